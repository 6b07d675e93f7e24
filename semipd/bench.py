"""Timing attention kernels on partitions of a real GPU: streams, CUDA graphs, events (torch, flashinfer).

Everything that is timed is a CUDA graph of a few layers, so that host launch costs stay out; graphs are
captured once per partition because their nodes are bound to the context they were captured in.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import torch

from semipd.core import FloatArray
from semipd.kernels import DecodeKernel, Gqa, PrefillKernel
from semipd.partition import PartitionBank
from semipd.sweep import DecodeWork, PrefillWork, Sharing, saturated_steps

Kernel: TypeAlias = PrefillKernel | DecodeKernel

GRAPH_MS = 0.5  # a timed graph lasts about this long, so that event overhead (about 2 us) stays under 1 %
MAX_LAYERS_PER_GRAPH = 48
ROTATED_BYTES = 192 << 20  # rotate through this much data, three times an H200's L2
LONG_STEP_MS = 100.0  # steps longer than this are measured once
SLACK = 1.1  # more work is enqueued than a window should take, since clocks move
KEPT_BYTES = 32 << 30  # of batches and graphs kept for the points that follow
MARKS = 64  # timed graphs per stream in one window, at most
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
        self._plain = {p: torch.cuda.Stream(priority=p) for p in (-1, 0)}
        self._gate = torch.cuda.Stream()

    def __enter__(self) -> GpuBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the device, drop graphs and kernels, release every partition."""
        self._forget()
        for bank in (self._capped, self._bank):
            if bank is not None:
                bank.close()

    def _forget(self) -> None:
        """Drop every graph and batch, once nothing runs."""
        torch.cuda.synchronize()
        self._lanes.clear()
        self._kernels.clear()

    def _make_room(self) -> None:
        """Before a point: a sweep over a grid must not fill the device with batches that are done with."""
        if torch.cuda.memory_allocated() > KEPT_BYTES:
            self._forget()

    @property
    def device_sms(self) -> int:
        """SMs of the whole device."""
        return int(torch.cuda.get_device_properties("cuda").multi_processor_count)

    def prefill(self, work: PrefillWork, backend: str, sms: int, marks: int) -> FloatArray:
        """Milliseconds of one layer, alone on ``sms`` SMs; shape [samples]."""
        self._make_room()
        lane = self._lane(self._prefill_kernel(work, backend), self._solo_stream(sms), sms)
        return self._alone(lane, marks)

    def decode(self, work: DecodeWork, backend: str, sms: int, marks: int) -> FloatArray:
        """Milliseconds of one layer of a decode step, alone on ``sms`` SMs; shape [samples]."""
        self._make_room()
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
        p_ms, d_ms = p_lane.replay_ms * 1.2, d_lane.replay_ms * 1.2
        settled_ms = 0.0
        for _ in range(6):
            wanted = 1 if max(p_ms, d_ms) > LONG_STEP_MS else marks
            window_ms = max(4.0, self.settle_ms - settled_ms, (wanted + 1) * max(p_ms, d_ms))
            plan = [(lane, 1 + math.ceil(SLACK * window_ms / ms)) for lane, ms in ((p_lane, p_ms), (d_lane, d_ms))]
            (p_stamps, p_each), (d_stamps, d_each) = self._timeline(plan)
            p_steps = saturated_steps(p_stamps, d_stamps[0], d_stamps[-1]) / p_each
            d_steps = saturated_steps(d_stamps, p_stamps[0], p_stamps[-1]) / d_each
            long = wanted < marks  # one such step settles the clocks for the next
            if (long or settled_ms >= self.settle_ms) and len(p_steps) >= wanted and len(d_steps) >= wanted:
                return p_steps / p_lane.layers, d_steps / d_lane.layers
            settled_ms += min(p_stamps[-1], d_stamps[-1]) - max(p_stamps[0], d_stamps[0])
            p_ms = self._contended(p_stamps, p_each, d_stamps, p_ms)
            d_ms = self._contended(d_stamps, d_each, p_stamps, d_ms)
        raise RuntimeError(f"{at}: {prefill} and {decode} could not be kept running together for {marks} steps")

    @staticmethod
    def _contended(own: FloatArray, each: int, other: FloatArray, before_ms: float) -> float:
        """Estimate of a replay's time while both run, from those that began while the other ran."""
        together = (own[:-1] < other[-1]) & (own[1:] > other[0])
        if not together.any():
            return before_ms * 2
        return float(np.mean(np.diff(own)[together])) / each

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
                ((p_stamps, _),) = self._timeline([(p_lane, steps[0])], exact=True)
                ((d_stamps, _),) = self._timeline([(d_lane, steps[1])], exact=True)
                prefill_ms, decode_ms = np.ptp(p_stamps), np.ptp(p_stamps) + np.ptp(d_stamps)
            else:
                (p_stamps, _), (d_stamps, _) = self._timeline([(p_lane, steps[0]), (d_lane, steps[1])], exact=True)
                start = min(p_stamps[0], d_stamps[0])
                prefill_ms, decode_ms = p_stamps[-1] - start, d_stamps[-1] - start
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
        self._make_room()
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

    def _lane(self, kernel: Kernel, stream: Any, sms: int, layers: int | None = None) -> Lane:
        replanned = isinstance(kernel, PrefillKernel) and kernel.backend == "fa3-sized" and kernel.ctas != sms
        if replanned:
            kernel.size_to(sms)
        key = (id(kernel), stream.cuda_stream, layers)
        if key not in self._lanes:
            self._lanes[key] = self._capture(kernel, stream, layers)
        return self._lanes[key]

    def _capture(self, kernel: Kernel, stream: Any, layers: int | None) -> Lane:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            kernel.launch(0)
            begin.record()
            kernel.launch(1)
            end.record()
            stream.synchronize()
            eager_ms = begin.elapsed_time(end)
            count = layers or max(1, min(MAX_LAYERS_PER_GRAPH, math.ceil(GRAPH_MS / eager_ms)))
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                for step in range(count):
                    kernel.launch(step)
            finally:
                graph.capture_end()
        lane = Lane(graph, stream, count, eager_ms * count)
        ((stamps, each),) = self._timeline([(lane, 2)], exact=True)
        lane.replay_ms = float(np.diff(stamps)[-1]) / each
        return lane

    def _alone(self, lane: Lane, marks: int) -> FloatArray:
        wanted = 1 if lane.replay_ms > LONG_STEP_MS else marks
        settle = max(1, math.ceil(self.settle_ms / lane.replay_ms)) if wanted == marks else 0
        ((stamps, _),) = self._timeline([(lane, settle + wanted)], exact=True)
        return np.diff(stamps)[settle:] / lane.layers

    def _timeline(self, plan: Sequence[tuple[Lane, int]], *, exact: bool = False) -> list[tuple[FloatArray, int]]:
        """Replay each lane's graph so many times, all starting together; stamps in ms and replays per stamp.

        The lanes wait behind a sleeping kernel while the host enqueues, so neither starts before the other.
        With more than MARKS replays a stamp is taken every few of them, unless ``exact``.
        """
        each = [1 if exact else max(1, math.ceil(replays / MARKS)) for _, replays in plan]
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
        torch.cuda.synchronize()
        return [
            (np.array([gate.elapsed_time(e) for e in events]), per) for events, per in zip(stamps, each, strict=True)
        ]


def provenance(gqa: Gqa, command: str) -> dict[str, object]:
    """Where and with what a table is measured: GPU, driver, clocks now, library versions, commit, command, date."""
    import datetime
    import platform
    import subprocess
    from importlib.metadata import version

    def ask(*argv: str) -> str:
        found = subprocess.run(argv, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
        return found.stdout.strip() if found.returncode == 0 else "unknown"

    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")
    smi = ask("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", "0").split(", ")
    device = torch.cuda.get_device_properties("cuda")
    return {
        "gpu": device.name,
        "device_sms": device.multi_processor_count,
        "device_memory_bytes": device.total_memory,
        **dict(zip((f.replace(".", "_") for f in fields), smi, strict=False)),
        "work": {
            "query_heads": gqa.query_heads,
            "kv_heads": gqa.kv_heads,
            "head_dim": gqa.head_dim,
            "dtype": gqa.dtype,
            "layers": 1,
            "page_size_tokens": 16,
        },
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "flashinfer": version("flashinfer-python"),
        "semipd": version("semipd"),
        "python": platform.python_version(),
        "commit": os.environ.get("SEMIPD_COMMIT") or ask("git", "rev-parse", "HEAD"),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
