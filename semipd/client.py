"""Who sends the requests, and when: as the trace has it, or each turn of a session after the one before has ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from heapq import heappop, heappush
from math import isnan

import numpy as np

from semipd.core import FloatArray, InputError, Request
from semipd.trace import Trace


class Client:
    """Open loop: every request is sent when it arrives in the trace, whatever became of the others.

    ``upcoming``: the next request to be sent, as far as that is known by now; requests are read one ahead.
    Raises InputError when a request arrives before its predecessor.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = _in_order(requests)
        self.upcoming = next(self._requests, None)

    def send(self) -> Request:
        """The request that was upcoming. Raises ValueError when there is none."""
        if self.upcoming is None:
            raise ValueError("no request is upcoming")
        sent, self.upcoming = self.upcoming, next(self._requests, None)
        return sent

    def ended(self, request_id: int, at_s: float) -> None:
        """Take note that a request was finished or dropped."""


class ClosedLoop(Client):
    """Sessions in closed loop: a later turn is sent its delay after the turn before has ended.

    It ends when it gets its last token, and when the scheduler drops it. A turn whose delay the trace does not say is
    sent when it arrives in the trace, but not before the turn before has ended. First turns and requests without
    session are sent when they arrive.

    ``sent_s``: when each request was sent, seconds; NaN before that. Ties are sent in the order of the trace.
    """

    def __init__(self, trace: Trace) -> None:
        sessions = trace.sessions
        if sessions is None:
            raise ValueError(f"{trace.name} has no sessions")
        self.sent_s: FloatArray = np.full(len(trace), np.nan)
        self._all: list[Request] = list(trace.requests())
        self._delay_s = sessions.delay_s
        order = np.lexsort((sessions.turn, sessions.index))
        follows = (np.diff(sessions.index[order]) == 0) & (sessions.index[order][1:] >= 0)
        self._next = dict(zip(order[:-1][follows].tolist(), order[1:][follows].tolist(), strict=True))
        first = np.flatnonzero(sessions.turn == 0).tolist()
        self._known: list[tuple[float, int]] = [(self._all[i].arrival_s, i) for i in first]  # to be sent, a heap
        self._last_s = 0.0
        self.upcoming = self._top()

    def send(self) -> Request:
        """The request that was upcoming. Raises IndexError when there is none."""
        self._last_s, i = heappop(self._known)
        sent = self._all[i]
        self.sent_s[i] = self._last_s
        self.upcoming = self._top()
        return sent

    def ended(self, request_id: int, at_s: float) -> None:
        """Have the session's next turn sent."""
        i = self._next.get(request_id)
        if i is None:
            return
        delay_s = float(self._delay_s[i])
        due_s = max(at_s, self._all[i].arrival_s) if isnan(delay_s) else at_s + delay_s
        # On a wall clock an end is learned of late, when requests that come after it may have been sent.
        self._all[i] = replace(self._all[i], arrival_s=max(due_s, self._last_s))
        heappush(self._known, (self._all[i].arrival_s, i))
        self.upcoming = self._top()

    def _top(self) -> Request | None:
        return self._all[self._known[0][1]] if self._known else None


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
