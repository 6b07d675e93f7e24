"""How long a layer of a short prefill batch takes with its kernels captured in CUDA graphs, and launched one by one.

    python benchmarks/prefill_layer.py --model configs/models/llama-3-8b.yaml --device cuda

Both through the executor that serves, side by side in one process: milliseconds of a layer, the median over the inner
layers of some runs one after the other. ``host``: what enqueuing a layer takes. The ratio is eager over captured.
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
from semipd.torch_executor import TorchExecutor, open_executor

RUNS = 8


def layer_ms(executor: TorchExecutor, tokens: int, at: Allocation) -> tuple[float, float]:
    """Of the device's inner layers, and of the host to enqueue one."""
    times, host_s = [], []
    for run_id in range(RUNS + 2):  # the first two capture and warm up
        requests = (Request(run_id, 0.0, tokens, 1),)
        run = Run(
            run_id, Phase.PREFILL, requests, (tokens,), (0,), at.prefill_sms, executor.layers, at, (True,)
        )  # fmt: skip
        executor.launch(run)
        (flight,) = executor._flights()
        while not flight.ended():
            enqueued, begun_s = flight._enqueued, time.perf_counter()
            flight.feed()
            if 0 < enqueued < flight._enqueued and run_id > 1:
                host_s.append(time.perf_counter() - begun_s)
        (record,) = executor.wait(None)
        if run_id > 1:
            times += np.diff(record.ends_s)[:-1].tolist()
    return float(np.median(times)) * 1e3, float(np.median(host_s)) * 1e3


def main(
    model: Annotated[Path, typer.Option(help="YAML file as in configs/models.")],
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    tokens: Annotated[list[int], typer.Option(help="Repeatable.")] = [16, 64, 128, 256, 512, 1024, 2048],  # noqa: B006 - typer copies
    sms: Annotated[list[int], typer.Option(help="Prefill SMs of a split; 0: whole device. Repeatable.")] = [0, 64],  # noqa: B006 - likewise
) -> None:
    """Print a line for every batch and partition."""
    config = load(model, ModelConfig)
    if config.layers < 3:
        raise typer.BadParameter(
            f"{model}: layers: found {config.layers}; expected at least 3, of which the inner ones are timed"
        )
    where: Literal["cuda", "cpu"] = "cuda" if device == "cuda" else "cpu"
    whole = torch.cuda.get_device_properties("cuda").multi_processor_count if where == "cuda" else 132
    found = {}
    for captured in (0, max(tokens)):
        with open_executor(
            config, device=where, num_blocks=-(-max(tokens) // 16) + 1, max_num_seqs=8,
            captured_tokens=captured, prefill_sms=[n for n in sms if n],
        ) as executor:  # fmt: skip
            for n in sms:
                at = Allocation(Mode.SPLIT, n, whole - n) if n else Allocation(Mode.EXCLUSIVE, whole, whole)
                found |= {(captured, n, each): layer_ms(executor, each, at) for each in tokens}
    print(
        f"{model.stem}, ms of a layer\n"
        f"{'SMs':>4} {'tokens':>6} {'eager':>7} {'host':>7} {'captured':>8} {'host':>7} ratio"
    )
    for n in sms:
        for each in tokens:
            (eager, eager_host), (captured_ms, host) = found[0, n, each], found[max(tokens), n, each]
            print(
                f"{n or whole:>4} {each:>6} {eager:7.3f} {eager_host:7.3f} {captured_ms:8.3f} {host:7.3f} "
                f"{eager / captured_ms:5.2f}"
            )


if __name__ == "__main__":
    typer.run(main)
