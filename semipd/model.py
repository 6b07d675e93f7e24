"""A decoder-only transformer a layer at a time: weights, random or from a Hugging Face folder, and the forward pass.

The layers are Llama's (arXiv 2302.13971, 2407.21783), with Qwen3's norm of queries and keys (arXiv 2505.09388).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semipd.attention import AttentionPlan
from semipd.core import InputError
from semipd.model_config import ModelConfig, from_huggingface
from semipd.ops import Ops, TorchOps
from semipd.paged_kv import PagedKvCache


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. Matrices are [out, in]; ``qkv`` and ``gate_up`` are stacked in that order; norms are vectors."""

    input_norm: Tensor
    qkv: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """A whole model: ``embedding`` and ``head`` are [vocab_size, hidden_size], the same tensor when tied.

    With ``attention_only`` there are no layers' weights and no final norm.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor | None
    head: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """What a layer needs to know of the tokens it processes: ``positions`` and cache ``slots``, int64 [rows]."""

    positions: Tensor
    slots: Tensor


@dataclass(eq=False)
class Hidden:
    """The state between two layers: what the last one added, and the sum of all before it; both [rows, hidden_size]."""

    x: Tensor
    residual: Tensor | None = None

    def take(self, rows: Tensor) -> Hidden:
        """Only these rows."""
        return Hidden(self.x[rows], None if self.residual is None else self.residual[rows])


class Model:
    """The forward pass over a paged KV cache. Nothing here waits for the device."""

    def __init__(self, config: ModelConfig, weights: Weights, cache: PagedKvCache, ops: Ops | None = None) -> None:
        self.config, self.weights, self.cache = config, weights, cache
        self._ops = ops or TorchOps()
        self._rope = None if config.rope_theta is None else rope_table(config, str(weights.embedding.device))

    def embed(self, tokens: Tensor) -> Hidden:
        """The state before the first layer, of int64 token ids [rows]."""
        return Hidden(torch.nn.functional.embedding(tokens, self.weights.embedding))

    def layer(self, index: int, hidden: Hidden, rows: Rows, attention: AttentionPlan) -> Hidden:
        """The state after that layer, which writes the rows' keys and values to the cache."""
        q, residual = self.before_attention(index, hidden, rows)
        return self.after_attention(index, attention.run(index, q), residual)

    def before_attention(
        self, index: int, hidden: Hidden, rows: Rows, qkv: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries of that layer, [rows, query_heads, head_dim], and what it adds to in the end.

        The rows' keys and values are in the cache then. ``qkv``: memory that may be used, [rows, all heads' width].
        """
        config = self.config
        kv_width = config.kv_heads * config.head_dim
        if config.attention_only:
            k, v = hidden.x[:, :kv_width], hidden.x[:, -kv_width:]
            return self._cached(index, hidden.x, k, v, rows), None
        w = self.weights.layers[index]
        x, residual = self._ops.add_norm(hidden.x, hidden.residual, w.input_norm, config.norm_eps)
        projected = torch.mm(x, w.qkv.t(), out=qkv)
        q, k, v = projected.split((config.query_heads * config.head_dim, kv_width, kv_width), dim=-1)
        return self._cached(index, q, k, v, rows), residual

    def after_attention(self, index: int, attended: Tensor, residual: Tensor | None) -> Hidden:
        """The state after that layer, of what attention and ``before_attention`` gave; may reuse their memory."""
        config, ops, x = self.config, self._ops, attended.flatten(1)
        if config.attention_only:
            return Hidden(x)
        w = self.weights.layers[index]
        x, residual = ops.add_norm(torch.nn.functional.linear(x, w.o), residual, w.post_norm, config.norm_eps)
        x = torch.nn.functional.linear(ops.silu_mul(torch.nn.functional.linear(x, w.gate_up)), w.down)
        return Hidden(x, residual)

    def logits(self, hidden: Hidden) -> Tensor:
        """Of the next token after each row, [rows, vocab_size], from the state after the last layer."""
        x = hidden.x
        if self.weights.norm is not None:
            x, _ = self._ops.add_norm(x, hidden.residual, self.weights.norm, self.config.norm_eps)
        return torch.nn.functional.linear(x, self.weights.head)

    def _cached(self, index: int, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """The queries, normed and rotated as the keys, which are written to the cache with the values."""
        config = self.config
        q, k, v = (x.unflatten(-1, (-1, config.head_dim)) for x in (q, k, v))
        if config.qk_norm:
            w = self.weights.layers[index]
            q, k = (self._ops.norm(x, norm, config.norm_eps) for x, norm in ((q, w.q_norm), (k, w.k_norm)))
        if self._rope is not None:
            q, k = self._ops.rotate(q, k, rows.positions, self._rope)
        self.cache.write(index, rows.slots, k, v)
        return q


def rope_table(config: ModelConfig, device: str) -> Tensor:
    """Cosines, then sines, of every position: float32 [max_positions, head_dim].

    Scaling is Llama 3.1's: frequencies with wavelengths above ``original_positions / low_freq_factor`` are divided
    by ``factor``, those below ``original_positions / high_freq_factor`` kept, those between blended
    (``_compute_llama3_parameters`` of transformers' ``modeling_rope_utils.py``).
    """
    if config.rope_theta is None:
        raise ValueError("rope_theta is None; expected a model with rotary embedding")
    powers = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / config.rope_theta**powers
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_positions * frequency / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)
        frequency = (1 - blend) * frequency / scaling.factor + blend * frequency
    angles = torch.arange(config.max_positions).float()[:, None] * frequency
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


Maker = Callable[[str, tuple[int, ...]], Tensor]
"""Makes the weight of a Hugging Face name and a shape."""


def _assemble(config: ModelConfig, make: Maker) -> Weights:
    """Ask for every weight, in the order of a forward pass."""
    hidden, width = config.hidden_size, config.intermediate_size or 0
    q, kv = config.query_heads * config.head_dim, config.kv_heads * config.head_dim

    def layer(prefix: str) -> LayerWeights:
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        parts = {"q": q, "k": kv, "v": kv}
        return LayerWeights(
            make(f"{prefix}.input_layernorm.weight", (hidden,)),
            torch.cat([make(f"{attention}.{x}_proj.weight", (n, hidden)) for x, n in parts.items()]),
            make(f"{attention}.q_norm.weight", (config.head_dim,)) if config.qk_norm else None,
            make(f"{attention}.k_norm.weight", (config.head_dim,)) if config.qk_norm else None,
            make(f"{attention}.o_proj.weight", (hidden, q)),
            make(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            torch.cat([make(f"{mlp}.{x}_proj.weight", (width, hidden)) for x in ("gate", "up")]),
            make(f"{mlp}.down_proj.weight", (hidden, width)),
        )  # fmt: skip

    embedding = make("model.embed_tokens.weight", (config.vocab_size, hidden))
    if config.attention_only:
        return Weights(embedding, (), None, embedding)
    layers = tuple([layer(f"model.layers.{i}") for i in range(config.layers)])
    norm = make("model.norm.weight", (hidden,))
    head = embedding if config.tied_embeddings else make("lm_head.weight", (config.vocab_size, hidden))
    return Weights(embedding, layers, norm, head)


def random_weights(config: ModelConfig, device: str, seed: int = 0) -> Weights:
    """Weights drawn on the device: matrices with variance 1 / inputs, a unit embedding, norms of ones.

    So activations neither vanish nor grow, whatever the depth. The same device and seed give the same weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, config.dtype)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        std = 1.0 if name.startswith("model.embed") else shape[1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

    return _assemble(config, make)


def load_weights(config: ModelConfig, folder: Path, device: str) -> Weights:
    """Weights of a Hugging Face folder: config.json and ``*.safetensors``, in one file or sharded with an index.

    Raises InputError naming the file and tensor for what is missing, left over or of another shape, and for a
    config.json that describes another model than ``config`` (element type and longest sequence aside).
    """
    from safetensors import SafetensorError, safe_open

    free = {"dtype", "max_positions"}
    ours, theirs = (x.model_dump(exclude=free) for x in (config, from_huggingface(folder / "config.json")))
    for name, value in theirs.items():
        if value != ours[name]:
            raise InputError(f"{folder / 'config.json'}: {name}: found {value}; expected {ours[name]}, as configured")
    files = _safetensors(folder)
    unused, dtype = set(files), getattr(torch, config.dtype)
    opened: dict[Path, Any] = {}

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in files:
            raise InputError(f"{folder}: {name}: missing; expected a tensor of shape {list(shape)}")
        path = files[name]
        try:
            if path not in opened:
                opened[path] = safe_open(path, framework="pt", device=device)
            tensor = opened[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: {name}: cannot be read ({error}); expected a safetensors file") from None
        if tuple(tensor.shape) != shape:
            raise InputError(f"{path}: {name}: found shape {list(tensor.shape)}; expected {list(shape)}")
        unused.discard(name)
        return tensor.to(dtype)

    weights = _assemble(config, make)
    if config.tied_embeddings:
        unused.discard("lm_head.weight")  # some checkpoints store the tied tensor twice
    if unused := {name for name in unused if not name.endswith("rotary_emb.inv_freq")}:
        name = min(unused)
        raise InputError(f"{files[name]}: {name}: found; expected no such tensor in this model")
    return weights


def _safetensors(folder: Path) -> dict[str, Path]:
    """Which file has each tensor. Raises InputError when there is none."""
    from safetensors import SafetensorError, safe_open

    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.exists():
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): folder / str(file) for name, file in found.items()}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except FileNotFoundError:
        raise InputError(f"{single}: not found; expected it, or {index.name} beside the files it names") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        path = index if index.exists() else single
        raise InputError(f"{path}: cannot be read ({error}); expected safetensors of a Hugging Face model") from None
