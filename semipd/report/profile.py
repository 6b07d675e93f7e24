"""A profile at one load as rich tables for the terminal; the sentences are those of the HTML page too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite, log

from rich import box
from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from semipd.frontier import IN_TURN, Optimum, Stretch
from semipd.prices import Beside, Shared, Source, Time
from semipd.report.tables import plain_table
from semipd.survey import Extent, Survey

MARKS = {Source.MEASURED: "", Source.INTERPOLATED: "~", Source.OUTSIDE: "!"}
"""In front of every value."""

MARKS_NOTE = (
    "Times and rates without a mark were measured, or computed from measured ones. ~ interpolated between measured "
    "points. ! outside the measured grid: taken from its edge, so too cheap above it."
)

TAKE = "★"


def profile_report(found: Survey) -> RenderableType:
    """Facts, scaling, heat maps, the frontier and what to take."""
    return Group(
        _facts(found),
        _scaling(found),
        _heat(found, "Prefill, ms of one layer while decode runs", lambda s: s.prefill.beside),
        _heat(found, "Decode, ms of a step of all layers while prefill runs", lambda s: s.decode.beside),
        _frontier(found),
        Text("\n".join([*frontier_notes(found), *optimum_notes(found), *warnings(found)])),
    )


def facts(found: Survey) -> Iterator[tuple[str, str]]:
    """What the profile is, how it was measured, how far its grid reaches: names and what is said of them."""
    profile = found.profile
    yield "device", f"{profile.device}, {profile.device_sms} SMs"
    yield "what", profile.description
    yield "layers", f"{profile.layers}; tables hold one layer, decode steps here are of all"
    yield "KV cache", f"{found.kv_capacity_tokens:,} tokens at most, {profile.kv_bytes_per_token:,} bytes each"
    for name, source in found.provenance.items():
        seen = ((label, source.get(key)) for label, key in _VERSIONS)
        versions = ", ".join(f"{label}{value}" for label, value in seen if value is not None)
        yield f"{name}.csv", f"{_rows(found.extents[name])} {versions}".strip()
        yield "", str(source.get("command", "command unknown"))
        resumed = source.get("resumed")
        if isinstance(resumed, list) and resumed:
            times = "once" if len(resumed) == 1 else f"{len(resumed)} times"
            yield "", f"resumed {times}; the commands are in {name}.json beside the table"


_VERSIONS = (
    ("", "date"), ("", "gpu"), ("driver ", "driver_version"), ("CUDA ", "cuda"), ("torch ", "torch"),
    ("flashinfer ", "flashinfer"), ("commit ", "commit"),
)  # fmt: skip


def _rows(extent: Extent) -> str:
    axes = "; ".join(f"{name.replace('_', ' ')} {_axis(values)}" for name, values in extent.values.items())
    spread = f"p10 to p90 is {100 * extent.spread_median:.1f} % of the median ({100 * extent.spread_p95:.1f} % at the"
    return f"{extent.rows:,} points: {axes}. {spread} 95th percentile)."


def _axis(values: Sequence[int | str]) -> str:
    """All of a few values, first and last of many."""
    if len(values) <= 7:
        return ", ".join(count(v) if isinstance(v, int) else v for v in values)
    return f"{values[0]} to {values[-1]} ({len(values)} values)"


def load_notes(found: Survey) -> list[str]:
    """Which load is shown, and which measured one is nearest."""
    place, nearest = found.place, found.nearest
    lines = [
        f"Load: prefill of {place.tokens:,} tokens with a mean context of {place.mean_context:,}, beside decode of "
        f"{place.batch:,} sequences with {place.kv_tokens:,} cached tokens in all."
    ]
    if place == nearest:
        lines.append("Both phases were measured together at this very load.")
    else:
        lines.append(
            f"Not a measured load of both phases; the nearest is --tokens {nearest.tokens} --context "
            f"{nearest.mean_context} --batch {nearest.batch} --kv-tokens {nearest.kv_tokens}."
        )
    if place.kv_tokens > found.kv_capacity_tokens:
        lines.append(f"The KV cache of this device holds only {found.kv_capacity_tokens:,} tokens.")
    return lines


def frontier_notes(found: Survey) -> list[str]:
    """How to read the frontier, and what is not in it."""
    line = found.in_turn
    mark = MARKS[found.in_turn_source]
    step, prefill = f"{mark}{number(line.step_s * 1e3)}", f"{mark}{rate(line.prefill_tps)}"
    notes = [
        f"In turn, computed from both phases alone on the whole device (decode {step} ms a step, prefill {prefill} "
        f"tokens/s): with a share f of the time for prefill, decode steps take {step} / (1 - f) ms on average and "
        f"prefill makes f x {prefill} tokens/s; switching is taken to cost nothing.",
        "in turn: its prefill tokens/s with decode equally fast; gain: how many times that this is. work: the rates of "
        "both phases as shares of the whole device's alone, summed; in turn has 1. spread: p90 - p10 of the measured "
        "steps, of the phase where it is larger; a gain within it may be none. best for: the TPOT limits for which "
        "nothing has more prefill. worse than (<): what has no slower decode and no less prefill.",
        f"In turn is best for TPOT limits (ms): {_stretches(found.best_where) or 'none'}.",
    ]
    if any(point.chunk_tokens for point in found.points):
        start_ms = found.profile.overheads.mixed_start_ms
        prompts = f"N - {found.place.batch} of them of prompts; each is a decode step"
        starts = f" Starting one takes {number(start_ms)} ms, left out as all starts are here." if start_ms else ""
        notes.append(f"chunked-N: fused steps of N tokens on the whole device, {prompts}.{starts}")
    if found.missing_modes:
        notes.append(f"Not measured in this profile: {', '.join(found.missing_modes)}.")
    notes += [f"{name} is not shown: {why}." for name, why in found.refused.items()]
    return notes


def optimum_notes(found: Survey) -> list[str]:
    """What to take at this load."""
    most = found.most_work
    gain = found.in_turn.weighted_speedup(most)
    lines = [
        f"Most work of both phases: {most.name}, {gain:.3f} of what in turn does."
        if gain > 1
        else f"No way of sharing does more work than in turn ({most.name} is next, {gain:.3f})."
    ]
    if found.optimum is None:
        return [*lines, "With --tpot-ms X: what has the most prefill throughput within that decode step time."]
    return [*lines, *_optimum(found, found.optimum)]


def _optimum(found: Survey, best: Optimum) -> list[str]:
    start = f"{TAKE} TPOT {number(best.tpot_s * 1e3)} ms"
    mark = MARKS[found.in_turn_source]
    at_limit = f"{mark}{rate(best.in_turn_tps)}"
    if best.take is None:
        alone = f"{mark}{number(found.in_turn.step_s * 1e3)}"
        return [f"{start}: nothing is as fast; decode alone on the whole device takes {alone} ms a step."]
    point = best.best
    if point is None:
        return [f"{start}: only in turn meets it, with {at_limit} prefill tokens/s."]
    own = MARKS[point.source]
    ratio = found.in_turn.gain(point)
    gain = (
        "in turn is never that fast"
        if ratio is None
        else f"{ratio:.2f} times what in turn makes with decode equally fast ({mark}{rate(best.equal_tps)})"
    )
    text = (
        f"{point.name} has the most prefill of those that meet it: {own}{rate(point.prefill_tps)} tokens/s with decode "
        f"at {own}{number(point.step_s * 1e3)} ms a step, {gain}"
    )
    if best.take == IN_TURN:
        return [f"{start}: take in turn, {at_limit} prefill tokens/s. Of the others, {text}."]
    return [f"{start}: {text}; in turn at the limit itself: {at_limit}."]


def warnings(found: Survey) -> list[str]:
    """Why not to decide by these values."""
    if found.source is not Source.OUTSIDE:
        return []
    return ["Warning: some values at this load are outside the measured grid (marked !): do not decide by them."]


def stretch_of(name: str, stretches: Sequence[Stretch]) -> str:
    """TPOT limits in ms for which a point is best; empty for none."""
    return next((_stretch(s) for s in stretches if s.best == name), "")


def _stretches(stretches: Sequence[Stretch]) -> str:
    shown = (s for s in stretches if s.best == IN_TURN and number(s.from_s * 1e3) != number(s.to_s * 1e3))
    return ", ".join(_stretch(s) for s in shown)


def _stretch(stretch: Stretch) -> str:
    if not isfinite(stretch.to_s):
        return f"above {number(stretch.from_s * 1e3)}"
    return f"{number(stretch.from_s * 1e3)} - {number(stretch.to_s * 1e3)}"


def number(value: float) -> str:
    """Four significant digits from one on, never an exponent."""
    digits = 3 if value < 10 else 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:.{digits}f}"


def rate(value: float) -> str:
    """Tokens per second, in thousands from 10,000."""
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1e3:,.1f}k"


def count(value: int) -> str:
    """A number of tokens in few characters: 524288 is 512Ki; only where that is exact."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value // 1024}Ki"
    return str(value)


def timed(time: Time) -> str:
    """Milliseconds under the mark of their source."""
    return MARKS[time.source] + number(time.seconds * 1e3)


def slower(side: Beside) -> str:
    """The slowdown under the mark of its source."""
    return f"{MARKS[side.slowdown_source]}{side.slowdown:.2f}"


def _facts(found: Survey) -> Group:
    lines = [*load_notes(found), MARKS_NOTE, ""]
    return Group(plain_table(found.profile.name, list(facts(found))), Text("\n".join(lines)))


def _scaling(found: Survey) -> Group:
    """Both phases on the partitions of each way of sharing; the whole device alone below."""
    each = ("device\n%", "\nbeside", "\nslower")
    table = _table("<prefill/decode\nSMs", "prefill\nalone", *each, "decode\nalone", *each)
    whole = found.profile.device_sms
    prefill, decode = found.prefill_alone[whole], found.decode_alone[whole]
    for s in found.shared:
        row = [s.sharing.name]
        for side, full in ((s.prefill, prefill), (s.decode, decode)):
            share = f"{100 * full.seconds / side.alone.seconds:.0f}"
            row += [timed(side.alone), share, timed(side.beside), slower(side)]
        table.add_row(*row)
    table.add_row(f"whole: {whole}", timed(prefill), "100", "", "", timed(decode), "100")
    return Group(
        Text("Scaling: prefill, ms of one layer; decode, ms of a step of all layers", style="bold"),
        table,
        Text(
            "device %: speed alone, of that on the whole device. beside: while the other phase runs throughout. "
            "slower: beside over alone.\n"
        ),
    )


def _heat(found: Survey, title: str, time: Callable[[Shared], Time]) -> Group:
    table = _table("<prefill/decode\nSMs")
    for d in found.heat.decodes:
        table.add_column(f"{d.batch} x\n{count(d.kv_tokens)}", justify="right", overflow="fold")
    seconds = [time(s).seconds for row in found.heat.rows for s in row]
    for row in found.heat.rows:
        cells = [Text(timed(time(s)), shade(time(s).seconds, min(seconds), max(seconds))) for s in row]
        table.add_row(row[0].sharing.name, *cells)
    place = found.place
    prefill = f"{place.tokens:,} tokens, mean context {place.mean_context:,}"
    notes = [f"Columns: decode batch x KV tokens in all. Prefill: {prefill}."]
    if found.heat.left_out:
        notes.append(f"{found.heat.left_out} measured decode batches are left out here.")
    return Group(Text(title, style="bold"), table, Text(" ".join(notes) + "\n"))


def shade(value: float, low: float, high: float) -> Style:
    """Cell colours from light (low) to dark red (high), linear in the logarithm."""
    share = log(value / low) / log(high / low) if high > low else 0.0
    light, dark = (255, 245, 235), (127, 39, 4)  # the ends of ColorBrewer's Oranges
    background = Color.from_rgb(*(a + (b - a) * share for a, b in zip(light, dark, strict=True)))
    return Style(color="black" if share < 0.6 else "white", bgcolor=background.name)


def _frontier(found: Survey) -> Group:
    columns = ("decode\nms", "prefill\ntok/s", "in turn\ntok/s", "\ngain", "\nwork", "spread\n%", "<best for\nTPOT ms")
    table = _table("<sharing", *columns)
    take = found.optimum.take if found.optimum else None
    for point in found.points:
        name, mark = point.name, MARKS[point.source]
        ratio = found.in_turn.gain(point)
        table.add_row(
            f"{name} {TAKE}" if name == take else name,
            mark + number(point.step_s * 1e3),
            mark + rate(point.prefill_tps),
            MARKS[found.in_turn_source] + rate(found.in_turn.tps_at(point.step_s)),
            "-" if ratio is None else f"{ratio:.2f}",
            f"{found.in_turn.weighted_speedup(point):.3f}",
            "-" if point.spread is None else f"{100 * point.spread:.1f}",
            f"< {better}" if (better := found.dominated.get(name)) else stretch_of(name, found.best_where),
        )
    return Group(Text("The frontier: decode step against prefill throughput", style="bold"), table)


def _table(*columns: str) -> Table:
    """A table that stays plain text when piped; columns are right-aligned unless their name begins with ``<``."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name.removeprefix("<"), justify="left" if name.startswith("<") else "right", overflow="fold")
    return table
