"""A fake CUDA driver for the tests of the partitioner; see fake_cuda/fake_cuda.c."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

FAKE_SOURCE = Path(__file__).parent / "fake_cuda" / "fake_cuda.c"


@pytest.fixture(scope="session")
def fake_libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake libcuda, built once."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the tests of the partitioner need a C compiler (cc or gcc)"
    library = tmp_path_factory.mktemp("fake_cuda") / "libcuda_fake.so"
    command = [compiler, "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    built = subprocess.run(
        [*command, "-o", str(library), str(FAKE_SOURCE)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return library


@pytest.fixture
def fake_cuda(fake_libcuda: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The fake in force, in its initial state.

    Whatever the test did, once nothing is idle it must leave no handle, no lost memory and no misuse.
    """
    from semipd.partition import release_idle  # here, for the tests that do without the compiled module

    monkeypatch.setenv("SEMIPD_LIBCUDA", str(fake_libcuda))
    fake = ctypes.CDLL(str(fake_libcuda))
    fake.fake_failed_call.restype = ctypes.c_char_p
    fake.fake_calls.restype = fake.fake_lost_bytes.restype = ctypes.c_long
    fake.fake_stream_green.restype = ctypes.c_void_p
    fake.fake_reset()
    yield fake
    fake.fake_fail(ctypes.c_long(0), 0)
    release_idle()
    live = (fake.fake_live_green(), fake.fake_live_streams(), fake.fake_primary_refs())
    assert live == (0, 0, 0), f"live (green contexts, streams, primary context references): {live}"
    assert (fake.fake_lost_bytes(), fake.fake_misuse()) == (0, 0)
