"""A trace in memory: one array a field, and the operations that cut or warp it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from semipd.core import FloatArray, InputError, IntArray, Request

MAX_TOKENS = 2**31 - 1
"""Longest prompt or output that a trace may hold, in tokens."""

MAX_RATE_SCALE = 1e6
"""Rates may be scaled by this factor, up or down."""


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Block ids of every prompt, flattened: request i has ``ids[offsets[i] : offsets[i + 1]]``.

    Two prompts share a prefix as far as their ids agree; a block is ``block_tokens`` tokens, the last one of a
    prompt may be partial.
    """

    ids: IntArray
    offsets: IntArray
    block_tokens: int

    def cut(self, start: int, stop: int) -> Prefixes:
        """The prefixes of requests ``start`` to ``stop`` (exclusive)."""
        first, last = self.offsets[start], self.offsets[stop]
        return Prefixes(self.ids[first:last], self.offsets[start : stop + 1] - first, self.block_tokens)


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival; the first one arrives at 0 s.

    ``rows_read`` rows of the source are either here or counted in ``dropped`` under the reason why. ``sha256`` is
    that of the source file, None for a drawn trace. Arrays are read-only copies. Raises ValueError when a column is
    empty, shorter than another, out of order or holds fewer than one token.
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
        if self.rows_read != n + sum(self.dropped.values()):
            raise ValueError(f"{self.rows_read} rows read are not {n} + {dict(self.dropped)} dropped")
        if self.prefixes is not None and len(self.prefixes.offsets) != n + 1:
            raise ValueError(f"prefixes.offsets has {len(self.prefixes.offsets)} entries, {n + 1} needed")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival_s[-1])

    def requests(self) -> Iterator[Request]:
        """Every request, numbered from 0 in order of arrival."""
        columns = zip(self.arrival_s.tolist(), self.prompt_len.tolist(), self.output_len.tolist(), strict=True)
        if self.prefixes is None:
            for i, (arrival_s, prompt_len, output_len) in enumerate(columns):
                yield Request(i, arrival_s, prompt_len, output_len)
            return
        ids, offsets = self.prefixes.ids.tolist(), self.prefixes.offsets.tolist()
        for i, (arrival_s, prompt_len, output_len) in enumerate(columns):
            blocks = tuple(ids[offsets[i] : offsets[i + 1]])
            size = self.prefixes.block_tokens if blocks else 0
            yield Request(i, arrival_s, prompt_len, output_len, blocks, size)


def head(trace: Trace, n: int, reason: str = "head") -> Trace:
    """The first ``n`` requests; the others are counted as dropped for ``reason``. Raises InputError for n < 1."""
    if n < 1:
        raise InputError(f"{trace.name}: number of requests: found {n}, expected at least 1")
    return _cut(trace, 0, min(n, len(trace)), reason)


def window(trace: Trace, start_s: float, end_s: float) -> Trace:
    """The requests that arrive in [start_s, end_s), the first of them now at 0 s; the others are dropped.

    Raises InputError when none arrives there.
    """
    start, stop = np.searchsorted(trace.arrival_s, (start_s, end_s), side="left").tolist()
    if not stop > start:
        raise InputError(
            f"{trace.name}: window {start_s:g} s to {end_s:g} s: found no arrival in it, expected a part of "
            f"0 to {trace.duration_s:g} s that has one"
        )
    return _cut(trace, start, stop, "window")


def scale_rate(trace: Trace, factor: float) -> Trace:
    """Time warp: every arrival divided by ``factor``, so 2 gives twice the rate in half the time.

    Order and the coefficient of variation of the gaps stay; rate changes, think times and the daily shape are
    compressed with the rest. Raises InputError for a factor outside 1e-6 to 1e6.
    """
    check_rate_scale(trace.name, factor)
    return replace(trace, arrival_s=trace.arrival_s / factor)


def check_rate_scale(name: str, factor: float) -> None:
    """Raises InputError for a factor outside 1e-6 to 1e6."""
    if not 1 / MAX_RATE_SCALE <= factor <= MAX_RATE_SCALE:
        raise InputError(f"{name}: rate scale: found {factor:g}, expected {1 / MAX_RATE_SCALE:g} to {MAX_RATE_SCALE:g}")


def _cut(trace: Trace, start: int, stop: int, reason: str) -> Trace:
    """Requests ``start`` to ``stop`` (exclusive), re-based to 0 s, the others counted under ``reason``."""
    lost = len(trace) - (stop - start)
    dropped = dict(trace.dropped)
    if lost:
        dropped[reason] = dropped.get(reason, 0) + lost
    return replace(
        trace,
        arrival_s=trace.arrival_s[start:stop] - trace.arrival_s[start],
        prompt_len=trace.prompt_len[start:stop],
        output_len=trace.output_len[start:stop],
        dropped=dropped,
        prefixes=trace.prefixes.cut(start, stop) if trace.prefixes else None,
    )
