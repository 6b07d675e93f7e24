"""The three sweeps: what each phase costs alone on every partition, and both at once on every split.

Written against ``Bench``, so that order, resuming, limits and choice of backend are tested without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from semipd.core import FloatArray
from semipd.sweep import (
    DecodePoint,
    DecodeWork,
    HybridPoint,
    PrefillPoint,
    PrefillWork,
    Sharing,
    Spread,
    TableWriter,
    TotalPoint,
)

DECODE_BACKEND = "fa2"  # flashinfer's tensor-core decode is its fa2 kernel
PREFILL_BACKENDS = ("fa2", "fa3", "fa3-sized")


class Bench(Protocol):
    """A device that can be timed; ``semipd.bench.GpuBench`` is the real one. All times in milliseconds."""

    @property
    def device_sms(self) -> int:
        """SMs of the whole device."""
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
