"""The two calls of the legacy interface, against the fake driver."""

from __future__ import annotations

import ctypes
import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from subprocesses import elsewhere

import green_context_lib as green_context
from semipd import CudaError
from semipd.partition import release_idle


@pytest.fixture
def fake(fake_cuda: ctypes.CDLL) -> Iterator[ctypes.CDLL]:
    yield fake_cuda
    green_context.destroy_green_context()


def sms_of(fake: ctypes.CDLL, stream: int) -> int:
    return int(fake.fake_stream_sms(ctypes.c_void_p(stream)))


def test_the_signatures_are_those_the_scripts_call() -> None:
    signature = inspect.signature(green_context.create_green_context_and_streams)
    assert {name: parameter.default for name, parameter in signature.parameters.items()} == {
        "intended_primary_sm_count": 64,
        "primary_stream_priority": -1,
        "remaining_stream_priority": 0,
    }
    assert not inspect.signature(green_context.destroy_green_context).parameters


def test_it_returns_streams_as_integers_and_the_sms_granted(fake: ctypes.CDLL) -> None:
    result = green_context.create_green_context_and_streams(
        intended_primary_sm_count=60, primary_stream_priority=-2, remaining_stream_priority=-1
    )
    assert all(type(value) is int for value in result)
    primary, remaining, primary_sms, remaining_sms = result
    assert (primary_sms, remaining_sms) == (64, 68)
    assert (sms_of(fake, primary), sms_of(fake, remaining)) == (64, 68)
    assert fake.fake_stream_priority(ctypes.c_void_p(primary)) == -2
    assert fake.fake_stream_priority(ctypes.c_void_p(remaining)) == -1


def test_asking_again_leaves_the_earlier_pair_valid_until_destroy(fake: ctypes.CDLL) -> None:
    first = green_context.create_green_context_and_streams(16)
    second = green_context.create_green_context_and_streams(32)
    assert len({*first[:2], *second[:2]}) == 4
    assert [sms_of(fake, stream) for stream in (*first[:2], *second[:2])] == [16, 116, 32, 100]
    green_context.destroy_green_context()
    assert fake.fake_live_streams() == 0
    release_idle()
    assert (fake.fake_live_green(), fake.fake_primary_refs()) == (0, 0)


def test_a_thousand_rounds_use_the_same_two_green_contexts(fake: ctypes.CDLL) -> None:
    greens = set()
    for _ in range(1000):
        for stream in green_context.create_green_context_and_streams(64)[:2]:
            greens.add(fake.fake_stream_green(ctypes.c_void_p(stream)))
        green_context.destroy_green_context()
    assert (len(greens), fake.fake_live_green(), fake.fake_lost_bytes()) == (2, 2, 0)


def test_destroying_twice_or_before_anything_does_nothing(fake: ctypes.CDLL) -> None:
    green_context.destroy_green_context()
    green_context.create_green_context_and_streams()
    green_context.destroy_green_context()
    green_context.destroy_green_context()
    assert fake.fake_live_streams() == 0


def test_destroying_waits_for_the_work_in_flight(fake: ctypes.CDLL) -> None:
    for stream in green_context.create_green_context_and_streams()[:2]:
        fake.fake_make_busy(ctypes.c_void_p(stream))
    green_context.destroy_green_context()
    assert fake.fake_waited() == 2


def test_a_failed_request_changes_nothing(fake: ctypes.CDLL) -> None:
    primary = green_context.create_green_context_and_streams()[0]
    with pytest.raises(CudaError, match="asked for 4 of the 132 SMs"):
        green_context.create_green_context_and_streams(4)
    with pytest.raises(CudaError, match="stream priority 7 is out of range"):
        green_context.create_green_context_and_streams(64, 7)
    assert fake.fake_live_streams() == 2
    assert sms_of(fake, primary) == 64


def test_threads_may_create_and_destroy_together(fake: ctypes.CDLL) -> None:
    def work() -> None:
        for _ in range(50):
            green_context.create_green_context_and_streams()
            green_context.destroy_green_context()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.fake_live_streams() == 0
    release_idle()
    assert (fake.fake_live_green(), fake.fake_primary_refs()) == (0, 0)


def test_a_process_may_end_without_destroying(fake_libcuda: Path) -> None:
    program = (
        "import green_context_lib as green_context\nprint(*green_context.create_green_context_and_streams()[2:])\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program],
        cwd="/",
        env={**elsewhere(), "SEMIPD_LIBCUDA": str(fake_libcuda)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "64 68\n", "")
