"""The traces and generator specifications that come with the package."""

from __future__ import annotations

from pathlib import Path

from semipd.core import InputError
from semipd.shipped import shipped_files

DEFAULT_TRACE = "azure-conv-synth.csv"
"""What is replayed when no trace is named: drawn from the fitted Azure 2023 conversation trace."""


def shipped(name: str) -> Path:
    """Path of a shipped file of that name, installed or in a checkout. Raises InputError for an unknown name."""
    files = {path.name: path for path in shipped_files("traces") if path.suffix != ".md"}
    if name not in files:
        raise InputError(f"trace: found {name!r}; expected a file, or what is shipped: {', '.join(files) or 'nothing'}")
    return files[name]
