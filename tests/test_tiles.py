"""Dealing attention tiles to CTAs: nothing lost, nobody idle, neighbours on the same keys; and where keys are split."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.stopwatch import Decodes
from semipd.sweep import DecodeWork
from semipd.tiles import FA3_TILE_ROWS, balance, decode_chunks, fa2_tile_rows, prefill_chunks


def cost(tile: int, tokens: int, kv_len: int) -> int:
    return kv_len - tokens + min((tile + 1) * FA3_TILE_ROWS, tokens) + FA3_TILE_ROWS


prompts = st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 2000)), min_size=1, max_size=6)


@given(prompts, st.sampled_from([(1, 1), (8, 8), (8, 4), (8, 1)]), st.integers(1, 40))
def test_every_tile_is_dealt_once_and_no_cta_is_ahead_by_more_than_a_tile(
    prompts: list[tuple[int, int]], heads_and_group: tuple[int, int], ctas: int
) -> None:
    heads, group = heads_and_group
    tokens, kv_lens = [q for q, _ in prompts], [q + c for q, c in prompts]
    dealt = balance(tokens, kv_lens, heads, group, ctas)
    tiles = list(zip(dealt.sequence.tolist(), dealt.head.tolist(), dealt.tile.tolist(), strict=True))
    expected = {(i, h, t) for i, q in enumerate(tokens) for h in range(heads) for t in range(-(-q // FA3_TILE_ROWS))}
    assert Counter(tiles) == Counter(expected)
    assert dealt.indptr[0] == 0
    assert dealt.indptr[-1] == len(tiles)
    costs = [cost(t, tokens[i], kv_lens[i]) for i, _, t in tiles]
    bounds = zip(dealt.indptr[:-1], dealt.indptr[1:], strict=True)
    loads = [sum(costs[a:b]) for a, b in bounds]
    assert len(loads) == ctas
    assert max(loads) - min(loads) <= max(costs)


def test_the_heads_that_share_keys_start_together() -> None:
    """The first tiles of eight CTAs are one tile of one sequence, in the eight heads of one group."""
    dealt = balance([4096] * 4, [4096] * 4, heads=64, group=8, ctas=16)
    first = dealt.indptr[:-1]
    for octet in (first[:8], first[8:]):
        assert len(set(dealt.tile[octet].tolist())) == 1
        assert len(set(dealt.sequence[octet].tolist())) == 1
        assert sorted(dealt.head[octet].tolist()) == list(range(8))


def chunk_tokens(kv_lens: list[int], chunks: int) -> int:
    """As flashinfer splits keys: the least size of at least 128 with which there are at most so many chunks, if any."""
    longest = max(kv_lens)
    for size in range(128, longest):
        if sum(-(-n // size) for n in kv_lens) <= chunks:
            return size
    return max(longest, 128)


def makespan(kv_lens: list[int], chunks: int, kv_heads: int, slots: int) -> int:
    """Keys until the last of a decode batch's CTAs is done, which start head by head in the order of the sequences."""
    size = chunk_tokens(kv_lens, chunks)
    pieces = [min(size, n - at) for n in kv_lens for at in range(0, n, size)]
    free = [0] * slots
    for _ in range(kv_heads):
        for keys in pieces:
            heapq.heapreplace(free, free[0] + keys)
    return max(free)


@pytest.mark.parametrize("sms", [132, 68, 36])
@pytest.mark.parametrize("sequences", [8, 16, 25, 32, 33, 40, 64, 96, 128, 256])
def test_decode_is_cut_so_that_no_long_sequence_keeps_the_others_waiting(sequences: int, sms: int) -> None:
    kv_lens = list(Decodes.of(DecodeWork(sequences, 4096 * sequences)).lengths)
    slots = 2 * sms
    even = sum(kv_lens) * 8 / slots
    chunks = decode_chunks(sequences, 8, sms, 132)
    assert chunks >= sequences
    assert makespan(kv_lens, chunks, 8, slots) < 1.45 * even
    whole_device = max(33, sequences)  # as flashinfer's own plan has it
    assert makespan(kv_lens, chunks, 8, slots) <= 1.02 * makespan(kv_lens, whole_device, 8, slots)
    if sequences in (36, 40) and sms == 132:
        assert makespan(kv_lens, whole_device, 8, slots) > 2 * even


DECODES = {n: list(Decodes.of(DecodeWork(n, n * each)).lengths) for n, each in ((8, 16384), (64, 2048), (64 * 4, 2048))}
MEASURED = (
    # New tokens, cached ones, decoding sequences, SMs, and us of a layer with keys not split, and split.
    ([512], [0], 0, 32, 45.9, 207.6),
    ([512], [0], 0, 64, 30.4, 113.0),
    ([512], [0], 0, 80, 30.3, 94.3),
    ([1024], [500], 0, 132, 79.2, 162.8),
    ([512], [16000], 0, 32, 1525, 1683),
    ([256], [16000], 0, 32, 758, 851),
    ([256], [16000], 0, 48, 760, 632),
    ([1024, 1024], [0, 0], 0, 132, 90, 254),
    ([2048], [4000], 0, 132, 559, 716),
    ([379, 368, 172, 148], [6700] * 4, 0, 48, 974, 1085),
    ([3, 8, 6, 14, 6, 13], [25000] * 6, 0, 48, 508, 463),
    ([172, 360, 234, 51, 96, 179], [12000, 8000, 15000, 3000, 20000, 12000], 0, 132, 1160, 809),
    ([256], [1000], 8, 132, 324, 268),
    ([2048], [0], 8, 132, 1144, 374),
    ([256], [1000], 64, 132, 240, 195),
    ([512], [1000], 256, 132, 543, 551),
)
"""On an H200, 32 heads, 8 of keys; kernels alone (docs/results/split-kv.md)."""


@pytest.mark.parametrize(("new", "context", "decodes", "sms", "whole_us", "split_us"), MEASURED)
def test_keys_are_split_where_that_was_measured_to_be_faster(
    new: list[int], context: list[int], decodes: int, sms: int, whole_us: float, split_us: float
) -> None:
    q_lens = np.array([1] * decodes + new)
    kv_lens = np.array(DECODES.get(decodes, []) + [n + c for n, c in zip(new, context, strict=True)])
    chunks = prefill_chunks(q_lens, kv_lens, 32, 8, sms, 132)
    assert (chunks > 0) == (split_us < whole_us)


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 30000)), min_size=1, max_size=40),
    st.sampled_from([(32, 8), (64, 8), (4, 2), (8, 8), (8, 1)]),
    st.sampled_from([132, 64, 16]),
)
def test_there_is_a_chunk_for_every_tile(batch: list[tuple[int, int]], heads: tuple[int, int], sms: int) -> None:
    q_lens, kv_lens = np.array([q for q, _ in batch]), np.array([q + c for q, c in batch])
    chunks = prefill_chunks(q_lens, kv_lens, *heads, sms, 132)
    group = heads[0] // heads[1]
    tiles = sum(-(-q * group // fa2_tile_rows(q_lens, group)) for q in q_lens.tolist())
    assert chunks == 0 or chunks >= tiles


def test_a_batch_without_a_past_is_not_split() -> None:
    for tokens in (1, 16, 100, 300):
        assert prefill_chunks(np.array([tokens]), np.array([tokens]), 32, 8, 132, 132) == 0
