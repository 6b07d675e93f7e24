"""What a step costs: the interface that the simulator and the policies price work with, and its two models.

``TableCost`` interpolates measured tables; docs/profiles.md says how and within which limits. ``ConstantCost`` has
fixed step times.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol, TypeVar

import numpy as np

from semipd._steps import Axis, Curve, Grid
from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, PrefillShape
from semipd.grid import axis, axis_values
from semipd.sweep import DecodePoint, HybridPoint, MixedPoint, PrefillPoint


class CostModel(Protocol):
    """Step times from measurements.

    A prefill step is one layer of a batch; a decode step is one token of every sequence, all layers, and so is a fused
    step.
    """

    @property
    def device_sms(self) -> int:
        """SMs of the whole device."""
        ...

    @property
    def layers(self) -> int:
        """Layers of the model: so many prefill steps take a batch through it."""
        ...

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """Every measured way of running both phases at once, each mode by ascending prefill SMs.

        The one of mode ``MIXED`` has the most prompt tokens that were measured in a fused batch; fewer may be chosen.
        """
        ...

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """Those of them that are disjoint splits."""
        ...

    @property
    def refused(self) -> Mapping[Mode, str]:
        """Modes that cannot be priced, and what is missing."""
        ...

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one layer on ``at``'s prefill partition, alone or beside a decode batch.

        The flag says whether the look-up fell outside the measured grid (and was clamped to its edge).
        Raises KeyError for a partition that was not measured.
        """
        ...

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """Seconds of each of so many decode steps, the first of that shape; each reads ``batch`` tokens more.

        The count says how many of the look-ups fell outside the measured grid. Raises KeyError likewise.
        """
        ...

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one fused step on the whole device: all layers of prompt pieces and, if any, of a decode batch.

        The flag is that of ``prefill_s``. Raises KeyError when no fused batch was measured.
        """
        ...


@dataclass(frozen=True)
class ConstantCost:
    """A cost model with fixed step times, for tests and closed forms; nothing contends, nothing is outside."""

    prefill_layer_s: float
    decode_step_s: float
    layers: int = 1
    device_sms: int = 132
    granularity_sms: int = 8
    chunk_tokens: int = 8192

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """Every disjoint split in multiples of ``granularity_sms``."""
        return tuple(Allocation(Mode.SPLIT, n, self.device_sms - n) for n in self._sizes)

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """The splits, as many capped ones, priority, and fused batches of up to ``chunk_tokens``."""
        whole = self.device_sms
        capped = tuple(Allocation(Mode.CAPPED, n, whole) for n in self._sizes)
        together = Allocation(Mode.PRIORITY, whole, whole), Allocation(Mode.MIXED, whole, whole, self.chunk_tokens)
        return (*self.splits, *capped, *together)

    @property
    def refused(self) -> Mapping[Mode, str]:
        """None."""
        return {}

    @property
    def _sizes(self) -> range:
        return range(self.granularity_sms, self.device_sms, self.granularity_sms)

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """``prefill_layer_s``, whatever the shape."""
        del shape, at, beside
        return self.prefill_layer_s, False

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """``decode_step_s`` for every step."""
        del shape, at, beside
        return np.full(steps, self.decode_step_s), 0

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """The layers of a prefill batch and a decode step, one after the other."""
        del chunk
        return self.layers * self.prefill_layer_s + (0.0 if decode is None else self.decode_step_s), False


class Misjudged:
    """Another cost model seen by a predictor that errs: for policies that shall not know what the simulation knows.

    At each allocation all times of a phase are off by one factor exp(error * z), z standard normal, drawn with
    ``seed``: as by tables measured on another day, whose points err together.
    """

    def __init__(self, cost: CostModel, error: float, seed: int = 0) -> None:
        self._cost, self._error, self._seed = cost, error, seed
        self.device_sms, self.layers = cost.device_sms, cost.layers
        self.splits, self.allocations, self.refused = cost.splits, cost.allocations, cost.refused
        self._factors: dict[tuple[int, Allocation], float] = {}

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """See ``CostModel.prefill_s``."""
        seconds, outside = self._cost.prefill_s(shape, at, beside)
        return seconds * self._factor(0, at), outside

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """See ``CostModel.decode_s``."""
        seconds, outside = self._cost.decode_s(shape, at, beside, steps)
        return seconds * self._factor(1, at), outside

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """See ``CostModel.mixed_s``."""
        seconds, outside = self._cost.mixed_s(chunk, decode)
        return seconds * self._factor(2, Allocation(Mode.MIXED, self.device_sms, self.device_sms)), outside

    def _factor(self, phase: int, at: Allocation) -> float:
        found = self._factors.get((phase, at))
        if found is None:
            drawn = np.random.default_rng([self._seed, phase, at.prefill_sms, at.decode_sms]).standard_normal()
            found = self._factors[phase, at] = float(np.exp(self._error * drawn))
        return found


CURVES = 4096
"""Decode curves that a ``TableCost`` keeps, of about 0.5 kB each; the least recently used goes first."""

FILLS_TOKENS = 2048
"""Prefill tokens that fill every partition for several waves; more of them last longer but contend no more."""

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
    """One way of sharing: how many times longer each phase takes while the other runs.

    ``prefill``: over (tokens, mean_context, batch, kv_tokens). ``decode``: over (tokens, mean_context, batch), a vector
    over the knots ``kv_tokens``, which are those of the solo curves and those of the hybrid table.
    ``solo``: the solo curves at these knots.
    """

    prefill: Grid
    decode: Grid
    solo: Grid
    kv_tokens: FloatArray
    low: float
    high: float


class TableCost:
    """A cost model that interpolates measured step times (law 8: it reproduces every measured point).

    Solo times are bilinear in (tokens, mean_context) and in (batch, kv_tokens), in the fastest backend measured at each
    point. Beside the other phase a step takes its solo time times a slowdown, which is measured at the same split and
    multilinear in the logarithms of tokens, mean_context, batch and kv_tokens. Between two measured KV token counts, a
    decode step beside prefill is linear in time. A fused step's time is multilinear in the same four. Outside the
    grid a look-up is clamped to its edge and counted; between two partitions nothing is interpolated.

    Rows of mode ``streams`` of the hybrid table are not used. Instances can be pickled.

    Args:
        prefill: Solo points, milliseconds of one layer; the whole device and every split's partition.
        decode: Likewise.
        hybrid: Points measured while both phases ran; the allocations are those found here.
        mixed: Fused batches on the whole device, milliseconds of a step divided by the layers.
        device_sms: SMs of the whole device.
        layers: Layers of a decode step.
        source: Where the points are from, for messages.

    Raises:
        InputError: There is no split, a partition is missing, or the grid of a split lacks a point. Where that is so of
            another mode, the mode is ``refused``.
    """

    def __init__(
        self,
        prefill: Iterable[PrefillPoint],
        decode: Iterable[DecodePoint],
        hybrid: Iterable[HybridPoint],
        mixed: Iterable[MixedPoint] = (),
        *,
        device_sms: int,
        layers: int,
        source: str = "profile",
    ) -> None:
        self.device_sms = device_sms
        self.layers = layers
        self._prefill = {
            sms: _prefill_grid(points, f"{source}/prefill.csv: {sms} SMs")
            for sms, points in _grouped(prefill, lambda p: p.sms).items()
        }
        self._decode = {
            sms: _decode_curves(points, f"{source}/decode.csv: {sms} SMs")
            for sms, points in _grouped(decode, lambda p: p.sms).items()
        }
        for table, measured in (("prefill.csv", self._prefill), ("decode.csv", self._decode)):
            if device_sms not in measured:
                raise InputError(f"{source}/{table}: sms: {device_sms} not found; expected it, being the whole device")
        by_mode = _grouped(hybrid, lambda p: p.mode)
        self._contention = self._shared(Mode.SPLIT, by_mode, source)
        self.refused: dict[Mode, str] = {}
        for mode in (Mode.CAPPED, Mode.PRIORITY):
            self._contention |= self._unless_refused(mode, partial(self._shared, mode, by_mode, source)) or {}
        self._fused = self._unless_refused(Mode.MIXED, lambda: _fused(mixed, f"{source}/mixed.csv"))
        self._remember()

    def _unless_refused(self, mode: Mode, read: Callable[[], P]) -> P | None:
        """What is read of a mode, None when that cannot be used."""
        try:
            return read()
        except InputError as error:
            self.refused[mode] = str(error)
            return None

    def _shared(
        self, mode: Mode, by_mode: Mapping[str, Iterable[HybridPoint]], source: str
    ) -> dict[Allocation, Contention]:
        """Contention in every allocation of a mode. Raises InputError as the constructor does."""
        shared = _grouped(by_mode.get(mode.value, ()), lambda p: (p.prefill_sms, p.decode_sms))
        if not shared:
            expected = "at least one measured split" if mode is Mode.SPLIT else "some to choose it"
            raise InputError(f"{source}/hybrid.csv: no row of mode {mode.value}; expected {expected}")
        found = {}
        for prefill_sms, decode_sms in sorted(shared):
            at = Allocation(mode, prefill_sms, decode_sms)
            name = f"split {at.name}" if mode is Mode.SPLIT else at.name
            if mode is not Mode.SPLIT and decode_sms != self.device_sms:
                raise InputError(
                    f"{source}/hybrid.csv: {name}: decode_sms: found {decode_sms}; expected the whole device, "
                    f"{self.device_sms}"
                )
            for table, measured, sms in (
                ("prefill.csv", set(self._prefill), prefill_sms),
                ("decode.csv", set(self._decode), decode_sms),
            ):
                if sms not in measured:
                    raise InputError(f"{source}/{table}: sms: {sms} not found; expected it, for {name} of hybrid.csv")
            found[at] = _contention(
                shared[prefill_sms, decode_sms],
                self._prefill[prefill_sms],
                self._decode[decode_sms],
                f"{source}/hybrid.csv: {name}",
            )
        return found

    def _remember(self) -> None:
        """Keep what was looked up before."""
        self._curve = lru_cache(maxsize=CURVES)(self._decode_curve)
        self._alone = lru_cache(maxsize=CURVES)(self._decode_alone)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_curve", "_alone")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    @property
    def splits(self) -> tuple[Allocation, ...]:
        """The measured disjoint splits, by ascending prefill SMs."""
        return tuple(at for at in self._contention if at.mode is Mode.SPLIT)

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        """See ``CostModel.allocations``."""
        if self._fused is None:
            return tuple(self._contention)
        most = int(self._fused.axes[0].high)
        return (*self._contention, Allocation(Mode.MIXED, self.device_sms, self.device_sms, most))

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one layer, alone or beside a decode batch; see ``CostModel.prefill_s``."""
        place = shape.tokens, shape.mean_context
        seconds, outside = _partition(self._prefill, at.prefill_sms, "prefill").number(*place)
        if beside is None:
            return seconds, outside
        slowdown, also = self._sharing(at).prefill.number(*place, beside.batch, beside.kv_tokens)
        return seconds * slowdown, outside or also

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """Seconds of each decode step, alone or beside a prefill batch; see ``CostModel.decode_s``."""
        batch, kv_tokens = shape
        return self._curve(batch, at, beside).at(kv_tokens, batch, steps)

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one fused step; see ``CostModel.mixed_s``."""
        if self._fused is None:
            raise KeyError(f"fused batches were not measured: {self.refused[Mode.MIXED]}")
        place = chunk.tokens, chunk.mean_context
        if decode is None:
            layer_s, outside = self._prefill[self.device_sms].number(*place)
        else:
            layer_s, outside = self._fused.number(*place, decode.batch, decode.kv_tokens)
        return layer_s * self.layers, outside

    def outside(
        self, own: PrefillShape | DecodeShape, at: Allocation, beside: PrefillShape | DecodeShape | None
    ) -> str | None:
        """Which number of a look-up is outside the measured grid, and what was measured; None when none is.

        ``own``: the batch that is priced, beside the other phase's; of a fused step its prompts, beside what decodes.
        """
        for table, measured, sought in self._consulted(own, at, beside):
            for name, along in measured.items():
                if not along.low <= sought[name] <= along.high:
                    least = f"{along.low:,.10g} to" if along.low > 0 else "at most"
                    return (
                        f"{name}: found {sought[name]:,.10g} at {at.name}; expected {least} {along.high:,.10g}, "
                        f"as measured in {table}"
                    )
        return None

    def _consulted(
        self, own: PrefillShape | DecodeShape, at: Allocation, beside: PrefillShape | DecodeShape | None
    ) -> Iterator[tuple[str, dict[str, Axis], dict[str, float]]]:
        """Tables that price this, the axes of each, and what is looked up."""
        sought = _numbers(own) | (_numbers(beside) if beside is not None else {})
        if isinstance(own, PrefillShape):
            yield "prefill.csv", dict(zip(_SHARED[:2], self._prefill[at.prefill_sms].axes, strict=True)), sought
        if isinstance(own, DecodeShape) or (at.mode is Mode.MIXED and beside is not None):
            alone = self._decode[at.decode_sms]
            yield "decode.csv", {"batch": alone.at_batch.axes[0], "kv_tokens": alone.kv}, sought
        if beside is None:
            return
        if at.mode is Mode.MIXED and self._fused is not None:
            yield "mixed.csv", dict(zip(_SHARED, self._fused.axes, strict=True)), sought
        else:
            yield "hybrid.csv", dict(zip(_SHARED, self._sharing(at).prefill.axes, strict=True)), sought

    def _decode_curve(self, batch: int, at: Allocation, beside: PrefillShape | None) -> Curve:
        solo = _partition(self._decode, at.decode_sms, "decode")
        if beside is None:
            layer_s, outside = solo.at_batch.vector(batch)
            return Curve(solo.kv_tokens, layer_s * self.layers, solo.kv.low, solo.kv.high, outside)
        shared = self._sharing(at)
        alone, tokens, context = self._alone(batch, at), beside.tokens, beside.mean_context
        return alone.times(shared.decode, shared.low, shared.high, tokens, context, batch)

    def _decode_alone(self, batch: int, at: Allocation) -> Curve:
        """Decode alone, with the knots at which it is known beside prefill."""
        shared = self._sharing(at)
        layer_s, outside = shared.solo.vector(batch)
        return Curve(shared.kv_tokens, layer_s * self.layers, shared.low, shared.high, outside)

    def _sharing(self, at: Allocation) -> Contention:
        found = self._contention.get(at)
        if found is None:
            raise KeyError(
                f"both phases at {at.name} were not measured; measured: {', '.join(a.name for a in self._contention)}"
            )
        return found


def _numbers(shape: PrefillShape | DecodeShape) -> dict[str, float]:
    """By the names of the axes."""
    if isinstance(shape, PrefillShape):
        return {"tokens": shape.tokens, "mean_context": shape.mean_context}
    return {"batch": shape.batch, "kv_tokens": shape.kv_tokens}


def _partition(measured: Mapping[int, P], sms: int, phase: str) -> P:
    found = measured.get(sms)
    if found is None:
        raise KeyError(f"{phase} on {sms} SMs was not measured; measured: {', '.join(map(str, sorted(measured)))}")
    return found


def _grouped(points: Iterable[P], key: Callable[[P], K]) -> dict[K, list[P]]:
    groups: dict[K, list[P]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def _fastest(points: Iterable[P], place: Callable[[P], K], time_ms: Callable[[P], float]) -> dict[K, P]:
    """The fastest point (that is: backend) at each place."""
    return {key: min(same, key=time_ms) for key, same in _grouped(points, place).items()}


def _prefill_grid(points: Iterable[PrefillPoint], where: str) -> Grid:
    """Seconds of a layer alone over (tokens, mean_context)."""
    best = _fastest(points, lambda p: (p.tokens, p.mean_context), lambda p: p.median_ms)
    names = ("tokens", "mean_context")
    values = axis_values(best, names, where)
    axes = [axis(name, v) for name, v in zip(names, values, strict=True)]
    return Grid(axes, np.array([best[t, m].median_ms / 1e3 for t, m in itertools.product(*values)]))


def _decode_curves(points: Iterable[DecodePoint], where: str) -> DecodeCurves:
    """Seconds of a layer alone over (batch, kv_tokens)."""
    best = _fastest(points, lambda p: (p.batch, p.kv_tokens), lambda p: p.median_ms)
    batches, kv = axis_values(best, ("batch", "kv_tokens"), where)
    rows = np.array([[best[b, k].median_ms / 1e3 for k in kv] for b in batches])
    return DecodeCurves(
        axis("kv_tokens", kv), np.array(kv, dtype=np.float64), rows, Grid([axis("batch", batches)], rows)
    )


_SHARED = ("tokens", "mean_context", "batch", "kv_tokens")
"""The axes of what both phases together take."""


def _contention(points: Iterable[HybridPoint], prefill: Grid, decode: DecodeCurves, where: str) -> Contention:
    """Slowdowns at one split: measured time over the solo time there, which may lie between solo points.

    Where several prefill backends were measured, the row of the fastest counts for both phases.
    """
    best = _fastest(points, lambda p: (p.tokens, p.mean_context, p.batch, p.kv_tokens), lambda p: p.prefill_median_ms)
    values = axis_values(best, _SHARED, where)
    axes = [axis(name, v, log=True) for name, v in zip(_SHARED, values, strict=True)]
    if values[0][-1] >= FILLS_TOKENS:
        axes[0] = axis("tokens", values[0], log=True, high=prefill.axes[0].high)
    tokens, contexts, batches, kv = values
    knots = np.union1d(decode.kv_tokens, np.array(kv, dtype=np.float64))

    prefill_slowdown = [
        best[t, m, b, k].prefill_median_ms / 1e3 / prefill.number(t, m)[0]
        for t, m, b, k in itertools.product(tokens, contexts, batches, kv)
    ]
    decode_slowdown = []
    for t, m, b in itertools.product(tokens, contexts, batches):
        measured = np.array([best[t, m, b, k].decode_median_ms / 1e3 for k in kv])
        slowdown = measured / np.interp(kv, decode.kv_tokens, decode.at_batch.vector(b)[0])
        decode_slowdown.append(np.interp(np.log2(knots), np.log2(kv), slowdown))
    return Contention(
        prefill=Grid(axes, np.array(prefill_slowdown)),
        decode=Grid(axes[:3], np.array(decode_slowdown)),
        solo=Grid(decode.at_batch.axes, np.array([np.interp(knots, decode.kv_tokens, row) for row in decode.rows])),
        kv_tokens=knots,
        low=max(decode.kv.low, axes[3].low),
        high=min(decode.kv.high, axes[3].high),
    )


def _fused(points: Iterable[MixedPoint], where: str) -> Grid:
    """Seconds of a fused step, divided by the layers."""
    best = _fastest(points, lambda p: (p.tokens, p.mean_context, p.batch, p.kv_tokens), lambda p: p.median_ms)
    if not best:
        raise InputError(f"{where}: no measured point; expected some to choose fused batches")
    values = axis_values(best, _SHARED, where)
    seconds = [best[t, m, b, k].median_ms / 1e3 for t, m, b, k in itertools.product(*values)]
    return Grid([axis(name, v) for name, v in zip(_SHARED, values, strict=True)], np.array(seconds))
