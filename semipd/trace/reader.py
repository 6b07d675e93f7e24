"""Trace files into traces: the format told from the content, every row checked."""

from __future__ import annotations

import json
from enum import Enum
from itertools import chain
from pathlib import Path

from semipd.core import InputError
from semipd.trace.columns import Trace, head
from semipd.trace.csv_reader import CSV_FORMATS, csv_format, read_csv
from semipd.trace.jsonl_reader import read_bailian, read_llmservingsim, read_mooncake
from semipd.trace.servegen import Clients, read_clients
from semipd.trace.source import Source, open_source, shown


class TraceFormat(str, Enum):
    """The file formats that can be read; Azure CSV and Mooncake JSONL can also be written."""

    AZURE = "azure-csv"
    MOONCAKE = "mooncake-jsonl"
    BAILIAN = "bailian-jsonl"
    LLMSERVINGSIM = "llmservingsim-jsonl"
    BURSTGPT = "burstgpt-csv"
    VIDUR = "vidur-csv"
    SPLITWISE = "splitwise-csv"
    SERVEGEN = "servegen-tar"


WRITTEN = (TraceFormat.AZURE, TraceFormat.MOONCAKE)


def read_trace(
    path: str | Path,
    format: TraceFormat | str | None = None,  # noqa: A002 - the word users know from the command line
    limit: int | None = None,
    seed: int = 0,
) -> Trace:
    """Read a trace; its format is taken from the content unless given.

    Every row is checked, also those beyond ``limit`` (which keeps the first rows and counts the others as
    dropped). ``seed`` matters for ServeGen's client data alone, from which a trace is drawn. Raises InputError on the
    first thing wrong.
    """
    wanted = None if format is None else trace_format(format)
    with open_source(Path(path)) as source:
        if wanted is TraceFormat.SERVEGEN or (wanted is None and source.is_tar()):
            trace = read_clients(source).draw(seed)
        else:
            trace = _read_text(source, wanted)
    return trace if limit is None else head(trace, limit, reason="limit")


def read_servegen(path: str | Path) -> Clients:
    """Read an archive of ServeGen's client data. Raises InputError on the first thing wrong."""
    with open_source(Path(path)) as source:
        return read_clients(source)


def trace_format(name: TraceFormat | str, known: tuple[TraceFormat, ...] = tuple(TraceFormat)) -> TraceFormat:
    """The format of that name. Raises InputError for an unknown one, and for one that is not in ``known``."""
    if name not in [f.value for f in known]:
        names = " or ".join([", ".join(f.value for f in known[:-1]), known[-1].value])
        raise InputError(f"trace format: found {shown(getattr(name, 'value', name))}, expected {names}")
    return TraceFormat(name)


def _read_text(source: Source, wanted: TraceFormat | None) -> Trace:
    lines = source.lines()
    first = next(lines)
    whole = chain([first], lines)
    if wanted is None and first[1].startswith("{"):
        wanted = _jsonl_format(first[1])
    if wanted is TraceFormat.MOONCAKE:
        return read_mooncake(source, whole)
    if wanted is TraceFormat.BAILIAN:
        return read_bailian(source, whole)
    if wanted is TraceFormat.LLMSERVINGSIM:
        return read_llmservingsim(source, whole)
    form = csv_format(first[1], wanted.value if wanted else None)
    if form is None and first[1].startswith("TIMESTAMP"):
        form = csv_format(first[1], TraceFormat.AZURE.value)  # says what is wrong with its header
    if form is None:
        headers = ", ".join(f"{form.header} ({form.name})" for form in CSV_FORMATS)
        source.refuse(1, "format", first[1], f"the header of a trace, one of {headers}, or a JSON object")
    return read_csv(source, whole, form)


def _jsonl_format(first_line: str) -> TraceFormat:
    """By a field that no other format has; what is broken is left to Mooncake's reader to refuse."""
    try:
        row = json.loads(first_line)
    except (ValueError, RecursionError):
        return TraceFormat.MOONCAKE
    if "chat_id" in row:
        return TraceFormat.BAILIAN
    return TraceFormat.LLMSERVINGSIM if "arrival_time_ns" in row else TraceFormat.MOONCAKE
