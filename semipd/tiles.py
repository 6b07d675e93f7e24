"""Dealing the tiles of a persistent attention kernel to the CTAs of a partition; no torch, no GPU."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from semipd.core import IntArray

FA3_HEAD_DIM = 128
FA3_TILE_ROWS = 128  # query rows of one fa3 tile at that head dimension; others have other tiles


@dataclass(frozen=True)
class TileList:
    """Tiles of a persistent kernel by CTA: tiles ``indptr[i]:indptr[i + 1]`` are CTA i's, all shape [tiles]."""

    tile: IntArray
    sequence: IntArray
    head: IntArray
    indptr: IntArray


def balance(seq_tokens: list[int], kv_lens: list[int], heads: int, group: int, ctas: int) -> TileList:
    """Deal the tiles of a causal prefill to ``ctas`` CTAs, each to the least loaded so far.

    A tile is ``FA3_TILE_ROWS`` query rows of one head of one sequence; it costs the keys its last row sees plus
    its own rows. The ``group`` query heads that share a KV head are dealt together, so that CTAs beside each other
    read the same keys at the same time and find them in L2. flashinfer deals head by head, which is as fast alone
    and costs the decode that streams through the same L2 five percent (docs/adr/0002-fa3-sized-to-the-partition.md).
    """
    order = sorted(range(len(seq_tokens)), key=lambda i: -kv_lens[i])
    heap = [(0, cta) for cta in range(ctas)]
    dealt: list[list[tuple[int, int, int]]] = [[] for _ in range(ctas)]
    for sequence in order:
        tokens, cached = seq_tokens[sequence], kv_lens[sequence] - seq_tokens[sequence]
        tiles = range((tokens + FA3_TILE_ROWS - 1) // FA3_TILE_ROWS - 1, -1, -1)
        for first in range(0, heads, group):
            for tile in tiles:
                cost = cached + min((tile + 1) * FA3_TILE_ROWS, tokens) + FA3_TILE_ROWS
                for head in range(first, first + group):
                    load, cta = heap[0]
                    heapq.heapreplace(heap, (load + cost, cta))
                    dealt[cta].append((tile, sequence, head))
    flat = np.array([entry for entries in dealt for entry in entries], dtype=np.int64).reshape(-1, 3)
    indptr = np.cumsum([0, *(len(entries) for entries in dealt)])
    return TileList(flat[:, 0], flat[:, 1], flat[:, 2], indptr)
