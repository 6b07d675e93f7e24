"""The contract of every executor. Nothing here knows what a step costs, or whether time is virtual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core import Allocation, Mode, Phase, Request, Run, StepRecord
from semipd.cost import ConstantCost
from semipd.executor import Executor
from semipd.sim import SimExecutor

LAYERS = 12
SPLIT, OTHER_SPLIT = Allocation(Mode.SPLIT, 64, 68), Allocation(Mode.SPLIT, 32, 100)
CAPPED, PRIORITY = Allocation(Mode.CAPPED, 64, 132), Allocation(Mode.PRIORITY, 132, 132)
FUSED = Allocation(Mode.MIXED, 132, 132, 64)
PROMPT = 12
LONG = 10**6  # tokens of output that no test waits for


def running_a_model(device: Literal["cpu", "cuda"]) -> AbstractContextManager[Executor]:
    """Runs are launched here whose context nobody computed, hence the blank one."""
    import torch

    from semipd.model_config import ModelConfig
    from semipd.torch_executor import open_executor

    torch.set_num_threads(1)  # a tiny model's threads spend their time waiting for each other
    wide = device == "cuda"  # flashinfer has kernels for wide heads and 16 bits
    model = ModelConfig(
        hidden_size=256 if wide else 16,
        layers=LAYERS,
        query_heads=2,
        kv_heads=1,
        head_dim=128 if wide else 8,
        intermediate_size=256 if wide else 16,
        vocab_size=128,
        rope_theta=1e4,
        dtype="bfloat16" if wide else "float32",
    )
    return open_executor(
        model, device=device, num_blocks=1000, max_num_seqs=8, prefill_sms=[32, 64], blank_context=True
    )


EXECUTORS: dict[str, Callable[[], AbstractContextManager[Executor]]] = {
    "sim": lambda: nullcontext(SimExecutor(ConstantCost(1e-3, 2e-3, layers=LAYERS))),
    "cpu": lambda: running_a_model("cpu"),
    "cuda": lambda: running_a_model("cuda"),
}


def kinds() -> list[object]:
    """Those that can be tested here."""
    if find_spec("torch") is None:
        return ["sim"]
    import torch

    gpu = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]
    if not torch.cuda.is_available():
        gpu.append(pytest.mark.skip(reason="no CUDA device"))
    return ["sim", "cpu", pytest.param("cuda", marks=gpu)]


@pytest.fixture(scope="module", params=kinds())
def fresh(request: pytest.FixtureRequest) -> Iterator[Callable[[], Executor]]:
    """Makes executors of one kind, each of which ends the one before."""
    with ExitStack() as opened:

        def make() -> Executor:
            opened.pop_all().close()
            return opened.enter_context(EXECUTORS[request.param]())

        yield make


@pytest.fixture
def executor(fresh: Callable[[], Executor]) -> Executor:
    return fresh()


def sequences(*output_lens: int) -> tuple[Request, ...]:
    return tuple(Request(i, 0.0, PROMPT, output_len) for i, output_len in enumerate(output_lens))


def prefill(run_id: int, *requests: Request, layers: int = LAYERS, at: Allocation = SPLIT) -> Run:
    """All the prompts; ``layers`` are left."""
    n = len(requests)
    new = tuple(r.prompt_len for r in requests)
    return Run(run_id, Phase.PREFILL, requests, new, (0,) * n, at.prefill_sms, layers, at, (True,) * n)


def decode(run_id: int, *requests: Request, generated: int = 1, max_steps: int = LONG, at: Allocation = SPLIT) -> Run:
    """Each sequence has had so many tokens."""
    cached = tuple(r.prompt_len + generated - 1 for r in requests)
    return Run(run_id, Phase.DECODE, requests, (1,) * len(requests), cached, at.decode_sms, max_steps, at)


def fused(run_id: int, decoding: tuple[Request, ...], *pieces: tuple[Request, int], generated: int = 1) -> Run:
    """A token for each that decodes, and so many first tokens of each prompt."""
    n = len(decoding)
    requests = (*decoding, *(request for request, _ in pieces))
    tokens = (1,) * n + tuple(new for _, new in pieces)
    cached = tuple(r.prompt_len + generated - 1 for r in decoding) + (0,) * len(pieces)
    emits = (True,) * n + tuple(new == request.prompt_len for request, new in pieces)
    return Run(run_id, Phase.MIXED, requests, tokens, cached, FUSED.decode_sms, 1, FUSED, emits, n)


def the_end(executor: Executor) -> StepRecord:
    """Of the one run that ends next."""
    (record,) = executor.wait(None)
    return record


def test_time_starts_at_zero_and_passes_without_work(executor: Executor) -> None:
    start_s = executor.now()
    assert 0 <= start_s < 1
    assert executor.wait(start_s + 0.01) == []
    assert executor.now() >= start_s + 0.01


def test_a_time_that_has_passed_does_not_turn_the_clock_back(executor: Executor) -> None:
    executor.wait(executor.now() + 0.01)
    now_s = executor.now()
    assert executor.wait(0.0) == []
    assert executor.now() >= now_s


def test_waiting_for_ever_for_nothing_is_an_error(executor: Executor) -> None:
    with pytest.raises(RuntimeError):
        executor.wait(None)


def test_a_prefill_run_does_its_layers_and_gives_each_prompt_one_token(executor: Executor) -> None:
    run = prefill(1, *sequences(1, 2, 1))
    executor.launch(run)
    record = the_end(executor)
    assert record.run is run
    assert record.steps == LAYERS
    assert record.finished == (0, 2)  # one token is all they want


def test_a_chunk_that_does_not_complete_its_prompt_gives_no_token(executor: Executor) -> None:
    (request,) = sequences(1)
    first = Run(1, Phase.PREFILL, (request,), (8,), (0,), 64, LAYERS, SPLIT, (False,))
    executor.launch(first)
    assert the_end(executor).finished == ()
    executor.launch(Run(2, Phase.PREFILL, (request,), (PROMPT - 8,), (8,), 64, LAYERS, SPLIT, (True,)))
    assert the_end(executor).finished == (0,)


def test_a_preempted_sequence_gets_its_next_token_from_being_prefilled_anew(executor: Executor) -> None:
    (request,) = sequences(4)
    for generated, finished in ((2, ()), (3, (0,))):
        executor.launch(
            Run(generated, Phase.PREFILL, (request,), (PROMPT + generated,), (0,), 64, LAYERS, SPLIT, (True,))
        )
        assert the_end(executor).finished == finished


def test_a_decode_run_ends_with_the_first_sequence_that_finishes(executor: Executor) -> None:
    executor.launch(decode(1, *sequences(9, 4, 7, 4)))
    record = the_end(executor)
    assert record.steps == 3  # prefill gave the first of four
    assert record.finished == (1, 3)


def test_a_decode_run_ends_at_its_last_step(executor: Executor) -> None:
    executor.launch(decode(1, *sequences(9, 8), max_steps=5))
    record = the_end(executor)
    assert record.steps == 5
    assert record.finished == ()


def test_boundaries_ascend_from_the_start_to_the_end_and_the_clock_has_passed_them(executor: Executor) -> None:
    executor.wait(executor.now() + 0.005)
    launched_s = executor.now()
    executor.launch(prefill(1, *sequences(5)))
    executor.launch(decode(2, Request(7, 0.0, PROMPT, 6)))
    records: list[StepRecord] = []
    while len(records) < 2:
        records += executor.wait(None)
        assert all(record.end_s <= executor.now() for record in records)
    for record in records:
        assert launched_s <= record.start_s <= record.ends_s[0]
        assert np.all(np.diff(record.ends_s) >= 0)
        assert record.end_s == record.ends_s[-1]
    assert records[0].end_s <= records[1].end_s


def test_only_one_run_of_a_phase_is_in_flight(executor: Executor) -> None:
    first = prefill(1, *sequences(5))
    executor.launch(first)
    with pytest.raises(ValueError, match="in flight"):
        executor.launch(prefill(2, *sequences(5)))
    assert the_end(executor).run is first
    executor.launch(prefill(2, *sequences(5)))


def test_partitions_of_two_splits_are_never_in_flight_together(executor: Executor) -> None:
    executor.launch(decode(1, *sequences(5)))
    with pytest.raises(ValueError, match="in flight"):
        executor.launch(prefill(2, *sequences(5), at=OTHER_SPLIT))
    assert the_end(executor).run.id == 1
    executor.launch(prefill(2, *sequences(5), at=OTHER_SPLIT))


@pytest.mark.parametrize("at", [CAPPED, PRIORITY], ids=["capped", "priority"])
def test_both_phases_are_in_flight_together_where_the_mode_lets_them_share_sms(
    executor: Executor, at: Allocation
) -> None:
    executor.launch(decode(1, Request(7, 0.0, PROMPT, 6), at=at))
    executor.launch(prefill(2, *sequences(5), at=at))
    records: list[StepRecord] = []
    while len(records) < 2:
        records += executor.wait(None)
    assert {(record.run.id, record.steps, record.finished) for record in records} == {(1, 5, (7,)), (2, LAYERS, ())}


def test_a_fused_run_is_one_step_and_ends_whom_it_gives_the_last_token(executor: Executor) -> None:
    done, more, one, cut, first = sequences(2, 3, 1, 1, 2)
    executor.launch(prefill(1, done, more))
    the_end(executor)
    executor.launch(fused(2, (done, more), (one, PROMPT), (first, PROMPT), (cut, PROMPT - 5)))
    record = the_end(executor)
    assert (record.steps, set(record.finished)) == (1, {done.id, one.id})
    executor.launch(Run(3, Phase.PREFILL, (cut,), (5,), (PROMPT - 5,), 64, LAYERS, SPLIT, (True,)))
    assert the_end(executor).finished == (cut.id,)
    executor.launch(decode(4, more, generated=2))
    assert the_end(executor).finished == (more.id,)


def test_a_fused_run_may_be_of_prompts_alone(executor: Executor) -> None:
    one, two = sequences(1, 2)
    executor.launch(fused(1, (), (one, PROMPT), (two, PROMPT)))
    executor.yield_(1)  # it is at its only step
    record = the_end(executor)
    assert (record.steps, record.finished) == (1, (one.id,))


def test_a_fused_run_has_the_device_for_itself(executor: Executor) -> None:
    one, two, three = sequences(5, 5, 5)
    executor.launch(fused(1, (), (one, PROMPT)))
    for run in (
        fused(2, (), (two, PROMPT)),
        prefill(3, two, at=FUSED),
        decode(4, three, at=FUSED),
        prefill(5, two),
    ):
        with pytest.raises(ValueError, match="run 1 "):
            executor.launch(run)
    assert the_end(executor).run.id == 1
    executor.launch(decode(6, one, at=FUSED))
    with pytest.raises(ValueError, match="whole device"):
        executor.launch(fused(7, (), (two, PROMPT)))
    assert the_end(executor).finished == (one.id,)


def test_a_fused_run_of_two_steps_or_without_a_prompt_or_in_another_mode_is_refused(executor: Executor) -> None:
    (one,) = sequences(5)
    whole = fused(1, (), (one, PROMPT))
    for run in (replace(whole, max_steps=2), replace(whole, decodes=1), replace(whole, allocation=PRIORITY)):
        with pytest.raises(ValueError, match="expected one step, with a piece of a prompt, at mixed"):
            executor.launch(run)


def test_a_decode_run_that_was_asked_to_yield_ends_early_and_can_go_on(executor: Executor) -> None:
    (request,) = sequences(400)
    executor.launch(decode(1, request))
    executor.wait(executor.now() + 0.01)
    executor.yield_(1)
    done = the_end(executor)
    assert 1 <= done.steps < 399
    assert done.finished == ()
    executor.launch(decode(2, request, generated=1 + done.steps))
    rest = the_end(executor)
    assert (done.steps + rest.steps, rest.finished) == (399, (0,))


def test_a_prefill_run_goes_on_with_the_layers_that_are_left_and_gives_its_token_at_the_last(
    executor: Executor,
) -> None:
    (request,) = sequences(1)
    left = LAYERS
    finished: list[int] = []
    for run_id in range(1, 4):
        executor.launch(prefill(run_id, request, layers=left))
        executor.yield_(run_id)
        done = the_end(executor)
        assert 1 <= done.steps < left
        finished += done.finished
        left -= done.steps
    assert finished == []
    executor.launch(prefill(4, request, layers=left))
    done = the_end(executor)
    assert (done.steps, done.finished) == (left, (0,))


def test_asking_twice_or_after_the_end_changes_nothing(executor: Executor) -> None:
    executor.launch(decode(1, *sequences(400)))
    executor.yield_(1)
    executor.yield_(1)
    assert 1 <= the_end(executor).steps < 399
    executor.launch(decode(2, *sequences(5)))
    executor.yield_(1)
    assert the_end(executor).steps == 4


def test_steps_done_counts_up_to_the_record_and_is_known_in_flight_only(executor: Executor) -> None:
    executor.launch(decode(1, *sequences(LONG), max_steps=60))
    seen = [executor.steps_done(1)]
    records: list[StepRecord] = []
    while not records:
        seen.append(executor.steps_done(1))
        records = executor.wait(executor.now() + 0.001)
    assert seen == sorted(seen)
    assert 0 <= seen[0] <= seen[-1] <= 60 == records[0].steps
    for run_id in (1, 2):
        with pytest.raises(KeyError):
            executor.steps_done(run_id)


def test_waiting_until_a_time_leaves_what_is_unfinished_in_flight(executor: Executor) -> None:
    executor.launch(decode(1, *sequences(LONG)))
    until_s = executor.now() + 0.01
    assert executor.wait(until_s) == []
    assert executor.now() >= until_s
    assert executor.steps_done(1) < LONG
    executor.yield_(1)
    assert the_end(executor).steps >= 1


@settings(max_examples=25, deadline=None)
@given(
    output_lens=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    max_steps=st.integers(1, 5),
    yields=st.lists(st.booleans(), min_size=1, max_size=8),
)
def test_every_request_gets_its_tokens_however_the_work_is_cut(
    fresh: Callable[[], Executor], output_lens: list[int], max_steps: int, yields: list[bool]
) -> None:
    executor = fresh()
    tokens = dict.fromkeys(range(len(output_lens)), 0)
    finished: list[int] = []
    clock_s, run_id, layers = 0.0, 0, LAYERS
    batch = sequences(*output_lens)
    while layers or batch:
        run_id += 1
        generated = max(tokens.values())
        run = (
            prefill(run_id, *batch, layers=layers)
            if layers
            else decode(run_id, *batch, generated=generated, max_steps=max_steps)
        )
        executor.launch(run)
        if yields[run_id % len(yields)]:
            executor.yield_(run_id)
        record = the_end(executor)
        assert clock_s <= record.start_s <= record.end_s
        assert 1 <= record.steps <= run.max_steps
        clock_s = record.end_s
        layers -= record.steps if layers else 0
        for request in batch:
            tokens[request.id] += (layers == 0) if run.phase is Phase.PREFILL else record.steps
        finished += record.finished
        batch = tuple(request for request in batch if request.id not in record.finished)
    assert list(tokens.values()) == output_lens
    assert sorted(finished) == sorted(tokens)
