"""``semipd show``: what it prints, the page it writes and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from subprocesses import elsewhere
from synthetic_profile import write_profile

from semipd.cli import main
from semipd.profile import load_profile

SHIPPED = "h200/gqa-64-8-128"


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_profile(tmp_path_factory.mktemp("profile") / "p")


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_document_holds_the_measured_rows_of_the_shipped_profile(capsys: pytest.CaptureFixture[str]) -> None:
    place = (2048, 2048, 256, 524288)
    words = [
        f"--{name}={value}" for name, value in zip(("tokens", "context", "batch", "kv-tokens"), place, strict=True)
    ]
    assert main(["show", SHIPPED, *words, "--json"]) == 0
    found = document(capsys)
    load = dict(zip(("tokens", "mean_context", "batch", "kv_tokens"), place, strict=True))
    assert found["load"] == {**load, "measured": True, "nearest_measured": load}
    profile = load_profile(SHIPPED)
    rows = {
        p.prefill_sms: p for p in profile.hybrid.points if (p.tokens, p.mean_context, p.batch, p.kv_tokens) == place
    }
    together = found["scaling"]["together"]
    assert [row["prefill_sms"] for row in together] == sorted(rows)
    for row in together:
        own = rows[row["prefill_sms"]]
        assert row["prefill_layer"]["beside"] == {
            "ms": pytest.approx(own.prefill_median_ms, rel=1e-12),
            "source": "measured",
        }
        assert row["decode_step"]["beside"]["ms"] == pytest.approx(own.decode_median_ms * 80, rel=1e-12)
    alone = {row["sms"]: row["ms"] for row in found["scaling"]["decode_step_alone"]}
    (whole,) = (p for p in profile.decode.points if (p.sms, p.batch, p.kv_tokens) == (132, 256, 524288))
    assert alone[132] == pytest.approx(whole.median_ms * 80, rel=1e-12)
    assert found["frontier"]["in_turn"]["decode_step_ms"] == alone[132]
    assert found["provenance"]["hybrid"]["gpu"] == "NVIDIA H200"
    assert found["source"] == "interpolated"  # as fused chunks of so many tokens are


def test_with_a_target_the_document_names_the_split_with_the_most_prefill_within_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", SHIPPED, "--tpot-ms", "20", "--json"]) == 0
    found = document(capsys)
    points = [p for p in found["frontier"]["points"] if p["decode_step_ms"] <= 20]
    best = max(points, key=lambda p: p["prefill_tps"])
    got = found["optimum"]
    assert (got["best_sharing"], got["take"], got["prefill_tps"]) == (best["sharing"],) * 2 + (best["prefill_tps"],)
    whole = found["frontier"]["in_turn"]
    equal = whole["prefill_tps"] * (1 - whole["decode_step_ms"] / best["decode_step_ms"])
    assert got["in_turn_tps_at_equal_decode"] == pytest.approx(equal)
    assert got["gain"] == pytest.approx(best["prefill_tps"] / equal)
    assert got["in_turn_tps_at_limit"] == pytest.approx(whole["prefill_tps"] * (1 - whole["decode_step_ms"] / 20))


def test_the_readme_says_what_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["show", SHIPPED, "--tpot-ms", "20"]) == 0
    lines = shown(capsys).splitlines()
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = readme.split("$ semipd show h200/gqa-64-8-128 --tpot-ms 20\n")[1].split("```")[0]
    quoted = [line for line in block.splitlines() if line != "..."]
    assert len(quoted) >= 5
    assert [line for line in quoted if line not in lines] == []


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--tpot-ms", "20"),
        ("--tokens", "65536", "--context", "300000", "--batch", "500", "--kv-tokens", "4000000", "--tpot-ms", "100"),
        ("--tokens", "1", "--batch", "1", "--kv-tokens", "300", "--tpot-ms", "0.1"),
        ("--tokens", "1500", "--batch", "200", "--tpot-ms", "15"),
    ],
)
def test_the_tables_fit_the_terminal_and_no_number_is_cut(
    width: int, words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["show", SHIPPED, *words]) == 0
    out = shown(capsys)
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    assert sum(line.startswith("128/4 ") for line in lines) == 4  # scaling, two heat maps, frontier: no row is folded
    rows = lines[lines.index("The frontier: decode step against prefill throughput") + 4 :][:16]
    assert [re.match(r"\d+/\d+", row) is not None for row in rows] == [True] * 16


@pytest.mark.parametrize("width", [80, 120])
def test_with_fused_chunks_every_row_of_the_frontier_is_one_line(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["show", "h200/llama-3-8b", "--tpot-ms", "20"]) == 0
    lines = shown(capsys).splitlines()
    assert max(map(len, lines)) <= width
    rows = lines[lines.index("The frontier: decode step against prefill throughput") + 4 :]
    rows = rows[: next(i for i, row in enumerate(rows) if row.startswith("In turn"))]
    names = [f"{n}/{132 - n}" for n in range(16, 128, 16)] + ["capped-64", "capped-96", "priority"]
    names += ["chunked-256", "chunked-512", "chunked-1024", "chunked-2048"]
    assert [row.split()[0] for row in rows] == names


def test_the_document_and_the_page_have_the_fused_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_profile(tmp_path / "p", all_modes=True, overheads={"mixed_start_ms": 0.25})
    page = tmp_path / "p.html"
    words = ["--tokens=1024", "--context=512", "--batch=16", "--kv-tokens=16384", "--html", str(page)]
    assert main(["show", str(folder), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    chunks = [p for p in found["frontier"]["points"] if p["mode"] == "mixed"]
    assert [(p["sharing"], p["chunk_tokens"]) for p in chunks] == [(f"chunked-{n}", n) for n in (256, 512, 1024, 2048)]
    assert {(p["prefill_sms"], p["decode_sms"], p["source"]) for p in chunks} == {(32, 32, "interpolated")}
    for p in chunks:
        assert p["prefill_tps"] * p["decode_step_ms"] / 1e3 == pytest.approx(p["chunk_tokens"] - 16)
    assert found["grid"]["mixed"]["rows"] == 3 * 3 * 3 * 3
    assert "mixed" in found["provenance"]
    text = page.read_text(encoding="utf-8")
    assert "<td>chunked-2048" in text
    assert "N - 16 of them of prompts; each is a decode step. Starting one takes 0.250 ms" in text


def test_a_measured_load_has_no_mark_and_others_are_marked_and_warned_of(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(*words: str) -> tuple[str, str]:
        assert main(["show", str(profile), *words]) == 0
        out = shown(capsys)
        frontier = out.split("The frontier")[1]
        (line,) = (line for line in frontier.splitlines() if line.startswith("16/16"))
        return line, " ".join(out.split())

    line, said = row("--tokens=1024", "--context=512", "--batch=1", "--kv-tokens=256")
    assert not {"~", "!"} & set(line)
    assert "measured together at this very load" in said
    assert "Warning" not in said
    line, said = row("--tokens=1000", "--context=512", "--batch=1", "--kv-tokens=256")
    assert line.split()[1].startswith("~")
    assert "the nearest is --tokens 1024 --context 512 --batch 1 --kv-tokens 256." in said
    assert "Warning" not in said
    line, said = row("--tokens=1000", "--context=512", "--batch=1", "--kv-tokens=1000000")
    assert line.split()[1].startswith("!")
    assert "Warning: some values at this load are outside the measured grid" in said
    assert "The KV cache of this device holds only 262,144 tokens." in said


@pytest.mark.parametrize(
    ("tpot_ms", "sentence"),
    [
        ("0.001", "nothing is as fast; decode alone on the whole device takes"),
        ("1000000", "take in turn,"),
    ],
)
def test_where_no_sharing_is_best_it_says_so(
    tpot_ms: str, sentence: str, profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(profile), "--tpot-ms", tpot_ms]) == 0
    assert sentence in " ".join(shown(capsys).split())


def test_what_was_not_measured_is_named(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(profile)]) == 0
    said = " ".join(shown(capsys).split())
    assert "Not measured in this profile: capped, priority, streams, mixed (fused chunks)." in said
    assert "closed forms, for tests" in said


def test_fused_batches_that_were_measured_are_not_said_to_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = load_profile("h200/llama-3-8b").mixed
    assert mixed is not None
    assert mixed.points
    assert main(["show", "h200/llama-3-8b"]) == 0
    said = " ".join(shown(capsys).split()).partition("Not measured in this profile: ")[2].partition(".")[0]
    assert said.split(", ") == ["streams"]
    assert main(["show", "h200/llama-3-8b", "--json"]) == 0
    assert document(capsys)["frontier"]["missing_modes"] == ["streams"]


class Page(HTMLParser):
    """Every tag of a page, with its attributes, and that each is closed in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.html"
    assert main(["show", SHIPPED, "--tpot-ms", "20", "--html", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["optimum"]["take"] == "72/60"
    assert err == f"saved: {path}\n"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    assert "url(" not in text
    assert "http" not in re.sub(r"data:image/svg\+xml;base64,[^\"]*", "", text)
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3
    for attrs in images:
        kind, data = (attrs["src"] or "").split(",")
        assert kind == "data:image/svg+xml;base64"
        assert attrs["alt"]
        svg = Xml.fromstring(base64.b64decode(data))  # our own file
        assert svg.tag.endswith("svg")
        links = [value for node in svg.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
    assert "72/60 ★" in text
    assert "NVIDIA H200" in text


def test_without_matplotlib_a_page_is_refused_and_the_rest_works(profile: Path) -> None:
    code = "import sys, importlib.machinery as m\n"
    code += "sys.meta_path[:] = [type('No', (), {'find_spec': staticmethod(lambda name, *a: None if name == "
    code += "'matplotlib' else m.PathFinder.find_spec(name, *a))}), *sys.meta_path[:2]]\n"
    code += "from semipd.cli import main\n"
    code += f"assert main(['show', {str(profile)!r}, '--json']) == 0\n"
    code += f"raise SystemExit(main(['show', {str(profile)!r}, '--html', 'p.html']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=elsewhere(), cwd=profile, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["profile"]["name"] == "synthetic"
    assert done.stderr == "error: show --html: matplotlib not installed: pip install 'semipd[plot]'\n"


def test_equal_surveys_write_equal_pages(profile: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.html", tmp_path / "b.html"
    for path in (a, b):
        assert main(["show", str(profile), "--html", str(path)]) == 0
    assert a.read_bytes() == b.read_bytes()


def test_the_names_in_a_profile_cannot_break_the_page(tmp_path: Path) -> None:
    folder = write_profile(tmp_path / "p", name="<script>alert('x')</script> & co")
    assert main(["show", str(folder), "--html", str(tmp_path / "p.html")]) == 0
    page = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert all(tag != "script" for tag, _ in page.tags)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("none",), "profile: found 'none'; expected a folder or one of h200/gqa-64-8-128"),
        ((), "Missing argument 'PROFILE'"),
        ((SHIPPED, "--tokens", "0"), "tokens: found 0; expected one or more"),
        ((SHIPPED, "--tokens", "many"), "Invalid value for '--tokens'"),
        (
            (SHIPPED, "--batch", "8", "--kv-tokens", "7"),
            "kv_tokens: found 7; expected at least one for each of batch 8",
        ),
        ((SHIPPED, "--tpot-ms", "-1"), "tpot_ms: found -1; expected a finite number above zero"),
        ((SHIPPED, "--tpot-ms", "nan"), "tpot_ms: found nan; expected a finite number above zero"),
        ((SHIPPED, "--html", "page.txt"), "--html: found 'page.txt'; expected a file that ends in .html"),
        ((SHIPPED, "--html", "no/such/p.html"), "--html: no/such: not a folder; expected one to write p.html in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {line}")
    assert err.count("\n") == 1
