"""Timing steps on an executor whose times are known: solo, beside each other, fused, and what lies between runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from closed_form_cost import ClosedFormCost
from hypothesis import given, settings
from hypothesis import strategies as st
from passing_on import PassingOn

from semipd.areas import areas_of
from semipd.core import Allocation, Mode, Phase, Request, Run, StepRecord
from semipd.overheads import Overheads
from semipd.points import DecodeWork, PrefillWork
from semipd.profile_config import DecodeAxes, ProfileConfig
from semipd.profiling import overheads
from semipd.ragged import Decodes, Prompts, dealt, lengths_at
from semipd.sim import SimExecutor
from semipd.stopwatch import BARELY_COVERED, BLOCKS, Steps, Stopwatch, covered, covered_share, inner_steps, spread_of

TRUTH = ClosedFormCost()
AT = Allocation(Mode.SPLIT, 8, 24)
ALLOCATIONS = [at for at in TRUTH.allocations if at.mode is not Mode.MIXED]
prompts = st.lists(st.tuples(st.integers(1, 800), st.integers(0, 3000)), min_size=1, max_size=5).map(
    lambda pairs: Prompts(*(tuple(column) for column in zip(*pairs, strict=True)))
)
decodes = st.lists(st.integers(8, 3000), min_size=1, max_size=20).map(lambda lengths: Decodes(tuple(lengths)))


def watch(overheads: Overheads | None = None) -> Stopwatch:
    return Stopwatch(SimExecutor(TRUTH, overheads or Overheads()), TRUTH.layers, settle_s=0.001, measure_s=0.004)


def decode_layer_ms(batch: Decodes, at: Allocation, beside: Prompts | None = None) -> float:
    seconds, _ = TRUTH.decode_s(batch.shape, at, beside.shape if beside else None)
    return float(seconds[0]) / TRUTH.layers * 1e3


@settings(deadline=None, max_examples=30)
@given(prompts, decodes, st.sampled_from(ALLOCATIONS))
def test_alone_and_beside_each_other_the_times_are_the_executors(
    prefill: Prompts, decode: Decodes, at: Allocation
) -> None:
    stopwatch = watch()
    assert stopwatch.prefill(prefill, at).median_ms == pytest.approx(
        TRUTH.prefill_s(prefill.shape, at, None)[0] * 1e3, rel=1e-4
    )
    assert stopwatch.decode(decode, at).median_ms == pytest.approx(decode_layer_ms(decode, at), rel=2e-3)
    beside_prefill, beside_decode = stopwatch.both(prefill, decode, at)
    # A simulated step is priced beside the other batch as it was when a run began: some tokens fewer.
    assert beside_prefill.median_ms == pytest.approx(
        TRUTH.prefill_s(prefill.shape, at, decode.shape)[0] * 1e3, rel=0.02
    )
    assert beside_decode.median_ms == pytest.approx(decode_layer_ms(decode, at, prefill), rel=0.02)


@settings(deadline=None, max_examples=20)
@given(prompts, decodes)
def test_a_fused_step_is_timed_from_its_launch_on(prefill: Prompts, decode: Decodes) -> None:
    at = Allocation(Mode.MIXED, 32, 32, 8192)
    measured = watch().mixed(prefill, decode, at)
    expected_s, _ = TRUTH.mixed_s(prefill.shape, decode.shape)
    assert measured.median_ms == pytest.approx(expected_s / TRUTH.layers * 1e3, rel=1e-4)


def test_what_runs_wait_for_is_found_and_is_in_no_step() -> None:
    stopwatch = watch(Overheads(prefill_start_ms=0.3, decode_start_ms=0.2, switch_ms=0.7))
    prefill, decode, other = Prompts((500,), (0,)), Decodes((2000,) * 8), Allocation(Mode.SPLIT, 24, 8)
    assert stopwatch.prefill(prefill, AT).median_ms == pytest.approx(
        TRUTH.prefill_s(prefill.shape, AT, None)[0] * 1e3, rel=1e-4
    )
    assert stopwatch.start_ms(Phase.PREFILL) == pytest.approx(0.3, abs=1e-3)
    assert stopwatch.decode_start_s(decode, AT) == pytest.approx(0.2e-3, abs=1e-5)  # later steps have more to read
    assert stopwatch.switch_s(prefill, AT, other) == pytest.approx(0.7e-3, abs=1e-6)
    assert stopwatch.start_ms(Phase.MIXED) == 0.0


@pytest.mark.parametrize(("start_ms", "each_ms"), [(0.0, 0.0), (1.5, 0.0), (0.5, 0.02)])
def test_the_start_of_decode_is_found_however_long_its_steps_are(start_ms: float, each_ms: float) -> None:
    """A steady load that is over before the first run is has no start in it."""
    truth = Overheads(decode_start_ms=start_ms, decode_start_per_sequence_ms=each_ms, prefill_start_ms=0.3)
    config = ProfileConfig(
        prefill_sms=(8, 16), capped_sms=(), modes=("split",), decode=DecodeAxes(batch=(8, 64), kv_tokens=(512, 96_000))
    )
    executor = SimExecutor(TRUTH, truth)
    stopwatch = Stopwatch(executor, TRUTH.layers, settle_s=1e-6, measure_s=1e-6)
    found = overheads(stopwatch, areas_of(config, TRUTH.device_sms), config)
    assert found.decode_start_ms == pytest.approx(start_ms, abs=0.02)
    assert found.decode_start_per_sequence_ms == pytest.approx(each_ms, abs=1e-3)
    assert found.prefill_start_ms == pytest.approx(0.3, abs=1e-2)


def test_dealt_parts_add_up_and_none_is_below_the_least() -> None:
    parts = dealt(np.array([1.0, 5.0, 0.0]), total=100, least=3)
    assert parts.sum() == 100
    assert parts.min() >= 3


class Forgotten:
    """An executor's memory of requests, as ``TorchExecutor`` keeps it."""

    def __init__(self) -> None:
        self.executor = SimExecutor(TRUTH)
        self.known: set[int] = set()

    def now(self) -> float:
        return self.executor.now()

    def launch(self, run: Run) -> None:
        self.known |= {request.id for request in run.requests}
        self.executor.launch(run)

    def yield_(self, run_id: int) -> None:
        self.executor.yield_(run_id)

    def steps_done(self, run_id: int) -> int:
        return self.executor.steps_done(run_id)

    def wait(self, until_s: float | None) -> list[StepRecord]:
        records = self.executor.wait(until_s)
        for record in records:
            self.known -= set(record.finished)
        return records

    def forget(self, ids: tuple[int, ...]) -> None:
        assert self.known >= set(ids)
        self.known -= set(ids)


@settings(deadline=None, max_examples=20)
@given(prompts, decodes)
def test_nothing_is_left_in_flight_or_unfinished(prefill: Prompts, decode: Decodes) -> None:
    executor = Forgotten()
    stopwatch = Stopwatch(executor, TRUTH.layers, forget=executor.forget, settle_s=0.001, measure_s=0.004)
    for measure in (
        lambda: stopwatch.prefill(prefill, AT),
        lambda: stopwatch.decode(decode, AT),
        lambda: stopwatch.both(prefill, decode, AT),
        lambda: stopwatch.mixed(prefill, decode, Allocation(Mode.MIXED, 32, 32, 8192)),
    ):
        measure()
        assert not executor.known
        with pytest.raises(RuntimeError, match="nothing is in flight"):
            executor.wait(None)


def record(start_s: float, ends_s: list[float], phase: Phase = Phase.DECODE) -> StepRecord:
    run = Run(1, phase, (Request(0, 0.0, 1, 1),), (1,), (1,), 8, 99, AT)
    return StepRecord(run, start_s, np.array(ends_s))


times = st.floats(0, 10, allow_nan=False)
intervals = st.lists(st.tuples(times, times), max_size=6)


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=12), intervals)
def test_a_step_that_was_alone_for_half_of_its_time_never_counts(lengths: list[float], others: list) -> None:
    ends = np.cumsum(lengths)
    steps = Steps(ends - np.array(lengths), ends)
    flights, last = [], 0.0
    for drawn_s, length in sorted(others):  # one after the other, as the runs of a phase are
        start_s = max(drawn_s, last)
        last = start_s + length / 4
        flights.append(record(start_s, [last]))
    grid = np.linspace(0, ends[-1], 20_001)
    inside = np.zeros(len(grid), dtype=bool)
    for flight in flights:
        inside |= (grid >= flight.start_s) & (grid <= flight.end_s)
    by_hand = [inside[(grid >= a) & (grid <= b)].mean() for a, b in zip(steps.starts_s, steps.ends_s, strict=True)]
    resolution = 4 * ends[-1] / 20_000 / min(lengths) * (1 + len(flights))
    assert covered_share(steps, flights) == pytest.approx(np.array(by_hand), abs=resolution)
    counted = covered(steps, flights)
    shares = dict(zip(steps.starts_s.tolist(), by_hand, strict=True))
    assert all(shares[start] >= BARELY_COVERED - resolution for start in counted.starts_s.tolist())


def test_the_first_step_of_a_run_and_the_sampling_layer_are_no_inner_steps() -> None:
    decode = record(0.0, [3.0, 4.0, 6.0])
    assert inner_steps([decode], 4).times_s.tolist() == [1.0, 2.0]
    whole = record(0.0, [3.0, 4.0, 6.0, 9.0], Phase.PREFILL)
    assert inner_steps([whole], 4).times_s.tolist() == [1.0, 2.0]
    stopped = record(0.0, [3.0, 4.0, 6.0], Phase.PREFILL)
    assert inner_steps([stopped], 4).times_s.tolist() == [1.0, 2.0]
    assert inner_steps([record(0.0, [3.0, 4.0], Phase.PREFILL)], 2).times_s.tolist() == [3.0, 1.0]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
def test_a_spread_is_of_the_means_of_blocks_and_counts_every_step(taken_ms: list[float]) -> None:
    spread = spread_of(np.array(taken_ms))
    blocks = [np.mean(block) for block in np.array_split(taken_ms, min(BLOCKS, len(taken_ms)))]
    assert spread.steps == len(taken_ms)
    assert spread.median_ms == pytest.approx(float(np.median(blocks)), abs=1e-6)
    assert min(taken_ms) - 1e-6 <= spread.p10_ms <= spread.median_ms <= spread.p90_ms <= max(taken_ms) + 1e-6


@given(st.integers(1, 64), st.integers(2, 500))
def test_batches_have_the_shape_of_their_work_and_decode_batches_are_ragged(batch: int, each: int) -> None:
    work = DecodeWork(batch, batch * each)
    assert Decodes.of(work).shape == work.shape
    lengths = np.array(Decodes.of(work).lengths)
    assert lengths.min() >= 1
    assert batch < 16 or each < 100 or 0.4 < lengths.std() / lengths.mean() < 0.55
    prefill = PrefillWork.at(128 * each, 64)
    shape = Prompts.of(prefill).shape
    assert (shape.tokens, shape.pairs) == (prefill.tokens, prefill.shape.pairs)
    assert shape.contexts == prefill.seqs * prefill.mean_context


def test_decode_lengths_are_quantiles_of_a_gamma_distribution() -> None:
    quantiles = np.linspace(0.001, 0.999, 500)
    assert lengths_at(quantiles) == pytest.approx(scipy.stats.gamma(4).ppf(quantiles), abs=1e-3)


def test_after_what_may_reach_the_power_limit_the_device_rests_for_a_share_of_the_load() -> None:
    batch, decode = Prompts((64, 300), (0, 500)), Decodes((100, 200))

    def took_s(rest_share: float, measure: Callable[[Stopwatch], object]) -> float:
        executor = SimExecutor(TRUTH, Overheads())
        stopwatch = Stopwatch(executor, TRUTH.layers, rest_share=rest_share)
        begun_s = executor.now()
        measure(stopwatch)
        return executor.now() - begun_s

    whole = Allocation(Mode.EXCLUSIVE, TRUTH.device_sms, TRUTH.device_sms)
    for limited in (
        lambda watch: watch.both(batch, decode, AT),
        lambda watch: watch.prefill(batch, whole),
        lambda watch: watch.mixed(batch, decode, Allocation(Mode.MIXED, 32, 32, 8192)),
    ):
        load_s = took_s(0.0, limited)
        assert 1.2 * load_s < took_s(0.5, limited) <= 1.5 * load_s + 1e-9
    assert took_s(0.5, lambda watch: watch.decode(decode, AT)) == took_s(0.0, lambda watch: watch.decode(decode, AT))


class SlowToFeed(PassingOn):
    """Its first wait takes 50 ms, as where a batch of a new size is captured."""

    waits = 0

    def wait(self, until_s: float | None) -> list[StepRecord]:
        self.waits += 1
        if self.waits > 1 or until_s is None:
            return self.to.wait(until_s)
        found = []
        while self.now() < until_s + 0.05:
            found += self.to.wait(until_s + 0.05)
        return found


@pytest.mark.parametrize("phase", [Phase.DECODE, Phase.MIXED])
def test_a_load_settles_from_when_every_phase_was_fed(phase: Phase) -> None:
    steps = {}
    for slow in (False, True):
        inner = SimExecutor(TRUTH, Overheads())
        stopwatch = Stopwatch(
            SlowToFeed(inner) if slow else inner, TRUTH.layers, settle_s=0.01, measure_s=0.02, limit_s=0.02
        )
        prefill, decode = Prompts((64,), (0,)), Decodes((100, 200))
        fused = Allocation(Mode.MIXED, 32, 32, 8192)
        spread = stopwatch.decode(decode, AT) if phase is Phase.DECODE else stopwatch.mixed(prefill, decode, fused)
        steps[slow] = spread.steps, inner.now()
    assert steps[True][0] <= steps[False][0] + 2  # those of the first 50 ms are left out
    assert steps[True][1] >= steps[False][1] + 0.045


class HeldUp(PassingOn):
    """Steps that end in the second half of every so many seconds, up to some time, take three times as long."""

    def __init__(self, to: SimExecutor, every_s: float, until_s: float) -> None:
        super().__init__(to)
        self.every_s, self.until_s = every_s, until_s

    def wait(self, until_s: float | None) -> list[StepRecord]:
        found = []
        for record in self.to.wait(until_s):
            ends_s = np.asarray(record.ends_s)
            held = (ends_s < self.until_s) & (ends_s % self.every_s > self.every_s / 2)
            times_s = np.diff(ends_s, prepend=record.start_s) * np.where(held, 3.0, 1.0)
            found.append(replace(record, ends_s=record.start_s + np.cumsum(times_s)))
        return found


def test_what_varies_a_lot_is_measured_again_for_twice_as_long_and_the_steadier_counts() -> None:
    decode = Decodes((100, 200, 4000))
    took_s = {}
    for until_s in (0.0, 0.06, 1e9):
        inner = SimExecutor(TRUTH, Overheads())
        held_up = HeldUp(inner, 0.05, until_s)
        stopwatch = Stopwatch(held_up, TRUTH.layers, settle_s=0.01, measure_s=0.05, limit_s=0.05)
        found = stopwatch.decode(decode, AT)
        took_s[until_s] = inner.now()
        if until_s < 1:
            assert found.median_ms == pytest.approx(decode_layer_ms(decode, AT), rel=0.01)
    assert took_s[0.06] > 2.5 * took_s[0.0]  # once more, for twice as long
    assert took_s[1e9] < 3.5 * took_s[0.0]  # and no oftener, however much it varies


def test_a_whole_run_is_timed_with_what_the_host_does_before_its_first_step() -> None:
    batch = Prompts((64, 300), (0, 500))
    layer_s = TRUTH.prefill_s(batch.shape, AT, None)[0]
    stopwatch = watch(Overheads(prefill_start_ms=2.0))
    assert stopwatch.whole_s(batch, AT) == pytest.approx(2e-3 + TRUTH.layers * layer_s)


class GettingFaster(PassingOn):
    """Its clock is that of a simulation, but its first runs start late."""

    def __init__(self, slow_runs: int) -> None:
        super().__init__(SimExecutor(TRUTH, Overheads()))
        self.runs, self.slow_runs = 0, slow_runs

    def launch(self, run: Run) -> None:
        self.runs += 1
        super().launch(run)

    def wait(self, until_s: float | None) -> list[StepRecord]:
        records = super().wait(until_s)
        if self.runs >= self.slow_runs:
            return records
        return [replace(record, start_s=record.start_s - 0.5 / self.runs) for record in records]


def test_the_host_is_settled_when_small_runs_get_no_faster_or_the_time_is_up() -> None:
    batch = Prompts((16,), (0,))
    for slow_runs, limit_s, settled in ((1, 1e9, True), (400, 1e9, True), (10**9, 0.05, False)):
        executor = GettingFaster(slow_runs)
        stopwatch = Stopwatch(executor, TRUTH.layers, settle_s=0.001, measure_s=0.004)
        stopwatch.settle_host(batch, AT, limit_s)
        assert executor.runs > slow_runs if settled else executor.now() >= limit_s
