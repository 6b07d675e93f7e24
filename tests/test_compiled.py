"""Modules that are compiled where mypyc was at hand: they do what they do as the Python that they are."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from subprocesses import elsewhere

from semipd import driver

ARGUMENTS = [
    "compare",
    "--json",
    "--jobs",
    "1",
    "--policies",
    "adaptive,chunked-512,priority,exclusive",
    "--set",
    "trace.limit=300",
]

AS_PYTHON = """
import sys
from importlib.machinery import FileFinder, SourceFileLoader
class Source:
    def find_spec(name, path, target=None):
        if name.startswith("semipd.") and name.split(".")[-1] not in ("_core", "_steps"):
            return FileFinder(path[0], (SourceFileLoader, [".py"])).find_spec(name)
sys.meta_path.insert(0, Source)
"""

RUN = """
import sys
from semipd import driver
from semipd.cli import main
print(driver.__file__, file=sys.stderr)
sys.exit(main(sys.argv[1:]))
"""


def compared(code: str) -> tuple[str, Any]:
    """Where the loop was loaded from, and what it found."""
    done = subprocess.run(
        [sys.executable, "-c", code, *ARGUMENTS],
        capture_output=True,
        text=True,
        check=True,
        cwd=tempfile.gettempdir(),
        env=elsewhere(),
    )
    document = json.loads(done.stdout)
    for run in document["runs"]:
        del run["wall_s"]
    return done.stderr.splitlines()[0], document


@pytest.mark.skipif(str(driver.__file__).endswith(".py"), reason="nothing was compiled")
def test_compiled_modules_give_the_same_bytes_as_interpreted_ones() -> None:
    compiled, found = compared(RUN)
    interpreted, expected = compared(AS_PYTHON + RUN)
    assert Path(compiled).suffix != ".py"
    assert Path(interpreted).suffix == ".py"
    assert found == expected
