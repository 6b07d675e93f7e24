"""The sweeps on a bench with closed-form times: what is planned, measured, resumed and left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from closed_form_bench import ClosedFormBench
from hypothesis import given
from hypothesis import strategies as st

from semipd.config import DecodeGrid, DecodeSweep, HybridSweep, PrefillGrid, PrefillSweep
from semipd.core import InputError
from semipd.points import (
    DecodePoint,
    DecodeWork,
    HybridPoint,
    MixedPoint,
    PrefillPoint,
    PrefillWork,
    Sharing,
    TotalPoint,
)
from semipd.profiler import (
    Progress,
    best_backends,
    decode_works,
    hybrid_plan,
    prefill_works,
    sharings,
    solo_sms,
    sweep_decode,
    sweep_hybrid,
    sweep_mixed,
    sweep_prefill,
    sweep_total,
    within,
)
from semipd.table_files import TableWriter, read_table

SMS = 132
PREFILL = PrefillWork.prompts(4, 4096)
DECODE = DecodeWork(128, 128 * 4096)
steps = st.sampled_from([2, 4, 6, 8, 16, 32])


def writer(folder: Path, cls: type, *, resume: bool = False) -> TableWriter[Any]:
    return TableWriter(folder / f"{cls.__name__}.csv", cls, {"gpu": "closed form"}, resume=resume)


def drained(sweep: Iterator[Progress]) -> list[Progress]:
    return list(sweep)


# What is planned


@given(steps, st.sampled_from(["primary", "remainder", "both"]))
def test_solo_sizes_are_those_of_one_side_or_both_of_every_split_and_the_whole_device(
    step: Any, partitions: Any
) -> None:
    first = {n for n in range(8, SMS) if n % step == 0}
    expected = {"primary": first, "remainder": {SMS - n for n in first}}
    expected["both"] = expected["primary"] | expected["remainder"]
    config = DecodeSweep(step_sms=step, partitions=partitions)
    assert solo_sms(config, SMS) == sorted(expected[partitions] | {SMS})


def test_the_sizes_of_both_sides_on_an_h200() -> None:
    assert solo_sms(PrefillSweep(partitions="remainder"), SMS) == [*range(4, 132, 8), 132]
    assert solo_sms(PrefillSweep(partitions="both"), SMS) == [*range(4, 132, 4), 132]


def test_named_sizes_are_measured_and_impossible_ones_refused() -> None:
    assert solo_sms(PrefillSweep(sms=(132, 64, 68)), SMS) == [64, 68, 132]
    with pytest.raises(InputError, match="sms: found 63; expected sizes that splits in steps of 8 have: 4, 8, 12"):
        solo_sms(PrefillSweep(sms=(64, 63)), SMS)
    with pytest.raises(InputError, match="sms: found 68; expected sizes"):
        sharings(HybridSweep(sms=(68,)), SMS)


@given(steps)
def test_every_sharing_stays_within_the_device_and_splits_use_all_of_it(step: Any) -> None:
    for at in sharings(HybridSweep(step_sms=step), SMS):
        assert 0 < at.prefill_sms <= SMS
        assert at.decode_sms == (SMS - at.prefill_sms if at.mode == "split" else SMS)


def test_modes_are_measured_in_the_order_given_and_once() -> None:
    config = HybridSweep(modes=("streams", "split", "streams"), sms=(64,))
    assert [at.name for at in sharings(config, SMS)] == ["streams", "64/68"]


def test_a_plan_measures_in_turn_first_with_every_backend_that_is_used() -> None:
    plan = hybrid_plan(HybridSweep(sms=(64,), modes=("split",), backends=("fa2", "fa3")), SMS)
    in_turn = Sharing("in-turn", SMS, SMS)
    split = Sharing("split", 64, 68)
    assert plan.totals == (("fa2", in_turn), ("fa3", in_turn), ("fa2", split), ("fa3", split))
    assert plan.contention == ((PREFILL, "fa2", split), (PREFILL, "fa3", split))


def solo_points(places: dict[tuple[int, int, str], float]) -> list[PrefillPoint]:
    """Points at (SMs, tokens, backend), of prompts without cached context."""
    return [
        PrefillPoint(sms, tokens, tokens // 2, 1, tokens, 0, backend, 10, ms, ms, ms)
        for (sms, tokens, backend), ms in places.items()
    ]


def test_with_a_solo_table_only_the_backend_that_is_fastest_alone_at_the_nearest_batch_is_measured() -> None:
    solo = solo_points(
        {(64, 512, "fa2"): 2.0, (64, 512, "fa3"): 3.0, (64, 8192, "fa2"): 9.0, (64, 8192, "fa3"): 8.0}
        | {(132, 512, "fa3"): 1.0}
    )
    grid = PrefillGrid(tokens=(1024, 4096), mean_context=(512, 2048))
    config = HybridSweep(prefill=grid, work=None, sms=(64,), modes=("split",), solo_prefill="solo.csv")
    chosen = {(w.tokens, w.mean_context): b for w, b, _ in hybrid_plan(config, SMS, solo).contention}
    assert chosen[1024, 512] == "fa2"
    assert chosen[4096, 2048] == "fa3"


def test_with_a_solo_table_in_turn_is_measured_with_the_whole_devices_backend_and_those_of_the_splits() -> None:
    solo = solo_points({(64, 4096, "fa2"): 2.0, (64, 4096, "fa3"): 3.0, (132, 4096, "fa3"): 1.0})
    config = HybridSweep(sms=(64,), modes=("split",), solo_prefill="solo.csv")
    assert [(b, at.name) for b, at in hybrid_plan(config, SMS, solo).totals] == [
        ("fa3", "in-turn"),
        ("fa2", "in-turn"),
        ("fa2", "64/68"),
    ]


def test_a_solo_table_without_the_partition_is_refused() -> None:
    config = HybridSweep(sms=(64,), modes=("split",), solo_prefill="solo.csv")
    with pytest.raises(InputError, match=r"solo\.csv: found no point on 64 SMs"):
        hybrid_plan(config, SMS, solo_points({(132, 4096, "fa3"): 1.0}))


def test_batches_come_from_one_prompt_shape_or_the_whole_grid_cheapest_first() -> None:
    assert prefill_works(PrefillGrid(seqs=2, seq_tokens=64, seq_context=32)) == [PrefillWork(128, 64, 2, 64, 32)]
    works = prefill_works(PrefillGrid(tokens=(512, 16), mean_context=(16, 1024)))
    assert {(w.tokens, w.mean_context) for w in works} == {(512, 16), (512, 1024), (16, 16), (16, 1024)}
    assert [w.tokens * w.mean_context for w in works] == sorted(w.tokens * w.mean_context for w in works)
    assert decode_works(DecodeGrid(batch=8, context=100)) == [DecodeWork(8, 800)]
    assert len(decode_works(DecodeGrid(batches=(1, 2), kv_tokens=(4, 8, 16)))) == 6


# What is measured


def test_a_prefill_sweep_has_every_point_and_the_benchs_time_at_each(tmp_path: Path) -> None:
    bench, table = ClosedFormBench(), writer(tmp_path, PrefillPoint)
    drained(sweep_prefill(bench, table, [PREFILL], ["fa2", "fa3"], [64, 132], 10))
    assert {(p.sms, p.backend) for p in table.points} == {(n, b) for n in (64, 132) for b in ("fa2", "fa3")}
    for p in table.points:
        ms = bench.prefill_ms(PREFILL, p.backend, p.sms)
        assert p.median_ms == pytest.approx(ms, abs=1e-6)
        assert ms * 0.99 <= p.p10_ms < p.median_ms < p.p90_ms <= ms * 1.01
        assert p.steps == 10


def test_the_whole_device_is_measured_first_since_the_baseline_is_worth_most(tmp_path: Path) -> None:
    bench = ClosedFormBench()
    drained(sweep_decode(bench, writer(tmp_path, DecodePoint), [DECODE], [8, 64, 132], 3))
    assert [call[-1] for call in bench.calls] == [132, 64, 8]


def test_a_hybrid_sweep_puts_every_prefill_cell_beside_every_decode_batch(tmp_path: Path) -> None:
    bench, table = ClosedFormBench(), writer(tmp_path, HybridPoint)
    split = Sharing("split", 64, 68)
    decodes = [DECODE, DecodeWork(1, 256)]
    drained(sweep_hybrid(bench, table, [(PREFILL, "fa2", split)], decodes, 10))
    assert [(p.batch, p.kv_tokens) for p in table.points] == [(128, 128 * 4096), (1, 256)]
    point = table.points[0]
    assert point.prefill_median_ms == pytest.approx(1.25 * bench.prefill_ms(PREFILL, "fa2", 64), abs=1e-6)
    assert point.decode_median_ms == pytest.approx(1.25 * bench.decode_ms(DECODE, 68), abs=1e-6)


def test_a_mixed_sweep_fuses_every_chunk_with_every_decode_batch_and_has_the_benchs_time_of_a_layer(
    tmp_path: Path,
) -> None:
    bench, table = ClosedFormBench(), writer(tmp_path, MixedPoint)
    chunks, decodes = [PrefillWork.at(n, 2048) for n in (256, 2048)], [DECODE, DecodeWork(1, 256)]
    drained(sweep_mixed(bench, table, chunks, decodes, ["fa2", "fa3"], 10))
    found = {(p.tokens, p.mean_context, p.batch, p.kv_tokens, p.backend): p for p in table.points}
    assert set(found) == {
        (c.tokens, 2048, d.batch, d.kv_tokens, b) for c in chunks for d in decodes for b in ("fa2", "fa3")
    }
    for chunk in chunks:
        for decode in decodes:
            point = found[chunk.tokens, 2048, decode.batch, decode.kv_tokens, "fa3"]
            assert point.median_ms == pytest.approx(bench.mixed_ms(chunk, decode, "fa3"), abs=1e-6)
            assert (point.seqs, point.seq_tokens, point.seq_context) == (1, chunk.tokens, 2048 - chunk.tokens // 2)


def test_fixed_work_in_turn_is_the_sum_of_both_alone_and_together_the_longer(tmp_path: Path) -> None:
    bench, table = ClosedFormBench(), writer(tmp_path, TotalPoint)
    cells = [("fa2", Sharing("in-turn", SMS, SMS)), ("fa2", Sharing("split", 64, 68))]
    drained(sweep_total(bench, table, PREFILL, DECODE, cells, (10, 100), 5))
    in_turn, split = table.points
    alone = (10 * bench.prefill_ms(PREFILL, "fa2", SMS), 100 * bench.decode_ms(DECODE, SMS))
    assert in_turn.total_ms == pytest.approx(sum(alone), abs=1e-5)
    assert split.total_ms == max(split.prefill_ms, split.decode_ms)
    assert (split.prefill_steps, split.decode_steps, split.runs) == (10, 100, 5)


def test_progress_counts_every_cell_once_and_ends_complete(tmp_path: Path) -> None:
    table = writer(tmp_path, PrefillPoint)
    seen = drained(sweep_prefill(ClosedFormBench(), table, [PREFILL], ["fa2"], [8, 64, 132], 2))
    assert [(p.done, p.total) for p in seen] == [(0, 3), (1, 3), (2, 3), (3, 3)]


# Interrupts, resuming, limits


@given(stop=st.integers(0, 11))
def test_wherever_a_sweep_stops_resuming_measures_the_rest_once(
    tmp_path_factory: pytest.TempPathFactory, stop: int
) -> None:
    folder = tmp_path_factory.mktemp("sweep")

    def interrupt(call: int) -> None:
        if call == stop:
            raise KeyboardInterrupt

    first, second, sizes = ClosedFormBench(before=interrupt), ClosedFormBench(), [8, 16, 64, 132]
    with pytest.raises(KeyboardInterrupt):
        drained(sweep_prefill(first, writer(folder, PrefillPoint), [PREFILL], ["fa2", "fa3", "fa3-sized"], sizes, 2))
    resumed = writer(folder, PrefillPoint, resume=True)
    assert len(resumed.points) == stop
    drained(sweep_prefill(second, resumed, [PREFILL], ["fa2", "fa3", "fa3-sized"], sizes, 2))
    assert len(first.calls) + len(second.calls) == 12
    assert not set(first.calls) & set(second.calls)
    assert len(read_table(resumed.path, PrefillPoint).points) == 12


def test_every_kind_of_sweep_measures_nothing_again(tmp_path: Path) -> None:
    cells = [("fa2", Sharing("in-turn", SMS, SMS)), ("fa2", Sharing("split", 64, 68))]
    plan = [(PREFILL, "fa2", Sharing("split", 64, 68))]

    def everything(bench: ClosedFormBench, resume: bool) -> None:
        drained(sweep_prefill(bench, writer(tmp_path, PrefillPoint, resume=resume), [PREFILL], ["fa2"], [64], 2))
        drained(sweep_decode(bench, writer(tmp_path, DecodePoint, resume=resume), [DECODE], [64], 2))
        drained(sweep_hybrid(bench, writer(tmp_path, HybridPoint, resume=resume), plan, [DECODE], 2))
        drained(sweep_total(bench, writer(tmp_path, TotalPoint, resume=resume), PREFILL, DECODE, cells, (1, 1), 2))
        drained(sweep_mixed(bench, writer(tmp_path, MixedPoint, resume=resume), [PREFILL], [DECODE], ["fa2"], 2))

    first, again = ClosedFormBench(), ClosedFormBench()
    everything(first, False)
    everything(again, True)
    assert len(first.calls) == 6
    assert again.calls == []


def test_a_time_limit_stops_between_two_points_and_keeps_what_was_measured(tmp_path: Path) -> None:
    bench = ClosedFormBench(before=lambda _: time.sleep(0.02))
    table = writer(tmp_path, DecodePoint)
    seen = drained(within(0.05, sweep_decode(bench, table, [DECODE], list(range(8, 132, 4)), 2)))
    assert 1 <= len(table.points) < 31
    assert seen[-1].done == len(table.points) == len(bench.calls)


def test_without_a_limit_everything_is_measured_and_no_time_measures_nothing(tmp_path: Path) -> None:
    table = writer(tmp_path, DecodePoint)
    drained(within(-1.0, sweep_decode(ClosedFormBench(), table, [DECODE], [8, 16], 2)))
    assert table.points == []
    drained(within(None, sweep_decode(ClosedFormBench(), table, [DECODE], [8, 16], 2)))
    assert len(table.points) == 2


@given(st.lists(st.tuples(st.sampled_from([8, 64]), st.sampled_from(["fa2", "fa3"]), st.floats(0.1, 10)), min_size=1))
def test_the_best_backend_of_a_place_is_its_smallest_median(found: list[tuple[int, str, float]]) -> None:
    points = [PrefillPoint(sms, 16, 8, 1, 16, 0, backend, 1, ms, ms, ms) for sms, backend, ms in found]
    best = best_backends(points)
    for sms in {p.sms for p in points}:
        assert best[sms, 16, 8].median_ms == min(p.median_ms for p in points if p.sms == sms)
