"""What a replay amounts to: a table of its requests, and the summary (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from semipd.core import FloatArray, IntArray, Request
from semipd.diagnosis import Bound
from semipd.distribution import Distribution
from semipd.log import Log
from semipd.slo import Slo
from semipd.trace import Trace

Saturation = Literal["stable", "backlogged", "overloaded"]

SATURATED_SHARE = 0.05
"""Requests waiting for their first token, as a share of all, that make a queue (docs/metrics.md, saturation)."""

FEW_REQUESTS = 10
"""So many waiting are no queue, however short the trace."""


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
