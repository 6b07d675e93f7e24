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

COLUMNS = ("requests", "runs", "steps", "wall_s", "cpu_s", "loop_s", "requests_per_s", "peak_mb")


def main() -> None:
    """Print a row for every size and repetition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default="azure-conv-synth.csv", help="trace file, or the name of a shipped one")
    parser.add_argument("--requests", type=int, nargs="+", help="replicate the trace to so many [default: as it is]")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="multiply the arrival rate [default: 1]")
    parser.add_argument("--policy", default="static-64", help="[default: static-64]")
    parser.add_argument("--repeat", type=int, default=1, help="times that each is run [default: 1]")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        requests = args.requests[0] if args.requests else None
        print(json.dumps(replayed(args.trace, requests, args.rate_scale, args.policy)))
        return
    print(*(f"{name:>14}" for name in COLUMNS))
    for requests in args.requests or [None]:
        for _ in range(args.repeat):
            row = measured(args, requests)
            print(*(f"{row[name]:14,.{2 * isinstance(row[name], float)}f}" for name in COLUMNS), flush=True)


def measured(args: argparse.Namespace, requests: int | None) -> dict[str, Any]:
    """One replay in a process of its own."""
    command = [sys.executable, __file__, "--child", "--trace", args.trace, "--policy", args.policy]
    command += ["--rate-scale", str(args.rate_scale)]
    command += ["--requests", str(requests)] if requests is not None else []
    start_s = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - start_s
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    cpu_s = usage.ru_utime + usage.ru_stime
    return {**json.loads(said), "wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": usage.ru_maxrss // 1024}


def replayed(path: str, requests: int | None, rate_scale: float, policy: str) -> dict[str, float]:
    """Replay a trace in this process; ``loop_s`` is without imports and reading, and with the summary."""
    from semipd.compare import prepare, simulate
    from semipd.config import CompareConfig, TraceConfig

    runs = steps = 0

    def count(record: StepRecord) -> None:
        nonlocal runs, steps
        runs += 1
        steps += len(record.ends_s)

    setup = prepare(CompareConfig(trace=TraceConfig(path=path, rate_scale=rate_scale)))
    if requests is not None:
        setup = replace(setup, trace=replicated(setup.trace, requests))
    summary = simulate(setup, policy, each=count).summary
    loop_s = summary.wall_s or 0.0
    n = summary.requests
    return {"requests": n, "runs": runs, "steps": steps, "loop_s": loop_s, "requests_per_s": n / loop_s}


def replicated(trace: Trace, requests: int) -> Trace:
    """So many requests: the trace again and again, one mean gap after its last arrival."""
    import numpy as np

    copy, row = np.divmod(np.arange(requests), len(trace))
    period_s = trace.duration_s * len(trace) / (len(trace) - 1)
    return replace(
        trace,
        arrival_s=trace.arrival_s[row] + copy * period_s,
        prompt_len=trace.prompt_len[row],
        output_len=trace.output_len[row],
        rows_read=requests,
        dropped={},
        prefixes=None,
    )


if __name__ == "__main__":
    main()
