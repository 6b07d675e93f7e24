"""KV blocks: law 3, and the lockstep counts against a recount of every sequence at every step.

Prefix caching against a second model that numbers every block and keeps what is in it.
"""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from naive_prefix_cache import NaivePrefixCache

from semipd.core import Request
from semipd.kv_cache import BlockManager


def decoding(tokens: list[int], num_blocks: int, block_size: int) -> BlockManager:
    manager = BlockManager(num_blocks, block_size)
    for sequence, n in enumerate(tokens):
        manager.hold(sequence, n)
        manager.join(sequence)
    return manager


def total(tokens: list[int], block_size: int) -> int:
    return sum(ceil(n / block_size) for n in tokens)


class Blocks(RuleBasedStateMachine):
    """Any order of operations; the model holds each sequence's tokens and counts blocks one by one."""

    SIZE, BLOCKS = 4, 40

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(self.BLOCKS, self.SIZE)
        self.prefilled: dict[int, int] = {}
        self.batch: dict[int, int] = {}

    def used(self) -> int:
        return total([*self.prefilled.values(), *self.batch.values()], self.SIZE)

    @rule(sequence=st.integers(0, 9), more=st.integers(1, 30))
    def hold(self, sequence: int, more: int) -> None:
        tokens = self.prefilled.get(sequence, 0) + more
        before = self.manager.free
        taken = ceil(tokens / self.SIZE) - ceil(self.prefilled.get(sequence, 0) / self.SIZE)
        if sequence in self.batch or taken > before:
            with pytest.raises(ValueError, match=r"blocks wanted|decode batch"):
                self.manager.hold(sequence, tokens)
            assert self.manager.free == before
        else:
            self.manager.hold(sequence, tokens)
            self.prefilled[sequence] = tokens

    @precondition(lambda self: self.prefilled)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.prefilled)))
        self.manager.join(sequence)
        self.batch[sequence] = self.prefilled.pop(sequence)

    @precondition(lambda self: self.prefilled or self.batch)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted({**self.prefilled, **self.batch})))
        self.manager.release(sequence)
        self.prefilled.pop(sequence, None)
        self.batch.pop(sequence, None)

    @rule(steps=st.integers(1, 25))
    def advance(self, steps: int) -> None:
        grown = {sequence: tokens + steps for sequence, tokens in self.batch.items()}
        after = total([*self.prefilled.values(), *grown.values()], self.SIZE)
        if after > self.BLOCKS:
            with pytest.raises(ValueError, match="blocks wanted"):
                self.manager.advance(steps)
        else:
            self.manager.advance(steps)
            self.batch = grown

    @invariant()
    def law_3_free_and_used_blocks_are_all_blocks(self) -> None:
        self.manager.check_integrity()
        assert self.manager.used == self.used()
        assert self.manager.free + self.manager.used == self.BLOCKS
        assert self.manager.peak_used >= self.manager.used
        for sequence, tokens in {**self.prefilled, **self.batch}.items():
            assert self.manager.tokens(sequence) == tokens


class SharedBlocks(RuleBasedStateMachine):
    """Prompts with common prefixes come and go in any order; the naive model numbers every block."""

    @initialize(sizes=st.sampled_from([(2, 2), (2, 6), (6, 2), (4, 6), (1, 3), (3, 1)]), num_blocks=st.integers(1, 40))
    def start(self, sizes: tuple[int, int], num_blocks: int) -> None:
        block_size, prefix_block_size = sizes
        self.manager = BlockManager(num_blocks, block_size, prefix_block_size)
        self.naive = NaivePrefixCache(num_blocks, block_size, prefix_block_size)
        self.prompts: dict[int, Request] = {}
        self.tokens: dict[int, int] = {}  # prefilled
        self.batch: dict[int, int] = {}  # decoding
        self.next = 0

    def ids(self, request: Request) -> tuple[int, ...]:
        """Of the prefix blocks that are whole."""
        return request.prefix_block_ids[: request.prompt_len // request.prefix_block_size]

    @rule(path=st.lists(st.integers(0, 1), max_size=5), rest=st.integers(1, 7), share=st.sampled_from([0.0, 0.5, 1.0]))
    def arrive(self, path: list[int], rest: int, share: float) -> None:
        """A prompt of some blocks of a binary tree and a few tokens more; a part of what was not hit is prefilled."""
        size = self.manager.prefix_block_size
        length = len(path) * size + rest
        prompt = Request(self.next, 0.0, length, 1, (*path, *range(100, 100 - (-rest // size))), size)
        keys = self.manager.keys_of(prompt)
        hit = self.manager.cached_tokens(keys, length)
        assert hit == self.naive.hit_tokens(self.ids(prompt), length)
        assert hit < length
        self.prompts[self.next], self.tokens[self.next] = prompt, 0
        self.grow(self.next, max(1, hit + round(share * (length - hit))))
        self.next += 1

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.integers(1, 8))
    def go_on(self, data: st.DataObject, more: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.tokens)))
        self.grow(sequence, min(self.tokens[sequence] + more, self.prompts[sequence].prompt_len))

    def grow(self, sequence: int, tokens: int) -> None:
        prompt = self.prompts[sequence]
        keys = self.manager.keys_of(prompt)
        before, cost = self.manager.available, self.manager.cost(sequence, tokens, keys)
        if self.naive.grow(sequence, tokens, self.ids(prompt)):
            self.manager.hold(sequence, tokens, keys)
            self.tokens[sequence] = tokens
            assert self.manager.available == before - cost
        else:
            with pytest.raises(ValueError, match="blocks wanted"):
                self.manager.hold(sequence, tokens, keys)
            if not self.tokens[sequence]:  # holds nothing
                del self.tokens[sequence], self.prompts[sequence]
                self.naive.tables.pop(sequence, None)

    @rule()
    def join(self) -> None:
        """All whose prompts are complete."""
        for sequence in [s for s, tokens in self.tokens.items() if tokens == self.prompts[s].prompt_len]:
            self.manager.join(sequence)
            self.batch[sequence] = self.tokens.pop(sequence)

    @precondition(lambda self: self.batch)
    @rule(steps=st.integers(1, 6))
    def decode(self, steps: int) -> None:
        for _ in range(min(steps, self.manager.steps_that_fit())):
            for sequence in self.batch:
                self.batch[sequence] += 1
                prompt = self.prompts[sequence]
                assert self.naive.grow(sequence, self.batch[sequence], self.ids(prompt)), "steps_that_fit was wrong"
            self.manager.advance()

    @precondition(lambda self: self.tokens or self.batch)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted({**self.tokens, **self.batch})))
        self.manager.release(sequence)
        self.naive.leave(sequence)
        self.tokens.pop(sequence, None)
        self.batch.pop(sequence, None)
        del self.prompts[sequence]

    @invariant()
    def law_3_free_used_and_cached_blocks_are_all_blocks(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_integrity()
        assert self.manager.free + self.manager.used + self.manager.cached == self.manager.num_blocks
        assert self.manager.used == len(self.naive.held())
        assert self.manager.cached == len(self.naive.cached())
        assert self.manager.free == len(self.naive.free())


TestBlocks = Blocks.TestCase
TestSharedBlocks = SharedBlocks.TestCase
TestSharedBlocks.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)

batches = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(tokens=batches, block_size=st.integers(1, 16), spare=st.integers(0, 60))
def test_steps_that_fit_is_the_last_step_whose_blocks_are_free(tokens: list[int], block_size: int, spare: int) -> None:
    have = total(tokens, block_size) + spare
    steps = decoding(tokens, have, block_size).steps_that_fit()
    assert total([n + steps for n in tokens], block_size) <= have < total([n + steps + 1 for n in tokens], block_size)


@given(tokens=batches, block_size=st.integers(1, 16), steps=st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_growing_by_many_steps_takes_what_single_steps_take(
    tokens: list[int], block_size: int, steps: list[int]
) -> None:
    manager = decoding(tokens, 10_000, block_size)
    for n in steps:
        need = manager.need(n)
        by_one = decoding(tokens, 10_000, block_size)
        used = by_one.used
        for _ in range(n):
            by_one.advance()
        assert need == by_one.used - used
        manager.advance(n)
        tokens = [t + n for t in tokens]
        assert manager.need(-n) == -need


def test_a_step_taken_back_frees_the_blocks_it_took() -> None:
    manager = decoding([4, 8, 5], 10, 4)
    manager.advance(1)
    assert manager.used == 7
    manager.advance(-1)
    assert manager.used == 5
    manager.check_integrity()


def test_releasing_what_holds_nothing_is_an_error() -> None:
    with pytest.raises(KeyError):
        BlockManager(4, 4).release(7)


def test_an_empty_decode_batch_has_no_last_step() -> None:
    with pytest.raises(ValueError, match="empty"):
        BlockManager(4, 4).steps_that_fit()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (8, 0)])
def test_a_cache_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockManager(num_blocks, block_size)
