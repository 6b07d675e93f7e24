"""Step times that vary as much as those measured, drawn with a seed (docs/profiles.md, *Variation*)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from math import log
from statistics import NormalDist, median
from typing import TypeAlias

import numpy as np

from semipd.core import Allocation, FloatArray, Mode, Phase
from semipd.profile import Profile

BLOCK = 4096
MODES = {mode.value for mode in (Mode.SPLIT, Mode.CAPPED, Mode.PRIORITY)}
P90 = NormalDist().inv_cdf(0.9)

Spread: TypeAlias = "tuple[float, float]"
"""Logarithms of p10 / median and p90 / median."""

NONE: Spread = (0.0, 0.0)


class Variation:
    """Factors to multiply step times with.

    Each phase has a sequence of random numbers of its own, one for every step that it does in a replay: a step has the
    same one however runs are cut and however often it is priced anew (law 10). A factor has median 1, and p10 and
    p90 as measured: the median over all points of its phase on its partition, alone or at its allocation beside the
    other phase. Between these it is log-normal, with a width of its own on either side.
    """

    def __init__(self, profile: Profile, seed: int) -> None:
        self.seed = seed
        shared = [p for p in profile.hybrid.points if p.mode in MODES]
        hybrid = [(Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms), p) for p in shared]
        mixed = profile.mixed.points if profile.mixed else ()
        self._alone = {
            Phase.PREFILL: _spreads((p.sms, p.p10_ms, p.median_ms, p.p90_ms) for p in profile.prefill.points),
            Phase.DECODE: _spreads((p.sms, p.p10_ms, p.median_ms, p.p90_ms) for p in profile.decode.points),
            Phase.MIXED: _spreads((profile.device_sms, p.p10_ms, p.median_ms, p.p90_ms) for p in mixed),
        }
        self._beside = {
            Phase.PREFILL: _spreads((at, p.prefill_p10_ms, p.prefill_median_ms, p.prefill_p90_ms) for at, p in hybrid),
            Phase.DECODE: _spreads((at, p.decode_p10_ms, p.decode_median_ms, p.decode_p90_ms) for at, p in hybrid),
        }
        self._blocks: dict[Phase, tuple[int, FloatArray]] = {}  # the last one of each phase

    def factors(self, phase: Phase, at: Allocation, beside: bool, first: int, steps: int) -> FloatArray:
        """Of so many steps, ``first`` being how many the phase has done before in this replay."""
        low, high = self._beside[phase].get(at, NONE) if beside else self._alone[phase].get(at.sms(phase), NONE)
        z = self._normal(phase, first, steps)
        return np.exp(np.where(z < 0, -low, high) / P90 * z)

    def _normal(self, phase: Phase, first: int, steps: int) -> FloatArray:
        """Numbers ``first`` and so on of the phase's sequence."""
        parts = []
        while steps > 0:
            number, start = divmod(first, BLOCK)
            part = self._block(phase, number)[start : start + steps]
            parts.append(part)
            first, steps = first + len(part), steps - len(part)
        return np.concatenate(parts)

    def _block(self, phase: Phase, number: int) -> FloatArray:
        held = self._blocks.get(phase)
        if held is None or held[0] != number:
            key = self.seed, list(Phase).index(phase), number
            held = self._blocks[phase] = number, np.random.default_rng(key).standard_normal(BLOCK)
        return held[1]


def _spreads(points: Iterable[tuple[Hashable, float, float, float]]) -> dict[Hashable, Spread]:
    """The spread at each place, of points given as place, p10, median and p90."""
    found: dict[Hashable, list[Spread]] = {}
    for place, p10, middle, p90 in points:
        found.setdefault(place, []).append((log(p10 / middle), log(p90 / middle)))
    return {place: (median(low for low, _ in of), median(high for _, high in of)) for place, of in found.items()}
