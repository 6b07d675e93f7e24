"""What a step costs by measured tables; docs/profiles.md says how they are interpolated, and within which limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TypeVar

from semipd._steps import Axis, Curve, Grid
from semipd.alone import Dealing, DecodeCurves, typical_prompts, with_tiles
from semipd.contention import SHARED, Contention
from semipd.core import Allocation, DecodeShape, FloatArray, Mode, PrefillShape
from semipd.tables import Tables

CURVES = 4096
"""Decode curves that a ``TableCost`` keeps, of about 0.5 kB each; the least recently used goes first."""

FUSED = 0
"""In place of the SMs of a partition: attention of a fused step, which is dealt with that of decode."""

T = TypeVar("T")


class TableCost:
    """A cost model that interpolates measured step times (law 8: it reproduces every measured point).

    A prefill batch is looked up by its tokens, and by the keys that attention computes for each of them on average,
    which are more than its mean context where prompts end within a tile. Solo times are bilinear in (tokens,
    mean_context) and in (batch, kv_tokens), in the fastest backend measured at each point. Beside the other phase a
    step keeps a share of its speed alone, which is multilinear in logarithms of tokens, mean_context, batch and
    kv_tokens between what was measured in the same way of sharing, and what ragged batches of all of them say
    (``semipd.contention``). Between two KV token counts a decode step beside prefill is linear in time. A fused step's
    time is that of its rows and a rest, multilinear in the same four. Outside the grid a look-up is clamped to its edge
    and counted; between two partitions nothing is interpolated.

    Instances can be pickled.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self.device_sms: int = tables.device_sms
        self.layers: int = tables.layers
        self.refused: Mapping[Mode, str] = tables.refused
        self._prefill: dict[int, Grid] = tables.prefill
        self._dealing: dict[int, Dealing] = tables.dealing
        self._decode: dict[int, DecodeCurves] = tables.decode
        self._contention: dict[Allocation, Contention] = tables.contention
        self._fused: Grid | None = tables.fused
        self._spare_queries: float = (tables.queries - 1) / 2  # of a prompt's last tile
        self._fused_rows: Grid = tables.fused_rows
        # What was looked up before.
        self._curve = lru_cache(maxsize=CURVES)(self._decode_curve)
        self._alone = lru_cache(maxsize=CURVES)(self._decode_alone)

    def __reduce__(self) -> tuple[type[TableCost], tuple[Tables]]:
        return TableCost, (self._tables,)

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
        tokens, context = shape.tokens, self._context(shape, at.prefill_sms)
        if beside is None:
            seconds, outside = _partition(self._prefill, at.prefill_sms, "prefill").number(tokens, context)
            return seconds + self._beyond_s(shape, context, at.prefill_sms), outside
        shared = self._sharing(at)
        seconds, outside = shared.prefill_alone.number(tokens, context)
        speed, also = shared.prefill.number(tokens, context, beside.batch, beside.kv_tokens)
        return (seconds + self._beyond_s(shape, context, at.prefill_sms)) / speed, outside or also

    def _beyond_s(self, shape: PrefillShape, context: float, sms: int) -> float:
        """What a batch's attention takes longer, by how it is dealt to the SMs, than is interpolated."""
        dealing = self._dealing.get(sms)
        if dealing is None or not shape.tokens:
            return 0.0
        if shape.new_tokens:
            return dealing.beyond_s(shape.tokens, context, shape.new_tokens, shape.context_lens)
        new_tokens, context_lens = typical_prompts(shape.tokens, context)
        return dealing.beyond_s(shape.tokens, context, new_tokens, context_lens)

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """Seconds of each decode step, alone or beside a prefill batch; see ``CostModel.decode_s``."""
        return self._curve(shape.batch, at, beside).at(shape.kv_tokens, shape.batch, steps)

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """Seconds of one fused step; see ``CostModel.mixed_s``."""
        if self._fused is None:
            raise KeyError(f"fused batches were not measured: {self.refused[Mode.MIXED]}")
        place = chunk.tokens, self._context(chunk, self.device_sms if decode is None else FUSED)
        if decode is None:
            layer_s, outside = self._prefill[self.device_sms].number(*place)
            layer_s += self._beyond_s(chunk, place[1], self.device_sms)
        else:
            layer_s, outside = self._fused.number(*place, decode.batch, decode.kv_tokens)
            layer_s += self._fused_rows.number(chunk.tokens + decode.batch)[0]
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
        sms = FUSED if at.mode is Mode.MIXED and beside is not None else at.prefill_sms
        sought = self._numbers(own, sms) | (self._numbers(beside, sms) if beside is not None else {})
        if isinstance(own, PrefillShape):
            yield "prefill.csv", dict(zip(SHARED[:2], self._prefill[at.prefill_sms].axes, strict=True)), sought
        if isinstance(own, DecodeShape) or (at.mode is Mode.MIXED and beside is not None):
            alone = self._decode[at.decode_sms]
            yield "decode.csv", {"batch": alone.at_batch.axes[0], "kv_tokens": alone.kv}, sought
        if beside is None:
            return
        if at.mode is Mode.MIXED and self._fused is not None:
            yield "mixed.csv", dict(zip(SHARED, self._fused.axes, strict=True)), sought
        else:
            yield "hybrid.csv", dict(zip(SHARED, self._sharing(at).prefill.axes, strict=True)), sought

    def _decode_curve(self, batch: int, at: Allocation, beside: PrefillShape | None) -> Curve:
        solo = _partition(self._decode, at.decode_sms, "decode")
        if beside is None:
            layer_s, outside = solo.at_batch.vector(batch)
            return Curve(solo.kv_tokens, layer_s * self.layers, solo.kv.low, solo.kv.high, outside)
        shared = self._sharing(at)
        alone, tokens, context = self._alone(batch, at), beside.tokens, self._context(beside, at.prefill_sms)
        return alone.at_speed(shared.decode, shared.low, shared.high, tokens, context, batch)

    def _decode_alone(self, batch: int, at: Allocation) -> Curve:
        """Decode alone, with the knots at which it is known beside prefill."""
        shared = self._sharing(at)
        layer_s, outside = shared.solo.vector(batch)
        return Curve(shared.kv_tokens, layer_s * self.layers, shared.low, shared.high, outside)

    def _context(self, shape: PrefillShape, sms: int) -> float:
        """Mean context of a prefill batch as attention computes it on a partition, or in a fused step.

        Where it is known how tiles are dealt, these are counted there.
        """
        return shape.mean_context if sms in self._dealing else with_tiles(shape, self._spare_queries)

    def _numbers(self, shape: PrefillShape | DecodeShape, sms: int) -> dict[str, float]:
        """By the names of the axes."""
        if isinstance(shape, PrefillShape):
            return {"tokens": shape.tokens, "mean_context": self._context(shape, sms)}
        return {"batch": shape.batch, "kv_tokens": shape.kv_tokens}

    def _sharing(self, at: Allocation) -> Contention:
        found = self._contention.get(at)
        if found is None:
            raise KeyError(
                f"both phases at {at.name} were not measured; measured: {', '.join(a.name for a in self._contention)}"
            )
        return found


def _partition(measured: Mapping[int, T], sms: int, phase: str) -> T:
    found = measured.get(sms)
    if found is None:
        raise KeyError(f"{phase} on {sms} SMs was not measured; measured: {', '.join(map(str, sorted(measured)))}")
    return found
