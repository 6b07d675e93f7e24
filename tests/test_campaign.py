"""A whole profile measured of a simulation whose truth is known: what the tables say, stopping, resuming, refining."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closed_form_cost import ClosedFormCost
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd._steps import Waves
from semipd.areas import AXES, HOST_S, Area, Cell, areas_of, blocks_of, expected_s, fitting, snapped
from semipd.campaign import Measured, Subject, measure_profile
from semipd.config import build
from semipd.contention import Scales
from semipd.core import Allocation, DecodeShape, InputError, Mode, PrefillShape
from semipd.grid import lacking, sparse_values
from semipd.holdout import errors, held_out
from semipd.model_config import ModelConfig
from semipd.padding import Padded
from semipd.points import DecodeWork, HoldoutPoint, PrefillPoint, PrefillWork
from semipd.profile import load_profile
from semipd.profile_config import DecodeAxes, More, PrefillAxes, ProfileConfig
from semipd.profiler import Progress
from semipd.profiling import AGAIN, Drift, _widened, measured_places, relative_error
from semipd.ragged import Decodes
from semipd.rectangle import SPINE, Rectangle
from semipd.roofline import RooflineCost
from semipd.sim import SimExecutor
from semipd.table_cost import TableCost
from semipd.table_files import read_points
from semipd.tables import Tables
from semipd.tiles import SplitKeys

MODEL = ModelConfig(
    hidden_size=32, layers=4, query_heads=4, kv_heads=2, head_dim=8, intermediate_size=64, vocab_size=199,
    rope_theta=1e4, dtype="float32",
)  # fmt: skip
SCALES = Scales.of(MODEL.weights_bytes, MODEL.kv_bytes_per_token)
TRUTH = ClosedFormCost(scales=SCALES)
ABOUT: dict[str, object] = {"gpu": "closed form", "device_sms": 32, "device_memory_bytes": 1 << 30, "work": {}}
CONFIG = ProfileConfig(
    prefill_sms=(8, 16, 24),
    capped_sms=(16,),
    prefill=PrefillAxes(tokens=(16, 512, 4096), mean_context=(64, 4096)),
    prefill_spine=(16, 1024, 2048, 8192),  # of which two lie between
    decode=DecodeAxes(batch=(1, 64), kv_tokens=(512, 65536)),
    decode_spine=(8, 64),
    both_prefill=PrefillAxes(tokens=(16, 4096), mean_context=(64, 4096)),
    both_decode=DecodeAxes(batch=(8, 64), kv_tokens=(512, 65536)),
    both_more=More(),
    ragged=0,
    max_num_seqs=64,
    settle_ms=1,
    limited_settle_ms=1,
    measure_ms=4,
)
POINTS = {"prefill": 4 * (6 + 2), "decode": 4 * (4 + 1), "hybrid": 5 * 16, "mixed": 16}


def subject(truth: ClosedFormCost = TRUTH, **changed: Any) -> Subject:
    return replace(Subject(SimExecutor(truth), MODEL, truth.device_sms, num_blocks=10**6), **changed)


def measure(out: Path, truth: ClosedFormCost = TRUTH, resume: bool = False, **changed: Any) -> Measured:
    config = CONFIG.model_copy(update=changed)
    return measure_profile(subject(truth), config, out, ABOUT, resume=resume)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiles") / "h200" / "closed"
    done = measure(out, holdout=60)
    assert done.complete
    assert done.usable
    assert not done.interrupted
    assert {name: len(table.points) for name, table in done.tables.items() if name != "holdout"} == POINTS
    return out


def test_the_tables_hold_the_executors_times(measured: Path) -> None:
    profile = load_profile(measured)
    assert (profile.name, profile.device, profile.layers) == ("h200/closed", "closed form", 4)
    assert profile.kv_bytes_per_token == MODEL.kv_bytes_per_token
    assert ModelConfig.model_validate(profile.model) == MODEL
    for p in profile.prefill.points:
        at = Allocation(Mode.SPLIT, p.sms, 32 - p.sms)
        truth = TRUTH.prefill_s(PrefillShape(p.tokens, float(p.tokens * p.mean_context)), at, None)[0] * 1e3
        assert p.median_ms == pytest.approx(truth, rel=1e-4)
    for h in profile.hybrid.points:
        at = Allocation(Mode(h.mode), h.prefill_sms, h.decode_sms)
        prefill = PrefillShape(h.tokens, float(h.tokens * h.mean_context))
        decode = DecodeShape(h.batch, h.kv_tokens)
        assert h.prefill_median_ms == pytest.approx(TRUTH.prefill_s(prefill, at, decode)[0] * 1e3, rel=0.01)
        step_s = TRUTH.decode_s(decode, at, prefill)[0][0]
        assert h.decode_median_ms == pytest.approx(step_s / 4 * 1e3, rel=0.02)
    assert {h.mode for h in profile.hybrid.points} == {"split", "capped", "priority"}


def test_held_out_points_of_a_bilinear_truth_are_met_and_show_what_leaving_contention_out_costs(measured: Path) -> None:
    held = held_out(load_profile(measured))
    assert sum(of["table"].points for of in held.values()) == 60 + 30  # half of them are two rows
    for group, of in held.items():
        assert of["table"].p95 < 0.01
        assert of["table"].outside == 0
        assert abs(of["table"].bias) <= of["table"].p95
        assert set(of) == {"table", "solo", "roofline"}
        if group.endswith("beside"):
            assert of["solo"].median > 0.1
            assert of["solo"].bias < 0
    assert held["mixed"]["solo"].bias == pytest.approx(1 / 0.9 - 1, rel=1e-3)


def test_held_out_points_are_ragged_and_off_the_grid_and_drawn_with_the_seed(measured: Path, tmp_path: Path) -> None:
    points = read_points(measured / "holdout.csv", HoldoutPoint)
    lens = [p.decode_lens.split() for p in points if p.decode_lens != "-"]
    assert sum(len(set(each)) > 1 for each in lens) > 0.8 * len(lens)
    assert sum(len(p.new_tokens.split()) > 1 for p in points) > 10
    tokens = {sum(map(int, p.new_tokens.split())) for p in points if p.new_tokens != "-"}
    assert not tokens & {512}
    measure(tmp_path / "p", holdout=60)
    assert read_points(tmp_path / "p" / "holdout.csv", HoldoutPoint) == points
    measure(tmp_path / "q", holdout=60, seed=1)
    assert read_points(tmp_path / "q" / "holdout.csv", HoldoutPoint) != points


def test_held_out_points_in_a_mode_that_lacks_a_point_are_left_out(measured: Path, tmp_path: Path) -> None:
    shutil.copytree(measured, folder := tmp_path / "p")
    rows = (folder / "hybrid.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    gone = next(i for i, row in enumerate(rows) if row.startswith("capped,"))
    (folder / "hybrid.csv").write_text("".join(rows[:gone] + rows[gone + 1 :]), encoding="utf-8")
    capped = [p for p in read_points(folder / "holdout.csv", HoldoutPoint) if p.mode == "capped"]
    whole, found = (held_out(load_profile(path)) for path in (measured, folder))
    assert capped
    for phase in ("prefill", "decode"):
        left_out = sum(p.phase == phase for p in capped)
        assert found[f"{phase} beside"]["table"].points == whole[f"{phase} beside"]["table"].points - left_out
    assert found["mixed"] == whole["mixed"]


def test_errors_are_those_of_a_plain_computation(measured: Path) -> None:
    profile = load_profile(measured)
    cost = profile.cost()
    path = measured / "holdout.csv"
    off = []
    for p in read_points(path, HoldoutPoint):
        if (p.phase, p.decode_lens) == ("prefill", "-"):
            new, context = ([int(x) for x in text.split()] for text in (p.new_tokens, p.context_lens))
            shape = PrefillShape.of(tuple(new), tuple(context))
            at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
            off.append(abs(cost.prefill_s(shape, at, None)[0] * 1e3 / p.median_ms - 1))
    found = held_out(profile)["prefill alone"]["table"]
    assert (found.points, found.median) == (len(off), pytest.approx(np.median(off)))
    assert found.p95 == pytest.approx(np.percentile(off, 95))


def after(points: int, kind: type[BaseException]) -> Any:
    """Progress that is interrupted before so many measurements."""
    left = [points]

    def watched(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
        del name
        for step in steps:
            if left[0] == 0:
                raise kind
            left[0] -= 1
            yield step

    return watched


@pytest.mark.parametrize("points", [5, 40, 84, 148])
def test_whenever_it_stops_the_tables_are_whole_and_resuming_measures_the_rest(points: int, tmp_path: Path) -> None:
    out = tmp_path / "p"
    first = measure_profile(subject(), CONFIG, out, ABOUT, watched=after(points, KeyboardInterrupt))
    assert first.interrupted
    assert not first.complete
    assert sum(len(table.points) for table in first.tables.values()) <= points
    if points >= 32 + 20 + 16 + 16:  # each phase alone, fused batches, and the first way of sharing
        cost = load_profile(out).cost()
        assert Allocation(Mode.SPLIT, 16, 16) in cost.splits
    seen: list[str] = []

    def watched(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
        for step in steps:
            if name == "coarse" and step.at != "done":
                seen.append(step.at)
            yield step

    before = sum(len(table.points) for table in first.tables.values())
    second = measure_profile(subject(), CONFIG, out, ABOUT, resume=True, watched=watched)
    assert second.complete
    assert len(seen) == sum(POINTS.values()) - before
    assert {name: len(table.points) for name, table in second.tables.items()} == POINTS
    assert len(load_profile(out).cost().allocations) == 3 + 1 + 1 + 1


def test_a_plan_that_is_longer_than_the_time_limit_is_announced(tmp_path: Path) -> None:
    for limit_s, said in ((1e-6, 1), (1e6, 0)):
        notes: list[str] = []
        config = CONFIG.model_copy(update={"limit_s": limit_s, "holdout": 6})
        measure_profile(subject(), config, tmp_path / str(limit_s), ABOUT, note=notes.append)
        assert sum("may take longer than" in line for line in notes) == said


def test_a_time_limit_ends_it_between_two_points(tmp_path: Path) -> None:
    done = measure(tmp_path / "p", limit_s=1e-6)
    assert (done.complete, done.usable, done.interrupted) == (False, False, False)
    with pytest.raises(InputError, match=r"prefill\.csv: exists; expected a new file, or --resume"):
        measure(tmp_path / "p")


def test_refinement_puts_values_where_the_model_errs(tmp_path: Path) -> None:
    """Prefill goes in stairs of 1,024 tokens here: between 512 and 4,096 a straight line is far off."""
    out = tmp_path / "p"
    measure(out, ClosedFormCost(stair_tokens=1024, scales=SCALES), tolerance=0.05, prefill_spine=(), decode_spine=())
    tables = load_profile(out)
    coarse = {16, 512, 4096}
    added = {p.tokens for p in tables.prefill.points} - coarse
    assert added
    assert len({p.mean_context for p in tables.prefill.points}) == 2  # which is linear: nothing to gain
    assert len({d.kv_tokens for d in tables.decode.points}) == 2
    places = measured_places({"prefill": _Points(tables.prefill.points)})  # type: ignore[dict-item]
    for of in places.values():
        tokens = {t for t, _ in of}
        assert of == {(t, m) for t in tokens for m in (64, 4096)}
    few = [p for p in tables.prefill.points if p.tokens in coarse]
    straight = TableCost(Tables.of(few, tables.decode.points, tables.hybrid.points, device_sms=32, layers=4))
    truth = ClosedFormCost(stair_tokens=1024, scales=SCALES)
    whole = Allocation(Mode.EXCLUSIVE, 32, 32)

    def worst(cost: TableCost) -> float:
        shapes = [PrefillShape(t, t * 64.0) for t in range(600, 4096, 100)]
        off = [cost.prefill_s(s, whole, None)[0] / truth.prefill_s(s, whole, None)[0] - 1 for s in shapes]
        return float(np.mean(np.abs(off)))

    assert worst(tables.cost()) < 0.6 * worst(straight)


def test_refinement_that_is_cut_short_has_put_to_use_what_it_tried(tmp_path: Path) -> None:
    """Each area has its value before the next one is tried."""
    trials = []

    def cut_short(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
        for step in steps:
            if name == "alone":
                trials.extend([step.at] if "trying" in step.at else [])
                if len({trial.split(",")[0] for trial in trials}) > 1:  # the second area
                    raise KeyboardInterrupt
            yield step

    config = CONFIG.model_copy(update={"tolerance": 0.05, "prefill_spine": (), "decode_spine": ()})
    stairs = ClosedFormCost(stair_tokens=1024, scales=SCALES)
    done = measure_profile(subject(stairs), config, tmp_path / "p", ABOUT, watched=cut_short)
    assert done.interrupted
    assert trials[0].startswith("prefill on 32 SMs, ")
    found = {p.tokens for p in load_profile(tmp_path / "p").prefill.points if p.sms == 32}
    assert len(found - {16, 512, 4096}) == 1


class _Points:
    def __init__(self, points: tuple[Any, ...]) -> None:
        self.points = points


def test_rectangles_gain_whole_knots_and_probe_every_interval_once() -> None:
    rectangle = Rectangle(("tokens", "mean_context"), ((16, 1024), (64,)))
    probes = rectangle.probes(snapped)
    assert [(p.axis, p.value, p.place) for p in probes] == [(0, 128, (128, 64))]
    wider = rectangle.with_knot(0, 128)
    assert set(wider.places()) == set(rectangle.places()) | set(rectangle.knot(0, 128))
    assert [p.value for p in wider.probes(snapped)] == [48, 384]
    assert Rectangle(("batch",), ((1, 2, 4, 8),)).probes(snapped) == []


def test_a_spine_gains_single_places_and_gives_them_up_to_whole_knots() -> None:
    rectangle = Rectangle(("batch", "kv_tokens"), ((8, 64), (512, 4096)), spine=(16, 32))
    assert rectangle.places()[:2] == [(16, 512), (32, 512)]
    assert len(set(rectangle.places())) == len(rectangle.places()) == 6
    assert [(p.axis, p.value, p.place) for p in rectangle.probes(snapped)] == [
        (0, 24, (24, 4096)), (1, 1472, (64, 1472)), (SPINE, 24, (24, 512)), (SPINE, 48, (48, 512)),
    ]  # fmt: skip
    assert rectangle.knot(SPINE, 24) == [(24, 512)]
    assert rectangle.with_knot(SPINE, 24).spine == (16, 24, 32)
    assert rectangle.knot(0, 16) == [(16, 4096)]  # the other place is known
    whole = rectangle.with_knot(0, 16)
    assert set(whole.places()) == {*rectangle.places(), *rectangle.knot(0, 16)}
    assert whole.spine == (32,)


def test_stairs_that_only_a_spine_has_cost_refinement_one_point_each(tmp_path: Path) -> None:
    out, spine = tmp_path / "p", (1024, 2048)
    measure(out, ClosedFormCost(stair_tokens=1024, scales=SCALES), tolerance=0.05, prefill_spine=spine, decode_spine=())
    places = {(p.tokens, p.mean_context) for p in load_profile(out).prefill.points if p.sms == 32}
    assert {t for t, m in places if m == 64} > {16, 512, 4096, *spine}
    resumed = measure(
        out,
        ClosedFormCost(stair_tokens=1024, scales=SCALES),
        True,
        tolerance=0.05,
        prefill_spine=spine,
        decode_spine=(),
    )
    assert {(p.tokens, p.mean_context) for p in resumed.tables["prefill"].points if p.sms == 32} >= places


def test_what_batches_are_padded_to_is_written_and_used(tmp_path: Path) -> None:
    padded = Padded(batch=(8, 64), tokens=(512,))
    unrefined = CONFIG.model_copy(update={"tolerance": 1000.0})
    measure_profile(subject(padded=padded), unrefined, tmp_path / "p", ABOUT)
    loaded = load_profile(tmp_path / "p")
    assert loaded.padded == padded
    whole = Allocation(Mode.EXCLUSIVE, 32, 32)
    seconds = [loaded.cost().prefill_s(PrefillShape(t, t * 64.0), whole, None)[0] for t in (17, 512)]
    assert seconds[0] == seconds[1]


@dataclass(frozen=True)
class OnlyWaves(ClosedFormCost):
    """Prefill takes a constant time, and what dealing its tiles to the SMs makes of attention."""

    waves: Waves = SplitKeys(query_heads=32, kv_heads=8, head_dim=128).waves

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """Beside decode, too."""
        del beside
        return 1e-5 + self.waves.seconds(shape.new_tokens, shape.context_lens, at.prefill_sms), False


@pytest.mark.parametrize("known", [True, False])
def test_what_is_known_of_dealing_is_written_and_refined_by(tmp_path: Path, known: bool) -> None:
    """Points are added where the cost model errs that will be used: not where dealing explains the time."""
    split_keys = SplitKeys(query_heads=32, kv_heads=8, head_dim=128) if known else None
    of = subject(OnlyWaves(scales=SCALES), backends=("fa2",), split_keys=split_keys)
    tables = measure_profile(of, CONFIG.model_copy(update={"modes": ("split",)}), tmp_path / "p", ABOUT).tables
    assert load_profile(tmp_path / "p").split_keys == split_keys
    assert (len(tables["prefill"].points) == POINTS["prefill"]) == known


def test_first_points_are_measured_again_and_the_provenance_says_how_far_they_moved(tmp_path: Path) -> None:
    measure(tmp_path / "p")
    for table in POINTS:
        drift = json.loads((tmp_path / "p" / f"{table}.json").read_text())["drift"]
        assert drift["points"] == AGAIN
        assert abs(drift["median"]) <= abs(drift["largest"]) < 1e-3  # this machine does not drift
    before = PrefillPoint(8, 16, 64, 1, 16, 56, "fa2", 5, 1.0, 1.0, 1.0)
    moved = Drift.of([(before, replace(before, median_ms=ms)) for ms in (1.01, 1.02, 0.95)])
    assert moved == Drift(3, 0.01, -0.05)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("tokens", 70, 64),
        ("tokens", 300, 320),
        ("tokens", 950, 896),
        ("tokens", 2900, 2944),
        ("batch", 45, 48),
        ("batch", 1.4, 1),
        ("mean_context", 10, 64),
    ],
)
def test_values_are_snapped_to_what_kernels_and_batches_are_padded_to(name: str, value: float, expected: int) -> None:
    assert snapped(name, value) == expected


def test_kv_tokens_without_room_are_left_out() -> None:
    fitted = fitting(CONFIG, num_blocks=2000)
    assert fitted.decode.kv_tokens == (512,)
    assert fitting(CONFIG, num_blocks=10**6) == CONFIG
    with pytest.raises(InputError, match="kv_tokens: found 512 or more; expected some that fit into 30 KV blocks"):
        fitting(CONFIG, num_blocks=30)


def test_more_values_of_both_phases_are_measured_one_at_a_time_with_all_of_the_others() -> None:
    more = More(tokens=(128, 4096, 9999), batch=(16,))  # of which two are not between the ends
    areas = areas_of(CONFIG.model_copy(update={"both_more": more, "mixed_more": more}), 32)
    for area, plain in areas_of(CONFIG, 32).items():
        added = set(areas[area].places()) - set(plain.places())
        tokens, contexts, batches, kv = plain.values if len(plain.values) == 4 else ((), (), (), ())
        expected = {*itertools.product((128,), contexts, batches, kv), *itertools.product(tokens, contexts, (16,), kv)}
        assert added == (expected if area.table in ("hybrid", "mixed") else set())


def test_with_more_values_of_both_phases_the_tables_say_what_was_measured_there(tmp_path: Path) -> None:
    out = tmp_path / "h200" / "more"
    more = {"both_more": More(tokens=(256,), batch=(24,), kv_tokens=(4096,))}
    assert measure(out, **more).complete
    cost, places = load_profile(out).cost(), set()
    for p in load_profile(out).hybrid.points:
        places.add((p.tokens, p.mean_context, p.batch, p.kv_tokens))
        at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
        batch, decode = PrefillShape(p.tokens, float(p.tokens * p.mean_context)), DecodeShape(p.batch, p.kv_tokens)
        assert cost.prefill_s(batch, at, decode)[0] * 1e3 == pytest.approx(p.prefill_median_ms, rel=1e-9)
        step_ms = float(cost.decode_s(decode, at, batch)[0][0]) / cost.layers * 1e3
        assert step_ms == pytest.approx(p.decode_median_ms, rel=1e-9)
    assert len(places) == 16 + 3 * 8
    again = measure(out, resume=True, **more)
    assert len(again.tables["hybrid"].points) == 5 * len(places)


AXIS_VALUES = ([16, 96, 256, 640, 4096], [64, 1024, 16384], [8, 16, 36, 96, 256], [512, 16384, 131072, 524288])


@st.composite
def rectangles(draw: st.DrawFn) -> Rectangle:
    values = tuple(tuple(sorted(draw(st.sets(st.sampled_from(v), min_size=2, max_size=3)))) for v in AXIS_VALUES)
    found = Rectangle(AXES["hybrid"], values, sparse=draw(st.booleans()))
    for axis, of in enumerate(AXIS_VALUES) if found.sparse else ():
        for value in draw(st.sets(st.sampled_from(of), max_size=2)):
            if values[axis][0] < value < values[axis][-1]:
                found = found.with_knot(axis, value)
    return found


@settings(deadline=None)
@given(rectangles(), rectangles(), st.data())
def test_whatever_was_measured_before_resuming_makes_a_sparse_grid_and_refining_keeps_it_one(
    before: Rectangle, now: Rectangle, data: st.DataObject
) -> None:
    places = set(before.places()) | lacking(before.places())
    rectangle = _widened(replace(now, sparse=True), places)
    places |= set(rectangle.places())
    places |= lacking(places)
    sparse_values(places, AXES["hybrid"], "resumed")
    for _ in range(data.draw(st.integers(0, 3))):
        if probes := rectangle.probes(snapped):
            probe = data.draw(st.sampled_from(probes))
            assert probe.place not in rectangle.places()
            places |= set(rectangle.knot(probe.axis, probe.value))
            rectangle = rectangle.with_knot(probe.axis, probe.value)
            assert probe.value in rectangle.along(probe.axis)
    sparse_values(places, AXES["hybrid"], "refined")


def test_a_profile_that_goes_on_with_another_configuration_can_be_used(tmp_path: Path) -> None:
    out = tmp_path / "h200" / "p"
    assert measure(out, both_more=More(tokens=(256,), kv_tokens=(4096,))).complete
    shorter = PrefillAxes(tokens=(16, 2048), mean_context=(64, 4096))
    assert measure(out, resume=True, both_prefill=shorter, both_more=More(batch=(24,))).complete
    points = load_profile(out).hybrid.points
    assert {p.tokens for p in points} == {16, 256, 2048, 4096}
    assert {p.batch for p in points} == {8, 24, 64}
    assert len(load_profile(out).cost().allocations) == 3 + 1 + 1 + 1


def test_what_rests_are_for_is_told_to_the_stopwatch_and_expected(tmp_path: Path) -> None:
    took_s = {}
    for share in (0.0, 1.0):
        truth = SimExecutor(TRUTH)
        config = CONFIG.model_copy(update={"rest_share": share, "both_more": More(tokens=(64,))})
        measure_profile(replace(subject(), executor=truth), config, tmp_path / str(share), ABOUT)
        took_s[share] = truth.now()
    assert took_s[1.0] > 1.5 * took_s[0.0]
    roofline = RooflineCost(MODEL, 32, 1e12, 1e11)
    for area, rectangle in areas_of(CONFIG, 32).items():
        cell = Cell.at(area, rectangle.places()[0])
        at = area.at
        resting = cell.prefill is not None and (cell.decode is not None or at.prefill_sms >= at.decode_sms)
        without, rested = (
            expected_s(cell, roofline, CONFIG.model_copy(update={"rest_share": share})) for share in (0, 1)
        )
        assert rested - HOST_S == pytest.approx((2 if resting else 1) * (without - HOST_S))


def test_the_most_kv_tokens_that_fit_are_the_end_of_those_measured_of_both_phases() -> None:
    more = More(tokens=(256,), kv_tokens=(4096, 16384))
    config = CONFIG.model_copy(update={"both_more": more})
    room = blocks_of(None, Decodes.of(DecodeWork(64, 16384)), config.block_size) + 4096 * 3 // config.block_size
    for num_blocks, kv in ((10**6, (512, 65536)), (room, (512, 16384)), (room // 2, (512, 4096))):
        fitted = fitting(config, num_blocks)
        assert fitted.both_decode.kv_tokens == kv
        hybrid = next(rectangle for area, rectangle in areas_of(fitted, 32).items() if area.table == "hybrid")
        assert hybrid.along(3) == tuple(x for x in (512, 4096, 16384, 65536) if x <= kv[-1])


def test_on_a_device_with_less_memory_the_defaults_still_have_many_kv_tokens_beside_prefill() -> None:
    room_for = 400_000 // ProfileConfig().block_size  # tokens, as on a device of 80 GB
    assert fitting(ProfileConfig(), room_for).both_decode.kv_tokens == (512, 131072)


def test_more_values_beyond_the_ends_are_left_out_whatever_they_are() -> None:
    config = CONFIG.model_copy(update={"both_more": More(tokens=(9999,), mean_context=(8192,), kv_tokens=(131072,))})
    assert fitting(config, 10**6).both_decode == CONFIG.both_decode
    assert areas_of(fitting(config, 10**6), 32) == areas_of(CONFIG, 32)


def test_prompts_that_cannot_be_dealt_are_refused_before_anything_is_measured() -> None:
    with pytest.raises(InputError, match="tokens 250: found no"):
        fitting(CONFIG.model_copy(update={"both_more": More(tokens=(250,))}), 10**6)
    with pytest.raises(InputError, match="tokens 250: found no"):
        fitting(CONFIG.model_copy(update={"mixed_more": More(tokens=(250,))}), 10**6)


def test_more_values_go_with_the_basic_ones_that_they_were_chosen_for() -> None:
    assert any(ProfileConfig().mixed_more.values)
    assert not any(ProfileConfig().both_more.values)  # ragged batches tell what lies between
    assert ProfileConfig().ragged > 0
    both = {"tokens": [16, 64], "mean_context": [64]}
    assert not any(build({"both_prefill": both}, ProfileConfig, "test").both_more.values)
    given = {"both_prefill": both, "both_more": {"tokens": [32]}}
    for name in ("both_more", "mixed_more"):
        assert not any(getattr(build({"both_prefill": both}, ProfileConfig, "test"), name).values)
        assert getattr(build(given, ProfileConfig, "test"), name).tokens == (32,)
    assert build(given | {"mixed_more": {"batch": [9]}}, ProfileConfig, "test").mixed_more == More(batch=(9,))
    fused = {"mixed_more": {"batch": [24]}}
    rectangles = areas_of(build(fused, ProfileConfig, "test"), 132)
    for area, rectangle in rectangles.items():
        if area.table in ("hybrid", "mixed"):
            assert (24 in rectangle.along(2)) == (area.table == "mixed")


def test_areas_are_phases_alone_first_and_the_most_even_split_before_the_others() -> None:
    names = [area.name for area in areas_of(CONFIG, 32)]
    assert names[0] == "prefill on 32 SMs"
    assert names.index("mixed") == 8
    assert names[9:] == ["hybrid 16/16", "hybrid 8/24", "hybrid 24/8", "hybrid capped-16", "hybrid priority"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prefill_sms": (8, 32)}, "prefill_sms: found 32; expected less than the 32 SMs of the device"),
        ({"prefill_sms": (8, 28)}, "prefill_sms: found 28; expected at least 8 of 32 SMs to be left"),
        ({"capped_sms": (4,)}, "capped_sms: found 4; expected sizes that prefill_sms has"),
    ],
)
def test_sizes_that_do_not_exist_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        areas_of(CONFIG.model_copy(update=changed), 32)


def test_a_cost_model_is_as_wrong_at_a_row_as_its_worse_phase_beyond_the_rows_spread(measured: Path) -> None:
    cost, area = load_profile(measured).cost(), Area("hybrid", Allocation(Mode.SPLIT, 8, 24))
    found = next(h for h in load_profile(measured).hybrid.points if (h.mode, h.prefill_sms) == ("split", 8))
    p_ms, d_ms = found.prefill_median_ms, found.decode_median_ms
    sharp = replace(found, prefill_p10_ms=p_ms, prefill_p90_ms=p_ms, decode_p10_ms=d_ms, decode_p90_ms=d_ms)
    cell = Cell.at(area, tuple(getattr(found, name) for name in AXES["hybrid"]))
    assert relative_error(cost, cell, sharp) == pytest.approx(0, abs=1e-9)
    assert relative_error(cost, cell, replace(sharp, prefill_median_ms=p_ms / 2)) == pytest.approx(1)
    slower = replace(sharp, decode_median_ms=2 * d_ms)
    assert relative_error(cost, cell, slower) == pytest.approx(0.5)
    blurred = replace(slower, decode_p10_ms=1.8 * d_ms, decode_p90_ms=2.2 * d_ms)
    assert relative_error(cost, cell, blurred) == pytest.approx(0.5 - 0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"new_tokens": "1 x"}, "row 2: new_tokens: found '1 x'; expected whole numbers, or - for no batch"),
        ({"new_tokens": "1 2", "context_lens": "3"}, "row 2: context_lens: found 1 numbers; expected 2"),
        ({"phase": "both"}, "row 2: phase, mode: found both, split; expected prefill, decode or mixed, and a mode"),
        ({"new_tokens": "-", "context_lens": "-"}, "row 2: found no batch of prefill; expected one"),
    ],
)
def test_a_malformed_row_of_held_out_points_is_refused(changed: dict[str, str], message: str) -> None:
    point = HoldoutPoint("prefill", "split", 8, 24, "16", "0", "-", 5, 1.0, 1.0, 1.0)
    with pytest.raises(InputError, match=message):
        errors([replace(point, **changed)], {}, Path("holdout.csv"))


def test_a_grid_point_that_equal_prompts_cannot_fill_is_never_tried() -> None:
    assert PrefillWork.at(8192, 2048).seqs == 2
    with pytest.raises(InputError):
        PrefillWork.at(6146, 2048)
