"""A small profile with known closed forms, for every test that needs one: written to a folder by ``write_profile``.

Roofline-like: prefill's time falls with its SMs, decode's only until the memory bandwidth is saturated, and each
phase is slower while the other runs. The solo times are bilinear in (tokens, mean context) and (batch, KV tokens),
the speeds beside the other phase multilinear in the logarithms, so a cost model that interpolates as docs/profiles.md
says agrees with the closed forms everywhere inside the grid (decode beside prefill: at the grid's KV token counts).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from math import log2
from pathlib import Path
from typing import Any

from semipd.points import DecodePoint, DecodeWork, HybridPoint, MixedPoint, PrefillPoint, PrefillWork
from semipd.sweep import decode_grid, grid, partition_counts, splits_of
from semipd.table_files import TableWriter

TOKENS = (1, 64, 1024, 8192)
MEAN_CONTEXTS = (16, 512, 4096, 32768)
BATCHES = (1, 8, 64, 256)
KV_TOKENS = (256, 4096, 65536, 524288)
HYBRID_TOKENS = (1, 1024, 8192)
HYBRID_CONTEXTS = (16, 512, 32768)
HYBRID_BATCHES = (1, 16, 256)
HYBRID_KV_TOKENS = (256, 16384, 524288)
MIXED_TOKENS = (1, 256, 2048)

SATURATING_SHARE = 0.5  # of the device's SMs draws all of its memory bandwidth
PROVENANCE: dict[str, object] = {"gpu": "closed form", "work": {"layers": 1}, "command": "write_profile"}


def prefill_ms(tokens: float, mean_context: float, sms: int) -> float:
    """Milliseconds of one prefill layer alone on ``sms`` SMs."""
    return 0.005 + tokens * (0.01 + 4e-6 * mean_context) / sms


def decode_ms(batch: float, kv_tokens: float, sms: int, device_sms: int = 32) -> float:
    """Milliseconds of one layer of a decode step alone on ``sms`` SMs."""
    return 0.01 + batch * 0.01 / sms + kv_tokens * 3e-5 / min(sms, device_sms * SATURATING_SHARE)


def prefill_slowdown(tokens: float, mean_context: float, batch: float, kv_tokens: float) -> float:
    """How many times longer a prefill layer takes beside decode."""
    return 1 / (1 - 0.01 * log2(kv_tokens) - 0.001 * log2(batch) * log2(tokens) - 0.002 * log2(mean_context))


def decode_slowdown(tokens: float, mean_context: float, batch: float, kv_tokens: float) -> float:
    """How many times longer a decode step takes beside prefill."""
    return 1 / (1 - 0.008 * log2(tokens) - 0.0005 * log2(mean_context) * log2(kv_tokens) - 0.003 * log2(batch))


def mixed_ms(tokens: float, mean_context: float, batch: float, kv_tokens: float) -> float:
    """A fused step, divided by the layers: linear in each."""
    return 0.05 + 2e-4 * tokens * (1 + mean_context / 4096) + 1e-4 * batch + 3e-7 * kv_tokens * (1 + batch / 512)


def _spread(median_ms: float, prefix: str = "") -> dict[str, Any]:
    values = {"median_ms": median_ms, "p10_ms": 0.98 * median_ms, "p90_ms": 1.05 * median_ms}
    return {f"{prefix}{name}": value for name, value in values.items()}


def prefill_point(work: PrefillWork, sms: int, backend: str = "fa3", factor: float = 1.0) -> PrefillPoint:
    """One row of prefill.csv."""
    median_ms = factor * prefill_ms(work.tokens, work.mean_context, sms)
    return PrefillPoint(sms=sms, **asdict(work), backend=backend, steps=10, **_spread(median_ms))


def decode_point(work: DecodeWork, sms: int, device_sms: int = 32) -> DecodePoint:
    """One row of decode.csv."""
    median_ms = decode_ms(work.batch, work.kv_tokens, sms, device_sms)
    return DecodePoint(sms=sms, **asdict(work), backend="fa2", steps=10, **_spread(median_ms))


def hybrid_point(
    prefill: PrefillWork, decode: DecodeWork, prefill_sms: int, device_sms: int = 32, mode: str = "split"
) -> HybridPoint:
    """One row of hybrid.csv: both phases at once; decode on what prefill leaves, in other modes on the whole device."""
    place = (prefill.tokens, prefill.mean_context, decode.batch, decode.kv_tokens)
    decode_sms = device_sms - prefill_sms if mode == "split" else device_sms
    p_ms = prefill_ms(*place[:2], prefill_sms) * prefill_slowdown(*place)
    d_ms = decode_ms(*place[2:], decode_sms, device_sms) * decode_slowdown(*place)
    return HybridPoint(
        mode=mode,
        prefill_sms=prefill_sms,
        decode_sms=decode_sms,
        **asdict(prefill),
        **asdict(decode),
        prefill_backend="fa3",
        decode_backend="fa2",
        prefill_steps=10,
        **_spread(p_ms, "prefill_"),
        decode_steps=10,
        **_spread(d_ms, "decode_"),
    )


def mixed_point(prefill: PrefillWork, decode: DecodeWork) -> MixedPoint:
    """One row of mixed.csv."""
    place = (prefill.tokens, prefill.mean_context, decode.batch, decode.kv_tokens)
    return MixedPoint(**asdict(prefill), **asdict(decode), backend="fa2", steps=10, **_spread(mixed_ms(*place)))


def prefill_points(sms: Sequence[int]) -> list[PrefillPoint]:
    """Solo prefill by two backends, of which ``fa3`` is the faster everywhere."""
    works = grid(TOKENS, MEAN_CONTEXTS)
    both = (("fa2", 1.5), ("fa3", 1.0))
    return [prefill_point(w, n, backend, factor) for w in works for backend, factor in both for n in sms]


def decode_points(sms: Sequence[int], device_sms: int = 32) -> list[DecodePoint]:
    """Solo decode."""
    return [decode_point(w, n, device_sms) for w in decode_grid(BATCHES, KV_TOKENS) for n in sms]


def hybrid_points(prefill_sms: Sequence[int], device_sms: int = 32, mode: str = "split") -> list[HybridPoint]:
    """Both phases at once, prefill on so many SMs."""
    prefills = grid(HYBRID_TOKENS, HYBRID_CONTEXTS)
    decodes = decode_grid(HYBRID_BATCHES, HYBRID_KV_TOKENS)
    return [hybrid_point(p, d, n, device_sms, mode) for n in prefill_sms for p in prefills for d in decodes]


def mixed_points() -> list[MixedPoint]:
    """Fused batches on the whole device."""
    prefills = grid(MIXED_TOKENS, HYBRID_CONTEXTS)
    decodes = decode_grid(HYBRID_BATCHES, HYBRID_KV_TOKENS)
    return [mixed_point(p, d) for p in prefills for d in decodes]


def write_profile(
    folder: Path,
    device_sms: int = 32,
    step: int = 8,
    *,
    name: str = "synthetic",
    layers: int = 4,
    kv_bytes_per_token: int | None = None,
    device_memory_bytes: int = 4 << 30,
    weights_bytes: int = 0,
    all_modes: bool = False,
    overheads: dict[str, float] | None = None,
) -> Path:
    """Write the profile of a device to ``folder`` and return it; splits are ``step`` SMs apart.

    ``all_modes``: with the other ways of sharing, too: capped at every size, priority, and fused batches.

    ``kv_bytes_per_token`` is 4096 times the layers when not given: the defaults hold about 260,000 KV tokens.
    """
    splits = splits_of(device_sms, step)
    provenance = {**PROVENANCE, "device_sms": device_sms}
    prefill = TableWriter(folder / "prefill.csv", PrefillPoint, provenance)
    for p in prefill_points(partition_counts(device_sms, step)):
        prefill.add(p)
    decode = TableWriter(folder / "decode.csv", DecodePoint, provenance)
    for d in decode_points([*sorted(s.decode_sms for s in splits), device_sms], device_sms):
        decode.add(d)
    hybrid = TableWriter(folder / "hybrid.csv", HybridPoint, provenance)
    for h in hybrid_points([s.prefill_sms for s in splits], device_sms):
        hybrid.add(h)
    if all_modes:
        for h in hybrid_points([s.prefill_sms for s in splits], device_sms, "capped"):
            hybrid.add(h)
        for h in hybrid_points([device_sms], device_sms, "priority"):
            hybrid.add(h)
        mixed = TableWriter(folder / "mixed.csv", MixedPoint, provenance)
        for m in mixed_points():
            mixed.add(m)
    header = {
        "name": name,
        "description": "closed forms, for tests",
        "device": "closed form",
        "device_sms": device_sms,
        "layers": layers,
        "kv_bytes_per_token": 4096 * layers if kv_bytes_per_token is None else kv_bytes_per_token,
        "device_memory_bytes": device_memory_bytes,
        "weights_bytes": weights_bytes,
    }
    if overheads is not None:
        header["overheads"] = overheads
    (folder / "profile.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    return folder
