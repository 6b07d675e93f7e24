"""What a profile says at one load: scaling curves, heat map, frontier; every value with where it is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

from semipd.core import DecodeShape, InputError, Mode
from semipd.frontier import InTurn, OperatingPoint, Optimum, Stretch, best_where, dominator, optimum
from semipd.points import DecodePoint, HybridPoint, MixedPoint, PrefillPoint, RaggedPoint, Sharing
from semipd.policies import CHUNKS
from semipd.prices import MODES, Place, Prices, Shared, Source, Time, place_of, spreads, worst
from semipd.profile import Profile
from semipd.table_files import SweepTable

TYPICAL = Place(tokens=2048, mean_context=1024, batch=64, kv_tokens=64 * 2048)
"""A prompt of 2,048 tokens beside 64 sequences of as many; the measured load nearest to it is the default."""

NEAR_OCTAVES = 4
"""Within which it is; where nothing so near was measured, it is the default itself."""


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
    ``decode_alone``: by SMs. ``points``: one for each of ``shared``, then one for each size of fused steps.
    ``dominated``: by name of a point, what is better than it. ``heat``: over the measured decode batches. ``refused``:
    by mode or name of a point, why it is not shown.
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
        return {name: table.provenance for name, table in _tables(self.profile).items()}

    @property
    def in_turn_source(self) -> Source:
        """The less certain of the whole device's times alone."""
        sms = self.profile.device_sms
        return worst((self.prefill_alone[sms].source, self.decode_alone[sms].source))

    @property
    def missing_modes(self) -> tuple[str, ...]:
        """Ways of sharing that the profile has no rows of."""
        measured = {p.mode for p in self.profile.hybrid.points}
        fused = "mixed" in _tables(self.profile)
        return (*(mode for mode in MODES if mode not in measured), *(() if fused else ("mixed (fused chunks)",)))

    @property
    def source(self) -> Source:
        """The least certain of all values at the load itself."""
        alone = [t.source for t in (*self.prefill_alone.values(), *self.decode_alone.values())]
        return worst([*alone, *(point.source for point in self.points)])

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
                "points": [self._point_json(point) for point in self.points],
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
                "refused": dict(self.refused),
            },
            "optimum": None if self.optimum is None else self._optimum_json(self.optimum),
            "heat_map": {
                "decodes": [asdict(d) for d in self.heat.decodes],
                "rows": [[_shared_json(s) for s in row] for row in self.heat.rows],
            },
            "source": self.source.value,
        }

    def _point_json(self, point: OperatingPoint) -> dict[str, Any]:
        return {
            "sharing": point.name,
            **asdict(point.sharing),
            "chunk_tokens": point.chunk_tokens or None,
            "decode_step_ms": point.step_s * 1e3,
            "prefill_tps": point.prefill_tps,
            "source": point.source.value,
            "spread": point.spread,
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

    Where none is near, of ``TYPICAL`` itself, if it is inside what was measured.

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
    measured = sorted({place_of(p) for p in profile.hybrid.points if p.mode == "split"})
    default = _default(measured)
    given = {"tokens": tokens, "mean_context": mean_context, "batch": batch, "kv_tokens": kv_tokens}
    place = replace(default, **{name: value for name, value in given.items() if value is not None})
    _check(place, tpot_s)
    shared = tuple(prices.shared(sharing, place) for sharing in prices.sharings)
    chunks, too_small = _chunks(prices, place)
    points = (*(_point(s, place, profile.layers) for s in shared), *chunks)
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
        refused=prices.refused | too_small,
    )


def nearest_to(place: Place, measured: Sequence[Place]) -> Place:
    """The measured place at the smallest distance (``octaves_from``); the smallest of equals."""
    return min(measured, key=lambda other: (place.octaves_from(other), other))


def _default(measured: Sequence[Place]) -> Place:
    nearest = nearest_to(TYPICAL, measured)
    if TYPICAL.octaves_from(nearest) <= NEAR_OCTAVES:
        return nearest
    along = [[getattr(place, name) for place in measured] for name in asdict(TYPICAL)]
    inside = all(min(of) <= value <= max(of) for of, value in zip(along, asdict(TYPICAL).values(), strict=True))
    return TYPICAL if inside else nearest


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
    return OperatingPoint(shared.sharing, shared.decode.beside.seconds, tps, shared.source, shared.spread)


def _chunks(prices: Prices, place: Place) -> tuple[list[OperatingPoint], dict[str, str]]:
    """Fused steps of each size whose prompt tokens lie within what was measured; why the others are left out."""
    points: list[OperatingPoint] = []
    refused: dict[str, str] = {}
    if prices.fused_tokens is None:
        return points, refused
    least, most = prices.fused_tokens
    whole = Sharing(Mode.MIXED.value, prices.device_sms, prices.device_sms)
    for chunk in CHUNKS:
        prompt = chunk - place.batch
        if least <= prompt <= most:
            time, spread = prices.fused(prompt, place)
            points.append(OperatingPoint(whole, time.seconds, prompt / time.seconds, time.source, spread, chunk))
        else:
            refused[f"chunked-{chunk}"] = (
                f"beside {place.batch} decode tokens it has {max(prompt, 0)} prompt tokens a step; {least} to {most} "
                "were measured"
            )
    return points, refused


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


def _tables(profile: Profile) -> dict[str, SweepTable[Any]]:
    """The tables with measured points, by name."""
    tables = {name: getattr(profile, name) for name in _AXES}
    return {name: table for name, table in tables.items() if table is not None and table.points}


def extents(profile: Profile) -> dict[str, Extent]:
    """What each table of a profile holds."""
    return {name: _extent(table.points, _AXES[name]) for name, table in _tables(profile).items()}


_AXES = {
    "prefill": ("sms", "tokens", "mean_context", "backend"),
    "decode": ("sms", "batch", "kv_tokens", "backend"),
    "hybrid": ("mode", "prefill_sms", "decode_sms", "tokens", "mean_context", "batch", "kv_tokens"),
    "ragged": ("mode", "prefill_sms", "decode_sms"),
    "mixed": ("tokens", "mean_context", "batch", "kv_tokens", "backend"),
}
"""Variables of each table."""


def _extent(
    points: Sequence[PrefillPoint | DecodePoint | HybridPoint | MixedPoint | RaggedPoint], axes: Sequence[str]
) -> Extent:
    values = {name: tuple(sorted({getattr(p, name) for p in points})) for name in axes}
    shares = [share for p in points for share in spreads(p)]
    middle, high = (float(x) for x in np.percentile(shares, [50, 95]))
    return Extent(len(points), values, middle, high)
