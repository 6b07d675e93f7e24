"""A trace in memory: one array a field, and the operations that cut it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from semipd.core import FloatArray, InputError, IntArray, Request

MAX_TOKENS = 2**31 - 1
"""Longest prompt or output that a trace may hold, in tokens."""

_CHUNK = 1 << 16


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Block ids of every prompt, flattened: request i has ``ids[offsets[i] : offsets[i + 1]]``.

    Two prompts share a prefix as far as their ids agree; a block is ``block_tokens`` tokens, the last one of a
    prompt may be partial.
    """

    ids: IntArray
    offsets: IntArray
    block_tokens: int

    def take(self, rows: IntArray) -> Prefixes:
        """The prefixes of those requests, in that order."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
        return Prefixes(self.ids[np.repeat(self.offsets[:-1][rows], counts) + within], offsets, self.block_tokens)


@dataclass(frozen=True, eq=False)
class Sessions:
    """Which requests are turns of one session; every column has one entry a request.

    ``index``: number of the session, -1 for a request of none; ``names[index]`` is its id in the source.
    ``turn``: 0 for a session's first turn in this trace, then 1 and so on in order of arrival; 0 without session.
    ``delay_s``: seconds from the end of the turn before to the start of this one; NaN for a first turn, and where the
    source does not say: then the turn's arrival is all that is known of it.
    """

    index: IntArray
    turn: IntArray
    delay_s: FloatArray
    names: tuple[str, ...]

    @staticmethod
    def of(index: IntArray, delay_s: FloatArray, names: tuple[str, ...]) -> Sessions:
        """Sessions of requests in order of arrival: their turns are counted, and a first turn loses its delay."""
        turn = _occurrence(index)
        return Sessions(index, turn, np.where(turn > 0, delay_s, np.nan), names)

    def take(self, rows: IntArray) -> Sessions:
        """The sessions of those requests, turns counted anew."""
        return Sessions.of(self.index[rows], self.delay_s[rows], self.names)


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival; the first one arrives at 0 s.

    ``rows_read`` rows of the source, and ``added`` copies of them, are either here or counted in ``dropped`` under the
    reason why. ``sha256`` is that of the source file, None for a drawn trace. ``operations`` says in words what was
    done to the arrivals since they were read. Arrays are read-only copies. Raises ValueError when a column is empty,
    shorter than another, out of order or holds fewer than one token.
    """

    name: str
    arrival_s: FloatArray
    prompt_len: IntArray
    output_len: IntArray
    source_format: str
    rows_read: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    sha256: str | None = None
    prefixes: Prefixes | None = None
    sessions: Sessions | None = None
    added: int = 0
    operations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for column, dtype in (("arrival_s", np.float64), ("prompt_len", np.int64), ("output_len", np.int64)):
            values = np.array(getattr(self, column), dtype=dtype)
            values.setflags(write=False)
            object.__setattr__(self, column, values)
        n = len(self.arrival_s)
        if n == 0 or len(self.prompt_len) != n or len(self.output_len) != n:
            raise ValueError(
                f"columns of {n}, {len(self.prompt_len)}, {len(self.output_len)} rows: equal and not 0 needed"
            )
        if self.arrival_s[0] != 0 or not np.all(np.diff(self.arrival_s) >= 0) or self.arrival_s[-1] == math.inf:
            raise ValueError("arrival_s must start at 0, be finite and never go back")
        if self.prompt_len.min() < 1 or self.output_len.min() < 1:
            raise ValueError("prompt_len and output_len must be at least 1 token")
        if self.rows_read + self.added != n + sum(self.dropped.values()):
            raise ValueError(f"{self.rows_read} rows read + {self.added} are not {n} + {dict(self.dropped)} dropped")
        if self.prefixes is not None and len(self.prefixes.offsets) != n + 1:
            raise ValueError(f"prefixes.offsets has {len(self.prefixes.offsets)} entries, {n + 1} needed")
        if self.sessions is not None and not (
            len(self.sessions.index) == len(self.sessions.turn) == len(self.sessions.delay_s) == n
        ):
            raise ValueError(f"sessions has {len(self.sessions.index)} entries, {n} needed")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_s[-1])

    def requests(self) -> Iterator[Request]:
        """Every request, numbered from 0 in order of arrival."""
        for start in range(0, len(self), _CHUNK):  # lists of all rows at once would take ten times the columns
            yield from self._requests(start, min(start + _CHUNK, len(self)))

    def _requests(self, start: int, stop: int) -> Iterator[Request]:
        rows = slice(start, stop)
        columns = zip(
            range(start, stop),
            self.arrival_s[rows].tolist(),
            self.prompt_len[rows].tolist(),
            self.output_len[rows].tolist(),
            strict=True,
        )
        if self.prefixes is None:
            for i, arrival_s, prompt_len, output_len in columns:
                yield Request(i, arrival_s, prompt_len, output_len)
            return
        first = int(self.prefixes.offsets[start])
        offsets = (self.prefixes.offsets[start : stop + 1] - first).tolist()
        ids = self.prefixes.ids[first : first + offsets[-1]].tolist()
        for i, arrival_s, prompt_len, output_len in columns:
            blocks = tuple(ids[offsets[i - start] : offsets[i - start + 1]])
            size = self.prefixes.block_tokens if blocks else 0
            yield Request(i, arrival_s, prompt_len, output_len, blocks, size)


def head(trace: Trace, n: int, reason: str = "head") -> Trace:
    """The first ``n`` requests; the others are counted as dropped for ``reason``. Raises InputError for n < 1."""
    if n < 1:
        raise InputError(f"{trace.name}: number of requests: found {n}, expected at least 1")
    return take(trace, np.arange(min(n, len(trace))), reason)


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The requests that arrive in [start_s, end_s), the first of them now at 0 s; the others are dropped.

    Raises InputError when none arrives there, for a negative start and for an end that is not after it.
    """
    if not 0 <= start_s < end_s:
        raise InputError(
            f"{trace.name}: window: found {start_s:g} s to {end_s:g} s, expected 0 s or later to something after that"
        )
    start, stop = np.searchsorted(trace.arrival_s, (start_s, end_s), side="left").tolist()
    if not stop > start:
        raise InputError(
            f"{trace.name}: window {start_s:g} s to {end_s:g} s: found no arrival in it, expected a part of "
            f"0 to {trace.duration_s:g} s that has one"
        )
    return take(trace, np.arange(start, stop), "window")


def take(trace: Trace, rows: IntArray, reason: str) -> Trace:
    """Those requests, in ascending order, the first of them now at 0 s; the others are dropped for ``reason``."""
    dropped = dict(trace.dropped)
    lost = len(trace) - len(rows)
    if lost:
        dropped[reason] = dropped.get(reason, 0) + lost
    return replace(
        trace,
        arrival_s=trace.arrival_s[rows] - trace.arrival_s[rows[0]],
        prompt_len=trace.prompt_len[rows],
        output_len=trace.output_len[rows],
        dropped=dropped,
        prefixes=trace.prefixes.take(rows) if trace.prefixes else None,
        sessions=trace.sessions.take(rows) if trace.sessions else None,
    )


def _occurrence(index: IntArray) -> IntArray:
    """For each entry how many equal ones come before it; 0 for a negative one."""
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    begins = np.flatnonzero(np.concatenate((np.ones(min(len(index), 1), dtype=bool), ordered[1:] != ordered[:-1])))
    sizes = np.diff(np.append(begins, len(index)))
    occurrence = np.empty(len(index), dtype=np.int64)
    occurrence[order] = np.arange(len(index)) - np.repeat(begins, sizes)
    occurrence[index < 0] = 0
    return occurrence
