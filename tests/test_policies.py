"""What each policy chooses, against a recomputation at every split and against its own rules."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Load, Mode, Phase, PrefillShape
from semipd.cost import ConstantCost
from semipd.policies import Policy, all_names, chosen, in_order, make_policy, whole_device
from semipd.policies.adaptive import round_up
from semipd.slo import Slo

FULL = whole_device(132)
SLO = Slo(ttft_s=0.5, tpot_s=0.03)
LOAD = Load(
    now_s=1.0,
    waiting_requests=1,
    waiting_tokens=1000,
    oldest_wait_s=0.0,
    prefill=PrefillShape.of((1000,), (0,)),
    decode=DecodeShape(64, 64_000),
    kv_free_share=0.5,
    split=None,
)


@dataclass(frozen=True)
class AmdahlCost:
    """Both phases speed up with their SMs; decode slows down with its batch and with the prefill beside it."""

    layers: int = 2
    device_sms: int = 132
    calls: list[int] | None = None

    @property
    def splits(self) -> tuple[Allocation, ...]:
        return ConstantCost(1, 1).splits

    @property
    def allocations(self) -> tuple[Allocation, ...]:
        return ConstantCost(1, 1).allocations

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        return 1e-4 + 1e-3 * shape.tokens / at.prefill_sms * (1.2 if beside else 1), False

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        if self.calls is not None:
            self.calls.append(shape.batch)
        slower = 1 + (beside.tokens / 8192 if beside else 0)
        kv_tokens = shape.kv_tokens + shape.batch * np.arange(steps)
        return (1e-3 + 1e-5 * kv_tokens / at.decode_sms + 1e-3 * shape.batch / at.decode_sms) * slower, 0


loads = st.builds(
    lambda tokens, context, batch, per_seq, current: replace(
        LOAD,
        prefill=PrefillShape(tokens, float(tokens * context)),
        decode=DecodeShape(batch, batch * per_seq),
        split=current,
    ),
    tokens=st.integers(1, 8192),
    context=st.integers(1, 4096),
    batch=st.integers(1, 256),
    per_seq=st.integers(1, 8192),
    current=st.sampled_from([None, *AmdahlCost().splits]),
)


def as_priced(load: Load) -> tuple[PrefillShape, DecodeShape]:
    """The load rounded up as adaptive documents it."""
    assert load.prefill is not None
    assert load.decode is not None
    tokens, context = round_up(load.prefill.tokens), round_up(load.prefill.mean_context)
    decode = DecodeShape(round_up(load.decode.batch), round_up(load.decode.kv_tokens))
    return PrefillShape(tokens, float(tokens * context)), decode


def step_s(cost: AmdahlCost, load: Load, split: Allocation) -> float:
    prefill, decode = as_priced(load)
    return float(cost.decode_s(decode, split, prefill)[0][0])


def throughput(cost: AmdahlCost, load: Load, split: Allocation) -> float:
    prefill, decode = as_priced(load)
    return prefill.tokens / (cost.prefill_s(prefill, split, decode)[0] * cost.layers)


@given(loads)
def test_adaptive_takes_a_split_that_meets_the_tpot_target_whenever_one_does(load: Load) -> None:
    cost = AmdahlCost()
    chosen = make_policy("adaptive", cost, SLO).decide(load)
    fastest = min(step_s(cost, load, split) for split in cost.splits)
    assert step_s(cost, load, chosen) <= max(SLO.tpot_s, fastest)


@given(loads)
def test_adaptive_is_within_5_percent_of_the_best_prefill_throughput_among_the_splits_that_meet_the_target(
    load: Load,
) -> None:
    cost = AmdahlCost()
    chosen = make_policy("adaptive", cost, SLO).decide(load)
    meet = [split for split in cost.splits if step_s(cost, load, split) <= SLO.tpot_s]
    if meet:
        best = max(throughput(cost, load, split) for split in meet)
        mine = throughput(cost, load, chosen)
        assert mine == best if chosen != load.split else best <= 1.05 * mine


@given(loads)
def test_adaptive_keeps_the_split_in_force_while_it_meets_the_target_and_is_within_5_percent(load: Load) -> None:
    cost = AmdahlCost()
    policy = make_policy("adaptive", cost, SLO)
    best = policy.decide(replace(load, split=None))
    for current in cost.splits:
        keeps = step_s(cost, load, current) <= SLO.tpot_s and (
            throughput(cost, load, best) <= 1.05 * throughput(cost, load, current)
        )
        assert policy.decide(replace(load, split=current)) == (current if keeps else best)


@given(load=loads, before=st.lists(loads, max_size=5))
def test_adaptive_answers_the_same_whatever_it_was_asked_before(load: Load, before: list[Load]) -> None:
    used = make_policy("adaptive", AmdahlCost(), SLO)
    for other in before:
        used.decide(other)
    assert used.decide(load) == make_policy("adaptive", AmdahlCost(), SLO).decide(load)


@given(x=st.floats(1, 1e9))
def test_adaptive_rounds_a_load_up_by_less_than_a_third_of_an_octave_and_one(x: float) -> None:
    assert x <= round_up(x) <= 2 ** (1 / 3) * x + 1


def test_adaptive_prices_a_load_once() -> None:
    calls: list[int] = []
    policy = make_policy("adaptive", AmdahlCost(calls=calls), SLO)
    for now_s in range(100):
        policy.decide(replace(LOAD, now_s=float(now_s)))
    assert len(calls) == len(AmdahlCost().splits)


def test_adaptive_takes_the_fewest_prefill_sms_of_splits_that_are_equally_good() -> None:
    assert make_policy("adaptive", ConstantCost(1e-3, 1e-2), SLO).decide(LOAD) == Allocation(Mode.SPLIT, 8, 124)


def test_adaptive_takes_the_shortest_decode_step_when_no_split_meets_the_target() -> None:
    policy = make_policy("adaptive", AmdahlCost(), Slo(0.5, 1e-6))
    assert policy.decide(LOAD) == Allocation(Mode.SPLIT, 8, 124)


@pytest.mark.parametrize("name", all_names(ConstantCost(1, 1)))
def test_every_name_makes_the_policy_of_that_name(name: str) -> None:
    policy: Policy = make_policy(name, ConstantCost(1, 1), SLO)
    assert policy.name == name


@pytest.mark.parametrize("name", all_names(ConstantCost(1, 1)))
def test_a_phase_alone_has_every_sm_under_every_policy(name: str) -> None:
    policy = make_policy(name, ConstantCost(1, 1), SLO)
    for current in (None, Allocation(Mode.SPLIT, 64, 68)):
        assert policy.decide(replace(LOAD, prefill=None, split=current)).decode_sms == 132
        assert policy.decide(replace(LOAD, decode=None, split=current)).prefill_sms == 132


def test_what_has_the_whole_device_anyway_needs_no_switch_when_the_other_phase_comes() -> None:
    cost = ConstantCost(1, 1)
    decode_only, prefill_only = replace(LOAD, prefill=None), replace(LOAD, decode=None)
    capped = make_policy("capped-64", cost, SLO)
    assert capped.decide(LOAD) == capped.decide(decode_only) == Allocation(Mode.CAPPED, 64, 132)
    assert capped.decide(prefill_only) == FULL
    for name, at in (
        ("priority", Allocation(Mode.PRIORITY, 132, 132)),
        ("chunked-512", Allocation(Mode.MIXED, 132, 132, 512)),
        ("exclusive-decode", Allocation(Mode.EXCLUSIVE, 132, 132, first=Phase.DECODE)),
    ):
        policy = make_policy(name, cost, SLO)
        assert {policy.decide(load) for load in (LOAD, decode_only, prefill_only)} == {at}


@given(loads)
def test_a_static_policy_takes_its_split_at_every_load_and_exclusive_the_whole_device(load: Load) -> None:
    cost = ConstantCost(1, 1)
    assert make_policy("static-64", cost, SLO).decide(load) == Allocation(Mode.SPLIT, 64, 68)
    assert make_policy("exclusive", cost, SLO).decide(load) == FULL


def test_all_names_are_everything_that_was_measured_in_order() -> None:
    cost = ConstantCost(1, 1, device_sms=32, chunk_tokens=600)
    assert all_names(cost) == (
        *("exclusive", "exclusive-decode", "static-8", "static-16", "static-24", "capped-8", "capped-16", "capped-24"),
        *("priority", "chunked-256", "chunked-512", "adaptive"),
    )
    shuffled = ["chunked-1000", "adaptive", "static-16", "static-8", "chunked-9", "exclusive"]
    assert sorted(shuffled, key=in_order) == [
        *("exclusive", "static-8", "static-16", "chunked-9", "chunked-1000", "adaptive"),
    ]


@pytest.mark.parametrize("name", ["static-65", "static-0", "capped-12"])
def test_an_unmeasured_split_is_refused_with_the_measured_ones(name: str) -> None:
    with pytest.raises(InputError, match=rf"found '{name}'.*measured prefill SMs: 8, 16, 24$"):
        make_policy(name, ConstantCost(1, 1, device_sms=32), SLO)


@pytest.mark.parametrize("name", ["chunked-0", "chunked-601"])
def test_a_chunk_beyond_what_was_measured_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"found '{name}'; expected .* N from 1 to the 600 tokens measured$"):
        make_policy(name, ConstantCost(1, 1, chunk_tokens=600), SLO)
    assert make_policy("chunked-600", ConstantCost(1, 1, chunk_tokens=600), SLO).name == "chunked-600"


@pytest.mark.parametrize(
    "name", ["", "best", "exclusive-8", "Static-8", "static", "static-", "static-064", "static-x", "priority-8"]
)
def test_an_unknown_policy_is_refused_with_the_names(name: str) -> None:
    names = r"one of exclusive, exclusive-decode, static-N \(prefill SMs\), .*, adaptive"
    with pytest.raises(InputError, match=rf"found '{name}'; expected {names}$"):
        make_policy(name, ConstantCost(1, 1), SLO)


def test_a_load_says_nothing_of_output_lengths() -> None:
    assert not [field.name for field in fields(Load) if "output" in field.name]


@given(loads, st.sampled_from(["exclusive", "static-64", "capped-64", "priority", "chunked-512", "adaptive"]))
def test_a_policy_decides_for_the_whole_device_or_for_what_it_said_it_can_choose(load: Load, name: str) -> None:
    cost = AmdahlCost()
    policy = make_policy(name, cost, SLO)
    assert policy.decide(load) in (FULL, *chosen(policy, cost))
    assert len(chosen(policy, cost)) == {"exclusive": 0, "adaptive": len(cost.splits)}.get(name, 1)
