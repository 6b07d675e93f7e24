"""Other arrivals and other rates: what each operation keeps, what it changes, and that it says so."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from semipd.core import InputError
from semipd.trace import (
    Arrivals,
    Prefixes,
    Process,
    Reshape,
    Sessions,
    Trace,
    dequantise,
    draw_arrivals,
    head,
    info,
    read_trace,
    replicate,
    reshape,
    scale_rate,
    thin,
    window,
)

TRACES = Path(os.environ.get("SEMIPD_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")


def real(*parts: str) -> Trace:
    path = TRACES.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path.name} is not here: set SEMIPD_TRACES to the folder of real traces")
    return read_trace(path)


def plain(n: int, rate_rps: float = 10.0) -> Trace:
    """Request i has i + 1 prompt tokens, by which it is known again."""
    return Trace("t", np.arange(n) / rate_rps, np.arange(n) + 1, np.ones(n, dtype=np.int64), "made", n)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Small traces with sessions and prefixes; request i has i + 1 prompt tokens, by which it is known again."""
    n = draw(st.integers(1, 40))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5]), min_size=n, max_size=n))
    index = np.array(draw(st.lists(st.integers(-1, 5), min_size=n, max_size=n)))
    delay_s = np.array(draw(st.lists(st.sampled_from([0.0, 2.0, math.nan]), min_size=n, max_size=n)))
    names = tuple("abcdef")
    blocks = draw(st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=n, max_size=n))
    ids = np.array([i for row in blocks for i in row], dtype=np.int64)
    prefixes = Prefixes(ids, np.cumsum([0, *map(len, blocks)]), 16)
    return Trace(
        "t",
        np.cumsum([0.0, *gaps[1:]]),
        np.arange(n) + 1,
        np.ones(n, dtype=np.int64),
        "made",
        n,
        prefixes=prefixes,
        sessions=Sessions.of(index, delay_s, names),
    )


def blocks_of(trace: Trace) -> list[tuple[int, ...]]:
    return [request.prefix_block_ids for request in trace.requests()]


def session_rows(trace: Trace) -> dict[str, list[int]]:
    """Prompt lengths of every session's turns, in order."""
    assert trace.sessions is not None
    rows: dict[str, list[int]] = {}
    for index, prompt in zip(trace.sessions.index.tolist(), trace.prompt_len.tolist(), strict=True):
        if index >= 0:
            rows.setdefault(trace.sessions.names[index], []).append(prompt)
    return rows


HOW = st.builds(
    Reshape,
    dequantise_s=st.sampled_from([None, 0.1, 10.0]),
    thin=st.sampled_from([0.3, 1.0]),
    replicate=st.integers(1, 3),
    jitter_s=st.sampled_from([0.0, 5.0]),
    every_s=st.sampled_from([0.0, 100.0]),
    arrivals=st.sampled_from([Arrivals(), Arrivals(Process.POISSON, 3.0), Arrivals(Process.RAMP, 1.0, None, 9.0)]),
    rate_scale=st.sampled_from([1.0, 2.0]),
    seed=st.integers(0, 3),
)


@settings(deadline=None)
@given(traces(), HOW)
def test_whatever_is_done_every_row_is_accounted_for_and_turns_stay_in_order(trace: Trace, how: Reshape) -> None:
    try:
        got = reshape(trace, how)
    except InputError:
        with pytest.raises(InputError, match="nothing left"):
            thin(trace, how.thin, how.seed)
        return
    assert got.rows_read + got.added == len(got) + sum(got.dropped.values())
    assert len(got) == (len(trace) - got.dropped.get("thinned", 0)) * how.replicate
    assert got.arrival_s[0] == 0
    for prompts in session_rows(got).values():  # ascending in the source
        assert prompts == sorted(prompts)
    assert got.sessions is not None
    for request, turn, delay_s in zip(
        got.requests(), got.sessions.turn.tolist(), got.sessions.delay_s.tolist(), strict=True
    ):
        assert len(request.prefix_block_ids) == len(blocks_of(trace)[request.prompt_len - 1])
        assert turn > 0 or math.isnan(delay_s)
    again = reshape(trace, how)
    assert again.arrival_s.tolist() == got.arrival_s.tolist()
    assert blocks_of(again) == blocks_of(got)


def test_what_is_done_is_named_with_its_seed() -> None:
    how = Reshape(
        start_s=1.0,
        end_s=9.0,
        dequantise_s=0.1,
        thin=0.5,
        replicate=2,
        arrivals=Arrivals(Process.GAMMA, 4.0, 0.5),
        rate_scale=2.0,
        seed=7,
    )
    assert reshape(plain(100), how).operations == (
        "stamps spread over 0.1 s, seed 7",
        "thinned to 0.5, seed 7",
        "replicated x 2, jitter 1 s, seed 7",
        "gamma arrivals, 4 requests/s, burstiness 0.5, seed 7",
        "time warp, rate x 2",
    )
    trace = plain(3)
    assert reshape(trace, Reshape()) is trace


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_arrivals_have_vllms_cv(burstiness: float) -> None:
    drawn = draw_arrivals(plain(40_000), Arrivals(Process.GAMMA, 5.0, burstiness), seed=1)
    found = info(drawn)
    assert found.interarrival_cv == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)
    assert found.rate_rps == pytest.approx(5.0, rel=0.03)


def test_poisson_arrivals_keep_the_rate_of_the_trace_when_none_is_given() -> None:
    found = info(draw_arrivals(plain(40_000), Arrivals(Process.POISSON), seed=2))
    assert found.rate_rps == pytest.approx(10.0, rel=0.03)
    assert found.interarrival_cv == pytest.approx(1.0, rel=0.03)
    assert found.dispersion_10s == pytest.approx(1.0, rel=0.15)


def test_constant_arrivals_are_evenly_spaced() -> None:
    drawn = draw_arrivals(plain(5), Arrivals(Process.CONSTANT, 4.0))
    assert drawn.arrival_s.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert drawn.prompt_len.tolist() == [1, 2, 3, 4, 5]


def test_a_ramp_grows_evenly_over_requests() -> None:
    n, low, high = 60_000, 2.0, 10.0
    at_s = draw_arrivals(plain(n), Arrivals(Process.RAMP, low, None, high), seed=3).arrival_s
    # The expected time of the i-th is the integral of 1 / (low + (high - low) x / n) from 0 to i.
    for i in (n // 4, n // 2, n - 1):
        expected_s = n / (high - low) * math.log(1 + (high - low) * i / n / low)
        assert at_s[i] == pytest.approx(expected_s, rel=0.02)


def test_drawn_starts_take_a_sessions_later_turns_along() -> None:
    sessions = Sessions.of(np.array([0, -1, 0, -1]), np.array([math.nan, math.nan, 2.0, math.nan]), ("a",))
    ones = np.ones(4, dtype=np.int64)
    trace = Trace("t", np.array([0.0, 1.0, 3.0, 8.0]), np.arange(4) + 1, ones, "made", 4, sessions=sessions)
    drawn = draw_arrivals(trace, Arrivals(Process.CONSTANT, 0.1))
    assert drawn.arrival_s.tolist() == [0.0, 3.0, 10.0, 20.0]  # three starts, 10 s apart
    assert drawn.prompt_len.tolist() == [1, 3, 2, 4]
    assert drawn.sessions is not None
    assert drawn.sessions.turn.tolist() == [0, 1, 0, 0]


def test_the_first_requests_are_the_same_at_every_rate() -> None:
    slow, fast = (draw_arrivals(plain(100), Arrivals(Process.POISSON, rate), seed=4).arrival_s for rate in (1.0, 8.0))
    np.testing.assert_allclose(slow, fast * 8)


@settings(deadline=None)
@given(traces(), st.sampled_from([0.1, 0.25, 3.0, 100.0]), st.integers(0, 5))
def test_dequantised_stamps_stay_in_order_and_within_their_quantum(trace: Trace, quantum_s: float, seed: int) -> None:
    got = dequantise(trace, quantum_s, seed)
    assert got.prompt_len.tolist() == trace.prompt_len.tolist()
    # The first of them is moved to 0 again, which shifts all by less than its own quantum.
    moved_s = got.arrival_s - trace.arrival_s
    assert moved_s.max() < quantum_s + 1e-9
    assert moved_s.min() > -quantum_s - 1e-9
    assert np.all(np.diff(got.arrival_s) >= 0)


def test_mooncakes_batches_of_3_s_become_poisson_when_spread() -> None:
    trace = real("mooncake-fast25", "conversation_trace.jsonl")
    before, after = info(trace), info(dequantise(trace, 3.0))
    assert (before.stamps, before.least_gap_s) == (1180, pytest.approx(3.0, abs=0.005))
    assert before.interarrival_cv == pytest.approx(3.03, abs=0.01)
    assert after.interarrival_cv == pytest.approx(1.01, abs=0.03)  # as published with the trace
    assert after.dispersion_60s == pytest.approx(before.dispersion_60s, rel=0.1)


def test_stamps_that_are_fine_already_move_by_no_more_than_the_quantum() -> None:
    trace = real("azure-2023", "AzureLLMInferenceTrace_conv.csv")
    assert np.abs(dequantise(trace, 1e-5).arrival_s - trace.arrival_s).max() < 1e-5


def test_thinning_keeps_sessions_and_prefix_trees_whole() -> None:
    # Session 0 joins rows 0 and 5; rows 1 and 5 begin with the same block, rows 2 and 6 with another one.
    n = 80
    index = np.full(n, -1)
    index[[0, 5]] = 0
    ids = np.arange(n) + 100
    ids[[1, 5]], ids[[2, 6]] = 7, 8
    prefixes = Prefixes(ids, np.arange(n + 1), 16)
    sessions = Sessions.of(index, np.full(n, math.nan), ("a",))
    trace = Trace("t", np.arange(n), np.arange(n) + 1, np.ones(n), "made", n, prefixes=prefixes, sessions=sessions)
    fates = set()
    for seed in range(40):
        kept = set(thin(trace, 0.5, seed).prompt_len.tolist())
        assert len(kept & {1, 2, 6}) in (0, 3)
        assert len(kept & {3, 7}) in (0, 2)
        fates.add((len(kept & {1, 2, 6}), len(kept & {3, 7})))
    assert len(fates) == 4  # the two groups are kept independently


@settings(deadline=None)
@given(traces(), st.integers(0, 20))
def test_thinning_never_splits_what_a_union_find_joins(trace: Trace, seed: int) -> None:
    assert trace.sessions is not None
    firsts = [blocks[:1] for blocks in blocks_of(trace)]
    assume(all(firsts.count(first) <= 16 for first in firsts if first))  # else they are a system prompt's
    root = list(range(len(trace)))
    keys = zip(firsts, trace.sessions.index.tolist(), strict=True)
    holders: dict[object, int] = {}
    for i, (first, session) in enumerate(keys):
        for key in [("block", *first)] * bool(first) + [("session", session)] * (session >= 0):
            a, b = i, holders.setdefault(key, i)
            while root[a] != a:
                a = root[a]
            while root[b] != b:
                b = root[b]
            root[a] = b
    groups: dict[int, set[int]] = {}
    for i in range(len(trace)):
        top = i
        while root[top] != top:
            top = root[top]
        groups.setdefault(top, set()).add(i + 1)
    try:
        kept = set(thin(trace, 0.5, seed).prompt_len.tolist())
    except InputError:  # nothing is left
        return
    assert all(group <= kept or not group & kept for group in groups.values())


def test_a_system_prompt_does_not_hold_all_requests_together() -> None:
    n = 2000
    ids = np.stack((np.zeros(n), np.arange(n) // 4 + 1), axis=1).astype(np.int64).ravel()  # four a conversation
    trace = Trace(
        "t",
        np.arange(n),
        np.arange(n) + 1,
        np.ones(n),
        "made",
        n,
        {},
        None,
        Prefixes(ids, np.arange(0, 2 * n + 1, 2), 16),
    )
    kept = thin(trace, 0.3, seed=1)
    assert len(kept) == pytest.approx(600, abs=4 * math.sqrt(500 * 0.3 * 0.7) * 4)
    counts = np.bincount((kept.prompt_len - 1) // 4, minlength=500)
    assert set(counts.tolist()) == {0, 4}


def test_thinning_less_keeps_what_thinning_more_keeps() -> None:
    trace = plain(500)
    more, less = (set(thin(trace, keep, seed=3).prompt_len.tolist()) for keep in (0.2, 0.6))
    assert more < less
    assert len(less) == pytest.approx(300, abs=50)
    assert dict(thin(trace, 0.2, seed=3).dropped) == {"thinned": 500 - len(more)}
    assert thin(trace, 1.0) is trace


def test_thinning_the_real_conversations_keeps_their_reuse() -> None:
    trace = real("mooncake-fast25", "conversation_trace.jsonl")
    kept = thin(trace, 0.5)
    assert len(kept) == pytest.approx(len(trace) / 2, rel=0.1)
    share, before = info(kept).prefix_share, info(trace).prefix_share
    assert share == pytest.approx(before, rel=0.1)
    rng = np.random.default_rng(0)
    alone = np.flatnonzero(rng.random(len(trace)) < 0.5)  # request by request it would not be
    assert trace.prefixes is not None
    lost = Trace(
        "t",
        np.zeros(len(alone)),
        trace.prompt_len[alone],
        trace.output_len[alone],
        "x",
        len(alone),
        prefixes=trace.prefixes.take(alone),
    )
    assert before is not None
    assert (info(lost).prefix_share or 0) < 0.85 * before


def test_copies_are_apart_by_their_jitter_only_and_share_no_blocks() -> None:
    ids = Prefixes(np.array([5, 5, 9]), np.array([0, 1, 2, 3]), 16)
    sessions = Sessions.of(np.array([0, 0, -1]), np.array([math.nan, 1.0, math.nan]), ("a",))
    trace = Trace(
        "t", np.array([0.0, 1.0, 2.0]), np.array([1, 2, 3]), np.ones(3), "made", 3, prefixes=ids, sessions=sessions
    )
    many = replicate(trace, 4, jitter_s=0.5, seed=1)
    assert (len(many), many.added, many.rows_read) == (12, 9, 3)
    for prompt, at_s in zip(many.prompt_len.tolist(), many.arrival_s.tolist(), strict=True):
        assert 0 <= at_s - (prompt - 1) < 0.5
    assert sorted(map(tuple, session_rows(many).items())) == [(name, [1, 2]) for name in ("a", "a#1", "a#2", "a#3")]
    shared = [
        {blocks[0] for p, blocks in zip(many.prompt_len.tolist(), blocks_of(many), strict=True) if p == k}
        for k in (1, 2, 3)
    ]
    assert shared[0] == shared[1]
    assert [len(s) for s in shared] == [4, 4, 4]
    assert not shared[0] & shared[2]
    assert many.sessions is not None
    first, second = (many.arrival_s[many.prompt_len == p] for p in (1, 2))
    np.testing.assert_allclose(np.sort(second - 1), np.sort(first))  # a session moves as one


def test_copies_laid_end_to_end_keep_the_rate() -> None:
    trace = plain(100)
    many = replicate(trace, 5, jitter_s=0.0, every_s=10.0)
    np.testing.assert_allclose(many.arrival_s, np.arange(500) / 10)
    assert many.prompt_len.tolist() == list(range(1, 101)) * 5


def test_a_time_warp_compresses_think_times_too() -> None:
    sessions = Sessions.of(np.array([0, 0]), np.array([math.nan, 6.0]), ("a",))
    trace = Trace("t", np.array([0.0, 9.0]), np.ones(2), np.ones(2), "made", 2, sessions=sessions)
    fast = scale_rate(trace, 3.0)
    assert fast.sessions is not None
    assert (fast.arrival_s[1], fast.sessions.delay_s[1]) == (3.0, 2.0)


def test_turns_are_counted_anew_when_a_session_loses_its_first() -> None:
    sessions = Sessions.of(np.array([0, 0, 0]), np.array([math.nan, 6.0, 7.0]), ("a",))
    trace = Trace("t", np.arange(3.0), np.ones(3), np.ones(3), "made", 3, sessions=sessions)
    late, early = window(trace, 0.5, 9.0).sessions, head(trace, 2).sessions
    assert late is not None
    assert late.turn.tolist() == [0, 1]
    np.testing.assert_array_equal(late.delay_s, [math.nan, 7.0])
    assert early is not None
    assert early.turn.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("process", "rate", "burstiness", "end", "message"),
    [
        ("weibull", 1.0, None, None, "process: found 'weibull', expected one of trace, poisson, gamma, ramp, constant"),
        ("trace", 1.0, None, None, "rate_rps: found 1, expected none for trace arrivals"),
        ("poisson", 0.0, None, None, "rate_rps: found 0, expected 1e-06 to 1e"),
        ("poisson", math.nan, None, None, "rate_rps: found nan"),
        ("poisson", 1.0, 2.0, None, "burstiness: found 2, expected none for poisson arrivals"),
        ("gamma", 1.0, None, None, "burstiness: found none, expected 0.001 to 1e.06 for gamma"),
        ("gamma", 1.0, 0.0, None, "burstiness: found 0, expected"),
        ("ramp", None, None, 2.0, "rate_rps: found none, expected"),
        ("ramp", 1.0, None, None, "end_rate_rps: found none, expected"),
        ("constant", 1.0, None, 2.0, "end_rate_rps: found 2, expected none for constant arrivals"),
    ],
)
def test_a_process_refuses_what_it_cannot_use(
    process: Process, rate: float | None, burstiness: float | None, end: float | None, message: str
) -> None:
    with pytest.raises(InputError, match=f"arrivals: {message}"):
        Arrivals(process, rate, burstiness, end)


def test_what_cannot_be_done_is_refused() -> None:
    trace = plain(10)
    for wrong, message in (
        (lambda: thin(trace, 0.0), "thin: found 0, expected a share"),
        (lambda: thin(trace, math.nan), "thin: found nan"),
        (lambda: thin(trace, 1e-9), "thin: found nothing left of 10 requests"),
        (lambda: thin(trace, 0.5, -1), "seed: found -1"),
        (lambda: replicate(trace, 0), "replicate: found 0, expected a number of copies from 1"),
        (lambda: replicate(trace, 10**9), "replicate: found 1000000000"),
        (lambda: replicate(trace, 2, -1.0), "jitter_s: found -1"),
        (lambda: replicate(trace, 2, 0.0, math.inf), "every_s: found inf"),
        (lambda: dequantise(trace, 0.0), "quantum: found 0 s"),
        (lambda: dequantise(trace, 1.0, -1), "seed: found -1"),
        (lambda: draw_arrivals(plain(1), Arrivals(Process.POISSON)), "rate: found none in a trace of 0 s"),
    ):
        with pytest.raises(InputError, match=f"t: {message}"):
            wrong()
