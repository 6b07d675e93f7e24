"""Two streams on disjoint SMs of the current GPU, in two calls; ``semipd.partition`` is the full interface.

    import green_context_lib as green_context
    primary, remaining, primary_sms, remaining_sms = green_context.create_green_context_and_streams(64)
    stream = torch.cuda.ExternalStream(primary)
    ...
    green_context.destroy_green_context()

Asking again without destroying first makes another pair; every earlier pair stays valid until
``destroy_green_context``, so no work in flight loses its stream. Pairs overlap each other on the SMs. Destroying
waits for the work in flight, destroys the streams and leaves the green contexts to the next pairs of the same size;
``semipd.partition.release_idle`` destroys those too. Destroying again, or with nothing created, does nothing. Both
calls are thread-safe.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack

from semipd.partition import Device, create_split

__all__ = ["create_green_context_and_streams", "destroy_green_context"]

_pairs = ExitStack()
_lock = threading.Lock()


def create_green_context_and_streams(
    intended_primary_sm_count: int = 64,
    primary_stream_priority: int = -1,
    remaining_stream_priority: int = 0,
) -> tuple[int, int, int, int]:
    """Split the SMs of the calling thread's current device (device 0 without one).

    Returns ``(primary_stream, remaining_stream, primary_sms, remaining_sms)``: CUstreams as integers and the SMs
    granted, the primary count being rounded up to what the device can split. Raises ``semipd.CudaError`` for a
    count or a priority that the device does not offer, and when there is no usable driver.
    """
    with _lock:
        split = create_split(
            intended_primary_sm_count,
            Device.current(),
            prefill_priority=primary_stream_priority,
            decode_priority=remaining_stream_priority,
        )
        _pairs.enter_context(split)
        return split.prefill.stream, split.decode.stream, split.prefill.sms, split.decode.sms


def destroy_green_context() -> None:
    """Wait for the work in flight, then destroy every stream created since the last call.

    Raises ``semipd.CudaError`` for what that work did wrong; every stream is destroyed even then.
    """
    with _lock:
        _pairs.close()
