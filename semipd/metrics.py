"""What a replay amounts to: a columnar log of runs, and the summary made from it (docs/metrics.md)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import numpy as np

from semipd.core import DECODE, Allocation, FloatArray, IntArray, Request, Slo, StepRecord
from semipd.diagnosis import Bound, DecodeTime
from semipd.trace import Trace

Saturation = Literal["stable", "backlogged", "overloaded"]

SATURATED_SHARE = 0.05
"""Requests waiting for their first token, as a share of all, that make a queue (docs/metrics.md, saturation)."""

FEW_REQUESTS = 10
"""So many waiting are no queue, however short the trace."""

CHUNK_STEPS = 2**20
"""Decode steps whose gaps are looked at together: a long replay needs little memory beside the gaps themselves."""

EXACT_STEPS = 2**24
"""The gaps of so many decode steps are kept to the last bit; those of later ones are counted by their first bits."""

ROUNDED_BITS = 18
"""So many bits after the first: a gap that is counted is off by up to 2 ** -19 of itself."""

BINS = 2**16
PERCENTILES = (50, 90, 95, 99)

Counted: TypeAlias = tuple[FloatArray, IntArray]
"""Values, and how often each occurs."""

_ids = attrgetter("id")


class Log:
    """What runs did, in columns that grow with runs: nothing is kept for each token, and no object.

    Records must come in the order in which runs ended, as ``driver.replay`` yields them. Sequences that decode together
    get their tokens together, so their gaps are those between steps, as often as there are sequences; only the
    tokens at which a sequence joins the batch have a gap of their own. Of steps, the first ``exact_steps`` are kept.
    """

    def __init__(self, chunk_steps: int = CHUNK_STEPS, exact_steps: int = EXACT_STEPS) -> None:
        self.tokens = 0
        self.lookups = 0
        self.extrapolated = 0
        self._names: dict[str, int] = {}  # of allocations, with their numbers
        self._allocations: dict[Allocation, int] = {}  # number of the name
        self._decode_s: dict[int, tuple[Allocation, float, float]] = {}  # by that number: busy, request-seconds
        self._run_allocation, self._run_start_s, self._run_end_s = array("l"), array("d"), array("d")
        self._chunk_steps, self._exact_steps = chunk_steps, exact_steps
        self._chunks: list[tuple[int, FloatArray]] = []  # how many decode runs, and the gaps of their steps
        self._rounded: dict[int, FloatArray] = {}  # counts of later gaps by their exponent and first bits
        self._closed_runs = 0  # decode runs in either
        self._chunk_start_s = 0.0  # end of their last decode step
        self._step_end_s = array("d")  # of the decode runs that follow
        self._decode_steps, self._decode_batch, self._decode_stayed = array("q"), array("q"), array("q")
        self._own_gap_s = array("d")
        self._first_id, self._first_s = array("q"), array("d")
        self._finish_id, self._finish_s = array("q"), array("d")

        self._requests: tuple[Request, ...] = ()  # of the last decode run; none once one was prefilled anew
        self._batch: set[int] = set()  # sequences whose last token came at the last decode step
        self._batch_s = 0.0  # its end
        self._token_s: dict[int, float] = {}  # last token of each other sequence that is to get more

    def append(self, record: StepRecord) -> None:
        """Take note of a run that ended."""
        run, steps, end_s, finished = record.run, len(record.ends_s), record.end_s, record.finished
        number = self._allocations.get(run.allocation)
        if number is None:
            number = self._names.setdefault(run.allocation.name, len(self._names))
            self._allocations[run.allocation] = number
        self._run_allocation.append(number)
        self._run_start_s.append(record.start_s)
        self._run_end_s.append(end_s)
        self.lookups += record.lookups
        self.extrapolated += record.extrapolated
        if steps == 0:
            return
        if run.phase is DECODE:
            at, busy_s, request_s = self._decode_s.get(number, (run.allocation, 0.0, 0.0))
            took_s = end_s - record.start_s
            self._decode_s[number] = at, busy_s + took_s, request_s + took_s * len(run.requests)
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
        ends_s, n, joined = record.ends_s, len(requests), 0
        if requests != self._requests:
            batch = set(map(_ids, requests))
            if left := self._batch - batch:
                self._token_s.update(dict.fromkeys(left, self._batch_s))
            if new := batch - self._batch:
                joined = len(new)
                first_s = ends_s.item(0)
                for request_id in new:
                    self._token(request_id, first_s)
            self._requests, self._batch = requests, batch
        steps = len(ends_s)
        self._step_end_s.frombytes(ends_s.tobytes())
        self._decode_steps.append(steps)
        self._decode_batch.append(n)
        self._decode_stayed.append(n - joined)
        self._batch_s = end_s
        self.tokens += steps * n
        if record.finished:
            self._batch.difference_update(record.finished)
        if len(self._step_end_s) >= self._chunk_steps:
            self._close_chunk()

    def _close_chunk(self) -> None:
        """Keep the gaps of the last decode runs' steps instead of their ends, or count them."""
        gaps, runs = self._open_gaps(), len(self._decode_steps) - self._closed_runs
        if sum(len(kept) for _, kept in self._chunks) < self._exact_steps:
            self._chunks.append((runs, gaps))
        else:
            self._count(*_present(gaps, self._gap_counts(self._closed_runs, runs)))
        self._closed_runs += runs
        self._chunk_start_s = self._batch_s
        self._step_end_s = array("d")

    def _open_gaps(self) -> FloatArray:
        return np.diff(_floats(self._step_end_s), prepend=self._chunk_start_s)

    def _count(self, gaps: FloatArray, counts: IntArray) -> None:
        """Count gaps that agree in their exponent and first bits together."""
        bits = gaps.view(np.int64) >> 52 - ROUNDED_BITS
        exponents, first_bits = bits >> ROUNDED_BITS, bits & 2**ROUNDED_BITS - 1
        for exponent in np.unique(exponents).tolist():
            of = exponents == exponent
            held = self._rounded.setdefault(exponent, np.zeros(2**ROUNDED_BITS))
            held += np.bincount(first_bits[of], counts[of], 2**ROUNDED_BITS)

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
        return _ints(self._first_id), _floats(self._first_s)

    def finishes(self) -> tuple[IntArray, FloatArray]:
        """Ids of the requests that are complete, and when their last token came."""
        return _ints(self._finish_id), _floats(self._finish_s)

    def decode_time(self) -> dict[Allocation, DecodeTime]:
        """How long decode ran by itself, at each allocation."""
        return {at: DecodeTime(busy_s, request_s) for at, busy_s, request_s in self._decode_s.values()}

    @property
    def end_s(self) -> float:
        """When the last run ended; 0 without runs."""
        return max(self._run_end_s, default=0.0)

    def gaps(self) -> Iterator[Counted]:
        """Gaps between successive tokens of a request, in seconds, and how many of each there are; in parts."""
        first = 0
        for runs, seconds in self._chunks:
            yield _present(seconds, self._gap_counts(first, runs))
            first += runs
        for exponent, found in self._rounded.items():
            bits = (exponent << ROUNDED_BITS) + np.arange(2**ROUNDED_BITS)
            middle = (2 * bits + 1) << 51 - ROUNDED_BITS
            yield _present(middle.view(np.float64), found.astype(np.int64))
        own, first = _floats(self._own_gap_s), self._closed_runs
        counts = self._gap_counts(first, len(self._decode_steps) - first)
        yield _present(
            np.concatenate([self._open_gaps(), own]), np.concatenate([counts, np.ones(len(own), dtype=np.int64)])
        )

    def _gap_counts(self, first: int, runs: int) -> IntArray:
        """How many sequences had the gap before each step of these decode runs."""
        of = slice(first, first + runs)
        steps = _ints(self._decode_steps[of])
        counts = np.repeat(_ints(self._decode_batch[of]), steps)
        counts[np.cumsum(steps) - steps] = _ints(self._decode_stayed[of])
        return counts

    def time_in_split(self, start_s: float) -> dict[str, float]:
        """Share of the time from ``start_s`` to the last run's end in each allocation, the rest being ``idle``."""
        order = np.argsort(_floats(self._run_start_s), kind="stable")
        starts, ends = _floats(self._run_start_s)[order], _floats(self._run_end_s)[order]
        if not len(ends) or not (span_s := float(ends.max()) - start_s) > 0:
            return {"idle": 1.0}
        covered_s = np.maximum.accumulate(np.concatenate([[start_s], ends[:-1]]))  # by the runs before
        own_s = np.maximum(ends - np.maximum(starts, covered_s), 0.0)
        busy = np.bincount(_ints(self._run_allocation)[order], own_s, len(self._names)) / span_s
        shares = dict(zip(self._names, busy.tolist(), strict=True))
        return {**{name: shares[name] for name in sorted(shares)}, "idle": max(0.0, 1 - math.fsum(shares.values()))}


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean, percentiles (linear between order statistics, as numpy's default) and maximum, in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @staticmethod
    def of(values: FloatArray, counts: IntArray | None = None) -> Distribution | None:
        """Of values that occur ``counts`` times each (at least once; None: once). None without any."""
        if counts is not None:
            return Distribution.of_parts(lambda: [(values, counts)])
        if not len(values):
            return None
        ordered = np.sort(values)
        return _distribution(float(values.mean()), ordered, np.arange(1, len(values) + 1), len(values))

    @staticmethod
    def of_parts(parts: Callable[[], Iterable[Counted]]) -> Distribution | None:
        """Likewise, of values in parts, which are gone through three times and only sorted around the percentiles.

        Raises ValueError for a value below 0.
        """
        # not values @ counts: BLAS rounds by its number of threads, and equal replays must give equal bytes
        looks = [(v.min(), v.max(), (v * n).sum(), n.sum()) for v, n in parts() if len(v)]
        if not looks:
            return None
        lows, highs, sums, numbers = zip(*looks, strict=True)
        low, high, n = float(min(lows)), float(max(highs)), int(sum(numbers))
        if low < 0:
            raise ValueError(f"found {low}; expected no value below 0")
        bins = _binning(low, high)
        held = np.zeros(BINS, dtype=np.int64)
        for values, counts in parts():
            held += np.bincount(bins(values), counts, BINS).astype(np.int64)
        wanted = np.zeros(BINS, dtype=np.bool_)
        ranks = [rank for q in PERCENTILES for rank in _ranks(q, n)[:2]]
        wanted[np.searchsorted(np.cumsum(held), [*ranks, n - 1], side="right")] = True
        few = [(v[chosen], c[chosen]) for v, c in parts() for chosen in [wanted[bins(v)]]]
        values, counts = (np.concatenate(column) for column in zip(*few, strict=True))
        order = np.argsort(values)
        left_out = np.cumsum(np.where(wanted, 0, held))  # up to each bin
        reached = np.cumsum(counts[order]) + left_out[bins(values[order])]
        return _distribution(math.fsum(sums) / n, values[order], reached, n)


def _distribution(mean: float, ordered: FloatArray, reached: IntArray, n: int) -> Distribution:
    """Of n values: the greatest and those around the percentiles, ascending, and how many are up to each of these."""

    def percentile(q: float) -> float:
        below, above, t = _ranks(q, n)
        i, j = np.searchsorted(reached, (below, above), side="right")
        low, high = float(ordered[i]), float(ordered[j])
        # numpy's two ways to interpolate, to agree with it to the last bit
        return low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t)

    p50, p90, p95, p99 = map(percentile, PERCENTILES)
    return Distribution(mean, p50, p90, p95, p99, float(ordered[-1]))


def _ranks(q: float, n: int) -> tuple[int, int, float]:
    """Between which two of n ascending values a percentile is, counted from 0, and how far."""
    place = q / 100 * (n - 1)
    below = math.floor(place)
    return below, min(below + 1, n - 1), place - below


def _binning(low: float, high: float) -> Callable[[FloatArray], IntArray]:
    """Puts values from low (at least 0) to high into bins in their order, which is that of their bits."""
    first, last = np.array([low, high]).view(np.int64).tolist()
    shift = max(0, (last - first).bit_length() - (BINS - 1).bit_length())
    return lambda values: (values.view(np.int64) - first) >> shift


@dataclass(frozen=True, eq=False)
class RequestTable:
    """One row a request, in the order sent; seconds are NaN where there is nothing to tell.

    ``first_token_s``, ``finish_s``: when; NaN before the first token, and for a request that did not complete.
    ``tpot_s``, ``e2e_s``: NaN for a request that did not complete.
    """

    id: IntArray
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    first_token_s: FloatArray
    finish_s: FloatArray
    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray

    def columns(self) -> dict[str, FloatArray | IntArray]:
        """The columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Summary:
    """What a run amounts to; docs/metrics.md defines every field. None where there is nothing to tell."""

    policy: str
    requests: int
    completed: int
    dropped: int
    duration_s: float
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2e_s: Distribution | None
    request_throughput_rps: float | None
    output_throughput_tps: float | None
    slo: Slo
    slo_attainment: float | None
    goodput_rps: float | None
    preemptions: int
    switches: int
    time_in_split: Mapping[str, float]
    kv_peak_share: float | None
    extrapolated_share: float | None
    saturation: Saturation
    wall_s: float | None
    prefix_hit_share: float | None = None
    bound_by: Bound | None = None
    time_shares: Mapping[Bound, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object: names, numbers and null, never NaN."""
        document: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Distribution):
                value = {part.name: getattr(value, part.name) for part in fields(value)}
            elif isinstance(value, Slo):
                value = {"ttft_s": value.ttft_s, "tpot_s": value.tpot_s}
            elif isinstance(value, Mapping):
                value = dict(value)
            document[field.name] = value
        return document


def request_table(log: Log, requests: Trace | Sequence[Request], sent_s: FloatArray | None = None) -> RequestTable:
    """When each request arrived, got its first token and finished, and what follows from that.

    ``sent_s``: when each request of a trace was sent, if not when it arrives there; NaN for one that was not.

    Raises ValueError when the log has a request that is not among these, or when two have the same id.
    """
    if isinstance(requests, Trace):
        at_s = requests.arrival_s if sent_s is None else sent_s
        ids = np.argsort(at_s, kind="stable")[: np.count_nonzero(~np.isnan(at_s))]
        arrival_s, prompt_tokens, output_tokens = at_s[ids], requests.prompt_len[ids], requests.output_len[ids]
    else:
        ids = np.array([r.id for r in requests], dtype=np.int64)
        arrival_s = np.array([r.arrival_s for r in requests], dtype=np.float64)
        prompt_tokens = np.array([r.prompt_len for r in requests], dtype=np.int64)
        output_tokens = np.array([r.output_len for r in requests], dtype=np.int64)
    first_token_s = _placed(ids, *log.first_tokens())
    finish_s = _placed(ids, *log.finishes())
    return RequestTable(
        id=ids,
        arrival_s=arrival_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        first_token_s=first_token_s,
        finish_s=finish_s,
        ttft_s=first_token_s - arrival_s,
        # e2e - TTFT is finish - first token; a single token has none after it
        tpot_s=(finish_s - first_token_s) / np.maximum(output_tokens - 1, 1),
        e2e_s=finish_s - arrival_s,
    )


def summarise(
    log: Log,
    requests: Trace | Sequence[Request],
    *,
    sent_s: FloatArray | None = None,
    policy: str,
    slo: Slo,
    dropped: Collection[int] = (),
    preemptions: int = 0,
    switches: int = 0,
    kv_peak_share: float | None = None,
    prefix_hit_share: float | None = None,
    wall_s: float | None = None,
) -> Summary:
    """Summary of a replay.

    Args:
        log: What its runs did.
        requests: All requests, in order of arrival.
        sent_s: When each of them was sent, as for ``request_table``.
        policy: Its name.
        slo: Targets that make a request good.
        dropped: Ids of the requests that the scheduler gave up.
        preemptions: As the scheduler counted.
        switches: As the scheduler counted.
        kv_peak_share: Largest share of the KV blocks in use.
        prefix_hit_share: Share of the prompts' tokens that was cached; None without prefix caching.
        wall_s: Seconds that the replay took to compute.

    Raises:
        ValueError: The log has a request that is not among ``requests``, or two of these have the same id.
    """
    table = request_table(log, requests, sent_s)
    sent = len(table.id)
    start_s = float(table.arrival_s[0]) if sent else 0.0
    complete = ~np.isnan(table.finish_s)
    completed = int(np.count_nonzero(complete))
    duration_s = float(table.finish_s[complete].max()) - start_s if completed else 0.0
    good = int(np.count_nonzero(complete & (table.ttft_s <= slo.ttft_s) & (table.tpot_s <= slo.tpot_s)))
    served = table.first_token_s[~np.isnan(table.first_token_s)]
    counted = ~np.isin(table.id, np.fromiter(dropped, np.int64, len(dropped))) | ~np.isnan(table.first_token_s)

    def rate(count: int) -> float | None:
        return count / duration_s if duration_s > 0 else None

    return Summary(
        policy=policy,
        requests=sent,
        completed=completed,
        dropped=len(dropped),
        duration_s=duration_s,
        ttft_s=Distribution.of(table.ttft_s[~np.isnan(table.ttft_s)]),
        tpot_s=Distribution.of(table.tpot_s[complete]),
        itl_s=Distribution.of_parts(log.gaps),
        e2e_s=Distribution.of(table.e2e_s[complete]),
        request_throughput_rps=rate(completed),
        output_throughput_tps=rate(log.tokens),
        slo=slo,
        slo_attainment=good / sent if sent else None,
        goodput_rps=rate(good),
        preemptions=preemptions,
        switches=switches,
        time_in_split=log.time_in_split(start_s),
        kv_peak_share=kv_peak_share,
        extrapolated_share=log.extrapolated / log.lookups if log.lookups else None,
        saturation=saturation(table.arrival_s[counted], np.sort(served)),
        wall_s=wall_s,
        prefix_hit_share=prefix_hit_share,
    )


def saturation(arrival_s: FloatArray, first_token_s: FloatArray) -> Saturation:
    """Whether the system kept up with what arrived, seen while requests arrived (docs/metrics.md has the formulas).

    ``overloaded``: the number of requests waiting for their first token grew, and was large at the last arrival.
    ``backlogged``: it was large at some time. ``stable``: neither. The idea, a trend of the backlog that leaves the
    drain after the last arrival out, is that of inference-sim's issues 1298 and 1390.

    Args:
        arrival_s: Of every request, ascending, without those that the scheduler dropped.
        first_token_s: Of every request that got one, ascending.
    """
    if not len(arrival_s):
        return "stable"
    waiting = np.arange(1, len(arrival_s) + 1) - np.searchsorted(first_token_s, arrival_s, side="right")
    large = max(SATURATED_SHARE * len(arrival_s), FEW_REQUESTS)
    start_s, end_s = float(arrival_s[0]), float(arrival_s[-1])
    half_s = (end_s - start_s) / 2
    if half_s > 0 and waiting[-1] > large:
        before, after = (
            (_count_s(arrival_s, t, t + half_s) - _count_s(first_token_s, t, t + half_s)) / half_s
            for t in (start_s, start_s + half_s)
        )
        if 2 * (after - before) > large:
            return "overloaded"
    return "backlogged" if waiting.max() > large else "stable"


def _count_s(events_s: FloatArray, start_s: float, end_s: float) -> float:
    """Integral from start to end of the number of events so far."""
    return float(np.sum(np.maximum(end_s - np.maximum(events_s, start_s), 0.0)))


def _placed(ids: IntArray, of: IntArray, values: FloatArray) -> FloatArray:
    """The values in the rows of their ids, NaN elsewhere."""
    column = np.full(len(ids), np.nan)
    order = np.argsort(ids, kind="stable")
    if np.any(np.diff(ids[order]) == 0):
        raise ValueError("two requests have the same id")
    found = np.searchsorted(ids[order], of)
    if len(of) and (not len(ids) or np.any(ids[order[np.minimum(found, len(ids) - 1)]] != of)):
        raise ValueError("the log has requests that are not among those given")
    column[order[found]] = values
    return column


def _present(values: FloatArray, counts: IntArray) -> Counted:
    """Without the values that do not occur."""
    occur = counts > 0
    return values[occur], counts[occur]


def _floats(column: array[float]) -> FloatArray:
    return np.array(column, dtype=np.float64)


def _ints(column: array[int]) -> IntArray:
    return np.array(column, dtype=np.int64)
