"""What is measured: batches and their place on a grid, and the rows of every table, with their spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from semipd.core import DecodeShape, FloatArray, InputError, PrefillShape


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 10th and 90th percentile of one step's time in milliseconds, over ``steps`` measured steps."""

    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @staticmethod
    def of(times_ms: FloatArray) -> Spread:
        """Spread of measured step times. Raises ValueError when there is none."""
        if len(times_ms) == 0:
            raise ValueError("no measured step")
        p10, median, p90 = (round(float(x), 6) for x in np.percentile(times_ms, [10, 50, 90]))
        return Spread(len(times_ms), median, p10, p90)


def fewest_prompts(tokens: int, mean_context: float) -> int:
    """Of prompts with so many tokens together, none of which is longer than twice the mean context."""
    return -(-tokens // max(1, int(2 * mean_context)))


def equal_prompts(tokens: int, mean_context: float) -> int:
    """One, or the fewest that are equal and of an even number of tokens each; 0 when twice as many are not enough."""
    fewest = fewest_prompts(tokens, mean_context)
    return next((n for n in range(fewest, 2 * fewest + 1) if n == 1 or tokens % (2 * n) == 0), 0)


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """A prefill batch to measure: ``seqs`` prompts of ``seq_tokens`` new tokens after ``seq_context`` cached ones.

    ``tokens`` and ``mean_context`` are its place on the grid: the cost of a ragged batch is looked up by its
    new tokens and by the keys that a query attends to on average.
    """

    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int

    @staticmethod
    def at(tokens: int, mean_context: int) -> PrefillWork:
        """The batch that sits at a grid point: one prompt after cached context, or several short prompts.

        A prompt of q new tokens after c cached ones has a mean context of c + q / 2. Of prompts that are too long for
        the mean context there are as many more as it takes to make them short enough and equal. Raises InputError
        when no number from the fewest to twice as many deals them evenly.
        """
        if seqs := equal_prompts(tokens, mean_context):
            each = tokens // seqs
            return PrefillWork(tokens, mean_context, seqs, each, mean_context - each // 2)
        fewest = fewest_prompts(tokens, mean_context)
        raise InputError(
            f"prefill grid: tokens {tokens}: found no {fewest} to {2 * fewest} equal prompts of an even number of "
            f"tokens, at most twice the mean context {mean_context}; expected a number of tokens that can be dealt so"
        )

    @staticmethod
    def prompts(seqs: int, seq_tokens: int, seq_context: int = 0) -> PrefillWork:
        """A batch given by its prompts."""
        return PrefillWork(seqs * seq_tokens, seq_context + seq_tokens // 2, seqs, seq_tokens, seq_context)

    @property
    def shape(self) -> PrefillShape:
        """This batch as the cost model sees it."""
        return PrefillShape(self.tokens, float(self.tokens * self.mean_context))


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """A decode step to measure: ``batch`` sequences that share ``kv_tokens`` cached tokens, evenly by ``lengths``."""

    batch: int
    kv_tokens: int

    @property
    def shape(self) -> DecodeShape:
        """This batch as the cost model sees it."""
        return DecodeShape(self.batch, self.kv_tokens)

    def lengths(self) -> list[int]:
        """Cached tokens of each sequence; at least one each, their sum is ``kv_tokens`` where that allows."""
        low, more = divmod(max(self.kv_tokens, self.batch), self.batch)
        return [low + 1] * more + [low] * (self.batch - more)


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a measurement shares the device, and the SMs each phase may use.

    ``mode``: ``split`` (disjoint SMs), ``capped`` (prefill on a partition, decode on the whole device at high
    priority), ``priority`` (two plain streams, decode first), ``streams`` (two plain streams, equal), ``mixed`` (both
    in one fused step on the whole device) or ``in-turn`` (one phase after the other on the whole device).
    """

    mode: str
    prefill_sms: int
    decode_sms: int

    @property
    def name(self) -> str:
        """As in ``time_in_split``: ``64/68``, ``capped-64``, or the mode."""
        if self.mode == "split":
            return f"{self.prefill_sms}/{self.decode_sms}"
        return f"capped-{self.prefill_sms}" if self.mode == "capped" else self.mode


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """One row of a prefill table: a batch alone on a partition, milliseconds of one layer."""

    sms: int
    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int
    backend: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (self.sms, self.seqs, self.seq_tokens, self.seq_context, self.backend)


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """One row of a decode table: a batch alone on a partition, milliseconds of one layer of one step."""

    sms: int
    batch: int
    kv_tokens: int
    backend: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (self.sms, self.batch, self.kv_tokens, self.backend)


@dataclass(frozen=True, slots=True)
class HybridPoint:
    """One row of a hybrid table: steady-state contention, each phase's layer time while the other runs.

    ``mode`` is ``split``, ``capped``, ``priority`` or ``streams`` (two plain streams of equal priority).
    """

    mode: str
    prefill_sms: int
    decode_sms: int
    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int
    batch: int
    kv_tokens: int
    prefill_backend: str
    decode_backend: str
    prefill_steps: int
    prefill_median_ms: float
    prefill_p10_ms: float
    prefill_p90_ms: float
    decode_steps: int
    decode_median_ms: float
    decode_p10_ms: float
    decode_p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (
            self.mode, self.prefill_sms, self.decode_sms, self.seqs, self.seq_tokens, self.seq_context,
            self.batch, self.kv_tokens, self.prefill_backend, self.decode_backend,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MixedPoint:
    """One row of a mixed table: fused steps of a prefill chunk and a decode batch, on the whole device.

    Milliseconds are those of a whole step divided by the model's layers, as in the other tables.
    """

    tokens: int
    mean_context: int
    seqs: int
    seq_tokens: int
    seq_context: int
    batch: int
    kv_tokens: int
    backend: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (self.seqs, self.seq_tokens, self.seq_context, self.batch, self.kv_tokens, self.backend)


@dataclass(frozen=True, slots=True)
class TotalPoint:
    """One row of a fixed-work table: so many prefill and decode steps, started together or in turn.

    ``mode`` is one of HybridPoint's or ``in-turn``; ``prefill_ms`` and ``decode_ms`` are when each phase had
    finished, ``total_ms`` when both had (median over ``runs``, with p10 and p90 of the total).
    """

    mode: str
    prefill_sms: int
    decode_sms: int
    prefill_backend: str
    decode_backend: str
    prefill_steps: int
    decode_steps: int
    runs: int
    prefill_ms: float
    decode_ms: float
    total_ms: float
    total_p10_ms: float
    total_p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (
            self.mode, self.prefill_sms, self.decode_sms, self.prefill_backend, self.decode_backend,
            self.prefill_steps, self.decode_steps,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class HoldoutPoint:
    """One row of held-out measurements: a ragged batch of ``phase``, milliseconds of one layer.

    ``new_tokens`` and ``context_lens``, of each prompt, and ``decode_lens``, of each decoding sequence what its new
    token attends to, are numbers with blanks between them, or ``-`` where that phase is idle. Where neither is, the row
    is what a layer of ``phase`` takes while the other one runs; or, with ``mixed``, a layer of the fused batch.
    """

    phase: str
    mode: str
    prefill_sms: int
    decode_sms: int
    new_tokens: str
    context_lens: str
    decode_lens: str
    steps: int
    median_ms: float
    p10_ms: float
    p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (
            self.phase, self.mode, self.prefill_sms, self.decode_sms, self.new_tokens, self.context_lens,
            self.decode_lens,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RaggedPoint:
    """One row of ragged batches beside each other, each phase's layer time while the other runs.

    ``new_tokens`` and ``context_lens``, of each prompt, are numbers with blanks between them. Decode has ``batch``
    sequences of ``kv_tokens`` in all, unequal ones.
    """

    mode: str
    prefill_sms: int
    decode_sms: int
    new_tokens: str
    context_lens: str
    batch: int
    kv_tokens: int
    prefill_steps: int
    prefill_median_ms: float
    prefill_p10_ms: float
    prefill_p90_ms: float
    decode_steps: int
    decode_median_ms: float
    decode_p10_ms: float
    decode_p90_ms: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a point the same point on resuming."""
        return (
            self.mode, self.prefill_sms, self.decode_sms, self.new_tokens, self.context_lens, self.batch,
            self.kv_tokens,
        )  # fmt: skip

    def shapes(self, where: str = "ragged.csv") -> tuple[PrefillShape, DecodeShape]:
        """Both batches. Raises InputError, which begins with ``where``, for what cannot be one."""
        new = whole_numbers(self.new_tokens, f"{where}: new_tokens")
        context = whole_numbers(self.context_lens, f"{where}: context_lens")
        if min(new) < 1:
            raise InputError(f"{where}: new_tokens: found {min(new)}; expected one or more of each prompt")
        if len(new) != len(context):
            raise InputError(
                f"{where}: context_lens: found {len(context)} numbers; expected {len(new)} as in new_tokens"
            )
        if self.kv_tokens < self.batch:
            raise InputError(
                f"{where}: kv_tokens: found {self.kv_tokens}; expected at least {self.batch}, one a sequence"
            )
        return PrefillShape.of(new, context), DecodeShape(self.batch, self.kv_tokens)


DIGITS = 9
"""Of a number of tokens, at most."""


def whole_numbers(text: str, where: str, expected: str = "whole numbers") -> tuple[int, ...]:
    """Numbers with blanks between them. Raises InputError, which begins with ``where``, for anything else."""
    words = text.split(" ")
    if not all(word.isascii() and word.isdecimal() and len(word) <= DIGITS for word in words):
        raise InputError(f"{where}: found {text[:40]!r}; expected {expected}")
    return tuple(map(int, words))


Point = TypeVar("Point", PrefillPoint, DecodePoint, HybridPoint, MixedPoint, TotalPoint, HoldoutPoint, RaggedPoint)
