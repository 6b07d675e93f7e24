"""Metrics: against numpy on the raw token times, brute force and closed forms."""

from __future__ import annotations

import json
import math
import random
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core import Allocation, FloatArray, Mode, Phase, Request, Run, StepRecord
from semipd.distribution import Distribution
from semipd.log import Log
from semipd.metrics import Summary, request_table, saturation, summarise
from semipd.slo import Slo
from semipd.trace import Trace

SPLITS = (Allocation(Mode.SPLIT, 64, 68), Allocation(Mode.SPLIT, 32, 100))
FULL = Allocation(Mode.EXCLUSIVE, 132, 132)
MIXED = Allocation(Mode.MIXED, 132, 132, 16)
LAYERS = 3
SLO = Slo(ttft_s=1.0, tpot_s=0.1)
PERCENTILES = (50, 90, 95, 99)

KEYS = [
    *("policy", "requests", "completed", "dropped", "duration_s", "ttft_s", "tpot_s", "itl_s", "e2e_s"),
    *("request_throughput_rps", "output_throughput_tps", "slo", "slo_attainment", "goodput_rps", "preemptions"),
    *("switches", "time_in_split", "kv_peak_share", "extrapolated_share", "saturation", "wall_s"),
    "prefix_hit_share",
    "bound_by",
    "time_shares",
]


def prefill(
    *requests: Request, start_s: float, ends_s: Sequence[float], finished: tuple[int, ...] = (), at: Allocation = FULL
) -> StepRecord:
    """As many layers as boundaries, the last of them giving every request a token."""
    n = len(requests)
    run = Run(0, Phase.PREFILL, requests, (4,) * n, (0,) * n, at.prefill_sms, len(ends_s), at, (True,) * n)
    return StepRecord(run, start_s, np.array(ends_s, dtype=float), finished)


def decode(
    *requests: Request, start_s: float, ends_s: Sequence[float], finished: tuple[int, ...] = (), at: Allocation = FULL
) -> StepRecord:
    n = len(requests)
    run = Run(0, Phase.DECODE, requests, (1,) * n, (4,) * n, at.decode_sms, max(len(ends_s), 1), at)
    return StepRecord(run, start_s, np.array(ends_s, dtype=float), finished)


def fused(
    decoding: tuple[Request, ...], pieces: tuple[Request, ...], emits: tuple[bool, ...], *, start_s: float, end_s: float
) -> StepRecord:
    at, n, batch = MIXED, len(decoding), (*decoding, *pieces)
    tokens, cached = (1,) * n + (4,) * len(pieces), (4,) * n + (0,) * len(pieces)
    run = Run(0, Phase.MIXED, batch, tokens, cached, at.decode_sms, 1, at, (True,) * n + emits, n)
    return StepRecord(run, start_s, np.array([end_s]))


def logged(*records: StepRecord) -> Log:
    log = Log()
    for record in records:
        log.append(record)
    return log


def summary(log: Log, requests: Trace | Sequence[Request], slo: Slo = SLO, dropped: tuple[int, ...] = ()) -> Summary:
    return summarise(log, requests, policy="p", slo=slo, dropped=dropped)


# A case by hand


A, B = Request(0, 1.0, 4, 3), Request(1, 1.5, 4, 1)


def by_hand() -> Log:
    """A gets its tokens at 2, 5 and 5.5; B its only one at 4."""
    return logged(
        prefill(A, start_s=1.0, ends_s=[2.0]),
        prefill(B, start_s=2.0, ends_s=[4.0], finished=(1,)),
        decode(A, start_s=4.0, ends_s=[5.0, 5.5], finished=(0,)),
    )


def test_the_definitions_on_two_requests() -> None:
    s = summary(by_hand(), [A, B], Slo(ttft_s=1.0, tpot_s=1.75))
    assert (s.requests, s.completed, s.dropped, s.duration_s) == (2, 2, 0, 4.5)
    assert s.ttft_s is not None
    assert s.tpot_s is not None
    assert s.itl_s is not None
    assert s.e2e_s is not None
    assert (s.ttft_s.mean, s.ttft_s.max) == (1.75, 2.5)
    assert (s.tpot_s.mean, s.tpot_s.max) == (0.875, 1.75)  # B had one token: 0
    assert (s.itl_s.mean, s.itl_s.p50, s.itl_s.max) == (1.75, 1.75, 3.0)  # A waited 3, then 0.5
    assert (s.e2e_s.mean, s.e2e_s.max) == (3.5, 4.5)
    assert s.request_throughput_rps == 2 / 4.5
    assert s.output_throughput_tps == 4 / 4.5
    assert (s.slo_attainment, s.goodput_rps) == (0.5, 1 / 4.5)  # B's TTFT is too long, A is just good


def test_the_table_of_requests() -> None:
    table = request_table(by_hand(), [A, B]).columns()
    assert {name: column.tolist() for name, column in table.items()} == {
        "id": [0, 1],
        "arrival_s": [1.0, 1.5],
        "prompt_tokens": [4, 4],
        "output_tokens": [3, 1],
        "first_token_s": [2.0, 4.0],
        "finish_s": [5.5, 4.0],
        "ttft_s": [1.0, 2.5],
        "tpot_s": [1.75, 0.0],
        "e2e_s": [4.5, 2.5],
    }


def test_a_trace_and_its_requests_give_the_same_summary() -> None:
    trace = Trace("t", np.array([0.0, 0.5]), np.array([4, 4]), np.array([3, 1]), "x", 2)
    assert summary(by_hand(), trace) == summary(by_hand(), list(trace.requests()))


def test_the_json_has_exactly_the_fixed_keys_and_survives_strict_json() -> None:
    document = summary(by_hand(), [A, B]).to_json()
    assert list(document) == KEYS
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
        assert list(document[name]) == ["mean", "p50", "p90", "p95", "p99", "max"]
    assert document["slo"] == {"ttft_s": 1.0, "tpot_s": 0.1}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


@pytest.mark.parametrize("requests", [[], [A, B]], ids=["no requests", "nothing done"])
def test_what_there_is_nothing_to_tell_about_is_null(requests: list[Request]) -> None:
    document = summary(Log(), requests, dropped=tuple(r.id for r in requests)).to_json()
    json.dumps(document, allow_nan=False)
    empty = {name for name, value in document.items() if value is None}
    metrics = {"ttft_s", "tpot_s", "itl_s", "e2e_s", "request_throughput_rps", "output_throughput_tps", "goodput_rps"}
    assert empty == metrics | {
        "kv_peak_share",
        "extrapolated_share",
        "wall_s",
        "prefix_hit_share",
        "bound_by",
        "time_shares",
    } | (set() if requests else {"slo_attainment"})
    assert (document["duration_s"], document["time_in_split"], document["saturation"]) == (0.0, {"idle": 1.0}, "stable")


def test_attainment_is_over_the_requests_sent_and_only_complete_ones_are_good() -> None:
    unfinished, refused = Request(2, 1.5, 4, 9), Request(3, 1.5, 4, 9)
    log = by_hand()
    log.append(prefill(unfinished, start_s=5.5, ends_s=[5.6]))
    lenient = Slo(100.0, 100.0)
    s = summary(log, [A, B, unfinished, refused], lenient, dropped=(3,))
    assert (s.requests, s.completed, s.dropped) == (4, 2, 1)
    assert (s.slo_attainment, s.goodput_rps) == (0.5, 2 / 4.5)
    assert s.ttft_s is not None
    assert s.ttft_s.max == pytest.approx(5.6 - 1.5)  # it has a first token, and nothing else
    assert s.output_throughput_tps == 5 / 4.5


def test_a_request_of_another_replay_is_an_error() -> None:
    for others in ([A], [A, replace(B, id=7)], []):
        with pytest.raises(ValueError, match="not among"):
            request_table(by_hand(), others)
    with pytest.raises(ValueError, match="same id"):
        request_table(by_hand(), [A, A])


def test_extrapolated_share_is_of_all_lookups() -> None:
    log = by_hand()
    log.append(replace(prefill(Request(2, 2.0, 4, 9), start_s=5.5, ends_s=[6.0]), lookups=3, extrapolated=1))
    log.append(replace(decode(start_s=6.0, ends_s=[]), lookups=5, extrapolated=1))
    assert summary(log, [A, B, Request(2, 2.0, 4, 9)]).extrapolated_share == 0.25


# Against raw token times


@dataclass
class Replay:
    """A replay without rhyme or reason that keeps the rules: records, and every token's time."""

    requests: list[Request]
    records: list[StepRecord] = field(default_factory=list)
    token_s: dict[int, list[float]] = field(default_factory=dict)


def a_replay(seed: int, n: int, complete: bool) -> Replay:
    """Random batches, preemptions, yields and pauses. A preempted sequence is prefilled anew."""
    rng = random.Random(seed)
    requests = [Request(3 * i + 1, rng.random(), 4, rng.choice((1, 2, 3, 9, 30))) for i in range(n)]
    replay = Replay(requests, token_s={r.id: [] for r in requests})
    waiting, decoding = list(requests), list[Request]()
    clock_s = 1.0

    def boundaries(steps: int) -> list[float]:
        times = clock_s + np.cumsum([rng.choice((0.01, 0.013, 0.4 * rng.random())) for _ in range(steps)])
        return [float(t) for t in times]

    def left(request: Request) -> int:
        return request.output_len - len(replay.token_s[request.id])

    while (waiting or decoding) and (complete or rng.random() > 0.02):
        clock_s += rng.choice((0.0, 0.0, 0.1 * rng.random()))
        at = rng.choice((*SPLITS, FULL))
        if waiting and rng.random() < 0.3:  # the last prompt may be cut, and gets no token then
            pieces = tuple(waiting[: rng.randint(1, 3)])
            emits = (True,) * (len(pieces) - 1) + (rng.random() < 0.7,)
            ends_s = boundaries(1)
            batch = (*decoding, *(r for r, emit in zip(pieces, emits, strict=True) if emit))
            waiting = [r for r in waiting if r not in batch]
            for request in batch:
                replay.token_s[request.id] += ends_s
            record = fused(tuple(decoding), pieces, emits, start_s=clock_s, end_s=ends_s[0])
        elif waiting and (not decoding or rng.random() < 0.4):
            batch = tuple(waiting[: rng.randint(1, 3)])
            if rng.random() < 0.2:  # stopped between two layers: no token
                record = prefill(*batch, start_s=clock_s, ends_s=boundaries(LAYERS), at=at)
                replay.records.append(replace(record, ends_s=record.ends_s[:1]))
                clock_s = float(record.ends_s[0])
                continue
            ends_s = boundaries(LAYERS)
            waiting = waiting[len(batch) :]
            for request in batch:
                replay.token_s[request.id].append(ends_s[-1])
            record = prefill(*batch, start_s=clock_s, ends_s=ends_s, at=at)
        else:
            if rng.random() < 0.2:
                rng.shuffle(decoding)
            batch = tuple(decoding)
            ends_s = boundaries(rng.randint(1, min(map(left, batch))))
            for request in batch:
                replay.token_s[request.id] += ends_s
            record = decode(*batch, start_s=clock_s, ends_s=ends_s, at=at)
        finished = tuple(r.id for r in batch if left(r) == 0)
        replay.records.append(replace(record, finished=finished))
        clock_s = ends_s[-1]
        decoding = [r for r in dict.fromkeys((*decoding, *batch)) if left(r)]
        if decoding and rng.random() < 0.1:
            waiting.insert(0, decoding.pop(rng.randrange(len(decoding))))
    return replay


def assert_matches(got: Distribution | None, values: Sequence[float] | FloatArray) -> None:
    """Percentiles and maximum to the last bit, the mean but for rounding."""
    if not len(values):
        assert got is None
        return
    assert got is not None
    assert got.mean == pytest.approx(np.mean(values))
    expected = [*np.percentile(values, PERCENTILES).tolist(), max(values)]
    assert [got.p50, got.p90, got.p95, got.p99, got.max] == expected


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 25), complete=st.booleans())
def test_every_metric_is_numpys_on_the_raw_token_times(seed: int, n: int, complete: bool) -> None:
    replay = a_replay(seed, n, complete)
    first = [r for r in replay.requests if replay.token_s[r.id]]
    done = [r for r in replay.requests if len(replay.token_s[r.id]) == r.output_len]
    times = replay.token_s
    requests = sorted(replay.requests, key=lambda r: r.arrival_s)
    s = summary(logged(*replay.records), requests)
    assert s.completed == len(done)
    assert_matches(s.ttft_s, [times[r.id][0] - r.arrival_s for r in first])
    assert_matches(s.e2e_s, [times[r.id][-1] - r.arrival_s for r in done])
    assert_matches(
        s.tpot_s, [(times[r.id][-1] - times[r.id][0]) / (r.output_len - 1) if r.output_len > 1 else 0.0 for r in done]
    )
    assert_matches(s.itl_s, np.concatenate([np.diff(t) for t in times.values()]))
    if done:
        duration_s = max(times[r.id][-1] for r in done) - requests[0].arrival_s
        assert s.duration_s == duration_s
        assert s.request_throughput_rps == len(done) / duration_s
        assert s.output_throughput_tps == sum(map(len, times.values())) / duration_s


@settings(max_examples=200)
@given(
    pairs=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 50)), min_size=1, max_size=40),
)
def test_percentiles_of_counted_values_are_those_of_the_values_repeated(pairs: list[tuple[float, int]]) -> None:
    values, counts = np.array([v for v, _ in pairs]), np.array([c for _, c in pairs])
    assert_matches(Distribution.of(values, counts), np.repeat(values, counts))
    assert_matches(Distribution.of(values), values)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 25), chunk_steps=st.integers(1, 20))
def test_gaps_kept_in_chunks_give_the_same_percentiles(seed: int, n: int, chunk_steps: int) -> None:
    replay = a_replay(seed, n, complete=True)
    whole, parted = Log(), Log(chunk_steps=chunk_steps)
    for record in replay.records:
        for log in (whole, parted):
            log.append(record)
    expected, found = Distribution.of_parts(whole.gaps), Distribution.of_parts(parted.gaps)
    if expected is None or found is None:
        assert expected is found
        return
    for name in ("p50", "p90", "p95", "p99", "max"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.mean == pytest.approx(expected.mean, rel=1e-12)


def test_the_log_keeps_no_record_and_nothing_for_a_token() -> None:
    requests = tuple(Request(i, 0.0, 4, 10**6) for i in range(500))
    log = logged(prefill(*requests, start_s=0.0, ends_s=[1.0]))
    record = decode(*requests, start_s=1.0, ends_s=np.arange(2.0, 12.0).tolist())
    before = sys.getrefcount(record), sys.getrefcount(record.run), sys.getrefcount(record.ends_s)
    tracemalloc.start()
    for _ in range(1000):
        log.append(record)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (sys.getrefcount(record), sys.getrefcount(record.run), sys.getrefcount(record.ends_s)) == before
    assert log.tokens == 500 * (1 + 10 * 1000)  # five million
    assert size < 250_000  # 10,000 steps


# Time in split

SECONDS = st.integers(0, 30)


@settings(max_examples=100)
@given(spans=st.lists(st.tuples(st.integers(0, 3), st.lists(st.tuples(SECONDS, SECONDS), max_size=5))))
def test_time_in_split_counts_every_moment_once(spans: list[tuple[int, list[tuple[int, int]]]]) -> None:
    """Allocations follow one another; within each, runs overlap as they like. Compared second by second."""
    allocations = [*SPLITS, FULL, Allocation(Mode.CAPPED, 64, 132)]
    records, clock = [], 2
    seconds: dict[str, int] = {}
    for which, runs in spans:
        at = allocations[which]
        pairs = [(clock + min(pair), clock + max(pair)) for pair in runs]
        busy = {second for start, end in pairs for second in range(start, end)}
        if pairs:
            seconds[at.name] = seconds.get(at.name, 0) + len(busy)
        pairs.sort(key=lambda pair: pair[1])
        records += [prefill(A, start_s=float(start), ends_s=[float(end)], at=at) for start, end in pairs]
        clock = max([clock, *(end for _, end in pairs)])
    span = max((record.end_s for record in records), default=1.0) - 1.0
    shares = logged(*records).time_in_split(start_s=1.0)
    expected = {name: count / span for name, count in seconds.items()} if span else {}
    assert shares == pytest.approx({**expected, "idle": 1 - sum(expected.values())})
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert list(shares)[-1] == "idle"


def test_the_names_of_time_in_split() -> None:
    log = logged(
        prefill(A, start_s=1.0, ends_s=[2.0], at=FULL),
        prefill(A, start_s=2.0, ends_s=[3.0], at=SPLITS[0]),
        decode(A, start_s=2.0, ends_s=[4.0], at=SPLITS[0]),
        decode(A, start_s=6.0, ends_s=[9.0], at=Allocation(Mode.CAPPED, 64, 132)),
        decode(A, start_s=9.0, ends_s=[10.0], at=Allocation(Mode.PRIORITY, 132, 132)),
        fused((A,), (B,), (False,), start_s=10.0, end_s=17.0),
    )
    shares = summary(log, [A, B]).time_in_split
    assert shares == {
        "full": 1 / 16,
        "64/68": 2 / 16,
        "capped-64": 3 / 16,
        "priority": 1 / 16,
        "mixed": 7 / 16,
        "idle": 2 / 16,
    }


# Saturation


def one_server(arrival_s: FloatArray, service_s: float) -> FloatArray:
    """When each customer of a single server with fixed service times leaves."""
    n = np.arange(len(arrival_s))
    left_s: FloatArray = np.maximum.accumulate(arrival_s - n * service_s) + (n + 1) * service_s
    return left_s


@settings(max_examples=100)
@given(n=st.integers(1, 3000), load=st.floats(0.05, 1.0), period_s=st.floats(1e-3, 10))
def test_steady_arrivals_below_capacity_are_stable(n: int, load: float, period_s: float) -> None:
    """D/D/1."""
    arrival_s: FloatArray = np.arange(float(n)) * period_s
    assert saturation(arrival_s, one_server(arrival_s, load * period_s)) == "stable"


@settings(max_examples=100)
@given(n=st.integers(400, 3000), load=st.floats(1.07, 5.0), period_s=st.floats(1e-3, 10))
def test_steady_arrivals_beyond_capacity_are_an_overload(n: int, load: float, period_s: float) -> None:
    """D/D/1: of n requests, n (1 - 1 / load) wait at the last arrival."""
    arrival_s: FloatArray = np.arange(float(n)) * period_s
    assert saturation(arrival_s, one_server(arrival_s, load * period_s)) == "overloaded"


@pytest.mark.parametrize("load", [0.5, 0.8, 0.95])
def test_poisson_arrivals_below_capacity_are_stable(load: float) -> None:
    """M/D/1."""
    arrival_s = np.cumsum(np.random.default_rng(1).exponential(1.0, 5000))
    assert saturation(arrival_s, one_server(arrival_s, load)) == "stable"


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6])
def test_a_burst_that_is_worked_off_is_a_backlog(at: float) -> None:
    steady = np.arange(1000) * 1.0
    arrival_s = np.sort(np.concatenate([steady, np.full(200, at * 1000)]))
    assert saturation(arrival_s, one_server(arrival_s, 0.5)) == "backlogged"


def test_a_long_queue_that_grows_no_longer_is_a_backlog() -> None:
    arrival_s = np.sort(np.concatenate([np.zeros(300), np.arange(1000.0)]))
    assert saturation(arrival_s, one_server(arrival_s, 1.0)) == "backlogged"


def test_all_at_once_is_a_backlog_if_many() -> None:
    for n, expected in ((5, "stable"), (50, "backlogged")):
        arrival_s = np.zeros(n)
        assert saturation(arrival_s, one_server(arrival_s, 1.0)) == expected


def test_requests_that_never_get_a_token_pile_up_but_dropped_ones_do_not() -> None:
    requests = [Request(i, float(i), 4, 1) for i in range(100)]
    log = Log()
    for r in requests[:40]:
        log.append(prefill(r, start_s=r.arrival_s, ends_s=[r.arrival_s + 0.5], finished=(r.id,)))
    assert summary(log, requests).saturation == "overloaded"
    assert summary(log, requests, dropped=tuple(range(40, 100))).saturation == "stable"
