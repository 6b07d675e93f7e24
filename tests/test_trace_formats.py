"""Every further format: what its fields mean, what is dropped and counted, what is refused, and the real files."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semipd.core import InputError
from semipd.trace import Sessions, Trace, info, read_servegen, read_trace, reblock, write

TRACES = Path(os.environ.get("SEMIPD_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")

BURSTGPT_1 = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,Conversation log\n"
)
BURSTGPT_3 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "19440110.0,a-1,43,GPT-4,906,446,1352,Conversation log\n"
    "19440120.0,,,ChatGPT,36,29,65,API log\n"
    "19440161.0,a-1,2.5,GPT-4,1400,30,1430,Conversation log\n"
    "19440162.0,a-1,1,GPT-4,1500,31,1531,Conversation log\n"
    "19440163.0,b-2,1,GPT-4,0,0,0,Conversation log\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,374,44\n1.25e0,396,109\n"
VIDUR_LENGTHS = (
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.85\n2015,156,2171,12.9\n"
)
SPLITWISE = (
    "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
    "0,2,0,0.1,1,100,10\n1,0,0,0.2,1,101,11\n2,2,0,0.3,1,102,12\n"
)


def bailian(**fields: Any) -> str:
    row = {"chat_id": 0, "parent_chat_id": -1, "timestamp": 0.0, "input_length": 17, "output_length": 5, "type": "text"}
    row |= {"turn": 1, "hash_ids": [1, 2]}
    return json.dumps(row | fields) + "\n"


BAILIAN = (
    bailian(chat_id=7, timestamp=61.114)
    + bailian(chat_id=8, timestamp=61.2, parent_chat_id=3)
    + bailian(chat_id=9, timestamp=70.5, parent_chat_id=7, turn=2, input_length=32, hash_ids=[1, 3])
    + bailian(chat_id=10, timestamp=71.0, output_length=0)
    + bailian(chat_id=11, timestamp=72.0, parent_chat_id=9, turn=3)
)
SESSIONS = (
    '{"session_id": "s", "timestamp": 1000, "input_length": 600, "output_length": 4, "hash_ids": [0, 1]}\n'
    '{"session_id": "s", "delay": 2000.5, "input_length": 700, "output_length": 5}\n'
    '{"session_id": "s", "timestamp": 9000, "input_length": 800, "output_length": 6}\n'
    '{"timestamp": 500, "input_length": 10, "output_length": 1}\n'
    '{"session_id": 12, "timestamp": 2000, "delay_ms": 0, "input_length": 11, "output_length": 2}\n'
    '{"session_id": 12, "timestamp": 2500, "delay_ms": 30, "input_length": 12, "output_length": 3}\n'
)
LLMSERVINGSIM = (
    '{"session_id": "a", "arrival_time_ns": 4000000000, "sub_requests": ['
    '{"input_toks": 1472, "output_toks": 133, "tool_duration_ns": 500000000}, '
    '{"input_toks": 1582, "output_toks": 125, "tool_duration_ns": 250000000, "input_tok_ids": [1]}, '
    '{"input_toks": 1734, "output_toks": 77, "tool_duration_ns": 0}]}\n'
    '{"input_toks": 10, "output_toks": 2, "arrival_time_ns": 1000000000, "output_tok_ids": [5, 6]}\n'
    '{"session_id": 7, "arrival_time_ns": 4250000000, "sub_requests": ['
    '{"input_toks": 20, "output_toks": 3, "tool_duration_ns": 0}]}\n'
)


def saved(folder: Path, content: str | bytes, name: str = "t") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def real(*parts: str) -> Path:
    path = TRACES.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path.name} is not here: set SEMIPD_TRACES to the folder of real traces")
    return path


def columns(trace: Trace) -> list[Any]:
    """All that a trace holds, for comparing; NaN equal to NaN."""
    sessions = trace.sessions
    found = [trace.arrival_s.tolist(), trace.prompt_len.tolist(), trace.output_len.tolist(), dict(trace.dropped)]
    found.append([r.prefix_block_ids for r in trace.requests()])
    if sessions is not None:
        names = [sessions.names[i] if i >= 0 else None for i in sessions.index.tolist()]
        found += [names, sessions.turn.tolist(), [repr(d) for d in sessions.delay_s.tolist()]]
    return found


def archive(members: dict[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


TWO_WINDOWS = "0,0.01,1.0,Gamma,1.5,80\n600,0,0,,0,0\n1200,0.02,1.0,Weibull,0.9,50\n"
LENGTHS = json.dumps(
    {
        "0": {"input_tokens": "{10: 0.5, 20: 0.5}", "output_tokens": "{7: 1.0}", "reason_ratio": "{0.0: 1.0}"},
        "1200": {"input_tokens": "{30: 1.0}", "output_tokens": "{8: 0.25, 9: 7.5e-1}"},
    }
)
SERVEGEN = {"x/chunk-3-trace.csv": TWO_WINDOWS, "x/chunk-3-dataset.json": LENGTHS, "x/README": "passed over"}

FILES = {
    "burstgpt-csv": (BURSTGPT_3.encode(), 5, 4),
    "vidur-csv": (VIDUR.encode(), 2, 2),
    "splitwise-csv": (SPLITWISE.encode(), 3, 2),
    "bailian-jsonl": (BAILIAN.encode(), 5, 4),
    "mooncake-jsonl": (SESSIONS.encode(), 6, 6),
    "llmservingsim-jsonl": (LLMSERVINGSIM.encode(), 5, 5),
}


@pytest.mark.parametrize("name", FILES)
def test_every_row_read_is_here_or_dropped_and_gzip_changes_nothing(tmp_path: Path, name: str) -> None:
    content, rows, requests = FILES[name]
    plain, zipped = read_trace(saved(tmp_path, content)), read_trace(saved(tmp_path, gzip.compress(content), "z"))
    named = read_trace(tmp_path / "t", format=name)
    assert columns(plain) == columns(zipped) == columns(named)
    assert plain.source_format == name
    assert (plain.rows_read, len(plain)) == (rows, requests)
    assert plain.rows_read == len(plain) + sum(plain.dropped.values())


def test_burstgpt_1_and_2_count_seconds_and_drop_failures(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, BURSTGPT_1))
    assert trace.arrival_s.tolist() == [0.0, 113.0]
    assert (trace.prompt_len.tolist(), trace.output_len.tolist()) == ([472, 417], [18, 276])
    assert (dict(trace.dropped), trace.sessions) == ({"failed": 1}, None)


def test_burstgpt_3_is_read_by_name_and_its_delays_count_from_the_end_of_the_turn_before(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, BURSTGPT_3))
    assert trace.arrival_s.tolist() == [0.0, 10.0, 51.0, 52.0]
    assert trace.prompt_len.tolist() == [906, 36, 1400, 1500]
    assert trace.sessions is not None
    assert trace.sessions.turn.tolist() == [0, 0, 1, 2]
    assert trace.sessions.index.tolist() == [0, -1, 0, 0]
    # 51 - 43 = 8 s after the first had ended; the third was sent while the second was running.
    np.testing.assert_array_equal(trace.sessions.delay_s, [math.nan, math.nan, 8.0, 0.0])


def test_columns_in_another_order_are_found_by_name(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, "num_decode_tokens,arrived_at,num_prefill_tokens\n44,1,374\n"))
    assert (trace.prompt_len.tolist(), trace.output_len.tolist()) == ([374], [44])


def test_a_pool_of_lengths_has_no_arrivals_and_says_so(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, VIDUR_LENGTHS))
    assert trace.arrival_s.tolist() == [0.0, 0.0]
    assert trace.operations == ("no arrivals in the source: all at 0 s",)


def test_splitwise_rows_that_are_no_generation_are_dropped(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, SPLITWISE))
    assert dict(trace.dropped) == {"request_type": 1}
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.2])


def test_bailian_follows_parents_and_begins_a_session_where_the_parent_is_unknown(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, BAILIAN))
    assert trace.arrival_s.tolist() == pytest.approx([0.0, 0.086, 9.386, 10.886])
    assert trace.sessions is not None
    assert [trace.sessions.names[i] for i in trace.sessions.index.tolist()] == ["7", "8", "7", "7"]
    assert trace.sessions.turn.tolist() == [0, 0, 1, 2]
    assert np.isnan(trace.sessions.delay_s).all()
    assert dict(trace.dropped) == {"no output": 1}
    assert [(r.prefix_block_ids, r.prefix_block_size) for r in trace.requests()][:3] == [
        ((1, 2), 16),
        ((1, 2), 16),
        ((1, 3), 16),
    ]


def test_mooncake_sessions_are_put_in_order_and_a_turn_without_stamp_follows_its_delay(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, SESSIONS))
    assert (trace.arrival_s + 0.5).tolist() == [0.5, 1.0, 2.0, 2.5, 3.0005, 9.0]
    assert trace.prompt_len.tolist() == [10, 600, 11, 12, 700, 800]
    assert trace.sessions is not None
    names = [trace.sessions.names[i] if i >= 0 else "" for i in trace.sessions.index.tolist()]
    assert names == ["", "s", "12", "12", "s", "s"]
    assert trace.sessions.turn.tolist() == [0, 0, 0, 1, 1, 2]
    nan = math.nan
    np.testing.assert_array_equal(trace.sessions.delay_s, [nan, nan, nan, 0.03, 2.0005, nan])
    assert [r.prefix_block_ids for r in trace.requests()][1] == (0, 1)


def test_llmservingsims_calls_follow_each_other_after_the_time_that_tools_take(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, LLMSERVINGSIM))
    assert trace.arrival_s.tolist() == [0.0, 3.0, 3.25, 3.5, 3.75]
    assert trace.prompt_len.tolist() == [10, 1472, 20, 1582, 1734]
    assert trace.output_len.tolist() == [2, 133, 3, 125, 77]
    assert trace.sessions is not None
    names = [trace.sessions.names[i] if i >= 0 else "" for i in trace.sessions.index.tolist()]
    assert names == ["", "a", "7", "a", "a"]
    nan = math.nan
    np.testing.assert_array_equal(trace.sessions.delay_s, [nan, nan, nan, 0.5, 0.25])
    assert trace.prefixes is None


def test_sessions_survive_being_written_as_mooncake_jsonl(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, LLMSERVINGSIM))
    write(trace, tmp_path / "m", "mooncake-jsonl")
    back = read_trace(tmp_path / "m")
    assert back.arrival_s.tolist() == trace.arrival_s.tolist()
    assert back.sessions is not None
    assert trace.sessions is not None
    assert back.sessions.turn.tolist() == trace.sessions.turn.tolist()
    np.testing.assert_array_equal(back.sessions.delay_s, trace.sessions.delay_s)


def test_info_counts_sessions_and_stamps(tmp_path: Path) -> None:
    found = info(read_trace(saved(tmp_path, SESSIONS)))
    assert (found.sessions, found.session_requests, found.stamps) == (2, 5, 6)
    assert found.least_gap_s == pytest.approx(0.5)


def test_blocks_are_joined_where_whole_runs_agree(tmp_path: Path) -> None:
    # Four blocks of 16 make one of 64: the second prompt agrees in the first 64 tokens, the third in 48 of them.
    rows = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 9, 5]]
    text = "".join(bailian(chat_id=i, input_length=80, hash_ids=ids) for i, ids in enumerate(rows))
    trace = read_trace(saved(tmp_path, text))
    joined = reblock(trace, 64)
    assert [r.prefix_block_ids for r in joined.requests()] == [(0, 1), (0, 2), (3, 4)]
    assert info(joined).prefix_share == pytest.approx(64 / 240)
    assert reblock(trace, 16) is trace
    with pytest.raises(InputError, match="prefix blocks: found 16 tokens, expected a divisor of 40"):
        reblock(trace, 40)
    write(reblock(trace, 512), tmp_path / "m", "mooncake-jsonl")
    assert read_trace(tmp_path / "m").prompt_len.tolist() == [80, 80, 80]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Timestamp,Model,Request tokens\n", "line 1: format: found 'Timestamp,Model,Request tokens', expected the"),
        (BURSTGPT_1.replace("Model", "Modell"), "line 1: header: found .* expected Timestamp,Request tokens,Response"),
        (BURSTGPT_1.replace("Model", "Log Type"), "line 1: header: found"),
        (BURSTGPT_3.replace("Elapsed time,", "").replace("a-1,43", "a-1"), "line 1: header: .*Elapsed time beside Ses"),
        (BURSTGPT_1.replace("45,", "4,"), "line 3: Timestamp: found '4', expected a stamp not before"),
        (BURSTGPT_1.replace("45,", "-45,"), "line 3: Timestamp: found '-45', expected a number of seconds from 0"),
        (BURSTGPT_1.replace("45,", "nan,"), "line 3: Timestamp: found 'nan'"),
        (BURSTGPT_1.replace("45,", "1e999,"), "line 3: Timestamp: found '1e999'"),
        (BURSTGPT_1.replace("1087,0", "1087,-1"), "line 3: Response tokens: found '-1', expected an integer from 0"),
        (BURSTGPT_1.split("\n")[0] + "\n5,x,0,0,0,y\n", r"rows: found 1 dropped \(failed\), expected at least one"),
        (BURSTGPT_3.replace("a-1,2.5", "a-1,"), "line 4: Elapsed time: found '', expected a number of seconds"),
        (VIDUR.replace("374", "374.5"), "line 2: num_prefill_tokens: found '374.5', expected an integer from 1"),
        (VIDUR.replace(",44", ",0"), "line 2: num_decode_tokens: found '0'"),
        (VIDUR.replace(",44", ",44,1"), "line 2: row: found '0.5,374,44,1', expected 3 fields"),
        (VIDUR_LENGTHS.split("\n")[0], "line 2: found the end of the file, expected at least one row"),
        (SPLITWISE.replace("0.3", "0.1"), "line 4: arrival_timestamp: found '0.1'"),
        (LLMSERVINGSIM.replace('"a"', "7"), "line 3: session_id: found '7', expected one that no row above has"),
        (LLMSERVINGSIM.replace('"a"', "null"), "line 1: session_id: found None, expected"),
        (LLMSERVINGSIM.replace("133", "0"), "line 1: output_toks: found 0, expected an integer from 1"),
        (LLMSERVINGSIM.replace("500000000", "-1"), "line 1: tool_duration_ns: found -1, expected an integer number of"),
        (LLMSERVINGSIM.replace("4000000000", "4.5"), "line 1: arrival_time_ns: found 4.5, expected an integer number"),
        (LLMSERVINGSIM.replace("output_tok_ids", "tools"), "line 2: row: found 'tools', expected no field but input_"),
        (LLMSERVINGSIM.replace('"input_tok_ids"', '"tools"'), "line 1: row: found 'tools', expected no field but inp"),
        ('{"session_id": 1, "arrival_time_ns": 0, "sub_requests": []}', "line 1: sub_requests: found .*at least one"),
        ('{"arrival_time_ns": 0, "input_toks": 3}', "line 1: output_toks: found no such field, expected an integer"),
        (bailian(chat_id=-1), "line 1: chat_id: found -1, expected an integer from 0"),
        (bailian() + bailian(), "line 2: chat_id: found 0, expected one that no row above has"),
        (bailian(timestamp="1"), "line 1: timestamp: found '1', expected a number of seconds"),
        (bailian(timestamp=2) + bailian(chat_id=1), "line 2: timestamp: found 0.0, expected at least 2"),
        (bailian(hash_ids=[1]), "line 1: hash_ids: found 1 ids, expected 2, one for every 16 of 17 tokens begun"),
        (bailian(delay=1), "line 1: row: found 'delay', expected no field but chat_id"),
        (bailian(output_length=0), "rows: found .*no output.* expected at least one"),
        (SESSIONS.replace('"s", "delay"', '"s2", "delay"'), "line 2: delay: found 2000.5, expected none, or 0, in the"),
        (SESSIONS.replace('"timestamp": 9000', '"timestamp": 1'), "line 3: timestamp: found 1, expected at least 3000"),
        (SESSIONS.replace('"timestamp": 9000, ', ""), "line 3: timestamp: found no such field"),
        (SESSIONS.replace("2000.5", "-1"), "line 2: delay: found -1, expected a number of ms from 0"),
        (SESSIONS.replace("2000.5", "NaN"), "line 2: delay: found nan"),
        (
            SESSIONS.replace('"delay": 2000.5', '"delay": 1, "delay_ms": 1'),
            "line 2: delay_ms: found 1, expected either",
        ),
        (SESSIONS.replace('"s"', "1.5"), "line 1: session_id: found 1.5, expected a text or an integer"),
        (SESSIONS.replace("500,", '500, "x": 1,', 1), "line 4: row: found 'x', expected no field but timestamp"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_field(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"t: {message}") as caught:
        read_trace(saved(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_only_two_formats_are_written(tmp_path: Path) -> None:
    trace = read_trace(saved(tmp_path, VIDUR))
    with pytest.raises(InputError, match="trace format: found 'vidur-csv', expected azure-csv or mooncake-jsonl"):
        write(trace, tmp_path / "x", "vidur-csv")
    assert not (tmp_path / "x").exists()


def test_servegen_draws_what_every_active_window_says(tmp_path: Path) -> None:
    clients = read_servegen(saved(tmp_path, archive(SERVEGEN)))
    assert (clients.rows_read, clients.idle, [len(c.windows) for c in clients.clients]) == (3, 1, [2])
    trace = clients.draw(seed=0)
    # 0.01/s and 0.02/s for 600 s each; the second window has other lengths.
    assert len(trace) == 6 + 12
    assert set(trace.prompt_len[:6].tolist()) <= {10, 20}
    assert set(trace.output_len[:6].tolist()) == {7}
    assert set(trace.prompt_len[6:].tolist()) == {30}
    assert trace.operations == ("drawn from 1 ServeGen clients, seed 0 (3 windows read = 2 active + 1 idle)",)
    again, other = clients.draw(seed=0), clients.draw(seed=1)
    assert columns(again) == columns(trace) == columns(read_trace(tmp_path / "t"))
    assert columns(other) != columns(trace)


def test_a_servegen_window_gets_its_rate_on_average_however_small(tmp_path: Path) -> None:
    # 0.25 requests a window: rounding up, as upstream does, would send one in every window.
    rows = "".join(f"{600 * i},{0.25 / 600},1.0,Gamma,1.0,80\n" for i in range(4000))
    lengths = json.dumps({"0": {"input_tokens": "{10: 1.0}", "output_tokens": "{7: 1.0}"}})
    path = saved(tmp_path, archive({"chunk-0-trace.csv": rows, "chunk-0-dataset.json": lengths}))
    assert len(read_servegen(path).draw()) == pytest.approx(1000, abs=4 * math.sqrt(4000 * 0.25 * 0.75))
    assert len(read_servegen(path).draw(rate_scale=8)) == 8000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x/chunk-3-trace.csv": None}, "chunk-3-trace.csv: found 'no such member'"),
        ({"x/chunk-3-trace.csv": "0,1,1\n"}, "chunk-3-trace.csv: line 1: row: found '0,1,1', expected 6 fields"),
        ({"x/chunk-3-trace.csv": "0,x,1,Gamma,1,1\n"}, "line 1: rate_rps: found 'x', expected a number from 0"),
        ({"x/chunk-3-trace.csv": "7,1,1,Gamma,1,1\n"}, "line 1: window_start_s: found '7', expected a multiple of 600"),
        ({"x/chunk-3-trace.csv": TWO_WINDOWS * 2}, "line 4: window_start_s: found '0'"),
        ({"x/chunk-3-trace.csv": "0,1,1,Pareto,1,1\n"}, "line 1: pattern: found 'Pareto', expected Gamma or Weibull"),
        ({"x/chunk-3-trace.csv": "0,1,1,,1,1\n"}, "line 1: pattern: found ''"),
        ({"x/chunk-3-trace.csv": "0,1,1,Gamma,0,1\n"}, "line 1: shape: found '0', expected a number above 0"),
        ({"x/chunk-3-trace.csv": "0,0,0,,0,0\n"}, "found about 0 requests to draw"),
        ({"x/chunk-3-trace.csv": "0,1e6,1,Gamma,1,1\n"}, "found about 6e.08 requests to draw"),
        ({"x/chunk-3-trace.csv": b"\xff"}, "chunk-3-trace.csv: found 'a byte that is not UTF-8'"),
        ({"x/chunk-3-dataset.json": "[]"}, r"chunk-3-dataset.json: found '\[\]', expected a JSON object"),
        ({"x/chunk-3-dataset.json": '{"600": {}}'}, "chunk-3-dataset.json: found 'nothing at 0 s'"),
        ({"x/chunk-3-dataset.json": '{"0": {}}'}, "0: input_tokens: found None, expected the text of a dict"),
        ({"x/chunk-3-dataset.json": LENGTHS.replace("{7: 1.0}", "{7: 0.5}")}, "0: output_tokens: found 'a sum of 0.5'"),
        ({"x/chunk-3-dataset.json": LENGTHS.replace("{7: 1.0}", "exit()")}, r"output_tokens: found 'exit\(\)'"),
        ({"x/chunk-3-dataset.json": LENGTHS.replace("{7: 1.0}", "{0: 1.0}")}, "output_tokens: found '0 to 0 tokens'"),
        ({"y/chunk-3-trace.csv": TWO_WINDOWS}, "y/chunk-3-trace.csv: found 'a second one'"),
    ],
)
def test_what_is_wrong_in_servegens_archive_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    members = {name: content for name, content in (SERVEGEN | change).items() if content is not None}
    with pytest.raises(InputError, match=message) as caught:
        read_trace(saved(tmp_path, archive(members)))
    assert "\n" not in str(caught.value)


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    whole = archive(SERVEGEN)
    for broken in (whole[:-40], gzip.compress(gzip.decompress(whole)[:700]), archive({"other": "x"})):
        with pytest.raises(InputError, match=r"t: found (a )?(broken|no chunk)"):
            read_trace(saved(tmp_path, broken))
    with pytest.raises(InputError, match="found a broken archive"):
        read_trace(saved(tmp_path, VIDUR), format="servegen-tar")


def test_a_million_rows_take_less_than_200_mb(tmp_path: Path) -> None:
    # A part of that here: memory beyond the columns does not grow with the file.
    path = tmp_path / "t.csv.gz"
    rows = "".join(
        f"2023-11-16 {i // 3600 % 24:02}:{i // 60 % 60:02}:{i % 60:02}.5,{i % 999 + 1},9\n" for i in range(28_800)
    )
    path.write_bytes(gzip.compress(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}".encode(), 1))
    tracemalloc.start()
    try:
        trace = read_trace(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(trace) == 28_800
    assert peak * (1_000_000 / 28_800) < 200e6


def test_the_real_length_pool_has_the_published_figures() -> None:
    found = info(read_trace(real("vidur", "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv")))
    assert found.rows_read == found.requests == 28_257
    assert found.sha256 == "9d3580538d915ca75e4aaaa54590b42dbb17abc6d74c8913310cf07c232adcdc"
    prompt, output = found.prompt_tokens, found.output_tokens
    lengths = [round(n) for n in (prompt.mean, prompt.p50, prompt.p90, prompt.p99)]
    assert lengths == [2588, 2730, 3702, 3933]
    assert [round(n) for n in (output.mean, output.p50, output.p90, output.p99)] == [291, 167, 372, 3271]


def test_the_real_servegen_clients_draw_the_published_figures() -> None:
    path = real("servegen", "reason-deepseek-r1.tar.gz")
    clients = read_servegen(path)
    assert clients.sha256 == "10fdebb4851dadb3d0bc13a8b808af14fe7219c98a04053f1c077978a2a86c6d"
    assert (len(clients.clients), clients.rows_read) == (73, 73 * 144)
    active = sum(len(client.windows) for client in clients.clients)
    assert active + clients.idle == clients.rows_read
    found = info(clients.draw(seed=0))
    assert found.requests == pytest.approx(1_383_669, abs=100)
    values = [found.duration_s, found.rate_rps, found.prompt_tokens.mean, found.prompt_tokens.p50]
    values += [found.prompt_tokens.p90, found.prompt_tokens.p99, found.output_tokens.mean, found.output_tokens.p50]
    values += [found.output_tokens.p90, found.output_tokens.p99]
    # The figures are of another draw.
    assert values == pytest.approx([86_400, 16.0, 1268, 208, 2092, 23_423, 1527, 792, 3432, 12_607], rel=0.01)


@st.composite
def traces_with_sessions(draw: st.DrawFn) -> Trace:
    """Arrivals in whole ms, delays in whole us, at the most where a turn before is."""
    n = draw(st.integers(1, 30))
    gaps = [0, *draw(st.lists(st.integers(0, 10**7), min_size=n - 1, max_size=n - 1))]
    index = np.array(draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n)))
    index[0] = 0  # a trace without any session has none to return
    delay_s = [draw(st.one_of(st.just(math.nan), st.integers(0, 10**12).map(lambda us: us / 1e6))) for _ in range(n)]
    names = draw(st.lists(st.text(min_size=1), min_size=5, max_size=5, unique=True))
    tokens = draw(st.lists(st.integers(1, 5000), min_size=2 * n, max_size=2 * n))
    sessions = Sessions.of(index, np.array(delay_s), tuple(names))
    return Trace("t", np.cumsum(gaps) / 1000, tokens[:n], tokens[n:], "made", n, sessions=sessions)  # type: ignore[arg-type]


@settings(deadline=None)
@given(traces_with_sessions())
def test_mooncake_jsonl_returns_the_sessions_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace
) -> None:
    path = tmp_path_factory.mktemp("w") / "t.jsonl"
    write(trace, path, "mooncake-jsonl")
    again = read_trace(path)
    assert columns(again)[:3] == columns(trace)[:3]
    assert columns(again)[5:] == columns(trace)[5:]
    first = path.read_bytes()
    write(again, path, "mooncake-jsonl")
    assert path.read_bytes() == first
