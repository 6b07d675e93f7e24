"""The traces and generator specifications that come with the package."""

from __future__ import annotations

from pathlib import Path

from semipd.core import InputError

DEFAULT_TRACE = "azure-conv-synth.csv"
"""What is replayed when no trace is named: drawn from the fitted Azure 2023 conversation trace."""


def shipped(name: str) -> Path:
    """Path of a shipped file of that name, installed or in a checkout. Raises InputError for an unknown name."""
    package = Path(__file__).resolve().parents[1]
    # The build installs the repository's traces/ as semipd/traces/; a checkout only has the former.
    folder = next((f for f in (package / "traces", package.parent / "traces") if f.is_dir()), package / "traces")
    names = sorted(f.name for f in folder.glob("*") if f.suffix != ".md")
    if name not in names:
        raise InputError(f"trace: found {name!r}; expected a file, or what is shipped: {', '.join(names) or 'nothing'}")
    return folder / name
