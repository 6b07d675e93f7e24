"""Step times that vary as measured."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_profile import write_profile
from test_laws import Scenario, scenarios, token_times

from semipd.config import CompareConfig, SchedulerOptions, TraceConfig
from semipd.core import Allocation, Mode, Phase
from semipd.driver import replay
from semipd.profile import load_profile
from semipd.replay import prepare, simulate
from semipd.sim import SimExecutor
from semipd.variation import Variation

SPLIT, FULL = Allocation(Mode.SPLIT, 8, 24), Allocation(Mode.EXCLUSIVE, 32, 32)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profile") / "p")  # p10 0.98 and p90 1.05 of every median


@pytest.fixture(scope="module")
def variation(profile: Path) -> Variation:
    return Variation(load_profile(profile), seed=3)


@pytest.mark.parametrize(("at", "beside"), [(SPLIT, True), (SPLIT, False), (FULL, False)])
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_the_spread_of_the_factors_is_the_measured_one(
    variation: Variation, phase: Phase, at: Allocation, beside: bool
) -> None:
    factors = variation.factors(phase, at, beside, 0, 200_000)
    assert np.percentile(factors, [10, 50, 90]) == pytest.approx([0.98, 1.0, 1.05], rel=1e-3)
    assert abs(np.corrcoef(factors[1:], factors[:-1])[0, 1]) < 0.01


@given(cuts=st.lists(st.integers(0, 20_000), max_size=6).map(sorted), seed=st.integers(0, 3))
@settings(deadline=None)
def test_a_step_has_the_same_factor_however_it_is_asked_for(profile: Path, cuts: list[int], seed: int) -> None:
    variation = Variation(load_profile(profile), seed)
    whole = variation.factors(Phase.DECODE, SPLIT, True, 0, 20_000)
    edges = [0, *cuts, 20_000]
    copied = pickle.loads(pickle.dumps(variation))
    for start, stop in reversed(list(pairwise(edges))):
        if stop > start:
            assert copied.factors(Phase.DECODE, SPLIT, True, start, stop - start).tolist() == whole[start:stop].tolist()


@settings(max_examples=150, deadline=None)
@given(scenario=scenarios(), decode_steps=st.integers(1, 3))
def test_law_10_holds_with_variation(variation: Variation, scenario: Scenario, decode_steps: int) -> None:
    def play(steps: int | None) -> dict[int, list[float]]:
        executor = SimExecutor(scenario.cost, scenario.overheads, variation)
        return token_times(list(replay(scenario.requests, scenario.scheduler(steps), executor)))

    coarse, fine = play(None), play(decode_steps)
    assert coarse.keys() == fine.keys()
    for request_id, times in coarse.items():
        assert fine[request_id] == pytest.approx(times, rel=1e-12)


def test_equal_seeds_give_equal_replays_and_others_others(profile: Path) -> None:
    def p99_s(seed: int | None) -> float:
        trace = TraceConfig(limit=200, rate_scale=3.0)
        scheduler = SchedulerOptions(num_blocks=10_000)
        setup = prepare(CompareConfig(trace=trace, profile=str(profile), variation_seed=seed, scheduler=scheduler))
        found = simulate(setup, "static-16").summary.itl_s
        assert found is not None
        return found.p99

    assert p99_s(1) == p99_s(1)
    assert len({p99_s(None), p99_s(1), p99_s(2)}) == 3
