"""The command line, one file a group of commands.

Results go to stdout, progress and notes to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130
interrupted. Whatever is wrong is one line, ``error: ...``; ``--debug``, anywhere, shows the traceback instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from semipd import __version__
from semipd.cli import doctor, profile, replay, show, sweep, trace
from semipd.cli.session import INTERRUPTED, CutShortError, OpenBench, Session, gpu_bench

# typer has brought its own copy of click since 0.26: the class of all usage errors is the one its public error has.
_CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def _app() -> typer.Typer:
    """All commands."""
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        epilog="With --debug, anywhere, an error shows its traceback.",
    )
    app.callback()(_root)
    app.add_typer(sweep.app, name="sweep")
    app.add_typer(trace.app, name="trace")
    app.command("replay")(replay.replay)
    app.command("compare")(replay.compare)
    app.command("profile")(profile.profile)
    app.command("show")(show.show_profile)
    app.command("doctor")(doctor.doctor)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        print(f"semipd {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Split one GPU's SMs between prefill and decode: measure every split, replay traces, choose."""
    del version  # its callback has answered


def main(argv: Sequence[str] | None = None, open_bench: OpenBench = gpu_bench) -> int:
    """Run one command line and return its exit code; ``open_bench`` is where sweeps measure."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = [arg for arg in given if arg != "--debug"]
    command = typer.main.get_command(_app())
    try:
        code = command.main(
            args or ["--help"], prog_name="semipd", standalone_mode=False, obj=Session(tuple(args), open_bench)
        )
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except CutShortError as error:
        print(error, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if "--debug" in given:
            raise
        return _report(error)
    if code == INTERRUPTED:  # typer makes it of KeyboardInterrupt
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    """Say on stderr, in one line, what went wrong; what nobody expected with its type. The exit code."""
    from semipd.core import InputError  # here, since it brings numpy

    core = sys.modules.get("semipd._core")  # unless it is loaded, nothing of it was raised
    code, text = 1, str(error)
    if isinstance(error, _CLICK_ERROR):
        code, text = 2, error.format_message()  # type: ignore[attr-defined]  # click's, under either name
    elif isinstance(error, InputError):
        code = 2
    elif not isinstance(error, (OSError, core.CudaError) if core else OSError):
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code
