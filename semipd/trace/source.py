"""A trace file as it is read: plain or gzipped, line by line, with its SHA-256, and how it is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

from semipd.core import InputError
from semipd.trace.columns import MAX_TOKENS

TOKENS_EXPECTED = f"an integer from 1 to {MAX_TOKENS}"
MAX_INT64 = 2**63 - 1

MAX_LINE_BYTES = 1 << 26
"""Longest line that is read: the block ids of the longest prompt take half of it."""

_CHUNK = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_TAR_MAGIC = slice(257, 262)  # "ustar" in the header of an archive's first member


class Source:
    """An open trace file: its content unpacked, a line at a time, and hashed as it is stored."""

    def __init__(self, path: Path, raw: io.RawIOBase) -> None:
        self.path = path
        self._hashed = _Hashed(raw)
        self._stored = cast("io.BufferedReader", io.BufferedReader(self._hashed, _CHUNK))
        self.content = self._stored
        if self._stored.peek(2)[:2] == _GZIP_MAGIC:
            self.content = cast("io.BufferedReader", io.BufferedReader(gzip.GzipFile(fileobj=self._stored), _CHUNK))

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        name = self.path.name
        for ending in (".gz", ".csv", ".jsonl", ".tar"):
            name = name.removesuffix(ending)
        return name

    def is_tar(self) -> bool:
        """Whether the unpacked content is a tar archive."""
        return self.content.peek(_TAR_MAGIC.stop)[_TAR_MAGIC] == b"ustar"

    def sha256(self) -> str:
        """SHA-256 of the file as it is stored, all of it."""
        while self._stored.read(_CHUNK):
            pass
        return self._hashed.digest.hexdigest()

    def lines(self) -> Iterator[tuple[int, str]]:
        """Number, from 1, and text of every line, which may end in LF or CRLF.

        Raises InputError for a file without any text, for bytes that are not UTF-8, and for an endless line.
        """
        stored_lines = self._stored_lines()
        number = 0
        for number, stored in stored_lines:
            try:
                text = (stored.removeprefix(_BOM) if number == 1 else stored).decode()
            except UnicodeDecodeError:
                raise InputError(f"{self.path}: line {number}: found a byte that is not UTF-8, expected text") from None
            if number == 1 and not text.strip() and not any(rest.strip() for _, rest in stored_lines):
                break
            yield number, text.removesuffix("\n").removesuffix("\r")
        else:
            if number:
                return
        raise InputError(f"{self.path}: found an empty file, expected a trace")

    def _stored_lines(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        while stored := self.content.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(stored) > MAX_LINE_BYTES:
                raise InputError(
                    f"{self.path}: line {number}: found more than {MAX_LINE_BYTES} bytes, expected a row of a trace"
                )
            yield number, stored

    def refuse(self, line: int, field: str, found: object, expected: str) -> NoReturn:
        """Raise the InputError of a field that is wrong."""
        raise InputError(f"{self.path}: line {line}: {field}: found {shown(found)}, expected {expected}")


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a trace file. Raises InputError when it cannot be read, or its gzip data is broken."""
    try:
        with path.open("rb", buffering=0) as raw:
            yield Source(path, raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: found broken gzip data ({error}), expected a whole .gz file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) or "null byte" in str(error):
            why = error.strerror if isinstance(error, OSError) else error
            raise InputError(f"{path}: found no readable file ({why}), expected a trace") from None
        raise


def shown(value: object) -> str:
    """A value on part of one line."""
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Hashed(io.RawIOBase):
    """A file, and the SHA-256 of what has been read of it."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        chunk = self._raw.read(len(buffer)) or b""
        self.digest.update(chunk)
        buffer[: len(chunk)] = chunk
        return len(chunk)
