"""``semipd profile``: measure all tables of a model through the executor that serves it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from semipd.cli.progress import watched
from semipd.cli.session import INTERRUPTED, Session, note, show, show_json

if TYPE_CHECKING:
    from semipd.config import ProfileConfig
    from semipd.core import Allocation
    from semipd.model_config import ModelConfig
    from semipd.profiler import Progress
    from semipd.profiling import Backends, Profiling, Tables
    from semipd.stopwatch import Stopwatch
    from semipd.torch_executor import TorchExecutor

DEVICES = ("cuda", "cpu")
CPU_SMS = 16  # a CPU has no SMs: its partitions are names


def profile(
    ctx: typer.Context,
    model: Annotated[Path, typer.Option(metavar="FILE", help="The model, a YAML file as in configs/models.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The profile's folder.")],
    device: Annotated[str, typer.Option(help="Where to measure: cuda or cpu.")] = "cuda",
    prefill_sms: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="SMs of prefill in the splits to measure.")
    ] = None,
    holdout: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Random points to hold the cost model against, measured last.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn at random.")] = None,
    limit_s: Annotated[float | None, typer.Option(help="Be done after this many seconds, loading included.")] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML file instead of the defaults.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the configuration.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what --out has.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")] = False,
) -> None:
    """Measure a model's profile: each phase alone, both at once, fused batches; first coarsely, then where it errs."""
    from semipd.config import ProfileConfig, build, load, read_yaml
    from semipd.core import InputError
    from semipd.model_config import ModelConfig

    begun_s = time.monotonic()
    session: Session = ctx.obj
    if device not in DEVICES:
        raise InputError(f"--device: found {device!r}; expected one of {', '.join(DEVICES)}")
    described = load(model, ModelConfig)
    options = {
        "prefill_sms": f"[{prefill_sms}]" if prefill_sms is not None else None,
        "holdout": holdout,
        "seed": seed,
        "limit_s": limit_s,
    }
    given = tuple(f"{name}={value}" for name, value in options.items() if value is not None)
    data = ProfileConfig().model_dump() if config is None else read_yaml(config)
    found = build(data, ProfileConfig, "command line" if config is None else str(config), (*(sets or ()), *given))
    if device == "cpu" and found.num_blocks is None:
        raise InputError("num_blocks: missing; expected the KV blocks to take of this machine's memory")
    if (out / "profile.json").exists() and not resume:
        raise InputError(f"{out}: holds a profile; expected a new folder, or --resume to go on with it")
    result = _measure(session, found, described, model.stem, out, device, resume, begun_s)
    errors = _held_out(out) if result.complete else {}
    if as_json:
        document = {
            "complete": result.complete,
            "config": found.model_dump(mode="json"),
            "points": {name: len(table.points) for name, table in result.tables.items()},
            "overheads": result.overheads,
            "holdout": {group: {name: asdict(e) for name, e in of.items()} for group, of in errors.items()},
        }
        show_json(document)
    else:
        from semipd.report.holdout import profiled_report

        show(profiled_report({name: len(table.points) for name, table in result.tables.items()}, result.overheads, errors))
    note(f"saved: {out}, after {time.monotonic() - begun_s:.0f} s")
    if not result.complete:
        note(f"{'interrupted' if result.interrupted else 'time limit reached'}; go on with: {session.resume_command()}")
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


@dataclass(frozen=True)
class Measured:
    """What was measured, whether that is all, and whether Ctrl-C ended it."""

    tables: dict[str, TableWriter[Any]]
    overheads: dict[str, float]
    complete: bool
    interrupted: bool


def _measure(
    session: Session,
    config: ProfileConfig,
    model: ModelConfig,
    name: str,
    out: Path,
    device: str,
    resume: bool,
    begun_s: float,
) -> Measured:
    """Open the model, measure what the tables lack, and stop early at the time limit or on Ctrl-C."""
    from semipd.profiling import POINTS, Area, Profiling, areas_of, choose_backends, expected_s, fitting, switch_ms
    from semipd.provenance import provenance
    from semipd.stopwatch import Stopwatch
    from semipd.sweep import HoldoutPoint, TableWriter

    work = {**model.model_dump(mode="json"), "page_size_tokens": config.block_size}
    about = provenance(work, session.command, device, CPU_SMS)
    device_sms = int(str(about["device_sms"]))
    with _opened(config, model, device, device_sms) as opened:
        executor, backends = opened
        note(f"{name} is loaded after {time.monotonic() - begun_s:.0f} s, {executor.num_blocks:,} KV blocks")
        room = config.block_size * executor.num_blocks
        fitted = fitting(config, room)
        areas = areas_of(fitted, device_sms)
        tables = {table: TableWriter(out / f"{table}.csv", kind, about, resume=resume) for table, kind in POINTS.items()}
        held = TableWriter(out / "holdout.csv", HoldoutPoint, about, resume=resume) if config.holdout else None
        stopwatch = Stopwatch(
            executor,
            model.layers,
            forget=executor.forget,
            settle_s=config.settle_ms / 1e3,
            measure_s=config.measure_ms / 1e3,
            limit_s=config.limit_ms / 1e3,
        )
