"""Coverage-guided fuzzing of the CSV and JSONL readers with atheris (libFuzzer's options apply).

    python tests/fuzz/fuzz_readers.py -max_total_time=60

Any exception but InputError, a row that is neither a request nor counted, and a message of several lines are findings.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["semipd.trace"]):
    from semipd.core import InputError
    from semipd.trace import read_trace

TEXTS = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:50.99,396,109",
    b"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,G,472,18,490,a\n45,G,10,0,10,b\n",
    b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    b"19.0,a-1,43,G,906,446,1352,c\n20.5,,,G,36,29,65,b\n70.0,a-1,2,G,9,4,13,c\n",
    b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,374,44\n1e1,2,3\n",
    b"request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n0,2,0,0.1,1,100,10\n",
    b'{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1]}\n'
    b'{"timestamp": 5, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}\n',
    b'{"timestamp": 0, "input_length": 3, "output_length": 1, "session_id": "s"}\n'
    b'{"session_id": "s", "delay": 5, "input_length": 3, "output_length": 1}\n',
    b'{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 9, "output_length": 1, "hash_ids": [1]}\n'
    b'{"chat_id": 2, "parent_chat_id": 1, "timestamp": 1, "input_length": 9, "output_length": 0, "turn": 2}\n',
    b"",
)


def one_input(data: bytes) -> None:
    """Put bytes into a trace: the first three say into which, where, and in place of how many."""
    if len(data) < 3:
        return
    text = TEXTS[data[0] % len(TEXTS)]
    at = data[1] * len(text) // 255
    PATH.write_bytes(text[:at] + data[3:] + text[at + data[2] % 32 :])
    try:
        trace = read_trace(PATH)
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        assert str(PATH) in message
        return
    assert trace.rows_read == len(trace) + sum(trace.dropped.values())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PATH = Path(folder) / "t"
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
