"""Files of the repository that the build installs inside the package, found there or in a checkout."""

from __future__ import annotations

from pathlib import Path


def shipped_files(folder: str) -> tuple[Path, ...]:
    """The files of one such folder, such as ``traces``, by name; none when it is nowhere."""
    package = Path(__file__).resolve().parent
    places = (package / folder, package.parent / folder)  # a checkout only has the latter
    found = next((place for place in places if place.is_dir()), None)
    return tuple(sorted(found.iterdir())) if found else ()
