"""Batching, admission, preemption and switching, with results fed by hand: no executor, no clock."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from semipd.core import Allocation, Load, Mode, Phase, Request, Run, StepRecord
from semipd.cost import ConstantCost
from semipd.policies import Policy, make_policy, whole_device
from semipd.scheduler import Plan, Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.slo import Slo

SMS, LAYERS = 32, 4
SPLIT, FULL = Allocation(Mode.SPLIT, 16, 16), whole_device(SMS)


class Asked:
    """A policy that gives one answer per load and remembers what it was asked."""

    name = "asked"

    def __init__(self, both: Allocation = SPLIT) -> None:
        self.loads: list[Load] = []
        self.both = both

    def decide(self, load: Load) -> Allocation:
        self.loads.append(load)
        return FULL if load.prefill is None or load.decode is None else self.both


class Bench:
    """A scheduler, and the executor's side of it done by hand."""

    def __init__(self, policy: str | Policy = "static-16", **limits: Any) -> None:
        cost = ConstantCost(1e-3, 1e-2, layers=LAYERS, device_sms=SMS)
        chosen = make_policy(policy, cost, Slo(1, 1)) if isinstance(policy, str) else policy
        config = SchedulerConfig(**{"num_blocks": 100, "block_size": 4, "watermark": 0.0, **limits})
        self.scheduler = Scheduler(config, chosen, device_sms=SMS, layers=LAYERS)
        self.ids = 0

    def add(self, *prompt_lens: int) -> None:
        """Requests 0, 1, 2 and so on."""
        for prompt_len in prompt_lens:
            self.scheduler.add(Request(self.ids, 0.0, prompt_len, output_len=10**6))
            self.ids += 1

    def plan(self, steps: int = 0) -> Plan:
        """Schedule, the decode run in flight having done so many steps."""
        plan = self.scheduler.schedule(1.0, lambda _: steps)
        self.scheduler.blocks.check_integrity()
        return plan

    def launch(self, phase: Phase) -> Run:
        """Schedule and expect one launch, of this phase."""
        (run,) = self.plan().launches
        assert run.phase is phase
        return run

    def end(self, run: Run, steps: int | None = None, finished: tuple[int, ...] = ()) -> None:
        """The run ends after so many steps, all by default."""
        ends_s = np.arange(1.0, 1.0 + (run.max_steps if steps is None else steps))
        self.scheduler.complete(StepRecord(run, 0.0, ends_s, finished))

    def decode(self, *prompt_lens: int) -> Run:
        """Prefill new requests, all in one batch, and launch the decode of all."""
        self.add(*prompt_lens)
        self.end(self.launch(Phase.PREFILL))
        return self.launch(Phase.DECODE)


def ids(run: Run) -> list[int]:
    return [request.id for request in run.requests]


# Batching


def test_a_prefill_batch_takes_whole_prompts_in_order_and_cuts_the_last_to_the_token_budget() -> None:
    bench = Bench(max_num_batched_tokens=10)
    bench.add(4, 4, 5, 1)
    run = bench.launch(Phase.PREFILL)
    assert (ids(run), run.new_tokens, run.context_lens) == ([0, 1, 2], (4, 4, 2), (0, 0, 0))
    assert run.emits == (True, True, False)
    assert run.max_steps == LAYERS


def test_the_rest_of_a_cut_prompt_goes_first_in_the_next_batch() -> None:
    bench = Bench("exclusive", max_num_batched_tokens=6)
    bench.add(4, 4, 1)
    bench.end(bench.launch(Phase.PREFILL))
    run = bench.launch(Phase.PREFILL)
    assert (ids(run), run.new_tokens, run.context_lens, run.emits) == ([1, 2], (2, 1), (2, 0), (True, True))


def test_a_prompt_longer_than_several_budgets_is_prefilled_chunk_by_chunk_and_emits_at_its_end_only() -> None:
    bench = Bench(max_num_batched_tokens=5)
    bench.add(12)
    chunks = []
    for _ in range(3):
        run = bench.launch(Phase.PREFILL)
        chunks.append((run.new_tokens, run.context_lens, run.emits))
        bench.end(run)
    assert chunks == [((5,), (0,), (False,)), ((5,), (5,), (False,)), ((2,), (10,), (True,))]
    assert bench.launch(Phase.DECODE).context_lens == (12,)


def test_a_prefill_run_that_yielded_goes_on_with_the_layers_it_has_left() -> None:
    bench = Bench()
    decode = bench.decode(4)
    bench.add(8)
    assert bench.plan().yields == (decode.id,)
    bench.end(decode, 1)
    _, prefill = bench.plan().launches
    bench.end(prefill, 3)
    rest = bench.launch(Phase.PREFILL)
    assert (ids(rest), rest.new_tokens, rest.max_steps) == ([1], (8,), 1)


def test_decode_context_is_what_is_cached_and_the_newest_token_is_not() -> None:
    bench = Bench()
    run = bench.decode(7)
    assert run.context_lens == (7,)  # one token generated: 7 - 7 + 1
    bench.end(run, 5)
    assert bench.launch(Phase.DECODE).context_lens == (12,)


def test_a_sequence_joins_decode_at_the_next_boundary_after_its_first_token() -> None:
    bench = Bench()
    first = bench.decode(4)
    bench.add(8)
    bench.plan()
    bench.end(first, 1)
    decode, prefill = bench.plan().launches
    bench.end(prefill)
    assert bench.plan(steps=3).yields == (decode.id,)
    assert bench.plan(steps=3) == Plan()  # the boundary is not reached
    bench.end(decode, 4)
    both = bench.launch(Phase.DECODE)
    assert (ids(both), both.context_lens) == ([0, 1], (9, 8))


def test_a_finished_sequence_leaves_the_decode_batch_and_the_others_stay_in_order() -> None:
    bench = Bench()
    run = bench.decode(4, 5, 6)
    bench.end(run, 2, finished=(1,))
    after = bench.launch(Phase.DECODE)
    assert (ids(after), after.context_lens) == ([0, 2], (6, 8))


def test_a_request_of_one_token_never_decodes() -> None:
    bench = Bench()
    bench.add(4)
    bench.end(bench.launch(Phase.PREFILL), finished=(0,))
    assert bench.plan() == Plan()
    assert not bench.scheduler.has_unfinished()
    assert bench.scheduler.blocks.used == 0


def test_max_num_seqs_bounds_sequences_prefilling_and_decoding() -> None:
    bench = Bench("exclusive", max_num_seqs=3)
    bench.add(4, 4, 4, 4)
    prefill = bench.launch(Phase.PREFILL)
    assert ids(prefill) == [0, 1, 2]
    bench.end(prefill)
    decode = bench.launch(Phase.DECODE)  # prefill first, were there a place
    bench.end(decode, 1, finished=(0,))
    assert ids(bench.launch(Phase.PREFILL)) == [3]


def test_decode_steps_bounds_a_decode_run() -> None:
    assert Bench(decode_steps=3).decode(4).max_steps == 3


# KV cache


def test_a_decode_run_may_do_the_steps_whose_blocks_are_free() -> None:
    run = Bench(num_blocks=5, block_size=4).decode(4, 7)
    # 1 + 2 blocks held. Sequence 0 takes one at step 1 and one at step 5, sequence 1 one at step 2.
    assert run.max_steps == 4


def test_an_admission_keeps_the_watermark_free_while_sequences_decode_and_not_otherwise() -> None:
    bench = Bench("exclusive", num_blocks=10, block_size=4, watermark=0.2)
    bench.add(38)
    assert bench.launch(Phase.PREFILL).new_tokens == (38,)

    bench = Bench("exclusive", num_blocks=10, block_size=4, watermark=0.2)
    decode = bench.decode(3)
    bench.add(29)  # 8 of the 9 free blocks
    assert not bench.plan().yields
    bench.end(decode, 1, finished=(0,))
    assert bench.launch(Phase.PREFILL).new_tokens == (29,)


def test_admission_sees_the_blocks_that_the_decode_run_in_flight_has_taken_by_now() -> None:
    for steps, admitted in ((3, True), (4, False)):
        bench = Bench("exclusive", num_blocks=4, block_size=4)
        decode = bench.decode(4)  # in its first step it takes its second block, in its fifth its third
        bench.add(8)
        assert bool(bench.plan(steps).yields) == admitted
        assert bench.scheduler.blocks.tokens(decode.requests[0].id) == 4 + steps + 1


@pytest.mark.parametrize("at_boundary", [True, False])
def test_a_decode_run_that_a_batch_leaves_too_few_blocks_for_yields_and_goes_on_with_fewer_steps(
    at_boundary: bool,
) -> None:
    bench = Bench(num_blocks=10, block_size=4, max_num_batched_tokens=8)
    decode = bench.decode(4)
    bench.add(24)
    bench.plan()
    bench.end(decode, 1)
    decode, chunk = bench.plan().launches
    assert (decode.context_lens, decode.max_steps) == ((5,), 4 * 8 - 5)  # the chunk has 2 of the 10 blocks
    bench.end(chunk)
    assert bench.plan(steps=3) == Plan(yields=(decode.id,))
    if at_boundary:
        bench.end(decode, 3)
        shorter, chunk = bench.plan().launches
    else:
        (chunk,) = bench.plan(steps=3).launches
        bench.end(decode, 4)
        shorter = bench.launch(Phase.DECODE)
    assert chunk.context_lens == (8,)
    assert shorter.context_lens[0] + shorter.max_steps == 4 * 6  # both chunks have 4


def test_the_latest_arrival_is_preempted_and_prefilled_anew_with_its_tokens_before_all_others() -> None:
    bench = Bench("exclusive", num_blocks=5, block_size=4)
    run = bench.decode(4, 8)
    assert run.max_steps == 4
    bench.end(run)
    bench.add(4)
    alone = bench.launch(Phase.DECODE)  # 4 + 8 cached tokens and 2 more would take 6 blocks
    assert ids(alone) == [0]
    assert bench.scheduler.preemptions == 1
    bench.end(alone, 1, finished=(0,))
    again = bench.launch(Phase.PREFILL)
    assert (ids(again), again.new_tokens, again.emits) == ([1, 2], (13, 4), (True, True))  # 8 + 5 generated


def test_a_sequence_that_outgrows_the_cache_alone_is_dropped_with_its_reason() -> None:
    bench = Bench(num_blocks=2, block_size=4)
    run = bench.decode(6)
    assert run.max_steps == 2
    bench.end(run)
    assert bench.plan() == Plan()
    ((request, reason),) = bench.scheduler.dropped
    assert (request.id, reason) == (0, "its prompt of 6 tokens grown to 9 does not fit the KV cache of 8 tokens")
    assert not bench.scheduler.has_unfinished()
    assert bench.scheduler.preemptions == 0
    assert bench.scheduler.blocks.used == 0


def test_a_prompt_that_leaves_no_room_for_one_more_token_is_dropped_on_arrival() -> None:
    bench = Bench(num_blocks=2, block_size=4)
    bench.add(7, 8)
    assert [(request.id, reason) for request, reason in bench.scheduler.dropped] == [
        (1, "a prompt of 8 tokens and its first do not fit the KV cache of 8 tokens")
    ]
    assert ids(bench.launch(Phase.PREFILL)) == [0]


# Allocations


def test_a_phase_alone_has_the_whole_device_and_both_have_their_partitions() -> None:
    bench = Bench()
    bench.add(4)
    prefill = bench.launch(Phase.PREFILL)
    assert (prefill.allocation, prefill.sms) == (FULL, SMS)
    bench.end(prefill)
    decode = bench.launch(Phase.DECODE)
    assert (decode.allocation, decode.sms) == (FULL, SMS)
    bench.add(4)
    bench.plan()
    bench.end(decode, 1)
    assert [(run.phase, run.allocation, run.sms) for run in bench.plan().launches] == [
        (Phase.DECODE, SPLIT, 16),
        (Phase.PREFILL, SPLIT, 16),
    ]
    assert bench.scheduler.switches == 1


def test_a_new_allocation_waits_until_both_runs_in_flight_have_ended() -> None:
    bench = Bench()
    decode = bench.decode(4, 4)
    bench.add(4)
    bench.plan()
    bench.end(decode, 1)
    decode, prefill = bench.plan().launches
    bench.end(decode, 1, finished=(0, 1))  # decode is idle: prefill may have the whole device
    assert bench.plan().yields == (prefill.id,)
    assert bench.scheduler.draining
    assert bench.plan() == Plan()
    bench.end(prefill, 2)
    rest = bench.launch(Phase.PREFILL)
    assert (rest.allocation, rest.max_steps) == (FULL, LAYERS - 2)
    assert bench.scheduler.switches == 2


def test_exclusive_prefills_first_and_decode_waits() -> None:
    bench = Bench("exclusive")
    decode = bench.decode(4)
    bench.add(4)
    assert bench.plan().yields == (decode.id,)
    bench.end(decode, 1)
    prefill = bench.launch(Phase.PREFILL)
    assert bench.plan() == Plan()
    bench.add(5)
    bench.end(prefill)
    assert ids(bench.launch(Phase.PREFILL)) == [2]
    assert bench.scheduler.switches == 0


def test_exclusive_decodes_while_no_prompt_can_be_admitted() -> None:
    bench = Bench("exclusive", num_blocks=6, block_size=4)
    decode = bench.decode(8)
    bench.add(16)
    assert bench.plan() == Plan()
    bench.end(decode, 2)
    assert ids(bench.launch(Phase.DECODE)) == [0]


def test_the_policy_is_asked_when_a_phase_or_the_decode_batch_changes_and_not_at_every_step() -> None:
    policy = Asked()
    bench = Bench(policy, decode_steps=1)
    decode = bench.decode(4, 4)
    assert len(policy.loads) == 2  # a prefill batch is about to start, then decode is
    for _ in range(5):
        bench.end(decode)
        decode = bench.launch(Phase.DECODE)
    assert len(policy.loads) == 2
    bench.end(decode, finished=(0,))
    decode = bench.launch(Phase.DECODE)
    assert len(policy.loads) == 3
    bench.add(9)
    bench.plan()
    load = policy.loads[-1]
    assert load.prefill is not None
    assert load.decode is not None
    assert (load.prefill.tokens, load.decode.batch, load.decode.kv_tokens) == (9, 1, 4 + 6 + 1)
    assert (load.waiting_requests, load.waiting_tokens, load.oldest_wait_s, load.split) == (1, 9, 1.0, None)


def test_the_policy_is_told_the_last_split_also_after_a_phase_had_the_whole_device() -> None:
    both = Allocation(Mode.SPLIT, 16, 16)
    policy = Asked(both)
    bench = Bench(policy)
    decode = bench.decode(4)
    assert {load.split for load in policy.loads} == {None}
    bench.add(4)
    assert bench.plan().yields == (decode.id,)
    bench.end(decode, 1)
    prefill, decode = bench.plan().launches
    assert (prefill.allocation, decode.allocation) == (both, both)
    bench.end(prefill)
    assert bench.plan().yields == (decode.id,)
    bench.end(decode, 1)
    (decode,) = bench.plan().launches
    assert decode.allocation == FULL
    bench.add(4)
    bench.plan()
    assert policy.loads[-1].split == both


@pytest.mark.parametrize(
    "both", [Allocation(Mode.SPLIT, 16, 24), Allocation(Mode.CAPPED, 16, 33), Allocation(Mode.MIXED, 32, 32)]
)
def test_an_allocation_beyond_the_device_or_without_a_token_for_a_fused_batch_is_refused(both: Allocation) -> None:
    bench = Bench(Asked(both))
    bench.decode(4)
    bench.add(4)
    with pytest.raises(ValueError, match=r"policy asked chose .*; expected at most 32 SMs, and a fused batch of"):
        bench.plan()


@pytest.mark.parametrize("policy", ["capped-16", "priority"])
def test_capped_and_priority_start_prefill_beside_a_decode_run_that_goes_on(policy: str) -> None:
    bench = Bench(policy, decode_steps=9)
    decode = bench.decode(4)
    bench.add(4)
    prefill = bench.launch(Phase.PREFILL)
    assert (prefill.sms, decode.sms) == ({"capped-16": 16, "priority": 32}[policy], 32)
    assert prefill.allocation == decode.allocation


def test_decode_first_prefills_only_when_nothing_decodes() -> None:
    bench = Bench("exclusive-decode")
    decode = bench.decode(4)
    bench.add(4)
    assert bench.plan() == Plan()
    bench.end(decode, 3)
    again = bench.launch(Phase.DECODE)
    bench.end(again, 1, finished=(0,))
    assert ids(bench.launch(Phase.PREFILL)) == [1]


# Fused batches


def test_a_fused_step_has_a_token_for_all_that_decode_then_pieces_of_prompts_up_to_the_chunk() -> None:
    bench = Bench("chunked-8")
    bench.add(5)
    first = bench.launch(Phase.MIXED)
    assert (first.decodes, first.new_tokens, first.emits, first.max_steps) == (0, (5,), (True,), 1)
    bench.add(4, 9)
    assert bench.plan() == Plan()
    bench.end(first)
    both = bench.launch(Phase.MIXED)
    assert (ids(both), both.decodes) == ([0, 1, 2], 1)
    assert (both.new_tokens, both.context_lens, both.emits) == ((1, 4, 3), (5, 0, 0), (True, True, False))
    assert (both.sms, both.allocation.name) == (SMS, "mixed")
    bench.end(both)
    third = bench.launch(Phase.MIXED)
    assert (ids(third), third.decodes) == ([0, 1, 2], 2)
    assert (third.new_tokens, third.context_lens, third.emits) == ((1, 1, 6), (6, 4, 3), (True, True, True))
    bench.end(third, finished=(1, 2))
    alone = bench.launch(Phase.DECODE)
    assert (ids(alone), alone.context_lens) == ([0], (7,))
    assert bench.scheduler.blocks.used == 2


def test_in_chunked_prefill_decode_goes_on_by_itself_until_a_prompt_comes_and_then_yields() -> None:
    bench = Bench("chunked-8")
    bench.add(4)
    bench.end(bench.launch(Phase.MIXED))
    decode = bench.launch(Phase.DECODE)
    assert decode.max_steps > 1
    bench.add(4)
    assert bench.plan(steps=2).yields == (decode.id,)
    assert bench.plan(steps=2) == Plan()
    bench.end(decode, 3)
    assert bench.launch(Phase.MIXED).context_lens == (7, 0)
    assert bench.scheduler.switches == 0


def test_a_fused_step_is_no_larger_than_a_batch_may_be_and_decode_alone_may_fill_it() -> None:
    bench = Bench("chunked-100", max_num_batched_tokens=3)
    bench.add(2, 2)
    run = bench.launch(Phase.MIXED)
    assert run.new_tokens == (2, 1)
    bench.end(run)
    run = bench.launch(Phase.MIXED)
    assert (run.new_tokens, run.decodes) == ((1, 1), 1)
    bench.end(run)
    bench.add(1)
    run = bench.launch(Phase.MIXED)
    assert (run.new_tokens, run.decodes) == ((1, 1, 1), 2)
    bench.end(run)
    bench.add(1)
    assert bench.launch(Phase.DECODE).new_tokens == (1, 1, 1)  # each of the three decodes, and no token is left


def test_in_a_fused_step_decoding_sequences_grow_first_and_the_latest_is_preempted() -> None:
    bench = Bench("chunked-5", num_blocks=4, block_size=4)
    bench.add(7, 7)
    for new_tokens in ((5,), (2, 3), (1, 4)):
        run = bench.launch(Phase.MIXED)
        assert run.new_tokens == new_tokens
        bench.end(run)
    run = bench.launch(Phase.DECODE)  # the ninth token of the first takes a third block, which leaves one
    assert bench.scheduler.preemptions == 1
    assert (ids(run), run.context_lens) == ([0], (8,))


def test_the_first_piece_of_a_prompt_waits_until_all_of_it_fits() -> None:
    bench = Bench("static-16", num_blocks=4, block_size=4, max_num_batched_tokens=4)
    first = bench.decode(4)
    bench.add(11)
    assert bench.plan() == Plan()  # two blocks are free: enough for the piece, but the prompt takes three
    bench.end(first, 1, finished=(0,))
    assert bench.launch(Phase.PREFILL).new_tokens == (4,)


def test_layers_that_were_stopped_are_finished_before_fused_steps_begin() -> None:
    fused = Allocation(Mode.MIXED, SMS, SMS, 8)

    class Changing:
        name = "changing"

        def decide(self, load: Load) -> Allocation:
            return SPLIT if load.waiting_requests == 0 else fused

    bench = Bench(Changing())
    bench.add(4)
    bench.end(bench.launch(Phase.MIXED))
    bench.end(bench.launch(Phase.DECODE), 2)
    bench.scheduler.policy = Asked()
    bench.add(4)
    decode, prefill = bench.plan().launches
    bench.scheduler.policy = Changing()
    bench.add(4)
    bench.end(decode, 1, finished=(0,))
    assert bench.plan().yields == (prefill.id,)
    bench.end(prefill, 1)
    rest = bench.launch(Phase.PREFILL)
    assert (ids(rest), rest.max_steps, rest.allocation) == ([1], LAYERS - 1, fused)
    bench.end(rest)
    assert ids(bench.launch(Phase.MIXED)) == [1, 2]


# Misuse


def test_an_unfinished_request_cannot_be_added_again() -> None:
    bench = Bench()
    bench.add(4)
    with pytest.raises(ValueError, match="request 0 is unfinished"):
        bench.scheduler.add(Request(0, 0.0, 4, 1))


def test_a_run_that_is_not_in_flight_cannot_complete() -> None:
    bench = Bench()
    bench.add(4)
    run = bench.launch(Phase.PREFILL)
    bench.end(run)
    with pytest.raises(ValueError, match="prefill run 1 is not in flight"):
        bench.end(run)


@pytest.mark.parametrize(
    "limits", [{"num_blocks": 0}, {"max_num_seqs": 0}, {"decode_steps": 0}, {"watermark": 1.0}, {"watermark": -0.1}]
)
def test_limits_that_admit_nothing_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(limits))}: found"):
        SchedulerConfig(**{"num_blocks": 10, **limits})
