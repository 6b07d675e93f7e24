"""What sharing a device buys at one load: decode step time against prefill throughput.

Both phases have work throughout. A *point* is one way of running them at once. *In turn* is the alternative that needs
no sharing: the whole device, for prefill a share of the time and for decode the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from semipd.points import Sharing
from semipd.prices import Source

IN_TURN = "in turn"


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Both phases at once: seconds of a decode step, all layers, and prefill tokens per second through all layers.

    ``source``: where these are from. ``spread``: p90 - p10 of the measured steps as a share of their median, None where
    none were measured. ``chunk_tokens``: of mode ``mixed``, tokens of a fused step, the decode batch's among them.
    """

    sharing: Sharing
    step_s: float
    prefill_tps: float
    source: Source = Source.MEASURED
    spread: float | None = None
    chunk_tokens: int = 0

    @property
    def name(self) -> str:
        """As in ``time_in_split``; of fused steps that of the policy."""
        return f"chunked-{self.chunk_tokens}" if self.chunk_tokens else self.sharing.name


@dataclass(frozen=True, slots=True)
class InTurn:
    """The whole device, one phase at a time: a decode step alone, and prefill tokens per second alone.

    With a share f of the time for prefill, prefill makes f * ``prefill_tps``, and decode steps last
    ``step_s`` / (1 - f) on average: in rates, a straight line between the two phases alone. Switching is taken to cost
    nothing, which favours in turn; a single gap between two tokens is as long as prefill then holds the device.
    """

    step_s: float
    prefill_tps: float

    def tps_at(self, step_s: float) -> float:
        """Prefill tokens per second while decode steps last ``step_s`` on average; 0 if decode is not so fast."""
        return self.prefill_tps * max(0.0, 1 - self.step_s / step_s)

    def step_s_at(self, prefill_tps: float) -> float:
        """Average decode step while prefill makes ``prefill_tps``; infinite if prefill is not so fast."""
        idle = 1 - prefill_tps / self.prefill_tps
        return self.step_s / idle if idle > 0 else inf

    def gain(self, point: OperatingPoint) -> float | None:
        """Prefill throughput of a point over in turn at equal decode speed; None where in turn has none left."""
        tps = self.tps_at(point.step_s)
        return point.prefill_tps / tps if tps > 0 else None

    def weighted_speedup(self, point: OperatingPoint) -> float:
        """Both rates of a point as shares of the whole device's, summed; in turn it is 1 whatever the shares.

        This is the system throughput (STP) of Eyerman and Eeckhout (IEEE Micro 28(3), 2008): how much longer in
        turn takes for the same work of both phases.
        """
        return self.step_s / point.step_s + point.prefill_tps / self.prefill_tps


@dataclass(frozen=True, slots=True)
class Stretch:
    """TPOT limits, from ``from_s`` up to ``to_s``, for which ``best`` has the most prefill throughput.

    ``best`` is a point's name or ``in turn``. ``prefill_tps``: its throughput at ``from_s``; in turn gains with the
    limit, a point does not.
    """

    from_s: float
    to_s: float
    best: str
    prefill_tps: float


@dataclass(frozen=True, slots=True)
class Optimum:
    """The point with the most prefill throughput within a TPOT limit, against in turn.

    ``best``: None when no point meets the limit. ``in_turn_tps``: in turn with decode just at the limit.
    ``equal_tps``: in turn with decode as fast as ``best``; 0 without one.
    """

    tpot_s: float
    best: OperatingPoint | None
    in_turn_tps: float
    equal_tps: float

    @property
    def take(self) -> str | None:
        """What has the most prefill throughput: a point's name, ``in turn``, or None when nothing meets the limit."""
        if self.best is not None and self.best.prefill_tps >= self.in_turn_tps:
            return self.best.name
        return IN_TURN if self.in_turn_tps > 0 else None


def dominator(point: OperatingPoint, points: Sequence[OperatingPoint], in_turn: InTurn) -> str | None:
    """What is at least as good in both and better in one: of those the one with the most prefill throughput, or None.

    In turn counts at the point's own decode speed.
    """
    better = {
        other.name: other.prefill_tps
        for other in points
        if other.step_s <= point.step_s
        and other.prefill_tps >= point.prefill_tps
        and (other.step_s, other.prefill_tps) != (point.step_s, point.prefill_tps)
    }
    tps = in_turn.tps_at(point.step_s)
    if tps > point.prefill_tps:
        better[IN_TURN] = tps
    return max(better, key=lambda name: better[name]) if better else None


def best_where(points: Sequence[OperatingPoint], in_turn: InTurn) -> tuple[Stretch, ...]:
    """Which way is best for which TPOT limit, by ascending limit; below the first stretch nothing is fast enough."""
    ahead: list[OperatingPoint] = []  # ever slower decode, ever more prefill
    for point in sorted(points, key=lambda p: (p.step_s, -p.prefill_tps)):
        if not ahead or point.prefill_tps > ahead[-1].prefill_tps:
            ahead.append(point)
    starts = [point.step_s for point in ahead]
    found: list[Stretch] = []
    first = min(starts, default=inf)
    if in_turn.step_s < first:
        found.append(Stretch(in_turn.step_s, first, IN_TURN, 0.0))
    for point, end in zip(ahead, [*starts[1:], inf], strict=True):
        overtaken = min(max(in_turn.step_s_at(point.prefill_tps), point.step_s), end)
        if overtaken > point.step_s:
            found.append(Stretch(point.step_s, overtaken, point.name, point.prefill_tps))
        if overtaken < end:
            found.append(Stretch(overtaken, end, IN_TURN, in_turn.tps_at(overtaken)))
    return _joined(found)


def _joined(stretches: Sequence[Stretch]) -> tuple[Stretch, ...]:
    """Neighbours of one name as one."""
    joined: list[Stretch] = []
    for s in stretches:
        if joined and joined[-1].best == s.best:
            joined[-1] = Stretch(joined[-1].from_s, s.to_s, s.best, joined[-1].prefill_tps)
        else:
            joined.append(s)
    return tuple(joined)


def optimum(points: Sequence[OperatingPoint], in_turn: InTurn, tpot_s: float) -> Optimum:
    """The point with the most prefill throughput whose decode step lasts at most ``tpot_s``; the fastest of equals."""
    fast = [point for point in points if point.step_s <= tpot_s]
    best = max(fast, key=lambda p: (p.prefill_tps, -p.step_s)) if fast else None
    equal = in_turn.tps_at(best.step_s) if best else 0.0
    return Optimum(tpot_s, best, in_turn.tps_at(tpot_s), equal)
