"""``semipd show``: what a profile says at one load, in the terminal, as an HTML page or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from semipd.cli.needs import require
from semipd.cli.session import note, show, show_json


def show_profile(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="A shipped profile's name, or a folder.")],
    tokens: Annotated[int | None, typer.Option(metavar="N", help="New tokens of the prefill batch.")] = None,
    context: Annotated[
        int | None, typer.Option(metavar="M", help="Keys that each of them attends to on average.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="B", help="Sequences of the decode step.")] = None,
    kv_tokens: Annotated[int | None, typer.Option(metavar="K", help="Cached tokens that they read in all.")] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(metavar="X", help="Longest decode step: say what then has the most prefill.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="F.html", help="Write a page with plots, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a profile: scaling, heat maps, the frontier, the best sharing; by default at a typical measured load."""
    from semipd.holdout import as_document, held_out
    from semipd.profile import load_profile
    from semipd.survey import survey

    if html is not None:
        _check_page(html)
    loaded = load_profile(profile)
    found = survey(
        loaded,
        tokens=tokens,
        mean_context=context,
        batch=batch,
        kv_tokens=kv_tokens,
        tpot_s=None if tpot_ms is None else tpot_ms / 1e3,
    )
    if html is not None:
        from semipd.report.html import profile_page

        html.write_text(profile_page(found), encoding="utf-8")
        note(f"saved: {html}")
    held = held_out(loaded)
    if as_json:
        show_json(found.document() | ({"holdout": as_document(held)} if held else {}))
    else:
        from semipd.report.profile import profile_report

        show(profile_report(found))
        if held:
            from rich.console import Group
            from rich.text import Text

            from semipd.report.holdout import holdout_report

            show(Group(Text(""), holdout_report(held)))


def _check_page(path: Path) -> None:
    """Refuse what cannot be written, before anything is computed."""
    from semipd.core import InputError

    if path.suffix not in (".html", ".htm"):
        raise InputError(f"--html: found {str(path)!r}; expected a file that ends in .html")
    if not path.parent.is_dir():
        raise InputError(f"--html: {path.parent}: not a folder; expected one to write {path.name} in")
    require("show --html")
