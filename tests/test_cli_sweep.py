"""``semipd sweep`` on a bench with closed-form times: what is measured, saved, printed, and how it is resumed."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from closed_form_bench import ClosedFormBench, OpenClosedForm
from synthetic_profile import write_profile

from semipd.cli import main
from semipd.config import Attention, HybridSweep, MixedSweep, PrefillSweep, load
from semipd.points import DecodePoint, DecodeWork, HybridPoint, MixedPoint, PrefillPoint, PrefillWork, TotalPoint
from semipd.profile import load_profile
from semipd.table_files import read_table

LAYERS = 4


def document(out: str) -> dict[str, Any]:
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_a_prefill_sweep_saves_every_backend_on_every_partition(tmp_path: Path) -> None:
    opened = OpenClosedForm()
    assert main(["sweep", "prefill", "--out", str(tmp_path / "p")], opened) == 0
    table = read_table(tmp_path / "p" / "prefill.csv", PrefillPoint)
    assert {(p.sms, p.backend) for p in table.points} == {
        (n, b) for n in [*range(8, 132, 8), 132] for b in ("fa2", "fa3", "fa3-sized")
    }
    assert {(p.seqs, p.seq_tokens, p.steps) for p in table.points} == {(32, 4096, 10)}
    assert opened.asked == [(Attention(), 8, f"semipd sweep prefill --out {tmp_path}/p")]
    assert table.provenance["command"] == opened.asked[0][2]


def test_the_configuration_that_was_measured_is_saved_and_gives_the_same_sweep(tmp_path: Path) -> None:
    options = ["--seqs", "2", "--seq-tokens", "512", "--step", "32", "--runs", "3"]
    assert main(["sweep", "prefill", *options, "--out", str(tmp_path / "a")], OpenClosedForm()) == 0
    saved = tmp_path / "a" / "prefill.yaml"
    config = load(saved, PrefillSweep)
    assert (config.prefill.seqs, config.prefill.seq_tokens, config.step_sms, config.runs) == (2, 512, 32, 3)
    assert main(["sweep", "prefill", "--config", str(saved), "--out", str(tmp_path / "b")], OpenClosedForm()) == 0
    a, b = (read_table(tmp_path / x / "prefill.csv", PrefillPoint).points for x in "ab")
    assert a == b


def test_options_win_over_set_and_set_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("kind: decode\nruns: 2\nstep_sms: 32\ndecode: {batch: 8, context: 64}\n")
    words = ["sweep", "decode", "--config", str(file), "--set", "runs=3", "--set", "decode.batch=16", "--runs", "4"]
    assert main([*words, "--out", str(tmp_path / "d")], OpenClosedForm()) == 0
    points = read_table(tmp_path / "d" / "decode.csv", DecodePoint).points
    assert {(p.steps, p.batch, p.kv_tokens) for p in points} == {(4, 16, 16 * 64)}
    assert [p.sms for p in points] == [132, 128, 96, 64, 32]


def test_a_hybrid_sweep_measures_fixed_work_and_contention(tmp_path: Path) -> None:
    out = tmp_path / "h"
    assert main(["sweep", "hybrid", "--step", "32", "--out", str(out)], OpenClosedForm()) == 0
    totals = read_table(out / "total.csv", TotalPoint).points
    steady = read_table(out / "hybrid.csv", HybridPoint).points
    sharings = {("split", n, 132 - n) for n in (32, 64, 96, 128)} | {("capped", n, 132) for n in (32, 64, 96, 128)}
    sharings |= {("priority", 132, 132), ("streams", 132, 132)}
    assert {(p.mode, p.prefill_sms, p.decode_sms) for p in steady} == sharings
    assert {(p.mode, p.prefill_sms, p.decode_sms) for p in totals} == sharings | {("in-turn", 132, 132)}
    assert {(p.prefill_steps, p.decode_steps) for p in totals} == {(10, 100)}


def test_the_hybrid_document_gives_both_baselines_and_the_speed_ups_over_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "hybrid", "--json", "--out", str(tmp_path / "h")], OpenClosedForm()) == 0
    found = document(capsys.readouterr().out)
    assert found["complete"] is True
    totals = found["tables"]["total"]
    in_turn = {p["prefill_backend"]: p["total_ms"] for p in totals if p["mode"] == "in-turn"}
    fastest = min(p["total_ms"] for p in totals if p["mode"] != "in-turn")
    best = found["summary"]["best"]
    assert best["best"]["total_ms"] == fastest
    assert best["over_fastest"] == pytest.approx(min(in_turn.values()) / fastest)
    assert best["over_same"] == pytest.approx(in_turn[best["best"]["prefill_backend"]] / fastest)
    assert best["gain_percent"] == pytest.approx(100 * (best["over_fastest"] - 1))
    assert found["summary"]["in_turn"][0]["total_ms"] == min(in_turn.values())
    assert len(found["tables"]["hybrid"]) == 102
    assert found["config"] == HybridSweep().model_dump(mode="json")
    assert found["provenance"]["total"]["device_sms"] == 132


def test_a_mixed_sweep_measures_each_chunk_fused_and_both_parts_alone_on_the_whole_device(tmp_path: Path) -> None:
    out, opened = tmp_path / "m", OpenClosedForm()
    assert main(["sweep", "mixed", "--out", str(out)], opened) == 0
    fused = read_table(out / "mixed.csv", MixedPoint)
    assert {(p.tokens, p.mean_context, p.backend) for p in fused.points} == {
        (n, 2048, b) for n in (256, 512, 1024, 2048) for b in ("fa2", "fa3")
    }
    assert {(p.batch, p.kv_tokens, p.steps) for p in fused.points} == {(128, 128 * 4096, 10)}
    assert fused.provenance["command"] == f"semipd sweep mixed --out {out}"
    alone, decode = read_table(out / "prefill.csv", PrefillPoint).points, read_table(out / "decode.csv", DecodePoint)
    assert {p.sms for p in alone} == {p.sms for p in decode.points} == {132}
    assert {p.backend for p in alone} == {"fa2", "fa3", "fa3-sized"}
    assert {(p.seq_tokens, p.seq_context) for p in alone} == {(p.seq_tokens, p.seq_context) for p in fused.points}
    assert load(out / "mixed.yaml", MixedSweep) == MixedSweep()


def test_the_mixed_document_gives_the_speed_ups_over_the_parts_in_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "mixed", "--chunk", "256", "--chunk", "4096", "--batch", "64", "--context", "1024", "--json"]
    opened = OpenClosedForm()
    assert main([*words, "--out", str(tmp_path / "m")], opened) == 0
    found = document(capsys.readouterr().out)
    assert found["complete"] is True
    tables = found["tables"]
    (decode,) = tables["decode"]
    assert (decode["batch"], decode["kv_tokens"]) == (64, 64 * 1024)
    alone = {(p["tokens"], p["backend"]): p["median_ms"] for p in tables["prefill"]}
    assert {(g["fused"]["tokens"], g["fused"]["backend"]) for g in found["summary"]} == {
        (n, b) for n in (256, 4096) for b in ("fa2", "fa3")
    }
    for gain in found["summary"]:
        tokens, backend, took = (gain["fused"][name] for name in ("tokens", "backend", "median_ms"))
        fastest = min(ms for (n, _), ms in alone.items() if n == tokens)
        assert gain["over_same"] == pytest.approx((alone[tokens, backend] + decode["median_ms"]) / took)
        assert gain["over_fastest"] == pytest.approx((fastest + decode["median_ms"]) / took)


def test_the_table_of_a_mixed_sweep_is_one_that_a_profile_takes(tmp_path: Path) -> None:
    folder = write_profile(tmp_path / "p", 132, layers=LAYERS)
    grid = ["--chunk", "16", "--chunk", "1024", "--set", "decode={batches: [8, 128], kv_tokens: [512, 65536]}"]
    opened = OpenClosedForm()
    assert main(["sweep", "mixed", *grid, "--out", str(tmp_path / "m")], opened) == 0
    for name in ("mixed.csv", "mixed.json"):
        (tmp_path / "m" / name).rename(folder / name)
    chunk, decode = PrefillWork.at(1024, 2048), DecodeWork(128, 65536)
    step_s, outside = load_profile(folder).cost().mixed_s(chunk.shape, decode.shape)
    fastest_ms = min(opened.bench.mixed_ms(chunk, decode, b) for b in ("fa2", "fa3"))
    assert (step_s, outside) == (pytest.approx(LAYERS * fastest_ms / 1e3, abs=1e-8), False)


def test_a_mixed_sweep_has_no_partitions_and_needs_a_baseline_for_each_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "mixed", "--out", str(tmp_path / "m"), "--set"]
    assert main([*words, "sms=[64]"], OpenClosedForm()) == 2
    assert "sms: unknown" in capsys.readouterr().err
    assert main([*words, "in_turn_backends=[fa2]"], OpenClosedForm()) == 2
    assert capsys.readouterr().err == (
        "error: command line: in_turn_backends lacks fa3 of backends; expected all of these, too\n"
    )


def test_a_solo_table_leaves_one_backend_for_each_partition(tmp_path: Path) -> None:
    solo, out = tmp_path / "solo dir", tmp_path / "h"
    words = ["--seqs", "4", "--out", str(solo)]
    assert main(["sweep", "prefill", *words], OpenClosedForm()) == 0
    table = solo / "prefill.csv"
    assert main(["sweep", "hybrid", "--solo-prefill", str(table), "--out", str(out)], OpenClosedForm()) == 0
    steady = read_table(out / "hybrid.csv", HybridPoint).points
    assert len(steady) == len({(p.mode, p.prefill_sms) for p in steady}) == 34
    alone = read_table(table, PrefillPoint).points
    for p in steady:
        here = {q.backend: q.median_ms for q in alone if q.sms == p.prefill_sms}
        assert here[p.prefill_backend] == min(here.values())


@pytest.mark.parametrize("kind", ["prefill", "decode", "hybrid", "mixed"])
def test_interrupting_keeps_what_was_measured_and_resume_measures_the_rest(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(call: int) -> None:
        if call == 5:
            raise KeyboardInterrupt

    broken = OpenClosedForm(ClosedFormBench(before=interrupt))
    words = ["sweep", kind, "--out", str(tmp_path / "out dir")]
    assert main(words, broken) == 130
    said = capsys.readouterr().err
    assert f"interrupted; go on with: semipd sweep {kind} --out '{tmp_path}/out dir' --resume" in said
    resume = shlex.split(said.rsplit("go on with: semipd ", 1)[1])
    rest = OpenClosedForm()
    assert main(resume, rest) == 0
    whole = OpenClosedForm()
    assert main(["sweep", kind, "--out", str(tmp_path / "whole")], whole) == 0
    kept = broken.bench.calls
    assert sorted(map(str, kept + rest.bench.calls)) == sorted(map(str, whole.bench.calls))
    assert len(kept) == 5


def test_a_time_limit_ends_with_the_points_so_far_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = OpenClosedForm(ClosedFormBench(before=lambda _: time.sleep(0.02)))
    assert main(["sweep", "decode", "--limit-s", "0.05", "--json", "--out", str(tmp_path / "d")], slow) == 0
    captured = capsys.readouterr()
    found = document(captured.out)
    assert found["complete"] is False
    assert 1 <= len(found["tables"]["decode"]) < 17
    assert "time limit reached; go on with: " in captured.err
    assert captured.err.rstrip().endswith("--resume")


def test_an_existing_table_is_kept_unless_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "decode", "--out", str(tmp_path / "d")]
    assert main(words, OpenClosedForm()) == 0
    before = (tmp_path / "d" / "decode.csv").read_bytes()
    capsys.readouterr()
    again = OpenClosedForm()
    assert main([*words, "--runs", "3"], again) == 2
    assert "exists; expected a new file, or --resume" in capsys.readouterr().err
    assert main([*words, "--resume"], again) == 0
    assert again.bench.calls == []
    assert (tmp_path / "d" / "decode.csv").read_bytes() == before


def test_results_go_to_stdout_and_notes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "decode", "--out", str(tmp_path / "d")], OpenClosedForm()) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("decode 128 x 4096, ms of one layer\n")
    assert captured.err == f"saved: {tmp_path}/d/decode.csv (17 points)\n"


def test_a_grid_of_batches_is_summed_up_in_one_row_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids = ["--set", "prefill={tokens: [512, 2048], mean_context: [256, 1024]}", "--set", "work=null"]
    grids += ["--set", "decode={batches: [1, 8], kv_tokens: [256, 4096]}", "--step", "32", "--set", "modes=[split]"]
    assert main(["sweep", "hybrid", *grids, "--out", str(tmp_path / "h")], OpenClosedForm()) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("split"))
    assert row == ["split", "4", "4", "4", str(4 * 4 * 4 * 3)]


@pytest.mark.parametrize("step", [2, 4, 6, 16, 32])
def test_every_step_asks_for_partitions_that_a_bank_of_that_step_has(step: int, tmp_path: Path) -> None:
    for kind in ("prefill", "decode", "hybrid"):
        assert main(["sweep", kind, "--step", str(step), "--out", str(tmp_path / kind)], OpenClosedForm()) == 0


def test_the_provenance_says_what_was_seen_while_measuring(tmp_path: Path) -> None:
    assert main(["sweep", "decode", "--step", "32", "--out", str(tmp_path)], OpenClosedForm()) == 0
    assert read_table(tmp_path / "decode.csv", DecodePoint).provenance["clocks_sm_mhz_under_load"] == [1000, 1500, 2000]
