"""Whatever a file holds, a reader takes every row of it or refuses it in one line that names it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_trace_formats import (
    BAILIAN,
    BURSTGPT_1,
    BURSTGPT_3,
    LLMSERVINGSIM,
    SERVEGEN,
    SESSIONS,
    SPLITWISE,
    VIDUR,
    VIDUR_LENGTHS,
    archive,
)
from test_trace_read import AZURE, MOONCAKE

from semipd.core import InputError
from semipd.trace import Trace, read_trace
from semipd.trace.reader import TraceFormat

AZURE_2024 = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
TEXTS = (
    *(AZURE, AZURE_2024, MOONCAKE, SESSIONS, BAILIAN, LLMSERVINGSIM, BURSTGPT_1, BURSTGPT_3, SPLITWISE, VIDUR),
    VIDUR_LENGTHS,
)
COUNTS = {  # the columns of prompt and output in each header
    "ContextTokens": "GeneratedTokens",
    "Request tokens": "Response tokens",
    "prompt_size": "token_size",
    "num_prefill_tokens": "num_decode_tokens",
}
LIMITS = settings(deadline=2000, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENS = [
    "",
    "0",
    "-1",
    "1e3",
    "nan",
    "null",
    "true",
    '"',
    "\\",
    "{",
    "[",
    "٣",
    "\x00",
    "\ud7ff",
    "9" * 400,
    ",",
    "\r",
    "\n",
]


def read_or_refuse(path: Path, content: bytes, form: TraceFormat | None = None) -> Trace | None:
    """The trace, its rows accounted for; None when the file was refused as it should be."""
    path.write_bytes(content)
    try:
        trace = read_trace(path, form)
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert message.startswith(f"{path}: ") or (message.startswith(f"{path.name}: ") and "to draw" in message)
        assert len(message) < 1000
        return None
    assert trace.rows_read == len(trace) + sum(trace.dropped.values())
    return trace


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A small trace of some format with a few cells, lines or stretches changed."""
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["cut", "insert", "line twice", "line away", "lines swapped", "splice"]))
        at = draw(st.integers(0, len(text)))
        lines = text.split("\n")
        line = draw(st.integers(0, len(lines) - 1))
        if kind == "cut":
            text = text[:at] + text[at + draw(st.integers(1, 12)) :]
        elif kind == "insert":
            text = text[:at] + draw(st.one_of(st.sampled_from(TOKENS), st.text(max_size=5))) + text[at:]
        elif kind == "line twice":
            text = "\n".join([*lines[: line + 1], *lines[line:]])
        elif kind == "line away":
            text = "\n".join(lines[:line] + lines[line + 1 :])
        elif kind == "lines swapped":
            text = "\n".join([*lines[:line], *reversed(lines[line : line + 2]), *lines[line + 2 :]])
        else:
            text = text[:at] + draw(st.sampled_from(TEXTS))[at:]
    return text


def counted_independently(text: str) -> tuple[int, int, int]:
    """Rows, prompt tokens and output tokens of a file that was accepted, those without output left out of both."""
    text = text.removeprefix("\ufeff")
    if text.startswith("{"):
        rows = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
        rows = [call for row in rows for call in row.get("sub_requests", [row])]
        kind = ("input_toks", "output_toks") if "input_toks" in rows[0] else ("input_length", "output_length")
        counts = [(row[kind[0]], row[kind[1]]) for row in rows]
    else:
        header, *lines = text.removesuffix("\n").split("\n")
        table = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
        prompt = next(name for name in COUNTS if name in table[0])
        kept = [row for row in table if row.get("request_type", "2") == "2" and row.get("batch_size", "1") == "1"]
        counts = [(int(row[prompt]), int(row[COUNTS[prompt]])) for row in kept]
        rows = table
    used = [(p, o) for p, o in counts if p and o]
    return len(rows), sum(p for p, _ in used), sum(o for _, o in used)


@LIMITS
@given(mutated())
@example(AZURE)
@example(SESSIONS)
@example(BURSTGPT_3)
def test_a_changed_file_is_refused_or_every_row_of_it_counts(tmp_path: Path, text: str) -> None:
    content = text.encode(errors="surrogatepass")
    trace = read_or_refuse(tmp_path / "t", content)
    if trace is not None:
        rows, prompts, outputs = counted_independently(text.replace("\r\n", "\n"))
        assert (trace.rows_read, trace.prompt_len.sum(), trace.output_len.sum()) == (rows, prompts, outputs)
    zipped = read_or_refuse(tmp_path / "z", gzip.compress(content, 1))
    assert (zipped is None) == (trace is None)


@LIMITS
@given(st.binary(max_size=600), st.sampled_from([None, *TraceFormat]), st.booleans())
def test_any_bytes_are_read_or_refused_in_every_format(
    tmp_path: Path, content: bytes, form: TraceFormat | None, zipped: bool
) -> None:
    read_or_refuse(tmp_path / "t", gzip.compress(content, 1) if zipped else content, form)


@LIMITS
@given(st.sampled_from(TEXTS), st.sampled_from(list(TraceFormat)))
def test_a_file_of_another_format_is_refused_not_misread(tmp_path: Path, text: str, form: TraceFormat) -> None:
    (tmp_path / "own").write_text(text, newline="")
    own = read_trace(tmp_path / "own").source_format
    got = read_or_refuse(tmp_path / "t", text.encode(), form)
    assert (got is not None) == (own == form.value)


@LIMITS
@given(st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), min_size=1, max_size=3), st.booleans())
def test_a_damaged_archive_is_refused_or_drawn_whole(
    tmp_path: Path, damages: list[tuple[float, bytes]], unpacked: bool
) -> None:
    content = archive(SERVEGEN)
    if unpacked:
        content = gzip.decompress(content)
    for where, what in damages:
        at = int(where * len(content))
        content = content[:at] + what + content[at + len(what) :]
    read_or_refuse(tmp_path / "t", content)


@LIMITS
@given(st.sampled_from(sorted(SERVEGEN)[1:]), st.integers(0, 400), st.integers(0, 8), st.sampled_from(TOKENS))
def test_a_changed_member_of_an_archive_is_refused_or_drawn_whole(
    tmp_path: Path, name: str, at: int, cut: int, insert: str
) -> None:
    text = SERVEGEN[name]
    at %= len(text)
    members = SERVEGEN | {name: text[:at] + insert + text[at + cut :]}
    trace = read_or_refuse(tmp_path / "t", archive(members))
    assert trace is None or trace.operations[0].startswith("drawn from ")


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed (Linux on x86-64 only)")
def test_coverage_guided_fuzzing_finds_nothing_in_a_short_run() -> None:
    target = Path(__file__).with_name("fuzz") / "fuzz_readers.py"
    command = [sys.executable, str(target), "-runs=4000", "-seed=1", "-max_len=300", "-timeout=5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 4000 runs" in done.stderr
