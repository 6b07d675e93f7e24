"""Rectangular grids of measured values, and what lies between them (docs/profiles.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from semipd._steps import Axis
from semipd.core import FloatArray, InputError

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
        first = ", ".join(f"{name} {x}" for name, x in zip(names, missing[0], strict=True))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{where}: no point at {first}{more}; expected every combination of {' and '.join(names)}")
    return values


@dataclass(frozen=True, slots=True)
class Knots:
    """One variable of a *sparse grid*: its values, ascending, and which of them are *basic*.

    Measured is every combination of basic values, and every other value of a variable with all basic values of the
    others (Zenger, Sparse Grids, 1991; Gerstner and Griebel, Dimension-Adaptive Tensor-Product Quadrature, 2003).
    """

    values: tuple[int, ...]
    basic: npt.NDArray[np.bool_]


def sparse_values(places: Iterable[tuple[int, ...]], names: Sequence[str], where: str) -> list[Knots]:
    """The variables of a sparse grid. Basic are the ends, and the values at which most was measured.

    In a full rectangle that is all of them.

    Raises InputError unless values are positive and what is measured at all of them is a sparse grid, at least.
    """
    found = set(places)
    knots, basics = [], []
    for i, name in enumerate(names):
        values, counts = np.unique([place[i] for place in found], return_counts=True)
        if values[0] < 1:
            raise InputError(f"{where}: {name}: found {values[0]}; expected one or more")
        basic = counts == counts.max()
        basic[[0, -1]] = True  # beyond them nothing is known
        knots.append(Knots(tuple(values.tolist()), basic))
        basics.append(values[basic].tolist())
    missing = [place for place in itertools.product(*basics) if place not in found]
    for i, of in enumerate(knots):
        for value in np.array(of.values)[~of.basic].tolist():
            others = itertools.product(*basics[:i], [value], *basics[i + 1 :])
            missing += [place for place in others if place not in found]
    if missing:
        first = ", ".join(f"{name} {x}" for name, x in zip(names, missing[0], strict=True))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(
            f"{where}: no point at {first}{more}; expected every combination of {' and '.join(names)}, or a sparse grid"
        )
    return knots


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
