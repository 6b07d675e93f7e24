"""A plain forward pass: one sequence, all tokens anew each time, no cache, no batch; float32 unless told otherwise.

It shares nothing with semipd.model but the weights. Rotations are products of complex numbers.
"""

from __future__ import annotations

import torch

from semipd.model import Weights
from semipd.model_config import ModelConfig


def plain_logits(
    config: ModelConfig, weights: Weights, tokens: list[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Of the next token after each one, float32 [tokens, vocab_size]; without rotary scaling."""
    n, d, group = len(tokens), config.head_dim, config.query_heads // config.kv_heads
    assert config.rope_theta is not None
    assert config.rope_scaling is None
    device = weights.embedding.device
    powers = torch.arange(d // 2, device=device, dtype=torch.float64) * 2 / d
    angles = torch.arange(n, device=device)[:, None] * config.rope_theta**-powers
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    future = torch.full((n, n), float("-inf"), device=device).triu(1)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide / (wide.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()).to(dtype) * weight.to(dtype)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        z = torch.complex(x[..., : d // 2].float(), x[..., d // 2 :].float()) * turns
        return torch.cat((z.real, z.imag), dim=-1).to(dtype)

    x = weights.embedding[tokens].to(dtype)
    for w in weights.layers:
        projected = normed(x, w.input_norm) @ w.qkv.to(dtype).T
        heads = list(projected.view(n, -1, d).unbind(1))
        q, k, v = (
            heads[: config.query_heads],
            heads[config.query_heads : config.query_heads + config.kv_heads],
            heads[-config.kv_heads :],
        )
        if w.q_norm is not None and w.k_norm is not None:
            q, k = [normed(h, w.q_norm) for h in q], [normed(h, w.k_norm) for h in k]
        out = []
        for head, query in enumerate(q):
            scores = (rotated(query) @ rotated(k[head // group]).T / d**0.5).float()
            out.append((scores + future).softmax(-1).to(dtype) @ v[head // group])
        x = x + torch.cat(out, dim=-1) @ w.o.to(dtype).T
        gate, up = (normed(x, w.post_norm) @ w.gate_up.to(dtype).T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w.down.to(dtype).T
    assert weights.norm is not None
    return (normed(x, weights.norm) @ weights.head.to(dtype).T).float()


def plain_tokens(config: ModelConfig, weights: Weights, prompt: list[int], count: int) -> list[int]:
    """So many tokens, each the likeliest after all before it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain_logits(config, weights, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
