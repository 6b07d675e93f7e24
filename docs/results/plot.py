"""Draws the figures of this folder from the tables of the shipped profile (pip install 'semipd[plot]')."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from semipd.points import TotalPoint
from semipd.profile import load_profile
from semipd.table_files import read_table

HERE = Path(__file__).parent
TOKENS, CONTEXT, BATCH, KV_TOKENS = 2048, 2048, 256, 524_288


def contention(name: str) -> None:
    """Both phases over the split, alone and while the other runs throughout: measured points only."""
    profile = load_profile(name)
    place = (TOKENS, CONTEXT, BATCH, KV_TOKENS)
    rows = [p for p in profile.hybrid.points if (p.tokens, p.mean_context, p.batch, p.kv_tokens) == place]
    rows.sort(key=lambda p: p.prefill_sms)
    prefill: dict[int, float] = {}
    for p in profile.prefill.points:
        if (p.tokens, p.mean_context) == place[:2]:
            prefill[p.sms] = min(p.median_ms, prefill.get(p.sms, p.median_ms))
    decode = {d.sms: d.median_ms for d in profile.decode.points if (d.batch, d.kv_tokens) == place[2:]}
    sms = [p.prefill_sms for p in rows]
    alone = [prefill[p.prefill_sms] for p in rows], [decode[p.decode_sms] for p in rows]
    together = [p.prefill_median_ms for p in rows], [p.decode_median_ms for p in rows]

    mpl.rcParams["svg.hashsalt"] = "semipd"  # the same bytes every time
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    styles = (("prefill", "decode", "tab:blue", "o"), ("decode", "prefill", "tab:orange", "s"))
    for (phase, other, colour, mark), solo, both in zip(styles, alone, together, strict=True):
        left.plot(sms, solo, mark + "--", color=colour, markersize=4, label=f"{phase} alone")
        left.plot(sms, both, mark + "-", color=colour, markersize=4, label=f"{phase} beside {other}")
        slower = [b / s for b, s in zip(both, solo, strict=True)]
        right.plot(sms, slower, mark + "-", color=colour, markersize=4, label=phase)
    left.set(xlabel="prefill SMs (decode has the others)", ylabel="ms of one layer", yscale="log")
    right.set(xlabel="prefill SMs (decode has the others)", ylabel="times slower than alone")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{profile.device}: prefill of {TOKENS:,} tokens (mean context {CONTEXT:,}), "
        f"decode of {BATCH} sequences ({KV_TOKENS:,} cached tokens)",
        fontsize=10,
    )
    figure.savefig(HERE / "h200-gqa-contention.svg", metadata={"Date": None})


def fixed_work(folder: Path) -> None:
    """10 prefill and 100 decode layers started together: how much faster than the fastest backend in turn."""
    points = read_table(folder / "total.csv", TotalPoint).points
    in_turn = min(p.total_ms for p in points if p.mode == "in-turn")
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for backend, colour in (("fa3-sized", "tab:blue"), ("fa3", "tab:orange"), ("fa2", "tab:green")):
        for mode, style in (("split", "o-"), ("capped", "^:")):
            rows = sorted((p.prefill_sms, p.total_ms) for p in points if (p.mode, p.prefill_backend) == (mode, backend))
            sms, speed_up = [n for n, _ in rows], [in_turn / ms for _, ms in rows]
            axes.plot(sms, speed_up, style, color=colour, markersize=4, label=f"{backend}, {mode}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xlabel="prefill SMs", ylabel="times faster than in turn", title="Fixed work, against the fastest in turn")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(HERE / "h200-gqa-fixed-work.svg", metadata={"Date": None})


if __name__ == "__main__":
    contention("h200/gqa-64-8-128")
    fixed_work(load_profile("h200/gqa-64-8-128").folder / "sweeps")
