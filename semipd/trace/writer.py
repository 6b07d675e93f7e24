"""Traces into trace files: Azure CSV and Mooncake JSONL."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from semipd.core import InputError
from semipd.trace.columns import Trace
from semipd.trace.csv_reader import AZURE_HEADER, AZURE_TICKS_PER_S, MAX_STAMP_S
from semipd.trace.jsonl_reader import MOONCAKE_BLOCK_TOKENS
from semipd.trace.reader import WRITTEN, TraceFormat, trace_format

# A trace has no date. Counting from here keeps the stamps readable as time since the start.
_AZURE_START = datetime(1970, 1, 1)


def write(
    trace: Trace,
    path: str | Path,
    format: TraceFormat | str,  # noqa: A002 - the word users know from the command line
) -> None:
    """Write a trace, gzipped when the path ends in ``.gz``; the same trace gives the same bytes.

    Arrivals are rounded to 100 ns in Azure CSV, which has no place for prefix block ids and sessions, and to 1 ms in
    Mooncake JSONL, delays there to 1 us. There, a request without block ids gets ids that no other has, so that every
    reader sees full-length prompts and no reuse. Raises InputError when the file cannot be written, the format is
    unknown or only read, blocks are not of Mooncake's 512 tokens (see ``reblock``), or the trace is longer than
    1e11 s.
    """
    path = Path(path)
    if trace.duration_s > MAX_STAMP_S:
        raise InputError(f"{trace.name}: duration: found {trace.duration_s:g} s, expected at most {MAX_STAMP_S:g} s")
    azure = trace_format(format, WRITTEN) is TraceFormat.AZURE
    if not azure and trace.prefixes is not None and trace.prefixes.block_tokens != MOONCAKE_BLOCK_TOKENS:
        found = trace.prefixes.block_tokens
        raise InputError(f"{trace.name}: prefix blocks: found {found} tokens, expected {MOONCAKE_BLOCK_TOKENS}")
    rows = _azure_rows(trace) if azure else _mooncake_rows(trace)
    try:
        with path.open("wb") as file:
            if path.suffix == ".gz":
                # mtime 0 and no name: the time and place of writing would make equal traces differ.
                with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
                    zipped.writelines(f"{row}\n".encode() for row in rows)
            else:
                file.writelines(f"{row}\n".encode() for row in rows)
    except OSError as error:
        raise InputError(f"{path}: found no writable place ({error.strerror}), expected one for a trace") from None


def _azure_rows(trace: Trace) -> Iterator[str]:
    yield AZURE_HEADER
    ticks = np.rint(trace.arrival_s * AZURE_TICKS_PER_S).astype(np.int64).tolist()
    for tick, prompt, output in zip(ticks, trace.prompt_len.tolist(), trace.output_len.tolist(), strict=True):
        seconds, fraction = divmod(tick, AZURE_TICKS_PER_S)
        yield f"{_AZURE_START + timedelta(seconds=seconds)}.{fraction:07},{prompt},{output}"


def _mooncake_rows(trace: Trace) -> Iterator[str]:
    unused = int(trace.prefixes.ids.max()) + 1 if trace.prefixes and len(trace.prefixes.ids) else 0
    stamps_ms = np.rint(trace.arrival_s * 1000).astype(np.int64).tolist()
    for stamp_ms, request, turn in zip(stamps_ms, trace.requests(), _turns(trace), strict=True):
        ids = list(request.prefix_block_ids)
        if not ids:
            blocks = -(-request.prompt_len // MOONCAKE_BLOCK_TOKENS)
            ids = list(range(unused, unused + blocks))
            unused += blocks
        row = {
            "timestamp": stamp_ms,
            "input_length": request.prompt_len,
            "output_length": request.output_len,
            "hash_ids": ids,
        }
        yield json.dumps(row | turn)


def _turns(trace: Trace) -> Iterator[dict[str, str | float]]:
    """The fields of a request's turn, as aiperf and Dynamo read them; none without session."""
    sessions = trace.sessions
    if sessions is None:
        yield from ({} for _ in range(len(trace)))
        return
    for index, delay_s in zip(sessions.index.tolist(), sessions.delay_s.tolist(), strict=True):
        turn: dict[str, str | float] = {} if index < 0 else {"session_id": sessions.names[index]}
        if not math.isnan(delay_s):
            delay_ms = round(delay_s * 1000, 3)
            turn["delay"] = int(delay_ms) if delay_ms.is_integer() else delay_ms
        yield turn
