"""Measured points, arranged for look-ups: grids of step times, and of speeds beside the other phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from semipd._steps import Grid, Waves
from semipd.alone import Dealing, DecodeCurves, decode_curves, fastest, grouped, prefill_surface
from semipd.contention import NO_SCALES, SHARED, Contention, Scales, Way, contentions, observations, ways_of
from semipd.core import Allocation, InputError, Mode
from semipd.grid import arranged, axis, completed, sparse_values
from semipd.padding import NOT_PADDED, Padded
from semipd.points import DecodePoint, HybridPoint, MixedPoint, PrefillPoint, RaggedPoint

P = TypeVar("P")


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
        ragged: Iterable[RaggedPoint] = (),
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
            ragged: Ragged batches beside each other, for what lies between the points of the hybrid table.
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
        by_sms = grouped(prefill, lambda p: p.sms)
        dealing = {
            sms: Dealing.of(waves, sms, points, padded.tokens, f"{source}/prefill.csv: {sms} SMs")
            for sms, points in by_sms.items()
            if waves is not None and all(p.backend == "fa2" for p in points)
        }
        prefill_alone = {
            sms: prefill_surface(points, padded.tokens, f"{source}/prefill.csv: {sms} SMs")
            for sms, points in by_sms.items()
        }
        prefill_of = {
            sms: Grid([axis("tokens", tokens), axis("mean_context", contexts)], rows)
            for sms, (tokens, contexts, rows) in prefill_alone.items()
        }
        decode_of = {
            sms: decode_curves(points, padded.batch, f"{source}/decode.csv: {sms} SMs")
            for sms, points in grouped(decode, lambda p: p.sms).items()
        }
        for table, found in (("prefill.csv", set(prefill_of)), ("decode.csv", set(decode_of))):
            if device_sms not in found:
                raise InputError(f"{source}/{table}: sms: {device_sms} not found; expected it, being the whole device")
        by_mode = grouped(hybrid, lambda p: p.mode)

        def shared(mode: Mode) -> dict[Allocation, Way]:
            points = by_mode.get(mode.value, ())
            return ways_of(mode, points, prefill_alone, dealing, decode_of, device_sms, scales, padded, source)

        refused: dict[Mode, str] = {}

        def unless_refused(mode: Mode, read: Callable[[], P]) -> P | None:
            try:
                return read()
            except InputError as error:
                refused[mode] = str(error)
                return None

        ways = shared(Mode.SPLIT)
        for mode in (Mode.CAPPED, Mode.PRIORITY):
            ways |= unless_refused(mode, partial(shared, mode)) or {}
        observed = observations(ragged, ways, refused, f"{source}/ragged.csv")
        tokens, _, seconds = prefill_alone[device_sms]
        fused_rows = Grid([axis("tokens", tokens)], seconds[:, 0] * bool(padded.tokens))
        fused = unless_refused(Mode.MIXED, lambda: _fused(mixed, fused_rows, f"{source}/mixed.csv"))
        return Tables(
            device_sms,
            layers,
            prefill_of,
            dealing,
            decode_of,
            contentions(ways, observed),
            fused,
            fused_rows,
            padded.queries,
            refused,
        )


def _fused(points: Iterable[MixedPoint], rows: Grid, where: str) -> Grid:
    """Seconds of a fused step, divided by the layers, beyond those of its rows."""
    best = fastest(points, lambda p: (p.tokens, p.mean_context, p.batch, p.kv_tokens), lambda p: p.median_ms)
    if not best:
        raise InputError(f"{where}: no measured point; expected some to choose fused batches")
    grid = sparse_values(best, SHARED, where)
    values = [list(of.values) for of in grid]
    beyond = {place: p.median_ms / 1e3 - rows.number(p.tokens + p.batch)[0] for place, p in best.items()}
    seconds = completed(arranged(beyond, values), grid, [np.array(v, dtype=np.float64) for v in values])
    return Grid([axis(name, v) for name, v in zip(SHARED, values, strict=True)], seconds.reshape(-1))
