"""The manners of the command line: exit codes, one-line errors, tracebacks on request, a quick start."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from closed_form_bench import ClosedFormBench, OpenClosedForm
from subprocesses import elsewhere

from semipd import __version__
from semipd.cli import main
from semipd.cli.needs import NEEDS
from semipd.config import Attention

CONFIGS = Path(__file__).parent.parent / "configs"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["swep"], "swep"),
        (["sweep"], "Missing command"),
        (["sweep", "prefill", "--sqes", "3"], "--sqes"),
        (["sweep", "prefill", "--seqs", "three"], "--seqs"),
        (["sweep", "prefill", "--seqs"], "--seqs"),
        (["sweep", "prefill", "surplus"], "surplus"),
        (["trace", "convert", "azure-conv-synth.csv"], "--format"),
        (["sweep", "prefill", "--step", "3"], "command line: step_sms: found 3; expected 2, 4, 6, 8, 16 or 32"),
        (["sweep", "decode", "--runs", "0"], "command line: runs: found 0"),
        (["sweep", "decode", "--set", "decode.batches=[1]"], "expected batch and context, or the lists batches and"),
        (["sweep", "decode", "--set", "batch=4"], "batch: unknown; expected one of attention, decode"),
        (["sweep", "decode", "--config", "none.yaml"], "none.yaml: not found"),
        (["sweep", "hybrid", "--solo-prefill", "none.csv"], "none.csv: not found; expected a sweep table"),
    ],
)
def test_wrong_usage_or_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main(words, OpenClosedForm()) == 2
    assert part in error_line(capsys)


@pytest.mark.parametrize("words", [["swep"], ["sweep", "decode", "--runs", "0"]])
@pytest.mark.parametrize("first", [True, False])
def test_a_traceback_comes_only_with_debug_wherever_it_stands(words: list[str], first: bool) -> None:
    with pytest.raises(Exception, match=r"swep|runs: found 0"):
        main(["--debug", *words] if first else [*words, "--debug"], OpenClosedForm())


def test_debug_leaves_a_good_command_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "trace", "info", "azure-conv-synth.csv"]) == 0
    assert "2500" in capsys.readouterr().out


def test_a_failure_while_measuring_is_exit_code_1_and_keeps_the_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(call: int) -> None:
        if call == 3:
            raise RuntimeError("out of\nmemory")

    opened = OpenClosedForm(ClosedFormBench(before=fail))
    assert main(["sweep", "decode", "--out", str(tmp_path)], opened) == 1
    assert error_line(capsys) == "error: RuntimeError: out of memory (--debug shows where)\n"
    assert len((tmp_path / "decode.csv").read_text().splitlines()) == 1 + 3


def test_interrupting_before_anything_is_measured_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    @contextmanager
    def interrupted(*_: object) -> Iterator[tuple[ClosedFormBench, dict[str, object]]]:
        raise KeyboardInterrupt
        yield ClosedFormBench(), {}

    assert main(["sweep", "decode"], interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_help_of_everything_is_plain_text_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["sweep", "--help"], ["sweep", "hybrid", "--help"], ["trace", "fit", "--help"]):
        assert main(words) == 0
        captured = capsys.readouterr()
        assert "Usage: semipd" in captured.out
        assert captured.err == ""
        assert captured.out.isascii()


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"semipd {__version__}\n"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, cwd="/", env={**elsewhere(), **environment},
    )  # fmt: skip


def test_help_loads_nothing_heavy_nor_the_compiled_module() -> None:
    heavy = {"numpy", "rich", "yaml", "joblib", "simpy", "torch", "flashinfer", "semipd._core"}
    done = run(
        f"import sys; from semipd.cli import main; main(['--help']); main(['sweep', '--help'])\n"
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    assert done.stderr == "[]\n"


def test_reading_a_trace_needs_neither_the_compiled_module_nor_torch() -> None:
    blocked = "import sys; sys.modules['semipd._core'] = sys.modules['torch'] = None\n"
    done = run(blocked + "from semipd.cli import main; sys.exit(main(['trace', 'info', 'azure-conv-synth.csv']))")
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_is_piped_is_plain_text_and_carries_no_trailing_blanks() -> None:
    done = run("from semipd.cli import main; main(['trace', 'info', 'azure-conv-synth.csv'])", FORCE_COLOR="1")
    assert "\x1b" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


MODEL = str(CONFIGS / "models" / "tiny.yaml")
ON_CPU = str(CONFIGS / "replay-cpu-tiny.yaml")


@pytest.mark.parametrize(
    ("words", "command", "absent"),
    [
        (["sweep", "decode"], "sweep", ("torch", "flashinfer")),
        (["profile", "--model", MODEL, "--out", "p"], "profile", ("flashinfer",)),
        (["profile", "--model", MODEL, "--out", "p", "--device", "cpu"], "profile --device cpu", ("torch",)),
        (["replay", ON_CPU, "--executor", "gpu"], "replay --executor gpu", ("flashinfer",)),
        (["replay", ON_CPU, "--executor", "cpu"], "replay --executor cpu", ("torch",)),
        (["replay", ON_CPU, "--executor", "cpu", "--set", "weights=w"], "replay --set weights=DIR", ("safetensors",)),
    ],
)
def test_a_module_that_is_not_installed_is_wrong_usage_and_it_is_said_what_to_install(
    words: list[str], command: str, absent: tuple[str, ...]
) -> None:
    code = "import sys, types; from semipd.cli import main\n"
    code += "import importlib.machinery as m; sys.path_importer_cache.clear()\n"
    needed = NEEDS[command]
    code += f"here = types.SimpleNamespace(find_spec=lambda name, *a: None if name in {absent!r} else "
    code += f"m.ModuleSpec(name, None) if name in {needed!r} else m.PathFinder.find_spec(name, *a))\n"
    code += "sys.meta_path[:] = [here, *sys.meta_path[:2]]\n"
    code += f"sys.exit(main({words!r}))"
    done = run(code)
    assert done.returncode == 2
    assert done.stderr == f"error: {command}: {' and '.join(absent)} not installed: pip install 'semipd[gpu]'\n"


def test_what_needs_something_is_a_command_with_that_option(capsys: pytest.CaptureFixture[str]) -> None:
    for needing in NEEDS:
        command, *option = needing.split()
        assert main([command, "--help"]) == 0
        assert set(option[:1]) <= set(capsys.readouterr().out.split())


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_doctor_on_a_machine_without_a_driver_says_why_nothing_can_be_partitioned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEMIPD_LIBCUDA", "libnone.so.1")
    document = found(capsys)
    parts = {p["name"]: p for p in document["parts"]}
    assert document["driver"] is None
    assert document["devices"] == []
    assert parts["replay, compare, show, trace"]["runs"]
    no_gpu = parts["partition the SMs (from Python)"]
    assert not no_gpu["runs"]
    assert "libnone.so.1" in no_gpu["why_not"]
    for name in ("sweep", "profile", "replay --executor gpu"):
        assert no_gpu["why_not"] in parts[name]["why_not"]
    for name in ("replay --executor cpu", "profile --device cpu"):
        assert "libnone.so.1" not in parts[name]["why_not"]


def test_doctor_speaks_of_every_command_but_itself(capsys: pytest.CaptureFixture[str]) -> None:
    spoken_of = {word for part in found(capsys)["parts"] for word in part["name"].split(", ")}
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    commands = {line.split()[0] for line in listed if not line.startswith("   ")}
    assert len(commands) > 6
    assert commands - {"doctor"} <= spoken_of


def test_doctor_names_every_device_and_the_splits_it_can_have(
    capsys: pytest.CaptureFixture[str], fake_cuda: ctypes.CDLL
) -> None:
    fake_cuda.fake_set_devices(2)
    document = found(capsys)
    devices = document["devices"]
    assert isinstance(devices, list)
    assert [d["index"] for d in devices] == [0, 1]
    assert (devices[0]["sms"], devices[0]["minimum"], devices[0]["multiple"]) == (132, 8, 8)
    assert (devices[0]["fine_minimum"], devices[0]["fine_multiple"]) == (2, 2)
    parts = {p["name"]: p for p in document["parts"]}
    assert parts["partition the SMs (from Python)"]["runs"]
    assert main(["doctor"]) == 0
    assert "132 SMs, splits of 8 or more in steps of 8" in " ".join(capsys.readouterr().out.split())


def test_a_bench_is_opened_with_the_attention_that_was_asked_for(tmp_path: Path) -> None:
    opened = OpenClosedForm()
    words = ["sweep", "decode", "--set", "attention.query_heads=32", "--step", "16", "--out", str(tmp_path)]
    assert main(words, opened) == 0
    assert opened.asked[0][:2] == (Attention(query_heads=32), 16)
