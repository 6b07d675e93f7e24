"""How long steps take on an executor: the very runs that a scheduler launches, alone or beside the other phase.

Works with any ``Executor``. What is timed is a *steady state*: runs of a phase follow one another at once, and a step
counts only if the other phase, where there is one, was in flight while it lasted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from semipd.core import (
    Allocation,
    FloatArray,
    Phase,
    Request,
    Run,
    StepRecord,
)
from semipd.executor import Executor
from semipd.points import Spread
from semipd.ragged import Decodes, Prompts

DECODE_STEPS = 8  # of a decode run; the next one is of the same batch with the same cached tokens
FIRST_DECODE_ID = 1 << 40  # request ids; those of prompts count from 0
TICK_S = 0.001
STEPS = 3  # wanted of each phase
FEW_STEPS = 2  # are enough when they take so long that the time is up
BLOCKS = 5
COVERED = 0.8  # of a step's time the other phase has to be in flight
BARELY_COVERED = 0.5  # where its runs are so short that no step is covered better
TRIES = 2
UNSTEADY = 0.1  # half of p10 to p90 over the median: something may have come between
WHOLE_RUNS = 3
START_RUNS = 7
SETTLED = 40  # groups of small runs, none of which was faster than those before


@dataclass(frozen=True)
class Steps:
    """Steps one after the other, with gaps between runs: when each began and ended, shape [n] each."""

    starts_s: FloatArray
    ends_s: FloatArray

    @property
    def times_s(self) -> FloatArray:
        """How long each took."""
        return self.ends_s - self.starts_s

    def where(self, chosen: npt.NDArray[np.bool_]) -> Steps:
        """Those for which ``chosen`` is true."""
        return Steps(self.starts_s[chosen], self.ends_s[chosen])


@dataclass(frozen=True)
class SteadyLoad:
    """Runs one after the other, by phase, and the time from which on they count."""

    records: dict[Phase, list[StepRecord]]
    settled_s: float


def inner_steps(records: list[StepRecord], layers: int) -> Steps:
    """The steps that a run's start and end are not part of.

    That is all but the first, which waits for the host to get the run going, and but the last layer of a whole prefill
    run, which samples. A prefill run of fewer than three layers has no other ones: all of its steps count, from the
    launch on.
    """
    starts, ends = [], []
    for record in records:
        bounds = np.concatenate(([record.start_s], record.ends_s))
        first, stop = 1, record.steps
        if record.run.phase is Phase.PREFILL:
            if layers < 3:
                first = 0
            elif record.steps == layers:
                stop -= 1
        starts.append(bounds[first:stop])
        ends.append(bounds[first + 1 : stop + 1])
    return Steps(np.concatenate(starts), np.concatenate(ends))


def covered_share(steps: Steps, others: list[StepRecord]) -> FloatArray:
    """Which share of each step's time runs of the other phase were in flight, from their launch to their last step."""
    share = np.zeros(len(steps.starts_s))
    for other in others:
        share += np.maximum(np.minimum(steps.ends_s, other.end_s) - np.maximum(steps.starts_s, other.start_s), 0.0)
    return share / np.maximum(steps.times_s, 1e-12)


def covered(steps: Steps, others: list[StepRecord]) -> Steps:
    """The steps during which the other phase was in flight, but for the short gaps between two of its runs."""
    share = covered_share(steps, others)
    enough = COVERED if np.count_nonzero(share >= COVERED) >= FEW_STEPS else BARELY_COVERED
    return steps.where(share >= enough)


def spread_of(times_ms: FloatArray) -> Spread:
    """Spread of a step's time over blocks of consecutive steps, which count by their mean.

    Steps beside another phase alternate between fast and slow as its kernels and its host work come and go: their mean
    is what a run's price is made of. The median over blocks leaves out what happened once.
    """
    blocks = np.array_split(times_ms, min(BLOCKS, len(times_ms)))
    of_blocks = Spread.of(np.array([block.mean() for block in blocks]))
    return Spread(len(times_ms), of_blocks.median_ms, of_blocks.p10_ms, of_blocks.p90_ms)


Spreads = TypeVar("Spreads", bound=tuple[Spread, ...])


def _steadier(measure: Callable[[int], Spreads]) -> Spreads:
    """A measurement; where it varies a lot, that or another one for twice as long, whichever varies less.

    On a machine that others use, too, the host may be held up for a tenth of a second.
    """

    def unsteady(spreads: Spreads) -> float:
        return max((each.p90_ms - each.p10_ms) / 2 / max(each.median_ms, 1e-9) for each in spreads)

    found = measure(1)
    if unsteady(found) <= UNSTEADY:
        return found
    with suppress(RuntimeError):  # what could be measured is enough
        found = min(found, measure(2), key=unsteady)
    return found


class Stopwatch:
    """Times steps on an executor that has nothing else to do. Results are milliseconds of one layer.

    What varies by more than ``UNSTEADY`` is measured twice.

    A prefill layer's time is that of the layers between the first and the last, and its part of the last one's
    surplus (final norm, logits, sampling), which is measured once for each partition: so a run's price is its layers
    times that. What a run takes until its first step begins is in no step; see ``start_ms`` and ``decode_start_s``.

    Args:
        executor: Where runs are launched.
        layers: Of the model.
        forget: Told the ids of requests that will not go on.
        settle_s: Load before the steps that count, of one phase on a part of the SMs.
        limited_settle_s: The same of what may reach the device's power limit, where clocks take longer to settle: both
            phases, or prefill on at least half of the SMs. As ``settle_s`` if not given.
        rest_share: After such a load the device rests for so many times as long as it was under it: one whose power is
            at the limit for a second clocks lower from then on, by no fixed amount.
        measure_s: Load with steps that count, at least.
        limit_s: After which a few steps have to do.
    """

    def __init__(
        self,
        executor: Executor,
        layers: int,
        *,
        forget: Callable[[tuple[int, ...]], None] = lambda ids: None,  # noqa: ARG005 - nothing is kept
        settle_s: float = 0.02,
        limited_settle_s: float | None = None,
        rest_share: float = 0.0,
        measure_s: float = 0.05,
        limit_s: float = 0.4,
    ) -> None:
        self.layers = layers
        self._executor, self._forget = executor, forget
        self._settle_s, self._measure_s, self._limit_s = settle_s, measure_s, limit_s
        self._limited_settle_s = settle_s if limited_settle_s is None else limited_settle_s
        self._rest_share = rest_share
        self._runs = 0
        self._sampling_s: dict[Allocation, float] = {}
        self._starts_s: dict[Phase, list[float]] = {phase: [] for phase in Phase}

    def prefill(self, batch: Prompts, at: Allocation) -> Spread:
        """A layer of the batch, alone on its partition."""
        sampling_s = self._sampling(at)
        limited, make = at.prefill_sms >= at.decode_sms, self._prefill(batch, at)

        def measure(longer: int) -> tuple[Spread]:
            times_s = self._alone(Phase.PREFILL, make, limited, longer)
            return (spread_of((times_s + sampling_s / self.layers) * 1e3),)

        return _steadier(measure)[0]

    def decode(self, batch: Decodes, at: Allocation) -> Spread:
        """A layer of a decode step, alone on its partition."""
        make = self._decode(batch, at)

        def measure(longer: int) -> tuple[Spread]:
            times_s = self._alone(Phase.DECODE, make, limited=False, longer=longer)
            return (spread_of(times_s / self.layers * 1e3),)

        return _steadier(measure)[0]

    def both(self, prefill: Prompts, decode: Decodes, at: Allocation) -> tuple[Spread, Spread]:
        """A layer of each phase while the other runs.

        Raises RuntimeError when they could not be kept running together.
        """
        sampling_s = self._sampling(at)
        works = {Phase.DECODE: self._decode(decode, at), Phase.PREFILL: self._prefill(prefill, at)}

        def measure(longer: int) -> tuple[Spread, Spread]:
            for tries in range(longer, longer + TRIES):
                load = self._limited(works, longer=tries)
                records = load.records
                pairs = ((Phase.PREFILL, Phase.DECODE), (Phase.DECODE, Phase.PREFILL))
                found = {phase: covered(self._settled(load, phase), records[other]).times_s for phase, other in pairs}
                if min(map(len, found.values())) >= FEW_STEPS:
                    break
            if min(map(len, found.values())) == 0:
                raise RuntimeError(f"at {at.name} the two phases could not be kept running together")
            return (
                spread_of((found[Phase.PREFILL] + sampling_s / self.layers) * 1e3),
                spread_of(found[Phase.DECODE] / self.layers * 1e3),
            )

        return _steadier(measure)

    def mixed(self, prefill: Prompts, decode: Decodes, at: Allocation) -> Spread:
        """A fused step of both, divided by the layers; from its launch on, as every step is a run of its own."""
        make = self._mixed(prefill, decode, at)

        def measure(longer: int) -> tuple[Spread]:
            load = self._limited({Phase.MIXED: make}, longer)
            records = load.records[Phase.MIXED]
            gaps = [after.start_s - before.end_s for before, after in pairwise(records)]
            self._starts_s[Phase.MIXED] += gaps
            settled = [r for r in records if r.start_s >= load.settled_s]
            times_s = np.array([r.end_s - r.start_s for r in settled or records[1:]])
            return (spread_of(times_s / self.layers * 1e3),)

        return _steadier(measure)[0]

    def whole_s(self, batch: Prompts, at: Allocation) -> float:
        """Median seconds of a prefill run as a whole, from its launch to its end, its planning by the host included."""
        records = [self._whole_run(self._prefill(batch, at)) for _ in range(1 + WHOLE_RUNS)]
        return float(np.median([record.end_s - record.start_s for record in records[1:]]))

    def settle_host(self, batch: Prompts, at: Allocation, limit_s: float) -> None:
        """Repeat small runs, which wait for the host, until they get no faster; at most for so long.

        A process's first seconds are slow: memory is touched, code loaded and compiled kernels fetched for the first
        time.
        """
        begun_s = self._executor.now()
        recent: list[float] = []
        while self._executor.now() - begun_s < limit_s:
            recent.append(self.whole_s(batch, at))
            if len(recent) > SETTLED and min(recent[-SETTLED:]) > 0.98 * min(recent[:-SETTLED]):
                return

    def switch_s(self, batch: Prompts, one: Allocation, other: Allocation, times: int = 10) -> float:
        """What the start of a prefill run takes longer, in the median, after a run at another allocation.

        Zero when it takes no longer.
        """
        starts_s = {}
        for pair in ((one, one), (one, other)):
            records = [self._whole_run(self._prefill(batch, at)) for at in pair * times]
            starts_s[pair] = float(np.median(_starts_s(records) or [0.0]))
        return max(0.0, starts_s[one, other] - starts_s[one, one])

    def decode_start_s(self, batch: Decodes, at: Allocation) -> float:
        """Median seconds from the end of a decode run to where the first step of the next one begins.

        Taken over whole runs: under a steady load of long steps, no run may end.
        """
        records = [self._whole_run(self._decode(batch, at)) for _ in range(1 + START_RUNS)]
        self._give_up({Phase.DECODE: records})
        return max(0.0, float(np.median(_starts_s(records))))

    def start_ms(self, phase: Phase) -> float:
        """Median time that passed between two runs, of prefill or fused, that is in no step; 0 when none was seen."""
        found = self._starts_s[phase]
        return max(0.0, round(float(np.median(found)) * 1e3, 6)) if found else 0.0

    def _sampling(self, at: Allocation) -> float:
        """Seconds that the last layer takes longer than another one, on the partition of prefill."""
        if at not in self._sampling_s:
            surplus: list[float] = []
            if self.layers >= 3:
                batch = Prompts((16,), (0,))
                self._whole_run(self._prefill(batch, at))  # what is made at first use
                for _ in range(STEPS):
                    times_s = np.diff(self._whole_run(self._prefill(batch, at)).ends_s)
                    surplus.append(times_s[-1] - np.mean(times_s[:-1]))
            self._sampling_s[at] = max(0.0, float(np.median(surplus))) if surplus else 0.0
        return self._sampling_s[at]

    def _alone(self, phase: Phase, make: Callable[[int], Run], limited: bool, longer: int) -> FloatArray:
        """Times of the steps that count of a phase alone; what lies between runs of prefill is noted."""
        works = {phase: make}
        load = self._limited(works, longer) if limited else self._steady(works, self._settle_s, longer)
        if phase is Phase.PREFILL and self.layers >= 3:
            self._starts_s[phase] += _starts_s(load.records[phase])
        return self._settled(load, phase).times_s

    def _limited(self, works: Mapping[Phase, Callable[[int], Run]], longer: int = 1) -> SteadyLoad:
        """A steady load that may reach the power limit, and the rest after it."""
        begun_s = self._executor.now()
        load = self._steady(works, self._limited_settle_s, longer)
        ended_s = self._executor.now()
        while self._executor.now() < ended_s + self._rest_share * (ended_s - begun_s):
            self._executor.wait(ended_s + self._rest_share * (ended_s - begun_s))
        return load

    def _settled(self, load: SteadyLoad, phase: Phase) -> Steps:
        """The steps that count, so far as the other phase has no say: after the load has settled, if any do."""
        steps = inner_steps(load.records[phase], self.layers)
        late = steps.where(steps.starts_s >= load.settled_s)
        return late if len(late.starts_s) else steps

    def _whole_run(self, make: Callable[[int], Run]) -> StepRecord:
        self._executor.launch(make(self._next()))
        while not (records := self._executor.wait(None)):
            pass
        return records[0]

    def _steady(self, works: Mapping[Phase, Callable[[int], Run]], settle_s: float, longer: int = 1) -> SteadyLoad:
        """Keep a run of each phase in flight until enough steps were seen, and then stop, the slower phase first.

        The load settles from when every phase was fed: before, batches of a new size are captured.
        """
        executor = self._executor
        records: dict[Phase, list[StepRecord]] = {phase: [] for phase in works}
        flying: dict[Phase, Run] = {}
        to_stop: list[Phase] = []
        stopped: set[Phase] = set()

        def launch(phase: Phase) -> None:
            flying[phase] = works[phase](self._next())
            executor.launch(flying[phase])

        def seen(phase: Phase) -> int:
            return sum(map(_countable, records[phase])) + max(0, executor.steps_done(flying[phase].id) - 1)

        for phase in works:
            launch(phase)
        fed_s: float | None = None
        settled: dict[Phase, int] | None = None
        while flying:
            ended = executor.wait(executor.now() + TICK_S)
            fed_s = executor.now() if fed_s is None else fed_s
            for record in ended:
                phase = record.run.phase
                records[phase].append(record)
                del flying[phase]
                if phase not in stopped:
                    launch(phase)
            elapsed_s = executor.now() - fed_s
            if not to_stop and elapsed_s >= settle_s:
                settled = settled or {phase: seen(phase) for phase in works}
                fresh = {phase: seen(phase) - settled[phase] for phase in works}
                wanted = FEW_STEPS if elapsed_s >= settle_s + longer * self._limit_s else STEPS
                if elapsed_s >= settle_s + longer * self._measure_s and min(fresh.values()) > wanted:
                    to_stop = sorted(works, key=lambda phase: fresh[phase])
            if to_stop and not flying.keys() & stopped and len(stopped) < len(to_stop):
                phase = to_stop[len(stopped)]
                stopped.add(phase)
                executor.yield_(flying[phase].id)
        self._give_up(records)
        return SteadyLoad(records, settle_s + (fed_s or 0.0))

    def _give_up(self, records: Mapping[Phase, list[StepRecord]]) -> None:
        finished = {request for found in records.values() for record in found[-1:] for request in record.finished}
        last = [request.id for found in records.values() for request in found[-1].run.requests]
        if unfinished := tuple(request for request in last if request not in finished):
            self._forget(unfinished)

    def _next(self) -> int:
        self._runs += 1
        return self._runs

    def _prefill(self, batch: Prompts, at: Allocation) -> Callable[[int], Run]:
        requests, new, context = _prompt_requests(batch), batch.new_tokens, batch.context_lens
        emits = (True,) * len(new)
        return lambda run: Run(run, Phase.PREFILL, requests, new, context, at.prefill_sms, self.layers, at, emits)

    def _decode(self, batch: Decodes, at: Allocation) -> Callable[[int], Run]:
        # The steps that count are the second to the last: the one in their middle has the lengths of the batch.
        cached = tuple(max(1, length - 1 - DECODE_STEPS // 2) for length in batch.lengths)
        requests, ones = _decode_requests(cached), (1,) * len(cached)
        return lambda run: Run(run, Phase.DECODE, requests, ones, cached, at.decode_sms, DECODE_STEPS, at)

    def _mixed(self, prefill: Prompts, decode: Decodes, at: Allocation) -> Callable[[int], Run]:
        cached = tuple(max(1, length - 1) for length in decode.lengths)
        requests = _decode_requests(cached) + _prompt_requests(prefill)
        new, context = (1,) * len(cached) + prefill.new_tokens, cached + prefill.context_lens
        emits = (True,) * len(requests)
        return lambda run: Run(
            run, Phase.MIXED, requests, new, context, at.prefill_sms, 1, at, emits, decodes=len(cached)
        )


def _starts_s(records: list[StepRecord]) -> list[float]:
    """Seconds between runs that are in no step: from one's end to the next one's first step's, less a later step's."""
    return [
        float(after.ends_s[0] - before.end_s - np.median(np.diff(after.ends_s)))
        for before, after in pairwise(records)
        if after.steps > 1
    ]


def _countable(record: StepRecord) -> int:
    """Steps that ``inner_steps`` may find; of a fused batch its one step."""
    return record.steps if record.run.phase is Phase.MIXED else max(1, record.steps - 1)


def _prompt_requests(batch: Prompts) -> tuple[Request, ...]:
    """Requests that are done when their prompt is."""
    lens = zip(batch.new_tokens, batch.context_lens, strict=True)
    return tuple([Request(i, 0.0, new + context, 1) for i, (new, context) in enumerate(lens)])


def _decode_requests(cached: tuple[int, ...]) -> tuple[Request, ...]:
    """Requests that go on after a run."""
    return tuple([Request(FIRST_DECODE_ID + i, 0.0, n, DECODE_STEPS + 2) for i, n in enumerate(cached)])
