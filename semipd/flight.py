"""Runs in flight on a device: what each enqueues, a step at a time, and what is seen of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from semipd.attention import AttentionPlan
from semipd.core import IntArray, Run
from semipd.engine import Engine
from semipd.executor import finished_by_prefill
from semipd.padding import decode_rows
from semipd.paged_kv import NO_BLOCKS, Ragged
from semipd.passes import Pass
from semipd.sequences import Sequences
from semipd.torch_device import Mark, Stream

LOOK_AHEAD = 2
"""Steps of a run in flight at most: one at work and one behind it, so that a yield takes effect within two."""


class Flight(ABC):
    """A run in flight: the steps enqueued, and those whose end was seen.

    Attributes:
        ends_s: When each step ended, as far as it was seen.
    """

    def __init__(self, run: Run, stream: Stream, steps: int, now: Callable[[], float]) -> None:
        self.run = run
        self.start_s = now()
        self.ends_s: list[float] = []
        self._stream, self._now = stream, now
        self._steps = steps  # at which the run ends
        self._enqueued = 0
        self._pending: deque[tuple[Mark, Tensor | None]] = deque()
        self._begun: tuple[float, Mark] | None = None  # the host's time, and the device's

    @abstractmethod
    def enqueue(self, step: int) -> Tensor | None:
        """Enqueue a step on the current stream; the host's copy of the tokens it samples, if any."""

    @abstractmethod
    def sampled(self, tokens: list[int]) -> None:
        """Take note of the tokens of the next step that sampled any."""

    @abstractmethod
    def complete(self) -> tuple[int, ...]:
        """Take note of what the run did, once it has ended; ids of the requests it finished."""

    def ready(self) -> bool:
        """Whether the next step could be enqueued now."""
        return True

    def feed(self) -> None:
        """Enqueue a step, if there is one and it is not too far ahead."""
        if self._enqueued == self._steps or len(self._pending) >= LOOK_AHEAD or not self.ready():
            return
        with self._stream.use():
            if self._begun is None:
                self._begun = self._now(), self._stream.mark()
            tokens = self.enqueue(self._enqueued)
            self._pending.append((self._stream.mark(), tokens))
        self._enqueued += 1

    def stop(self) -> None:
        """End after what is enqueued, or the first step."""
        self._steps = min(self._steps, max(1, self._enqueued))

    def steps_done(self) -> int:
        """Steps that were seen to be done, or cannot be taken back and have another one behind them."""
        return max(len(self.ends_s), self._enqueued - 1)

    def ended(self) -> bool:
        """Look at what has been reached by now, and whether that is the end."""
        while self._begun and self._pending and self._pending[0][0].reached():
            mark, tokens = self._pending.popleft()
            begun_s, begun = self._begun
            self.ends_s.append(begun_s + mark.seconds_since(begun))
            if tokens is not None:
                self.sampled(tokens.tolist())
        return len(self.ends_s) == self._steps


class PrefillBatch:
    """A prefill batch on its way through the layers, of which ``layers`` are left."""

    def __init__(self, run: Run, layers: int) -> None:
        self.run = run
        self.layers = layers
        self.started: Pass | None = None

    def continued_by(self, run: Run) -> bool:
        """Whether a run does what is left."""
        mine = self.run
        return run.max_steps == self.layers and (run.requests, run.new_tokens, run.context_lens, run.emits) == (
            mine.requests,
            mine.new_tokens,
            mine.context_lens,
            mine.emits,
        )


class PrefillFlight(Flight):
    """Layers of one batch.

    A batch that goes on after a yield may do so on another stream. That needs no event: the run before has been seen
    to end. Its state is in buffers that stay where they are, or in tensors whose memory goes back to the stream that
    it came from, where nothing runs meanwhile.
    """

    def __init__(
        self, engine: Engine, sequences: Sequences, run: Run, batch: PrefillBatch, now: Callable[[], float]
    ) -> None:
        super().__init__(run, engine.device.stream(run.phase, run.allocation), run.max_steps, now)
        self._engine, self._sequences, self._batch = engine, sequences, batch
        self._plan = self._attention()
        self._first_tokens: list[int] = []
        self._emitting: Tensor | None = None

    def _attention(self) -> AttentionPlan:
        return self._engine.prefill_plan(self.run.allocation.prefill_sms)

    @property
    def stopped(self) -> PrefillBatch | None:
        """The batch, when layers are left."""
        return self._batch if self._batch.layers else None

    def enqueue(self, step: int) -> Tensor | None:
        """See ``Flight``: a layer, at last with the first tokens."""
        model, batch = self._engine.model, self._batch
        begun = (batch.started if step else None) or self._begin()
        begun.layer(model.config.layers - batch.layers, self._stream, self._plan)
        batch.layers -= 1
        if batch.layers or self._emitting is None:
            return None
        return self._engine.device.download(model.logits(begun.hidden().take(self._emitting)).argmax(dim=-1))

    def _begin(self) -> Pass:
        run, sequences, blocks = self.run, self._sequences, self._sequences.blocks
        for request, new, context in zip(run.requests, run.new_tokens, run.context_lens, strict=True):
            sequences.grow(request.id, context + new)
        tables = [blocks.of(request.id) for request in run.requests]
        ragged = Ragged.of(run.new_tokens, run.context_lens, tables, blocks.block_size)
        self._plan.plan(ragged)
        begun = self._batch.started
        if begun is None:
            parts = zip(run.requests, run.new_tokens, run.context_lens, strict=True)
            tokens = [sequences.history(request).between(n, n + new) for request, new, n in parts]
            begun = self._engine.start_prefill(self._stream, ragged, np.concatenate(tokens))
            self._batch.started = begun
        last = (np.cumsum(ragged.q_lens) - 1)[list(run.emits)]
        self._emitting = self._engine.device.upload(last) if len(last) else None
        return begun

    def sampled(self, tokens: list[int]) -> None:
        """See ``Flight``."""
        self._first_tokens = tokens

    def complete(self) -> tuple[int, ...]:
        """See ``Flight``."""
        run = self.run
        if self._batch.layers:
            return ()
        tokens = iter(self._first_tokens)
        parts = zip(run.requests, run.new_tokens, run.context_lens, run.emits, strict=True)
        for request, new, context, emits in parts:
            history = self._sequences.history(request)
            history.cached = context + new
            if emits:
                history.add(context + new, (next(tokens),))
        return finished_by_prefill(run)


class MixedFlight(PrefillFlight):
    """A fused step: all layers of a batch of prompt pieces and decoding sequences, which are pieces of one token."""

    def __init__(self, engine: Engine, sequences: Sequences, run: Run, now: Callable[[], float]) -> None:
        super().__init__(engine, sequences, run, PrefillBatch(run, engine.model.config.layers), now)

    def _attention(self) -> AttentionPlan:
        return self._engine.mixed_plan()

    def enqueue(self, step: int) -> Tensor | None:
        """See ``Flight``: every layer at once, and a token for all that emit."""
        tokens = None
        for layer in range(step, self._batch.layers):
            tokens = super().enqueue(layer)
        return tokens


class DecodeFlight(Flight):
    """Steps of one batch, padded to its bucket with rows that write to the scratch block.

    Args:
        left: Tokens of output that each sequence has yet to get.
    """

    def __init__(
        self, engine: Engine, sequences: Sequences, run: Run, left: Sequence[int], now: Callable[[], float]
    ) -> None:
        super().__init__(run, engine.device.stream(run.phase, run.allocation), min(run.max_steps, *left), now)
        self._engine, self._sequences, self._left = engine, sequences, left
        n = len(run.requests)
        rows = decode_rows(n, engine.max_num_seqs)
        sms = run.allocation.decode_sms
        self._step, self._plan = engine.decode_step(self._stream, rows, sms), engine.decode_plan(rows, sms)
        self._ids = [request.id for request in run.requests]
        self._histories = [sequences.history(request) for request in run.requests]
        self._cached, self._ones = np.array(run.context_lens), np.ones(rows, np.int64)
        self._inputs = np.zeros(engine.decode_buffers.shape, np.int64)
        self._next_tokens = engine.decode_buffers[0, :n]
        scratch = np.array([engine.model.cache.scratch])
        self._tables = [sequences.blocks.of(i) for i in self._ids] + [scratch] * (rows - n)
        self._pages = np.array([len(table) for table in self._tables])
        self._blocks = NO_BLOCKS  # of all tables
        self._tokens: list[list[int]] = []
        self._planned: Mark | None = None

    def ready(self) -> bool:
        """See ``Flight``: what the last step's plan was copied from is free again."""
        return self._planned is None or self._planned.reached()

    def enqueue(self, step: int) -> Tensor:
        """See ``Flight``: a token for every sequence."""
        n, engine = len(self._ids), self._engine
        tokens, positions, slots = self._inputs[:, : len(self._ones)]
        np.add(self._cached, step, out=positions[:n])
        batch = self._next_batch(positions + 1)
        slots[:] = batch.blocks[batch.page_indptr[1:] - 1] * batch.block_size + positions % batch.block_size
        if step == 0:
            each = zip(self._histories, self.run.context_lens, strict=True)
            tokens[:n] = [history.token(cached) for history, cached in each]
        new = slice(min(step, 1), None)  # a step leaves the next tokens on the device
        engine.device.write(engine.decode_buffers[new], self._inputs[new])
        self._plan.plan(batch)
        self._planned = self._stream.mark()
        self._step()
        return engine.device.download(self._next_tokens)

    def _next_batch(self, kv_lens: IntArray) -> Ragged:
        """The batch with so many tokens of each sequence, which have the blocks for them."""
        sequences, size = self._sequences, self._sequences.blocks.block_size
        pages = -(-kv_lens // size)
        changed = np.flatnonzero(pages != self._pages).tolist()
        for i in changed:
            sequences.grow(self._ids[i], int(kv_lens[i]))
            self._tables[i] = sequences.blocks.of(self._ids[i])[: pages[i]]
        if changed or not len(self._blocks):
            self._pages, self._blocks = pages, np.concatenate(self._tables)
        return Ragged(self._ones, kv_lens, self._blocks, size)

    def sampled(self, tokens: list[int]) -> None:
        """See ``Flight``."""
        self._tokens.append(tokens)

    def complete(self) -> tuple[int, ...]:
        """See ``Flight``."""
        steps = len(self._tokens)
        columns = zip(*self._tokens, strict=True)
        for history, cached, tokens in zip(self._histories, self.run.context_lens, columns, strict=True):
            history.cached = cached + steps
            history.add(cached + 1, tokens)
        return tuple([i for i, left in zip(self._ids, self._left, strict=True) if left == steps])
