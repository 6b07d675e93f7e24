"""What a profile is measured at: rectangles of each table, batches at their places, and whether there is room and time.

An *area* is one rectangle of one table: a phase alone on one partition, both phases in one way of sharing the device,
or fused batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from semipd.core import Allocation, DecodeShape, InputError, Mode, PrefillShape
from semipd.padding import MOST_PREFILL_ROWS, prefill_sizes
from semipd.points import DecodeWork, PrefillWork
from semipd.profile_config import DecodeAxes, ProfileConfig
from semipd.ragged import Decodes, Prompts
from semipd.rectangle import SPINE, Place, Rectangle
from semipd.roofline import RooflineCost
from semipd.stopwatch import DECODE_STEPS, FEW_STEPS, STEPS

AXES: Mapping[str, tuple[str, ...]] = {
    "prefill": ("tokens", "mean_context"),
    "decode": ("batch", "kv_tokens"),
    "hybrid": ("tokens", "mean_context", "batch", "kv_tokens"),
    "mixed": ("tokens", "mean_context", "batch", "kv_tokens"),
}

HOST_S = 0.01
"""About what the host does for a measurement while the device idles."""


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


CONTENDED = 1.5
"""How many times as long a step takes beside the other phase as a roofline says, about."""

LEAST_SMS = 8
"""Of a partition on which a model runs: on 4 SMs of an H200 kernels of cuBLAS do not start."""


def areas_of(config: ProfileConfig, device_sms: int) -> dict[Area, Rectangle]:
    """The coarse rectangles with their spines, in the order in which they are measured.

    Phases alone come first, then fused batches, and the ways of sharing from the most even one on.

    Raises InputError for sizes that the device does not have, or that leave too few SMs.
    """
    for name, sizes in (("prefill_sms", config.prefill_sms), ("capped_sms", config.capped_sms)):
        for sms in sizes:
            if sms >= device_sms:
                raise InputError(f"{name}: found {sms}; expected less than the {device_sms} SMs of the device")
            if device_sms - sms < LEAST_SMS:
                raise InputError(f"{name}: found {sms}; expected at least {LEAST_SMS} of {device_sms} SMs to be left")
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
    more = {"hybrid": config.both_more.values, "mixed": config.mixed_more.values}
    return {
        area: _rectangle(area.table, values, spines.get(area.table, ()), more.get(area.table))
        for area, values in found.items()
    }


def _rectangle(
    table: str, values: tuple[tuple[int, ...], ...], spine: tuple[int, ...], more: tuple[tuple[int, ...], ...] | None
) -> Rectangle:
    """With ``more``, which may be empty, a sparse one."""
    found = Rectangle(AXES[table], tuple(tuple(sorted(set(v))) for v in values), sparse=more is not None)
    for value in _between(found.values[0], spine):
        found = found.with_knot(SPINE, value)
    for axis, others in enumerate(more or ()):
        for value in _between(found.values[axis], others):
            found = found.with_knot(axis, value)
    return found


def _between(values: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
    """Those of the others that are between the ends of the values."""
    return tuple(x for x in others if min(values) < x < max(values))


def snapped(name: str, value: float) -> int:
    """The nearest value that it makes sense to measure: what batches are padded to, whole tiles of tokens beyond."""
    if name == "tokens" and value <= MOST_PREFILL_ROWS:
        return min(prefill_sizes(MOST_PREFILL_ROWS), key=lambda size: abs(size - value))
    if name == "batch" and value < 6:
        return 4 if value > 3 else 2 if value > 1.5 else 1
    step = {"tokens": 128, "mean_context": 64, "batch": 8}.get(name, 64)
    return max(step, round(value / step) * step)


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

    basic = config.both_decode
    asked = zip(
        (*config.both_prefill.values, *basic.values), config.both_more.values, config.mixed_more.values, strict=True
    )
    tokens, contexts, _, kv_tokens = ((*values, *_between(values, (*more, *fused))) for values, more, fused in asked)
    works = [PrefillWork.at(t, m) for t in tokens for m in contexts]
    every = room(basic.model_copy(update={"kv_tokens": kv_tokens}), works).kv_tokens
    # The most KV tokens for which there is room are basic: what is beyond the ends of these is left out.
    ends = tuple(sorted({*(kv for kv in basic.kv_tokens if kv in every), max(every)}))
    return config.model_copy(
        update={"decode": room(config.decode, ()), "both_decode": basic.model_copy(update={"kv_tokens": ends})}
    )


def longest_sequence(config: ProfileConfig) -> int:
    """Tokens of the longest sequence that may be measured."""
    works = [DecodeWork(min(axes.batch), max(axes.kv_tokens)) for axes in (config.decode, config.both_decode)]
    most_kv = max(max(Decodes.of(work).lengths) for work in works)
    contexts = max(max(axes.mean_context) for axes in (config.prefill, config.both_prefill))
    return most_kv + contexts + config.max_num_batched_tokens


def expected_s(cell: Cell, roofline: RooflineCost, config: ProfileConfig) -> float:
    """About how long a measurement takes, if steps take what a roofline says."""
    at, p, d = cell.area.at, cell.prefill_shape, cell.decode_shape
    steps_s = []
    if p and d and at.mode is Mode.MIXED:
        steps_s = [roofline.mixed_s(p, d)[0]]
    else:
        steps_s += [roofline.prefill_s(p, at, None)[0]] if p else []
        steps_s += [float(roofline.decode_s(d, at, None)[0][0])] if d else []
    limited = p is not None and (d is not None or at.prefill_sms >= at.decode_sms)
    settle_s = (config.limited_settle_ms if limited else config.settle_ms) / 1e3
    slow_s = max(steps_s) * (CONTENDED if p and d else 1.0)
    steady_s = max(config.measure_ms / 1e3, min(STEPS * slow_s, config.limit_ms / 1e3), FEW_STEPS * slow_s) + 2 * slow_s
    return (settle_s + steady_s) * (1 + config.rest_share * limited) + HOST_S
