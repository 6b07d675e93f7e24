"""What every command shares: the command line it was given, where it measures, and how it speaks."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from semipd.cli.needs import require

if TYPE_CHECKING:
    from rich.console import RenderableType

    from semipd.config import SweepConfig
    from semipd.profiler import Bench

INTERRUPTED = 130  # as shells report Ctrl-C


class CutShortError(Exception):
    """Ctrl-C ended a command, which has kept what was complete; its text is the last line to say."""


OpenBench: TypeAlias = "Callable[[SweepConfig, str], AbstractContextManager[tuple[Bench, dict[str, object]]]]"
"""(config, command) to a bench and the provenance of what it measures."""


@contextmanager
def gpu_bench(config: SweepConfig, command: str) -> Iterator[tuple[Bench, dict[str, object]]]:
    """The real bench, on the current GPU. Raises InputError without the [gpu] extra, CudaError without a GPU."""
    require("sweep")
    from semipd.partition import Device

    Device(0).resource()  # says what is missing in one line, where torch would not
    from semipd.bench import GpuBench
    from semipd.kernels import Gqa
    from semipd.provenance import provenance

    gqa = Gqa(**config.attention.model_dump())
    load = config.model_dump(include={"settle_ms", "rest_ms"})
    with GpuBench(gqa, **config.model_dump(include={"step_sms"}), **load) as bench:
        work = {**config.attention.model_dump(), "layers": 1, "page_size_tokens": 16}
        yield bench, provenance(work, command) | load


@dataclass(frozen=True)
class Session:
    """One invocation: its arguments, without the program's name, and how to reach what can be timed."""

    argv: tuple[str, ...]
    open_bench: OpenBench = gpu_bench

    @property
    def command(self) -> str:
        """The command line, as one would type it again."""
        return shlex.join(("semipd", *self.argv))

    def resume_command(self) -> str:
        """The command line that goes on where this one stopped."""
        return self.command if "--resume" in self.argv else f"{self.command} --resume"


def show(renderable: RenderableType) -> None:
    """Print a result on stdout: in colour on a terminal, plain text without trailing blanks when piped."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console(markup=False, highlight=False).print(renderable)
        return
    text = io.StringIO()
    # force_terminal: FORCE_COLOR, which CI sets, would put escape sequences into files.
    Console(file=text, force_terminal=False, markup=False, highlight=False, width=_columns()).print(renderable)
    for line in text.getvalue().splitlines():
        print(line.rstrip())


def _columns() -> int:
    """Columns of a table that goes to a file or a pipe: ``COLUMNS``, or 80."""
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else 80


def show_json(document: dict[str, Any]) -> None:
    """Print one JSON document on stdout. Raises ValueError for a number that JSON has not."""
    print(json.dumps(document, indent=1, allow_nan=False))


def note(message: str) -> None:
    """Say something on stderr that is no result."""
    print(message, file=sys.stderr)
