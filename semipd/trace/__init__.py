"""Request traces: read, check, reshape, describe, fit, draw and write them (docs/traces.md)."""

from semipd.trace.columns import Prefixes, Trace, head, scale_rate, window
from semipd.trace.fitting import fit
from semipd.trace.reader import TraceFormat, read_trace
from semipd.trace.shipped import shipped
from semipd.trace.spec import TraceSpec, load_spec, save_spec
from semipd.trace.statistics import TokenSummary, TraceInfo, info
from semipd.trace.synthesis import synth
from semipd.trace.writer import write

__all__ = [
    "Prefixes",
    "TokenSummary",
    "Trace",
    "TraceFormat",
    "TraceInfo",
    "TraceSpec",
    "fit",
    "head",
    "info",
    "load_spec",
    "read_trace",
    "save_spec",
    "scale_rate",
    "shipped",
    "synth",
    "window",
    "write",
]
