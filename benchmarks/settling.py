"""How long a layer takes from the start of a load on, after a rest and after other loads: when clocks settle.

    python benchmarks/settling.py --model configs/models/llama-3-8b.yaml --device cuda

Prefill beside decode on one split, through the executor that serves. Of each load in turn: milliseconds of a prefill
layer, the mean of those that ended within each bin, which is named by its end. A GPU that limits its power clocks down
some 60 ms into a heavy load, and again once a second of it is over.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from semipd.config import load
from semipd.core import Allocation, Mode, Phase
from semipd.model_config import ModelConfig
from semipd.points import DecodeWork, PrefillWork
from semipd.ragged import Decodes, Prompts
from semipd.stopwatch import Stopwatch, inner_steps
from semipd.torch_executor import open_executor

BINS_S = (0.07, 0.12, 0.17, 0.25, 0.5, 0.9, 1.0, 1.1, 1.2, 1.5)
HEAVY, LIGHT = (1024, 64, 512), (16, 64, 512)
LOADS = (("a rest", HEAVY), ("the same", HEAVY), ("the same", LIGHT), ("the light one", HEAVY))
"""After what, and new prompt tokens, decoding sequences and their cached tokens."""


def main(
    model: Annotated[Path, typer.Option(help="YAML file as in configs/models.")],
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    prefill_sms: Annotated[int, typer.Option(help="Of the split.")] = 64,
    device_sms: Annotated[int, typer.Option(help="Of the whole device.")] = 132,
    seconds: Annotated[float, typer.Option(help="Of each load.")] = 1.5,
) -> None:
    """Print a line for every load."""
    config = load(model, ModelConfig)
    where: Literal["cuda", "cpu"] = "cuda" if device == "cuda" else "cpu"
    at = Allocation(Mode.SPLIT, prefill_sms, device_sms - prefill_sms)
    bins = [end for end in BINS_S if end <= seconds]
    print(f"{model.stem}, {at.name}: ms of a prefill layer until so many seconds after the start of a load")
    print(f"{'after':>15} {'tokens':>6} " + " ".join(f"{end:>6g}" for end in bins))
    with open_executor(
        config, device=where, num_blocks=2048, max_num_seqs=64, prefill_sms=[prefill_sms], blank_context=True
    ) as executor:
        watch = Stopwatch(executor, config.layers, forget=executor.forget, limited_settle_s=seconds, measure_s=0.001)
        batches = {
            tokens: (Prompts.of(PrefillWork.at(tokens, 64)), Decodes.of(DecodeWork(batch, kv)))
            for tokens, batch, kv in (HEAVY, LIGHT)
        }
        for prefill, decode in batches.values():
            watch.both(prefill, decode, at)  # what is made at first use
        time.sleep(1)
        for after, (tokens, *_) in LOADS:
            prefill, decode = batches[tokens]
            works = {Phase.DECODE: watch._decode(decode, at), Phase.PREFILL: watch._prefill(prefill, at)}
            begun_s = executor.now()
            steps = inner_steps(watch._steady(works, seconds).records[Phase.PREFILL], config.layers)
            bin_of = np.searchsorted(bins, steps.ends_s - begun_s)
            binned = [steps.times_s[bin_of == i] * 1e3 for i in range(len(bins))]
            print(f"{after:>15} {tokens:>6} " + " ".join(f"{ms.mean():6.3f}" if len(ms) else " " * 6 for ms in binned))


if __name__ == "__main__":
    typer.run(main)
