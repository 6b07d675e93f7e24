"""A roofline of a model on a device (Williams, Waterman, Patterson, CACM 52(4), 2009): a yardstick for tables.

A step takes as long as its arithmetic at the device's peak, or its bytes at the memory's, whichever is longer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from semipd.core import Allocation, DecodeShape, FloatArray, PrefillShape
from semipd.model_config import ModelConfig
from semipd.points import DecodePoint, PrefillPoint


@dataclass(frozen=True)
class RooflineCost:
    """A cost model of two numbers. SMs have equal shares of the arithmetic; half of them reach all of the bandwidth.

    Contention and launches are not in it.
    """

    model: ModelConfig
    device_sms: int
    flops_per_s: float
    bytes_per_s: float

    @property
    def layers(self) -> int:
        """Of the model."""
        return self.model.layers

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one layer, and its part of the logits; see ``CostModel.prefill_s``."""
        del beside
        flops = prefill_flops(self.model, shape) / self.layers
        return self._seconds(flops, self.model.weights_bytes / self.layers, at.prefill_sms), False

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """Seconds of each step; see ``CostModel.decode_s``."""
        del beside
        batch, first = shape.batch, shape.kv_tokens
        seconds = [
            self._seconds(
                decode_flops(self.model, DecodeShape(batch, kv_tokens)),
                self.model.weights_bytes + kv_tokens * self.model.kv_bytes_per_token,
                at.decode_sms,
            )
            for kv_tokens in range(first, first + batch * steps, batch)
        ]
        return np.array(seconds), 0

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of a fused step; see ``CostModel.mixed_s``."""
        flops, loaded = prefill_flops(self.model, chunk), float(self.model.weights_bytes)
        if decode is not None:
            flops += decode_flops(self.model, decode)
            loaded += decode.kv_tokens * self.model.kv_bytes_per_token
        return self._seconds(flops, loaded, self.device_sms), False

    def _seconds(self, flops: float, loaded: float, sms: int) -> float:
        share = sms / self.device_sms
        return max(flops / self.flops_per_s / share, loaded / self.bytes_per_s / min(1.0, 2 * share))


def _layer_parameters(model: ModelConfig) -> int:
    """Weights that every token is multiplied with, in all layers."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return model.parameters - embeddings


def prefill_flops(model: ModelConfig, shape: PrefillShape) -> float:
    """Operations of all layers of a prefill batch: two for each token and weight, four for each pair and channel."""
    attention = 4.0 * shape.pairs * model.query_heads * model.head_dim * model.layers
    return 2.0 * shape.tokens * _layer_parameters(model) + attention


def decode_flops(model: ModelConfig, shape: DecodeShape) -> float:
    """Operations of a decode step, logits included."""
    weights = _layer_parameters(model) + model.vocab_size * model.hidden_size
    return 2.0 * shape.batch * weights + 4.0 * shape.kv_tokens * model.query_heads * model.head_dim * model.layers


def fitted(
    model: ModelConfig, device_sms: int, prefill: Iterable[PrefillPoint], decode: Iterable[DecodePoint]
) -> RooflineCost:
    """The roofline whose peaks are the highest rates that measured points of the whole device reached."""
    flops = [
        prefill_flops(model, PrefillShape(p.tokens, float(p.tokens * p.mean_context))) / (p.median_ms * model.layers)
        for p in prefill
        if p.sms == device_sms
    ]
    rates = [
        (model.weights_bytes + d.kv_tokens * model.kv_bytes_per_token) / (d.median_ms * model.layers)
        for d in decode
        if d.sms == device_sms
    ]
    return RooflineCost(model, device_sms, max(flops) * 1e3, max(rates) * 1e3)
