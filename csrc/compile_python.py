"""Translate the modules in which a replay spends its time to C, for CMake: ``compile_python.py FOLDER``.

mypyc does that from their types. ``FOLDER/modules.cmake`` then has ``compiled_module(name sources headers)`` for each
extension module. Where these modules are not compiled, they run as the Python they are.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mypyc.build import mypycify

COMPILED = (
    "core",
    "kv_cache",
    "batch",
    "log",
    "cost",
    "table_cost",
    "policies/__init__",
    "policies/static",
    "policies/adaptive",
    "diagnosis",
    "executor",
    "scheduler",
    "sim",
    "client",
    "driver",
)
"""Of semipd, without ``.py``."""


def main() -> None:
    """Write the C files into the folder, and what to build of them."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "mypy.ini"
    # What is installed beside must not matter: of numpy only that it is there is used.
    config.write_text(
        "[mypy]\nfollow_imports = silent\nignore_missing_imports = true\n"
        "[mypy-numpy.*,simpy.*,pydantic.*,pyarrow.*,yaml.*]\nfollow_imports = skip\n"
    )
    options = [f"--config-file={config}", f"--cache-dir={folder / 'cache'}"]
    modules = mypycify(
        [*options, *(f"semipd/{name}.py" for name in COMPILED)], target_dir=str(folder), group_name="semipd"
    )
    (folder / "modules.cmake").write_text(
        "".join(
            f'compiled_module("{module.name}" "{";".join(module.sources)}" "{";".join(module.include_dirs)}")\n'
            for module in modules
        )
    )


if __name__ == "__main__":
    main()
