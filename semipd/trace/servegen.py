"""ServeGen's client data: arrival processes and length distributions of every client, and a trace drawn from them.

Format and method: github.com/alibaba/ServeGen (arXiv 2505.09999, NSDI'26). Two deliberate differences in drawing: a
client's input and output are drawn independently (upstream reuses one random number for both, so that they rise
together), and the number of requests in a window is rounded at random (upstream rounds up, which inflates clients
that send little).
"""

from __future__ import annotations

import json
import math
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from semipd.core import FloatArray, InputError, IntArray
from semipd.trace.columns import MAX_TOKENS, Trace
from semipd.trace.source import Source, shown

SERVEGEN = "servegen-tar"
WINDOW_S = 600
MAX_REQUESTS = 50_000_000
MAX_WINDOW_START_S = 1e9

_MEMBER = re.compile(r"(?:.*/)?chunk-(\d{1,9})-(trace\.csv|dataset\.json)", re.ASCII | re.DOTALL)
_ENTRY = re.compile(r"\d{1,10}: \d{1,20}(?:\.\d{0,30})?(?:e[+-]?\d{1,3})?", re.ASCII)
_NUMBER = re.compile(r"\d{1,20}(?:\.\d{0,30})?(?:e[+-]?\d{1,3})?", re.ASCII)
_FIELDS = ("window_start_s", "rate_rps", "cv", "pattern", "shape", "scale")
_PATTERNS = ("Gamma", "Weibull", "")
_MAX_BYTES = 1 << 30
"""Most that the members of an archive may hold together."""


@dataclass(frozen=True)
class Window:
    """A client's arrivals in one window: gaps of that shape, at that rate. ``pattern``: Gamma or Weibull."""

    start_s: int
    rate_rps: float
    pattern: str
    shape: float


@dataclass(frozen=True, eq=False)
class Pdf:
    """Lengths in tokens and the probability of each."""

    tokens: IntArray
    probability: FloatArray

    def draw(self, rng: np.random.Generator, n: int) -> IntArray:
        """``n`` lengths."""
        index = np.searchsorted(np.cumsum(self.probability), rng.random(n), side="right")
        return self.tokens[np.minimum(index, len(self.tokens) - 1)]


@dataclass(frozen=True, eq=False)
class Client:
    """One client: its active windows, and its prompt and output lengths from each of several times on."""

    number: int
    windows: tuple[Window, ...]
    lengths: Mapping[int, tuple[Pdf, Pdf]]

    def lengths_at(self, start_s: int) -> tuple[Pdf, Pdf]:
        """The lengths in force then."""
        return self.lengths[max(since for since in self.lengths if since <= start_s)]


@dataclass(frozen=True, eq=False)
class Clients:
    """All clients of an archive. ``rows_read`` windows are either active, in a client, or ``idle``."""

    name: str
    clients: tuple[Client, ...]
    rows_read: int
    idle: int
    sha256: str

    def draw(self, seed: int = 0, rate_scale: float = 1.0) -> Trace:
        """A trace of all windows: the same arguments give the same one.

        In every window each client sends rate x 600 s requests, rounded at random: that many gaps and one more are
        drawn and scaled to fill the window. Raises InputError for a negative seed, for a rate scale that is not
        above 0, and when there is nothing or over 50 million requests to draw.
        """
        expected = rate_scale * sum(w.rate_rps * WINDOW_S for client in self.clients for w in client.windows)
        if seed < 0:
            raise InputError(f"{self.name}: seed: found {seed}, expected an integer from 0")
        if not 0 < expected <= MAX_REQUESTS:
            raise InputError(
                f"{self.name}: found about {expected:.3g} requests to draw, expected above 0 and up to {MAX_REQUESTS}"
            )
        rngs = (np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(len(self.clients)))
        parts = [
            _draw_window(client, window, rate_scale, rng)
            for client, rng in zip(self.clients, rngs, strict=True)
            for window in client.windows
        ]
        arrival_s, prompt_len, output_len = (np.concatenate(column) for column in zip(*parts, strict=True))
        if len(arrival_s) == 0:
            raise InputError(f"{self.name}: found no request in this draw, expected a higher rate scale")
        order = np.argsort(arrival_s, kind="stable")
        arrival_s = arrival_s[order]
        active = self.rows_read - self.idle
        return Trace(
            name=self.name,
            arrival_s=np.round(arrival_s - arrival_s[0], 7),
            prompt_len=prompt_len[order],
            output_len=output_len[order],
            source_format=SERVEGEN,
            rows_read=len(arrival_s),
            sha256=self.sha256,
            operations=(
                f"drawn from {len(self.clients)} ServeGen clients, seed {seed}"
                f" ({self.rows_read} windows read = {active} active + {self.idle} idle)",
            ),
        )


def read_clients(source: Source) -> Clients:
    """Read an archive of ``chunk-N-trace.csv`` and ``chunk-N-dataset.json``; other members are passed over.

    Raises InputError naming the member, row and field.
    """
    members: dict[int, dict[str, bytes]] = {}
    total = 0
    try:
        with tarfile.open(fileobj=source.content, mode="r|") as archive:
            for member in archive:
                match = _MEMBER.fullmatch(member.name)
                if match is None or not member.isfile() or member.issparse():
                    continue
                total += member.size
                if total > _MAX_BYTES:
                    _refuse(source, member.name, f"{total} bytes so far", f"at most {_MAX_BYTES} in all")
                file = archive.extractfile(member)
                kinds = members.setdefault(int(match[1]), {})
                if match[2] in kinds:
                    _refuse(source, member.name, "a second one", "one for each client")
                kinds[match[2]] = file.read() if file else b""
    except (tarfile.TarError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise InputError(f"{source.path}: found a broken archive ({error}), expected a whole tar file") from None
    if not members:
        raise InputError(f"{source.path}: found no chunk-N-trace.csv in the archive, expected ServeGen's client data")
    clients, rows, idle = [], 0, 0
    for number, kinds in sorted(members.items()):
        for kind in ("trace.csv", "dataset.json"):
            if kind not in kinds:
                _refuse(source, f"chunk-{number}-{kind}", "no such member", "one beside the client's other")
        windows = _windows(source, f"chunk-{number}-trace.csv", kinds["trace.csv"])
        active = tuple(window for window in windows if window.rate_rps)
        rows, idle = rows + len(windows), idle + len(windows) - len(active)
        lengths = _lengths(source, f"chunk-{number}-dataset.json", kinds["dataset.json"], active)
        clients.append(Client(number, active, lengths))
    return Clients(source.name, tuple(clients), rows, idle, source.sha256())


def _draw_window(
    client: Client, window: Window, rate_scale: float, rng: np.random.Generator
) -> tuple[FloatArray, IntArray, IntArray]:
    n = int(window.rate_rps * WINDOW_S * rate_scale + rng.random())
    # One gap more than requests: scaled to n gaps, the last request of every client would be at the window's very end.
    gaps = rng.gamma(window.shape, size=n + 1) if window.pattern == "Gamma" else rng.weibull(window.shape, size=n + 1)
    reached = np.cumsum(gaps)
    if not 0 < reached[-1] < math.inf:  # a shape near 0 underflows
        reached = np.arange(1.0, n + 2)
    prompts, outputs = client.lengths_at(window.start_s)
    arrival_s = window.start_s + WINDOW_S * reached[:n] / reached[-1]
    return arrival_s, prompts.draw(rng, n), outputs.draw(rng, n)


def _windows(source: Source, member: str, content: bytes) -> list[Window]:
    """Rows ``window_start_s,rate_rps,cv,pattern,shape,scale``; an idle one is ``t,0,0,,0,0``."""
    windows: list[Window] = []
    for line, text in enumerate(_text(source, member, content).splitlines(), start=1):
        row = text.split(",")
        where = f"{member}: line {line}"
        if len(row) != len(_FIELDS):
            _refuse(source, f"{where}: row", text, f"{len(_FIELDS)} fields, {','.join(_FIELDS)}")
        for field, cell in zip(_FIELDS, row, strict=True):
            if field != "pattern" and (_NUMBER.fullmatch(cell) is None or float(cell) > MAX_WINDOW_START_S):
                _refuse(source, f"{where}: {field}", cell, f"a number from 0 to {MAX_WINDOW_START_S:g}")
        start_s, rate_rps, pattern, shape = float(row[0]), float(row[1]), row[3], float(row[4])
        if start_s % WINDOW_S or (windows and start_s <= windows[-1].start_s):
            _refuse(source, f"{where}: window_start_s", row[0], f"a multiple of {WINDOW_S}, after the row above's")
        if pattern not in _PATTERNS or (rate_rps > 0) != (pattern != ""):
            _refuse(source, f"{where}: pattern", pattern, "Gamma or Weibull, and none where the rate is 0")
        if rate_rps > 0 and not shape > 0:
            _refuse(source, f"{where}: shape", row[4], "a number above 0")
        windows.append(Window(int(start_s), rate_rps, pattern, shape))
    return windows


def _lengths(source: Source, member: str, content: bytes, active: Iterable[Window]) -> dict[int, tuple[Pdf, Pdf]]:
    """The distributions that the active windows need: ``{since_s: {"input_tokens": ..., "output_tokens": ...}}``."""
    try:
        document = json.loads(_text(source, member, content))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not all(isinstance(fields, dict) for fields in document.values()):
        _refuse(source, member, content[:60].decode(errors="replace"), "a JSON object of distributions by time")
    for since in document:
        if not (since.isascii() and since.isdigit() and len(since) <= 9):
            _refuse(source, member, since, "a start in whole seconds")
    starts = sorted(int(since) for since in document)
    needed: set[int] = set()
    for window in active:
        before = [since for since in starts if since <= window.start_s]
        if not before:
            _refuse(source, member, f"nothing at {window.start_s} s", "distributions for every active window")
        needed.add(before[-1])
    by_start = {int(since): fields for since, fields in document.items()}
    return {
        since: (
            _pdf(source, member, f"{since}: input_tokens", by_start[since].get("input_tokens")),
            _pdf(source, member, f"{since}: output_tokens", by_start[since].get("output_tokens")),
        )
        for since in sorted(needed)
    }


def _pdf(source: Source, member: str, field: str, literal: object) -> Pdf:
    """A distribution, stored as the text of a Python dict; parsed as just that, never evaluated."""
    expected = "the text of a dict of token counts to probabilities that sum to 1"
    if not isinstance(literal, str) or not (literal.startswith("{") and literal.endswith("}")):
        _refuse(source, f"{member}: {field}", literal, expected)
    entries = literal[1:-1].split(", ")
    for entry in entries:
        if _ENTRY.fullmatch(entry) is None:
            _refuse(source, f"{member}: {field}", entry, expected)
    cells = [entry.split(": ") for entry in entries]
    tokens = np.array([int(token) for token, _ in cells], dtype=np.int64)
    probability = np.array([float(p) for _, p in cells])
    kept = probability > 0
    tokens, probability = tokens[kept], probability[kept]
    total = float(probability.sum())
    if not abs(total - 1) < 1e-6:
        _refuse(source, f"{member}: {field}", f"a sum of {total:g}", expected)
    if tokens.min() < 1 or tokens.max() > MAX_TOKENS:
        _refuse(source, f"{member}: {field}", f"{tokens.min()} to {tokens.max()} tokens", f"1 to {MAX_TOKENS}")
    return Pdf(tokens, probability / total)


def _text(source: Source, member: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        _refuse(source, member, "a byte that is not UTF-8", "text")


def _refuse(source: Source, where: str, found: object, expected: str) -> NoReturn:
    raise InputError(f"{source.path}: {' '.join(where.split())}: found {shown(found)}, expected {expected}")
