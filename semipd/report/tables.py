"""Sweeps as tables: measured points in, rich tables out; nothing here prints, measures or reads a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from semipd.points import DecodePoint, HybridPoint, MixedPoint, PrefillPoint, Sharing, TotalPoint
from semipd.report.speedup import FusedGain, Gain, TotalSummary, fused_gains, summarise_totals
from semipd.trace import TraceInfo

STAR = "★"
_MODES = ("streams", "priority", "capped", "split")


def solo_report(points: Sequence[PrefillPoint] | Sequence[DecodePoint], device_sms: int) -> RenderableType:
    """A solo sweep: one table a batch, or for a grid of batches one row each.

    Performance is relative to the fastest backend on the whole device.
    """
    by_batch: dict[str, list[PrefillPoint | DecodePoint]] = {}
    for point in points:
        by_batch.setdefault(_batch(point), []).append(point)
    if len(by_batch) == 1:
        ((batch, own),) = by_batch.items()
        return _solo_table(batch, own, device_sms)
    return _grid_table(by_batch, device_sms)


def _solo_table(batch: str, points: Iterable[PrefillPoint | DecodePoint], device_sms: int) -> Group:
    rows = sorted(points, key=lambda p: (p.sms, p.median_ms))
    whole_ms = min((p.median_ms for p in rows if p.sms == device_sms), default=None)
    table = _table("SMs", "device\n%", "<backend", "median\nms", "p10 - p90\nms", "performance\n%", "")
    for sms, group in groupby(rows, key=lambda p: p.sms):
        for rank, p in enumerate(group):
            table.add_row(
                str(sms) if rank == 0 else "",
                f"{100 * sms / device_sms:.1f}" if rank == 0 else "",
                p.backend,
                _ms(p.median_ms),
                f"{_ms(p.p10_ms)} - {_ms(p.p90_ms)}",
                f"{100 * whole_ms / p.median_ms:.1f}" if whole_ms else "-",
                STAR if rank == 0 else "",
            )
    return _titled(
        f"{batch}, ms of one layer",
        table,
        f"performance: of the fastest on the whole device; {STAR} the fastest backend on these SMs",
    )


def _grid_table(by_batch: dict[str, list[PrefillPoint | DecodePoint]], device_sms: int) -> Group:
    table = _table("<batch", "<backend", "median\nms", "SMs for\nhalf", "SMs for\n90 %")
    for batch, points in by_batch.items():
        whole = min((p for p in points if p.sms == device_sms), key=lambda p: p.median_ms, default=None)
        if whole is None:
            table.add_row(batch, "-", "-", "-", "-")
            continue
        needed = [
            min(p.sms for p in points if whole.median_ms / p.median_ms >= share) for share in (0.5, 0.9)
        ]  # the whole device itself is among them
        table.add_row(batch, whole.backend, _ms(whole.median_ms), *map(str, needed))
    return _titled(
        "The fastest on the whole device, ms of one layer",
        table,
        "SMs for half, 90 %: the fewest measured that reach this share of its performance",
    )


def hybrid_report(contention: Sequence[HybridPoint], totals: Sequence[TotalPoint], device_sms: int) -> RenderableType:
    """A hybrid sweep: both alone, every sharing with its fastest backend, the summary; a grid in one row a mode."""
    if len({(p.tokens, p.mean_context, p.seqs, p.batch, p.kv_tokens) for p in contention}) > 1:
        return _contention_grid(contention)
    summary = summarise_totals(totals)
    parts: list[RenderableType] = []
    if totals:
        parts.append(_in_turn_table(totals))
    parts.append(_sharing_table(contention, totals, summary))
    if summary is not None:
        parts += [_summary_table(summary), _sentences(summary, device_sms)]
    return Group(*parts)


def _in_turn_table(totals: Sequence[TotalPoint]) -> Group:
    rows = sorted((p for p in totals if p.mode == "in-turn"), key=lambda p: p.total_ms)
    table = _table("<backend", "prefill\nms", "decode\nms", "total\nms", "p10 - p90\nms")
    for p in rows:
        spread = f"{_ms(p.total_p10_ms)} - {_ms(p.total_p90_ms)}"
        table.add_row(p.prefill_backend, _ms(p.prefill_ms), _ms(p.total_ms - p.prefill_ms), _ms(p.total_ms), spread)
    work = f"{totals[0].prefill_steps} prefill and {totals[0].decode_steps} decode layers"
    return _titled(f"{work}, each phase alone on the whole device, in turn", table)


def _sharing_table(
    contention: Sequence[HybridPoint], totals: Sequence[TotalPoint], summary: TotalSummary | None
) -> Group:
    """One row a sharing, with the backend of its smallest total; without totals, a row for each backend."""
    table = _table("<sharing", "<backend")
    if totals:
        _columns(table, "prefill\nms", "decode\nms", "total\nms", "x\nsame", "x\nbest")
    if contention:
        _columns(table, "prefill\nbeside", "decode\nbeside")
    if totals:
        _columns(table, "")
    steady = {(_sharing(p), p.prefill_backend): p for p in contention}
    done = _fastest_each([p for p in totals if p.mode != "in-turn"])
    in_turn_ms = {p.prefill_backend: p.total_ms for p in totals if p.mode == "in-turn"}
    cells = {(_sharing(p), p.prefill_backend): p for p in done} if totals else dict.fromkeys(steady)
    for at, backend in sorted(cells, key=lambda cell: (_MODES.index(cell[0].mode), cell[0].prefill_sms, cell[1])):
        total, beside = cells[at, backend], steady.get((at, backend))
        row = [at.name, backend]
        if total is not None:
            row += [_ms(total.prefill_ms), _ms(total.decode_ms), _ms(total.total_ms)]
            row += [_ratio(in_turn_ms.get(backend), total), _ratio(min(in_turn_ms.values(), default=None), total)]
        if contention:
            row += [_ms(beside.prefill_median_ms), _ms(beside.decode_median_ms)] if beside else ["-", "-"]
        if totals:
            row.append(STAR if summary is not None and total == summary.best.best else "")
        table.add_row(*row)
    notes = []
    if totals:
        notes += [
            f"Each sharing with its fastest backend; {STAR} the fastest of all. prefill, decode: when each was done.",
            "x same, x best: speed-up over the same and over the fastest backend in turn.",
        ]
    if contention:
        notes.append("beside: steady state, ms of one layer while the other phase runs throughout.")
    return _titled("Both at once, prefill/decode SMs", table, *notes)


def _summary_table(summary: TotalSummary) -> Group:
    table = _table("<backend", "in turn\nms", "<best\nsharing", "total\nms", "x\nsame", "x\nbest")
    for gain in summary.by_backend:
        p = gain.best
        row = [p.prefill_backend, _ms(gain.same_ms), _sharing(p).name, _ms(p.total_ms)]
        table.add_row(*row, f"{gain.over_same:.2f}", f"{gain.over_fastest:.2f}")
    return _titled("The best sharing of each backend", table)


def _sentences(summary: TotalSummary, device_sms: int) -> Text:
    fastest, best = summary.in_turn[0], summary.best
    lines = [
        f"Baseline: {_ms(fastest.total_ms)} ms in turn with {fastest.prefill_backend}, the fastest in turn"
        + (f"; {_ms(best.same_ms)} ms with {best.best.prefill_backend}." if best.same_ms != best.fastest_ms else "."),
        f"Best: {_described(best, device_sms)}",
    ]
    if summary.best_split is not None and summary.best_split != best:
        lines.append(f"Best split: {_described(summary.best_split, device_sms)}")
    return Text("\n".join(lines))


def _described(gain: Gain, device_sms: int) -> str:
    p = gain.best
    shares = " / ".join(f"{100 * n / device_sms:.0f} %" for n in (p.prefill_sms, p.decode_sms))
    same = "" if gain.same_ms == gain.fastest_ms else f", {gain.over_same:.2f}x of the same backend in turn"
    return (
        f"{_sharing(p).name} with {p.prefill_backend} (shares {shares}): {_ms(p.total_ms)} ms, "
        f"{gain.over_fastest:.2f}x of the fastest in turn ({gain.gain_percent:+.1f} %){same}."
    )


def _contention_grid(points: Sequence[HybridPoint]) -> Group:
    table = _table("<mode", "sharings", "prefill\nbatches", "decode\nbatches", "points")
    for mode in _MODES:
        own = [p for p in points if p.mode == mode]
        if own:
            counts = (
                len({p.prefill_sms for p in own}),
                len({(p.tokens, p.mean_context, p.seqs) for p in own}),
                len({(p.batch, p.kv_tokens) for p in own}),
                len(own),
            )
            table.add_row(mode, *map(str, counts))
    return _titled("Measured: each phase's layer time while the other runs throughout", table)


def mixed_report(
    fused: Sequence[MixedPoint], prefills: Sequence[PrefillPoint], decodes: Sequence[DecodePoint], device_sms: int
) -> RenderableType:
    """A sweep of fused batches: one table a decode batch, beside both parts in turn; before any, the parts."""
    gains = fused_gains(fused, prefills, decodes)
    if not gains:
        return Group(*(solo_report(points, device_sms) for points in (prefills, decodes) if points))
    by_decode = groupby(gains, key=lambda gain: (gain.fused.batch, gain.fused.kv_tokens))
    return Group(*(_fused_table(list(own)) for _, own in by_decode))


def _fused_table(gains: Sequence[FusedGain]) -> Group:
    best = max(gains, key=lambda gain: gain.over_fastest)
    table = _table(
        "<chunk", "<backend", "prefill\nms", "in turn\nms", "fused\nms", "spread\n%", "x\nsame", "x\nbest", ""
    )
    for gain in gains:
        p = gain.fused
        row = [_prompts(p), p.backend, _ms(gain.prefill_ms), _ms(gain.in_turn_ms), _ms(p.median_ms)]
        row += [f"{100 * (p.p90_ms - p.p10_ms) / p.median_ms:.1f}", f"{gain.over_same:.2f}", f"{gain.over_fastest:.2f}"]
        table.add_row(*row, STAR if gain is best else "")
    first = gains[0].fused
    return _titled(
        f"Chunks fused with decode {first.batch} x {first.kv_tokens / first.batch:.0f}, ms of one layer, whole device",
        table,
        f"in turn: prefill of the chunk alone, then decode alone ({_ms(gains[0].decode_ms)} ms).",
        "x same, x best: speed-up over that, and over it with the fastest backend;",
        f"{STAR} the most over the fastest.",
    )


def _fastest_each(points: Sequence[TotalPoint]) -> list[TotalPoint]:
    """The smallest total of each sharing."""
    best: dict[Sharing, TotalPoint] = {}
    for p in sorted(points, key=lambda p: p.total_ms):
        best.setdefault(_sharing(p), p)
    return list(best.values())


def _sharing(point: TotalPoint | HybridPoint) -> Sharing:
    return Sharing(point.mode, point.prefill_sms, point.decode_sms)


def _batch(point: PrefillPoint | DecodePoint) -> str:
    if isinstance(point, DecodePoint):
        return f"decode {point.batch} x {point.kv_tokens / point.batch:.0f}"
    return f"prefill {_prompts(point)}"


def _prompts(point: PrefillPoint | MixedPoint) -> str:
    after = f" after {point.seq_context}" if point.seq_context else ""
    return f"{point.seqs} x {point.seq_tokens}{after}"


def _ms(value: float) -> str:
    """Three significant digits or more, never an exponent."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _ratio(baseline_ms: float | None, point: TotalPoint) -> str:
    return "-" if baseline_ms is None else f"{baseline_ms / point.total_ms:.2f}"


def _table(*columns: str) -> Table:
    """A table that stays plain text when piped, and narrow."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    _columns(table, *columns)
    return table


def _titled(title: str, table: Table, *notes: str) -> Group:
    """A table under its title, with a line for each note and an empty one; not wrapped to the table's width."""
    return Group(Text(title, style="bold"), table, *map(Text, notes), Text())


def _columns(table: Table, *names: str) -> None:
    """Add columns, right-aligned unless the name begins with ``<``."""
    for name in names:
        table.add_column(name.removeprefix("<"), justify="left" if name.startswith("<") else "right", overflow="fold")


def trace_report(info: TraceInfo) -> RenderableType:
    """What a trace looks like in numbers (docs/traces.md has the definitions)."""
    dropped = "".join(f", {n} dropped ({reason})" for reason, n in info.dropped.items())
    rows = [
        ("requests", f"{info.requests}{dropped}"),
        ("duration", f"{info.duration_s:.1f} s"),
        ("rate", "-" if info.rate_rps is None else f"{info.rate_rps:.3g} requests/s"),
    ]
    numbers = {
        "CV of the gaps": info.interarrival_cv,
        "dispersion, 1 s bins": info.dispersion_1s,
        "dispersion, 10 s bins": info.dispersion_10s,
        "dispersion, 60 s bins": info.dispersion_60s,
        "prefix share": info.prefix_share,
    }
    rows += [(name, "-" if value is None else f"{value:.3g}") for name, value in numbers.items()]
    lengths = _table("<tokens", "mean", "p50", "p90", "p99")
    for name, tokens in (("prompt", info.prompt_tokens), ("output", info.output_tokens)):
        lengths.add_row(name, *(f"{n:.0f}" for n in (tokens.mean, tokens.p50, tokens.p90, tokens.p99)))
    return Group(plain_table(f"{info.name} ({info.source_format})", rows), lengths)


def plain_table(title: str, rows: Sequence[tuple[str, str]]) -> Group:
    """Names and what is said of them, long texts folded between words."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return _titled(title, table)
