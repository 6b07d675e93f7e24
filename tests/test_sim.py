"""The simulated executor: exact times, against hand-computed cases and a step-by-step loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core import Allocation, DecodeShape, FloatArray, IntArray, Mode, Phase, PrefillShape, Request, Run
from semipd.cost import ConstantCost, CostModel
from semipd.overheads import Overheads
from semipd.sim import STRETCH_STEPS, SimExecutor

SPLIT = Allocation(Mode.SPLIT, 64, 68)
FULL = Allocation(Mode.EXCLUSIVE, 132, 132)
FUSED = Allocation(Mode.MIXED, 132, 132, 64)
ENDLESS = 10**15


@dataclass
class Contended:
    """Prices that are easy to add up by hand. What decode reads, and what prefill sees of it, is kept.

    A layer takes ``layer_s``, a step ``step_s`` and ``token_s`` for each KV token; ``slower`` times as much beside the
    other phase. Decode steps of more than ``outside`` KV tokens lie outside the grid, and layers beside such.
    """

    layer_s: float = 1.0
    step_s: float = 1.0
    token_s: float = 0.0
    prefill_slower: float = 1.0
    decode_slower: float = 1.0
    outside: int = ENDLESS
    layers: int = 4
    device_sms: int = 132
    splits: tuple[Allocation, ...] = (SPLIT,)
    priced: list[IntArray] = field(default_factory=list)
    seen: list[DecodeShape] = field(default_factory=list)

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        del at
        if beside is None:
            return self.layer_s * shape.tokens, False
        self.seen.append(beside)
        return self.layer_s * shape.tokens * self.prefill_slower, beside.kv_tokens > self.outside

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        if decode is None:
            return self.layers * self.layer_s * chunk.tokens, False
        self.seen.append(decode)
        return self.layers * self.layer_s * chunk.tokens + self.step_s, decode.kv_tokens > self.outside

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        del at
        kv_tokens = shape.kv_tokens + shape.batch * np.arange(steps)
        self.priced.append(kv_tokens)
        seconds = (self.step_s + self.token_s * kv_tokens.astype(np.float64)) * (
            1.0 if beside is None else self.decode_slower
        )
        return seconds, int(np.count_nonzero(kv_tokens > self.outside))


def prefill(run_id: int = 1, layers: int = 4, tokens: int = 1, *, at: Allocation = SPLIT, name: int = 100) -> Run:
    """Layers of one prompt; runs of one name have the same request."""
    request = Request(name, 0.0, tokens, ENDLESS)
    return Run(run_id, Phase.PREFILL, (request,), (tokens,), (0,), at.prefill_sms, layers, at, (True,))


def decode(
    run_id: int = 2, steps: int = ENDLESS, context_lens: tuple[int, ...] = (9,), *, at: Allocation = SPLIT
) -> Run:
    """Steps of sequences whose prompts were one token."""
    requests = tuple(Request(i, 0.0, 1, ENDLESS) for i in range(len(context_lens)))
    ones = (1,) * len(requests)
    return Run(run_id, Phase.DECODE, requests, ones, context_lens, at.decode_sms, steps, at)


def fused(run_id: int = 3, decoding: tuple[int, ...] = (), piece: int = 2) -> Run:
    """Decoding sequences of so many cached tokens, whose prompts were one, and a piece of a prompt."""
    n = len(decoding)
    requests = tuple(Request(i, 0.0, 1, ENDLESS) for i in range(n + 1))
    return Run(
        run_id, Phase.MIXED, requests, (1,) * n + (piece,), (*decoding, 0), 132, 1, FUSED, (True,) * n + (False,), n
    )


def ends(executor: SimExecutor, runs: int) -> dict[int, list[float]]:
    """Boundaries of the runs in flight, by id, once all have ended."""
    times: dict[int, list[float]] = {}
    while len(times) < runs:
        for record in executor.wait(None):
            times[record.run.id] = record.ends_s.tolist()
    return times


# Prices


def test_a_decode_step_reads_what_is_cached_and_the_token_it_processes() -> None:
    cost = Contended(step_s=0.0, token_s=1.0)
    executor = SimExecutor(cost)
    run = decode(steps=3, context_lens=(9, 4))
    executor.launch(run)
    assert ends(executor, 1) == {2: [15.0, 32.0, 51.0]}  # 13 cached and 2 new, then 2 more a step
    assert run.decode_shape == DecodeShape(2, 15)


def test_a_stretch_is_priced_at_once_and_never_beyond_the_end_of_a_sequence() -> None:
    cost = Contended()
    executor = SimExecutor(cost)
    requests = (Request(0, 0.0, 1, 8), Request(1, 0.0, 1, ENDLESS))
    executor.launch(Run(1, Phase.DECODE, requests, (1, 1), (1, 1), 68, ENDLESS, SPLIT))
    (record,) = executor.wait(None)
    assert (record.steps, record.finished) == (7, (0,))
    assert [len(kv) for kv in cost.priced] == [7]


def test_a_run_of_no_requests_or_no_steps_or_for_a_finished_sequence_is_refused() -> None:
    executor = SimExecutor(ConstantCost(1.0, 1.0))
    done = Request(5, 0.0, 1, 3)
    for run in (
        decode(steps=0),
        decode(context_lens=()),
        Run(1, Phase.DECODE, (done,), (1,), (3,), 68, 1, SPLIT),  # cached: the prompt and two tokens of three
    ):
        with pytest.raises(ValueError, match="run"):
            executor.launch(run)
    with pytest.raises(RuntimeError):
        executor.wait(None)


def test_an_exclusive_run_has_the_device_for_itself() -> None:
    executor = SimExecutor(ConstantCost(1.0, 1.0))
    executor.launch(prefill(at=FULL))
    with pytest.raises(ValueError, match="whole device"):
        executor.launch(decode(at=FULL))


def test_a_fused_step_is_priced_by_its_pieces_and_the_sequences_that_decode() -> None:
    cost = Contended(outside=15)
    executor = SimExecutor(cost)
    executor.launch(fused(1, decoding=(9, 5)))
    (record,) = executor.wait(None)
    assert (record.ends_s.tolist(), record.lookups, record.extrapolated) == ([2 * 4 + 1.0], 1, 1)
    assert cost.seen == [DecodeShape(2, 9 + 5 + 2)]
    executor.launch(fused(2, piece=3))
    (record,) = executor.wait(None)
    assert (record.ends_s.tolist(), record.lookups, record.extrapolated) == ([9.0 + 3 * 4], 1, 0)


def test_a_partition_without_a_price_is_named() -> None:
    class Unmeasured(Contended):
        def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
            del shape, at, beside
            raise KeyError("prefill on 64 SMs was not measured")

    executor = SimExecutor(Unmeasured())
    executor.launch(prefill())
    with pytest.raises(KeyError, match="64 SMs"):
        executor.wait(None)


# Processor sharing, by hand


def test_both_slow_down_when_the_second_starts_within_a_step_and_recover_when_it_stops() -> None:
    executor = SimExecutor(Contended(prefill_slower=2.0, decode_slower=3.0))
    executor.launch(decode(steps=2))
    assert executor.wait(0.5) == []
    executor.launch(prefill(layers=4))
    # Step 1 is half done: 0.5 + 0.5 x 3. Step 2 takes 3. By then, layer 3 is a quarter done and goes on alone.
    assert ends(executor, 2) == {2: [2.0, 5.0], 1: [2.5, 4.5, 5.75, 6.75]}


def test_a_step_may_be_retimed_more_than_once() -> None:
    executor = SimExecutor(Contended(decode_slower=4.0))
    executor.launch(decode(steps=2))
    executor.wait(0.25)
    executor.launch(prefill(1, layers=1))  # until 1.25: a quarter of the step
    executor.wait(1.25)
    executor.wait(1.5)  # a quarter alone
    executor.launch(prefill(3, layers=1))  # until 2.5: the last quarter
    assert ends(executor, 2) == {3: [2.5], 2: [2.5, 3.5]}


def test_a_step_that_ends_when_the_other_phase_starts_is_not_retimed() -> None:
    executor = SimExecutor(Contended(decode_slower=3.0, prefill_slower=2.0))
    executor.launch(decode(steps=3))
    executor.wait(1.0)
    executor.launch(prefill(layers=2))
    # The layers take 2 each, so step 2 (3 beside prefill) ends at 4, and step 3 starts there: 1 of 3 by 5, then alone.
    assert ends(executor, 2) == {1: [3.0, 5.0], 2: [1.0, 4.0, pytest.approx(5 + 2 / 3)]}


def test_what_follows_at_once_leaves_no_moment_alone() -> None:
    """A run replaced as it ends was never absent, even when the executor is asked for what ends right now."""
    executor = SimExecutor(Contended(prefill_slower=2.0, decode_slower=2.0))
    executor.launch(decode(steps=4))
    executor.launch(prefill(1, layers=1))
    assert [r.run.id for r in executor.wait(None)] == [1]
    assert executor.wait(executor.now()) == []
    executor.launch(prefill(3, layers=1, name=7))
    assert [r.run.id for r in executor.wait(None)] == [3]
    assert executor.now() == 4.0
    assert executor.steps_done(2) == 2


def test_runs_that_end_together_are_returned_together_prefill_first() -> None:
    executor = SimExecutor(ConstantCost(1.0, 2.0))
    executor.launch(decode(steps=2))
    executor.launch(prefill(layers=4))
    assert [record.run.phase for record in executor.wait(None)] == [Phase.PREFILL, Phase.DECODE]


def test_a_run_that_ends_at_the_time_waited_for_is_returned() -> None:
    executor = SimExecutor(ConstantCost(1.0, 0.1))
    executor.launch(prefill(layers=3))
    assert executor.wait(2.0) == []
    assert [record.end_s for record in executor.wait(3.0)] == [3.0]


# Overheads, by hand


OVERHEADS = Overheads(prefill_start_ms=250.0, decode_start_ms=500.0, mixed_start_ms=2000.0, switch_ms=4000.0)


def test_a_run_begins_after_the_host_has_started_it_and_one_that_goes_on_begins_at_once() -> None:
    executor = SimExecutor(ConstantCost(1.0, 1.0), OVERHEADS)
    executor.launch(decode(1, 2))
    executor.launch(prefill(2, layers=2))
    assert ends(executor, 2) == {1: [1.5, 2.5], 2: [1.25, 2.25]}
    executor.launch(decode(3, 2, (11,)))  # goes on: nine cached tokens and two steps
    executor.launch(prefill(4, layers=1, name=7))
    assert ends(executor, 2) == {3: [3.5, 4.5], 4: [3.75]}
    executor.launch(decode(5, 1, (11, 13)))
    assert ends(executor, 1) == {5: [6.0]}


def test_prefill_that_was_stopped_between_two_layers_goes_on_at_once() -> None:
    executor = SimExecutor(ConstantCost(1.0, 1.0), OVERHEADS)
    executor.launch(prefill(1, layers=4))
    executor.yield_(1)
    executor.wait(None)
    executor.launch(prefill(2, layers=3))
    assert ends(executor, 1) == {2: [2.25, 3.25, 4.25]}


def test_what_is_launched_within_a_switch_begins_after_it() -> None:
    executor = SimExecutor(ConstantCost(1.0, 1.0), OVERHEADS)
    executor.launch(decode(1, 1))
    assert ends(executor, 1) == {1: [1.5]}
    executor.launch(decode(2, 1, (10,), at=Allocation(Mode.CAPPED, 64, 132)))
    executor.wait(2.0)
    executor.launch(prefill(3, layers=1, at=Allocation(Mode.CAPPED, 64, 132)))
    assert ends(executor, 2) == {2: [1.5 + 4 + 0.5 + 1], 3: [1.5 + 4 + 0.25 + 1]}


def test_every_fused_step_is_started_by_the_host() -> None:
    executor = SimExecutor(Contended(), OVERHEADS)
    for run_id, end_s in ((1, 2.0 + 8), (2, 10 + 2.0 + 8)):
        executor.launch(fused(run_id))
        assert ends(executor, 1) == {run_id: [end_s]}


def test_the_work_of_a_run_that_has_yet_to_begin_is_not_slowed_down() -> None:
    executor = SimExecutor(Contended(decode_slower=3.0), OVERHEADS)
    executor.launch(decode(1, 2))  # begins at 0.5
    executor.wait(0.25)
    executor.launch(prefill(2, layers=1))  # from 0.5 to 1.5, in which a third of a step is done
    records = {record.run.id: record for _ in range(2) for record in executor.wait(None)}
    assert records[2].ends_s.tolist() == [1.5]
    assert records[1].ends_s.tolist() == pytest.approx([1.5 + 2 / 3, 2.5 + 2 / 3])
    assert records[1].lookups == 3


# What a phase sees of the other


def test_prefill_sees_the_decode_batch_as_it_was_when_either_last_began_something_new() -> None:
    cost = Contended(layer_s=1.0)
    executor = SimExecutor(cost)
    executor.launch(decode(steps=ENDLESS, context_lens=(10, 20)))
    executor.wait(2.5)  # in its third step
    executor.launch(prefill(1, layers=4))
    executor.wait(None)
    executor.launch(prefill(3, layers=1, name=7))  # at 6.5, in the seventh step
    executor.wait(None)
    assert cost.seen == [DecodeShape(2, 30 + 2 * 3), DecodeShape(2, 30 + 2 * 7)]


def test_a_continuation_is_nothing_new_and_another_batch_is() -> None:
    cost = Contended(layer_s=100.0)
    executor = SimExecutor(cost)
    executor.launch(prefill(layers=1))
    for run_id, (context, steps) in enumerate([(10, 3), (13, 2), (15, 4)]):
        executor.launch(decode(10 + run_id, steps, (context,)))
        executor.wait(None)
    assert cost.seen == [DecodeShape(1, 11)]
    executor.launch(decode(20, 1, (3, 3)))
    executor.wait(None)
    assert cost.seen == [DecodeShape(1, 11), DecodeShape(2, 8)]


def test_a_prefill_batch_that_goes_on_after_a_yield_is_nothing_new() -> None:
    cost = Contended(prefill_slower=2.0)
    executor = SimExecutor(cost)
    executor.launch(decode())
    executor.launch(prefill(1, layers=4))
    executor.wait(3.0)
    executor.yield_(1)
    assert [record.steps for record in executor.wait(None)] == [2]
    executor.launch(prefill(3, layers=2))
    executor.wait(None)
    assert set(cost.seen) == {DecodeShape(1, 10)}
    assert executor.now() == 8.0


# Yielding


@pytest.mark.parametrize(
    ("at_s", "steps"),
    [(0.0, 1), (0.5, 1), (1.0, 1), (1.5, 2), (2.0, 2), (3.5, 4)],
    ids=["start", "first step", "boundary", "second step", "second boundary", "last step"],
)
def test_a_run_yields_at_its_first_boundary_from_now_on_but_never_without_a_step(at_s: float, steps: int) -> None:
    executor = SimExecutor(ConstantCost(1.0, 1.0))
    executor.launch(decode(steps=4))
    assert executor.wait(at_s) == []
    executor.yield_(2)
    (record,) = executor.wait(None)
    assert (record.steps, executor.now()) == (steps, max(steps, at_s))


def test_a_yield_at_a_boundary_takes_effect_without_time_passing() -> None:
    executor = SimExecutor(Contended(decode_slower=3.0))
    executor.launch(decode(steps=9))
    executor.launch(prefill(layers=6))
    assert executor.wait(3.0) == []
    assert executor.steps_done(2) == 1
    executor.yield_(2)
    (record,) = executor.wait(3.0)
    assert record.ends_s.tolist() == [3.0]


def test_a_yield_at_a_boundary_at_which_prices_changed_takes_effect_at_once() -> None:
    executor = SimExecutor(Contended(decode_slower=2.0, prefill_slower=1.0))
    executor.launch(decode(steps=9))
    executor.launch(prefill(layers=4))
    assert [record.run.id for record in executor.wait(None)] == [1]  # at 4, where two steps are done
    executor.launch(prefill(3, layers=4, tokens=2))
    executor.yield_(2)
    (record,) = executor.wait(None)
    assert record.ends_s.tolist() == [2.0, 4.0]


def test_a_run_beside_one_that_takes_no_time_goes_on_as_if_it_had_not_been_there() -> None:
    executor = SimExecutor(Contended(layer_s=0.0, decode_slower=2.0))
    executor.launch(decode(steps=9))
    for at_s in (0.5, 3.0):
        executor.wait(at_s)
        executor.launch(prefill(1))
        assert [record.run.id for record in executor.wait(None)] == [1]
        assert executor.now() == at_s
    executor.yield_(2)  # at a boundary at which it was priced anew
    (record,) = executor.wait(None)
    assert record.ends_s.tolist() == [1.0, 2.0, 3.0]
    assert record.lookups == 4  # step 1 in two parts


def test_a_boundary_to_yield_at_moves_with_the_price() -> None:
    executor = SimExecutor(Contended(decode_slower=3.0))
    executor.launch(decode(steps=9))
    executor.wait(0.5)
    executor.yield_(2)
    executor.launch(prefill(layers=9))
    (record,) = executor.wait(None)
    assert record.ends_s.tolist() == [2.0]


# Look-ups


def test_lookups_are_steps_worked_on_and_those_outside_the_grid_are_counted_among_them() -> None:
    executor = SimExecutor(Contended(outside=12))
    executor.launch(decode(steps=9, context_lens=(9,)))  # reads 10, 11, 12 and, outside, 13 to 18
    executor.wait(4.5)
    executor.yield_(2)
    (record,) = executor.wait(None)
    assert (record.steps, record.lookups, record.extrapolated) == (5, 5, 2)


def test_a_step_that_is_retimed_is_looked_up_again() -> None:
    executor = SimExecutor(Contended(outside=10))
    executor.launch(decode(steps=3, context_lens=(9,)))
    executor.wait(1.5)
    executor.launch(prefill(layers=1))
    records = {r.run.id: r for _ in range(2) for r in executor.wait(None)}
    # Alone: steps 1, 2; beside: 2, 3; alone: 3. All but step 1 are outside, and so is what prefill sees.
    assert (records[2].lookups, records[2].extrapolated) == (5, 4)
    assert (records[1].lookups, records[1].extrapolated) == (1, 1)


# Laws, with prices that are powers of two, so that all times are exact and simultaneous events are simultaneous


@dataclass(frozen=True)
class Dyadic:
    """Prices depend on both batches."""

    layers: int = 4
    device_sms: int = 132
    splits: tuple[Allocation, ...] = (SPLIT,)

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        del at
        return 0.5 * shape.tokens * (1 if beside is None else 2 << beside.kv_tokens % 3), shape.tokens > 2

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        del at
        kv_tokens = shape.kv_tokens + shape.batch * np.arange(steps)
        price = 0.25 * 2.0 ** (kv_tokens // 4 % 4).astype(np.float64) * (1 if beside is None else 2 * beside.tokens)
        return price, int(np.count_nonzero(kv_tokens % 5 == 0))


@dataclass(frozen=True)
class Script:
    """Prefill batches (arrival, layers, tokens) one after the other, beside one decode of so many steps."""

    batches: list[tuple[float, int, int]]
    start_s: float
    steps: int
    context: int


SCRIPTS = st.builds(
    Script,
    batches=st.lists(
        st.tuples(st.integers(0, 60).map(lambda n: n / 4), st.integers(1, 5), st.sampled_from([1, 2, 4])), max_size=5
    ).map(sorted),
    start_s=st.integers(0, 24).map(lambda n: n / 4),
    steps=st.integers(1, 30),
    context=st.integers(0, 20),
)


def drive(
    script: Script, chunk: int, one_layer: bool, cost: CostModel
) -> tuple[list[list[float]], list[float], tuple[int, int]]:
    """Boundaries of each batch's layers and of decode steps, and look-ups, when runs are as long as said."""
    executor = SimExecutor(cost)
    batches = list(enumerate(script.batches))
    layer_s: list[list[float]] = [[] for _ in batches]
    step_s: list[float] = []
    lookups = extrapolated = run_id = 0
    busy = {Phase.PREFILL: False, Phase.DECODE: False}
    while True:
        now_s = executor.now()
        if not busy[Phase.DECODE] and now_s >= script.start_s and len(step_s) < script.steps:
            run_id += 1
            left = script.steps - len(step_s)
            executor.launch(decode(run_id, min(chunk, left), (script.context + 1 + len(step_s),)))
            busy[Phase.DECODE] = True
        if not busy[Phase.PREFILL] and batches and batches[0][1][0] <= now_s:
            run_id += 1
            i, (_, layers, tokens) = batches[0]
            executor.launch(prefill(run_id, layers - len(layer_s[i]), tokens, name=100 + i))
            if one_layer:
                executor.yield_(run_id)
            busy[Phase.PREFILL] = True
        waits = [arrival_s for _, (arrival_s, _, _) in batches[:1] if not busy[Phase.PREFILL]]
        waits += [script.start_s] if now_s < script.start_s else []
        if not any(busy.values()) and not waits:
            return layer_s, step_s, (lookups, extrapolated)
        for record in executor.wait(min(waits) if waits else None):
            busy[record.run.phase] = False
            lookups += record.lookups
            extrapolated += record.extrapolated
            if record.run.phase is Phase.DECODE:
                step_s += record.ends_s.tolist()
            else:
                i, (_, layers, _) = batches[0]
                layer_s[i] += record.ends_s.tolist()
                if len(layer_s[i]) == layers:
                    batches.pop(0)


def one_by_one(script: Script) -> tuple[list[list[float]], list[float]]:
    """The same, one layer and one step at a time."""
    cost, now_s = Dyadic(), 0.0
    batches = list(enumerate(script.batches))
    layer_s: list[list[float]] = [[] for _ in batches]
    step_s: list[float] = []
    layer: float | None = None  # share of it that is left
    step: float | None = None
    batch_began = False
    seen = DecodeShape(1, 1)
    while True:
        starts_decode = step is None and now_s >= script.start_s and len(step_s) < script.steps
        starts_layer = layer is None and bool(batches) and batches[0][1][0] <= now_s
        step = 1.0 if starts_decode else step
        layer = 1.0 if starts_layer else layer
        kv_tokens = script.context + 2 + len(step_s)
        if (starts_decode and not step_s) or (starts_layer and not batch_began):
            seen = DecodeShape(1, kv_tokens)
        batch_began = batch_began or starts_layer
        tokens = batches[0][1][2] if batches else 0
        shape = PrefillShape(tokens, tokens * tokens / 2)
        events = [script.start_s] if now_s < script.start_s else []
        layer_price = step_price = 0.0
        if layer is not None:
            layer_price, _ = cost.prefill_s(shape, SPLIT, seen if step is not None else None)
            events.append(now_s + layer * layer_price)
        elif batches:
            events.append(batches[0][1][0])
        if step is not None:
            (step_price,), _ = cost.decode_s(DecodeShape(1, kv_tokens), SPLIT, shape if layer is not None else None)
            events.append(now_s + step * float(step_price))
        if not events:
            return layer_s, step_s
        then_s = min(events)
        if layer is not None:
            layer -= (then_s - now_s) / layer_price
        if step is not None:
            step -= (then_s - now_s) / float(step_price)
        now_s = then_s
        if step == 0:
            step = None
            step_s.append(now_s)
        if layer == 0:
            layer = None
            i, (_, layers, _) = batches[0]
            layer_s[i].append(now_s)
            if len(layer_s[i]) == layers:
                batches.pop(0)
                batch_began = False


@settings(max_examples=300, deadline=None)
@given(script=SCRIPTS)
def test_a_run_takes_what_its_steps_take_one_by_one(script: Script) -> None:
    layer_s, step_s, _ = drive(script, ENDLESS, False, Dyadic())
    assert (layer_s, step_s) == one_by_one(script)


@settings(max_examples=300, deadline=None)
@given(script=SCRIPTS, chunk=st.integers(1, 7), one_layer=st.booleans())
def test_many_short_runs_take_exactly_the_time_and_lookups_of_a_long_one(
    script: Script, chunk: int, one_layer: bool
) -> None:
    """Law 10."""
    assert drive(script, chunk, one_layer, Dyadic()) == drive(script, ENDLESS, False, Dyadic())


@settings(max_examples=200, deadline=None)
@given(script=SCRIPTS, chunk=st.integers(1, 7), one_layer=st.booleans())
def test_cutting_runs_does_not_change_a_bit_of_times_that_do_not_come_out_even(
    script: Script, chunk: int, one_layer: bool
) -> None:
    def uneven() -> CostModel:
        return Contended(0.37, 0.11, token_s=0.013, prefill_slower=1.3, decode_slower=1.7, outside=20)

    assert drive(script, chunk, one_layer, uneven()) == drive(script, ENDLESS, False, uneven())


def test_a_run_of_a_million_steps_is_priced_as_far_as_it_gets() -> None:
    cost = Contended(decode_slower=2.0)
    executor = SimExecutor(cost)
    executor.launch(decode(steps=10**6))
    for run_id in range(10):
        executor.launch(prefill(10 + run_id, layers=1, name=10 + run_id))
        executor.wait(None)
    assert sum(map(len, cost.priced)) <= 10 * STRETCH_STEPS
    executor.wait(5000.0)
    executor.yield_(2)
    (record,) = executor.wait(None)
    assert record.ends_s.tolist() == [*range(2, 11, 2), *range(11, 5001)]
    assert record.lookups == record.steps


def test_whole_numbers_of_seconds_start_at_any_time() -> None:
    executor = SimExecutor(ConstantCost(2, 3))
    assert executor.wait(0.5) == []
    executor.launch(decode(steps=2))
    (record,) = executor.wait(None)
    assert record.ends_s.tolist() == [3.5, 6.5]


def test_steps_that_take_no_time_end_at_once() -> None:
    executor = SimExecutor(ConstantCost(0.0, 0.0))
    executor.launch(decode(steps=3 * STRETCH_STEPS))
    executor.launch(prefill())
    assert [record.steps for record in executor.wait(None)] == [4]
    assert [record.steps for record in executor.wait(None)] == [3 * STRETCH_STEPS]
    assert executor.now() == 0.0
