"""What sharing gains on fixed work, against running the two phases in turn on the whole device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from semipd.sweep import TotalPoint


@dataclass(frozen=True)
class Gain:
    """The fastest sharing with one prefill backend (or with any) and what it gains.

    ``same_ms``: the same backend in turn on the whole device. ``fastest_ms``: in turn with the fastest backend,
    the baseline that a better kernel alone would reach.
    """

    best: TotalPoint
    same_ms: float
    fastest_ms: float

    @property
    def over_same(self) -> float:
        """Speed-up over the same backend in turn."""
        return self.same_ms / self.best.total_ms

    @property
    def over_fastest(self) -> float:
        """Speed-up over the fastest backend in turn."""
        return self.fastest_ms / self.best.total_ms

    @property
    def gain_percent(self) -> float:
        """Gain in throughput over the fastest in turn, percent."""
        return (self.over_fastest - 1) * 100

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **asdict(self),
            "over_same": self.over_same,
            "over_fastest": self.over_fastest,
            "gain_percent": self.gain_percent,
        }


@dataclass(frozen=True)
class TotalSummary:
    """Fixed work, summed up: the runs in turn, the best sharing, the best disjoint split, the best per backend."""

    in_turn: tuple[TotalPoint, ...]
    best: Gain
    best_split: Gain | None
    by_backend: tuple[Gain, ...]

    def document(self) -> dict[str, Any]:
        """As JSON: milliseconds, speed-ups, and SMs of each sharing."""
        return {
            "in_turn": [asdict(point) for point in self.in_turn],
            "best": self.best.document(),
            "best_split": self.best_split.document() if self.best_split else None,
            "by_backend": [gain.document() for gain in self.by_backend],
        }


def summarise_totals(points: Sequence[TotalPoint]) -> TotalSummary | None:
    """Sum up a fixed-work table; None while it lacks a sharing whose backend was also run in turn."""
    in_turn = sorted((p for p in points if p.mode == "in-turn"), key=lambda p: p.total_ms)
    same_ms = {p.prefill_backend: p.total_ms for p in in_turn}
    shared = sorted(
        (p for p in points if p.mode != "in-turn" and p.prefill_backend in same_ms), key=lambda p: p.total_ms
    )
    if not shared:
        return None

    def gain(point: TotalPoint) -> Gain:
        return Gain(point, same_ms[point.prefill_backend], in_turn[0].total_ms)

    best_of: dict[str, TotalPoint] = {}
    for point in shared:
        best_of.setdefault(point.prefill_backend, point)
    split = next((p for p in shared if p.mode == "split"), None)
    return TotalSummary(
        tuple(in_turn), gain(shared[0]), gain(split) if split else None, tuple(gain(p) for p in best_of.values())
    )
