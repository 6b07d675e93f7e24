"""How far tables are off at batches between their points, as a smooth function of where these lie: kriging.

What is off is taken for a draw of a Gaussian process of mean zero (Rasmussen and Williams, Gaussian Processes for
Machine Learning, 2006, equation 2.23), which at points of the tables is zero and at other measured batches what was
seen there, but for noise. Its covariance is a product over the variables, of a constant and one that falls with the
distance (Matern, nu = 3/2; equation 4.17): so what a variable does alone is found from fewer points than what several
do together. The numbers below are in docs/adr/0009-contention-is-learnt-from-ragged-batches.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semipd.core import Allocation, FloatArray, IntArray

LENGTHS = (0.45, 1.4, 0.7, 0.9)
"""Over which tokens, mean context, batch and KV tokens stay alike, as shares of the ranges of their logarithms."""

SMS_LENGTH = 2.0
"""Octaves of prefill's SMs over which ways of sharing stay alike."""

OTHER_MODE = 0.5
"""How alike two modes are at the same SMs."""

SPREAD = 0.15
"""Standard deviation of what logarithms of speeds are off between points."""

NOISE = 0.02
"""Of the logarithm of a ragged batch's speed: what it is off for reasons that it does not share with its neighbours."""

MOST = 0.6
"""Of a logarithm: a batch that is off by more was disturbed when it was measured, and counts as off by so much."""

DECIMALS = 6
"""Of a correction: the last bits of linear algebra depend on the processor and on how many threads there are."""

EXACT = 1e-6
"""In place of ``NOISE``, squared, at points of the tables: keeps the equations solvable."""


@dataclass(frozen=True)
class Units:
    """From places, numbers of some variables, to where they lie between the ends of these: 0 to 1.

    ``low``, ``high``: the ends; ``offset``: what is added before logarithms are taken, shape [variables] each.
    """

    low: FloatArray
    high: FloatArray
    offset: FloatArray

    @staticmethod
    def of(values: Sequence[Sequence[float]], offsets: Sequence[float]) -> Units:
        """From the least to the most of each variable's values."""
        low, high = (np.array([pick(of) for of in values], np.float64) for pick in (min, max))
        return Units(low, high, np.array(offsets, np.float64))

    def at(self, places: FloatArray) -> FloatArray:
        """Of places, shape [n, variables]; what is beyond an end is at it. A variable without a range is at 0."""
        low, high = np.log2(self.low + self.offset), np.log2(self.high + self.offset)
        clipped = np.clip(places, self.low, self.high)
        found: FloatArray = (np.log2(clipped + self.offset) - low) / np.where(high > low, high - low, 1.0)
        return found

    def along(self, variable: int, values: Sequence[float]) -> FloatArray:
        """Of values of one variable, shape [n]."""
        places = np.tile(self.low, (len(values), 1))
        places[:, variable] = values
        return self.at(places)[:, variable]


@dataclass(frozen=True)
class Seen:
    """In one way of sharing, where nothing is off, where it was seen how much is, and how much, shape [n].

    Places are in units, shape [places, variables].
    """

    at: Allocation
    exact: FloatArray
    places: FloatArray
    off: FloatArray


@dataclass(frozen=True)
class Correction:
    """What is most likely off, in every way of sharing, no more than the most that was seen.

    ``ways``, and by their index ``way`` with ``places``, where something is known, shape [n] and [n, variables];
    ``weights``: of it, shape [n].
    """

    ways: tuple[Allocation, ...]
    way: IntArray
    places: FloatArray
    weights: FloatArray
    least: float
    most: float

    @staticmethod
    def of(seen: Sequence[Seen]) -> Correction:
        """From all ways together: what one is off, others are expected to be, too, the more alike they are."""
        ways = tuple(each.at for each in seen)
        way = np.repeat(np.arange(len(seen)), [len(each.exact) + len(each.places) for each in seen])
        places = np.concatenate([part for each in seen for part in (each.exact, each.places)])
        parts = [(np.zeros(len(each.exact)), np.clip(each.off, -MOST, MOST)) for each in seen]
        off = np.concatenate([part for both in parts for part in both])
        noise = [np.full(len(part), of) for both in parts for part, of in zip(both, (EXACT, NOISE**2), strict=True)]
        alike = _alike(places, places) * _ways_alike(ways, ways)[np.ix_(way, way)]
        weights = np.linalg.solve(SPREAD**2 * alike + np.diag(np.concatenate(noise)), off)
        return Correction(ways, way, places, weights, float(off.min()), float(off.max()))

    def at_all(self, way: Allocation, nodes: Sequence[FloatArray]) -> FloatArray:
        """In one way, at every combination of values of each variable, in units."""
        weights = SPREAD**2 * self.weights * _ways_alike((way,), self.ways)[0][self.way]
        along = [_alike_along(i, of, self.places[:, i]) for i, of in enumerate(nodes)]
        half = len(along) // 2
        first, second = (_combined(some, len(self.places)) for some in (along[:half], along[half:]))
        found = ((first * weights) @ second.T).reshape([len(of) for of in nodes])
        clipped: FloatArray = np.clip(found, min(0.0, self.least), max(0.0, self.most)).round(DECIMALS)
        return clipped


def uncertainty(places: FloatArray, known: FloatArray) -> FloatArray:
    """Of what is off at places, in units, the share of its variance that is left once others are known, shape [n]."""
    if not len(known):
        return np.ones(len(places))
    covariance = _alike(known, known) + np.diag(np.full(len(known), (NOISE / SPREAD) ** 2))
    across = _alike(known, places)
    left: FloatArray = 1 - np.einsum("kp,kp->p", across, np.linalg.solve(covariance, across))
    return left


def _alike_along(variable: int, a: FloatArray, b: FloatArray) -> FloatArray:
    """Correlation by one variable, shape [a, b]."""
    apart = np.sqrt(3) * np.abs(a[:, None] - b[None, :]) / LENGTHS[variable]
    found: FloatArray = (1 + (1 + apart) * np.exp(-apart)) / 2
    return found


def _alike(a: FloatArray, b: FloatArray) -> FloatArray:
    """Correlation of places, shape [a, b]."""
    found: FloatArray = np.prod([_alike_along(i, a[:, i], b[:, i]) for i in range(a.shape[1])], axis=0)
    return found


def _ways_alike(a: Sequence[Allocation], b: Sequence[Allocation]) -> FloatArray:
    """Correlation of ways of sharing, by prefill's SMs and by the mode, shape [a, b]."""
    apart = np.sqrt(3) * np.abs(np.log2([[x.prefill_sms / y.prefill_sms for y in b] for x in a])) / SMS_LENGTH
    same = np.array([[1.0 if x.mode is y.mode else OTHER_MODE for y in b] for x in a])
    found: FloatArray = (1 + apart) * np.exp(-apart) * same
    return found


def _combined(along: Sequence[FloatArray], places: int) -> FloatArray:
    """Products at all combinations of the values of some variables, shape [combinations, places]."""
    found = np.ones((1, places))
    for of in along:
        found = (found[:, None, :] * of[None, :, :]).reshape(-1, places)
    return found
