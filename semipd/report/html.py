"""A profile at one load as one HTML page: its plots are in it as SVG, and it loads nothing."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from semipd.prices import Shared, Source, Time
from semipd.report.profile import (
    MARKS,
    MARKS_NOTE,
    TAKE,
    count,
    facts,
    frontier_notes,
    load_notes,
    number,
    optimum_notes,
    rate,
    slower,
    stretch_of,
    timed,
    warnings,
)
from semipd.survey import Survey

PREFILL, DECODE, IN_TURN = "tab:blue", "tab:orange", "0.45"

_MODE_MARKS = {"split": "o", "capped": "s", "priority": "^", "streams": "D", "mixed": "P"}

_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { max-width: 100%; height: auto; display: block }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { padding: .15rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd }
td { white-space: nowrap } .facts td { white-space: normal }
th { vertical-align: bottom; font-weight: 600 }
th:first-child, td:first-child, .facts td { text-align: left }
.take { background: #fff1cc } .dominated { color: #777 }
.warning { background: #fde8e8; border-left: 4px solid #c0392b; padding: .5rem .8rem }
.note { color: #555 }
"""


def profile_page(found: Survey) -> str:
    """The page. Equal surveys give equal bytes with one version of matplotlib."""
    name = escape(found.profile.name)
    parts = [
        f"<h1>{name}</h1>",
        *(f'<p class="warning">{escape(line)}</p>' for line in warnings(found)),
        _paragraphs(load_notes(found)),
        _paragraphs([MARKS_NOTE], "note"),
        "<h2>What to take</h2>",
        _paragraphs(optimum_notes(found)),
        "<h2>The frontier: decode step against prefill throughput</h2>",
        _image(_frontier_plot(found), "Decode step time against prefill tokens per second of every way of sharing"),
        _frontier_table(found),
        _paragraphs(frontier_notes(found), "note"),
        "<h2>Scaling: each phase on its SMs, alone and beside the other</h2>",
        _image(_scaling_plot(found), "Prefill layer time and decode step time over SMs"),
        _scaling_table(found),
        "<h2>Splits and decode batches</h2>",
        _image(_heat_plot(found), "Heat maps of prefill and decode time and slowdown over splits and decode batches"),
        _paragraphs(_heat_notes(found), "note"),
        "<h2>The profile</h2>",
        _table((), [((label, text), "") for label, text in facts(found)], "facts"),
        f"<details><summary>Provenance of the tables</summary><pre>{escape(_json(found.provenance))}</pre></details>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{name}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, indent=1, sort_keys=True)


def _paragraphs(lines: Iterable[str], kind: str = "") -> str:
    return "\n".join(f'<p class="{kind}">{escape(line)}</p>' if kind else f"<p>{escape(line)}</p>" for line in lines)


def _table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], str]], kind: str = "") -> str:
    """A table; each row with its class."""
    top = f"<thead><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr></thead>" if head else ""
    body = "\n".join(
        f'<tr class="{escape(own)}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>' for cells, own in rows
    )
    return f'<div class="scroll"><table class="{kind}">{top}\n<tbody>\n{body}\n</tbody></table></div>'


def _image(figure: Figure, what: str) -> str:
    """A figure as SVG in a data URI: so its ids clash with those of no other figure."""
    svg = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "semipd"}):  # the same bytes every time
        figure.savefig(svg, format="svg", metadata={"Date": None})
    data = base64.b64encode(svg.getvalue()).decode("ascii")
    return f'<img alt="{escape(what)}" src="data:image/svg+xml;base64,{data}">'


def _frontier_table(found: Survey) -> str:
    take = found.optimum.take if found.optimum else None
    head = (
        "sharing", "decode step, ms", "prefill, tokens/s", "in turn, tokens/s", "gain", "work", "spread, %",
        "best for TPOT, ms", "worse than",
    )  # fmt: skip
    rows = []
    for point in found.points:
        gain, by = found.in_turn.gain(point), found.dominated.get(point.name, "")
        cells = (
            f"{point.name} {TAKE}" if point.name == take else point.name,
            MARKS[point.source] + number(point.step_s * 1e3),
            MARKS[point.source] + rate(point.prefill_tps),
            MARKS[found.in_turn_source] + rate(found.in_turn.tps_at(point.step_s)),
            "-" if gain is None else f"{gain:.2f}",
            f"{found.in_turn.weighted_speedup(point):.3f}",
            "-" if point.spread is None else f"{100 * point.spread:.1f}",
            stretch_of(point.name, found.best_where),
            by,
        )
        rows.append((cells, "take" if point.name == take else "dominated" if by else ""))
    return _table(head, rows)


def _scaling_table(found: Survey) -> str:
    head = (
        "prefill/decode SMs", "prefill layer alone, ms", "beside decode, ms", "times slower", "decode step alone, ms",
        "beside prefill, ms", "times slower",
    )  # fmt: skip
    rows = [
        (
            s.sharing.name,
            timed(s.prefill.alone), timed(s.prefill.beside), slower(s.prefill),
            timed(s.decode.alone), timed(s.decode.beside), slower(s.decode),
        )
        for s in found.shared
    ]  # fmt: skip
    whole = found.profile.device_sms
    rows.append(
        (f"whole: {whole}", timed(found.prefill_alone[whole]), "", "", timed(found.decode_alone[whole]), "", "")
    )
    return _table(head, [(row, "") for row in rows])


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _dots(axes: Any, xs: Sequence[float], ys: Sequence[float], sources: Sequence[Source], **style: Any) -> None:
    """Marks that say where a value is from: filled measured, hollow interpolated, a cross outside the grid."""
    for x, y, source in zip(xs, ys, sources, strict=True):
        own = dict(style, marker="x") if source is Source.OUTSIDE else dict(style)
        if source is Source.INTERPOLATED:
            own["markerfacecolor"] = "white"
        axes.plot([x], [y], linestyle="none", **own)


def _source_legend(axes: Any, sources: Iterable[Source]) -> None:
    """What the marks mean, of those that occur; under the curves' own legend."""
    marks = {"measured": ("o", "0.3"), "interpolated": ("o", "white"), "outside the grid": ("x", "0.3")}
    found = set(sources)
    for (label, (mark, face)), source in zip(marks.items(), Source, strict=True):
        if source in found:
            axes.plot([], [], mark, color="0.3", markerfacecolor=face, markersize=5, linestyle="none", label=label)


def _plain_ticks(axis: Any) -> None:
    """Plain numbers, several a decade, on a logarithmic axis."""
    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _scaling_plot(found: Survey) -> Figure:
    figure = _figure(11, 4.2)
    left, right = figure.subplots(1, 2)
    sides: tuple[tuple[Any, str, str, str, Mapping[int, Time], Callable[[Shared], tuple[int, Time]]], ...] = (
        (
            left, "prefill", "decode", PREFILL, found.prefill_alone,
            lambda s: (s.sharing.prefill_sms, s.prefill.beside),
        ),
        (
            right, "decode", "prefill", DECODE, found.decode_alone,
            lambda s: (s.sharing.decode_sms, s.decode.beside),
        ),
    )  # fmt: skip
    for axes, phase, other, colour, alone, beside in sides:
        times = list(alone.values())
        axes.plot(list(alone), [t.seconds * 1e3 for t in times], "--", color=colour, label=f"{phase} alone")
        _dots(axes, list(alone), [t.seconds * 1e3 for t in times], [t.source for t in times], marker="o",
              color=colour, markersize=3)  # fmt: skip
        sources = [t.source for t in times]
        for mode in dict.fromkeys(s.sharing.mode for s in found.shared):
            rows = sorted((beside(s) for s in found.shared if s.sharing.mode == mode), key=lambda row: row[0])
            sms, ms = [n for n, _ in rows], [t.seconds * 1e3 for _, t in rows]
            own = [t.source for _, t in rows]
            line = "-" if mode == "split" else "none"
            axes.plot(sms, ms, linestyle=line, color=colour)
            axes.plot([], [], _MODE_MARKS[mode] + ("-" if mode == "split" else ""), color=colour, markersize=5,
                      label=f"{phase} beside {other}, {mode}")  # fmt: skip
            _dots(axes, sms, ms, own, marker=_MODE_MARKS[mode], color=colour, markersize=5)
            sources += own
        _source_legend(axes, sources)
        what = "prefill, ms of one layer" if phase == "prefill" else "decode, ms of a step of all layers"
        axes.set(xlabel=f"SMs of {phase}", ylabel=what, yscale="log")
        _plain_ticks(axes.yaxis)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def _frontier_plot(found: Survey) -> Figure:
    figure = _figure(11, 5.5)
    axes = figure.subplots()
    line = found.in_turn
    slowest = max(1.15 * max(p.step_s for p in found.points), 2 * line.step_s)
    steps = [line.step_s * (slowest / line.step_s) ** (i / 200) for i in range(201)]
    axes.plot([s * 1e3 for s in steps], [line.tps_at(s) / 1e3 for s in steps], "--", color=IN_TURN,
              label="in turn, computed from the phases alone")  # fmt: skip
    best = _envelope(found, slowest)
    axes.plot([x * 1e3 for x, _ in best], [y / 1e3 for _, y in best], color="tab:green", alpha=0.35, linewidth=4,
              label="most prefill within a TPOT limit")  # fmt: skip
    take = found.optimum.take if found.optimum else None
    for mode in dict.fromkeys(point.sharing.mode for point in found.points):
        axes.plot([], [], _MODE_MARKS[mode], color=PREFILL, label="fused chunks" if mode == "mixed" else mode)
    for point in found.points:
        worse = point.name in found.dominated
        colour = "0.65" if worse else PREFILL
        x, y = point.step_s * 1e3, point.prefill_tps / 1e3
        _dots(axes, [x], [y], [point.source], marker=_MODE_MARKS[point.sharing.mode], color=colour, markersize=6)
        axes.annotate(
            point.name, (x, y), xytext=(-5, 4), textcoords="offset points", fontsize=8, ha="right", color=colour
        )
        if point.name == take:
            axes.plot([x], [y], marker="*", markersize=18, color="gold", markeredgecolor="black", linestyle="none",
                      zorder=1, label="best within the TPOT target")  # fmt: skip
    if found.dominated:
        axes.plot([], [], "o", color="0.65", label="worse than another")
    _source_legend(axes, (point.source for point in found.points))
    if found.optimum is not None:
        x = found.optimum.tpot_s * 1e3
        axes.axvline(x, color="tab:red", linewidth=1, label=f"TPOT target {number(x)} ms")
    axes.set(xlabel="decode step, ms (all layers)", ylabel="prefill, thousand tokens/s", xscale="log")
    _plain_ticks(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    return figure


def _envelope(found: Survey, slowest: float) -> list[tuple[float, float]]:
    """The most prefill tokens/s within each decode step time up to ``slowest``, as a line of enough corners."""
    corners: list[tuple[float, float]] = []
    names = {point.name for point in found.points}
    for stretch in (s for s in found.best_where if s.from_s < slowest):
        end = min(stretch.to_s, slowest)
        for i in range(21):
            step_s = stretch.from_s + (end - stretch.from_s) * i / 20
            tps = stretch.prefill_tps if stretch.best in names else found.in_turn.tps_at(step_s)
            corners.append((step_s, tps))
    return corners


def _heat_plot(found: Survey) -> Figure:
    heat = found.heat
    figure = _figure(max(11.0, 1.4 * len(heat.decodes)), 2 * (1.2 + 0.24 * len(heat.rows)))
    panels: tuple[tuple[str, Callable[[Shared], float], Callable[[Shared], str]], ...] = (
        (
            "prefill, ms of one layer beside decode",
            lambda s: s.prefill.beside.seconds,
            lambda s: timed(s.prefill.beside),
        ),
        ("decode, ms of a step beside prefill", lambda s: s.decode.beside.seconds, lambda s: timed(s.decode.beside)),
        ("prefill, times slower than alone", lambda s: s.prefill.slowdown, lambda s: slower(s.prefill)),
        ("decode, times slower than alone", lambda s: s.decode.slowdown, lambda s: slower(s.decode)),
    )
    for axes, (title, value, text) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = [[value(s) for s in row] for row in heat.rows]
        low, high = min(map(min, values)), max(map(max, values))
        norm = LogNorm(low, high if high > low else low * 1.01)
        axes.imshow(values, cmap="Oranges", norm=norm, aspect="auto")
        for y, row in enumerate(heat.rows):
            for x, s in enumerate(row):
                colour = "white" if norm(value(s)) > 0.6 else "black"
                axes.text(x, y, text(s), ha="center", va="center", fontsize=7, color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(heat.decodes)), [f"{d.batch} x\n{count(d.kv_tokens)}" for d in heat.decodes],
                        fontsize=7)  # fmt: skip
        axes.set_yticks(range(len(heat.rows)), [row[0].sharing.name for row in heat.rows], fontsize=7)
        axes.set_xlabel("decode batch x KV tokens in all", fontsize=8)
        axes.set_ylabel("prefill/decode SMs", fontsize=8)
    return figure


def _heat_notes(found: Survey) -> list[str]:
    place = found.place
    notes = [
        f"Every column is a decode batch of the hybrid table; prefill: {place.tokens:,} tokens, mean context "
        f"{place.mean_context:,}. Colours are logarithmic, from the least to the most of each map."
    ]
    if found.heat.left_out:
        notes.append(f"{found.heat.left_out} measured decode batches are left out here.")
    return notes
