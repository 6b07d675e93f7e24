"""What the benchmarks replay, and tapes of what the parts of that replay told each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from semipd.compare import Setup, prepare
from semipd.config import CompareConfig, TraceConfig
from semipd.core import Request, Run, StepRecord
from semipd.driver import replay
from semipd.policies import make_policy
from semipd.scheduler import Plan, Scheduler
from semipd.sim import SimExecutor

POLICY = "static-64"


@dataclass
class Tape:
    """One replay: the calls of its parts in order, each a method's name and arguments, and its records."""

    setup: Setup
    sim: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    scheduler: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)

    def new_scheduler(self) -> Scheduler:
        """A scheduler like the taped one."""
        cost = self.setup.cost
        policy = make_policy(POLICY, cost, self.setup.slo)
        return Scheduler(self.setup.scheduler, policy, device_sms=cost.device_sms, layers=cost.layers)


class TapedExecutor(SimExecutor):
    """A simulation that notes what it is asked."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape.setup.cost)
        self._tape = tape.sim

    def launch(self, run: Run) -> None:
        self._tape.append(("launch", (run,)))
        super().launch(run)

    def yield_(self, run_id: int) -> None:
        self._tape.append(("yield_", (run_id,)))
        super().yield_(run_id)

    def steps_done(self, run_id: int) -> int:
        self._tape.append(("steps_done", (run_id,)))
        return super().steps_done(run_id)

    def wait(self, until_s: float | None) -> list[StepRecord]:
        self._tape.append(("wait", (until_s,)))
        return super().wait(until_s)


class TapedScheduler(Scheduler):
    """A scheduler that notes what it is told; ``steps_done`` with the answers it got."""

    def __init__(self, tape: Tape) -> None:
        cost = tape.setup.cost
        policy = make_policy(POLICY, cost, tape.setup.slo)
        super().__init__(tape.setup.scheduler, policy, device_sms=cost.device_sms, layers=cost.layers)
        self._tape = tape.scheduler

    def add(self, request: Request) -> None:
        self._tape.append(("add", (request,)))
        super().add(request)

    def schedule(self, now_s: float, steps_done: Callable[[int], int]) -> Plan:
        answers: dict[int, int] = {}

        def noted(run_id: int) -> int:
            answers[run_id] = steps_done(run_id)
            return answers[run_id]

        self._tape.append(("schedule", (now_s, answers.__getitem__)))
        return super().schedule(now_s, noted)

    def complete(self, record: StepRecord) -> None:
        self._tape.append(("complete", (record,)))
        super().complete(record)


def taped(trace: TraceConfig) -> Tape:
    """Replay a trace and note everything."""
    tape = Tape(prepare(CompareConfig(trace=trace)))
    tape.records.extend(replay(tape.setup.trace.requests(), TapedScheduler(tape), TapedExecutor(tape)))
    return tape


@pytest.fixture(scope="session")
def tape() -> Tape:
    """The shipped comparison: the shipped trace at eight times its rate."""
    return taped(CompareConfig().trace)
