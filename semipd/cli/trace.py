"""``semipd trace``: describe, convert, fit and draw request traces."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from semipd.cli.session import Session, note, show, show_json

if TYPE_CHECKING:
    from semipd.trace import Trace

app = typer.Typer(help="Read, describe, convert, fit and draw request traces (docs/traces.md).")

WRITTEN = "azure-csv or mooncake-jsonl"
READ = (
    "azure-csv, mooncake-jsonl, bailian-jsonl, llmservingsim-jsonl, burstgpt-csv, vidur-csv, splitwise-csv or "
    "servegen-tar"
)

File = Annotated[str, typer.Argument(metavar="FILE", help="A trace file, or the name of a shipped trace.")]
Spec = Annotated[str, typer.Argument(metavar="SPEC", help="A specification file, or the name of a shipped one.")]
ReadAs = Annotated[str | None, typer.Option("--from", help=f"{READ}; told from the content when not given.")]
Format = Annotated[str, typer.Option("--format", help=f"{WRITTEN}.")]
Out = Annotated[Path, typer.Option("--out", metavar="FILE", help="File to write; gzipped when it ends in .gz.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite --out.")]
RateScale = Annotated[float, typer.Option(help="Multiply the arrival rate.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many requests.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is drawn; the same one gives the same trace.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("info")
def info(
    file: File,
    read_as: ReadAs = None,
    limit: Limit = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Requests, rate, lengths and burstiness of a trace."""
    from semipd.report.tables import plain_table, trace_report
    from semipd.trace import info, read_trace

    found = info(read_trace(_found(file), read_as, limit, seed))
    if as_json:
        show_json(asdict(found))
        return
    show(trace_report(found))
    dropped = "".join(f" + {n} dropped ({reason})" for reason, n in found.dropped.items())
    stamps = f"{found.stamps} different" + (f", {found.least_gap_s:.3g} s apart at least" if found.least_gap_s else "")
    rows = [("rows read", f"{found.rows_read} = {found.requests} requests{dropped}"), ("stamps", stamps)]
    if found.sessions:
        rows.append(("sessions", f"{found.sessions} of {found.session_requests} requests in all"))
    rows += [("arrivals", operation) for operation in found.operations]
    show(plain_table("Where it comes from", rows))


@app.command("convert")
def convert(
    file: File,
    format_: Format,
    out: Out,
    read_as: ReadAs = None,
    limit: Limit = None,
    start_s: Annotated[float, typer.Option(help="Only what arrives from this time on.")] = 0.0,
    end_s: Annotated[float | None, typer.Option(help="Only what arrives before this time.")] = None,
    dequantise_s: Annotated[
        float | None, typer.Option(help="Spread the requests of each stamp over so many seconds.")
    ] = None,
    thin: Annotated[float, typer.Option(help="Keep this share, sessions and prefix trees whole.")] = 1.0,
    replicate: Annotated[int, typer.Option(help="So many copies of every request.")] = 1,
    jitter_s: Annotated[float, typer.Option(help="Move each start of a copy by up to so much.")] = 1.0,
    every_s: Annotated[float, typer.Option(help="Begin each copy so much later; 0: all at once.")] = 0.0,
    arrivals: Annotated[str, typer.Option(help="trace, poisson, gamma, ramp or constant.")] = "trace",
    rate: Annotated[float | None, typer.Option(help="Drawn arrivals/s; the trace's when not given.")] = None,
    end_rate: Annotated[float | None, typer.Option(help="Arrivals/s at the end of a ramp.")] = None,
    burstiness: Annotated[
        float | None, typer.Option(help="Shape of Gamma gaps, as vLLM's; 1 is Poisson, less is burstier.")
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="Multiply the arrival rate by a time warp.")] = 1.0,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a trace in another format, reshaped in the order of these options."""
    from semipd.trace import Arrivals, Process, Reshape, TraceFormat, read_trace, reblock, reshape, write
    from semipd.trace.jsonl_reader import MOONCAKE_BLOCK_TOKENS
    from semipd.trace.reader import WRITTEN, trace_format

    wanted = trace_format(format_, WRITTEN)
    process = Arrivals(cast("Process", arrivals), rate, burstiness, end_rate)  # it says which processes there are
    how = Reshape(start_s, end_s, dequantise_s, thin, replicate, jitter_s, every_s, process, rate_scale, seed)
    _refuse_existing(out, force)
    trace = reshape(read_trace(_found(file), read_as, limit, seed), how)
    if wanted is TraceFormat.MOONCAKE and trace.prefixes and trace.prefixes.block_tokens != MOONCAKE_BLOCK_TOKENS:
        note(f"prefix blocks of {trace.prefixes.block_tokens} tokens joined to blocks of {MOONCAKE_BLOCK_TOKENS}")
        trace = reblock(trace, MOONCAKE_BLOCK_TOKENS)
    write(trace, out, wanted)
    for kind, lost in (("prefix block ids", trace.prefixes), ("sessions", trace.sessions)):
        if wanted is TraceFormat.AZURE and lost is not None:
            note(f"azure-csv has no place for {kind}: they are dropped")
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
    seed: Seed = 0,
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
    rate_rps = len(trace) / trace.duration_s if trace.duration_s else None
    if as_json:
        document = {"out": str(out), "requests": len(trace), "duration_s": trace.duration_s, "rate_rps": rate_rps}
        source = {"rows_read": trace.rows_read, "added": trace.added, "dropped": dict(trace.dropped)}
        show_json({**document, **source, "operations": list(trace.operations)})
        return
    rate = "" if rate_rps is None else f", {rate_rps:.3g} requests/s"
    print(f"{out}: {len(trace)} requests in {trace.duration_s:.1f} s{rate}")
    for operation in trace.operations:
        print(f"  {operation}")
