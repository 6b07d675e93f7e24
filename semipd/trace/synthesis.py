"""A trace drawn from a generator specification."""

from __future__ import annotations

import numpy as np

from semipd.core import FloatArray, InputError, IntArray
from semipd.trace.columns import Trace
from semipd.trace.csv_reader import AZURE_TICKS_PER_S
from semipd.trace.scaling import MAX_REQUESTS, check_rate_scale
from semipd.trace.spec import MAX_DURATION_S, TraceSpec

_BLOCK = 4096


def synth(
    spec: TraceSpec,
    seed: int = 0,
    *,
    duration_s: float | None = None,
    requests: int | None = None,
    rate_scale: float = 1.0,
) -> Trace:
    """Draw a trace: the same arguments give the same trace.

    It lasts ``duration_s``, or has ``requests`` requests, or lasts as long as the source did; past the source's
    duration its windows start over. ``rate_scale`` multiplies every window's rate and leaves the windows where they
    are (unlike ``scale_rate``, which warps time). Arrivals and lengths come from separate streams, so request i
    has the same lengths at every rate. The first request arrives at 0 s; arrivals are rounded to 100 ns.
    Raises InputError for an argument out of range, when both ``duration_s`` and ``requests`` are given, and for a
    trace of more than 50 million requests.
    """
    _check(spec, seed, duration_s, requests, rate_scale)
    arrivals, lengths = (np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(2))
    if requests is None:
        arrival_s = _arrivals_within(spec, arrivals, duration_s or spec.duration_s, rate_scale)
    else:
        arrival_s = _inverse_rate_s(spec, rate_scale, _unit_arrivals(spec, arrivals, requests))
    arrival_s = np.rint((arrival_s - arrival_s[0]) * AZURE_TICKS_PER_S) / AZURE_TICKS_PER_S
    prompt_len, output_len = _lengths(spec, lengths, len(arrival_s))
    return Trace(
        name=f"{spec.name}-synth",
        arrival_s=arrival_s,
        prompt_len=prompt_len,
        output_len=output_len,
        source_format="synth",
        rows_read=len(arrival_s),
        operations=(f"drawn from {spec.name}, rate x {rate_scale:g}, seed {seed}",),
    )


def _unit_arrivals(spec: TraceSpec, rng: np.random.Generator, n: int) -> FloatArray:
    """``n`` arrivals of a renewal process with Gamma gaps of mean 1 and the fitted shape, the first at 0."""
    gaps = rng.gamma(spec.burstiness, 1 / spec.burstiness, n - 1)
    return np.concatenate(([0.0], np.cumsum(gaps)))


def _arrivals_within(spec: TraceSpec, rng: np.random.Generator, duration_s: float, rate_scale: float) -> FloatArray:
    """Arrivals from the first one's time t0 until t0 + ``duration_s`` (exclusive)."""
    parts = [np.zeros(1)]
    while True:
        arrival_s = _inverse_rate_s(spec, rate_scale, np.concatenate(parts))
        inside = np.searchsorted(arrival_s, arrival_s[0] + duration_s, side="left")
        if inside < len(arrival_s):
            return arrival_s[:inside]
        gaps = rng.gamma(spec.burstiness, 1 / spec.burstiness, _BLOCK * len(parts))
        parts.append(parts[-1][-1] + np.cumsum(gaps))


def _inverse_rate_s(spec: TraceSpec, rate_scale: float, expected: FloatArray) -> FloatArray:
    """The times at which the integral of the rate reaches ``expected`` arrivals, cycling over the windows."""
    edges_s = spec.window_edges_s()
    rate_rps = np.array(spec.rate_rps) * rate_scale
    reached = np.concatenate(([0.0], np.cumsum(rate_rps * np.diff(edges_s))))
    cycle, rest = np.divmod(expected, reached[-1])
    # The last window that begins at or before ``rest`` has a rate above 0: an empty one begins where the next does.
    index = np.searchsorted(reached, rest, side="right") - 1
    within_s = np.minimum(edges_s[index] + (rest - reached[index]) / rate_rps[index], edges_s[index + 1])
    return np.asarray(cycle * spec.duration_s + within_s, dtype=np.float64)


def _lengths(spec: TraceSpec, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray]:
    """Prompt lengths by inverting their quantiles, then each output within its prompt's bin, independently."""
    draws = rng.random((n, 2))
    levels = np.array(spec.quantile_levels)
    prompt_len = np.interp(draws[:, 0], levels, spec.prompt_quantiles_tokens)
    bins = spec.output_quantiles_tokens_by_prompt_bin
    index = (draws[:, 0] * len(bins)).astype(np.int64)
    output_len = np.empty(n)
    for i, quantiles in enumerate(bins):
        output_len[index == i] = np.interp(draws[index == i, 1], levels, quantiles)
    return np.rint(prompt_len).astype(np.int64), np.rint(output_len).astype(np.int64)


def _check(spec: TraceSpec, seed: int, duration_s: float | None, requests: int | None, rate_scale: float) -> None:
    check_rate_scale(spec.name, rate_scale)
    if seed < 0:
        raise InputError(f"{spec.name}: seed: found {seed}, expected an integer from 0")
    if duration_s is not None and requests is not None:
        raise InputError(f"{spec.name}: found both a duration and a number of requests, expected one of them")
    if duration_s is not None and not 0 < duration_s <= MAX_DURATION_S:
        raise InputError(
            f"{spec.name}: duration_s: found {duration_s:g}, expected above 0 and up to {MAX_DURATION_S:g}"
        )
    if requests is not None and requests < 1:
        raise InputError(f"{spec.name}: requests: found {requests}, expected an integer from 1")
    mean_rps = float(np.dot(spec.rate_rps, np.diff(spec.window_edges_s()))) / spec.duration_s * rate_scale
    expected = requests or mean_rps * (duration_s or spec.duration_s)
    if expected > MAX_REQUESTS:
        raise InputError(f"{spec.name}: found about {expected:.3g} requests to draw, expected at most {MAX_REQUESTS}")
