"""Sparse grids: which places they have, and what lies between them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.core import FloatArray, InputError
from semipd.grid import Knots, completed, sparse_values

NAMES = ("a", "b", "c")
Variables = list[tuple[list[int], list[int]]]
"""Of each: basic values, and others between them."""


@st.composite
def variables(draw: st.DrawFn) -> Variables:
    found = []
    for _ in NAMES:
        values = sorted(draw(st.sets(st.integers(1, 1000), min_size=2, max_size=6)))
        more = sorted(draw(st.sets(st.sampled_from(values[1:-1]), max_size=3))) if len(values) > 2 else []
        found.append(([v for v in values if v not in more], more))
    return found


def sparse(grid: Variables) -> set[tuple[int, ...]]:
    basics = [basic for basic, _ in grid]
    found = set(itertools.product(*basics))
    for i, (_, more) in enumerate(grid):
        found |= set(itertools.product(*basics[:i], more, *basics[i + 1 :]))
    return found


def everywhere(grid: Variables) -> list[list[int]]:
    return [sorted((*basic, *more)) for basic, more in grid]


def table(grid: Variables, whole: FloatArray, measured: set[tuple[int, ...]]) -> FloatArray:
    known = np.array([place in measured for place in itertools.product(*everywhere(grid))]).reshape(whole.shape)
    return np.where(known, whole, np.nan)


def knots_of(grid: Variables) -> list[Knots]:
    return [
        Knots(tuple(values), np.isin(values, basic)) for values, (basic, _) in zip(everywhere(grid), grid, strict=True)
    ]


def scales(grid: Variables) -> list[FloatArray]:
    return [np.log2(np.array(values, dtype=np.float64)) for values in everywhere(grid)]


@given(variables(), st.integers(0, 2**32 - 1))
def test_what_the_variables_do_one_by_one_is_found_again_exactly_on_top_of_anything_multilinear(
    grid: Variables, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    along, values = scales(grid), everywhere(grid)
    whole = rng.uniform() + rng.normal() * np.multiply.outer(np.multiply.outer(along[0], along[1]), along[2])
    for i in range(3):
        whole = whole + rng.normal(size=len(values[i])).reshape([-1 if j == i else 1 for j in range(3)])
    measured = table(grid, whole, sparse(grid))
    low, high = np.nanmin(measured), np.nanmax(measured)
    assert completed(measured, knots_of(grid), along) == pytest.approx(np.clip(whole, low, high), rel=1e-9, abs=1e-9)


@given(variables(), st.integers(0, 2**32 - 1), st.data())
def test_what_was_measured_stays_and_nothing_is_beyond_it(grid: Variables, seed: int, data: st.DataObject) -> None:
    whole = np.random.default_rng(seed).normal(size=[len(values) for values in everywhere(grid)])
    rest = sorted(set(itertools.product(*everywhere(grid))) - sparse(grid))
    extra = data.draw(st.sets(st.sampled_from(rest))) if rest else set()
    measured = table(grid, whole, sparse(grid) | extra)
    found = completed(measured, knots_of(grid), scales(grid))
    known = ~np.isnan(measured)
    assert np.array_equal(found[known], measured[known])
    assert np.nanmin(measured) <= found.min() <= found.max() <= np.nanmax(measured)


def test_a_pair_that_was_measured_counts_where_all_three_are_off_the_basic_values() -> None:
    grid: Variables = [([1, 4], [2])] * 3
    whole = np.zeros((3, 3, 3))
    whole[1, 1, :] = 1.0  # at (2, 2, anything) only
    measured = table(grid, whole, sparse(grid) | {(2, 2, 1), (2, 2, 4)})
    assert completed(measured, knots_of(grid), scales(grid))[1, 1].tolist() == [1.0, 1.0, 1.0]
    assert not completed(table(grid, whole, sparse(grid)), knots_of(grid), scales(grid)).any()


@given(variables())
def test_its_variables_are_read_off_its_places(grid: Variables) -> None:
    places = sparse(grid)
    found = sparse_values(places, NAMES, "here")
    assert [list(of.values) for of in found] == everywhere(grid)
    if sum(bool(more) for _, more in grid) > 1:  # else it is a full rectangle
        for of, (basic, _) in zip(found, grid, strict=True):
            assert np.array(of.values)[of.basic].tolist() == basic
    else:
        assert all(of.basic.all() for of in found)


@given(variables(), st.data())
def test_more_may_have_been_measured_of_some_pairs_of_values(grid: Variables, data: st.DataObject) -> None:
    pairs = list(itertools.product(grid[0][1], grid[1][1]))
    places = sparse(grid)
    for a, b in data.draw(st.sets(st.sampled_from(pairs))) if pairs else ():
        places |= set(itertools.product([a], [b], grid[2][0]))
    found = sparse_values(places, NAMES, "here")
    assert [list(of.values) for of in found] == everywhere(grid)
    whole = np.random.default_rng(0).normal(size=[len(of.values) for of in found])
    measured = table(grid, whole, places)
    filled = completed(measured, found, scales(grid))
    assert not np.isnan(filled).any()
    assert np.array_equal(filled[~np.isnan(measured)], measured[~np.isnan(measured)])


@given(variables(), st.booleans(), st.data())
def test_a_point_that_was_lost_is_named(grid: Variables, full: bool, data: st.DataObject) -> None:
    places = set(itertools.product(*everywhere(grid))) if full else sparse(grid)
    assert sparse_values(places, NAMES, "here")
    hole = data.draw(st.sampled_from(sorted(places)))
    ends = all(x in (values[0], values[-1]) for x, values in zip(hole, everywhere(grid), strict=True))
    inner = sum(x not in (values[0], values[-1]) for x, values in zip(hole, everywhere(grid), strict=True))
    named = "here: no point at " + ", ".join(f"{name} {x}" for name, x in zip(NAMES, hole, strict=True)) + ";"
    if ends or (full and inner != 2):
        with pytest.raises(InputError, match="^" + re.escape(named)):
            sparse_values(places - {hole}, NAMES, "here")
    elif full:
        with pytest.raises(InputError, match=r"^here: no point at .*; expected every combination of a and b and c, or"):
            sparse_values(places - {hole}, NAMES, "here")


def test_a_value_below_one_is_refused() -> None:
    places: Sequence[tuple[int, ...]] = [(0, 1, 1), (1, 1, 1)]
    with pytest.raises(InputError, match="here: a: found 0; expected one or more"):
        sparse_values(places, NAMES, "here")
