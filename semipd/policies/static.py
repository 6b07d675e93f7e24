"""One split for the whole replay."""

from __future__ import annotations

from dataclasses import dataclass

from semipd.core import Allocation, Load
from semipd.policies.exclusive import whole_device


@dataclass(frozen=True)
class Static:
    """A fixed split while both phases have work, the whole device while one is idle.

    That is SGLang PDMux with a single division: its first and last stream groups are the whole device.
    """

    split: Allocation
    device_sms: int

    @property
    def name(self) -> str:
        """``static-N``, N being the prefill SMs."""
        return f"static-{self.split.prefill_sms}"

    def decide(self, load: Load) -> Allocation:
        """The split, or the whole device when a phase is idle."""
        return whole_device(self.device_sms) if load.prefill is None or load.decode is None else self.split
