"""A bench whose times are closed forms: for the sweeps, their tables and the command line, without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from semipd.config import Attention, PartitionSweep, SweepConfig
from semipd.core import FloatArray
from semipd.points import DecodeWork, PrefillWork, Sharing


@dataclass
class ClosedFormBench:
    """Prefill is bound by SMs, decode by bandwidth that half of the SMs saturate; together each is 25 % slower.

    ``fa2`` scales with the SMs. ``fa3`` would take 60 % of its time, but runs in whole waves of the device's size;
    ``fa3-sized`` takes 70 % without waves. In a fused batch the longer part hides 70 % of the shorter. ``calls`` lists
    what was timed; ``before`` runs ahead of each timing.
    """

    device_sms: int = 132
    calls: list[tuple[object, ...]] = field(default_factory=list)
    before: Callable[[int], None] = lambda _: None
    step_sms: int = 2

    def observed(self) -> dict[str, object]:
        return {"clocks_sm_mhz_under_load": [1000, 1500, 2000]}

    def prefill(self, work: PrefillWork, backend: str, sms: int, marks: int) -> FloatArray:
        self._timed("prefill", work, backend, sms)
        return _samples(self.prefill_ms(work, backend, sms), marks)

    def decode(self, work: DecodeWork, backend: str, sms: int, marks: int) -> FloatArray:
        self._timed("decode", work, backend, sms)
        return _samples(self.decode_ms(work, sms), marks)

    def both(
        self,
        prefill: PrefillWork,
        prefill_backend: str,
        decode: DecodeWork,
        decode_backend: str,
        at: Sharing,
        marks: int,
    ) -> tuple[FloatArray, FloatArray]:
        self._timed("both", prefill, prefill_backend, decode, decode_backend, at)
        p_ms, d_ms = self._beside(prefill, prefill_backend, decode, at)
        return _samples(p_ms, marks), _samples(d_ms, marks)

    def mixed(self, prefill: PrefillWork, decode: DecodeWork, backend: str, marks: int) -> FloatArray:
        self._timed("mixed", prefill, decode, backend, self.device_sms)
        return _samples(self.mixed_ms(prefill, decode, backend), marks)

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
        self._timed("total", prefill, prefill_backend, decode, decode_backend, at)
        if at.mode == "in-turn":
            p = self.prefill_ms(prefill, prefill_backend, at.prefill_sms) * steps[0]
            d = p + self.decode_ms(decode, at.decode_sms) * steps[1]
        else:
            p, d = (ms * n for ms, n in zip(self._beside(prefill, prefill_backend, decode, at), steps, strict=True))
        return np.tile([p, d, max(p, d)], (runs, 1))

    def prefill_ms(self, work: PrefillWork, backend: str, sms: int) -> float:
        whole_ms = work.tokens * work.mean_context / 1e7
        if backend == "fa3":
            return 0.6 * whole_ms * math.ceil(self.device_sms / sms)
        return (0.7 if backend == "fa3-sized" else 1.0) * whole_ms * self.device_sms / sms

    def decode_ms(self, work: DecodeWork, sms: int) -> float:
        return work.kv_tokens / 1e6 * max(1.0, self.device_sms / 2 / sms)

    def mixed_ms(self, prefill: PrefillWork, decode: DecodeWork, backend: str) -> float:
        parts = self.prefill_ms(prefill, backend, self.device_sms), self.decode_ms(decode, self.device_sms)
        return max(parts) + 0.3 * min(parts)

    def _beside(self, prefill: PrefillWork, backend: str, decode: DecodeWork, at: Sharing) -> tuple[float, float]:
        slower = {"split": 1.25, "capped": 1.4, "priority": 1.9, "streams": 2.0}[at.mode]
        return slower * self.prefill_ms(prefill, backend, at.prefill_sms), slower * self.decode_ms(
            decode, at.decode_sms
        )

    def _timed(self, *call: object) -> None:
        asked = call[-1]
        sizes = (asked.prefill_sms, asked.decode_sms) if isinstance(asked, Sharing) else (asked,)
        for sms in sizes:  # as a bank of partitions has them
            assert isinstance(sms, int)
            assert sms == self.device_sms or 0 in (sms % self.step_sms, (self.device_sms - sms) % self.step_sms)
        self.before(len(self.calls))
        self.calls.append(call)


def _samples(ms: float, marks: int) -> FloatArray:
    """Samples from 1 % below to 1 % above, their median exact."""
    return ms * np.linspace(0.99, 1.01, marks)


@dataclass
class OpenClosedForm:
    """How the command line opens a ClosedFormBench; remembers what it was asked for."""

    bench: ClosedFormBench = field(default_factory=ClosedFormBench)
    asked: list[tuple[Attention, int, str]] = field(default_factory=list)

    @contextmanager
    def __call__(self, config: SweepConfig, command: str) -> Iterator[tuple[ClosedFormBench, dict[str, object]]]:
        if isinstance(config, PartitionSweep):
            self.bench.step_sms = config.step_sms
        self.asked.append((config.attention, self.bench.step_sms, command))
        yield self.bench, {"gpu": "closed form", "device_sms": self.bench.device_sms, "command": command}
