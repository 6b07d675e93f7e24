"""The measured split with the most prefill throughput that still decodes fast enough."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2

from semipd.core import Allocation, DecodeShape, Load, PrefillShape
from semipd.cost import CostModel
from semipd.policies.static import whole_device
from semipd.slo import Slo

GAIN = 1.05
"""A new split must have more than 1.05 times the prefill throughput of the one in force (hysteresis)."""

STEPS_PER_OCTAVE = 3
"""Loads are rounded up to the next 2 ** (k / 3): a replay then looks up 1,000 different ones, not 10,000 and more."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a split promises at one load."""

    split: Allocation
    prefill_tps: float
    decode_step_s: float


class Adaptive:
    """Looks both phases up in the cost model, each beside the other, at every measured split.

    Of the splits whose decode step meets the TPOT target it takes the one with the most prefill throughput
    (tokens a second through all layers), of equals the one with the fewest prefill SMs. When none meets it: the
    one with the shortest decode step. It keeps the last split while that meets the target and is within 5 % of
    the best throughput. The whole device while a phase is idle. The idea is MuxWise's (arXiv 2504.14489, section 3):
    decode gets as many SMs as its SLO needs beside this prefill, prefill the rest.

    Both loads are rounded up (``STEPS_PER_OCTAVE``): tokens, mean context, batch and KV tokens by under 26 % each,
    so predicted decode steps err on the safe side. A prefill batch is looked up as if it were one prompt.
    """

    name = "adaptive"

    def __init__(self, cost: CostModel, slo: Slo) -> None:
        self._cost = cost
        self._slo = slo
        self._outlooks = lru_cache(maxsize=None)(self._look_up)

    def decide(self, load: Load) -> Allocation:
        """The split for this load, or the whole device when a phase is idle."""
        prefill, decode = load.prefill, load.decode
        if prefill is None or decode is None:
            return whole_device(self._cost.device_sms)
        outlooks = self._outlooks(
            round_up(prefill.tokens), round_up(prefill.mean_context), round_up(decode.batch), round_up(decode.kv_tokens)
        )
        fast = [outlook for outlook in outlooks if outlook.decode_step_s <= self._slo.tpot_s]
        if not fast:
            return min(outlooks, key=lambda outlook: outlook.decode_step_s).split
        best = max(fast, key=lambda outlook: outlook.prefill_tps)
        for outlook in fast:
            if outlook.split == load.split and best.prefill_tps <= GAIN * outlook.prefill_tps:
                return outlook.split
        return best.split

    def _look_up(self, tokens: int, mean_context: int, batch: int, kv_tokens: int) -> tuple[Outlook, ...]:
        """Every measured split at one load, by ascending prefill SMs."""
        prefill, decode = PrefillShape(tokens, float(tokens * mean_context)), DecodeShape(batch, kv_tokens)
        return tuple(self._outlook(split, prefill, decode) for split in self._cost.splits)

    def _outlook(self, split: Allocation, prefill: PrefillShape, decode: DecodeShape) -> Outlook:
        layer_s, _ = self._cost.prefill_s(prefill, split, decode)
        step_s, _ = self._cost.decode_s(decode, split, prefill)
        return Outlook(split, prefill.tokens / (layer_s * self._cost.layers), float(step_s[0]))


def round_up(x: float) -> int:
    """The next of the whole numbers ceil(2 ** (k / STEPS_PER_OCTAVE)); at least 1."""
    if x <= 1:
        return 1
    return ceil(float(2 ** (ceil(log2(x) * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE)))
