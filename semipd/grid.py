"""Rectangular grids of measured values, and what lies between them (docs/profiles.md)."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from math import log2
from operator import mul
from typing import Generic, TypeVar

import numpy as np

from semipd.core import FloatArray, InputError

FLOORS: Mapping[str, float] = {"tokens": 16, "mean_context": 64, "batch": 8, "kv_tokens": 512}
"""Work below which a step takes no less time to speak of, since kernels compute whole tiles (docs/profiles.md)."""

V = TypeVar("V", float, FloatArray)


class Axis:
    """The measured values of one variable of a grid, ascending, and how to place a number among them.

    ``log``: weights are linear in the number's logarithm. Beyond the last value is outside the grid. So is below the
    first, unless the first is at most the variable's floor, below which nothing gets cheaper. ``high``: up to where
    the last value still holds, if farther than itself.
    """

    def __init__(self, name: str, values: Sequence[float], *, log: bool = False, high: float = 0.0) -> None:
        self.name = name
        self.low = 0.0 if values[0] <= FLOORS.get(name, 0) else values[0]
        self.high = max(values[-1], high)
        self._values = tuple(values)
        self._last = len(values) - 1
        self._knots = tuple(log2(x) for x in values) if log else self._values
        self._log = log

    def __len__(self) -> int:
        return len(self._values)

    def place(self, x: float) -> tuple[int, tuple[float, ...], bool]:
        """Index of the first neighbour, the neighbours' weights, and whether x is outside (and clamped)."""
        values, last = self._values, self._last
        if last == 0:
            return 0, (1.0,), not self.low <= x <= self.high
        if x <= values[0]:
            return 0, (1.0, 0.0), x < self.low
        if x >= values[last]:
            return last - 1, (0.0, 1.0), x > self.high
        i = bisect_right(values, x) - 1
        low, high = self._knots[i], self._knots[i + 1]
        weight = ((log2(x) if self._log else x) - low) / (high - low)
        return i, (1 - weight, weight), False


class Grid(Generic[V]):
    """Multilinear interpolation between values on a rectangular grid: exact on it, clamped to its edge outside.

    ``values`` are numbers or equally long vectors, in row-major order of ``axes``.
    """

    def __init__(self, axes: Sequence[Axis], values: Sequence[V]) -> None:
        self.axes = tuple(axes)
        self.values: tuple[V, ...] = tuple(values)
        self._cells: dict[tuple[int, ...], Sequence[V]] = {}  # those looked at, by their first corner's indices

    def at(self, *place: float) -> tuple[V, bool]:
        """Value at a place, and whether the place is outside the grid."""
        first, weights, outside = [], [1.0], False
        for axis, x in zip(self.axes, place, strict=True):
            i, pair, out = axis.place(x)
            first.append(i)
            weights = [a * b for a in weights for b in pair]
            outside = outside or out
        key = tuple(first)
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = self._cell(key)
        return self._blend(weights, cell), outside

    def _cell(self, first: tuple[int, ...]) -> Sequence[V]:
        """Values at the corners of the cell that starts at these indices."""
        corners = [0]
        for axis, i in zip(self.axes, first, strict=True):
            corners = [corner * len(axis) + j for corner in corners for j in (i, i + 1) if j < len(axis)]
        return [self.values[corner] for corner in corners]

    def _blend(self, weights: Sequence[float], cell: Sequence[V]) -> V:
        blend: V = sum(map(mul, weights, cell))
        return blend


class VectorGrid(Grid[FloatArray]):
    """A grid of vectors: the same sums, in one go."""

    def _cell(self, first: tuple[int, ...]) -> Sequence[FloatArray]:
        return np.array(super()._cell(first))  # type: ignore[return-value]  # shape [corners, knots]

    def _blend(self, weights: Sequence[float], cell: Sequence[FloatArray]) -> FloatArray:
        blend: FloatArray = np.add.reduce(np.array(weights)[:, np.newaxis] * cell)
        return blend


def axis_values(places: Iterable[tuple[int, ...]], names: Sequence[str], where: str) -> list[list[int]]:
    """Values of each variable. Raises InputError unless they are positive and every combination is a place."""
    found = set(places)
    values = [sorted({place[i] for place in found}) for i in range(len(names))]
    for name, measured in zip(names, values, strict=True):
        if measured[0] < 1:
            raise InputError(f"{where}: {name}: found {measured[0]}; expected one or more")
    missing = [place for place in itertools.product(*values) if place not in found]
    if missing:
        first = ", ".join(f"{name} {x}" for name, x in zip(names, missing[0], strict=True))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{where}: no point at {first}{more}; expected every combination of {' and '.join(names)}")
    return values
