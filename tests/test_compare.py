"""Replays side by side: the laws that tie a summary to its trace, and which policy is called the best."""

from __future__ import annotations

import io
import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from synthetic_profile import write_profile

from semipd.compare import Comparison, judge, policy_names, run_all
from semipd.config import CompareConfig, SchedulerOptions, TraceConfig, build
from semipd.core import InputError, StepRecord
from semipd.distribution import Distribution
from semipd.metrics import Summary
from semipd.profile import load_profile
from semipd.replay import Setup, prepare, scheduler_config, simulate
from semipd.report.comparison import comparison_report
from semipd.slo import Slo


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profile") / "p", all_modes=True)


def config(profile: Path, **changed: object) -> CompareConfig:
    given = {
        "trace": {"path": "azure-conv-synth.csv", "limit": 120, "rate_scale": 2.0},
        "profile": str(profile),
        "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
    }
    return build(given | changed, CompareConfig, "test")


@pytest.fixture(scope="module")
def setup(profile: Path) -> Setup:
    return prepare(config(profile))


def test_every_policy_completes_every_request_of_the_same_trace(setup: Setup) -> None:
    names = policy_names((), setup)
    assert names == (
        *("exclusive", "exclusive-decode", "static-8", "static-16", "static-24", "capped-8", "capped-16", "capped-24"),
        *("priority", "chunked-256", "chunked-512", "chunked-1024", "chunked-2048", "adaptive"),
    )
    runs = list(run_all(setup, names, jobs=1))
    assert [run.policy for run in runs] == list(names)
    for run in runs:
        assert (run.requests, run.completed, run.dropped) == (120, 120, 0)
        assert math.isclose(sum(run.time_in_split.values()), 1.0)
        assert run.output_throughput_tps is not None
        assert run.output_throughput_tps * run.duration_s == pytest.approx(setup.trace.output_len.sum())


@pytest.mark.parametrize("options", [{}, {"predictor_error": 0.2, "variation_seed": 3}])
def test_processes_of_their_own_find_the_same(profile: Path, options: dict[str, float]) -> None:
    setup = prepare(config(profile, **options))
    names = ("exclusive", "static-16", "adaptive")
    alone, apart = ({run.policy: replace(run, wall_s=None) for run in run_all(setup, names, jobs)} for jobs in (1, 2))
    assert alone == apart


def test_what_each_request_met_adds_up_to_the_summary(setup: Setup) -> None:
    outcome = simulate(setup, "static-16")
    table, summary = outcome.requests, outcome.summary
    good = (table.ttft_s <= setup.slo.ttft_s) & (table.tpot_s <= setup.slo.tpot_s)
    assert summary.slo_attainment == good.mean()
    assert summary.ttft_s is not None
    assert summary.ttft_s.p99 == np.percentile(table.ttft_s, 99)
    assert outcome.complete


def test_a_watcher_sees_time_and_finished_requests_grow(setup: Setup) -> None:
    seen: list[tuple[float, int]] = []
    simulate(setup, "static-16", watch=lambda now_s, finished: seen.append((now_s, finished)))
    assert seen == sorted(seen)
    assert seen[-1][1] <= 120


def test_an_interrupted_replay_keeps_what_was_complete(setup: Setup) -> None:
    finished: list[int] = []

    def interrupt(record: StepRecord) -> None:
        finished.extend(record.finished)
        if len(finished) > 30:
            signal.raise_signal(signal.SIGINT)

    outcome = simulate(setup, "static-16", each=interrupt)
    assert not outcome.complete
    assert 30 < outcome.summary.completed == len(finished) < 120
    assert outcome.summary.requests == 120
    json.dumps(outcome.summary.to_json(), allow_nan=False)


def test_the_kv_cache_gets_what_the_weights_leave(profile: Path, setup: Setup) -> None:
    found, trace = load_profile(profile), setup.trace
    options = SchedulerOptions(gpu_memory_utilization=0.5, block_size=16)
    blocks = scheduler_config(options, found, trace).num_blocks
    assert blocks == (found.device_memory_bytes // 2) // (16 * found.kv_bytes_per_token)
    heavy = replace(found, weights_bytes=found.device_memory_bytes // 4)
    assert scheduler_config(options, heavy, trace).num_blocks == blocks // 2
    with pytest.raises(InputError, match=r"^scheduler.gpu_memory_utilization: found 0.5, which leaves 0.0 GiB"):
        scheduler_config(options, replace(found, weights_bytes=found.device_memory_bytes // 2), trace)


def test_unknown_names_are_refused_before_anything_runs(profile: Path, setup: Setup) -> None:
    with pytest.raises(InputError, match="static-N with N one of the measured prefill SMs: 8, 16, 24"):
        policy_names(("exclusive", "static-12"), setup)
    with pytest.raises(InputError, match=r"^test: slo: found 'x'; expected ttft_s and tpot_s, a YAML file"):
        prepare(config(profile, slo="x"))
    with pytest.raises(InputError, match=r"^trace: found 'nowhere.csv'; expected a file, or what is shipped: "):
        prepare(config(profile, trace=TraceConfig(path="nowhere.csv").model_dump()))
    with pytest.raises(InputError, match="profile: found 'h100/x'; expected a folder or one of h200/gqa-64-8-128"):
        prepare(CompareConfig(profile="h100/x"))


def test_a_predictor_that_errs_changes_adaptive_alone_and_is_named(profile: Path) -> None:
    sure, unsure = (prepare(config(profile, predictor_error=error, predictor_seed=2)) for error in (0.0, 2.0))
    for policy in ("exclusive", "static-16"):
        assert replace(simulate(sure, policy).summary, wall_s=None) == replace(
            simulate(unsure, policy).summary, wall_s=None
        )
    runs = [simulate(s, "adaptive").summary for s in (sure, unsure)]
    assert runs[0].time_in_split != runs[1].time_in_split
    assert judge(sure, runs[:1]).to_json()["predictor"].endswith("a perfect predictor")
    assert judge(unsure, runs[1:]).to_json()["predictor"] == "these tables misjudged by 200 % (seed 2)"


# Which one to take


def summary(policy: str, goodput_rps: float, ttft_p99_s: float = 0.5, tpot_p99_s: float = 0.01) -> Summary:
    def all_at(value: float) -> Distribution:
        return Distribution(value, value, value, value, value, value)

    return Summary(
        policy=policy,
        requests=100,
        completed=100,
        dropped=0,
        duration_s=10.0,
        ttft_s=all_at(ttft_p99_s),
        tpot_s=all_at(tpot_p99_s),
        itl_s=all_at(tpot_p99_s),
        e2e_s=all_at(1.0),
        request_throughput_rps=10.0,
        output_throughput_tps=100.0,
        slo=Slo(1.0, 0.02),
        slo_attainment=goodput_rps / 10,
        goodput_rps=goodput_rps,
        preemptions=0,
        switches=0,
        time_in_split={"full": 1.0},
        kv_peak_share=0.5,
        extrapolated_share=0.0,
        saturation="stable",
        wall_s=0.1,
    )


def judged(setup: Setup, *runs: Summary) -> Comparison:
    return judge(setup, runs)


def test_the_most_goodput_wins_and_the_best_static_split_is_named_beside_it(setup: Setup) -> None:
    found = judged(setup, summary("adaptive", 9.0), summary("static-8", 5.0), summary("static-16", 7.0))
    assert (found.best_static, found.recommended) == ("static-16", "adaptive")
    assert [run.policy for run in found.runs] == ["static-8", "static-16", "adaptive"]
    assert found.reason == (
        "Take adaptive: it meets both targets for 90.0 % of requests (p99 TTFT 0.5 s, p99 TPOT 10 ms), where static-16 "
        "does for 70.0 % of requests (p99 TTFT 0.5 s, p99 TPOT 10 ms)."
    )


def test_it_is_said_when_adaptive_loses(setup: Setup) -> None:
    found = judged(setup, summary("adaptive", 6.0), summary("static-8", 9.0), summary("exclusive", 3.0))
    assert (found.best_static, found.recommended) == ("static-8", "static-8")
    assert found.reason.endswith("; adaptive loses here.")
    assert "adaptive does for 60.0 %" in found.reason
    assert "exclusive does for 30.0 %" in found.reason


def test_among_equals_the_tail_decides_by_its_share_of_the_target(setup: Setup) -> None:
    late, slow = summary("static-8", 9.0, ttft_p99_s=0.9), summary("static-16", 8.95, tpot_p99_s=0.016)
    found = judged(setup, late, slow, summary("adaptive", 8.99, ttft_p99_s=0.95))
    assert found.recommended == "static-16"  # 0.8 of its target, against 0.9
    assert found.reason.endswith("; adaptive serves as many, with longer tails.")


def test_adaptive_has_longer_tails_only_where_it_has(setup: Setup) -> None:
    same = judged(setup, summary("exclusive", 9.0), summary("adaptive", 9.0))
    assert same.recommended == "exclusive"
    assert same.reason.endswith("; adaptive does the same.")
    longer = judged(setup, summary("exclusive", 9.0), summary("adaptive", 9.0, ttft_p99_s=0.6))
    assert longer.reason.endswith("; adaptive serves as many, with longer tails.")
    none = replace(summary("adaptive", 0.0), completed=0, ttft_s=None, tpot_s=None)
    assert judged(setup, summary("exclusive", 0.0), none).reason.endswith("; adaptive loses here.")


def test_where_every_request_is_dropped_it_is_said_why_and_nothing_is_recommended(profile: Path) -> None:
    tiny = prepare(config(profile, scheduler={"num_blocks": 1, "block_size": 2}))
    found = judge(tiny, run_all(tiny, ("exclusive", "static-8", "chunked-512", "adaptive"), jobs=1))
    assert found.reason == (
        "No request completed under any policy: 120 of 120 were dropped, since they never fit the KV cache of 2 tokens."
    )
    assert (found.best_static, found.best_chunked, found.against_chunked) == (None, None, None)
    assert found.recommended == "exclusive"  # a name even so
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as text:
        console.print(comparison_report(found))
    shown = " ".join(text.get().split())
    assert "★" not in shown
    assert "•" not in shown
    assert "bound by" not in shown
    assert found.reason in shown
    assert "Requests dropped, since they never fit the KV cache: exclusive 120, static-8 120," in shown


def test_without_a_static_split_there_is_no_best_one(setup: Setup) -> None:
    found = judged(setup, summary("exclusive", 0.0), summary("chunked-512", 0.0))
    assert (found.best_static, found.recommended, found.against_chunked) == (None, "exclusive", None)


@pytest.mark.parametrize(
    ("split_rps", "fused_rps", "verdict"),
    [(9.0, 6.0, "beats"), (6.0, 9.0, "loses to"), (9.0, 8.95, "serves as many good requests as")],
)
def test_the_best_split_is_held_against_the_best_chunked_prefill(
    setup: Setup, split_rps: float, fused_rps: float, verdict: str
) -> None:
    found = judged(
        setup,
        *(summary("static-8", 0.5), summary("static-16", split_rps)),
        *(summary("chunked-300", fused_rps), summary("chunked-4000", 0.5)),
    )
    assert [run.policy for run in found.runs] == ["static-8", "static-16", "chunked-300", "chunked-4000"]
    assert (found.best_static, found.best_chunked) == ("static-16", "chunked-300")
    assert found.against_chunked == (
        f"Splitting {verdict} chunked prefill here: at its best, with static-16, both targets are met for "
        f"{10 * split_rps:.1f} % of requests (p99 TTFT 0.5 s, p99 TPOT 10 ms); with chunked-300 for "
        f"{10 * fused_rps:.1f} % of requests (p99 TTFT 0.5 s, p99 TPOT 10 ms)."
    )
    assert found.to_json()["against_chunked"] == found.against_chunked


def test_the_comparison_of_every_policy_fits_80_columns(setup: Setup) -> None:
    runs = [replace(summary(name, 9.99), switches=98765) for name in policy_names((), setup)]
    runs[1] = replace(runs[1], goodput_rps=10.0, slo_attainment=1.0)
    console = Console(file=io.StringIO(), width=80)
    with console.capture() as text:
        console.print(comparison_report(judge(setup, runs)))
    lines = text.get().splitlines()
    assert max(map(len, lines)) <= 80
    for run in runs:
        line = next(line for line in lines if line.startswith(f"{run.policy} "))
        assert len(line.replace("★", "").replace("•", "").split()) == 12
        assert "…" not in line


def test_the_document_has_the_fixed_names(setup: Setup) -> None:
    document = judged(setup, summary("exclusive", 1.0), summary("static-8", 2.0)).to_json()
    assert set(document) >= {"trace", "profile", "runs", "best_static", "recommended"}
    assert document["trace"] == "azure-conv-synth"
    assert set(document["runs"][0]) == {
        "policy", "requests", "completed", "dropped", "duration_s", "ttft_s", "tpot_s", "itl_s", "e2e_s",
        "request_throughput_rps", "output_throughput_tps", "slo", "slo_attainment", "goodput_rps", "preemptions",
        "switches", "time_in_split", "kv_peak_share", "extrapolated_share", "saturation", "wall_s",
            "prefix_hit_share", "bound_by", "time_shares",
    }  # fmt: skip


def test_a_replay_on_a_gpu_takes_the_kernel_that_its_profile_was_measured_with() -> None:
    from semipd.profile import load_profile

    profile = load_profile("h200/gqa-64-8-128")
    assert profile.prefill_backend(96) == "fa3-sized"
    with pytest.raises(KeyError, match="no prefill was measured on 97 SMs"):
        profile.prefill_backend(97)
