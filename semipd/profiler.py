"""The sweeps: what each phase costs alone on every partition, both at once on every split, and both fused.

Written against ``Bench``, so that order, resuming, limits and choice of backend are tested without a GPU. The
first half says what a configuration measures on a device, the second measures it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from semipd.config import DecodeGrid, DecodeSweep, HybridSweep, PrefillGrid, PrefillSweep
from semipd.core import FloatArray, InputError
from semipd.points import (
    DecodePoint,
    DecodeWork,
    HybridPoint,
    MixedPoint,
    PrefillPoint,
    PrefillWork,
    Sharing,
    Spread,
    TotalPoint,
)
from semipd.sweep import decode_grid, grid, partition_counts, splits_of
from semipd.table_files import TableWriter

DECODE_BACKEND = "fa2"  # flashinfer's tensor-core decode is its fa2 kernel


class Bench(Protocol):
    """A device that can be timed; ``semipd.bench.GpuBench`` is the real one. All times in milliseconds."""

    @property
    def device_sms(self) -> int:
        """SMs of the whole device."""
        ...

    def observed(self) -> dict[str, object]:
        """What the device did while it was measured, such as its clocks: an addition to the provenance."""
        ...

    def prefill(self, work: PrefillWork, backend: str, sms: int, marks: int) -> FloatArray:
        """Layer times alone on a partition, shape [samples]."""
        ...

    def decode(self, work: DecodeWork, backend: str, sms: int, marks: int) -> FloatArray:
        """Layer times of a decode step alone on a partition, shape [samples]."""
        ...

    def both(
        self,
        prefill: PrefillWork,
        prefill_backend: str,
        decode: DecodeWork,
        decode_backend: str,
        at: Sharing,
        marks: int,
    ) -> tuple[FloatArray, FloatArray]:
        """Layer times of each phase while the other runs throughout."""
        ...

    def mixed(self, prefill: PrefillWork, decode: DecodeWork, backend: str, marks: int) -> FloatArray:
        """Layer times of both batches in one call, on the whole device, shape [samples]."""
        ...

    def total(
        self,
        prefill: PrefillWork,
        prefill_backend: str,
        decode: DecodeWork,
        decode_backend: str,
        at: Sharing,
        steps: tuple[int, int],
        runs: int,
    ) -> FloatArray:
        """Fixed work: times until prefill, decode and both are done, shape [runs, 3]."""
        ...


def prefill_works(config: PrefillGrid) -> list[PrefillWork]:
    """The prefill batches to measure, cheapest first. Raises InputError for a grid that equal prompts cannot fill."""
    if config.seqs and config.seq_tokens:
        return [PrefillWork.prompts(config.seqs, config.seq_tokens, config.seq_context)]
    return grid(config.tokens, config.mean_context)


def decode_works(config: DecodeGrid) -> list[DecodeWork]:
    """The decode batches to measure, cheapest first."""
    if config.batch and config.context:
        return [DecodeWork(config.batch, config.batch * config.context)]
    return decode_grid(config.batches, config.kv_tokens)


def solo_sms(config: PrefillSweep | DecodeSweep, device_sms: int) -> list[int]:
    """Partition sizes of a solo sweep, ascending, the whole device last.

    Raises InputError for a size in ``config.sms`` that no split at ``config.step_sms`` grants.
    """
    primary = partition_counts(device_sms, config.step_sms)
    remainder = [*(device_sms - n for n in reversed(primary[:-1])), device_sms]
    if config.sms:
        return _known(config.sms, {*primary, *remainder}, config.step_sms)
    sizes = {"primary": primary, "remainder": remainder, "both": [*primary, *remainder]}[config.partitions]
    return sorted(set(sizes))


def sharings(config: HybridSweep, device_sms: int) -> list[Sharing]:
    """Every way of sharing that a hybrid sweep measures: by mode, then by ascending prefill SMs.

    Raises InputError for a size in ``config.sms`` that prefill has in no split.
    """
    sizes = [split.prefill_sms for split in splits_of(device_sms, config.step_sms)]
    if config.sms:
        sizes = _known(config.sms, set(sizes), config.step_sms)
    ways = {
        "split": [Sharing("split", n, device_sms - n) for n in sizes],
        "capped": [Sharing("capped", n, device_sms) for n in sizes],
        "priority": [Sharing("priority", device_sms, device_sms)],
        "streams": [Sharing("streams", device_sms, device_sms)],
    }
    return [at for mode in dict.fromkeys(config.modes) for at in ways[mode]]


def _known(sms: Sequence[int], possible: set[int], step_sms: int) -> list[int]:
    for n in sms:
        if n not in possible:
            sizes = ", ".join(map(str, sorted(possible)))
            raise InputError(f"sms: found {n}; expected sizes that splits in steps of {step_sms} have: {sizes}")
    return sorted(set(sms))


def chosen_backends(
    config: HybridSweep, work: PrefillWork, at: Sharing, solo: Sequence[PrefillPoint] | None
) -> Sequence[str]:
    """The prefill backends to measure there: all of the configuration's, or the one that is fastest alone.

    With ``solo`` that is the fastest at the nearest batch measured on this partition, by the ratios of tokens and
    of mean contexts. Raises InputError when ``solo`` has nothing on this partition.
    """
    if solo is None:
        return config.backends
    here = [p for p in best_backends(solo).values() if p.sms == at.prefill_sms]
    if not here:
        raise InputError(f"{config.solo_prefill}: found no point on {at.prefill_sms} SMs; expected one for each split")

    def distance(point: PrefillPoint) -> float:
        ratios = (point.tokens / work.tokens, (point.mean_context + 1) / (work.mean_context + 1))
        return sum(abs(math.log(ratio)) for ratio in ratios)

    return (min(here, key=distance).backend,)


@dataclass(frozen=True)
class HybridPlan:
    """What a hybrid sweep measures: (batch, backend, sharing) beside every decode batch, and fixed-work totals."""

    contention: tuple[tuple[PrefillWork, str, Sharing], ...]
    totals: tuple[tuple[str, Sharing], ...]


def hybrid_plan(config: HybridSweep, device_sms: int, solo: Sequence[PrefillPoint] | None = None) -> HybridPlan:
    """Plan of a hybrid sweep, baselines first: in turn with every backend that some sharing uses.

    Raises InputError as ``sharings``, ``prefill_works`` and ``chosen_backends`` do.
    """
    works, ways = prefill_works(config.prefill), sharings(config, device_sms)
    cells = [(work, b, at) for work in works for at in ways for b in chosen_backends(config, work, at, solo)]
    in_turn = Sharing("in-turn", device_sms, device_sms)
    whole = [b for work in works for b in chosen_backends(config, work, in_turn, solo)] if config.work else []
    used = dict.fromkeys([*whole, *(b for _, b, _ in cells)])
    totals = [*((b, in_turn) for b in used), *((b, at) for _, b, at in cells)]
    return HybridPlan(tuple(cells) if config.contention else (), tuple(totals) if config.work else ())


@dataclass(frozen=True)
class Progress:
    """How far a sweep is: points done of all its points, and what it is at."""

    done: int
    total: int
    at: str


def sweep_prefill(
    bench: Bench,
    table: TableWriter[PrefillPoint],
    works: Sequence[PrefillWork],
    backends: Sequence[str],
    sms: Sequence[int],
    marks: int,
) -> Iterator[Progress]:
    """Measure every batch on every partition with every backend, skipping what the table has."""
    cells = [(work, backend, n) for work in works for backend in backends for n in reversed(sms)]
    for done, (work, backend, n) in enumerate(cells):
        yield Progress(
            done, len(cells), f"{work.seqs} x {work.seq_tokens} after {work.seq_context}, {backend}, {n} SMs"
        )
        key = (n, work.seqs, work.seq_tokens, work.seq_context, backend)
        if not table.has(key):
            spread = Spread.of(bench.prefill(work, backend, n, marks))
            table.add(PrefillPoint(sms=n, **asdict(work), backend=backend, **asdict(spread)))
    yield Progress(len(cells), len(cells), "done")


def sweep_decode(
    bench: Bench, table: TableWriter[DecodePoint], works: Sequence[DecodeWork], sms: Sequence[int], marks: int
) -> Iterator[Progress]:
    """Measure every decode batch on every partition, skipping what the table has."""
    cells = [(work, n) for work in works for n in reversed(sms)]
    for done, (work, n) in enumerate(cells):
        yield Progress(done, len(cells), f"{work.batch} x {work.kv_tokens / work.batch:.0f}, {n} SMs")
        if not table.has((n, work.batch, work.kv_tokens, DECODE_BACKEND)):
            spread = Spread.of(bench.decode(work, DECODE_BACKEND, n, marks))
            table.add(DecodePoint(sms=n, **asdict(work), backend=DECODE_BACKEND, **asdict(spread)))
    yield Progress(len(cells), len(cells), "done")


def sweep_hybrid(
    bench: Bench,
    table: TableWriter[HybridPoint],
    prefills: Sequence[tuple[PrefillWork, str, Sharing]],
    decodes: Sequence[DecodeWork],
    marks: int,
) -> Iterator[Progress]:
    """Measure steady-state contention: each (prefill batch, backend, sharing) beside every decode batch."""
    total = len(prefills) * len(decodes)
    done = 0
    for work, backend, at in prefills:
        for decode in decodes:
            yield Progress(done, total, f"{at.name}, prefill {work.seqs} x {work.seq_tokens}, decode {decode.batch}")
            done += 1
            key = (
                at.mode, at.prefill_sms, at.decode_sms, work.seqs, work.seq_tokens, work.seq_context,
                decode.batch, decode.kv_tokens, backend, DECODE_BACKEND,
            )  # fmt: skip
            if table.has(key):
                continue
            p, d = (Spread.of(x) for x in bench.both(work, backend, decode, DECODE_BACKEND, at, marks))
            table.add(
                HybridPoint(
                    **asdict(at),
                    **asdict(work),
                    **asdict(decode),
                    prefill_backend=backend,
                    decode_backend=DECODE_BACKEND,
                    **{f"prefill_{name}": value for name, value in asdict(p).items()},
                    **{f"decode_{name}": value for name, value in asdict(d).items()},
                )
            )
    yield Progress(total, total, "done")


def sweep_mixed(
    bench: Bench,
    table: TableWriter[MixedPoint],
    prefills: Sequence[PrefillWork],
    decodes: Sequence[DecodeWork],
    backends: Sequence[str],
    marks: int,
) -> Iterator[Progress]:
    """Measure every chunk fused with every decode batch, with every backend, skipping what the table has."""
    cells = [(work, decode, backend) for work in prefills for decode in decodes for backend in backends]
    for done, (work, decode, backend) in enumerate(cells):
        yield Progress(done, len(cells), f"{work.seqs} x {work.seq_tokens} with decode {decode.batch}, {backend}")
        key = (work.seqs, work.seq_tokens, work.seq_context, decode.batch, decode.kv_tokens, backend)
        if not table.has(key):
            spread = Spread.of(bench.mixed(work, decode, backend, marks))
            table.add(MixedPoint(**asdict(work), **asdict(decode), backend=backend, **asdict(spread)))
    yield Progress(len(cells), len(cells), "done")


def sweep_total(
    bench: Bench,
    table: TableWriter[TotalPoint],
    prefill: PrefillWork,
    decode: DecodeWork,
    cells: Sequence[tuple[str, Sharing]],
    steps: tuple[int, int],
    runs: int,
) -> Iterator[Progress]:
    """Measure fixed work (so many prefill and decode steps) for each (backend, sharing)."""
    for done, (backend, at) in enumerate(cells):
        yield Progress(done, len(cells), f"{at.name}, {backend}")
        if table.has((at.mode, at.prefill_sms, at.decode_sms, backend, DECODE_BACKEND, *steps)):
            continue
        rows = bench.total(prefill, backend, decode, DECODE_BACKEND, at, steps, runs)
        prefill_ms, decode_ms, total_ms = (round(float(x), 6) for x in np.median(rows, axis=0))
        p10, p90 = (round(float(x), 6) for x in np.percentile(rows[:, 2], [10, 90]))
        table.add(
            TotalPoint(
                **asdict(at),
                prefill_backend=backend,
                decode_backend=DECODE_BACKEND,
                prefill_steps=steps[0],
                decode_steps=steps[1],
                runs=len(rows),
                prefill_ms=prefill_ms,
                decode_ms=decode_ms,
                total_ms=total_ms,
                total_p10_ms=p10,
                total_p90_ms=p90,
            )
        )
    yield Progress(len(cells), len(cells), "done")


def best_backends(points: Sequence[PrefillPoint]) -> dict[tuple[int, int, int], PrefillPoint]:
    """The fastest measured point for each (SMs, tokens, mean context)."""
    best: dict[tuple[int, int, int], PrefillPoint] = {}
    for point in points:
        place = (point.sms, point.tokens, point.mean_context)
        if place not in best or point.median_ms < best[place].median_ms:
            best[place] = point
    return best


def within(limit_s: float | None, steps: Iterator[Progress]) -> Iterator[Progress]:
    """Pass a sweep's progress on, and stop between two points once ``limit_s`` seconds are over."""
    start = time.monotonic()
    for step in steps:
        yield step
        if limit_s is not None and time.monotonic() - start > limit_s:
            return
