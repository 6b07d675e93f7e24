"""Contention learnt from ragged batches: the smooth correction, profiles that have such batches, measuring them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from closed_form_cost import ClosedFormCost
from hypothesis import given, settings
from hypothesis import strategies as st
from test_campaign import ABOUT, CONFIG, MODEL, SCALES, subject

from semipd.campaign import measure_profile
from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, PrefillShape
from semipd.correction import (
    EXACT,
    LENGTHS,
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
from semipd.survey import survey
from semipd.table_files import read_points

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
@settings(deadline=None, max_examples=40)
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

    rough_at: tuple[int, ...] = (8, 16, 24, 32)

    def _hill(self, at: Allocation, x: float, least: float, most: float) -> float:
        along = (np.log(x) - np.log(least)) / (np.log(most) - np.log(least))
        return 1 + 0.3 * float(np.sin(np.pi * np.clip(along, 0, 1))) * (at.prefill_sms in self.rough_at)

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
    profile = measured_with(tmp_path / "p", Hilly(scales=SCALES, rough_at=(8,)), modes=("split",))
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


def test_a_model_of_attention_alone_can_have_them(hilly: Profile) -> None:
    """Its logarithms have no offsets."""
    assert MODEL.weights_bytes > 0
    alone = replace(hilly, weights_bytes=0)
    batch, decode = PrefillShape(4096, 4096.0 * 64), DecodeShape(8, 512)
    assert alone.cost().prefill_s(batch, alone.cost().splits[0], decode)[0] > 0
