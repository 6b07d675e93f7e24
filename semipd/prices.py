"""What a profile's tables say at one load: each phase's times in every way of running both, and where they are from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from math import log2

from semipd.core import Allocation, DecodeShape, InputError, Mode, PrefillShape
from semipd.cost import CostModel
from semipd.points import DecodePoint, HybridPoint, MixedPoint, PrefillPoint, RaggedPoint, Sharing
from semipd.profile import Profile

STREAMS = "streams"
"""Two plain streams of equal priority: measured to compare with, and no mode that a policy can choose."""

MODES = ("split", "capped", "priority", STREAMS)
"""Ways of running both phases beside each other that a hybrid table may hold."""


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

    At a measured place that is its median, elsewhere the time alone times an interpolated slowdown; plain streams are
    priced as splits are. ``refused``: why the rows of a mode cannot be used, by mode. ``fused_tokens``:
    the least and the most prompt tokens that a measured fused step holds, None when none can be priced.

    Raises InputError as ``Profile.cost`` does.
    """

    def __init__(self, profile: Profile) -> None:
        self.layers = profile.layers
        self.device_sms = profile.device_sms
        self.refused: dict[str, str] = {}
        self._cost = profile.cost()
        measured = {p.mode for p in profile.hybrid.points}
        self.refused |= {mode.value: why for mode, why in self._cost.refused.items() if mode.value in measured}
        found = [(at.mode.value, at, self._cost) for at in self._cost.allocations if at.mode is not Mode.MIXED]
        if rows := tuple(replace(p, mode="split") for p in profile.hybrid.points if p.mode == STREAMS):
            try:
                cost = replace(profile, hybrid=replace(profile.hybrid, points=rows), ragged=None).cost()
                found += [(STREAMS, at, cost) for at in cost.splits]
            except InputError as error:
                self.refused[STREAMS] = str(error)
        self._ways = {Sharing(mode, at.prefill_sms, at.decode_sms): (at, cost) for mode, at, cost in found}
        fused, unusable = profile.mixed.points if profile.mixed else (), self._cost.refused.get(Mode.MIXED)
        if fused and unusable:
            self.refused[Mode.MIXED.value] = unusable
        tokens = {p.tokens for p in fused}
        self.fused_tokens = (min(tokens), max(tokens)) if fused and not unusable else None
        self._fused = {place_of(p): p for p in sorted(fused, key=lambda p: -p.median_ms)}
        self._prefill = {(p.sms, p.tokens, p.mean_context) for p in profile.prefill.points}
        self._decode = {(p.sms, p.batch, p.kv_tokens) for p in profile.decode.points}
        slowest_first = sorted(profile.hybrid.points, key=lambda p: -p.prefill_median_ms)
        self._hybrid = {
            (_sharing(p), place_of(p)): p for p in slowest_first
        }  # the fastest prefill counts, as in TableCost

    @property
    def sharings(self) -> tuple[Sharing, ...]:
        """The measured ways of sharing, splits first, by ascending prefill SMs."""
        return tuple(self._ways)

    def prefill_alone(self, sms: int, place: Place) -> Time:
        """One layer alone on ``sms`` SMs. Raises KeyError for a partition that was not measured, as all here do."""
        at, known = Allocation(Mode.SPLIT, sms, sms), (sms, place.tokens, place.mean_context) in self._prefill
        return _prefill_time(self._cost, at, place, None, known)

    def decode_alone(self, sms: int, place: Place) -> Time:
        """One step alone on ``sms`` SMs."""
        at, known = Allocation(Mode.SPLIT, sms, sms), (sms, place.batch, place.kv_tokens) in self._decode
        return _decode_time(self._cost, at, place, None, known)

    def shared(self, sharing: Sharing, place: Place) -> Shared:
        """Both phases, alone on their partitions and beside each other."""
        at, cost = self._ways[sharing]
        row = self._hybrid.get((sharing, place))
        known = row is not None
        return Shared(
            sharing,
            Beside(
                self.prefill_alone(sharing.prefill_sms, place),
                _prefill_time(cost, at, place, place.decode, known),
            ),
            Beside(
                self.decode_alone(sharing.decode_sms, place),
                _decode_time(cost, at, place, place.prefill, known),
            ),
            None if row is None else max(spreads(row)),
        )

    def fused(self, prompt_tokens: int, place: Place) -> tuple[Time, float | None]:
        """A step of so many prompt tokens fused with the load's decode batch, and its spread where it was measured.

        The prompts are as far on as the load's are. Raises KeyError when no fused step was measured.
        """
        at = replace(place, tokens=prompt_tokens)
        seconds, outside = self._cost.mixed_s(at.prefill, at.decode)
        row = self._fused.get(at)
        return Time(seconds, _source(row is not None, outside)), None if row is None else max(spreads(row))


def _prefill_time(cost: CostModel, at: Allocation, place: Place, beside: DecodeShape | None, known: bool) -> Time:
    seconds, outside = cost.prefill_s(place.prefill, at, beside)
    return Time(seconds, _source(known, outside))


def _decode_time(cost: CostModel, at: Allocation, place: Place, beside: PrefillShape | None, known: bool) -> Time:
    seconds, outside = cost.decode_s(place.decode, at, beside)
    return Time(float(seconds[0]), _source(known, bool(outside)))


def _source(known: bool, outside: bool) -> Source:
    return Source.OUTSIDE if outside else Source.MEASURED if known else Source.INTERPOLATED


def _sharing(point: HybridPoint) -> Sharing:
    return Sharing(point.mode, point.prefill_sms, point.decode_sms)


def place_of(point: HybridPoint | MixedPoint) -> Place:
    """Where a row of both phases lies."""
    return Place(point.tokens, point.mean_context, point.batch, point.kv_tokens)


def spreads(point: PrefillPoint | DecodePoint | HybridPoint | MixedPoint | RaggedPoint) -> list[float]:
    """p90 - p10 over the median, of everything that was timed there."""
    prefixes = ("prefill_", "decode_") if isinstance(point, (HybridPoint, RaggedPoint)) else ("",)
    columns = [[getattr(point, f"{prefix}{name}_ms") for name in ("p10", "median", "p90")] for prefix in prefixes]
    return [(p90 - p10) / median for p10, median, p90 in columns]
