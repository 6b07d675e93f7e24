"""CSV traces: a declarative map of columns for each format, and one reader for all of them.

Formats: Azure (github.com/Azure/AzurePublicDataset), BurstGPT (github.com/HPMLL/BurstGPT, arXiv 2401.17644), vidur
(github.com/microsoft/vidur) and splitwise-sim (github.com/Mutinifni/splitwise-sim).
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, Protocol, TypeAlias

import numpy as np

from semipd.core import FloatArray, InputError, IntArray
from semipd.trace.columns import MAX_TOKENS, Sessions, Trace
from semipd.trace.source import TOKENS_EXPECTED, Source

AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_TICKS_PER_S = 10**7
"""Azure 2023 stamps have seven fractional digits: 100 ns."""

MAX_STAMP_S = 1e11
"""Latest time stamp that is read, in seconds."""

Lines: TypeAlias = Iterator[tuple[int, str]]

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.(\d{1,7}))?(\+00:00)?", re.ASCII)
_YEAR_1_S = -62_135_596_800
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


BLOCK_ROWS = 4096
"""Rows that are looked at together."""


def read_csv(source: Source, lines: Lines, form: CsvFormat) -> Trace:
    """Every row of a CSV trace, in the order of its time stamps."""
    _, header = next(lines)
    rows = _Rows(source, header, form)
    while block := list(islice(lines, BLOCK_ROWS)):
        if not rows.add_plain([text for _, text in block]):
            for line, text in block:
                rows.add(line, text)
    return rows.trace()


def _ticks_in_s(ticks: IntArray) -> FloatArray:
    """Seconds of Azure's ticks, of which a double holds those of 28 years."""
    if ticks.max() < 2**53:
        direct: FloatArray = ticks / AZURE_TICKS_PER_S
        return direct
    whole, rest = np.divmod(ticks, AZURE_TICKS_PER_S)
    summed: FloatArray = whole + rest / AZURE_TICKS_PER_S
    return summed


class _Rows:
    """The columns of a CSV trace, as its rows are read."""

    def __init__(self, source: Source, header: str, form: CsvFormat) -> None:
        self._source, self._header, self._form = source, header, form
        self._at = _columns(source, header, form)
        self._clock: _Clock = _AzureClock(source) if form.azure_stamps else _SecondsClock(source)
        self._stamps: array[Any] = array(
            "q" if form.azure_stamps else "d"
        )  # Azure's ticks are more than a double holds
        self._prompts, self._outputs = array("q"), array("q")
        self._turns = _Turns(source)
        self._dropped: dict[str, int] = {}
        self._last_stamp = -math.inf
        self._read = 0

    def add_plain(self, texts: list[str]) -> bool:
        """Take many rows a column at a time; False, and none is taken, if one may have to be dropped or refused."""
        form, at = self._form, self._at
        rows = [text.split(",") for text in texts]
        if form.session in at or set(map(len, rows)) != {len(at)}:
            return False
        columns = list(zip(*rows, strict=True))
        if any(set(columns[at[name]]) != {value} for name, value in form.only.items()):
            return False
        prompts, outputs = (_all_counts(columns[at[name]]) for name in (form.prompt, form.output))
        stamps = np.zeros(len(rows)) if form.arrival is None else self._clock.all(columns[at[form.arrival]])
        if stamps is None or prompts is None or outputs is None:
            return False
        if stamps[0] < self._last_stamp or np.any(stamps[1:] < stamps[:-1]):
            return False
        self._stamps.frombytes(stamps.tobytes())
        self._prompts.frombytes(prompts.tobytes())
        self._outputs.frombytes(outputs.tobytes())
        self._last_stamp = self._stamps[-1]
        self._read += len(rows)
        return True

    def add(self, line: int, text: str) -> None:
        """Take or drop a row. Raises InputError with the first thing that is wrong with it."""
        source, form, at = self._source, self._form, self._at
        row = text.split(",")
        if len(row) != len(at):
            source.refuse(line, "row", text, f"{len(at)} fields, {self._header}")
        stamp = 0.0
        if form.arrival:
            stamp = self._clock.one(line, form.arrival, row[at[form.arrival]])
            if stamp < self._last_stamp:
                source.refuse(line, form.arrival, row[at[form.arrival]], "a stamp not before the row above's")
            self._last_stamp = stamp
        prompt = _tokens(source, line, form, form.prompt, row[at[form.prompt]])
        output = _tokens(source, line, form, form.output, row[at[form.output]])
        self._read += 1
        reason = next((column for column, value in form.only.items() if row[at[column]] != value), None)
        if prompt == 0 or output == 0:
            reason = form.no_tokens
        if reason is not None:
            self._dropped[reason] = self._dropped.get(reason, 0) + 1
            return
        self._stamps.append(stamp)
        self._prompts.append(prompt)
        self._outputs.append(output)
        if form.session in at and form.elapsed:
            self._turns.add(line, stamp, row[at[form.session]], form.elapsed, row[at[form.elapsed]])

    def trace(self) -> Trace:
        """All rows. Raises InputError without any."""
        if not self._stamps:
            _refuse_no_rows(self._source, 1 + self._read, self._dropped)
        since_first = np.array(self._stamps) - self._stamps[0]
        return Trace(
            name=self._source.name,
            arrival_s=_ticks_in_s(since_first) if self._form.azure_stamps else since_first,
            prompt_len=np.array(self._prompts),
            output_len=np.array(self._outputs),
            source_format=self._form.name,
            rows_read=self._read,
            dropped=self._dropped,
            sha256=self._source.sha256(),
            sessions=self._turns.sessions(),
            operations=() if self._form.arrival else ("no arrivals in the source: all at 0 s",),
        )


class _Turns:
    """Sessions as their turns are read: the delay is what passed since the turn before had ended."""

    def __init__(self, source: Source) -> None:
        self._seconds = _SecondsClock(source)
        self._index, self._delay_s = array("q"), array("d")
        self._numbers: dict[str, int] = {}
        self._end_s = array("d")

    def add(self, line: int, stamp_s: float, session: str, field: str, elapsed: str) -> None:
        if not session:
            self._index.append(-1)
            self._delay_s.append(math.nan)
            return
        end_s = stamp_s + self._seconds.one(line, field, elapsed)
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


def _all_counts(texts: Sequence[str]) -> IntArray | None:
    """A column of token counts of at least 1, None if one is something else."""
    digits = "".join(texts)
    if not (digits.isascii() and digits.isdigit() and "" not in texts and max(map(len, texts)) <= 10):
        return None
    counts = np.fromiter(map(int, texts), np.int64, len(texts))
    return counts if counts.min() >= 1 and counts.max() <= MAX_TOKENS else None


class _Clock(Protocol):
    """Reads the time stamps of a file, in ticks."""

    def one(self, line: int, field: str, text: str) -> float:
        """One of them. Raises InputError for what is none."""
        ...

    def all(self, texts: Sequence[str]) -> FloatArray | IntArray | None:
        """A column of them, None if one of them is not right."""
        ...


class _SecondsClock:
    """Reads plain seconds."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def one(self, line: int, field: str, text: str) -> float:
        if _DECIMAL.fullmatch(text) is None or not float(text) <= MAX_STAMP_S:
            self._source.refuse(line, field, text, _DECIMAL_EXPECTED)
        return float(text)

    def all(self, texts: Sequence[str]) -> FloatArray | None:
        if None in map(_DECIMAL.fullmatch, texts):
            return None
        seconds = np.fromiter(map(float, texts), np.float64, len(texts))
        return seconds if seconds.max() <= MAX_STAMP_S else None


class _AzureClock:
    """Reads Azure's dates as whole ticks, exactly; all with an offset, or none."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._zone: str | None = None  # of the first stamp

    def one(self, line: int, field: str, text: str) -> int:
        match = _STAMP.fullmatch(text)
        if match is None:
            self._source.refuse(line, field, text, _STAMP_EXPECTED)
        seconds, fraction, zone = match.groups(default="")
        try:
            whole = datetime.fromisoformat(seconds) - datetime(1970, 1, 1)  # both naive: no local zone comes in
        except ValueError:
            self._source.refuse(line, field, text, _STAMP_EXPECTED)
        if self._zone not in (None, zone):
            self._source.refuse(line, field, text, "all stamps with +00:00, or none")
        self._zone = zone
        return (whole.days * 86_400 + whole.seconds) * AZURE_TICKS_PER_S + int(fraction.ljust(7, "0"))

    def all(self, texts: Sequence[str]) -> IntArray | None:
        matches = list(map(_STAMP.fullmatch, texts))
        if None in matches:
            return None
        seconds, fractions, zones = zip(*(match.groups("") for match in matches if match), strict=True)
        zone = zones[0] if self._zone is None else self._zone
        if set(zones) != {zone}:
            return None
        try:
            whole = np.array(seconds, dtype="datetime64[s]").astype(np.int64)
        except ValueError:
            return None
        if whole.min() < _YEAR_1_S:  # numpy knows a year 0
            return None
        self._zone = zone
        parts = np.fromiter((int(fraction.ljust(7, "0")) for fraction in fractions), np.int64, len(texts))
        return whole * AZURE_TICKS_PER_S + parts


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
