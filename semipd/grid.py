"""Rectangular grids of measured values, and what lies between them (docs/profiles.md)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from semipd._steps import Axis
from semipd.core import InputError

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
