"""The model against transformers' on checkpoints made here, its configuration files, and its paged KV cache."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.config import load
from semipd.core import InputError, IntArray
from semipd.model_config import ModelConfig, from_huggingface

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from semipd.attention import TorchAttention  # noqa: E402 - after the check for torch
from semipd.flashinfer_attention import DecodePaging  # noqa: E402 - likewise
from semipd.model import Model, Rows, Weights, load_weights, random_weights  # noqa: E402 - likewise
from semipd.paged_kv import BlockMap, PagedKvCache, Ragged  # noqa: E402 - likewise

torch.set_num_threads(1)  # a tiny model's threads spend their time waiting for each other

MODELS = Path(__file__).parent.parent / "configs" / "models"
TINY = load(MODELS / "tiny.yaml", ModelConfig)
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 80,
    "vocab_size": 101,
    "max_position_embeddings": 512,
}
CHECKPOINTS = {
    "llama": transformers.LlamaConfig(**SHAPES, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "llama-scaled": transformers.LlamaConfig(**SHAPES, rope_parameters=SCALED, rms_norm_eps=1e-3),
    "llama-tied": transformers.LlamaConfig(**SHAPES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SHAPES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
}


def checkpoint(name: str, folder: Path, shard: str = "1GB") -> transformers.PreTrainedModel:
    """Save a random model; its norms are random, too, and its matrices large enough for peaked attention."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CHECKPOINTS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def logits(config: ModelConfig, weights: Weights, tokens: list[int], cuts: list[int], block_size: int) -> torch.Tensor:
    """Of every position, prefilled in chunks that end at ``cuts``, over blocks in a random order."""
    cache = PagedKvCache(config, -(-len(tokens) // block_size), block_size, "cpu")
    model, plan = Model(config, weights, cache), TorchAttention(cache).prefill(1)
    table = np.random.default_rng(0).permutation(cache.num_blocks).tolist()
    rows, start = [], 0
    for stop in [*cuts, len(tokens)]:
        batch = Ragged.of((stop - start,), (start,), [table], block_size)
        plan.plan(batch)
        at = Rows(torch.from_numpy(batch.positions), torch.from_numpy(batch.slots))
        hidden = model.embed(torch.tensor(tokens[start:stop]))
        for layer in range(config.layers):
            hidden = model.layer(layer, hidden, at, plan)
        rows.append(model.logits(hidden))
        start = stop
    return torch.cat(rows)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_logits_are_those_of_transformers(name: str, shard: str, tmp_path: Path) -> None:
    theirs = checkpoint(name, tmp_path, shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    config = from_huggingface(tmp_path / "config.json")
    weights = load_weights(config, tmp_path, "cpu")
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=150).tolist()
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    found = logits(config, weights, tokens, [1, 40, 128], 16)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen3-32b", "gqa-64-8-128", "tiny"])
def test_every_shipped_model_is_a_valid_configuration(name: str) -> None:
    config = load(MODELS / f"{name}.yaml", ModelConfig)
    assert config == ModelConfig.model_validate(yaml.safe_load((MODELS / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [("llama-3-8b", 8_030_261_248, 131_072), ("qwen3-32b", 32_762_123_264, 262_144)],  # the publishers' model cards
)
def test_published_models_have_their_published_size(name: str, parameters: int, kv_bytes: int) -> None:
    config = load(MODELS / f"{name}.yaml", ModelConfig)
    assert (config.parameters, config.kv_bytes_per_token) == (parameters, kv_bytes)
    assert config.weights_bytes == 2 * parameters


@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"tied_embeddings": True}, {"kv_heads": 4}])
def test_the_number_of_parameters_is_that_of_the_weights(change: dict[str, object]) -> None:
    config = TINY.model_copy(update=change)
    weights = random_weights(config, "cpu")
    tensors = {id(weights.embedding): weights.embedding, id(weights.head): weights.head, 0: weights.norm}
    tensors |= {id(x): x for layer in weights.layers for x in vars(layer).values() if x is not None}
    assert sum(x.numel() for x in tensors.values()) == config.parameters


def test_random_weights_depend_on_the_seed_alone() -> None:
    one, again, other = (random_weights(TINY, "cpu", seed) for seed in (3, 3, 4))
    assert torch.equal(one.layers[1].qkv, again.layers[1].qkv)
    assert not torch.equal(one.layers[1].qkv, other.layers[1].qkv)


def test_random_weights_keep_activations_in_proportion_whatever_the_depth() -> None:
    config = TINY.model_copy(update={"layers": 24, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256})
    found = logits(config, random_weights(config, "cpu"), list(range(60)), [], 16)
    assert 0.3 < float(found.std()) < 3


def test_attention_only_is_attention_of_the_embedded_tokens() -> None:
    config = ModelConfig(
        hidden_size=32, layers=1, query_heads=4, kv_heads=2, head_dim=8, vocab_size=50,
        dtype="float32", tied_embeddings=True, attention_only=True,
    )  # fmt: skip
    weights = random_weights(config, "cpu")
    tokens = list(range(20))
    x = weights.embedding[tokens]
    q, k, v = x.view(20, 4, 8), x[:, :16].view(20, 2, 8), x[:, 16:].view(20, 2, 8)
    expected = torch.empty(20, 4, 8)
    for i in range(20):
        for head in range(4):
            scores = k[: i + 1, head // 2] @ q[i, head] / 8**0.5
            expected[i, head] = scores.softmax(0) @ v[: i + 1, head // 2]
    found = logits(config, weights, tokens, [7], 4)
    torch.testing.assert_close(found, expected.flatten(1) @ weights.embedding.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_heads": 3}, "query_heads: found 4; expected a multiple of kv_heads 3"),
        ({"head_dim": 7}, "head_dim: found 7; expected an even number"),
        ({"rope_theta": None}, "rope_theta: missing; expected a value unless attention_only"),
        ({"attention_only": True}, "intermediate_size: found with attention_only; expected none"),
        ({"biases": True}, "biases: unknown; expected one of"),
        ({"layers": 0}, "layers: found 0; expected"),
        ({"dtype": "float8"}, "dtype: found 'float8'; expected"),
    ],
)
def test_a_wrong_configuration_is_one_line_that_says_what_is_expected(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(TINY.model_dump() | change))
    with pytest.raises(InputError, match=r"model\.yaml: ") as error:
        load(path, ModelConfig)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def spoil(folder: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "shape":
        tensors[name] = tensors[name][1:].clone()
    elif what == "extra":
        tensors["model.layers.3.mlp.up_proj.weight"] = tensors[name].clone()
    save_file(tensors, path)
    if what == "garbage":
        path.write_bytes(b"no tensors")
    elif what == "none":
        path.unlink()
    elif what in ("theta", "model", "bias"):
        data = json.loads((folder / "config.json").read_text())
        data["rope_parameters"]["rope_theta"] *= 2 if what == "theta" else 1
        data["model_type"] = "gpt2" if what == "model" else data["model_type"]
        data["attention_bias"] = what == "bias"
        (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "model.layers.1.mlp.up_proj.weight: missing; expected a tensor of shape [80, 48]"),
        ("shape", "model.layers.1.mlp.up_proj.weight: found shape [79, 48]; expected [80, 48]"),
        ("extra", "model.layers.3.mlp.up_proj.weight: found; expected no such tensor"),
        ("garbage", "model.safetensors: cannot be read"),
        ("none", "model.safetensors: not found"),
        ("theta", "config.json: rope_theta: found 20000.0; expected 10000.0"),
        ("model", "config.json: model_type: found 'gpt2'; expected llama or qwen3"),
        ("bias", "config.json: attention_bias: found true; expected false"),
    ],
)
def test_weights_that_do_not_fit_are_one_line_that_names_file_and_tensor(what: str, said: str, tmp_path: Path) -> None:
    checkpoint("llama", tmp_path)
    config = from_huggingface(tmp_path / "config.json")
    spoil(tmp_path, what)
    with pytest.raises(InputError) as error:
        load_weights(config, tmp_path, "cpu")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_rope_settings_of_transformers_4_are_understood(tmp_path: Path) -> None:
    checkpoint("llama-scaled", tmp_path)
    path = tmp_path / "config.json"
    expected = from_huggingface(path)
    data = json.loads(path.read_text())
    rope = data.pop("rope_parameters")
    data |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(data))
    assert from_huggingface(path) == expected
    assert expected.rope_scaling is not None


@settings(max_examples=50, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=5),
    block_size=st.integers(1, 8),
)
def test_every_new_token_has_a_slot_of_its_own_in_a_block_of_its_sequence(
    lens: list[tuple[int, int]], block_size: int
) -> None:
    blocks = BlockMap(200, block_size)
    for i, (new, cached) in enumerate(lens):
        blocks.grow(i, cached + new)
    new_tokens, contexts = zip(*lens, strict=True)
    batch = Ragged.of(new_tokens, contexts, [blocks.of(i) for i in range(len(lens))], block_size)
    expected_positions = [n for new, cached in lens for n in range(cached, cached + new)]
    expected_slots = [
        blocks.of(i)[n // block_size] * block_size + n % block_size
        for i, (new, cached) in enumerate(lens)
        for n in range(cached, cached + new)
    ]
    assert batch.positions.tolist() == expected_positions
    assert batch.slots.tolist() == expected_slots
    assert len(set(expected_slots)) == batch.rows == sum(new_tokens)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=30))
def test_a_block_belongs_to_one_sequence_or_is_free(moves: list[tuple[int, int]]) -> None:
    blocks = BlockMap(12, 4)
    given: list[tuple[IntArray, list[int]]] = []  # tables, and what was in them
    for sequence, tokens in moves:
        if tokens == 0:
            blocks.release(sequence)
        elif blocks.missing(sequence, tokens) > blocks.free:
            with pytest.raises(RuntimeError, match="KV blocks more"):
                blocks.grow(sequence, tokens)
        else:
            blocks.grow(sequence, tokens)
            assert len(blocks.of(sequence)) * 4 >= tokens
        given.append((blocks.of(sequence), blocks.of(sequence).tolist()))
        held = [block for s in blocks.sequences for block in blocks.of(s)]
        assert len(set(held)) == len(held) == 12 - blocks.free
        assert set(held) <= set(range(12))
    assert all(table.tolist() == before for table, before in given)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(1, 8))
def test_a_decode_plan_finds_on_the_device_what_the_last_batch_has(batches: list[list[int]], block_size: int) -> None:
    paging = DecodePaging(5, 5 * 20, "cpu")
    ids = itertools.cycle(np.random.default_rng(0).permutation(100).tolist())
    for kv_lens in batches:
        tables = [[next(ids) for _ in range(0, n, block_size)] for n in kv_lens]
        paging.write(Ragged.of([1] * len(kv_lens), [n - 1 for n in kv_lens], tables, block_size))
        for indptr, last, pages in (paging.on_device(len(kv_lens)), paging.on_host(len(kv_lens))):
            ends = list(itertools.accumulate(len(table) for table in tables))
            assert indptr.tolist() == [0, *ends]
            assert [pages[start:end].tolist() for start, end in itertools.pairwise(indptr.tolist())] == tables
            assert [(len(table) - 1) * block_size for table in tables] == [
                n - in_last for n, in_last in zip(kv_lens, last.tolist(), strict=True)
            ]
