"""Both phases at once: the share of its speed alone that each keeps, in every way of sharing the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from semipd._steps import Grid
from semipd.alone import Dealing, DecodeCurves, Surface, fastest, grouped, stairs, typical_prompts, with_tiles
from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, PrefillShape
from semipd.correction import Units, smooth
from semipd.grid import Knots, arranged, axis, completed, sparse_values
from semipd.padding import Padded
from semipd.points import HybridPoint, RaggedPoint, whole_numbers

FILLS_TOKENS = 2048
"""Prefill tokens that fill every partition for several waves; more of them last longer but contend no more."""

SHARED = ("tokens", "mean_context", "batch", "kv_tokens")
"""The axes of what both phases together take."""

CONTEXT_KNEE = 2048
"""Of a model with weights: see docs/adr/0005-profiles-through-the-serving-executor.md for what it rests on."""

PARTS = {"tokens": 16, "mean_context": 4, "batch": 8, "kv_tokens": 6}
"""Into how many equal parts of its logarithms the range of a variable is cut, where ragged batches tell more."""


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
class Observed:
    """Ragged batches of both phases that ran beside each other, and the seconds that a layer of each took."""

    prefill: PrefillShape
    decode: DecodeShape
    prefill_s: float
    decode_s: float

    @property
    def place(self) -> tuple[float, float, float, float]:
        """By ``SHARED``."""
        return self.prefill.tokens, self.prefill.mean_context, self.decode.batch, self.decode.kv_tokens


def observations(points: Sequence[RaggedPoint], source: str) -> dict[Allocation, list[Observed]]:
    """The rows of a table of ragged batches. Raises InputError naming the row that cannot be read."""
    found: dict[Allocation, list[Observed]] = {}
    for row, p in enumerate(points, 2):
        where = f"{source}: row {row}"
        if p.mode not in (Mode.SPLIT.value, Mode.CAPPED.value, Mode.PRIORITY.value):
            raise InputError(f"{where}: mode: found {p.mode!r}; expected split, capped or priority")
        new, context = (whole_numbers(getattr(p, name), f"{where}: {name}") for name in ("new_tokens", "context_lens"))
        if min(new) < 1:
            raise InputError(f"{where}: new_tokens: found {min(new)}; expected one or more of each prompt")
        if len(new) != len(context):
            raise InputError(
                f"{where}: context_lens: found {len(context)} numbers; expected {len(new)} as in new_tokens"
            )
        at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
        shapes = PrefillShape.of(new, context), DecodeShape(p.batch, p.kv_tokens)
        found.setdefault(at, []).append(Observed(*shapes, p.prefill_median_ms / 1e3, p.decode_median_ms / 1e3))
    return found


def contentions(
    mode: Mode,
    points: Iterable[HybridPoint],
    observed: Mapping[Allocation, Sequence[Observed]],
    prefill: Mapping[int, Surface],
    dealing: Mapping[int, Dealing],
    decode: Mapping[int, DecodeCurves],
    device_sms: int,
    scales: Scales,
    padded: Padded,
    source: str,
) -> dict[Allocation, Contention]:
    """Contention in every allocation of a mode, by its rows of a hybrid table and by ragged batches.

    Raises InputError as ``Tables.of`` does.
    """
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
        found[at] = _contention(rows, observed.get(at, ()), *alone, scales, padded, f"{source}/hybrid.csv: {name}")
    return found


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
    observed: Sequence[Observed],
    prefill: Surface,
    dealing: Dealing | None,
    decode: DecodeCurves,
    scales: Scales,
    padded: Padded,
    where: str,
) -> Contention:
    """Speeds in one way of sharing: the time alone there, which may lie between its points, over the measured time.

    They follow the logarithms of the tokens, of the batch, and of what both phases have to do for each: matrix products
    and attention. Where several prefill backends were measured, the row of the fastest counts for both phases. What
    ragged batches are off between the rows is smoothed.
    """
    best = fastest(points, lambda p: (p.tokens, p.mean_context, p.batch, p.kv_tokens), lambda p: p.prefill_median_ms)
    grid = sparse_values(best, SHARED, where)
    values = [list(of.values) for of in grid]
    alone = _without_stairs(prefill, padded.tokens[-1] if padded.tokens else None, values[0])
    way = _Way(alone, prefill[0][-1], dealing, decode, scales, padded)
    speeds = way.speeds(best, grid)
    plain = way.contention(values, *speeds)
    return plain if not observed else way.contention(*way.corrected(plain, values, speeds, set(best), observed))


Speeds = tuple[FloatArray, FloatArray]
"""Shares of its speed alone that prefill keeps, and decode, at all combinations of values of ``SHARED``."""


@dataclass(frozen=True)
class _Way:
    """A way of sharing, and what each phase takes there alone. ``most_tokens``: of the largest batch measured so."""

    prefill: Grid
    most_tokens: int
    dealing: Dealing | None
    decode: DecodeCurves
    scales: Scales
    padded: Padded

    @property
    def offsets(self) -> tuple[float, ...]:
        """What is added to the variables of ``SHARED`` before logarithms are taken."""
        return 0.0, self.scales.mean_context, 0.0, self.scales.kv_tokens

    def speeds(self, best: Mapping[tuple[int, int, int, int], HybridPoint], grid: Sequence[Knots]) -> Speeds:
        """By the rows of a hybrid table, each at its place."""
        prefill_s = {
            (t, m): self.prefill.number(t, m)[0]
            + (self.dealing.beyond_s(t, m, *typical_prompts(t, m)) if self.dealing else 0.0)
            for t, m, _, _ in best
        }
        alone_s = {b: self.decode.at_batch.vector(b)[0] for _, _, b, _ in best}
        prefill = {(t, m, b, k): prefill_s[t, m] * 1e3 / p.prefill_median_ms for (t, m, b, k), p in best.items()}
        decode = {
            (t, m, b, k): float(np.interp(k, self.decode.kv_tokens, alone_s[b])) * 1e3 / p.decode_median_ms
            for (t, m, b, k), p in best.items()
        }
        return self._everywhere(prefill, grid), self._everywhere(decode, grid)

    def _everywhere(self, speeds: Mapping[tuple[int, int, int, int], float], grid: Sequence[Knots]) -> FloatArray:
        measured = arranged(speeds, [of.values for of in grid])
        straight = [np.log2(np.array(of.values) + offset) for of, offset in zip(grid, self.offsets, strict=True)]
        return np.where(np.isnan(measured), np.exp(completed(np.log(measured), grid, straight)), measured)

    def contention(self, values: Sequence[Sequence[int]], prefill: FloatArray, decode: FloatArray) -> Contention:
        """Arranged for look-ups.

        To prefill, a decode batch is as large as it is padded to: its kernels are those of that size.
        """
        axes = [axis(name, v, log=True, offset=o) for name, v, o in zip(SHARED, values, self.offsets, strict=True)]
        tokens, _, batches, kv = values
        if tokens[-1] >= FILLS_TOKENS:
            axes[0] = axis("tokens", tokens, log=True, high=self.most_tokens)
        knots = np.union1d(self.decode.kv_tokens, np.array(kv, dtype=np.float64))
        at, among = (np.log2(np.asarray(x, dtype=np.float64) + self.scales.kv_tokens) for x in (knots, kv))
        steps, counts_as = stairs(batches, self.padded.batch)
        padded = np.einsum("tmbk,bs->tmsk", prefill, _shares(np.log2(counts_as), np.log2(batches)))
        alone = self.decode
        return Contention(
            prefill=Grid([*axes[:2], axis("batch", steps, log=True), axes[3]], padded.reshape(-1)),
            prefill_alone=self.prefill,
            decode=Grid(axes[:3], np.array([np.interp(at, among, of) for of in decode.reshape(-1, len(kv))])),
            solo=Grid(alone.at_batch.axes, np.array([np.interp(knots, alone.kv_tokens, row) for row in alone.rows])),
            kv_tokens=knots,
            low=max(alone.kv.low, axes[3].low),
            high=min(alone.kv.high, axes[3].high),
        )

    def corrected(
        self,
        plain: Contention,
        values: Sequence[Sequence[int]],
        speeds: Speeds,
        measured: set[tuple[int, int, int, int]],
        observed: Sequence[Observed],
    ) -> tuple[list[list[int]], FloatArray, FloatArray]:
        """At more values of the variables: what the rows say there, and what ragged batches were off.

        Args:
            plain: What the rows say.
            values: Of the variables, in the rows.
            speeds: At these.
            measured: Which of their combinations are rows; these stay as they are.
            observed: The ragged batches.
        """
        finer = [sorted({*of, *more}) for of, more in zip(values, self._between(values), strict=True)]
        units = Units.of(values, self.offsets)
        nodes, among = ([units.along(i, of) for i, of in enumerate(along)] for along in (finer, values))
        exact = units.at(np.array(sorted(measured), np.float64))
        rows = ~np.isnan(arranged(dict.fromkeys(measured, 0.0), finer))
        off = np.array([self._off(plain, each) for each in observed])
        found = []
        for phase, speed in enumerate(speeds):
            at = units.at(np.array([self._place(each, padded=phase == 0) for each in observed], np.float64))
            beyond = np.where(rows, 0.0, smooth(nodes, at, off[:, phase], exact))
            found.append(_at_all(nodes, among, speed) * np.exp(beyond))
        return finer, found[0], found[1]

    def _between(self, values: Sequence[Sequence[int]]) -> list[list[int]]:
        """Evenly by their logarithms, between the ends; of batches those that they are padded to."""
        found = []
        for name, of, offset in zip(SHARED, values, self.offsets, strict=True):
            low, high = np.log2(of[0] + offset), np.log2(of[-1] + offset)
            even = np.exp2(np.linspace(low, high, PARTS[name] + 1)) - offset
            sizes = self.padded.batch if name == "batch" else ()
            more = sizes or np.round(even).astype(int).tolist()
            found.append([x for x in more if of[0] < x < of[-1]])
        return found

    def _place(self, each: Observed, *, padded: bool) -> tuple[float, float, float, float]:
        """Where a look-up goes, by ``SHARED``."""
        batch = each.decode.batch
        if padded and self.padded.batch:
            batch = next((size for size in self.padded.batch if size >= batch), batch)
        return each.prefill.tokens, self._context(each.prefill), batch, each.decode.kv_tokens

    def _context(self, shape: PrefillShape) -> float:
        return shape.mean_context if self.dealing else with_tiles(shape, (self.padded.queries - 1) / 2)

    def _off(self, plain: Contention, each: Observed) -> tuple[float, float]:
        """Logarithm of what the rows say that each phase takes over what it took."""
        tokens, context, batch, kv_tokens = self._place(each, padded=False)
        prefill_s = plain.prefill_alone.number(tokens, context)[0]
        if self.dealing:
            prefill_s += self.dealing.beyond_s(int(tokens), context, each.prefill.new_tokens, each.prefill.context_lens)
        prefill_s /= plain.prefill.number(tokens, context, batch, kv_tokens)[0]
        curve_s = plain.solo.vector(batch)[0] / plain.decode.vector(tokens, context, batch)[0]
        decode_s = float(np.interp(kv_tokens, plain.kv_tokens, curve_s))
        return float(np.log(prefill_s / each.prefill_s)), float(np.log(decode_s / each.decode_s))


def _shares(at: FloatArray, among: FloatArray) -> FloatArray:
    """What each of some values has to do with what lies at others, on a straight line between two, [among, at]."""
    return np.array([np.interp(at, among, unit) for unit in np.eye(len(among))])


def _at_all(nodes: Sequence[FloatArray], among: Sequence[FloatArray], values: FloatArray) -> FloatArray:
    """What lies between values at all combinations of some numbers of each variable: multilinear."""
    found = values
    for i, (at, of) in enumerate(zip(nodes, among, strict=True)):
        found = np.moveaxis(np.tensordot(_shares(at, of), found, (0, i)), 0, i)
    return found
