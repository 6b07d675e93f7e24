"""Replays as tables: summaries in, rich tables out."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from semipd.compare import Comparison
from semipd.distribution import Distribution
from semipd.metrics import Summary
from semipd.profile import Profile
from semipd.replay import Setup

TAKE, STATIC = "★", "•"

_COLUMNS = ("TTFT\np50", "s\np90", "\np99", "TPOT\np50", "ms\np90", "\np99")


def comparison_report(found: Comparison) -> RenderableType:
    """The runs of a comparison, the best static split and the recommended policy marked, and why."""
    marks = {found.best_static: STATIC, found.recommended: TAKE} if _completed(found) else {}
    return Group(
        _title(found.trace, found.operations, found.runs[0], found.rate_rps),
        _table(found.runs, marks),
        _notes(found),
    )


def summary_report(summary: Summary, setup: Setup, rate_rps: float | None, ran: str | None = None) -> RenderableType:
    """One replay, at so many requests a second; ``ran``: what ran where, if it was no simulation."""
    finished = f"Completed {summary.completed:,}, dropped {summary.dropped:,}"
    lines = [
        f"{'; '.join([finished, summary.saturation, *_bound(summary)])}.",
        f"Time in split: {_splits(summary)}.",
        *_caveats([summary], setup.profile, setup.predicted_by, ran),
        *_varied(None if setup.variation is None or ran is not None else setup.variation.seed),
    ]
    return Group(
        _title(setup.trace.name, setup.trace.operations, summary, rate_rps),
        _table([summary], {}),
        *(Text(line) for line in lines),
    )


def _title(trace: str, operations: Sequence[str], run: Summary, rate_rps: float | None) -> Text:
    rate = "all at once" if rate_rps is None else f"{rate_rps:.3g} a second"
    slo = f"SLO {run.slo.name}: TTFT {run.slo.ttft_s:g} s, TPOT {1e3 * run.slo.tpot_s:g} ms"
    done = f" ({'; '.join(operations)})" if operations else ""
    return Text(f"{trace}: {run.requests:,} requests, {rate}{done}\n{slo}\n")


def _table(runs: Sequence[Summary], marks: dict[str | None, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("\npolicy", no_wrap=True)
    for name in (*_COLUMNS, "SLO\n%", "good\nrps", "\nswitch", "both\n%", "idle\n%"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        idle = run.time_in_split.get("idle", 0.0)
        both = max(0.0, 1 - idle - run.time_in_split.get("full", 0.0))
        table.add_row(
            f"{run.policy} {marks.get(run.policy, '')}".rstrip(),
            *_percentiles(run.ttft_s, 1.0, 3),
            *_percentiles(run.tpot_s, 1e3, 2),
            "-" if run.slo_attainment is None else f"{100 * run.slo_attainment:.1f}",
            "-" if run.goodput_rps is None else _number(run.goodput_rps),
            f"{run.switches}",
            *(f"{100 * share:.0f}" for share in (both, idle)),
        )
    return table


def _completed(found: Comparison) -> bool:
    """Whether there is something to recommend."""
    return any(run.completed for run in found.runs)


def _notes(found: Comparison) -> Text:
    lines = ["", f"{TAKE} {found.reason}" if _completed(found) else found.reason]
    if found.best_static is not None and found.best_static != found.recommended:
        lines.append(f"{STATIC} the best static split: {found.best_static}.")
    if found.against_chunked is not None:
        lines.append(found.against_chunked)
    taken = [run for run in found.runs if run.policy == found.recommended]
    lines += [f"{run.policy} is {bound}." for run in taken for bound in _bound(run)]
    lines += [f"Time in split of adaptive: {_splits(run)}." for run in found.runs if run.policy == "adaptive"]
    caveats = _caveats(found.runs, found.profile, found.predicted_by)
    return Text("\n".join([*lines, *caveats, *_varied(found.variation_seed)]))


def _varied(seed: int | None) -> list[str]:
    return [] if seed is None else [f"Step times vary by the measured spread, drawn with seed {seed}."]


def _caveats(runs: Sequence[Summary], profile: Profile, predicted_by: str, ran: str | None = None) -> list[str]:
    """What one has to know to read the figures: what was simulated, by which predictor, and where it stops."""
    lines = [
        "SLO %: requests that met both targets, good rps: these per second; switch: changes of the allocation; both %: "
        "of the time, at an allocation that lets both phases run at once; idle %: with nothing in flight.",
        f"Simulated on {profile.device}, {profile.name}. {profile.description}" if ran is None else ran,
    ]
    if ran is None and any(run.policy == "adaptive" for run in runs):
        lines.append(f"adaptive predicts with {predicted_by}.")
    if ran is None and any(run.switches for run in runs):
        lines.append(
            f"A switch costs the wait until both phases reach a boundary, and {profile.overheads.switch_ms:g} ms."
            if profile.overheads.switch_ms
            else "A switch costs the wait until both phases reach a boundary, and nothing else."
        )
    if ran is None and (starts := _starts(profile)):
        lines.append(f"Host time from a launch until work begins, as measured: {', '.join(starts)}.")
    dropped = [f"{run.policy} {run.dropped:,}" for run in runs if run.dropped]
    if dropped:
        lines.append(f"Requests dropped, since they never fit the KV cache: {', '.join(dropped)}.")
    unfinished = [(run.policy, run.requests - run.completed - run.dropped) for run in runs]
    if any(count for _, count in unfinished):
        lines.append(f"Requests not completed: {', '.join(f'{name} {n:,}' for name, n in unfinished if n)}.")
    preempted = [f"{run.policy} {run.preemptions:,}" for run in runs if run.preemptions]
    if preempted:
        lines.append(f"Preemptions: {', '.join(preempted)}.")
    unsteady: dict[str, list[str]] = {}
    for run in runs:
        if run.saturation != "stable":
            unsteady.setdefault(f"{run.saturation}, bound by {run.bound_by}", []).append(run.policy)
    if unsteady:
        each = (f"{what}: {', '.join(policies)}" for what, policies in unsteady.items())
        lines.append(f"Did not keep up with arrivals: {'; '.join(each)}.")
    hits = max((run.prefix_hit_share or 0.0 for run in runs), default=0.0)
    if hits:
        lines.append(f"Up to {100 * hits:.0f} % of the prompts' tokens were cached.")
    outside = max((run.extrapolated_share or 0.0 for run in runs), default=0.0)
    if outside:
        lines.append(f"Up to {100 * outside:.2g} % of a run's cost look-ups fell outside the measured grid.")
    return lines


def _bound(run: Summary) -> list[str]:
    """What bound it, in words; none when no time was spent on its requests."""
    shares = sorted((run.time_shares or {}).items(), key=lambda item: -item[1])
    shown = ", ".join(f"{bound} {100 * share:.0f} %" for bound, share in shares if share >= 0.005)
    return [f"bound by {run.bound_by} (requests' time: {shown})"] if shown else []


def _splits(run: Summary) -> str:
    shares = sorted(run.time_in_split.items(), key=lambda item: -item[1])
    shown = [f"{name} {100 * share:.0f} %" for name, share in shares if share >= 0.005]
    return ", ".join(shown) + (", others under 1 %" if len(shown) < len(shares) else "")


def _percentiles(values: Distribution | None, scale: float, decimals: int) -> tuple[str, str, str]:
    if values is None:
        return "-", "-", "-"
    p50, p90, p99 = (_number(scale * x, decimals) for x in (values.p50, values.p90, values.p99))
    return p50, p90, p99


def _number(value: float, decimals: int = 2) -> str:
    """Three significant digits; below one, that many decimals."""
    digits = decimals if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def _starts(profile: Profile) -> list[str]:
    """What the host takes to start a run of each kind, where it was measured."""
    host = profile.overheads
    of = {
        "a prefill run": host.prefill_start_ms,
        "a decode run": host.decode_start_ms,
        "each of its sequences": host.decode_start_per_sequence_ms,
        "a fused step": host.mixed_start_ms,
    }
    return [f"{name} {ms:.2g} ms" for name, ms in of.items() if ms]
