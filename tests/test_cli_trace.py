"""``semipd trace``: what each command prints, writes and refuses."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from semipd.cli import main
from semipd.trace import info, load_spec, read_trace, shipped

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def mooncake(folder: Path, shared: bool = True) -> Path:
    """Three requests; with ``shared`` they begin with the same block of 512 tokens."""
    rows = [
        {"timestamp": 1000 * i, "input_length": 600 + i, "output_length": 5, "hash_ids": [0 if shared else i, 10 + i]}
        for i in range(3)
    ]
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    """Output and notes of a command that must succeed."""
    assert main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a command that must refuse its input."""
    assert main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    return captured.err


def test_info_gives_the_statistics_of_a_shipped_trace_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    expected = info(read_trace(shipped("azure-conv-synth.csv")))
    out, err = printed(capsys, "trace", "info", "azure-conv-synth.csv", "--json")
    assert json.loads(out) == asdict(expected)
    assert err == ""
    table, _ = printed(capsys, "trace", "info", "azure-conv-synth.csv")
    assert f"{expected.requests}" in table
    assert f"{expected.rate_rps:.3g} requests/s" in table


def test_info_counts_what_a_limit_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, "trace", "info", "azure-conv-synth.csv", "--limit", 10, "--json")
    found = json.loads(out)
    assert (found["requests"], found["dropped"], found["rows_read"]) == (10, {"limit": 2490}, 2500)


def test_a_file_here_goes_before_a_shipped_one_of_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("azure-conv-synth.csv").write_text(f"{AZURE}\n2023-11-16 18:00:00,7,1\n")
    out, _ = printed(capsys, "trace", "info", "azure-conv-synth.csv", "--json")
    assert json.loads(out)["requests"] == 1


def test_converting_to_azure_says_that_prefixes_are_lost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    said, note = printed(capsys, "trace", "convert", mooncake(tmp_path), "--format", "azure-csv", "--out", out)
    assert said == f"{out}: 3 requests in 2.0 s, 1.5 requests/s\n"
    assert note == "azure-csv has no place for prefix block ids: they are dropped\n"
    assert list(read_trace(out).prompt_len) == [600, 601, 602]


def test_converting_without_prefixes_or_to_mooncake_has_nothing_to_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("trace", "convert", mooncake(tmp_path), "--format", "mooncake-jsonl", "--out", tmp_path / "b.jsonl")
    assert printed(capsys, *words)[1] == ""
    again = ("trace", "convert", "azure-conv-synth.csv", "--format", "azure-csv", "--out", tmp_path / "c.csv.gz")
    assert printed(capsys, *again)[1] == ""
    assert len(read_trace(tmp_path / "c.csv.gz")) == 2500


def test_converting_can_warp_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words: tuple[Any, ...] = ("trace", "convert", mooncake(tmp_path), "--format", "mooncake-jsonl", "--rate-scale", 4)
    out, _ = printed(capsys, *words, "--out", tmp_path / "fast.jsonl", "--json")
    assert json.loads(out)["duration_s"] == 0.5
    assert read_trace(tmp_path / "fast.jsonl").duration_s == 0.5


def test_converting_to_azure_says_that_sessions_are_lost(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"session_id": "a", "timestamp": 0, "input_length": 5, "output_length": 1}\n')
    words = ("trace", "convert", path, "--format", "azure-csv", "--out", tmp_path / "a.csv")
    assert printed(capsys, *words)[1] == "azure-csv has no place for sessions: they are dropped\n"


def test_converting_bailian_joins_its_blocks_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text(
        '{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 17, "output_length": 1, '
        '"type": "text", "turn": 1, "hash_ids": [8, 9]}\n'
    )
    out = tmp_path / "m.jsonl"
    _, note = printed(capsys, "trace", "convert", path, "--format", "mooncake-jsonl", "--out", out)
    assert note == "prefix blocks of 16 tokens joined to blocks of 512\n"
    assert json.loads(out.read_text())["hash_ids"] == [0]


def test_everything_done_to_a_trace_is_printed_and_can_be_repeated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words: tuple[Any, ...] = ("trace", "convert", "azure-conv-synth.csv", "--format", "azure-csv", "--limit", 1000)
    words += ("--start-s", 10, "--end-s", 100, "--dequantise-s", 0.1, "--thin", 0.5, "--replicate", 3)
    words += ("--jitter-s", 2, "--arrivals", "ramp", "--rate", 2, "--end-rate", 8, "--rate-scale", 2, "--seed", 5)
    said, _ = printed(capsys, *words, "--out", tmp_path / "a.csv")
    assert [line.strip() for line in said.splitlines()[1:]] == [
        "stamps spread over 0.1 s, seed 5",
        "thinned to 0.5, seed 5",
        "replicated x 3, jitter 2 s, seed 5",
        "ramp arrivals, 2 requests/s to 8, seed 5",
        "time warp, rate x 2",
    ]
    document, _ = printed(capsys, *words, "--out", tmp_path / "b.csv", "--json")
    found = json.loads(document)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert found["rows_read"] + found["added"] == found["requests"] + sum(found["dropped"].values())
    assert found["dropped"].keys() == {"limit", "window", "thinned"}
    assert found["rate_rps"] == pytest.approx(10, rel=0.2)  # twice the mean of 2 and 8


def test_info_accounts_for_every_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    path.write_text(f"{header}\n1.0,a,2,GPT-4,10,5,15,x\n3.0,a,2,GPT-4,10,0,10,x\n9.0,a,2,GPT-4,20,5,25,x\n")
    out, _ = printed(capsys, "trace", "info", path)
    assert "rows read  3 = 2 requests + 1 dropped (failed)\n" in out
    assert "sessions   1 of 2 requests in all\n" in out
    assert "stamps     2 different, 8 s apart at least\n" in out


@pytest.mark.parametrize(
    "words",
    [
        ("trace", "convert", "azure-conv-synth.csv", "--format", "azure-csv"),
        ("trace", "fit", "azure-conv-synth.csv"),
        ("trace", "synth", "azure-2023-conv.yaml", "--requests", "5"),
    ],
)
def test_an_existing_file_is_overwritten_only_when_forced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    assert f"{out}: exists; expected a new file, or --force" in refused(capsys, *words, "--out", out)
    assert out.read_text() == "precious"
    printed(capsys, *words, "--out", out, "--force")
    assert out.read_text() != "precious"


def test_a_fit_records_where_it_came_from_and_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "s.yaml"
    words = ["trace", "fit", "azure-conv-synth.csv", "--window-s", "30", "--name", "mine", "--source", "a drawn trace"]
    words += ["--licence", "CC-BY-4.0", "--attribution", "Patel et al.", "--out", str(out)]
    printed(capsys, *words)
    spec = load_spec(out)
    assert (spec.name, spec.source, spec.licence, spec.attribution) == (
        "mine",
        "a drawn trace",
        "CC-BY-4.0",
        "Patel et al.",
    )
    assert spec.window_s == 30
    assert spec.command.startswith("semipd trace fit azure-conv-synth.csv --window-s 30 --name mine --source 'a drawn")


def test_the_command_in_the_readme_of_the_traces_draws_the_default_trace_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "again.csv"
    words = ("trace", "synth", "azure-2023-conv.yaml", "--seed", 0, "--requests", 2500, "--format", "azure-csv")
    printed(capsys, *words, "--out", out)
    assert out.read_bytes() == shipped("azure-conv-synth.csv").read_bytes()


def test_another_seed_draws_another_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for seed in (1, 2):
        words = ("trace", "synth", "azure-2023-code.yaml", "--seed", seed, "--duration-s", 60)
        printed(capsys, *words, "--out", tmp_path / f"{seed}.csv")
    assert (tmp_path / "1.csv").read_bytes() != (tmp_path / "2.csv").read_bytes()


def test_the_shipped_specifications_are_fitted_by_the_commands_that_they_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = shlex.split(load_spec(shipped("azure-2023-conv.yaml")).command)
    assert words[:3] == ["semipd", "trace", "fit"]
    words[3] = "azure-conv-synth.csv"  # its source is not shipped: every option must be one that exists
    words[words.index("--out") + 1] = str(tmp_path / "s.yaml")
    printed(capsys, *words[1:])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("info", "none.csv"), "trace: found 'none.csv'; expected a file, or what is shipped: azure-2023-code.yaml"),
        (("info", "no/such.csv"), "no/such.csv: found no readable file"),
        (("info", "azure-conv-synth.csv", "--from", "csv"), "trace format: found 'csv', expected azure-csv, mooncake"),
        (("info", "azure-conv-synth.csv", "--from", "mooncake-jsonl"), "line 1: row: found"),
        (("info", "azure-conv-synth.csv", "--limit", "0"), "number of requests: found 0, expected at least 1"),
        (("convert", "azure-conv-synth.csv", "--format", "x", "--out", "y"), "trace format: found 'x'"),
        (("convert", "azure-conv-synth.csv", "--format", "vidur-csv", "--out", "y"), "expected azure-csv or mooncake"),
        (
            ("convert", "azure-conv-synth.csv", "--format", "azure-csv", "--out", "y", "--arrivals", "x"),
            "process: found 'x'",
        ),
        (("convert", "azure-conv-synth.csv", "--format", "azure-csv", "--out", "y", "--thin", "2"), "thin: found 2"),
        (
            ("convert", "azure-conv-synth.csv", "--format", "azure-csv", "--out", "y", "--end-s", "nan"),
            "azure-conv-synth: window: found 0 s to nan s, expected 0 s or later to something after that",
        ),
        (("synth", "azure-conv-synth.csv", "--out", "y"), "expected"),
        (("synth", "azure-2023-conv.yaml", "--seed", "-1", "--out", "y"), "seed: found -1"),
        (("fit", "azure-conv-synth.csv", "--window-s", "0", "--out", "y"), "window_s: found 0"),
    ],
)
def test_bad_input_is_one_line_that_says_what_was_found_and_expected(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert line in refused(capsys, "trace", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_is_wrong_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"{AZURE}\n2023-11-16 18:00:00,7,0\n")
    assert "bad.csv: line 2: GeneratedTokens: found '0', expected an integer from 1" in refused(
        capsys, "trace", "info", path
    )
