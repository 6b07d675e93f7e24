"""SM partitions of a GPU, as green contexts: plan a split, create it, or keep a bank of every split at hand.

Importing this needs no CUDA driver; the first use opens ``libcuda.so.1`` (or what the environment variable
``SEMIPD_LIBCUDA`` names). Whatever CUDA refuses is a ``CudaError``.

Closing a partition destroys its stream and leaves its green context idle, for the process's next partition of the
same SMs: the driver does not give back a destroyed green context's memory while its primary context lives. So
creating and closing splits for ever takes the memory of those that were ever open at once, size by size; an idle
context keeps the device's primary context. ``release_idle`` destroys the idle ones.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

from semipd import _core
from semipd._core import CudaError, Device, PrimaryContext, SmResource, SplitPlan, release_idle
from semipd.core import Allocation, InputError, Mode

__all__ = [
    "CudaError",
    "Device",
    "Partition",
    "PartitionBank",
    "PrimaryContext",
    "SmResource",
    "Split",
    "SplitPlan",
    "create_split",
    "plan_split",
    "release_idle",
]


def plan_split(prefill_sms: int, device: int = 0, ignore_coscheduling: bool = False) -> SplitPlan:
    """What asking for ``prefill_sms`` would grant; nothing is created.

    Raises CudaError for a size below the minimum, above the device's, or that leaves no remainder.
    """
    return Device(device).plan(prefill_sms, ignore_coscheduling)


class Partition:
    """A non-blocking CUDA stream and the ``sms`` SMs its work runs on.

    ``stream`` is the CUstream as an integer, for ``torch.cuda.ExternalStream``, which does not own it: keep the
    partition open for as long as the stream is used. Dropping the last reference closes it too.
    """

    def __init__(self, handle: _core.Partition) -> None:
        self._handle: _core.Partition | None = handle
        self._lock = threading.Lock()
        self.sms = handle.sms
        self.priority = handle.priority

    @property
    def closed(self) -> bool:
        """Whether the stream is gone."""
        return self._handle is None

    @property
    def stream(self) -> int:
        """The CUstream as an integer. Raises RuntimeError once closed."""
        return self._open().stream

    def synchronize(self) -> None:
        """Wait for the stream's work; closing meanwhile is safe.

        Raises CudaError, also with what that work did wrong, and RuntimeError once closed.
        """
        self._open().synchronize()

    def close(self) -> None:
        """Wait for the stream's work, then destroy the stream and leave its green context idle; again does nothing.

        When waiting raises CudaError for what the work did wrong, the green context is destroyed with the stream.
        """
        with self._lock:
            last = [self._handle]
            self._handle = None
        if last[0] is not None:
            try:
                last[0].synchronize()
            finally:
                last.clear()  # now, not when a traceback that refers to this frame goes

    def _open(self) -> _core.Partition:
        handle = self._handle
        if handle is None:
            raise RuntimeError(f"this partition of {self.sms} SMs is closed")
        return handle

    def __enter__(self) -> Partition:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<Partition of {self.sms} SMs, priority {self.priority}, {state}>"


@dataclass(frozen=True)
class Split:
    """The device in two: ``prefill`` has the group asked for, ``decode`` all other SMs."""

    prefill: Partition
    decode: Partition
    ignore_coscheduling: bool = False

    @property
    def allocation(self) -> Allocation:
        """The split as a policy names it, with the SMs granted."""
        return Allocation(Mode.SPLIT, self.prefill.sms, self.decode.sms)

    def close(self) -> None:
        """Close both partitions, as ``Partition.close`` does."""
        with ExitStack() as both:
            both.callback(self.prefill.close)
            both.callback(self.decode.close)

    def __enter__(self) -> Split:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def create_split(
    prefill_sms: int,
    device: int | Device | PrimaryContext = 0,
    ignore_coscheduling: bool = False,
    prefill_priority: int = -1,
    decode_priority: int = 0,
) -> Split:
    """Split a device: at least ``prefill_sms`` SMs to prefill, all others to decode; lower priorities go first.

    ``ignore_coscheduling`` allows finer sizes, at the price of thread-block clusters. Raises CudaError as
    ``plan_split`` does, for a priority out of range, or with what the driver says; nothing is left in use then.
    """
    if isinstance(device, int):
        device = Device(device)
    context = device if isinstance(device, PrimaryContext) else PrimaryContext(device)
    prefill, decode = context.create_split(prefill_sms, ignore_coscheduling, prefill_priority, decode_priority)
    return Split(Partition(prefill), Partition(decode), ignore_coscheduling)


class PartitionBank:
    """Every split of a device, created once, up front; choosing one is a look-up, nothing is ever resized.

    ``step_sms``: prefill gets each multiple of it that a split can have. ``prefill_sms`` names the sizes instead.
    A size that needs it ignores coscheduling (multiples of 2 on Hopper, without thread-block clusters); the
    others do not. Beside the splits there are two streams on the whole device: ``whole_high`` at the greatest
    priority of the device and ``whole_normal`` at the least.

    Splits of one bank overlap each other: never have work of two of them in flight together.

    ``creation_s`` is the seconds and ``memory_bytes`` the device memory that creating it took. What an earlier
    bank or split left idle is reused, which takes neither: so these are the cost of a bank only for the first of its
    sizes in the process, or after ``release_idle``; for a bank made again they are near 0 (its streams alone).

    Thread-safe. ``close`` waits for the work in flight and closes every partition; a ``pick`` beside it either
    raises or returns a split that is being closed. Partitions keep what they need alive: one that is still
    referred to stays usable when the bank itself is dropped without ``close``.

    Raises InputError for sizes that no split can have, CudaError for what CUDA refuses; nothing is left in use then.
    """

    def __init__(
        self,
        device: int = 0,
        step_sms: int = 8,
        prefill_sms: Sequence[int] | None = None,
        prefill_priority: int = -1,
        decode_priority: int = 0,
    ) -> None:
        self.device = Device(device)
        self.resource = self.device.resource()
        sizes = _sizes(self.device, step_sms, prefill_sms)
        self._lock = threading.Lock()
        self._closed = False
        context = PrimaryContext(self.device)
        with ExitStack() as made:
            free_before, start_s = context.free_bytes, time.perf_counter()
            self.splits = tuple(
                made.enter_context(create_split(size, context, flag, prefill_priority, decode_priority))
                for size, flag in sizes
            )
            priorities = context.priorities
            self.whole_high = made.enter_context(Partition(context.create_stream(priorities.greatest)))
            self.whole_normal = made.enter_context(Partition(context.create_stream(priorities.least)))
            self.creation_s = time.perf_counter() - start_s
            self.memory_bytes = free_before - context.free_bytes
            self._made = made.pop_all()
        self._by_size = {split.prefill.sms: split for split in self.splits}

    def pick(self, prefill_sms: int) -> Split:
        """The split whose prefill partition has exactly ``prefill_sms`` SMs.

        Raises InputError when there is none, RuntimeError when the bank is closed.
        """
        if self._closed:
            raise RuntimeError("this bank of partitions is closed")
        try:
            return self._by_size[prefill_sms]
        except KeyError:
            raise InputError(
                f"no split with {prefill_sms} prefill SMs in this bank: expected one of {sorted(self._by_size)}"
            ) from None

    @property
    def closed(self) -> bool:
        """Whether the bank was closed."""
        return self._closed

    def close(self) -> None:
        """Close every partition, as ``Partition.close`` does; again does nothing.

        All are closed even when waiting for one raises CudaError for what its work did wrong.
        """
        with self._lock:
            self._closed = True
            self._made.close()

    def __enter__(self) -> PartitionBank:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _sizes(device: Device, step_sms: int, prefill_sms: Sequence[int] | None) -> list[tuple[int, bool]]:
    """The prefill sizes of a bank, ascending, each with whether it has to ignore coscheduling."""
    coarse, fine = device.resource(), device.resource(ignore_coscheduling=True)
    if prefill_sms is None:
        if step_sms <= 0 or step_sms % fine.multiple:
            raise InputError(f"step_sms: found {step_sms}, expected a positive multiple of {fine.multiple}")
        prefill_sms = range(step_sms, coarse.count, step_sms)
    sizes = []
    for sms in sorted(set(prefill_sms)):
        if sms % fine.multiple or not fine.minimum <= sms < fine.count:
            raise InputError(
                f"prefill_sms: found {sms}, expected multiples of {fine.multiple} "
                f"from {fine.minimum} to {fine.count - 1}"
            )
        sizes.append((sms, sms < coarse.minimum or sms % coarse.multiple != 0))
    return sizes
