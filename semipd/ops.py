"""Element-wise operations of a layer: plain torch, and flashinfer's fused kernels.

All take and give tensors of one row a token, and compute in float32 inside.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ops(Protocol):
    """What lies between a layer's matrix products and attention."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension."""
        ...

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm of ``x + residual``, and that sum; may reuse the memory of both."""
        ...

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary embedding of q and k, shape [tokens, heads, head_dim]; may reuse their memory.

        ``table``: float32 [positions, head_dim], cosines then sines; pairs are (i, i + head_dim / 2).
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of the two halves of the last dimension."""
        ...


class TorchOps:
    """Plain torch, for any device: the reference."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``Ops``."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``Ops``."""
        total = x if residual is None else x + residual
        return self.norm(total, weight, eps), total

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Ops``."""
        cos, sin = table[positions][:, None].chunk(2, dim=-1)

        def turn(x: Tensor) -> Tensor:
            left, right = x.float().chunk(2, dim=-1)
            return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)

        return turn(q), turn(k)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See ``Ops``."""
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


class FlashinferOps:
    """flashinfer's fused kernels, one launch each; CUDA, 16-bit elements."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``Ops``."""
        import flashinfer

        return flashinfer.norm.rmsnorm(x, weight, eps)

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See ``Ops``."""
        import flashinfer

        if residual is None:
            return flashinfer.norm.rmsnorm(x, weight, eps), x
        flashinfer.norm.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Ops``."""
        import flashinfer

        flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(
            positions, q.view(len(q), -1), k.view(len(k), -1), q.shape[-1], table, is_neox=True
        )
        return q, k

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See ``Ops``."""
        import flashinfer

        return flashinfer.activation.silu_and_mul(gate_up)
