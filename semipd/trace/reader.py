"""Trace files into traces: Azure CSV and Mooncake JSONL, plain or gzipped, every row checked."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from semipd.core import InputError
from semipd.trace.columns import MAX_TOKENS, Prefixes, Trace, head

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_TICKS_PER_S = 10**7
"""Azure 2023 stamps have seven fractional digits: 100 ns."""

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,7}))?(\+00:00)?", re.ASCII)
_STAMP_EXPECTED = "YYYY-MM-DD HH:MM:SS with up to 7 decimals and no offset or +00:00"
_TOKENS_EXPECTED = f"an integer from 1 to {MAX_TOKENS}"
_MAX_INT64 = 2**63 - 1


class TraceFormat(str, Enum):
    """The file formats that can be read and written."""

    AZURE = "azure-csv"
    MOONCAKE = "mooncake-jsonl"


def read_trace(
    path: str | Path,
    format: TraceFormat | str | None = None,  # noqa: A002 - the word users know from the command line
    limit: int | None = None,
) -> Trace:
    """Read a trace; its format is taken from the content unless given.

    Every row is checked, also those beyond ``limit`` (which keeps the first rows and counts the others as
    dropped). Raises InputError on the first thing wrong.
    """
    path = Path(path)
    stored = _bytes(path)
    lines = _lines(path, stored)
    read = {TraceFormat.AZURE: _read_azure, TraceFormat.MOONCAKE: _read_mooncake}
    trace = read[_format(path, lines[0]) if format is None else trace_format(format)](path, lines, stored)
    return trace if limit is None else head(trace, limit, reason="limit")


def trace_format(name: TraceFormat | str) -> TraceFormat:
    """The format of that name. Raises InputError for an unknown one."""
    try:
        return TraceFormat(name)
    except ValueError:
        known = " or ".join(f.value for f in TraceFormat)
        raise InputError(f"trace format: found {_shown(name)}, expected {known}") from None


def _read_azure(path: Path, lines: Sequence[str], stored: bytes) -> Trace:
    """Rows ``TIMESTAMP,ContextTokens,GeneratedTokens``; lines end in LF or CRLF, the last one may be open."""
    if lines[0].rstrip("\r") != AZURE_HEADER:
        _refuse(path, 1, "header", lines[0].rstrip("\r"), AZURE_HEADER)
    ticks, prompts, outputs = [], [], []
    first_zone, last = None, None
    for line, text in enumerate(lines[1:], start=2):
        row = text.rstrip("\r").split(",")
        if len(row) != 3:
            _refuse(path, line, "row", text.rstrip("\r"), f"3 fields, {AZURE_HEADER}")
        tick, zone = _azure_ticks(path, line, row[0])
        if last is not None and tick < last:
            _refuse(path, line, "TIMESTAMP", row[0], "a stamp not before the row above's")
        if first_zone not in (None, zone):
            _refuse(path, line, "TIMESTAMP", row[0], "all stamps with +00:00, or none")
        first_zone, last = zone, tick
        ticks.append(tick)
        prompts.append(_azure_tokens(path, line, "ContextTokens", row[1]))
        outputs.append(_azure_tokens(path, line, "GeneratedTokens", row[2]))
    if not ticks:
        raise InputError(f"{path}: line 2: found the end of the file, expected at least one row after the header")
    since_first = np.array(ticks, dtype=np.int64) - ticks[0]
    return Trace(
        name=_name(path),
        arrival_s=since_first / AZURE_TICKS_PER_S,
        prompt_len=np.array(prompts),
        output_len=np.array(outputs),
        source_format=TraceFormat.AZURE.value,
        rows_read=len(ticks),
        sha256=hashlib.sha256(stored).hexdigest(),
    )


def _azure_ticks(path: Path, line: int, stamp: str) -> tuple[int, str]:
    """A stamp as 100 ns ticks, exactly, and its offset as written."""
    match = _STAMP.fullmatch(stamp)
    if match is None:
        _refuse(path, line, "TIMESTAMP", stamp, _STAMP_EXPECTED)
    seconds, fraction, zone = match.groups(default="")
    try:
        whole = datetime.fromisoformat(seconds) - datetime(1970, 1, 1)  # both naive: no local time zone comes in
    except ValueError:
        _refuse(path, line, "TIMESTAMP", stamp, _STAMP_EXPECTED)
    return (whole.days * 86_400 + whole.seconds) * AZURE_TICKS_PER_S + int(fraction.ljust(7, "0")), zone


def _azure_tokens(path: Path, line: int, field: str, text: str) -> int:
    """A token count: digits alone, since ``int`` would also take ' 7', '+7', '1_0' and other scripts' digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and 1 <= int(text) <= MAX_TOKENS):
        _refuse(path, line, field, text, _TOKENS_EXPECTED)
    return int(text)


def _read_mooncake(path: Path, lines: Sequence[str], stored: bytes) -> Trace:
    """One JSON object a row; ``timestamp`` in ms, ``hash_ids`` one id for every 512 tokens begun, or absent."""
    stamps: list[int] = []
    prompts: list[int] = []
    outputs: list[int] = []
    ids: list[int] = []
    offsets = [0]
    for line, text in enumerate(lines, start=1):
        row = _json_object(path, line, text)
        stamp = _integer(path, line, row, "timestamp", 0, _MAX_INT64, "an integer number of ms from 0")
        if stamps and stamp < stamps[-1]:
            _refuse(path, line, "timestamp", stamp, f"at least {stamps[-1]}, the row above's")
        stamps.append(stamp)
        prompts.append(_integer(path, line, row, "input_length", 1, MAX_TOKENS, _TOKENS_EXPECTED))
        outputs.append(_integer(path, line, row, "output_length", 1, MAX_TOKENS, _TOKENS_EXPECTED))
        if "hash_ids" in row:
            ids.extend(_hash_ids(path, line, row["hash_ids"], prompts[-1]))
        offsets.append(len(ids))
    since_first = np.array(stamps, dtype=np.int64) - stamps[0]
    prefixes = Prefixes(np.array(ids, dtype=np.int64), np.array(offsets), MOONCAKE_BLOCK_TOKENS)
    return Trace(
        name=_name(path),
        arrival_s=since_first / 1000,
        prompt_len=np.array(prompts),
        output_len=np.array(outputs),
        source_format=TraceFormat.MOONCAKE.value,
        rows_read=len(stamps),
        sha256=hashlib.sha256(stored).hexdigest(),
        prefixes=prefixes if ids else None,
    )


def _json_object(path: Path, line: int, text: str) -> dict[str, Any]:
    """A row's fields. Unknown ones are refused: ``delay`` or ``session_id`` would change what the trace means."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        _refuse(path, line, "row", text, "one complete JSON object")
    if not isinstance(row, dict):
        _refuse(path, line, "row", text, "one complete JSON object")
    unknown = [key for key in row if key not in MOONCAKE_FIELDS]
    if unknown:
        _refuse(path, line, "row", unknown[0], f"no field but {', '.join(MOONCAKE_FIELDS)}")
    return row


def _integer(path: Path, line: int, row: dict[str, Any], field: str, low: int, high: int, expected: str) -> int:
    if field not in row:
        raise InputError(f"{path}: line {line}: {field}: found no such field, expected {expected}")
    value = row[field]
    if type(value) is not int or not low <= value <= high:  # a bool is an int to isinstance
        _refuse(path, line, field, value, expected)
    return value


def _hash_ids(path: Path, line: int, ids: object, prompt_len: int) -> list[int]:
    blocks = -(-prompt_len // MOONCAKE_BLOCK_TOKENS)
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i <= _MAX_INT64 for i in ids):
        _refuse(path, line, "hash_ids", ids, f"a list of integers from 0 to {_MAX_INT64}")
    if len(ids) != blocks:
        raise InputError(
            f"{path}: line {line}: hash_ids: found {len(ids)} ids, expected {blocks}, "
            f"one for every {MOONCAKE_BLOCK_TOKENS} of {prompt_len} tokens begun"
        )
    return ids


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: found no readable file ({error.strerror}), expected a trace") from None


def _lines(path: Path, stored: bytes) -> list[str]:
    """The text of a plain or gzipped file, cut at LF; never empty."""
    if stored.startswith(b"\x1f\x8b"):
        try:
            stored = gzip.decompress(stored)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: found broken gzip data ({error}), expected a whole .gz file") from None
    try:
        text = stored.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = stored[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: found a byte that is not UTF-8, expected text") from None
    if not text.strip():
        raise InputError(f"{path}: found an empty file, expected a trace")
    return text.removesuffix("\n").split("\n")


def _format(path: Path, first_line: str) -> TraceFormat:
    if first_line.startswith("{"):
        return TraceFormat.MOONCAKE
    if first_line.startswith("TIMESTAMP"):
        return TraceFormat.AZURE
    expected = f"the header {AZURE_HEADER} (azure-csv) or a JSON object (mooncake-jsonl)"
    raise InputError(f"{path}: line 1: format: found {_shown(first_line)}, expected {expected}")


def _name(path: Path) -> str:
    """The file's name without its endings."""
    return path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse(path: Path, line: int, field: str, found: object, expected: str) -> NoReturn:
    raise InputError(f"{path}: line {line}: {field}: found {_shown(found)}, expected {expected}")
