"""Attention with keys split as semipd has it, against flashinfer's own plan: one layer's kernels, on partitions.

    python benchmarks/split_kv.py --model configs/models/llama-3-8b.yaml

Decode, prefill and fused batches by fa2, over a paged cache of random data. Both plans run on the same partition, one
right after the other; of each, microseconds of a layer, the median of some replays of a CUDA graph of several layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from semipd.config import load
from semipd.flashinfer_attention import FlashinferAttention
from semipd.model_config import ModelConfig
from semipd.paged_kv import PagedKvCache, Ragged
from semipd.partition import PartitionBank
from semipd.points import DecodeWork
from semipd.ragged import Decodes

BLOCK = 16
REPLAYS = 5
DECODE = ((8, 16384), (16, 32768), (32, 2048), (36, 2048), (36, 14563), (64, 128), (64, 2048), (96, 5461), (128, 2048))
PREFILL = (
    ("1 x 512 after 0", [512], [0]),
    ("1 x 16 after 16,376", [16], [16376]),
    ("1 x 256 after 16,000", [256], [16000]),
    ("1 x 512 after 4,000", [512], [4000]),
    ("1 x 512 after 16,000", [512], [16000]),
    ("1 x 1024 after 500", [1024], [500]),
    ("8 x 16 after 12,000", [16] * 8, [12000] * 8),
    (
        "426 of 8 after 12,000 to 25,000",
        [56, 65, 20, 49, 62, 66, 55, 53],
        [17669, 25475, 12235, 12152, 17557, 22087, 21053, 19231],
    ),
    ("1,092 of 6 after 3,000 to 20,000", [172, 360, 234, 51, 96, 179], [12000, 8000, 15000, 3000, 20000, 12000]),
    ("2 x 2048 after 0", [2048] * 2, [0] * 2),
)
FUSED = ((8, 16384), (36, 14563), (64, 2048), (64, 8), (256, 2048))
CHUNKS = (([256], [1000]), ([512], [15000]), ([2048], [0]))


def batches() -> Iterator[tuple[str, str, list[int], list[int]]]:
    """Kind, name, new tokens and cached ones."""
    lengths = {place: list(Decodes.of(DecodeWork(place[0], place[0] * place[1])).lengths) for place in DECODE + FUSED}
    for n, each in DECODE:
        yield "decode", f"{n} x {each:,}", [1] * n, [length - 1 for length in lengths[n, each]]
    for name, new, context in PREFILL:
        yield "prefill", name, new, context
    for n, each in FUSED:
        for new, context in CHUNKS:
            name = f"{new[0]:,} after {context[0]:,} + {n} x {each:,}"
            yield "fused", name, [1] * n + new, [length - 1 for length in lengths[n, each]] + context


def timed(stream: Any, layer: Callable[[], object], layers: int) -> float:
    """Microseconds of a layer."""
    layer()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    for _ in range(layers):
        layer()
    graph.capture_end()
    times = []
    for _ in range(REPLAYS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record(stream)
        graph.replay()
        ended.record(stream)
        ended.synchronize()
        times.append(begun.elapsed_time(ended) / layers * 1e3)
    return float(np.median(times[1:]))


def measure(config: ModelConfig, bank: PartitionBank, sms: list[int], blocks: int, layers: int) -> None:
    """Print the lines. All tensors that streams of the bank have used are gone when it returns."""
    cache = PagedKvCache(config, blocks, BLOCK, "cuda")
    cache.randomise(0)
    order = np.random.default_rng(0).permutation(blocks)
    attention = FlashinferAttention(config, cache, 256)
    whole = torch.cuda.get_device_properties("cuda").multi_processor_count
    print(f"{'':8} {'':34} {'SMs':>4} {'flashinfer':>10} {'semipd':>8} ratio")
    for n in sms:
        partition, at = (bank.pick(n).prefill, n) if n else (bank.whole_normal, whole)
        stream = torch.cuda.ExternalStream(partition.stream)
        for kind, name, new, context in batches():
            ends = np.cumsum([-(-(a + b) // BLOCK) for a, b in zip(new, context, strict=True)])
            tables = np.split(order[: ends[-1]], ends[:-1])
            batch = Ragged.of(new, context, tables, BLOCK)
            q = torch.randn(batch.rows, config.query_heads, config.head_dim, device="cuda", dtype=torch.bfloat16)
            out, found = torch.empty_like(q), []
            with torch.cuda.stream(stream):
                plan: Any = attention.decode(len(new), at) if kind == "decode" else attention.prefill(at)
                for ours in (False, True):
                    plan.plan(batch)
                    if not ours and kind == "decode":
                        plan._plan_by_flashinfer(BLOCK)
                    elif not ours:
                        plan._plan_by_flashinfer(batch, np.concatenate(([0], np.cumsum(batch.q_lens))))
                    found.append(timed(stream, lambda plan=plan, q=q, out=out: plan.run(0, q, out), layers))
            print(f"{kind:8} {name:34} {at:>4} {found[0]:>10.1f} {found[1]:>8.1f} {found[0] / found[1]:>5.2f}")
    torch.cuda.synchronize()


def main(
    model: Annotated[Path, typer.Option(help="YAML file as in configs/models.")],
    sms: Annotated[list[int], typer.Option(help="SMs of partitions; 0: the whole device.")] = [0, 64],  # noqa: B006 - typer copies
    blocks: Annotated[int, typer.Option(help="KV blocks of 16 tokens, of one layer.")] = 40000,
    layers: Annotated[int, typer.Option(help="Of a CUDA graph.")] = 6,
) -> None:
    """Print a line for every batch and partition, and the ratio of both plans."""
    config = load(model, ModelConfig).model_copy(update={"layers": 1})
    bank = PartitionBank(0, prefill_sms=[n for n in sms if n])
    print(f"{model.stem}: us of a layer's attention")
    measure(config, bank, sms, blocks, layers)
    torch.cuda.empty_cache()  # or what is freed later would be marked on streams that are gone
    bank.close()


if __name__ == "__main__":
    typer.run(main)
