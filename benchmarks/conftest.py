"""What the benchmarks replay, and tapes of what the parts of that replay told each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from semipd.config import CompareConfig, TraceConfig
from semipd.core import StepRecord
from semipd.policies import make_policy
from semipd.replay import Setup, prepare
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


class Noted:
    """An object that notes the calls of its methods on a tape."""

    def __init__(self, of: Any, tape: list[tuple[str, tuple[Any, ...]]]) -> None:
        self._of, self._tape = of, tape

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            self._tape.append((name, args))
            return getattr(self._of, name)(*args)

        return called


def taped(trace: TraceConfig) -> Tape:
    """Replay a trace and note everything; of ``steps_done``, which the scheduler is given, the answers it got."""
    tape = Tape(prepare(CompareConfig(trace=trace)))
    executor, plain = Noted(SimExecutor(tape.setup.cost), tape.sim), tape.new_scheduler()
    scheduler, coming = Noted(plain, tape.scheduler), deque(tape.setup.trace.requests())

    def schedule(now_s: float) -> Plan:
        answers: dict[int, int] = {}

        def noted(run_id: int) -> int:
            answers[run_id] = executor.steps_done(run_id)
            return answers[run_id]

        tape.scheduler.append(("schedule", (now_s, answers.__getitem__)))
        return plain.schedule(now_s, noted)

    while coming or plain.has_unfinished():  # as driver.replay does
        now_s = executor.now()
        while coming and coming[0].arrival_s <= now_s:
            scheduler.add(coming.popleft())
        plan = schedule(now_s)
        for run_id in plan.yields:
            executor.yield_(run_id)
        for run in plan.launches:
            executor.launch(run)
        at_once = plan.yields and not plain.drains
        for record in executor.wait(now_s if at_once else coming[0].arrival_s if coming else None):
            scheduler.complete(record)
            tape.records.append(record)
    return tape


@pytest.fixture(scope="session")
def tape() -> Tape:
    """The shipped comparison: the shipped trace at eight times its rate."""
    return taped(CompareConfig().trace)
