"""Spines and padding: times that go in stairs along one variable and are smooth along the other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_profile import decode_points, hybrid_points, prefill_points, write_profile

from semipd.core import Allocation, DecodeShape, InputError, Mode, PrefillShape
from semipd.padding import Padded, decode_rows, decode_sizes, prefill_rows, prefill_sizes
from semipd.points import DecodePoint, DecodeWork, HybridPoint, MixedPoint, PrefillPoint, PrefillWork
from semipd.profile import load_profile
from semipd.table_cost import TableCost
from semipd.tables import Tables

DEVICE, LAYERS = 32, 4
WHOLE = Allocation(Mode.EXCLUSIVE, DEVICE, DEVICE)
SPINE_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
SPINE_TOKENS = (16, 48, 64, 112, 160, 256, 512, 640, 2048, 3072, 8192)
COARSE_BATCHES, KV_TOKENS = (1, 16, 64), (512, 4096, 65536)
COARSE_TOKENS, CONTEXTS = (16, 256, 8192), (64, 1024, 8192)
SIZES = Padded(batch=decode_sizes(64), tokens=prefill_sizes(2048))


def decode_stair_ms(rows: float) -> float:
    """Steep and uneven, as tiles of matrix products make it."""
    return 1.0 + 0.3 * (rows > 4) + 0.01 * rows + 0.4 * (rows > 24)


def prefill_stair_ms(rows: float) -> float:
    return 0.2 + 0.0006 * rows + 0.1 * (rows > 64) + 0.5 * (rows > 512) + 0.8 * (rows > 1024)


def attention_ms(sequences: float, tokens: float) -> float:
    """Of decode beyond its spine: bilinear."""
    return (2e-5 + 1e-7 * sequences) * (tokens - KV_TOKENS[0])


def prefill_attention_ms(tokens: float, mean_context: float) -> float:
    return 1e-7 * tokens * (mean_context - CONTEXTS[0])


def decode_point(batch: int, kv_tokens: int, rows: int) -> DecodePoint:
    ms = decode_stair_ms(rows) + attention_ms(batch, kv_tokens)
    return DecodePoint(DEVICE, batch, kv_tokens, "fa2", 5, ms, ms, ms)


def prefill_point(tokens: int, mean_context: int, rows: int) -> PrefillPoint:
    ms, work = prefill_stair_ms(rows) + prefill_attention_ms(tokens, mean_context), PrefillWork.at(tokens, mean_context)
    shape = work.tokens, work.mean_context, work.seqs, work.seq_tokens, work.seq_context
    return PrefillPoint(DEVICE, *shape, "fa2", 5, ms, ms, ms)


def decode_table(rows_of: Callable[[int], int] = lambda n: n) -> list[DecodePoint]:
    places = {(b, KV_TOKENS[0]) for b in SPINE_BATCHES} | {(b, kv) for b in COARSE_BATCHES for kv in KV_TOKENS}
    return [decode_point(b, kv, rows_of(b)) for b, kv in sorted(places)]


def prefill_table() -> list[PrefillPoint]:
    places = {(t, CONTEXTS[0]) for t in SPINE_TOKENS} | {(t, c) for t in COARSE_TOKENS for c in CONTEXTS}
    return [prefill_point(t, c, prefill_rows(t)) for t, c in sorted(places)]


def model(
    decode: list[DecodePoint] | None = None,
    mixed: list[MixedPoint] | None = None,
    padded: Padded | None = None,
    prefill: list[PrefillPoint] | None = None,
) -> TableCost:
    """The tables above on the whole device; elsewhere a full rectangle without stairs."""
    parts = [8, 16, 24]
    tables = Tables.of(
        [*prefill_points(parts), *(prefill or prefill_table())], [*decode_points(parts), *(decode or decode_table())],
        hybrid_points(parts), mixed or (), device_sms=DEVICE, layers=LAYERS, padded=padded or Padded(),
    )  # fmt: skip
    return TableCost(tables)


def decode_ms(cost: TableCost, batch: int, kv_tokens: int) -> float:
    return float(cost.decode_s(DecodeShape(batch, kv_tokens), WHOLE, None)[0][0]) / LAYERS * 1e3


def prefill_ms(cost: TableCost, tokens: int, mean_context: float) -> float:
    return cost.prefill_s(PrefillShape(tokens, tokens * mean_context), WHOLE, None)[0] * 1e3


@pytest.mark.parametrize("padded", [Padded(), SIZES, Padded(batch=(32, 64), tokens=(100, 300))])
def test_every_measured_point_is_reproduced_whatever_batches_are_padded_to(padded: Padded) -> None:
    cost = model(padded=padded)
    for d in decode_table():
        assert decode_ms(cost, d.batch, d.kv_tokens) == pytest.approx(d.median_ms, rel=1e-12)
    for p in prefill_table():
        assert prefill_ms(cost, p.tokens, p.mean_context) == pytest.approx(p.median_ms, rel=1e-12)


@given(st.integers(1, 64), st.integers(KV_TOKENS[0], KV_TOKENS[-1]))
def test_a_spine_has_the_stairs_and_the_coarse_rectangle_the_rest(batch: int, kv_tokens: int) -> None:
    stair = np.interp(batch, SPINE_BATCHES, [decode_stair_ms(b) for b in SPINE_BATCHES])
    assert decode_ms(model(), batch, kv_tokens) == pytest.approx(stair + attention_ms(batch, kv_tokens), rel=1e-9)


@given(st.sampled_from([n for n in range(1, 65) if decode_rows(n, 64) in SPINE_BATCHES]), st.integers(512, 65536))
def test_a_padded_decode_batch_has_the_stair_of_its_rows_and_its_own_attention(batch: int, kv_tokens: int) -> None:
    expected_ms = decode_stair_ms(decode_rows(batch, 64)) + attention_ms(batch, kv_tokens)
    assert decode_ms(model(padded=SIZES), batch, kv_tokens) == pytest.approx(expected_ms, rel=1e-9)


@given(st.sampled_from([n for n in range(16, 2049) if prefill_rows(n) in SPINE_TOKENS]), st.integers(64, 8192))
def test_a_padded_prefill_batch_has_the_stair_of_its_rows_and_its_own_attention(tokens: int, context: int) -> None:
    expected_ms = prefill_stair_ms(prefill_rows(tokens)) + prefill_attention_ms(tokens, context)
    assert prefill_ms(model(padded=SIZES), tokens, context) == pytest.approx(expected_ms, rel=1e-9)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 3000)), min_size=1, max_size=6))
def test_prompts_that_end_within_a_tile_cost_more_than_one_of_as_many_keys_but_no_more_than_whole_tiles(
    prompts: list[tuple[int, int]],
) -> None:
    new, context = zip(*prompts, strict=True)
    shape = PrefillShape.of(new, context)
    as_one = PrefillShape(shape.tokens, shape.pairs)
    whole = PrefillShape(shape.tokens, sum((q + 31) * (c + q / 2) for q, c in prompts))
    plain, tiles = (model(padded=Padded(queries=queries)) for queries in (1, 32))
    times = [tiles.prefill_s(each, WHOLE, None)[0] for each in (as_one, shape)]
    assert times[0] == plain.prefill_s(as_one, WHOLE, None)[0] == plain.prefill_s(shape, WHOLE, None)[0]
    assert times[0] <= times[1] <= plain.prefill_s(whole, WHOLE, None)[0]
    assert len(prompts) > 1 or times[0] == times[1]


@given(st.integers(1, 64))
def test_on_the_spine_a_time_stays_between_its_measured_neighbours(batch: int) -> None:
    low = max(b for b in SPINE_BATCHES if b <= batch)
    high = min(b for b in SPINE_BATCHES if b >= batch)
    for padded in (Padded(), SIZES):
        found_ms = decode_ms(model(padded=padded), batch, KV_TOKENS[0])
        assert decode_stair_ms(low) - 1e-12 <= found_ms <= decode_stair_ms(high) + 1e-12


def test_sizes_are_those_that_the_executor_pads_to() -> None:
    assert [next(s for s in SIZES.tokens if s >= n) for n in range(1, 1025)] == [
        prefill_rows(n) for n in range(1, 1025)
    ]
    assert [next(s for s in SIZES.batch if s >= n) for n in range(1, 65)] == [decode_rows(n, 64) for n in range(1, 65)]


def test_above_the_last_size_nothing_is_padded() -> None:
    between = (prefill_stair_ms(3072) + prefill_stair_ms(8192)) / 2
    assert prefill_ms(model(padded=SIZES), (3072 + 8192) // 2, 64) == pytest.approx(between, rel=1e-12)


def test_a_point_right_beyond_the_last_size_is_one_more_stair() -> None:
    """Of 1,024: the first batch that is not padded takes another tile, too."""
    found = {}
    for extra in (1088, 1216):
        table = [*prefill_table(), *(prefill_point(t, CONTEXTS[0], t) for t in (1024, extra))]
        cost = model(prefill=table, padded=SIZES)
        assert prefill_ms(cost, 1024, 64) == pytest.approx(prefill_stair_ms(1024), rel=1e-12)
        assert prefill_ms(cost, extra, 64) == pytest.approx(prefill_stair_ms(extra), rel=1e-12)
        found[extra] = prefill_ms(cost, 1025, 64)
    assert found[1088] == pytest.approx(prefill_stair_ms(1088), rel=1e-12)
    assert found[1216] < prefill_stair_ms(1088)  # too far: it is on a line


def test_a_spine_that_goes_beyond_the_coarse_rectangle_is_a_hole_in_it() -> None:
    table = [d for d in decode_table() if d.batch != COARSE_BATCHES[-1] or d.kv_tokens == KV_TOKENS[0]]
    with pytest.raises(InputError, match=r"no point at batch 64, kv_tokens 4096 \(and 1 more\); expected every"):
        model(decode=table)


def test_a_profile_says_what_its_batches_were_padded_to(tmp_path: Path) -> None:
    folder = write_profile(tmp_path / "p", DEVICE)
    assert load_profile(folder).padded == Padded()
    header = json.loads((folder / "profile.json").read_text())
    (folder / "profile.json").write_text(json.dumps(header | {"padded": {"batch": [1, 64], "tokens": [4096]}}))
    loaded = load_profile(folder)
    assert loaded.padded == Padded(batch=(1, 64), tokens=(4096,))
    steps_s = [float(loaded.cost().decode_s(DecodeShape(n, 256), WHOLE, None)[0][0]) for n in (2, 8, 9, 64)]
    assert steps_s[0] == steps_s[1] < steps_s[2] == steps_s[3]  # measured at 1, 8 and 64


def shared_model(padded: Padded) -> TableCost:
    """The tables above on half of the device, too; beside the other phase everything takes 1.5 times as long there."""
    half = DEVICE // 2
    prefill = [replace(p, sms=sms) for p in prefill_table() for sms in (half, DEVICE)]
    decode = [replace(d, sms=sms) for d in decode_table() for sms in (half, DEVICE)]
    places = itertools.product(
        [p for p in prefill_table() if p.tokens in COARSE_TOKENS and p.mean_context in (64, 8192)],
        [d for d in decode_table() if d.batch in (1, 64) and d.kv_tokens in (512, 65536)],
    )
    names = ("tokens", "mean_context", "seqs", "seq_tokens", "seq_context")
    hybrid = [
        HybridPoint(
            "split", half, half, *(getattr(p, name) for name in names), d.batch, d.kv_tokens, "fa2", "fa2",
            *(5, *[1.5 * p.median_ms] * 3), *(5, *[1.5 * d.median_ms] * 3),
        )
        for p, d in places
    ]  # fmt: skip
    return TableCost(Tables.of(prefill, decode, hybrid, device_sms=DEVICE, layers=LAYERS, padded=padded))


@given(st.integers(1024, 8192), st.integers(64, 8192), st.integers(1, 64), st.integers(512, 65536))
def test_beside_the_other_phase_nothing_is_left_of_the_stairs_beyond_the_padded_sizes(
    tokens: int, context: int, batch: int, kv_tokens: int
) -> None:
    split, beside = Allocation(Mode.SPLIT, DEVICE // 2, DEVICE // 2), DecodeShape(batch, kv_tokens)

    def time_s(cost: TableCost, n: int, other: DecodeShape | None) -> float:
        return cost.prefill_s(PrefillShape(n, float(n * context)), split, other)[0]

    cost = shared_model(SIZES)
    straight_s = np.interp(tokens, (1024, 8192), [time_s(cost, n, beside) for n in (1024, 8192)])
    assert time_s(cost, tokens, beside) == pytest.approx(straight_s, rel=1e-9)
    assert time_s(cost, 2048, None) > 1.1 * np.interp(2048, (1024, 8192), [time_s(cost, n, None) for n in (1024, 8192)])
    unpadded = shared_model(Padded())
    assert time_s(unpadded, tokens, beside) == pytest.approx(1.5 * time_s(unpadded, tokens, None), rel=1e-9)


SPARSE = ({16, 256, 8192}, {64, 8192}, {1, 64}, {512, 65536})


def speed_left(phase: int, tokens: float, context: float, batch: float, kv_tokens: float) -> float:
    """Whose logarithm is multilinear in those of the variables, plus something odd of each alone off ``SPARSE``."""
    t, m, b, k = np.log2([tokens, context, batch, kv_tokens])
    odd = 0.005 * (tokens == 512) - 0.004 * (batch == 16) + 0.003 * (kv_tokens == 4096) + 0.002 * (context == 1024)
    return float(np.exp(-0.3 - 0.01 * phase - 0.004 * t * b - 0.003 * k * m + 0.001 * t * k + odd))


def hybrid_rows(places: Iterable[tuple[int, int, int, int]]) -> list[HybridPoint]:
    """Both phases on halves of the device, by the time alone of these tables and ``speed_left``."""
    cost = TableCost(
        Tables.of(
            [*prefill_points([8, 16, 24]), *prefill_table()], [*decode_points([8, 16, 24]), *decode_table()],
            hybrid_points([8, 16, 24]), device_sms=DEVICE, layers=LAYERS,
        )
    )  # fmt: skip
    found = []
    for t, m, b, k in places:
        work = PrefillWork.at(t, m)
        shape = work.tokens, work.mean_context, work.seqs, work.seq_tokens, work.seq_context
        p = prefill_ms(cost, t, m) / speed_left(0, t, m, b, k)
        d = decode_ms(cost, b, k) / speed_left(1, t, m, b, k)
        half = DEVICE // 2
        found.append(HybridPoint("split", half, half, *shape, b, k, "fa2", "fa2", 5, p, p, p, 5, d, d, d))
    return found


@given(st.integers(16, 8192), st.integers(64, 8192), st.integers(1, 64), st.integers(512, 65536))
def test_to_prefill_a_decode_batch_is_as_large_as_it_is_padded_to(
    tokens: int, context: int, batch: int, kv_tokens: int
) -> None:
    """Which kernels it runs is decided by that size; of its own time the same stairs are in the time alone."""
    padded, plain = contending(Padded(batch=SIZES.batch)), contending(Padded())
    split, prefill = Allocation(Mode.SPLIT, DEVICE // 2, DEVICE // 2), PrefillShape(tokens, float(tokens * context))
    rows = decode_rows(batch, 64)
    found_s = padded.prefill_s(prefill, split, DecodeShape(batch, kv_tokens))[0]
    assert found_s == pytest.approx(padded.prefill_s(prefill, split, DecodeShape(rows, kv_tokens))[0], rel=1e-12)
    assert found_s == pytest.approx(plain.prefill_s(prefill, split, DecodeShape(rows, kv_tokens))[0], rel=1e-12)
    alone_s, beside_s = (
        [float(cost.decode_s(DecodeShape(batch, 65536), split, other)[0][0]) for cost in (padded, plain)]
        for other in (None, prefill)
    )
    assert beside_s[0] / alone_s[0] == pytest.approx(beside_s[1] / alone_s[1], rel=1e-9)


@cache
def contending(padded: Padded) -> TableCost:
    """Halves of the device that keep ``speed_left``, measured everywhere at three batches."""
    places = itertools.product((16, 8192), (64, 8192), (1, 16, 64), (512, 65536))
    prefill = [replace(p, sms=n) for p in prefill_table() for n in (DEVICE // 2, DEVICE)]
    decode = [replace(d, sms=n) for d in decode_table() for n in (DEVICE // 2, DEVICE)]
    rows = hybrid_rows(places)
    return TableCost(Tables.of(prefill, decode, rows, device_sms=DEVICE, layers=LAYERS, padded=padded))


def test_a_sparse_grid_says_what_the_full_one_does_where_variables_act_alone_on_top_of_something_multilinear() -> None:
    values = [(16, 256, 512, 8192), (64, 1024, 8192), (1, 16, 64), (512, 4096, 65536)]
    full = set(itertools.product(*values))
    sparse = {place for place in full if sum(x not in basic for x, basic in zip(place, SPARSE, strict=True)) < 2}
    prefill, decode = (
        [replace(p, sms=n) for p in of for n in (DEVICE // 2, DEVICE)] for of in (prefill_table(), decode_table())
    )
    by_full, by_sparse = (
        TableCost(Tables.of(prefill, decode, hybrid_rows(places), device_sms=DEVICE, layers=LAYERS))
        for places in (full, sparse)
    )
    assert len(sparse) < 0.7 * len(full)
    at = Allocation(Mode.SPLIT, DEVICE // 2, DEVICE // 2)
    for t, m, b, k in full:
        shape, beside = PrefillShape(t, float(t * m)), DecodeShape(b, k)
        assert by_sparse.prefill_s(shape, at, beside) == pytest.approx(by_full.prefill_s(shape, at, beside), rel=1e-9)
        steps = (cost.decode_s(beside, at, shape)[0][0] for cost in (by_sparse, by_full))
        assert next(steps) == pytest.approx(next(steps), rel=1e-9)


def test_a_sparse_table_of_fused_batches_says_what_the_full_one_does() -> None:
    full = fused_table((8, 24, 64), (512, 4096, 65536))
    sparse = [p for p in full if (p.tokens == 256) + (p.batch == 24) + (p.kv_tokens == 4096) < 2]
    assert len(sparse) < 0.8 * len(full)
    by_full, by_sparse = (model(mixed=table, padded=SIZES) for table in (full, sparse))
    for p in full:
        chunk, decode = PrefillShape(p.tokens, float(p.tokens * p.mean_context)), DecodeShape(p.batch, p.kv_tokens)
        assert by_sparse.mixed_s(chunk, decode)[0] == pytest.approx(by_full.mixed_s(chunk, decode)[0], rel=1e-9)


def test_beyond_the_hybrid_tables_tokens_prefill_keeps_its_last_speed_stairs_and_all() -> None:
    values = ((16, 256, 2048), (64, 8192), (1, 64), (512, 65536))
    prefill, decode = (
        [replace(p, sms=n) for p in of for n in (DEVICE // 2, DEVICE)] for of in (prefill_table(), decode_table())
    )
    hybrid = hybrid_rows(itertools.product(*values))
    cost = TableCost(Tables.of(prefill, decode, hybrid, device_sms=DEVICE, layers=LAYERS, padded=SIZES))
    at, beside = Allocation(Mode.SPLIT, DEVICE // 2, DEVICE // 2), DecodeShape(64, 512)
    for tokens in (2048, 3000, 3072, 8192):
        shape = PrefillShape(tokens, 64.0 * tokens)
        alone_s = cost.prefill_s(shape, at, None)[0]
        assert cost.prefill_s(shape, at, beside) == (pytest.approx(alone_s / speed_left(0, 2048, 64, 64, 512)), False)


def test_where_the_solo_table_ends_before_the_hybrid_one_its_last_point_counts() -> None:
    short = [p for p in prefill_table() if p.tokens <= 3072]
    short += [prefill_point(3072, c, 3072) for c in CONTEXTS[1:]]
    short = [p for p in short if p.tokens != 8192]
    prefill, decode = ([replace(p, sms=n) for p in of for n in (DEVICE // 2, DEVICE)] for of in (short, decode_table()))
    hybrid = hybrid_rows(itertools.product((16, 256, 8192), (64, 8192), (1, 64), (512, 65536)))
    cost = TableCost(Tables.of(prefill, decode, hybrid, device_sms=DEVICE, layers=LAYERS, padded=SIZES))
    at, beside = Allocation(Mode.SPLIT, DEVICE // 2, DEVICE // 2), DecodeShape(64, 512)
    for tokens, outside in ((2500, False), (3072, False), (4000, True)):
        shape = PrefillShape(tokens, 64.0 * tokens)
        assert cost.prefill_s(shape, at, beside)[1] is outside
        assert (cost.outside(shape, at, beside) is not None) is outside


def mixed_table() -> list[MixedPoint]:
    """The coarse one."""
    return fused_table((8, 64), (512, 65536))


def fused_table(batches: tuple[int, ...], kv_tokens: tuple[int, ...]) -> list[MixedPoint]:
    """Fused steps whose matrix products have the stair of all rows, the rest being linear in each number."""
    found = []
    for tokens, context in ((t, c) for t in (16, 256, 2048) for c in (64, 1024)):
        for decode in (DecodeWork(b, kv) for b in batches for kv in kv_tokens):
            work = PrefillWork.at(tokens, context)
            ms = mixed_ms(tokens, context, decode.batch, decode.kv_tokens)
            shape = work.tokens, work.mean_context, work.seqs, work.seq_tokens, work.seq_context
            found.append(MixedPoint(*shape, decode.batch, decode.kv_tokens, "fa2", 5, ms, ms, ms))
    return found


def mixed_ms(tokens: float, context: float, batch: float, kv_tokens: float) -> float:
    rows = prefill_rows(int(tokens + batch))
    known = np.interp(rows, SPINE_TOKENS, [prefill_stair_ms(t) for t in SPINE_TOKENS])
    return float(known) + 1e-7 * tokens * context + 2e-5 * kv_tokens + 1e-3 * batch


@given(st.integers(16, 2048), st.integers(64, 1024), st.integers(8, 64), st.integers(512, 65536))
def test_a_fused_step_has_the_stair_of_the_rows_of_both(tokens: int, context: int, batch: int, kv: int) -> None:
    found_s, outside = model(mixed=mixed_table(), padded=SIZES).mixed_s(
        PrefillShape(tokens, float(tokens * context)), DecodeShape(batch, kv)
    )
    rows = prefill_rows(tokens + batch)
    if rows in SPINE_TOKENS:  # elsewhere the size is between two that were measured, and so is the time
        assert found_s / LAYERS * 1e3 == pytest.approx(mixed_ms(tokens, context, batch, kv), rel=1e-9)
    assert not outside


def test_every_fused_point_is_reproduced_padded_or_not() -> None:
    for padded in (Padded(), SIZES):
        cost = model(mixed=mixed_table(), padded=padded)
        for x in mixed_table():
            chunk = PrefillShape(x.tokens, float(x.tokens * x.mean_context))
            found_s = cost.mixed_s(chunk, DecodeShape(x.batch, x.kv_tokens))[0]
            assert found_s == pytest.approx(x.median_ms * LAYERS / 1e3, rel=1e-12)


def test_batches_of_the_shipped_profile_cost_what_they_took_prompts_and_all() -> None:
    profile = load_profile("h200/llama-3-8b")
    cost = profile.cost()
    for p in profile.prefill.points:
        batch = PrefillShape.of((p.seq_tokens,) * p.seqs, (p.seq_context,) * p.seqs)
        found_s = cost.prefill_s(batch, Allocation(Mode.EXCLUSIVE, p.sms, p.sms), None)[0]
        fewest = p.seqs == -(-p.tokens // (2 * p.mean_context))
        assert found_s * 1e3 == pytest.approx(p.median_ms, rel=1e-9 if fewest else 0.01)
