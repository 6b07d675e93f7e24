"""Simulated execution: runs take the time that a cost model says, in virtual time.

A run costs a few vectorised operations when it starts and when it is re-timed, not for each step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Generic, TypeAlias, TypeVar

from simpy import Environment, Timeout

from semipd._steps import Boundaries
from semipd.core import (
    DECODE,
    FUSED,
    Allocation,
    DecodeShape,
    FloatArray,
    InputError,
    Phase,
    PrefillShape,
    Run,
    StepRecord,
)
from semipd.cost import CostModel
from semipd.executor import check_launch, finished_by_prefill, output_left
from semipd.overheads import NO_OVERHEADS, Overheads
from semipd.variation import Variation

Own = TypeVar("Own")
Other = TypeVar("Other", PrefillShape, DecodeShape)

Place: TypeAlias = tuple[PrefillShape | DecodeShape, Allocation, PrefillShape | DecodeShape | None]
"""Where a step's price is looked up: its own batch, the allocation, the batch beside it."""

Outside: TypeAlias = Callable[[PrefillShape | DecodeShape, Allocation, PrefillShape | DecodeShape | None], str | None]
"""What is outside the measured grid at a place, None when nothing is."""

STRETCH_STEPS: Final = 1024
"""Steps priced at a time, so that a run that could go on for a million steps costs no more to start or re-time."""


class SimExecutor:
    """An ``Executor`` in virtual time that starts at 0, on simpy.

    **Steps.** A prefill step is one layer and costs ``cost.prefill_s``; all steps of a run cost the same. Step i
    (from 0) of a decode run reads ``sum(context_lens) + batch * (i + 1)`` KV tokens: what is cached, with the
    token that each sequence processes in this step, which attends to itself. A decode run ends with the
    first step that gives a sequence its last token. A sequence of n cached tokens has n - prompt_len + 1 tokens of
    output. A prefill run gives its ``emits`` their token when all ``max_steps`` layers are done. A fused run is one
    step and costs ``cost.mixed_s``.

    **Contention.** A step has its solo price while no run of the other phase is in flight, and the price beside the
    other's batch while one is. When that changes within a step, the share of its work that is left goes on
    at the new price (processor sharing in the fluid limit).

    **The other's batch** grows while it decodes; a step is priced beside what it was when it was last looked at. That
    is when a run of either phase starts that is not the plain continuation of its predecessor: launched at
    the moment at which that one ended, at the same allocation, with the same requests where they then were. So many
    short runs take exactly the time of a long one (law 10). All that is launched at one moment is seen together; a
    run that is replaced at the moment at which it ends was never absent.

    **Yielding** ends a run at its first boundary from now on, and that is now when it is at a boundary, other than its
    start: a run always does a step. ``steps_done`` counts a boundary at this very moment as reached.

    **Look-ups** are counted by the steps that were worked on at a price; a step that was re-timed counts for each.

    **Overheads.** The first step of a run begins ``overheads.start_s`` after its launch, or at once when the run is the
    plain continuation of its predecessor; what is launched at another allocation than the last one, and until
    ``switch_ms`` later, begins no earlier than that. A run counts as in flight from its launch.

    In ``EXCLUSIVE`` and ``MIXED`` one run at a time has the device: ``launch`` refuses a second one.

    **Variation.** Times are then multiplied by factors, which are those of the step, however often it is priced.

    Args:
        cost: What steps cost.
        overheads: What starting runs and changing the allocation costs besides; nothing by default.
        variation: By how much step times vary; not at all by default.
        outside: Says what is outside the measured grid (``TableCost.outside``), to refuse what takes such a look-up: an
            InputError of ``wait``. None to count them only.
    """

    def __init__(
        self,
        cost: CostModel,
        overheads: Overheads = NO_OVERHEADS,
        variation: Variation | None = None,
        outside: Outside | None = None,
    ) -> None:
        self._cost = cost
        self._outside = outside
        self._variation = variation
        self._phase_steps = dict.fromkeys(Phase, 0)  # of all runs that have ended
        self._overheads = overheads
        self._switch_s = overheads.switch_ms / 1e3
        self._switched_s = 0.0  # until when the last change of allocation lasts
        self._allocation: Allocation | None = None  # of the last launch
        self._env = Environment()
        # simpy adds delays to its clock, which rounds: this is the exact time.
        self._now_s = 0.0
        self._prefill: PrefillFlight | None = None  # or the fused run
        self._decode: DecodeFlight | None = None
        self._last_prefill: StepRecord | None = None
        self._last_decode: StepRecord | None = None
        self._seen_prefill: PrefillShape | None = None
        self._seen_decode: DecodeShape | None = None
        self._priced_to_s = math.inf  # the first of what is in flight: the clock must not pass this
        self._look = False  # something new was launched at this moment
        self._changed = False  # something was launched, asked to yield or has ended at this moment

    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._now_s

    def launch(self, run: Run) -> None:
        """Start a run now.

        Raises ValueError as ``Executor.launch`` does, and for a sequence that has all its output.
        """
        check_launch(run, [flight.run for flight in self._flights()])
        now_s, allocation = self._now_s, run.allocation
        flight: PrefillFlight | DecodeFlight
        if run.phase is DECODE:
            flight, last = DecodeFlight(run, now_s), self._last_decode
            self._decode = flight
        else:
            flight = (MixedFlight if run.phase is FUSED else PrefillFlight)(run, now_s)
            self._prefill, last = flight, self._last_prefill
        continues = last is not None and flight.continues(last)
        if self._allocation is not None and allocation is not self._allocation and allocation != self._allocation:
            self._switched_s = now_s + self._switch_s
        self._allocation = allocation
        begin_s = max(now_s, self._switched_s) + (
            0.0 if continues else self._overheads.start_s(run.phase, len(run.requests))
        )
        if begin_s > now_s:
            flight.steps.begin_s = begin_s
        if self._variation is not None:
            flight.vary(self._variation, self._phase_steps[run.phase])
        self._look = self._look or not continues
        self._changed = True

    def yield_(self, run_id: int) -> None:
        """Ask the run to end at its first boundary from now on; no effect on a run that has ended."""
        for flight in self._flights():
            if flight.run.id == run_id:
                flight.stop(self._now_s)
                self._priced_to_s = min(self._priced_to_s, flight.priced_to_s)
                self._changed = True

    def steps_done(self, run_id: int) -> int:
        """Steps that a run in flight has completed by now. Raises KeyError for a run that is not in flight."""
        for flight in self._flights():
            if flight.run.id == run_id:
                return flight.steps.reached(self._now_s)
        raise KeyError(f"run {run_id} is not in flight")

    def wait(self, until_s: float | None) -> list[StepRecord]:
        """Go on until a run ends or ``until_s`` is reached; see ``Executor.wait``.

        Runs that end at the same moment are returned together, prefill first, and so are those that end at
        ``until_s``. A time that has passed returns what has ended by now.

        Raises KeyError when the cost model has no price for a run, and RuntimeError when nothing is in flight and
        ``until_s`` is None.
        """
        if until_s is None:
            if self._prefill is None and self._decode is None:
                raise RuntimeError("nothing is in flight and no time is given: this would wait for ever")
            until_s = math.inf
        while True:
            if self._priced_to_s <= self._now_s and (ended := self._collect()):
                return ended
            if until_s <= self._now_s:
                return []
            if self._changed or self._priced_to_s <= self._now_s:
                self._settle()
            else:
                self._go_on_to(min(self._priced_to_s, until_s))

    def _flights(self) -> list[PrefillFlight | DecodeFlight]:
        prefill, decode = self._prefill, self._decode
        if prefill is None:
            return [] if decode is None else [decode]
        return [prefill] if decode is None else [prefill, decode]

    def _collect(self) -> list[StepRecord]:
        """The records of the runs that have ended, which are no longer in flight then."""
        prefill, decode, ended = self._prefill, self._decode, []
        self._priced_to_s = math.inf
        if prefill is not None:
            if prefill.end_s <= self._now_s:
                self._prefill = None
                self._last_prefill = self._ended(prefill)
                ended.append(self._last_prefill)
            else:
                self._priced_to_s = prefill.priced_to_s
        if decode is not None:
            if decode.end_s <= self._now_s:
                self._decode = None
                self._last_decode = self._ended(decode)
                ended.append(self._last_decode)
            elif decode.priced_to_s < self._priced_to_s:
                self._priced_to_s = decode.priced_to_s
        if ended:
            self._changed = True
        return ended

    def _ended(self, flight: PrefillFlight | DecodeFlight) -> StepRecord:
        """What a run did. Raises InputError when that was outside the measured grid and is to be refused."""
        record = flight.record(self._cost)
        if self._variation is not None:
            self._phase_steps[record.run.phase] += record.steps
        if record.extrapolated and self._outside is not None:
            found = filter(None, (self._outside(*place) for place in flight.clamped()))
            raise InputError(f"strict: {record.run.phase.value} run {record.run.id}: {next(found)}")
        return record

    def _settle(self) -> None:
        """Price what is in flight, now that all that happens at this moment is known."""
        now_s, cost, prefill, decode = self._now_s, self._cost, self._prefill, self._decode
        if self._look:
            self._seen_prefill = prefill.shape if prefill is not None else None
            self._seen_decode = decode.shape(decode.steps.reached(now_s)) if decode is not None else None
        self._priced_to_s = math.inf
        if prefill is not None:
            prefill.go_on(now_s, cost, self._seen_decode if decode is not None else None)
            self._priced_to_s = prefill.priced_to_s
        if decode is not None:
            decode.go_on(now_s, cost, self._seen_prefill if prefill is not None else None)
            if decode.priced_to_s < self._priced_to_s:
                self._priced_to_s = decode.priced_to_s
        self._look = self._changed = False

    def _go_on_to(self, at_s: float) -> None:
        """Move the clock. Nothing happens until then: what ends, and when, is known of all that is in flight."""
        env = self._env
        Timeout(env, at_s - self._now_s)
        env.step()
        self._now_s = at_s


class Flight(ABC, Generic[Other]):
    """A run in flight: when its steps end at the present prices (``steps``), and what they are priced beside.

    ``priced_to_s``: the last boundary known. ``end_s``: the run's end, infinite while that is further than was priced.
    """

    __slots__ = (
        *(
            "_before",
            "_beside",
            "_clamped",
            "_extrapolated",
            "_first",
            "_lookups",
            "_outside",
            "_priced",
            "_start_s",
            "_variation",
        ),
        *("end_s", "priced_to_s", "run", "steps"),
    )

    def __init__(self, run: Run, now_s: float, steps: int) -> None:
        self.run = run
        self.steps = Boundaries(now_s, steps)
        self.priced_to_s, self.end_s = -math.inf, math.inf
        self._start_s = now_s
        self._first = 0  # step of the present stretch
        self._priced = 0  # look-ups of it
        self._outside = 0  # of these, outside the measured grid
        self._beside: Other | None = None
        self._lookups = 0
        self._extrapolated = 0
        self._clamped: tuple[int, int, Other | None] | None = None  # the first such steps, from and to, beside what
        self._variation: Variation | None = None
        self._before = 0

    def vary(self, variation: Variation, before: int) -> None:
        """Have times vary; the phase has done so many steps before."""
        self._variation, self._before = variation, before

    @abstractmethod
    def continues(self, last: StepRecord) -> bool:
        """Whether this run plainly goes on with what that one did."""

    @abstractmethod
    def price(self, cost: CostModel, first: int, steps: int, beside: Other | None) -> tuple[FloatArray | float, int]:
        """Seconds of so many steps from ``first`` on, or of every one, and how many look-ups are outside the grid."""

    @abstractmethod
    def finished(self, steps: int) -> tuple[int, ...]:
        """Ids of the requests that have their last token after so many steps."""

    @abstractmethod
    def place(self, step: int, beside: Other | None) -> Place:
        """Where a step, counted from 0, is looked up."""

    def clamped(self) -> list[Place]:
        """Of the first stretch with look-ups outside the grid the first and the last, one of which at least is so."""
        if self._clamped is None:
            return []
        first, last, beside = self._clamped
        return [self.place(first, beside), self.place(last, beside)]

    def go_on(self, now_s: float, cost: CostModel, beside: Other | None) -> None:
        """Have what is left priced beside this from now on."""
        steps = self.steps
        if now_s < self.priced_to_s and (beside is self._beside or beside == self._beside):
            return
        worked, first, left = steps.leave(now_s)
        if worked:
            self._count(cost, worked)
        self._beside, self._first, self._priced = beside, first, min(left, STRETCH_STEPS)
        seconds, self._outside = self.price(cost, first, self._priced, beside)
        if self._variation is not None:
            run, at = self.run, self._before + first
            seconds = seconds * self._variation.factors(run.phase, run.allocation, beside is not None, at, self._priced)
        if isinstance(seconds, float):
            self.priced_to_s, self.end_s = steps.price_evenly(seconds, self._priced)
        else:
            self.priced_to_s, self.end_s = steps.price(seconds)

    def stop(self, now_s: float) -> None:
        """Have the run end at its first boundary from now on."""
        self.priced_to_s, self.end_s = self.steps.stop(now_s)

    def record(self, cost: CostModel) -> StepRecord:
        """What the run did; it has ended."""
        ends_s = self.steps.ends_s()
        steps = len(ends_s)
        if worked := steps - self._first:
            self._count(cost, worked)
        return StepRecord(self.run, self._start_s, ends_s, self.finished(steps), self._lookups, self._extrapolated)

    def _count(self, cost: CostModel, steps: int) -> None:
        """Count the look-ups of so many steps of the present stretch, which were worked on."""
        self._lookups += steps
        if self._outside:
            first = self._first
            outside = self._outside if steps == self._priced else self.price(cost, first, steps, self._beside)[1]
            self._extrapolated += outside
            if outside and self._clamped is None:
                self._clamped = first, first + steps - 1, self._beside


class PrefillFlight(Flight[DecodeShape]):
    """Layers of one batch."""

    __slots__ = ("shape",)

    def __init__(self, run: Run, now_s: float) -> None:
        super().__init__(run, now_s, run.max_steps)
        self.shape = run.prefill_shape

    def continues(self, last: StepRecord) -> bool:
        """The same batch, at the moment at which it was stopped between two layers."""
        run, before = self.run, last.run
        return (
            last.end_s == self._start_s
            and last.steps < before.max_steps
            and run.allocation == before.allocation
            and run.requests == before.requests
            and run.context_lens == before.context_lens
            and run.new_tokens == before.new_tokens
        )

    def price(self, cost: CostModel, first: int, steps: int, beside: DecodeShape | None) -> tuple[float, int]:
        """The same for every layer."""
        del first
        seconds, outside = cost.prefill_s(self.shape, self.run.allocation, beside)
        return seconds, steps * outside

    def place(self, step: int, beside: DecodeShape | None) -> Place:
        """The same for every layer."""
        del step
        return self.shape, self.run.allocation, beside

    def finished(self, steps: int) -> tuple[int, ...]:
        """Requests whose prompt is complete and whose output is with one token more."""
        return () if steps < self.run.max_steps else finished_by_prefill(self.run)


class MixedFlight(PrefillFlight):
    """A fused step, which has the device for itself."""

    __slots__ = ()

    def price(self, cost: CostModel, first: int, steps: int, beside: DecodeShape | None) -> tuple[float, int]:
        """The one step, all layers."""
        del first, beside
        decode = self.run.decode_shape if self.run.decodes else None
        seconds, outside = cost.mixed_s(self.shape, decode)
        return seconds, steps * outside

    def place(self, step: int, beside: DecodeShape | None) -> Place:
        """The prompts, beside those that decode."""
        del step, beside
        return self.shape, self.run.allocation, self.run.decode_shape if self.run.decodes else None


class DecodeFlight(Flight[PrefillShape]):
    """Steps of one batch, up to the first that gives a sequence its last token."""

    __slots__ = ("_batch", "_cached", "_first_finish", "_left")

    def __init__(self, run: Run, now_s: float) -> None:
        self._left = output_left(run)
        self._first_finish = min(self._left)
        super().__init__(run, now_s, min(run.max_steps, self._first_finish))
        self._batch = len(run.requests)
        self._cached = sum(run.context_lens)

    def continues(self, last: StepRecord) -> bool:
        """The same sequences with the tokens they had when the last run ended, at that moment."""
        run, before = self.run, last.run
        return (
            last.end_s == self._start_s
            and run.allocation == before.allocation
            and run.requests == before.requests
            and self._cached == sum(before.context_lens) + self._batch * last.steps
        )

    def shape(self, step: int) -> DecodeShape:
        """The batch in a step, counted from 0."""
        return DecodeShape(self._batch, self._cached + self._batch * (step + 1))

    def price(self, cost: CostModel, first: int, steps: int, beside: PrefillShape | None) -> tuple[FloatArray, int]:
        """Each step reads one token more of every sequence."""
        return cost.decode_s(self.shape(first), self.run.allocation, beside, steps)

    def place(self, step: int, beside: PrefillShape | None) -> Place:
        """With the KV tokens that the step reads."""
        return self.shape(step), self.run.allocation, beside

    def finished(self, steps: int) -> tuple[int, ...]:
        """Requests whose last token comes with that step."""
        if steps < self._first_finish:
            return ()
        return tuple([r.id for r, n in zip(self.run.requests, self._left, strict=True) if n == steps])
