"""Streams, and marks of what they have reached: the part of torch that differs between a CPU and a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from semipd.core import Allocation, Mode, Phase

if TYPE_CHECKING:
    from semipd.partition import Partition, PartitionBank


class Mark(Protocol):
    """A place in a stream, behind the work that was enqueued before it."""

    def reached(self) -> bool:
        """Whether the device has got there; does not wait."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Time from an earlier mark of the stream to this one, both reached."""
        ...


class Stream(Protocol):
    """Where the work of one phase on one partition is enqueued."""

    def use(self) -> AbstractContextManager[Any]:
        """Enqueue here inside the ``with``."""
        ...

    def mark(self) -> Mark:
        """A mark behind all work enqueued so far."""
        ...

    def capture(self, work: Callable[[], None], *, warm: bool = False) -> Callable[[], None]:
        """Have the work done by one call that can be repeated on this stream; it may be done right now as well.

        ``warm``: the same kernels have been enqueued here before.
        """
        ...


class Device(Protocol):
    """A CPU or a GPU. ``name`` is torch's."""

    name: str

    def stream(self, phase: Phase, allocation: Allocation) -> Stream:
        """The phase's stream; the same one whenever the partition is the same. ValueError when there is none."""
        ...

    def upload(self, array: Any) -> Tensor:
        """A copy of a numpy array on the device, made on the current stream without waiting."""
        ...

    def write(self, tensor: Tensor, array: Any) -> None:
        """Copy a numpy array of its shape into a tensor of the device, on the current stream without waiting."""
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """A copy on the host, to be read once a later mark of the current stream is reached."""
        ...

    def synchronize(self) -> None:
        """Wait for all work."""
        ...


class CpuMark:
    """Everything before it is done."""

    def __init__(self) -> None:
        self._at_s = time.perf_counter()

    def reached(self) -> bool:
        """See ``Mark``."""
        return True

    def seconds_since(self, earlier: CpuMark) -> float:
        """See ``Mark``."""
        return self._at_s - earlier._at_s


class CpuStream:
    """Work is done when it is enqueued."""

    def use(self) -> AbstractContextManager[Any]:
        """See ``Stream``."""
        return nullcontext()

    def mark(self) -> Mark:
        """See ``Stream``."""
        return CpuMark()

    def capture(self, work: Callable[[], None], *, warm: bool = False) -> Callable[[], None]:
        """See ``Stream``: the work as it is."""
        del warm
        return work


class CpuDevice:
    """One stream of each phase, whatever the allocation."""

    name = "cpu"

    def __init__(self) -> None:
        self._streams = {phase: CpuStream() for phase in Phase}

    def stream(self, phase: Phase, allocation: Allocation) -> Stream:
        """See ``Device``."""
        del allocation
        return self._streams[phase]

    def upload(self, array: Any) -> Tensor:
        """See ``Device``."""
        return torch.tensor(array)

    def write(self, tensor: Tensor, array: Any) -> None:
        """See ``Device``."""
        tensor.copy_(torch.from_numpy(array))

    def download(self, tensor: Tensor) -> Tensor:
        """See ``Device``."""
        return tensor.clone()

    def synchronize(self) -> None:
        """See ``Device``: there is never anything to wait for."""


class CudaMark:
    """An event."""

    def __init__(self, stream: Any) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def reached(self) -> bool:
        """See ``Mark``."""
        return bool(self._event.query())

    def seconds_since(self, earlier: CudaMark) -> float:
        """See ``Mark``."""
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class CudaStream:
    """A stream of a partition, which it does not own, with its CUDA graphs' shared memory pool.

    ``using``: torch's streams in use, the current one last; all streams of a device share it.
    """

    def __init__(self, handle: int, pool: Any, using: list[Any]) -> None:
        self._stream = torch.cuda.ExternalStream(handle)
        self._pool, self._using = pool, using

    @contextmanager
    def use(self) -> Iterator[None]:
        """See ``Stream``. torch's own context asks for the current device and stream first, which takes longer."""
        self._using.append(self._stream)
        try:
            torch.cuda.set_stream(self._stream)
            yield
        finally:
            self._using.pop()
            torch.cuda.set_stream(self._using[-1])

    def mark(self) -> Mark:
        """See ``Stream``."""
        return CudaMark(self._stream)

    def capture(self, work: Callable[[], None], *, warm: bool = False) -> Callable[[], None]:
        """See ``Stream``: a CUDA graph, which is bound to this stream's SMs. Waits for the stream, unless ``warm``."""
        with self.use():
            if not warm:
                work()  # what allocates or compiles at first use cannot be captured
                self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay


def partition_of(bank: PartitionBank, phase: Phase, allocation: Allocation) -> Partition:
    """Where a phase runs.

    ``split``: on its partition of that split. ``capped``: prefill on a split's prefill partition, decode on the whole
    device at the highest priority. ``priority``, ``exclusive`` and ``mixed``: on the whole device, decode at the
    highest priority.

    Raises InputError for a split that the bank does not have; ValueError for one that it has with another number of
    SMs.
    """
    mode, prefill = allocation.mode, phase is Phase.PREFILL
    if mode is not Mode.SPLIT and not (mode is Mode.CAPPED and prefill):
        return bank.whole_high if phase is Phase.DECODE else bank.whole_normal
    split = bank.pick(allocation.prefill_sms)
    partition = split.prefill if prefill else split.decode
    if partition.sms != allocation.sms(phase):
        raise ValueError(f"{allocation.name}: found {partition.sms} SMs for {phase.value} in the bank's split")
    return partition


class CudaDevice:
    """The current GPU and a bank of its partitions, which must stay open."""

    name = "cuda"

    def __init__(self, bank: PartitionBank) -> None:
        torch.zeros(1, device="cuda")
        self._bank = bank
        # One pool for all graphs of a phase, of which no two run at the same time.
        self._decode_pool, self._prefill_pool = torch.cuda.graph_pool_handle(), torch.cuda.graph_pool_handle()
        self._streams: dict[int, CudaStream] = {}
        self._using: list[Any] = [torch.cuda.current_stream()]

    def stream(self, phase: Phase, allocation: Allocation) -> Stream:
        """See ``Device`` and ``partition_of``."""
        handle = partition_of(self._bank, phase, allocation).stream
        if handle not in self._streams:
            pool = self._decode_pool if phase is Phase.DECODE else self._prefill_pool
            self._streams[handle] = CudaStream(handle, pool, self._using)
        return self._streams[handle]

    def upload(self, array: Any) -> Tensor:
        """See ``Device``: by way of pinned memory, which torch reuses only after the copy."""
        return torch.from_numpy(array).pin_memory().to("cuda", non_blocking=True)

    def write(self, tensor: Tensor, array: Any) -> None:
        """See ``Device``: by way of pinned memory, as ``upload``.

        Which is not kept for the next time: torch cannot free memory that a stream has copied from once that is gone.
        """
        tensor.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        """See ``Device``; to pinned memory."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def synchronize(self) -> None:
        """See ``Device``."""
        torch.cuda.synchronize()
