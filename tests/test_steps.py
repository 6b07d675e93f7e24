"""The compiled arithmetic of steps: against numpy, scipy and a plain model of one run."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from semipd._steps import Axis, Boundaries, Curve, Grid

ROOT = Path(__file__).parent.parent

ascending = st.lists(st.integers(1, 10_000), min_size=2, max_size=6, unique=True).map(sorted)


def random_grid(draw: st.DataObject, log: bool, offset: float = 0.0) -> tuple[list[list[int]], np.ndarray, Grid]:
    values = [draw.draw(ascending) for _ in range(draw.draw(st.integers(1, 4)))]
    points = np.random.default_rng(draw.draw(st.integers(0, 99))).uniform(0.1, 10, [len(v) for v in values])
    return values, points, Grid([Axis(v, v[0], v[-1], log, offset) for v in values], points)


@settings(deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([0.0, 7.5, 3000.0]))
def test_a_grid_interpolates_as_scipy_does_is_exact_on_its_points_and_clamped_outside(
    data: st.DataObject, log: bool, offset: float
) -> None:
    values, points, grid = random_grid(data, log, offset)

    def scale(x: list[int] | list[float]) -> np.ndarray:
        return np.log2(np.array(x) + offset) if log else np.array(x)

    expected = RegularGridInterpolator([scale(v) for v in values], points)
    place = [data.draw(st.floats(0.5, 20_000)) for _ in values]
    clamped = [min(max(x, v[0]), v[-1]) for x, v in zip(place, values, strict=True)]
    found, outside = grid.number(*place)
    assert found == pytest.approx(float(expected(scale(clamped))[0]), rel=1e-9)
    assert outside == (clamped != place)
    for corner in itertools.islice(itertools.product(*(range(len(v)) for v in values)), 50):
        assert grid.number(*(v[i] for v, i in zip(values, corner, strict=True))) == (points[corner], False)


@settings(deadline=None)
@given(st.data(), st.booleans())
def test_a_grid_of_vectors_is_one_grid_for_each_of_their_numbers(data: st.DataObject, log: bool) -> None:
    values, points, grid = random_grid(data, log)
    axes = [Axis(v, v[0], v[-1], log) for v in values]
    vectors = Grid(axes, np.stack([points, 3 * points], axis=-1))
    place = [data.draw(st.floats(0.5, 20_000)) for _ in values]
    found, outside = vectors.vector(*place)
    thrice, _ = Grid(axes, 3 * points).number(*place)
    assert (found.tolist(), outside) == ([grid.number(*place)[0], thrice], grid.number(*place)[1])
    assert pickle.loads(pickle.dumps(vectors)).vector(*place)[0].tolist() == found.tolist()


def test_what_a_grid_and_a_curve_need_is_said() -> None:
    axis = Axis([1.0, 2.0], 1.0, 2.0, False)
    with pytest.raises(ValueError, match="lacks points"):
        Grid([axis], np.ones(3))
    with pytest.raises(TypeError, match="a number for each axis"):
        Grid([axis], np.ones(2)).number(1.0, 1.0)
    with pytest.raises(TypeError, match="grid of vectors"):
        Grid([axis], np.ones(4)).number(1.0)
    with pytest.raises(ValueError, match="without values"):
        Axis([], 0.0, 1.0, False)
    with pytest.raises(ValueError, match="as many knots as times"):
        Curve(np.ones(2), np.ones(3), 0.0, 1.0, False)
    with pytest.raises(ValueError, match="a speed for each knot"):
        Curve(np.ones(2), np.ones(2), 0.0, 1.0, False).at_speed(Grid([axis], np.ones(2)), 0.0, 1.0, 1.0)


@given(st.data(), ascending)
def test_a_curve_is_numpys_interpolation_to_the_last_bit(data: st.DataObject, knots: list[int]) -> None:
    seconds = np.array(data.draw(st.lists(st.floats(1e-6, 1), min_size=len(knots), max_size=len(knots))))
    near = st.sampled_from([k + d for k in knots for d in (-1, 0, 1)])
    first, more, steps = (
        data.draw(near | st.integers(0, 20_000)),
        data.draw(st.integers(1, 99)),
        data.draw(st.integers(0, 20)),
    )
    kv_tokens = first + more * np.arange(steps)
    low, high = data.draw(st.integers(0, 5000)), data.draw(st.integers(5000, 20_000))
    curve = Curve(np.array(knots, dtype=float), seconds, low, high, False)
    found, outside = curve.at(first, more, steps)
    assert found.tolist() == np.interp(kv_tokens, knots, seconds).tolist()
    assert outside == np.count_nonzero((kv_tokens < low) | (kv_tokens > high))
    assert Curve(np.array(knots, dtype=float), seconds, low, high, True).at(first, more, steps)[1] == steps

    factors = np.arange(1.0, 2 * len(knots) + 1).reshape(2, len(knots))
    grid = Grid([Axis([1.0, 3.0], 1.0, 3.0, False)], factors)
    times, outside = curve.at_speed(grid, 0, high, 2.0).at(first, more, steps)
    assert times.tolist() == np.interp(kv_tokens, knots, seconds / factors.mean(axis=0)).tolist()
    assert outside == np.count_nonzero(kv_tokens > high)
    assert curve.at_speed(grid, 0, high, 4.0).at(first, more, steps)[1] == steps


class PlainRun:
    """One run, a step at a time, in fractions: what is left of a step goes on at the present price."""

    def __init__(self, begin: float, steps: int) -> None:
        self.now, self.steps, self.left = Fraction(begin), steps, Fraction(1)
        self.ends: list[Fraction] = []

    def go_on_to(self, until: float, seconds: float) -> None:
        while len(self.ends) < self.steps and self.now < until:
            end = self.now + self.left * Fraction(seconds)
            if end > until:
                self.left -= (Fraction(until) - self.now) / Fraction(seconds)
                self.now = Fraction(until)
                return
            self.ends.append(end)
            self.now, self.left = end, Fraction(1)


powers = st.sampled_from([0.25, 0.5, 1.0, 2.0])  # shares of steps stay exact


@given(
    steps=st.integers(1, 6),
    begin=st.integers(0, 2),
    prices=st.lists(st.tuples(st.integers(0, 3), powers), min_size=1, max_size=6),
    evenly=st.booleans(),
)
def test_what_is_left_of_a_step_goes_on_at_the_new_price(
    steps: int, begin: int, prices: list[tuple[int, float]], evenly: bool
) -> None:
    run, plain, now, worked = Boundaries(0.0, steps), PlainRun(begin, steps), 0.0, 0
    run.begin_s = float(begin)
    for wait, seconds in prices:
        here, first, _ = run.leave(now)
        worked += here
        priced_to, end = run.price_evenly(seconds, steps) if evenly else run.price(np.full(steps, seconds))
        now += wait
        plain.go_on_to(now, seconds)
        assert run.reached(now) == len(plain.ends)
        if end <= now:
            break
    plain.go_on_to(math.inf, prices[-1][1] if end > now else seconds)
    assert run.ends_s().tolist() == [float(end) for end in plain.ends]
    assert (end, priced_to) == (run.ends_s()[-1], run.ends_s()[-1])
    assert worked + len(run.ends_s()) - first >= steps  # a step that was priced anew is worked on at each price


@given(steps=st.integers(1, 6), at=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 7.0]), max_size=3).map(sorted))
def test_a_run_that_is_asked_to_stop_ends_at_its_first_boundary_from_then_on(steps: int, at: list[float]) -> None:
    run, expected = Boundaries(0.0, steps), steps
    run.price_evenly(1.0, steps)
    for now in at:
        run.leave(now)
        run.price_evenly(1.0, steps)
        expected = min(expected, max(1, math.ceil(now)))
        assert run.stop(now) == (expected, expected)
        assert run.ends_s().tolist() == list(range(1, expected + 1))


def test_steps_beyond_those_priced_have_no_end_yet() -> None:
    run = Boundaries(1.0, 5)
    assert run.stop(1.0) == (-math.inf, math.inf)
    run = Boundaries(1.0, 5)
    assert run.price(np.array([1.0, 0.5])) == (2.5, math.inf)
    assert run.ends_s().tolist() == [2.0, 2.5]
    assert run.leave(2.5) == (2, 2, 3)
    assert run.price_evenly(1.0, 9) == (5.5, 5.5)
    assert run.ends_s().tolist() == [2.0, 2.5, 3.5, 4.5, 5.5]


def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers over every path of csrc/steps.hpp and csrc/waves.hpp."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    sanitize = [
        "-std=c++17",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-D_GLIBCXX_ASSERTIONS",
    ]
    trivial = tmp_path / "trivial.cpp"
    trivial.write_text("int main() { return 0; }\n")
    if subprocess.run(
        [compiler, *sanitize, trivial, "-o", tmp_path / "trivial"], capture_output=True, check=False
    ).returncode:
        pytest.skip(f"{compiler} has no AddressSanitizer and UBSan")
    program, source = tmp_path / "steps_main", ROOT / "tests" / "steps_main.cpp"
    built = subprocess.run(
        [compiler, *sanitize, "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", source, "-o", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runs" in done.stdout
