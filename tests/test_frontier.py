"""The frontier and the survey: against brute force, closed forms and the rows of the tables themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf, isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_profile import (
    decode_ms,
    decode_slowdown,
    hybrid_points,
    mixed_ms,
    prefill_ms,
    prefill_slowdown,
    write_profile,
)

from semipd.core import InputError
from semipd.frontier import IN_TURN, InTurn, OperatingPoint, best_where, dominator, optimum
from semipd.points import Sharing
from semipd.prices import Place, Source, worst
from semipd.profile import Profile, load_profile
from semipd.survey import TYPICAL, Survey, _default, nearest_to, survey

DEVICE, LAYERS = 32, 4
GRID = Place(1024, 512, 16, 16384)  # on every table's grid but for the solo decode table's, which has no batch of 16

seconds = st.floats(1e-3, 1.0)
rates = st.floats(10.0, 1e6)
in_turns = st.builds(InTurn, step_s=seconds, prefill_tps=rates)
numbers = st.lists(st.tuples(seconds, rates), min_size=1, max_size=8)


def operating(values: list[tuple[float, float]]) -> list[OperatingPoint]:
    return [OperatingPoint(Sharing("split", n, 99 - n), s, t) for n, (s, t) in enumerate(values, 1)]


points_lists = numbers.map(operating)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return load_profile(write_profile(tmp_path_factory.mktemp("profile") / "p", DEVICE, layers=LAYERS))


@pytest.fixture(scope="module")
def with_chunks(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = write_profile(tmp_path_factory.mktemp("profile") / "all", DEVICE, layers=LAYERS, all_modes=True)
    return load_profile(folder)


@pytest.fixture(scope="module")
def shipped() -> Profile:
    return load_profile("h200/gqa-64-8-128")


def at(profile: Profile, place: Place, tpot_s: float | None = None) -> Survey:
    return survey(
        profile,
        tokens=place.tokens,
        mean_context=place.mean_context,
        batch=place.batch,
        kv_tokens=place.kv_tokens,
        tpot_s=tpot_s,
    )


@given(line=in_turns, share=st.floats(0.01, 0.99))
def test_in_turn_gives_each_phase_its_share_of_the_time(line: InTurn, share: float) -> None:
    work_s = 10.0  # so long prefill and decode take turns
    steps = (1 - share) * work_s / line.step_s
    point = OperatingPoint(Sharing("in-turn", 1, 1), work_s / steps, share * line.prefill_tps)
    assert line.tps_at(point.step_s) == pytest.approx(point.prefill_tps)
    assert line.step_s_at(point.prefill_tps) == pytest.approx(point.step_s)
    assert line.weighted_speedup(point) == pytest.approx(1)
    assert line.gain(point) == pytest.approx(1)


@given(line=in_turns, step_s=seconds, tps=rates)
def test_the_weighted_speedup_is_how_much_longer_in_turn_takes_for_the_same_work(
    line: InTurn, step_s: float, tps: float
) -> None:
    point = OperatingPoint(Sharing("split", 8, 24), step_s, tps)
    steps, tokens = 1 / step_s, tps  # in one second
    assert line.weighted_speedup(point) == pytest.approx(steps * line.step_s + tokens / line.prefill_tps)
    gain = line.gain(point)
    if gain is None:
        assert step_s <= line.step_s
    elif not isclose(gain, 1, rel_tol=1e-9):
        assert (gain > 1) == (line.weighted_speedup(point) > 1)


def test_in_turn_reaches_neither_phase_alone_while_the_other_runs() -> None:
    line = InTurn(0.01, 1000.0)
    assert (line.tps_at(0.01), line.tps_at(0.005)) == (0, 0)
    assert line.step_s_at(1000.0) == inf
    assert line.step_s_at(2000.0) == inf


@given(points=points_lists, line=in_turns)
def test_a_point_has_a_dominator_just_when_something_is_better_in_one_and_worse_in_none(
    points: list[OperatingPoint], line: InTurn
) -> None:
    for p in points:
        others = {
            q.name: q.prefill_tps
            for q in points
            if (q.step_s < p.step_s and q.prefill_tps >= p.prefill_tps)
            or (q.step_s <= p.step_s and q.prefill_tps > p.prefill_tps)
        }
        if line.tps_at(p.step_s) > p.prefill_tps:
            others[IN_TURN] = line.tps_at(p.step_s)
        found = dominator(p, points, line)
        assert (found is None) == (not others)
        if found is not None:
            assert others[found] == max(others.values())


@given(points=points_lists, line=in_turns, limits=st.lists(st.floats(5e-4, 5.0), min_size=1, max_size=10))
def test_what_is_best_where_has_the_most_prefill_at_every_limit(
    points: list[OperatingPoint], line: InTurn, limits: list[float]
) -> None:
    stretches = best_where(points, line)
    named = {p.name: p for p in points}
    for limit in [*limits, *(s.from_s for s in stretches)]:
        most = max([p.prefill_tps for p in points if p.step_s <= limit] + [line.tps_at(limit)])
        here = [s for s in stretches if s.from_s <= limit < s.to_s]
        if not here:
            assert most == 0
            continue
        (one,) = here
        tps = line.tps_at(limit) if one.best == IN_TURN else named[one.best].prefill_tps
        assert tps == pytest.approx(most, rel=1e-9, abs=1e-6 * line.prefill_tps)
        best = optimum(points, line, limit)
        reached = line.tps_at(limit) if best.take == IN_TURN else named[best.take].prefill_tps if best.take else 0.0
        assert reached == most


@given(points=points_lists, line=in_turns)
def test_the_stretches_follow_one_another_up_to_any_limit(points: list[OperatingPoint], line: InTurn) -> None:
    stretches = best_where(points, line)
    assert stretches[0].from_s == min([line.step_s, *(p.step_s for p in points)])
    assert stretches[-1].to_s == inf
    for before, after in pairwise(stretches):
        assert before.from_s < before.to_s == after.from_s
        assert before.best != after.best


@given(points=points_lists, line=in_turns)
def test_what_is_dominated_is_best_nowhere(points: list[OperatingPoint], line: InTurn) -> None:
    best = {s.best for s in best_where(points, line)}
    for p in points:
        if dominator(p, points, line) is not None:
            assert p.name not in best


def test_the_optimum_names_what_in_turn_makes_at_equal_decode_speed_and_at_the_limit() -> None:
    line = InTurn(0.010, 1000.0)
    points = operating([(0.012, 300.0), (0.020, 620.0), (0.040, 700.0)])
    found = optimum(points, line, 0.025)
    assert found.best == points[1]
    assert found.take == points[1].name
    assert (found.equal_tps, found.in_turn_tps) == (pytest.approx(500), pytest.approx(600))
    assert optimum(points, line, 0.030).take == IN_TURN  # 667 tokens/s with decode at 30 ms
    assert optimum(points, line, 0.011).best is None
    assert optimum(points, line, 0.011).take == IN_TURN
    assert optimum(points, line, 0.009).take is None


def test_a_survey_of_closed_forms_returns_them(profile: Profile) -> None:
    found = at(profile, GRID)
    p_tokens, context, batch, kv = GRID.tokens, GRID.mean_context, GRID.batch, GRID.kv_tokens
    assert [s.sharing.name for s in found.shared] == ["8/24", "16/16", "24/8"]
    for s, point in zip(found.shared, found.points, strict=True):
        layer_s = prefill_ms(p_tokens, context, s.sharing.prefill_sms) / 1e3
        step_s = decode_ms(batch, kv, s.sharing.decode_sms, DEVICE) / 1e3 * LAYERS
        assert s.prefill.alone.seconds == pytest.approx(layer_s)
        assert s.decode.alone.seconds == pytest.approx(step_s)
        assert s.prefill.slowdown == pytest.approx(prefill_slowdown(p_tokens, context, batch, kv))
        assert s.decode.slowdown == pytest.approx(decode_slowdown(p_tokens, context, batch, kv))
        assert s.spread == pytest.approx(1.05 - 0.98)
        assert point.step_s == s.decode.beside.seconds
        assert point.prefill_tps == pytest.approx(p_tokens / (s.prefill.beside.seconds * LAYERS))
    assert found.in_turn.step_s == pytest.approx(decode_ms(batch, kv, DEVICE, DEVICE) / 1e3 * LAYERS)
    assert list(found.prefill_alone) == [8, 16, 24, 32]
    assert found.prefill_alone[8].seconds == pytest.approx(prefill_ms(p_tokens, context, 8) / 1e3)


def test_every_value_says_where_it_is_from(profile: Profile) -> None:
    on = at(profile, GRID)
    assert {s.source for s in on.shared} == {Source.MEASURED}
    assert {t.source for t in on.prefill_alone.values()} == {Source.MEASURED}
    assert {t.source for t in on.decode_alone.values()} == {Source.INTERPOLATED}  # batch 16 between 8 and 64
    assert on.shared[0].decode.slowdown_source is Source.INTERPOLATED
    assert on.source is Source.INTERPOLATED
    assert on.nearest == GRID
    between = at(profile, replace(GRID, tokens=1000))
    assert {s.source for s in between.shared} == {Source.INTERPOLATED}
    assert [s.spread for s in between.shared] == [None] * 3
    assert between.nearest == GRID
    beyond = at(profile, replace(GRID, kv_tokens=1_000_000))
    assert {s.source for s in beyond.shared} == {Source.OUTSIDE}
    assert {t.source for t in beyond.prefill_alone.values()} == {Source.MEASURED}
    assert (beyond.source, beyond.in_turn_source) == (Source.OUTSIDE, Source.OUTSIDE)


def test_the_default_load_of_the_shipped_profile_is_measured_and_its_values_are_the_rows(shipped: Profile) -> None:
    found = survey(shipped)
    assert {s.source for s in found.shared} == {Source.MEASURED}
    assert found.nearest == found.place
    place = found.place
    rows = {
        (p.prefill_sms, p.decode_sms): p
        for p in shipped.hybrid.points
        if (p.tokens, p.mean_context, p.batch, p.kv_tokens)
        == (place.tokens, place.mean_context, place.batch, place.kv_tokens)
    }
    assert len(found.shared) == len(rows) == 16
    for s in found.shared:
        row = rows[s.sharing.prefill_sms, s.sharing.decode_sms]
        assert s.prefill.beside.seconds * 1e3 == pytest.approx(row.prefill_median_ms, rel=1e-12)
        assert s.decode.beside.seconds * 1e3 == pytest.approx(row.decode_median_ms * shipped.layers, rel=1e-12)
    distances = [TYPICAL.octaves_from(Place(p.tokens, p.mean_context, p.batch, p.kv_tokens)) for p in rows.values()]
    assert min(distances) == min(
        TYPICAL.octaves_from(Place(p.tokens, p.mean_context, p.batch, p.kv_tokens)) for p in shipped.hybrid.points
    )


def test_where_nothing_near_a_typical_load_was_measured_it_is_the_default_if_it_is_inside() -> None:
    def default(*loads: tuple[int, int, int, int]) -> Place:
        return _default([Place(*load) for load in loads])

    corners = (16, 64, 8, 512), (4096, 16384, 256, 524288)
    assert default(*corners) == TYPICAL
    assert default(*corners, (2048, 4096, 64, 131072)) == Place(2048, 4096, 64, 131072)
    assert default((16, 64, 8, 512), (1024, 16384, 256, 524288)) == Place(1024, 16384, 256, 524288)


def test_the_nearest_place_is_nearest_in_factors_of_two() -> None:
    places = [Place(16, 64, 1, 256), Place(2048, 2048, 256, 131072)]
    assert nearest_to(Place(300, 64, 8, 4096), places) == places[0]
    assert nearest_to(Place(2048, 2048, 300, 131072), places) == places[1]
    assert Place(8, 2, 1, 4).octaves_from(Place(2, 4, 1, 4)) == 3


def test_the_heat_map_is_the_survey_at_each_measured_decode_batch(profile: Profile) -> None:
    heat = at(profile, GRID).heat
    assert len(heat.rows) == 3
    assert (len(heat.decodes), heat.left_out) == (8, 1)
    for row in heat.rows:
        for decode, s in zip(heat.decodes, row, strict=True):
            assert s in at(profile, replace(GRID, batch=decode.batch, kv_tokens=decode.kv_tokens)).shared


def with_rows(profile: Profile, mode: str, decode_sms: int, keep: int | None = None) -> Profile:
    """A profile with rows of another mode: prefill on 8 or 16 SMs as in the splits, decode 1.1 times as long."""
    rows = [
        replace(p, mode=mode, decode_sms=decode_sms, decode_median_ms=1.1 * p.decode_median_ms)
        for p in hybrid_points([8, 16], DEVICE)
    ]
    points = (*profile.hybrid.points, *rows[:keep])
    return replace(profile, hybrid=replace(profile.hybrid, points=points))


def test_other_ways_of_sharing_join_the_frontier_when_they_were_measured(profile: Profile) -> None:
    capped = with_rows(profile, "capped", DEVICE)
    found = at(capped, GRID)
    assert [p.name for p in found.points] == ["8/24", "16/16", "24/8", "capped-8", "capped-16"]
    for i, same in ((3, 0), (4, 1)):
        assert found.shared[i].source is Source.MEASURED
        assert found.points[i].prefill_tps == pytest.approx(found.points[same].prefill_tps)
        assert found.points[i].step_s == pytest.approx(1.1 * found.points[same].step_s)
        assert found.dominated[found.points[i].name] == "16/16"
    assert found.missing_modes == ("priority", "streams", "mixed (fused chunks)")
    assert at(capped, replace(GRID, tokens=1000)).shared[3].source is Source.INTERPOLATED
    assert at(profile, GRID).missing_modes[0] == "capped"


def test_a_mode_that_was_not_measured_completely_is_left_out_and_the_reason_kept(profile: Profile) -> None:
    found = at(with_rows(profile, "capped", DEVICE, keep=5), GRID)
    assert [p.name for p in found.points] == ["8/24", "16/16", "24/8"]
    assert list(found.refused) == ["capped"]
    assert "no point at" in found.refused["capped"]


def test_a_fused_chunk_is_a_decode_step_that_leaves_what_decode_does_not_need_to_prompts(with_chunks: Profile) -> None:
    found = at(with_chunks, GRID)
    others = ["8/24", "16/16", "24/8", "capped-8", "capped-16", "capped-24", "priority"]
    chunks = found.points[len(others) :]
    assert [p.name for p in found.points[: len(others)]] == others
    assert [p.name for p in chunks] == ["chunked-256", "chunked-512", "chunked-1024", "chunked-2048"]
    for point in chunks:
        prompt = point.chunk_tokens - GRID.batch
        step_s = LAYERS * mixed_ms(prompt, GRID.mean_context, GRID.batch, GRID.kv_tokens) / 1e3
        assert point.step_s == pytest.approx(step_s)
        assert point.prefill_tps == pytest.approx(prompt / step_s)
        assert (point.source, point.spread) == (Source.INTERPOLATED, None)
    assert found.missing_modes == ("streams",)
    assert found.refused == {}


def test_a_fused_chunk_that_was_measured_is_said_to_be_and_has_its_spread(with_chunks: Profile) -> None:
    assert with_chunks.mixed is not None
    moved = [replace(p, tokens=240) if p.tokens == 256 else p for p in with_chunks.mixed.points]
    profile = replace(with_chunks, mixed=replace(with_chunks.mixed, points=tuple(moved)))
    (point,) = (p for p in at(profile, GRID).points if p.name == "chunked-256")
    assert point.source is Source.MEASURED
    assert point.spread == pytest.approx(1.05 - 0.98)


def test_the_optimum_is_a_fused_chunk_where_that_has_the_most_prefill(with_chunks: Profile) -> None:
    found = at(with_chunks, GRID, tpot_s=10.0)
    (largest,) = (p for p in found.points if p.name == "chunked-2048")
    assert largest.prefill_tps > max(p.prefill_tps for p in found.points if p != largest)
    assert found.optimum is not None
    assert found.optimum.best == largest
    names = {s.best for s in found.best_where} | set(found.dominated)
    assert {f"chunked-{n}" for n in (256, 512, 1024, 2048)} <= names


def test_chunks_of_more_or_fewer_prompt_tokens_than_were_measured_are_left_out_and_named(with_chunks: Profile) -> None:
    assert with_chunks.mixed is not None
    kept = [p for p in with_chunks.mixed.points if p.tokens <= 256]
    profile = replace(with_chunks, mixed=replace(with_chunks.mixed, points=tuple(kept)))
    found = at(profile, replace(GRID, batch=256))
    assert [p.name for p in found.points if p.chunk_tokens] == ["chunked-512"]
    assert {name: why.split(";")[0] for name, why in found.refused.items()} == {
        "chunked-256": "beside 256 decode tokens it has 0 prompt tokens a step",
        "chunked-1024": "beside 256 decode tokens it has 768 prompt tokens a step",
        "chunked-2048": "beside 256 decode tokens it has 1792 prompt tokens a step",
    }
    assert found.refused["chunked-256"].endswith("; 1 to 256 were measured")


def test_fused_steps_that_were_not_measured_completely_are_left_out_and_the_reason_kept(with_chunks: Profile) -> None:
    assert with_chunks.mixed is not None
    profile = replace(with_chunks, mixed=replace(with_chunks.mixed, points=with_chunks.mixed.points[:-1]))
    found = at(profile, GRID)
    assert not any(p.chunk_tokens for p in found.points)
    assert list(found.refused) == ["mixed"]
    assert "no point at" in found.refused["mixed"]


def test_a_load_outside_the_fused_grid_is_marked_so(with_chunks: Profile) -> None:
    beyond = at(with_chunks, replace(GRID, kv_tokens=1_000_000))
    assert {p.source for p in beyond.points if p.chunk_tokens} == {Source.OUTSIDE}


@pytest.mark.parametrize(
    ("place", "tpot_s", "message"),
    [
        (replace(GRID, tokens=0), None, "tokens: found 0; expected one or more"),
        (replace(GRID, batch=-1), None, "batch: found -1; expected one or more"),
        (replace(GRID, kv_tokens=15), None, "kv_tokens: found 15; expected at least one for each of batch 16"),
        (GRID, 0.0, "tpot_ms: found 0; expected a finite number above zero"),
        (GRID, float("nan"), "tpot_ms: found nan; expected a finite number above zero"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(
    profile: Profile, place: Place, tpot_s: float | None, message: str
) -> None:
    with pytest.raises(InputError) as error:
        at(profile, place, tpot_s)
    assert str(error.value) == message


def test_every_table_has_its_extent_and_its_provenance(profile: Profile, with_chunks: Profile) -> None:
    for loaded, names in (
        (profile, {"prefill", "decode", "hybrid"}),
        (with_chunks, {"prefill", "decode", "hybrid", "mixed"}),
    ):
        found = survey(loaded)
        assert set(found.extents) == set(found.provenance) == names
    assert found.extents["mixed"].values["tokens"] == (1, 256, 2048)
    assert found.provenance["mixed"]["gpu"] == "closed form"


def test_the_extent_is_that_of_the_tables(profile: Profile) -> None:
    extents = survey(profile).extents
    assert extents["hybrid"].rows == len(profile.hybrid.points)
    assert extents["prefill"].values["sms"] == (8, 16, 24, 32)
    assert extents["decode"].values["kv_tokens"] == (256, 4096, 65536, 524288)
    for extent in extents.values():
        assert (extent.spread_median, extent.spread_p95) == (pytest.approx(0.07), pytest.approx(0.07))


def test_the_worst_source_is_the_least_certain() -> None:
    assert worst([]) is Source.MEASURED
    assert worst([Source.INTERPOLATED, Source.MEASURED]) is Source.INTERPOLATED
    assert worst([Source.INTERPOLATED, Source.OUTSIDE, Source.MEASURED]) is Source.OUTSIDE


def test_the_folder_of_a_profile_does_not_reach_the_document(profile: Profile) -> None:
    assert str(profile.folder) not in str(survey(profile).document())
