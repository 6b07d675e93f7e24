"""The whole system once more: one token and one layer at a time, brute force, exact arithmetic.

An independent reading of the rules in docs/invariants.md and of the docstrings of scheduler, sim and executor, to
hold scheduler and simulator against: no runs, no yields, no events, no simpy, nothing cached, every KV block
recounted at every step, time in fractions. Only the policies and the cost model are shared, both being plain
functions of their input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import numpy as np

from semipd.core import Allocation, DecodeShape, FloatArray, Load, Mode, Phase, PrefillShape, Request
from semipd.cost import CostModel
from semipd.overheads import NO_OVERHEADS, Overheads
from semipd.policies import Policy
from semipd.scheduler_config import SchedulerConfig


@dataclass(frozen=True)
class BucketCost:
    """Step times that depend on everything a step time may depend on, in steps of powers of two.

    So times are dyadic and floating point is exact: results can be compared for equality, ties included.
    """

    layers: int
    device_sms: int = 32
    refused: ClassVar[dict[Mode, str]] = {}

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """Three splits."""
        return tuple(Allocation(Mode.SPLIT, n, self.device_sms - n) for n in (8, 16, 24))

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """The splits, two capped ones, priority, and fused batches of up to 16 tokens."""
        sms = self.device_sms
        capped = (Allocation(Mode.CAPPED, n, sms) for n in (8, 24))
        return (*self.splits, *capped, Allocation(Mode.PRIORITY, sms, sms), Allocation(Mode.MIXED, sms, sms, 16))

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """By the tokens' bit length; twice as long beside a large decode batch."""
        slower = 2.0 if beside is not None and beside.kv_tokens > 12 else 1.0
        on_partition = {8: 0.5, 16: 0.25, 24: 0.125, 32: 0.0625}[at.prefill_sms]
        return 2.0 ** (shape.tokens.bit_length() - 2) * on_partition * slower, False

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """By batch and KV tokens; two or four times as long beside prefill."""
        slower = 1.0 if beside is None else 4.0 if beside.tokens > 6 else 2.0
        batch, first = shape.batch, shape.kv_tokens
        on_partition = {8: 0.5, 16: 0.25, 24: 0.25, 32: 0.125}[at.decode_sms] * (2.0 if batch > 2 else 1.0)
        kv_tokens = range(first, first + batch * steps, batch)
        return np.array([on_partition * slower * 2.0 ** (k // 16) for k in kv_tokens]), 0

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """By the bit lengths of the chunk's tokens and pairs and of the decode batch's KV tokens."""
        beside = 1 if decode is None else (decode.batch + decode.kv_tokens).bit_length()
        return 2.0 ** (chunk.tokens.bit_length() + int(chunk.pairs).bit_length() // 2 + beside - 6), False


def ms(time: float) -> Fraction:
    """Milliseconds as exact seconds."""
    return Fraction(time) / 1000


@dataclass(eq=False)
class Job:
    """A request: how many of its tokens are cached, how many it has generated, how many prefill must cache."""

    request: Request
    to_prefill: int
    cached: int = 0
    room: int = 0  # tokens that its blocks are taken for
    token_times: list[Fraction] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """A prefill batch with the layers it has left."""

    jobs: list[Job]
    new: list[int]
    shape: PrefillShape
    layers_left: int


@dataclass
class Stage:
    """A layer, a decode step or a fused one: the time until it begins, the share of it that is left, its price now."""

    delay: Fraction
    left: Fraction = Fraction(1)
    price: Fraction = Fraction(1)

    def ends_in(self) -> Fraction:
        return self.delay + self.left * self.price

    def pass_by(self, time: Fraction) -> None:
        idle = min(self.delay, time)
        self.delay -= idle
        self.left -= (time - idle) / self.price


@dataclass
class Outcome:
    """When each request's tokens came, and what else can be compared."""

    tokens: dict[int, list[Fraction]]
    dropped: list[int]
    preemptions: int
    switches: int
    kv_peak: int


class Reference:
    """See the module."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: Policy,
        cost: CostModel,
        requests: Iterable[Request],
        overheads: Overheads = NO_OVERHEADS,
    ) -> None:
        self.config, self.policy, self.cost, self.overheads = config, policy, cost, overheads
        self.now = Fraction(0)
        self.arrivals = list(requests)
        self.jobs: list[Job] = []
        self.waiting: list[Job] = []
        self.cut: Job | None = None
        self.batch: Batch | None = None
        self.decoding: list[Job] = []
        self.joining: list[Job] = []
        self.leaving: list[Job] = []  # finished by prefill beside a decode step, which takes its blocks first
        self.beside_step = False  # whether what ends now did so beside one
        self.layer: Stage | None = None
        self.step: Stage | None = None
        self.fused: Stage | None = None  # of the batch and of now_decoding
        self.now_decoding: list[Job] = []  # whom the step in progress, or the last one, is for
        self.current: Allocation | None = None
        self.last_split: Allocation | None = None
        self.target: Allocation | None = None
        self.asked_for: tuple[object, ...] = ()
        self.asked_for_next_batch = False
        self.seen_decode: DecodeShape | None = None  # the other phase as each was last told of it
        self.seen_prefill: PrefillShape | None = None
        self.last_step: tuple[object, ...] = ()  # when the last one ended, where it ran, and whom for
        self.last_layer: tuple[object, ...] = ()
        self.ran_at: Allocation | None = None  # the last that began
        self.switched = Fraction(0)  # until when nothing begins
        self.dropped: list[int] = []
        self.preemptions = self.switches = self.kv_peak = 0

    def run(self) -> Outcome:
        """Replay everything."""
        while self.advance():
            pass
        assert not self.waiting
        assert not self.decoding + self.joining
        assert not self.batch
        assert not self.cut
        tokens = {job.request.id: job.token_times for job in self.jobs}
        return Outcome(tokens, self.dropped, self.preemptions, self.switches, self.kv_peak)

    # time

    def advance(self) -> bool:
        """Act on this instant, then go to the next one; False when there is none."""
        self.arrive()
        self.act()
        stages = [stage for stage in (self.layer, self.step, self.fused) if stage]
        ends = [self.now + stage.ends_in() for stage in stages]
        if self.arrivals:
            ends.append(max(self.now, Fraction(self.arrivals[0].arrival_s)))
        if not ends:
            return False
        then = min(ends)
        for stage in stages:
            stage.pass_by(then - self.now)
        self.now = then
        self.beside_step = self.step is not None
        step_over = self.step is not None and self.step.left == 0
        layer_over = self.layer is not None and self.layer.left == 0
        fused_over = self.fused is not None and self.fused.left == 0
        if step_over or (fused_over and self.now_decoding):
            self.end_step()
        if layer_over:
            self.end_layer()
        if fused_over:
            self.fused = None
            self.end_batch()
        return True

    def arrive(self) -> None:
        while self.arrivals and Fraction(self.arrivals[0].arrival_s) <= self.now:
            request = self.arrivals.pop(0)
            job = Job(request, request.prompt_len)
            self.jobs.append(job)
            if self.blocks(request.prompt_len + 1) > self.config.num_blocks:
                self.dropped.append(request.id)
            else:
                self.waiting.append(job)

    def end_step(self) -> None:
        self.last_step = (self.now, self.current, list(self.now_decoding)) if self.step else ()
        self.step = None
        for job in self.now_decoding:
            job.cached += 1
            self.emit(job, self.leave)
        self.decoding = [job for job in self.decoding if not self.finished(job)]

    def end_layer(self) -> None:
        self.layer = None
        batch = self.batch
        assert batch
        batch.layers_left -= 1
        self.last_layer = (self.now, self.current, batch)
        if not batch.layers_left:
            self.end_batch()

    def end_batch(self) -> None:
        batch = self.batch
        assert batch
        self.batch = None
        for job, new in zip(batch.jobs, batch.new, strict=True):
            job.cached += new
            if job.cached < job.to_prefill:
                self.cut = job
                continue
            self.emit(job, self.leaving.append if self.beside_step else self.leave)
            if not self.finished(job):
                self.joining.append(job)

    def emit(self, job: Job, leave: Callable[[Job], None]) -> None:
        job.token_times.append(self.now)
        if self.finished(job):
            leave(job)

    def leave(self, job: Job) -> None:
        job.room = 0

    def finished(self, job: Job) -> bool:
        return len(job.token_times) == job.request.output_len

    # KV blocks

    def blocks(self, tokens: int) -> int:
        return (tokens + self.config.block_size - 1) // self.config.block_size

    def free(self) -> int:
        used = sum(self.blocks(job.room) for job in self.jobs)
        assert used <= self.config.num_blocks
        self.kv_peak = max(self.kv_peak, used)
        return self.config.num_blocks - used

    # decisions

    def act(self) -> None:
        if self.fused:
            return  # it is one step, and alone
        if self.step is None:
            self.decoding += self.joining
            self.joining = []
            self.make_room()
        for job in self.leaving:
            self.leave(job)
        self.leaving = []
        batch = self.batch or self.candidate()
        if not batch and not self.decoding:
            return
        target, batch = self.decide(batch)
        if target != self.current:
            if self.step or self.layer:
                self.start(False, False)
                return  # drain: nothing starts until both are between two steps
            self.switches += self.current is not None
            self.current = target
            if target.mode is Mode.SPLIT:
                self.last_split = target
        alone = target.mode in (Mode.EXCLUSIVE, Mode.MIXED)
        turn = Phase.PREFILL if batch and not (target.first is Phase.DECODE and self.decoding) else Phase.DECODE
        starts_step = self.step is None and bool(self.decoding) and not (alone and turn is Phase.PREFILL)
        starts_layer = self.layer is None and batch is not None
        starts_layer &= not (alone and (turn is Phase.DECODE or self.step is not None))
        fuses = starts_layer and target.mode is Mode.MIXED and batch is not self.batch
        if starts_layer and batch is not self.batch:
            assert batch
            self.admit(batch)
        if fuses:
            self.fuse()
        else:
            self.start(starts_step, starts_layer)

    def tokens_wanted(self) -> int:
        """Most new tokens of a prompt batch, as the policy last said."""
        most, running = self.config.max_num_batched_tokens, len(self.decoding + self.joining)
        if self.target and self.target.mode is Mode.MIXED:
            return min(most, self.target.chunk_tokens) - running
        if self.target and self.target.mode is Mode.EXCLUSIVE and self.target.first is Phase.DECODE and running:
            return 0
        return most

    def make_room(self) -> None:
        """Room for the next token of all that decode; else the latest arrivals give way."""
        while self.decoding:
            before = [job.room for job in self.decoding]
            for job in self.decoding:
                job.room = job.cached + 1
            if sum(self.blocks(job.room) for job in self.jobs) <= self.config.num_blocks:
                self.free()
                return
            for job, room in zip(self.decoding, before, strict=True):
                job.room = room
            last = max(self.decoding, key=self.jobs.index)
            self.decoding.remove(last)
            self.leave(last)
            if self.blocks(last.cached + 1) > self.config.num_blocks:
                self.dropped.append(last.request.id)
                continue
            self.preemptions += 1
            last.to_prefill = last.cached + 1
            last.cached = 0
            self.waiting.insert(0, last)

    def candidate(self) -> Batch | None:
        """Who would be prefilled next: in order, while tokens, places and blocks last."""
        running = len(self.decoding) + len(self.joining)
        left = self.free() - (int(self.config.watermark * self.config.num_blocks) if running else 0)
        jobs: list[Job] = []
        new: list[int] = []
        for job in ([self.cut] if self.cut else []) + self.waiting:
            tokens = min(job.to_prefill - job.cached, self.tokens_wanted() - sum(new))
            piece = self.blocks(job.cached + tokens) - self.blocks(job.room)
            needed = piece if job.cached else self.blocks(job.to_prefill)
            if tokens <= 0 or left < needed or running + len(jobs) == self.config.max_num_seqs:
                break
            left -= piece
            jobs.append(job)
            new.append(tokens)
        if not jobs:
            return None
        pairs = sum(float(n * (job.cached + n / 2)) for n, job in zip(new, jobs, strict=True))
        contexts = sum(job.cached + n / 2 for n, job in zip(new, jobs, strict=True))
        shape = PrefillShape(sum(new), pairs, contexts, tuple(new), tuple(job.cached for job in jobs))
        return Batch(jobs, new, shape, self.cost.layers)

    def admit(self, batch: Batch) -> None:
        for job, new in zip(batch.jobs, batch.new, strict=True):
            job.room = job.cached + new
            if job is self.cut:
                self.cut = None
            else:
                self.waiting.remove(job)
        self.batch = batch
        self.asked_for_next_batch = False
        self.free()

    def decode_shape(self) -> DecodeShape | None:
        jobs = self.decoding + self.joining
        return DecodeShape(len(jobs), sum(job.cached + 1 for job in jobs)) if jobs else None

    def decide(self, batch: Batch | None) -> tuple[Allocation, Batch | None]:
        """Ask the policy once before a batch starts, and when who decodes or who is busy is not as last time.

        Its answer may let other prompts start than the last one did.
        """
        decoding = {id(job) for job in self.decoding + self.joining}
        busy = (batch is not None, decoding)
        starts = batch is not None and batch is not self.batch
        if self.target is None or (starts and not self.asked_for_next_batch) or busy != self.asked_for:
            queue = ([self.cut] if self.cut else []) + self.waiting
            tokens = sum(job.to_prefill - job.cached for job in queue)
            if self.batch:
                tokens += sum(j.to_prefill - j.cached - n for j, n in zip(self.batch.jobs, self.batch.new, strict=True))
            load = Load(
                now_s=float(self.now),
                waiting_requests=len(queue),
                waiting_tokens=tokens,
                oldest_wait_s=float(self.now - Fraction(queue[0].request.arrival_s)) if queue else 0.0,
                prefill=batch.shape if batch else None,
                decode=self.decode_shape(),
                kv_free_share=self.free() / self.config.num_blocks,
                split=self.last_split,
            )
            self.target = self.policy.decide(load)
            batch = self.batch or self.candidate()
            self.asked_for = (batch is not None, decoding)
            self.asked_for_next_batch = batch is not None and batch is not self.batch
        return self.target, batch

    # prices

    def stage(self, phase: Phase, goes_on: bool) -> Stage:
        """What begins now, when it does: later after a switch, and later unless it goes on with what was."""
        if self.current != self.ran_at and self.ran_at:
            self.switched = self.now + ms(self.overheads.switch_ms)
        self.ran_at = self.current
        start_ms = {
            Phase.PREFILL: self.overheads.prefill_start_ms,
            Phase.DECODE: self.overheads.decode_start_ms,
            Phase.MIXED: self.overheads.mixed_start_ms,
        }
        launch = ms(start_ms[phase])
        if phase is Phase.DECODE:
            launch += ms(self.overheads.decode_start_per_sequence_ms) * len(self.decoding)
        return Stage(max(Fraction(0), self.switched - self.now) + (0 if goes_on else launch))

    def fuse(self) -> None:
        """Begin a fused step of all that decode and the batch."""
        assert self.batch
        self.now_decoding = list(self.decoding)
        kv_tokens = sum(job.cached + 1 for job in self.now_decoding)
        decode = DecodeShape(len(self.now_decoding), kv_tokens) if self.now_decoding else None
        self.fused = self.stage(Phase.MIXED, False)
        self.fused.price = Fraction(self.cost.mixed_s(self.batch.shape, decode)[0])

    def start(self, starts_step: bool, starts_layer: bool) -> None:
        """Begin a step or a layer or both; and whatever is in progress goes on at today's price.

        Each phase learns the other's shape when either begins something that is not the next step of what it did
        until this instant at the same allocation.
        """
        news = False
        if starts_step:
            goes_on = self.last_step == (self.now, self.current, self.decoding)
            news |= not goes_on
            self.now_decoding = list(self.decoding)
            self.step = self.stage(Phase.DECODE, goes_on)
        if starts_layer:
            goes_on = self.last_layer == (self.now, self.current, self.batch)
            news |= not goes_on
            self.layer = self.stage(Phase.PREFILL, goes_on)
        kv_tokens = sum(job.cached + 1 for job in self.now_decoding)
        if news:
            self.seen_decode = DecodeShape(len(self.now_decoding), kv_tokens) if self.step else None
            self.seen_prefill = self.batch.shape if self.layer and self.batch else None
        if not self.current:
            return
        if self.step:
            beside = self.seen_prefill if self.layer else None
            price, _ = self.cost.decode_s(DecodeShape(len(self.now_decoding), kv_tokens), self.current, beside)
            self.step.price = Fraction(float(price[0]))
        if self.layer and self.batch:
            seconds, _ = self.cost.prefill_s(self.batch.shape, self.current, self.seen_decode if self.step else None)
            self.layer.price = Fraction(seconds)
