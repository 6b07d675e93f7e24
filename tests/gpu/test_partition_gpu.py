"""The partitioner on a real GPU. Measurements go to ``$SEMIPD_GPU_OUT/bank.json`` when that is set."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from semipd.partition import (
    CudaError,
    Device,
    Partition,
    PartitionBank,
    PrimaryContext,
    create_split,
    release_idle,
)

pytestmark = pytest.mark.gpu

MAX_SMS = 1024
NO_DRIVER, NO_DEVICE = 303, 100
MIB = 1 << 20


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.delenv("SEMIPD_LIBCUDA", raising=False)
    try:
        return Device(0)
    except CudaError as error:
        if error.code in (NO_DRIVER, NO_DEVICE):
            pytest.skip(str(error))
        raise


class Probe:
    """The kernels of probe.cu."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def sms_of(self, *partitions: Partition, blocks: int = 4096) -> list[set[int]]:
        """The SMs each partition's blocks ran on, all of them in flight together."""
        count = len(partitions)
        streams = (ctypes.c_void_p * count)(*(p.stream for p in partitions))
        seen = (ctypes.c_uint * (MAX_SMS * count))()
        error = self._library.mark_sms(streams, count, blocks, seen)
        assert error == 0, f"cudaError {error}"
        return [{sm for sm in range(MAX_SMS) if seen[i * MAX_SMS + sm]} for i in range(count)]

    def occupy(self, stream: int, seconds: float) -> None:
        error = self._library.occupy(ctypes.c_void_p(stream), ctypes.c_double(seconds))
        assert error == 0, f"cudaError {error}"

    def priority_of(self, stream: int) -> int:
        priority = ctypes.c_int(99)
        error = self._library.priority_of(ctypes.c_void_p(stream), ctypes.byref(priority))
        assert error == 0, f"cudaError {error}"
        return priority.value


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc not found on PATH or in /usr/local/cuda/bin")
    library = tmp_path_factory.mktemp("probe") / "libprobe.so"
    source = Path(__file__).with_name("probe.cu")
    command = [nvcc, "-O2", "-shared", "-Xcompiler", "-fPIC", "-o", str(library), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return Probe(library)


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, object]]:
    """What the tests measured, written at the end."""
    measured: dict[str, object] = {}
    yield measured
    text = json.dumps(measured, indent=2)
    print(text)
    folder = os.environ.get("SEMIPD_GPU_OUT")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "bank.json").write_text(text + "\n")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_plans_follow_the_law_that_the_fake_driver_implements(device: Device) -> None:
    if device.compute_capability[0] != 9:
        pytest.skip("the rounding law is Hopper's")
    total = device.resource().count
    for ignore, step in ((False, 8), (True, 2)):
        sizes = device.resource(ignore)
        assert (sizes.minimum, sizes.multiple) == (step, step)
        for requested in range(1, total + 1):
            expected = min(-(-requested // step) * step, total)
            if requested < step or expected == total:
                with pytest.raises(CudaError):
                    device.plan(requested, ignore)
            else:
                plan = device.plan(requested, ignore)
                assert (plan.granted, plan.remaining) == (expected, total - expected)


def test_every_split_of_a_bank_runs_on_disjoint_sms(device: Device, probe: Probe, record: dict[str, object]) -> None:
    total = device.resource().count
    keep = PrimaryContext(device)
    for step in (8, 2):
        release_idle()  # so that the bank's cost is that of a first one
        with PartitionBank(step_sms=step) as bank:
            idle = keep.free_bytes
            probe.sms_of(bank.whole_normal)  # loads the kernels, so that they are not counted below
            before = keep.free_bytes
            for split in bank.splits:
                prefill, decode = probe.sms_of(split.prefill, split.decode)
                assert prefill & decode == set(), split
                assert (len(prefill), len(decode)) == (split.prefill.sms, split.decode.sms)
                assert split.prefill.sms + split.decode.sms == total
                assert split.ignore_coscheduling == (split.prefill.sms % 8 != 0)
            assert len(probe.sms_of(bank.whole_high)[0]) == total
            assert len(probe.sms_of(bank.whole_normal)[0]) == total
            measured: dict[str, object] = {
                "splits": len(bank.splits),
                "creation_s": bank.creation_s,
                "memory_mib": bank.memory_bytes / MIB,
                "memory_mib_of_first_kernel": (idle - before) / MIB,
                "memory_mib_after_kernels": (bank.memory_bytes + before - keep.free_bytes) / MIB,
            }
            started_s = time.perf_counter()
        record[f"bank_step_{step}"] = {**measured, "close_s": time.perf_counter() - started_s}
    record["device"] = {"name": device.name, "sms": total, "driver_version": device.driver_version}


def test_multiples_of_eight_are_disjoint_also_without_coscheduling(device: Device, probe: Probe) -> None:
    for size in range(8, device.resource().count, 8):
        with create_split(size, ignore_coscheduling=True) as split:
            prefill, decode = probe.sms_of(split.prefill, split.decode)
        assert prefill & decode == set()
        assert (len(prefill), len(decode)) == (split.prefill.sms, split.decode.sms)


def test_streams_have_the_priorities_asked_for(probe: Probe) -> None:
    with PartitionBank(prefill_sms=[64], prefill_priority=-3, decode_priority=-2) as bank:
        split = bank.pick(64)
        for part in (split.prefill, split.decode, bank.whole_high, bank.whole_normal):
            assert probe.priority_of(part.stream) == part.priority
        assert (split.prefill.priority, split.decode.priority) == (-3, -2)
        assert bank.whole_high.priority < bank.whole_normal.priority


def test_a_thousand_rounds_do_not_grow_memory(device: Device, probe: Probe, record: dict[str, object]) -> None:
    keep = PrimaryContext(device)
    sizes = list(range(8, device.resource().count, 8))

    def rounds(count: int) -> None:
        for i in range(count):
            with create_split(sizes[i % len(sizes)], keep) as split:
                probe.sms_of(split.prefill, split.decode, blocks=1)

    rounds(3 * len(sizes))  # every size, and what the driver and the kernel take once
    free, rss, started_s = keep.free_bytes, rss_bytes(), time.perf_counter()
    rounds(1000)
    took_s = time.perf_counter() - started_s
    device_growth, rss_growth = free - keep.free_bytes, rss_bytes() - rss
    record["thousand_rounds"] = {
        "seconds": took_s,
        "device_growth_mib": device_growth / MIB,
        "rss_growth_mib": rss_growth / MIB,
    }
    assert device_growth <= 16 * MIB
    assert rss_growth <= 8 * MIB


def test_a_reused_context_and_a_new_one_of_a_split_have_disjoint_sms(device: Device, probe: Probe) -> None:
    keep = PrimaryContext(device)
    for size, ignore in ((64, False), (60, False), (44, True)):
        release_idle()
        with create_split(size, keep, ignore) as first:
            expected = probe.sms_of(first.prefill, first.decode)
            first.prefill.close()
            with create_split(size, keep, ignore) as second:  # its prefill is reused, its decode new
                assert probe.sms_of(second.prefill, second.decode) == expected
                second.decode.close()
            first.decode.close()
            with create_split(size, keep, ignore) as third:  # both reused
                assert probe.sms_of(third.prefill, third.decode) == expected
        assert set.intersection(*expected) == set()


def test_releasing_idle_contexts_gives_their_memory_back_with_the_primary_context(
    record: dict[str, object], tmp_path: Path
) -> None:
    program = """
from semipd.partition import Device, PartitionBank, PrimaryContext, release_idle
free = [PrimaryContext(Device()).free_bytes]
for _ in range(3):
    bank = PartitionBank()
    taken = bank.memory_bytes
    bank.close()
    del bank
    free.append(PrimaryContext(Device()).free_bytes)
    release_idle()
    free.append(PrimaryContext(Device()).free_bytes)
print(taken, *free)
"""  # alone in its process: here the runtime, which launches the kernels, retains the primary context as well
    # Elsewhere, for a checkout in the current folder would hide the installed package.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    taken, before, *after = map(int, done.stdout.split())
    record["released"] = {"taken_mib": taken / MIB, "held_mib": [(before - free) / MIB for free in after]}
    for idle, released in zip(after[::2], after[1::2], strict=True):
        assert before - idle >= taken / 2
        assert before - released <= 16 * MIB


def test_closing_waits_for_the_work_in_flight(probe: Probe) -> None:
    with create_split(64) as first:
        probe.sms_of(first.prefill, first.decode)  # loads the kernels
    split = create_split(64)
    probe.occupy(split.prefill.stream, 0.3)
    probe.occupy(split.decode.stream, 0.3)
    started_s = time.perf_counter()
    split.close()
    assert time.perf_counter() - started_s >= 0.2
    with create_split(64) as again:
        assert len(probe.sms_of(again.prefill)[0]) == again.prefill.sms


def test_dropping_the_last_reference_waits_too(probe: Probe) -> None:
    split = create_split(64)
    probe.sms_of(split.prefill)
    probe.occupy(split.prefill.stream, 0.3)
    started_s = time.perf_counter()
    del split
    assert time.perf_counter() - started_s >= 0.2


def test_a_thread_without_a_current_context_can_create_and_close(probe: Probe) -> None:
    found: list[int] = []

    def work() -> None:
        with create_split(32) as split:
            found.append(len(probe.sms_of(split.prefill)[0]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [32]


def test_the_scripts_interface_runs_a_matmul_with_torch(probe: Probe) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    import green_context_lib as green_context

    a = torch.randn(1024, 1024, device="cuda")
    expected = a @ a
    torch.cuda.synchronize()
    primary, remaining, primary_sms, remaining_sms = green_context.create_green_context_and_streams(
        intended_primary_sm_count=64, primary_stream_priority=-1, remaining_stream_priority=0
    )
    assert (primary_sms, remaining_sms) == (64, Device(0).resource().count - 64)
    results = []
    for pointer in (primary, remaining):
        stream = torch.cuda.ExternalStream(pointer)
        with torch.cuda.stream(stream):
            results.append(a @ a)
    torch.cuda.synchronize()
    for result in results:
        torch.testing.assert_close(result, expected)
    probe.occupy(primary, 0.3)
    green_context.destroy_green_context()
    green_context.destroy_green_context()
    torch.testing.assert_close(a @ a, expected)
