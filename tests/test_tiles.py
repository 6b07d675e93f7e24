"""Dealing attention tiles to CTAs: nothing lost, nobody idle, neighbours on the same keys."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from semipd.tiles import FA3_TILE_ROWS, balance


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
