"""What a replay was bound by, on cases made for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from synthetic_profile import write_profile
from test_laws import Scenario, scenarios

from semipd.core import Allocation, Mode, Phase, Request
from semipd.cost import ConstantCost
from semipd.diagnosis import Blocked, Bound, DecodeTime, time_shares
from semipd.driver import replay
from semipd.log import Log
from semipd.metrics import request_table
from semipd.policies import make_policy
from semipd.profile import load_profile
from semipd.replay import Setup, simulate
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor
from semipd.slo import Slo
from semipd.trace import Trace

COST = ConstantCost(prefill_layer_s=0.25, decode_step_s=0.5, layers=2)


def shares(
    requests: list[Request], *, policy: str = "static-64", cost: ConstantCost = COST, **limits: int
) -> Mapping[str, float]:
    config = SchedulerConfig(**{"num_blocks": 1000, "watermark": 0.0, **limits})  # type: ignore[arg-type]
    scheduler = Scheduler(config, make_policy(policy, cost, Slo(1, 1)), device_sms=cost.device_sms, layers=cost.layers)
    log = Log()
    for record in replay(requests, scheduler, SimExecutor(cost)):
        log.append(record)
    total_s = float(request_table(log, requests).e2e_s.sum())
    found = time_shares(total_s, log.decode_time(), scheduler.blocked.request_s, cost, 10.0)
    assert found is not None
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def test_one_request_by_hand_half_a_second_of_prefill_and_two_of_decode() -> None:
    assert shares([Request(0, 1.0, 5, 5)]) == {"KV": 0.0, "queue": 0.0, "SMs": 0.2, "bandwidth": 0.8}


def test_waiting_for_ones_turn_to_be_prefilled_is_for_want_of_sms() -> None:
    """Four prompts at once, one a batch, of one token: 0.5 + 1.0 + 1.5 + 2.0 s."""
    found = shares([Request(i, 0.0, 5, 1) for i in range(4)], max_num_batched_tokens=5)
    assert found == {"KV": 0.0, "queue": 0.0, "SMs": 1.0, "bandwidth": 0.0}


def test_waiting_for_a_place_is_the_queue_by_hand() -> None:
    """The second waits 0.5 s while the first is prefilled, and 2 s while it decodes; then each takes 2.5 s."""
    found = shares([Request(i, 0.0, 5, 5) for i in range(2)], max_num_seqs=1)
    total_s = 2.5 + 5.0
    assert found == pytest.approx(
        {"KV": 0.0, "queue": 2.0 / total_s, "SMs": (0.5 + 0.5 + 0.5) / total_s, "bandwidth": 4.0 / total_s}
    )


def test_waiting_for_kv_blocks_is_kv_by_hand() -> None:
    """As with one place, but of blocks: each sequence takes one of one block."""
    found = shares([Request(i, 0.0, 5, 5) for i in range(2)], num_blocks=1)
    assert found["KV"] == pytest.approx(2.0 / 7.5)
    assert found["queue"] == 0.0


def test_waiting_while_decode_goes_first_is_bandwidth() -> None:
    requests = [Request(0, 0.0, 5, 9), Request(1, 0.5, 5, 1)]
    assert shares(requests, policy="exclusive-decode")["bandwidth"] == pytest.approx((4.0 + 4.0) / (4.5 + 4.5))
    assert shares(requests, policy="exclusive")["bandwidth"] == pytest.approx(4.0 / (5.0 + 0.5))


@settings(max_examples=150, deadline=None)
@given(scenarios())
def test_whatever_happens_the_shares_are_of_all_time_and_waiting_is_never_counted_twice(scenario: Scenario) -> None:
    scheduler, records = scenario.play()
    log = Log()
    for record in records:
        log.append(record)
    decode_s = sum(
        (record.end_s - record.start_s) * len(record.run.requests)
        for record in records
        if record.run.phase is Phase.DECODE
    )
    assert sum(time.request_s for time in log.decode_time().values()) == decode_s
    blocked = scheduler.blocked.request_s
    assert min(blocked.values()) >= 0
    table = request_table(log, scenario.requests)
    dropped = [request.id for request, _ in scheduler.dropped]
    if not dropped:  # of these nobody notes how long they were there
        assert decode_s + sum(blocked.values()) <= table.e2e_s.sum()
        found = time_shares(table.e2e_s.sum(), log.decode_time(), blocked, scenario.cost, 8.0)
        assert found is not None
        assert sum(found.values()) == pytest.approx(1.0)


def setup(folder: Path, trace: Trace, **limits: int) -> Setup:
    profile = load_profile(folder)
    return Setup(
        trace=trace, closed_loop=False, strict=False, profile=profile, cost=profile.cost(), predictor=profile.cost(),
        predicted_by="", slo=Slo(1, 1), scheduler=SchedulerConfig(**{"num_blocks": 50_000, **limits}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profile") / "p", all_modes=True)


def trace(n: int, gap_s: float, prompt: int, output: int) -> Trace:
    return Trace("t", np.arange(n) * gap_s, np.full(n, prompt), np.full(n, output), "made", n)


@pytest.mark.parametrize(("decode_sms", "bound"), [(8, "SMs"), (16, "bandwidth"), (24, "bandwidth")])
def test_decode_is_bound_by_sms_where_the_whole_device_would_be_faster_and_else_by_bandwidth(
    folder: Path, decode_sms: int, bound: Bound
) -> None:
    """In that profile 16 of 32 SMs draw all of the memory bandwidth; on 8 a step takes about twice as long."""
    decode = {Allocation(Mode.SPLIT, 32 - decode_sms, decode_sms): DecodeTime(busy_s=1.0, request_s=64.0)}
    found = time_shares(64.0, decode, Blocked().request_s, load_profile(folder).cost(), 4000.0)
    assert found is not None
    assert found[bound] == 1.0


def test_the_summary_says_what_bound_a_run_that_was_made_to_be_bound_so(folder: Path) -> None:
    prompts, chat = trace(200, 0.001, 6000, 2), trace(200, 0.001, 100, 500)
    assert simulate(setup(folder, prompts), "exclusive").summary.bound_by == "SMs"
    assert simulate(setup(folder, chat), "exclusive").summary.bound_by == "bandwidth"
    assert simulate(setup(folder, chat, max_num_seqs=8), "exclusive").summary.bound_by == "queue"
    assert simulate(setup(folder, chat, num_blocks=200), "exclusive").summary.bound_by == "KV"


def test_nothing_spent_is_nothing_to_tell() -> None:
    assert time_shares(0.0, {}, Blocked().request_s, COST, 0.0) is None
