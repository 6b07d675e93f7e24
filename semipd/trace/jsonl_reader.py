"""JSONL traces: Mooncake, with or without sessions, Bailian (Qwen), and LLMServingSim's workloads.

Formats: github.com/kvcache-ai/Mooncake (FAST'25); ``session_id`` and ``delay`` as aiperf and Dynamo read them;
github.com/alibaba-edu/qwen-bailian-usagetraces-anon (arXiv 2506.02634); github.com/casys-kaist/LLMServingSim.
"""

from __future__ import annotations

import json
import math
from array import array
from typing import Any

import numpy as np

from semipd.core import InputError, IntArray
from semipd.trace.columns import MAX_TOKENS, Prefixes, Sessions, Trace
from semipd.trace.csv_reader import MAX_STAMP_S, Lines
from semipd.trace.source import MAX_INT64, TOKENS_EXPECTED, Source

MOONCAKE = "mooncake-jsonl"
MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids", "session_id", "delay", "delay_ms")

BAILIAN = "bailian-jsonl"
BAILIAN_BLOCK_TOKENS = 16
BAILIAN_FIELDS = (
    "chat_id",
    "parent_chat_id",
    "timestamp",
    "input_length",
    "output_length",
    "type",
    "turn",
    "hash_ids",
)

LLMSERVINGSIM = "llmservingsim-jsonl"
LLMSERVINGSIM_CALL = ("input_toks", "output_toks", "input_tok_ids", "output_tok_ids")
LLMSERVINGSIM_REQUEST = (*LLMSERVINGSIM_CALL, "arrival_time_ns")
LLMSERVINGSIM_TURN = (*LLMSERVINGSIM_CALL, "tool_duration_ns")
LLMSERVINGSIM_SESSION = ("session_id", "arrival_time_ns", "sub_requests")

_NS_PER_S = 1_000_000_000
_MAX_STAMP_NS = int(MAX_STAMP_S) * _NS_PER_S
_NS_EXPECTED = f"an integer number of ns from 0 to {_MAX_STAMP_NS:g}"
_MAX_STAMP_MS = int(MAX_STAMP_S * 1000)
_STAMP_MS_EXPECTED = "an integer number of ms from 0"
_DELAY_EXPECTED = f"a number of ms from 0 to {_MAX_STAMP_MS:g}"
_STAMP_S_EXPECTED = f"a number of seconds from 0 to {MAX_STAMP_S:g}"


class _Rows:
    """The columns that all formats have, as they are read; ``lengths`` are the fields of prompt and output."""

    def __init__(
        self, source: Source, block_tokens: int, lengths: tuple[str, str] = ("input_length", "output_length")
    ) -> None:
        self._source, self._block_tokens, self._lengths = source, block_tokens, lengths
        self.stamps = array("d")
        self._prompts, self._outputs = array("q"), array("q")
        self._ids, self._offsets = array("q"), array("q", [0])

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, line: int, row: dict[str, Any], stamp: float, least_output: int = 1) -> bool:
        """Whether a row was taken: one with an output of 0 tokens is not, where ``least_output`` lets it pass."""
        expected = TOKENS_EXPECTED if least_output else f"an integer from 0 to {MAX_TOKENS}"
        prompt = _integer(self._source, line, row, self._lengths[0], 1, MAX_TOKENS, TOKENS_EXPECTED)
        output = _integer(self._source, line, row, self._lengths[1], least_output, MAX_TOKENS, expected)
        ids = self._block_ids(line, row["hash_ids"], prompt) if "hash_ids" in row else ()
        if output == 0:
            return False
        self._ids.extend(ids)
        self._offsets.append(len(self._ids))
        self.stamps.append(stamp)
        self._prompts.append(prompt)
        self._outputs.append(output)
        return True

    def trace(
        self,
        source_format: str,
        ticks_per_s: int,
        dropped: dict[str, int],
        session: array[int],
        delay_s: array[float],
        names: tuple[str, ...],
    ) -> Trace:
        """The rows in order of their stamps; equal ones stay in the order of the file."""
        if not len(self):
            raise InputError(
                f"{self._source.path}: rows: found {dropped} dropped, expected at least one that can be replayed"
            )
        stamps = np.frombuffer(self.stamps)
        prefixes = sessions = None
        if self._ids:
            ids, offsets = (np.frombuffer(column, dtype=np.int64) for column in (self._ids, self._offsets))
            prefixes = Prefixes(ids, offsets, self._block_tokens)
        prompts, outputs = (np.frombuffer(column, dtype=np.int64) for column in (self._prompts, self._outputs))
        order: IntArray | slice = slice(None)
        if np.any(np.diff(stamps) < 0):
            order = np.argsort(stamps, kind="stable").astype(np.int64)
            prefixes = prefixes.take(order) if prefixes else None
        if names:
            sessions = Sessions.of(np.frombuffer(session, dtype=np.int64)[order], np.frombuffer(delay_s)[order], names)
        return Trace(
            name=self._source.name,
            arrival_s=(stamps[order] - stamps.min()) / ticks_per_s,
            prompt_len=prompts[order],
            output_len=outputs[order],
            source_format=source_format,
            rows_read=len(self) + sum(dropped.values()),
            dropped=dropped,
            sha256=self._source.sha256(),
            prefixes=prefixes,
            sessions=sessions,
        )

    def _block_ids(self, line: int, ids: object, prompt: int) -> list[int]:
        blocks = -(-prompt // self._block_tokens)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i <= MAX_INT64 for i in ids):
            self._source.refuse(line, "hash_ids", ids, f"a list of integers from 0 to {MAX_INT64}")
        if len(ids) != blocks:
            raise InputError(
                f"{self._source.path}: line {line}: hash_ids: found {len(ids)} ids, expected {blocks}, "
                f"one for every {self._block_tokens} of {prompt} tokens begun"
            )
        return ids


def read_mooncake(source: Source, lines: Lines) -> Trace:
    """One JSON object a row; ``timestamp`` in ms, ``hash_ids`` one id for every 512 tokens begun, or absent.

    With ``session_id`` a row is a turn: ``delay`` (or ``delay_ms``) is the time since the turn before had ended, and
    ``timestamp`` may be absent after the first turn; its arrival is then the earliest possible one, that delay after
    the arrival before. The rows of a file with sessions need to be in order within each session only.
    """
    rows = _Rows(source, MOONCAKE_BLOCK_TOKENS)
    session, delay_s = array("q"), array("d")
    numbers: dict[str, int] = {}
    last_ms: dict[int, float] = {}  # of every session, and of the rows without one under -1
    for line, text in lines:
        row = _object(source, line, text, MOONCAKE_FIELDS)
        name = _session_id(source, line, row)
        number = -1 if name is None else numbers.setdefault(name, len(numbers))
        before_ms = last_ms.get(number)
        delay_ms = _delay_ms(source, line, row, first=before_ms is None)
        if "timestamp" not in row and number >= 0 and before_ms is not None and delay_ms is not None:
            stamp_ms: float = before_ms + delay_ms
        else:
            stamp_ms = _integer(source, line, row, "timestamp", 0, _MAX_STAMP_MS, _STAMP_MS_EXPECTED)
        if before_ms is not None and stamp_ms < before_ms:
            above = "the row above's" if number < 0 else "the turn before's"
            source.refuse(line, "timestamp", row.get("timestamp"), f"at least {before_ms:.0f}, {above}")
        last_ms[number] = stamp_ms
        rows.add(line, row, stamp_ms)
        session.append(number)
        delay_s.append(math.nan if delay_ms is None else round(delay_ms / 1000, 9))
    return rows.trace(MOONCAKE, 1000, {}, session, delay_s, tuple(numbers))


def read_bailian(source: Source, lines: Lines) -> Trace:
    """One JSON object a row; ``timestamp`` in s, ``hash_ids`` one id for every 16 tokens begun, or absent.

    A request belongs to its parent's session, -1 marking a session's first. A parent that is not in the file was
    before the excerpt began: its children each begin a session. Rows without output tokens are dropped.
    """
    rows = _Rows(source, BAILIAN_BLOCK_TOKENS)
    session, delay_s = array("q"), array("d")
    session_of: dict[int, int] = {}
    names: list[str] = []
    dropped: dict[str, int] = {}
    last_s = 0.0
    for line, text in lines:
        row = _object(source, line, text, BAILIAN_FIELDS)
        chat = _integer(source, line, row, "chat_id", 0, MAX_INT64, f"an integer from 0 to {MAX_INT64}")
        parent = _integer(source, line, row, "parent_chat_id", -1, MAX_INT64, f"an integer from -1 to {MAX_INT64}")
        stamp_s = _number(source, line, row, "timestamp", MAX_STAMP_S, _STAMP_S_EXPECTED)
        if stamp_s < last_s:
            source.refuse(line, "timestamp", stamp_s, f"at least {last_s:.17g}, the row above's")
        if chat in session_of:
            source.refuse(line, "chat_id", chat, "one that no row above has")
        last_s = stamp_s
        if parent not in session_of:
            names.append(str(chat))
        session_of[chat] = session_of.get(parent, len(names) - 1)
        if rows.add(line, row, stamp_s, least_output=0):
            session.append(session_of[chat])
            delay_s.append(math.nan)  # the format does not say when a turn ended
        else:
            dropped["no output"] = dropped.get("no output", 0) + 1
    return rows.trace(BAILIAN, 1, dropped, session, delay_s, tuple(names))


def read_llmservingsim(source: Source, lines: Lines) -> Trace:
    """One JSON object a row: a request (``arrival_time_ns``), or a session with all its turns (``sub_requests``).

    A turn's ``tool_duration_ns`` is the time from its end to the next turn's start; the arrival of a later turn is the
    earliest possible one, so much after the arrival before. Each turn counts as a row read. Token ids are not used.
    """
    rows = _Rows(source, 1, ("input_toks", "output_toks"))
    session, delay_s = array("q"), array("d")
    names: dict[str, None] = {}

    def add(line: int, call: dict[str, Any], stamp_ns: float, number: int, delay_ns: float) -> None:
        rows.add(line, call, stamp_ns)
        session.append(number)
        delay_s.append(delay_ns / _NS_PER_S)

    for line, text in lines:
        row = _object(source, line, text, (*LLMSERVINGSIM_REQUEST, *LLMSERVINGSIM_SESSION[::2]))
        arrival_ns: float = _integer(source, line, row, "arrival_time_ns", 0, _MAX_STAMP_NS, _NS_EXPECTED)
        if "sub_requests" not in row:
            add(line, _only(source, line, row, LLMSERVINGSIM_REQUEST), arrival_ns, -1, math.nan)
            continue
        name = _session_id(source, line, _only(source, line, row, LLMSERVINGSIM_SESSION))
        if name is None:
            source.refuse(line, "session_id", name, "a text or an integer")
        if name in names:
            source.refuse(line, "session_id", name, "one that no row above has")
        names[name] = None
        turns, delay_ns = row["sub_requests"], math.nan
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            source.refuse(line, "sub_requests", turns, "a list of at least one JSON object")
        for turn in turns:
            _only(source, line, turn, LLMSERVINGSIM_TURN)
            add(line, turn, arrival_ns, len(names) - 1, delay_ns)
            delay_ns = _integer(source, line, turn, "tool_duration_ns", 0, _MAX_STAMP_NS, _NS_EXPECTED)
            arrival_ns += delay_ns
    return rows.trace(LLMSERVINGSIM, _NS_PER_S, {}, session, delay_s, tuple(names))


def _object(source: Source, line: int, text: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """A row's fields."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        source.refuse(line, "row", text, "one complete JSON object")
    if not isinstance(row, dict):
        source.refuse(line, "row", text, "one complete JSON object")
    return _only(source, line, row, fields)


def _only(source: Source, line: int, row: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """The row. Unknown fields are refused: they might change what it means."""
    unknown = [key for key in row if key not in fields]
    if unknown:
        source.refuse(line, "row", unknown[0], f"no field but {', '.join(fields)}")
    return row


def _session_id(source: Source, line: int, row: dict[str, Any]) -> str | None:
    found = row.get("session_id")
    if found is None:
        for field in ("delay", "delay_ms"):
            if row.get(field) is not None:
                source.refuse(line, "row", field, f"no field {field} without session_id")
        return None
    if type(found) not in (str, int) or found == "":
        source.refuse(line, "session_id", found, "a text or an integer")
    return str(found)


def _delay_ms(source: Source, line: int, row: dict[str, Any], first: bool) -> float | None:
    """The delay of a turn; a session's first one has none, and 0 says the same there."""
    given = [field for field in ("delay", "delay_ms") if row.get(field) is not None]
    if not given:
        return None
    if len(given) == 2:
        source.refuse(line, "delay_ms", row["delay_ms"], "either delay or delay_ms")
    delay_ms = _number(source, line, row, given[0], float(_MAX_STAMP_MS), _DELAY_EXPECTED)
    if first and delay_ms:
        source.refuse(line, given[0], row[given[0]], "none, or 0, in the first turn of a session")
    return None if first else delay_ms


def _integer(source: Source, line: int, row: dict[str, Any], field: str, low: int, high: int, expected: str) -> int:
    value = _value(source, line, row, field, expected)
    if type(value) is not int or not low <= value <= high:  # a bool is an int to isinstance
        source.refuse(line, field, value, expected)
    return value


def _number(source: Source, line: int, row: dict[str, Any], field: str, high: float, expected: str) -> float:
    """A number from 0 to ``high``; NaN and infinities, which Python's JSON knows, are outside."""
    value = _value(source, line, row, field, expected)
    if type(value) not in (int, float) or not 0 <= value <= high:
        source.refuse(line, field, value, expected)
    return float(value)


def _value(source: Source, line: int, row: dict[str, Any], field: str, expected: str) -> Any:
    if field not in row:
        raise InputError(f"{source.path}: line {line}: {field}: found no such field, expected {expected}")
    return row[field]
