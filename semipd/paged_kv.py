"""The paged KV cache on a device, and which of its blocks each sequence has.

The scheduler counts blocks (``BlockManager``); here they get numbers. PagedAttention, arXiv 2309.06180.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from semipd.core import IntArray
from semipd.model_config import ModelConfig

NO_BLOCKS: IntArray = np.empty(0, np.int64)


class BlockMap:
    """Hands out the blocks 0 to ``num_blocks`` - 1; those given back last go first.

    Attributes:
        free: Blocks that no sequence has.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.free = num_blocks
        self._free = np.arange(num_blocks)[::-1].copy()  # a stack, of which the first ``free`` are there
        self._held: dict[int, IntArray] = {}

    @property
    def sequences(self) -> tuple[int, ...]:
        """Those that have blocks."""
        return tuple(self._held)

    def of(self, sequence: int) -> IntArray:
        """Its blocks, in order of its tokens; the array is never changed."""
        return self._held.get(sequence, NO_BLOCKS)

    def missing(self, sequence: int, tokens: int) -> int:
        """Blocks that it would take for the sequence to have room for so many tokens."""
        return max(0, -(-tokens // self.block_size) - len(self.of(sequence)))

    def grow(self, sequence: int, tokens: int) -> None:
        """Give it room for so many tokens. Raises RuntimeError when too few blocks are free."""
        held = self.of(sequence)
        missing = -(-tokens // self.block_size) - len(held)
        if missing <= 0:
            return
        if missing > self.free:
            raise RuntimeError(f"sequence {sequence} needs {missing} KV blocks more, {self.free} are free")
        more = self._free[self.free - missing : self.free][::-1]
        self._held[sequence] = np.concatenate((held, more))
        self.free -= missing

    def release(self, sequence: int) -> None:
        """Take back all that it has, which may be nothing."""
        held = self._held.pop(sequence, NO_BLOCKS)
        self._free[self.free : self.free + len(held)] = held[::-1]
        self.free += len(held)


@dataclass(frozen=True, eq=False)
class Ragged:
    """A batch of sequences, each with new tokens after cached ones.

    ``q_lens``: new tokens, shape [sequences]. ``kv_lens``: all tokens, the new ones included, shape [sequences].
    ``blocks``: block ids of the first sequence, then of the second, and so on.
    """

    q_lens: IntArray
    kv_lens: IntArray
    blocks: IntArray
    block_size: int

    @staticmethod
    def of(
        new_tokens: Iterable[int], context_lens: Iterable[int], tables: Iterable[IntArray | Sequence[int]], size: int
    ) -> Ragged:
        """From what each sequence adds and has, and its blocks, of which there may be more than it needs."""
        q_lens = np.fromiter(new_tokens, np.int64)
        kv_lens = np.fromiter(context_lens, np.int64) + q_lens
        pages = -(-kv_lens // size)
        blocks = np.concatenate([np.array(table[:n], np.int64) for table, n in zip(tables, pages, strict=True)])
        return Ragged(q_lens, kv_lens, blocks, size)

    @cached_property
    def pages(self) -> IntArray:
        """Blocks of each sequence, shape [sequences]."""
        return -(-self.kv_lens // self.block_size)

    @cached_property
    def page_indptr(self) -> IntArray:
        """Where in ``blocks`` each sequence's start, and where the last one's end, shape [sequences + 1]."""
        indptr = np.zeros(len(self.pages) + 1, np.int64)
        np.cumsum(self.pages, out=indptr[1:])
        return indptr

    @property
    def last_page_lens(self) -> IntArray:
        """Tokens in each sequence's last block, shape [sequences]."""
        return (self.kv_lens - 1) % self.block_size + 1

    @property
    def rows(self) -> int:
        """New tokens in all."""
        return int(self.q_lens.sum())

    @property
    def positions(self) -> IntArray:
        """Of each new token in its sequence, shape [rows]."""
        starts = np.cumsum(self.q_lens) - self.q_lens
        shifts: IntArray = np.repeat(self.kv_lens - self.q_lens - starts, self.q_lens)
        return shifts + np.arange(self.rows)

    @property
    def slots(self) -> IntArray:
        """Where each new token goes in the cache, ``block * block_size + offset``, shape [rows]."""
        positions = self.positions
        first = np.repeat(self.page_indptr[:-1], self.q_lens)
        blocks: IntArray = self.blocks[first + positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


class PagedKvCache:
    """Keys and values of every layer, each [layers, num_blocks + 1, block_size, kv_heads, head_dim], zero at first.

    The last block, ``scratch``, belongs to no sequence: the rows that pad a batch live there.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, device: str) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks {num_blocks}, block_size {block_size}: expected at least 1 of each")
        self.num_blocks, self.block_size, self.scratch = num_blocks, block_size, num_blocks
        shape = (config.layers, num_blocks + 1, block_size, config.kv_heads, config.head_dim)
        self.keys, self.values = (
            torch.zeros(shape, dtype=getattr(torch, config.dtype), device=device) for _ in range(2)
        )

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store the rows of keys and values, each [rows, kv_heads, head_dim], at these slots."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)

    def randomise(self, seed: int) -> None:
        """Fill the cache with standard normal values."""
        generator = torch.Generator(self.keys.device).manual_seed(seed)
        for tensor in (self.keys, self.values):
            for layer in tensor:  # one at a time: generators work in float32 aside
                layer.normal_(generator=generator)
