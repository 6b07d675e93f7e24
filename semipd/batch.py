"""Batches: sequences on their way, and which prompts or pieces of prompts are prefilled together next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from semipd.core import FUSED, PREFILL, Allocation, PrefillShape, Request, Run


class Sequence:
    """A request on its way: waiting, being prefilled, then decoding."""

    __slots__ = ("base", "length", "order", "prefilled", "request")

    def __init__(self, request: Request, order: int) -> None:
        self.request = request
        self.order = order  # of arrival
        self.length = request.prompt_len  # tokens to prefill: the prompt, and after a preemption all tokens so far
        self.prefilled = 0  # of these, cached by batches that have ended
        self.base = 0  # while decoding: cached tokens less the scheduler's count of decode steps


@dataclass(slots=True, eq=False)
class PrefillBatch:
    """Sequences whose next tokens go through the layers together; ``layers`` are left."""

    sequences: tuple[Sequence, ...]
    new_tokens: tuple[int, ...]
    context_lens: tuple[int, ...]
    emits: tuple[bool, ...]
    blocks: int
    shape: PrefillShape
    layers: int

    @property
    def requests(self) -> tuple[Request, ...]:
        """Whose tokens these are."""
        return tuple([sequence.request for sequence in self.sequences])

    def run(self, run_id: int, at: Allocation) -> Run:
        """The layers that are left, as a run of their own."""
        return Run(
            run_id, PREFILL, self.requests, self.new_tokens, self.context_lens, at.prefill_sms, self.layers, at,
            self.emits,
        )  # fmt: skip

    def fused(self, run_id: int, at: Allocation, decoding: tuple[Request, ...], cached: tuple[int, ...]) -> Run:
        """All layers in one step, together with a token for each decoding sequence of so many cached ones."""
        n = len(decoding)
        return Run(
            run_id, FUSED, decoding + self.requests, (1,) * n + self.new_tokens, cached + self.context_lens,
            at.decode_sms, 1, at, (True,) * n + self.emits, n,
        )  # fmt: skip


def next_batch(
    waiting: Iterable[Sequence], *, tokens: int, places: int, free: int, blocks_of: Callable[[int], int], layers: int
) -> PrefillBatch | None:
    """The next tokens of those that wait, in their order: whole prompts, the last one cut to fit; None without any.

    Args:
        waiting: In order; a prompt that was cut before goes first.
        tokens: Most new tokens of the batch.
        places: Most sequences.
        free: KV blocks that it may take.
        blocks_of: Blocks of so many tokens.
        layers: Of the model.
    """
    sequences: list[Sequence] = []
    new_tokens: list[int] = []
    contexts: list[int] = []
    emits: list[bool] = []
    blocks, pairs, left = 0, 0.0, tokens
    for sequence in waiting:
        done = sequence.prefilled
        new = min(sequence.length - done, left)
        blocks_after = blocks + blocks_of(done + new) - blocks_of(done)
        if new <= 0 or len(sequences) >= places or blocks_after > free:
            break
        sequences.append(sequence)
        new_tokens.append(new)
        contexts.append(done)
        emits.append(done + new == sequence.length)
        blocks = blocks_after
        pairs += new * (done + new / 2)
        left -= new
    if not sequences:
        return None
    shape = PrefillShape(tokens - left, pairs)
    return PrefillBatch(tuple(sequences), tuple(new_tokens), tuple(contexts), tuple(emits), blocks, shape, layers)
