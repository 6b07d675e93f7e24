"""Where a sweep measures: partitions of a device, and the batches of a rectangular grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from semipd.core import Allocation, Mode
from semipd.points import DecodeWork, PrefillWork


def partition_counts(device_sms: int, step_sms: int) -> list[int]:
    """SM counts of a sweep: the multiples of ``step_sms`` from 8 on, and the whole device last."""
    return [*range(_least(step_sms), device_sms, step_sms), device_sms]


def splits_of(device_sms: int, step_sms: int) -> list[Allocation]:
    """The disjoint splits of a sweep, by ascending prefill SMs."""
    return [Allocation(Mode.SPLIT, n, device_sms - n) for n in range(_least(step_sms), device_sms, step_sms)]


def _least(step_sms: int) -> int:
    return -(-8 // step_sms) * step_sms


def grid(tokens: Sequence[int], mean_contexts: Sequence[int]) -> list[PrefillWork]:
    """Every prefill batch of a rectangular grid, cheapest first."""
    works = [PrefillWork.at(t, m) for t in tokens for m in mean_contexts]
    return sorted(works, key=lambda work: work.tokens * work.mean_context)


def decode_grid(batches: Sequence[int], kv_tokens: Iterable[int]) -> list[DecodeWork]:
    """Every decode batch of a rectangular grid, cheapest first."""
    return sorted((DecodeWork(b, t) for t in kv_tokens for b in batches), key=lambda work: work.kv_tokens)
