"""Prices of the ways of sharing that are no splits, and what is said of those that were not measured."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_profile import (
    BATCHES,
    HYBRID_KV_TOKENS,
    KV_TOKENS,
    MEAN_CONTEXTS,
    MIXED_TOKENS,
    decode_ms,
    decode_slowdown,
    mixed_ms,
    prefill_ms,
    prefill_slowdown,
    write_profile,
)
from test_cost import assert_reproduces_every_measured_point, decode_step_s, drop_rows, edit, shape

from semipd.core import Allocation, DecodeShape, InputError, Mode
from semipd.cost import ConstantCost, Misjudged
from semipd.overheads import Overheads
from semipd.policies import all_names, make_policy
from semipd.profile import Profile, load_profile
from semipd.slo import Slo
from semipd.table_cost import TableCost

DEVICE, LAYERS = 32, 4
CAPPED = [Allocation(Mode.CAPPED, n, DEVICE) for n in (8, 16, 24)]
PRIORITY = Allocation(Mode.PRIORITY, DEVICE, DEVICE)
FUSED = Allocation(Mode.MIXED, DEVICE, DEVICE, MIXED_TOKENS[-1])
SLO = Slo(1.0, 0.1)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    return load_profile(
        write_profile(tmp_path_factory.mktemp("profiles") / "all", DEVICE, layers=LAYERS, all_modes=True)
    )


@pytest.fixture(scope="module")
def cost(profile: Profile) -> TableCost:
    return profile.cost()


def test_every_measured_point_of_every_mode_is_reproduced(profile: Profile) -> None:
    assert_reproduces_every_measured_point(profile)


def test_every_way_of_sharing_that_was_measured_is_listed_splits_first(cost: TableCost) -> None:
    assert cost.allocations == (*cost.splits, *CAPPED, PRIORITY, FUSED)
    assert cost.refused == {}


places = st.tuples(
    st.integers(1, MIXED_TOKENS[-1]),
    st.integers(MEAN_CONTEXTS[0], MEAN_CONTEXTS[-1]),
    st.integers(1, BATCHES[-1]),
    st.integers(KV_TOKENS[0], KV_TOKENS[-1]),
)


@given(places, st.sampled_from([*CAPPED, PRIORITY]))
def test_capped_and_priority_meet_the_closed_forms_with_decode_on_the_whole_device(
    cost: TableCost, place: tuple[int, int, int, int], at: Allocation
) -> None:
    tokens, context, batch, kv = place
    expected_ms = prefill_ms(tokens, context, at.prefill_sms) * prefill_slowdown(*place)
    assert cost.prefill_s(shape(tokens, context), at, DecodeShape(batch, kv)) == (
        pytest.approx(expected_ms / 1e3),
        False,
    )
    knot = HYBRID_KV_TOKENS[kv % len(HYBRID_KV_TOKENS)]
    expected_ms = decode_ms(batch, knot, DEVICE) * decode_slowdown(tokens, context, batch, knot) * LAYERS
    assert decode_step_s(cost, batch, knot, at, shape(tokens, context)) == pytest.approx(expected_ms / 1e3)


@given(places)
def test_a_fused_step_meets_the_closed_form_and_without_decode_it_is_prefill_alone(
    cost: TableCost, place: tuple[int, int, int, int]
) -> None:
    tokens, context, batch, kv = place
    seconds, outside = cost.mixed_s(shape(tokens, context), DecodeShape(batch, kv))
    assert (seconds, outside) == (pytest.approx(mixed_ms(*place) * LAYERS / 1e3), False)
    alone_s = prefill_ms(tokens, context, DEVICE) * LAYERS / 1e3
    assert cost.mixed_s(shape(tokens, context), None) == (pytest.approx(alone_s), False)


@pytest.mark.parametrize(
    ("tokens", "context", "batch", "kv"),
    [(4096, 512, 16, 16384), (256, 65536, 16, 16384), (256, 512, 512, 16384), (256, 512, 16, 2**20)],
    ids=["tokens", "context", "batch", "KV tokens"],
)
def test_a_fused_step_outside_the_grid_is_clamped_and_counted(
    cost: TableCost, tokens: int, context: int, batch: int, kv: int
) -> None:
    seconds, outside = cost.mixed_s(shape(tokens, context), DecodeShape(batch, kv))
    inside = min(tokens, 2048), min(context, 32768), min(batch, 256), min(kv, 524288)
    assert (seconds, outside) == (pytest.approx(mixed_ms(*inside) * LAYERS / 1e3), True)


INCOMPLETE: dict[str, tuple[Callable[[Path], object], Mode, str, str]] = {
    "no capped rows": (
        lambda f: drop_rows(f, "hybrid.csv", "capped,"),
        Mode.CAPPED,
        "capped-8",
        "hybrid.csv: no row of mode capped; expected some to choose it",
    ),
    "a capped point": (
        lambda f: drop_rows(f, "hybrid.csv", "capped,16,32,8192,32768,"),
        Mode.CAPPED,
        "capped-8",
        r"hybrid.csv: capped-16: no point at tokens 8192, mean_context 32768, .* \(and 8 more\); expected every .*",
    ),
    "half a device for decode": (
        lambda f: edit(f, "hybrid.csv", "capped,8,32,", "capped,8,16,"),
        Mode.CAPPED,
        "capped-16",
        "hybrid.csv: capped-8: decode_sms: found 16; expected the whole device, 32",
    ),
    "no priority rows": (
        lambda f: drop_rows(f, "hybrid.csv", "priority,"),
        Mode.PRIORITY,
        "priority",
        "hybrid.csv: no row of mode priority; expected some to choose it",
    ),
    "no table of fused batches": (
        lambda f: (f / "mixed.csv").unlink(),
        Mode.MIXED,
        "chunked-512",
        "mixed.csv: no measured point; expected some to choose fused batches",
    ),
    "a table of fused batches that was only begun": (
        lambda f: (f / "mixed.csv").write_text((f / "mixed.csv").read_text().partition("\n")[0] + "\n"),
        Mode.MIXED,
        "chunked-512",
        "mixed.csv: no measured point; expected some to choose fused batches",
    ),
    "a fused point": (
        lambda f: drop_rows(f, "mixed.csv", "2048,32768,"),
        Mode.MIXED,
        "chunked-512",
        r"mixed.csv: no point at tokens 2048, mean_context 32768, .* \(and 8 more\); expected every .*",
    ),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_a_mode_whose_table_lacks_something_cannot_be_chosen_and_that_is_said(tmp_path: Path, what: str) -> None:
    breaks, mode, policy, message = INCOMPLETE[what]
    folder = write_profile(tmp_path / "p", DEVICE, all_modes=True)
    breaks(folder)
    cost = load_profile(folder).cost()
    assert set(cost.refused) == {mode}
    assert mode not in {at.mode for at in cost.allocations}
    with pytest.raises(
        InputError, match=rf"^policy: found '{policy}', which was not measured: {re.escape(str(folder))}/{message}$"
    ):
        make_policy(policy, cost, SLO)
    assert policy.partition("-")[0] not in {name.partition("-")[0] for name in all_names(cost)}


def test_without_a_table_of_fused_batches_they_have_no_price(tmp_path: Path) -> None:
    cost = load_profile(write_profile(tmp_path / "p", DEVICE)).cost()
    with pytest.raises(KeyError, match=r"fused batches were not measured: .*mixed.csv: no measured point"):
        cost.mixed_s(shape(64, 32), None)


def test_a_constant_fused_step_is_its_layers_and_a_decode_step_one_after_the_other() -> None:
    constant = ConstantCost(0.01, 0.02, layers=3, device_sms=32, chunk_tokens=2048)
    assert constant.allocations == (*constant.splits, *CAPPED, PRIORITY, FUSED)
    assert constant.mixed_s(shape(5, 1), None) == (pytest.approx(0.03), False)
    assert constant.mixed_s(shape(5, 1), DecodeShape(2, 9)) == (pytest.approx(0.05), False)


def test_a_misjudged_model_knows_the_same_ways_and_is_off_by_one_factor_in_fused_steps(cost: TableCost) -> None:
    seen = Misjudged(cost, 0.2, seed=1)
    assert (seen.allocations, seen.refused) == (cost.allocations, cost.refused)
    loads = [(shape(16, 64), None), (shape(2000, 512), DecodeShape(8, 5000))]
    first, second = (seen.mixed_s(*load)[0] / cost.mixed_s(*load)[0] for load in loads)
    assert first == pytest.approx(second)
    assert first != 1.0


def test_a_profile_says_what_starting_and_switching_cost_and_nothing_by_default(
    tmp_path: Path, profile: Profile
) -> None:
    said = {"prefill_start_ms": 0.5, "decode_start_ms": 1, "mixed_start_ms": 0.25, "switch_ms": 2.0}
    found = load_profile(write_profile(tmp_path / "p", DEVICE, overheads=said))
    assert found.overheads == Overheads(**said)
    assert profile.overheads == Overheads()
