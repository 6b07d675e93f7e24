"""A trace reduced to its generator specification."""

from __future__ import annotations

import math

import numpy as np

from semipd.core import FloatArray, InputError, IntArray
from semipd.trace.columns import Trace
from semipd.trace.spec import MAX_BURSTINESS, MAX_DURATION_S, MAX_WINDOWS, MIN_BURSTINESS, TraceSpec, window_edges_s

# Even steps for the body; closer ones where a heavy tail bends away from the line between two points.
LEVELS: tuple[float, ...] = (
    *(round(0.02 * i, 2) for i in range(50)),
    0.985,
    0.99,
    0.9925,
    0.995,
    0.9975,
    0.999,
    0.9995,
    1.0,
)
PROMPT_BINS = 8


def fit(
    trace: Trace,
    window_s: float = 60.0,
    *,
    name: str | None = None,
    source: str = "unstated",
    licence: str = "unstated",
    attribution: str = "unstated",
    command: str = "",
) -> TraceSpec:
    """Fit arrivals window by window, burstiness within windows, and the lengths' quantiles.

    Raises InputError when the trace has no duration or one over 1e9 s, when the window is not positive or gives
    more than 10,000 windows, and when no burstiness can be told within windows.
    """
    duration_s = round(trace.duration_s, 7)
    if not 0 < duration_s <= MAX_DURATION_S:
        raise InputError(
            f"{trace.name}: duration: found {duration_s:g} s, expected above 0 and up to {MAX_DURATION_S:g} s"
        )
    least = duration_s / MAX_WINDOWS
    if not max(least, 1e-6) <= window_s <= MAX_DURATION_S:
        raise InputError(
            f"{trace.name}: window_s: found {window_s:g}, expected {max(least, 1e-6):g} to {MAX_DURATION_S:g} s"
        )
    edges_s = window_edges_s(duration_s, window_s)
    counts = np.histogram(np.minimum(trace.arrival_s, duration_s), edges_s)[0]
    rates = counts / np.diff(edges_s)
    return TraceSpec(
        name=name or trace.name,
        source=source,
        licence=licence,
        attribution=attribution,
        source_sha256=trace.sha256 or "",
        command=command,
        duration_s=duration_s,
        window_s=float(window_s),
        rate_rps=tuple(_digits(rate, 6) for rate in rates.tolist()),
        burstiness=_digits(burstiness(trace, window_s), 4),
        quantile_levels=LEVELS,
        prompt_quantiles_tokens=_quantiles(trace.prompt_len),
        output_quantiles_tokens_by_prompt_bin=_output_quantiles(trace.prompt_len, trace.output_len),
    )


def burstiness(trace: Trace, window_s: float) -> float:
    """Gamma shape b of the gaps between arrivals, each taken relative to its window's mean gap.

    Estimator: in a window with n gaps let r = (sample variance) / (mean gap)^2. A Gamma sample's mean is
    independent of its shape statistics, so E[r] = n c / (n + c) exactly, with c = CV^2 = 1/b. Windows are pooled
    by their degrees of freedom and sum((n - 1) r) = sum((n - 1) n c / (n + c)) is solved for c; so a small n
    does not bias it. Gaps that cross a window's edge are left out, which makes b a little too large for gaps
    comparable to a window. Equal gaps give 1e6. Raises InputError when no window holds three arrivals, not all at
    one time, and when stamps are so coarse that a window sees only one gap between clumps.
    """
    index = (trace.arrival_s // window_s).astype(np.int64)
    index = np.unique(index, return_inverse=True)[1]  # empty windows would cost memory only
    inside = index[1:] == index[:-1]
    window, gap_s = index[1:][inside], np.diff(trace.arrival_s)[inside]
    n = np.bincount(window, minlength=index[-1] + 1)
    total_s = np.bincount(window, gap_s, minlength=len(n))
    usable = (n >= 2) & (total_s > 0)
    if not usable.any():
        raise _window_too_short(trace, window_s)
    mean_s = np.where(usable, total_s / np.maximum(n, 1), 1.0)
    spread = np.bincount(window, (gap_s / mean_s[window] - 1) ** 2, minlength=len(n))  # (n - 1) r
    cv2 = _solve_cv2(n[usable].astype(np.float64), float(spread[usable].sum()))
    if cv2 > 1 / MIN_BURSTINESS:
        raise _window_too_short(trace, window_s)
    return 1 / cv2


def _window_too_short(trace: Trace, window_s: float) -> InputError:
    return InputError(
        f"{trace.name}: window_s: found {window_s:g}, in which arrivals come alone or as one or two clumps, "
        f"expected a longer one (burstiness is taken from the gaps inside a window)"
    )


def _solve_cv2(n: FloatArray, pooled: float) -> float:
    """The c with sum((n - 1) n c / (n + c)) = pooled, by bisection of its logarithm: the sum grows with c."""
    low, high = -math.log10(MAX_BURSTINESS), 1 - math.log10(MIN_BURSTINESS)
    while high - low > 1e-12:
        middle = (low + high) / 2
        c = 10**middle
        if float(((n - 1) * n * c / (n + c)).sum()) < pooled:
            low = middle
        else:
            high = middle
    return float(10**low)


def _output_quantiles(prompt_len: IntArray, output_len: IntArray) -> tuple[tuple[int, ...], ...]:
    """Output quantiles per prompt-length bin; bins hold equally many requests (fewer bins for a tiny trace)."""
    by_prompt = np.argsort(prompt_len, kind="stable")
    bins = np.array_split(output_len[by_prompt], min(PROMPT_BINS, len(output_len)))
    return tuple(_quantiles(values) for values in bins)


def _quantiles(values: IntArray) -> tuple[int, ...]:
    return tuple(np.rint(np.quantile(values, LEVELS)).astype(np.int64).tolist())


def _digits(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")
