"""``semipd sweep``: measure on a GPU, print a table, save every point so that an interrupted sweep can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from semipd.cli.progress import watched
from semipd.cli.session import CutShortError, Session, note, show, show_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from semipd.config import SweepConfig
    from semipd.points import Point
    from semipd.profiler import Bench, Progress
    from semipd.table_files import TableWriter

Schema = TypeVar("Schema", bound="SweepConfig")

app = typer.Typer(help="Measure attention on partitions of the GPU (needs one, and the [gpu] extra).")

Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file instead of the defaults.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the configuration; repeatable.")
]
Step = Annotated[int | None, typer.Option(help="SMs between partition sizes; 2 is the finest.")]
Runs = Annotated[int | None, typer.Option(help="Samples of each point.")]
Limit = Annotated[float | None, typer.Option(help="Stop between two points after this many seconds.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Where to save.  [default: runs/sweep-KIND]")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what --out has.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Seqs = Annotated[int | None, typer.Option(help="Prompts of the prefill batch.")]
SeqTokens = Annotated[int | None, typer.Option(help="Tokens of each prompt.")]
Batch = Annotated[int | None, typer.Option(help="Sequences of the decode batch.")]
Context = Annotated[int | None, typer.Option(help="Cached tokens of each sequence.")]


@app.command("prefill")
def prefill(
    ctx: typer.Context,
    config: Config = None,
    sets: Sets = None,
    seqs: Seqs = None,
    seq_tokens: SeqTokens = None,
    step: Step = None,
    runs: Runs = None,
    limit_s: Limit = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Prefill alone on every partition; by default 32 prompts of 4096 tokens."""
    from semipd.config import PrefillSweep
    from semipd.points import PrefillPoint
    from semipd.profiler import prefill_works, solo_sms, sweep_prefill
    from semipd.report.tables import solo_report

    options = {"prefill.seqs": seqs, "prefill.seq_tokens": seq_tokens, **_common(step, runs, limit_s)}
    swept = _configured(PrefillSweep, config, sets, options)

    def plan(bench: Bench, folder: Folder) -> list[Stage]:
        works, sms = prefill_works(swept.prefill), solo_sms(swept, bench.device_sms)
        table = folder.table("prefill", PrefillPoint)
        return [Stage(table, sweep_prefill(bench, table, works, swept.backends, sms, swept.runs))]

    done = _measure(ctx.obj, swept, out or Path("runs/sweep-prefill"), resume, plan)
    _finish(ctx.obj, done, as_json, lambda: solo_report(done.points("prefill"), done.device_sms))


@app.command("decode")
def decode(
    ctx: typer.Context,
    config: Config = None,
    sets: Sets = None,
    batch: Batch = None,
    context: Context = None,
    step: Step = None,
    runs: Runs = None,
    limit_s: Limit = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Decode alone on every partition; by default 128 sequences of 4096 cached tokens."""
    from semipd.config import DecodeSweep
    from semipd.points import DecodePoint
    from semipd.profiler import decode_works, solo_sms, sweep_decode
    from semipd.report.tables import solo_report

    options = {"decode.batch": batch, "decode.context": context, **_common(step, runs, limit_s)}
    swept = _configured(DecodeSweep, config, sets, options)

    def plan(bench: Bench, folder: Folder) -> list[Stage]:
        works, sms = decode_works(swept.decode), solo_sms(swept, bench.device_sms)
        table = folder.table("decode", DecodePoint)
        return [Stage(table, sweep_decode(bench, table, works, sms, swept.runs))]

    done = _measure(ctx.obj, swept, out or Path("runs/sweep-decode"), resume, plan)
    _finish(ctx.obj, done, as_json, lambda: solo_report(done.points("decode"), done.device_sms))


@app.command("hybrid")
def hybrid(
    ctx: typer.Context,
    config: Config = None,
    sets: Sets = None,
    seqs: Seqs = None,
    seq_tokens: SeqTokens = None,
    batch: Batch = None,
    context: Context = None,
    solo_prefill: Annotated[
        Path | None,
        typer.Option(metavar="TABLE.csv", help="Prefill table: measure only its fastest backend of each partition."),
    ] = None,
    step: Step = None,
    runs: Runs = None,
    limit_s: Limit = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Both at once on every split; by default 4 prompts of 4096 tokens beside 128 sequences of 4096."""
    from semipd.config import HybridSweep
    from semipd.points import HybridPoint, PrefillPoint, TotalPoint
    from semipd.profiler import decode_works, hybrid_plan, prefill_works, sweep_hybrid, sweep_total
    from semipd.report.speedup import summarise_totals
    from semipd.report.tables import hybrid_report
    from semipd.table_files import read_table

    options = {
        "prefill.seqs": seqs,
        "prefill.seq_tokens": seq_tokens,
        "decode.batch": batch,
        "decode.context": context,
        "solo_prefill": json.dumps(str(solo_prefill)) if solo_prefill else None,
        **_common(step, runs, limit_s),
    }
    swept = _configured(HybridSweep, config, sets, options)
    solo = read_table(Path(swept.solo_prefill), PrefillPoint).points if swept.solo_prefill else None

    def plan(bench: Bench, folder: Folder) -> list[Stage]:
        cells = hybrid_plan(swept, bench.device_sms, solo)
        decodes = decode_works(swept.decode)
        stages = []
        if swept.work is not None:
            total = folder.table("total", TotalPoint)
            steps = (swept.work.prefill_steps, swept.work.decode_steps)
            work = prefill_works(swept.prefill)[0]
            stages.append(Stage(total, sweep_total(bench, total, work, decodes[0], cells.totals, steps, swept.runs)))
        if swept.contention:
            steady = folder.table("hybrid", HybridPoint)
            stages.append(Stage(steady, sweep_hybrid(bench, steady, cells.contention, decodes, swept.runs)))
        return stages

    done = _measure(ctx.obj, swept, out or Path("runs/sweep-hybrid"), resume, plan)
    totals = done.points("total")
    summary = summarise_totals(totals)
    _finish(
        ctx.obj,
        done,
        as_json,
        lambda: hybrid_report(done.points("hybrid"), totals, done.device_sms),
        {"summary": summary.document() if summary else None},
    )


@app.command("mixed")
def mixed(
    ctx: typer.Context,
    config: Config = None,
    sets: Sets = None,
    chunk: Annotated[list[int] | None, typer.Option(metavar="N", help="Prompt tokens of a chunk; repeatable.")] = None,
    batch: Batch = None,
    context: Context = None,
    runs: Runs = None,
    limit_s: Limit = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Both fused in one call; by default chunks of 256 to 2048 prompt tokens with 128 sequences of 4096.

    Beside them each part alone, on the whole device, too: in turn, they are the baseline.
    """
    from semipd.config import MixedSweep
    from semipd.points import DecodePoint, MixedPoint, PrefillPoint
    from semipd.profiler import decode_works, prefill_works, sweep_decode, sweep_mixed, sweep_prefill
    from semipd.report.speedup import fused_gains
    from semipd.report.tables import mixed_report

    options = {"prefill.tokens": chunk or None, "decode.batch": batch, "decode.context": context}
    swept = _configured(MixedSweep, config, sets, options | _common(None, runs, limit_s))

    def plan(bench: Bench, folder: Folder) -> list[Stage]:
        prefills, decodes, whole = prefill_works(swept.prefill), decode_works(swept.decode), [bench.device_sms]
        alone, beside = folder.table("prefill", PrefillPoint), folder.table("decode", DecodePoint)
        fused = folder.table("mixed", MixedPoint)
        return [
            Stage(alone, sweep_prefill(bench, alone, prefills, swept.in_turn_backends, whole, swept.runs)),
            Stage(beside, sweep_decode(bench, beside, decodes, whole, swept.runs)),
            Stage(fused, sweep_mixed(bench, fused, prefills, decodes, swept.backends, swept.runs)),
        ]

    done = _measure(ctx.obj, swept, out or Path("runs/sweep-mixed"), resume, plan)
    tables = done.points("mixed"), done.points("prefill"), done.points("decode")
    gains = [gain.document() for gain in fused_gains(*tables)]
    _finish(ctx.obj, done, as_json, lambda: mixed_report(*tables, done.device_sms), {"summary": gains})


@dataclass(frozen=True)
class Folder:
    """Where a sweep's tables go, and what they carry."""

    path: Path
    provenance: dict[str, object]
    resume: bool

    def table(self, name: str, cls: type[Point]) -> TableWriter[Point]:
        """The table ``name.csv``, to be continued when resuming. Raises InputError as TableWriter does."""
        from semipd.table_files import TableWriter

        return TableWriter(self.path / f"{name}.csv", cls, self.provenance, resume=self.resume)


@dataclass(frozen=True)
class Stage:
    """A table and the sweep that fills it."""

    table: TableWriter[Any]
    steps: Iterator[Progress]


@dataclass(frozen=True)
class Measured:
    """What a sweep left: its tables, whether they are complete, and whether Ctrl-C ended it."""

    config: SweepConfig
    folder: Path
    device_sms: int
    tables: tuple[TableWriter[Any], ...]
    complete: bool
    interrupted: bool

    def points(self, name: str) -> list[Any]:
        """Points of the table of that name; none when the sweep has no such table."""
        return [p for table in self.tables if table.path.stem == name for p in table.points]


def _common(step: int | None, runs: int | None, limit_s: float | None) -> dict[str, object]:
    return {"step_sms": step, "runs": runs, "limit_s": limit_s}


def _configured(schema: type[Schema], file: Path | None, sets: list[str] | None, options: dict[str, object]) -> Schema:
    """The file, or else the schema's defaults; then ``--set``, then the options that were given."""
    from semipd.config import build, read_yaml

    given = tuple(f"{name}={value}" for name, value in options.items() if value is not None)
    data = schema().model_dump() if file is None else read_yaml(file)
    source = "command line" if file is None else str(file)
    return build(data, schema, source, (*(sets or ()), *given))


def _measure(
    session: Session, config: SweepConfig, out: Path, resume: bool, plan: Callable[[Bench, Folder], list[Stage]]
) -> Measured:
    """Open the bench, measure what the tables lack, and stop early at the time limit or on Ctrl-C."""
    import yaml

    with session.open_bench(config, session.command) as (bench, provenance):
        stages = plan(bench, Folder(out, provenance, resume))
        saved = config.model_dump(mode="json")
        (out / f"{saved['kind']}.yaml").write_text(yaml.safe_dump(saved, sort_keys=False), encoding="utf-8")
        complete = interrupted = False
        try:
            complete = _drive(stages, config.limit_s)
        except KeyboardInterrupt:
            interrupted = True
        for stage in stages:
            stage.table.note(bench.observed())
        return Measured(config, out, bench.device_sms, tuple(s.table for s in stages), complete, interrupted)


def _drive(stages: list[Stage], limit_s: float | None) -> bool:
    """Run the stages in order, with progress on stderr; whether all of them came to their end."""
    from semipd.profiler import within

    start_s = time.monotonic()
    for stage in stages:
        left_s = None if limit_s is None else limit_s - (time.monotonic() - start_s)
        ended = False
        for step in watched(stage.table.path.stem, within(left_s, stage.steps)):
            ended = step.done == step.total
        if not ended:
            return False
    return True


def _finish(
    session: Session,
    done: Measured,
    as_json: bool,
    report: Callable[[], RenderableType],
    extra: dict[str, object] | None = None,
) -> None:
    """Print the result, say on stderr where it is and how to go on; exit 130 after Ctrl-C."""
    from semipd.table_files import read_provenance

    if as_json:
        document: dict[str, Any] = {
            "complete": done.complete,
            "config": done.config.model_dump(mode="json"),
            "provenance": {t.path.stem: read_provenance(t.path) for t in done.tables},
            "tables": {t.path.stem: [asdict(p) for p in t.points] for t in done.tables},
            **(extra or {}),
        }
        show_json(document)
    elif any(t.points for t in done.tables):
        show(report())
    saved = ", ".join(f"{t.path} ({len(t.points)} points)" for t in done.tables)
    note(f"saved: {saved}")
    if done.interrupted:
        raise CutShortError(f"interrupted; go on with: {session.resume_command()}")
    if not done.complete:
        note(f"time limit reached; go on with: {session.resume_command()}")
