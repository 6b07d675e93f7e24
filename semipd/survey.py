"""What a profile says at one load: scaling curves, heat map, frontier; every value with where it is from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from math import isfinite, log2
from typing import Any

import numpy as np

from semipd.core import Allocation, DecodeShape, InputError, Mode, PrefillShape
from semipd.cost import CostModel
from semipd.frontier import InTurn, OperatingPoint, Optimum, Stretch, best_where, dominator, optimum
from semipd.profile import Profile
from semipd.sweep import DecodePoint, HybridPoint, PrefillPoint, Sharing

MODES = ("split", "capped", "priority", "streams")
"""Ways of running both phases at once that a hybrid table may hold."""


class Source(str, Enum):
    """Where a value is from: a measured point, between measured points, or outside and clamped to the grid's edge."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    OUTSIDE = "outside"


def worst(sources: Iterable[Source]) -> Source:
    """The least certain of some sources; ``measured`` when there is none."""
    order = tuple(Source)
    return max(sources, key=order.index, default=Source.MEASURED)


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds, of one prefill layer or of one decode step of all layers."""

    seconds: float
    source: Source


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A load as the tables place it: a prefill batch and a decode batch, tokens throughout."""

    tokens: int
    mean_context: int
    batch: int
    kv_tokens: int

    @property
    def prefill(self) -> PrefillShape:
        """The prefill batch."""
        return PrefillShape(self.tokens, float(self.tokens * self.mean_context))

    @property
    def decode(self) -> DecodeShape:
        """The decode batch."""
        return DecodeShape(self.batch, self.kv_tokens)

    def octaves_from(self, other: Place) -> float:
        """Distance to another place: factors of two, summed over the four axes."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return sum(abs(log2(a / b)) for a, b in pairs)


TYPICAL = Place(tokens=2048, mean_context=1024, batch=64, kv_tokens=64 * 2048)
"""A prompt of 2,048 tokens beside 64 sequences of as many; the measured load nearest to it is the default."""


@dataclass(frozen=True, slots=True)
class Beside:
    """One phase in one way of sharing: alone on its partition, and while the other phase runs throughout."""

    alone: Time
    beside: Time

    @property
    def slowdown(self) -> float:
        """How many times longer it takes beside the other phase."""
        return self.beside.seconds / self.alone.seconds

    @property
    def slowdown_source(self) -> Source:
        """The less certain of both times."""
        return worst((self.alone.source, self.beside.source))


@dataclass(frozen=True, slots=True)
class Shared:
    """Both phases in one way of sharing at one load.

    ``spread``: p90 - p10 of the steps measured together as a share of their median, of the phase where it is larger;
    None where both were not measured together.
    """

    sharing: Sharing
    prefill: Beside
    decode: Beside
    spread: float | None

    @property
    def source(self) -> Source:
        """The less certain of both phases beside each other."""
        return worst((self.prefill.beside.source, self.decode.beside.source))


class Prices:
    """Step times of a profile, each with its source.

    Ways of sharing other than splits are priced as splits are: at a measured place its median, elsewhere the time
    alone times an interpolated slowdown. ``refused``: why the rows of a mode cannot be used, by mode.

    Raises InputError as ``Profile.cost`` does.
    """

    def __init__(self, profile: Profile) -> None:
        self.layers = profile.layers
        self.device_sms = profile.device_sms
        self.refused: dict[str, str] = {}
        self._costs: dict[str, CostModel] = {"split": profile.cost()}
        for mode in MODES[1:]:
            rows = tuple(replace(p, mode="split") for p in profile.hybrid.points if p.mode == mode)
            if rows:
                try:
                    self._costs[mode] = replace(profile, hybrid=replace(profile.hybrid, points=rows)).cost()
                except InputError as error:
                    self.refused[mode] = str(error)
        self._prefill = {(p.sms, p.tokens, p.mean_context) for p in profile.prefill.points}
        self._decode = {(p.sms, p.batch, p.kv_tokens) for p in profile.decode.points}
        slowest_first = sorted(profile.hybrid.points, key=lambda p: -p.prefill_median_ms)
        self._hybrid = {
            (_sharing(p), _place(p)): p for p in slowest_first
        }  # the fastest prefill counts, as in TableCost

    @property
    def sharings(self) -> tuple[Sharing, ...]:
        """The measured ways of sharing, splits first, by ascending prefill SMs."""
        return tuple(
            Sharing(mode, at.prefill_sms, at.decode_sms) for mode, cost in self._costs.items() for at in cost.splits
        )

    def prefill_alone(self, sms: int, place: Place) -> Time:
        """One layer alone on ``sms`` SMs. Raises KeyError for a partition that was not measured, as all here do."""
        return self._prefill_s("split", Allocation(Mode.SPLIT, sms, sms), place, None, self._prefill_known(sms, place))

    def decode_alone(self, sms: int, place: Place) -> Time:
        """One step alone on ``sms`` SMs."""
        return self._decode_s("split", Allocation(Mode.SPLIT, sms, sms), place, None, self._decode_known(sms, place))

    def shared(self, sharing: Sharing, place: Place) -> Shared:
        """Both phases, alone on their partitions and beside each other."""
        at = Allocation(Mode.SPLIT, sharing.prefill_sms, sharing.decode_sms)
        row = self._hybrid.get((sharing, place))
        known = row is not None
        return Shared(
            sharing,
            Beside(
                self.prefill_alone(sharing.prefill_sms, place),
                self._prefill_s(sharing.mode, at, place, place.decode, known),
            ),
            Beside(
                self.decode_alone(sharing.decode_sms, place),
                self._decode_s(sharing.mode, at, place, place.prefill, known),
            ),
            None if row is None else max(_spreads(row, _HYBRID_SPREADS)),
        )

    def _prefill_known(self, sms: int, place: Place) -> bool:
        return (sms, place.tokens, place.mean_context) in self._prefill

    def _decode_known(self, sms: int, place: Place) -> bool:
        return (sms, place.batch, place.kv_tokens) in self._decode

    def _prefill_s(self, mode: str, at: Allocation, place: Place, beside: DecodeShape | None, known: bool) -> Time:
        seconds, outside = self._costs[mode].prefill_s(place.prefill, at, beside)
        return Time(seconds, _source(known, outside))

    def _decode_s(self, mode: str, at: Allocation, place: Place, beside: PrefillShape | None, known: bool) -> Time:
        seconds, outside = self._costs[mode].decode_s(place.batch, np.array([place.kv_tokens]), at, beside)
        return Time(float(seconds[0]), _source(known, bool(outside)))


def _source(known: bool, outside: bool) -> Source:
    return Source.OUTSIDE if outside else Source.MEASURED if known else Source.INTERPOLATED


def _sharing(point: HybridPoint) -> Sharing:
    return Sharing(point.mode, point.prefill_sms, point.decode_sms)


def _place(point: HybridPoint) -> Place:
    return Place(point.tokens, point.mean_context, point.batch, point.kv_tokens)


@dataclass(frozen=True)
class Extent:
    """What a table holds: rows, the values of each variable, and the measurement's spread.

    ``spread_median``, ``spread_p95``: over the rows, p90 - p10 of the measured steps as a share of their median.
    """

    rows: int
    values: Mapping[str, tuple[int | str, ...]]
    spread_median: float
    spread_p95: float


@dataclass(frozen=True)
class HeatMap:
    """The splits (rows) over decode batches (columns), beside the load's prefill; ``left_out`` columns do not fit."""

    decodes: tuple[DecodeShape, ...]
    rows: tuple[tuple[Shared, ...], ...]
    left_out: int


@dataclass(frozen=True)
class Survey:
    """Everything that ``semipd show`` shows of a profile at one load.

    ``nearest``: the measured load nearest to ``place``, itself if that was measured. ``prefill_alone``,
    ``decode_alone``: by SMs. ``dominated``: by name of a point, what is better than it. ``heat``: over the measured
    decode batches.
    """

    profile: Profile
    extents: Mapping[str, Extent]
    place: Place
    nearest: Place
    kv_capacity_tokens: int
    prefill_alone: Mapping[int, Time]
    decode_alone: Mapping[int, Time]
    shared: tuple[Shared, ...]
    points: tuple[OperatingPoint, ...]
    in_turn: InTurn
    dominated: Mapping[str, str]
    best_where: tuple[Stretch, ...]
    optimum: Optimum | None
    heat: HeatMap
    refused: Mapping[str, str]

    @property
    def provenance(self) -> dict[str, dict[str, object]]:
        """Of each table."""
        profile = self.profile
        return {
            "prefill": profile.prefill.provenance,
            "decode": profile.decode.provenance,
            "hybrid": profile.hybrid.provenance,
        }

    @property
    def in_turn_source(self) -> Source:
        """The less certain of the whole device's times alone."""
        sms = self.profile.device_sms
        return worst((self.prefill_alone[sms].source, self.decode_alone[sms].source))

    @property
    def missing_modes(self) -> tuple[str, ...]:
        """Ways of sharing that the profile has no rows of."""
        measured = {p.mode for p in self.profile.hybrid.points}
        fused = self.profile.mixed is not None and self.profile.mixed.points
        return (*(mode for mode in MODES if mode not in measured), *(() if fused else ("mixed (fused chunks)",)))

    @property
    def source(self) -> Source:
        """The least certain of all values at the load itself."""
        alone = [t.source for t in (*self.prefill_alone.values(), *self.decode_alone.values())]
        return worst([*alone, *(s.source for s in self.shared)])

    @property
    def most_work(self) -> OperatingPoint:
        """The point with the largest weighted speed-up."""
        return max(self.points, key=self.in_turn.weighted_speedup)

    def document(self) -> dict[str, Any]:
        """As JSON: times in milliseconds, each with its source; an open end and a gain over nothing are null."""
        header = {name: getattr(self.profile, name) for name in _HEADER}
        return {
            "profile": header | {"kv_capacity_tokens": self.kv_capacity_tokens},
            "provenance": self.provenance,
            "grid": {name: asdict(extent) for name, extent in self.extents.items()},
            "load": {
                **asdict(self.place),
                "measured": self.place == self.nearest,
                "nearest_measured": asdict(self.nearest),
            },
            "scaling": {
                "prefill_layer_alone": [{"sms": n, **_json(t)} for n, t in self.prefill_alone.items()],
                "decode_step_alone": [{"sms": n, **_json(t)} for n, t in self.decode_alone.items()],
                "together": [_shared_json(s) for s in self.shared],
            },
            "frontier": {
                "points": [self._point_json(p, s.source) for p, s in zip(self.points, self.shared, strict=True)],
                "in_turn": {
                    "decode_step_ms": self.in_turn.step_s * 1e3,
                    "prefill_tps": self.in_turn.prefill_tps,
                    "source": self.in_turn_source.value,
                },
                "best_where": [
                    {
                        "from_tpot_ms": s.from_s * 1e3,
                        "to_tpot_ms": s.to_s * 1e3 if isfinite(s.to_s) else None,
                        "best": s.best,
                        "prefill_tps": s.prefill_tps,
                    }
                    for s in self.best_where
                ],
                "most_work": self.most_work.name,
                "missing_modes": list(self.missing_modes),
                "refused_modes": dict(self.refused),
            },
            "optimum": None if self.optimum is None else self._optimum_json(self.optimum),
            "heat_map": {
                "decodes": [d._asdict() for d in self.heat.decodes],
                "rows": [[_shared_json(s) for s in row] for row in self.heat.rows],
            },
            "source": self.source.value,
        }

    def _point_json(self, point: OperatingPoint, source: Source) -> dict[str, Any]:
        return {
            "sharing": point.name,
            **asdict(point.sharing),
            "decode_step_ms": point.step_s * 1e3,
            "prefill_tps": point.prefill_tps,
            "source": source.value,
            "in_turn_tps_at_equal_decode": self.in_turn.tps_at(point.step_s),
            "gain": self.in_turn.gain(point),
            "weighted_speedup": self.in_turn.weighted_speedup(point),
            "dominated_by": self.dominated.get(point.name),
        }

    def _optimum_json(self, found: Optimum) -> dict[str, Any]:
        return {
            "tpot_ms": found.tpot_s * 1e3,
            "take": found.take,
            "best_sharing": found.best.name if found.best else None,
            "prefill_tps": found.best.prefill_tps if found.best else None,
            "decode_step_ms": found.best.step_s * 1e3 if found.best else None,
            "in_turn_tps_at_equal_decode": found.equal_tps if found.best else None,
            "gain": self.in_turn.gain(found.best) if found.best else None,
            "in_turn_tps_at_limit": found.in_turn_tps,
        }


_HEADER = (
    "name", "description", "device", "device_sms", "layers", "kv_bytes_per_token", "device_memory_bytes",
    "weights_bytes",
)  # fmt: skip


def _json(time: Time) -> dict[str, Any]:
    return {"ms": time.seconds * 1e3, "source": time.source.value}


def _shared_json(shared: Shared) -> dict[str, Any]:
    sides = {"prefill_layer": shared.prefill, "decode_step": shared.decode}
    return {
        "sharing": shared.sharing.name,
        **asdict(shared.sharing),
        "spread": shared.spread,
        **{
            name: {"alone": _json(side.alone), "beside": _json(side.beside), "slowdown": side.slowdown}
            for name, side in sides.items()
        },
    }


def survey(
    profile: Profile,
    *,
    tokens: int | None = None,
    mean_context: int | None = None,
    batch: int | None = None,
    kv_tokens: int | None = None,
    tpot_s: float | None = None,
    columns: int = 8,
) -> Survey:
    """Look a profile up at one load; what is not given is that of the measured load nearest to ``TYPICAL``.

    Args:
        profile: Where from.
        tokens: New prompt tokens of the prefill batch.
        mean_context: Keys that each of them attends to on average.
        batch: Sequences of the decode step.
        kv_tokens: Cached tokens that they read in all.
        tpot_s: TPOT target of the optimum, seconds; none without one.
        columns: Decode batches in the heat map, at most.

    Raises:
        InputError: The load or the target makes no sense, or the profile's tables lack something.
    """
    prices = Prices(profile)
    measured = sorted({_place(p) for p in profile.hybrid.points if p.mode == "split"})
    default = nearest_to(TYPICAL, measured)
    given = {"tokens": tokens, "mean_context": mean_context, "batch": batch, "kv_tokens": kv_tokens}
    place = replace(default, **{name: value for name, value in given.items() if value is not None})
    _check(place, tpot_s)
    shared = tuple(prices.shared(sharing, place) for sharing in prices.sharings)
    points = tuple(_point(s, place, profile.layers) for s in shared)
    prefill_alone = {n: prices.prefill_alone(n, place) for n in sorted({p.sms for p in profile.prefill.points})}
    decode_alone = {n: prices.decode_alone(n, place) for n in sorted({p.sms for p in profile.decode.points})}
    whole = profile.device_sms
    in_turn = InTurn(decode_alone[whole].seconds, place.tokens / (prefill_alone[whole].seconds * profile.layers))
    better = {point.name: dominator(point, points, in_turn) for point in points}
    return Survey(
        profile=profile,
        extents=extents(profile),
        place=place,
        nearest=nearest_to(place, measured),
        kv_capacity_tokens=max(profile.device_memory_bytes - profile.weights_bytes, 0) // profile.kv_bytes_per_token,
        prefill_alone=prefill_alone,
        decode_alone=decode_alone,
        shared=shared,
        points=points,
        in_turn=in_turn,
        dominated={name: by for name, by in better.items() if by is not None},
        best_where=best_where(points, in_turn),
        optimum=None if tpot_s is None else optimum(points, in_turn, tpot_s),
        heat=_heat(prices, place, measured, columns),
        refused=prices.refused,
    )


def nearest_to(place: Place, measured: Sequence[Place]) -> Place:
    """The measured place at the smallest distance (``octaves_from``); the smallest of equals."""
    return min(measured, key=lambda other: (place.octaves_from(other), other))


def _check(place: Place, tpot_s: float | None) -> None:
    for name, value in asdict(place).items():
        if value < 1:
            raise InputError(f"{name}: found {value}; expected one or more")
    if place.kv_tokens < place.batch:
        raise InputError(f"kv_tokens: found {place.kv_tokens}; expected at least one for each of batch {place.batch}")
    if tpot_s is not None and not (isfinite(tpot_s) and tpot_s > 0):
        raise InputError(f"tpot_ms: found {tpot_s * 1e3:g}; expected a finite number above zero")


def _point(shared: Shared, place: Place, layers: int) -> OperatingPoint:
    tps = place.tokens / (shared.prefill.beside.seconds * layers)
    return OperatingPoint(shared.sharing, shared.decode.beside.seconds, tps)


def _heat(prices: Prices, place: Place, measured: Sequence[Place], columns: int) -> HeatMap:
    """Evenly chosen among the measured decode batches when they are more than ``columns``."""
    found = sorted({(p.batch, p.kv_tokens) for p in measured})
    chosen = found
    if len(found) > columns:
        chosen = [found[i] for i in np.linspace(0, len(found) - 1, columns).round().astype(int)]
    splits = [sharing for sharing in prices.sharings if sharing.mode == "split"]
    rows = tuple(
        tuple(prices.shared(split, replace(place, batch=b, kv_tokens=k)) for b, k in chosen) for split in splits
    )
    return HeatMap(tuple(DecodeShape(b, k) for b, k in chosen), rows, len(found) - len(chosen))


def extents(profile: Profile) -> dict[str, Extent]:
    """What each table of a profile holds."""
    prefill, decode, hybrid = profile.prefill.points, profile.decode.points, profile.hybrid.points
    names = ("tokens", "mean_context")
    return {
        "prefill": _extent(prefill, ("sms", *names, "backend"), _SPREADS),
        "decode": _extent(decode, ("sms", "batch", "kv_tokens", "backend"), _SPREADS),
        "hybrid": _extent(hybrid, ("mode", "prefill_sms", "decode_sms", *names, "batch", "kv_tokens"), _HYBRID_SPREADS),
    }


def _extent(
    points: Sequence[PrefillPoint] | Sequence[DecodePoint] | Sequence[HybridPoint],
    axes: Sequence[str],
    prefixes: Sequence[str],
) -> Extent:
    values = {name: tuple(sorted({getattr(p, name) for p in points})) for name in axes}
    shares = [share for p in points for share in _spreads(p, prefixes)]
    middle, high = (float(x) for x in np.percentile(shares, [50, 95]))
    return Extent(len(points), values, middle, high)


_SPREADS = ("",)
_HYBRID_SPREADS = ("prefill_", "decode_")


def _spreads(point: PrefillPoint | DecodePoint | HybridPoint, prefixes: Sequence[str]) -> list[float]:
    """p90 - p10 over the median, of the columns with each prefix."""
    columns = [[getattr(point, f"{prefix}{name}_ms") for name in ("p10", "median", "p90")] for prefix in prefixes]
    return [(p90 - p10) / median for p10, median, p90 in columns]
