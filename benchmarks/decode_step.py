"""How one step of the real decode loop divides between kernels and host.

    python benchmarks/decode_step.py --model configs/models/llama-3-8b.yaml --device cuda --batch 64 --context 2048

Three times of a step, medians: as the loop makes it, with everything that a scheduler would see; of its kernels alone,
as a CUDA graph replayed again and again; and what the host spends to enqueue it, which the device hides as long
as it is the shorter one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer

from semipd.config import load
from semipd.core import Allocation, Mode, Phase, Request, Run
from semipd.model_config import ModelConfig
from semipd.padding import decode_rows
from semipd.torch_executor import TorchExecutor, open_executor


def looped(executor: TorchExecutor, run: Run) -> tuple[float, float]:
    """Milliseconds of a step of the loop, and of the host to enqueue one."""
    executor.launch(run)
    (flight,) = executor._flights()
    host_s: list[float] = []
    while not flight.ended():
        enqueued, begun_s = flight._enqueued, time.perf_counter()
        flight.feed()
        if flight._enqueued > enqueued:
            host_s.append(time.perf_counter() - begun_s)
    (record,) = executor.wait(None)
    return float(np.median(np.diff(record.ends_s))) * 1e3, float(np.median(host_s)) * 1e3


def kernels(executor: TorchExecutor, at: Allocation, batch: int, times: int) -> float:
    """Milliseconds of a step's kernels, planned as for the last step of the loop."""
    stream = executor.engine.device.stream(Phase.DECODE, at)
    step = executor.engine.decode_step(stream, decode_rows(batch, executor.engine.max_num_seqs), at.decode_sms)
    with stream.use():
        step()
        begun = stream.mark()
        for _ in range(times):
            step()
        ended = stream.mark()
    executor.engine.device.synchronize()
    return ended.seconds_since(begun) / times * 1e3


def main(
    model: Annotated[Path, typer.Option(help="YAML file as in configs/models.")],
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    batch: Annotated[list[int], typer.Option(help="Sequences; repeatable.")] = [1, 64, 256],  # noqa: B006 - typer copies
    context: Annotated[int, typer.Option(help="Cached tokens of each sequence.")] = 2048,
    sms: Annotated[list[int], typer.Option(help="Prefill SMs of splits to decode beside; 0: whole device.")] = [0],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 50,
) -> None:
    """Print a line for every batch and partition."""
    config = load(model, ModelConfig)
    where: Literal["cuda", "cpu"] = "cuda" if device == "cuda" else "cpu"
    blocks = max(batch) * (-(-(context + steps) // 16) + 1)
    splits = [n for n in sms if n]
    whole = torch.cuda.get_device_properties("cuda").multi_processor_count if where == "cuda" else 132
    with open_executor(
        config, device=where, num_blocks=blocks, max_num_seqs=max(batch), prefill_sms=splits, blank_context=True
    ) as executor:
        print(
            f"{model.stem}, context {context}\n{'SMs':>4} {'batch':>6} {'loop ms':>8} {'kernels ms':>11} {'host ms':>8}"
        )
        for n in sms:
            at = Allocation(Mode.SPLIT, n, whole - n) if n else Allocation(Mode.EXCLUSIVE, whole, whole)
            for size in batch:
                requests = tuple(Request(i, 0.0, context, steps + 2) for i in range(size))
                for run_id in (1, 2):  # the first captures and warms up
                    cached = (context,) * size
                    run = Run(run_id, Phase.DECODE, requests, (1,) * size, cached, at.decode_sms, steps, at)
                    loop_ms, host_ms = looped(executor, run)
                kernels_ms = kernels(executor, at, size, steps)
                executor.forget(tuple(range(size)))
                print(f"{at.decode_sms:>4} {size:>6} {loop_ms:>8.3f} {kernels_ms:>11.3f} {host_ms:>8.3f}")


if __name__ == "__main__":
    typer.run(main)
