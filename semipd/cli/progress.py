"""How far a measurement is, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from semipd.cli.session import note

if TYPE_CHECKING:
    from semipd.profiler import Progress

NOTE_EVERY_S = 20.0  # without a terminal, progress is a line on stderr this often


def watched(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
    """Pass the steps on and show them: as a bar on a terminal, else as a line now and then."""
    return (_bars if sys.stderr.isatty() else _notes)(name, steps)


def _bars(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
    """Pass the steps on, with a bar and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[at]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None, at="")
        for step in steps:
            bar.update(task, completed=step.done, total=step.total, at=step.at)
            yield step


def _notes(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
    """Pass the steps on, with a line now and then and the time left at the pace so far."""
    start_s = noted_s = time.monotonic()
    for step in steps:
        now_s = time.monotonic()
        if now_s - noted_s > NOTE_EVERY_S and step.done:
            left_s = (now_s - start_s) / step.done * (step.total - step.done)
            note(f"{name}: {step.done}/{step.total}, about {left_s:.0f} s left, at {step.at}")
            noted_s = now_s
        yield step
