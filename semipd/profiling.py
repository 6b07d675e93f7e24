"""What a model's profile is measured at, and in which order: first coarse rectangles, then where they err most.

An area (``semipd.areas``), or a value that an axis gets, is saved when all of it is measured: whenever measuring stops,
the tables hold full rectangles and sparse grids only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from semipd.areas import AXES, Area, Cell, snapped
from semipd.core import InputError, Mode, Phase
from semipd.cost import CostModel
from semipd.grid import lacking
from semipd.overheads import Overheads
from semipd.points import DecodePoint, DecodeWork, HybridPoint, MixedPoint, PrefillPoint, PrefillWork, Spread
from semipd.profile_config import ProfileConfig
from semipd.profiler import Progress
from semipd.ragged import Decodes, Prompts
from semipd.rectangle import SPINE, Place, Probe, Rectangle
from semipd.stopwatch import Stopwatch
from semipd.table_files import TableWriter

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


@dataclass(frozen=True)
class Backends:
    """Names of the attention kernels, for the tables: prefill's by its SMs, decode's, and that of fused batches."""

    prefill: Callable[[int], str]
    decode: str
    mixed: str


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
            places = rectangle.places()
            if rectangle.sparse:  # with what an earlier configuration left there, more may be needed
                places += sorted(lacking(have.union(places)))
            if cells := [Cell.at(area, place) for place in places if place not in have]:
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

        Areas take turns. In its turn an area has the middle of every interval of every axis tried, at one place of the
        other axes, and gets the value where the model errs most: so what was tried is of use however short the time is,
        and an area whose times are noisy does not take all there is. What a point spreads by itself is no error of the
        model's.
        """
        done = 0
        tried: dict[tuple[Area, Probe], tuple[float, Any]] = {}
        waiting, model = deque(areas), cost()
        while waiting:
            area = waiting.popleft()
            probes = self._probes(area)
            untried = [probe for probe in probes if (area, probe) not in tried]
            for i, probe in enumerate(untried):
                cell = Cell.at(area, probe.place)
                yield Progress(done, done + len(untried) - i, f"{cell} (trying)")
                done += 1
                point = self._measure(cell)
                tried[area, probe] = relative_error(model, cell, point), point
            worst = max(probes, key=lambda probe: tried[area, probe][0], default=None)
            if worst is None or tried[area, worst][0] <= tolerance:
                continue
            error, point = tried[area, worst]
            points = [point]
            for place in self.areas[area].knot(worst.axis, worst.value):
                if place != worst.place:
                    cell = Cell.at(area, place)
                    yield Progress(done, done + 1, f"{cell} (the model was {100 * error:.0f} % off)")
                    done += 1
                    points.append(self._measure(cell))
            self._save(area, points)
            self.areas[area] = self.areas[area].with_knot(worst.axis, worst.value)
            model = cost()
            waiting.append(area)
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


def _columns(phase: str, spread: Spread) -> dict[str, Any]:
    return {f"{phase}_{name}": value for name, value in asdict(spread).items()}


def _widened(rectangle: Rectangle, places: set[Place]) -> Rectangle:
    """With the values that these places have; those of a spine are at the least of the other axes only."""
    for axis in range(0 if rectangle.sparse else 1, len(rectangle.names)):
        for value in {place[axis] for place in places}:
            rectangle = rectangle.with_knot(axis, value)
    if rectangle.sparse:
        return rectangle
    for place in places:
        on_spine = rectangle.spine and [place] == rectangle.knot(SPINE, place[0])
        rectangle = rectangle.with_knot(SPINE if on_spine else 0, place[0])
    return rectangle


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
    each_s = min(max(0.0, many_s - few_s) / more, many_s / most) if more else 0.0
    for area in areas:
        if area.table == "mixed":
            stopwatch.mixed(prompts, decodes, area.at)
    switch_s = stopwatch.switch_s(prompts, splits[0], splits[1]) if len(splits) > 1 else 0.0
    return Overheads(
        prefill_start_ms=stopwatch.start_ms(Phase.PREFILL),
        decode_start_ms=round(max(0.0, many_s - each_s * most) * 1e3, 6),
        decode_start_per_sequence_ms=round(each_s * 1e3, 6),
        mixed_start_ms=stopwatch.start_ms(Phase.MIXED),
        switch_ms=round(switch_s * 1e3, 6),
    )


def _middle(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]
