"""A CPU that behaves like a GPU: what is enqueued on a stream is seen to be done only some looks later, in order."""

from __future__ import annotations

import time
from collections.abc import Callable

from semipd.core import Allocation, Phase
from semipd.torch_device import CpuDevice, CpuStream


class LaggingStream(CpuStream):
    """Every ``lag`` looks at any of its marks, it gets to one more."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.marks: list[LaggingMark] = []
        self.reached = 0
        self.most_pending = 0
        self._looks = 0

    def mark(self) -> LaggingMark:
        self.marks.append(LaggingMark(self, len(self.marks)))
        self.most_pending = max(self.most_pending, len(self.marks) - self.reached)
        return self.marks[-1]

    def capture(self, work: Callable[[], None], *, warm: bool = False) -> Callable[[], None]:
        if not warm:
            work()
        return work

    def look(self) -> None:
        self._looks += 1
        if self._looks >= self.lag and self.reached < len(self.marks):
            self._looks = 0
            self.marks[self.reached].at_s = time.perf_counter()
            self.reached += 1


class LaggingMark:
    def __init__(self, stream: LaggingStream, index: int) -> None:
        self._stream, self._index = stream, index
        self.at_s = 0.0

    def reached(self) -> bool:
        self._stream.look()
        return self._index < self._stream.reached

    def seconds_since(self, earlier: LaggingMark) -> float:
        assert self._index < self._stream.reached
        return self.at_s - earlier.at_s


class LaggingDevice(CpuDevice):
    """A stream for each phase and allocation."""

    def __init__(self, prefill_lag: int, decode_lag: int) -> None:
        super().__init__()
        self._lags = {Phase.PREFILL: prefill_lag, Phase.MIXED: prefill_lag, Phase.DECODE: decode_lag}
        self.lagging: dict[tuple[Phase, Allocation], LaggingStream] = {}

    def stream(self, phase: Phase, allocation: Allocation) -> LaggingStream:
        key = phase, allocation
        if key not in self.lagging:
            self.lagging[key] = LaggingStream(self._lags[phase])
        return self.lagging[key]
