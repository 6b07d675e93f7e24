"""Tables of fixed points: the numbers in them, and that they fit a terminal."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from semipd.points import DecodePoint, HybridPoint, MixedPoint, PrefillPoint, TotalPoint
from semipd.report.speedup import fused_gains, summarise_totals
from semipd.report.tables import STAR, hybrid_report, mixed_report, solo_report, trace_report
from semipd.trace import info, read_trace, shipped

# Of one H200: fixed work of 10 prefill (4 x 4096) and 100 decode (128 x 4096) layers.
TOTALS = [
    TotalPoint("in-turn", 132, 132, "fa2", "fa2", 10, 100, 10, 28.5, 78.4, 78.4, 78.1, 78.9),
    TotalPoint("in-turn", 132, 132, "fa3", "fa2", 10, 100, 10, 17.0, 67.1, 67.1, 66.9, 67.4),
    TotalPoint("split", 64, 68, "fa2", "fa2", 10, 100, 10, 61.0, 66.6, 66.6, 66.5, 66.9),
    TotalPoint("split", 56, 76, "fa3", "fa2", 10, 100, 10, 58.0, 64.7, 64.7, 64.5, 64.9),
    TotalPoint("split", 64, 68, "fa3", "fa2", 10, 100, 10, 57.0, 67.5, 67.5, 67.1, 67.9),
    TotalPoint("capped", 80, 132, "fa3", "fa2", 10, 100, 10, 41.0, 61.5, 61.5, 61.4, 61.9),
    TotalPoint("streams", 132, 132, "fa3", "fa2", 10, 100, 10, 20.0, 66.8, 66.8, 66.6, 66.9),
]


def steady(total: TotalPoint, prefill_ms: float, decode_ms: float) -> HybridPoint:
    place = (total.mode, total.prefill_sms, total.decode_sms, 16384, 2048, 4, 4096, 0, 128, 524288)
    spread = (10, prefill_ms, prefill_ms, prefill_ms, 10, decode_ms, decode_ms, decode_ms)
    return HybridPoint(*place, total.prefill_backend, "fa2", *spread)


STEADY = [steady(p, 6.62, 0.648) for p in TOTALS if p.mode != "in-turn"]
PREFILL = [
    PrefillPoint(sms, 131072, 2048, 32, 4096, 0, backend, 10, ms, ms * 0.99, ms * 1.01)
    for sms, backend, ms in [
        (8, "fa2", 1234.5), (8, "fa3-sized", 987.6), (64, "fa2", 45.28), (64, "fa3-sized", 30.0),
        (132, "fa2", 22.96), (132, "fa3-sized", 15.0),
    ]
]  # fmt: skip
DECODE = [DecodePoint(n, 128, 524288, "fa2", 10, ms, ms, ms) for n, ms in [(8, 3.88), (64, 0.585), (132, 0.501)]]


def rendered(report: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    with console.capture() as text:
        console.print(report)
    return text.get()


def rows(text: str, start: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if re.match(rf"\s*{start}(\s|$)", line)]


def test_performance_is_a_share_of_the_fastest_on_the_whole_device_and_the_fastest_of_each_size_is_marked() -> None:
    text = rendered(solo_report(PREFILL, 132))
    assert rows(text, "64") == [["64", "48.5", "fa3-sized", "30.00", "29.70", "-", "30.30", "50.0", STAR]]
    assert rows(text, "fa2")[1] == ["fa2", "45.28", "44.83", "-", "45.73", "33.1"]
    assert rows(text, "132") == [["132", "100.0", "fa3-sized", "15.00", "14.85", "-", "15.15", "100.0", STAR]]


def test_without_the_whole_device_there_is_no_share_of_it() -> None:
    assert rows(rendered(solo_report(DECODE[:2], 132)), "64")[0][-2] == "-"


def test_a_grid_shows_how_many_sms_each_batch_needs() -> None:
    other = [DecodePoint(n, 1, 256, "fa2", 10, 0.004, 0.004, 0.004) for n in (8, 64, 132)]
    text = rendered(solo_report([*DECODE, *other], 132))
    assert rows(text, "decode 1 x 256")[0][-3:] == ["0.004", "8", "8"]
    assert rows(text, "decode 128 x 4096")[0][-3:] == ["0.501", "64", "132"]


def test_the_published_speed_ups_come_out_of_their_points() -> None:
    summary = summarise_totals(TOTALS)
    assert summary is not None
    assert summary.best.best.mode == "capped"
    assert summary.best.over_fastest == pytest.approx(67.1 / 61.5)
    assert summary.best_split is not None
    assert summary.best_split.best.prefill_sms == 56
    assert round(summary.best_split.over_fastest, 2) == 1.04
    by_backend = {gain.best.prefill_backend: gain for gain in summary.by_backend}
    assert round(by_backend["fa2"].over_same, 2) == 1.18
    assert round(by_backend["fa2"].over_fastest, 2) == 1.01


def test_there_is_no_summary_before_the_baseline_and_a_sharing_are_measured() -> None:
    assert summarise_totals([]) is None
    assert summarise_totals(TOTALS[:2]) is None
    assert summarise_totals(TOTALS[2:]) is None


def test_hybrid_shows_each_sharing_once_with_its_fastest_backend_and_one_star() -> None:
    text = rendered(hybrid_report(STEADY, TOTALS, 132))
    assert rows(text, "64/68") == [
        ["64/68", "fa2", "61.00", "66.60", "66.60", "1.18", "1.01", "6.620", "0.648"],
    ]
    assert rows(text, "capped-80") == [
        ["capped-80", "fa3", "41.00", "61.50", "61.50", "1.09", "1.09", "6.620", "0.648", STAR],
    ]
    assert [line for line in text.splitlines() if line.endswith(STAR)] == [
        line for line in text.splitlines() if line.startswith("capped-80")
    ]


def test_the_runs_in_turn_show_both_phases_alone() -> None:
    text = rendered(hybrid_report([], TOTALS, 132))
    assert rows(text, "fa3")[0] == ["fa3", "17.00", "50.10", "67.10", "66.90", "-", "67.40"]


def test_the_summary_says_the_gain_over_the_fastest_in_turn_and_the_shares() -> None:
    text = " ".join(rendered(hybrid_report(STEADY, TOTALS, 132)).split())
    assert "Baseline: 67.10 ms in turn with fa3, the fastest in turn." in text
    assert "Best: capped-80 with fa3 (shares 61 % / 100 %): 61.50 ms, 1.09x of the fastest in turn (+9.1 %)." in text
    assert "Best split: 56/76 with fa3 (shares 42 % / 58 %): 64.70 ms, 1.04x" in text


def test_a_sweep_cut_short_is_shown_as_far_as_it_went() -> None:
    assert "64/68" in rendered(hybrid_report(STEADY, [], 132))
    assert "-" in rows(rendered(hybrid_report(STEADY[:1], TOTALS, 132)), "56/76")[0]
    assert rows(rendered(hybrid_report([], TOTALS[2:], 132)), "64/68")[0][5:] == ["-", "-"]


CHUNKS = [
    PrefillPoint(132, tokens, 2048, 1, tokens, 2048 - tokens // 2, backend, 10, ms, ms, ms)
    for tokens, backend, ms in [
        (256, "fa2", 0.10), (256, "fa3", 0.08), (512, "fa2", 0.20), (512, "fa3", 0.12), (512, "fa3-sized", 0.10),
    ]
]  # fmt: skip
FUSED = [
    MixedPoint(tokens, 2048, 1, tokens, 2048 - tokens // 2, 128, 524288, backend, 10, ms, 0.98 * ms, 1.02 * ms)
    for tokens, backend, ms in [(256, "fa2", 0.60), (256, "fa3", 0.58), (512, "fa2", 0.56), (512, "fa3", 0.62)]
]


def test_a_fused_batch_stands_beside_its_parts_in_turn_and_the_one_that_gains_most_has_the_star() -> None:
    text = rendered(mixed_report(FUSED, CHUNKS, DECODE[2:], 132))
    assert rows(text, "1 x 256 after 1920") == [
        ["1", "x", "256", "after", "1920", "fa3", "0.080", "0.581", "0.580", "4.0", "1.00", "1.00"],
        ["1", "x", "256", "after", "1920", "fa2", "0.100", "0.601", "0.600", "4.0", "1.00", "0.97"],
    ]
    assert rows(text, "1 x 512 after 1792") == [
        ["1", "x", "512", "after", "1792", "fa2", "0.200", "0.701", "0.560", "4.0", "1.25", "1.07", STAR],
        ["1", "x", "512", "after", "1792", "fa3", "0.120", "0.621", "0.620", "4.0", "1.00", "0.97"],
    ]
    assert text.splitlines()[0].rstrip() == "Chunks fused with decode 128 x 4096, ms of one layer, whole device"
    assert "then decode alone (0.501 ms)" in text


def test_a_mixed_sweep_cut_short_shows_the_parts_that_were_measured() -> None:
    assert "prefill 1 x 256 after 1920" in rendered(mixed_report([], CHUNKS, [], 132))
    assert "decode 128 x 4096" in rendered(mixed_report([], CHUNKS, DECODE[2:], 132))
    assert len(fused_gains(FUSED, CHUNKS[:2], DECODE[2:])) == 2
    assert fused_gains(FUSED, CHUNKS, []) == []


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_width_with_every_number_whole(width: int) -> None:
    slow = [TotalPoint("split", 128, 4, "fa3-sized", "fa2", 10, 100, 9, 46.1, 12345.6, 12345.6, 12345.6, 12345.6)]
    capped = [TotalPoint("capped", 128, 132, "fa3-sized", "fa2", 10, 100, 9, 1046.1, 1345.6, 1345.6, 1.0, 1.0)]
    points = [*TOTALS, *slow, *capped]
    reports = [
        hybrid_report([*STEADY, steady(slow[0], 1234.56, 123.4)], points, 132),
        solo_report(PREFILL, 132),
        solo_report([*DECODE, DecodePoint(132, 1, 256, "fa2", 9, 0.004, 0.004, 0.004)], 132),
        mixed_report([replace(p, median_ms=1234.5) for p in FUSED], CHUNKS, DECODE[2:], 132),
        trace_report(info(read_trace(shipped("azure-conv-synth.csv")))),
    ]
    texts = [rendered(report, width) for report in reports]
    assert all(len(line.rstrip()) <= width for text in texts for line in text.splitlines())
    assert not any("…" in text for text in texts)
    row = rows(texts[0], "128/4")[0]
    assert row == ["128/4", "fa3-sized", "46.10", "12345.6", "12345.6", "-", "0.01", "1234.6", "123.4"]
