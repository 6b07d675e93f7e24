"""Prefix caching once more, block by block: every KV block has a number and knows what is in it.

To hold ``BlockManager`` against, which only counts, and scheduler and simulator with it. Nothing is shared with it; no
keys, no counters, no order kept: who holds a block, what is cached and what goes first is looked up from all sequences
and from when each stretch of a prompt was last in use.
"""

from __future__ import annotations

from typing import Any

from reference import Batch, Job, Reference

from semipd.core import PrefillShape
from semipd.scheduler_config import SchedulerConfig

Stretch = tuple[int, ...]
"""A prompt's first prefix blocks, a whole number of units of them, by their ids."""


class NaivePrefixCache:
    """``num_blocks`` numbered KV blocks. A unit is the shortest whole number of prefix blocks that fills KV blocks."""

    def __init__(self, num_blocks: int, block_size: int, prefix_block_size: int) -> None:
        self.num_blocks, self.block_size, self.prefix_block_size = num_blocks, block_size, prefix_block_size
        self.unit = next(n for n in range(1, 10**6) if n % block_size == 0 and n % prefix_block_size == 0)
        self.tables: dict[int, list[int]] = {}  # numbers of each sequence's blocks, in order
        self.stretches: dict[int, list[Stretch]] = {}  # what each sequence's first blocks are known to hold
        self.known: dict[Stretch, list[int]] = {}  # where the last unit of a stretch lies
        self.last_use: dict[Stretch, int] = {}
        self.now = 0

    def copy(self) -> NaivePrefixCache:
        """Another one of the same state; what is in its dictionaries is never changed in place, but for tables."""
        other = NaivePrefixCache.__new__(NaivePrefixCache)
        other.__dict__ = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}
        other.tables = {sequence: list(table) for sequence, table in self.tables.items()}
        return other

    def held(self) -> set[int]:
        return {block for table in self.tables.values() for block in table}

    def cached(self) -> set[int]:
        return {block for blocks in self.known.values() for block in blocks} - self.held()

    def free(self) -> set[int]:
        return set(range(self.num_blocks)) - self.held() - self.cached()

    def prefix(self, ids: Stretch, units: int) -> Stretch:
        return ids[: units * self.unit // self.prefix_block_size]

    def hit_tokens(self, ids: Stretch, length: int) -> int:
        """Tokens in leading units that are known, the last token never among them."""
        tokens = 0
        while (
            tokens + self.unit < length
            and (tokens + self.unit) <= len(ids) * self.prefix_block_size
            and self.prefix(ids, tokens // self.unit + 1) in self.known
        ):
            tokens += self.unit
        return tokens

    def grow(self, sequence: int, tokens: int, ids: Stretch = ()) -> bool:
        """Whether there was room for so many tokens; without it nothing changes.

        ``ids`` are those of the prompt's whole prefix blocks: units that the tokens complete are shared by them.
        """
        saved = self.copy()
        self.now += 1
        table = self.tables.setdefault(sequence, [])
        mine = list(self.stretches.get(sequence, []))
        per_unit = self.unit // self.block_size
        whole = min(tokens, len(ids) * self.prefix_block_size) // self.unit
        for n in range(len(mine), whole):  # what is known already takes no room of its own
            stretch = self.prefix(ids, n + 1)
            if stretch in self.known:
                table[n * per_unit : (n + 1) * per_unit] = self.known[stretch]
        while len(table) < -(-tokens // self.block_size):
            if not self.free() and not self.evict():
                self.__dict__ = saved.__dict__
                return False
            table.append(min(self.free()))
        for n in range(len(mine), whole):
            stretch = self.prefix(ids, n + 1)
            self.known.setdefault(stretch, table[n * per_unit : (n + 1) * per_unit])
            mine.append(stretch)
        self.stretches[sequence] = mine
        return True

    def evict(self) -> bool:
        """Forget the cached unit that was in use longest ago, of those of one time the one furthest into a prompt."""
        idle = [stretch for stretch, blocks in self.known.items() if not set(blocks) & self.held()]
        if not idle:
            return False
        del self.known[min(idle, key=lambda stretch: (self.last_use[stretch], -len(stretch)))]
        return True

    def leave(self, sequence: int) -> None:
        self.now += 1
        del self.tables[sequence]
        for stretch in self.stretches.pop(sequence):
            self.last_use[stretch] = self.now


class CachingReference(Reference):
    """The brute-force system with prefix caching: rooms are those of a ``NaivePrefixCache``."""

    def __init__(self, config: SchedulerConfig, *args: Any) -> None:
        super().__init__(config, *args)
        self.cache = NaivePrefixCache(config.num_blocks, config.block_size, config.prefix_block_size)
        self.prompt_tokens = self.hit_tokens = 0

    def ids(self, job: Job) -> Stretch:
        return job.request.prefix_block_ids[: job.request.prompt_len // self.config.prefix_block_size]

    def grow(self, job: Job, tokens: int) -> bool:
        return self.cache.grow(job.request.id, tokens, self.ids(job))

    def leave(self, job: Job) -> None:
        self.cache.leave(job.request.id)

    def free(self) -> int:
        used = len(self.cache.held())
        self.kv_peak = max(self.kv_peak, used)
        return self.config.num_blocks - used

    def make_room(self) -> None:
        """As without caching, but that giving way leaves prefixes cached."""
        while self.decoding:
            trial = self.cache.copy()
            if all(trial.grow(job.request.id, job.cached + 1, self.ids(job)) for job in self.decoding):
                self.cache = trial
                self.free()
                return
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
        """As without caching, but after what is cached; in a copy where nothing is ever evicted."""
        running = len(self.decoding) + len(self.joining)
        endless = self.cache.copy()
        endless.num_blocks = 10**3
        most = len(self.cache.held()) + self.free()
        most -= int(self.config.watermark * self.config.num_blocks) if running else 0
        batch = Batch([], [], PrefillShape(0, 0.0), self.cost.layers)
        self.contexts: list[int] = []
        pairs = mean_contexts = 0.0
        for job in ([self.cut] if self.cut else []) + self.waiting:
            context = job.cached or endless.hit_tokens(self.ids(job), job.to_prefill)
            tokens = min(job.to_prefill - context, self.tokens_wanted() - sum(batch.new))
            if tokens <= 0 or running + len(batch.jobs) == self.config.max_num_seqs:
                break
            whole = endless.copy()
            whole.grow(job.request.id, job.to_prefill, self.ids(job))
            endless.grow(job.request.id, context + tokens, self.ids(job))
            if len(endless.held()) > most or (not job.cached and len(whole.held()) > most):
                break
            batch.jobs.append(job)
            batch.new.append(tokens)
            self.contexts.append(context)
            pairs += tokens * (context + tokens / 2)
            mean_contexts += context + tokens / 2
        batch.shape = PrefillShape(sum(batch.new), pairs, mean_contexts, tuple(batch.new), tuple(self.contexts))
        return batch if batch.jobs else None

    def admit(self, batch: Batch) -> None:
        """Whoever shares what is cached does so before room is made for anyone."""
        for job, context in zip(batch.jobs, self.contexts, strict=True):
            if job is not self.cut and job.to_prefill == job.request.prompt_len:
                self.prompt_tokens += job.to_prefill
                self.hit_tokens += context
            job.cached = context
            self.grow(job, self.cache.hit_tokens(self.ids(job), job.to_prefill) if job is not self.cut else context)
        for job, new in zip(batch.jobs, batch.new, strict=True):
            assert self.grow(job, job.cached + new)
            if job is self.cut:
                self.cut = None
            else:
                self.waiting.remove(job)
        self.batch = batch
        self.asked_for_next_batch = False
        self.free()
