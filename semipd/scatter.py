"""Ragged batches beside each other, measured where the cost model errs most: what lies between the tables' points."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from semipd.areas import Area
from semipd.contention import SHARED, Scales
from semipd.core import DecodeShape, FloatArray, Phase, PrefillShape
from semipd.correction import Units, uncertainty
from semipd.points import HybridPoint, RaggedPoint
from semipd.profile_config import ProfileConfig
from semipd.profiler import Progress
from semipd.ragged import Decodes, Prompts
from semipd.stopwatch import Stopwatch
from semipd.table_files import TableWriter
from semipd.trials import Ranges, Times, Trial, as_text, decodes, predicted, prompts

FIRST = 4
"""Batches in every way of sharing before it is known where the model errs."""

RECENT = 12
"""Batches by which that is judged, the last ones."""

PHASES = (Phase.PREFILL, Phase.DECODE)

CANDIDATES = 8
"""Drawn at random, of which the one is taken of which least is known."""

SOLVED = 1 / 3
"""Of the tolerance: where the model errs by less, root mean square, no more is measured."""


@dataclass(eq=False)
class _Way:
    """One way of sharing: where batches were measured in it, and how far the model was off when they were."""

    area: Area
    rng: np.random.Generator
    known: list[FloatArray]
    ragged: int = 0
    off: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def error(self) -> float:
        """Root mean square of both phases, of late; infinite before it is known."""
        return float(np.sqrt(np.mean(np.square(self.off)))) if len(self.off) >= FIRST else np.inf


class Scatter:
    """Fills a table of ragged batches.

    Args:
        areas: The ways of sharing.
        config: How many at most in each, from where they are drawn, by which seed.
        scales: Of the model.
        stopwatch: Measures.
        table: To fill.
        hybrid: Rows at which nothing is off.
        fits: Whether there is room for both batches.
    """

    def __init__(
        self,
        areas: Sequence[Area],
        config: ProfileConfig,
        scales: Scales,
        stopwatch: Stopwatch,
        table: TableWriter[RaggedPoint],
        hybrid: Sequence[HybridPoint],
        fits: Callable[[Prompts, Decodes], bool],
    ) -> None:
        self._config, self._stopwatch, self._table, self._fits = config, stopwatch, table, fits
        axes = (*config.both_prefill.values, *config.both_decode.values)
        self._units = Units.of(axes, (0.0, scales.mean_context, 0.0, scales.kv_tokens))
        self._ranges = Ranges.of(config.both_prefill, config.both_decode)
        self._ways = [_Way(area, np.random.default_rng([config.seed, i]), []) for i, area in enumerate(areas, 1)]
        for way in self._ways:
            at = way.area.at
            key = at.mode.value, at.prefill_sms, at.decode_sms
            rows = [p for p in hybrid if (p.mode, p.prefill_sms, p.decode_sms) == key]
            ragged = [p for p in table.points if (p.mode, p.prefill_sms, p.decode_sms) == key]
            way.ragged = len(ragged)
            of_rows = [(p.tokens, p.mean_context, p.batch, p.kv_tokens) for p in rows]
            places = [*of_rows, *(_place(*p.shapes(str(table.path))) for p in ragged)]
            way.known += list(self._units.at(np.array(places, np.float64))) if places else []

    def measure(self, cost: Callable[[], Times]) -> Iterator[Progress]:
        """In rounds, each held against the model of those before, until that nowhere errs by much or all are taken.

        ``cost``: the model that the tables make by then.
        """
        done = 0
        while turns := self._turns():
            model = cost()
            for i, way in enumerate(turns):
                drawn = self._drawn(way)
                if drawn is None:
                    way.ragged = self._config.ragged  # there is no room for any
                    continue
                yield Progress(done, done + len(turns) - i, f"{way.area.name}, {_about(*drawn)}")
                way.off.append(self._take(way, *drawn, model))
                done += 1
        yield Progress(done, done, "done")

    def _turns(self) -> list[_Way]:
        """One round: first every way, then as many in each as the model errs there (Neyman's allocation)."""
        open_ = [way for way in self._ways if way.ragged < self._config.ragged and not self._solved(way)]
        if unknown := [way for way in open_ if not np.isfinite(way.error)]:
            return unknown
        turns: list[_Way] = []
        for _ in range(3 * len(open_)):
            then = [(way, way.ragged + turns.count(way)) for way in open_]
            left = [(way.error / (1 + n), way) for way, n in then if n < self._config.ragged]
            turns += [max(left, key=lambda each: each[0])[1]] if left else []
        return turns

    def _solved(self, way: _Way) -> bool:
        return len(way.off) == RECENT and way.error < SOLVED * self._config.tolerance

    def _drawn(self, way: _Way) -> tuple[Prompts, Decodes] | None:
        """Of some random batches that fit, those of which least is known."""
        drawn = [(prompts(way.rng, self._ranges), decodes(way.rng, self._ranges)) for _ in range(CANDIDATES)]
        found = [both for both in drawn if self._fits(*both)]
        if not found:
            return None
        places = self._units.at(np.array([_place(p.shape, d.shape) for p, d in found], np.float64))
        return found[int(np.argmax(uncertainty(places, np.array(way.known).reshape(len(way.known), len(SHARED)))))]

    def _take(self, way: _Way, p: Prompts, d: Decodes, model: Times) -> tuple[float, ...]:
        """Measure and save; how far the model is off, of each phase."""
        at = way.area.at
        both = self._stopwatch.both(p, d, at)
        point = RaggedPoint(
            mode=at.mode.value,
            prefill_sms=at.prefill_sms,
            decode_sms=at.decode_sms,
            new_tokens=as_text(p.new_tokens),
            context_lens=as_text(p.context_lens),
            batch=d.shape.batch,
            kv_tokens=d.shape.kv_tokens,
            **{f"{of.value}_{name}": x for of, s in zip(PHASES, both, strict=True) for name, x in asdict(s).items()},
        )
        if not self._table.has(point.key):
            self._table.add(point)
        way.ragged += 1
        way.known += list(self._units.at(np.array([_place(p.shape, d.shape)], np.float64)))
        trial = Trial(at, p, d)
        return tuple(predicted(model, of.value, trial)[0] / s.median_ms - 1 for of, s in zip(PHASES, both, strict=True))


def _place(prefill: PrefillShape, decode: DecodeShape) -> tuple[float, float, float, float]:
    return prefill.tokens, prefill.mean_context, decode.batch, decode.kv_tokens


def _about(p: Prompts, d: Decodes) -> str:
    """For people."""
    return f"{p.shape.tokens} of {len(p.new_tokens)}, {d.shape.batch} x {d.shape.kv_tokens / d.shape.batch:.0f}"
