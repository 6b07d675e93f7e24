"""Attention kernels of one layer, planned for the partition they run on (torch and flashinfer).

flashinfer's fa3 prefill is persistent: it launches one CTA per SM of the *device* and hands each a fixed list
of tiles, so on a partition of n SMs it takes ceil(device / n) waves. Its list is plain data in the wrapper's
integer workspace, so ``size_to`` writes one for n CTAs instead, in an order that is kind to L2, and leaves the
others empty: no kernel is changed, and the time is smooth in n (docs/adr/0002-fa3-sized-to-the-partition.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from semipd.points import DecodeWork, PrefillWork
from semipd.tiles import FA3_HEAD_DIM, balance

WORKSPACE_BYTES = 256 << 20  # fa2 splits few queries over long keys into partial results


@dataclass(frozen=True)
class Gqa:
    """Grouped-query attention: query heads, KV heads, head dimension, and the element type's name in torch."""

    query_heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> Any:
        """The torch dtype."""
        return getattr(torch, self.dtype)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token adds in one layer."""
        return 2 * self.kv_heads * self.head_dim * int(self.torch_dtype.itemsize)


class PrefillKernel:
    """Causal GQA attention of one prefill batch over ragged keys and values, random data.

    ``copies`` layers' worth of q, k and v are rotated through, so that small shapes do not live in L2.
    Backend ``fa2``, ``fa3`` (planned by flashinfer for the whole device) or ``fa3-sized`` (planned for
    ``ctas`` CTAs).
    """

    def __init__(self, gqa: Gqa, work: PrefillWork, backend: str, copies: int = 1, seed: int = 0) -> None:
        import flashinfer

        self.gqa, self.work, self.backend, self.copies = gqa, work, backend, copies
        self.ctas: int | None = None
        generator = torch.Generator("cuda").manual_seed(seed)
        kv_len = work.seq_context + work.seq_tokens

        def random(tokens: int, heads: int) -> Any:
            shape = (copies, tokens, heads, gqa.head_dim)
            return torch.randn(shape, device="cuda", dtype=gqa.torch_dtype, generator=generator)

        self.q = random(work.tokens, gqa.query_heads)
        self.k = random(work.seqs * kv_len, gqa.kv_heads)
        self.v = random(work.seqs * kv_len, gqa.kv_heads)
        self.out = torch.empty_like(self.q[0])
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self._wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            self._workspace, "NHD", backend="fa2" if backend == "fa2" else "fa3"
        )
        steps = torch.arange(work.seqs + 1, dtype=torch.int32)
        self._wrapper.plan(
            steps * work.seq_tokens,
            steps * kv_len,
            gqa.query_heads,
            gqa.kv_heads,
            gqa.head_dim,
            causal=True,
            q_data_type=gqa.torch_dtype,
        )

    def size_to(self, ctas: int) -> None:
        """Plan for a partition of ``ctas`` SMs; only ``fa3-sized`` needs it, the others ignore it.

        Raises RuntimeError when flashinfer's plan is laid out otherwise than this module knows.
        """
        if self.backend != "fa3-sized" or ctas == self.ctas:
            return
        self.ctas = ctas
        work, info = self.work, [int(x) for x in self._wrapper._plan_info]
        device_ctas = torch.cuda.get_device_properties("cuda").multi_processor_count
        if self.gqa.head_dim != FA3_HEAD_DIM or len(info) != 9 or info[8] or ctas > device_ctas:
            raise RuntimeError(
                f"flashinfer's fa3 plan is {info}, head dimension {self.gqa.head_dim}, {ctas} CTAs; expected nine "
                f"offsets, one schedule per head, head dimension {FA3_HEAD_DIM} and at most {device_ctas} CTAs"
            )
        kv_len = work.seq_context + work.seq_tokens
        heads, group = self.gqa.query_heads, self.gqa.query_heads // self.gqa.kv_heads
        tiles = balance([work.seq_tokens] * work.seqs, [kv_len] * work.seqs, heads, group, ctas)
        indptr = np.concatenate([tiles.indptr, np.full(device_ctas - ctas, tiles.indptr[-1])])
        count = len(tiles.tile)
        room = (info[1] - info[0]) // 4
        if count > room:
            raise RuntimeError(f"flashinfer's fa3 plan has room for {room} tiles; {count} are needed")
        columns = (
            tiles.tile,
            tiles.sequence * work.seq_tokens,
            tiles.sequence * kv_len,
            np.full(count, work.seq_tokens),
            np.full(count, kv_len),
            tiles.head,
            indptr,
            tiles.sequence,
        )
        torch.cuda.synchronize()
        for offset, column in zip(info[:8], columns, strict=True):
            data = torch.from_numpy(column.astype(np.int32)).view(torch.uint8)
            self._wrapper._int_workspace_buffer[offset : offset + len(data)].copy_(data)
        torch.cuda.synchronize()

    def launch(self, step: int) -> None:
        """Enqueue one layer on the current stream."""
        copy = step % self.copies
        self._wrapper.run(self.q[copy], self.k[copy], self.v[copy], out=self.out)


class DecodeKernel:
    """GQA attention of one decode step over a paged KV cache, tensor cores, random data, pages in random order."""

    def __init__(
        self,
        gqa: Gqa,
        work: DecodeWork,
        copies: int = 1,
        page_size: int = 16,
        seed: int = 0,
        split_tokens: int = 0,
    ) -> None:
        import flashinfer

        self.gqa, self.work, self.copies, self.page_size = gqa, work, copies, page_size
        generator = torch.Generator("cuda").manual_seed(seed)
        lengths = work.lengths()
        pages = [(n + page_size - 1) // page_size for n in lengths]
        indptr = torch.tensor([0, *np.cumsum(pages)], dtype=torch.int32)
        count = int(indptr[-1])
        self.page_ids = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        shape = (copies, count, 2, page_size, gqa.kv_heads, gqa.head_dim)
        self.cache = torch.randn(shape, device="cuda", dtype=gqa.torch_dtype, generator=generator)
        q_shape = (copies, work.batch, gqa.query_heads, gqa.head_dim)
        self.q = torch.randn(q_shape, device="cuda", dtype=gqa.torch_dtype, generator=generator)
        self.out = torch.empty_like(self.q[0])
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", use_tensor_cores=True)
        self._wrapper.plan(
            indptr,
            self.page_ids.to("cuda"),
            torch.tensor([(n - 1) % page_size + 1 for n in lengths], dtype=torch.int32),
            gqa.query_heads,
            gqa.kv_heads,
            gqa.head_dim,
            page_size,
            q_data_type=gqa.torch_dtype,
            fixed_split_size=split_tokens // page_size or None,
        )

    def size_to(self, ctas: int) -> None:
        """Decode is planned once: its grid is not persistent, so it fits any partition."""

    def launch(self, step: int) -> None:
        """Enqueue one layer on the current stream."""
        copy = step % self.copies
        self._wrapper.run(self.q[copy], self.cache[copy], out=self.out)


class Pages:
    """Keys and values of sequences of so many tokens in a paged cache: random data, pages in random order.

    ``cache`` has the shape [copies, pages, 2, page_size, kv_heads, head_dim]; ``indptr``, ``ids`` and ``last_len`` say
    which pages each sequence has and how many tokens its last one holds, as flashinfer's plans take them.
    """

    def __init__(self, gqa: Gqa, lengths: list[int], copies: int, page_size: int, generator: Any) -> None:
        counts = [(n + page_size - 1) // page_size for n in lengths]
        self.indptr = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
        self.last_len = torch.tensor([(n - 1) % page_size + 1 for n in lengths], dtype=torch.int32)
        total = int(self.indptr[-1])
        order = torch.Generator().manual_seed(generator.initial_seed())
        self.ids = torch.randperm(total, generator=order).to(torch.int32).to("cuda")
        shape = (copies, total, 2, page_size, gqa.kv_heads, gqa.head_dim)
        self.cache = torch.randn(shape, device="cuda", dtype=gqa.torch_dtype, generator=generator)


class MixedKernel:
    """Causal GQA attention of a fused batch in one call: a token of every decoding sequence, then prompt pieces.

    Both read one paged KV cache, as a model's phases do; random data. Backend ``fa2`` or ``fa3``, flashinfer's prefill
    kernels, to which a decoding sequence is a prompt piece of one token.
    """

    def __init__(
        self,
        gqa: Gqa,
        prefill: PrefillWork,
        decode: DecodeWork,
        backend: str,
        copies: int = 1,
        page_size: int = 16,
        seed: int = 0,
    ) -> None:
        import flashinfer

        self.copies, self.page_size = copies, page_size
        self.q_lens = [1] * decode.batch + [prefill.seq_tokens] * prefill.seqs
        self.kv_lens = decode.lengths() + [prefill.seq_context + prefill.seq_tokens] * prefill.seqs
        generator = torch.Generator("cuda").manual_seed(seed)
        self.pages = Pages(gqa, self.kv_lens, copies, page_size, generator)
        q_shape = (copies, sum(self.q_lens), gqa.query_heads, gqa.head_dim)
        self.q = torch.randn(q_shape, device="cuda", dtype=gqa.torch_dtype, generator=generator)
        self.out = torch.empty_like(self.q[0])
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=backend)
        self._wrapper.plan(
            torch.tensor([0, *np.cumsum(self.q_lens)], dtype=torch.int32),
            self.pages.indptr,
            self.pages.ids,
            self.pages.last_len,
            gqa.query_heads,
            gqa.kv_heads,
            gqa.head_dim,
            page_size,
            causal=True,
            q_data_type=gqa.torch_dtype,
        )

    def launch(self, step: int) -> None:
        """Enqueue one layer on the current stream."""
        copy = step % self.copies
        self._wrapper.run(self.q[copy], self.pages.cache[copy], out=self.out)
