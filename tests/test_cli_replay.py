"""``semipd replay`` and ``semipd compare``: what they print, save and refuse."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pyarrow import parquet
from subprocesses import elsewhere
from synthetic_profile import write_profile
from test_trace_read import TRACES

from semipd.cli import main
from semipd.config import ReplayConfig, load

AZURE = TRACES / "azure-2023" / "AzureLLMInferenceTrace_conv.csv"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profile") / "p")


@pytest.fixture
def config(tmp_path: Path, profile: Path) -> Path:
    path = tmp_path / "replay.yaml"
    data = {
        "trace": {"path": "azure-conv-synth.csv", "limit": 150, "rate_scale": 3.0},
        "profile": str(profile),
        "policy": "static-16",
        "slo": {"ttft_s": 1.0, "tpot_s": 0.05},
    }
    path.write_text(yaml.safe_dump(data))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    found = parquet.read_table(path).to_pylist()
    assert isinstance(found, list)
    return found


def compared(*words: str) -> list[str]:
    return ["compare", "--limit", "150", "--jobs", "1", *words]


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_a_saved_replay_can_be_run_again_and_its_files_agree(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(["replay", str(config), "--set", "policy=adaptive", "--out", str(a)]) == 0
    assert main(["replay", str(a / "config.yaml"), "--out", str(b)]) == 0
    assert capsys.readouterr().err.splitlines() == [f"saved: {a}", f"saved: {b}"]
    assert load(a / "config.yaml", ReplayConfig).policy == "adaptive"
    for name in ("config.yaml", "requests.parquet", "runs.parquet"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    summary = json.loads((a / "summary.json").read_text())
    requests, runs = rows(a / "requests.parquet"), rows(a / "runs.parquet")
    assert summary["completed"] == len(requests) == 150
    assert summary["ttft_s"]["p90"] == np.percentile([row["ttft_s"] for row in requests], 90)
    assert sorted(i for row in runs for i in row["finished"]) == [row["id"] for row in requests]
    decoded = sum(row["steps"] * row["requests"] for row in runs if row["phase"] == "decode")
    assert decoded == sum(row["output_tokens"] - 1 for row in requests)


def test_a_folder_that_holds_a_run_is_not_overwritten(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    assert main(["replay", str(config), "--out", str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["replay", str(config), "--set", "policy=exclusive", "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {out}: holds a run; expected a new folder"
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def interrupted(words: list[str], after: Path | None = None, wait_s: float = 1.0) -> tuple[int, str]:
    """Exit code and stderr of a command that gets Ctrl-C so long after its start, or after a file is there."""
    # The handler by hand, since a child of a shell's background job would ignore Ctrl-C.
    program = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from semipd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *words]
    # In another folder, for the checkout's package would come first, without its compiled modules.
    with subprocess.Popen(
        command, env=elsewhere(), cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        while after is not None and not after.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().decode()
        return process.wait(), said


def test_ctrl_c_saves_what_is_complete_and_says_so(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    words = ["replay", str(config), "--set", "trace.limit=null", "--set", "trace.replicate=100", "--out", str(out)]
    code, said = interrupted(words, out / "runs.parquet")
    assert code == 130, said
    summary, requests = json.loads((out / "summary.json").read_text()), rows(out / "requests.parquet")
    assert not summary["complete"]
    assert len(requests) == summary["requests"] == 250_000
    finished = sorted(i for row in rows(out / "runs.parquet") for i in row["finished"])
    assert finished == [row["id"] for row in requests if row["finish_s"] is not None]
    assert 0 < summary["completed"] == len(finished) < len(requests)
    assert said.splitlines()[-1] == f"interrupted: {len(finished)} of 250000 requests are complete"


def test_ctrl_c_ends_a_comparison_with_what_is_complete(profile: Path) -> None:
    words = ["compare", "--profile", str(profile), "--set", "trace.replicate=400", "--jobs", "1"]
    code, said = interrupted([*words, "--policies", "exclusive,static-8"], wait_s=5.0)
    assert code == 130, said
    assert said.splitlines()[-1] == "interrupted: none of 2 policies is complete"


def test_a_replay_prints_its_summary_as_one_document(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(config), "--json"]) == 0
    found = document(capsys)
    assert (found["policy"], found["requests"], found["completed"]) == ("static-16", 150, 150)
    assert found["slo"] == {"ttft_s": 1.0, "tpot_s": 0.05}


def test_a_comparison_document_holds_every_run(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(compared("--profile", str(profile), "--json")) == 0
    found = document(capsys)
    policies = ["exclusive", "exclusive-decode", "static-8", "static-16", "static-24", "adaptive"]
    assert [run["policy"] for run in found["runs"]] == policies
    assert found["best_static"].startswith("static-")
    assert found["recommended"] in {run["policy"] for run in found["runs"]}
    assert found["profile"] == "synthetic"


def test_the_options_of_a_comparison_reach_it(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--profile", str(profile), "--policies", "adaptive,static-8", "--slo", "mooncake-100", "--json")
    assert main(compared(*words, "--rate-scale", "2")) == 0
    once = document(capsys)
    assert [run["policy"] for run in once["runs"]] == ["static-8", "adaptive"]
    assert once["runs"][0]["slo"] == {"ttft_s": 30.0, "tpot_s": 0.1}
    assert main(compared(*words, "--rate-scale", "1")) == 0
    assert document(capsys)["runs"][0]["duration_s"] > 1.5 * once["runs"][0]["duration_s"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal_and_no_number_is_cut(
    width: int, config: Path, profile: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(compared("--profile", str(profile))) == 0
    assert main(["replay", str(config)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    said = " ".join(out.split())
    assert "a perfect predictor" in said
    assert said.count("closed forms, for tests") == 2  # what was simulated is said wherever results are shown


def test_the_shipped_comparison_finds_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--policies", "static-96,static-112,chunked-1024", "--json"]) == 0
    found = document(capsys)
    assert (found["recommended"], found["best_static"], found["best_chunked"]) == (
        "chunked-1024", "static-96", "chunked-1024",
    )  # fmt: skip
    assert found["profile"] == "h200/llama-3-8b"
    assert [run["extrapolated_share"] for run in found["runs"]] == [0.0, 0.0, 0.0]


def test_the_same_scheduler_runs_a_model_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    configs = Path(__file__).parent.parent / "configs"
    path = configs / "replay-cpu-tiny.yaml"
    words = ("replay", str(path), "--set", f"model={configs / 'models' / 'tiny.yaml'}", "--set", "trace.limit=3")
    assert main([*words, "--executor", "cpu", "--out", str(tmp_path / "r"), "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert err == f"saved: {tmp_path / 'r'}\n"
    assert (summary["requests"], summary["completed"]) == (3, 3)
    assert all(row["ttft_s"] > 0 for row in rows(tmp_path / "r" / "requests.parquet"))


def test_ctrl_c_ends_a_replay_that_waits_for_a_request(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    configs, out = Path(__file__).parent.parent / "configs", tmp_path / "r"
    words = ["replay", str(configs / "replay-cpu-tiny.yaml"), "--executor", "cpu", "--out", str(out)]
    words += ["--set", f"model={configs / 'models' / 'tiny.yaml'}", "--set", "trace.rate_scale=0.0001"]
    started_s = time.monotonic()
    code, said = interrupted(words, out / "runs.parquet", wait_s=12)
    assert code == 130, said
    assert time.monotonic() - started_s < 60  # the next request comes in hours
    assert said.splitlines()[-1] == "interrupted: 1 of 10 requests are complete"
    assert json.loads((out / "summary.json").read_text())["completed"] == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--set", "model=null"), "model: missing; expected a file such as configs/models/tiny.yaml to run"),
        (("--set", "scheduler.num_blocks=null"), "scheduler.num_blocks: missing; expected the KV blocks to take"),
        (("--set", "trace.limit=100"), "{model}: max_positions: found 4096; expected at least the"),
    ],
)
def test_what_a_model_on_the_cpu_lacks_is_said(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    configs = Path(__file__).parent.parent / "configs"
    model = configs / "models" / "tiny.yaml"
    first = ("replay", str(configs / "replay-cpu-tiny.yaml"), "--set", f"model={model}", "--executor", "cpu")
    assert main([*first, *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line.format(model=model)}")


@pytest.mark.skipif(not AZURE.exists(), reason=f"the Azure conversation trace is not in {TRACES}")
def test_the_azure_conversation_trace_completes_on_the_shipped_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--trace", str(AZURE), "--policies", "static-64,adaptive", "--json"]) == 0
    for run in document(capsys)["runs"]:
        assert (run["requests"], run["completed"], run["dropped"]) == (19_366, 19_366, 0)
        assert run["extrapolated_share"] == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("compare", "--policies", "static-12"), "policy: found 'static-12'; expected static-N with N one of the"),
        (("compare", "--policies", ""), "policy: found ''; expected one of exclusive, exclusive-decode, static-N"),
        (("compare", "--slo", "fast"), "command line: slo: found 'fast'; expected ttft_s and tpot_s, a YAML"),
        (("compare", "--trace", "none.csv"), "trace: found 'none.csv'; expected a file, or what is shipped:"),
        (("compare", "--profile", "none"), "profile: found 'none'; expected a folder or one of h200/gqa-64-8-128"),
        (("compare", "--rate-scale", "0"), "command line: trace.rate_scale: found 0.0; expected greater than 0"),
        (
            ("compare", "--predictor-error", "nan"),
            "command line: predictor_error: found 'nan'; expected a finite number",
        ),
        (("compare", "--jobs", "0"), "Invalid value for '--jobs'"),
        (("replay", "none.yaml"), "none.yaml: not found; expected a YAML file"),
        (("replay",), "Missing argument 'CONFIG'"),
        (("replay", "none.yaml", "--executor", "tpu"), "Invalid value for '--executor'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
