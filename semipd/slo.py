"""What a request's latencies should be."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets of a request in seconds; it is good when it meets both."""

    ttft_s: float
    tpot_s: float
    name: str = field(default="custom", compare=False)
