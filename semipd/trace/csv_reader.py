"""CSV traces: a declarative map of columns for each format, and one reader for all of them.

Formats: Azure (github.com/Azure/AzurePublicDataset), BurstGPT (github.com/HPMLL/BurstGPT, arXiv 2401.17644), vidur
(github.com/microsoft/vidur) and splitwise-sim (github.com/Mutinifni/splitwise-sim).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np

from semipd.core import InputError
from semipd.trace.columns import MAX_TOKENS, Sessions, Trace
from semipd.trace.source import TOKENS_EXPECTED, Source

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_TICKS_PER_S = 10**7
"""Azure 2023 stamps have seven fractional digits: 100 ns."""

MAX_STAMP_S = 1e11
"""Latest time stamp that is read, in seconds."""

Lines: TypeAlias = Iterator[tuple[int, str]]
Stamp: TypeAlias = Callable[[int, str, str], float]
"""(line, field, text) to a time stamp in ticks."""

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,7}))?(\+00:00)?", re.ASCII)
_STAMP_EXPECTED = "YYYY-MM-DD HH:MM:SS with up to 7 decimals and no offset or +00:00"
_DECIMAL = re.compile(r"\d{1,20}(?:\.\d{0,30})?(?:[eE][+-]?\d{1,3})?", re.ASCII)
_DECIMAL_EXPECTED = f"a number of seconds from 0 to {MAX_STAMP_S:g}"


@dataclass(frozen=True)
class CsvFormat:
    """Names of the columns of a format, in the words of its source.

    Without ``arrival`` the file is a pool of lengths: every request arrives at 0 s. ``others`` are columns that may
    be there and are not used. ``session`` and ``elapsed`` name the session's id, blank for none, and the seconds
    that its turn took. A row with a count of 0 is dropped for ``no_tokens``, and refused where that is None. A row
    whose value in a column of ``only`` is another one is dropped for that column's name.
    """

    name: str
    arrival: str | None
    prompt: str
    output: str
    others: frozenset[str] = frozenset()
    session: str | None = None
    elapsed: str | None = None
    no_tokens: str | None = None
    only: dict[str, str] = field(default_factory=dict)
    azure_stamps: bool = False

    @property
    def header(self) -> str:
        """The columns that must be there."""
        return ",".join(self.required)

    @property
    def required(self) -> list[str]:
        """The same, one by one."""
        return [c for c in (self.arrival, *self.only, self.prompt, self.output) if c is not None]

    @property
    def known(self) -> set[str]:
        """All columns that may be there."""
        return {c for c in (*self.required, self.session, self.elapsed, *self.others) if c is not None}

    def matches(self, header: str) -> bool:
        """Whether a file with this header is of this format."""
        return set(self.required) <= set(header.split(","))


AZURE = CsvFormat("azure-csv", "TIMESTAMP", "ContextTokens", "GeneratedTokens", azure_stamps=True)
BURSTGPT = CsvFormat(
    "burstgpt-csv",
    "Timestamp",
    "Request tokens",
    "Response tokens",
    others=frozenset({"Model", "Total tokens", "Log Type"}),
    session="Session ID",
    elapsed="Elapsed time",
    no_tokens="failed",  # the source's README: failures are the rows without response tokens
)
SPLITWISE = CsvFormat(
    "splitwise-csv",
    "arrival_timestamp",
    "prompt_size",
    "token_size",
    others=frozenset({"request_id", "application_id"}),
    only={"request_type": "2", "batch_size": "1"},  # 2: generation by a language model
)
VIDUR = CsvFormat(
    "vidur-csv",
    "arrived_at",
    "num_prefill_tokens",
    "num_decode_tokens",
    others=frozenset({"num_total_tokens", "pd_ratio"}),
)
VIDUR_LENGTHS = CsvFormat(
    "vidur-csv",
    None,
    "num_prefill_tokens",
    "num_decode_tokens",
    others=frozenset({"num_total_tokens", "pd_ratio"}),
)
CSV_FORMATS = (AZURE, BURSTGPT, SPLITWISE, VIDUR, VIDUR_LENGTHS)


def read_csv(source: Source, lines: Lines, form: CsvFormat) -> Trace:
    """Every row of a CSV trace, in the order of its time stamps."""
    line, header = next(lines)
    at = _columns(source, header, form)
    prompt_at, output_at = at[form.prompt], at[form.output]
    arrival_at = at[form.arrival] if form.arrival else None
    session_at = at.get(form.session) if form.session else None
    stamp_of = _azure_stamp(source) if form.azure_stamps else _decimal(source)
    stamps: array[Any] = array("q" if form.azure_stamps else "d")  # Azure's ticks are more than a double holds
    prompts, outputs = array("q"), array("q")
    turns = _Turns(source)
    dropped: dict[str, int] = {}
    last = -math.inf
    for line, text in lines:
        row = text.split(",")
        if len(row) != len(at):
            source.refuse(line, "row", text, f"{len(at)} fields, {header}")
        stamp = 0.0
        if arrival_at is not None and form.arrival:
            stamp = stamp_of(line, form.arrival, row[arrival_at])
            if stamp < last:
                source.refuse(line, form.arrival, row[arrival_at], "a stamp not before the row above's")
            last = stamp
        prompt = _tokens(source, line, form, form.prompt, row[prompt_at])
        output = _tokens(source, line, form, form.output, row[output_at])
        reason = next((column for column, value in form.only.items() if row[at[column]] != value), None)
        if prompt == 0 or output == 0:
            reason = form.no_tokens
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        stamps.append(stamp)
        prompts.append(prompt)
        outputs.append(output)
        if session_at is not None and form.elapsed:
            turns.add(line, stamp, row[session_at], form.elapsed, row[at[form.elapsed]])
    if not stamps:
        _refuse_no_rows(source, line, dropped)
    since_first = np.array(stamps) - stamps[0]
    return Trace(
        name=source.name,
        arrival_s=since_first / (AZURE_TICKS_PER_S if form.azure_stamps else 1),
        prompt_len=np.array(prompts),
        output_len=np.array(outputs),
        source_format=form.name,
        rows_read=len(stamps) + sum(dropped.values()),
        dropped=dropped,
        sha256=source.sha256(),
        sessions=turns.sessions(),
        operations=() if form.arrival else ("no arrivals in the source: all at 0 s",),
    )


class _Turns:
    """Sessions as their turns are read: the delay is what passed since the turn before had ended."""

    def __init__(self, source: Source) -> None:
        self._seconds = _decimal(source)
        self._index, self._delay_s = array("q"), array("d")
        self._numbers: dict[str, int] = {}
        self._end_s = array("d")

    def add(self, line: int, stamp_s: float, session: str, field: str, elapsed: str) -> None:
        if not session:
            self._index.append(-1)
            self._delay_s.append(math.nan)
            return
        end_s = stamp_s + self._seconds(line, field, elapsed)
        number = self._numbers.setdefault(session, len(self._numbers))
        self._index.append(number)
        if number == len(self._end_s):
            self._end_s.append(end_s)
            self._delay_s.append(math.nan)
        else:  # a turn may be sent before the last one has ended
            self._delay_s.append(max(0.0, stamp_s - self._end_s[number]))
            self._end_s[number] = end_s

    def sessions(self) -> Sessions | None:
        if not self._numbers:
            return None
        return Sessions.of(np.array(self._index), np.array(self._delay_s), tuple(self._numbers))


def _columns(source: Source, header: str, form: CsvFormat) -> dict[str, int]:
    """Where each column is. Azure's are these three in this order, the others go by name."""
    names = header.split(",")
    known = form.known
    exact = form is AZURE and header != AZURE_HEADER
    if exact or not form.matches(header) or not set(names) <= known or len(set(names)) != len(names):
        more = ",".join(sorted(known - set(form.required)))
        source.refuse(1, "header", header, form.header + (f", with or without {more}" if more else ""))
    if form.session in names and form.elapsed not in names:
        source.refuse(1, "header", header, f"{form.elapsed} beside {form.session}")
    return {name: i for i, name in enumerate(names)}


def _tokens(source: Source, line: int, form: CsvFormat, field: str, text: str) -> int:
    """A token count: digits alone, since ``int`` would also take ' 7', '+7', '1_0' and other scripts' digits."""
    least = 1 if form.no_tokens is None else 0
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) <= MAX_TOKENS):
        source.refuse(line, field, text, TOKENS_EXPECTED if least else f"an integer from 0 to {MAX_TOKENS}")
    return int(text)


def _decimal(source: Source) -> Stamp:
    """Reads plain seconds."""

    def parse(line: int, field: str, text: str) -> float:
        if _DECIMAL.fullmatch(text) is None or not float(text) <= MAX_STAMP_S:
            source.refuse(line, field, text, _DECIMAL_EXPECTED)
        return float(text)

    return parse


def _azure_stamp(source: Source) -> Stamp:
    """Reads Azure's dates as whole ticks, exactly; all with an offset, or none."""
    first_zone: str | None = None
    last_seconds, last_ticks = "", 0  # most rows share their second with the one above

    def parse(line: int, field: str, text: str) -> int:
        nonlocal first_zone, last_seconds, last_ticks
        match = _STAMP.fullmatch(text)
        if match is None:
            source.refuse(line, field, text, _STAMP_EXPECTED)
        seconds, fraction, zone = match.groups(default="")
        if seconds != last_seconds:
            try:
                whole = datetime.fromisoformat(seconds) - datetime(1970, 1, 1)  # both naive: no local zone comes in
            except ValueError:
                source.refuse(line, field, text, _STAMP_EXPECTED)
            last_seconds, last_ticks = seconds, (whole.days * 86_400 + whole.seconds) * AZURE_TICKS_PER_S
        if first_zone not in (None, zone):
            source.refuse(line, field, text, "all stamps with +00:00, or none")
        first_zone = zone
        return last_ticks + int(fraction.ljust(7, "0"))

    return parse


def _refuse_no_rows(source: Source, line: int, dropped: dict[str, int]) -> None:
    if dropped:
        reasons = ", ".join(f"{n} dropped ({reason})" for reason, n in dropped.items())
        raise InputError(f"{source.path}: rows: found {reasons}, expected at least one that can be replayed")
    raise InputError(
        f"{source.path}: line {line + 1}: found the end of the file, expected at least one row after the header"
    )


def csv_format(header: str, name: str | None = None) -> CsvFormat | None:
    """The format whose columns a header has; of those of a name, when it is given, else the first of them."""
    forms = [form for form in CSV_FORMATS if name in (None, form.name)]
    return next((form for form in forms if form.matches(header)), forms[0] if name and forms else None)
