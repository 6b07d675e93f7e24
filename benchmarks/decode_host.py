"""What the host spends on a decode step and between two runs of decode, on a device that does nothing.

    python benchmarks/decode_host.py --batch 8 --batch 64 --batch 256 --context 2048

Medians in microseconds. A step: to enqueue it and to see that it ended. A turnover: from the moment that the last step
of a run is done until the first of the next one, of the same sequences, is enqueued. Nothing of the scheduler, of
flashinfer and of CUDA is in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from semipd.core import Allocation, Mode, Phase, Request, Run
from semipd.flashinfer_attention import DecodePaging
from semipd.model import Model, random_weights
from semipd.model_config import ModelConfig
from semipd.paged_kv import PagedKvCache, Ragged
from semipd.sequences import pooled_prompts
from semipd.torch_device import CpuDevice, CpuStream
from semipd.torch_executor import TorchExecutor

AT = Allocation(Mode.EXCLUSIVE, 132, 132)
MODEL = ModelConfig(
    hidden_size=2, layers=1, query_heads=1, kv_heads=1, head_dim=2, vocab_size=16, dtype="float32",
    tied_embeddings=True, attention_only=True,
)  # fmt: skip


class NoAttention:
    """Computes nothing. Decode steps are captured, and their plans bring the pages to the device."""

    graphs = True

    def __init__(self, max_num_seqs: int, num_blocks: int) -> None:
        self._paging = DecodePaging(max_num_seqs, num_blocks + max_num_seqs, "cpu")

    def prefill(self, sms: int) -> NoAttention:
        """See ``Attention``."""
        del sms
        return self

    def mixed(self) -> NoAttention:
        """See ``Attention``."""
        return self

    def decode(self, rows: int) -> NoAttention:
        """See ``Attention``."""
        del rows
        return self

    def plan(self, batch: Ragged) -> None:
        """See ``AttentionPlan``."""
        if len(batch.kv_lens) == batch.rows:
            self._paging.write(batch)

    def run(self, layer: int, q: Tensor, out: Tensor | None = None) -> Tensor:
        """See ``AttentionPlan``."""
        del layer
        return q if out is None else out


class IdleStream(CpuStream):
    """What is captured takes no time."""

    def capture(self, work: Callable[[], None], *, warm: bool = False) -> Callable[[], None]:
        """See ``Stream``."""
        del work, warm
        return lambda: None


class IdleDevice(CpuDevice):
    """A CPU that does nothing in a decode step."""

    def __init__(self) -> None:
        self._streams = {phase: IdleStream() for phase in Phase}


def measured(batch: int, context: int, steps: int, runs: int) -> tuple[float, float]:
    """Median microseconds of a step and of a turnover."""
    output = runs * steps + 2
    cache = PagedKvCache(MODEL, batch * -(-(context + output) // 16), 16, "cpu")
    executor = TorchExecutor(
        Model(MODEL, random_weights(MODEL, "cpu"), cache), NoAttention(batch, cache.num_blocks), IdleDevice(),
        max_num_seqs=batch, prompts=pooled_prompts(MODEL.vocab_size, context),
    )  # fmt: skip
    # Their lengths differ as those of real ones do, by up to a block and more.
    requests = tuple(Request(i, 0.0, context - i % 17, output) for i in range(batch))
    executor.follow(dict.fromkeys(range(batch), context + output).__getitem__)
    for request in requests:
        whole = (request.prompt_len,)
        executor.launch(Run(0, Phase.PREFILL, (request,), whole, (0,), 132, 1, AT, (True,)))
        executor.wait(None)
    step_s, turnover_s, ended_s = [], [], 0.0
    for n in range(runs):
        cached = tuple([request.prompt_len + n * steps for request in requests])
        run = Run(n, Phase.DECODE, requests, (1,) * batch, cached, 132, steps, AT)
        begun_s = ended_s or time.perf_counter()
        executor.launch(run)
        (flight,) = executor._flights()
        for step in range(steps):
            flight.feed()
            fed_s = time.perf_counter()
            if step == 0:
                turnover_s.append(fed_s - begun_s)
            assert flight.ended() == (step == steps - 1)
            seen_s = time.perf_counter()
            if step:
                step_s.append(seen_s - begun_s)
            begun_s = ended_s = seen_s
        executor._collect()
    return float(np.median(step_s)) * 1e6, float(np.median(turnover_s[1:])) * 1e6


def main(
    batch: Annotated[list[int], typer.Option(help="Sequences; repeatable.")] = [8, 64, 256],  # noqa: B006 - typer copies
    context: Annotated[int, typer.Option(help="Cached tokens of each sequence.")] = 2048,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 5,
    runs: Annotated[int, typer.Option(help="Runs of each batch.")] = 60,
) -> None:
    """Print a line for every batch."""
    torch.set_num_threads(1)
    print(f"{'batch':>6} {'step us':>8} {'turnover us':>12}")
    for size in batch:
        step_us, turnover_us = measured(size, context, steps, runs)
        print(f"{size:>6} {step_us:>8.0f} {turnover_us:>12.0f}")


if __name__ == "__main__":
    typer.run(main)
