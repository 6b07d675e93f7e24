"""Sweep tables: where points are placed, which steps count, and tables that survive interrupts and refuse nonsense."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_profile import PROVENANCE, decode_point, decode_points, hybrid_points, prefill_points

from semipd.core import InputError, Mode, PrefillShape
from semipd.points import DecodePoint, DecodeWork, HybridPoint, PrefillPoint, PrefillWork, Sharing, Spread, TotalPoint
from semipd.sweep import decode_grid, grid, partition_counts, splits_of
from semipd.table_files import TableWriter, provenance_path, read_points, read_table

TOTALS = [
    TotalPoint("split", 64, 68, "fa2", "fa2", 10, 100, 5, 60.5, 62.25, 62.25, 62.0, 63.125),
    TotalPoint("in-turn", 132, 132, "fa3", "fa2", 10, 100, 5, 16.75, 67.5, 67.5, 67.0, 68.0),
]
TABLES = [
    (PrefillPoint, prefill_points([8, 32])),
    (DecodePoint, decode_points([8, 32])),
    (HybridPoint, hybrid_points([8])),
    (TotalPoint, TOTALS),
]
each_table = pytest.mark.parametrize(("cls", "points"), TABLES, ids=lambda x: getattr(x, "__name__", ""))

# Where points are placed


def prompts_of(work: PrefillWork) -> PrefillShape:
    return PrefillShape.of((work.seq_tokens,) * work.seqs, (work.seq_context,) * work.seqs)


@given(st.integers(0, 14), st.integers(0, 17))
def test_a_batch_at_a_grid_point_has_its_tokens_and_its_mean_context(log_tokens: int, log_context: int) -> None:
    tokens, mean_context = 2**log_tokens, 2**log_context
    work = PrefillWork.at(tokens, mean_context)
    assert (work.tokens, work.mean_context) == (tokens, mean_context)
    assert prompts_of(work).tokens == tokens
    assert prompts_of(work).mean_context == mean_context + (0.5 if tokens == 1 else 0)  # a token attends to itself
    assert work.shape == PrefillShape(tokens, float(tokens * mean_context))


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_any_batch_is_placed_within_half_a_token_of_its_mean_context_or_refused(tokens: int, mean_context: int) -> None:
    fewest = math.ceil(tokens / (2 * mean_context))
    even = [n for n in range(fewest, 2 * fewest + 1) if (tokens / n).is_integer() and tokens // n % 2 == 0]
    if fewest == 1 or even:
        work = PrefillWork.at(tokens, mean_context)
        shape = prompts_of(work)
        assert work.seqs == (1 if fewest == 1 else min(even))
        assert shape.tokens == tokens
        assert abs(shape.mean_context - mean_context) <= 0.5
    else:
        with pytest.raises(InputError, match=f"tokens {tokens}: found no .* equal prompts .* {mean_context}; expected"):
            PrefillWork.at(tokens, mean_context)


@given(st.integers(1, 64), st.integers(1, 4096), st.integers(0, 4096))
def test_a_batch_given_by_its_prompts_is_placed_where_these_prompts_are(seqs: int, new: int, cached: int) -> None:
    work = PrefillWork.prompts(seqs, new, cached)
    assert (work.tokens, prompts_of(work).tokens) == (seqs * new, seqs * new)
    assert abs(prompts_of(work).mean_context - work.mean_context) <= 0.5


@given(st.integers(1, 300), st.integers(1, 100_000))
def test_a_decode_batch_shares_its_kv_tokens_evenly_and_every_sequence_has_one(batch: int, kv_tokens: int) -> None:
    lengths = DecodeWork(batch, kv_tokens).lengths()
    assert len(lengths) == batch
    assert sum(lengths) == max(kv_tokens, batch)
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


def test_a_grid_has_every_combination_once_and_the_cheapest_first() -> None:
    works = grid([16, 512, 8192], [16, 256, 131072])
    assert len(works) == 9
    assert {(w.tokens, w.mean_context) for w in works} == {(t, m) for t in (16, 512, 8192) for m in (16, 256, 131072)}
    assert [w.shape.pairs for w in works] == sorted(w.shape.pairs for w in works)
    decodes = decode_grid([1, 64], iter([4096, 256]))
    assert {(w.batch, w.kv_tokens) for w in decodes} == {(1, 256), (64, 256), (1, 4096), (64, 4096)}
    assert [w.kv_tokens for w in decodes] == [256, 256, 4096, 4096]


def test_an_h200_in_steps_of_8_has_16_splits_and_17_partition_sizes() -> None:
    assert partition_counts(132, 8) == [8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 132]
    splits = splits_of(132, 8)
    assert [s.name for s in splits][::15] == ["8/124", "128/4"]
    assert len(splits) == 16


@given(st.integers(16, 200), st.sampled_from([2, 4, 6, 8, 16, 32]))
def test_splits_use_the_whole_device_and_both_phases_get_some(device_sms: int, step_sms: int) -> None:
    splits, counts = splits_of(device_sms, step_sms), partition_counts(device_sms, step_sms)
    assert all(s.mode is Mode.SPLIT and s.prefill_sms + s.decode_sms == device_sms for s in splits)
    assert all(s.prefill_sms >= 8 and s.decode_sms > 0 for s in splits)
    assert counts == [*(s.prefill_sms for s in splits), device_sms]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("at", "name"),
    [
        (Sharing("split", 64, 68), "64/68"),
        (Sharing("capped", 64, 132), "capped-64"),
        (Sharing("priority", 132, 132), "priority"),
        (Sharing("in-turn", 132, 132), "in-turn"),
    ],
)
def test_a_way_of_sharing_is_named_as_in_a_summary(at: Sharing, name: str) -> None:
    assert at.name == name


# Which steps count


def test_a_spread_is_the_median_and_the_outer_deciles() -> None:
    assert Spread.of(np.arange(101.0)) == Spread(101, 50.0, 10.0, 90.0)
    with pytest.raises(ValueError, match="no measured step"):
        Spread.of(np.array([]))


# Tables on disk


@each_table
def test_a_written_table_reads_back_the_same_with_its_provenance(tmp_path: Path, cls: type, points: list) -> None:
    path = tmp_path / "new" / "table.csv"
    writer = TableWriter(path, cls, PROVENANCE)
    for point in points:
        assert not writer.has(point.key)
        writer.add(point)
        assert writer.has(point.key)
    table = read_table(path, cls)
    assert table.points == tuple(points) == tuple(writer.points)
    assert table.provenance == PROVENANCE


@given(st.lists(st.floats(1e-9, 1e9), min_size=3, max_size=3), st.integers(1, 2**40))
def test_numbers_survive_writing_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, times: list[float], steps: int
) -> None:
    point = replace(
        decode_point(DecodeWork(1, 256), 8), steps=steps, median_ms=times[0], p10_ms=times[1], p90_ms=times[2]
    )
    path = tmp_path_factory.mktemp("table") / "decode.csv"
    TableWriter(path, DecodePoint, PROVENANCE).add(point)
    assert read_points(path, DecodePoint) == [point]


def test_every_row_is_on_disk_when_it_has_been_added(tmp_path: Path) -> None:
    path = tmp_path / "decode.csv"
    writer = TableWriter(path, DecodePoint, PROVENANCE)
    for count, point in enumerate(decode_points([8]), 1):
        writer.add(point)
        assert len(read_points(path, DecodePoint)) == count


def test_an_existing_table_is_refused_unless_resumed(tmp_path: Path) -> None:
    path = tmp_path / "decode.csv"
    TableWriter(path, DecodePoint, PROVENANCE).add(decode_points([8])[0])
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: exists; expected a new file, or --resume to go on"):
        TableWriter(path, DecodePoint, PROVENANCE)
    assert path.read_bytes() == before


@each_table
def test_a_table_interrupted_at_any_byte_goes_on_from_its_last_whole_row(
    tmp_path: Path, cls: type, points: list
) -> None:
    points = points[:3]
    whole = tmp_path / "whole.csv"
    writer = TableWriter(whole, cls, PROVENANCE)
    for point in points:
        writer.add(point)
    text = whole.read_bytes()
    cut = tmp_path / "cut.csv"
    for length in range(len(text) + 1):
        cut.write_bytes(text[:length])
        provenance_path(cut).write_bytes(provenance_path(whole).read_bytes())
        resumed = TableWriter(cut, cls, PROVENANCE, resume=True)
        rows = max(text[:length].count(b"\n") - 1, 0)
        assert resumed.points == points[:rows]
        assert [resumed.has(point.key) for point in points] == [i < rows for i in range(len(points))]
        for point in points[rows:]:
            resumed.add(point)
        assert cut.read_bytes() == text
        assert read_table(cut, cls).points == tuple(points)


def test_resuming_a_table_that_is_not_there_begins_it(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path / "decode.csv", DecodePoint, PROVENANCE, resume=True)
    assert writer.points == []
    assert read_points(writer.path, DecodePoint) == []


def test_the_provenance_is_of_the_beginning_and_lists_every_resumption(tmp_path: Path) -> None:
    path = tmp_path / "decode.csv"
    TableWriter(path, DecodePoint, PROVENANCE).add(decode_points([8])[0])
    again = [{"command": f"again {i}", "commit": f"c{i}", "date": f"d{i}"} for i in range(2)]
    for how in again:
        TableWriter(path, DecodePoint, {**PROVENANCE, **how}, resume=True)
    assert read_table(path, DecodePoint).provenance == {**PROVENANCE, "resumed": again}


def test_a_file_that_is_no_table_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "decode.csv"
    path.write_text("a line of somebody else, without its end")
    with pytest.raises(InputError, match="found columns a line of somebody else"):
        TableWriter(path, DecodePoint, PROVENANCE, resume=True)
    assert path.read_text() == "a line of somebody else, without its end"


@pytest.mark.parametrize("field", ["gpu", "device_sms", "work"])
def test_a_table_is_not_resumed_with_other_work_or_on_another_device(tmp_path: Path, field: str) -> None:
    path = tmp_path / "decode.csv"
    TableWriter(path, DecodePoint, PROVENANCE).add(decode_points([8])[0])
    message = rf"decode.json: {field}: found .*; expected 'other' to resume \(use another --out for other work\)$"
    with pytest.raises(InputError, match=message):
        TableWriter(path, DecodePoint, {**PROVENANCE, field: "other"}, resume=True)


# Tables that cannot be used


HEADER = ",".join(f.name for f in dataclasses.fields(DecodePoint))
ROW = "8,1,256,fa2,10,0.5,0.4,0.6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: found columns none; expected sms,.*"),
        ("sms,batch\n", "row 1: found columns sms,batch; expected sms,batch,kv_tokens,.*"),
        (f"{HEADER}\n", "no measured points; expected at least one row after the header"),
        (f"{HEADER}\n{ROW}\n{ROW},1\n", "row 3: found 9 fields; expected 8"),
        (f"{HEADER}\n{ROW}\n\n", "row 3: found 0 fields; expected 8"),
        (f"{HEADER}\n8,1,256,fa2,10,0.5,0.4", "row 2: found 7 fields; expected 8"),
        (f"{HEADER}\n{ROW.replace('8,1,', '8.0,1,')}\n", r"row 2: sms: found '8\.0'; expected an integer"),
        (f"{HEADER}\n{ROW.replace('8,1,', '8,0,')}\n", "row 2: batch: found '0'; expected more than zero"),
        (f"{HEADER}\n{ROW.replace('256', '-256')}\n", "row 2: kv_tokens: found '-256'; expected more than zero"),
        (f"{HEADER}\n{ROW.replace('256', '1_000')}\n", "row 2: kv_tokens: found '1_000'; expected an integer"),
        (f"{HEADER}\n{ROW.replace('256', '9' * 400)}\n", "row 2: kv_tokens: found '9+'; expected an integer"),
        (f"{HEADER}\n{ROW.replace('fa2', '')}\n", "row 2: backend: found ''; expected a name"),
        (f"{HEADER}\n{ROW.replace('0.5', 'fast')}\n", "row 2: median_ms: found 'fast'; expected a number"),
        (f"{HEADER}\n{ROW.replace('0.5', 'nan')}\n", "row 2: median_ms: found 'nan'; expected more than zero"),
        (f"{HEADER}\n{ROW.replace('0.5', 'inf')}\n", "row 2: median_ms: found 'inf'; expected more than zero"),
        (f"{HEADER}\n{ROW}\n16{ROW[1:]}\n{ROW}\n", "row 4: the point of row 2 again; expected each point once"),
        (f"{HEADER}\n8,1,256,{'x' * 200_000}\n", r"row 2: not CSV \(field larger than field limit .*\); expected .*"),
    ],
)
def test_a_malformed_table_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "decode.csv"
    path.write_text(text, encoding="utf-8")
    provenance_path(path).write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}: {message}$"):
        read_table(path, DecodePoint)


def test_what_no_cached_context_is_written_as_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prefill.csv"
    point = replace(prefill_points([8])[0], seq_context=0, mean_context=0)
    TableWriter(path, PrefillPoint, PROVENANCE).add(point)
    assert read_points(path, PrefillPoint) == [point]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda _: None, "decode.csv: not found; expected a sweep table"),
        (lambda p: p.mkdir(), "decode.csv: cannot be read .*; expected a sweep table"),
        (
            lambda p: p.write_bytes(HEADER.encode() + b"\n\xff\n"),
            "decode.csv: not UTF-8 text .*; expected a sweep table",
        ),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path: Path, write, message: str) -> None:
    path = tmp_path / "decode.csv"
    write(path)
    with pytest.raises(InputError, match=message):
        read_table(path, DecodePoint)


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        (None, "decode.json: not found; expected the provenance of decode.csv beside it"),
        ("{", r"decode.json: not JSON \(.*\); expected the provenance of decode.csv"),
        ("[1]", "decode.json: found list; expected a JSON object"),
    ],
)
def test_a_table_without_usable_provenance_is_refused(tmp_path: Path, provenance: str | None, message: str) -> None:
    path = tmp_path / "decode.csv"
    path.write_text(f"{HEADER}\n{ROW}\n", encoding="utf-8")
    if provenance is not None:
        provenance_path(path).write_text(provenance, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_table(path, DecodePoint)


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_whatever_a_file_holds_reading_gives_points_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, rows: str | bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "decode.csv"
    path.write_bytes(f"{HEADER}\n".encode() + (rows.encode("utf-8", "replace") if isinstance(rows, str) else rows))
    try:
        points = read_points(path, DecodePoint)
    except InputError as error:
        refused = str(error)
    else:
        assert all(point.median_ms > 0 for point in points)
        return
    assert refused.startswith(str(path))
    assert len(refused.splitlines()) == 1
