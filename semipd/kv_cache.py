"""KV-cache blocks: how many are free, and how many each sequence holds.

Blocks are counted, not numbered. A sequence of n tokens holds ceil(n / block_size) blocks, as in vLLM's
PagedAttention (arXiv 2309.06180, section 4).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate


class BlockManager:
    """Counts the blocks of one device; ``free + used == num_blocks`` always (law 3).

    A sequence is prefilled at its own pace (``hold``) and then joins the decode batch (``join``), whose sequences
    all grow by one token a step (``advance``). Since they cross a block boundary every ``block_size`` steps, it
    is enough to count them by the step, modulo ``block_size``, at which they do: a step costs O(1) and any
    number of steps O(block_size), however many sequences decode.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks}, block_size {block_size}: expected at least 1 of each")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = num_blocks
        self.peak_used = 0
        self._held: dict[int, int] = {}  # prefilled sequences: tokens
        self._offsets: dict[int, int] = {}  # decode batch: tokens - self._step
        self._step = 0
        self._by_offset = [0] * block_size  # decode batch: sequences by offset modulo block_size

    @property
    def used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - self.free

    def blocks(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens of one sequence take."""
        return -(-tokens // self.block_size)

    def tokens(self, sequence: int) -> int:
        """Tokens that a sequence has room for; 0 when it holds nothing."""
        if sequence in self._offsets:
            return self._offsets[sequence] + self._step
        return self._held.get(sequence, 0)

    def hold(self, sequence: int, tokens: int) -> None:
        """Grow a sequence outside the decode batch to ``tokens``. Raises ValueError when too few blocks are free."""
        if sequence in self._offsets:
            raise ValueError(f"sequence {sequence} is in the decode batch, which grows together")
        self._take(self.blocks(tokens) - self.blocks(self._held.get(sequence, 0)))
        self._held[sequence] = tokens

    def join(self, sequence: int) -> None:
        """Move a sequence, with what it holds, into the decode batch. Raises KeyError when it holds nothing."""
        offset = self._held.pop(sequence) - self._step
        self._offsets[sequence] = offset
        self._by_offset[offset % self.block_size] += 1

    def release(self, sequence: int) -> None:
        """Free all that a sequence holds. Raises KeyError when that is nothing."""
        offset = self._offsets.pop(sequence, None)
        if offset is None:
            self.free += self.blocks(self._held.pop(sequence))
        else:
            self._by_offset[offset % self.block_size] -= 1
            self.free += self.blocks(offset + self._step)

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
        """Grow the decode batch by so many tokens a sequence. Raises ValueError when too few blocks are free."""
        if steps:
            self._take(self.need(steps))
            self._step += steps

    def steps_that_fit(self) -> int:
        """Steps that the decode batch can still grow. Raises ValueError for an empty batch, which never fills up."""
        if not self._offsets:
            raise ValueError("the decode batch is empty")
        cycles, left = divmod(self.free, len(self._offsets))
        last = -self._step % self.block_size + 1
        crossings = self._by_offset[last:] + self._by_offset[:last]  # a whole cycle of steps, from its end
        crossings.reverse()
        return cycles * self.block_size + bisect_right(list(accumulate(crossings)), left)

    def check_integrity(self) -> None:
        """Recount. Raises RuntimeError when free and held blocks are not all the blocks there are."""
        everyone = [*self._held.values(), *(offset + self._step for offset in self._offsets.values())]
        held = sum(self.blocks(tokens) for tokens in everyone)
        if self.free < 0 or self.free + held != self.num_blocks:
            raise RuntimeError(f"KV blocks: {self.free} free + {held} held; expected {self.num_blocks} in all")

    def _take(self, blocks: int) -> None:
        if blocks > self.free:
            raise ValueError(f"{blocks} KV blocks wanted, {self.free} free")
        self.free -= blocks
        if self.num_blocks - self.free > self.peak_used:
            self.peak_used = self.num_blocks - self.free
