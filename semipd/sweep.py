"""Sweep tables: what was measured, where on the grid, with which spread, and by what.

A table is a CSV file of measured points beside a JSON file of the same name with its provenance. This module
needs no GPU: it places the points, judges which steps of a concurrent run count, and reads and writes tables.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, PrefillShape


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 10th and 90th percentile of one step's time in milliseconds, over ``steps`` measured steps."""

    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @staticmethod
    def of(times_ms: FloatArray) -> Spread:
        """Spread of measured step times. Raises ValueError when there is none."""
        if len(times_ms) == 0:
            raise ValueError("no measured step")
        p10, median, p90 = (round(float(x), 6) for x in np.percentile(times_ms, [10, 50, 90]))
        return Spread(len(times_ms), median, p10, p90)


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A prefill batch to measure: ``seqs`` prompts of ``seq_tokens`` new tokens after ``seq_context`` cached ones.

    ``tokens`` and ``mean_context`` are its place on the grid: the cost of a ragged batch is looked up by its
    new tokens and by the keys that a query attends to on average.
    """

    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int

    @staticmethod
    def at(tokens: int, mean_context: int) -> PrefillWork:
        """The batch that sits at a grid point: one prompt after cached context, or several short prompts.

        A prompt of q new tokens after c cached ones has a mean context of c + q / 2. Of prompts that are too long for
        the mean context there are as many more as it takes to make them short enough and equal. Raises InputError
        when no number from the fewest to twice as many deals them evenly.
        """
        most = 2 * mean_context
        if tokens <= most:
            return PrefillWork(tokens, mean_context, 1, tokens, mean_context - tokens // 2)
        fewest = -(-tokens // most)
        for seqs in range(fewest, 2 * fewest + 1):
            if tokens % (2 * seqs) == 0:
                each = tokens // seqs
                return PrefillWork(tokens, mean_context, seqs, each, mean_context - each // 2)
        raise InputError(
            f"prefill grid: tokens {tokens}: found no {fewest} to {2 * fewest} equal prompts of an even number of "
            f"tokens, at most twice the mean context {mean_context}; expected a number of tokens that can be dealt so"
        )

    @staticmethod
    def prompts(seqs: int, seq_tokens: int, seq_context: int = 0) -> PrefillWork:
        """A batch given by its prompts."""
        return PrefillWork(seqs * seq_tokens, seq_context + seq_tokens // 2, seqs, seq_tokens, seq_context)

    @property
    def shape(self) -> PrefillShape:
        """This batch as the cost model sees it."""
        return PrefillShape(self.tokens, float(self.tokens * self.mean_context))


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """A decode step to measure: ``batch`` sequences that share ``kv_tokens`` cached tokens, evenly by ``lengths``."""

    batch: int
    kv_tokens: int

    @property
    def shape(self) -> DecodeShape:
        """This batch as the cost model sees it."""
        return DecodeShape(self.batch, self.kv_tokens)

    def lengths(self) -> list[int]:
        """Cached tokens of each sequence; at least one each, their sum is ``kv_tokens`` where that allows."""
        low, more = divmod(max(self.kv_tokens, self.batch), self.batch)
        return [low + 1] * more + [low] * (self.batch - more)


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a measurement shares the device, and the SMs each phase may use.

    ``mode``: ``split`` (disjoint SMs), ``capped`` (prefill on a partition, decode on the whole device at high
    priority), ``priority`` (two plain streams, decode first), ``streams`` (two plain streams, equal), ``mixed`` (both
    in one fused step on the whole device) or ``in-turn`` (one phase after the other on the whole device).
    """

    mode: str
    prefill_sms: int
    decode_sms: int

    @property
    def name(self) -> str:
        """As in ``time_in_split``: ``64/68``, ``capped-64``, or the mode."""
        if self.mode == "split":
            return f"{self.prefill_sms}/{self.decode_sms}"
        return f"capped-{self.prefill_sms}" if self.mode == "capped" else self.mode


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """One row of a prefill table: a batch alone on a partition, milliseconds of one layer."""

    sms: int
    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int
    backend: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (self.sms, self.seqs, self.seq_tokens, self.seq_context, self.backend)


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """One row of a decode table: a batch alone on a partition, milliseconds of one layer of one step."""

    sms: int
    batch: int
    kv_tokens: int
    backend: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (self.sms, self.batch, self.kv_tokens, self.backend)


@dataclass(frozen=True, slots=True)
class HybridPoint:
    """One row of a hybrid table: steady-state contention, each phase's layer time while the other runs.

    ``mode`` is ``split``, ``capped``, ``priority`` or ``streams`` (two plain streams of equal priority).
    """

    mode: str
    prefill_sms: int
    decode_sms: int
    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int
    batch: int
    kv_tokens: int
    prefill_backend: str
    decode_backend: str
    prefill_steps: int
    prefill_median_ms: float
    prefill_p10_ms: float
    prefill_p90_ms: float
    decode_steps: int
    decode_median_ms: float
    decode_p10_ms: float
    decode_p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (
            self.mode, self.prefill_sms, self.decode_sms, self.seqs, self.seq_tokens, self.seq_context,
            self.batch, self.kv_tokens, self.prefill_backend, self.decode_backend,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MixedPoint:
    """One row of a mixed table: fused steps of a prefill chunk and a decode batch, on the whole device.

    Milliseconds are those of a whole step divided by the model's layers, as in the other tables.
    """

    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int
    batch: int
    kv_tokens: int
    backend: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (self.seqs, self.seq_tokens, self.seq_context, self.batch, self.kv_tokens, self.backend)


@dataclass(frozen=True, slots=True)
class TotalPoint:
    """One row of a fixed-work table: so many prefill and decode steps, started together or in turn.

    ``mode`` is one of HybridPoint's or ``in-turn``; ``prefill_ms`` and ``decode_ms`` are when each phase had
    finished, ``total_ms`` when both had (median over ``runs``, with p10 and p90 of the total).
    """

    mode: str
    prefill_sms: int
    decode_sms: int
    prefill_backend: str
    decode_backend: str
    prefill_steps: int
    decode_steps: int
    runs: int
    prefill_ms: float
    decode_ms: float
    total_ms: float
    total_p10_ms: float
    total_p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (
            self.mode, self.prefill_sms, self.decode_sms, self.prefill_backend, self.decode_backend,
            self.prefill_steps, self.decode_steps,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HoldoutPoint:
    """One row of held-out measurements: a ragged batch of ``phase``, milliseconds of one layer.

    ``new_tokens`` and ``context_lens``, of each prompt, and ``decode_lens``, of each decoding sequence what its new
    token attends to, are numbers with blanks between them, or ``-`` where that phase is idle. Where neither is, the row
    is what a layer of ``phase`` takes while the other one runs; or, with ``mixed``, a layer of the fused batch.
    """

    phase: str
    mode: str
    prefill_sms: int
    decode_sms: int
    new_tokens: str
    context_lens: str
    decode_lens: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (
            self.phase, self.mode, self.prefill_sms, self.decode_sms, self.new_tokens, self.context_lens,
            self.decode_lens,
        )  # fmt: skip


Point = TypeVar("Point", PrefillPoint, DecodePoint, HybridPoint, MixedPoint, TotalPoint, HoldoutPoint)


@dataclass(frozen=True)
class SweepTable(Generic[Point]):
    """Measured points with the provenance of the measurement (GPU, driver, clocks, versions, commit, command)."""

    points: tuple[Point, ...]
    provenance: dict[str, object]


def read_table(path: Path, cls: type[Point]) -> SweepTable[Point]:
    """Read a table and its provenance.

    Raises InputError naming the file, row and field of whatever is missing, malformed or not finite and
    positive where it must be.
    """
    points = tuple(read_points(path, cls))
    if not points:
        raise InputError(f"{path}: no measured points; expected at least one row after the header")
    return SweepTable(points, read_provenance(path))


def provenance_path(path: Path) -> Path:
    """The JSON file beside a table that says how it was measured."""
    return path.with_suffix(".json")


def read_provenance(path: Path) -> dict[str, object]:
    """Provenance of the table at ``path``. Raises InputError when it is missing or no JSON object."""
    beside = provenance_path(path)
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{beside}: not found; expected the provenance of {path.name} beside it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{beside}: not JSON ({error}); expected the provenance of {path.name}") from None
    if not isinstance(found, dict):
        raise InputError(f"{beside}: found {type(found).__name__}; expected a JSON object")
    return found


def read_points(path: Path, cls: type[Point]) -> list[Point]:
    """Rows of a table. Raises InputError as ``read_table`` does; a file with a header only is an empty list."""
    kinds = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            if header != names:
                raise InputError(
                    f"{path}: row 1: found columns {','.join(header or []) or 'none'}; expected {','.join(names)}"
                )
            points = [_point(path, reader.line_num, row, names, kinds, cls) for row in reader]
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected a sweep table") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a sweep table") from None
    except csv.Error as error:
        raise InputError(f"{path}: row {reader.line_num}: not CSV ({error}); expected a sweep table") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); expected a sweep table") from None
    seen: dict[tuple[object, ...], int] = {}
    for row, point in enumerate(points, 2):
        if point.key in seen:
            raise InputError(f"{path}: row {row}: the point of row {seen[point.key]} again; expected each point once")
        seen[point.key] = row
    return points


def _point(path: Path, line: int, row: list[str], names: list[str], kinds: dict[str, type], cls: type[Point]) -> Point:
    if len(row) != len(names):
        raise InputError(f"{path}: row {line}: found {len(row)} fields; expected {len(names)}")
    values = {name: _value(path, line, name, text, kinds[name]) for name, text in zip(names, row, strict=True)}
    return cls(**values)


def _value(path: Path, line: int, name: str, text: str, kind: type) -> typing.Any:
    """What one field says."""
    if kind is str:
        if not text:
            _refuse(path, line, name, text, "a name")
        return text
    try:
        number = kind(text.replace("_", "?"))  # Python would read 1_000
        finite = math.isfinite(number)
    except (ValueError, OverflowError):
        _refuse(path, line, name, text, "an integer" if kind is int else "a number")
    may_be_zero = name in ("seq_context", "mean_context")
    if not finite or number < 0 or (number == 0 and not may_be_zero):
        _refuse(path, line, name, text, "zero or more" if may_be_zero else "more than zero")
    return number


def _refuse(path: Path, line: int, name: str, text: str, expected: str) -> typing.NoReturn:
    raise InputError(f"{path}: row {line}: {name}: found {text!r}; expected {expected}") from None


RESUMED = ("command", "commit", "date", "driver_version", "torch", "flashinfer", "settle_ms", "rest_ms")
"""What the provenance says again of every resumption."""


class TableWriter(Generic[Point]):
    """Appends points to a table as they are measured, so that an interrupt loses nothing.

    With ``resume`` the points already in the file are kept and known by their keys; without it an existing
    file is refused with InputError. Every row is on disk when ``add`` returns; the provenance lists every resumption.
    """

    def __init__(self, path: Path, cls: type[Point], provenance: dict[str, object], *, resume: bool = False) -> None:
        self._names = [field.name for field in dataclasses.fields(cls)]
        self.path = path
        self.points: list[Point] = []
        if path.exists():
            if not resume:
                raise InputError(f"{path}: exists; expected a new file, or --resume to go on with it")
            self._drop_torn_row()
            if path.stat().st_size:  # else the interrupt came before the header was whole
                self.points = read_points(path, cls)
            if self.points:
                self._resume(provenance)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.points:
            path.write_text(",".join(self._names) + "\n", encoding="utf-8")
            self._write_provenance(provenance)
        self._done = {point.key for point in self.points}

    def _drop_torn_row(self) -> None:
        """Cut a last row that an interrupt left without its line end, the header too; a file of others is kept."""
        text = self.path.read_bytes()
        header = ",".join(self._names).encode()
        if not text.endswith(b"\n") and (b"\n" in text or header.startswith(text)):
            self.path.write_bytes(text[: text.rfind(b"\n") + 1])

    def _resume(self, provenance: dict[str, object]) -> None:
        """Note in the provenance by which command, commit and date the table goes on."""
        before = read_provenance(self.path)
        for name in ("gpu", "device_sms", "work"):
            if before.get(name) != provenance.get(name):
                raise InputError(
                    f"{provenance_path(self.path)}: {name}: found {before.get(name)!r}; expected "
                    f"{provenance.get(name)!r} to resume (use another --out for other work)"
                )
        resumed = before.setdefault("resumed", [])
        if isinstance(resumed, list):
            resumed.append({name: provenance[name] for name in RESUMED if name in provenance})
        self._write_provenance(before)

    def _write_provenance(self, provenance: dict[str, object]) -> None:
        text = json.dumps(provenance, indent=1, sort_keys=True)
        provenance_path(self.path).write_text(text + "\n", encoding="utf-8")

    def note(self, observed: dict[str, object]) -> None:
        """Add to the provenance what was seen while measuring."""
        if observed:
            self._write_provenance(read_provenance(self.path) | observed)

    def has(self, key: tuple[object, ...]) -> bool:
        """Whether the point of this key has been measured."""
        return key in self._done

    def add(self, *points: Point) -> None:
        """Append points, in one go: an interrupt leaves all of them or none."""
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows(map(dataclasses.astuple, points))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(rows.getvalue())
        self.points += points
        self._done.update(point.key for point in points)


def partition_counts(device_sms: int, step_sms: int) -> list[int]:
    """SM counts of a sweep: the multiples of ``step_sms`` from 8 on, and the whole device last."""
    return [*range(_least(step_sms), device_sms, step_sms), device_sms]


def splits_of(device_sms: int, step_sms: int) -> list[Allocation]:
    """The disjoint splits of a sweep, by ascending prefill SMs."""
    return [Allocation(Mode.SPLIT, n, device_sms - n) for n in range(_least(step_sms), device_sms, step_sms)]


def _least(step_sms: int) -> int:
    return -(-8 // step_sms) * step_sms


def grid(tokens: Sequence[int], mean_contexts: Sequence[int]) -> list[PrefillWork]:
    """Every prefill batch of a rectangular grid, cheapest first."""
    works = [PrefillWork.at(t, m) for t in tokens for m in mean_contexts]
    return sorted(works, key=lambda work: work.tokens * work.mean_context)


def decode_grid(batches: Sequence[int], kv_tokens: Iterable[int]) -> list[DecodeWork]:
    """Every decode batch of a rectangular grid, cheapest first."""
    return sorted((DecodeWork(b, t) for t in kv_tokens for b in batches), key=lambda work: work.kv_tokens)
