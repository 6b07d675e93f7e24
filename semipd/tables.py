"""Measured points, arranged for look-ups: grids of step times, and of speeds beside the other phase."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from semipd._steps import Axis, Grid, Waves
from semipd.core import Allocation, FloatArray, InputError, Mode
from semipd.grid import arranged, axis, axis_values, completed, sparse_values
from semipd.padding import NOT_PADDED, Padded
from semipd.points import DecodePoint, HybridPoint, MixedPoint, PrefillPoint, equal_prompts, fewest_prompts

FILLS_TOKENS = 2048
"""Prefill tokens that fill every partition for several waves; more of them last longer but contend no more."""

SHARED = ("tokens", "mean_context", "batch", "kv_tokens")
"""The axes of what both phases together take."""

CONTEXT_KNEE = 2048
"""Of a model with weights: see docs/adr/0005-profiles-through-the-serving-executor.md for what it rests on."""

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
class Contention:
    """One way of sharing: the share of its speed alone that each phase keeps while the other runs.

    ``prefill``: over (tokens, mean_context, batch, kv_tokens), of what ``prefill_alone`` has at (tokens, mean_context):
    the time alone without the stairs that nothing is left of beside the other phase. ``decode``: over (tokens,
    mean_context, batch), a vector over the knots ``kv_tokens``, which are those of the solo curves and those of the
    hybrid table. ``solo``: the solo curves at these knots.
    """

    prefill: Grid
    prefill_alone: Grid
    decode: Grid
    solo: Grid
    kv_tokens: FloatArray
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scales:
    """Where a model's attention begins to matter beside its matrix products; zeros for attention alone.

    ``mean_context``: keys of a query from which on attention changes how a batch contends with the other phase.
    ``kv_tokens``: tokens whose keys and values are as many bytes as the weights.
    """

    mean_context: float = 0.0
    kv_tokens: float = 0.0

    @staticmethod
    def of(weights_bytes: int, kv_bytes_per_token: int) -> Scales:
        """Of a model; of attention alone, which has no weights, zeros."""
        return Scales(CONTEXT_KNEE if weights_bytes else 0.0, weights_bytes / kv_bytes_per_token)


NO_SCALES = Scales()


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
        tokens, contexts, rows = _prefill_surface(estimated, sizes, where)
        return Dealing(waves, sms, Grid([axis("tokens", tokens), axis("mean_context", contexts)], rows))

    def beyond_s(self, tokens: int, context: float, new_tokens: Sequence[int], context_lens: Sequence[int]) -> float:
        """Seconds of a layer to add to what is interpolated at (tokens, context); may be negative."""
        return self.waves.seconds(new_tokens, context_lens, self.sms) - self.table_s.number(tokens, context)[0]


def typical_prompts(tokens: int, mean_context: float) -> tuple[list[int], list[int]]:
    """New and cached tokens of as many prompts as tables are measured with at this place, about equal."""
    seqs = equal_prompts(tokens, mean_context) or fewest_prompts(tokens, mean_context)
    new = [tokens // seqs + (i < tokens % seqs) for i in range(seqs)]
    return new, [max(0, round(mean_context - q // 2)) for q in new]


@dataclass(frozen=True)
class Tables:
    """A profile's tables, arranged for look-ups.

    ``prefill``, ``decode``: alone, by SMs of the partition. ``contention``: in every measured way of running both
    phases beside each other. ``fused``: seconds of a fused step divided by the layers, None without any; beyond what
    ``fused_rows`` has for the rows of both parts, if these were padded.
    ``queries``: of a prompt that attention computes at once. ``refused``: modes that cannot be priced, and what is
    missing.
    """

    device_sms: int
    layers: int
    prefill: dict[int, Grid]
    dealing: dict[int, Dealing]
    decode: dict[int, DecodeCurves]
    contention: dict[Allocation, Contention]
    fused: Grid | None
    fused_rows: Grid
    queries: int
    refused: Mapping[Mode, str]

    @staticmethod
    def of(
        prefill: Iterable[PrefillPoint],
        decode: Iterable[DecodePoint],
        hybrid: Iterable[HybridPoint],
        mixed: Iterable[MixedPoint] = (),
        *,
        device_sms: int,
        layers: int,
        padded: Padded = NOT_PADDED,
        scales: Scales = NO_SCALES,
        waves: Waves | None = None,
        source: str = "profile",
    ) -> Tables:
        """Tables of measured points.

        Rows of mode ``streams`` of the hybrid table are not used.

        Args:
            prefill: Solo points, milliseconds of one layer; the whole device and every split's partition.
            decode: Likewise.
            hybrid: Points measured while both phases ran; the allocations are those found here.
            mixed: Fused batches on the whole device, milliseconds of a step divided by the layers.
            device_sms: SMs of the whole device.
            layers: Layers of a decode step.
            padded: To which sizes batches were padded.
            scales: Of the model.
            waves: Of its attention, if how that is dealt to SMs is known.
            source: Where the points are from, for messages.

        Raises:
            InputError: There is no split, a partition is missing, or the grid of a split lacks a point. Where that is
                so of another mode, the mode is ``refused``.
        """
        by_sms = _grouped(prefill, lambda p: p.sms)
        dealing = {
            sms: Dealing.of(waves, sms, points, padded.tokens, f"{source}/prefill.csv: {sms} SMs")
            for sms, points in by_sms.items()
            if waves is not None and all(p.backend == "fa2" for p in points)
        }
        prefill_alone = {
            sms: _prefill_surface(points, padded.tokens, f"{source}/prefill.csv: {sms} SMs")
            for sms, points in by_sms.items()
        }
        prefill_of = {
            sms: Grid([axis("tokens", tokens), axis("mean_context", contexts)], rows)
            for sms, (tokens, contexts, rows) in prefill_alone.items()
        }
        decode_of = {
            sms: _decode_curves(points, padded.batch, f"{source}/decode.csv: {sms} SMs")
            for sms, points in _grouped(decode, lambda p: p.sms).items()
        }
        for table, found in (("prefill.csv", set(prefill_of)), ("decode.csv", set(decode_of))):
            if device_sms not in found:
                raise InputError(f"{source}/{table}: sms: {device_sms} not found; expected it, being the whole device")
        by_mode = _grouped(hybrid, lambda p: p.mode)

        def shared(mode: Mode) -> dict[Allocation, Contention]:
            points = by_mode.get(mode.value, ())
            return _shared(mode, points, prefill_alone, dealing, decode_of, device_sms, scales, padded, source)

        refused: dict[Mode, str] = {}

        def unless_refused(mode: Mode, read: Callable[[], P]) -> P | None:
            try:
                return read()
            except InputError as error:
                refused[mode] = str(error)
                return None

        contention = shared(Mode.SPLIT)
        for mode in (Mode.CAPPED, Mode.PRIORITY):
            contention |= unless_refused(mode, partial(shared, mode)) or {}
        tokens, _, seconds = prefill_alone[device_sms]
        fused_rows = Grid([axis("tokens", tokens)], seconds[:, 0] * bool(padded.tokens))
        fused = unless_refused(Mode.MIXED, lambda: _fused(mixed, fused_rows, f"{source}/mixed.csv"))
        return Tables(
            device_sms,
            layers,
            prefill_of,
            dealing,
            decode_of,
            contention,
            fused,
            fused_rows,
            padded.queries,
            refused,
        )


def _shared(
    mode: Mode,
    points: Iterable[HybridPoint],
    prefill: Mapping[int, Surface],
    dealing: Mapping[int, Dealing],
    decode: Mapping[int, DecodeCurves],
    device_sms: int,
    scales: Scales,
    padded: Padded,
    source: str,
) -> dict[Allocation, Contention]:
    """Contention in every allocation of a mode. Raises InputError as ``Tables.of`` does."""
    shared = _grouped(points, lambda p: (p.prefill_sms, p.decode_sms))
    if not shared:
        expected = "at least one measured split" if mode is Mode.SPLIT else "some to choose it"
        raise InputError(f"{source}/hybrid.csv: no row of mode {mode.value}; expected {expected}")
    found = {}
    for prefill_sms, decode_sms in sorted(shared):
        at = Allocation(mode, prefill_sms, decode_sms)
        name = f"split {at.name}" if mode is Mode.SPLIT else at.name
        if mode is not Mode.SPLIT and decode_sms != device_sms:
            raise InputError(
                f"{source}/hybrid.csv: {name}: decode_sms: found {decode_sms}; expected the whole device, {device_sms}"
            )
        for table, measured, sms in (
            ("prefill.csv", set(prefill), prefill_sms),
            ("decode.csv", set(decode), decode_sms),
        ):
            if sms not in measured:
                raise InputError(f"{source}/{table}: sms: {sms} not found; expected it, for {name} of hybrid.csv")
        alone = prefill[prefill_sms], dealing.get(prefill_sms), decode[decode_sms]
        rows = shared[prefill_sms, decode_sms]
        found[at] = _contention(rows, *alone, scales, padded, f"{source}/hybrid.csv: {name}")
    return found


def _grouped(points: Iterable[P], key: Callable[[P], K]) -> dict[K, list[P]]:
    groups: dict[K, list[P]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def _fastest(points: Iterable[P], place: Callable[[P], K], time_ms: Callable[[P], float]) -> dict[K, P]:
    """The fastest point (that is: backend) at each place."""
    return {key: min(same, key=time_ms) for key, same in _grouped(points, place).items()}


def _prefill_surface(points: Iterable[PrefillPoint], sizes: Sequence[int], where: str) -> Surface:
    """Seconds of a layer alone over (tokens, mean_context)."""
    best = _fastest(points, lambda p: (p.tokens, p.mean_context), lambda p: p.median_ms)
    seconds = {place: point.median_ms / 1e3 for place, point in best.items()}
    return _surface(seconds, ("tokens", "mean_context"), sizes, where)


def _decode_curves(points: Iterable[DecodePoint], sizes: Sequence[int], where: str) -> DecodeCurves:
    """Seconds of a layer alone over (batch, kv_tokens)."""
    best = _fastest(points, lambda p: (p.batch, p.kv_tokens), lambda p: p.median_ms)
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
    knots, counts_as = _stairs(along, sizes)
    spine = np.interp(counts_as, along, [seconds[a, low] for a in along])
    excess = (measured - measured[:, :1]).T
    rows = spine[:, None] + np.array([np.interp(knots, firsts, of) for of in excess]).T
    rows[[bisect_left(knots, a) for a in firsts]] = measured  # to the last bit
    return knots, seconds_axis, rows


ONE_MORE = 1.125


def _stairs(along: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], list[int]]:
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


def _without_stairs(surface: Surface, stairs_to: int | None, tokens: Sequence[int]) -> Grid:
    """Seconds of a layer alone, between ``stairs_to`` and the last of ``tokens`` at no others than these.

    Batches of up to ``stairs_to`` tokens are padded. Larger ones go in waves of tiles, the last of which is only partly
    filled: beside the other phase, with the power that this saves, the device clocks higher.
    """
    along, contexts, rows = surface
    ends = (along[0], along[-1])
    kept = [
        i
        for i, x in enumerate(along)
        if stairs_to is None or x <= stairs_to or x in tokens or x > tokens[-1] or x in ends
    ]
    return Grid([axis("tokens", [along[i] for i in kept]), axis("mean_context", contexts)], rows[kept])


def _contention(
    points: Iterable[HybridPoint],
    prefill: Surface,
    dealing: Dealing | None,
    decode: DecodeCurves,
    scales: Scales,
    padded: Padded,
    where: str,
) -> Contention:
    """Speeds at one split: the solo time there, which may lie between solo points, over the measured time.

    They follow the logarithms of the tokens, of the batch, and of what both phases have to do for each: matrix products
    and attention. To prefill, a decode batch is as large as it is padded to: its kernels are those of that size. Where
    several prefill backends were measured, the row of the fastest counts for both phases.
    """
    best = _fastest(points, lambda p: (p.tokens, p.mean_context, p.batch, p.kv_tokens), lambda p: p.prefill_median_ms)
    grid = sparse_values(best, SHARED, where)
    values = [list(of.values) for of in grid]
    offsets = {"mean_context": scales.mean_context, "kv_tokens": scales.kv_tokens}
    axes = [axis(name, v, log=True, offset=offsets.get(name, 0.0)) for name, v in zip(SHARED, values, strict=True)]
    if values[0][-1] >= FILLS_TOKENS:
        axes[0] = axis("tokens", values[0], log=True, high=prefill[0][-1])
    tokens, _, batches, kv = values
    alone = _without_stairs(prefill, padded.tokens[-1] if padded.tokens else None, tokens)
    knots = np.union1d(decode.kv_tokens, np.array(kv, dtype=np.float64))
    at, among = (np.log2(np.asarray(x, dtype=np.float64) + scales.kv_tokens) for x in (knots, kv))

    decode_s = {
        b: dict(zip(kv, np.interp(kv, decode.kv_tokens, decode.at_batch.vector(b)[0]), strict=True)) for b in batches
    }
    prefill_s = {
        (t, m): alone.number(t, m)[0] + (dealing.beyond_s(t, m, *typical_prompts(t, m)) if dealing else 0.0)
        for t, m in {place[:2] for place in best}
    }
    straight = [np.log2(np.array(v) + offsets.get(name, 0.0)) for name, v in zip(SHARED, values, strict=True)]

    def everywhere(speeds: Mapping[tuple[int, int, int, int], float]) -> FloatArray:
        measured = arranged(speeds, values)
        return np.where(np.isnan(measured), np.exp(completed(np.log(measured), grid, straight)), measured)

    prefill_speed = everywhere(
        {(t, m, b, k): prefill_s[t, m] * 1e3 / p.prefill_median_ms for (t, m, b, k), p in best.items()}
    )
    decode_speed = everywhere(
        {(t, m, b, k): decode_s[b][k] * 1e3 / p.decode_median_ms for (t, m, b, k), p in best.items()}
    )
    steps, counts_as = _stairs(batches, padded.batch)
    shares = np.array([np.interp(np.log2(counts_as), np.log2(batches), unit) for unit in np.eye(len(batches))])
    padded_axes = [*axes[:2], axis("batch", steps, log=True), axes[3]]
    return Contention(
        prefill=Grid(padded_axes, np.einsum("tmbk,bs->tmsk", prefill_speed, shares).reshape(-1)),
        prefill_alone=alone,
        decode=Grid(axes[:3], np.array([np.interp(at, among, of) for of in decode_speed.reshape(-1, len(kv))])),
        solo=Grid(decode.at_batch.axes, np.array([np.interp(knots, decode.kv_tokens, row) for row in decode.rows])),
        kv_tokens=knots,
        low=max(decode.kv.low, axes[3].low),
        high=min(decode.kv.high, axes[3].high),
    )


def _fused(points: Iterable[MixedPoint], rows: Grid, where: str) -> Grid:
    """Seconds of a fused step, divided by the layers, beyond those of its rows."""
    best = _fastest(points, lambda p: (p.tokens, p.mean_context, p.batch, p.kv_tokens), lambda p: p.median_ms)
    if not best:
        raise InputError(f"{where}: no measured point; expected some to choose fused batches")
    grid = sparse_values(best, SHARED, where)
    values = [list(of.values) for of in grid]
    beyond = {place: p.median_ms / 1e3 - rows.number(p.tokens + p.batch)[0] for place, p in best.items()}
    seconds = completed(arranged(beyond, values), grid, [np.array(v, dtype=np.float64) for v in values])
    return Grid([axis(name, v) for name, v in zip(SHARED, values, strict=True)], seconds.reshape(-1))
