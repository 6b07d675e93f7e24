"""Limits of batching."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of batching, under vLLM's names.

    ``num_blocks``: KV blocks of ``block_size`` tokens. ``max_num_seqs``: sequences being prefilled or decoded.
    ``max_num_batched_tokens``: tokens of a prefill or fused batch. ``watermark``: share of the blocks that an admission
    leaves free while sequences decode, so that they are not preempted at once. ``decode_steps``: most steps of a decode
    run; None for as many as its KV blocks allow. ``prefix_block_size``: tokens of the prefix blocks that requests name,
    with prefix caching; 0 without it.
    """

    num_blocks: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    watermark: float = 0.01
    decode_steps: int | None = None
    prefix_block_size: int = 0

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_num_seqs", "max_num_batched_tokens", "block_size", "decode_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: found {value}; expected at least 1")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark: found {self.watermark}; expected a share from 0 to below 1")
        if self.prefix_block_size < 0:
            raise ValueError(f"prefix_block_size: found {self.prefix_block_size}; expected at least 0")
