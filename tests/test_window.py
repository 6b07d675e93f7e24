"""Windows in which both phases run: only steps beside the other count, and there are enough of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.window import LONG_STEP_MS, Stamps, saturated_steps, stamped_every, together

durations = st.lists(st.floats(0.1, 10), min_size=1, max_size=20)


@given(durations, st.floats(-20, 20), durations, st.floats(-20, 20))
def test_only_steps_wholly_inside_the_other_streams_activity_count(
    own: list[float], own_start: float, other: list[float], other_start: float
) -> None:
    own_stamps = own_start + np.concatenate([[0.0], np.cumsum(own)])
    other_stamps = other_start + np.concatenate([[0.0], np.cumsum(other)])
    first, last = float(other_stamps[0]), float(other_stamps[-1])
    expected = []
    for begin, end in itertools.pairwise(own_stamps):
        if begin < first or end > last:
            continue  # the other stream was idle at the step's beginning or at its end
        expected.append(end - begin)
    assert saturated_steps(own_stamps, first, last).tolist() == expected


def test_streams_that_never_meet_have_no_saturated_step() -> None:
    assert len(saturated_steps(np.array([0.0, 1.0, 2.0]), 2.0, 5.0)) == 0


@dataclass
class Fluid:
    """Two streams that slow each other down: a step takes ``alone`` or, while the other runs too, ``beside`` ms."""

    alone: tuple[float, float]
    beside: tuple[float, float]
    windows_ms: list[float] = field(default_factory=list)

    def __call__(self, first: int, second: int, stamps: int) -> tuple[Stamps, Stamps]:
        every = [stamped_every(n, stamps) for n in (first, second)]
        ends: list[list[float]] = [[0.0], [0.0]]
        left, now = [1.0, 1.0], 0.0
        todo = [-(-n // e) * e for n, e in zip((first, second), every, strict=True)]
        while any(todo):
            rate = self.beside if all(todo) else self.alone
            going = [i for i in (0, 1) if todo[i]]
            step = min(left[i] * rate[i] for i in going)
            now += step
            for i in going:
                left[i] -= step / rate[i]
                if left[i] < 1e-9:
                    left[i], todo[i] = 1.0, todo[i] - 1
                    if todo[i] % every[i] == 0:
                        ends[i].append(now)
        self.windows_ms.append(now)
        a, b = (Stamps(np.array(e), n) for e, n in zip(ends, every, strict=True))
        return a, b


times = st.floats(0.05, 20.0)
slower = st.floats(1.0, 3.0)


@given(st.tuples(times, times), st.tuples(slower, slower), st.integers(1, 100), st.sampled_from([0.0, 20.0, 60.0]))
def test_every_sample_is_the_time_beside_the_other_and_none_is_missing(
    alone: tuple[float, float], slower: tuple[float, float], marks: int, settle_ms: float
) -> None:
    fluid = Fluid(alone, (alone[0] * slower[0], alone[1] * slower[1]))
    for samples, beside in zip(together(fluid, alone, marks, settle_ms), fluid.beside, strict=True):
        assert len(samples) >= marks
        assert samples == pytest.approx(beside)
    assert sum(fluid.windows_ms[:-1]) >= settle_ms


def test_one_step_is_enough_when_it_is_long() -> None:
    fluid = Fluid((2 * LONG_STEP_MS, 1.0), (3 * LONG_STEP_MS, 1.5))
    prefill, decode = together(fluid, fluid.alone, 10, 60.0)
    assert prefill == pytest.approx(3 * LONG_STEP_MS)
    assert decode == pytest.approx(1.5)
    assert 1 <= len(prefill) < 10
    assert sum(fluid.windows_ms) < 20 * LONG_STEP_MS


def test_phases_that_never_run_together_are_an_error_not_a_number() -> None:
    def in_turn(first: int, second: int, _stamps: int) -> tuple[Stamps, Stamps]:
        a, b = np.arange(first + 1.0), first + np.arange(second + 1.0)
        return Stamps(a, 1), Stamps(b, 1)

    with pytest.raises(RuntimeError, match="could not be kept running together for 5 steps"):
        together(in_turn, (1.0, 1.0), 5, 0.0)


@given(st.integers(1, 10_000), st.integers(1, 500))
def test_stamps_are_as_many_as_allowed_or_more_than_half(replays: int, stamps: int) -> None:
    taken = -(-replays // stamped_every(replays, stamps))
    assert taken <= stamps
    assert taken == replays or 2 * taken > stamps
