"""Real execution: a transformer on a CPU or on the partitions of a GPU, in wall-clock time.

The host enqueues a few steps ahead on the stream of each phase and looks at events; while runs are in flight it
never waits for a stream, so that neither phase starves because of the other (docs/adr/0004-one-host-thread.md).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from semipd.attention import Attention, TorchAttention
from semipd.core import Allocation, InputError, Phase, Run, StepRecord
from semipd.engine import Engine
from semipd.executor import check_launch, output_left
from semipd.flashinfer_attention import FlashinferAttention, flashinfer_workspace_bytes
from semipd.flight import DecodeFlight, Flight, MixedFlight, PrefillBatch, PrefillFlight
from semipd.model import Model, load_weights, random_weights
from semipd.model_config import DTYPE_BYTES, ModelConfig
from semipd.ops import FlashinferOps, TorchOps
from semipd.padding import MOST_PREFILL_ROWS
from semipd.paged_kv import BlockMap, PagedKvCache
from semipd.sequences import Prompts, Sequences, random_prompts
from semipd.torch_device import CpuDevice, CudaDevice, Device


@contextmanager
def open_executor(
    config: ModelConfig,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    weights_dir: Path | None = None,
    seed: int = 0,
    num_blocks: int | None = None,
    block_size: int = 16,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    captured_tokens: int = MOST_PREFILL_ROWS,
    gpu_memory_utilization: float = 0.9,
    step_sms: int = 8,
    prefill_sms: Sequence[int] | None = None,
    prefill_backend: Callable[[int], str] = lambda sms: "fa2",  # noqa: ARG005 - whatever the size
    prompts: Prompts | None = None,
    blank_context: bool = False,
) -> Iterator[TorchExecutor]:
    """A model, its KV cache and, on ``cuda``, the partitions, made into an executor and closed in the end.

    Args:
        config: The model.
        device: Where it runs.
        weights_dir: A Hugging Face folder of weights; None for random ones.
        seed: Of random weights and prompts.
        num_blocks: KV blocks; None, on ``cuda`` only, for as many as fit.
        block_size: Tokens of a KV block.
        max_num_seqs: Most sequences of a decode run.
        max_num_batched_tokens: Most tokens of a prefill run, for which memory is left.
        captured_tokens: See ``TorchExecutor``.
        gpu_memory_utilization: Share of the device's memory that may be used.
        step_sms: Sizes of the partitions, see ``PartitionBank``.
        prefill_sms: Or a list of them.
        prefill_backend: See ``FlashinferAttention``.
        prompts: See ``TorchExecutor``.
        blank_context: See ``TorchExecutor``.

    Raises InputError for weights that do not fit the model, and when there is no room for a KV block.
    """
    with ExitStack() as opened:
        on: Device
        lanes = 1  # that prefill may have: the whole device, and each split
        if device == "cuda":
            from semipd.partition import PartitionBank

            bank = opened.enter_context(PartitionBank(step_sms=step_sms, prefill_sms=prefill_sms))
            on, lanes = CudaDevice(bank), 1 + len(bank.splits)
        else:
            on = CpuDevice()
        if weights_dir is None:
            weights = random_weights(config, device, seed)
        else:
            weights = load_weights(config, weights_dir, device)
        if num_blocks is None:
            lane_bytes = activation_bytes(config, max_num_batched_tokens, max_num_seqs) + GRAPHS_BYTES * config.layers
            num_blocks = _blocks_that_fit(
                config, device, lanes * lane_bytes, max_num_seqs, block_size, gpu_memory_utilization
            )
        cache = PagedKvCache(config, num_blocks, block_size, device)
        attention: Attention
        if device == "cuda":
            attention = FlashinferAttention(config, cache, max_num_seqs, prefill_backend)
        else:
            attention = TorchAttention(cache)
        if blank_context:
            cache.randomise(seed)  # a GPU reads zeros with less power, and so with higher clocks
        executor = TorchExecutor(
            Model(config, weights, cache, FlashinferOps() if device == "cuda" else TorchOps()),
            attention,
            on,
            max_num_seqs=max_num_seqs,
            captured_tokens=captured_tokens,
            prompts=prompts or random_prompts(config.vocab_size, seed),
            blank_context=blank_context,
        )
        opened.callback(executor.close)
        on.synchronize()  # weights, cache and workspaces are made on another stream than those that use them
        # What is there by now stays: a collection that went through all of torch would hold up both streams.
        gc.collect()
        gc.freeze()
        opened.callback(gc.unfreeze)
        yield executor


def activation_bytes(config: ModelConfig, tokens: int, sequences: int) -> int:
    """Memory that a prefill batch of so many tokens beside a decode batch takes at most, about.

    A row has at once its state twice, and the in- and output of the widest matrix product.
    """
    heads = (config.query_heads + 2 * config.kv_heads) * config.head_dim
    row = 4 * config.hidden_size + max(3 * (config.intermediate_size or 0), 2 * heads)
    logits = 2 * config.vocab_size * sequences
    return DTYPE_BYTES[config.dtype] * ((tokens + sequences) * row + logits)


GRAPHS_BYTES = 28 << 20
"""Left for each layer's CUDA graphs on a partition, and cuBLAS's workspaces, of which it has one for each stream.

On an H200, a layer of Llama-3-8B took 10 to 12 MiB for 35 sizes of decode, and 19 MiB for 24 of prefill; there are 21
and 20 now.
"""


def _blocks_that_fit(
    config: ModelConfig, device: str, work_bytes: int, max_num_seqs: int, block_size: int, utilization: float
) -> int:
    """KV blocks for which the device has memory. Raises InputError when there is none."""
    if device != "cuda":
        raise InputError(f"num_blocks: missing; expected a number of KV blocks on a {device}")
    free, total = torch.cuda.mem_get_info()
    free -= int((1 - utilization) * total) + work_bytes + flashinfer_workspace_bytes(config, max_num_seqs)
    blocks = int(free // (config.kv_bytes_per_token * block_size)) - 1  # one is scratch
    if blocks < 1:
        raise InputError(f"gpu_memory_utilization: found {utilization}, which leaves no room for a block of KV cache")
    return blocks


class TorchExecutor:
    """An ``Executor`` that runs a model; time is the wall's, from the first look at it.

    **Steps.** A prefill step is one layer of the batch, the last one with the sampling of first tokens; a decode step
    is a whole pass that gives each sequence a token, and so is the one step of a fused batch. Sampling is greedy. A run
    ends where ``SimExecutor``'s would, but that what is enqueued is done: a yield takes effect within ``LOOK_AHEAD``
    steps.

    **Work is enqueued by** ``wait``, up to ``LOOK_AHEAD`` steps of each phase, and on a CPU done there and then.
    ``steps_done`` counts the step before the last one enqueued as done, as it cannot be taken back: so the scheduler
    counts KV blocks for every step that is enqueued.

    **KV cache.** Blocks are counted by the scheduler and numbered here. A sequence gives them back when it is
    finished or prefilled anew; those of preempted sequences that still wait, or were dropped, are taken back when
    blocks run out, so ``follow`` has to be told whom the scheduler holds blocks for.

    Args:
        model: The model with its KV cache.
        attention: How attention is computed; over the same cache.
        device: Where the model is.
        max_num_seqs: Most sequences of a decode run.
        captured_tokens: Most tokens of a prefill batch whose layers are captured (``semipd.passes``).
        prompts: Prompts; random ones by default.
        blank_context: Whether cached tokens need not have been computed: to measure a shape without its history.
            What was never written is random, or another sequence's; unknown tokens are token 0.
    """

    def __init__(
        self,
        model: Model,
        attention: Attention,
        device: Device,
        *,
        max_num_seqs: int = 256,
        captured_tokens: int = MOST_PREFILL_ROWS,
        prompts: Prompts | None = None,
        blank_context: bool = False,
    ) -> None:
        config, cache = model.config, model.cache
        self.engine = Engine(model, attention, device, max_num_seqs, captured_tokens)
        self.sequences = Sequences(
            BlockMap(cache.num_blocks, cache.block_size),
            prompts or random_prompts(config.vocab_size),
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            blank_context=blank_context,
        )
        self._start_s: float | None = None
        self._last_end_s = 0.0
        self._prefill: PrefillFlight | None = None
        self._decode: DecodeFlight | None = None
        self._mixed: MixedFlight | None = None
        self._stopped: PrefillBatch | None = None  # between two layers

    @property
    def num_blocks(self) -> int:
        """KV blocks there are, for the scheduler's configuration."""
        return self.sequences.blocks.num_blocks

    @property
    def layers(self) -> int:
        """Layers of the model, which are the steps of a prefill run."""
        return self.engine.model.config.layers

    def follow(self, held: Callable[[int], int]) -> None:
        """Who has KV blocks: tokens that a request's sequence has room for, 0 for none (``BlockManager.tokens``)."""
        self.sequences.held = held

    def forget(self, request_ids: Iterable[int]) -> None:
        """Give up sequences that are not finished and not in flight, with their tokens and KV blocks."""
        self._stopped = None
        self.sequences.finish(request_ids)

    def tokens(self, request_id: int) -> tuple[int, ...]:
        """The tokens generated for a request so far, in runs that have ended."""
        return tuple(self.sequences.generated.get(request_id, ()))

    def now(self) -> float:
        """Seconds since the first call."""
        now_s = time.perf_counter()
        if self._start_s is None:
            self._start_s = now_s
        return now_s - self._start_s

    def launch(self, run: Run) -> None:
        """Start a run; its steps are enqueued by ``wait``.

        Raises ValueError as ``Executor.launch`` does; for a sequence that has all its output or not the cached tokens
        that the run says; for more sequences than ``max_num_seqs``; for layers that are not those left of the batch
        that was stopped last, without another one since; and for an allocation that the device does not have.
        """
        check_launch(run, [flight.run for flight in self._flights()])
        if run.phase is Phase.PREFILL:
            self._launch_prefill(run)
        elif run.phase is Phase.MIXED:
            self.sequences.check(run)
            self._stopped = None
            self._mixed = MixedFlight(self.engine, self.sequences, run, self.now)
        else:
            if len(run.requests) > self.engine.max_num_seqs:
                raise ValueError(
                    f"decode run {run.id}: {len(run.requests)} sequences; expected at most {self.engine.max_num_seqs}"
                )
            left = output_left(run)
            self.sequences.check(run)
            self._decode = DecodeFlight(self.engine, self.sequences, run, left, self.now)

    def _launch_prefill(self, run: Run) -> None:
        batch = self._stopped
        if run.max_steps == self.layers:
            self.sequences.check(run)
            batch = PrefillBatch(run, run.max_steps)
        elif batch is None or not batch.continued_by(run):
            raise ValueError(f"prefill run {run.id}: {run.max_steps} layers are left, but of no batch that was stopped")
        self._prefill = PrefillFlight(self.engine, self.sequences, run, batch, self.now)
        self._stopped = None

    def yield_(self, run_id: int) -> None:
        """Ask the run to end after the steps that are enqueued, or its first; no effect on a run that has ended."""
        for flight in self._flights():
            if flight.run.id == run_id:
                flight.stop()

    def steps_done(self, run_id: int) -> int:
        """Steps of a run in flight that ``wait`` saw done, or that are about to be; fewer than it will end with.

        Raises KeyError for a run that is not in flight.
        """
        for flight in self._flights():
            if flight.run.id == run_id:
                return flight.steps_done()
        raise KeyError(f"run {run_id} is not in flight")

    def wait(self, until_s: float | None) -> list[StepRecord]:
        """Keep both phases fed until a run ends or ``until_s`` is reached; see ``Executor.wait``.

        On a CPU it returns at most a step of each phase later. Raises RuntimeError when nothing is in flight and
        ``until_s`` is None, and when the KV cache has too few blocks; ValueError for a sequence that is too long for
        the model.
        """
        if until_s is None and not self._flights():
            raise RuntimeError("nothing is in flight and no time is given: this would wait for ever")
        while True:
            if ended := self._collect():
                return ended
            if until_s is not None and until_s <= self.now():
                return []
            flights = self._flights()
            for flight in flights:
                flight.feed()
            if not flights and until_s is not None:
                time.sleep(max(0.0, until_s - self.now()))

    def prepare(self, allocations: Iterable[Allocation], prefill_tokens: int = 1) -> None:
        """Do now what would otherwise be done at the first launch at each allocation, and take its memory.

        That is the capture of decode steps and of prefill layers for every number of rows, workspaces, and what a
        prefill batch of so many tokens needs. To be called with nothing in flight. A batch that was stopped is lost.
        """
        self._stopped = None
        for at in allocations:
            self.engine.prepare(at, prefill_tokens)

    def close(self) -> None:
        """Wait for the device and drop what belongs to its streams, so that the partitions can be closed."""
        self._prefill = self._decode = self._mixed = self._stopped = None
        self.engine.close()

    def _flights(self) -> list[Flight]:
        """Those in flight; decode, whose steps are short and whose tokens someone reads, is fed first."""
        return [flight for flight in (self._decode, self._mixed, self._prefill) if flight is not None]

    def _collect(self) -> list[StepRecord]:
        """The records of the runs that have ended, in that order, which are no longer in flight then."""
        ended: list[Flight] = []
        # Who ended before one that has been seen to is seen to have ended at the latest after that.
        while late := [flight for flight in self._flights() if flight not in ended and flight.ended()]:
            ended += late
        records = []
        for flight in sorted(ended, key=lambda flight: flight.ends_s[-1]):
            if isinstance(flight, MixedFlight):
                self._mixed = None
            elif isinstance(flight, PrefillFlight):
                self._prefill, self._stopped = None, flight.stopped
            else:
                self._decode = None
            finished = flight.complete()
            self.sequences.finish(finished)
            # Two streams' clocks are compared by way of the host, which is good to some microseconds.
            ends_s = np.minimum(flight.ends_s, self.now())
            ends_s[-1] = self._last_end_s = max(ends_s[-1], self._last_end_s)
            records.append(StepRecord(flight.run, flight.start_s, ends_s, finished))
        return records
