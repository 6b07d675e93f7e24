"""What a step costs: the interface that the simulator and the policies price work with.

``table_cost`` has the model that interpolates measured tables. Here are one with fixed step times, and one that errs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from semipd.core import Allocation, DecodeShape, FloatArray, Mode, PrefillShape


class CostModel(Protocol):
    """Step times from measurements. Like ``Policy``, not to be inherited from.

    A prefill step is one layer of a batch; a decode step is one token of every sequence, all layers, and so is a fused
    step.
    """

    @property
    def device_sms(self) -> int:
        """SMs of the whole device."""
        ...

    @property
    def layers(self) -> int:
        """Layers of the model: so many prefill steps take a batch through it."""
        ...

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """Every measured way of running both phases at once, each mode by ascending prefill SMs.

        The one of mode ``MIXED`` has the most prompt tokens that were measured in a fused batch; fewer may be chosen.
        """
        ...

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """Those of them that are disjoint splits."""
        ...

    @property
    def refused(self) -> Mapping[Mode, str]:
        """Modes that cannot be priced, and what is missing."""
        ...

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one layer on ``at``'s prefill partition, alone or beside a decode batch.

        The flag says whether the look-up fell outside the measured grid (and was clamped to its edge, but for dealing).
        Raises KeyError for a partition that was not measured.
        """
        ...

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """Seconds of each of so many decode steps, the first of that shape; each reads ``batch`` tokens more.

        The count says how many of the look-ups fell outside the measured grid. Raises KeyError likewise.
        """
        ...

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one fused step on the whole device: all layers of prompt pieces and, if any, of a decode batch.

        The flag is that of ``prefill_s``. Raises KeyError when no fused batch was measured.
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
    chunk_tokens: int = 8192

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """Every disjoint split in multiples of ``granularity_sms``."""
        return tuple(Allocation(Mode.SPLIT, n, self.device_sms - n) for n in self._sizes)

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """The splits, as many capped ones, priority, and fused batches of up to ``chunk_tokens``."""
        whole = self.device_sms
        capped = tuple(Allocation(Mode.CAPPED, n, whole) for n in self._sizes)
        together = Allocation(Mode.PRIORITY, whole, whole), Allocation(Mode.MIXED, whole, whole, self.chunk_tokens)
        return (*self.splits, *capped, *together)

    @property
    def refused(self) -> Mapping[Mode, str]:
        """None."""
        return {}

    @property
    def _sizes(self) -> range:
        return range(self.granularity_sms, self.device_sms, self.granularity_sms)

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """``prefill_layer_s``, whatever the shape."""
        del shape, at, beside
        return self.prefill_layer_s, False

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """``decode_step_s`` for every step."""
        del shape, at, beside
        return np.full(steps, self.decode_step_s), 0

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """The layers of a prefill batch and a decode step, one after the other."""
        del chunk
        return self.layers * self.prefill_layer_s + (0.0 if decode is None else self.decode_step_s), False


class Misjudged:
    """Another cost model seen by a predictor that errs: for policies that shall not know what the simulation knows.

    At each allocation all times of a phase are off by one factor exp(error * z), z standard normal, drawn with
    ``seed``: as by tables measured on another day, whose points err together. Instances can be pickled.
    """

    def __init__(self, cost: CostModel, error: float, seed: int = 0) -> None:
        self._cost, self._error, self._seed = cost, error, seed
        self.device_sms, self.layers = cost.device_sms, cost.layers
        self.splits, self.allocations, self.refused = cost.splits, cost.allocations, cost.refused
        self._factors: dict[tuple[int, Allocation], float] = {}

    def __reduce__(self) -> tuple[type[Misjudged], tuple[CostModel, float, int]]:
        return Misjudged, (self._cost, self._error, self._seed)

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """See ``CostModel.prefill_s``."""
        seconds, outside = self._cost.prefill_s(shape, at, beside)
        return seconds * self._factor(0, at), outside

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """See ``CostModel.decode_s``."""
        seconds, outside = self._cost.decode_s(shape, at, beside, steps)
        return seconds * self._factor(1, at), outside

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """See ``CostModel.mixed_s``."""
        seconds, outside = self._cost.mixed_s(chunk, decode)
        return seconds * self._factor(2, Allocation(Mode.MIXED, self.device_sms, self.device_sms)), outside

    def _factor(self, phase: int, at: Allocation) -> float:
        found = self._factors.get((phase, at))
        if found is None:
            drawn = np.random.default_rng([self._seed, phase, at.prefill_sms, at.decode_sms]).standard_normal()
            found = self._factors[phase, at] = float(np.exp(self._error * drawn))
        return found
