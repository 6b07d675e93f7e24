"""One policy on one trace: what that needs, read and checked, and what came of it."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from semipd.client import ClosedLoop
from semipd.config import SchedulerOptions, TraceConfig, Workload
from semipd.core import InputError, StepRecord
from semipd.cost import CostModel, Misjudged
from semipd.diagnosis import time_shares
from semipd.driver import replay
from semipd.executor import Executor
from semipd.log import Log
from semipd.metrics import RequestTable, Summary, request_table, summarise
from semipd.policies import make_policy
from semipd.profile import Profile, load_profile
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor
from semipd.slo import Slo
from semipd.table_cost import TableCost
from semipd.trace import Arrivals, Reshape, Trace, read_trace, reshape, shipped
from semipd.variation import Variation

WATCH_EVERY = 256  # records between two calls of a watcher


@dataclass(frozen=True)
class Setup:
    """Everything a replay needs but its policy, read and checked. Can be pickled.

    ``cost`` is what the simulation runs on, ``variation`` by how much its steps vary. ``predictor`` is what policies
    predict with, in words ``predicted_by``.
    """

    trace: Trace
    closed_loop: bool
    strict: bool
    profile: Profile
    cost: TableCost
    predictor: CostModel
    predicted_by: str
    slo: Slo
    scheduler: SchedulerConfig
    variation: Variation | None = None

    def simulator(self) -> SimExecutor:
        """A new simulation, which refuses look-ups outside the tables when it is to be strict."""
        outside = self.cost.outside if self.strict else None
        return SimExecutor(self.cost, self.profile.overheads, self.variation, outside)


@dataclass(frozen=True)
class Outcome:
    """One replay: its summary, and what each request met. ``complete`` is False when Ctrl-C ended it early."""

    summary: Summary
    requests: RequestTable
    complete: bool


def prepare(config: Workload) -> Setup:
    """Read the trace and the profile that a configuration names.

    Raises InputError for whatever is missing or malformed in them.
    """
    profile = load_profile(config.profile)
    cost = profile.cost()
    error, seed = config.predictor_error, config.predictor_seed
    trace = load_trace(config.trace)
    return Setup(
        trace=trace,
        closed_loop=config.trace.closed_loop,
        strict=config.strict,
        profile=profile,
        cost=cost,
        predictor=Misjudged(cost, error, seed) if error else cost,
        predicted_by=(
            f"these tables misjudged by {100 * error:g} % (seed {seed})"
            if error
            else "the tables that the simulation runs on: a perfect predictor"
        ),
        slo=config.targets,
        scheduler=scheduler_config(config.scheduler, profile, trace),
        variation=None if config.variation_seed is None else Variation(profile, config.variation_seed),
    )


def load_trace(config: TraceConfig) -> Trace:
    """The trace of that file or shipped name, reshaped. Raises InputError as the reader and the reshaping do."""
    path = Path(config.path)
    if not path.exists() and path.name == config.path:
        path = shipped(config.path)
    drawn = Arrivals(**config.arrivals.model_dump())
    options = config.model_dump(exclude={"path", "format", "limit", "arrivals", "closed_loop"})
    trace = reshape(read_trace(path, config.format, config.limit, config.seed), Reshape(arrivals=drawn, **options))
    if not config.closed_loop:
        return trace
    if trace.sessions is None:
        raise InputError(f"trace.closed_loop: found true, but {trace.name} has no sessions; expected a trace with some")
    return replace(trace, operations=(*trace.operations, "closed loop: a turn waits for the one before"))


def scheduler_config(options: SchedulerOptions, profile: Profile, trace: Trace) -> SchedulerConfig:
    """Batching limits, with the KV blocks that fit beside the weights.

    Raises InputError when not a single block does, and for prefix caching of a trace without prefix blocks.
    """
    prefixes = trace.prefixes if options.enable_prefix_caching else None
    if options.enable_prefix_caching and prefixes is None:
        raise InputError(
            f"scheduler.enable_prefix_caching: found true, but {trace.name} has no prefix blocks; expected a trace "
            "with hash_ids"
        )
    return SchedulerConfig(
        num_blocks=options.num_blocks or _blocks_that_fit(options, profile),
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        watermark=options.watermark,
        decode_steps=options.decode_steps,
        prefix_block_size=prefixes.block_tokens if prefixes is not None else 0,
    )


def _blocks_that_fit(options: SchedulerOptions, profile: Profile) -> int:
    free_bytes = options.gpu_memory_utilization * profile.device_memory_bytes - profile.weights_bytes
    blocks = int(free_bytes // (profile.kv_bytes_per_token * options.block_size))
    if blocks < 1:
        raise InputError(
            f"scheduler.gpu_memory_utilization: found {options.gpu_memory_utilization}, which leaves "
            f"{free_bytes / 2**30:.1f} GiB for the KV cache; expected room for a block of "
            f"{options.block_size} tokens"
        )
    return blocks


def simulate(
    setup: Setup,
    policy: str,
    *,
    watch: Callable[[float, int], None] | None = None,
    each: Callable[[StepRecord], None] | None = None,
) -> Outcome:
    """Replay the trace in simulation under one policy, as ``run`` does. Raises InputError for an unknown policy."""
    scheduler = Scheduler(
        setup.scheduler,
        make_policy(policy, setup.predictor, setup.slo),
        device_sms=setup.cost.device_sms,
        layers=setup.cost.layers,
    )
    return run(setup, policy, scheduler, setup.simulator(), watch=watch, each=each)


def run(
    setup: Setup,
    policy: str,
    scheduler: Scheduler,
    executor: Executor,
    *,
    watch: Callable[[float, int], None] | None = None,
    each: Callable[[StepRecord], None] | None = None,
) -> Outcome:
    """Replay the trace on an executor.

    Args:
        setup: What to replay.
        policy: What the scheduler's policy is called.
        scheduler: A new one, for this executor.
        executor: Where it runs.
        watch: Called now and then with the seconds of the replay and the requests finished so far.
        each: Called with every record, as runs end.

    Ctrl-C ends the replay, but not within a record: the outcome then holds what was complete.
    """
    log, finished, complete = Log(), 0, True
    loop = ClosedLoop(setup.trace) if setup.closed_loop else None
    start_s = time.perf_counter()
    try:
        with _no_collection(), _interrupts() as interrupts:
            for count, record in enumerate(replay(loop or setup.trace.requests(), scheduler, executor)):
                with interrupts.held_back():  # a record is noted everywhere or nowhere
                    log.append(record)
                    finished += len(record.finished)
                    if each is not None:
                        each(record)
                    if watch is not None and count % WATCH_EVERY == 0:
                        watch(record.end_s, finished)
    except KeyboardInterrupt:
        complete = False
    sent_s = loop.sent_s if loop is not None else None
    summary = summarise(
        log,
        setup.trace,
        sent_s=sent_s,
        policy=policy,
        slo=setup.slo,
        dropped=[request.id for request, _ in scheduler.dropped],
        preemptions=scheduler.preemptions,
        switches=scheduler.switches,
        kv_peak_share=scheduler.blocks.peak_used / scheduler.blocks.num_blocks,
        prefix_hit_share=scheduler.prefix_hit_share,
        wall_s=time.perf_counter() - start_s,
    )
    table = request_table(log, setup.trace, sent_s)
    return Outcome(_diagnosed(summary, log, table, scheduler, setup.cost), table, complete)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A replay makes no reference cycles: looking for some takes 5 % of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Interrupts:
    """Ctrl-C as KeyboardInterrupt, which can be held back for a while."""

    def __init__(self) -> None:
        self._held = self._came = False

    def handle(self, *_: object) -> None:
        """The signal's handler."""
        if not self._held:
            raise KeyboardInterrupt
        self._came = True

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Until the end of this."""
        self._held = True
        yield
        self._held = False
        if self._came:
            raise KeyboardInterrupt


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    interrupts, before = _Interrupts(), signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if here:  # elsewhere it is not raised, or is to be ignored
        signal.signal(signal.SIGINT, interrupts.handle)
    try:
        yield interrupts
    finally:
        if here:
            signal.signal(signal.SIGINT, before)


def _diagnosed(summary: Summary, log: Log, table: RequestTable, scheduler: Scheduler, cost: CostModel) -> Summary:
    """The summary with what the replay was bound by."""
    kept = ~np.isin(table.id, [request.id for request, _ in scheduler.dropped])
    ends_s = np.where(np.isnan(table.finish_s), log.end_s, table.finish_s)
    in_system_s = float(np.maximum(ends_s - table.arrival_s, 0.0)[kept].sum())
    outputs = table.output_tokens
    context = float((outputs * (table.prompt_tokens + outputs / 2)).sum() / outputs.sum()) if len(outputs) else 0.0
    shares = time_shares(in_system_s, log.decode_time(), scheduler.blocked.request_s, cost, context)
    most = max(shares.items(), key=lambda item: item[1])[0] if shares else None
    return replace(summary, time_shares=shares, bound_by=most)
