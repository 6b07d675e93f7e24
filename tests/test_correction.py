"""Contention learnt from ragged batches: the smooth correction, profiles that have such batches, measuring them."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from closed_form_cost import ClosedFormCost
from hypothesis import given, settings
from hypothesis import strategies as st
from test_campaign import ABOUT, CONFIG, MODEL, SCALES, subject

from semipd.areas import areas_of
from semipd.campaign import measure_profile
from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, PrefillShape
from semipd.correction import (
    EXACT,
    LENGTHS,
    MOST,
    NOISE,
    OTHER_MODE,
    SMS_LENGTH,
    SPREAD,
    Correction,
    Seen,
    Units,
    uncertainty,
)
from semipd.holdout import held_out
from semipd.points import RaggedPoint
from semipd.prices import Prices, place_of
from semipd.profile import Profile, load_profile
from semipd.profiler import Progress
from semipd.scatter import Scatter
from semipd.sim import SimExecutor
from semipd.stopwatch import Stopwatch
from semipd.survey import survey
from semipd.table_files import TableWriter, read_points

PLACES = st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=6, unique=True)


WAYS = (Allocation(Mode.SPLIT, 64, 68), Allocation(Mode.SPLIT, 16, 116), Allocation(Mode.CAPPED, 64, 132))


def plain_kriging(at: tuple[Allocation, Sequence[float]], seen: Sequence[Seen]) -> tuple[float, float]:
    """Mean and variance at one place of one way by the textbook's formulas, number by number."""

    def alike(a: tuple[Allocation, Sequence[float]], b: tuple[Allocation, Sequence[float]]) -> float:
        octaves = 3**0.5 * abs(float(np.log2(a[0].prefill_sms / b[0].prefill_sms))) / SMS_LENGTH
        found = (1 + octaves) * float(np.exp(-octaves)) * (1 if a[0].mode is b[0].mode else OTHER_MODE)
        for x, y, length in zip(a[1], b[1], LENGTHS, strict=True):
            d = 3**0.5 * abs(x - y) / length
            found *= 0.5 + 0.5 * (1 + d) * float(np.exp(-d))
        return SPREAD**2 * found

    known = [(of.at, place, 0.0, EXACT) for of in seen for place in of.exact]
    known += [(of.at, place, off, NOISE**2) for of in seen for place, off in zip(of.places, of.off, strict=True)]
    matrix = np.array([[alike(a[:2], b[:2]) + (a is b) * a[3] for b in known] for a in known])
    across = np.array([alike(at, b[:2]) for b in known])
    weights = np.linalg.solve(matrix, across)
    return float(weights @ np.array([value for _, _, value, _ in known])), SPREAD**2 - float(weights @ across)


@given(st.tuples(PLACES, PLACES, PLACES), st.sampled_from(WAYS), st.data())
@settings(deadline=None, max_examples=12)
def test_it_is_kriging_of_all_ways_together_no_farther_than_was_seen(
    places: tuple[list[tuple[float, ...]], ...], way: Allocation, data: st.DataObject
) -> None:
    corners = np.array(list(np.ndindex(2, 2, 2, 2)), np.float64)
    seen = []
    for at, of in zip(WAYS, places, strict=True):
        off = data.draw(st.lists(st.floats(-0.3, 0.3), min_size=len(of), max_size=len(of)))
        seen.append(Seen(at, corners, np.array(of), np.array(off)))
    nodes = [np.array([0.0, 0.3, 1.0]), np.array([0.0, 0.6]), np.array([0.5]), np.array([0.1, 0.9])]
    found = Correction.of(seen).at_all(way, nodes)
    assert found.shape == (3, 2, 1, 2)
    everything = np.concatenate([of.off for of in seen])
    for index in np.ndindex(*found.shape):
        mean, _ = plain_kriging((way, [of[i] for of, i in zip(nodes, index, strict=True)]), seen)
        expected = np.clip(mean, min(0.0, everything.min()), max(0.0, everything.max()))
        assert found[index] == pytest.approx(expected, abs=1e-6)


@given(PLACES, PLACES)
@settings(deadline=None)
def test_uncertainty_is_the_variance_that_is_left(
    places: list[tuple[float, ...]], known: list[tuple[float, ...]]
) -> None:
    found = uncertainty(np.array(places), np.array(known))
    for share, at in zip(found, places, strict=True):
        _, variance = plain_kriging(
            (WAYS[0], at), [Seen(WAYS[0], np.zeros((0, 4)), np.array(known), np.zeros(len(known)))]
        )
        assert share == pytest.approx(variance / SPREAD**2, abs=1e-8)
    assert (uncertainty(np.array(places), np.zeros((0, 4))) == 1).all()


def test_places_are_measured_by_logarithms_between_the_ends() -> None:
    units = Units.of([(16, 256, 4096), (64, 64)], (0.0, 2048.0))
    assert units.at(np.array([[16, 64], [256, 64], [4096, 64], [1, 9e9]])).tolist() == [
        [0, 0],
        [0.5, 0],
        [1, 0],
        [0, 0],
    ]
    assert units.along(0, (16, 256)).tolist() == [0, 0.5]


@dataclass(frozen=True)
class Hilly(ClosedFormCost):
    """Contention that no grid of the ends shows: of prefill by tokens and batch, of decode by KV tokens."""

    height: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys((8, 16, 24, 32), 0.3))

    def _hill(self, at: Allocation, x: float, least: float, most: float) -> float:
        along = (np.log(x) - np.log(least)) / (np.log(most) - np.log(least))
        return 1 + self.height.get(at.prefill_sms, 0.0) * float(np.sin(np.pi * np.clip(along, 0, 1)))

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        seconds, outside = super().prefill_s(shape, at, beside)
        hill = self._hill(at, shape.tokens, 16, 4096) * self._hill(at, beside.batch, 8, 64) if beside else 1.0
        return seconds * hill, outside

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        seconds, outside = super().decode_s(shape, at, beside, steps)
        along = shape.kv_tokens + SCALES.kv_tokens, 512 + SCALES.kv_tokens, 65536 + SCALES.kv_tokens
        return seconds * (self._hill(at, *along) if beside else 1.0), outside


def measured_with(out: Path, truth: ClosedFormCost, **changed: object) -> Profile:
    config = CONFIG.model_copy(update={"ragged": 40, "holdout": 60, "modes": ("split", "capped"), **changed})
    measure_profile(subject(truth), config, out, ABOUT)
    return load_profile(out)


@pytest.fixture(scope="module")
def hilly(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return measured_with(tmp_path_factory.mktemp("profiles") / "h200" / "hilly", Hilly(scales=SCALES))


def test_what_lies_between_the_rows_is_learnt_from_ragged_batches(hilly: Profile) -> None:
    with_them, without = held_out(hilly), held_out(replace(hilly, ragged=None))
    for group in ("prefill beside", "decode beside"):
        assert with_them[group]["table"].median < 0.4 * without[group]["table"].median
        assert with_them[group]["table"].outside == 0
    for group in ("prefill alone", "decode alone"):
        assert with_them[group] == without[group]


def test_rows_of_the_tables_stay_what_was_measured(hilly: Profile) -> None:
    cost = hilly.cost()
    for p in hilly.hybrid.points:
        at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
        batch, decode = PrefillShape(p.tokens, float(p.tokens * p.mean_context)), DecodeShape(p.batch, p.kv_tokens)
        assert cost.prefill_s(batch, at, decode)[0] * 1e3 == pytest.approx(p.prefill_median_ms, rel=1e-9)
        step_ms = float(cost.decode_s(decode, at, batch)[0][0]) / cost.layers * 1e3
        assert step_ms == pytest.approx(p.decode_median_ms, rel=1e-9)


def test_batches_that_take_what_the_tables_say_change_nothing(tmp_path: Path) -> None:
    profile = measured_with(tmp_path / "h200" / "flat", ClosedFormCost(scales=SCALES))
    ways = Counter((p.mode, p.prefill_sms) for p in read_points(tmp_path / "h200" / "flat" / "ragged.csv", RaggedPoint))
    assert max(ways.values()) < 16  # of the 40 that might be: the model does not err
    with_them, without = profile.cost(), replace(profile, ragged=None).cost()
    assert with_them.allocations == without.allocations
    for at in without.allocations[:-1]:
        batch, decode = PrefillShape.of((300, 7), (0, 900)), DecodeShape(20, 9000)
        assert with_them.prefill_s(batch, at, decode)[0] == pytest.approx(
            without.prefill_s(batch, at, decode)[0], rel=0.01
        )
        steps_s = [cost.decode_s(decode, at, batch, 3)[0] for cost in (with_them, without)]
        assert steps_s[0] == pytest.approx(steps_s[1], rel=0.01)


def test_more_are_measured_where_the_model_errs_more(tmp_path: Path) -> None:
    profile = measured_with(tmp_path / "p", Hilly(scales=SCALES, height={8: 0.3}), modes=("split",))
    assert profile.ragged is not None
    count = Counter(p.prefill_sms for p in profile.ragged.points)
    assert count[8] == 40
    assert count[24] < 20  # the one between is expected to be like both


def test_what_was_measured_before_an_interrupt_is_kept_and_not_measured_again(tmp_path: Path) -> None:
    def stopped(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
        for step in steps:
            if name == "ragged" and step.done == 30:
                raise KeyboardInterrupt
            yield step

    out, truth = tmp_path / "p", Hilly(scales=SCALES)
    config = CONFIG.model_copy(update={"ragged": 20, "modes": ("split",)})
    first = measure_profile(subject(truth), config, out, ABOUT, watched=stopped)
    assert first.interrupted
    before = list(first.tables["ragged"].points)
    assert len(before) == 30
    second = measure_profile(subject(truth), config, out, ABOUT, resume=True)
    assert second.complete
    assert second.tables["ragged"].points[: len(before)] == before
    assert Counter(p.prefill_sms for p in second.tables["ragged"].points) == {8: 20, 16: 20, 24: 20}
    assert len({p.key for p in second.tables["ragged"].points}) == 60


def test_what_is_shown_of_a_mode_is_what_the_cost_model_says(hilly: Profile) -> None:
    cost, prices = hilly.cost(), Prices(hilly)
    place = replace(place_of(hilly.hybrid.points[0]), tokens=300, batch=20, kv_tokens=9000)
    for sharing in prices.sharings:
        at = Allocation(Mode(sharing.mode), sharing.prefill_sms, sharing.decode_sms)
        shown = prices.shared(sharing, place)
        assert shown.prefill.beside.seconds == cost.prefill_s(place.prefill, at, place.decode)[0]
        assert shown.decode.beside.seconds == cost.decode_s(place.decode, at, place.prefill)[0][0]
    assert survey(hilly).points


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "mixed"}, "mode: found 'mixed'; expected split, capped or priority"),
        ({"new_tokens": "3 x"}, "new_tokens: found '3 x'; expected whole numbers"),
        ({"new_tokens": "0", "context_lens": "4"}, "new_tokens: found 0; expected one or more of each prompt"),
        ({"new_tokens": "3 4", "context_lens": "1"}, "context_lens: found 1 numbers; expected 2 as in new_tokens"),
        ({"new_tokens": "12345678901"}, "new_tokens: found '12345678901'; expected whole numbers"),
        ({"batch": "8", "kv_tokens": "7"}, "kv_tokens: found 7; expected at least 8, one a sequence"),
        ({"decode_median_ms": "1e-322"}, "decode_median_ms: found 1e-322; expected a layer's, 1e-06 to 1e+06"),
        ({"prefill_median_ms": "1e300"}, "prefill_median_ms: found 1e+300; expected a layer's, 1e-06 to 1e+06"),
        (
            {"mode": "split", "prefill_sms": "8", "decode_sms": "8"},
            "prefill_sms, decode_sms: found 8, 8 of split; expected those of 8/24, 16/16, 24/8, as in hybrid.csv",
        ),
    ],
)
def test_a_malformed_row_is_refused(hilly: Profile, changed: dict[str, str], message: str, tmp_path: Path) -> None:
    shutil.copytree(hilly.folder, folder := tmp_path / "p")
    text = (folder / "ragged.csv").read_text(encoding="utf-8").splitlines()
    names, row = text[0].split(","), dict(zip(text[0].split(","), text[2].split(","), strict=True))
    text[2] = ",".join((row | changed)[name] for name in names)
    (folder / "ragged.csv").write_text("\n".join(text) + "\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_profile(folder).cost()
    assert str(error.value) == f"{folder / 'ragged.csv'}: row 3: {message}"


def test_those_of_a_mode_that_lacks_a_row_are_left_out_and_the_others_are_used(hilly: Profile) -> None:
    rows = list(hilly.hybrid.points)
    rows.remove(next(p for p in rows if p.mode == "capped"))
    assert hilly.ragged is not None
    assert {p.mode for p in hilly.ragged.points} == {"split", "capped"}
    cost = replace(hilly, hybrid=replace(hilly.hybrid, points=tuple(rows))).cost()
    splits = tuple(p for p in hilly.ragged.points if p.mode == "split")
    alike = replace(hilly, ragged=replace(hilly.ragged, points=splits)).cost()
    batch, decode = PrefillShape.of((300, 7), (0, 900)), DecodeShape(20, 9000)
    assert cost.refused.keys() >= {Mode.CAPPED}
    for at in cost.splits:
        assert cost.prefill_s(batch, at, decode)[0] == pytest.approx(alike.prefill_s(batch, at, decode)[0], rel=0.02)


def test_those_outside_the_rows_are_left_out(hilly: Profile) -> None:
    assert hilly.ragged is not None
    some, *others = hilly.ragged.points
    far = replace(some, new_tokens="9000", context_lens="0", prefill_median_ms=some.prefill_median_ms * 50)
    costs = [
        replace(hilly, ragged=replace(hilly.ragged, points=points)).cost() for points in ((far, *others), tuple(others))
    ]
    batch, decode = PrefillShape.of((300, 7), (0, 900)), DecodeShape(20, 9000)
    for at in costs[0].splits:
        assert costs[0].prefill_s(batch, at, decode) == costs[1].prefill_s(batch, at, decode)


def test_one_that_was_disturbed_counts_as_off_by_so_much_only(hilly: Profile) -> None:
    assert hilly.ragged is not None
    some, *others = hilly.ragged.points
    at = Allocation(Mode(some.mode), some.prefill_sms, some.decode_sms)
    batch, decode = some.shapes()
    plain_s = replace(hilly, ragged=None).cost().prefill_s(batch, at, decode)[0]
    disturbed = replace(some, prefill_median_ms=some.prefill_median_ms * 1000)
    cost = replace(hilly, ragged=replace(hilly.ragged, points=(disturbed, *others))).cost()
    assert cost.prefill_s(batch, at, decode)[0] < plain_s * np.exp(MOST) * 1.001


@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
def test_batches_that_take_what_the_rows_say_are_off_by_nothing(kernel: str) -> None:
    """Whatever look-ups take into account: padding, how tiles are dealt or, where that is not known, that they fill."""
    shipped = load_profile("h200/llama-3-8b")
    assert shipped.ragged is not None
    prefill = tuple(replace(p, backend=kernel) for p in shipped.prefill.points)
    plain = replace(shipped, ragged=None, prefill=replace(shipped.prefill, points=prefill))
    rows, said = plain.cost(), []
    for p in shipped.ragged.points[::8]:
        at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
        batch, decode = p.shapes()
        layer_ms = rows.prefill_s(batch, at, decode)[0] * 1e3
        step_ms = float(rows.decode_s(decode, at, batch)[0][0]) / rows.layers * 1e3
        said.append(replace(p, prefill_median_ms=layer_ms, decode_median_ms=step_ms))
    learnt = replace(plain, ragged=replace(shipped.ragged, points=tuple(said))).cost()
    for at in rows.splits:
        for tokens, beside in ((37, 50), (300, 33), (700, 130)):
            batch, decode = PrefillShape.of((tokens, 20, 90), (0, 900, 4000)), DecodeShape(beside, 90_000)
            assert learnt.prefill_s(batch, at, decode)[0] == pytest.approx(
                rows.prefill_s(batch, at, decode)[0], rel=1e-3
            )
            steps_s = [float(cost.decode_s(decode, at, batch)[0][0]) for cost in (learnt, rows)]
            assert steps_s[0] == pytest.approx(steps_s[1], rel=0.02)  # a line in time between more knots


def test_the_shipped_profile_keeps_the_laws_with_them() -> None:
    """Rows are met, nothing between them is outside, and a copy says the same."""
    profile = load_profile("h200/llama-3-8b")
    assert profile.ragged is not None
    cost = profile.cost()
    copy = pickle.loads(pickle.dumps(cost))
    for p in profile.hybrid.points:
        at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
        batch = PrefillShape.of((p.seq_tokens,) * p.seqs, (p.seq_context,) * p.seqs)
        decode = DecodeShape(p.batch, p.kv_tokens)
        assert cost.prefill_s(batch, at, decode)[0] * 1e3 == pytest.approx(p.prefill_median_ms, rel=1e-9)
        steps_s, outside = cost.decode_s(decode, at, batch)
        assert float(steps_s[0]) / cost.layers * 1e3 == pytest.approx(p.decode_median_ms, rel=1e-9)
        assert outside == 0
    for p in profile.ragged.points[::20]:
        at = Allocation(Mode(p.mode), p.prefill_sms, p.decode_sms)
        batch, decode = p.shapes()
        assert cost.outside(batch, at, decode) is None
        assert cost.prefill_s(batch, at, decode) == copy.prefill_s(batch, at, decode)


def test_the_bits_of_prices_do_not_depend_on_how_many_threads_linear_algebra_has(tmp_path: Path) -> None:
    """Law 6."""
    code = (
        "from semipd.core import Allocation, DecodeShape, Mode, PrefillShape\n"
        "from semipd.profile import load_profile\n"
        "cost = load_profile('h200/llama-3-8b').cost()\n"
        "for at in cost.allocations[:-1]:\n"
        "    for t, b in ((37, 50), (300, 33), (700, 130), (2000, 64)):\n"
        "        p, d = PrefillShape.of((t, 9), (0, 900)), DecodeShape(b, b * 700)\n"
        "        print(cost.prefill_s(p, at, d)[0].hex(), float(cost.decode_s(d, at, p)[0][0]).hex())\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OPENBLAS_NUM_THREADS": str(threads)},
            cwd=tmp_path,  # the package that is installed, not the folder of its sources
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2)
    ]
    assert said[0] == said[1] != ""


def test_as_many_are_measured_in_a_way_as_the_model_errs_there(tmp_path: Path) -> None:
    """Proportionally, by Neyman's allocation: three times the hill, and about three times as many."""

    def stopped(name: str, steps: Iterator[Progress]) -> Iterator[Progress]:
        for step in steps:
            if name == "ragged" and step.done == 60:
                raise KeyboardInterrupt
            yield step

    config = CONFIG.model_copy(update={"ragged": 100, "modes": ("split",), "tolerance": 0.001, "prefill_spine": ()})
    truth = Hilly(scales=SCALES, height={8: 0.6, 24: 0.1})
    found = measure_profile(subject(truth), config, tmp_path / "p", ABOUT, watched=stopped)
    count = Counter(p.prefill_sms for p in found.tables["ragged"].points)
    assert count[8] > 1.5 * count[24]
    assert count[24] > 5


def test_going_on_without_them_keeps_and_uses_those_that_there_are(tmp_path: Path) -> None:
    out, truth = tmp_path / "p", Hilly(scales=SCALES)
    config = CONFIG.model_copy(update={"ragged": 12, "modes": ("split",)})
    measure_profile(subject(truth), config, out, ABOUT)
    before = load_profile(out)
    done = measure_profile(subject(truth), config.model_copy(update={"ragged": 0}), out, ABOUT, resume=True)
    assert done.complete
    after = load_profile(out)
    assert after.hybrid.points == before.hybrid.points
    assert before.ragged is not None
    assert after.ragged is not None
    assert after.ragged.points == before.ragged.points


def test_where_there_is_room_for_none_it_ends(tmp_path: Path) -> None:
    table = TableWriter(tmp_path / "ragged.csv", RaggedPoint, ABOUT)
    config = CONFIG.model_copy(update={"ragged": 5})
    areas = [area for area in areas_of(config, 32) if area.table == "hybrid"]
    watch = Stopwatch(SimExecutor(ClosedFormCost(scales=SCALES)), MODEL.layers)
    scatter = Scatter(areas, config, SCALES, watch, table, (), lambda p, d: False)  # noqa: ARG005 - whatever they are
    assert [step.at for step in scatter.measure(lambda: ClosedFormCost(scales=SCALES))] == ["done"]
    assert not table.points


def test_a_table_that_was_only_begun_changes_nothing(hilly: Profile, tmp_path: Path) -> None:
    shutil.copytree(hilly.folder, folder := tmp_path / "p")
    header = (folder / "ragged.csv").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (folder / "ragged.csv").write_text(header, encoding="utf-8")
    batch, decode = PrefillShape.of((300, 7), (0, 900)), DecodeShape(20, 9000)
    costs = [load_profile(folder).cost(), replace(hilly, ragged=None).cost()]
    for at in costs[0].splits:
        assert costs[0].prefill_s(batch, at, decode) == costs[1].prefill_s(batch, at, decode)
    (folder / "ragged.json").unlink()
    with pytest.raises(InputError, match=r"ragged\.json: not found; expected the provenance of ragged\.csv"):
        load_profile(folder)


def test_a_model_of_attention_alone_can_have_them(hilly: Profile) -> None:
    """Its logarithms have no offsets."""
    assert MODEL.weights_bytes > 0
    alone = replace(hilly, weights_bytes=0)
    batch, decode = PrefillShape(4096, 4096.0 * 64), DecodeShape(8, 512)
    assert alone.cost().prefill_s(batch, alone.cost().splits[0], decode)[0] > 0
