"""Attention by flashinfer's kernels, planned for the partition that they run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semipd._steps import CTAS_OF_SM
from semipd.attention import AttentionPlan
from semipd.core import IntArray
from semipd.model_config import ModelConfig
from semipd.paged_kv import PagedKvCache, Ragged
from semipd.tiles import (
    ALIGNING_BYTES,
    PREFILL_WORKSPACE_BYTES,
    balance,
    decode_chunks,
    decode_workspace_bytes,
    prefill_chunks,
)

BACKENDS = ("fa2", "fa3", "fa3-sized")


class FlashinferAttention:
    """flashinfer on CUDA, 16-bit elements.

    ``prefill_backend`` names the kernel of a partition by its SMs: ``fa2``, ``fa3``, or ``fa3-sized``, which is fa3
    planned for the partition (docs/adr/0002-fa3-sized-to-the-partition.md). Decode uses tensor cores (fa2).
    So are fused batches, whose many single rows fa3 is slow at. Where fa2 splits keys is ours to say, for it depends on
    the partition (docs/adr/0008-where-keys-are-split.md). Prefill and fused plans share one workspace and decode plans
    another, as there is one run of each phase at a time.
    """

    graphs = True

    def __init__(
        self,
        config: ModelConfig,
        cache: PagedKvCache,
        max_num_seqs: int,
        prefill_backend: Callable[[int], str] = lambda sms: "fa2",  # noqa: ARG005 - whatever the size
    ) -> None:
        self._config, self._cache, self._prefill_backend = config, cache, prefill_backend
        sizes = PREFILL_WORKSPACE_BYTES, _decode_workspace_bytes(config, max_num_seqs)
        self._workspaces = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes]
        self._paging = DecodePaging(max_num_seqs, cache.num_blocks + max_num_seqs, "cuda")
        self._decode_ints: tuple[Tensor, Tensor] | None = None

    def prefill(self, sms: int) -> AttentionPlan:
        """See ``Attention``."""
        return FlashinferPrefill(self._config, self._cache, self._workspaces[0], self._prefill_backend(sms), sms)

    def mixed(self) -> AttentionPlan:
        """See ``Attention``."""
        return FlashinferPrefill(self._config, self._cache, self._workspaces[0], "fa2", _device_sms())

    def decode(self, rows: int, sms: int) -> AttentionPlan:
        """See ``Attention``. Its buffers are shared by the plans of every number of rows."""
        import flashinfer

        indptr, last, pages = self._paging.on_device(rows)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspaces[1],
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=pages,
            paged_kv_last_page_len_buffer=last,
        )
        # 8 MiB each on the device and pinned, for every wrapper, unless they share them.
        if self._decode_ints is None:
            self._decode_ints = wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer
        wrapper._int_workspace_buffer, wrapper._pin_memory_int_workspace_buffer = self._decode_ints
        return FlashinferDecode(self._config, self._cache, wrapper, self._paging, rows, sms)


class DecodePaging:
    """Where a decode batch's pages lie: indptr [rows + 1], tokens in the last ones [rows], ids; int32.

    All in one array, which is written on the host and copied to the device at once.
    """

    def __init__(self, max_num_seqs: int, max_pages: int, device: str) -> None:
        self._part = -(-(max_num_seqs + 1) // 64) * 64  # each part starts at a multiple of 256 bytes
        size = 2 * self._part + max_pages
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._host = torch.zeros(size, dtype=torch.int32)

    def on_device(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """The three of so many rows, with room for all page ids."""
        return self._parts(self._device, rows)

    def on_host(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """What they are copied from."""
        return self._parts(self._host, rows)

    def write(self, batch: Ragged) -> None:
        """Fill the host's with a batch's, and enqueue the copy."""
        part, rows, size, ints = self._part, len(batch.kv_lens), 2 * self._part + len(batch.blocks), self._host.numpy()
        ints[: rows + 1] = batch.page_indptr
        ints[part : part + rows] = batch.last_page_lens
        ints[2 * part : size] = batch.blocks
        host = self._host[:size]
        self._device[:size].copy_(host.pin_memory() if self._device.is_cuda else host, non_blocking=True)

    def _parts(self, whole: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        part = self._part
        return whole[: rows + 1], whole[part : part + rows], whole[2 * part :]


def _pinned(array: IntArray) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).pin_memory()


def _device_sms() -> int:
    return int(torch.cuda.get_device_properties("cuda").multi_processor_count)


def _decode_workspace_bytes(config: ModelConfig, max_num_seqs: int) -> int:
    shape = config.query_heads, config.kv_heads, config.head_dim
    return decode_workspace_bytes(max_num_seqs, *shape, _device_sms())


def flashinfer_workspace_bytes(config: ModelConfig, max_num_seqs: int) -> int:
    """What ``FlashinferAttention`` takes of the device's memory for partial results."""
    return PREFILL_WORKSPACE_BYTES + _decode_workspace_bytes(config, max_num_seqs)


def _plan_fa2(wrapper: Any, config: ModelConfig, batch: Ragged, host: tuple[Tensor, Tensor], chunks: int) -> None:
    """Plan flashinfer's fa2 kernel with at most so many CTAs for each KV head, or without splitting keys (0).

    The number is what fills the device, less ``num_colocated_ctas``, the last argument, which flashinfer's own ``plan``
    methods cannot be told. They must have been called before, since they fetch the kernels. ``host``: where each
    sequence's new tokens and pages start, int32 [sequences + 1] each. A plan for CUDA graphs is one for decode.
    """
    graphs = wrapper.is_cuda_graph_enabled
    spare = CTAS_OF_SM * _device_sms() - chunks * config.kv_heads
    wrapper._plan_info = wrapper._cached_module.plan(
        wrapper._float_workspace_buffer,
        wrapper._int_workspace_buffer,
        wrapper._pin_memory_int_workspace_buffer,
        *host,
        torch.from_numpy(batch.kv_lens.astype(np.int32)),
        batch.rows,
        len(batch.q_lens),
        config.query_heads,
        config.kv_heads,
        batch.block_size,
        graphs,
        config.head_dim,
        config.head_dim,
        not graphs,  # causal, which makes no difference to a single new token
        -1,  # no sliding window
        -1,  # no fixed size of chunks
        not chunks,
        spare if chunks else 0,
    )


class FlashinferPrefill:
    """Prefill batches, or fused ones, with one kernel on one partition."""

    def __init__(self, config: ModelConfig, cache: PagedKvCache, workspace: Tensor, backend: str, sms: int) -> None:
        import flashinfer

        if backend not in BACKENDS:
            raise ValueError(f"prefill backend: found {backend!r}; expected one of {', '.join(BACKENDS)}")
        if backend == "fa3-sized" and config.head_dim != 128:
            raise ValueError(f"prefill backend: found fa3-sized with head_dim {config.head_dim}; expected 128")
        self._config, self._cache, self._backend, self._sms = config, cache, backend, sms
        self._wrapper: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "NHD", backend="fa2" if backend == "fa2" else "fa3"
        )
        self._has_kernels = False
        self._constants: tuple[Any, ...] = ()  # the arguments of a launch from lse on

    def plan(self, batch: Ragged) -> None:
        """See ``AttentionPlan``."""
        q_indptr = np.concatenate(([0], np.cumsum(batch.q_lens)))
        if self._backend != "fa2" or not self._has_kernels:
            self._plan_by_flashinfer(batch, q_indptr)
            self._has_kernels = True
        if self._backend == "fa2":
            self._plan_for_partition(batch, q_indptr)
        elif self._backend == "fa3-sized":
            self._size(batch, q_indptr, batch.page_indptr)

    def _plan_by_flashinfer(self, batch: Ragged, q_indptr: IntArray) -> None:
        config = self._config
        self._wrapper.plan(
            _pinned(q_indptr),
            _pinned(batch.page_indptr),
            _pinned(batch.blocks).to("cuda", non_blocking=True),
            _pinned(batch.last_page_lens),
            config.query_heads,
            config.kv_heads,
            config.head_dim,
            batch.block_size,
            causal=True,
            q_data_type=getattr(torch, config.dtype),
            seq_lens=_pinned(batch.kv_lens),
            max_token_per_sequence=int(batch.q_lens.max()),  # or flashinfer compares them one by one in Python
        )

    def _plan_for_partition(self, batch: Ragged, q_indptr: IntArray) -> None:
        """As flashinfer's would for fa2, but for where keys are split; with one copy to the device instead of five."""
        config, wrapper = self._config, self._wrapper
        parts = (q_indptr, batch.page_indptr, batch.last_page_lens, batch.blocks)
        starts = np.cumsum([0, *(-(-len(part) // 64) * 64 for part in parts)]).tolist()  # multiples of 256 bytes
        host = torch.empty(starts[-1], dtype=torch.int32, pin_memory=True)
        for start, part in zip(starts, parts, strict=False):
            host.numpy()[start : start + len(part)] = part
        device = host.to("cuda", non_blocking=True)
        views = [[of[a : a + len(part)] for a, part in zip(starts, parts, strict=False)] for of in (host, device)]
        (
            wrapper._qo_indptr_buf,
            wrapper._paged_kv_indptr_buf,
            wrapper._paged_kv_last_page_len_buf,
            wrapper._paged_kv_indices_buf,
        ) = views[1]
        wrapper._qo_indptr_last = batch.rows
        shape = config.query_heads, config.kv_heads, config.head_dim
        room = PREFILL_WORKSPACE_BYTES - ALIGNING_BYTES
        chunks = prefill_chunks(batch.q_lens, batch.kv_lens, *shape, self._sms, room)
        _plan_fa2(wrapper, config, batch, (views[0][0], views[0][1]), chunks)

    def _size(self, batch: Ragged, q_indptr: IntArray, kv_indptr: IntArray) -> None:
        """Deal the tiles to the partition's SMs only; raises RuntimeError when flashinfer's plan has another layout."""
        info = [int(x) for x in self._wrapper._plan_info]
        device_ctas = _device_sms()
        if len(info) != 9 or self._sms > device_ctas:
            raise RuntimeError(f"flashinfer's fa3 plan is {info}; expected nine numbers")
        if info[8]:  # a huge batch, planned once for all heads: its many tiles fill any partition evenly
            return
        config = self._config
        group = config.query_heads // config.kv_heads
        tiles = balance(batch.q_lens.tolist(), batch.kv_lens.tolist(), config.query_heads, group, self._sms)
        columns = (
            tiles.tile,
            q_indptr[tiles.sequence],
            kv_indptr[tiles.sequence],
            batch.q_lens[tiles.sequence],
            batch.kv_lens[tiles.sequence],
            tiles.head,
            np.concatenate([tiles.indptr, np.full(device_ctas - self._sms, tiles.indptr[-1])]),
            tiles.sequence,
        )
        for offset, column in zip(info[:8], columns, strict=True):
            data = torch.from_numpy(column.astype(np.int32)).view(torch.uint8).pin_memory()
            self._wrapper._int_workspace_buffer[offset : offset + len(data)].copy_(data, non_blocking=True)

    def run(self, layer: int, q: Tensor, out: Tensor | None = None) -> Tensor:
        """See ``AttentionPlan``."""
        out = torch.empty_like(q) if out is None else out  # which flashinfer would fill with zeros first
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if self._backend != "fa2":
            return self._wrapper.run(q, (keys, values), out=out)
        self._launch(q, keys, values, out)
        return out

    def _launch(self, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """As the wrapper's ``run`` would for fa2, which takes Python twice as long as the launch itself."""
        wrapper = self._wrapper
        if not self._constants:
            from flashinfer.prefill import _get_cache_alibi_slopes_buf

            nothing = None  # of masks, positions, prefix lengths, scales and their like
            slopes = _get_cache_alibi_slopes_buf(q.shape[1], q.device)
            scale = 1 / self._config.head_dim**0.5
            pdl = torch.cuda.get_device_capability() >= (9, 0)  # programmatic dependent launch
            causal, layout, window = 1, 0, -1
            self._constants = (
                nothing, causal, layout, window, pdl, nothing, nothing, slopes, nothing, nothing, nothing,
                0.0, scale, nothing, nothing, nothing, 1.0, 1e4, 0, wrapper._workspace_size,
            )  # fmt: skip
        wrapper._cached_module.paged_run(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._plan_info,
            q,
            keys,
            values,
            wrapper._qo_indptr_buf,
            wrapper._paged_kv_indptr_buf,
            wrapper._paged_kv_indices_buf,
            wrapper._paged_kv_last_page_len_buf,
            out,
            *self._constants,
        )


class FlashinferDecode:
    """Decode batches of one size; the arguments of ``run`` stay where they are, so that a CUDA graph can hold it."""

    def __init__(
        self, config: ModelConfig, cache: PagedKvCache, wrapper: Any, paging: DecodePaging, rows: int, sms: int
    ) -> None:
        self._config, self._cache, self._wrapper, self._paging = config, cache, wrapper, paging
        self._host, self._device = paging.on_host(rows), paging.on_device(rows)
        self._q_indptr = torch.arange(rows + 1, dtype=torch.int32)
        self._chunks = decode_chunks(rows, config.kv_heads, sms, _device_sms())
        self._has_kernels = False

    def plan(self, batch: Ragged) -> None:
        """See ``AttentionPlan``. What it copies comes from pinned memory that the next ``plan`` overwrites."""
        self._paging.write(batch)
        if not self._has_kernels:
            self._plan_by_flashinfer(batch.block_size)
            self._has_kernels = True
        _plan_fa2(self._wrapper, self._config, batch, (self._q_indptr, self._host[0]), self._chunks)

    def _plan_by_flashinfer(self, block_size: int) -> None:
        """Of what was written to the paging last."""
        config, (indptr, last, _), (_, _, pages) = self._config, self._host, self._device
        self._wrapper.plan(
            indptr,
            pages,
            last,
            config.query_heads,
            config.kv_heads,
            config.head_dim,
            block_size,
            q_data_type=getattr(torch, config.dtype),
        )

    def run(self, layer: int, q: Tensor, out: Tensor | None = None) -> Tensor:
        """See ``AttentionPlan``."""
        out = torch.empty_like(q) if out is None else out  # which flashinfer would fill with zeros first
        return self._wrapper.run(q, (self._cache.keys[layer], self._cache.values[layer]), out=out)
