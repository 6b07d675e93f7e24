"""Prefix caching once more, block by block: every KV block has a number and knows what is in it.

To hold ``BlockManager`` against, which only counts. Nothing is shared with it; no keys, no counters, no order kept:
who holds a block, what is cached and what goes first is looked up from all sequences and from when each stretch of a
prompt was last in use.
"""

from __future__ import annotations

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
        saved = ({s: list(t) for s, t in self.tables.items()}, dict(self.known), {**self.stretches})
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
                self.tables, self.known, self.stretches = saved
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
