"""What a trace looks like in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from semipd.core import FloatArray, IntArray
from semipd.trace.columns import Prefixes, Trace


@dataclass(frozen=True)
class TokenSummary:
    """Mean and percentiles of a length in tokens (linear interpolation between order statistics)."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class TraceInfo:
    """Statistics of a trace; None where it is too short to have one.

    ``rate_rps``: requests / (last arrival - first). ``interarrival_cv``: standard deviation / mean of the gaps.
    ``dispersion_*``: variance / mean of the number of arrivals in whole bins of that width, 1 for Poisson.
    ``prefix_share``: share of all prompt tokens in leading blocks that an earlier request had too, which is the
    hit rate of an unbounded prefix cache; None without block ids. ``sessions``: how many there are, and
    ``session_requests`` the requests that are their turns. ``stamps``: different arrival times, ``least_gap_s`` the
    least time between two of them; few of them far apart mean coarse stamps. ``rows_read`` + ``added`` (by
    replication) = ``requests`` + all of ``dropped``.
    """

    name: str
    source_format: str
    sha256: str | None
    rows_read: int
    dropped: dict[str, int]
    requests: int
    duration_s: float
    rate_rps: float | None
    prompt_tokens: TokenSummary
    output_tokens: TokenSummary
    interarrival_cv: float | None
    dispersion_1s: float | None
    dispersion_10s: float | None
    dispersion_60s: float | None
    prefix_share: float | None
    added: int
    sessions: int
    session_requests: int
    stamps: int
    least_gap_s: float | None
    operations: list[str]


def info(trace: Trace) -> TraceInfo:
    """Statistics of a trace."""
    stamps = np.unique(trace.arrival_s)
    session = trace.sessions.index[trace.sessions.index >= 0] if trace.sessions else np.zeros(0, dtype=np.int64)
    return TraceInfo(
        name=trace.name,
        source_format=trace.source_format,
        sha256=trace.sha256,
        rows_read=trace.rows_read,
        dropped=dict(trace.dropped),
        requests=len(trace),
        duration_s=trace.duration_s,
        rate_rps=len(trace) / trace.duration_s if trace.duration_s else None,
        prompt_tokens=_summary(trace.prompt_len),
        output_tokens=_summary(trace.output_len),
        interarrival_cv=_interarrival_cv(trace.arrival_s),
        dispersion_1s=dispersion(trace.arrival_s, 1),
        dispersion_10s=dispersion(trace.arrival_s, 10),
        dispersion_60s=dispersion(trace.arrival_s, 60),
        prefix_share=_prefix_share(trace.prefixes, trace.prompt_len) if trace.prefixes else None,
        added=trace.added,
        sessions=len(np.unique(session)),
        session_requests=len(session),
        stamps=len(stamps),
        least_gap_s=float(np.diff(stamps).min()) if len(stamps) > 1 else None,
        operations=list(trace.operations),
    )


def dispersion(arrival_s: FloatArray, bin_s: float) -> float | None:
    """Variance / mean of the arrivals in every whole bin of ``bin_s``; None with fewer than two.

    The rest after the last whole bin is left out: counted as a bin it would look like a drop in rate.
    """
    bins = float(arrival_s[-1] // bin_s)
    index = arrival_s // bin_s
    counts = np.unique(index[index < bins], return_counts=True)[1].astype(np.float64)  # bins that are not empty
    if bins < 2:
        return None
    mean = counts.sum() / bins
    return float(((counts**2).sum() / bins - mean**2) / mean)


def _interarrival_cv(arrival_s: FloatArray) -> float | None:
    gaps = np.diff(arrival_s)
    return float(gaps.std() / gaps.mean()) if len(gaps) >= 2 and gaps.any() else None


def _summary(tokens: IntArray) -> TokenSummary:
    p50, p90, p99 = np.percentile(tokens, (50, 90, 99)).tolist()
    return TokenSummary(float(tokens.mean()), p50, p90, p99)


def _prefix_share(prefixes: Prefixes, prompt_len: IntArray) -> float:
    ids, offsets, prompts = prefixes.ids.tolist(), prefixes.offsets.tolist(), prompt_len.tolist()
    seen: set[int] = set()
    hit_tokens = 0
    for i, prompt in enumerate(prompts):
        blocks = ids[offsets[i] : offsets[i + 1]]
        leading = next((n for n, block in enumerate(blocks) if block not in seen), len(blocks))
        hit_tokens += min(leading * prefixes.block_tokens, prompt)
        seen.update(blocks)
    return float(hit_tokens / sum(prompts))
