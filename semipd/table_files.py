"""Tables of measured points as files: CSV, beside JSON of the same name with its provenance."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from semipd.core import InputError
from semipd.points import Point


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
