"""Time sharing: one phase at a time on the whole device, prefill first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from semipd.core import Allocation, Load, Mode


@cache
def whole_device(device_sms: int) -> Allocation:
    """The allocation in which either phase has every SM, one at a time."""
    return Allocation(Mode.EXCLUSIVE, device_sms, device_sms)


@dataclass(frozen=True)
class Exclusive:
    """Never splits: what an engine without chunked prefill does (vLLM's default before v1)."""

    device_sms: int
    name: str = "exclusive"

    def decide(self, load: Load) -> Allocation:
        """The whole device, whatever the load."""
        del load
        return whole_device(self.device_sms)
