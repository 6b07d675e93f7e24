"""Tables of held-out errors, and of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from semipd.holdout import Errors
from semipd.overheads import Overheads


def profiled_report(
    points: Mapping[str, int], overheads: Overheads, held: Mapping[str, Mapping[str, Errors]]
) -> RenderableType:
    """What ``semipd profile`` prints when it ends."""
    host = [f"{name.removesuffix('_ms').replace('_', ' ')} {ms:.3f} ms" for name, ms in asdict(overheads).items()]
    lines = [
        "Measured: " + ", ".join(f"{count:,} points of {name}" for name, count in points.items()) + ".",
        f"Host time in no step: {', '.join(host)}.",
    ]
    return Group(Text("\n".join(lines)), *([Text(""), holdout_report(held)] if held else []))


def holdout_report(held: Mapping[str, Mapping[str, Errors]]) -> RenderableType:
    """Held-out errors: a line a group, three columns a model."""
    models = list(next(iter(held.values())))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("held out\n%", no_wrap=True)
    table.add_column("\npoints", justify="right", no_wrap=True)
    for model in models:
        for heading in (f"{model}\nmedian", "\np95", "\nbias"):
            table.add_column(heading, justify="right", no_wrap=True)
    for group, of in held.items():
        cells = [cell for model in models for cell in _cells(of[model])]
        table.add_row(group, f"{of[models[0]].points:,}", *cells)
    outside = sum(of[models[0]].outside for of in held.values())
    notes = ["|predicted / measured - 1|: median and 95th percentile; bias is the mean with its sign."]
    if outside:
        notes.append(f"{outside} look-ups were outside the measured grid.")
    return Group(table, Text("\n".join(notes)))


def _cells(errors: Errors) -> tuple[str, str, str]:
    """Percent: one decimal where it can be seen."""
    median, p95, bias = (100 * x for x in (errors.median, errors.p95, errors.bias))
    return f"{median:.{_decimals(median)}f}", f"{p95:.{_decimals(p95)}f}", f"{bias:+.{_decimals(bias)}f}"


def _decimals(percent: float) -> int:
    return 1 if abs(percent) < 100 else 0
