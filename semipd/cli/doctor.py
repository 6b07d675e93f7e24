"""``semipd doctor``: what this machine offers, what will run on it, and why the rest will not."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Annotated, cast

import typer

from semipd.cli.needs import GPU, NEEDS, missing
from semipd.cli.session import show, show_json

PACKAGES = ("semipd", "numpy", "simpy", "pyarrow", "torch", "flashinfer-python", "safetensors", "matplotlib")


@dataclass(frozen=True)
class Gpu:
    """A device, and the SM counts that its splits can have: from ``minimum`` in steps of ``multiple``.

    The ``fine`` ones cost thread-block clusters.
    """

    index: int
    name: str
    compute_capability: str
    sms: int
    minimum: int
    multiple: int
    fine_minimum: int
    fine_multiple: int


@dataclass(frozen=True)
class Part:
    """Commands, or another part of semipd: whether it will run here, and if not, why and what to do."""

    name: str
    runs: bool
    why_not: str = ""


@dataclass(frozen=True)
class Findings:
    """What the machine offers. ``driver`` is the CUDA version of its driver, None without a usable one.

    ``simulator``: whether it was compiled when semipd was installed, or is interpreted.
    """

    python: str
    simulator: str
    driver: str | None
    devices: tuple[Gpu, ...]
    packages: dict[str, str | None]
    parts: tuple[Part, ...]


def doctor(
    ctx: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False
) -> None:
    """Say what this machine offers, what will run on it, and why the rest will not."""
    from semipd.report.tables import plain_table

    program = cast("typer.core.TyperGroup", ctx.find_root().command)
    found = examine([name for name in program.list_commands(ctx) if name != "doctor"])
    if as_json:
        show_json(asdict(found))
        return
    alike: dict[str, list[str]] = {}
    for part in found.parts:
        alike.setdefault(part.why_not or "runs", []).append(part.name)
    show(plain_table("Part of semipd", [("\n".join(names), said) for said, names in alike.items()]))
    here = [("python", found.python), ("simulator", found.simulator), ("CUDA driver", found.driver or "none")]
    here += [(f"GPU {d.index}", _described(d)) for d in found.devices]
    here += [(name, version or "not installed") for name, version in found.packages.items()]
    show(plain_table("Here", here))


def examine(commands: Sequence[str]) -> Findings:
    """Look at this machine, for these commands; nothing is created on a GPU, and torch is not imported."""
    from semipd import driver as driver_module

    packages = {name: _version(name) for name in PACKAGES}
    driver, devices, no_gpu = _gpus()
    cpu_build = packages["torch"] if "+cpu" in (packages["torch"] or "") else None
    no_cuda = f"torch {cpu_build} is built without CUDA: install a CUDA build of it" if cpu_build else ""
    no_compiler = "" if shutil.which("nvcc") else "no nvcc on PATH: flashinfer can use only kernels built before"
    parts = [_part(", ".join(name for name in commands if name not in NEEDS))]
    for command, needs in NEEDS.items():
        parts.append(_part(command, *((no_gpu, no_cuda) if GPU in needs else ()), missing(command)))
    parts.append(_part("partition the SMs (from Python)", no_gpu))
    parts.append(_part("compile attention kernels", no_cuda, missing("sweep"), no_compiler))
    simulator = "interpreted" if str(driver_module.__file__).endswith(".py") else "compiled"
    return Findings(platform.python_version(), simulator, driver, devices, packages, tuple(parts))


def _part(name: str, *reasons: str) -> Part:
    """Which runs unless there are reasons why not."""
    why_not = "; ".join(filter(None, reasons))
    return Part(name, not why_not, why_not)


def _version(package: str) -> str | None:
    from importlib import metadata  # here, since no other command needs it

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[str | None, tuple[Gpu, ...], str]:
    """The driver's CUDA version, the devices that can be split, and why there is none."""
    try:
        from semipd.partition import CudaError, Device
    except ImportError as error:
        return None, (), f"the compiled module does not load ({error}): pip install semipd again"
    driver: str | None = None
    devices: list[Gpu] = []
    for index in count():
        try:
            device = Device(index)
            driver = f"{device.driver_version // 1000}.{device.driver_version % 1000 // 10}"
            coarse, fine = device.resource(), device.resource(ignore_coscheduling=True)
        except CudaError as error:
            return driver, tuple(devices), "" if devices else str(error)
        major, minor = device.compute_capability
        sizes = (coarse.count, coarse.minimum, coarse.multiple, fine.minimum, fine.multiple)
        devices.append(Gpu(index, device.name, f"{major}.{minor}", *sizes))
    raise AssertionError("count() never ends")


def _described(gpu: Gpu) -> str:
    return (
        f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.sms} SMs, splits of {gpu.minimum} or more in "
        f"steps of {gpu.multiple} ({gpu.fine_minimum} in steps of {gpu.fine_multiple} without clusters)"
    )
