"""Replays of several policies on one trace, side by side, with the one to take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from semipd.metrics import Summary
from semipd.policies import all_names, in_order, make_policy
from semipd.profile import Profile
from semipd.replay import Setup, simulate
from semipd.scheduler_config import SchedulerConfig
from semipd.trace import Trace

CAPACITY = 0.9
"""A policy copes with a load when at least this share of the requests meets both targets."""

ALIKE = 0.99
"""Goodputs within 1 % of the best count as equal: a tail latency then decides."""


@dataclass(frozen=True)
class Comparison:
    """The same trace under several policies. ``reason``: in one sentence, why the recommended one.

    ``best_chunked``: the best chunked prefill. ``against_chunked``: in one sentence, how the best static split compares
    with it; None unless both were run. ``operations``: what was done to the trace. ``rate_rps``: requests a second as
    replayed. ``predicted_by``: what policies predicted with.
    """

    trace: str
    operations: tuple[str, ...]
    rate_rps: float | None
    predicted_by: str
    variation_seed: int | None
    profile: Profile
    runs: tuple[Summary, ...]
    best_static: str | None
    best_chunked: str | None
    recommended: str
    reason: str
    against_chunked: str | None

    def to_json(self) -> dict[str, Any]:
        """The document of ``semipd compare --json``."""
        return {
            "trace": self.trace,
            "operations": list(self.operations),
            "rate_rps": self.rate_rps,
            "predictor": self.predicted_by,
            "variation_seed": self.variation_seed,
            "profile": self.profile.name,
            "runs": [run.to_json() for run in self.runs],
            "best_static": self.best_static,
            "best_chunked": self.best_chunked,
            "recommended": self.recommended,
            "reason": self.reason,
            "against_chunked": self.against_chunked,
        }


def rate_rps(trace: Trace) -> float | None:
    """Mean arrival rate, None for requests that all arrive at once."""
    return len(trace) / trace.duration_s if trace.duration_s > 0 else None


def policy_names(asked: Sequence[str], setup: Setup) -> tuple[str, ...]:
    """The policies to compare, all of them when none is asked for. Raises InputError for an unknown one."""
    for name in asked:
        make_policy(name, setup.cost, setup.slo)
    return tuple(dict.fromkeys(asked)) or all_names(setup.cost)


def run_all(setup: Setup, policies: Sequence[str], jobs: int) -> Iterator[Summary]:
    """Replay under each policy, ``jobs`` at a time in processes of their own; summaries as they come.

    Raises KeyboardInterrupt instead of a summary of what Ctrl-C cut short.
    """
    if jobs == 1:
        replays: Iterable[tuple[Summary, bool]] = (_summary(setup, name) for name in policies)
    else:
        from joblib import Parallel, delayed  # here, since one replay does without

        work = (delayed(_summary)(setup, name) for name in policies)
        replays = Parallel(n_jobs=jobs, return_as="generator_unordered")(work)
    for summary, complete in replays:
        if not complete:  # Ctrl-C may have reached a worker first
            raise KeyboardInterrupt
        yield summary


def _summary(setup: Setup, policy: str) -> tuple[Summary, bool]:
    """Without the table of requests, which need not be sent from a worker."""
    outcome = simulate(setup, policy)
    return outcome.summary, outcome.complete


def judge(setup: Setup, runs: Iterable[Summary]) -> Comparison:
    """Order the runs, find the best static split, the best chunked prefill and the policy to take.

    The best has the most goodput; among those within 1 % of it, the one whose p99 latencies leave the most
    room below their targets. Where no request completed, there is no best one: the first policy is named, and the
    reason says why. Raises ValueError without a run.
    """
    ordered = tuple(sorted(runs, key=lambda run: in_order(run.policy)))
    best = _best(ordered)
    static, chunked = (_best_of(ordered, kind) for kind in ("static-", "chunked-"))
    return Comparison(
        trace=setup.trace.name,
        operations=setup.trace.operations,
        rate_rps=rate_rps(setup.trace),
        predicted_by=setup.predicted_by,
        variation_seed=None if setup.variation is None else setup.variation.seed,
        profile=setup.profile,
        runs=ordered,
        best_static=static.policy if static else None,
        best_chunked=chunked.policy if chunked else None,
        recommended=best.policy,
        reason=_reason(ordered, best, static) if best.completed else _nothing(best, setup.scheduler),
        against_chunked=_against_chunked(static, chunked) if static and chunked else None,
    )


def _best_of(runs: Sequence[Summary], kind: str) -> Summary | None:
    of_kind = [run for run in runs if run.policy.startswith(kind) and run.completed]
    return _best(of_kind) if of_kind else None


def _best(runs: Sequence[Summary]) -> Summary:
    most = max(run.goodput_rps or 0.0 for run in runs)
    return min((run for run in runs if (run.goodput_rps or 0.0) >= ALIKE * most), key=_tail)


def _tail(run: Summary) -> float:
    """The larger of p99 TTFT and p99 TPOT, as a share of its target."""
    if run.ttft_s is None or run.tpot_s is None:
        return float("inf")
    return max(run.ttft_s.p99 / run.slo.ttft_s, run.tpot_s.p99 / run.slo.tpot_s)


def _reason(runs: Sequence[Summary], best: Summary, static: Summary | None) -> str:
    """One sentence: what the recommended policy reaches, and what the others that matter do."""
    named = {run.policy: run for run in runs}
    rivals = [named[name] for name in ("adaptive", "exclusive") if name in named and name != best.policy]
    if static is not None and static is not best:
        rivals.insert(0, static)
    if (best.slo_attainment or 0.0) >= CAPACITY:
        said = f"Take {best.policy}: it meets both targets for {_reached(best)}"
    else:
        said = (
            f"None copes with this rate, for none meets both targets for {100 * CAPACITY:.0f} % of requests; "
            f"{best.policy} comes closest, with {_reached(best)}"
        )
    if rivals:
        *others, last = (f"{run.policy} does for {_reached(run)}" for run in rivals)
        said += ", where " + (f"{', '.join(others)} and {last}" if others else last)
    if "adaptive" in named and best.policy != "adaptive":
        said += f"; adaptive {_against_best(named['adaptive'], best)}"
    return said + "."


def _against_best(run: Summary, best: Summary) -> str:
    """What a policy does that was not found the best."""
    if not run.completed or (run.goodput_rps or 0.0) < ALIKE * (best.goodput_rps or 0.0):
        return "loses here"
    return "serves as many, with longer tails" if _tail(run) > _tail(best) else "does the same"


def _nothing(run: Summary, scheduler: SchedulerConfig) -> str:
    """Why no policy completed a request."""
    said = "No request completed under any policy"
    if run.dropped:  # for which there is one reason
        capacity = scheduler.num_blocks * scheduler.block_size
        dropped = f"{run.dropped:,} of {run.requests:,} were dropped"
        said += f": {dropped}, since they never fit the KV cache of {capacity:,} tokens"
    return said + "."


def _against_chunked(static: Summary, chunked: Summary) -> str:
    """Whether splitting is better than chunked prefill at all, by the goodput of the best of each."""
    split, fused = static.goodput_rps or 0.0, chunked.goodput_rps or 0.0
    verdict = "beats" if split > fused else "loses to"
    if min(split, fused) >= ALIKE * max(split, fused):
        verdict = "serves as many good requests as"
    return (
        f"Splitting {verdict} chunked prefill here: at its best, with {static.policy}, both targets are met for "
        f"{_reached(static)}; with {chunked.policy} for {_reached(chunked)}."
    )


def _reached(run: Summary) -> str:
    if run.ttft_s is None or run.tpot_s is None or run.slo_attainment is None:
        return "none"
    return (
        f"{100 * run.slo_attainment:.1f} % of requests "
        f"(p99 TTFT {_three_digits(run.ttft_s.p99)} s, p99 TPOT {_three_digits(1e3 * run.tpot_s.p99)} ms)"
    )


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
