"""KV-cache blocks: how many are free, how many each sequence holds, and which prefixes stay cached.

Blocks are counted, not numbered. A sequence of n tokens holds ceil(n / block_size) blocks, as in vLLM's
PagedAttention (arXiv 2309.06180, section 4).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from math import lcm

from semipd.core import Request


class BlockManager:
    """Counts the blocks of one device; ``free + used + cached == num_blocks`` always (law 3).

    A sequence is prefilled at its own pace (``hold``) and then joins the decode batch (``join``), whose sequences
    all grow by one token a step (``advance``). Since they cross a block boundary every ``block_size`` steps, it
    is enough to count them by the step, modulo ``block_size``, at which they do: a step costs O(1) and any
    number of steps O(block_size), however many sequences decode.

    **Prefix caching** (``prefix_block_size``, 0 for none). Prompts share *units*, the shortest stretches that are whole
    prefix blocks of the trace as well as whole KV blocks: ``unit_tokens`` is their least common multiple. A unit is
    known by its key, from ``keys_of``. However many sequences hold a unit, its blocks are counted once; when none does
    any more they stay *cached* until the room is needed, and the unit released longest ago goes first, of one
    sequence the last unit first: a unit is never cached without those before it. That is vLLM's order
    (``vllm/v1/core/kv_cache_manager.py``).
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_block_size: int = 0) -> None:
        if num_blocks < 1 or block_size < 1 or prefix_block_size < 0:
            raise ValueError(
                f"num_blocks {num_blocks}, block_size {block_size}, prefix_block_size {prefix_block_size}: "
                "expected at least 1, 1 and 0"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_block_size = prefix_block_size
        self.unit_tokens = lcm(prefix_block_size or 1, block_size)
        self.available = num_blocks  # free or cached: may be taken
        self.peak_used = 0
        self._unit_blocks = self.unit_tokens // block_size
        self._holders: dict[int, int] = {}  # units that sequences hold: how many do
        self._cached: OrderedDict[int, None] = OrderedDict()  # units that none holds, the next to go first
        self._shared: dict[int, list[int]] = {}  # sequences: the units they hold
        self._held: dict[int, int] = {}  # prefilled sequences: tokens
        self._offsets: dict[int, int] = {}  # decode batch: tokens - self._step
        self._step = 0
        self._by_offset = [0] * block_size  # decode batch: sequences by offset modulo block_size

    @property
    def used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks of units that no sequence holds."""
        return self._unit_blocks * len(self._cached)

    @property
    def free(self) -> int:
        """Blocks with nothing in them."""
        return self.available - self.cached

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def tokens(self, sequence: int) -> int:
        """Tokens that a sequence has room for; 0 when it holds nothing."""
        if sequence in self._offsets:
            return self._offsets[sequence] + self._step
        return self._held.get(sequence, 0)

    def keys_of(self, request: Request) -> tuple[int, ...]:
        """Keys of the whole units of a request's prompt, in order; equal keys are equal prefixes up to there.

        A key is a hash of the one before and of the unit's prefix block ids, as in vLLM. Raises ValueError for ids of
        blocks of another size than ``prefix_block_size``.
        """
        ids = request.prefix_block_ids
        if not ids or not self.prefix_block_size:
            return ()
        if request.prefix_block_size != self.prefix_block_size:
            raise ValueError(
                f"request {request.id}: prefix blocks of {request.prefix_block_size} tokens; expected "
                f"{self.prefix_block_size}"
            )
        step, units = self.unit_tokens // self.prefix_block_size, request.prompt_len // self.unit_tokens
        keys: list[int] = []
        for start in range(0, units * step, step):
            keys.append(hash((keys[-1] if keys else 0, ids[start : start + step])))
        return tuple(keys)

    def cached_tokens(self, keys: Sequence[int], length: int, ahead: Collection[int] = ()) -> int:
        """Tokens of the longest prefix in whole units that is there, or will be when those ``ahead`` are.

        Less than ``length`` in any case: what computes a token has to compute the last one.
        """
        most = min(len(keys), (length - 1) // self.unit_tokens) if keys else 0
        units = 0
        while units < most and (keys[units] in self._holders or keys[units] in self._cached or keys[units] in ahead):
            units += 1
        return units * self.unit_tokens

    def cost(self, sequence: int, tokens: int, keys: Sequence[int] = (), ahead: Collection[int] = ()) -> int:
        """Blocks that ``hold`` would take of those available, were the units ``ahead`` held by others."""
        more = self.blocks(tokens) - self.blocks(self._held.get(sequence, 0))
        if not keys:
            return more
        counted = sum([key in self._holders or key in ahead for key in self._new_units(sequence, tokens, keys)])
        return more - self._unit_blocks * counted

    def hold(self, sequence: int, tokens: int, keys: Sequence[int] = ()) -> None:
        """Grow a sequence outside the decode batch to ``tokens``, as ``hold_all`` does."""
        self.hold_all(((sequence, tokens, keys),))

    def hold_all(self, wanted: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """Grow sequences outside the decode batch, each to so many tokens, sharing the whole units of its prompt.

        At once: a unit that one of them shares does not go for the room of another. Raises ValueError when too few
        blocks are available.
        """
        blocks, ahead = 0, set[int]()
        for sequence, tokens, keys in wanted:
            if sequence in self._offsets:
                raise ValueError(f"sequence {sequence} is in the decode batch, which grows together")
            blocks += self.cost(sequence, tokens, keys, ahead)
            ahead.update(keys[: tokens // self.unit_tokens])
        self._check(blocks)
        for sequence, tokens, keys in wanted:
            if keys:
                units = self._new_units(sequence, tokens, keys)
                self._shared.setdefault(sequence, []).extend(units)
                for key in units:
                    self._holders[key] = self._holders.get(key, 0) + 1
                    self._cached.pop(key, None)
            self._held[sequence] = tokens
        self._take(blocks)

    def join(self, sequence: int) -> None:
        """Move a sequence, with what it holds, into the decode batch. Raises KeyError when it holds nothing."""
        offset = self._held.pop(sequence) - self._step
        self._offsets[sequence] = offset
        self._by_offset[offset % self.block_size] += 1

    def release(self, sequence: int) -> None:
        """Give back all that a sequence holds; units that none holds any more stay cached.

        Raises KeyError when it holds nothing.
        """
        offset = self._offsets.pop(sequence, None)
        if offset is None:
            self.available += self.blocks(self._held.pop(sequence))
        else:
            self._by_offset[offset % self.block_size] -= 1
            self.available += self.blocks(offset + self._step)
        for key in reversed(self._shared.pop(sequence, ())):
            self._holders[key] -= 1
            if self._holders[key]:
                self.available -= self._unit_blocks
            else:
                del self._holders[key]
                self._cached[key] = None

    def need(self, steps: int = 1) -> int:
        """Blocks that the decode batch takes to grow by so many steps; negative to shrink, for steps taken back."""
        size, counts = self.block_size, self._by_offset
        if steps == 1:
            return counts[-self._step % size]
        start, count = (self._step, steps) if steps >= 0 else (self._step + steps, -steps)
        cycles, rest = divmod(count, size)
        last = -start % size + 1
        first = last - rest  # the steps from start on go from last down to first, around the end
        rest_crossings = sum(counts[first:last]) if first >= 0 else sum(counts[:last]) + sum(counts[first:])
        crossings = cycles * len(self._offsets) + rest_crossings
        return crossings if steps >= 0 else -crossings

    def advance(self, steps: int = 1) -> None:
        """Grow the decode batch by so many tokens a sequence. Raises ValueError when too few blocks are available."""
        if steps:
            self._take(self.need(steps))
            self._step += steps

    def steps_that_fit(self) -> int:
        """Steps that the decode batch can still grow. Raises ValueError for an empty batch, which never fills up."""
        if not self._offsets:
            raise ValueError("the decode batch is empty")
        size, counts = self.block_size, self._by_offset
        cycles, left = divmod(self.available, len(self._offsets))
        steps = cycles * size
        while left >= 0:
            left -= counts[-(self._step + steps) % size]
            steps += 1
        return steps - 1

    def check_integrity(self) -> None:
        """Recount. Raises RuntimeError when free, cached and held blocks are not all the blocks there are."""
        everyone = [*self._held.values(), *(offset + self._step for offset in self._offsets.values())]
        shared = [key for keys in self._shared.values() for key in keys]
        twice = len(shared) - len(set(shared))  # units by how much more often they are held than counted
        held = sum(self.blocks(tokens) for tokens in everyone) - self._unit_blocks * twice
        if self.free < 0 or self.free + self.cached + held != self.num_blocks or set(shared) & self._cached.keys():
            raise RuntimeError(
                f"KV blocks: {self.free} free + {self.cached} cached + {held} held; expected {self.num_blocks} in all"
            )

    def _new_units(self, sequence: int, tokens: int, keys: Sequence[int]) -> Sequence[int]:
        """Units that a sequence would come to hold, having grown to ``tokens``."""
        return keys[len(self._shared.get(sequence, ())) : tokens // self.unit_tokens]

    def _check(self, blocks: int) -> None:
        if blocks > self.available:
            raise ValueError(f"{blocks} KV blocks wanted, {self.available} available")

    def _take(self, blocks: int) -> None:
        self._check(blocks)
        self.available -= blocks
        while self.cached > self.available:
            self._cached.popitem(last=False)
        if self.num_blocks - self.available > self.peak_used:
            self.peak_used = self.num_blocks - self.available
