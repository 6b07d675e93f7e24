"""Where and with what a table is measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def provenance(work: dict[str, object], command: str, device: str = "cuda", device_sms: int = 1) -> dict[str, object]:
    """GPU, driver, limits, library versions, commit, command, date; on a CPU what there is of these.

    The commit is that of the checkout this package is in (``SEMIPD_COMMIT`` says it for an installed one).

    Args:
        work: What is measured.
        command: By which command.
        device: ``cuda`` or ``cpu``.
        device_sms: SMs that a CPU is said to have.
    """
    package = str(Path(__file__).parent)
    commit = os.environ.get("SEMIPD_COMMIT") or _ask(
        "git", "-C", package, "describe", "--always", "--abbrev=40", "--dirty"
    )
    return {
        **(_gpu() if device == "cuda" else _cpu(device_sms)),
        "work": work,
        "torch": torch.__version__,
        "semipd": version("semipd"),
        "python": platform.python_version(),
        "commit": commit,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu() -> dict[str, object]:
    device = torch.cuda.get_device_properties("cuda")
    fields = ("driver_version", "clocks.mem", "clocks.max.sm", "power.limit")
    query = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", f"GPU-{device.uuid}")
    return {
        "gpu": device.name,
        "device_sms": device.multi_processor_count,
        "device_memory_bytes": device.total_memory,
        **dict(zip((f.replace(".", "_") for f in fields), _ask(*query).split(", "), strict=False)),
        "cuda": torch.version.cuda,
        "flashinfer": version("flashinfer-python"),
    }


def _cpu(device_sms: int) -> dict[str, object]:
    return {
        "gpu": f"CPU, {platform.machine()}",
        "device_sms": device_sms,
        "device_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _ask(*argv: str) -> str:
    found = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    return found.stdout.strip() if found.returncode == 0 else "unknown"
