"""Batches as executors run them, ragged: of each sequence its tokens; and how those that are measured are dealt."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np

from semipd.core import DecodeShape, FloatArray, IntArray, PrefillShape
from semipd.points import DecodeWork, PrefillWork

GOLDEN_RATIO = (5**0.5 - 1) / 2  # multiples of which fill an interval evenly, wherever one stops


LENGTHS_SHAPE = 4
"""Of the gamma distribution that lengths have: a standard deviation of half their mean."""


def lengths_at(quantiles: FloatArray) -> FloatArray:
    """Quantiles of a gamma distribution of shape 4, by its distribution function, which is a sum for whole shapes."""
    x = np.linspace(0.0, 40.0, 8001)
    terms = [x**k / factorial(k) for k in range(LENGTHS_SHAPE)]
    found: FloatArray = np.interp(quantiles, 1 - np.exp(-x) * np.sum(terms, axis=0), x)
    return found


def dealt(shares: FloatArray, total: int, least: int = 1) -> IntArray:
    """Whole parts of a number, of at least ``least``, that are beyond it in proportion to these shares."""
    ends = np.round(np.cumsum(shares) / shares.sum() * (total - least * len(shares))).astype(np.int64)
    parts: IntArray = np.diff(ends, prepend=0) + least
    return parts


@dataclass(frozen=True, slots=True)
class Prompts:
    """A prefill batch, ragged: prompt i has ``new_tokens[i]`` after ``context_lens[i]`` cached ones."""

    new_tokens: tuple[int, ...]
    context_lens: tuple[int, ...]

    @staticmethod
    def of(work: PrefillWork) -> Prompts:
        """Equal prompts."""
        return Prompts((work.seq_tokens,) * work.seqs, (work.seq_context,) * work.seqs)

    @property
    def shape(self) -> PrefillShape:
        """As the cost model sees it."""
        return PrefillShape.of(self.new_tokens, self.context_lens)


@dataclass(frozen=True, slots=True)
class Decodes:
    """A decode batch, ragged: the new token of sequence i attends to ``lengths[i]`` tokens, itself included."""

    lengths: tuple[int, ...]

    @staticmethod
    def of(work: DecodeWork) -> Decodes:
        """Sequences about as unequal as those that are served: quantiles of ``lengths_at``, in no order.

        Decode attention deals equal ones to the SMs more evenly than it can these.
        """
        shares = lengths_at((np.arange(work.batch, dtype=np.float64) + 0.5) * GOLDEN_RATIO % 1)
        return Decodes(tuple(dealt(shares, max(work.kv_tokens, work.batch)).tolist()))

    @property
    def shape(self) -> DecodeShape:
        """As the cost model sees it."""
        return DecodeShape(len(self.lengths), sum(self.lengths))
