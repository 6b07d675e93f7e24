"""Traces into trace files: Azure CSV and Mooncake JSONL."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from semipd.core import InputError
from semipd.trace.columns import Trace
from semipd.trace.reader import AZURE_HEADER, AZURE_TICKS_PER_S, MOONCAKE_BLOCK_TOKENS, TraceFormat, trace_format

# A trace has no date. Counting from here keeps the stamps readable as time since the start.
_AZURE_START = datetime(1970, 1, 1)
MAX_WRITTEN_S = 2.5e11
"""Longest trace that can be written, in seconds: dates end with the year 9999."""


def write(
    trace: Trace,
    path: str | Path,
    format: TraceFormat | str,  # noqa: A002 - the word users know from the command line
) -> None:
    """Write a trace, gzipped when the path ends in ``.gz``; the same trace gives the same bytes.

    Arrivals are rounded to 100 ns in Azure CSV, which has no place for prefix block ids, and to 1 ms in Mooncake
    JSONL. There, a request without block ids gets ids that no other has, so that every reader sees full-length
    prompts and no reuse. Raises InputError when the file cannot be written, the format is unknown, blocks are not of
    Mooncake's 512 tokens, or the trace is longer than 2.5e11 s.
    """
    path = Path(path)
    if trace.duration_s > MAX_WRITTEN_S:
        raise InputError(f"{trace.name}: duration: found {trace.duration_s:g} s, expected at most {MAX_WRITTEN_S:g} s")
    rows = _azure_rows(trace) if trace_format(format) is TraceFormat.AZURE else _mooncake_rows(trace)
    content = "".join(f"{row}\n" for row in rows).encode()
    try:
        # mtime 0: the time of writing would make equal traces differ.
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    except OSError as error:
        raise InputError(f"{path}: found no writable place ({error.strerror}), expected one for a trace") from None


def _azure_rows(trace: Trace) -> Iterator[str]:
    yield AZURE_HEADER
    ticks = np.rint(trace.arrival_s * AZURE_TICKS_PER_S).astype(np.int64).tolist()
    for tick, prompt, output in zip(ticks, trace.prompt_len.tolist(), trace.output_len.tolist(), strict=True):
        seconds, fraction = divmod(tick, AZURE_TICKS_PER_S)
        yield f"{_AZURE_START + timedelta(seconds=seconds)}.{fraction:07},{prompt},{output}"


def _mooncake_rows(trace: Trace) -> Iterator[str]:
    block = trace.prefixes.block_tokens if trace.prefixes else MOONCAKE_BLOCK_TOKENS
    if block != MOONCAKE_BLOCK_TOKENS:
        raise InputError(f"{trace.name}: prefix blocks: found {block} tokens, expected {MOONCAKE_BLOCK_TOKENS}")
    unused = int(trace.prefixes.ids.max()) + 1 if trace.prefixes and len(trace.prefixes.ids) else 0
    stamps_ms = np.rint(trace.arrival_s * 1000).astype(np.int64).tolist()
    for stamp_ms, request in zip(stamps_ms, trace.requests(), strict=True):
        ids = list(request.prefix_block_ids)
        if not ids:
            blocks = -(-request.prompt_len // MOONCAKE_BLOCK_TOKENS)
            ids = list(range(unused, unused + blocks))
            unused += blocks
        yield json.dumps(
            {
                "timestamp": stamp_ms,
                "input_length": request.prompt_len,
                "output_length": request.output_len,
                "hash_ids": ids,
            }
        )
