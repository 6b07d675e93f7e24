"""The laws of docs/invariants.md over the scheduler and the simulator together, on random small scenarios.

Times are dyadic, so floating point is exact and results can be compared for equality.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from zlib import crc32

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from passing_on import PassingOn
from reference import BucketCost, Reference

from semipd.core import Allocation, Load, Mode, Phase, Request, Run, StepRecord
from semipd.cost import ConstantCost, CostModel
from semipd.driver import replay
from semipd.overheads import NO_OVERHEADS, Overheads
from semipd.policies import Policy, make_policy, whole_device
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor
from semipd.slo import Slo

STEADY = (
    "exclusive",
    "exclusive-decode",
    "static-8",
    "static-16",
    "static-24",
    "capped-8",
    "capped-24",
    "priority",
    "chunked-1",
    "chunked-3",
    "chunked-6",
    "chunked-16",
    "adaptive",
)
POLICIES = (*STEADY, *("restless",) * 5)  # which reaches what none of the others does, if seldom


class Restless:
    """Any mode at any load: changes its mind as often as it is asked."""

    name = "restless"

    def __init__(self, cost: CostModel) -> None:
        sms = cost.device_sms
        chunks = (Allocation(Mode.MIXED, sms, sms, n) for n in (2, 5))
        self.choices = (whole_device(sms), whole_device(sms, Phase.DECODE), *cost.allocations, *chunks)

    def decide(self, load: Load) -> Allocation:
        seen = (load.waiting_tokens, load.decode and (load.decode.batch, load.decode.kv_tokens), load.prefill)
        return self.choices[crc32(repr(seen).encode()) % len(self.choices)]


NONE_OR_SOME = (
    NO_OVERHEADS,
    Overheads(
        prefill_start_ms=125,
        decode_start_ms=62.5,
        decode_start_per_sequence_ms=31.25,
        mixed_start_ms=250,
        switch_ms=500,
    ),
)


@dataclass(frozen=True)
class Scenario:
    """Everything that a replay depends on."""

    requests: tuple[Request, ...]
    config: SchedulerConfig
    cost: CostModel
    policy: str
    slo: Slo
    overheads: Overheads = NO_OVERHEADS

    def make_policy(self) -> Policy:
        return Restless(self.cost) if self.policy == "restless" else make_policy(self.policy, self.cost, self.slo)

    def scheduler(self, decode_steps: int | None = None) -> Scheduler:
        config = replace(self.config, decode_steps=decode_steps)
        return Scheduler(config, self.make_policy(), device_sms=self.cost.device_sms, layers=self.cost.layers)

    def executor(self) -> SimExecutor:
        return SimExecutor(self.cost, self.overheads)

    def play(self, decode_steps: int | None = None) -> tuple[Scheduler, list[StepRecord]]:
        scheduler = self.scheduler(decode_steps)
        return scheduler, list(replay(self.requests, scheduler, self.executor()))


@st.composite
def scenarios(draw: st.DrawFn, *, roomy: bool = False, policies: tuple[str, ...] = POLICIES) -> Scenario:
    """Few requests, bursty arrivals, small or ample KV, every policy, costs that contend or not."""
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.125, 0.25, 0.5, 1.0, 1.5, 4.0]), min_size=1, max_size=7))
    arrivals = np.cumsum(gaps).tolist()
    requests = tuple(
        Request(i, arrival_s, draw(st.integers(1, 12)), draw(st.integers(1, 9))) for i, arrival_s in enumerate(arrivals)
    )
    block_size = draw(st.integers(1, 4))
    config = SchedulerConfig(
        num_blocks=1000 if roomy else draw(st.integers(-(-12 // block_size), -(-48 // block_size))),
        block_size=block_size,
        max_num_seqs=100 if roomy else draw(st.integers(1, 5)),
        max_num_batched_tokens=draw(st.integers(1, 16)),
        watermark=draw(st.sampled_from([0.0, 0.1, 0.3])),
    )
    layers = draw(st.integers(1, 3))
    cost: CostModel = draw(
        st.sampled_from([BucketCost(layers), ConstantCost(0.25, 0.5, layers=layers, device_sms=BucketCost.device_sms)])
    )
    slo = Slo(1.0, draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])))
    policy, overheads = draw(st.sampled_from(policies)), draw(st.sampled_from(NONE_OR_SOME))
    return Scenario(requests, config, cost, policy, slo, overheads)


def token_times(records: list[StepRecord]) -> dict[int, list[float]]:
    """When each request got each of its tokens."""
    times: dict[int, list[float]] = {}
    for record in records:
        run = record.run
        if run.phase is Phase.DECODE:
            for request in run.requests:
                times.setdefault(request.id, []).extend(record.ends_s.tolist())
        elif record.steps == run.max_steps:
            for request, emits in zip(run.requests, run.emits, strict=True):
                if emits:
                    times.setdefault(request.id, []).append(record.end_s)
    return times


def of_phase(records: list[StepRecord], phase: Phase) -> list[StepRecord]:
    """Runs of a phase, among them fused ones with work of it, as they started."""
    found = [
        record
        for record in records
        if record.run.phase is phase
        or (record.run.phase is Phase.MIXED and (phase is Phase.PREFILL or record.run.decodes))
    ]
    return sorted(found, key=lambda record: record.start_s)


def prompts(run: Run) -> Iterator[tuple[Request, int, int]]:
    """The prompts of a run, their new tokens and their cached ones."""
    parts = zip(run.requests, run.new_tokens, run.context_lens, strict=True)
    yield from list(parts)[run.decodes :]


@settings(deadline=None)
@given(scenarios())
def test_law_1_every_request_gets_all_its_tokens_or_is_dropped_with_a_reason(scenario: Scenario) -> None:
    scheduler, records = scenario.play()
    dropped = {request.id: reason for request, reason in scheduler.dropped}
    finished = [request_id for record in records for request_id in record.finished]
    assert sorted([*finished, *dropped]) == [request.id for request in scenario.requests]
    assert all("does not fit" in reason or "do not fit" in reason for reason in dropped.values())
    times = token_times(records)
    for request in scenario.requests:
        if request.id not in dropped:
            assert len(times[request.id]) == request.output_len
    assert not scheduler.has_unfinished()


@settings(deadline=None)
@given(scenarios(roomy=True))
def test_law_1_without_preemption_every_prompt_token_is_prefilled_once(scenario: Scenario) -> None:
    _, records = scenario.play()
    prefilled = dict.fromkeys((request.id for request in scenario.requests), 0)
    for record in of_phase(records, Phase.PREFILL):
        if record.steps == record.run.max_steps:
            for request, new, context in prompts(record.run):
                assert context == prefilled[request.id]
                prefilled[request.id] += new
    assert prefilled == {request.id: request.prompt_len for request in scenario.requests}


@settings(deadline=None)
@given(scenarios())
def test_law_2_nothing_starts_before_it_arrived_or_ends_before_it_started_and_clocks_never_go_back(
    scenario: Scenario,
) -> None:
    _, records = scenario.play()
    assert all(before.end_s <= after.end_s for before, after in pairwise(records))
    for record in records:
        assert all(request.arrival_s <= record.start_s for request in record.run.requests)
        assert np.all(np.diff([record.start_s, *record.ends_s]) > 0)
    for phase in (Phase.PREFILL, Phase.DECODE):
        assert all(before.end_s <= after.start_s for before, after in pairwise(of_phase(records, phase)))
    for times in token_times(records).values():
        assert np.all(np.diff(times) > 0)


@settings(deadline=None)
@given(scenarios())
def test_law_3_free_and_used_blocks_are_all_blocks_after_every_run(scenario: Scenario) -> None:
    scheduler = scenario.scheduler()
    for _ in replay(scenario.requests, scheduler, scenario.executor()):
        scheduler.blocks.check_integrity()
    assert scheduler.blocks.used == 0
    assert scheduler.blocks.peak_used <= scheduler.config.num_blocks


@settings(deadline=None)
@given(scenarios())
def test_law_4_the_sms_in_flight_never_exceed_the_device_unless_the_mode_shares_them(scenario: Scenario) -> None:
    _, records = scenario.play()
    for one, other in combinations(records, 2):
        assert max(one.run.sms, other.run.sms) <= scenario.cost.device_sms
        if one.start_s < other.end_s and other.start_s < one.end_s:
            assert one.run.allocation == other.run.allocation
            assert {one.run.phase, other.run.phase} == {Phase.PREFILL, Phase.DECODE}
            shares = one.run.allocation.mode in (Mode.CAPPED, Mode.PRIORITY)
            assert shares or one.run.sms + other.run.sms <= scenario.cost.device_sms


def idle_with_work(own: list[StepRecord], work: list[tuple[float, float]]) -> Iterator[tuple[float, float, StepRecord]]:
    """Gaps between runs of one phase during which it had work, and the run after each."""
    busy_until = 0.0
    for record in own:
        begins = [
            max(busy_until, start) for start, end in work if start < min(end, record.start_s) and end > busy_until
        ]
        if begins and min(begins) < record.start_s:
            yield min(begins), record.start_s, record
        busy_until = record.end_s


def has_its_turn(run: Run, config: SchedulerConfig) -> bool:
    """Whether the mode says that the other phase waits for this run: it goes first, or fills the fused steps."""
    at = run.allocation
    if at.mode is Mode.MIXED:
        return run.phase is Phase.DECODE and len(run.requests) >= min(at.chunk_tokens, config.max_num_batched_tokens)
    return at.mode is Mode.EXCLUSIVE and run.phase is at.first


@settings(max_examples=300, deadline=None)
@given(scenarios(roomy=True, policies=STEADY))
def test_law_5_a_phase_with_runnable_work_idles_only_for_a_switch_or_while_the_other_has_its_turn(
    scenario: Scenario,
) -> None:
    _, records = scenario.play()
    prefills, decodes = of_phase(records, Phase.PREFILL), of_phase(records, Phase.DECODE)
    times = token_times(records)
    prefill_work = [(request.arrival_s, times[request.id][0]) for request in scenario.requests]
    decode_work = [(times[request.id][0], times[request.id][-1]) for request in scenario.requests]
    for own, other, work in ((prefills, decodes, prefill_work), (decodes, prefills, decode_work)):
        for start, end, after in idle_with_work(own, work):
            beside = [record for record in other if record.start_s < end and record.end_s > start]
            covered = sum(min(record.end_s, end) - max(record.start_s, start) for record in beside)
            assert covered == end - start, "both phases idle with work"
            waited_for = [record for record in beside if not has_its_turn(record.run, scenario.config)]
            if not waited_for:
                continue
            (record,) = waited_for
            assert record.end_s == end, "idle beyond the end of the run it waited for"
            assert not [t for t in record.ends_s if start < t < end], "waited for more than the step in progress"
            # The last run's end may change who decodes, and with it the policy's mind: the switch is called off.
            alone = record.run.allocation.mode in (Mode.EXCLUSIVE, Mode.MIXED)
            switched = after.run.allocation != record.run.allocation
            assert alone or switched or record.finished or any(record.run.emits)


def log_of(records: list[StepRecord]) -> bytes:
    return repr(
        [(r.run.id, r.run.phase, r.run.allocation, r.start_s, r.ends_s.tolist(), r.finished) for r in records]
    ).encode()


@settings(deadline=None)
@given(scenarios())
def test_law_6_the_same_input_gives_the_same_bytes(scenario: Scenario) -> None:
    assert log_of(scenario.play()[1]) == log_of(scenario.play()[1])


class Oracle(PassingOn):
    """A simulator that is told the true output lengths, which the scheduler is not."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario.executor())
        self.truth = scenario.requests

    def launch(self, run: Run) -> None:
        super().launch(replace(run, requests=tuple(self.truth[request.id] for request in run.requests)))


@settings(deadline=None)
@given(scenarios(), st.lists(st.sampled_from([1, 2, 3, 10, 10**9]), min_size=1))
def test_law_7_whatever_output_lengths_scheduler_and_policy_are_told_they_do_the_same(
    scenario: Scenario, lies: list[int]
) -> None:
    requests = [replace(request, output_len=lies[request.id % len(lies)]) for request in scenario.requests]
    records = list(replay(requests, scenario.scheduler(), Oracle(scenario)))
    assert log_of(records) == log_of(scenario.play()[1])


@pytest.mark.parametrize(("load", "n"), [(0.3, 40_000), (0.6, 60_000), (0.8, 100_000)])
def test_law_9_with_fixed_service_times_the_mean_wait_is_that_of_an_m_d_1_queue(load: float, n: int) -> None:
    service_s, prompt_len = 1.0, 16
    # The quantiles of the exponential distribution in random order: a Poisson process whose rate is exact.
    gaps = -np.log1p(-(np.random.default_rng(7).permutation(n) + 0.5) / n)
    arrivals = np.cumsum(gaps / np.mean(gaps)) * service_s / load
    requests = (Request(i, t, prompt_len, 1) for i, t in enumerate(arrivals.tolist()))
    cost = ConstantCost(service_s, 1.0)
    config = SchedulerConfig(num_blocks=1000, max_num_batched_tokens=prompt_len)
    policy = make_policy("exclusive", cost, Slo(1, 1))
    scheduler = Scheduler(config, policy, device_sms=cost.device_sms, layers=cost.layers)
    ends = np.array([record.end_s for record in replay(requests, scheduler, SimExecutor(cost))])
    waits_s = ends - service_s - arrivals
    # Pollaczek-Khinchine with deterministic service; over seeds, the mean of so many waits varies by 1 to 1.5 %.
    assert np.mean(waits_s) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.02)
    # Lindley's recursion, wait' = max(0, wait + service - gap), is a walk that is held up at its lowest point so far.
    walk_s = np.cumsum(service_s - np.diff(arrivals, prepend=arrivals[0] - service_s))
    assert waits_s == pytest.approx(walk_s - np.minimum.accumulate(np.minimum(walk_s, 0.0)), abs=1e-6)


@settings(max_examples=600, deadline=None)
@given(scenario=scenarios(), decode_steps=st.integers(1, 3))
def test_law_10_coarse_decode_runs_give_the_same_result_as_short_ones(scenario: Scenario, decode_steps: int) -> None:
    coarse, coarse_records = scenario.play()
    fine, fine_records = scenario.play(decode_steps)
    assert token_times(fine_records) == token_times(coarse_records)
    assert (fine.preemptions, fine.switches, fine.dropped) == (coarse.preemptions, coarse.switches, coarse.dropped)
    assert fine.blocks.peak_used == coarse.blocks.peak_used


# The preempted sequence is prefilled anew at the very moment at which its first prefill ended.
PREFILLED_TWICE_ON_END = Scenario(
    (Request(0, 0.0, 8, 6), Request(1, 0.0, 8, 2), Request(2, 0.0, 1, 1)),
    SchedulerConfig(num_blocks=21, max_num_seqs=2, max_num_batched_tokens=8, block_size=1, watermark=0.0),
    BucketCost(layers=2),
    "static-8",
    Slo(1.0, 0.5),
)


@settings(max_examples=2500, deadline=None)
@given(scenarios())
@example(PREFILLED_TWICE_ON_END)
def test_scheduler_and_simulator_agree_with_a_brute_force_model_of_the_whole_system(scenario: Scenario) -> None:
    scheduler, records = scenario.play()
    expected = Reference(
        scenario.config, scenario.make_policy(), scenario.cost, scenario.requests, scenario.overheads
    ).run()
    assert token_times(records) == {
        request_id: [float(t) for t in times] for request_id, times in expected.tokens.items() if times
    }
    assert [request.id for request, _ in scheduler.dropped] == expected.dropped
    assert (scheduler.preemptions, scheduler.switches) == (expected.preemptions, expected.switches)
    assert scheduler.blocks.peak_used == expected.kv_peak


@settings(deadline=None)
@given(scenarios())
def test_a_plan_yields_or_launches_and_never_both(scenario: Scenario) -> None:
    asked: list[set[str]] = [set()]  # of the executor, between one wait and the next
    launched: list[int] = []

    class Recorded(PassingOn):
        def launch(self, run: Run) -> None:
            asked[-1].add("launch")
            launched.append(run.id)
            super().launch(run)

        def yield_(self, run_id: int) -> None:
            asked[-1].add("yield")
            super().yield_(run_id)

        def wait(self, until_s: float | None) -> list[StepRecord]:
            asked.append(set())
            return super().wait(until_s)

    records = list(replay(scenario.requests, scenario.scheduler(), Recorded(scenario.executor())))
    assert sorted(record.run.id for record in records) == launched
    assert {"launch", "yield"} not in asked
