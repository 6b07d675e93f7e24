"""How long to run both phases together, and which of their steps count; no torch, no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from semipd.core import FloatArray

LONG_STEP_MS = 100.0  # steps longer than this are measured once
SLACK = 1.1  # more work is enqueued than a window should take, since clocks move
STAMPS = 64  # at least about half as many stamps are taken of a window, and no more than twice as many
TRIES = 6


@dataclass(frozen=True)
class Stamps:
    """One stream of a window: when its first replay started, then when every ``each``-th ended; ms, shape [n + 1]."""

    at_ms: FloatArray
    each: int


Run: TypeAlias = Callable[[int, int, int], tuple[Stamps, Stamps]]
"""Replays of prefill and of decode, started together, and the most stamps to take of either, to what happened."""


def saturated_steps(own_ends: FloatArray, other_start: float, other_end: float) -> FloatArray:
    """Times of the steps during which the other phase ran from beginning to end.

    Args:
        own_ends: Stamps of one stream, shape [n + 1]: the first step's start, then each step's end.
        other_start: When the other stream's first step started, same clock.
        other_end: When its last step ended.

    Returns:
        Durations of the steps that lie wholly inside the other stream's activity.
    """
    starts, ends = own_ends[:-1], own_ends[1:]
    inside = (starts >= other_start) & (ends <= other_end)
    return np.asarray((ends - starts)[inside], dtype=np.float64)


def stamped_every(replays: int, stamps: int) -> int:
    """Replays between two stamps so that ``replays`` give at most ``stamps``, and more than half as many."""
    return max(1, math.ceil(replays / stamps))


def together(run: Run, alone_ms: tuple[float, float], marks: int, settle_ms: float) -> tuple[FloatArray, FloatArray]:
    """Milliseconds of a replay of each phase while the other runs from its beginning to its end.

    Windows are run until both phases together have run for ``settle_ms`` and, in one window after that, each has
    ``marks`` steps throughout which the other ran. Of steps longer than LONG_STEP_MS one is enough, and what precedes
    it in its window settles the clocks.

    Args:
        run: Runs so many replays of prefill and decode, started together.
        alone_ms: What a replay of each takes alone, a first estimate.
        marks: Samples wanted of each.
        settle_ms: Load before them.

    Returns:
        Samples of prefill and of decode, each the mean over the replays between two stamps.

    Raises:
        RuntimeError: They could not be kept running together for so long.
    """
    first_ms, second_ms = (ms * 1.2 for ms in alone_ms)
    settled_ms = 0.0
    for _ in range(TRIES):
        wanted = 1 if max(first_ms, second_ms) > LONG_STEP_MS else marks
        window_ms = max(4.0, settle_ms - settled_ms, (wanted + 1) * max(first_ms, second_ms))
        replays = tuple(1 + math.ceil(SLACK * window_ms / ms) for ms in (first_ms, second_ms))
        first, second = run(replays[0], replays[1], max(STAMPS, 4 * wanted))
        steps = (
            saturated_steps(first.at_ms, second.at_ms[0], second.at_ms[-1]) / first.each,
            saturated_steps(second.at_ms, first.at_ms[0], first.at_ms[-1]) / second.each,
        )
        if (wanted < marks or settled_ms >= settle_ms) and min(map(len, steps)) >= wanted:
            return steps
        settled_ms += min(first.at_ms[-1], second.at_ms[-1]) - max(first.at_ms[0], second.at_ms[0])
        first_ms, second_ms = _contended_ms(first, second, first_ms), _contended_ms(second, first, second_ms)
    raise RuntimeError(f"the two phases could not be kept running together for {marks} steps each in {TRIES} windows")


def _contended_ms(own: Stamps, other: Stamps, before_ms: float) -> float:
    """Estimate of a replay's time while both run, from the steps during some of which the other ran."""
    beside = (own.at_ms[:-1] < other.at_ms[-1]) & (own.at_ms[1:] > other.at_ms[0])
    if not beside.any():
        return before_ms * 2
    return float(np.mean(np.diff(own.at_ms)[beside])) / own.each
