"""The seam between the scheduler and whatever does the work: a simulation, a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from semipd.core import FUSED, ONE_AT_A_TIME, Mode, Run, StepRecord


class Executor(Protocol):
    """Owns time, virtual or wall-clock, and runs what it is given. Like ``Policy``, not to be inherited from.

    At most one run of each phase is in flight, and a fused one only alone. A run ends by itself (prefill: its layers
    are done; decode: a sequence finished or ``max_steps`` reached; fused: its one step is done) or at its next step
    boundary after ``yield_``.
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


def check_launch(run: Run, in_flight: Iterable[Run]) -> None:
    """Raises ValueError for a run that must not start beside those in flight, as ``Executor.launch`` says.

    Nor may one without requests or steps, in ``EXCLUSIVE`` and ``MIXED`` any beside another, or a fused one of more
    than one step, without a piece of a prompt or at an allocation of another mode.
    """
    for other in in_flight:
        if other.phase is run.phase:
            raise ValueError(f"{run.phase.value} run {run.id}: run {other.id} of this phase is in flight")
        if other.allocation is not run.allocation and other.allocation != run.allocation:
            raise ValueError(
                f"{run.phase.value} run {run.id} at {run.allocation.name}: run {other.id} is in flight at "
                f"{other.allocation.name}; expected the same allocation"
            )
        if run.allocation.mode in ONE_AT_A_TIME:
            raise ValueError(f"{run.phase.value} run {run.id}: run {other.id} has the whole device")
    if run.phase is FUSED and (
        run.max_steps != 1 or run.decodes >= len(run.requests) or run.allocation.mode is not Mode.MIXED
    ):
        raise ValueError(
            f"mixed run {run.id} at {run.allocation.name}: {run.max_steps} steps, {run.decodes} of {len(run.requests)} "
            "sequences decode; expected one step, with a piece of a prompt, at mixed"
        )
    if not run.requests or run.max_steps < 1:
        raise ValueError(
            f"{run.phase.value} run {run.id}: {len(run.requests)} requests, {run.max_steps} steps; "
            "expected at least 1 of each"
        )


def output_left(run: Run) -> tuple[int, ...]:
    """Decode: tokens of output that each sequence has yet to get (the oracle); n cached ones gave n - prompt_len + 1.

    Raises ValueError for a sequence that has all of them.
    """
    cached, left = run.context_lens, list[int]()
    for i, request in enumerate(run.requests):
        tokens = request.prompt_len + request.output_len - 1 - cached[i]
        if tokens < 1:
            raise ValueError(
                f"decode run {run.id}: request {request.id} has all its {request.output_len} tokens of output"
            )
        left.append(tokens)
    return tuple(left)


def finished_by_prefill(run: Run) -> tuple[int, ...]:
    """Ids of the requests whose last token a whole prefill or fused run gives."""
    batch = zip(run.requests, run.new_tokens, run.context_lens, run.emits, strict=True)
    return tuple([r.id for r, new, n, emits in batch if emits and n + new >= r.prompt_len + r.output_len - 1])
