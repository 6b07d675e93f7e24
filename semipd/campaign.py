"""A model's whole profile, measured: its stages, how the time is shared among them, and what is written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from semipd.areas import Area, areas_of, blocks_of, expected_s, fitting
from semipd.contention import Scales
from semipd.executor import Executor
from semipd.holdout import measure, trials
from semipd.model_config import ModelConfig
from semipd.overheads import NO_OVERHEADS, Overheads
from semipd.padding import NOT_PADDED, Padded
from semipd.points import HoldoutPoint, RaggedPoint
from semipd.profile import ProfileHeader
from semipd.profile_config import ProfileConfig
from semipd.profiler import Progress, within
from semipd.profiling import AGAIN, POINTS, Backends, Profiling, choose_backends, overheads
from semipd.ragged import Decodes, Prompts
from semipd.roofline import RooflineCost
from semipd.scatter import Scatter
from semipd.stopwatch import Stopwatch
from semipd.table_cost import TableCost
from semipd.table_files import TableWriter
from semipd.tables import Tables
from semipd.tiles import SplitKeys

ALONE_SHARE = 0.5
"""Of the time for refinement, what the phases alone may take: all other tables are multiples of theirs."""

BY_KNOTS_SHARE = 0.1
"""Of the time for refinement, what all tables may take together where ragged batches are measured, too."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a model on a device, behind an executor.

    ``forget``: see ``Stopwatch``. ``backends``: attention kernels that prefill may use; ``use_backend`` has those of a
    size of partition use one of them. ``padded``: what the executor pads batches to. ``split_keys``: how
    it splits keys of prefill, if that is known. ``decode_backend``, ``mixed_backend``: names of the other kernels.
    """

    executor: Executor
    model: ModelConfig
    device_sms: int
    num_blocks: int
    forget: Callable[[Iterable[int]], None] = lambda ids: None  # noqa: ARG005 - nothing is kept
    backends: tuple[str, ...] = ("torch",)
    use_backend: Callable[[int, str], None] = lambda sms, name: None  # noqa: ARG005 - there is one
    padded: Padded = NOT_PADDED
    split_keys: SplitKeys | None = None
    decode_backend: str = "torch"
    mixed_backend: str = "torch"


@dataclass(frozen=True)
class Measured:
    """The tables by name, the host's overheads, and how it ended.

    ``usable``: the coarse tables are complete; ``complete``: so are the held-out points. ``interrupted``: by Ctrl-C.
    """

    tables: dict[str, TableWriter[Any]]
    overheads: Overheads
    usable: bool
    complete: bool
    interrupted: bool


def measure_profile(
    subject: Subject,
    config: ProfileConfig,
    out: Path,
    about: dict[str, object],
    *,
    resume: bool = False,
    begun_s: float | None = None,
    watched: Callable[[str, Iterator[Progress]], Iterator[Progress]] = lambda name, steps: steps,  # noqa: ARG005
    note: Callable[[str], None] = lambda line: None,  # noqa: ARG005 - nobody listens
) -> Measured:
    """Measure what a profile's folder lacks; stop early at the time limit or on Ctrl-C.

    Args:
        subject: What is measured.
        config: What of it.
        out: The folder.
        about: Provenance; also the device's name and memory.
        resume: Whether to go on with what the folder has.
        begun_s: When the time that ``config.limit_s`` limits began (``time.monotonic``); now, if not given.
        watched: Shows progress.
        note: Says something.

    Raises InputError for a folder that has a profile already, or one of something else, and sizes that do not exist.
    """
    config = fitting(config, subject.num_blocks)
    areas = areas_of(config, subject.device_sms)
    kinds = {name: kind for name, kind in POINTS.items() if any(area.table == name for area in areas)}
    if "hybrid" in kinds and (config.ragged or (out / "ragged.csv").exists()):
        kinds["ragged"] = RaggedPoint
    if config.holdout:
        kinds["holdout"] = HoldoutPoint
    tables = {name: TableWriter(out / f"{name}.csv", kind, about, resume=resume) for name, kind in kinds.items()}
    campaign = Campaign(subject, config, areas, tables, time.monotonic() if begun_s is None else begun_s, watched, note)
    host, complete, interrupted = NO_OVERHEADS, False, False
    write_header(out, subject, about, host)
    try:
        host = campaign.prepare()
        write_header(out, subject, about, host)
        complete = campaign.run()
    except KeyboardInterrupt:
        interrupted = True
    return Measured(tables, host, campaign.usable, complete, interrupted)


class Campaign:
    """The stages of ``measure_profile``. ``usable``: see ``Measured``."""

    def __init__(
        self,
        subject: Subject,
        config: ProfileConfig,
        areas: dict[Area, Any],
        tables: dict[str, TableWriter[Any]],
        begun_s: float,
        watched: Callable[[str, Iterator[Progress]], Iterator[Progress]],
        note: Callable[[str], None],
    ) -> None:
        self._subject, self._config, self._areas, self._tables = subject, config, areas, tables
        self._begun_s, self._watched, self._note = begun_s, watched, note
        self.usable = False
        self._backends: dict[int, str] = {}
        self._stopwatch = self._new_stopwatch()

    def prepare(self) -> Overheads:
        """Choose kernels, and measure what starting a run takes."""

        def use(sms: int, name: str) -> None:
            self._backends[sms] = name
            self._subject.use_backend(sms, name)

        whole = next(area.at for area in self._areas if area.table == "prefill")
        self._stopwatch.settle_host(Prompts((16,), (0,)), whole, self._config.warmup_s)
        choose_backends(self._stopwatch, self._areas, self._subject.backends, use)
        return overheads(self._new_stopwatch(), self._areas, self._config)

    def run(self) -> bool:
        """Coarse tables, more where the model errs, held-out points; whether the first and the last are complete."""
        config, subject = self._config, self._subject
        names = Backends(self._backends.__getitem__, subject.decode_backend, subject.mixed_backend)
        rows = {name: table for name, table in self._tables.items() if name in POINTS}
        profiling = Profiling(self._areas, rows, self._stopwatch, names, lambda c: self._fits(c.prompts, c.decodes))
        missing = [cell for cells in profiling.missing().values() for cell in cells]
        peaks = config.peak_tflops * 1e12, config.peak_tbps * 1e12
        roofline = RooflineCost(subject.model, subject.device_sms, *peaks)
        about_s = sum(expected_s(cell, roofline, config) for cell in missing)
        self._note(
            f"plan: {len(missing)} points, about {about_s:.0f} s at {config.peak_tflops:.0f} TFLOP/s and "
            f"{config.peak_tbps:.1f} TB/s; then more where the cost model errs; then {config.holdout} held out"
        )
        held_out_s = self._held_out_s(about_s / len(missing)) if missing else 0.0
        if about_s + held_out_s > self._left_s():
            self._note(f"that and the held-out points may take longer than the {self._left_s():.0f} s that are left")
        started_s = time.monotonic()
        if not self._drive("coarse", profiling.fill(), self._left_s()):
            return False
        self.usable = True
        pace_s = (time.monotonic() - started_s) / len(missing) if missing else HOST_PACE_S
        again_s = pace_s * AGAIN * len(POINTS)
        refine_s = self._left_s() - self._held_out_s(pace_s) - again_s
        self._refine(profiling, refine_s)
        self._drive("again", profiling.again(), self._left_s())
        for name, drift in profiling.drift.items():
            self._note(f"drift of {name}: {drift}")
        if not config.holdout:
            return True
        stopwatch = self._new_stopwatch(at_random=True)
        drawn = [t for t in trials(config, self._areas) if self._fits(t.prefill, t.decode)]
        return self._drive("held out", measure(drawn, stopwatch, self._tables["holdout"]), self._left_s())

    def _refine(self, profiling: Profiling, seconds: float) -> None:
        """More of what the cost model is wrong about: knots of the tables, then ragged batches beside each other."""
        config, until_s = self._config, time.monotonic() + seconds
        alone = [area for area in self._areas if area.table in ("prefill", "decode")]
        ways = [area for area in self._areas if area.table == "hybrid"]
        ragged = self._tables.get("ragged")
        both = [area for area in self._areas if area not in alone and not (ragged and area in ways)]
        knots_s = seconds * (BY_KNOTS_SHARE if ragged else 1.0)
        for name, some, share in (("alone", alone, ALONE_SHARE), ("both", both, 1.0)):
            began_s = time.monotonic()
            self._drive(name, profiling.refine(some, self._cost, config.tolerance), share * knots_s)
            knots_s -= time.monotonic() - began_s
        if ragged:
            model = self._subject.model
            scales = Scales.of(model.weights_bytes, model.kv_bytes_per_token)
            hybrid = self._tables["hybrid"].points
            scatter = Scatter(ways, config, scales, self._stopwatch, ragged, hybrid, self._fits)
            self._drive("ragged", scatter.measure(self._cost), until_s - time.monotonic())

    def _drive(self, name: str, steps: Iterator[Progress], seconds: float) -> bool:
        """Take the steps, at most for so long; whether they came to their end."""
        ended = False
        for step in self._watched(name, within(seconds, steps)):
            ended = step.done == step.total
        return ended

    def _held_out_s(self, pace_s: float) -> float:
        """About how long held-out points take, where others take ``pace_s`` each."""
        longer_s = (HELD_OUT_LONGER - 1) * self._config.measure_ms / 1e3
        return self._config.holdout * (pace_s + longer_s * (1 + self._config.rest_share))

    def _left_s(self) -> float:
        limit_s = math.inf if self._config.limit_s is None else self._config.limit_s
        return limit_s - (time.monotonic() - self._begun_s)

    def _fits(self, prefill: Prompts | None, decode: Decodes | None) -> bool:
        return blocks_of(prefill, decode, self._config.block_size) <= self._subject.num_blocks

    def _cost(self) -> TableCost:
        points = {name: table.points for name, table in self._tables.items()}
        tables = Tables.of(
            points["prefill"], points["decode"], points["hybrid"], points.get("mixed", ()),
            points.get("ragged", ()),
            device_sms=self._subject.device_sms, layers=self._subject.model.layers, padded=self._subject.padded,
            scales=Scales.of(self._subject.model.weights_bytes, self._subject.model.kv_bytes_per_token),
            waves=self._subject.split_keys.waves if self._subject.split_keys else None,
            source=str(self._tables["prefill"].path.parent),
        )  # fmt: skip
        return TableCost(tables)

    def _new_stopwatch(self, *, at_random: bool = False) -> Stopwatch:
        """``at_random``: for measurements that follow one another at random, so that clocks have farther to go.

        They take ``HELD_OUT_LONGER`` as long, since what they vary by would count as the model's error.
        """
        config, subject = self._config, self._subject
        return Stopwatch(
            subject.executor,
            subject.model.layers,
            forget=subject.forget,
            settle_s=(config.limited_settle_ms if at_random else config.settle_ms) / 1e3,
            limited_settle_s=config.limited_settle_ms / 1e3,
            rest_share=config.rest_share,
            measure_s=config.measure_ms * (HELD_OUT_LONGER if at_random else 1) / 1e3,
            limit_s=config.limit_ms / 1e3,
        )


HELD_OUT_LONGER = 2

HOST_PACE_S = 0.3
"""Seconds a held-out point is thought to take when nothing has been measured to go by."""


def write_header(out: Path, subject: Subject, about: dict[str, object], host: Overheads) -> None:
    """Write profile.json; the folder's last two names are the profile's."""
    model = subject.model
    gpu = str(about["gpu"])
    header = ProfileHeader(
        name="/".join(out.resolve().parts[-2:]),
        description=(
            f"A model of {model.parameters / 1e9:.2f} billion parameters, {model.dtype}, {model.layers} layers, "
            "measured through the executor that serves it."
        ),
        device=gpu,
        device_sms=int(str(about["device_sms"])),
        layers=model.layers,
        kv_bytes_per_token=model.kv_bytes_per_token,
        device_memory_bytes=int(str(about["device_memory_bytes"])),
        weights_bytes=model.weights_bytes,
        overheads=host,
        padded=subject.padded,
        model=model.model_dump(mode="json"),
        split_keys=subject.split_keys,
    )
    (out / "profile.json").write_text(json.dumps(asdict(header), indent=1) + "\n", encoding="utf-8")
