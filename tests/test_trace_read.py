"""Reading traces: what is accepted, what is refused and how, on small files and on the real ones."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from semipd.core import InputError
from semipd.trace import Trace, head, info, read_trace, scale_rate, window

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE = (
    f"{HEADER}\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:50.9951691,879,55"
)
MOONCAKE = (
    '{"timestamp": 27482, "input_length": 513, "output_length": 7, "hash_ids": [0, 1]}\n'
    '{"timestamp": 27482, "input_length": 512, "output_length": 1}\n'
    '{"timestamp": 30535, "input_length": 1536, "output_length": 9, "hash_ids": [0, 1, 5]}\n'
)

TRACES = Path(os.environ.get("SEMIPD_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")
CONV = TRACES / "azure-2023" / "AzureLLMInferenceTrace_conv.csv"
CODE = TRACES / "azure-2023" / "AzureLLMInferenceTrace_code.csv"
CONVERSATION = TRACES / "mooncake-fast25" / "conversation_trace.jsonl"


def real(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path.name} is not here: set SEMIPD_TRACES to the folder of real traces")
    return path


def saved(folder: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_azure_2023_keeps_all_seven_digits_and_starts_at_zero(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, AZURE))
    assert trace.arrival_s.tolist() == [0.0, 4.314579, 4.3145791]
    assert trace.prompt_len.tolist() == [374, 396, 879]
    assert trace.output_len.tolist() == [44, 109, 55]
    assert (trace.name, trace.source_format, trace.rows_read, dict(trace.dropped)) == ("t", "azure-csv", 3, {})
    assert trace.sha256 == hashlib.sha256(AZURE.encode()).hexdigest()


def test_azure_2024_stamps_with_an_offset_and_fewer_digits(tmp_path: Path) -> None:
    rows = "2024-02-28 23:59:59.500000+00:00,5,6\n2024-02-29 00:00:00+00:00,7,8\n"
    trace = read_trace(saved(tmp_path, f"{HEADER}\n{rows}"))
    assert trace.arrival_s.tolist() == [0.0, 0.5]


def test_mooncake_milliseconds_and_block_ids(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, MOONCAKE, "m.jsonl"))
    first, second, third = trace.requests()
    assert trace.arrival_s.tolist() == [0.0, 0.0, 3.053]
    assert (first.prefix_block_ids, first.prefix_block_size) == ((0, 1), 512)
    assert (second.prefix_block_ids, second.prefix_block_size) == ((), 0)
    assert (third.id, third.prompt_len, third.output_len, third.prefix_block_ids) == (2, 1536, 9, (0, 1, 5))


@pytest.mark.parametrize("content", [AZURE, MOONCAKE])
def test_gzip_and_file_names_do_not_matter(tmp_path: Path, content: str) -> None:
    plain = read_trace(saved(tmp_path, content, "a"))
    packed = read_trace(saved(tmp_path, gzip.compress(content.encode()), "b.txt"))
    assert list(plain.requests()) == list(packed.requests())


def test_a_forced_format_is_not_second_guessed(tmp_path: Path) -> None:
    path = saved(tmp_path, AZURE)
    assert len(read_trace(path, format="azure-csv")) == 3
    with pytest.raises(InputError, match=r"t\.csv: line 1: row: found 'TIMESTAMP.*expected one complete JSON object"):
        read_trace(path, format="mooncake-jsonl")
    with pytest.raises(InputError, match="trace format: found 'csv', expected azure-csv, mooncake-jsonl"):
        read_trace(path, format="csv")


STAMP = "2023-11-16 18:15:46.6805900"
TOKENS = r"an integer from 1 to 2147483647"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (f"{STAMP},0,44", rf"line 2: ContextTokens: found '0', expected {TOKENS}"),
        (f"{STAMP},1,-3", rf"line 2: GeneratedTokens: found '-3', expected {TOKENS}"),
        (f"{STAMP},1,0", rf"line 2: GeneratedTokens: found '0', expected {TOKENS}"),
        (f"{STAMP},1.5,4", rf"line 2: ContextTokens: found '1\.5', expected {TOKENS}"),
        (f"{STAMP},nan,4", r"line 2: ContextTokens: found 'nan'"),
        (f"{STAMP}, 7,4", r"line 2: ContextTokens: found ' 7'"),
        (f"{STAMP},1_0,4", r"line 2: ContextTokens: found '1_0'"),
        (f"{STAMP},,4", r"line 2: ContextTokens: found ''"),
        (f"{STAMP},٣,4", r"line 2: ContextTokens: found '٣'"),
        (f"{STAMP},2147483648,4", r"line 2: ContextTokens: found '2147483648'"),
        (f"{STAMP},{'9' * 5000},4", r"line 2: ContextTokens: found '9{56}\.\.\., expected"),
        (f"{STAMP},1", rf"line 2: row: found '{STAMP},1', expected 3 fields"),
        (f"{STAMP},1,2,3", r"line 2: row: found .* expected 3 fields"),
        (f"{STAMP},1,2\n\n{STAMP},1,2", r"line 3: row: found '', expected 3 fields"),
        ("NaN,1,2", r"line 2: TIMESTAMP: found 'NaN', expected YYYY-MM-DD"),
        ("2023-02-30 00:00:00.0000000,1,2", r"line 2: TIMESTAMP: found '2023-02-30"),
        ("2023-11-16 18:15:46.12345678,1,2", r"line 2: TIMESTAMP: found"),
        ("2023-11-16 18:15:46.1+01:00,1,2", r"line 2: TIMESTAMP: found .* no offset or \+00:00"),
        (f"{STAMP},1,2\n2023-11-16 18:15:46.6805899,1,2", r"line 3: TIMESTAMP: found .*5899', expected a stamp not"),
        (f"{STAMP},1,2\n{STAMP}+00:00,1,2", r"line 3: TIMESTAMP: found .* all stamps with \+00:00, or none"),
    ],
)
def test_a_bad_azure_row_is_named(tmp_path: Path, rows: str, message: str) -> None:
    path = saved(tmp_path, f"{HEADER}\n{rows}\n")
    with pytest.raises(InputError, match=rf"t\.csv: {message}") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"timestamp": 1, "input_length"', "row: found .*expected one complete JSON object"),
        ("[1, 2]", r"row: found '\[1, 2\]', expected one complete JSON object"),
        ("", "row: found '', expected one complete JSON object"),
        ("[" * 100_000, "row: found .*expected one complete JSON object"),
        ('{"timestamp": 1, "input_length": 3}', "output_length: found no such field, expected an integer from 1"),
        ('{"timestamp": 1.5, "input_length": 3, "output_length": 1}', r"timestamp: found 1\.5, expected an integer nu"),
        ('{"timestamp": NaN, "input_length": 3, "output_length": 1}', "timestamp: found nan"),
        ('{"timestamp": true, "input_length": 3, "output_length": 1}', "timestamp: found True"),
        ('{"timestamp": -1, "input_length": 3, "output_length": 1}', "timestamp: found -1"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1}', "timestamp: found 0, expected at least 1"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "input_length: found 0"),
        ('{"timestamp": 1, "input_length": "3", "output_length": 1}', "input_length: found '3'"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 0}', "output_length: found 0"),
        (
            '{"timestamp": 1, "input_length": 3, "output_length": 1, "delay": 5}',
            "row: found 'delay', expected no field",
        ),
        (
            '{"timestamp": 1, "input_length": 1025, "output_length": 1, "hash_ids": [1, 2]}',
            "hash_ids: found 2 ids, expected 3, one for every 512 of 1025 tokens begun",
        ),
        (
            '{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": []}',
            "hash_ids: found 0 ids, expected 1",
        ),
        (
            '{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": null}',
            "hash_ids: found None, expected a",
        ),
        ('{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": [1.0]}', r"hash_ids: found \[1\.0\]"),
        ('{"timestamp": 1, "input_length": 3, "output_length": 1, "hash_ids": [-1]}', r"hash_ids: found \[-1\]"),
    ],
)
def test_a_bad_mooncake_row_is_named(tmp_path: Path, row: str, message: str) -> None:
    good = '{"timestamp": 1, "input_length": 3, "output_length": 1}'
    path = saved(tmp_path, f"{good}\n{row}\n", "m.jsonl")
    with pytest.raises(InputError, match=rf"m\.jsonl: line 2: {message}") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found an empty file"),
        ("\n\n", "found an empty file"),
        (f"{HEADER}\r\n", "line 2: found the end of the file, expected at least one row"),
        ("TIMESTAMP,ContextTokens\n", f"line 1: header: found 'TIMESTAMP,ContextTokens', expected {HEADER}"),
        ("time,in,out\n1,2,3\n", "line 1: format: found 'time,in,out', expected the header"),
        (f"{HEADER}\n".encode() + b"\xff\n", "line 2: found a byte that is not UTF-8"),
        (gzip.compress(AZURE.encode())[:-12], "found broken gzip data"),
        (b"\x1f\x8bnot gzip after all", "found broken gzip data"),
        (gzip.compress(bytes(1 << 27), 1), "line 1: found more than 67108864 bytes, expected a row of a trace"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=rf"t\.csv: {message}"):
        read_trace(saved(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: found no readable file \(No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(InputError, match="found no readable file"):
        read_trace(tmp_path)


def test_every_row_is_accounted_for_through_every_cut(tmp_path: Path) -> None:
    rows = "".join(f"2023-11-16 00:00:{i:02}.0,{i + 1},{i + 2}\n" for i in range(20))
    trace = read_trace(saved(tmp_path, f"{HEADER}\n{rows}"), limit=15)
    assert (trace.rows_read, len(trace), dict(trace.dropped)) == (20, 15, {"limit": 5})
    cut = head(window(trace, 3.0, 10.0), 4)
    assert cut.prompt_len.tolist() == [4, 5, 6, 7]
    assert cut.arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert dict(cut.dropped) == {"limit": 5, "window": 8, "head": 3}
    assert cut.rows_read == len(cut) + sum(cut.dropped.values())
    for wrong in (lambda: head(trace, 0), lambda: window(trace, 30, 40)):
        with pytest.raises(InputError, match="t: "):
            wrong()
    for start_s, end_s in ((5, 5), (5, 4), (-1, 5), (float("nan"), 5), (0, float("nan"))):
        with pytest.raises(InputError, match=f"t: window: found {start_s} s to {end_s} s, expected 0 s or later to"):
            window(trace, start_s, end_s)


@pytest.mark.parametrize("bad", ["2023-11-16 18:15:50.5,1,0", "2023-11-16 18:15:50.5,1", "2023-11-16 18:15:40,1,1"])
def test_a_bad_row_far_into_a_file_is_named_by_its_line(tmp_path: Path, bad: str) -> None:
    rows = ["2023-11-16 18:15:50.5,1,1"] * 10_000
    rows[9_000] = bad
    with pytest.raises(InputError, match=r": line 9002: "):
        read_trace(saved(tmp_path, "\n".join([HEADER, *rows])))


@given(*(st.integers(0, high) for high in (9999, 13, 32, 24, 60, 60)))
@example(0, 1, 1, 0, 0, 0)
@example(2023, 2, 29, 0, 0, 0)
@example(1, 1, 1, 0, 0, 0)
@example(1290, 1, 1, 0, 0, 2)
def test_a_stamp_is_taken_exactly_when_the_calendar_has_it(
    year: int, month: int, day: int, hour: int, minute: int, second: int
) -> None:
    stamp = f"{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}"
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder), f"{HEADER}\n{stamp},1,1\n9999-12-31 23:59:59.9999999,1,1\n")
        try:
            since = datetime(9999, 12, 31, 23, 59, 59) - datetime(year, month, day, hour, minute, second)
        except ValueError:
            with pytest.raises(InputError, match=f"line 2: TIMESTAMP: found '{stamp}'"):
                read_trace(path)
        else:
            seconds = since.days * 86_400 + since.seconds
            # In ticks, thousands of years are more than a double holds.
            assert read_trace(path).arrival_s.tolist() == [0.0, pytest.approx(seconds + 0.9999999, rel=1e-15)]


def test_rows_beyond_the_limit_are_checked_too(tmp_path: Path) -> None:
    path = saved(tmp_path, f"{AZURE}\nbroken")
    with pytest.raises(InputError, match=r"line 5: row: found 'broken'"):
        read_trace(path, limit=1)


def test_a_cut_keeps_each_requests_own_blocks(tmp_path: Path) -> None:
    trace = window(read_trace(saved(tmp_path, MOONCAKE, "m.jsonl")), 3.0, 4.0)
    assert [r.prefix_block_ids for r in trace.requests()] == [(0, 1, 5)]


def test_time_warp_scales_rate_and_keeps_the_shape(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, AZURE))
    fast = scale_rate(trace, 2.0)
    assert fast.arrival_s.tolist() == [t / 2 for t in trace.arrival_s.tolist()]
    assert fast.duration_s == trace.duration_s / 2
    assert info(fast).interarrival_cv == pytest.approx(info(trace).interarrival_cv)
    for factor in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(InputError, match=r"t: rate scale: found .* expected 1e-06 to 1e\+06"):
            scale_rate(trace, factor)


def test_a_trace_is_read_only_and_consistent() -> None:
    mine = np.array([0.0, 1.0])
    ones = np.ones(2, dtype=np.int64)
    trace = Trace("t", mine, ones, ones, "made", 2)
    with pytest.raises(ValueError, match="read-only"):
        trace.arrival_s[0] = 5.0
    mine[1] = 7.0  # the caller's own array stays theirs
    assert trace.duration_s == 1.0
    for arrival_s, tokens, rows in (
        ([0.0, -1.0], ones, 2),
        ([1.0, 2.0], ones, 2),
        ([0.0, np.nan], ones, 2),
        ([0.0, np.inf], ones, 2),
        ([0.0], ones, 2),
        ([0.0, 1.0], ones - 1, 2),
        ([0.0, 1.0], ones, 3),
    ):
        with pytest.raises(ValueError, match=r"columns|arrival_s|at least 1|rows read"):
            Trace("t", np.array(arrival_s), tokens, ones, "made", rows)


def test_dispersion_and_cv_against_counting_by_hand(tmp_path: Path) -> None:
    # Whole 1 s bins of 0 s to 4 s hold 3, 0, 1, 2 arrivals; the arrival at 4.5 s is in no whole bin.
    stamps = (0, 200, 400, 2500, 3000, 3999, 4500)
    rows = "".join(f'{{"timestamp": {t}, "input_length": 1, "output_length": 1}}\n' for t in stamps)
    got = info(read_trace(saved(tmp_path, rows, "m.jsonl")))
    gaps = np.diff(np.array(stamps) / 1000)
    assert got.dispersion_1s == pytest.approx(np.var([3, 0, 1, 2]) / 1.5)
    assert got.dispersion_10s is None
    assert got.interarrival_cv == pytest.approx(gaps.std() / gaps.mean())
    assert got.rate_rps == pytest.approx(7 / 4.5)


def test_one_request_has_no_rate(tmp_path: Path) -> None:
    got = info(read_trace(saved(tmp_path, AZURE), limit=1))
    assert (got.requests, got.duration_s, got.rate_rps, got.interarrival_cv) == (1, 0.0, None, None)
    assert got.prompt_tokens.p99 == 374


def test_prefix_share_counts_leading_blocks_seen_before(tmp_path: Path) -> None:
    # Row 3 shares blocks 0 and 1 (1024 tokens) with row 1; row 4 shares block 5, but not from its start.
    rows = MOONCAKE + '{"timestamp": 40000, "input_length": 1000, "output_length": 1, "hash_ids": [9, 5]}\n'
    got = info(read_trace(saved(tmp_path, rows, "m.jsonl")))
    assert got.prefix_share == pytest.approx(1024 / (513 + 512 + 1536 + 1000))


def test_the_real_azure_trace_matches_a_plain_csv_reading() -> None:
    trace = read_trace(real(CONV))
    with CONV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    start = datetime.fromisoformat(rows[0]["TIMESTAMP"][:26])
    expected_s = [(datetime.fromisoformat(r["TIMESTAMP"][:26]) - start).total_seconds() for r in rows]
    assert len(trace) == trace.rows_read == 19_366
    np.testing.assert_allclose(trace.arrival_s, expected_s, rtol=0, atol=1e-9)
    assert trace.prompt_len.tolist() == [int(r["ContextTokens"]) for r in rows]
    assert trace.output_len.tolist() == [int(r["GeneratedTokens"]) for r in rows]


def test_the_real_azure_trace_is_read_in_well_under_a_second() -> None:
    path = real(CONV)
    took_s = []
    for _ in range(3):
        start = time.process_time()  # not what other processes take
        read_trace(path)
        took_s.append(time.process_time() - start)
    assert min(took_s) < 0.3


@pytest.mark.parametrize(
    ("path", "sha256", "figures"),
    [
        (
            CODE,
            "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
            [8819, 3436, 2.57, 2048, 1469, 5188, 7436, 28, 13, 55, 251, 13.2, 13, 72, 164],
        ),
        (
            CONV,
            "2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
            [19366, 3502, 5.53, 1155, 1020, 2735, 4142, 211, 129, 424, 601, 1.09, 1.4, 3.9, 16],
        ),
        (
            CONVERSATION,
            "b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
            [12031, 3537, 3.40, 12035, 6909, 27367, 85400, 343, 350, 597, 1119, 3.03, 7.9, 2.1, 2.9],
        ),
    ],
    ids=["code", "conv", "mooncake"],
)
def test_info_reproduces_the_published_figures(path: Path, sha256: str, figures: list[float]) -> None:
    got = info(read_trace(real(path)))
    prompt, output = got.prompt_tokens, got.output_tokens
    values = [got.requests, got.duration_s, got.rate_rps]
    values += [prompt.mean, prompt.p50, prompt.p90, prompt.p99, output.mean, output.p50, output.p90, output.p99]
    values += [got.interarrival_cv, got.dispersion_1s, got.dispersion_10s, got.dispersion_60s]
    assert got.sha256 == sha256
    # The figures are rounded to two to five digits.
    assert values == pytest.approx(figures, rel=0.015)


def test_prefix_share_of_the_real_mooncake_trace_against_brute_force() -> None:
    path = real(CONVERSATION)
    prefixes: set[tuple[int, ...]] = set()
    hits = total = 0
    for text in path.read_text().splitlines()[:300]:
        row = json.loads(text)
        ids = tuple(row["hash_ids"])
        shared = max((n for n in range(len(ids) + 1) if n == 0 or ids[:n] in prefixes), default=0)
        hits += min(512 * shared, row["input_length"])
        total += row["input_length"]
        prefixes.update(ids[:n] for n in range(1, len(ids) + 1))
    # Ids form a tree in this file, so a block seen before is a whole prefix seen before.
    assert info(read_trace(path, limit=300)).prefix_share == pytest.approx(hits / total)
