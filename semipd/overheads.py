"""Host time that is in no step."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from semipd.core import Phase


@dataclass(frozen=True, kw_only=True)
class Overheads:
    """Host time that is in no step, milliseconds, as profile.json has it.

    ``*_start_ms``: from the launch of a run that is not the plain continuation of its predecessor until its first step
    begins; of decode, ``decode_start_per_sequence_ms`` more for each sequence. ``switch_ms``: from a change of
    allocation until anything can start at the new one.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, in profiles

    prefill_start_ms: float = 0.0
    decode_start_ms: float = 0.0
    decode_start_per_sequence_ms: float = 0.0
    mixed_start_ms: float = 0.0
    switch_ms: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < inf:
                raise ValueError(f"{name}: found {value}; expected zero or more")

    def start_s(self, phase: Phase, sequences: int) -> float:
        """Seconds from the launch of a run of this phase, of so many sequences, until its first step begins."""
        each_ms = self.decode_start_per_sequence_ms if phase is Phase.DECODE else 0.0
        return (float(getattr(self, f"{phase.value}_start_ms")) + sequences * each_ms) / 1e3


NO_OVERHEADS = Overheads()
