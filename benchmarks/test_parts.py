"""What each part of a replay takes alone, fed with what it was told in a real one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from conftest import Tape
from pytest_benchmark.fixture import BenchmarkFixture

from semipd.log import Log
from semipd.metrics import summarise
from semipd.replay import simulate
from semipd.sim import SimExecutor


def play(part: object, calls: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
    for name, args in calls:
        getattr(part, name)(*args)


def logged(tape: Tape) -> Log:
    log = Log()
    for record in tape.records:
        log.append(record)
    return log


def test_the_scheduler_alone(benchmark: BenchmarkFixture, tape: Tape) -> None:
    benchmark(lambda: play(tape.new_scheduler(), tape.scheduler))


def test_the_simulation_alone(benchmark: BenchmarkFixture, tape: Tape) -> None:
    benchmark(lambda: play(SimExecutor(tape.setup.cost), tape.sim))


def test_the_log_alone(benchmark: BenchmarkFixture, tape: Tape) -> None:
    assert benchmark(logged, tape).tokens > 0


def test_the_summary_alone(benchmark: BenchmarkFixture, tape: Tape) -> None:
    summary = benchmark(summarise, logged(tape), tape.setup.trace, policy="static-64", slo=tape.setup.slo)
    assert summary.completed == len(tape.setup.trace)


def test_the_whole_replay(benchmark: BenchmarkFixture, tape: Tape) -> None:
    outcome = benchmark(simulate, tape.setup, "static-64")
    assert outcome.summary.completed == len(tape.setup.trace)
