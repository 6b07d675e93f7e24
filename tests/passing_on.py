"""An executor that passes everything on to another one: what is to be watched or changed on the way is overridden."""

from __future__ import annotations

from semipd.core import Run, StepRecord
from semipd.executor import Executor


class PassingOn:
    def __init__(self, to: Executor) -> None:
        self.to = to

    def now(self) -> float:
        return self.to.now()

    def launch(self, run: Run) -> None:
        self.to.launch(run)

    def yield_(self, run_id: int) -> None:
        self.to.yield_(run_id)

    def steps_done(self, run_id: int) -> int:
        return self.to.steps_done(run_id)

    def wait(self, until_s: float | None) -> list[StepRecord]:
        return self.to.wait(until_s)
