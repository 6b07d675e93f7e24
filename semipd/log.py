"""A columnar log of what runs did (docs/metrics.md)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import Final

import numpy as np

from semipd.core import DECODE, Allocation, FloatArray, IntArray, Request, StepRecord
from semipd.diagnosis import DecodeTime
from semipd.distribution import Counted

LATEST: Final = 256

CHUNK_STEPS: Final = 2**20
"""Decode steps whose gaps are looked at together: a long replay needs little memory for them."""


class Column:
    """Numbers that come one at a time; the latest are in a list, which takes them faster than an array does."""

    __slots__ = ("_earlier", "_latest")

    def __init__(self) -> None:
        self._earlier = array("d")
        self._latest: list[float] = []

    def __len__(self) -> int:
        return len(self._earlier) + len(self._latest)

    def append(self, number: float) -> None:
        """Add a number; of whole ones those below 2 ** 53."""
        self._latest.append(number)
        if len(self._latest) == LATEST:
            self._earlier.extend(self._latest)
            self._latest = []

    def floats(self) -> FloatArray:
        """A copy of all."""
        return np.concatenate([np.array(self._earlier, dtype=np.float64), np.array(self._latest, dtype=np.float64)])

    def ints(self) -> IntArray:
        """All of them, which are whole numbers."""
        return self.floats().astype(np.int64)


class Log:
    """What runs did, in columns that grow with runs: nothing is kept for each token, and no object.

    Records must come in the order in which runs ended, as ``driver.replay`` yields them. Sequences that decode together
    get their tokens together, so their gaps are those between steps, as often as there are sequences; only the
    tokens at which a sequence joins the batch have a gap of their own. Of decode steps the last ``chunk_steps`` are
    held in memory, and those before in temporary files that vanish with the log.
    """

    def __init__(self, chunk_steps: int = CHUNK_STEPS) -> None:
        self.tokens = 0
        self.lookups = 0
        self.extrapolated = 0
        self._names: dict[str, int] = {}  # of allocations, with their numbers
        self._allocations: dict[Allocation, int] = {}  # number of the name
        self._run_allocation, self._run_start_s, self._run_end_s = Column(), Column(), Column()
        self._run_alone = Column()  # sequences of a run that only decodes
        self._end_s = 0.0
        self._chunk_steps = chunk_steps
        self._chunks: list[tuple[int, FloatArray]] = []  # how many decode runs, and the gaps of their steps
        self._closed_runs = 0  # decode runs in these
        self._chunk_start_s = 0.0  # end of their last decode step
        self._step_end_s = array("d")  # of the decode runs that follow
        self._decode_steps, self._decode_batch, self._decode_stayed = Column(), Column(), Column()
        self._own_gap_s = Column()
        self._first_id, self._first_s = Column(), Column()
        self._finish_id, self._finish_s = Column(), Column()

        self._only_part: Counted | None = None  # gaps as last asked for, when all are in memory

        self._requests: tuple[Request, ...] = ()  # of the last decode run; none once one was prefilled anew
        self._batch: set[int] = set()  # sequences whose last token came at the last decode step
        self._batch_s = 0.0  # its end
        self._token_s: dict[int, float] = {}  # last token of each other sequence that is to get more

    def append(self, record: StepRecord) -> None:
        """Take note of a run that ended."""
        run, steps, end_s, finished = record.run, record.steps, record.end_s, record.finished
        self._only_part = None
        number = self._allocations.get(run.allocation)
        if number is None:
            number = self._names.setdefault(run.allocation.name, len(self._names))
            self._allocations[run.allocation] = number
        self._run_allocation.append(number)
        self._run_start_s.append(record.start_s)
        self._run_end_s.append(end_s)
        self._end_s = max(self._end_s, end_s)
        self._run_alone.append(len(run.requests) if run.phase is DECODE else 0)
        self.lookups += record.lookups
        self.extrapolated += record.extrapolated
        if steps == 0:
            return
        if run.phase is DECODE:
            self._append_decode(run.requests, record, end_s)
        elif steps == run.max_steps:
            if run.decodes:
                self._append_decode(run.requests[: run.decodes], record, end_s)
            self._append_prefill(record, end_s)
        for request_id in finished:
            self._finish_id.append(request_id)
            self._finish_s.append(end_s)

    def _append_decode(self, requests: tuple[Request, ...], record: StepRecord, end_s: float) -> None:
        """Every step gives each of these sequences a token."""
        n, steps, joined = len(requests), record.steps, 0
        if requests != self._requests:
            joined = self._follow(requests, record.ends_s)
        self._step_end_s.frombytes(record.ends_s.tobytes())
        self._decode_steps.append(steps)
        self._decode_batch.append(n)
        self._decode_stayed.append(n - joined)
        self._batch_s = end_s
        self.tokens += steps * n
        for request_id in record.finished:
            self._batch.discard(request_id)
        if len(self._step_end_s) >= self._chunk_steps:
            self._close_chunk()

    def _follow(self, requests: tuple[Request, ...], ends_s: FloatArray) -> int:
        """Take note of who is in the decode batch now; how many of them have joined it."""
        batch, joined, first_s = self._batch, 0, 0.0
        for request in requests:
            if request.id not in batch:
                if not joined:
                    first_s = ends_s.item(0)
                joined += 1
                batch.add(request.id)
                self._token(request.id, first_s)
        if len(batch) > len(requests):
            for request_id in batch - {request.id for request in requests}:
                batch.remove(request_id)
                self._token_s[request_id] = self._batch_s
        self._requests = requests
        return joined

    def _close_chunk(self) -> None:
        """Keep the gaps of the last decode runs' steps instead of their ends."""
        runs = len(self._decode_steps) - self._closed_runs
        self._chunks.append((runs, _on_disk(self._open_gaps())))
        self._closed_runs += runs
        self._chunk_start_s = self._batch_s
        self._step_end_s = array("d")

    def _open_gaps(self) -> FloatArray:
        return np.diff(np.array(self._step_end_s, dtype=np.float64), prepend=self._chunk_start_s)

    def _append_prefill(self, record: StepRecord, end_s: float) -> None:
        """The end gives a token to each request whose prompt it completes."""
        run, finished = record.run, record.finished
        for request, emits in zip(run.requests[run.decodes :], run.emits[run.decodes :], strict=True):
            if not emits:
                continue
            if request.id in self._batch:  # preempted since its last decode step
                self._batch.remove(request.id)
                self._requests = ()
                self._token_s[request.id] = self._batch_s
            self._token(request.id, end_s)
            self.tokens += 1
            if request.id not in finished:
                self._token_s[request.id] = end_s

    def _token(self, request_id: int, at_s: float) -> None:
        """A token that comes apart from the other sequences': the first one, or one with a gap of its own."""
        last_s = self._token_s.pop(request_id, None)
        if last_s is None:
            self._first_id.append(request_id)
            self._first_s.append(at_s)
        else:
            self._own_gap_s.append(at_s - last_s)

    def first_tokens(self) -> tuple[IntArray, FloatArray]:
        """Ids of the requests that have had a token, and when the first one came."""
        return self._first_id.ints(), self._first_s.floats()

    def finishes(self) -> tuple[IntArray, FloatArray]:
        """Ids of the requests that are complete, and when their last token came."""
        return self._finish_id.ints(), self._finish_s.floats()

    def decode_time(self) -> dict[Allocation, DecodeTime]:
        """How long decode ran by itself, at each allocation."""
        number, sequences = self._run_allocation.ints(), self._run_alone.ints()
        took_s = self._run_end_s.floats() - self._run_start_s.floats()
        kinds = len(self._names)
        busy_s = np.bincount(number, took_s * (sequences > 0), kinds).astype(np.float64)
        request_s = np.bincount(number, took_s * sequences, kinds).astype(np.float64)
        decoded = {n: at for at, n in self._allocations.items() if busy_s[n] > 0}
        return {at: DecodeTime(busy_s.item(n), request_s.item(n)) for n, at in decoded.items()}

    @property
    def end_s(self) -> float:
        """When the last run ended; 0 without runs."""
        return self._end_s

    def gaps(self) -> Iterator[Counted]:
        """Gaps between successive tokens of a request, in seconds, and how many of each there are; in parts.

        A log that is all in memory puts them together once, however often it is asked.
        """
        if self._only_part is not None:
            yield self._only_part
            return
        steps, batch, stayed = self._decode_steps.ints(), self._decode_batch.ints(), self._decode_stayed.ints()

        def counts(of: slice) -> IntArray:
            """How many sequences had the gap before each step of these decode runs."""
            counts: IntArray = np.repeat(batch[of], steps[of])
            counts[np.cumsum(steps[of]) - steps[of]] = stayed[of]
            return counts

        first = 0
        for runs, seconds in self._chunks:
            yield _present(seconds, counts(slice(first, first + runs)))
            first += runs
        own = self._own_gap_s.floats()
        once: IntArray = np.ones(len(own), dtype=np.int64)
        last = _present(np.concatenate([self._open_gaps(), own]), np.concatenate([counts(slice(first, None)), once]))
        if not self._chunks:
            self._only_part = last
        yield last

    def time_in_split(self, start_s: float) -> dict[str, float]:
        """Share of the time from ``start_s`` to the last run's end in each allocation, the rest being ``idle``."""
        order = np.argsort(self._run_start_s.floats(), kind="stable")
        starts, ends = self._run_start_s.floats()[order], self._run_end_s.floats()[order]
        if not len(ends) or not (span_s := float(ends.max()) - start_s) > 0:
            return {"idle": 1.0}
        covered_s = np.maximum.accumulate(np.concatenate([[start_s], ends[:-1]]))  # by the runs before
        own_s = np.maximum(ends - np.maximum(starts, covered_s), 0.0)
        busy = np.bincount(self._run_allocation.ints()[order], own_s, len(self._names)) / span_s
        shares = dict(zip(self._names, busy.tolist(), strict=True))
        return {**{name: shares[name] for name in sorted(shares)}, "idle": max(0.0, 1 - math.fsum(shares.values()))}


def _present(values: FloatArray, counts: IntArray) -> Counted:
    """Without the values that do not occur."""
    occur = counts > 0
    return values[occur], counts[occur]


def _on_disk(values: FloatArray) -> FloatArray:
    """The same values in a temporary file without a name, which goes when they do; in memory where there is no room."""
    try:
        with TemporaryFile() as file:
            values.tofile(file)
            return np.memmap(file, values.dtype, "r", shape=values.shape)
    except OSError:
        return values
