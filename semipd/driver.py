"""The loop that joins requests, scheduler and executor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from semipd.core import InputError, Request, StepRecord
from semipd.executor import Executor
from semipd.scheduler import Scheduler


def replay(requests: Iterable[Request], scheduler: Scheduler, executor: Executor) -> Iterator[StepRecord]:
    """Run every request and yield what each run did, in the order in which runs ended.

    The executor owns time; requests are read one ahead of it. Runs that were asked to yield and end at this very
    moment are completed before anything is launched, so that simultaneous events have one outcome.

    Raises InputError when a request arrives before its predecessor.
    """
    arrivals = _in_order(requests)
    upcoming = next(arrivals, None)
    while True:
        now = executor.now()
        while upcoming is not None and upcoming.arrival_s <= now:
            scheduler.add(upcoming)
            upcoming = next(arrivals, None)
        plan = scheduler.schedule(now, executor.steps_done)
        for run_id in plan.yields:
            executor.yield_(run_id)
        for run in plan.launches:
            executor.launch(run)
        if upcoming is None and not scheduler.has_unfinished():
            return
        at_once = plan.yields and not scheduler.drains
        until = now if at_once else upcoming.arrival_s if upcoming is not None else None
        for record in executor.wait(until):
            scheduler.complete(record)
            yield record


def _in_order(requests: Iterable[Request]) -> Iterator[Request]:
    last_s = float("-inf")
    for request in requests:
        if request.arrival_s < last_s:
            raise InputError(
                f"request {request.id}: arrival_s: found {request.arrival_s} after {last_s}; "
                "expected requests in order of arrival"
            )
        last_s = request.arrival_s
        yield request
