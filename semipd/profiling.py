"""What a model's profile is measured at, and in which order: first coarse rectangles, then where they err most.

An *area* is one rectangle of one table: a phase alone on one partition, both phases in one way of sharing the device,
or fused batches. An area, or a value that an axis gets, is saved when all of it is measured: whenever measuring stops,
the tables hold full rectangles only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from semipd.config import DecodeAxes, ProfileConfig
from semipd.core import Allocation, DecodeShape, InputError, Mode, Phase, PrefillShape
from semipd.cost import CostModel
from semipd.overheads import Overheads
from semipd.padding import MOST_PREFILL_ROWS, prefill_sizes
from semipd.profiler import Progress
from semipd.rectangle import SPINE, Place, Probe, Rectangle
from semipd.roofline import RooflineCost
from semipd.stopwatch import DECODE_STEPS, FEW_STEPS, STEPS, Decodes, Prompts, Stopwatch
from semipd.sweep import (
    DecodePoint,
    DecodeWork,
    HybridPoint,
    MixedPoint,
    PrefillPoint,
    PrefillWork,
    Spread,
    TableWriter,
)

AXES: Mapping[str, tuple[str, ...]] = {
    "prefill": ("tokens", "mean_context"),
    "decode": ("batch", "kv_tokens"),
    "hybrid": ("tokens", "mean_context", "batch", "kv_tokens"),
    "mixed": ("tokens", "mean_context", "batch", "kv_tokens"),
}
TYPICAL_TOKENS = 1024
"""Of each of two prompts, about as long as in conversations, for which prefill's attention kernel is chosen."""

TYPICAL_LENGTH = 1500
"""Tokens of a sequence, for which the start of a decode run is measured."""

CLEARLY = 1.03
"""How many times faster another attention kernel has to be."""

AGAIN = 5
"""Points of each table that are measured again at the end."""

POINTS: Mapping[str, type[Any]] = {
    "prefill": PrefillPoint,
    "decode": DecodePoint,
    "hybrid": HybridPoint,
    "mixed": MixedPoint,
}
Tables = Mapping[str, TableWriter[Any]]
"""The tables of a profile, by the names of ``AXES``."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far, relatively, the times of a table's first points moved until the end: with its sign, and at most."""

    points: int
    median: float
    largest: float

    def __str__(self) -> str:
        return f"{self.points} points measured again took {self.median:+.1%} in the median, {self.largest:+.1%} at most"

    @staticmethod
    def of(pairs: Sequence[tuple[Any, Any]]) -> Drift:
        """Of rows, each as it was and as it is."""
        times = [(getattr(a, name), getattr(b, name)) for a, b in pairs for name in MEDIANS if hasattr(a, name)]
        moved = np.array([later / earlier - 1 for earlier, later in times])
        largest = moved[np.argmax(np.abs(moved))]
        return Drift(len(pairs), round(float(np.median(moved)), 4), round(float(largest), 4))


MEDIANS = ("median_ms", "prefill_median_ms", "decode_median_ms")


@dataclass(frozen=True, slots=True)
class Area:
    """A table, and where its phases run: ``at`` is any allocation that has the partition of a phase that is alone."""

    table: str
    at: Allocation

    @property
    def key(self) -> tuple[object, ...]:
        """What its rows have in common."""
        at = self.at
        of = {"prefill": (at.prefill_sms,), "decode": (at.decode_sms,), "mixed": ()}
        return self.table, *of.get(self.table, (at.mode.value, at.prefill_sms, at.decode_sms))

    @property
    def name(self) -> str:
        """For people."""
        sms = {"prefill": f" on {self.at.prefill_sms} SMs", "decode": f" on {self.at.decode_sms} SMs"}
        return self.table + sms.get(self.table, "" if self.table == "mixed" else f" {self.at.name}")


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: batches of one phase, or of both, in an area."""

    area: Area
    prefill: PrefillWork | None
    decode: DecodeWork | None

    @staticmethod
    def at(area: Area, place: Place) -> Cell:
        """The measurement at a place of a rectangle. Raises InputError when equal prompts cannot fill it."""
        values = dict(zip(AXES[area.table], place, strict=True))
        prefill = PrefillWork.at(values["tokens"], values["mean_context"]) if "tokens" in values else None
        return Cell(area, prefill, DecodeWork(values["batch"], values["kv_tokens"]) if "batch" in values else None)

    @property
    def prompts(self) -> Prompts | None:
        """The prefill batch."""
        return Prompts.of(self.prefill) if self.prefill else None

    @property
    def decodes(self) -> Decodes | None:
        """The decode batch."""
        return Decodes.of(self.decode) if self.decode else None

    @property
    def prefill_shape(self) -> PrefillShape | None:
        """As the cost model sees it."""
        return self.prefill.shape if self.prefill else None

    @property
    def decode_shape(self) -> DecodeShape | None:
        """As the cost model sees it."""
        return self.decode.shape if self.decode else None

    def __str__(self) -> str:
        words = [self.area.name]
        if self.prefill:
            words.append(f"{self.prefill.seqs} x {self.prefill.seq_tokens} after {self.prefill.seq_context}")
        if self.decode:
            words.append(f"{self.decode.batch} x {self.decode.kv_tokens / self.decode.batch:.0f}")
        return ", ".join(words)


@dataclass(frozen=True)
class Backends:
    """Names of the attention kernels, for the tables: prefill's by its SMs, decode's, and that of fused batches."""

    prefill: Callable[[int], str]
    decode: str
    mixed: str


def areas_of(config: ProfileConfig, device_sms: int) -> dict[Area, Rectangle]:
    """The coarse rectangles with their spines, in the order in which they are measured.

    Phases alone come first, then fused batches, and the ways of sharing from the most even one on.

    Raises InputError for sizes that the device does not have.
    """
    for name, sizes in (("prefill_sms", config.prefill_sms), ("capped_sms", config.capped_sms)):
        for sms in sizes:
            if sms >= device_sms:
                raise InputError(f"{name}: found {sms}; expected less than the {device_sms} SMs of the device")
    if unknown := sorted({*config.capped_sms} - {*config.prefill_sms}):
        raise InputError(f"capped_sms: found {unknown[0]}; expected sizes that prefill_sms has")
    whole = Allocation(Mode.EXCLUSIVE, device_sms, device_sms)
    splits = [Allocation(Mode.SPLIT, n, device_sms - n) for n in sorted(set(config.prefill_sms))]
    shared = {
        "split": splits,
        "capped": [Allocation(Mode.CAPPED, n, device_sms) for n in config.capped_sms],
        "priority": [Allocation(Mode.PRIORITY, device_sms, device_sms)],
    }
    alone = [whole, *reversed(splits)]
    decode_sizes = {at.decode_sms: at for at in alone}
    found = {Area("prefill", at): config.prefill.values for at in alone}
    found |= {Area("decode", at): config.decode.values for at in decode_sizes.values()}
    both = (*config.both_prefill.values, *config.both_decode.values)
    if "mixed" in config.modes:
        mixed = Allocation(Mode.MIXED, device_sms, device_sms, max(config.both_prefill.tokens))
        found[Area("mixed", mixed)] = both
    ways = [at for mode in config.modes for at in shared.get(mode, ())]
    for at in sorted(ways, key=lambda at: (at.mode is not Mode.SPLIT, abs(at.prefill_sms - device_sms / 2))):
        found[Area("hybrid", at)] = both
    spines = {"prefill": config.prefill_spine, "decode": config.decode_spine}
    return {area: _rectangle(area.table, values, spines.get(area.table, ())) for area, values in found.items()}


def _rectangle(table: str, values: tuple[tuple[int, ...], ...], spine: tuple[int, ...]) -> Rectangle:
    found = Rectangle(AXES[table], tuple(tuple(sorted(set(v))) for v in values))
    for value in spine:
        if found.values[0][0] < value < found.values[0][-1]:
            found = found.with_knot(SPINE, value)
    return found


def measured_places(tables: Tables) -> dict[tuple[object, ...], set[Place]]:
    """The places that tables have, by ``Area.key``."""
    found: dict[tuple[object, ...], set[Place]] = {}
    for name, table in tables.items():
        for point in table.points:
            key: tuple[object, ...] = (name,)
            if name in ("prefill", "decode"):
                key = name, point.sms
            elif name == "hybrid":
                key = name, point.mode, point.prefill_sms, point.decode_sms
            found.setdefault(key, set()).add(tuple(getattr(point, axis) for axis in AXES[name]))
    return found


class Profiling:
    """Fills the tables of a profile. What they have already is kept: the knots of an earlier refinement, too.

    Args:
        areas: The coarse rectangles.
        tables: To fill.
        stopwatch: Measures.
        backends: What to write into the tables.
        fits: Whether there is room for the batches of a measurement.

    Attributes:
        drift: By table, once ``again`` has measured its first points again.
    """

    def __init__(
        self,
        areas: Mapping[Area, Rectangle],
        tables: Tables,
        stopwatch: Stopwatch,
        backends: Backends,
        fits: Callable[[Cell], bool] = lambda cell: True,  # noqa: ARG005 - on a device without bounds
    ) -> None:
        self._tables, self._stopwatch, self._backends, self._fits = tables, stopwatch, backends, fits
        self._places = measured_places(tables)
        self._first: dict[str, list[tuple[Cell, Any]]] = {}
        self.drift: dict[str, Drift] = {}
        self.areas = {area: _widened(rectangle, self._places.get(area.key, set())) for area, rectangle in areas.items()}

    def missing(self) -> dict[Area, list[Cell]]:
        """What is still to measure of the rectangles."""
        found = {}
        for area, rectangle in self.areas.items():
            have = self._places.get(area.key, set())
            if cells := [Cell.at(area, place) for place in rectangle.places() if place not in have]:
                found[area] = cells
        return found

    def fill(self) -> Iterator[Progress]:
        """Measure what is missing, area by area."""
        missing = self.missing()
        total, done = sum(map(len, missing.values())), 0
        for area, cells in missing.items():
            points = []
            for cell in cells:
                yield Progress(done, total, str(cell))
                points.append(self._measure(cell))
                done += 1
            self._save(area, points)
            first = self._first.setdefault(area.table, [])
            first += list(zip(cells, points, strict=True))[: AGAIN - len(first)]
        yield Progress(total, total, "done")

    def again(self) -> Iterator[Progress]:
        """Measure the first points of this session again, and note in each table's provenance how far they moved."""
        total, done = sum(map(len, self._first.values())), 0
        for table, first in self._first.items():
            pairs = []
            for cell, before in first:
                yield Progress(done, total, f"{cell} (again)")
                pairs.append((before, self._measure(cell)))
                done += 1
            self.drift[table] = Drift.of(pairs)
            self._tables[table].note({"drift": asdict(self.drift[table])})
        yield Progress(total, total, "done")

    def refine(self, areas: Iterable[Area], cost: Callable[[], CostModel], tolerance: float) -> Iterator[Progress]:
        """Give axes more values where the cost model errs, until it nowhere errs by more than ``tolerance``.

        Tried is the middle of every interval of every axis, at one place of the other axes. Areas take turns, each with
        the value where the model errs most there, so that one whose times are noisy does not take all there is. What
        a point spreads by itself is no error of the model's.
        """
        done = 0
        turns = dict.fromkeys(self.areas, 0)
        tried: dict[tuple[Area, Probe], tuple[float, Any]] = {}
        areas = list(areas)
        model = cost()
        while True:
            candidates = {(area, probe) for area in areas for probe in self._probes(area)}
            for area, probe in sorted(candidates - tried.keys(), key=_order):
                cell = Cell.at(area, probe.place)
                yield Progress(done, done + len(candidates - tried.keys()), f"{cell} (trying)")
                done += 1
                point = self._measure(cell)
                tried[area, probe] = relative_error(model, cell, point), point
            wrong = [x for x in sorted(candidates, key=_order) if tried[x][0] > tolerance]
            if not wrong:
                break
            area, probe = max(wrong, key=lambda x: (-turns[x[0]], tried[x][0]))
            turns[area] += 1
            worst, tried_point = tried[area, probe]
            points = [tried_point]
            for place in self.areas[area].knot(probe.axis, probe.value):
                if place != probe.place:
                    cell = Cell.at(area, place)
                    yield Progress(done, done + 1, f"{cell} (the model was {100 * worst:.0f} % off)")
                    done += 1
                    points.append(self._measure(cell))
            self._save(area, points)
            self.areas[area] = self.areas[area].with_knot(probe.axis, probe.value)
            model = cost()
        yield Progress(done, done, "done")

    def _probes(self, area: Area) -> list[Probe]:
        rectangle = self.areas[area]
        return [
            probe
            for probe in rectangle.probes(snapped)
            if self._possible(area, rectangle.knot(probe.axis, probe.value))
        ]

    def _possible(self, area: Area, places: Sequence[Place]) -> bool:
        try:
            return all(self._fits(Cell.at(area, place)) for place in places)
        except InputError:
            return False

    def _save(self, area: Area, points: Sequence[Any]) -> None:
        self._tables[area.table].add(*points)
        places = {tuple(getattr(point, axis) for axis in AXES[area.table]) for point in points}
        self._places.setdefault(area.key, set()).update(places)

    def _measure(self, cell: Cell) -> Any:
        """One row of the cell's table."""
        watch, at, names = self._stopwatch, cell.area.at, self._backends
        p, d = cell.prefill, cell.decode
        if p and d and cell.area.table == "mixed":
            spread = watch.mixed(Prompts.of(p), Decodes.of(d), at)
            return MixedPoint(**asdict(p), **asdict(d), backend=names.mixed, **asdict(spread))
        if p and d:
            both = watch.both(Prompts.of(p), Decodes.of(d), at)
            return HybridPoint(
                mode=at.mode.value,
                prefill_sms=at.prefill_sms,
                decode_sms=at.decode_sms,
                **asdict(p),
                **asdict(d),
                prefill_backend=names.prefill(at.prefill_sms),
                decode_backend=names.decode,
                **_columns("prefill", both[0]),
                **_columns("decode", both[1]),
            )
        if p:
            spread, backend = watch.prefill(Prompts.of(p), at), names.prefill(at.prefill_sms)
            return PrefillPoint(sms=at.prefill_sms, **asdict(p), backend=backend, **asdict(spread))
        if d:
            spread = watch.decode(Decodes.of(d), at)
            return DecodePoint(sms=at.decode_sms, **asdict(d), backend=names.decode, **asdict(spread))
        raise ValueError("a cell without work")


def _order(tried: tuple[Area, Probe]) -> tuple[object, ...]:
    return (*map(str, tried[0].key), tried[1].axis, tried[1].value)


def _columns(phase: str, spread: Spread) -> dict[str, Any]:
    return {f"{phase}_{name}": value for name, value in asdict(spread).items()}


def _widened(rectangle: Rectangle, places: set[Place]) -> Rectangle:
    """With the values that these places have; those of a spine are at the least of the other axes only."""
    for axis in range(1, len(rectangle.names)):
        for value in {place[axis] for place in places}:
            rectangle = rectangle.with_knot(axis, value)
    for place in places:
        on_spine = rectangle.spine and [place] == rectangle.knot(SPINE, place[0])
        rectangle = rectangle.with_knot(SPINE if on_spine else 0, place[0])
    return rectangle


def snapped(name: str, value: float) -> int:
    """The nearest value that it makes sense to measure: what batches are padded to, whole tiles of tokens beyond."""
    if name == "tokens" and value <= MOST_PREFILL_ROWS:
        return min(prefill_sizes(), key=lambda size: abs(size - value))
    if name == "batch" and value < 6:
        return 4 if value > 3 else 2 if value > 1.5 else 1
    step = {"tokens": 128, "mean_context": 64, "batch": 8}.get(name, 64)
    return max(step, round(value / step) * step)


def relative_error(cost: CostModel, cell: Cell, point: Any) -> float:
    """How far, relatively, a cost model is off at a measured row, beyond half of the row's own spread (p10 to p90).

    Of two phases the larger; below zero where the spread explains it.
    """
    at, p, d = cell.area.at, cell.prefill_shape, cell.decode_shape

    def beyond(seconds: float, prefix: str = "") -> float:
        median_ms, p10_ms, p90_ms = (getattr(point, f"{prefix}{name}_ms") for name in ("median", "p10", "p90"))
        return float(abs(seconds * 1e3 / median_ms - 1) - (p90_ms - p10_ms) / 2 / median_ms)

    if p and cell.area.table == "mixed":
        return beyond(cost.mixed_s(p, d)[0] / cost.layers)
    found = []
    if p:
        found.append(beyond(cost.prefill_s(p, at, d)[0], "prefill_" if d else ""))
    if d:
        step_s = cost.decode_s(d, at, p)[0][0]
        found.append(beyond(step_s / cost.layers, "decode_" if p else ""))
    return max(found)


def blocks_of(prefill: Prompts | None, decode: Decodes | None, block_size: int) -> int:
    """KV blocks that a measurement takes at most."""
    lengths: list[int] = []
    if prefill:
        lengths += [new + context for new, context in zip(prefill.new_tokens, prefill.context_lens, strict=True)]
    if decode:
        lengths += [max(length, 2) + DECODE_STEPS for length in decode.lengths]
    return sum(-(-length // block_size) for length in lengths)


def fitting(config: ProfileConfig, num_blocks: int) -> ProfileConfig:
    """The configuration without the KV token counts for which there is no room.

    Raises InputError when none is left.
    """

    def room(axes: DecodeAxes, prefills: Sequence[PrefillWork]) -> DecodeAxes:
        left = num_blocks - max((blocks_of(Prompts.of(work), None, config.block_size) for work in prefills), default=0)

        def fits(kv: int) -> bool:
            return all(blocks_of(None, Decodes.of(DecodeWork(b, kv)), config.block_size) <= left for b in axes.batch)

        if not (kept := tuple(kv for kv in axes.kv_tokens if fits(kv))):
            raise InputError(
                f"kv_tokens: found {min(axes.kv_tokens)} or more; expected some that fit into {num_blocks} KV blocks, "
                "beside prefill"
            )
        return axes.model_copy(update={"kv_tokens": kept})

    both = [PrefillWork.at(t, m) for t in config.both_prefill.tokens for m in config.both_prefill.mean_context]
    return config.model_copy(update={"decode": room(config.decode, ()), "both_decode": room(config.both_decode, both)})


def longest_sequence(config: ProfileConfig) -> int:
    """Tokens of the longest sequence that may be measured."""
    works = [DecodeWork(min(axes.batch), max(axes.kv_tokens)) for axes in (config.decode, config.both_decode)]
    most_kv = max(max(Decodes.of(work).lengths) for work in works)
    contexts = max(max(axes.mean_context) for axes in (config.prefill, config.both_prefill))
    return most_kv + contexts + config.max_num_batched_tokens


def choose_backends(
    stopwatch: Stopwatch,
    areas: Iterable[Area],
    names: Sequence[str],
    use: Callable[[int, str], None],
) -> None:
    """Have every partition of prefill use the attention kernel with which a typical run is over first.

    That includes the host's planning, which takes longer for kernels that need more of it. A kernel is taken before
    those named earlier only if it is faster by ``CLEARLY``: fa2, which is named first, wastes least on short prompts.
    """
    batch = Prompts((TYPICAL_TOKENS, TYPICAL_TOKENS), (0, 0))
    for area in areas:
        if area.table == "prefill":
            sms = area.at.prefill_sms
            took_s = {}
            for name in names if len(names) > 1 else ():
                use(sms, name)
                took_s[name] = stopwatch.whole_s(batch, area.at)
            best = names[0]
            for name, seconds in took_s.items():
                best = name if seconds < took_s[best] / CLEARLY else best
            use(sms, best)


def overheads(stopwatch: Stopwatch, areas: Iterable[Area], config: ProfileConfig) -> Overheads:
    """Host time in no step, in the median over some typical batches: a fresh stopwatch sees to that.

    Starting decode takes longer the more sequences there are: it is measured with the most and a quarter of them.
    """
    prompts = Prompts.of(PrefillWork.at(_middle(config.prefill.tokens), config.prefill.mean_context[0]))
    decodes = Decodes.of(DecodeWork(_middle(config.decode.batch), _middle(config.decode.kv_tokens)))
    most = max(config.decode.batch)
    each = min(TYPICAL_LENGTH, max(config.decode.kv_tokens) // most)
    few, many = (Decodes.of(DecodeWork(n, n * each)) for n in (-(-most // 4), most))
    splits = [area.at for area in areas if area.table == "hybrid" and area.at.mode is Mode.SPLIT]
    starts_s = []
    for at in splits[:3]:
        stopwatch.prefill(prompts, at)
        starts_s.append([stopwatch.decode_start_s(batch, at) for batch in (few, many)])
    few_s, many_s = np.median(starts_s, axis=0)
    more = len(many.lengths) - len(few.lengths)
    each_s = max(0.0, many_s - few_s) / more if more else 0.0
    for area in areas:
        if area.table == "mixed":
            stopwatch.mixed(prompts, decodes, area.at)
    switch_s = stopwatch.switch_s(prompts, splits[0], splits[1]) if len(splits) > 1 else 0.0
    return Overheads(
        prefill_start_ms=stopwatch.start_ms(Phase.PREFILL),
        decode_start_ms=round(max(0.0, many_s - each_s * len(many.lengths)) * 1e3, 6),
        decode_start_per_sequence_ms=round(each_s * 1e3, 6),
        mixed_start_ms=stopwatch.start_ms(Phase.MIXED),
        switch_ms=round(switch_s * 1e3, 6),
    )


def _middle(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]


def expected_s(cell: Cell, roofline: RooflineCost, config: ProfileConfig) -> float:
    """About how long a measurement takes, if steps take what a roofline says."""
    at, p, d = cell.area.at, cell.prefill_shape, cell.decode_shape
    steps_s = []
    if p and d and at.mode is Mode.MIXED:
        steps_s = [roofline.mixed_s(p, d)[0]]
    else:
        steps_s += [roofline.prefill_s(p, at, None)[0]] if p else []
        steps_s += [float(roofline.decode_s(d, at, None)[0][0])] if d else []
    load_s = (config.settle_ms + config.measure_ms) / 1e3
    slow_s = max(steps_s)
    return max(load_s, min((STEPS + 2) * slow_s, config.limit_ms / 1e3), (FEW_STEPS + 2) * slow_s) + HOST_S


HOST_S = 0.03
"""About what the host does for a measurement while the device idles."""
