"""A phase alone on a partition: its measured times, and what lies between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeVar

import numpy as np

from semipd._steps import Axis, Grid, Waves
from semipd.core import FloatArray, PrefillShape
from semipd.grid import axis, axis_values
from semipd.points import DecodePoint, PrefillPoint, equal_prompts, fewest_prompts

Surface = tuple[list[int], list[int], FloatArray]
"""Two variables' values, and seconds at every pair of them, shape [first, second]."""

P = TypeVar("P")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class DecodeCurves:
    """Decode on one partition, alone: at each batch, seconds of a layer at the knots ``kv_tokens``.

    ``rows``: these seconds, of each measured batch; ``at_batch``: of any.
    """

    kv: Axis
    kv_tokens: FloatArray
    rows: FloatArray
    at_batch: Grid


@dataclass(frozen=True, slots=True)
class Dealing:
    """How much longer attention of a batch takes than between the measured ones, by how it is dealt to a partition.

    ``table_s``: an estimate of it for the measured batches, interpolated as their times are.
    """

    waves: Waves
    sms: int
    table_s: Grid

    @staticmethod
    def of(waves: Waves, sms: int, points: Sequence[PrefillPoint], sizes: Sequence[int], where: str) -> Dealing:
        """Of the batches that were measured on so many SMs."""
        estimated = [
            replace(p, median_ms=waves.seconds([p.seq_tokens] * p.seqs, [p.seq_context] * p.seqs, sms) * 1e3)
            for p in points
        ]
        tokens, contexts, rows = prefill_surface(estimated, sizes, where)
        return Dealing(waves, sms, Grid([axis("tokens", tokens), axis("mean_context", contexts)], rows))

    def beyond_s(self, tokens: int, context: float, new_tokens: Sequence[int], context_lens: Sequence[int]) -> float:
        """Seconds of a layer to add to what is interpolated at (tokens, context); may be negative."""
        return self.waves.seconds(new_tokens, context_lens, self.sms) - self.table_s.number(tokens, context)[0]


def typical_prompts(tokens: int, mean_context: float) -> tuple[list[int], list[int]]:
    """New and cached tokens of as many prompts as tables are measured with at this place, about equal."""
    seqs = equal_prompts(tokens, mean_context) or fewest_prompts(tokens, mean_context)
    new = [tokens // seqs + (i < tokens % seqs) for i in range(seqs)]
    return new, [max(0, round(mean_context - q // 2)) for q in new]


def with_tiles(shape: PrefillShape, spare_queries: float) -> float:
    """Mean context of a prefill batch as attention computes it, where how its tiles are dealt is not known.

    A prompt counts for ``spare_queries``, half a tile, more, unless there have to be so many prompts: of those without
    cached tokens the longest that have this mean context, of others one. Such batches the tables hold.
    """
    mean, tokens = shape.mean_context, shape.tokens
    fewest = ceil(tokens / (2 * mean)) if mean else 1
    return mean + spare_queries * max(0.0, shape.contexts - fewest * mean) / max(1, tokens)


def grouped(points: Iterable[P], key: Callable[[P], K]) -> dict[K, list[P]]:
    """Points with the same key together."""
    groups: dict[K, list[P]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def fastest(points: Iterable[P], place: Callable[[P], K], time_ms: Callable[[P], float]) -> dict[K, P]:
    """The fastest point (that is: backend) at each place."""
    return {key: min(same, key=time_ms) for key, same in grouped(points, place).items()}


def prefill_surface(points: Iterable[PrefillPoint], sizes: Sequence[int], where: str) -> Surface:
    """Seconds of a layer alone over (tokens, mean_context)."""
    best = fastest(points, lambda p: (p.tokens, p.mean_context), lambda p: p.median_ms)
    seconds = {place: point.median_ms / 1e3 for place, point in best.items()}
    return _surface(seconds, ("tokens", "mean_context"), sizes, where)


def decode_curves(points: Iterable[DecodePoint], sizes: Sequence[int], where: str) -> DecodeCurves:
    """Seconds of a layer alone over (batch, kv_tokens)."""
    best = fastest(points, lambda p: (p.batch, p.kv_tokens), lambda p: p.median_ms)
    seconds = {place: point.median_ms / 1e3 for place, point in best.items()}
    batches, kv, rows = _surface(seconds, ("batch", "kv_tokens"), sizes, where)
    return DecodeCurves(
        axis("kv_tokens", kv), np.array(kv, dtype=np.float64), rows, Grid([axis("batch", batches)], rows)
    )


def _surface(
    seconds: Mapping[tuple[int, int], float], names: tuple[str, str], sizes: Sequence[int], where: str
) -> Surface:
    """Times over two variables at every pair of some values: the first's, the second's, and the times [first, second].

    What was measured at the least value of the second variable is the *spine*, a time for each value of the first. What
    a time exceeds it by is bilinear between the values that have a full row. On the spine a batch counts as
    the one of ``sizes`` that it is padded to, or as the next measured one if that comes first.
    """
    low = min(second for _, second in seconds)
    along = sorted({first for first, _ in seconds})
    whole = {first for first, second in seconds if second != low} | {along[0], along[-1]}
    firsts, seconds_axis = axis_values([place for place in seconds if place[0] in whole], names, where)
    measured = np.array([[seconds[a, b] for b in seconds_axis] for a in firsts])
    knots, counts_as = stairs(along, sizes)
    spine = np.interp(counts_as, along, [seconds[a, low] for a in along])
    excess = (measured - measured[:, :1]).T
    rows = spine[:, None] + np.array([np.interp(knots, firsts, of) for of in excess]).T
    rows[[bisect_left(knots, a) for a in firsts]] = measured  # to the last bit
    return knots, seconds_axis, rows


ONE_MORE = 1.125


def stairs(along: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Knots of a spine measured at ``along``, between which it is linear, and the size that each counts as.

    What is measured within ``ONE_MORE`` beyond the last size counts as one: the first batch that is not padded takes
    another tile as well.
    """
    if sizes and (beyond := [x for x in along if sizes[-1] < x <= sizes[-1] * ONE_MORE]):
        sizes = (*sizes, beyond[0])
    last = sizes[-1] if sizes else 0
    edges = {x for x in (*sizes, *along) if along[0] <= x < along[-1] and x <= last}
    knots = sorted({*along, *edges, *(x + 1 for x in edges)})
    return knots, [min(sizes[bisect_left(sizes, x)] if x <= last else x, along[bisect_left(along, x)]) for x in knots]
