"""Configuration files: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from semipd.config import (
    CompareConfig,
    DecodeGrid,
    HybridSweep,
    PrefillGrid,
    PrefillSweep,
    ReplayConfig,
    SchedulerOptions,
    Strict,
    build,
    load,
    load_slo,
    read_yaml,
    shipped_slos,
)
from semipd.core import InputError


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def refusal(data: dict[str, object], schema: type = ReplayConfig, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as refused:
        build(data, schema, "c.yaml", overrides)
    text = str(refused.value)
    assert "\n" not in text
    return text


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, ""), ReplayConfig) == ReplayConfig()


def test_a_file_and_overrides_reach_nested_fields_in_that_order(tmp_path: Path) -> None:
    path = written(tmp_path, "trace: {rate_scale: 2.0, limit: 7}\npolicy: static-64\n")
    config = load(path, ReplayConfig, ("trace.rate_scale=3", "trace.rate_scale=4.5", "slo={ttft_s: 1, tpot_s: 0.1}"))
    assert (config.trace.rate_scale, config.trace.limit, config.policy) == (4.5, 7, "static-64")
    assert (config.targets.ttft_s, config.targets.tpot_s) == (1, 0.1)


@given(
    st.integers(1, 10**6),
    st.floats(min_value=1e-6, max_value=1e6, allow_nan=False),
    st.sampled_from(["adaptive", "exclusive", "static-64"]),
)
def test_a_configuration_survives_being_saved_and_read_again(seqs: int, scale: float, policy: str) -> None:
    data = {"policy": policy, "scheduler": {"max_num_seqs": seqs}, "trace": {"rate_scale": scale}}
    config = build(data, ReplayConfig, "c.yaml")
    assert build(config.model_dump(mode="json"), ReplayConfig, "again") == config


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"trace": {"limit": 0}}, "c.yaml: trace.limit: found 0; expected greater than 0"),
        ({"scheduler": {"block_size": 0}}, "c.yaml: scheduler.block_size: found 0; expected greater than 0"),
        ({"trace": {"rate_scale": float("inf")}}, "c.yaml: trace.rate_scale: found inf; expected a finite number"),
        (
            {"trace": {"paht": "x"}},
            "c.yaml: trace.paht: unknown; expected one of arrivals, closed_loop, dequantise_s, end_s, every_s, format,",
        ),
        ({"trace": {"format": "csv"}}, "c.yaml: trace.format: found 'csv'; expected 'azure-csv', 'mooncake-jsonl',"),
    ],
)
def test_what_is_wrong_is_named_with_file_field_found_and_expected(data: dict[str, object], line: str) -> None:
    assert refusal(data).startswith(line)


def schemas(base: type[Strict] = Strict) -> list[type[Strict]]:
    return [base, *(schema for derived in base.__subclasses__() for schema in schemas(derived))]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_every_number_of_every_schema_is_finite(number: float) -> None:
    asked = 0
    for schema in schemas():
        for name, field in schema.model_fields.items():
            if float in (field.annotation, *get_args(field.annotation)):
                with pytest.raises(ValidationError) as refused:
                    schema.model_validate({name: number})
                types = {e["type"] for e in refused.value.errors() if e["loc"][0] == name}
                assert "finite_number" in types
                asked += 1
    assert asked > 20


def test_an_unknown_field_on_top_is_answered_with_the_known_ones() -> None:
    assert refusal({"sead": 1}) == (
        "c.yaml: sead: unknown; expected one of model, policy, predictor_error, predictor_seed, profile, scheduler, "
        "slo, strict, trace, variation_seed, weights"
    )


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refusal({"policy": 3, "profile": ["x" * 10_000]})) < 200


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("policy", "--set policy: expected NAME=VALUE"),
        ("=3", "--set =3: expected NAME=VALUE"),
        ("policy.name=x", "c.yaml: policy: found {'name': 'x'}; expected a valid string"),
        ("trace.limit=[1", "--set trace.limit=[1: the value is not YAML"),
    ],
)
def test_an_override_that_cannot_be_applied_is_named(override: str, line: str) -> None:
    assert refusal({"policy": "adaptive"}, overrides=(override,)).startswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a: [1\nb: 2\n", "c.yaml: row 2: not YAML"),
        (b"- 1\n- 2\n", "c.yaml: found list; expected a mapping"),
        (b"a: \xff\n", "c.yaml: cannot be read"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_yaml(tmp_path / "c.yaml")
    assert str(refused.value).removeprefix(f"{tmp_path}/").startswith(line)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: not found; expected a YAML file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("schema", "data"),
    [
        (PrefillGrid, {}),
        (PrefillGrid, {"seqs": 4}),
        (PrefillGrid, {"tokens": [16]}),
        (PrefillGrid, {"seqs": 4, "seq_tokens": 16, "tokens": [16], "mean_context": [8]}),
        (PrefillGrid, {"seqs": 4, "seq_tokens": 16, "tokens": [16]}),
        (PrefillGrid, {"tokens": [16], "mean_context": [8], "seq_context": 5}),
        (DecodeGrid, {"batch": 4}),
        (DecodeGrid, {"batch": 4, "context": 5, "kv_tokens": [1]}),
    ],
)
def test_a_grid_is_one_batch_or_two_lists_and_nothing_between(schema: type, data: dict[str, object]) -> None:
    assert "found" in refusal(data, schema) or "belongs" in refusal(data, schema)


@pytest.mark.parametrize(
    "data",
    [
        {"work": None, "contention": False},
        {"prefill": {"tokens": [16], "mean_context": [8]}},
        {"modes": []},
        {"modes": ["in-turn"]},
    ],
)
def test_a_hybrid_sweep_without_something_to_measure_is_refused(data: dict[str, object]) -> None:
    refusal(data, HybridSweep)


def test_a_prefill_sweep_has_no_decode_fields() -> None:
    assert "decode: unknown" in refusal({"decode": {"batch": 1, "context": 1}}, PrefillSweep)


PUBLISHED = {
    "mlperf-8b": (2.0, 0.1),
    "mlperf-8b-interactive": (0.5, 0.03),
    "mlperf-70b": (2.0, 0.2),
    "mlperf-70b-interactive": (0.45, 0.04),
    "semipd-8b-sharegpt-tight": (0.3, 0.15),
    "semipd-8b-sharegpt-loose": (0.4, 0.2),
    "semipd-8b-longbench-tight": (2.25, 0.13),
    "semipd-8b-longbench-loose": (3.0, 0.18),
    "mooncake-100": (30.0, 0.1),
    "mooncake-200": (30.0, 0.2),
    "mooncake-300": (30.0, 0.3),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_targets_are_those_published_and_carry_their_name(name: str) -> None:
    targets = CompareConfig(slo=name).targets
    assert (targets.ttft_s, targets.tpot_s) == PUBLISHED[name]
    assert targets.name == name


def test_every_file_of_targets_that_ships_is_one() -> None:
    assert set(shipped_slos()) >= set(PUBLISHED)
    for name, path in shipped_slos().items():
        assert path.read_text().startswith("# "), f"{name} does not say where it comes from"
        assert load_slo(name).ttft_s > load_slo(name).tpot_s


def test_targets_can_be_in_a_file_of_their_own_that_carries_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("ttft_s: 1\ntpot_s: 0.02\n")
    targets = CompareConfig(slo=str(path)).targets
    assert (targets.ttft_s, targets.tpot_s, targets.name) == (1, 0.02, "mine")
    saved = ReplayConfig(slo=str(path)).settled()
    path.write_text("ttft_s: 1\n")
    assert (saved.targets.ttft_s, saved.targets.tpot_s) == (1, 0.02)
    assert ReplayConfig(slo="mlperf-8b").settled().slo == "mlperf-8b"
    with pytest.raises(InputError, match=r"mine\.yaml: tpot_s: missing; expected a value"):
        _ = CompareConfig(slo=str(path)).targets


def test_an_unknown_slo_is_answered_with_those_that_ship() -> None:
    assert "slo: found 'fast'; expected ttft_s and tpot_s, a YAML file of them, or one of mlperf-70b," in refusal(
        {"slo": "fast"}, ReplayConfig
    )


def test_targets_can_be_given_in_the_file_and_on_the_command_line() -> None:
    given = build({"slo": "mlperf-8b"}, ReplayConfig, "c.yaml", ("slo.ttft_s=2", "slo.tpot_s=0.5"))
    assert (given.targets.ttft_s, given.targets.tpot_s) == (2, 0.5)
    assert given == build({"slo": {"ttft_s": 2, "tpot_s": 0.5}}, ReplayConfig, "c.yaml")


def test_every_knob_of_the_scheduler_is_documented_with_its_default() -> None:
    text = (Path(__file__).parent.parent / "docs" / "scheduling.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE))
    assert rows == {name: json.dumps(default) for name, default in SchedulerOptions().model_dump().items()}
