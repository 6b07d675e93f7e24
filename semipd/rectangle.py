"""Rectangles of measured places with a spine, and where one more value on an axis would help most."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Place = tuple[int, ...]

SPINE = -1
"""Stands for the first axis where only the spine gets a value."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A value that an axis, or the spine, could get, and the one place at which to try what it would bring."""

    axis: int
    value: int
    place: Place


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Every combination of the values of some variables: ``names[i]`` takes ``values[i]``, ascending.

    ``spine``: more values of the first variable, between the ends of its values; the others have their least there.
    ``more``: other values of each variable, at which the others have all of ``values``; with any, it is a sparse grid
    (``semipd.grid.sparse_values``). ``sparse``: whether a new value goes there if it is between the ends of ``values``.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    spine: tuple[int, ...] = ()
    more: tuple[tuple[int, ...], ...] = ()
    sparse: bool = False

    def places(self) -> list[Place]:
        """All of them: the spine, then the combinations in row-major order, then those with one value of ``more``."""
        found = [place for value in self.spine for place in self.knot(SPINE, value)]
        found += itertools.product(*self.values)
        return found + [place for i, more in enumerate(self.more) for value in more for place in self.knot(i, value)]

    def along(self, axis: int) -> tuple[int, ...]:
        """All values of a variable, ascending."""
        return tuple(sorted((*self.values[axis], *(self.more[axis] if self.more else ()))))

    def knot(self, axis: int, value: int) -> list[Place]:
        """The places that another value on an axis adds."""
        if axis == SPINE:
            return [(value, *(least for least, *_ in self.values[1:]))]
        places = itertools.product(*self.values[:axis], (value,), *self.values[axis + 1 :])
        known = {place for found in self.spine for place in self.knot(SPINE, found)}
        return [place for place in places if place not in known]

    def with_knot(self, axis: int, value: int) -> Rectangle:
        """With these places."""
        if axis == SPINE:
            return self if value in self.values[0] else replace(self, spine=tuple(sorted({*self.spine, value})))
        if self.sparse and self.values[axis][0] < value < self.values[axis][-1]:
            found = tuple(self.more[i] if self.more else () for i in range(len(self.values)))
            added = found[axis] if value in self.values[axis] else tuple(sorted({*found[axis], value}))
            return replace(self, more=(*found[:axis], added, *found[axis + 1 :]))
        added = tuple(sorted({*self.values[axis], value}))
        values = (*self.values[:axis], added, *self.values[axis + 1 :])
        return replace(self, values=values, spine=tuple(x for x in self.spine if x not in values[0]))

    def probes(self, snap: Callable[[str, float], int]) -> list[Probe]:
        """One between every two neighbours on every axis, in the middle of the other axes; on a spine at their least.

        It lies at the geometric mean of the two, moved by ``snap`` to a value that the variable can have; there is none
        where that is one of the two.
        """
        middle = tuple(axis[len(axis) // 2] for axis in self.values)
        least = tuple(axis[0] for axis in self.values)
        along = [(axis, self.along(axis), middle) for axis in range(len(self.values))]
        if self.spine:
            along.append((SPINE, tuple(sorted((*self.spine, *self.values[0]))), least))
        known = set(self.places())
        found = []
        for axis, values, elsewhere in along:
            varied = max(axis, 0)
            for low, high in itertools.pairwise(values):
                value = snap(self.names[varied], float(np.sqrt(max(low, 1) * high)))
                if low < value < high:
                    place = (*elsewhere[:varied], value, *elsewhere[varied + 1 :])
                    found += [Probe(axis, value, place)] if place not in known else []
        return found
