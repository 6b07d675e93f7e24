"""Both phases at once: the share of its speed alone that each keeps, in every way of sharing the device."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from semipd._steps import Grid
from semipd.alone import Dealing, DecodeCurves, Surface, fastest, grouped, stairs, typical_prompts, with_tiles
from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, PrefillShape
from semipd.correction import Correction, Seen, Units
from semipd.grid import arranged, axis, completed, sparse_values
from semipd.padding import Padded
from semipd.points import HybridPoint, RaggedPoint

FILLS_TOKENS = 2048
"""Prefill tokens that fill every partition for several waves; more of them last longer but contend no more."""

SHARED = ("tokens", "mean_context", "batch", "kv_tokens")
"""The axes of what both phases together take."""

CONTEXT_KNEE = 2048
"""Of a model with weights: see docs/adr/0005-profiles-through-the-serving-executor.md for what it rests on."""

LEAST_MS, MOST_MS = 1e-6, 1e6
"""Of a layer, however small or large: what is beyond is no time."""

Place = tuple[int, int, int, int]
"""Numbers of the variables of ``SHARED``."""

PARTS = {"tokens": 16, "mean_context": 4, "batch": 8, "kv_tokens": 6}
"""Into how many equal parts of its logarithms the range of a variable is cut, where ragged batches tell more."""


@dataclass(frozen=True, slots=True)
class Contention:
    """One way of sharing: the share of its speed alone that each phase keeps while the other runs.

    ``prefill``: over (tokens, mean_context, batch, kv_tokens), of what ``prefill_alone`` has at (tokens, mean_context):
    the time alone without the stairs that nothing is left of beside the other phase. ``decode``: over (tokens,
    mean_context, batch), a vector over the knots ``kv_tokens``, which are those of the solo curves, of the hybrid table
    and, with ragged batches, some between. ``solo``: the solo curves at these knots.
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
class Observed:
    """Ragged batches of both phases that ran beside each other, and the seconds that a layer of each took."""

    prefill: PrefillShape
    decode: DecodeShape
    prefill_s: float
    decode_s: float


def observations(
    points: Iterable[RaggedPoint], ways: Collection[Allocation], refused: Collection[Mode], source: str
) -> dict[Allocation, list[Observed]]:
    """The rows of a table of ragged batches, by way of sharing; those of modes that are ``refused`` are left out.

    Raises InputError naming the row that cannot be read, or whose way of sharing is none of ``ways``.
    """
    found: dict[Allocation, list[Observed]] = {}
    for row, p in enumerate(points, 2):
        where = f"{source}: row {row}"
        if p.mode not in (Mode.SPLIT.value, Mode.CAPPED.value, Mode.PRIORITY.value):
            raise InputError(f"{where}: mode: found {p.mode!r}; expected split, capped or priority")
        shapes = p.shapes(where)
        for name in ("prefill_median_ms", "decode_median_ms"):
            if not LEAST_MS <= getattr(p, name) <= MOST_MS:
                raise InputError(
                    f"{where}: {name}: found {getattr(p, name)!r}; expected a layer's, {LEAST_MS:g} to {MOST_MS:g}"
                )
        at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
        if at.mode in refused:
            continue
        if at not in ways:
            known = ", ".join(way.name for way in ways if way.mode is at.mode)
            raise InputError(
                f"{where}: prefill_sms, decode_sms: found {p.prefill_sms}, {p.decode_sms} of {p.mode}; expected those "
                f"of {known}, as in hybrid.csv"
            )
        found.setdefault(at, []).append(Observed(*shapes, p.prefill_median_ms / 1e3, p.decode_median_ms / 1e3))
    return found


@dataclass(frozen=True)
class Way:
    """A way of sharing by its rows of a hybrid table, and what each phase takes there alone.

    ``prefill_s``: without the stairs that nothing is left of beside the other phase; ``most_tokens``: of the largest
    batch measured alone. ``values``: of the variables of ``SHARED``; ``rows``: which combinations of them were
    measured. ``prefill``, ``decode``: shares of its speed alone that each phase keeps, at all combinations.
    """

    at: Allocation
    prefill_s: Grid
    most_tokens: int
    dealing: Dealing | None
    decode_s: DecodeCurves
    scales: Scales
    padded: Padded
    values: list[list[int]]
    rows: frozenset[Place]
    prefill: FloatArray
    decode: FloatArray

    @property
    def offsets(self) -> tuple[float, ...]:
        """What is added to the variables before logarithms are taken."""
        return _offsets(self.scales)

    @property
    def contention(self) -> Contention:
        """Arranged for look-ups."""
        return self._arranged(self.values, self.prefill, self.decode)

    def _arranged(self, values: Sequence[Sequence[int]], prefill: FloatArray, decode: FloatArray) -> Contention:
        """To prefill, a decode batch is as large as it is padded to: its kernels are those of that size."""
        axes = [axis(name, v, log=True, offset=o) for name, v, o in zip(SHARED, values, self.offsets, strict=True)]
        tokens, _, batches, kv = values
        if tokens[-1] >= FILLS_TOKENS:
            axes[0] = axis("tokens", tokens, log=True, high=self.most_tokens)
        alone = self.decode_s
        knots = np.union1d(alone.kv_tokens, np.array(kv, dtype=np.float64))
        at, among = (np.log2(np.asarray(x, dtype=np.float64) + self.scales.kv_tokens) for x in (knots, kv))
        steps, counts_as = stairs(batches, self.padded.batch)
        padded = np.einsum("tmbk,bs->tmsk", prefill, _shares(np.log2(counts_as), np.log2(batches)))
        return Contention(
            prefill=Grid([*axes[:2], axis("batch", steps, log=True), axes[3]], padded.reshape(-1)),
            prefill_alone=self.prefill_s,
            decode=Grid(axes[:3], decode.reshape(-1, len(kv)) @ _shares(at, among)),
            solo=Grid(alone.at_batch.axes, np.array([np.interp(knots, alone.kv_tokens, row) for row in alone.rows])),
            kv_tokens=knots,
            low=max(alone.kv.low, axes[3].low),
            high=min(alone.kv.high, axes[3].high),
        )

    def seen(self, observed: Sequence[Observed], units: Units) -> tuple[Seen, Seen]:
        """What the rows are off at ragged batches, of prefill and of decode; at the rows themselves nothing."""
        plain = self.contention
        off = np.array([self._off(plain, each) for each in observed], np.float64).reshape(-1, 2)
        exact = units.at(np.array(sorted(self.rows), np.float64))
        prefill, decode = (
            units.at(np.array([self._place(each, padded) for each in observed], np.float64).reshape(-1, len(SHARED)))
            for padded in (True, False)
        )
        return Seen(self.at, exact, prefill, off[:, 0]), Seen(self.at, exact, decode, off[:, 1])

    def within(self, each: Observed) -> bool:
        """Whether batches are between the ends of the rows."""
        place = self._place(each, padded=False)
        return all(of[0] <= x <= of[-1] for of, x in zip(self.values, place, strict=True))

    def corrected(self, units: Units, prefill: Correction, decode: Correction) -> Contention:
        """With what lies between the rows; these stay as they are."""
        finer = [sorted({*of, *more}) for of, more in zip(self.values, self._between(), strict=True)]
        nodes, among = ([units.along(i, of) for i, of in enumerate(v)] for v in (finer, self.values))
        rows = ~np.isnan(arranged(dict.fromkeys(self.rows, 0.0), finer))
        speeds = (
            _at_all(nodes, among, speed) * np.exp(np.where(rows, 0.0, off.at_all(self.at, nodes)))
            for speed, off in ((self.prefill, prefill), (self.decode, decode))
        )
        return self._arranged(finer, *speeds)

    def _between(self) -> list[list[int]]:
        """Evenly by their logarithms, between the ends; of batches those that they are padded to."""
        found = []
        for name, of, offset in zip(SHARED, self.values, self.offsets, strict=True):
            low, high = np.log2(of[0] + offset), np.log2(of[-1] + offset)
            even = np.exp2(np.linspace(low, high, PARTS[name] + 1)) - offset
            sizes = self.padded.batch if name == "batch" else ()
            found.append([x for x in sizes or np.round(even).astype(int).tolist() if of[0] < x < of[-1]])
        return found

    def _place(self, each: Observed, padded: bool) -> tuple[float, float, float, float]:
        """Where a look-up goes, by ``SHARED``; with the size of the decode batch as it is ``padded``, or its own."""
        shape, batch = each.prefill, each.decode.batch
        context = shape.mean_context if self.dealing else with_tiles(shape, (self.padded.queries - 1) / 2)
        rows = next((size for size in self.padded.batch if size >= batch), batch)
        return shape.tokens, context, rows if padded else batch, each.decode.kv_tokens

    def _off(self, plain: Contention, each: Observed) -> tuple[float, float]:
        """Logarithm of what the rows say that each phase takes over what it took."""
        shape = each.prefill
        tokens, context, batch, kv_tokens = self._place(each, padded=False)
        prefill_s = plain.prefill_alone.number(tokens, context)[0]
        if self.dealing:
            prefill_s += self.dealing.beyond_s(shape.tokens, context, shape.new_tokens, shape.context_lens)
        prefill_s /= plain.prefill.number(tokens, context, batch, kv_tokens)[0]
        curve_s = plain.solo.vector(batch)[0] / plain.decode.vector(tokens, context, batch)[0]
        decode_s = float(np.interp(kv_tokens, plain.kv_tokens, curve_s))
        return float(np.log(prefill_s / each.prefill_s)), float(np.log(decode_s / each.decode_s))


def ways_of(
    mode: Mode,
    points: Iterable[HybridPoint],
    prefill: Mapping[int, Surface],
    dealing: Mapping[int, Dealing],
    decode: Mapping[int, DecodeCurves],
    device_sms: int,
    scales: Scales,
    padded: Padded,
    source: str,
) -> dict[Allocation, Way]:
    """Every allocation of a mode. Raises InputError as ``Tables.of`` does."""
    shared = grouped(points, lambda p: (p.prefill_sms, p.decode_sms))
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
        found[at] = _way(at, rows, *alone, scales, padded, f"{source}/hybrid.csv: {name}")
    return found


def contentions(
    ways: Mapping[Allocation, Way], observed: Mapping[Allocation, Sequence[Observed]]
) -> dict[Allocation, Contention]:
    """In every way of sharing, by its rows and by ragged batches between them, from which all ways learn together."""
    between = {at: [each for each in observed.get(at, ()) if way.within(each)] for at, way in ways.items()}
    if not any(between.values()):
        return {at: way.contention for at, way in ways.items()}
    every = [sorted({x for way in ways.values() for x in way.values[i]}) for i in range(len(SHARED))]
    units = Units.of(every, next(iter(ways.values())).offsets)
    seen = [way.seen(between[at], units) for at, way in ways.items()]
    corrections = [Correction.of([each[phase] for each in seen]) for phase in (0, 1)]
    return {at: way.corrected(units, *corrections) for at, way in ways.items()}


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


def _way(
    at: Allocation,
    points: Iterable[HybridPoint],
    prefill: Surface,
    dealing: Dealing | None,
    decode: DecodeCurves,
    scales: Scales,
    padded: Padded,
    where: str,
) -> Way:
    """Speeds in one way of sharing: the time alone there, which may lie between its points, over the measured time.

    They follow the logarithms of the tokens, of the batch, and of what both phases have to do for each: matrix products
    and attention. Where several prefill backends were measured, the row of the fastest counts for both phases.
    """
    best = fastest(points, lambda p: (p.tokens, p.mean_context, p.batch, p.kv_tokens), lambda p: p.prefill_median_ms)
    grid = sparse_values(best, SHARED, where)
    values = [list(of.values) for of in grid]
    alone = _without_stairs(prefill, padded.tokens[-1] if padded.tokens else None, values[0])
    prefill_s = {
        (t, m): alone.number(t, m)[0] + (dealing.beyond_s(t, m, *typical_prompts(t, m)) if dealing else 0.0)
        for t, m in {place[:2] for place in best}
    }
    curves = {b: decode.at_batch.vector(b)[0] for b in values[2]}
    decode_s = {(b, k): float(np.interp(k, decode.kv_tokens, curves[b])) for b, k in {place[2:] for place in best}}
    straight = [np.log2(np.array(of) + offset) for of, offset in zip(values, _offsets(scales), strict=True)]

    def everywhere(speeds: Mapping[Place, float]) -> FloatArray:
        measured = arranged(speeds, values)
        return np.where(np.isnan(measured), np.exp(completed(np.log(measured), grid, straight)), measured)

    return Way(
        at, alone, prefill[0][-1], dealing, decode, scales, padded, values, frozenset(best),
        prefill=everywhere({place: prefill_s[place[:2]] * 1e3 / p.prefill_median_ms for place, p in best.items()}),
        decode=everywhere({place: decode_s[place[2:]] * 1e3 / p.decode_median_ms for place, p in best.items()}),
    )  # fmt: skip


def _offsets(scales: Scales) -> tuple[float, ...]:
    return 0.0, scales.mean_context, 0.0, scales.kv_tokens


def _shares(at: FloatArray, among: FloatArray) -> FloatArray:
    """What each of some values has to do with what lies at others, on a straight line between two, [among, at]."""
    return np.array([np.interp(at, among, unit) for unit in np.eye(len(among))])


def _at_all(nodes: Sequence[FloatArray], among: Sequence[FloatArray], values: FloatArray) -> FloatArray:
    """What lies between values at all combinations of some numbers of each variable: multilinear."""
    found = values
    for i, (at, of) in enumerate(zip(nodes, among, strict=True)):
        found = np.moveaxis(np.tensordot(_shares(at, of), found, (0, i)), 0, i)
    return found
