"""How fast whole replays are: ``python benchmarks/replay_speed.py [--trace F] [--requests N]...`` (see README.md).

Every replay is a process of its own, which imports, reads, replays and summarises as ``semipd compare`` does; its wall
time, CPU time and peak memory are those of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semipd.core import StepRecord
    from semipd.trace import Trace

COLUMNS = ("requests", "runs", "steps", "tokens", "wall_s", "cpu_s", "loop_s", "requests_per_s", "peak_mb")


def main() -> None:
    """Print a row for every size and repetition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="azure-conv-synth.csv", help="trace file, or the name of a shipped one")
    parser.add_argument("--requests", type=int, nargs="+", help="replicate the trace to so many [default: as it is]")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="multiply the arrival rate [default: 1]")
    parser.add_argument("--policy", default="static-64", help="[default: static-64]")
    parser.add_argument("--profile", default=None, help="profile [default: that of semipd compare]")
    parser.add_argument("--single-steps", action="store_true", help="one decode step a run: the plain per-token loop")
    parser.add_argument(
        "--against", metavar="DIR", help="in turns with another checkout, built in place, for a ratio of CPU times"
    )
    parser.add_argument("--repeat", type=int, default=1, help="times that each is run [default: 1]")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(replayed(args)))
        return
    print(*(f"{name:>14}" for name in COLUMNS), "  checkout")
    for requests in args.requests or [None]:
        cpu_s: dict[str | None, float] = {}
        for _ in range(args.repeat):
            for checkout in (None, args.against) if args.against else (None,):
                row = measured(args, requests, checkout)
                cpu_s[checkout] = min(cpu_s.get(checkout, float("inf")), row["cpu_s"])
                columns = (f"{row[name]:14,.{2 * isinstance(row[name], float)}f}" for name in COLUMNS)
                print(*columns, f"  {checkout or 'this one'}", flush=True)
        if args.against:
            print(f"CPU time of {args.against} / that of this one: {cpu_s[args.against] / cpu_s[None]:.2f}")


def measured(args: argparse.Namespace, requests: int | None, checkout: str | None) -> dict[str, Any]:
    """One replay in a process of its own, by the code in a checkout; None for what is installed or beside this."""
    command = [sys.executable, __file__, "--child", "--trace", args.trace, "--policy", args.policy]
    command += ["--rate-scale", str(args.rate_scale)]
    command += ["--requests", str(requests)] if requests is not None else []
    command += ["--profile", args.profile] if args.profile else []
    command += ["--single-steps"] if args.single_steps else []
    start_s = time.perf_counter()
    environment = {**os.environ, **({"PYTHONPATH": checkout} if checkout else {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    cpu_s = usage.ru_utime + usage.ru_stime
    return {**json.loads(said), "wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": usage.ru_maxrss // 1024}


def replayed(args: argparse.Namespace) -> dict[str, float]:
    """Replay a trace in this process; ``loop_s`` is without imports, reading and summary."""
    from semipd.config import CompareConfig, SchedulerOptions, TraceConfig
    from semipd.replay import prepare, simulate

    runs = steps = 0

    def count(record: StepRecord) -> None:
        nonlocal runs, steps
        runs += 1
        steps += len(record.ends_s)

    options: dict[str, Any] = {"profile": args.profile} if args.profile else {}
    scheduler = SchedulerOptions(decode_steps=1 if args.single_steps else None)
    trace = TraceConfig(path=args.trace, rate_scale=args.rate_scale)
    setup = prepare(CompareConfig(trace=trace, scheduler=scheduler, **options))
    if args.requests:
        setup = replace(setup, trace=resized(setup.trace, args.requests[0]))
    summary = simulate(setup, args.policy, each=count).summary
    loop_s = summary.wall_s or 0.0
    n = summary.requests
    tokens = int(setup.trace.output_len.sum())
    return {
        "requests": n, "runs": runs, "steps": steps, "tokens": tokens, "loop_s": loop_s, "requests_per_s": n / loop_s,
    }  # fmt: skip


def resized(trace: Trace, requests: int) -> Trace:
    """So many requests: the first of the trace, or the trace again and again, one mean gap after its last arrival."""
    import numpy as np

    copy, row = np.divmod(np.arange(requests), len(trace))
    period_s = trace.duration_s * len(trace) / (len(trace) - 1)
    return replace(
        trace,
        arrival_s=trace.arrival_s[row] + copy * period_s,
        prompt_len=trace.prompt_len[row],
        output_len=trace.output_len[row],
        rows_read=requests,
        added=0,
        dropped={},
        prefixes=None,
        sessions=None,
    )


if __name__ == "__main__":
    main()
