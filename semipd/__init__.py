"""semipd: split one GPU's SMs between prefill and decode, measured, replayed and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semipd._core import CudaError as CudaError

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``semipd.CudaError``, without loading the compiled module on import."""
    if name == "CudaError":
        from semipd._core import CudaError

        return CudaError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
