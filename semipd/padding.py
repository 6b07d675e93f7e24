"""To how many rows batches are padded: CUDA graphs have one size each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

MOST_PREFILL_ROWS = 1024
"""Of a prefill batch whose layers are captured; a larger one keeps the device busy while the host launches kernels."""


SLOW_ROWS = (448,)
"""To which no prefill batch is padded: cuBLAS on an H200 takes 1.2 to 1.5 times as long for them as for 512."""


def decode_rows(sequences: int, most: int) -> int:
    """Rows of a decode batch: 1, 2, 4, multiples of 8 up to 32, then of 16, at most ``most``."""
    step = 8 if sequences <= 32 else 16
    return min(most, sequences if sequences <= 2 else 4 if sequences <= 4 else -(-sequences // step) * step)


def prefill_rows(tokens: int, most: int = MOST_PREFILL_ROWS) -> int:
    """Rows of a prefill batch: multiples of 16 up to 128, then of an eighth of the next power of two.

    None of ``SLOW_ROWS``. More than ``most`` tokens are not padded.
    """
    if tokens > most:
        return tokens
    step = max(16, (1 << (tokens - 1).bit_length()) // 8)
    rows = -(-tokens // step) * step
    return min(most, rows + step if rows in SLOW_ROWS else rows)


def attention_queries(heads_per_key: int) -> int:
    """New tokens of a prompt that flashinfer's prefill kernels compute at once, for so many heads that share keys."""
    return max(1, 128 // heads_per_key)


def decode_sizes(most: int) -> tuple[int, ...]:
    """All that ``decode_rows`` gives, ascending."""
    return tuple(sorted({decode_rows(n, most) for n in range(1, most + 1)}))


def prefill_sizes(most: int) -> tuple[int, ...]:
    """All that ``prefill_rows`` pads batches of at most so many tokens to, ascending."""
    return tuple(sorted({prefill_rows(n) for n in range(1, min(most, MOST_PREFILL_ROWS) + 1)}))


@dataclass(frozen=True, kw_only=True)
class Padded:
    """The sizes, ascending, that batches were padded to when they were measured.

    ``queries``: new tokens of a prompt that attention computes at once.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, in profiles

    batch: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    queries: int = 1

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries: found {self.queries}; expected at least 1")
        for name, sizes in (("batch", self.batch), ("tokens", self.tokens)):
            if any(low >= high for low, high in pairwise((0, *sizes))):
                raise ValueError(f"{name}: found {list(sizes)}; expected ascending sizes from one on")


NOT_PADDED = Padded()
