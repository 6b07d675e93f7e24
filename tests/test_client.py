"""Sessions in closed loop: what is sent when, whatever becomes of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from synthetic_profile import write_profile
from test_laws import Scenario, scenarios

from semipd.cli import main
from semipd.client import Client, ClosedLoop
from semipd.core import Request, StepRecord
from semipd.cost import ConstantCost
from semipd.driver import replay
from semipd.log import Log
from semipd.metrics import request_table, summarise
from semipd.policies import make_policy
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor
from semipd.slo import Slo
from semipd.trace import Sessions, Trace

COST = ConstantCost(prefill_layer_s=0.25, decode_step_s=0.5, layers=2)  # a prompt takes 0.5 s, and so does a token


def trace_of(rows: list[tuple[float, int, int, int, float]]) -> Trace:
    """Rows of arrival, prompt and output tokens, session (-1: none) and delay."""
    arrival_s, prompt_len, output_len, index, delay_s = (np.array(column) for column in zip(*rows, strict=True))
    sessions = Sessions.of(index, delay_s.astype(np.float64), tuple(str(i) for i in range(index.max() + 1)))
    return Trace("t", arrival_s, prompt_len, output_len, "made", len(rows), sessions=sessions)


def play(trace: Trace, num_blocks: int = 100) -> tuple[ClosedLoop, Scheduler, list[StepRecord]]:
    config = SchedulerConfig(num_blocks=num_blocks)
    policy = make_policy("exclusive", COST, Slo(1, 1))
    scheduler = Scheduler(config, policy, device_sms=COST.device_sms, layers=COST.layers)
    loop = ClosedLoop(trace)
    return loop, scheduler, list(replay(loop, scheduler, SimExecutor(COST)))


def test_a_turn_is_sent_its_delay_after_the_one_before_got_its_last_token() -> None:
    rows = [(0.0, 5, 3, 0, math.nan), (0.125, 5, 1, 0, 2.0), (0.25, 5, 1, 0, 0.0)]
    loop, _, records = play(trace_of(rows))
    assert loop.sent_s.tolist() == [0.0, 1.5 + 2.0, 4.0]  # 0.5 s prefill and two tokens; 0.5 s prefill
    assert [r.end_s for r in records] == [0.5, 1.5, 4.0, 4.5]


def test_a_turn_of_unknown_delay_is_sent_when_it_arrives_but_not_before_the_one_before_has_ended() -> None:
    rows = [(0.0, 5, 3, 0, math.nan), (1.0, 5, 1, 0, math.nan), (7.0, 5, 1, 0, math.nan)]
    assert play(trace_of(rows))[0].sent_s.tolist() == [0.0, 1.5, 7.0]


def test_first_turns_and_requests_without_session_are_sent_when_they_arrive() -> None:
    rows = [(0.0, 5, 9, 0, math.nan), (0.5, 5, 9, -1, math.nan), (0.5, 5, 9, -1, math.nan), (0.75, 5, 9, 1, math.nan)]
    assert play(trace_of(rows))[0].sent_s.tolist() == [0.0, 0.5, 0.5, 0.75]


def test_a_session_goes_on_after_a_turn_that_was_dropped() -> None:
    rows = [
        (0.0, 1000, 1, 0, math.nan),  # never fits 2 blocks of 16 tokens
        (0.0, 30, 100, 0, 1.0),  # outgrows them: prefill at 1.0, then its 3rd token has no room at 2.5
        (0.0, 5, 1, 0, 1.0),
    ]
    loop, scheduler, records = play(trace_of(rows), num_blocks=2)
    assert [request.id for request, _ in scheduler.dropped] == [0, 1]
    assert loop.sent_s.tolist() == [0.0, 1.0, 3.5]
    assert records[-1].finished == (2,)


def test_latencies_count_from_when_a_request_was_sent_and_the_table_is_in_that_order() -> None:
    rows = [(0.0, 5, 3, 0, math.nan), (0.125, 5, 1, 0, 2.0), (0.75, 5, 1, -1, math.nan)]
    trace = trace_of(rows)
    loop, _, records = play(trace)
    log = Log()
    for record in records:
        log.append(record)
    table = request_table(log, trace, loop.sent_s)
    assert table.id.tolist() == [0, 2, 1]
    assert np.all(np.diff(table.arrival_s) >= 0)
    assert table.ttft_s.tolist() == [0.5, 0.75, 0.5]  # the second has to wait for a decode step
    summary = summarise(log, trace, sent_s=loop.sent_s, policy="exclusive", slo=Slo(1, 1))
    assert (summary.requests, summary.completed) == (3, 3)


def test_a_request_that_was_never_sent_is_not_counted() -> None:
    trace = trace_of([(0.0, 5, 3, 0, math.nan), (0.125, 5, 1, 0, 2.0)])
    assert summarise(Log(), trace, sent_s=np.array([0.0, np.nan]), policy="p", slo=Slo(1, 1)).requests == 1


def test_on_a_clock_that_has_gone_on_requests_are_still_sent_in_order() -> None:
    loop = ClosedLoop(trace_of([(0.0, 1, 1, 0, math.nan), (0.0, 1, 1, 0, 0.5), (9.0, 1, 1, -1, math.nan)]))
    first, other = loop.send(), loop.send()
    loop.ended(first.id, at_s=2.0)  # learned of after the other was sent at 9
    assert (other.arrival_s, loop.send().arrival_s) == (9.0, 9.0)
    assert loop.upcoming is None


def test_without_sessions_there_is_no_closed_loop() -> None:
    trace = Trace("plain", np.zeros(1), np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64), "made", 1)
    with pytest.raises(ValueError, match="plain has no sessions"):
        ClosedLoop(trace)


def test_nothing_can_be_sent_when_nothing_is_upcoming() -> None:
    with pytest.raises(ValueError, match="no request is upcoming"):
        Client([]).send()


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Scenario, Trace]:
    scenario = draw(scenarios())
    n = len(scenario.requests)
    index = draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    delay_s = draw(st.lists(st.sampled_from([0.0, 0.5, 2.0, math.nan]), min_size=n, max_size=n))
    first_s = scenario.requests[0].arrival_s
    rows = [(r.arrival_s - first_s, r.prompt_len, r.output_len) for r in scenario.requests]
    made = trace_of([(*row, i, d) for row, i, d in zip(rows, [0, *index[1:]], delay_s, strict=True)])
    return scenario, made


@settings(max_examples=200, deadline=None)
@given(sessions())
def test_whatever_happens_every_turn_is_sent_once_and_its_delay_after_the_end_of_the_one_before(
    made: tuple[Scenario, Trace],
) -> None:
    scenario, trace = made
    loop, scheduler = ClosedLoop(trace), scenario.scheduler()
    ended: dict[int, float] = {}
    executor = scenario.executor()
    for record in replay(loop, scheduler, executor):
        ended.update(dict.fromkeys(record.finished, record.end_s))
    dropped = {request.id for request, _ in scheduler.dropped}
    assert sorted([*ended, *dropped]) == list(range(len(trace)))
    found = trace.sessions
    assert found is not None
    for i in range(len(trace)):
        before = [j for j in range(i) if found.index[j] == found.index[i] >= 0]
        if not before:
            assert loop.sent_s[i] == trace.arrival_s[i]
        elif before[-1] in ended:  # when one is dropped nobody notes the time
            end_s, delay_s = ended[before[-1]], found.delay_s[i]
            assert loop.sent_s[i] == (max(end_s, trace.arrival_s[i]) if math.isnan(delay_s) else end_s + delay_s)
        else:
            assert loop.sent_s[i] >= loop.sent_s[before[-1]]


@settings(max_examples=50, deadline=None)
@given(scenarios())
def test_a_closed_loop_without_a_second_turn_is_the_open_loop(scenario: Scenario) -> None:
    first_s = scenario.requests[0].arrival_s
    requests = [replace(r, arrival_s=r.arrival_s - first_s) for r in scenario.requests]
    trace = trace_of([(r.arrival_s, r.prompt_len, r.output_len, i, math.nan) for i, r in enumerate(requests)])

    def log(client: list[Request] | ClosedLoop) -> list[tuple[float, list[float]]]:
        records = replay(client, scenario.scheduler(), scenario.executor())
        return [(record.start_s, record.ends_s.tolist()) for record in records]

    assert log(requests) == log(ClosedLoop(trace))


def replay_file(tmp_path: Path, rows: list[dict[str, object]], **changed: object) -> Path:
    path, config = tmp_path / "t.jsonl", tmp_path / "replay.yaml"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document: dict[str, object] = {
        "trace": {"path": str(path), "closed_loop": True},
        "profile": str(write_profile(tmp_path / "p")),
        "policy": "static-16",
        "slo": {"ttft_s": 1.0, "tpot_s": 1.0},
    }
    config.write_text(json.dumps(document | changed))
    return config


def turns(n: int) -> list[dict[str, object]]:
    """Two sessions of n turns each, whose stamps would have all of them sent at once."""
    return [
        {"session_id": name, "timestamp": 0, "input_length": 20, "output_length": 5} | ({"delay": 30} if turn else {})
        for name in "ab"
        for turn in range(n)
    ]


def saved_requests(run: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = parquet.read_table(run / "requests.parquet").to_pylist()
    return found


@pytest.mark.parametrize("executor", ["sim", "cpu"])
def test_every_executor_can_be_driven_in_closed_loop(tmp_path: Path, executor: str) -> None:
    if executor == "cpu":
        pytest.importorskip("torch")
    tiny = Path(__file__).parent.parent / "configs" / "models" / "tiny.yaml"
    config = replay_file(tmp_path, turns(4), model=str(tiny), scheduler={"num_blocks": 200})
    assert main(["replay", str(config), "--executor", executor, "--out", str(tmp_path / "r")]) == 0
    found = {row["id"]: row for row in saved_requests(tmp_path / "r")}
    assert len(found) == 8
    for session in (range(4), range(4, 8)):
        assert found[session[0]]["arrival_s"] == 0
        for before, turn in pairwise(session):
            delay_s = found[turn]["arrival_s"] - found[before]["finish_s"]
            assert delay_s == pytest.approx(0.03) if executor == "sim" else delay_s >= 0.03 - 1e-9


def test_the_report_says_that_the_loop_was_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replay_file(tmp_path, turns(3))
    assert main(["replay", str(config)]) == 0
    assert "closed loop: a turn waits for the one before" in " ".join(capsys.readouterr().out.split())


def test_a_closed_loop_without_sessions_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replay_file(tmp_path, [{"timestamp": 0, "input_length": 20, "output_length": 5}])
    assert main(["replay", str(config)]) == 2
    assert capsys.readouterr().err == (
        "error: trace.closed_loop: found true, but t has no sessions; expected a trace with some\n"
    )
