"""Full rectangles of measured places, and where one more value on an axis would help most."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Place = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A value that an axis could get, and the one place at which to try what it would bring."""

    axis: int
    value: int
    place: Place


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Every combination of the values of some variables: ``names[i]`` takes ``values[i]``, ascending."""

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]

    def places(self) -> list[Place]:
        """All of them, in row-major order."""
        return list(itertools.product(*self.values))

    def knot(self, axis: int, value: int) -> list[Place]:
        """The places that another value on an axis adds."""
        return list(itertools.product(*self.values[:axis], (value,), *self.values[axis + 1 :]))

    def with_knot(self, axis: int, value: int) -> Rectangle:
        """With these places."""
        more = tuple(sorted({*self.values[axis], value}))
        return replace(self, values=(*self.values[:axis], more, *self.values[axis + 1 :]))

    def probes(self, snap: Callable[[str, float], int]) -> list[Probe]:
        """One between every two neighbours on every axis, in the middle of the other axes.

        It lies at the geometric mean of the two, moved by ``snap`` to a value that the variable can have; there is none
        where that is one of the two.
        """
        middle = tuple(axis[len(axis) // 2] for axis in self.values)
        found = []
        for axis, (name, values) in enumerate(zip(self.names, self.values, strict=True)):
            for low, high in itertools.pairwise(values):
                value = snap(name, float(np.sqrt(max(low, 1) * high)))
                if low < value < high:
                    found.append(Probe(axis, value, (*middle[:axis], value, *middle[axis + 1 :])))
        return found
