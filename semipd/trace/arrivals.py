"""Arrivals other than the trace's own: drawn from a named process, or spread where the stamps are coarse."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from semipd.core import FloatArray, InputError
from semipd.trace.columns import Trace
from semipd.trace.scaling import Starts, generator, rebase, starts_of

MIN_RATE_RPS = 1e-6
MAX_RATE_RPS = 1e6
MIN_BURSTINESS = 1e-3
MAX_BURSTINESS = 1e6


class Process(str, Enum):
    """How arrivals come about. ``trace``: as they are."""

    TRACE = "trace"
    POISSON = "poisson"
    GAMMA = "gamma"
    RAMP = "ramp"
    CONSTANT = "constant"


@dataclass(frozen=True)
class Arrivals:
    """An arrival process.

    ``rate_rps``: starts/s, those of the trace when None. A start is a request, or a session with all its turns.
    ``burstiness`` b, for ``gamma`` and ``ramp``, is vLLM's: gaps are Gamma with shape b and mean 1/rate, so their
    coefficient of variation is 1/sqrt(b). ``end_rate_rps``: where a ramp ends. Raises InputError for a value that is
    out of range, that the process needs and lacks, or that it has no use for.
    """

    process: Process = Process.TRACE
    rate_rps: float | None = None
    burstiness: float | None = None
    end_rate_rps: float | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "process", Process(self.process))
        except ValueError:
            known = ", ".join(p.value for p in Process)
            raise InputError(f"arrivals: process: found {self.process!r}, expected one of {known}") from None
        ramp = self.process is Process.RAMP
        self._check("rate_rps", self.rate_rps, MIN_RATE_RPS, MAX_RATE_RPS, self.process is not Process.TRACE, ramp)
        self._check("end_rate_rps", self.end_rate_rps, MIN_RATE_RPS, MAX_RATE_RPS, ramp, ramp)
        gamma = self.process is Process.GAMMA
        self._check("burstiness", self.burstiness, MIN_BURSTINESS, MAX_BURSTINESS, gamma or ramp, gamma)

    def _check(self, name: str, value: float | None, low: float, high: float, used: bool, needed: bool) -> None:
        if value is None:
            if needed:
                raise InputError(f"arrivals: {name}: found none, expected {low:g} to {high:g} for {self.process.value}")
        elif not used:
            raise InputError(f"arrivals: {name}: found {value:g}, expected none for {self.process.value} arrivals")
        elif not low <= value <= high:
            raise InputError(f"arrivals: {name}: found {value:g}, expected {low:g} to {high:g}")


def draw_arrivals(trace: Trace, arrivals: Arrivals, seed: int = 0) -> Trace:
    """The same requests at other times, in the same order; the first one arrives at 0 s.

    Poisson: exponential gaps. Gamma: see ``Arrivals``. Constant: equal gaps. Ramp, as vLLM's linear one: the i-th of
    n gaps is drawn at the rate a + (b - a) i / n, so the rate grows evenly over starts, not over time. (Unlike
    vLLM, arrivals are not scaled afterwards to end at n / rate.) What is drawn are starts: the later turns of a
    session keep their distance to its first. Raises InputError for a negative seed, and without a rate for a trace
    whose starts have none.
    """
    if arrivals.process is Process.TRACE:
        return trace
    rng = generator(trace.name, seed, 2)
    starts = starts_of(trace)
    rate_rps = arrivals.rate_rps or _own_rate_rps(trace, starts)
    gaps = len(starts.first) - 1
    rates = np.full(gaps, rate_rps)
    if arrivals.end_rate_rps is not None:
        rates += (arrivals.end_rate_rps - rate_rps) * np.arange(1, gaps + 1) / max(gaps, 1)
    shape = 1.0 if arrivals.burstiness is None else arrivals.burstiness
    unit = np.ones(gaps) if arrivals.process is Process.CONSTANT else rng.gamma(shape, 1 / shape, gaps)
    at_s = np.concatenate(([0.0], np.cumsum(unit / rates)))
    name = f"{arrivals.process.value} arrivals, {rate_rps:g} requests/s"
    if arrivals.end_rate_rps is not None:
        name += f" to {arrivals.end_rate_rps:g}"
    if arrivals.burstiness is not None:
        name += f", burstiness {arrivals.burstiness:g}"
    if arrivals.process is not Process.CONSTANT:
        name += f", seed {seed}"
    offset_s = trace.arrival_s - trace.arrival_s[starts.first][starts.of]
    return rebase(replace(trace, operations=(*trace.operations, name)), at_s[starts.of] + offset_s)


def dequantise(trace: Trace, quantum_s: float, seed: int = 0) -> Trace:
    """Spread the requests of each time stamp evenly at random over the ``quantum_s`` that follows it.

    They stay in order: a spread ends where the next stamp is, if that comes sooner, and the requests of one stamp
    take their places in the order they have. For stamps that were rounded down, as Mooncake's batches of 3 s and
    BurstGPT's seconds. Raises InputError for a negative seed or a quantum that is not above 0.
    """
    if not 0 < quantum_s <= 86_400:
        raise InputError(f"{trace.name}: quantum: found {quantum_s:g} s, expected above 0 and up to 86400 s")
    rng = generator(trace.name, seed, 3)
    stamps, group = np.unique(trace.arrival_s, return_inverse=True)
    width_s = np.minimum(np.diff(stamps, append=np.inf), quantum_s)
    share = rng.random(len(trace))
    share = share[np.lexsort((share, group))]  # ascending within each stamp, whose requests are next to each other
    name = f"stamps spread over {quantum_s:g} s, seed {seed}"
    spread_s = stamps[group] + width_s[group] * share
    return rebase(replace(trace, operations=(*trace.operations, name)), spread_s)


def _own_rate_rps(trace: Trace, starts: Starts) -> float:
    """Starts a second, by the mean gap between them."""
    at_s: FloatArray = trace.arrival_s[starts.first]
    duration_s = float(at_s[-1])
    rate_rps = (len(at_s) - 1) / duration_s if duration_s else 0.0
    if not MIN_RATE_RPS <= rate_rps <= MAX_RATE_RPS:
        raise InputError(f"{trace.name}: rate: found none in a trace of {duration_s:g} s, expected one to be given")
    return rate_rps
