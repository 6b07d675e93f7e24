"""A prefill batch on its way through the layers: eager, or by CUDA graphs of what lies between two attentions.

A layer of a few hundred tokens takes the device less time than Python needs to launch its ten kernels. So all
but attention, whose launch depends on the batch, is captured, for some numbers of rows that batches are padded to
(*piecewise CUDA graphs*: https://docs.vllm.ai/en/latest/design/cuda_graphs.html).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from semipd.attention import AttentionPlan
from semipd.core import IntArray
from semipd.model import Hidden, Model, Rows
from semipd.padding import prefill_rows
from semipd.paged_kv import Ragged
from semipd.torch_device import Device, Stream


class Pass(Protocol):
    """A batch that has been through some layers. What it does goes to the stream, which is current."""

    def layer(self, index: int, stream: Stream, attention: AttentionPlan) -> None:
        """Enqueue the next layer."""
        ...

    def hidden(self) -> Hidden:
        """The state after the last layer."""
        ...


class EagerPass:
    """A batch of any size; its kernels are launched one by one."""

    def __init__(self, model: Model, device: Device, batch: Ragged, tokens: IntArray) -> None:
        self._model = model
        self._rows = Rows(device.upload(batch.positions), device.upload(batch.slots))
        self._hidden = model.embed(device.upload(tokens))

    def layer(self, index: int, stream: Stream, attention: AttentionPlan) -> None:
        """See ``Pass``."""
        del stream
        self._hidden = self._model.layer(index, self._hidden, self._rows, attention)

    def hidden(self) -> Hidden:
        """See ``Pass``."""
        return self._hidden


class Pieces:
    """Layers cut at their attention, captured for the streams of a device; of use to one batch at a time.

    A batch of at most ``most`` rows lies in buffers that stay where they are: so it can go on by another stream's
    graphs. Piece i ends with the queries of layer i; the last one with the state after the last layer.
    """

    def __init__(self, model: Model, device: Device, most: int) -> None:
        config, dtype = model.config, model.weights.embedding.dtype
        self.model, self.most = model, most
        self.tokens, self.positions, self.slots = (
            torch.zeros(most, dtype=torch.int64, device=device.name) for _ in range(3)
        )
        self.x, self.residual = (
            torch.zeros(most, config.hidden_size, dtype=dtype, device=device.name) for _ in range(2)
        )
        heads = config.query_heads
        self._qkv = torch.zeros(most, heads + 2 * config.kv_heads, config.head_dim, dtype=dtype, device=device.name)
        self.q = self._qkv[:, :heads]
        self.attended = torch.zeros(most, heads, config.head_dim, dtype=dtype, device=device.name)
        self._captured: dict[tuple[Stream, int], list[Callable[[], None]]] = {}

    def of(self, stream: Stream, rows: int) -> list[Callable[[], None]]:
        """What enqueues each piece on the stream, for so many rows; made when it is first asked for."""
        key = stream, rows
        if key not in self._captured:
            with stream.use():
                self._captured[key] = self._capture(stream, rows)
        return self._captured[key]

    def clear(self) -> None:
        """Drop what is captured."""
        self._captured.clear()

    def _capture(self, stream: Stream, rows: int) -> list[Callable[[], None]]:
        cache, layers = self.model.cache, self.model.config.layers
        buffers = (self.tokens, self.positions, self.slots, self.x, self.residual, self._qkv)
        held = [buffer[:rows] for buffer in buffers]
        kept = [buffer.clone() for buffer in held]  # a batch may be on its way
        self.tokens[:rows].zero_()
        self.positions[:rows].zero_()
        self.slots[:rows].fill_(cache.scratch * cache.block_size)
        # Those between have the kernels of the second one.
        pieces = [stream.capture(self._piece(i, rows), warm=1 < i < layers) for i in range(layers + 1)]
        for buffer, values in zip(held, kept, strict=True):
            buffer.copy_(values)
        return pieces

    def _piece(self, index: int, rows: int) -> Callable[[], None]:
        model, residual_of = self.model, self.residual[:rows]

        def piece() -> None:
            if index == 0:
                hidden = model.embed(self.tokens[:rows])
            else:
                # Attention alone has no residual, and leaves the buffer as it is.
                hidden = model.after_attention(index - 1, self.attended[:rows], residual_of)
            if index < model.config.layers:
                of = Rows(self.positions[:rows], self.slots[:rows])
                q, residual = model.before_attention(index, hidden, of, self._qkv[:rows].flatten(1))
                _keep(self.q[:rows], q)
            else:
                residual = hidden.residual
                _keep(self.x[:rows], hidden.x)
            if residual is not None:
                _keep(residual_of, residual)

        return piece


def _keep(buffer: Tensor, values: Tensor) -> None:
    """Copy the values to where they are to be, unless they are there."""
    if values.data_ptr() != buffer.data_ptr():
        buffer.copy_(values)


class PaddedPass:
    """A batch of few tokens, padded with rows that write to the scratch block."""

    def __init__(self, pieces: Pieces, device: Device, stream: Stream, batch: Ragged, tokens: IntArray) -> None:
        cache = pieces.model.cache
        self._pieces, self._tokens, self._rows = pieces, batch.rows, prefill_rows(batch.rows, pieces.most)
        first = pieces.of(stream, self._rows)[0]  # capturing would overwrite the batch
        spare = self._rows - self._tokens
        scratch = cache.scratch * cache.block_size
        for buffer, values, filler in (
            (pieces.tokens, tokens, 0),
            (pieces.positions, batch.positions, 0),
            (pieces.slots, batch.slots, scratch),
        ):
            padded = np.concatenate((values, np.full(spare, filler, np.int64)))
            buffer[: self._rows].copy_(device.upload(padded))
        first()

    def layer(self, index: int, stream: Stream, attention: AttentionPlan) -> None:
        """See ``Pass``."""
        n = self._tokens
        after = self._pieces.of(stream, self._rows)[index + 1]
        attention.run(index, self._pieces.q[:n], out=self._pieces.attended[:n])
        after()

    def hidden(self) -> Hidden:
        """See ``Pass``."""
        n, pieces = self._tokens, self._pieces
        return Hidden(pieces.x[:n], None if pieces.model.config.attention_only else pieces.residual[:n])
