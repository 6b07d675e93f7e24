"""What a replay was bound by: where its requests spent their time (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from semipd.core import Allocation, DecodeShape, Mode
from semipd.cost import CostModel

Bound: TypeAlias = Literal["KV", "queue", "SMs", "bandwidth"]
Cause: TypeAlias = Literal["KV", "queue", "decode"]

HELPS = 1.1
"""Decode wants SMs where the whole device would do its steps so many times as fast."""


class Blocked:
    """Request-seconds that prompts waited while none was prefilled, by what kept the first of them from starting.

    ``KV``: its blocks were not available. ``queue``: ``max_num_seqs`` sequences were decoding. ``decode``: it was not
    its turn, since decoding sequences go first or fill the fused steps.
    """

    def __init__(self) -> None:
        self.request_s: dict[Cause, float] = {"KV": 0.0, "queue": 0.0, "decode": 0.0}
        self.cause: Cause | None = None
        self._waiting = 0
        self._since_s = 0.0

    def note(self, now_s: float, cause: Cause | None, waiting: int) -> None:
        """From now on so many prompts wait because of this; None for none."""
        if self.cause is not None:
            self.request_s[self.cause] += self._waiting * (now_s - self._since_s)
        self.cause, self._waiting, self._since_s = cause, waiting, now_s


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """How long decode ran at an allocation by itself, in seconds, and in request-seconds."""

    busy_s: float
    request_s: float


def time_shares(
    in_system_s: float,
    decode: Mapping[Allocation, DecodeTime],
    blocked_s: Mapping[Cause, float],
    cost: CostModel,
    context_tokens: float,
) -> dict[Bound, float] | None:
    """Shares of the requests' time by what it was spent on or waiting for; None when no time was spent.

    Args:
        in_system_s: Request-seconds from being sent to the last token.
        decode: Decode runs.
        blocked_s: ``Blocked.request_s``.
        cost: Prices decode on its partition and on the whole device.
        context_tokens: Cached tokens of a decoding sequence, on average.
    """
    if in_system_s <= 0:
        return None
    wanting = {at: _wants_sms(cost, at, time.request_s / time.busy_s, context_tokens) for at, time in decode.items()}
    bandwidth_s = blocked_s["decode"] + sum(time.request_s for at, time in decode.items() if not wanting[at])
    sms_s = max(0.0, in_system_s - bandwidth_s - blocked_s["KV"] - blocked_s["queue"])
    spent: dict[Bound, float] = {
        "KV": blocked_s["KV"], "queue": blocked_s["queue"], "SMs": sms_s, "bandwidth": bandwidth_s,
    }  # fmt: skip
    total_s = sum(spent.values())
    return {bound: seconds / total_s for bound, seconds in spent.items()}


def _wants_sms(cost: CostModel, at: Allocation, batch: float, context_tokens: float) -> bool:
    """Whether decode steps of that size would be much shorter on the whole device."""
    if at.decode_sms == cost.device_sms:
        return False
    whole = Allocation(Mode.EXCLUSIVE, cost.device_sms, cost.device_sms)
    sequences = max(1, round(batch))
    shape = DecodeShape(sequences, max(1, round(sequences * context_tokens)))
    here_s, whole_s = [cost.decode_s(shape, where, None)[0].item(0) for where in (at, whole)]
    return bool(here_s > HELPS * whole_s)
