"""Everything that can be done to a trace before it is replayed, in one order."""

from __future__ import annotations

from dataclasses import dataclass, field

from semipd.trace.arrivals import Arrivals, dequantise, draw_arrivals
from semipd.trace.columns import Trace, window
from semipd.trace.scaling import replicate, scale_rate, thin


@dataclass(frozen=True)
class Reshape:
    """What to do to a trace; the defaults leave it as it is. The parts are documented where they are defined.

    ``start_s``, ``end_s``: ``window``. ``dequantise_s``: the quantum of ``dequantise``. ``thin``: share to keep.
    ``replicate``, ``jitter_s``, ``every_s``: ``replicate``. ``arrivals``: ``draw_arrivals``. ``rate_scale``:
    ``scale_rate``. ``seed``: of each of them, which have random numbers of their own.
    """

    start_s: float = 0.0
    end_s: float | None = None
    dequantise_s: float | None = None
    thin: float = 1.0
    replicate: int = 1
    jitter_s: float = 1.0
    every_s: float = 0.0
    arrivals: Arrivals = field(default_factory=Arrivals)
    rate_scale: float = 1.0
    seed: int = 0


def reshape(trace: Trace, how: Reshape) -> Trace:
    """The trace cut, dequantised, thinned, replicated, given other arrivals and warped, in this order.

    Raises InputError as each of these does.
    """
    if how.start_s != 0 or how.end_s is not None:
        trace = window(trace, how.start_s, float("inf") if how.end_s is None else how.end_s)
    if how.dequantise_s is not None:
        trace = dequantise(trace, how.dequantise_s, how.seed)
    trace = thin(trace, how.thin, how.seed)
    trace = replicate(trace, how.replicate, how.jitter_s, how.every_s, how.seed)
    trace = draw_arrivals(trace, how.arrivals, how.seed)
    return scale_rate(trace, how.rate_scale)
