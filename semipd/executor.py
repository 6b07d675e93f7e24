"""The seam between the scheduler and whatever does the work: a simulation, a CPU or a GPU."""

from __future__ import annotations

from typing import Protocol

from semipd.core import Run, StepRecord


class Executor(Protocol):
    """Owns time, virtual or wall-clock, and runs what it is given.

    At most one run of each phase is in flight. A run ends by itself (prefill: its layers are done; decode: a
    sequence finished or ``max_steps`` reached) or at its next step boundary after ``yield_``.
    """

    def now(self) -> float:
        """Seconds since the start of the replay."""
        ...

    def launch(self, run: Run) -> None:
        """Start a run now.

        Raises ValueError when a run of the same phase is in flight, or one of another allocation: partitions of
        two splits share SMs, so a new split waits until both phases have left the old one.
        """
        ...

    def yield_(self, run_id: int) -> None:
        """Ask the run to end at its next step boundary; no effect on a run that has ended."""
        ...

    def steps_done(self, run_id: int) -> int:
        """Steps that a run in flight has completed by now. Raises KeyError for a run that is not in flight."""
        ...

    def wait(self, until_s: float | None) -> list[StepRecord]:
        """Go on until a run ends or ``until_s`` is reached, and return the records of the runs that ended.

        ``until_s`` None waits for a run to end. Raises RuntimeError when nothing is in flight and ``until_s``
        is None, since that would wait for ever.
        """
        ...
