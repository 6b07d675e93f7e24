"""Every configuration that is checked in is one that the schemas accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from semipd.compare import policy_names
from semipd.config import (
    CompareConfig,
    DecodeSweep,
    HybridSweep,
    MixedSweep,
    PrefillSweep,
    ReplayConfig,
    SweepConfig,
    load,
    read_yaml,
)
from semipd.core import InputError
from semipd.profiler import decode_works, hybrid_plan, prefill_works, solo_sms
from semipd.replay import prepare

CONFIGS = Path(__file__).parent.parent / "configs"
SWEEPS = CONFIGS / "sweeps"
H200_SMS = 132
SCHEMAS: dict[str, type[SweepConfig]] = {
    "prefill": PrefillSweep,
    "decode": DecodeSweep,
    "hybrid": HybridSweep,
    "mixed": MixedSweep,
}


def configs() -> list[Path]:
    return sorted(SWEEPS.glob("*.yaml"))


def loaded(path: Path) -> SweepConfig:
    return load(path, SCHEMAS[read_yaml(path)["kind"]])


def points(config: SweepConfig) -> int:
    """Points that a sweep measures on an H200."""
    if isinstance(config, PrefillSweep):
        return len(prefill_works(config.prefill)) * len(solo_sms(config, H200_SMS)) * len(config.backends)
    if isinstance(config, DecodeSweep):
        return len(decode_works(config.decode)) * len(solo_sms(config, H200_SMS))
    if isinstance(config, MixedSweep):
        chunks, decodes = len(prefill_works(config.prefill)), len(decode_works(config.decode))
        return chunks * len(config.in_turn_backends) + decodes + chunks * decodes * len(config.backends)
    assert isinstance(config, HybridSweep)
    plan = hybrid_plan(config, H200_SMS)
    return len(plan.totals) + len(plan.contention) * len(decode_works(config.decode))


@pytest.mark.parametrize("path", configs(), ids=lambda path: path.stem)
def test_a_checked_in_sweep_has_points_to_measure(path: Path) -> None:
    assert points(loaded(path)) > 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_checked_in_replay_or_comparison_names_what_there_is(path: Path) -> None:
    schema = CompareConfig if path.stem.startswith("compare") else ReplayConfig
    config = load(path, schema)
    setup = prepare(config)
    assert len(setup.trace) > 0
    asked = config.policies if isinstance(config, CompareConfig) else (config.policy,)
    assert policy_names(asked, setup)


def test_the_file_of_the_default_comparison_says_what_the_command_does_without_one() -> None:
    assert load(CONFIGS / "compare-azure-conv.yaml", CompareConfig) == CompareConfig()


@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_the_file_of_a_default_sweep_says_what_the_command_does_without_one(
    name: str, schema: type[SweepConfig]
) -> None:
    assert load(SWEEPS / f"{name}.yaml", schema) == schema()


def test_the_hybrid_grid_of_the_profile_is_on_its_solo_grids_and_on_the_same_partitions() -> None:
    prefill, decode, hybrid = (loaded(SWEEPS / f"h200-grid-{kind}.yaml") for kind in ("prefill", "decode", "hybrid"))
    assert isinstance(prefill, PrefillSweep)
    assert isinstance(decode, DecodeSweep)
    assert isinstance(hybrid, HybridSweep)
    for inner, outer in (
        (hybrid.prefill.tokens, prefill.prefill.tokens),
        (hybrid.prefill.mean_context, prefill.prefill.mean_context),
        (hybrid.decode.batches, decode.decode.batches),
        (hybrid.decode.kv_tokens, decode.decode.kv_tokens),
    ):
        assert set(inner) <= set(outer)  # else a slowdown would be measured over interpolated
    splits = {at for _, _, at in hybrid_plan(hybrid, H200_SMS).contention}
    assert {at.prefill_sms for at in splits} <= set(solo_sms(prefill, H200_SMS))
    assert {at.decode_sms for at in splits} <= set(solo_sms(decode, H200_SMS))


def test_a_sweep_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"decode.yaml: kind: found 'decode'; expected 'prefill'"):
        load(SWEEPS / "decode.yaml", PrefillSweep)
