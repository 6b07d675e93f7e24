"""The executor that runs a model: law 11, KV blocks, tokens, look-ahead and what it refuses.

What drives a GPU is tested on a CPU that lags behind like one (``lagging_device``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BucketCost

from semipd.config import load
from semipd.core import Allocation, InputError, IntArray, Mode, Phase, Request, Run, StepRecord
from semipd.driver import replay
from semipd.model_config import ModelConfig
from semipd.policies import make_policy
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.slo import Slo

torch = pytest.importorskip("torch")

from lagging_device import LaggingDevice  # noqa: E402 - after the check for torch
from plain_forward import plain_tokens  # noqa: E402 - likewise

from semipd.attention import TorchAttention, TorchPlan  # noqa: E402 - likewise
from semipd.flight import LOOK_AHEAD  # noqa: E402 - likewise
from semipd.model import Model, Weights, random_weights  # noqa: E402 - likewise
from semipd.padding import decode_rows, prefill_rows  # noqa: E402 - likewise
from semipd.paged_kv import PagedKvCache, Ragged  # noqa: E402 - likewise
from semipd.sequences import random_prompts  # noqa: E402 - likewise
from semipd.torch_device import CpuDevice, Device, partition_of  # noqa: E402 - likewise
from semipd.torch_executor import TorchExecutor, open_executor  # noqa: E402 - likewise

torch.set_num_threads(1)  # a tiny model's threads spend their time waiting for each other

TINY = load(Path(__file__).parent.parent / "configs" / "models" / "tiny.yaml", ModelConfig)
MODELS = {
    "llama": TINY,
    "qwen3": TINY.model_copy(update={"qk_norm": True, "tied_embeddings": True}),
    "deep": TINY.model_copy(update={"layers": 9}),
}
POLICIES = (
    *("exclusive", "exclusive-decode", "static-8", "static-24", "capped-8", "priority"),
    *("chunked-2", "chunked-5", "chunked-16", "adaptive"),
)
SPLIT = Allocation(Mode.SPLIT, 64, 68)
MOST_OUTPUT = 9


@cache
def weights(name: str) -> Weights:
    return random_weights(MODELS[name], "cpu")


@cache
def alone(name: str, request_id: int, prompt_len: int) -> list[int]:
    """Tokens of a request that has the model for itself."""
    prompt = random_prompts(TINY.vocab_size)(Request(request_id, 0.0, prompt_len, 1)).tolist()
    return plain_tokens(MODELS[name], weights(name), prompt, MOST_OUTPUT)


def executor_of(
    num_blocks: int, block_size: int = 4, *, name: str = "llama", device: Device | None = None, max_num_seqs: int = 8,
    captured_tokens: int = 2048, blank_context: bool = False, prompts: Callable[[Request], IntArray] | None = None,
) -> TorchExecutor:  # fmt: skip
    kv = PagedKvCache(MODELS[name], num_blocks, block_size, "cpu")
    return TorchExecutor(
        Model(MODELS[name], weights(name), kv), TorchAttention(kv), device or CpuDevice(),
        max_num_seqs=max_num_seqs, captured_tokens=captured_tokens, blank_context=blank_context, prompts=prompts,
    )  # fmt: skip


def prefill(run_id: int, *requests: Request, layers: int = TINY.layers, at: Allocation = SPLIT) -> Run:
    new, none = tuple(r.prompt_len for r in requests), (0,) * len(requests)
    return Run(run_id, Phase.PREFILL, requests, new, none, at.prefill_sms, layers, at, (True,) * len(requests))


def decode(run_id: int, *requests: Request, generated: int = 1, max_steps: int = 100, at: Allocation = SPLIT) -> Run:
    cached = tuple(r.prompt_len + generated - 1 for r in requests)
    return Run(run_id, Phase.DECODE, requests, (1,) * len(requests), cached, at.decode_sms, max_steps, at)


def do(executor: TorchExecutor, run: Run) -> StepRecord:
    executor.launch(run)
    (record,) = executor.wait(None)
    return record


def serve(
    requests: tuple[Request, ...], config: SchedulerConfig, policy: str, executor: TorchExecutor
) -> tuple[Scheduler, list[StepRecord]]:
    """The real scheduler and loop."""
    made = make_policy(policy, BucketCost(TINY.layers), Slo(1.0, 0.5))
    scheduler = Scheduler(config, made, device_sms=BucketCost.device_sms, layers=TINY.layers)
    executor.follow(scheduler.blocks.tokens)
    records = []
    for record in replay(requests, scheduler, executor):
        scheduler.blocks.check_integrity()
        records.append(record)
    return scheduler, records


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_law_11_scheduling_never_changes_a_generated_token(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(["llama", "qwen3"]))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.004]), min_size=1, max_size=6))
    requests = tuple(
        Request(i, arrival_s, draw(st.integers(1, 12)), draw(st.integers(1, MOST_OUTPUT)))
        for i, arrival_s in enumerate(np.cumsum(gaps).tolist())
    )
    block_size = draw(st.integers(1, 4))
    config = SchedulerConfig(
        num_blocks=draw(st.integers(-(-16 // block_size), -(-60 // block_size))),
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 20)),
        watermark=draw(st.sampled_from([0.0, 0.1])),
        decode_steps=draw(st.sampled_from([None, 1, 3])),
    )
    lags = draw(st.none() | st.tuples(st.integers(1, 6), st.integers(1, 6)))
    device = CpuDevice() if lags is None else LaggingDevice(*lags)
    captured = draw(st.sampled_from([0, 5, 20]))
    executor = executor_of(config.num_blocks, block_size, name=name, device=device, captured_tokens=captured)
    scheduler, records = serve(requests, config, draw(st.sampled_from(POLICIES)), executor)
    finished = [request_id for record in records for request_id in record.finished]
    dropped = [request.id for request, _ in scheduler.dropped]
    assert sorted(finished + dropped) == [request.id for request in requests]
    for request in requests:
        expected = alone(name, request.id, request.prompt_len)
        found = list(executor.tokens(request.id))
        assert found == expected[: len(found)]
        assert len(found) == request.output_len or request.id in dropped


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("exclusive-decode", "chunked-2")])
def test_law_11_holds_with_preemption_and_chunks_in_policies_that_do_both(policy: str, lag: int) -> None:
    requests = tuple(Request(i, 0.0, 5 + i, 9) for i in range(6))
    config = SchedulerConfig(num_blocks=10, block_size=4, max_num_batched_tokens=7, watermark=0.0)
    device = LaggingDevice(lag, 2 * lag) if lag else CpuDevice()
    executor = executor_of(config.num_blocks, device=device)
    scheduler, records = serve(requests, config, policy, executor)
    assert scheduler.preemptions > 0
    assert any(not all(record.run.emits) for record in records)
    assert {r.id: list(executor.tokens(r.id)) for r in requests} == {
        r.id: alone("llama", r.id, r.prompt_len) for r in requests
    }
    assert executor.sequences.blocks.free == config.num_blocks


def test_tokens_depend_on_all_that_is_cached() -> None:
    """Or law 11 would say little: that a key or value is wrong anywhere has to show."""
    request = Request(0, 0.0, 12, 9)
    expected = alone("llama", 0, 12)
    assert len(set(expected)) > 5
    changed = 0
    for position in range(12):
        executor = executor_of(10)
        do(executor, prefill(1, request))
        block = executor.sequences.blocks.of(0)[position // 4]
        kv = executor.engine.model.cache
        kv.values[0, block, position % 4] += 3.0
        do(executor, decode(2, request))
        assert executor.tokens(0)[0] == expected[0]
        changed += list(executor.tokens(0)) != expected
    assert changed >= 10


def test_prompts_can_be_given() -> None:
    prompt = np.array([7, 3, 198, 0])
    executor = executor_of(10, prompts=lambda request: prompt[: request.prompt_len])
    request = Request(0, 0.0, 4, 3)
    do(executor, prefill(1, request))
    do(executor, decode(2, request))
    assert list(executor.tokens(0)) == plain_tokens(TINY, weights("llama"), prompt.tolist(), 3)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [1, 2, 3, 199], [1, 2, 3, -1]])
def test_a_prompt_that_does_not_fit_its_request_or_the_vocabulary_is_refused(prompt: list[int]) -> None:
    executor = executor_of(10, prompts=lambda request: np.array(prompt))  # noqa: ARG005 - whoever asks
    with pytest.raises(ValueError, match=r"request 5: prompt: .*expected 4 tokens from 0 to 198"):
        executor.launch(prefill(1, Request(5, 0.0, 4, 1)))


def test_random_prompts_depend_on_seed_and_request_alone() -> None:
    draw = random_prompts(1000, seed=1)
    requests = [Request(i, 0.0, 40, 1) for i in (3, 8, 3)]
    first, second, again = (draw(request).tolist() for request in requests)
    assert first == again != second
    assert random_prompts(1000, seed=2)(requests[0]).tolist() != first


def test_tokens_are_known_when_their_run_has_ended() -> None:
    executor = executor_of(20)
    request = Request(0, 0.0, 6, 5)
    assert executor.tokens(0) == ()
    counts = []
    for run in (prefill(1, request), decode(2, request, max_steps=2), decode(3, request, generated=3)):
        executor.launch(run)
        before = executor.tokens(0)
        executor.wait(None)
        counts.append((len(before), len(executor.tokens(0))))
    assert counts == [(0, 1), (1, 3), (3, 5)]


def test_a_prefill_batch_goes_on_after_a_yield_at_another_split() -> None:
    requests = tuple(Request(i, 0.0, 5 + i, 1) for i in range(3))
    executor = executor_of(20)
    first = prefill(1, *requests)
    executor.launch(first)
    executor.yield_(1)
    (record,) = executor.wait(None)
    assert (record.steps, record.finished) == (1, ())
    rest = prefill(2, *requests, layers=TINY.layers - 1, at=Allocation(Mode.SPLIT, 32, 100))
    assert do(executor, rest).finished == (0, 1, 2)
    assert [executor.tokens(i)[0] for i in range(3)] == [alone("llama", i, 5 + i)[0] for i in range(3)]


def test_only_prompts_that_are_complete_get_a_token() -> None:
    requests = tuple(Request(i, 0.0, 5 + i, 2) for i in range(3))
    executor = executor_of(20)
    new, emits = (4, 6, 7), (False, True, True)
    do(executor, Run(1, Phase.PREFILL, requests, new, (0,) * 3, 64, TINY.layers, SPLIT, emits))
    assert [list(executor.tokens(i)) for i in range(3)] == [[], *(alone("llama", i, 5 + i)[:1] for i in (1, 2))]
    rest = Run(2, Phase.PREFILL, requests[:1], (1,), (4,), 64, TINY.layers, SPLIT, (True,))
    assert do(executor, rest).finished == ()
    assert list(executor.tokens(0)) == alone("llama", 0, 5)[:1]


@pytest.mark.parametrize("lag", [0, 2])
def test_law_11_holds_for_fused_batches(lag: int) -> None:
    """Prompts in pieces beside sequences that decode, as a scheduler of chunked prefill would have it."""
    requests = tuple(Request(i, 0.0, 5 + 4 * i, 9) for i in range(4))
    executor = executor_of(40, device=LaggingDevice(lag, lag) if lag else CpuDevice())
    cached, generated, finished = dict.fromkeys(range(4), 0), dict.fromkeys(range(4), 0), []
    step = 0
    while len(finished) < 4:
        pieces: list[tuple[Request, int, bool]] = []
        room = 6
        for request in sorted(requests, key=lambda r: -generated[r.id]):
            if request.id in finished or room == 0:
                continue
            decodes = generated[request.id] > 0
            new = 1 if decodes else min(room, request.prompt_len - cached[request.id])
            room -= new
            pieces.append((request, new, decodes or cached[request.id] + new == request.prompt_len))
        step += 1
        fused = Run(
            step, Phase.MIXED, tuple(r for r, _, _ in pieces), tuple(n for _, n, _ in pieces),
            tuple(cached[r.id] for r, _, _ in pieces), 132, 1, Allocation(Mode.MIXED, 132, 132, 6),
            tuple(e for _, _, e in pieces), sum(generated[r.id] > 0 for r, _, _ in pieces),
        )  # fmt: skip
        alone_now = fused.decodes == len(pieces)
        record = do(executor, replace(fused, phase=Phase.DECODE, emits=(), decodes=0) if alone_now else fused)
        assert record.steps == 1
        for request, new, emits in pieces:
            cached[request.id] += new
            generated[request.id] += emits
        finished += record.finished
    assert {i: list(executor.tokens(i)) for i in range(4)} == {i: alone("llama", i, 5 + 4 * i) for i in range(4)}
    assert executor.sequences.blocks.free == 40


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt_len", [1, 9, 17])
def test_a_batch_goes_on_where_nothing_was_captured_for_it(name: str, prompt_len: int) -> None:
    executor, layers = executor_of(20, name=name, device=LaggingDevice(3, 3)), MODELS[name].layers
    request = Request(0, 0.0, prompt_len, 5)
    first = prefill(1, request, layers=layers)
    executor.launch(first)
    executor._flights()[0].feed()
    executor.yield_(1)
    (record,) = executor.wait(None)
    assert record.steps < layers
    there = Allocation(Mode.SPLIT, 32, 100)
    do(executor, replace(first, id=2, max_steps=layers - record.steps, allocation=there, sms=32))
    do(executor, decode(3, request))
    assert list(executor.tokens(0)) == alone(name, 0, prompt_len)[:5]


@pytest.mark.parametrize("between", ["fused", "prepared"])
def test_a_stopped_batch_is_given_up_when_others_get_its_memory(between: str) -> None:
    executor, request, other = executor_of(20, device=LaggingDevice(3, 3)), Request(0, 0.0, 9, 5), Request(1, 0.0, 5, 3)
    first = prefill(1, request)
    executor.launch(first)
    executor._flights()[0].feed()
    executor.yield_(1)
    (record,) = executor.wait(None)
    if between == "fused":
        whole = Allocation(Mode.MIXED, 132, 132, 16)
        do(executor, Run(2, Phase.MIXED, (other,), (5,), (0,), 132, 1, whole, (True,)))
    else:
        executor.prepare([SPLIT], 8)
    with pytest.raises(ValueError, match="but of no batch that was stopped"):
        executor.launch(replace(first, id=3, max_steps=TINY.layers - record.steps))


def test_layers_that_no_stopped_batch_has_left_are_refused() -> None:
    one, other = (Request(i, 0.0, 5, 1) for i in range(2))
    executor = executor_of(20)
    with pytest.raises(ValueError, match="1 layers are left, but of no batch"):
        executor.launch(prefill(1, one, layers=1))
    executor.launch(prefill(2, one))
    executor.yield_(2)
    executor.wait(None)
    with pytest.raises(ValueError, match="1 layers are left, but of no batch"):
        executor.launch(prefill(3, other, layers=1))
    do(executor, prefill(4, one, layers=1))
    with pytest.raises(ValueError, match="1 layers are left, but of no batch"):
        executor.launch(prefill(5, one, layers=1))


def test_a_context_that_was_never_computed_is_refused_unless_it_may_be_blank() -> None:
    request = Request(0, 0.0, 5, 4)
    with pytest.raises(ValueError, match="found 5 cached tokens and 1 new ones; expected 0 cached of 5"):
        executor_of(20).launch(decode(1, request))
    executor = executor_of(20, blank_context=True)
    assert do(executor, decode(1, request)).steps == 3


def test_more_sequences_than_there_is_room_for_are_refused() -> None:
    requests = [Request(i, 0.0, 2, 3) for i in range(3)]
    executor = executor_of(20, max_num_seqs=2)
    with pytest.raises(ValueError, match="3 sequences; expected at most 2"):
        executor.launch(decode(1, *requests))


def test_a_sequence_that_outgrows_the_model_is_refused() -> None:
    executor = executor_of(2000)
    executor.launch(prefill(1, Request(7, 0.0, TINY.max_positions + 1, 1)))
    with pytest.raises(ValueError, match="request 7: found 4097 tokens; expected at most 4096"):
        executor.wait(None)


def test_blocks_that_the_scheduler_does_not_count_are_an_error() -> None:
    executor = executor_of(2)
    executor.launch(prefill(1, Request(0, 0.0, 9, 1)))
    with pytest.raises(RuntimeError, match="needs 3 KV blocks more, 2 are free"):
        executor.wait(None)


def test_a_preempted_sequence_gives_its_blocks_to_who_needs_them() -> None:
    executor = executor_of(4)
    old, new = Request(0, 0.0, 12, 5), Request(1, 0.0, 8, 1)
    do(executor, prefill(1, old))
    held = {0: 12, 1: 8}
    executor.follow(lambda request_id: held[request_id])
    executor.launch(prefill(2, new))
    with pytest.raises(RuntimeError, match="KV blocks"):
        executor.wait(None)
    executor = executor_of(4)
    executor.follow(lambda request_id: held[request_id])
    do(executor, prefill(1, old))
    held[0] = 0
    do(executor, prefill(2, new))
    assert executor.tokens(1)[0] == alone("llama", 1, 8)[0]
    anew = Run(3, Phase.PREFILL, (old,), (13,), (0,), 64, TINY.layers, SPLIT, (True,))
    do(executor, anew)
    assert list(executor.tokens(0)) == alone("llama", 0, 12)[:2]


def test_a_finished_sequence_leaves_its_tokens_and_no_block() -> None:
    executor = executor_of(20)
    requests = tuple(Request(i, 0.0, 7, 2 + i) for i in range(3))
    do(executor, prefill(1, *requests))
    assert do(executor, decode(2, *requests)).finished == (0,)
    assert executor.sequences.blocks.sequences == (1, 2)
    do(executor, decode(3, *requests[1:], generated=2))
    do(executor, decode(4, *requests[2:], generated=3))
    assert executor.sequences.blocks.free == 20
    assert [len(executor.tokens(i)) for i in range(3)] == [2, 3, 4]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_a_yield_ends_what_is_in_flight_whatever_the_lags(prefill_lag: int, decode_lag: int, yields: bool) -> None:
    device = LaggingDevice(prefill_lag, decode_lag)
    executor = executor_of(100, device=device, blank_context=True)
    old, new = Request(0, 0.0, 6, 60), Request(1, 0.0, 9, 1)
    executor.launch(decode(1, old))
    executor.launch(prefill(2, new))
    ended = {record.run.id: record for record in executor.wait(None)}
    if yields and 1 not in ended:
        at_least = executor.steps_done(1)
        executor.yield_(1)
        while 1 not in ended:
            ended |= {record.run.id: record for record in executor.wait(None)}
        # The step that cannot be taken back, and the one behind it.
        assert at_least <= ended[1].steps <= max(at_least + 1, 1)
        generated = 1 + ended[1].steps
        if generated < 60:
            executor.launch(decode(3, old, generated=generated))
    while executor._flights():
        executor.wait(None)
    assert len(executor.tokens(0)) == 60
    assert list(executor.tokens(1)) == alone("llama", 1, 9)[:1]


def test_both_phases_are_fed_while_either_lags() -> None:
    """Whatever the lag of one, the other's steps go on ending."""
    device = LaggingDevice(prefill_lag=500, decode_lag=1)
    executor = executor_of(100, device=device, blank_context=True)
    executor.launch(prefill(1, Request(1, 0.0, 9, 1)))
    executor.launch(decode(2, Request(0, 0.0, 6, 60)))
    (record,) = executor.wait(None)
    assert (record.run.id, record.steps) == (2, 59)
    (record,) = executor.wait(None)
    assert (record.run.id, record.steps) == (1, TINY.layers)


def test_what_is_enqueued_counts_as_done_but_for_the_last_step() -> None:
    """For it cannot be taken back: the scheduler has to count the KV blocks of every step that is enqueued."""
    device = LaggingDevice(1, 1)
    executor = executor_of(100, name="deep", device=device)
    executor.launch(prefill(1, Request(0, 0.0, 6, 60), layers=9))
    assert executor.steps_done(1) == 0
    stream = device.lagging[Phase.PREFILL, SPLIT]
    stream.lag = 10**9  # nothing is seen to end
    assert executor.wait(executor.now() + 0.02) == []
    assert executor.steps_done(1) == LOOK_AHEAD - 1
    executor.yield_(1)
    stream.lag = 1
    (record,) = executor.wait(None)
    assert record.steps == LOOK_AHEAD


def test_a_decode_step_is_planned_when_what_the_last_plan_was_copied_from_is_free() -> None:
    device = LaggingDevice(1, 3)

    class OnePinnedBuffer(TorchPlan):
        mark = -1  # the one made next after a plan

        def plan(self, batch: Ragged) -> None:
            stream = device.lagging[Phase.DECODE, SPLIT]
            assert stream.reached > self.mark
            super().plan(batch)
            self.mark = len(stream.marks)

    class Attention(TorchAttention):
        def decode(self, rows: int, sms: int) -> OnePinnedBuffer:
            del rows, sms
            return OnePinnedBuffer(kv)

    kv = PagedKvCache(TINY, 40, 4, "cpu")
    executor = TorchExecutor(Model(TINY, weights("llama"), kv), Attention(kv), device, max_num_seqs=2)
    request = Request(0, 0.0, 6, MOST_OUTPUT)
    do(executor, prefill(1, request))
    do(executor, decode(2, request))
    assert list(executor.tokens(0)) == alone("llama", 0, 6)


def test_a_decode_step_reads_the_blocks_that_its_tokens_are_in_and_no_others() -> None:
    """Also of a sequence that has more, and those that it got on the way."""
    found: list[Ragged] = []

    class Kept(TorchPlan):
        def plan(self, batch: Ragged) -> None:
            found.append(batch)
            super().plan(batch)

    class Attention(TorchAttention):
        def decode(self, rows: int, sms: int) -> Kept:
            del rows, sms
            return Kept(kv)

    kv = PagedKvCache(TINY, 40, 4, "cpu")
    model = Model(TINY, weights("llama"), kv)
    executor = TorchExecutor(model, Attention(kv), CpuDevice(), max_num_seqs=8, blank_context=True)
    requests = [Request(i, 0.0, 3 * i + 1, 30) for i in range(3)]
    do(executor, decode(1, *requests, generated=16, max_steps=6))
    do(executor, decode(2, *requests, generated=2, max_steps=6))
    contexts = [[request.prompt_len + done + step for request in requests] for done in (15, 1) for step in range(6)]
    for batch, cached in zip(found, contexts, strict=True):
        tables = [executor.sequences.blocks.of(i).tolist()[: n // 4 + 1] for i, n in enumerate(cached)]
        assert batch.blocks.tolist() == [*itertools.chain(*tables), kv.scratch]
        assert batch.kv_lens.tolist() == [*(n + 1 for n in cached), 1]


def test_preparing_leaves_no_trace() -> None:
    executor = executor_of(20)
    executor.prepare([SPLIT, Allocation(Mode.EXCLUSIVE, 132, 132)], prefill_tokens=50)
    request = Request(0, 0.0, 6, MOST_OUTPUT)
    do(executor, prefill(1, request))
    do(executor, decode(2, request))
    assert list(executor.tokens(0)) == alone("llama", 0, 6)


def test_padded_batches_have_few_rows_to_spare() -> None:
    for n in range(1, 300):
        assert n <= decode_rows(n, 300) <= max(n + (7 if n <= 32 else 15), 4)
        assert decode_rows(n, n) == n
    assert len({decode_rows(n, 256) for n in range(1, 257)}) == 21
    for n in range(1, 1025):
        assert n <= prefill_rows(n) < n + max(16, n / 3)
        assert prefill_rows(prefill_rows(n)) == prefill_rows(n)
        assert prefill_rows(n, n) == n
    assert len({prefill_rows(n) for n in range(1, 1025)}) == 19
    assert prefill_rows(1025) == 1025


@pytest.mark.usefixtures("fake_cuda")
def test_each_mode_has_its_partitions() -> None:
    from semipd.partition import PartitionBank

    with PartitionBank(prefill_sms=[64]) as bank:
        (split,) = bank.splits
        decode_sms, whole = split.decode.sms, bank.resource.count
        at = {
            Allocation(Mode.SPLIT, 64, decode_sms): (split.prefill, split.decode),
            Allocation(Mode.CAPPED, 64, whole): (split.prefill, bank.whole_high),
            Allocation(Mode.PRIORITY, whole, whole): (bank.whole_normal, bank.whole_high),
            Allocation(Mode.EXCLUSIVE, whole, whole): (bank.whole_normal, bank.whole_high),
            Allocation(Mode.MIXED, whole, whole, 512): (bank.whole_normal, bank.whole_high),
        }
        phases = (Phase.PREFILL, Phase.DECODE)
        for allocation, partitions in at.items():
            assert tuple(partition_of(bank, phase, allocation) for phase in phases) == partitions
            assert [partition.sms for partition in partitions] == [allocation.sms(phase) for phase in phases]
        # The lower priority goes first.
        assert bank.whole_high.priority < split.prefill.priority <= bank.whole_normal.priority
        with pytest.raises(InputError, match="no split with 72 prefill SMs"):
            partition_of(bank, Phase.PREFILL, Allocation(Mode.SPLIT, 72, decode_sms))
        with pytest.raises(ValueError, match=f"64/1: found {decode_sms} SMs for decode"):
            partition_of(bank, Phase.DECODE, Allocation(Mode.SPLIT, 64, 1))


def test_an_executor_can_be_opened_by_its_configuration(tmp_path: Path) -> None:
    request = Request(0, 0.0, 6, MOST_OUTPUT)
    with open_executor(TINY, num_blocks=10) as executor:
        assert (executor.num_blocks, executor.layers) == (10, TINY.layers)
        do(executor, prefill(1, request))
        do(executor, decode(2, request))
        assert list(executor.tokens(0)) == alone("llama", 0, 6)
    with pytest.raises(InputError, match="num_blocks: missing"), open_executor(TINY):
        pass
    with pytest.raises(InputError, match=r"config\.json: cannot be read"), open_executor(TINY, weights_dir=tmp_path):
        pass


def test_opening_with_a_checkpoint_uses_its_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=64, vocab_size=199, rms_norm_eps=1e-5, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    request = replace(Request(0, 0.0, 6, MOST_OUTPUT), id=4)
    prompt = random_prompts(TINY.vocab_size)(request).tolist()
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(MOST_OUTPUT):
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
    with open_executor(TINY, weights_dir=tmp_path, num_blocks=10) as executor:
        do(executor, prefill(1, request))
        do(executor, decode(2, request))
        assert [*prompt, *executor.tokens(4)] == tokens
