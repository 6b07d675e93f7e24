"""The table cost model: law 8, bounds, edges, what is not measured, and profiles that cannot be used."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator
from synthetic_profile import (
    BATCHES,
    HYBRID_BATCHES,
    HYBRID_CONTEXTS,
    HYBRID_KV_TOKENS,
    HYBRID_TOKENS,
    KV_TOKENS,
    MEAN_CONTEXTS,
    PROVENANCE,
    TOKENS,
    decode_ms,
    decode_point,
    decode_points,
    decode_slowdown,
    hybrid_point,
    hybrid_points,
    mixed_point,
    prefill_ms,
    prefill_point,
    prefill_points,
    prefill_slowdown,
    write_profile,
)

from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, PrefillShape
from semipd.cost import ConstantCost, CostModel, Misjudged
from semipd.points import DecodePoint, DecodeWork, HybridPoint, MixedPoint, PrefillPoint, PrefillWork
from semipd.profile import Profile, load_profile, shipped_profiles
from semipd.sweep import decode_grid
from semipd.table_cost import TableCost
from semipd.table_files import TableWriter
from semipd.tables import Tables
from semipd.tiles import SplitKeys

DEVICE = 32
LAYERS = 4
WHOLE = Allocation(Mode.EXCLUSIVE, DEVICE, DEVICE)
SPLITS = [Allocation(Mode.SPLIT, n, DEVICE - n) for n in (8, 16, 24)]


def shape(tokens: float, mean_context: float) -> PrefillShape:
    return PrefillShape(tokens, float(tokens * mean_context))


def decode_step_s(cost: CostModel, batch: int, kv: int, at: Allocation, beside: PrefillShape | None = None) -> float:
    return float(cost.decode_s(DecodeShape(batch, kv), at, beside)[0][0])


def decode_steps_s(
    cost: CostModel, batch: int, kvs: Iterable[int], at: Allocation, beside: PrefillShape | None = None
) -> tuple[FloatArray, int]:
    """Seconds of steps that read so many tokens each, and how many are outside, each looked up by itself."""
    found = [cost.decode_s(DecodeShape(batch, int(kv)), at, beside) for kv in kvs]
    return np.array([seconds.item(0) for seconds, _ in found]), sum(outside for _, outside in found)


def model(**changed: list[PrefillPoint] | list[DecodePoint] | list[HybridPoint]) -> TableCost:
    points = {
        "prefill": prefill_points([8, 16, 24, 32]),
        "decode": decode_points([8, 16, 24, 32]),
        "hybrid": hybrid_points([8, 16, 24]),
    }
    return TableCost(Tables.of(**(points | changed), device_sms=DEVICE, layers=LAYERS))  # type: ignore[arg-type] # three kinds


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return load_profile(write_profile(tmp_path_factory.mktemp("profiles") / "synthetic", DEVICE, layers=LAYERS))


@pytest.fixture(scope="module")
def cost(profile: Profile) -> TableCost:
    return profile.cost()


# Random profiles: any grid, any times


@dataclass(frozen=True)
class RandomGrid:
    """A profile of one split (8/24 of 32 SMs) with random times on random grids, and its arrays by axis."""

    prefill_axes: tuple[list[int], ...]
    decode_axes: tuple[list[int], ...]
    hybrid_axes: tuple[list[int], ...]
    prefill_ms: dict[int, np.ndarray]
    decode_ms: dict[int, np.ndarray]
    both_ms: tuple[np.ndarray, np.ndarray]
    profile: Profile

    def solo_prefill(self, sms: int, tokens: float, mean_context: float) -> float:
        return interpolated(self.prefill_axes, self.prefill_ms[sms], (tokens, mean_context))

    def solo_decode(self, sms: int, batch: float, kv: float) -> float:
        return interpolated(self.decode_axes, self.decode_ms[sms], (batch, kv))

    def slowdowns(self) -> tuple[np.ndarray, np.ndarray]:
        prefill, decode = (np.empty_like(ms) for ms in self.both_ms)
        for i in np.ndindex(prefill.shape):
            t, m, b, k = (axis[j] for axis, j in zip(self.hybrid_axes, i, strict=True))
            prefill[i] = self.both_ms[0][i] / self.solo_prefill(8, t, m)
            decode[i] = self.both_ms[1][i] / self.solo_decode(24, b, k)
        return prefill, decode


def interpolated(
    axes: tuple[list[int], ...], values: np.ndarray, place: tuple[float, ...], *, log: bool = False
) -> float:
    """scipy's multilinear interpolation, clamped to the edge; it wants two values an axis."""
    keep = [i for i, axis in enumerate(axes) if len(axis) > 1]
    scale: Callable[[object], np.ndarray] = np.log2 if log else np.asarray  # type: ignore[assignment]
    squeezed = values.reshape([len(axes[i]) for i in keep])
    if not keep:
        return float(squeezed)
    inside = [np.clip(place[i], axes[i][0], axes[i][-1]) for i in keep]
    return float(RegularGridInterpolator([scale(axes[i]) for i in keep], squeezed)(scale(inside))[0])


powers = st.integers(0, 13).map(lambda n: 2**n)


def axis(low: int = 1, size: int = 4) -> st.SearchStrategy[list[int]]:
    values = powers.filter(lambda x: x >= low)
    return st.lists(values, min_size=1, max_size=size, unique=True).map(sorted)


@st.composite
def random_grids(draw: st.DrawFn) -> RandomGrid:
    solo_p, solo_d = (draw(axis(2)), draw(axis())), (draw(axis()), draw(axis()))
    hybrid = (draw(axis(2, 3)), draw(axis(1, 3)), draw(axis(1, 3)), draw(axis(1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p_ms = {sms: rng.lognormal(0, 2, [len(a) for a in solo_p]) for sms in (8, 32)}
    d_ms = {sms: rng.lognormal(0, 2, [len(a) for a in solo_d]) for sms in (24, 32)}
    both = (rng.lognormal(0, 2, [len(a) for a in hybrid]), rng.lognormal(0, 2, [len(a) for a in hybrid]))
    with tempfile.TemporaryDirectory() as folder:
        path = write_random(Path(folder) / "p", solo_p, solo_d, hybrid, p_ms, d_ms, both)
        return RandomGrid(solo_p, solo_d, hybrid, p_ms, d_ms, both, load_profile(path))


def write_random(
    folder: Path,
    solo_p: tuple[list[int], ...],
    solo_d: tuple[list[int], ...],
    hybrid: tuple[list[int], ...],
    p_ms: dict[int, np.ndarray],
    d_ms: dict[int, np.ndarray],
    both: tuple[np.ndarray, np.ndarray],
) -> Path:
    """Write times at every place of the grids; the fastest of three backends has the given time."""

    def work(t: int, m: int) -> PrefillWork:
        return PrefillWork(t, m, 1, t, m)  # only its place on the grid matters here

    prefill = TableWriter(folder / "prefill.csv", PrefillPoint, PROVENANCE)
    for (sms, ms), (slower, backend) in itertools.product(p_ms.items(), ((1.1, "a"), (1.0, "b"), (7.0, "c"))):
        for i, (t, m) in zip(np.ndindex(ms.shape), itertools.product(*solo_p), strict=True):
            prefill.add(replace(prefill_point(work(t, m), sms, backend), median_ms=float(ms[i]) * slower))
    decode = TableWriter(folder / "decode.csv", DecodePoint, PROVENANCE)
    for sms, ms in d_ms.items():
        for i, (b, k) in zip(np.ndindex(ms.shape), itertools.product(*solo_d), strict=True):
            decode.add(replace(decode_point(DecodeWork(b, k), sms), median_ms=float(ms[i])))
    table = TableWriter(folder / "hybrid.csv", HybridPoint, PROVENANCE)
    mixed = TableWriter(folder / "mixed.csv", MixedPoint, PROVENANCE)
    for i, (t, m, b, k) in zip(np.ndindex(both[0].shape), itertools.product(*hybrid), strict=True):
        point = hybrid_point(work(t, m), DecodeWork(b, k), 8)
        table.add(replace(point, prefill_median_ms=float(both[0][i]), decode_median_ms=float(both[1][i])))
        point = hybrid_point(work(t, m), DecodeWork(b, k), 8, mode="capped")
        table.add(replace(point, prefill_median_ms=float(both[1][i]), decode_median_ms=float(both[0][i])))
        fused = mixed_point(work(t, m), DecodeWork(b, k))
        mixed.add(replace(fused, median_ms=float(both[0][i] + both[1][i])))
    header = {
        "name": "random", "description": "", "device": "random", "device_sms": DEVICE, "layers": LAYERS,
        "kv_bytes_per_token": 1, "device_memory_bytes": 1, "weights_bytes": 0,
    }  # fmt: skip
    (folder / "profile.json").write_text(json.dumps(header), encoding="utf-8")
    return folder


random_profiles = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_reproduces_every_measured_point(profile: Profile) -> None:
    cost = profile.cost()
    fastest: dict[tuple[int, int, int], float] = {}
    for p in profile.prefill.points:
        place = (p.sms, p.tokens, p.mean_context)
        fastest[place] = min(p.median_ms, fastest.get(place, np.inf))
    for (sms, tokens, mean_context), ms in fastest.items():
        at = Allocation(Mode.SPLIT, sms, profile.device_sms - sms)
        assert cost.prefill_s(shape(tokens, mean_context), at, None) == (pytest.approx(ms / 1e3, rel=1e-9), False)
    for d in profile.decode.points:
        at = Allocation(Mode.SPLIT, profile.device_sms - d.sms, d.sms)
        seconds, outside = cost.decode_s(DecodeShape(d.batch, d.kv_tokens), at, None)
        assert seconds[0] == pytest.approx(d.median_ms / 1e3 * profile.layers, rel=1e-9)
        assert outside == 0
    for h in profile.hybrid.points:
        if h.mode == "streams":
            continue
        at = Allocation(Mode(h.mode), h.prefill_sms, h.decode_sms)
        p_shape, d_shape = shape(h.tokens, h.mean_context), DecodeShape(h.batch, h.kv_tokens)
        seconds_p, _ = cost.prefill_s(p_shape, at, d_shape)
        assert seconds_p == pytest.approx(h.prefill_median_ms / 1e3, rel=1e-9)
        seconds_d = decode_step_s(cost, h.batch, h.kv_tokens, at, p_shape)
        assert seconds_d == pytest.approx(h.decode_median_ms / 1e3 * profile.layers, rel=1e-9)
    for x in profile.mixed.points if profile.mixed else ():
        seconds_x, _ = cost.mixed_s(shape(x.tokens, x.mean_context), DecodeShape(x.batch, x.kv_tokens))
        assert seconds_x == pytest.approx(x.median_ms / 1e3 * profile.layers, rel=1e-9)


@random_profiles
@given(random_grids())
def test_every_measured_point_is_reproduced_solo_and_contended(grids: RandomGrid) -> None:
    assert_reproduces_every_measured_point(grids.profile)


def test_every_point_of_the_synthetic_profile_is_reproduced_and_inside(profile: Profile, cost: TableCost) -> None:
    assert_reproduces_every_measured_point(profile)
    for h in profile.hybrid.points:
        at, p_shape = Allocation(Mode(h.mode), h.prefill_sms, h.decode_sms), shape(h.tokens, h.mean_context)
        assert not cost.prefill_s(p_shape, at, DecodeShape(h.batch, h.kv_tokens))[1]
        assert not cost.decode_s(DecodeShape(h.batch, h.kv_tokens), at, p_shape)[1]


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_point_of_a_shipped_profile_is_reproduced(name: str) -> None:
    assert_reproduces_every_measured_point(load_profile(name))


# Anywhere, the edges included: sizes from well below to well above the random grids.
anywhere = st.tuples(
    st.integers(1, 20_000), st.floats(0.5, 20_000), st.integers(1, 20_000), st.lists(st.integers(1, 20_000), min_size=1)
)


@random_profiles
@given(random_grids(), anywhere)
def test_solo_times_agree_with_scipy_everywhere(grids: RandomGrid, place: tuple[int, float, int, list[int]]) -> None:
    tokens, context, batch, kvs = place
    cost = grids.profile.cost()
    for at in (Allocation(Mode.SPLIT, 8, 24), WHOLE):
        p = shape(tokens, context)
        expected = grids.solo_prefill(at.prefill_sms, tokens, p.mean_context)
        assert cost.prefill_s(p, at, None)[0] * 1e3 == pytest.approx(expected, rel=1e-9)
        found, _ = decode_steps_s(cost, batch, kvs, at)
        expected_ms = [grids.solo_decode(at.decode_sms, batch, kv) for kv in kvs]
        np.testing.assert_allclose(found * 1e3 / LAYERS, expected_ms, rtol=1e-9)


@random_profiles
@given(random_grids(), anywhere)
def test_contended_times_are_scipys_solo_time_over_its_speed_in_logarithms(
    grids: RandomGrid, place: tuple[int, float, int, list[int]]
) -> None:
    tokens, context, batch, kvs = place
    cost, at, p = grids.profile.cost(), Allocation(Mode.SPLIT, 8, 24), shape(tokens, context)
    context = p.mean_context
    p_slow, d_slow = grids.slowdowns()
    for kv in kvs:
        speed = interpolated(grids.hybrid_axes, 1 / p_slow, (tokens, context, batch, kv), log=True)
        found, _ = cost.prefill_s(p, at, DecodeShape(batch, kv))
        assert found * 1e3 == pytest.approx(grids.solo_prefill(8, tokens, context) / speed, rel=1e-9)

    # Decode: so at every KV count measured alone or beside prefill, and linear in time between these.
    knots = sorted({*grids.decode_axes[1], *grids.hybrid_axes[3]})
    at_knots = [
        grids.solo_decode(24, batch, kv)
        / interpolated(grids.hybrid_axes, 1 / d_slow, (tokens, context, batch, kv), log=True)
        for kv in knots
    ]
    found_d, _ = decode_steps_s(cost, batch, kvs, at, p)
    np.testing.assert_allclose(found_d * 1e3 / LAYERS, np.interp(kvs, knots, at_knots), rtol=1e-9)


def cell(values: list[int], x: float) -> slice:
    """The measured neighbours of x: two, or one beyond an edge."""
    low = max((i for i, v in enumerate(values) if v <= x), default=0)
    high = min((i for i, v in enumerate(values) if v >= x), default=len(values) - 1)
    return slice(low, high + 1)


@random_profiles
@given(random_grids(), anywhere)
def test_solo_times_and_slowdowns_stay_between_their_measured_neighbours(
    grids: RandomGrid, place: tuple[int, float, int, list[int]]
) -> None:
    tokens, context, batch, kvs = place
    cost, at, p = grids.profile.cost(), Allocation(Mode.SPLIT, 8, 24), shape(tokens, context)
    context = p.mean_context
    p_slow, d_slow = grids.slowdowns()

    def between(found: float, corners: np.ndarray) -> bool:
        return bool(corners.min() * (1 - 1e-9) <= found <= corners.max() * (1 + 1e-9))

    def corners(axes: tuple[list[int], ...], values: np.ndarray, *place: float) -> np.ndarray:
        return values[tuple(cell(a, x) for a, x in zip(axes, place, strict=True))]

    alone, _ = cost.prefill_s(p, at, None)
    assert between(alone * 1e3, corners(grids.prefill_axes, grids.prefill_ms[8], tokens, context))
    for kv in kvs:
        beside, _ = cost.prefill_s(p, at, DecodeShape(batch, kv))
        assert between(beside / alone, corners(grids.hybrid_axes, p_slow, tokens, context, batch, kv))
        step = decode_step_s(cost, batch, kv, at)
        assert between(step * 1e3 / LAYERS, corners(grids.decode_axes, grids.decode_ms[24], batch, kv))
        slowdown = decode_step_s(cost, batch, kv, at, p) / step
        assert between(slowdown, corners(grids.hybrid_axes, d_slow, tokens, context, batch, kv))


# The synthetic profile: closed forms


inside = st.tuples(
    st.integers(1, TOKENS[-1]),
    st.integers(MEAN_CONTEXTS[0], MEAN_CONTEXTS[-1]),
    st.integers(1, BATCHES[-1]),
    st.integers(KV_TOKENS[0], KV_TOKENS[-1]),
    st.sampled_from(SPLITS),
)


@given(inside)
def test_the_closed_forms_are_met_everywhere_inside_the_grid(
    cost: TableCost, place: tuple[int, int, int, int, Allocation]
) -> None:
    tokens, context, batch, kv, at = place
    p, d = shape(tokens, context), DecodeShape(batch, kv)
    alone_p, alone_d = prefill_ms(tokens, context, at.prefill_sms), decode_ms(batch, kv, at.decode_sms)
    slow_p = prefill_slowdown(tokens, context, batch, kv)
    assert cost.prefill_s(p, at, None) == (pytest.approx(alone_p / 1e3), False)
    assert cost.prefill_s(p, at, d) == (pytest.approx(alone_p * slow_p / 1e3), False)
    assert decode_step_s(cost, batch, kv, at) == pytest.approx(alone_d * LAYERS / 1e3)
    knot = HYBRID_KV_TOKENS[kv % len(HYBRID_KV_TOKENS)]
    expected = decode_ms(batch, knot, at.decode_sms) * decode_slowdown(tokens, context, batch, knot)
    assert decode_step_s(cost, batch, knot, at, p) == pytest.approx(expected * LAYERS / 1e3)


def test_a_phase_that_is_alone_runs_at_its_partitions_speed_or_the_whole_devices(cost: TableCost) -> None:
    p = shape(1024, 512)
    for at, sms in ((SPLITS[0], 8), (WHOLE, 32)):
        assert cost.prefill_s(p, at, None)[0] == pytest.approx(prefill_ms(1024, 512, sms) / 1e3)
    for at, sms in ((SPLITS[0], 24), (WHOLE, 32)):
        assert decode_step_s(cost, 64, 65536, at) == pytest.approx(decode_ms(64, 65536, sms) * LAYERS / 1e3)


def test_the_splits_are_those_of_the_hybrid_table_by_ascending_prefill_sms(cost: TableCost) -> None:
    assert list(cost.splits) == SPLITS
    assert (cost.device_sms, cost.layers) == (DEVICE, LAYERS)


def test_the_fastest_backend_counts_wherever_it_is_in_the_table() -> None:
    points = prefill_points([8, 16, 24, 32])
    assert {p.backend for p in points} == {"fa2", "fa3"}
    only_fast = model(prefill=[p for p in points if p.backend == "fa3"])
    for some in (points, points[::-1]):
        assert model(prefill=some).prefill_s(shape(100, 700), WHOLE, None) == only_fast.prefill_s(
            shape(100, 700), WHOLE, None
        )


def test_other_ways_of_sharing_in_the_hybrid_table_change_nothing(cost: TableCost) -> None:
    rows = hybrid_points([8, 16, 24])
    odd = [replace(rows[0], mode=mode, prefill_median_ms=99.0) for mode in ("capped", "priority", "streams")]
    with_odd = model(hybrid=[*odd, *rows])
    p, d = shape(rows[0].tokens, rows[0].mean_context), DecodeShape(rows[0].batch, rows[0].kv_tokens)
    assert with_odd.splits == cost.splits
    assert with_odd.prefill_s(p, SPLITS[0], d) == cost.prefill_s(p, SPLITS[0], d)


# Edges


@given(
    st.sampled_from(SPLITS),
    st.integers(1, 2 * TOKENS[-1]),
    st.floats(1, 2 * MEAN_CONTEXTS[-1]),
    st.integers(1, 2 * BATCHES[-1]),
    st.lists(st.integers(1, 2 * KV_TOKENS[-1]), min_size=1, max_size=20),
)
def test_a_look_up_is_clamped_to_the_edge_and_counted_exactly_when_it_is_beyond_the_last_point(
    cost: TableCost, at: Allocation, tokens: int, context: float, batch: int, kvs: list[int]
) -> None:
    p, d = shape(tokens, context), DecodeShape(batch, kvs[0])
    at_edge = shape(min(tokens, TOKENS[-1]), min(p.mean_context, MEAN_CONTEXTS[-1]))
    edge_batch, edge_kvs = min(batch, BATCHES[-1]), np.minimum(kvs, KV_TOKENS[-1])
    p_out = tokens > TOKENS[-1] or p.mean_context > MEAN_CONTEXTS[-1]
    d_out = batch > BATCHES[-1] or kvs[0] > KV_TOKENS[-1]

    for beside, outside in ((None, p_out), (d, p_out or d_out)):
        edge = None if beside is None else DecodeShape(edge_batch, int(edge_kvs[0]))
        assert cost.prefill_s(p, at, beside) == (pytest.approx(cost.prefill_s(at_edge, at, edge)[0]), outside)
    for other, edge_p, all_out in ((None, None, False), (p, at_edge, p_out)):
        seconds, count = decode_steps_s(cost, batch, kvs, at, other)
        np.testing.assert_allclose(seconds, decode_steps_s(cost, edge_batch, edge_kvs, at, edge_p)[0], rtol=1e-12)
        out = [all_out or batch > BATCHES[-1] or kv > KV_TOKENS[-1] for kv in kvs]
        assert count == sum(out)


def test_less_work_than_a_tile_costs_what_a_tile_costs_and_is_not_outside(cost: TableCost) -> None:
    assert (TOKENS[0], MEAN_CONTEXTS[0], KV_TOKENS[0]) == (1, 16, 256)
    at, d = SPLITS[1], DecodeShape(1, 10)
    assert cost.prefill_s(shape(64, 3), at, None) == cost.prefill_s(shape(64, 16), at, None)
    assert cost.prefill_s(shape(64, 3), at, d) == cost.prefill_s(shape(64, 16), at, DecodeShape(1, 256))
    seconds, outside = decode_steps_s(cost, 1, [10, 256], at, shape(1, 0.5))
    assert (seconds[0], outside) == (seconds[1], 0)


def test_below_a_least_point_that_is_more_than_a_tile_is_outside() -> None:
    sizes = [8, 16, 24, 32]
    large = model(
        prefill=[p for p in prefill_points(sizes) if p.tokens >= 64 and p.mean_context >= 512],
        decode=[d for d in decode_points(sizes) if d.batch >= 64 and d.kv_tokens >= 4096],
    )
    at = SPLITS[0]
    least = large.prefill_s(shape(64, 512), at, None)
    assert least[1] is False
    assert large.prefill_s(shape(63, 512), at, None) == (least[0], True)
    assert large.prefill_s(shape(64, 511), at, None) == (least[0], True)
    assert decode_steps_s(large, 64, [4095, 4096], at)[1] == 1
    assert decode_steps_s(large, 63, [4095, 4096], at)[1] == 2
    assert decode_steps_s(large, 64, [4095, 4096], at, shape(1024, 512))[1] == 1


def test_a_prefill_that_fills_every_partition_has_the_slowdown_of_one_that_also_does() -> None:
    def up_to(tokens: int) -> TableCost:
        points = [
            hybrid_point(PrefillWork.at(t, 512), d, 8)
            for t in (1, tokens)
            for d in decode_grid(HYBRID_BATCHES, HYBRID_KV_TOKENS)
        ]
        return model(hybrid=points)

    at, beside = SPLITS[0], DecodeShape(16, 16384)
    for tokens, outside in ((1024, True), (2048, False)):
        cost = up_to(tokens)
        slowdown = [cost.prefill_s(shape(t, 512), at, beside)[0] / cost.prefill_s(shape(t, 512), at, None)[0]
                    for t in (tokens, 8192)]  # fmt: skip
        assert slowdown[1] == pytest.approx(slowdown[0])
        assert cost.prefill_s(shape(8192, 512), at, beside)[1] is outside
    assert up_to(2048).prefill_s(shape(8193, 512), at, beside)[1] is True


def test_beside_prefill_the_edges_of_the_hybrid_grid_count_too() -> None:
    narrow = model(hybrid=[h for h in hybrid_points([8, 16, 24]) if h.kv_tokens == 16384 and h.tokens >= 1024])
    at, kvs = SPLITS[0], [16383, 16384, 16385]
    assert decode_steps_s(narrow, 16, kvs, at)[1] == 0
    assert decode_steps_s(narrow, 16, kvs, at, shape(1024, 512))[1] == 2
    assert decode_steps_s(narrow, 16, kvs, at, shape(1023, 512))[1] == 3
    assert narrow.prefill_s(shape(1024, 512), at, DecodeShape(16, 16384))[1] is False
    assert narrow.prefill_s(shape(1024, 512), at, DecodeShape(16, 16385))[1] is True


def test_an_unmeasured_partition_or_way_of_sharing_is_a_key_error_that_lists_the_measured(cost: TableCost) -> None:
    p, d = shape(64, 512), DecodeShape(8, 4096)
    odd = Allocation(Mode.SPLIT, 12, 20)
    with pytest.raises(KeyError, match="prefill on 12 SMs was not measured; measured: 8, 16, 24, 32"):
        cost.prefill_s(p, odd, None)
    with pytest.raises(KeyError, match="decode on 20 SMs was not measured; measured: 8, 16, 24, 32"):
        cost.decode_s(d, odd, None)
    for at, name in (
        (Allocation(Mode.SPLIT, 8, 16), "8/16"),
        (Allocation(Mode.CAPPED, 8, 32), "capped-8"),
        (WHOLE, "full"),
    ):
        message = f"both phases at {name} were not measured; measured: 8/24, 16/16, 24/8"
        with pytest.raises(KeyError, match=message):
            cost.prefill_s(p, at, d)
        with pytest.raises(KeyError, match=message):
            cost.decode_s(d, at, p)


# Many look-ups


look_ups = st.lists(
    st.tuples(
        st.integers(1, 300),
        st.integers(1, 600_000),
        st.integers(1, 600),
        st.sampled_from(SPLITS),
        st.none() | st.builds(shape, st.integers(1, 9000), st.integers(1, 40_000)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=30)
@given(look_ups)
def test_a_vector_of_steps_costs_what_its_steps_cost_whatever_was_asked_before(profile: Profile, asked: list) -> None:
    used = profile.cost()
    for _ in range(2):
        for batch, first, steps, at, beside in asked:
            seconds, outside = used.decode_s(DecodeShape(batch, first), at, beside, steps)
            fresh = pickle.loads(pickle.dumps(used))  # without what it remembers
            one_by_one, each = decode_steps_s(fresh, batch, range(first, first + batch * steps, batch), at, beside)
            assert seconds.tolist() == one_by_one.tolist()
            assert outside == each


def test_a_pickled_model_gives_the_same_times(cost: TableCost) -> None:
    p, d = shape(3000, 700), DecodeShape(37, 90_000)
    cost.decode_s(DecodeShape(37, 90_000), SPLITS[1], p)
    copy = pickle.loads(pickle.dumps(cost))
    assert copy.splits == cost.splits
    assert copy.prefill_s(p, SPLITS[1], d) == cost.prefill_s(p, SPLITS[1], d)
    assert decode_step_s(copy, 37, 90_000, SPLITS[1], p) == decode_step_s(cost, 37, 90_000, SPLITS[1], p)


def test_a_constant_cost_is_constant() -> None:
    constant = ConstantCost(0.01, 0.02, layers=3, device_sms=32)
    assert list(constant.splits) == SPLITS
    assert constant.prefill_s(shape(5, 1), SPLITS[0], DecodeShape(1, 1)) == (0.01, False)
    seconds, outside = constant.decode_s(DecodeShape(7, 10), WHOLE, None, steps=2)
    assert (seconds.tolist(), outside) == ([0.02, 0.02], 0)


# Points that the model was not made from


# Profiles that cannot be used


def test_a_profile_is_known_by_its_folder_and_says_what_it_is_of(profile: Profile) -> None:
    assert (profile.name, profile.device, profile.device_sms, profile.layers) == ("synthetic", "closed form", 32, 4)
    assert (profile.kv_bytes_per_token, profile.device_memory_bytes, profile.weights_bytes) == (4096 * 4, 4 << 30, 0)
    assert profile.prefill.points == tuple(prefill_points([8, 16, 24, 32]))
    assert profile.hybrid.points == tuple(hybrid_points([8, 16, 24]))
    assert profile.decode.provenance["gpu"] == "closed form"


def test_an_unknown_profile_lists_the_shipped_ones() -> None:
    names = ", ".join(shipped_profiles()) or "none shipped"
    with pytest.raises(
        InputError, match=f"^profile: found 'h200/nope'; expected a folder or one of {re.escape(names)}$"
    ):
        load_profile("h200/nope")


def edit_header(folder: Path, **changed: object) -> None:
    path = folder / "profile.json"
    header = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({k: v for k, v in header.items() if v is not None}))


def drop_rows(folder: Path, table: str, start: str) -> None:
    path = folder / table
    rows = path.read_text().splitlines(keepends=True)
    kept = [row for row in rows if not row.startswith(start)]
    assert len(kept) < len(rows)
    path.write_text("".join(kept))


def edit(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


SPLIT_KEYS = {"rule": "waves-1", "query_heads": 32, "kv_heads": 8, "head_dim": 128, "workspace_bytes": 1 << 30}

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no header": (
        lambda f: (f / "profile.json").unlink(),
        "profile.json: not found; expected the profile's description",
    ),
    "no JSON": (
        lambda f: (f / "profile.json").write_text("{"),
        r"profile.json: not JSON \(EOF .*\); expected an object",
    ),
    "no object": (lambda f: (f / "profile.json").write_text("[]"), r"profile.json: the whole: found \[\]; expected .*"),
    "missing field": (lambda f: edit_header(f, layers=None), "profile.json: layers: missing; expected a value"),
    "unknown field": (
        lambda f: edit_header(f, sms=1),
        "profile.json: sms: unknown; expected only name, .*weights_bytes, overheads, padded, model, split_keys",
    ),
    "unknown overhead": (
        lambda f: edit_header(f, overheads={"start_ms": 1.0}),
        "profile.json: overheads.start_ms: unknown; expected only prefill_start_ms, .*, switch_ms",
    ),
    "negative overhead": (
        lambda f: edit_header(f, overheads={"switch_ms": -1.0}),
        "profile.json: overheads.switch_ms: found -1.0; expected zero or more",
    ),
    "unknown padding": (
        lambda f: edit_header(f, padded={"rows": [1]}),
        "profile.json: padded.rows: unknown; expected only batch, tokens, queries",
    ),
    "padding that descends": (
        lambda f: edit_header(f, padded={"batch": [1, 8, 4]}),
        r"profile.json: padded.batch: found \[1, 8, 4\]; expected ascending sizes from one on",
    ),
    "heads that cannot be": (
        lambda f: edit_header(f, split_keys=SPLIT_KEYS | {"kv_heads": 64}),
        r"profile.json: split_keys.query_heads, kv_heads, .*: found 32, 64, 128, \d+; expected .* KV heads, and bytes",
    ),
    "heads in words": (
        lambda f: edit_header(f, split_keys=SPLIT_KEYS | {"kv_heads": "8"}),
        "profile.json: split_keys.kv_heads: found '8'; expected to be a valid integer",
    ),
    "a rule of another time": (
        lambda f: edit_header(f, split_keys=SPLIT_KEYS | {"rule": "waves-0"}),
        "profile.json: split_keys.rule: found 'waves-0'; expected to be 'waves-1'",
    ),
    "unknown of split keys": (
        lambda f: edit_header(f, split_keys=SPLIT_KEYS | {"sms": 1}),
        "profile.json: split_keys.sms: unknown; expected only rule, query_heads, kv_heads, head_dim, workspace_bytes",
    ),
    "malformed fused batch": (
        lambda f: ((f / "mixed.csv").write_text("tokens\n"), (f / "mixed.json").write_text("{}")),
        "mixed.csv: row 1: found columns tokens; expected tokens,mean_context,.*",
    ),
    "text for a number": (
        lambda f: edit_header(f, layers="4"),
        "profile.json: layers: found '4'; expected to be a valid integer",
    ),
    "no layers": (lambda f: edit_header(f, layers=0), "profile.json: layers: found 0; expected to be greater than 0"),
    "no table": (lambda f: (f / "decode.csv").unlink(), "decode.csv: not found; expected a sweep table"),
    "no provenance": (
        lambda f: (f / "hybrid.json").unlink(),
        "hybrid.json: not found; expected the provenance of hybrid.csv beside it",
    ),
    "malformed row": (
        lambda f: edit(f, "decode.csv", "8,1,256,fa2", "8,one,256,fa2"),
        "decode.csv: row 2: batch: found 'one'; expected an integer",
    ),
    "more SMs than the device": (
        lambda f: edit(f, "prefill.csv", "\n16,", "\n36,"),
        "prefill.csv: row 3: sms: found 36; expected at most the device's 32",
    ),
    "overlapping split": (
        lambda f: edit(f, "hybrid.csv", "split,8,24,", "split,16,24,"),
        r"hybrid.csv: row 2: prefill_sms \+ decode_sms: found 40; expected at most the device's 32",
    ),
}

INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "prefill point": (
        lambda f: (drop_rows(f, "prefill.csv", "16,64,512,"), drop_rows(f, "prefill.csv", "16,1024,16,")),
        r"prefill.csv: 16 SMs: no point at tokens 64, mean_context 512 \(and 1 more\); "
        "expected every combination of tokens and mean_context",
    ),
    "decode point": (
        lambda f: drop_rows(f, "decode.csv", "24,64,65536,"),
        "decode.csv: 24 SMs: no point at batch 64, kv_tokens 65536; expected every combination of batch and kv_tokens",
    ),
    "hybrid point": (
        lambda f: drop_rows(f, "hybrid.csv", hybrid_row_start()),
        "hybrid.csv: split 8/24: no point at tokens 1, mean_context 16, batch 1, kv_tokens 256; "
        "expected every combination of tokens and mean_context and batch and kv_tokens, or a sparse grid",
    ),
    "whole device": (
        lambda f: drop_rows(f, "decode.csv", "32,"),
        "decode.csv: sms: 32 not found; expected it, being the whole device",
    ),
    "a split's partition": (
        lambda f: drop_rows(f, "prefill.csv", "24,"),
        "prefill.csv: sms: 24 not found; expected it, for split 24/8 of hybrid.csv",
    ),
    "split": (
        lambda f: (f / "hybrid.csv").write_text((f / "hybrid.csv").read_text().replace("split", "capped")),
        "hybrid.csv: no row of mode split; expected at least one measured split",
    ),
    "context": (
        lambda f: (f / "prefill.csv").write_text((f / "prefill.csv").read_text().replace(",16,", ",0,")),
        "prefill.csv: 8 SMs: mean_context: found 0; expected one or more",
    ),
}


def hybrid_row_start() -> str:
    h = hybrid_point(PrefillWork.at(HYBRID_TOKENS[0], HYBRID_CONTEXTS[0]), DecodeWork(HYBRID_BATCHES[0], 256), 8)
    return f"split,8,24,{h.tokens},{h.mean_context},{h.seqs},{h.seq_tokens},{h.seq_context},{h.batch},{h.kv_tokens},"


@pytest.mark.parametrize("what", BROKEN)
def test_a_malformed_profile_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    breaks, message = BROKEN[what]
    folder = write_profile(tmp_path / "p", DEVICE)
    breaks(folder)
    with pytest.raises(InputError, match=f"^{re.escape(str(folder))}/{message}$"):
        load_profile(folder)


@pytest.mark.parametrize("what", INCOMPLETE)
def test_what_an_incomplete_profile_lacks_is_said_in_one_line(tmp_path: Path, what: str) -> None:
    breaks, message = INCOMPLETE[what]
    folder = write_profile(tmp_path / "p", DEVICE)
    breaks(folder)
    loaded = load_profile(folder)
    with pytest.raises(InputError, match=f"^{re.escape(str(folder))}/{message}$"):
        loaded.cost()


def test_a_misjudged_model_is_off_by_one_factor_for_each_phase_and_allocation(cost: TableCost) -> None:
    seen = Misjudged(cost, 0.2, seed=1)
    factors = set()
    for at in cost.splits:
        for tokens, context in ((16, 64), (1024, 512), (4000, 3000)):
            p = shape(tokens, context)
            ratio = seen.prefill_s(p, at, None)[0] / cost.prefill_s(p, at, None)[0]
            factors.add((at, "prefill", round(ratio, 12)))
            ratios = np.divide(*(decode_steps_s(of, 8, [256, 5000, 60000], at, p)[0] for of in (seen, cost)))
            factors |= {(at, "decode", round(float(r), 12)) for r in ratios}
    assert len(factors) == 2 * len(cost.splits)
    assert len({factor for _, _, factor in factors}) == len(factors)


def test_misjudging_is_drawn_with_its_seed_and_as_wide_as_asked() -> None:
    split = [Allocation(Mode.SPLIT, n, 1000 - n) for n in range(1, 1000)]
    truth = ConstantCost(1.0, 1.0, device_sms=1000)
    one, again, other = (Misjudged(truth, 0.1, seed) for seed in (3, 3, 4))
    logs = np.log([one.prefill_s(shape(1, 0.5), at, None)[0] for at in split])
    assert logs.tolist() == np.log([again.prefill_s(shape(1, 0.5), at, None)[0] for at in split]).tolist()
    assert not np.allclose(logs, np.log([other.prefill_s(shape(1, 0.5), at, None)[0] for at in split]))
    assert abs(logs.mean()) < 0.015
    assert logs.std() == pytest.approx(0.1, rel=0.1)
    assert Misjudged(truth, 0.0).prefill_s(shape(1, 0.5), split[0], None) == (1.0, False)


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 30000)), min_size=1, max_size=8),
    st.sampled_from([16, 64, 96, 132]),
)
@settings(max_examples=50, deadline=None)  # the first example reads a profile
def test_attention_is_priced_by_how_each_prompt_is_dealt_to_the_sms(prompts: list[tuple[int, int]], sms: int) -> None:
    """A device on which nothing else takes time but a constant is priced exactly, whatever the batch."""
    new, context = tuple(q for q, _ in prompts), tuple(c for _, c in prompts)
    cost = only_waves()
    seconds, _ = cost.prefill_s(PrefillShape.of(new, context), Allocation(Mode.SPLIT, sms, sms), None)
    assert seconds == pytest.approx(1e-3 + WAVES.seconds(new, context, sms))


WAVES = SplitKeys(query_heads=32, kv_heads=8, head_dim=128).waves


@cache
def only_waves() -> CostModel:
    profile = load_profile("h200/llama-3-8b")
    points = tuple(
        replace(p, median_ms=1 + 1e3 * WAVES.seconds([p.seq_tokens] * p.seqs, [p.seq_context] * p.seqs, p.sms))
        for p in profile.prefill.points
    )
    assert {p.backend for p in points} == {"fa2"}
    return replace(profile, prefill=replace(profile.prefill, points=points)).cost()


def test_a_batch_whose_prompts_are_not_known_is_priced_as_equal_ones() -> None:
    cost, at = load_profile("h200/llama-3-8b").cost(), Allocation(Mode.SPLIT, 64, 68)
    for tokens, context, known in ((352, 8000, ((352,), (7824,))), (300, 50, ((100,) * 3, (0,) * 3))):
        shape = PrefillShape(tokens, float(tokens * context))
        assert cost.prefill_s(shape, at, None)[0] == pytest.approx(cost.prefill_s(PrefillShape.of(*known), at, None)[0])


@pytest.mark.parametrize("points", ["some", "none"])
def test_only_where_it_is_known_how_tiles_are_dealt_nothing_is_added_for_those_that_are_not_full(points: str) -> None:
    """A partition with another kernel has its half tiles, whatever the others have; so have fused steps."""
    profile = replace(load_profile("h200/llama-3-8b"), ragged=None)  # from which partitions learn together
    prefill = tuple(replace(p, backend="fa3") if points == "none" or p.sms == 64 else p for p in profile.prefill.points)
    cost = replace(profile, prefill=replace(profile.prefill, points=prefill)).cost()
    plain = replace(profile, split_keys=None).cost()
    batch, decode = PrefillShape.of((20,) * 30, (500,) * 30), DecodeShape(8, 512)
    for sms in (64, 96):
        at = Allocation(Mode.SPLIT, sms, profile.device_sms - sms)
        same = cost.prefill_s(batch, at, None) == plain.prefill_s(batch, at, None)
        assert same == (points == "none" or sms == 64)
        assert (cost.prefill_s(batch, at, decode) == plain.prefill_s(batch, at, decode)) == same
    assert cost.mixed_s(batch, decode) == plain.mixed_s(batch, decode)
