"""Percentiles of many values, each of which may occur often, as numpy would give them (docs/metrics.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from semipd.core import FloatArray, IntArray

BINS = 2**16
PERCENTILES = (50, 90, 95, 99)

Counted: TypeAlias = tuple[FloatArray, IntArray]
"""Values, and how often each occurs."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, percentiles (linear between order statistics, as numpy's default) and maximum, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @staticmethod
    def of(values: FloatArray, counts: IntArray | None = None) -> Distribution | None:
        """Of values that occur ``counts`` times each (at least once; None: once). None without any."""
        if counts is not None:
            return Distribution.of_parts(lambda: [(values, counts)])
        if not len(values):
            return None
        ordered = np.sort(values)
        return _distribution(float(values.mean()), ordered, np.arange(1, len(values) + 1), len(values))

    @staticmethod
    def of_parts(parts: Callable[[], Iterable[Counted]]) -> Distribution | None:
        """Likewise, of values in parts, which are gone through three times and only sorted around the percentiles.

        Raises ValueError for a value below 0.
        """
        # not values @ counts: BLAS rounds by its number of threads, and equal replays must give equal bytes
        looks = [(v.min(), v.max(), (v * n).sum(), n.sum()) for v, n in parts() if len(v)]
        if not looks:
            return None
        lows, highs, sums, numbers = zip(*looks, strict=True)
        low, high, n = float(min(lows)), float(max(highs)), int(sum(numbers))
        if low < 0:
            raise ValueError(f"found {low}; expected no value below 0")
        bins = _binning(low, high)
        held = np.zeros(BINS, dtype=np.int64)
        for values, counts in parts():
            held += np.bincount(bins(values), counts, BINS).astype(np.int64)
        wanted = np.zeros(BINS, dtype=np.bool_)
        ranks = [rank for q in PERCENTILES for rank in _ranks(q, n)[:2]]
        wanted[np.searchsorted(np.cumsum(held), [*ranks, n - 1], side="right")] = True
        few = [(v[chosen], c[chosen]) for v, c in parts() for chosen in [wanted[bins(v)]]]
        values, counts = (np.concatenate(column) for column in zip(*few, strict=True))
        order = np.argsort(values)
        left_out = np.cumsum(np.where(wanted, 0, held))  # up to each bin
        reached = np.cumsum(counts[order]) + left_out[bins(values[order])]
        return _distribution(math.fsum(sums) / n, values[order], reached, n)


def _distribution(mean: float, ordered: FloatArray, reached: IntArray, n: int) -> Distribution:
    """Of n values: the greatest and those around the percentiles, ascending, and how many are up to each of these."""

    def percentile(q: float) -> float:
        below, above, t = _ranks(q, n)
        i, j = np.searchsorted(reached, (below, above), side="right")
        low, high = float(ordered[i]), float(ordered[j])
        # numpy's two ways to interpolate, to agree with it to the last bit
        return low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t)

    p50, p90, p95, p99 = map(percentile, PERCENTILES)
    return Distribution(mean, p50, p90, p95, p99, float(ordered[-1]))


def _ranks(q: float, n: int) -> tuple[int, int, float]:
    """Between which two of n ascending values a percentile is, counted from 0, and how far."""
    place = q / 100 * (n - 1)
    below = math.floor(place)
    return below, min(below + 1, n - 1), place - below


def _binning(low: float, high: float) -> Callable[[FloatArray], IntArray]:
    """Puts values from low (at least 0) to high into bins in their order, which is that of their bits."""
    first, last = np.array([low, high]).view(np.int64).tolist()
    shift = max(0, (last - first).bit_length() - (BINS - 1).bit_length())
    return lambda values: (values.view(np.int64) - first) >> shift
