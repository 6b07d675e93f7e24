"""The whole system once more: one token and one layer at a time, brute force, exact arithmetic.

An independent reading of the rules in docs/invariants.md and of the docstrings of scheduler, sim and executor, to
hold scheduler and simulator against: no runs, no yields, no events, no simpy, nothing cached, every KV block
recounted at every step, time in fractions. Only the policies and the cost model are shared, both being plain
functions of their input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from semipd.core import Allocation, DecodeShape, FloatArray, IntArray, Load, Mode, PrefillShape, Request
from semipd.cost import CostModel
from semipd.policies import Policy
from semipd.scheduler import SchedulerConfig


@dataclass(frozen=True)
class BucketCost:
    """Step times that depend on everything a step time may depend on, in steps of powers of two.

    So times are dyadic and floating point is exact: results can be compared for equality, ties included.
    """

    layers: int
    device_sms: int = 32

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """Three splits."""
        return tuple(Allocation(Mode.SPLIT, n, self.device_sms - n) for n in (8, 16, 24))

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """By the tokens' bit length; twice as long beside a large decode batch."""
        slower = 2.0 if beside is not None and beside.kv_tokens > 12 else 1.0
        on_partition = {8: 0.5, 16: 0.25, 24: 0.125, 32: 0.0625}[at.prefill_sms]
        return 2.0 ** (shape.tokens.bit_length() - 2) * on_partition * slower, False

    def decode_s(
        self, batch: int, kv_tokens: IntArray, at: Allocation, beside: PrefillShape | None
    ) -> tuple[FloatArray, int]:
        """By batch and KV tokens; two or four times as long beside prefill."""
        slower = 1.0 if beside is None else 4.0 if beside.tokens > 6 else 2.0
        on_partition = {8: 0.5, 16: 0.25, 24: 0.25, 32: 0.125}[at.decode_sms] * (2.0 if batch > 2 else 1.0)
        return np.array([on_partition * slower * 2.0 ** (int(k) // 16) for k in kv_tokens]), 0


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
    """A layer or a decode step in progress: the share of it that is left, and its price now."""

    left: Fraction
    price: Fraction


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

    def __init__(self, config: SchedulerConfig, policy: Policy, cost: CostModel, requests: Iterable[Request]) -> None:
        self.config, self.policy, self.cost = config, policy, cost
        self.now = Fraction(0)
        self.arrivals = list(requests)
        self.jobs: list[Job] = []
        self.waiting: list[Job] = []
        self.cut: Job | None = None
        self.batch: Batch | None = None
        self.decoding: list[Job] = []
        self.joining: list[Job] = []
        self.layer: Stage | None = None
        self.step: Stage | None = None
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
        ends = [self.now + stage.left * stage.price for stage in (self.layer, self.step) if stage]
        if self.arrivals:
            ends.append(max(self.now, Fraction(self.arrivals[0].arrival_s)))
        if not ends:
            return False
        then = min(ends)
        for stage in (self.layer, self.step):
            if stage:
                stage.left -= (then - self.now) / stage.price
        self.now = then
        step_over = self.step is not None and self.step.left == 0
        layer_over = self.layer is not None and self.layer.left == 0
        if step_over:
            self.end_step()
        if layer_over:
            self.end_layer()
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
        self.step = None
        self.last_step = (self.now, self.current, list(self.now_decoding))
        for job in self.now_decoding:
            job.cached += 1
            self.emit(job)
        self.decoding = [job for job in self.decoding if not self.finished(job)]

    def end_layer(self) -> None:
        self.layer = None
        batch = self.batch
        assert batch
        batch.layers_left -= 1
        self.last_layer = (self.now, self.current, batch)
        if batch.layers_left:
            return
        self.batch = None
        for job, new in zip(batch.jobs, batch.new, strict=True):
            job.cached += new
            if job.cached < job.to_prefill:
                self.cut = job
                continue
            self.emit(job)
            if not self.finished(job):
                self.joining.append(job)

    def emit(self, job: Job) -> None:
        job.token_times.append(self.now)
        if self.finished(job):
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
        if self.step is None:
            self.decoding += self.joining
            self.joining = []
            self.make_room()
        batch = self.batch or self.candidate()
        if not batch and not self.decoding:
            return
        target = self.decide(batch)
        if target != self.current:
            if self.step or self.layer:
                self.start(False, False)
                return  # drain: nothing starts until both are between two steps
            self.switches += self.current is not None
            self.current = target
            if target.mode is Mode.SPLIT:
                self.last_split = target
        alone = target.mode is Mode.EXCLUSIVE
        starts_step = self.step is None and bool(self.decoding) and not (alone and batch)
        starts_layer = self.layer is None and batch is not None and not (alone and self.step is not None)
        if starts_layer and batch is not self.batch:
            assert batch
            self.admit(batch)
        self.start(starts_step, starts_layer)

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
            last.room = 0
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
            tokens = min(job.to_prefill - job.cached, self.config.max_num_batched_tokens - sum(new))
            left -= self.blocks(job.cached + tokens) - self.blocks(job.room)
            if tokens == 0 or left < 0 or running + len(jobs) == self.config.max_num_seqs:
                break
            jobs.append(job)
            new.append(tokens)
        if not jobs:
            return None
        pairs = sum(float(n * (job.cached + n / 2)) for n, job in zip(new, jobs, strict=True))
        return Batch(jobs, new, PrefillShape(sum(new), pairs), self.cost.layers)

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

    def decide(self, batch: Batch | None) -> Allocation:
        """Ask the policy once before a batch starts, and when who decodes or who is busy is not as last time."""
        busy = (batch is not None, {id(job) for job in self.decoding + self.joining})
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
            self.asked_for, self.asked_for_next_batch = busy, starts
        return self.target

    # prices

    def start(self, starts_step: bool, starts_layer: bool) -> None:
        """Begin a step or a layer or both; and whatever is in progress goes on at today's price.

        Each phase learns the other's shape when either begins something that is not the next step of what it did
        until this instant at the same allocation.
        """
        news = False
        if starts_step:
            news |= self.last_step != (self.now, self.current, self.decoding)
            self.now_decoding = list(self.decoding)
            self.step = Stage(Fraction(1), Fraction(1))
        if starts_layer:
            news |= self.last_layer != (self.now, self.current, self.batch)
            self.layer = Stage(Fraction(1), Fraction(1))
        kv_tokens = sum(job.cached + 1 for job in self.now_decoding)
        if news:
            self.seen_decode = DecodeShape(len(self.now_decoding), kv_tokens) if self.step else None
            self.seen_prefill = self.batch.shape if self.layer and self.batch else None
        if not self.current:
            return
        if self.step:
            beside = self.seen_prefill if self.layer else None
            price, _ = self.cost.decode_s(len(self.now_decoding), np.array([kv_tokens]), self.current, beside)
            self.step.price = Fraction(float(price[0]))
        if self.layer and self.batch:
            seconds, _ = self.cost.prefill_s(self.batch.shape, self.current, self.seen_decode if self.step else None)
            self.layer.price = Fraction(seconds)
