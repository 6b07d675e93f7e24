"""Continuous batching: which requests run next, on which partition, and whether their KV cache fits.

Prefill and decode are batched separately, FCFS. Knobs and preemption by recomputation are vLLM's
(``vllm/config/scheduler.py``, ``vllm/v1/core/sched/scheduler.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from semipd.core import Allocation, DecodeShape, Load, Mode, Phase, PrefillShape, Request, Run, StepRecord
from semipd.kv_cache import BlockManager
from semipd.policies import Policy


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of batching, under vLLM's names.

    ``num_blocks``: KV blocks of ``block_size`` tokens. ``max_num_seqs``: sequences being prefilled or decoded.
    ``max_num_batched_tokens``: tokens of a prefill batch. ``watermark``: share of the blocks that an admission
    leaves free while sequences decode, so that they are not preempted at once. ``decode_steps``: most steps of a decode
    run; None for as many as its KV blocks allow.
    """

    num_blocks: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    watermark: float = 0.01
    decode_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_num_seqs", "max_num_batched_tokens", "block_size", "decode_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: found {value}; expected at least 1")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark: found {self.watermark}; expected a share from 0 to below 1")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: ask runs in flight to yield, or launch new ones; never both.

    What ends at this very moment because it was asked to is thus known before anything is launched.
    """

    yields: tuple[int, ...] = ()
    launches: tuple[Run, ...] = ()


NOTHING = Plan()


class Sequence:
    """A request on its way: waiting, being prefilled, then decoding."""

    __slots__ = ("base", "length", "order", "prefilled", "request")

    def __init__(self, request: Request, order: int) -> None:
        self.request = request
        self.order = order  # of arrival
        self.length = request.prompt_len  # tokens to prefill: the prompt, and after a preemption all tokens so far
        self.prefilled = 0  # of these, cached by batches that have ended
        self.base = 0  # while decoding: cached tokens less the scheduler's count of decode steps


@dataclass(slots=True, eq=False)
class PrefillBatch:
    """Sequences whose next tokens go through the layers together; ``layers`` are left."""

    sequences: tuple[Sequence, ...]
    new_tokens: tuple[int, ...]
    context_lens: tuple[int, ...]
    emits: tuple[bool, ...]
    blocks: int
    shape: PrefillShape
    layers: int


class Scheduler:
    """Decides what runs, and never looks at an output length (law 7): executors report what has finished.

    Prefill takes whole waiting prompts in order of arrival up to ``max_num_batched_tokens``, the last one cut to fit;
    its rest goes first next time. A sequence that got its first token joins the decode batch at its next step
    boundary. Every decoding sequence has room for its next token at each boundary; when there is too little, the
    latest arrivals are preempted: they give all blocks back, go to the head of the queue and are prefilled anew with
    all their tokens. So a decode run of many steps takes blocks just when single steps would, and admission
    sees the same free blocks (law 10).

    Modes: ``SPLIT`` (both phases, each on its partition) and ``EXCLUSIVE`` (one phase at a time, prefill first). A
    change of allocation drains: both phases yield, and the first to end waits for the other.

    Args:
        config: Limits.
        policy: Chooses the allocation.
        device_sms: SMs of the device; no allocation may exceed them (law 4).
        layers: Layers of the model, which are the steps of a prefill run.

    Attributes:
        dropped: Requests that can never fit the KV cache, with the reason.
        preemptions: Times that a sequence lost its blocks.
        switches: Times that the allocation in force changed.
        blocks: The KV cache.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy, *, device_sms: int, layers: int) -> None:
        self.config = config
        self.policy = policy
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.dropped: list[tuple[Request, str]] = []
        self.preemptions = 0
        self.switches = 0
        self._device_sms = device_sms
        self._layers = layers
        self._watermark_blocks = int(config.watermark * config.num_blocks)

        self._live: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._waiting_tokens = 0  # not yet in a batch
        self._partial: Sequence | None = None  # its prompt was cut, goes first
        self._batch: PrefillBatch | None = None  # in flight, or stopped between two layers
        self._decoding: list[Sequence] = []
        self._base_sum = 0  # of _decoding
        self._joining: list[Sequence] = []  # decode from the next boundary on

        self._prefill_run: Run | None = None  # in flight
        self._decode_run: Run | None = None
        self._yielding: set[int] = set()
        self._steps = 0  # decode steps of all runs that have ended
        self._done = 0  # steps of the decode run in flight
        self._ahead = 0  # steps beyond _steps that the decode batch has room for

        self._current: Allocation | None = None  # in force
        self._split: Allocation | None = None  # the last that was, of mode split
        self._target: Allocation | None = None  # the policy's last answer
        self._decode_changed = False  # since the policy was asked
        self._start_asked = False  # whether it was asked for the next batch
        self._busy = (False, False)  # prefill, decode, when it was asked
        self._drains = False  # all in flight was asked to yield for a new allocation, and nothing came since
        self._next_order = 0
        self._next_run = 0

    @property
    def allocation(self) -> Allocation | None:
        """The allocation in force, None before the first decision."""
        return self._current

    @property
    def draining(self) -> bool:
        """Whether runs in flight are being ended for a new allocation."""
        return (self._prefill_run or self._decode_run) is not None and self._target != self._current

    def has_unfinished(self) -> bool:
        """Whether a request was added that is neither finished nor dropped."""
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Queue a request that has arrived, or drop it when its prompt and one token can never fit.

        Raises ValueError when a request of that id is unfinished.
        """
        self._drains = False
        if request.id in self._live:
            raise ValueError(f"request {request.id} is unfinished; expected each id once")
        sequence = Sequence(request, self._next_order)
        self._next_order += 1
        self._live[request.id] = sequence
        if self.blocks.blocks(request.prompt_len + 1) > self.blocks.num_blocks:
            self._drop(sequence, f"a prompt of {request.prompt_len} tokens and its first do")
            return
        self._waiting.append(sequence)
        self._waiting_tokens += sequence.length

    def schedule(self, now_s: float, steps_done: Callable[[int], int]) -> Plan:
        """What to do now. To be called again after every plan, when its yields that took effect are completed.

        Args:
            now_s: The executor's time.
            steps_done: Steps that a run in flight has completed by now, by the run's id.
        """
        if self._drains:
            return NOTHING
        decode = self._decode_run
        if decode is None:
            self._make_room()
        elif self._joining and decode.id not in self._yielding:
            return self._yield(decode)
        else:
            self._follow(decode, steps_done(decode.id))
        batch = self._batch
        if batch is None and (self._waiting or self._partial is not None):
            batch = self._next_batch()
        if batch is None and not self._decoding:
            return NOTHING
        target = self._decide(now_s, batch)
        if target is not self._current and target != self._current:
            in_flight = [run for run in (self._prefill_run, decode) if run is not None]
            if in_flight:
                self._drains = True
                return self._yield(*in_flight)
            self.switches += self._current is not None
            self._current = target
            if target.mode is Mode.SPLIT:
                self._split = target
        return self._launch(target, batch)

    def complete(self, record: StepRecord) -> None:
        """Take note of a run that ended. Raises ValueError for one that was not in flight."""
        self._drains = False
        run = record.run
        decodes = run.phase is Phase.DECODE
        launched = self._decode_run if decodes else self._prefill_run
        if launched is None or launched.id != run.id:
            raise ValueError(f"{run.phase.value} run {run.id} is not in flight")
        self._yielding.discard(run.id)
        if decodes:
            self._decode_run = None
            self._complete_decode(record)
        else:
            self._prefill_run = None
            if self._batch is not None:
                self._complete_prefill(self._batch, record)

    def _complete_decode(self, record: StepRecord) -> None:
        steps = record.steps
        self._steps += steps
        self.blocks.advance(steps - self._ahead)
        self._ahead = self._done = 0
        if record.finished:
            gone = {id(self._live[request_id]) for request_id in record.finished}
            self._decoding = [sequence for sequence in self._decoding if id(sequence) not in gone]
            self._base_sum = sum([sequence.base for sequence in self._decoding])
            self._finish(record.finished)
            self._decode_changed = True

    def _complete_prefill(self, batch: PrefillBatch, record: StepRecord) -> None:
        batch.layers -= record.steps
        if batch.layers:
            return
        self._batch = None
        finished = set(record.finished)
        for sequence, new_tokens, emits in zip(batch.sequences, batch.new_tokens, batch.emits, strict=True):
            sequence.prefilled += new_tokens
            if not emits:
                self._partial = sequence
            elif sequence.request.id not in finished:
                self._joining.append(sequence)
                self._decode_changed = True
        self._finish(record.finished)

    def _finish(self, request_ids: tuple[int, ...]) -> None:
        for request_id in request_ids:
            del self._live[request_id]
            self.blocks.release(request_id)

    def _make_room(self) -> None:
        """With no decode run in flight: take in who joins and make room for everyone's next token."""
        if self._joining:
            self.blocks.advance(-self._ahead)
            self._ahead = 0
            for sequence in self._joining:
                sequence.base = sequence.length - self._steps
                self._base_sum += sequence.base
                self.blocks.join(sequence.request.id)
            self._decoding += self._joining
            self._joining = []
        if self._ahead or not self._decoding:
            return
        while self.blocks.need() > self.blocks.free:
            self._preempt(max(self._decoding, key=lambda sequence: sequence.order))
        if self._decoding:
            self.blocks.advance()
            self._ahead = 1

    def _preempt(self, sequence: Sequence) -> None:
        self._decoding.remove(sequence)
        self._base_sum -= sequence.base
        self._decode_changed = True
        sequence.length = sequence.base + self._steps + 1  # the newest token is not cached yet
        self.blocks.release(sequence.request.id)
        if self.blocks.blocks(sequence.length) > self.blocks.num_blocks:
            self._drop(sequence, f"its prompt of {sequence.request.prompt_len} tokens grown to {sequence.length} does")
            return
        sequence.prefilled = 0
        self._waiting.appendleft(sequence)
        self._waiting_tokens += sequence.length
        self.preemptions += 1

    def _drop(self, sequence: Sequence, what: str) -> None:
        del self._live[sequence.request.id]
        capacity = self.blocks.num_blocks * self.blocks.block_size
        reason = f"{what} not fit the KV cache of {capacity} tokens"
        self.dropped.append((sequence.request, reason))

    def _follow(self, decode: Run, steps_done: int) -> None:
        """Count the blocks of the step that the decode run in flight is in."""
        self._done = steps_done
        ahead = min(steps_done + 1, decode.max_steps)
        if ahead != self._ahead:
            self.blocks.advance(ahead - self._ahead)
            self._ahead = ahead

    def _next_batch(self) -> PrefillBatch | None:
        """The prefill batch that could start now, of those that wait; nothing is taken yet."""
        decoding = len(self._decoding) + len(self._joining)
        free = self.blocks.free - (self._watermark_blocks if decoding else 0)
        places = self.config.max_num_seqs - decoding
        budget = self.config.max_num_batched_tokens
        sequences: list[Sequence] = []
        new_tokens: list[int] = []
        contexts: list[int] = []
        emits: list[bool] = []
        blocks, pairs, blocks_of = 0, 0.0, self.blocks.blocks
        for sequence in self._waiting if self._partial is None else chain((self._partial,), self._waiting):
            done = sequence.prefilled
            tokens = min(sequence.length - done, budget)
            blocks_after = blocks + blocks_of(done + tokens) - blocks_of(done)
            if tokens == 0 or len(sequences) == places or blocks_after > free:
                break
            sequences.append(sequence)
            new_tokens.append(tokens)
            contexts.append(done)
            emits.append(done + tokens == sequence.length)
            blocks = blocks_after
            pairs += tokens * (done + tokens / 2)
            budget -= tokens
        if not sequences:
            return None
        shape = PrefillShape(sum(new_tokens), pairs)
        return PrefillBatch(
            tuple(sequences), tuple(new_tokens), tuple(contexts), tuple(emits), blocks, shape, self._layers
        )

    def _decide(self, now_s: float, batch: PrefillBatch | None) -> Allocation:
        """The policy's answer, asked for when a batch is about to start or who is busy or decoding has changed.

        A switch for a batch takes a while; it is not called off because the load is another one by then.
        """
        busy = (batch is not None, bool(self._decoding or self._joining))
        starts = batch is not None and batch is not self._batch
        unasked = starts and not self._start_asked
        if self._target is None or unasked or self._decode_changed or busy != self._busy:
            head = self._partial or (self._waiting[0] if self._waiting else None)
            load = Load(
                now_s=now_s,
                waiting_requests=len(self._waiting) + (self._partial is not None),
                waiting_tokens=self._waiting_tokens,
                oldest_wait_s=now_s - head.request.arrival_s if head else 0.0,
                prefill=batch.shape if batch else None,
                decode=self._decode_shape(),
                kv_free_share=self.blocks.free / self.blocks.num_blocks,
                split=self._split,
            )
            target = self.policy.decide(load)
            if target is not self._target:
                self._target = self._checked(target)
            self._decode_changed = False
            self._start_asked = starts
            self._busy = busy
        return self._target

    def _decode_shape(self) -> DecodeShape | None:
        """The batch in its next step, in which each sequence's newest token attends to itself, too."""
        batch = len(self._decoding) + len(self._joining)
        if not batch:
            return None
        cached = self._base_sum + len(self._decoding) * (self._steps + self._done)
        cached += sum([sequence.length for sequence in self._joining])
        return DecodeShape(batch, cached + batch)

    def _context_lens(self) -> tuple[int, ...]:
        steps = self._steps + self._done
        return tuple([sequence.base + steps for sequence in self._decoding])

    def _checked(self, target: Allocation) -> Allocation:
        """Raises ValueError for an allocation that this scheduler cannot carry out on this device."""
        sms = (
            target.prefill_sms + target.decode_sms
            if target.mode is Mode.SPLIT
            else max(target.prefill_sms, target.decode_sms)
        )
        if target.mode not in (Mode.SPLIT, Mode.EXCLUSIVE) or sms > self._device_sms:
            raise ValueError(
                f"policy {self.policy.name} chose {target}; expected split or exclusive on {self._device_sms} SMs"
            )
        return target

    def _launch(self, at: Allocation, batch: PrefillBatch | None) -> Plan:
        """Start what the allocation allows and is not in flight, decode first."""
        decode = self._decode_run
        if at.mode is Mode.EXCLUSIVE and batch is not None and decode is not None:
            return self._yield(decode)
        starts_prefill = batch is not None and self._prefill_run is None
        if batch is not None and starts_prefill and batch is not self._batch:
            if decode is not None and decode.id not in self._yielding and not self._fits(decode, batch):
                return self._yield(decode)  # goes on from its next boundary with the steps that fit beside the batch
            self._admit(batch)
        launches: list[Run] = []
        if self._decoding and decode is None and (at.mode is Mode.SPLIT or batch is None):
            self._decode_run = self._new_decode_run(at)
            launches.append(self._decode_run)
        if batch is not None and starts_prefill:
            self._prefill_run = self._new_prefill_run(at, batch)
            launches.append(self._prefill_run)
        return Plan((), tuple(launches)) if launches else NOTHING

    def _fits(self, decode: Run, batch: PrefillBatch) -> bool:
        """Whether the decode run in flight can still reach its last step once the batch has its blocks."""
        return self.blocks.need(decode.max_steps - self._ahead) <= self.blocks.free - batch.blocks

    def _admit(self, batch: PrefillBatch) -> None:
        for sequence, new_tokens in zip(batch.sequences, batch.new_tokens, strict=True):
            self.blocks.hold(sequence.request.id, sequence.prefilled + new_tokens)
            self._waiting_tokens -= new_tokens
            if sequence is self._partial:
                self._partial = None
            else:
                self._waiting.popleft()
        self._batch = batch
        self._start_asked = False

    def _new_decode_run(self, at: Allocation) -> Run:
        max_steps = 1 + self.blocks.steps_that_fit()
        if self.config.decode_steps is not None:
            max_steps = min(max_steps, self.config.decode_steps)
        requests = tuple([sequence.request for sequence in self._decoding])
        ones = (1,) * len(requests)
        return Run(self._run_id(), Phase.DECODE, requests, ones, self._context_lens(), at.decode_sms, max_steps, at)

    def _new_prefill_run(self, at: Allocation, batch: PrefillBatch) -> Run:
        requests = tuple([sequence.request for sequence in batch.sequences])
        return Run(
            self._run_id(), Phase.PREFILL, requests, batch.new_tokens, batch.context_lens, at.prefill_sms,
            batch.layers, at, batch.emits,
        )  # fmt: skip

    def _run_id(self) -> int:
        self._next_run += 1
        return self._next_run

    def _yield(self, *runs: Run) -> Plan:
        """Ask the runs that have not been asked."""
        asked = [run.id for run in runs if run.id not in self._yielding]
        if not asked:
            return NOTHING
        self._yielding.update(asked)
        return Plan(tuple(asked))
