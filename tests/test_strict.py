"""Look-ups outside the measured grid: named by the number that is, and refused where asked to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_profile import write_profile

from semipd.cli import main
from semipd.core import Allocation, DecodeShape, InputError, Mode, Phase, PrefillShape, Request, Run
from semipd.driver import replay
from semipd.policies import Policy, all_names, make_policy, whole_device
from semipd.profile import load_profile
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor
from semipd.slo import Slo
from semipd.table_cost import TableCost
from semipd.trace import Trace

WHOLE = 32
FUSED = Allocation(Mode.MIXED, WHOLE, WHOLE, 512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profile") / "p", all_modes=True)


@pytest.fixture(scope="module")
def cost(folder: Path) -> TableCost:
    return load_profile(folder).cost()


tokens = st.sampled_from([1, 63, 1024, 2048, 2049, 8192, 8193, 20_000])
contexts = st.sampled_from([0.5, 16.0, 512.0, 32_768.0, 32_769.0])
batches = st.sampled_from([1, 8, 256, 257])
kv_tokens = st.sampled_from([1, 255, 4096, 524_288, 524_289])
prefills = st.builds(lambda t, m: PrefillShape(t, t * m), tokens, contexts)
decodes = st.builds(DecodeShape, batches, kv_tokens)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), prefill=prefills, decode=decodes, beside=st.booleans())
def test_a_number_is_named_just_when_the_look_up_counts_as_outside(
    cost: TableCost, data: st.DataObject, prefill: PrefillShape, decode: DecodeShape, beside: bool
) -> None:
    at = data.draw(st.sampled_from([*cost.allocations[:-1], whole_device(WHOLE)]))
    beside = beside and at.mode is not Mode.EXCLUSIVE
    _, counted = cost.prefill_s(prefill, at, decode if beside else None)
    assert counted == (cost.outside(prefill, at, decode if beside else None) is not None)
    _, outside = cost.decode_s(decode, at, prefill if beside else None)
    assert outside == (cost.outside(decode, at, prefill if beside else None) is not None)
    _, counted = cost.mixed_s(prefill, decode if beside else None)
    assert counted == (cost.outside(prefill, FUSED, decode if beside else None) is not None)


def test_the_message_has_the_number_what_was_measured_and_where(cost: TableCost) -> None:
    split = cost.splits[0]
    small, long = PrefillShape(64, 64 * 512.0), PrefillShape(8193, 8193 * 512.0)
    few, many = DecodeShape(8, 4096), DecodeShape(257, 4096)
    assert cost.outside(small, split, few) is None
    assert cost.outside(long, split, few) == (
        "tokens: found 8,193 at 8/24; expected at most 8,192, as measured in prefill.csv"
    )
    assert cost.outside(small, split, many) == (
        "batch: found 257 at 8/24; expected at most 256, as measured in hybrid.csv"
    )
    assert (
        cost.outside(many, split, None) == "batch: found 257 at 8/24; expected at most 256, as measured in decode.csv"
    )
    assert cost.outside(PrefillShape(4096, 4096.0), FUSED, few) == (
        "tokens: found 4,096 at mixed; expected at most 2,048, as measured in mixed.csv"
    )


def trace(prompt_len: int, output_len: int, n: int = 6) -> Trace:
    lengths = (np.full(n, prompt_len), np.full(n, output_len))
    return Trace("t", np.arange(n) * 0.05, *lengths, "made", n)


@pytest.mark.parametrize(
    ("prompt_len", "output_len", "inside"), [(900, 20, True), (30, 1200, True), (200_000, 3, False)]
)
def test_a_strict_replay_is_refused_just_when_a_lax_one_counts_look_ups_outside(
    cost: TableCost, prompt_len: int, output_len: int, inside: bool
) -> None:
    requests = list(trace(prompt_len, output_len).requests())
    config = SchedulerConfig(num_blocks=200_000, max_num_batched_tokens=8192)
    for name in all_names(cost):
        policy = make_policy(name, cost, Slo(1, 0.1))

        def play(executor: SimExecutor, policy: Policy = policy) -> int:
            scheduler = Scheduler(config, policy, device_sms=WHOLE, layers=cost.layers)
            return sum(record.extrapolated for record in replay(requests, scheduler, executor))

        assert (play(SimExecutor(cost)) == 0) == inside
        if inside:
            assert play(SimExecutor(cost, outside=cost.outside)) == 0
        else:
            with pytest.raises(InputError, match=r"^strict: \w+ run \d+: \w+: found [\d,.]+ at \S+; expected"):
                play(SimExecutor(cost, outside=cost.outside))


@pytest.mark.parametrize(("steps", "refused"), [(3, False), (4, True)])
def test_steps_that_were_priced_but_not_worked_on_are_not_refused(cost: TableCost, steps: int, refused: bool) -> None:
    """The third step reads the last number of KV tokens that was measured; 100 are priced at the start."""
    request, at = Request(0, 0.0, 524_280, 10_000), whole_device(WHOLE)
    executor = SimExecutor(cost, outside=cost.outside)
    executor.launch(Run(1, Phase.DECODE, (request,), (1,), (524_285,), WHOLE, 100, at))
    step_s = cost.decode_s(DecodeShape(1, 524_288), at, None)[0].item()
    assert executor.wait((steps - 0.5) * step_s) == []
    executor.yield_(1)
    if refused:
        with pytest.raises(
            InputError, match=r"decode run 1: kv_tokens: found 524,289 at full; expected at most 524,288"
        ):
            executor.wait(None)
    else:
        assert executor.wait(None)[0].steps == steps


def test_the_command_refuses_with_one_line_and_says_which_number(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"profile": str(folder), "trace": {"path": "azure-conv-synth.csv", "limit": 400, "rate_scale": 500}}
    one, two = tmp_path / "replay.yaml", tmp_path / "compare.yaml"
    one.write_text(json.dumps(document | {"policy": "static-16"}))
    two.write_text(json.dumps(document | {"policies": ["static-16", "exclusive"]}))
    large = ("--set", "scheduler.max_num_batched_tokens=20000")
    assert main(["replay", str(one), "--strict"]) == 0
    capsys.readouterr()
    assert main(["replay", str(one), *large]) == 0
    assert capsys.readouterr().err.count("fell outside the measured grid and were clamped") == 1
    for words in (("replay", str(one)), ("compare", str(two), "--jobs", "1"), ("compare", str(two), "--jobs", "2")):
        assert main([*words, "--strict", *large]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        line = r"error: strict: (prefill|decode) run \d+: tokens: found [\d,]+ at \S+; expected at most 8,192, as .*\n"
        assert re.fullmatch(line, captured.err), captured.err
