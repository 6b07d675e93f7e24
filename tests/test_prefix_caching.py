"""Prefix caching in the whole system: scheduler, simulator and KV blocks together."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from naive_prefix_cache import CachingReference
from test_laws import Scenario, scenarios, token_times

from semipd.core import Request
from semipd.driver import replay

PATHS = st.lists(st.integers(0, 1), max_size=5)


@st.composite
def shared(draw: st.DrawFn, *, roomy: bool = False) -> Scenario:
    """Scenarios whose prompts are paths in a binary tree of prefix blocks, with a few tokens of their own."""
    scenario = draw(scenarios(roomy=roomy))
    size = draw(st.sampled_from([1, 2, 3, 4]))
    requests: list[Request] = []
    for request in scenario.requests:
        path, rest = draw(PATHS), draw(st.integers(1, 4))
        ids = (*path, *(100 * request.id + 2 + i for i in range(-(-rest // size))))
        length = min(len(path) * size + rest, 12)
        ids = ids[: -(-length // size)]
        requests.append(replace(request, prompt_len=length, prefix_block_ids=ids, prefix_block_size=size))
    return replace(scenario, requests=tuple(requests), config=replace(scenario.config, prefix_block_size=size))


@settings(max_examples=500, deadline=None)
@given(shared())
def test_scheduler_and_simulator_agree_with_a_brute_force_model_that_numbers_every_block(scenario: Scenario) -> None:
    scheduler, records = scenario.play()
    expected = CachingReference(
        scenario.config, scenario.make_policy(), scenario.cost, scenario.requests, scenario.overheads
    )
    outcome = expected.run()
    assert token_times(records) == {
        request_id: [float(t) for t in times] for request_id, times in outcome.tokens.items() if times
    }
    assert [request.id for request, _ in scheduler.dropped] == outcome.dropped
    assert (scheduler.preemptions, scheduler.switches) == (outcome.preemptions, outcome.switches)
    assert (scheduler.prompt_tokens, scheduler.prefix_hit_tokens) == (expected.prompt_tokens, expected.hit_tokens)
    assert scheduler.blocks.peak_used == outcome.kv_peak
    assert scheduler.blocks.cached == len(expected.cache.cached())


@settings(deadline=None)
@given(shared())
def test_law_3_free_used_and_cached_blocks_are_all_blocks_after_every_run(scenario: Scenario) -> None:
    scheduler = scenario.scheduler()
    for _ in replay(scenario.requests, scheduler, scenario.executor()):
        scheduler.blocks.check_integrity()
    assert scheduler.blocks.used == 0


@settings(max_examples=300, deadline=None)
@given(scenario=shared(), decode_steps=st.integers(1, 3))
def test_law_10_coarse_decode_runs_give_the_same_result_as_short_ones(scenario: Scenario, decode_steps: int) -> None:
    coarse, coarse_records = scenario.play()
    fine, fine_records = scenario.play(decode_steps)
    assert token_times(fine_records) == token_times(coarse_records)
    assert (fine.preemptions, fine.switches, fine.dropped) == (coarse.preemptions, coarse.switches, coarse.dropped)
    assert (fine.prefix_hit_tokens, fine.blocks.cached) == (coarse.prefix_hit_tokens, coarse.blocks.cached)
