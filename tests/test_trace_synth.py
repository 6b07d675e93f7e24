"""Writing, fitting and drawing traces: round trips, recovery of known parameters, likeness to the source."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core import InputError
from semipd.trace import (
    Prefixes,
    Trace,
    TraceSpec,
    fit,
    info,
    load_spec,
    read_trace,
    save_spec,
    scale_rate,
    shipped,
    synth,
    write,
)
from semipd.trace.shipped import DEFAULT_TRACE

REPOSITORY = Path(__file__).resolve().parents[1]
TRACES = Path(os.environ.get("SEMIPD_TRACES") or REPOSITORY.parent / "shared" / "traces")
SPECS = {"azure-2023-conv": "AzureLLMInferenceTrace_conv.csv", "azure-2023-code": "AzureLLMInferenceTrace_code.csv"}


def source_of(name: str) -> Trace:
    path = TRACES / "azure-2023" / SPECS[name]
    if not path.exists():
        pytest.skip(f"{path.name} is not here: set SEMIPD_TRACES to the folder of real traces")
    return read_trace(path)


@st.composite
def traces(draw: st.DrawFn, resolution: int) -> Trace:
    """Traces whose arrivals are whole numbers of 1 / resolution seconds."""
    lengths = st.integers(1, 5000)
    rows = draw(st.lists(st.tuples(st.integers(0, 10**10), lengths, lengths), min_size=1, max_size=30))
    ticks = np.cumsum([0] + [gap for gap, _, _ in rows[1:]])
    prompt_len = np.array([row[1] for row in rows])
    prefixes = None
    if draw(st.booleans()):
        blocks = -(-prompt_len // 512)
        ids = draw(st.lists(st.integers(0, 2**40), min_size=int(blocks.sum()), max_size=int(blocks.sum())))
        prefixes = Prefixes(np.array(ids), np.concatenate(([0], np.cumsum(blocks))), 512)
    outputs = np.array([row[2] for row in rows])
    return Trace("t", ticks / resolution, prompt_len, outputs, "made", len(rows), prefixes=prefixes)


def columns(trace: Trace) -> list[list[float]]:
    return [trace.arrival_s.tolist(), trace.prompt_len.tolist(), trace.output_len.tolist()]


@settings(deadline=None)
@given(traces(resolution=10**7))
def test_azure_csv_returns_what_was_written_to_100_ns(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("w") / "t.csv"
    write(trace, path, "azure-csv")
    assert columns(read_trace(path)) == columns(trace)


@settings(deadline=None)
@given(traces(resolution=1000))
def test_mooncake_jsonl_returns_what_was_written_to_1_ms(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace
) -> None:
    path = tmp_path_factory.mktemp("w") / "t.jsonl.gz"
    write(trace, path, "mooncake-jsonl")
    again = read_trace(path)
    assert columns(again) == columns(trace)
    ids = [r.prefix_block_ids for r in again.requests()]
    if trace.prefixes is not None:
        assert ids == [r.prefix_block_ids for r in trace.requests()]
    else:  # nothing is shared, and every prompt has its full length
        assert [len(blocks) for blocks in ids] == [-(-p // 512) for p in trace.prompt_len.tolist()]
        assert len({i for blocks in ids for i in blocks}) == sum(map(len, ids))
        assert info(again).prefix_share == 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_rounding_moves_an_arrival_by_half_the_resolution_at_most(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[float]
) -> None:
    arrival_s = np.cumsum([0.0, *gaps])
    ones = np.ones(len(arrival_s), dtype=np.int64)
    trace = Trace("t", arrival_s, ones, ones, "made", len(ones))
    folder = tmp_path_factory.mktemp("w")
    for file_format, half_s in (("azure-csv", 0.5e-7), ("mooncake-jsonl", 0.5e-3)):
        write(trace, folder / "t", file_format)
        # At 2e7 s a double resolves 4 ns.
        np.testing.assert_allclose(read_trace(folder / "t").arrival_s, arrival_s, rtol=0, atol=half_s + 8e-9)


def test_ids_made_up_beside_real_ones_are_new(tmp_path: Path) -> None:
    # The second request has no blocks of its own; 0 to 7 are taken by the others.
    prefixes = Prefixes(np.array([0, 7, 0]), np.array([0, 2, 2, 3]), 512)
    trace = Trace(
        "t", np.arange(3.0), np.array([600, 600, 5]), np.ones(3, dtype=np.int64), "made", 3, {}, None, prefixes
    )
    write(trace, tmp_path / "t", "mooncake-jsonl")
    assert [r.prefix_block_ids for r in read_trace(tmp_path / "t").requests()] == [(0, 7), (8, 9), (0,)]


def test_equal_traces_are_equal_files_also_gzipped(tmp_path: Path) -> None:
    trace = synth(load_spec(shipped("azure-2023-conv.yaml")), requests=100)
    for name in ("a.csv.gz", "b.csv.gz"):
        write(trace, tmp_path / name, "azure-csv")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.csv.gz").read_bytes()).startswith(b"TIMESTAMP,")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    ones = np.ones(1, dtype=np.int64)
    trace = Trace("t", np.zeros(1), ones, ones, "made", 1, prefixes=Prefixes(np.zeros(1), np.array([0, 1]), 16))
    with pytest.raises(InputError, match="t: prefix blocks: found 16 tokens, expected 512"):
        write(trace, tmp_path / "t", "mooncake-jsonl")
    with pytest.raises(InputError, match="found no writable place"):
        write(trace, tmp_path / "none" / "t", "azure-csv")
    with pytest.raises(InputError, match="trace format: found 'xml'"):
        write(trace, tmp_path / "t", "xml")
    eons = Trace("t", np.array([0.0, 1e12]), np.ones(2), np.ones(2), "made", 2)
    with pytest.raises(InputError, match=r"t: duration: found 1e\+12 s, expected at most"):
        write(eons, tmp_path / "t", "azure-csv")


def gamma_trace(burstiness: float, rate_rps: float, n: int, seed: int) -> Trace:
    """Arrivals as vLLM draws them: Gamma gaps with shape b and mean 1 / rate."""
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate_rps * burstiness), n)
    arrival_s = np.cumsum(gaps) - gaps[0]
    lengths = np.random.default_rng(seed).integers(1, 1000, n)
    return Trace("gamma", arrival_s, lengths, lengths, "made", n)


@pytest.mark.parametrize("window_arrivals", [12, 300])
@pytest.mark.parametrize("burstiness", [0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 20.0])
def test_fit_recovers_the_burstiness_of_a_gamma_process(burstiness: float, window_arrivals: int) -> None:
    trace = gamma_trace(burstiness, rate_rps=window_arrivals / 60, n=20_000, seed=3)
    assert fit(trace, 60).burstiness == pytest.approx(burstiness, rel=0.1)


def test_fit_does_not_take_a_changing_rate_for_burstiness() -> None:
    calm, busy = gamma_trace(1.0, 2.0, 2000, 1), gamma_trace(1.0, 40.0, 40_000, 2)
    arrival_s = np.concatenate((calm.arrival_s, calm.duration_s + busy.arrival_s))
    trace = Trace("step", arrival_s, np.ones(42_000), np.ones(42_000), "made", 42_000)
    cv = info(trace).interarrival_cv
    assert cv is not None
    assert 1 / cv**2 < 0.5
    assert fit(trace, 20).burstiness == pytest.approx(1.0, rel=0.1)


def test_equal_gaps_are_drawn_as_equal_gaps() -> None:
    trace = Trace("clock", np.arange(200.0), np.full(200, 9), np.full(200, 5), "made", 200)
    spec = fit(trace, 50)
    assert spec.burstiness == pytest.approx(1e6, rel=0.01)
    drawn = synth(spec, requests=190)
    np.testing.assert_allclose(np.diff(drawn.arrival_s), 1.0, atol=0.03)
    assert set(drawn.prompt_len.tolist()) == {9}
    assert set(drawn.output_len.tolist()) == {5}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(0.01, 0.5), min_size=10, max_size=60),
    st.floats(5, 200),
    st.integers(0, 2**32),
)
def test_a_fitted_spec_survives_saving_and_draws_within_the_source(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[float], window_s: float, seed: int
) -> None:
    arrival_s = np.cumsum([0.0, *gaps])
    lengths = np.random.default_rng(seed).integers(1, 10**6, len(arrival_s))
    trace = Trace("any", arrival_s, lengths, lengths[::-1], "made", len(arrival_s))
    spec = fit(trace, window_s)
    for name in ("s.yaml", "s.json"):
        path = tmp_path_factory.mktemp("spec") / name
        save_spec(spec, path)
        assert load_spec(path) == spec
    expected = np.dot(spec.rate_rps, np.diff(spec.window_edges_s()))
    assert expected == pytest.approx(len(trace), rel=1e-4)
    drawn = synth(spec, seed, requests=50)
    assert len(drawn) == drawn.rows_read == 50
    assert lengths.min() <= drawn.prompt_len.min() <= drawn.prompt_len.max() <= lengths.max()


def test_a_trace_that_has_no_rate_or_no_gaps_is_not_fitted() -> None:
    def trace(*arrival_s: float) -> Trace:
        n = len(arrival_s)
        return Trace("t", np.array(arrival_s), np.ones(n), np.ones(n), "made", n)

    with pytest.raises(InputError, match="t: duration: found 0 s"):
        fit(trace(0, 0, 0))
    with pytest.raises(InputError, match="t: window_s: found 1, in which arrivals come alone"):
        fit(trace(0, 5, 10), 1)
    with pytest.raises(InputError, match="t: window_s: found 5, in which arrivals come alone or as one or two clumps"):
        fit(trace(*[3.0 * (i // 10) for i in range(1000)]), 5)
    for window_s in (0, -1, float("nan"), float("inf"), 1e-4):
        with pytest.raises(InputError, match=r"t: window_s: found .* expected 0\.001 to"):
            fit(trace(0, 1, 2, 10), window_s)


def spec_with(**changes: Any) -> TraceSpec:
    fields: dict[str, Any] = {
        "name": "s",
        "source": "a test",
        "licence": "none",
        "attribution": "nobody",
        "source_sha256": "",
        "command": "",
        "duration_s": 100.0,
        "window_s": 25.0,
        "rate_rps": [10.0, 0.0, 40.0, 0.0],
        "burstiness": 1.0,
        "quantile_levels": [0.0, 0.5, 1.0],
        "prompt_quantiles_tokens": [100, 200, 1000],
        "output_quantiles_tokens_by_prompt_bin": [[1, 2, 3], [10, 20, 30]],
    }
    return TraceSpec.model_validate(fields | changes)


def test_drawn_windows_have_their_rates_and_empty_ones_stay_empty() -> None:
    trace = synth(spec_with(), seed=1, duration_s=2000)
    window = (trace.arrival_s % 100 // 25).astype(int)
    counts = np.bincount(window, minlength=4)
    # 20 cycles of Poisson arrivals: standard deviations of 71 and 141.
    assert counts[[1, 3]].tolist() == [0, 0]
    assert abs(counts[0] - 5000) < 300
    assert abs(counts[2] - 20_000) < 600
    assert trace.duration_s < 2000


def test_drawn_lengths_follow_the_quantiles_and_outputs_depend_on_prompts() -> None:
    trace = synth(spec_with(), seed=2, requests=40_000)
    short = trace.prompt_len < 200
    assert short.mean() == pytest.approx(0.5, abs=0.015)
    assert set(trace.output_len[short].tolist()) == {1, 2, 3}
    assert trace.output_len[trace.prompt_len > 200].min() == 10
    assert trace.output_len[trace.prompt_len > 200].max() == 30
    # Linear between the quantiles: means of the two halves are 150 and 600.
    assert trace.prompt_len.mean() == pytest.approx(375, rel=0.02)


def test_rate_scale_moves_arrivals_only_and_leaves_windows_in_place() -> None:
    spec = spec_with()
    base, double = synth(spec, seed=3), synth(spec, seed=3, rate_scale=2)
    assert len(double) == pytest.approx(2 * len(base), rel=0.1)
    n = min(len(base), len(double))
    assert double.prompt_len[:n].tolist() == base.prompt_len[:n].tolist()
    assert double.output_len[:n].tolist() == base.output_len[:n].tolist()
    assert not np.any((double.arrival_s % 100 > 26) & (double.arrival_s % 100 < 49))
    # A time warp to the same rate compresses the windows as well.
    assert scale_rate(base, 2).duration_s == base.duration_s / 2
    assert double.duration_s > 70


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    spec = spec_with(burstiness=0.3)
    short, longer = synth(spec, seed=4, requests=50), synth(spec, seed=4, requests=9000)
    by_time = synth(spec, seed=4, duration_s=longer.duration_s)
    assert columns(short) == [column[:50] for column in columns(longer)]
    assert columns(by_time) == [column[: len(by_time)] for column in columns(longer)]
    assert len(by_time) == pytest.approx(9000, abs=1)


def test_seeds_decide_everything(tmp_path: Path) -> None:
    digests = []
    for i, seed in enumerate((5, 5, 6)):
        write(synth(spec_with(), seed), tmp_path / str(i), "azure-csv")
        digests.append(hashlib.sha256((tmp_path / str(i)).read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed: found -1, expected an integer from 0"),
        ({"requests": 0}, "requests: found 0, expected an integer from 1"),
        ({"duration_s": 0.0}, "duration_s: found 0, expected above 0"),
        ({"duration_s": float("nan")}, "duration_s: found nan"),
        ({"rate_scale": 0.0}, "rate scale: found 0, expected 1e-06 to"),
        ({"rate_scale": float("nan")}, "rate scale: found nan"),
        ({"requests": 5, "duration_s": 5.0}, "found both a duration and a number of requests"),
        ({"duration_s": 1e8}, r"found about 1.25e\+09 requests to draw"),
        ({"requests": 10**15}, r"found about 1e\+15 requests to draw"),
    ],
)
def test_a_draw_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"s: {message}"):
        synth(spec_with(), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour: found an unknown field, expected only name, source"),
        ({"rate_rps": None}, "rate_rps: found None, expected a valid tuple"),
        ({"rate_rps": [1.0, -2.0, 1.0, 1.0]}, r"rate_rps\.1: found -2\.0, expected greater than or equal to 0"),
        ({"rate_rps": [1.0, float("nan"), 1.0, 1.0]}, r"rate_rps\.1: found nan, expected a finite number"),
        ({"rate_rps": [0, 0, 0, 0]}, r"rate_rps: found \[0, 0, 0, 0\], expected at least one rate above 0"),
        ({"rate_rps": [1.0]}, r"rate_rps: found \[1\.0\], expected 4 rates, one for every window_s"),
        ({"burstiness": 0}, "burstiness: found 0, expected greater than or equal to 0.001"),
        ({"burstiness": "1"}, "burstiness: found '1', expected a valid number"),
        ({"window_s": 0}, "window_s: found 0, expected greater than 0"),
        ({"name": ""}, "name: found ''"),
        ({"quantile_levels": [0.0, 0.7, 0.5, 1.0]}, "quantile_levels: found .* expected ascending levels from 0 to 1"),
        ({"quantile_levels": [0.0, 0.5]}, "quantile_levels: found .* expected ascending levels from 0 to 1"),
        ({"prompt_quantiles_tokens": [1, 2]}, r"prompt_quantiles_tokens: found \[1, 2\], expected 3 values"),
        ({"prompt_quantiles_tokens": [3, 2, 4]}, "prompt_quantiles_tokens: found .* expected values that never fall"),
        ({"prompt_quantiles_tokens": [0, 2, 4]}, r"prompt_quantiles_tokens\.0: found 0"),
        ({"prompt_quantiles_tokens": [1, 2.5, 4]}, r"prompt_quantiles_tokens\.1: found 2\.5, expected a valid integer"),
        ({"output_quantiles_tokens_by_prompt_bin": [[1, 2]]}, "output_quantiles_tokens_by_prompt_bin: .*3 values"),
    ],
)
@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_broken_spec_names_the_file_and_the_field(
    tmp_path: Path, change: dict[str, Any], message: str, ending: str
) -> None:
    path = tmp_path / f"s.{ending}"
    document = spec_with().model_dump(mode="json") | change
    path.write_text(json.dumps(document) if ending == "json" else yaml.safe_dump(document))
    with pytest.raises(InputError, match=rf"s\.{ending}: {message}") as caught:
        load_spec(path)
    assert "\n" not in str(caught.value)


def test_a_spec_that_is_no_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    incomplete = spec_with().model_dump(mode="json")
    del incomplete["burstiness"]
    for text, message in (
        ("a: [1", r"found broken \.yaml"),
        ("- 1", "found a list, expected the fields"),
        ("", "found a NoneType"),
        (yaml.safe_dump(incomplete), "burstiness: found no such field"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=rf"s\.yaml: {message}") as caught:
            load_spec(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"none\.yaml: found no readable text"):
        load_spec(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", SPECS)
def test_shipped_specs_are_small_attributed_and_refit_from_the_source(name: str) -> None:
    path = shipped(f"{name}.yaml")
    spec = load_spec(path)
    assert path.stat().st_size < 20_000
    assert spec.licence == "CC-BY-4.0"
    assert "Splitwise" in spec.attribution
    again = fit(
        source_of(name),
        spec.window_s,
        name=spec.name,
        source=spec.source,
        licence=spec.licence,
        attribution=spec.attribution,
        command=spec.command,
    )
    assert again == spec


def test_shipped_traces_are_what_their_commands_draw(tmp_path: Path) -> None:
    spec = load_spec(shipped("azure-2023-conv.yaml"))
    for name, file_format, n in ((DEFAULT_TRACE, "azure-csv", 2500), ("mooncake-example.jsonl", "mooncake-jsonl", 50)):
        write(synth(spec, seed=0, requests=n), tmp_path / name, file_format)
        assert (tmp_path / name).read_bytes() == shipped(name).read_bytes()
        assert len(read_trace(shipped(name))) == n


def test_an_unknown_shipped_name_lists_the_known_ones() -> None:
    for name in ("nope", "../pyproject.toml", "README.md"):
        with pytest.raises(
            InputError, match=r"trace: found .*; expected a file, or what is shipped: azure-2023-code\.yaml, az"
        ):
            shipped(name)


@pytest.mark.parametrize("name", SPECS)
def test_a_drawn_trace_resembles_its_source(name: str) -> None:
    source = source_of(name)
    spec = load_spec(shipped(f"{name}.yaml"))
    drawn = [info(synth(spec, seed)) for seed in range(5)]
    want = info(source)

    def mean(*path: str) -> float:
        values: list[Any] = list(drawn)
        for part in path:
            values = [getattr(value, part) for value in values]
        return float(np.mean(values))

    assert mean("rate_rps") == pytest.approx(want.rate_rps, rel=0.03)
    assert mean("interarrival_cv") == pytest.approx(want.interarrival_cv, rel=0.15)
    for dispersion in ("dispersion_1s", "dispersion_10s", "dispersion_60s"):
        assert mean(dispersion) == pytest.approx(getattr(want, dispersion), rel=0.25)
    for field in ("mean", "p50", "p90", "p99"):
        # The mean of five draws still has a sampling error of about 1 % at the 99th percentile.
        rel = 0.03 if field == "p99" else 0.02
        assert mean("prompt_tokens", field) == pytest.approx(getattr(want.prompt_tokens, field), rel=rel)
        assert mean("output_tokens", field) == pytest.approx(getattr(want.output_tokens, field), rel=rel)


def test_outputs_depend_on_prompts_as_in_the_source() -> None:
    source = source_of("azure-2023-conv")
    drawn = synth(load_spec(shipped("azure-2023-conv.yaml")), seed=0)
    edges = np.quantile(source.prompt_len, np.linspace(0, 1, 5))[1:-1]

    def mean_output(trace: Trace) -> list[float]:
        quarter = np.searchsorted(edges, trace.prompt_len)
        return [float(trace.output_len[quarter == i].mean()) for i in range(4)]

    want = mean_output(source)
    assert max(want) > 1.5 * min(want)  # independent outputs would be level
    assert mean_output(drawn) == pytest.approx(want, rel=0.1)
