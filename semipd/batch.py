"""Batches: sequences on their way, and which prompts or pieces of prompts are prefilled together next."""

from __future__ import annotations

from collections.abc import Iterable

from semipd.core import FUSED, PREFILL, Allocation, PrefillShape, Request, Run
from semipd.kv_cache import BlockManager


class Sequence:
    """A request on its way: waiting, being prefilled, then decoding."""

    __slots__ = ("base", "keys", "length", "order", "prefilled", "request")

    def __init__(self, request: Request, order: int, keys: tuple[int, ...] = ()) -> None:
        self.request = request
        self.order = order  # of arrival
        self.keys = keys  # of the units of its prompt, which prefix caching shares
        self.length = request.prompt_len  # tokens to prefill: the prompt, and after a preemption all tokens so far
        self.prefilled = 0  # of these, cached by batches that have ended
        self.base = 0  # while decoding: cached tokens less the scheduler's count of decode steps


class PrefillBatch:
    """Sequences whose next tokens go through the layers together; ``layers`` are left."""

    __slots__ = ("blocks", "context_lens", "emits", "layers", "new_tokens", "sequences", "shape")

    def __init__(
        self,
        sequences: tuple[Sequence, ...],
        new_tokens: tuple[int, ...],
        context_lens: tuple[int, ...],
        emits: tuple[bool, ...],
        blocks: int,
        shape: PrefillShape,
        layers: int,
    ) -> None:
        self.sequences = sequences
        self.new_tokens = new_tokens
        self.context_lens = context_lens
        self.emits = emits
        self.blocks = blocks
        self.shape = shape
        self.layers = layers

    @property
    def requests(self) -> tuple[Request, ...]:
        """Whose tokens these are."""
        return tuple([sequence.request for sequence in self.sequences])

    @property
    def holds(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """What its sequences come to hold: id, tokens and keys of each."""
        each = zip(self.sequences, self.context_lens, self.new_tokens, strict=True)
        return [(sequence.request.id, done + new, sequence.keys) for sequence, done, new in each]

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
    waiting: Iterable[Sequence], *, tokens: int, places: int, free: int, cache: BlockManager, layers: int
) -> PrefillBatch | None:
    """The next tokens of those that wait, in their order: whole prompts, the last one cut to fit; None without any.

    The first piece of a prompt is taken only when all of it fits (vLLM's ``scheduler_reserve_full_isl``).
    A prompt starts after what is cached of it, or will be by then, since prompts before it in the batch compute it:
    each layer writes all their keys and values before it reads any.

    Args:
        waiting: In order; a prompt that was cut before goes first.
        tokens: Most new tokens of the batch.
        places: Most sequences.
        free: KV blocks that it may take.
        cache: Whose blocks these are.
        layers: Of the model.
    """
    sequences: list[Sequence] = []
    new_tokens: list[int] = []
    contexts: list[int] = []
    emits: list[bool] = []
    blocks, pairs, mean_contexts, left = 0, 0.0, 0.0, tokens
    ahead: set[int] = set()
    for sequence in waiting:
        keys, done, whole = sequence.keys, sequence.prefilled, sequence.length
        if keys and not done:
            done = cache.cached_tokens(keys, whole, ahead)
        new = min(whole - done, left)
        needed = blocks_after = blocks + cache.cost(sequence.request.id, done + new, keys, ahead)
        if done + new < whole and not sequence.prefilled:
            needed = max(needed, blocks + cache.cost(sequence.request.id, whole, keys, ahead))
        if new <= 0 or len(sequences) >= places or needed > free:
            break
        sequences.append(sequence)
        new_tokens.append(new)
        contexts.append(done)
        emits.append(done + new == sequence.length)
        if keys:
            ahead.update(keys[: (done + new) // cache.unit_tokens])
        blocks = blocks_after
        pairs += new * (done + new / 2)
        mean_contexts += done + new / 2
        left -= new
    if not sequences:
        return None
    dealt, cached = tuple(new_tokens), tuple(contexts)
    shape = PrefillShape(tokens - left, pairs, mean_contexts, dealt, cached)
    return PrefillBatch(tuple(sequences), dealt, cached, tuple(emits), blocks, shape, layers)
