"""Causal attention of a ragged batch over the paged KV cache, and the reference for it in plain torch.

A backend makes plans: one for prefill on a partition, one for decode with a fixed number of rows. A plan is told
a batch, then runs its layers; it has its own workspace, so plans of the two phases never meet.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from semipd.paged_kv import PagedKvCache, Ragged


class AttentionPlan(Protocol):
    """Attention of one batch at a time, all layers alike."""

    def plan(self, batch: Ragged) -> None:
        """Get ready for the layers of this batch, which go to the current stream. Does not wait for the device."""
        ...

    def run(self, layer: int, q: Tensor, out: Tensor | None = None) -> Tensor:
        """Enqueue a layer: q [rows, query_heads, head_dim], whose keys are cached by now, gives the same shape.

        ``out``: where to, if it matters.
        """
        ...


class Attention(Protocol):
    """A way to compute attention. ``graphs``: whether ``run`` of a decode plan can be part of a CUDA graph."""

    graphs: bool

    def prefill(self, sms: int) -> AttentionPlan:
        """For batches of any shape, on a partition of so many SMs."""
        ...

    def mixed(self) -> AttentionPlan:
        """For fused batches of prompts and decoding sequences, on the whole device."""
        ...

    def decode(self, rows: int, sms: int) -> AttentionPlan:
        """For batches of exactly so many sequences with one new token each, on a partition of so many SMs."""
        ...


class TorchAttention:
    """One sequence after the other in plain torch, on any device: the reference."""

    graphs = False

    def __init__(self, cache: PagedKvCache) -> None:
        self._cache = cache

    def prefill(self, sms: int) -> AttentionPlan:
        """See ``Attention``."""
        del sms
        return TorchPlan(self._cache)

    def mixed(self) -> AttentionPlan:
        """See ``Attention``."""
        return TorchPlan(self._cache)

    def decode(self, rows: int, sms: int) -> AttentionPlan:
        """See ``Attention``."""
        del rows, sms
        return TorchPlan(self._cache)


class TorchPlan:
    """A batch for ``TorchAttention``."""

    def __init__(self, cache: PagedKvCache) -> None:
        self._cache = cache
        self._sequences: list[tuple[slice, Tensor, int, Tensor | None]] = []

    def plan(self, batch: Ragged) -> None:
        """See ``AttentionPlan``."""
        device = self._cache.keys.device
        tables = torch.from_numpy(batch.blocks).to(device, non_blocking=True)
        self._sequences = []
        row = page = 0
        for q_len, kv_len, pages in zip(
            batch.q_lens.tolist(), batch.kv_lens.tolist(), batch.pages.tolist(), strict=True
        ):
            seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)
            self._sequences.append(
                (slice(row, row + q_len), tables[page : page + pages], kv_len, seen if q_len > 1 else None)
            )
            row, page = row + q_len, page + pages

    def run(self, layer: int, q: Tensor, out: Tensor | None = None) -> Tensor:
        """See ``AttentionPlan``."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        out = torch.empty_like(q) if out is None else out
        for rows, table, kv_len, seen in self._sequences:
            k, v = (x[table].flatten(0, 1)[:kv_len].transpose(0, 1) for x in (keys, values))
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[rows].transpose(0, 1), k, v, attn_mask=seen, enable_gqa=True
            )
            out[rows] = attended.transpose(0, 1)
        return out
