"""The loop: arrivals are read lazily and in order, and it always ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.core import InputError, Phase, Request, StepRecord
from semipd.cost import ConstantCost
from semipd.driver import replay
from semipd.log import Log
from semipd.policies import make_policy
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor
from semipd.slo import Slo

COST = ConstantCost(prefill_layer_s=0.25, decode_step_s=0.5, layers=2)


def start(requests: Iterable[Request], num_blocks: int = 100) -> tuple[Scheduler, Iterator[StepRecord]]:
    policy = make_policy("exclusive", COST, Slo(1, 1))
    config = SchedulerConfig(num_blocks=num_blocks)
    scheduler = Scheduler(config, policy, device_sms=COST.device_sms, layers=COST.layers)
    return scheduler, replay(requests, scheduler, SimExecutor(COST))


def test_one_request_by_hand() -> None:
    _, records = start([Request(0, arrival_s=1.0, prompt_len=10, output_len=4)])
    done = [(r.run.phase, r.start_s, list(r.ends_s), r.finished) for r in records]
    assert done == [
        (Phase.PREFILL, 1.0, [1.25, 1.5], ()),
        (Phase.DECODE, 1.5, [2.0, 2.5, 3.0], (0,)),
    ]


@given(batch=st.integers(1, 40), outputs=st.integers(2, 60), step=st.sampled_from([0.1, 0.03, 0.5]))
def test_decode_alone_makes_its_batch_in_every_step_time(batch: int, outputs: int, step: float) -> None:
    requests = [Request(i, 0.0, 16, outputs) for i in range(batch)]
    cost = ConstantCost(prefill_layer_s=1.0, decode_step_s=step)
    config = SchedulerConfig(num_blocks=10_000)
    scheduler = Scheduler(config, make_policy("exclusive", cost, Slo(1, 1)), device_sms=132, layers=1)
    log = Log()
    for record in replay(requests, scheduler, SimExecutor(cost)):
        log.append(record)
    first_s, last_s = log.first_tokens()[1].max(), log.finishes()[1].max()
    assert (log.tokens - batch) / (last_s - first_s) == pytest.approx(batch / step, rel=1e-12)


def test_no_requests_no_records() -> None:
    assert list(start([])[1]) == []


def test_requests_are_read_one_ahead_of_the_executors_time() -> None:
    read: list[int] = []

    def requests() -> Iterator[Request]:
        for i in range(5):
            read.append(i)
            yield Request(i, arrival_s=100.0 * i, prompt_len=1, output_len=1)

    _, records = start(requests())
    for i, record in enumerate(records):
        assert record.finished == (i,)
        assert len(read) == min(i + 2, 5)


def test_requests_out_of_order_are_refused() -> None:
    requests = [Request(i, arrival_s, 1, 1) for i, arrival_s in enumerate([0.0, 2.0, 1.5])]
    with pytest.raises(
        InputError, match=r"^request 2: arrival_s: found 1\.5 after 2\.0; expected .* order of arrival$"
    ):
        list(start(requests)[1])


def test_it_ends_when_the_last_request_is_dropped_on_arrival() -> None:
    scheduler, records = start([Request(0, 0.0, 1, 1), Request(1, 5.0, 1000, 1)], num_blocks=2)
    assert [record.finished for record in records] == [(0,)]
    assert [request.id for request, _ in scheduler.dropped] == [1]


def test_it_ends_when_the_last_request_outgrows_the_cache() -> None:
    scheduler, records = start([Request(0, 0.0, 30, 100)], num_blocks=2)
    assert sum(record.steps for record in records if record.run.phase is Phase.DECODE) == 2
    assert [request.id for request, _ in scheduler.dropped] == [0]
