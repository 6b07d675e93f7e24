"""Random ragged batches to measure, and what a model of their times says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from semipd.core import Allocation, DecodeShape, FloatArray, Phase, PrefillShape
from semipd.profile_config import DecodeAxes, PrefillAxes
from semipd.ragged import LENGTHS_SHAPE, Decodes, Prompts, dealt


class Times(Protocol):
    """The part of a cost model that is held against measured times."""

    @property
    def layers(self) -> int:
        """Of the model."""
        ...

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """See ``CostModel.prefill_s``."""
        ...

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """See ``CostModel.decode_s``."""
        ...

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """See ``CostModel.mixed_s``."""
        ...


@dataclass(frozen=True, slots=True)
class Trial:
    """What to measure: a batch of a phase alone, or of both, at an allocation."""

    at: Allocation
    prefill: Prompts | None
    decode: Decodes | None


@dataclass(frozen=True)
class Ranges:
    """Where batches are drawn from, least and most: the inside of a table."""

    tokens: tuple[int, int]
    mean_context: tuple[int, int]
    batch: tuple[int, int]
    kv_tokens: tuple[int, int]

    @staticmethod
    def of(prefill: PrefillAxes, decode: DecodeAxes) -> Ranges:
        """From one end of these axes to the other."""
        tokens, mean_context, batch, kv_tokens = ((min(v), max(v)) for v in (*prefill.values, *decode.values))
        return Ranges(tokens, mean_context, batch, kv_tokens)


def prompts(rng: np.random.Generator, ranges: Ranges) -> Prompts:
    """Up to eight of uneven lengths, with tokens and a mean context drawn log-uniformly."""
    tokens = _log_uniform(rng, ranges.tokens)
    parts = int(rng.integers(1, 1 + min(8, tokens // 8)))
    new = dealt(rng.gamma(LENGTHS_SHAPE, size=parts), tokens)
    own = float((new * new).sum()) / 2 / tokens  # mean context without any cached token
    mean_context = _log_uniform(rng, ranges.mean_context)
    context = np.zeros(parts, np.int64)
    if (cached := mean_context - own) > 0:
        shares = rng.gamma(LENGTHS_SHAPE, size=parts)
        context = np.round(cached * shares * tokens / float((shares * new).sum())).astype(np.int64)
    return Prompts(tuple(new.tolist()), tuple(context.tolist()))


def decodes(rng: np.random.Generator, ranges: Ranges) -> Decodes:
    """Of a size and KV tokens drawn log-uniformly; lengths have a standard deviation of about half their mean."""
    batch, kv_tokens = _log_uniform(rng, ranges.batch), _log_uniform(rng, ranges.kv_tokens)
    return Decodes(tuple(dealt(rng.gamma(LENGTHS_SHAPE, size=batch), max(kv_tokens, 2 * batch), least=2).tolist()))


def _log_uniform(rng: np.random.Generator, range_: tuple[int, int]) -> int:
    return round(float(np.exp(rng.uniform(np.log(range_[0]), np.log(range_[1])))))


def as_text(numbers: tuple[int, ...]) -> str:
    """Numbers as tables have them."""
    return " ".join(map(str, numbers))


def predicted(model: Times, phase: str, trial: Trial) -> tuple[float, bool]:
    """Milliseconds of a layer of one of a trial's phases by a model, and whether that was outside its grid."""
    prefill = trial.prefill.shape if trial.prefill else None
    decode = trial.decode.shape if trial.decode else None
    if phase == Phase.MIXED.value and prefill:
        seconds, outside = model.mixed_s(prefill, decode)
        return seconds * 1e3 / model.layers, outside
    if phase == Phase.PREFILL.value and prefill:
        seconds, outside = model.prefill_s(prefill, trial.at, decode)
        return seconds * 1e3, outside
    if decode is None:
        raise ValueError(f"{phase}: this trial has no such batch")
    steps_s, beyond = model.decode_s(decode, trial.at, prefill)
    return float(steps_s[0]) * 1e3 / model.layers, beyond > 0
