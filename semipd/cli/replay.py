"""``semipd replay`` and ``semipd compare``: a trace under one policy, or under several with the one to take."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from semipd.cli.needs import require
from semipd.cli.progress import NOTE_EVERY_S
from semipd.cli.session import CutShortError, note, show, show_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from semipd.config import ReplayConfig
    from semipd.core import StepRecord
    from semipd.executor import Executor
    from semipd.metrics import Summary
    from semipd.replay import Outcome, Setup
    from semipd.scheduler import Scheduler

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the configuration; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


Strict = Annotated[bool, typer.Option("--strict", help="Refuse cost look-ups outside the measured grid.")]


class ExecutorName(str, Enum):
    """Where a replay runs: in simulation, or a model with torch on this machine's CPU or GPU."""

    SIM = "sim"
    GPU = "gpu"
    CPU = "cpu"


def replay(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the replay.")],
    executor: Annotated[ExecutorName, typer.Option(help="Where it runs.")] = ExecutorName.SIM,
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="Folder to save the run in.")] = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Replay a trace under one policy."""
    from semipd.compare import policy_names, rate_rps
    from semipd.config import ReplayConfig, load
    from semipd.replay import prepare, run

    found = load(config, ReplayConfig, (*(sets or ()), *(("strict=true",) if strict else ())))
    setup = prepare(found)
    policy_names((found.policy,), setup)  # refuse an unknown one before anything is written
    with (
        _opened(executor, found, setup) as (opened, scheduler, ran),
        _saved(out, found.settled().model_dump(mode="json")) as each,
        _watched(found.policy, len(setup.trace)) as watch,
    ):
        outcome = run(setup, found.policy, scheduler, opened, watch=watch, each=each)
    if out is not None:
        _save(out, outcome)
    if as_json:
        show_json(outcome.summary.to_json())
    else:
        from semipd.report.comparison import summary_report

        show(summary_report(outcome.summary, setup, rate_rps(setup.trace), ran))
    _note_outside([outcome.summary])
    if not outcome.complete:
        complete = f"{outcome.summary.completed} of {outcome.summary.requests}"
        raise CutShortError(f"interrupted: {complete} requests are complete")


def compare(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of the comparison.")] = None,
    trace: Annotated[str | None, typer.Option(metavar="F", help="Trace file, or the name of a shipped one.")] = None,
    profile: Annotated[str | None, typer.Option(metavar="P", help="Profile: a shipped name or a folder.")] = None,
    policies: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Only these, such as exclusive,static-64.  [default: all]"),
    ] = None,
    rate_scale: Annotated[float | None, typer.Option(help="Multiply the arrival rate.")] = None,
    slo: Annotated[str | None, typer.Option(metavar="NAME", help="Latency targets: a name or a YAML file.")] = None,
    predictor_error: Annotated[
        float | None, typer.Option(help="How far off the times are that policies predict with, such as 0.1.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Replays at a time.  [default: the CPUs there are]")] = None,
    strict: Strict = False,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Replay a trace under every policy, and say which one to take; by default the shipped comparison."""
    from semipd.compare import judge, policy_names, run_all
    from semipd.config import CompareConfig, build, read_yaml
    from semipd.replay import prepare

    options = {
        "trace.path": json.dumps(trace) if trace is not None else None,
        "profile": json.dumps(profile) if profile is not None else None,
        "policies": json.dumps([name.strip() for name in policies.split(",")]) if policies is not None else None,
        "trace.rate_scale": rate_scale,
        "trace.limit": limit,
        "predictor_error": predictor_error,
        "strict": "true" if strict else None,
        "slo": json.dumps(slo) if slo is not None else None,
    }
    given = tuple(f"{name}={value}" for name, value in options.items() if value is not None)
    data = CompareConfig().model_dump() if config is None else read_yaml(config)
    found = build(data, CompareConfig, "command line" if config is None else str(config), (*(sets or ()), *given))
    if config is None and "trace.rate_scale" not in {word.partition("=")[0] for word in (*(sets or ()), *given)}:
        own = found.trace.path != CompareConfig().trace.path  # the default's rate is that of the shipped comparison
        found = build(found.model_dump(), CompareConfig, "command line", ("trace.rate_scale=1",) if own else ())
    setup = prepare(found)
    names = policy_names(found.policies, setup)
    runs, interrupted = _run_all(setup, names, min(jobs or os.cpu_count() or 1, len(names)), run_all)
    if not runs:
        raise CutShortError(f"interrupted: none of {len(names)} policies is complete")
    result = judge(setup, runs)
    if as_json:
        show_json(result.to_json())
    else:
        from semipd.report.comparison import comparison_report

        show(comparison_report(result))
    _note_outside(runs)
    if interrupted:
        raise CutShortError(f"interrupted: {len(runs)} of {len(names)} policies are complete")


def _run_all(
    setup: Setup, names: tuple[str, ...], jobs: int, run_all: Callable[..., Iterator[Summary]]
) -> tuple[list[Summary], bool]:
    """The summaries, with progress on stderr, and whether Ctrl-C cut them short."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    runs: list[Summary] = []
    columns = (TextColumn("replaying"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(names))
        try:
            for summary in run_all(setup, names, jobs):
                runs.append(summary)
                bar.advance(task)
        except KeyboardInterrupt:
            return runs, True
    return runs, False


@contextmanager
def _opened(name: ExecutorName, config: ReplayConfig, setup: Setup) -> Iterator[tuple[Executor, Scheduler, str | None]]:
    """The executor, a scheduler for it, and what runs where if it is no simulation."""
    from dataclasses import replace

    from semipd.config import load
    from semipd.core import InputError
    from semipd.policies import chosen, make_policy, whole_device
    from semipd.scheduler import Scheduler

    policy = make_policy(config.policy, setup.predictor, setup.slo)
    if name is ExecutorName.SIM:
        yield (
            setup.simulator(),
            Scheduler(setup.scheduler, policy, device_sms=setup.cost.device_sms, layers=setup.cost.layers),
            None,
        )
        return
    if config.scheduler.enable_prefix_caching:
        raise InputError(
            f"scheduler.enable_prefix_caching: found true; expected false with --executor {name.value}, "
            "whose sequences share no blocks"
        )
    require(f"replay --executor {name.value}")
    if config.weights is not None:
        require("replay --set weights=DIR")
    if config.model is None:
        raise InputError("model: missing; expected a file such as configs/models/tiny.yaml to run")
    blocks = config.scheduler.num_blocks
    if name is ExecutorName.CPU and blocks is None:
        raise InputError("scheduler.num_blocks: missing; expected the KV blocks to take of this machine's memory")
    from semipd.model_config import ModelConfig
    from semipd.torch_executor import open_executor

    model = load(Path(config.model), ModelConfig)
    longest = int((setup.trace.prompt_len + setup.trace.output_len).max())
    if longest > model.max_positions:
        raise InputError(
            f"{config.model}: max_positions: found {model.max_positions}; expected at least the {longest} tokens "
            "of the longest request"
        )
    options, device = config.scheduler, "cpu" if name is ExecutorName.CPU else "cuda"
    with open_executor(
        model,
        device="cpu" if name is ExecutorName.CPU else "cuda",
        weights_dir=Path(config.weights) if config.weights else None,
        num_blocks=blocks,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        gpu_memory_utilization=options.gpu_memory_utilization,
        prefill_sms=sorted({at.prefill_sms for at in setup.cost.allocations} - {setup.cost.device_sms}),
        prefill_backend=setup.profile.prefill_backend,
    ) as opened:
        limits = replace(setup.scheduler, num_blocks=opened.num_blocks)
        sms = setup.cost.device_sms
        scheduler = Scheduler(limits, policy, device_sms=sms, layers=opened.layers)
        opened.follow(scheduler.blocks.tokens)
        if name is ExecutorName.GPU:
            opened.prepare((whole_device(sms), *chosen(policy, setup.cost)), options.max_num_batched_tokens)
        yield (
            opened,
            scheduler,
            f"Ran {Path(config.model).stem} on this machine ({device}), priced by {setup.profile.name}.",
        )


@contextmanager
def _watched(policy: str, requests: int) -> Iterator[Callable[[float, int], None]]:
    """Progress on stderr: requests finished, simulated time, rate and time left; without a terminal a line at times."""
    if not sys.stderr.isatty():
        yield _noted(policy, requests)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(policy), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[at]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=requests, at="")

        def watch(now_s: float, finished: int) -> None:
            bar.update(task, completed=finished)
            rate_rps = bar.tasks[0].speed or 0.0
            bar.update(task, at=f"at {now_s:,.0f} s, {rate_rps:,.0f}/s")

        yield watch


def _noted(policy: str, requests: int) -> Callable[[float, int], None]:
    start_s = last_s = time.monotonic()

    def watch(now_s: float, finished: int) -> None:
        nonlocal last_s
        clock_s = time.monotonic()
        if clock_s - last_s < NOTE_EVERY_S or not finished:
            return
        last_s = clock_s
        rate_rps = finished / (clock_s - start_s)
        left_s = (requests - finished) / rate_rps
        note(
            f"{policy}: {finished:,}/{requests:,} requests, at {now_s:,.0f} s, {rate_rps:,.0f}/s, "
            f"about {left_s:.0f} s left"
        )

    return watch


@contextmanager
def _saved(out: Path | None, config: dict[str, Any]) -> Iterator[Callable[[StepRecord], None] | None]:
    """Save the configuration, and every run as it ends, into ``out``: config.yaml and runs.parquet."""
    if out is None:
        yield None
        return
    import yaml

    from semipd.archive import RunWriter
    from semipd.core import InputError

    if (out / "summary.json").exists():
        raise InputError(f"{out}: holds a run; expected a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made a folder ({error.strerror}); expected a new folder") from None
    (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with RunWriter(out / "runs.parquet") as runs:
        yield runs.add


def _save(out: Path, outcome: Outcome) -> None:
    """Write summary.json and requests.parquet."""
    from semipd.archive import write_requests

    document = outcome.summary.to_json() | ({} if outcome.complete else {"complete": False})
    (out / "summary.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write_requests(out / "requests.parquet", outcome.requests)
    note(f"saved: {out}")


def _note_outside(runs: list[Summary]) -> None:
    outside = max((run.extrapolated_share or 0.0 for run in runs), default=0.0)
    if outside:
        note(f"warning: up to {100 * outside:.2g} % of cost look-ups fell outside the measured grid and were clamped")
