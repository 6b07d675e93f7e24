"""Timing attention kernels on partitions of a real GPU: streams, CUDA graphs, events (torch, flashinfer).

Everything that is timed is a CUDA graph of a few layers, so that host launch costs stay out; graphs are
captured once per partition because their nodes are bound to the context they were captured in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch

from semipd.core import FloatArray
from semipd.kernels import DecodeKernel, Gqa, MixedKernel, PrefillKernel
from semipd.partition import PartitionBank
from semipd.points import DecodeWork, PrefillWork, Sharing
from semipd.window import LONG_STEP_MS, Stamps, stamped_every, together

Kernel: TypeAlias = PrefillKernel | DecodeKernel | MixedKernel

GRAPH_MS = 0.5  # a timed graph lasts about this long, so that event overhead (about 2 us) stays under 1 %
MAX_LAYERS_PER_GRAPH = 48
ROTATED_BYTES = 192 << 20  # rotate through this much data, three times an H200's L2
CLOCKED_EVERY_S = 0.5
SETTLE_MS = 60.0  # load before a measurement: a GPU at its power limit needs about this long to settle its clocks


@dataclass
class Lane:
    """A captured graph of ``layers`` layers on a stream, and how long one replay takes alone (ms)."""

    graph: Any
    stream: Any
    layers: int
    replay_ms: float


def copies_for(bytes_per_layer: int) -> int:
    """Layers' worth of distinct data to rotate through, so that a step cannot live in L2."""
    return max(1, min(16, math.ceil(ROTATED_BYTES / bytes_per_layer)))


class GpuBench:
    """Measures attention on every partition of one GPU. A context manager; raises CudaError from the driver.

    ``step_sms`` is the granularity of the splits: 8, or 2 at the price of thread-block clusters. ``settle_ms``:
    every measurement follows at least so much of the same load, since both phases at once draw more power than
    the device may and its clocks fall within tens of milliseconds. ``rest_ms``: fixed work is measured after so
    long an idle time instead, as a burst meets a rested GPU.
    """

    def __init__(
        self, gqa: Gqa, step_sms: int = 8, seed: int = 0, settle_ms: float = SETTLE_MS, rest_ms: float = 0.0
    ) -> None:
        torch.zeros(1, device="cuda")
        self.gqa, self.step_sms, self.seed = gqa, step_sms, seed
        self.settle_ms, self.rest_ms = settle_ms, rest_ms
        self._bank = PartitionBank(step_sms=step_sms, prefill_priority=-1, decode_priority=0)
        # A size that both sides of a split can have is measured on the prefill side, the aligned one.
        self._solo = {s.decode.sms: s.decode for s in self._bank.splits}
        self._solo.update({s.prefill.sms: s.prefill for s in self._bank.splits})
        self._capped: PartitionBank | None = None
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._lanes: dict[tuple[object, ...], Lane] = {}
        self._work: PrefillWork | DecodeWork | None = None
        self._plain = {p: torch.cuda.Stream(priority=p) for p in (-1, 0)}
        self._gate = torch.cuda.Stream()
        self._clocks_mhz: list[int] = []  # while something ran
        self._clocked_s = 0.0

    def __enter__(self) -> GpuBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the device, drop graphs and kernels, release every partition."""
        with ExitStack() as banks:  # closed whatever the work in flight did wrong
            for bank in (self._bank, self._capped):
                if bank is not None:
                    banks.callback(bank.close)
            self._forget()

    def _forget(self) -> None:
        """Drop every graph and batch, once nothing runs."""
        torch.cuda.synchronize()
        self._lanes.clear()
        self._kernels.clear()
        torch.cuda.empty_cache()

    def _keep_only(self, work: PrefillWork | DecodeWork) -> None:
        """Keep batches and graphs for the points of one batch only: graphs take memory that torch does not count."""
        if work != self._work:
            self._forget()
            self._work = work

    @property
    def device_sms(self) -> int:
        """SMs of the whole device."""
        return int(torch.cuda.get_device_properties("cuda").multi_processor_count)

    def observed(self) -> dict[str, object]:
        """Least, median and most SM clock while something ran, sampled twice a second."""
        if not self._clocks_mhz:
            return {}
        return {"clocks_sm_mhz_under_load": [int(x) for x in np.percentile(self._clocks_mhz, [0, 50, 100])]}

    def prefill(self, work: PrefillWork, backend: str, sms: int, marks: int) -> FloatArray:
        """Milliseconds of one layer, alone on ``sms`` SMs; shape [samples]."""
        self._keep_only(work)
        lane = self._lane(self._prefill_kernel(work, backend), self._solo_stream(sms), sms)
        return self._alone(lane, marks)

    def decode(self, work: DecodeWork, backend: str, sms: int, marks: int) -> FloatArray:
        """Milliseconds of one layer of a decode step, alone on ``sms`` SMs; shape [samples]."""
        self._keep_only(work)
        lane = self._lane(self._decode_kernel(work, backend), self._solo_stream(sms), sms)
        return self._alone(lane, marks)

    def both(
        self,
        prefill: PrefillWork,
        prefill_backend: str,
        decode: DecodeWork,
        decode_backend: str,
        at: Sharing,
        marks: int,
    ) -> tuple[FloatArray, FloatArray]:
        """Milliseconds of one layer of each phase while the other runs from its beginning to its end.

        Raises RuntimeError when they cannot be kept running together for ``marks`` whole steps each.
        """
        p_lane, d_lane = self._pair(prefill, prefill_backend, decode, decode_backend, at)

        def run(p_replays: int, d_replays: int, stamps: int) -> tuple[Stamps, Stamps]:
            p_stamps, d_stamps = self._timeline([(p_lane, p_replays), (d_lane, d_replays)], stamps)
            return p_stamps, d_stamps

        p_ms, d_ms = together(run, (p_lane.replay_ms, d_lane.replay_ms), marks, self.settle_ms)
        return p_ms / p_lane.layers, d_ms / d_lane.layers

    def mixed(self, prefill: PrefillWork, decode: DecodeWork, backend: str, marks: int) -> FloatArray:
        """Milliseconds of one layer of both batches in one call, on the whole device; shape [samples]."""
        self._keep_only(prefill)
        lane = self._lane(self._mixed_kernel(prefill, decode, backend), self._plain[0], self.device_sms)
        return self._alone(lane, marks)

    def total(
        self,
        prefill: PrefillWork,
        prefill_backend: str,
        decode: DecodeWork,
        decode_backend: str,
        at: Sharing,
        steps: tuple[int, int],
        runs: int,
    ) -> FloatArray:
        """Fixed work, started together: milliseconds until prefill, decode and both are done; shape [runs, 3].

        ``at.mode`` ``in-turn`` runs prefill, then decode, on the whole device.
        """
        p_lane, d_lane = self._pair(prefill, prefill_backend, decode, decode_backend, at, layers=1)
        rows: list[list[float]] = []
        settled_ms = 0.0
        while len(rows) < runs:
            time.sleep(self.rest_ms / 1e3)
            if at.mode == "in-turn":
                (p,), (d,) = self._timeline([(p_lane, steps[0])]), self._timeline([(d_lane, steps[1])])
                prefill_ms = float(np.ptp(p.at_ms))
                decode_ms = prefill_ms + float(np.ptp(d.at_ms))
            else:
                p, d = self._timeline([(p_lane, steps[0]), (d_lane, steps[1])])
                start = min(p.at_ms[0], d.at_ms[0])
                prefill_ms, decode_ms = float(p.at_ms[-1] - start), float(d.at_ms[-1] - start)
            if settled_ms >= (1e-9 if self.rest_ms else self.settle_ms):
                rows.append([prefill_ms, decode_ms, max(prefill_ms, decode_ms)])
            settled_ms += max(prefill_ms, decode_ms)
        return np.array(rows)

    def _solo_stream(self, sms: int) -> Any:
        if sms == self.device_sms:
            return self._plain[0]
        return torch.cuda.ExternalStream(self._solo[sms].stream)

    def _pair(
        self,
        prefill: PrefillWork,
        prefill_backend: str,
        decode: DecodeWork,
        decode_backend: str,
        at: Sharing,
        layers: int | None = None,
    ) -> tuple[Lane, Lane]:
        self._keep_only(prefill)
        if at.mode == "split":
            split = self._bank.pick(at.prefill_sms)
            p_stream = torch.cuda.ExternalStream(split.prefill.stream)
            d_stream = torch.cuda.ExternalStream(split.decode.stream)
        elif at.mode == "capped":
            if self._capped is None:
                self._capped = PartitionBank(step_sms=self.step_sms, prefill_priority=0, decode_priority=0)
            p_stream = torch.cuda.ExternalStream(self._capped.pick(at.prefill_sms).prefill.stream)
            d_stream = self._plain[-1]
        elif at.mode == "priority":
            p_stream, d_stream = self._plain[0], self._plain[-1]
        else:
            p_stream, d_stream = self._plain[0], self._gate
        p_lane = self._lane(self._prefill_kernel(prefill, prefill_backend), p_stream, at.prefill_sms, layers)
        d_lane = self._lane(self._decode_kernel(decode, decode_backend), d_stream, at.decode_sms, layers)
        return p_lane, d_lane

    def _prefill_kernel(self, work: PrefillWork, backend: str) -> PrefillKernel:
        key = ("prefill", work, backend)
        if key not in self._kernels:
            kv = work.seqs * (work.seq_tokens + work.seq_context)
            q_bytes = work.tokens * self.gqa.query_heads * self.gqa.head_dim * self.gqa.torch_dtype.itemsize
            copies = copies_for(kv * self.gqa.kv_bytes_per_token + q_bytes)
            self._kernels[key] = PrefillKernel(self.gqa, work, backend, copies, self.seed)
        kernel = self._kernels[key]
        assert isinstance(kernel, PrefillKernel)  # noqa: S101 - the key says so; mypy cannot
        return kernel

    def _decode_kernel(self, work: DecodeWork, backend: str) -> DecodeKernel:
        key = ("decode", work, backend)
        if key not in self._kernels:
            copies = copies_for(max(work.kv_tokens, work.batch) * self.gqa.kv_bytes_per_token)
            self._kernels[key] = DecodeKernel(self.gqa, work, copies, seed=self.seed)
        kernel = self._kernels[key]
        assert isinstance(kernel, DecodeKernel)  # noqa: S101 - likewise
        return kernel

    def _mixed_kernel(self, prefill: PrefillWork, decode: DecodeWork, backend: str) -> MixedKernel:
        key = ("mixed", prefill, decode, backend)
        if key not in self._kernels:
            kv = prefill.seqs * (prefill.seq_tokens + prefill.seq_context) + max(decode.kv_tokens, decode.batch)
            copies = copies_for(kv * self.gqa.kv_bytes_per_token)
            self._kernels[key] = MixedKernel(self.gqa, prefill, decode, backend, copies, seed=self.seed)
        kernel = self._kernels[key]
        assert isinstance(kernel, MixedKernel)  # noqa: S101 - likewise
        return kernel

    def _lane(self, kernel: Kernel, stream: Any, sms: int, layers: int | None = None) -> Lane:
        if isinstance(kernel, PrefillKernel) and kernel.backend == "fa3-sized" and kernel.ctas != sms:
            kernel.size_to(sms)
        key = (id(kernel), stream.cuda_stream, layers)
        if key not in self._lanes:
            self._lanes[key] = self._capture(kernel, stream, layers)
        return self._lanes[key]

    def _capture(self, kernel: Kernel, stream: Any, layers: int | None) -> Lane:
        """A graph of so many layers, or of as many as last GRAPH_MS: of one first, which tells how long that takes."""
        lane = self._record(kernel, stream, layers or 1)
        wanted = layers or min(MAX_LAYERS_PER_GRAPH, math.ceil(GRAPH_MS / lane.replay_ms))
        return lane if wanted == lane.layers else self._record(kernel, stream, wanted)

    def _record(self, kernel: Kernel, stream: Any, layers: int) -> Lane:
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            kernel.launch(0)  # loads what it needs, which a capture could not
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for step in range(layers):
                    kernel.launch(step)
            finally:
                graph.capture_end()
        lane = Lane(graph, stream, layers, replay_ms=0.0)
        (stamps,) = self._timeline([(lane, 2)])
        lane.replay_ms = float(np.diff(stamps.at_ms)[-1])
        return lane

    def _alone(self, lane: Lane, marks: int) -> FloatArray:
        wanted = 1 if lane.replay_ms > LONG_STEP_MS else marks
        settle = max(1, math.ceil(self.settle_ms / lane.replay_ms)) if wanted == marks else 0
        (stamps,) = self._timeline([(lane, settle + wanted)])
        return np.diff(stamps.at_ms)[settle:] / lane.layers

    def _timeline(self, plan: Sequence[tuple[Lane, int]], stamps_at_most: int | None = None) -> list[Stamps]:
        """Replay each lane's graph so many times, all starting together.

        The lanes wait behind a sleeping kernel while the host enqueues, so neither starts before the other. Without
        a limit on stamps every replay is stamped.
        """
        each = [stamped_every(replays, stamps_at_most or replays) for _, replays in plan]
        launches = sum(replays for _, replays in plan)
        torch.cuda.synchronize()
        with torch.cuda.stream(self._gate):
            torch.cuda._sleep(int(2_000 * min(20_000, 200 + 25 * launches)))  # cycles, about 2,000 a microsecond
            gate = torch.cuda.Event(enable_timing=True)
            gate.record()
        stamps: list[list[Any]] = []
        turns: list[tuple[float, int]] = []
        for index, ((lane, replays), per) in enumerate(zip(plan, each, strict=True)):
            lane.stream.wait_event(gate)
            first = torch.cuda.Event(enable_timing=True)
            first.record(lane.stream)
            stamps.append([first])
            turns += [(i * per / replays, index) for i in range(math.ceil(replays / per))]
        for _, index in sorted(turns):
            lane = plan[index][0]
            with torch.cuda.stream(lane.stream):
                for _ in range(each[index]):
                    lane.graph.replay()
                event = torch.cuda.Event(enable_timing=True)
                event.record(lane.stream)
            stamps[index].append(event)
        if time.monotonic() - self._clocked_s > CLOCKED_EVERY_S and not stamps[-1][-1].query():
            self._clocked_s = time.monotonic()
            self._clocks_mhz.append(torch.cuda.clock_rate())
        torch.cuda.synchronize()
        return [
            Stamps(np.array([gate.elapsed_time(e) for e in events]), per)
            for events, per in zip(stamps, each, strict=True)
        ]
