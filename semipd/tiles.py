"""How the attention of a batch is cut for a partition: tiles dealt to CTAs, and keys split; no torch, no GPU."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import numpy as np

from semipd._steps import CTAS_OF_SM, Waves
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


PREFILL_WORKSPACE_BYTES = 640 << 20
"""For partial results of split keys: of 316 tiles of 128 rows, 32 heads; 4,096 tokens and 96 sequences need 290.

Of 64 heads there is room for half as many.
"""

ALIGNING_BYTES = 1 << 20
"""Of a workspace, left for the alignment of its parts."""


@dataclass(frozen=True, kw_only=True)
class SplitKeys:
    """How keys of prefill by fa2 were split when a profile was measured: by ``prefill_chunks``, of these heads.

    ``rule``: it and its constants in csrc/waves.hpp; with another one times are other ones. ``workspace_bytes``: for
    partial results. Raises ValueError for impossible heads.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, in profiles

    rule: Literal["waves-1"] = "waves-1"
    query_heads: int
    kv_heads: int
    head_dim: int
    workspace_bytes: int = PREFILL_WORKSPACE_BYTES - ALIGNING_BYTES

    def __post_init__(self) -> None:
        heads = self.query_heads, self.kv_heads, self.head_dim
        if min(heads) < 1 or self.query_heads < self.kv_heads or self.workspace_bytes < 0:
            found = ", ".join(map(str, (*heads, self.workspace_bytes)))
            raise ValueError(
                f"query_heads, kv_heads, head_dim, workspace_bytes: found {found}; expected numbers from one on, of "
                "query heads no fewer than of KV heads, and bytes"
            )

    @property
    def waves(self) -> Waves:
        """What estimates the time that depends on it."""
        return Waves(self.query_heads, self.kv_heads, self.head_dim, self.workspace_bytes)


def decode_workspace_bytes(sequences: int, query_heads: int, kv_heads: int, head_dim: int, device_sms: int) -> int:
    """For decode plans of at most so many sequences; with CUDA graphs they have some more tiles than sequences."""
    waves = Waves(query_heads, kv_heads, head_dim, 0)
    rows = waves.tile_rows([1])
    tiles = -(-sequences * (query_heads // kv_heads) // rows) + sequences - 1
    chunks = max(tiles, decode_chunks(sequences, kv_heads, device_sms, device_sms))
    return ALIGNING_BYTES + chunks * waves.partial_bytes(rows)


def decode_chunks(sequences: int, kv_heads: int, sms: int, device_sms: int) -> int:
    """Into how many CTAs for each KV head a decode batch may be cut.

    flashinfer's own plan makes as many as fill the device once: so from 33 sequences on (8 KV heads on 132 SMs) it
    splits none, and the longest one keeps its SMs. Here there is a wave more, for the partition.
    """
    wave = CTAS_OF_SM * device_sms // kv_heads
    return wave if 4 * sequences <= 3 * wave else sequences + max(1, CTAS_OF_SM * sms // kv_heads)


def prefill_chunks(
    q_lens: IntArray,
    kv_lens: IntArray,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    sms: int,
    workspace_bytes: int,
) -> int:
    """Into how many CTAs for each KV head fa2 may cut a causal batch by splitting keys; 0 when it should not.

    A CTA computes a tile of queries over all of their keys, and an SM holds ``CTAS_OF_SM``. Splitting the keys evens
    out what CTAs have to do, but partial results have to be written and merged, for every row. flashinfer's own plan
    splits whenever there are fewer tiles than a wave on the whole device. Here the time is estimated for the longest
    prompt's keys in one chunk, in two, and so on: of waves on the partition, or of even shares and a part of a chunk
    (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969, has a whole one), and of merging.

    Args:
        q_lens: New tokens of each sequence, shape [sequences]; so many of its ``kv_lens``.
        kv_lens: All tokens of each sequence, shape [sequences].
        query_heads: Of the model.
        kv_heads: Of the model.
        head_dim: Of the model.
        sms: Of the partition.
        workspace_bytes: For partial results.

    Raises ValueError for no sequences.
    """
    waves = Waves(query_heads, kv_heads, head_dim, workspace_bytes)
    return waves.chunks(q_lens.tolist(), kv_lens.tolist(), sms)
