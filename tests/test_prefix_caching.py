"""Prefix caching in the whole system: scheduler, simulator and KV blocks together."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_prefix_cache import CachingReference
from passing_on import PassingOn
from synthetic_profile import write_profile
from test_laws import Scenario, scenarios, token_times

from semipd.cli import main
from semipd.core import Phase, Request, Run
from semipd.cost import ConstantCost
from semipd.driver import replay
from semipd.policies import make_policy
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor
from semipd.slo import Slo
from semipd.trace import Trace, head, read_trace

TRACES = Path(os.environ.get("SEMIPD_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")
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
    assert fine.blocks.peak_used == coarse.blocks.peak_used


@settings(deadline=None)
@given(shared(roomy=True))
def test_with_room_for_all_every_prompt_token_is_prefilled_or_hit_and_hits_are_those_of_an_endless_cache(
    scenario: Scenario,
) -> None:
    scheduler, records = scenario.play()
    prefilled = sum(
        sum(record.run.new_tokens[record.run.decodes :])
        for record in records
        if record.run.phase is not Phase.DECODE and record.steps == record.run.max_steps
    )
    assert scheduler.prompt_tokens == sum(request.prompt_len for request in scenario.requests)
    assert prefilled + scheduler.prefix_hit_tokens == scheduler.prompt_tokens
    unit = math.lcm(scenario.config.block_size, scenario.config.prefix_block_size)
    assert scheduler.prefix_hit_tokens == endless_hit_tokens(scenario.requests, unit)


def endless_hit_tokens(requests: Iterable[Request], unit: int) -> int:
    """Tokens in leading whole units that an earlier prompt had too, the last token of a prompt never among them."""
    seen: set[tuple[int, ...]] = set()
    total = 0
    for request in requests:
        per_unit = unit // request.prefix_block_size
        stretches = [request.prefix_block_ids[: n * per_unit] for n in range(1, request.prompt_len // unit + 1)]
        total += sum(n * unit < request.prompt_len and s in seen for n, s in enumerate(stretches, 1)) * unit
        seen.update(stretches)
    return total


def mooncake() -> Trace:
    path = TRACES / "mooncake-fast25" / "conversation_trace.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: set SEMIPD_TRACES to the folder of real traces")
    return read_trace(path)


def hit_share(trace: Trace, num_blocks: int) -> float:
    cost = ConstantCost(1e-3, 1e-2, layers=1)
    config = SchedulerConfig(num_blocks=num_blocks, prefix_block_size=512, max_num_seqs=64)
    scheduler = Scheduler(config, make_policy("static-64", cost, Slo(1, 1)), device_sms=132, layers=1)
    for _ in replay(trace.requests(), scheduler, SimExecutor(cost)):
        pass
    assert scheduler.prefix_hit_share is not None
    return scheduler.prefix_hit_share


def test_mooncakes_conversations_hit_as_much_as_in_an_endless_cache_when_there_is_room_and_less_when_there_is_not() -> (
    None
):
    whole = mooncake()
    assert endless_hit_tokens(whole.requests(), 512) / whole.prompt_len.sum() == pytest.approx(0.373, abs=5e-4)
    trace = head(whole, 2500)
    endless = endless_hit_tokens(trace.requests(), 512) / trace.prompt_len.sum()
    room = -(-int(trace.prompt_len.sum() + trace.output_len.sum()) // 16)
    assert hit_share(trace, room) == endless
    shares = [hit_share(trace, tokens // 16) for tokens in (500_000, 2_000_000)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < endless


def test_block_ids_change_nothing_without_prefix_caching() -> None:
    prompts = [Request(i, 0.25 * i, 40, 3, (1, 2, 3), 16) for i in range(6)]
    bare = [replace(request, prefix_block_ids=(), prefix_block_size=0) for request in prompts]

    def play(requests: list[Request]) -> list[tuple[float, list[float]]]:
        cost = ConstantCost(0.125, 0.25)
        policy = make_policy("static-64", cost, Slo(1, 1))
        scheduler = Scheduler(SchedulerConfig(num_blocks=20), policy, device_sms=132, layers=1)
        assert scheduler.prefix_hit_share is None
        return [(r.start_s, r.ends_s.tolist()) for r in replay(requests, scheduler, SimExecutor(cost))]

    assert play(prompts) == play(bare)


class Recorded(PassingOn):
    """Remembers what it was asked to prefill."""

    def launch(self, run: Run) -> None:
        if run.phase is Phase.PREFILL:
            self.prefills = [*getattr(self, "prefills", []), (run.new_tokens, run.context_lens)]
        super().launch(run)


def prefills(requests: list[Request], **limits: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    cost = ConstantCost(0.125, 0.25)
    config = SchedulerConfig(**{"num_blocks": 1000, "block_size": 16, "prefix_block_size": 512, **limits})  # type: ignore[arg-type]
    scheduler = Scheduler(config, make_policy("exclusive", cost, Slo(1, 1)), device_sms=132, layers=1)
    executor = Recorded(SimExecutor(cost))
    for _ in replay(requests, scheduler, executor):
        scheduler.blocks.check_integrity()
    return executor.prefills


def test_a_prompt_starts_after_its_whole_cached_blocks_and_computes_at_least_its_last_token() -> None:
    """By hand: two blocks of 512 tokens and a part of a third, then the same again, longer, and cut at the blocks."""
    requests = [
        Request(0, 0.0, 1200, 1, (7, 8, 9), 512),
        Request(1, 1.0, 1200, 1, (7, 8, 9), 512),  # the third block is not whole: it is not shared
        Request(2, 2.0, 1600, 1, (7, 8, 10, 11), 512),
        Request(3, 3.0, 1024, 1, (7, 8), 512),  # all of it is cached: its last block is computed
        Request(4, 4.0, 1025, 1, (7, 8, 12), 512),
        Request(5, 5.0, 1025, 1, (6, 8, 12), 512),  # other from the first block on, whatever the second is called
    ]
    assert prefills(requests) == [
        ((1200,), (0,)), ((176,), (1024,)), ((576,), (1024,)), ((512,), (512,)), ((1,), (1024,)), ((1025,), (0,)),
    ]  # fmt: skip


def test_prompts_of_one_batch_share_what_those_before_them_compute() -> None:
    requests = [Request(i, 0.0, 600, 1, (7, 8 + i), 512) for i in range(3)]
    assert prefills(requests) == [((600, 88, 88), (0, 512, 512))]


@pytest.mark.parametrize(
    ("block_size", "prefix_block_size", "unit"),
    [(16, 512, 512), (16, 16, 16), (32, 16, 32), (16, 24, 48), (64, 16, 64)],
)
def test_blocks_of_two_sizes_are_shared_in_units_of_their_least_common_multiple(
    block_size: int, prefix_block_size: int, unit: int
) -> None:
    length = 5 * unit + 1
    ids = tuple(range(-(-length // prefix_block_size)))
    changed = ids[: 3 * unit // prefix_block_size - 1]  # differs in the last block of the third unit
    other = (*changed, *range(1000, 1000 + len(ids) - len(changed)))
    requests = [
        Request(0, 0.0, length, 1, ids, prefix_block_size),
        Request(1, 1.0, length, 1, ids, prefix_block_size),
        Request(2, 2.0, length, 1, other, prefix_block_size),
    ]
    found = prefills(requests, block_size=block_size, prefix_block_size=prefix_block_size)
    assert found == [((length,), (0,)), ((1,), (5 * unit,)), ((length - 2 * unit,), (2 * unit,))]


def test_ids_of_blocks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="request 0: prefix blocks of 16 tokens; expected 512"):
        prefills([Request(0, 0.0, 20, 1, (1, 2), 16)])


def replay_file(tmp_path: Path, folder: Path, rows: list[dict[str, object]], **scheduler: object) -> Path:
    path, config = tmp_path / "t.jsonl", tmp_path / "replay.yaml"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {"trace": {"path": str(path)}, "profile": str(folder), "policy": "static-16", "scheduler": scheduler}
    config.write_text(json.dumps(document | {"slo": {"ttft_s": 1.0, "tpot_s": 1.0}}))
    return config


ROWS: list[dict[str, object]] = [
    {"timestamp": 1000 * i, "input_length": 2000, "output_length": 3, "hash_ids": [0, 1, 2, 3 + i]} for i in range(4)
]


def test_a_replay_with_prefix_caching_says_what_was_cached_and_is_faster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_profile(tmp_path / "p")
    found = []
    for enabled in (False, True):
        config = replay_file(tmp_path, folder, ROWS, enable_prefix_caching=enabled, num_blocks=1000)
        assert main(["replay", str(config), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, cached = found
    assert plain["prefix_hit_share"] is None
    assert cached["prefix_hit_share"] == pytest.approx(3 * 1536 / 8000)
    assert cached["ttft_s"]["mean"] < plain["ttft_s"]["mean"]
    assert cached["ttft_s"]["max"] == plain["ttft_s"]["max"]  # that of the first prompt, which hits nothing
    assert main(["replay", str(config)]) == 0
    assert "58 % of the prompts' tokens were cached" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("executor", ["cpu", "gpu"])
def test_an_executor_that_shares_no_blocks_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], executor: str
) -> None:
    config = replay_file(tmp_path, write_profile(tmp_path / "p"), ROWS, enable_prefix_caching=True)
    assert main(["replay", str(config), "--executor", executor]) == 2
    assert capsys.readouterr().err == (
        f"error: scheduler.enable_prefix_caching: found true; expected false with --executor {executor}, "
        "whose sequences share no blocks\n"
    )


def test_a_trace_without_prefix_blocks_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [{name: value for name, value in row.items() if name != "hash_ids"} for row in ROWS]
    config = replay_file(tmp_path, write_profile(tmp_path / "p"), bare, enable_prefix_caching=True)
    assert main(["replay", str(config)]) == 2
    assert capsys.readouterr().err == (
        "error: scheduler.enable_prefix_caching: found true, but t has no prefix blocks; "
        "expected a trace with hash_ids\n"
    )
