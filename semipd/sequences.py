"""The sequences of a real execution: their tokens, and which KV blocks are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from semipd.core import IntArray, Request, Run
from semipd.paged_kv import BlockMap

Prompts = Callable[[Request], IntArray]
"""Gives the token ids of a request's prompt, shape [prompt_len]; the same ones whenever it is asked."""


def random_prompts(vocab_size: int, seed: int = 0) -> Prompts:
    """Prompts drawn from a seed and the request's id, so that they depend on nothing else."""
    return lambda request: np.random.default_rng((seed, request.id)).integers(vocab_size, size=request.prompt_len)


def pooled_prompts(vocab_size: int, longest: int, seed: int = 0) -> Prompts:
    """Prompts of up to ``longest`` tokens that are pieces of one random text: to be had for nothing."""
    text = np.random.default_rng(seed).integers(vocab_size, size=2 * longest)
    return lambda request: text[request.id % longest :][: request.prompt_len]


@dataclass(eq=False)
class History:
    """A request's tokens, and how many of them are in the KV cache."""

    prompt: IntArray
    generated: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def known(self) -> int:
        """Tokens there are."""
        return len(self.prompt) + len(self.generated)

    def between(self, start: int, stop: int) -> IntArray:
        """Token ids of these positions, shape [stop - start]."""
        own = len(self.prompt)
        if stop <= own:
            return self.prompt[start:stop]
        if start >= own:
            return np.array(self.generated[start - own : stop - own], np.int64)
        return np.concatenate((self.prompt[start:], np.array(self.generated[: stop - own], np.int64)))

    def token(self, position: int) -> int:
        """Token id of this position."""
        own = len(self.prompt)
        return self.generated[position - own] if position >= own else int(self.prompt[position])

    def add(self, position: int, tokens: Iterable[int]) -> None:
        """Tokens generated from that position on."""
        self.generated[position - len(self.prompt) :] = tokens


class Sequences:
    """What is known of each request's sequence: its tokens and its KV blocks.

    Attributes:
        blocks: Whose block is which.
        generated: Tokens generated, by request, the finished ones included.
        held: See ``TorchExecutor.follow``.
    """

    def __init__(
        self, blocks: BlockMap, prompts: Prompts, *, vocab_size: int, max_positions: int, blank_context: bool
    ) -> None:
        self.blocks = blocks
        self.generated: dict[int, list[int]] = {}
        self.held: Callable[[int], int] | None = None
        self._prompts = prompts
        self._vocab_size = vocab_size
        self._max_positions = max_positions
        self._blank_context = blank_context
        self._histories: dict[int, History] = {}  # of requests that are not finished

    def history(self, request: Request) -> History:
        """Its tokens so far. Raises ValueError when its prompt has not ``prompt_len`` tokens of the vocabulary."""
        history = self._histories.get(request.id)
        if history is None:
            prompt = np.asarray(self._prompts(request), np.int64)
            if prompt.shape != (request.prompt_len,) or prompt.min() < 0 or prompt.max() >= self._vocab_size:
                raise ValueError(
                    f"request {request.id}: prompt: found shape {prompt.shape}, tokens {prompt[:3].tolist()}...; "
                    f"expected {request.prompt_len} tokens from 0 to {self._vocab_size - 1}"
                )
            history = self._histories[request.id] = History(prompt)
            self.generated[request.id] = history.generated
        return history

    def check(self, run: Run) -> None:
        """Take back the blocks of those prefilled from their start; ValueError when one has not what the run says."""
        for request, new, context in zip(run.requests, run.new_tokens, run.context_lens, strict=True):
            history = self.history(request)
            if context == 0:
                self._take_back(request.id)
            if context == history.cached and context + new <= history.known:
                continue
            if self._blank_context:
                history.generated += [0] * (context + new - history.known)
            else:
                raise ValueError(
                    f"{run.phase.value} run {run.id}: request {request.id}: found {context} cached tokens and {new} "
                    f"new ones; expected {history.cached} cached of {history.known}"
                )

    def grow(self, sequence: int, tokens: int) -> None:
        """Give a sequence blocks for so many tokens, if need be those of sequences that are to have none.

        Raises ValueError for a sequence that is too long for the model, RuntimeError when blocks run out.
        """
        if tokens > self._max_positions:
            raise ValueError(f"request {sequence}: found {tokens} tokens; expected at most {self._max_positions}")
        if self.held is not None and self.blocks.missing(sequence, tokens) > self.blocks.free:
            for other in self.blocks.sequences:
                if not self.held(other):
                    self._take_back(other)
        self.blocks.grow(sequence, tokens)

    def finish(self, request_ids: Iterable[int]) -> None:
        """Forget all about these but what they generated."""
        for request_id in request_ids:
            self._take_back(request_id)
            del self._histories[request_id]

    def _take_back(self, sequence: int) -> None:
        self.blocks.release(sequence)
        if sequence in self._histories:
            self._histories[sequence].cached = 0
