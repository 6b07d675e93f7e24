"""``semipd trace``: describe, convert, fit and draw request traces."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from semipd.cli.session import Session, note, show, show_json

if TYPE_CHECKING:
    from semipd.trace import Trace

app = typer.Typer(help="Read, describe, convert, fit and draw request traces (docs/traces.md).")

FORMATS = "azure-csv or mooncake-jsonl"

File = Annotated[str, typer.Argument(metavar="FILE", help="A trace file, or the name of a shipped trace.")]
Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A specification file, or the name of a shipped one.")]
ReadAs = Annotated[str | None, typer.Option("--from", help=f"{FORMATS}; told from the content when not given.")]
Format = Annotated[str, typer.Option("--format", help=f"{FORMATS}.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write; gzipped when it ends in .gz.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite --out.")]
RateScale = Annotated[float, typer.Option(help="Multiply the arrival rate.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("info")
def info(
    file: File,
    read_as: ReadAs = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    as_json: Json = False,
) -> None:
    """Requests, rate, lengths and burstiness of a trace."""
    from semipd.report.tables import trace_report
    from semipd.trace import info, read_trace

    found = info(read_trace(_found(file), read_as, limit))
    if as_json:
        show_json(asdict(found))
    else:
        show(trace_report(found))


@app.command("convert")
def convert(
    file: File,
    format_: Format,
    out: Out,
    read_as: ReadAs = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many requests.")] = None,
    rate_scale: RateScale = 1.0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a trace in another format; a rate scale warps time."""
    from semipd.trace import TraceFormat, read_trace, scale_rate, write
    from semipd.trace.reader import trace_format

    wanted = trace_format(format_)
    _refuse_existing(out, force)
    trace = scale_rate(read_trace(_found(file), read_as, limit), rate_scale)
    write(trace, out, wanted)
    if wanted is TraceFormat.AZURE and trace.prefixes is not None:
        note("azure-csv has no place for prefix block ids: they are dropped")
    _written(trace, out, as_json)


@app.command("fit")
def fit(
    ctx: typer.Context,
    file: File,
    out: Annotated[Path, typer.Option("--out", metavar="SPEC", help="YAML (or .json) file to write.")],
    window_s: Annotated[float, typer.Option(help="Width of the windows of constant arrival rate.")] = 60.0,
    name: Annotated[str | None, typer.Option(help="Name of the specification; the trace's when not given.")] = None,
    source: Annotated[str, typer.Option(help="Where the trace comes from.")] = "unstated",
    licence: Annotated[str, typer.Option(help="Its licence.")] = "unstated",
    attribution: Annotated[str, typer.Option(help="What its licence asks to be said.")] = "unstated",
    read_as: ReadAs = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Reduce a trace to a generator specification: rates per window, burstiness, quantiles of lengths."""
    from semipd.trace import fit, read_trace, save_spec

    session: Session = ctx.obj
    _refuse_existing(out, force)
    spec = fit(
        read_trace(_found(file), read_as),
        window_s,
        name=name,
        source=source,
        licence=licence,
        attribution=attribution,
        command=session.command,
    )
    save_spec(spec, out)
    if as_json:
        show_json(spec.model_dump(mode="json"))
    else:
        print(f"{out}: {spec.name}, {len(spec.rate_rps)} windows of {window_s:g} s, burstiness {spec.burstiness:g}")


@app.command("synth")
def synth(
    spec: Spec,
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of the draw; the same one gives the same bytes.")] = 0,
    requests: Annotated[int | None, typer.Option(help="Draw so many requests.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Or draw so long a trace.")] = None,
    rate_scale: RateScale = 1.0,
    format_: Format = "azure-csv",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw a trace from a specification; by default as long as its source."""
    from semipd.trace import load_spec, synth, write
    from semipd.trace.reader import trace_format

    wanted = trace_format(format_)
    _refuse_existing(out, force)
    loaded = load_spec(_found(spec))
    trace = synth(loaded, seed, requests=requests, duration_s=duration_s, rate_scale=rate_scale)
    write(trace, out, wanted)
    _written(trace, out, as_json)


def _found(name: str) -> Path:
    """A file of that path, else the shipped one of that name. Raises InputError when there is neither."""
    from semipd.trace import shipped

    path = Path(name)
    if path.exists() or path.name != name:  # a path with folders is no shipped name: let the reader refuse it
        return path
    return shipped(name)


def _refuse_existing(out: Path, force: bool) -> None:
    from semipd.core import InputError

    if out.exists() and not force:
        raise InputError(f"{out}: exists; expected a new file, or --force to overwrite it")


def _written(trace: Trace, out: Path, as_json: bool) -> None:
    if as_json:
        dropped = dict(trace.dropped)
        show_json({"out": str(out), "requests": len(trace), "duration_s": trace.duration_s, "dropped": dropped})
    else:
        print(f"{out}: {len(trace)} requests in {trace.duration_s:.1f} s")
