"""Rectangular grids of measured values, and what lies between them (docs/profiles.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from semipd._steps import Axis
from semipd.core import FloatArray, InputError

Place = TypeVar("Place", bound=tuple[int, ...])

FLOORS: Mapping[str, float] = {"tokens": 16, "mean_context": 64, "batch": 8, "kv_tokens": 512}
"""Work below which a step takes no less time to speak of, since kernels compute whole tiles (docs/profiles.md)."""


def axis(name: str, values: Sequence[float], *, log: bool = False, offset: float = 0.0, high: float = 0.0) -> Axis:
    """The measured values of one variable of a grid, ascending.

    ``log``: weights are linear in the logarithm of a number and ``offset``. Beyond the last value is outside the grid.
    So is below the first, unless the first is at most the variable's floor, below which nothing gets cheaper. ``high``:
    up to where the last value still holds, if farther than itself.
    """
    low = 0.0 if values[0] <= FLOORS.get(name, 0) else values[0]
    return Axis(values, low, max(values[-1], high), log, offset)


def axis_values(places: Iterable[tuple[int, ...]], names: Sequence[str], where: str) -> list[list[int]]:
    """Values of each variable. Raises InputError unless they are positive and every combination is a place."""
    found = set(places)
    values = [sorted({place[i] for place in found}) for i in range(len(names))]
    for name, measured in zip(names, values, strict=True):
        if measured[0] < 1:
            raise InputError(f"{where}: {name}: found {measured[0]}; expected one or more")
    missing = [place for place in itertools.product(*values) if place not in found]
    if missing:
        raise _lacks(missing, names, where)
    return values


def _lacks(missing: Sequence[tuple[int, ...]], names: Sequence[str], where: str, otherwise: str = "") -> InputError:
    first = ", ".join(f"{name} {x}" for name, x in zip(names, missing[0], strict=True))
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    every = " and ".join(names)
    return InputError(f"{where}: no point at {first}{more}; expected every combination of {every}{otherwise}")


@dataclass(frozen=True, slots=True)
class Knots:
    """One variable of a *sparse grid*: its values, ascending, and which of them are *basic*.

    Measured is every combination of basic values, and every other value of a variable with all basic values of the
    others (Zenger, Sparse Grids, 1991; Gerstner and Griebel, Dimension-Adaptive Tensor-Product Quadrature, 2003).
    """

    values: tuple[int, ...]
    basic: npt.NDArray[np.bool_]


def sparse_values(places: Iterable[tuple[int, ...]], names: Sequence[str], where: str) -> Sequence[Knots]:
    """The variables of a sparse grid, of which more may have been measured.

    Basic are the ends, since beyond them nothing is known, and as many other values as make it one; those with the
    fewest points come last. Of a combination of values that are not basic, all must have been measured, with the
    basic values of the other variables, or nothing: what else is missing was lost.

    Raises InputError unless values are positive and what is measured at them is such a grid.
    """
    found = frozenset(places)
    for name, of in zip(names, zip(*found, strict=True), strict=True):
        if min(of) < 1:
            raise InputError(f"{where}: {name}: found {min(of)}; expected one or more")
    knots, lost = _sparse(found)
    if lost:
        raise _lacks(lost, names, where, ", or a sparse grid")
    return knots


def lacking(places: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """What has to be measured besides, for these places to be a sparse grid; nothing if they are, or are none."""
    found = set(places)
    added: set[tuple[int, ...]] = set()
    while found and (lost := _sparse(frozenset(found | added))[1]):
        added |= set(lost)
    return added


@lru_cache(maxsize=16)  # ways of sharing mostly have the same places
def _sparse(found: frozenset[tuple[int, ...]]) -> tuple[tuple[Knots, ...], tuple[tuple[int, ...], ...]]:
    """The variables of these places as those of a sparse grid, and what it lacks: as little as possible."""
    values = [sorted(set(of)) for of in zip(*found, strict=True)]
    known = ~np.isnan(arranged(dict.fromkeys(found, 0.0), values))
    counts = [known.sum(axis=tuple(j for j in range(known.ndim) if j != i)) for i in range(known.ndim)]
    shares = [of / of.max() for of in counts]
    best: tuple[tuple[Knots, ...], tuple[tuple[int, ...], ...]] | None = None
    for least in (0.0, *sorted({float(share) for of in shares for share in of[1:-1]})):
        basic = [of > least for of in shares]
        for of in basic:
            of[[0, -1]] = True
        knots = tuple([Knots(tuple(of), each) for of, each in zip(values, basic, strict=True)])
        holes = _holes(known, knots)
        if best is None or len(holes) < len(best[1]):
            lost = tuple([tuple(of[i] for of, i in zip(values, hole, strict=True)) for hole in holes])
            best = knots, lost
        if not holes:
            break
    if best is None:
        raise ValueError("no place is given")
    return best


def _holes(known: npt.NDArray[np.bool_], knots: Sequence[Knots]) -> list[tuple[int, ...]]:
    """Indices at which a sparse grid of these variables lacks a point."""
    found: list[tuple[int, ...]] = []
    whole: dict[tuple[int, ...], npt.NDArray[np.bool_]] = {}
    for count in range(len(knots) + 1):
        for off in itertools.combinations(range(len(knots)), count):
            along = [np.flatnonzero(~of.basic if i in off else of.basic) for i, of in enumerate(knots)]
            block = known[np.ix_(*along)]
            others = tuple(i for i in range(len(knots)) if i not in off)
            complete, some = np.asarray(block.all(axis=others)), np.asarray(block.any(axis=others))
            wanted = np.ones_like(some) if count < 2 else some
            if count > 2:  # what all parts of it were measured for
                parts = [np.expand_dims(whole[tuple(j for j in off if j != i)], off.index(i)) for i in off]
                wanted = some | np.logical_and.reduce(np.broadcast_arrays(*parts))
            whole[off] = complete
            lost = np.argwhere(~block & np.expand_dims(wanted, others))
            found += [tuple(int(of[i]) for of, i in zip(along, at, strict=True)) for at in lost]
    return found


def arranged(measured: Mapping[Place, float], values: Sequence[Sequence[int]]) -> FloatArray:
    """What was measured at places, with an axis for each variable's values; NaN where nothing was."""
    found: FloatArray = np.full([len(of) for of in values], np.nan)
    index = [{value: i for i, value in enumerate(of)} for of in values]
    for place, number in measured.items():
        found[tuple(at[value] for at, value in zip(index, place, strict=True))] = number
    return found


def completed(values: FloatArray, knots: Sequence[Knots], along: Sequence[FloatArray]) -> FloatArray:
    """A sparse grid's values everywhere: what was not measured is what the variables do one by one, added up.

    Where some variables are not at basic values, what lies between the basic ones in all of them is corrected by what
    each of them does alone, then by what each pair does, so far as measured: the hierarchical surplus of all of them
    together is taken to be zero (Bungartz and Griebel, Sparse Grids, Acta Numerica 13, 2004). The result stays between
    the least and the most that was measured.

    Args:
        values: With an axis for each variable; NaN where nothing was measured.
        knots: The variables.
        along: Where their values lie on a scale that is straight between two of them.
    """
    found: FloatArray = values.copy()
    between = []  # of each variable: the weights of its basic values at all of them
    for of, at in zip(knots, along, strict=True):
        unit = np.eye(int(of.basic.sum()))
        between.append(np.array([np.interp(at, at[of.basic], row) for row in unit]).T)
    axes = range(len(knots))
    for count in range(2, len(knots) + 1):
        for off in itertools.combinations(axes, count):
            block = np.ix_(*(~of.basic if i in off else of.basic for i, of in enumerate(knots)))
            if found[block].size == 0 or not np.isnan(found[block]).any():
                continue
            expected = np.zeros_like(found[block])
            for size in range(1, count + 1):
                for straight in itertools.combinations(off, size):
                    exact = {*off} - {*straight}
                    part = found[np.ix_(*(~of.basic if i in exact else of.basic for i, of in enumerate(knots)))]
                    for i in straight:
                        weights = between[i][~knots[i].basic]
                        part = np.moveaxis(np.tensordot(weights, part, axes=(1, i)), 0, i)
                    expected += (-1) ** (size + 1) * part
            found[block] = np.where(np.isnan(found[block]), expected, found[block])
    return np.where(np.isnan(values), np.clip(found, np.nanmin(values), np.nanmax(values)), values)
