"""Request traces: read, check, reshape, describe, fit, draw and write them (docs/traces.md)."""

from semipd.trace.arrivals import Arrivals, Process, dequantise, draw_arrivals
from semipd.trace.columns import Prefixes, Sessions, Trace, head, window
from semipd.trace.fitting import fit
from semipd.trace.reader import TraceFormat, read_servegen, read_trace
from semipd.trace.reshaping import Reshape, reshape
from semipd.trace.scaling import reblock, replicate, scale_rate, thin
from semipd.trace.shipped import shipped
from semipd.trace.spec import TraceSpec, load_spec, save_spec
from semipd.trace.statistics import TokenSummary, TraceInfo, info
from semipd.trace.synthesis import synth
from semipd.trace.writer import write

__all__ = [
    "Arrivals",
    "Prefixes",
    "Process",
    "Reshape",
    "Sessions",
    "TokenSummary",
    "Trace",
    "TraceFormat",
    "TraceInfo",
    "TraceSpec",
    "dequantise",
    "draw_arrivals",
    "fit",
    "head",
    "info",
    "load_spec",
    "read_servegen",
    "read_trace",
    "reblock",
    "replicate",
    "reshape",
    "save_spec",
    "scale_rate",
    "shipped",
    "synth",
    "thin",
    "window",
    "write",
]
