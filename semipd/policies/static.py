"""One way of sharing for the whole replay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from semipd.core import DECODE, PREFILL, Allocation, Load, Mode, Phase


@cache
def whole_device(device_sms: int, first: Phase = Phase.PREFILL) -> Allocation:
    """The allocation in which either phase has every SM, one at a time; ``first`` has its turn while it has work."""
    return Allocation(Mode.EXCLUSIVE, device_sms, device_sms, first=first)


@dataclass(frozen=True)
class Static:
    """One allocation; a phase that is alone has the whole device.

    With a split, that is SGLang PDMux with a single division: its first and last stream groups are the whole device.
    Where a phase has every SM anyway, as decode in ``CAPPED`` and both in ``PRIORITY``, ``MIXED`` and ``EXCLUSIVE``,
    nothing changes when it is alone, and nothing has to wait when the other phase comes.
    """

    name: str
    allocation: Allocation
    device_sms: int

    def decide(self, load: Load) -> Allocation:
        """The allocation, or the whole device for a phase that is alone and has less."""
        alone = load.decode is None or load.prefill is None
        phase = PREFILL if load.decode is None else DECODE
        if alone and self.allocation.sms(phase) < self.device_sms:
            return whole_device(self.device_sms)
        return self.allocation
