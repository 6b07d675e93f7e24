"""What a model is made of: shapes, rotary embedding, element type. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from semipd.config import Positive, PositiveFloat, Strict, build
from semipd.core import InputError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class RopeScaling(Strict):
    """Llama 3.1's stretching of low rotary frequencies (``rope_type`` ``llama3`` of Hugging Face)."""

    factor: PositiveFloat
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_positions: Positive

    @model_validator(mode="after")
    def _ordered(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor: found {self.high_freq_factor}; expected more than "
                f"low_freq_factor {self.low_freq_factor}"
            )
        return self


class ModelConfig(Strict):
    """A decoder-only transformer of the Llama family: RMSNorm, rotary GQA, SwiGLU, no biases.

    ``max_positions``: length of the rotary table, and so the longest sequence. ``qk_norm``: RMSNorm of every query
    and key head, as in Qwen3. ``attention_only``: layers that are attention and nothing else (no projection, norm,
    rotation or MLP): queries are the hidden state, keys and values its first and last KV heads.
    """

    hidden_size: Positive
    layers: Positive
    query_heads: Positive
    kv_heads: Positive
    head_dim: Positive
    intermediate_size: Positive | None = None
    vocab_size: Positive
    max_positions: Positive = 131072
    rope_theta: PositiveFloat | None = None
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-5
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    tied_embeddings: bool = False
    qk_norm: bool = False
    attention_only: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads: found {self.query_heads}; expected a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: found {self.head_dim}; expected an even number")
        needed = {"intermediate_size": self.intermediate_size, "rope_theta": self.rope_theta}
        if not self.attention_only:
            missing = [name for name, value in needed.items() if value is None]
            if missing:
                raise ValueError(f"{missing[0]}: missing; expected a value unless attention_only")
            return self
        unused = [name for name in (*needed, "rope_scaling", "qk_norm") if getattr(self, name)]
        if unused:
            raise ValueError(f"{unused[0]}: found with attention_only; expected none")
        if not self.tied_embeddings:
            raise ValueError("tied_embeddings: found false with attention_only; expected true")
        if self.hidden_size != self.query_heads * self.head_dim:
            raise ValueError(
                f"hidden_size: found {self.hidden_size}; expected query_heads x head_dim = "
                f"{self.query_heads * self.head_dim} with attention_only"
            )
        return self

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that a token adds, all layers together."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """Number of weights."""
        hidden, heads = self.hidden_size, self.query_heads + self.kv_heads
        embeddings = self.vocab_size * hidden * (1 if self.tied_embeddings else 2)
        if self.attention_only:
            return embeddings
        layer = 2 * hidden * heads * self.head_dim + 3 * hidden * (self.intermediate_size or 0) + 2 * hidden
        return embeddings + self.layers * (layer + 2 * self.head_dim * self.qk_norm) + hidden

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * DTYPE_BYTES[self.dtype]


def from_huggingface(path: Path) -> ModelConfig:
    """The configuration that a Hugging Face ``config.json`` of a Llama or Qwen3 model describes.

    Raises InputError naming the file and field for what is missing, unknown or not supported.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a model's config.json") from None
    kind = data.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise InputError(f"{path}: model_type: found {kind!r}; expected llama or qwen3")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if data.get(name):
            raise InputError(f"{path}: {name}: found true; expected false")
    names = {
        "hidden_size": "hidden_size",
        "num_hidden_layers": "layers",
        "num_attention_heads": "query_heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "rms_norm_eps": "norm_eps",
    }
    missing = [name for name in names if name not in data]
    if missing:
        raise InputError(f"{path}: {missing[0]}: missing; expected a value")
    found: dict[str, Any] = {ours: data[theirs] for theirs, ours in names.items()}
    found["head_dim"] = data.get("head_dim") or data["hidden_size"] // data["num_attention_heads"]
    found["tied_embeddings"] = data.get("tie_word_embeddings", False)
    found["qk_norm"] = kind == "qwen3"
    found["dtype"] = data.get("dtype") or data.get("torch_dtype") or "float32"
    return build(found | _rope(data, path), ModelConfig, str(path))


def _rope(data: dict[str, Any], path: Path) -> dict[str, Any]:
    """Rotary embedding: ``rope_parameters``, or before transformers 5 ``rope_theta`` and ``rope_scaling``."""
    rope = data.get("rope_parameters") or {"rope_theta": data.get("rope_theta"), **(data.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"{path}: rope_type: found {kind!r}; expected default or llama3")
    if kind == "default":
        return {"rope_theta": rope.get("rope_theta")}
    scaling = {name: rope.get(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    scaling["original_positions"] = rope.get("original_max_position_embeddings")
    return {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling}
