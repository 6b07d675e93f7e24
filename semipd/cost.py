"""What a step costs: the interface that the simulator and the policies price work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from semipd.core import Allocation, DecodeShape, FloatArray, IntArray, Mode, PrefillShape


class CostModel(Protocol):
    """Step times from measurements.

    A prefill step is one layer of a batch; a decode step is one token of every sequence, all layers.
    """

    device_sms: int
    layers: int

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """The measured disjoint splits, by ascending prefill SMs."""
        ...

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one layer on ``at``'s prefill partition, alone or beside a decode batch.

        The flag says whether the look-up fell outside the measured grid (and was clamped to its edge).
        Raises KeyError for a partition that was not measured.
        """
        ...

    def decode_s(
        self, batch: int, kv_tokens: IntArray, at: Allocation, beside: PrefillShape | None
    ) -> tuple[FloatArray, int]:
        """Seconds of each decode step, for a batch that reads ``kv_tokens[i]`` cached tokens in step i.

        The count says how many of the look-ups fell outside the measured grid. Raises KeyError likewise.
        """
        ...


@dataclass(frozen=True)
class ConstantCost:
    """A cost model with fixed step times, for tests and closed forms; nothing contends, nothing is outside."""

    prefill_layer_s: float
    decode_step_s: float
    layers: int = 1
    device_sms: int = 132
    granularity_sms: int = 8

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """Every disjoint split in multiples of ``granularity_sms``."""
        steps = range(self.granularity_sms, self.device_sms, self.granularity_sms)
        return tuple(Allocation(Mode.SPLIT, n, self.device_sms - n) for n in steps)

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """``prefill_layer_s``, whatever the shape."""
        del shape, at, beside
        return self.prefill_layer_s, False

    def decode_s(
        self, batch: int, kv_tokens: IntArray, at: Allocation, beside: PrefillShape | None
    ) -> tuple[FloatArray, int]:
        """``decode_step_s`` for every step."""
        del batch, at, beside
        return np.full(len(kv_tokens), self.decode_step_s), 0
