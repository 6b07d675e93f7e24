"""What commands need beyond what is always installed, and whether it is here."""

from __future__ import annotations

from importlib.util import find_spec

GPU = "GPU"

NEEDS = {
    "replay --executor cpu": ("torch",),
    "replay --executor gpu": (GPU, "torch", "flashinfer"),
    "replay --set weights=DIR": ("torch", "safetensors"),
    "show --html": ("matplotlib",),
    "sweep": (GPU, "torch", "flashinfer"),
    "profile": (GPU, "torch", "flashinfer"),
    "profile --device cpu": ("torch",),
}
"""A command, or an option of one, and what it needs: a GPU whose SMs can be split, and modules. Others need nothing."""

EXTRAS = {"torch": "gpu", "flashinfer": "gpu", "safetensors": "gpu", "matplotlib": "plot"}
"""The extra of semipd that brings each module."""


def missing(command: str) -> str:
    """Which modules that command lacks here and how to get them; empty when it has all."""
    absent = [name for name in NEEDS[command] if name != GPU and find_spec(name) is None]
    if not absent:
        return ""
    extras = ",".join(dict.fromkeys(EXTRAS[name] for name in absent))
    return f"{' and '.join(absent)} not installed: pip install 'semipd[{extras}]'"


def require(command: str) -> None:
    """Raises InputError when that command lacks a module."""
    if lacks := missing(command):
        from semipd.core import InputError  # here, since it brings numpy

        raise InputError(f"{command}: {lacks}")
