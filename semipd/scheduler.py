"""Continuous batching: which requests run next, on which partition, and whether their KV cache fits.

Prefill and decode are batched separately, or fused in ``MIXED``; FCFS. Knobs and preemption by recomputation are vLLM's
(``vllm/config/scheduler.py``, ``vllm/v1/core/sched/scheduler.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from semipd.batch import PrefillBatch, Sequence, next_batch
from semipd.core import (
    DECODE,
    FUSED,
    ONE_AT_A_TIME,
    PREFILL,
    Allocation,
    DecodeShape,
    Load,
    Mode,
    Phase,
    Request,
    Run,
    StepRecord,
)
from semipd.diagnosis import Blocked, Cause
from semipd.kv_cache import BlockManager
from semipd.policies import Policy
from semipd.scheduler_config import SchedulerConfig


@dataclass(slots=True, init=False)
class Plan:
    """What to do now: ask runs in flight to yield, or launch new ones; never both.

    What ends at this very moment because it was asked to is thus known before anything is launched.
    """

    yields: tuple[int, ...]
    launches: tuple[Run, ...]

    def __init__(self, yields: tuple[int, ...] = (), launches: tuple[Run, ...] = ()) -> None:
        self.yields = yields
        self.launches = launches


NOTHING = Plan()


class Scheduler:
    """Decides what runs, and never looks at an output length (law 7): executors report what has finished.

    Prefill takes whole waiting prompts in order of arrival up to ``max_num_batched_tokens``, the last one cut to fit;
    its rest goes first next time. A sequence that got its first token joins the decode batch at its next step
    boundary. Every decoding sequence has room for its next token at each boundary; when there is too little, the
    latest arrivals are preempted: they give all blocks back, go to the head of the queue and are prefilled anew with
    all their tokens. So a decode run of many steps takes blocks just when single steps would, and admission
    sees the same free blocks (law 10).

    ``SPLIT``, ``CAPPED`` and ``PRIORITY``: both phases have a run in flight whenever they have work.
    ``EXCLUSIVE``: one at a time; ``first`` has its turn while it has work, which for prefill is a batch that fits and
    for decode a sequence.
    ``MIXED``: while prompts wait that fit, each step is one fused run: a token for every decoding sequence, and of the
    prompts as many as the rest of ``chunk_tokens`` allows. Else decode goes on by itself. That is the chunked prefill
    of Sarathi-Serve (arXiv 2403.02310) and of vLLM's v1 engine.

    A change of allocation drains: both phases yield, and the first to end waits for the other. A batch stopped between
    two layers is finished as a prefill run whatever the new mode, ``MIXED`` included.

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
        blocked: How long prompts waited while none was prefilled, and why.
        prompt_tokens: Tokens of the prompts admitted so far.
        prefix_hit_tokens: Of these, those that were cached when their prompt was admitted first.
        drains: Whether all in flight was asked to yield for a new allocation: nothing starts until a run has ended or
            a request has come.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy, *, device_sms: int, layers: int) -> None:
        self.config = config
        self.policy = policy
        self.blocks = BlockManager(config.num_blocks, config.block_size, config.prefix_block_size)
        self.dropped: list[tuple[Request, str]] = []
        self.preemptions = 0
        self.switches = 0
        self.prompt_tokens = self.prefix_hit_tokens = 0
        self.blocked = Blocked()
        self.drains = False
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
        self._leaving: list[int] = []  # finished by prefill beside a decode run, whose blocks are to be counted first

        self._in_flight: dict[Phase, Run] = {}
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
        self._next_order = 0
        self._next_run = 0

    @property
    def allocation(self) -> Allocation | None:
        """The allocation in force, None before the first decision."""
        return self._current

    @property
    def draining(self) -> bool:
        """Whether runs in flight are being ended for a new allocation."""
        return bool(self._in_flight) and self._target != self._current

    @property
    def prefix_hit_share(self) -> float | None:
        """Share of the prompts' tokens that was cached when they were admitted first; None without prefix caching."""
        if not self.config.prefix_block_size or not self.prompt_tokens:
            return None
        return self.prefix_hit_tokens / self.prompt_tokens

    def has_unfinished(self) -> bool:
        """Whether a request was added that is neither finished nor dropped."""
        return bool(self._live)

    def add(self, request: Request) -> None:
        """Queue a request that has arrived, or drop it when its prompt and one token can never fit.

        Raises ValueError when a request of that id is unfinished.
        """
        self.drains = False
        if request.id in self._live:
            raise ValueError(f"request {request.id} is unfinished; expected each id once")
        sequence = Sequence(request, self._next_order, self.blocks.keys_of(request))
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
        if self.drains or FUSED in self._in_flight:  # which is one step
            return NOTHING
        decode = self._in_flight.get(DECODE)
        if decode is None:
            self._make_room()
            if self._leaving:
                self._release_leaving()
        elif self._joining and decode.id not in self._yielding:
            return self._yield([decode])
        else:
            self._follow(decode, steps_done(decode.id))
            if self._leaving:
                self._release_leaving()
        batch = self._next_batch()
        if batch is None and not self._decoding:
            return NOTHING
        target, batch = self._decide(now_s, batch)
        waiting = len(self._waiting) + (self._partial is not None) if batch is None else 0
        if waiting or self.blocked.cause is not None:
            self.blocked.note(now_s, self._cause() if waiting else None, waiting)
        if target is not self._current and target != self._current:
            if self._in_flight:
                self.drains = True
                return self._yield(list(self._in_flight.values()))
            self.switches += self._current is not None
            self._current = target
            if target.mode is Mode.SPLIT:
                self._split = target
        return self._launch(target, batch)

    def complete(self, record: StepRecord) -> None:
        """Take note of a run that ended. Raises ValueError for one that was not in flight."""
        self.drains = False
        run, phase = record.run, record.run.phase
        launched = self._in_flight.get(phase)
        if launched is None or launched.id != run.id:
            raise ValueError(f"{phase.value} run {run.id} is not in flight")
        del self._in_flight[phase]
        self._yielding.discard(run.id)
        if phase is DECODE or run.decodes:
            self._complete_decode(record)
        if phase is not DECODE and self._batch is not None:
            self._batch.layers -= record.steps if phase is PREFILL else self._layers
            if not self._batch.layers:
                self._complete_batch(self._batch, record)
        beside_decode = phase is PREFILL and DECODE in self._in_flight
        for request_id in record.finished:
            del self._live[request_id]
            if beside_decode:
                self._leaving.append(request_id)
            else:
                self.blocks.release(request_id)

    def _complete_decode(self, record: StepRecord) -> None:
        steps = record.steps
        self._steps += steps
        self.blocks.advance(steps - self._ahead)
        self._ahead = self._done = 0
        if record.finished:
            gone = {id(self._live[request_id]) for request_id in record.finished}
            left = [sequence for sequence in self._decoding if id(sequence) not in gone]
            self._decode_changed = self._decode_changed or len(left) < len(self._decoding)
            self._decoding = left
            self._base_sum = sum([sequence.base for sequence in left])

    def _release_leaving(self) -> None:
        for request_id in self._leaving:
            self.blocks.release(request_id)
        self._leaving.clear()

    def _complete_batch(self, batch: PrefillBatch, record: StepRecord) -> None:
        self._batch = None
        finished = set(record.finished)
        for sequence, new_tokens, emits in zip(batch.sequences, batch.new_tokens, batch.emits, strict=True):
            sequence.prefilled += new_tokens
            if not emits:
                self._partial = sequence
            elif sequence.request.id not in finished:
                self._joining.append(sequence)
                self._decode_changed = True

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
        while self.blocks.need() > self.blocks.available:
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
        """The batch in flight or stopped, else what could start now as the policy last said; nothing is taken yet."""
        if self._batch is not None or not (self._waiting or self._partial):
            return self._batch
        decoding = len(self._decoding) + len(self._joining)
        return next_batch(
            chain((self._partial,), self._waiting) if self._partial else self._waiting,
            tokens=self._prompt_tokens(),
            places=self.config.max_num_seqs - decoding,
            free=self.blocks.available - (self._watermark_blocks if decoding else 0),
            cache=self.blocks,
            layers=self._layers,
        )

    def _prompt_tokens(self) -> int:
        """Most prompt tokens that the policy's last answer lets into a batch now."""
        at, most = self._target, self.config.max_num_batched_tokens
        decoding = len(self._decoding) + len(self._joining)
        if at is None or at.mode not in ONE_AT_A_TIME:
            return most
        if at.mode is Mode.MIXED:
            return min(at.chunk_tokens, most) - decoding
        return 0 if decoding and at.first is DECODE else most

    def _cause(self) -> Cause:
        """Why no prompt starts, of those that wait."""
        if len(self._decoding) + len(self._joining) >= self.config.max_num_seqs:
            return "queue"
        return "KV" if self._prompt_tokens() > 0 else "decode"

    def _decide(self, now_s: float, batch: PrefillBatch | None) -> tuple[Allocation, PrefillBatch | None]:
        """The policy's answer, asked for when a batch is about to start or who is busy or decoding has changed.

        And the batch that could start under it. A switch for a batch takes a while; it is not called off because the
        load is another one by then.
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
                kv_free_share=self.blocks.available / self.blocks.num_blocks,
                split=self._split,
            )
            target, tokens = self.policy.decide(load), self._prompt_tokens()
            if target is not self._target:
                self._target = self._checked(target)
                if self._prompt_tokens() != tokens:
                    batch = self._next_batch()
            self._decode_changed = False
            self._start_asked = batch is not None and batch is not self._batch
            self._busy = (batch is not None, busy[1])
        return self._target, batch

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
        """Raises ValueError for an allocation that cannot be carried out on this device (law 4)."""
        shares = target.prefill_sms, target.decode_sms
        sms = sum(shares) if target.mode is Mode.SPLIT else max(shares)
        if sms > self._device_sms or (target.mode is Mode.MIXED and target.chunk_tokens < 1):
            raise ValueError(
                f"policy {self.policy.name} chose {target}; expected at most {self._device_sms} SMs, and a fused batch "
                "of at least one token"
            )
        return target

    def _launch(self, at: Allocation, batch: PrefillBatch | None) -> Plan:
        """Start what the allocation allows and is not in flight, decode first."""
        decode, alone = self._in_flight.get(DECODE), at.mode in ONE_AT_A_TIME
        if alone and at.first is DECODE and self._decoding:
            batch = None  # it was stopped in another mode, and waits
        if alone and batch is not None and decode is not None:
            return self._yield([decode])
        starts_prefill = batch is not None and PREFILL not in self._in_flight
        if batch is not None and starts_prefill and batch is not self._batch:
            if decode is not None and decode.id not in self._yielding and not self._fits(decode, batch):
                return self._yield([decode])  # goes on from its next boundary with the steps that fit beside the batch
            self._admit(batch)
            if at.mode is Mode.MIXED:
                decoding = tuple([sequence.request for sequence in self._decoding])
                return self._start([batch.fused(self._run_id(), at, decoding, self._context_lens())])
        launches: list[Run] = []
        if self._decoding and decode is None and not (alone and batch is not None):
            launches.append(self._new_decode_run(at))
        if batch is not None and starts_prefill:
            launches.append(batch.run(self._run_id(), at))
        return self._start(launches)

    def _fits(self, decode: Run, batch: PrefillBatch) -> bool:
        """Whether the decode run in flight can still reach its last step once the batch has its blocks."""
        return self.blocks.need(decode.max_steps - self._ahead) <= self.blocks.available - batch.blocks

    def _admit(self, batch: PrefillBatch) -> None:
        for sequence, done, new_tokens in zip(batch.sequences, batch.context_lens, batch.new_tokens, strict=True):
            self._waiting_tokens -= done - sequence.prefilled + new_tokens
            if sequence is self._partial:
                self._partial = None
                continue
            self._waiting.popleft()
            sequence.prefilled = done
            if sequence.length == sequence.request.prompt_len:
                self.prompt_tokens += sequence.length
                self.prefix_hit_tokens += done
        self.blocks.hold_all(batch.holds)
        self._batch = batch
        self._start_asked = False

    def _new_decode_run(self, at: Allocation) -> Run:
        max_steps = 1 + self.blocks.steps_that_fit()
        if self.config.decode_steps is not None:
            max_steps = min(max_steps, self.config.decode_steps)
        requests = tuple([sequence.request for sequence in self._decoding])
        ones = (1,) * len(requests)
        return Run(self._run_id(), DECODE, requests, ones, self._context_lens(), at.decode_sms, max_steps, at)

    def _start(self, runs: list[Run]) -> Plan:
        for run in runs:
            self._in_flight[run.phase] = run
        return Plan((), tuple(runs)) if runs else NOTHING

    def _run_id(self) -> int:
        self._next_run += 1
        return self._next_run

    def _yield(self, runs: list[Run]) -> Plan:
        """Ask the runs that have not been asked."""
        asked = [run.id for run in runs if run.id not in self._yielding]
        if not asked:
            return NOTHING
        self._yielding.update(asked)
        return Plan(tuple(asked))
