"""What sharing gains, against running the two phases in turn on the whole device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from semipd.points import DecodePoint, MixedPoint, PrefillPoint, TotalPoint


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


@dataclass(frozen=True)
class FusedGain:
    """A fused batch against its two parts, each alone on the whole device, one after the other; ms of one layer.

    ``prefill_ms``: by the same backend. ``fastest_ms``: by the fastest.
    """

    fused: MixedPoint
    prefill_ms: float
    fastest_ms: float
    decode_ms: float

    @property
    def in_turn_ms(self) -> float:
        """Both parts by the same backend."""
        return self.prefill_ms + self.decode_ms

    @property
    def over_same(self) -> float:
        """Speed-up over the same backend in turn."""
        return self.in_turn_ms / self.fused.median_ms

    @property
    def over_fastest(self) -> float:
        """Speed-up over the fastest backend in turn."""
        return (self.fastest_ms + self.decode_ms) / self.fused.median_ms

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "over_same": self.over_same, "over_fastest": self.over_fastest}


def fused_gains(
    fused: Sequence[MixedPoint], prefills: Sequence[PrefillPoint], decodes: Sequence[DecodePoint]
) -> list[FusedGain]:
    """What each fused batch gains whose parts were measured, too; by decode batch, then by chunk, the fastest first.

    ``prefills`` and ``decodes`` are those of the whole device.
    """
    alone: dict[tuple[int, int, int], dict[str, float]] = {}
    for p in prefills:
        alone.setdefault((p.seqs, p.seq_tokens, p.seq_context), {})[p.backend] = p.median_ms
    decode_ms = {(d.batch, d.kv_tokens): d.median_ms for d in decodes}
    gains = []
    for point in fused:
        parts, decode = (point.seqs, point.seq_tokens, point.seq_context), (point.batch, point.kv_tokens)
        if point.backend in alone.get(parts, {}) and decode in decode_ms:
            by_backend = alone[parts]
            gains.append(FusedGain(point, by_backend[point.backend], min(by_backend.values()), decode_ms[decode]))
    return sorted(
        gains, key=lambda g: (g.fused.batch, g.fused.kv_tokens, g.fused.tokens, g.fused.mean_context, g.fused.median_ms)
    )
