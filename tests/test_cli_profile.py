"""``semipd profile`` with a tiny model on a CPU: the very executor that drives a GPU; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semipd.cli import main
from semipd.config import load
from semipd.core import Allocation, Mode, Phase
from semipd.model_config import ModelConfig
from semipd.profile import load_profile
from semipd.profile_config import ProfileConfig

torch = pytest.importorskip("torch")

from lagging_device import LaggingDevice  # noqa: E402 - after the check for torch

from semipd.attention import TorchAttention  # noqa: E402 - likewise
from semipd.model import Model, random_weights  # noqa: E402 - likewise
from semipd.paged_kv import PagedKvCache  # noqa: E402 - likewise
from semipd.ragged import Decodes, Prompts  # noqa: E402 - likewise
from semipd.sequences import pooled_prompts  # noqa: E402 - likewise
from semipd.stopwatch import Stopwatch  # noqa: E402 - likewise
from semipd.torch_executor import TorchExecutor  # noqa: E402 - likewise

torch.set_num_threads(1)  # a tiny model's threads spend their time waiting for each other

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = CONFIGS / "models" / "tiny.yaml"


def command(out: Path, *words: str) -> list[str]:
    config = CONFIGS / "profiles" / "cpu-tiny.yaml"
    return [
        "profile", "--model", str(TINY), "--device", "cpu", "--config", str(config), "--out", str(out), *words
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profiles") / "cpu" / "tiny"
    assert main(command(out, "--holdout", "6")) == 0
    return out


def test_a_model_on_a_cpu_becomes_a_profile_that_prices_every_way_of_sharing(measured: Path) -> None:
    profile = load_profile(measured)
    assert (profile.name, profile.device_sms, profile.layers) == ("cpu/tiny", 16, 2)
    assert profile.model == load(TINY, ModelConfig).model_dump(mode="json")
    assert [at.name for at in profile.cost().allocations] == ["8/8", "capped-8", "priority", "mixed"]
    assert all(p.median_ms > 0 and p.backend == "torch" for p in profile.prefill.points)
    assert str(profile.hybrid.provenance["command"]).startswith("semipd profile --model")


def test_show_says_how_far_models_are_off_at_held_out_points(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(measured)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("prefill alone", "decode beside", "solo", "roofline", "bias"))
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["show", str(measured), "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["holdout"]
    assert held["prefill beside"]["table"]["points"] == 3
    assert set(held["decode alone"]) == {"table", "solo", "roofline"}


def test_what_was_measured_is_not_measured_again(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_text() for path in measured.glob("*.csv")}
    assert main(command(measured, "--holdout", "6", "--resume", "--json")) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["complete"] is True
    assert document["points"]["hybrid"] == 3 * 4
    assert "plan: 0 points" in err
    assert {path.name: path.read_text() for path in measured.glob("*.csv")} == before


def test_a_time_limit_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "p", "--limit-s", "0.001")) == 0
    assert "time limit reached; go on with: semipd profile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "tpu"), "--device: found 'tpu'; expected one of cuda, cpu"),
        (("--set", "num_blocks=null"), "num_blocks: missing; expected the KV blocks to take of this machine's memory"),
        (("--prefill-sms", "8,16"), "prefill_sms: found 16; expected less than the 16 SMs of the device"),
        (("--prefill-sms", "8,x"), "prefill_sms.1: found 'x'; expected a valid integer"),
        (("--set", "both_prefill.tokens=[99999]"), "both_prefill.tokens: found 99999; expected at most max_num_bat"),
        (("--set", "decode.kv_tokens=[4]"), "decode.kv_tokens: found 4; expected at least two for each of 4 sequences"),
        (("--set", "modes=[mixed]"), "modes: split is missing; a profile has at least the splits"),
        (("--model", "nowhere.yaml"), "nowhere.yaml: not found; expected a YAML file"),
    ],
)
def test_wrong_input_is_one_line(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "p", *words)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_a_folder_that_has_a_profile_is_kept(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(measured)) == 2
    assert "holds a profile; expected a new folder, or --resume" in capsys.readouterr().err


def test_the_shipped_configuration_files_and_the_defaults_are_valid() -> None:
    assert load(CONFIGS / "profiles" / "cpu-tiny.yaml", ProfileConfig).num_blocks == 200
    assert ProfileConfig().modes == ("split", "capped", "priority", "mixed")


def test_steps_are_timed_on_a_device_that_lags_behind_and_nothing_is_left_of_them() -> None:
    config = load(TINY, ModelConfig).model_copy(update={"layers": 5})
    cache = PagedKvCache(config, 100, 16, "cpu")
    cache.randomise(0)
    executor = TorchExecutor(
        Model(config, random_weights(config, "cpu"), cache),
        TorchAttention(cache),
        LaggingDevice(3, 2),
        max_num_seqs=8,
        prompts=pooled_prompts(config.vocab_size, 4096),
        blank_context=True,
    )
    watch = Stopwatch(executor, config.layers, forget=executor.forget, settle_s=0.001, measure_s=0.002, limit_s=0.05)
    prefill, decode = Prompts((40, 8), (100, 0)), Decodes((100, 50, 7))
    for at in (Allocation(Mode.SPLIT, 8, 8), Allocation(Mode.CAPPED, 8, 16), Allocation(Mode.PRIORITY, 16, 16)):
        alone = watch.prefill(prefill, at), watch.decode(decode, at)
        both = watch.both(prefill, decode, at)
        assert all(spread.median_ms > 0 for spread in (*alone, *both))
        assert executor.sequences.blocks.free == 100
    assert watch.mixed(prefill, decode, Allocation(Mode.MIXED, 16, 16, 64)).steps >= 2
    assert executor.sequences.blocks.free == 100
    assert watch.start_ms(Phase.MIXED) > 0
