"""A model made ready for the streams of a device: attention plans, and what is captured for every batch size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from semipd.attention import Attention, AttentionPlan
from semipd.core import Allocation, IntArray, Phase
from semipd.model import Model, Rows
from semipd.padding import MOST_PREFILL_ROWS, decode_rows, prefill_rows
from semipd.paged_kv import Ragged
from semipd.passes import EagerPass, PaddedPass, Pass, Pieces
from semipd.torch_device import Device, Stream


class Engine:
    """A model made ready to run on the streams of a device.

    Args:
        model: The model.
        attention: Over the model's cache.
        device: Where both are.
        max_num_seqs: Most sequences of a decode batch.
        captured_tokens: Most tokens of a prefill batch whose layers are captured.

    Attributes:
        decode_buffers: What a decode step reads: token ids, which it replaces by the next ones, positions and slots;
            int64 [3, max_num_seqs].
    """

    def __init__(
        self,
        model: Model,
        attention: Attention,
        device: Device,
        max_num_seqs: int,
        captured_tokens: int = MOST_PREFILL_ROWS,
    ) -> None:
        self.model, self.device, self.max_num_seqs = model, device, max_num_seqs
        self._attention = attention
        self.decode_buffers = torch.zeros(3, max_num_seqs, dtype=torch.int64, device=device.name)
        self._pieces = Pieces(model, device, captured_tokens)
        self._prefill_plans: dict[int, AttentionPlan] = {}
        self._mixed_plan: AttentionPlan | None = None
        self._decode_plans: dict[tuple[int, int], AttentionPlan] = {}
        self._decode_steps: dict[tuple[Stream, int, int], Callable[[], None]] = {}

    def prefill_plan(self, sms: int) -> AttentionPlan:
        """Prefill attention on a partition of so many SMs."""
        if sms not in self._prefill_plans:
            self._prefill_plans[sms] = self._attention.prefill(sms)
        return self._prefill_plans[sms]

    def forget_prefill_plan(self, sms: int) -> None:
        """Have the plan of that partition made anew: another backend may have been chosen for it."""
        self._prefill_plans.pop(sms, None)

    def mixed_plan(self) -> AttentionPlan:
        """Attention of fused batches, on the whole device."""
        if self._mixed_plan is None:
            self._mixed_plan = self._attention.mixed()
        return self._mixed_plan

    def decode_plan(self, rows: int, sms: int) -> AttentionPlan:
        """Decode attention of so many rows on a partition of so many SMs."""
        key = rows, sms
        if key not in self._decode_plans:
            self._decode_plans[key] = self._attention.decode(rows, sms)
        return self._decode_plans[key]

    def decode_step(self, stream: Stream, rows: int, sms: int) -> Callable[[], None]:
        """What enqueues a step of so many rows on the stream of a partition, once they are planned.

        Made when it is first asked for, which overwrites ``decode_buffers``.
        """
        key = stream, rows, sms
        if key not in self._decode_steps:
            self._decode_steps[key] = self._make_decode_step(stream, rows, sms)
        return self._decode_steps[key]

    def _make_decode_step(self, stream: Stream, rows: int, sms: int) -> Callable[[], None]:
        model = self.model
        with stream.use():  # on which what the plan is made of is ready then
            plan = self.decode_plan(rows, sms)
        tokens, positions, slots = self.decode_buffers[:, :rows]

        def step() -> None:
            hidden, of = model.embed(tokens), Rows(positions, slots)
            for layer in range(model.config.layers):
                hidden = model.layer(layer, hidden, of, plan)
            tokens.copy_(model.logits(hidden).argmax(dim=-1))

        if not self._attention.graphs:
            return step
        with stream.use():
            plan.plan(self._blank((1,) * rows))
            tokens.zero_()
            positions.zero_()
            slots.fill_(model.cache.scratch * model.cache.block_size)
        return stream.capture(step)

    def _blank(self, lengths: tuple[int, ...]) -> Ragged:
        """Sequences of so many tokens that all lie in the scratch block."""
        cache = self.model.cache
        tables = [[cache.scratch] * -(-n // cache.block_size) for n in lengths]
        return Ragged.of(lengths, (0,) * len(lengths), tables, cache.block_size)

    def prepare(self, at: Allocation, prefill_tokens: int) -> None:
        """See ``TorchExecutor.prepare``."""
        stream = self.device.stream(Phase.DECODE, at)
        sizes = {decode_rows(n + 1, self.max_num_seqs) for n in range(self.max_num_seqs)}
        for rows in sorted(sizes, reverse=True):  # the memory of the largest is enough for the others
            self.decode_step(stream, rows, at.decode_sms)
        stream = self.device.stream(Phase.PREFILL, at)
        most = self._pieces.most
        padded = {prefill_rows(n + 1, most) for n in range(min(prefill_tokens, most))}
        for rows in sorted(padded, reverse=True):
            self._pieces.of(stream, rows)
        longest = self.model.config.max_positions
        whole, rest = divmod(prefill_tokens, longest)
        batch = self._blank((longest,) * whole + ((rest,) if rest else ()))
        with stream.use():
            plan, begun = self.prefill_plan(at.prefill_sms), self.start_prefill(stream, batch, batch.positions * 0)
            plan.plan(batch)
            begun.layer(0, stream, plan)
            self.model.logits(begun.hidden().take(self.device.upload(np.zeros(1, np.int64))))
        self.device.synchronize()

    def start_prefill(self, stream: Stream, batch: Ragged, tokens: IntArray) -> Pass:
        """The batch before its first layer, on the stream, which is current."""
        if batch.rows > self._pieces.most:
            return EagerPass(self.model, self.device, batch, tokens)
        return PaddedPass(self._pieces, self.device, stream, batch, tokens)

    def close(self) -> None:
        """Wait for the device; drop graphs and plans."""
        try:
            self.device.synchronize()
        finally:
            self._decode_steps.clear()
            self._pieces.clear()
            self._decode_plans.clear()
            self._prefill_plans.clear()
            self._mixed_plan = None
