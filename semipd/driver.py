"""The loop that joins requests, scheduler and executor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from semipd.client import Client
from semipd.core import Request, StepRecord
from semipd.executor import Executor
from semipd.scheduler import Scheduler


def replay(requests: Iterable[Request] | Client, scheduler: Scheduler, executor: Executor) -> Iterator[StepRecord]:
    """Run every request and yield what each run did, in the order in which runs ended.

    The executor owns time, and the client what is sent when; plain requests are sent when they arrive. Runs that were
    asked to yield and end at this very moment are completed before anything is launched, so that simultaneous
    events have one outcome.

    Raises InputError as ``Client`` does.
    """
    client = requests if isinstance(requests, Client) else Client(requests)
    dropped = 0
    while True:
        now = executor.now()
        while client.upcoming is not None and client.upcoming.arrival_s <= now:
            scheduler.add(client.send())
        plan = scheduler.schedule(now, executor.steps_done)
        for run_id in plan.yields:
            executor.yield_(run_id)
        for run in plan.launches:
            executor.launch(run)
        while dropped < len(scheduler.dropped):
            client.ended(scheduler.dropped[dropped][0].id, now)
            dropped += 1
        if client.upcoming is None and not scheduler.has_unfinished():
            return
        at_once = plan.yields and not scheduler.drains
        until = now if at_once else client.upcoming.arrival_s if client.upcoming is not None else None
        for record in executor.wait(until):
            scheduler.complete(record)
            for request_id in record.finished:
                client.ended(request_id, record.end_s)
            yield record
