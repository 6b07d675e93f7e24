"""A cost model in closed forms: the truth that a simulated profile is held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np
from synthetic_profile import decode_ms, decode_slowdown, prefill_ms, prefill_slowdown

from semipd.contention import NO_SCALES, Scales
from semipd.core import Allocation, DecodeShape, FloatArray, Mode, PrefillShape


@dataclass(frozen=True)
class ClosedFormCost:
    """The closed forms of ``synthetic_profile``; a fused step is 10 % shorter than its parts one after the other.

    ``stair_tokens``: prefill time steps up at every multiple of so many tokens beyond ``stair_from``; 0 for none.
    ``scales``: from where on slowdowns follow the logarithms of contexts.
    """

    device_sms: int = 32
    layers: int = 4
    stair_tokens: int = 0
    scales: Scales = NO_SCALES

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        whole = self.device_sms
        capped = [Allocation(Mode.CAPPED, n, whole) for n in (8, 16, 24)]
        return (
            *self.splits,
            *capped,
            Allocation(Mode.PRIORITY, whole, whole),
            Allocation(Mode.MIXED, whole, whole, 8192),
        )

    @property
    def splits(self) -> tuple[Allocation, ...]:
        return tuple(Allocation(Mode.SPLIT, n, self.device_sms - n) for n in (8, 16, 24))

    @property
    def refused(self) -> Mapping[Mode, str]:
        return {}

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        tokens = shape.tokens
        if self.stair_tokens:
            tokens = ceil(tokens / self.stair_tokens) * self.stair_tokens
        alone_ms = prefill_ms(tokens, shape.mean_context, at.prefill_sms)
        if beside is not None:
            place = (shape.tokens, self._context(shape), beside.batch, beside.kv_tokens + self.scales.kv_tokens)
            alone_ms *= self._harder(at) * prefill_slowdown(*place)
        return alone_ms / 1e3, False

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        batch, first = shape.batch, shape.kv_tokens
        kv_tokens = range(first, first + batch * steps, batch)
        alone_ms = np.array([decode_ms(batch, kv, at.decode_sms, self.device_sms) for kv in kv_tokens])
        if beside is not None:
            place = (beside.tokens, self._context(beside), batch)
            slowdown = [decode_slowdown(*place, kv + self.scales.kv_tokens) for kv in kv_tokens]
            alone_ms *= self._harder(at) * np.array(slowdown)
        return alone_ms * self.layers / 1e3, 0

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        whole = Allocation(Mode.EXCLUSIVE, self.device_sms, self.device_sms)
        seconds = self.prefill_s(chunk, whole, None)[0] * self.layers
        if decode is not None:
            seconds += float(self.decode_s(decode, whole, None)[0][0])
        return 0.9 * seconds, False

    def _context(self, shape: PrefillShape) -> float:
        return max(shape.mean_context, 1) + self.scales.mean_context

    def _harder(self, at: Allocation) -> float:
        return 1.0 if at.mode is Mode.SPLIT else 1.2
