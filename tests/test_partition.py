"""The partitioner against the fake driver: what it grants, what it refuses, and that it never leaves a handle."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from subprocesses import elsewhere

import semipd
from semipd import _core
from semipd.core import Allocation, InputError, Mode
from semipd.partition import (
    CudaError,
    Device,
    Partition,
    PartitionBank,
    PrimaryContext,
    Split,
    create_split,
    plan_split,
    release_idle,
)

ROOT = Path(__file__).parent.parent
SMS = 132
OUT_OF_MEMORY = 2

each_example_resets_nothing = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def granted(requested: int, ignore_coscheduling: bool, total: int = SMS) -> int | None:
    """Hopper's law in closed form: SMs of the group, None where no split is possible."""
    step = 2 if ignore_coscheduling else 8
    group = -(-requested // step) * step
    return group if requested >= step and group < total else None


def live(fake: ctypes.CDLL) -> tuple[int, int, int]:
    """Green contexts, streams and references to the primary context that exist."""
    return fake.fake_live_green(), fake.fake_live_streams(), fake.fake_primary_refs()


def left(fake: ctypes.CDLL) -> tuple[int, int, int]:
    """What is live once no green context is idle."""
    release_idle()
    return live(fake)


def green_of(fake: ctypes.CDLL, partition: Partition) -> int:
    """The green context a partition's stream belongs to."""
    return int(fake.fake_stream_green(ctypes.c_void_p(partition.stream)))


def sms_of(fake: ctypes.CDLL, stream: int) -> int:
    """What the driver would run the stream's work on."""
    return int(fake.fake_stream_sms(ctypes.c_void_p(stream)))


def make_busy(fake: ctypes.CDLL, stream: int) -> None:
    fake.fake_make_busy(ctypes.c_void_p(stream))


# What is granted


@pytest.mark.parametrize("ignore", [False, True])
def test_every_count_is_rounded_up_or_refused(fake_cuda: ctypes.CDLL, ignore: bool) -> None:
    for requested in range(-2, SMS + 10):
        expected = granted(requested, ignore)
        if expected is None:
            with pytest.raises(CudaError, match=f"asked for {requested} of the 132 SMs") as refused:
                plan_split(requested, ignore_coscheduling=ignore)
            assert refused.value.name == "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"
            assert refused.value.code == 915
        else:
            plan = plan_split(requested, ignore_coscheduling=ignore)
            assert (plan.requested, plan.granted, plan.remaining) == (requested, expected, SMS - expected)
    assert live(fake_cuda) == (0, 0, 0)


@each_example_resets_nothing
@given(
    requested=st.integers(1, 200),
    ignore=st.booleans(),
    total=st.integers(16, 192),
    priorities=st.tuples(st.integers(-5, 0), st.integers(-5, 0)),
)
def test_a_split_has_what_its_plan_said(
    fake_cuda: ctypes.CDLL, requested: int, ignore: bool, total: int, priorities: tuple[int, int]
) -> None:
    release_idle()  # those of the device of the example before
    fake_cuda.fake_set_architecture(9, total, 0)
    expected = granted(requested, ignore, total)
    if expected is None:
        with pytest.raises(CudaError):
            create_split(requested, 0, ignore, *priorities)
        return
    with create_split(requested, 0, ignore, *priorities) as split:
        assert split.prefill.sms == sms_of(fake_cuda, split.prefill.stream) == expected
        assert split.decode.sms == sms_of(fake_cuda, split.decode.stream) == total - expected
        assert split.allocation == Allocation(Mode.SPLIT, expected, total - expected)
        for partition, priority in zip((split.prefill, split.decode), priorities, strict=True):
            stream = ctypes.c_void_p(partition.stream)
            assert partition.priority == fake_cuda.fake_stream_priority(stream) == priority
        assert live(fake_cuda)[:2] == (2, 2)


def test_a_device_tells_what_it_is_and_what_it_can_split(fake_cuda: ctypes.CDLL) -> None:
    device = Device(0)
    assert (device.index, device.name, device.compute_capability) == (0, "Fake GPU 0", (9, 0))
    assert device.driver_version == 13000
    for ignore, step in ((False, 8), (True, 2)):
        resource = device.resource(ignore)
        assert (resource.count, resource.minimum, resource.multiple) == (SMS, step, step)
    assert live(fake_cuda) == (0, 0, 0)


@pytest.mark.parametrize(("major", "coarse", "fine"), [(6, (1, 1), (1, 1)), (7, (2, 2), (2, 2)), (8, (4, 2), (2, 2))])
def test_a_driver_that_refuses_small_sizes_leaves_the_documented_limits(
    fake_cuda: ctypes.CDLL, major: int, coarse: tuple[int, int], fine: tuple[int, int]
) -> None:
    fake_cuda.fake_set_architecture(major, 108, 1)
    for ignore, expected in ((False, coarse), (True, fine)):
        resource = Device(0).resource(ignore)
        assert (resource.count, resource.minimum, resource.multiple) == (108, *expected)


# What is refused


def test_without_a_driver_the_import_works_and_the_first_use_says_so(tmp_path: Path) -> None:
    program = (
        "import sys, semipd; assert 'semipd._core' not in sys.modules\n"
        "import semipd.partition, green_context_lib\n"
        "try: green_context_lib.create_green_context_and_streams()\n"
        "except semipd.CudaError as error: print(error.code, error.name, error.call, error)\n"
    )
    environment = {**elsewhere(), "SEMIPD_LIBCUDA": str(tmp_path / "libcuda.so.1")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    expected = f"303 CUDA_ERROR_SHARED_OBJECT_INIT_FAILED dlopen no CUDA driver: {tmp_path}/libcuda.so.1: "
    assert done.stdout.startswith(expected)


def test_a_library_that_is_no_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMIPD_LIBCUDA", _core.__file__)
    with pytest.raises(CudaError, match=r"no CUDA driver: .* has no cuInit"):
        Device()


@pytest.mark.parametrize("version", [11080, 12020, 12040])
def test_a_driver_too_old_is_told_which_version_is_needed(fake_cuda: ctypes.CDLL, version: int) -> None:
    fake_cuda.fake_set_driver_version(version)
    found = f"{version // 1000}.{version % 1000 // 10}"
    with pytest.raises(CudaError, match=rf"need driver API 12\.5 or newer.* offers {found}; update") as old:
        Device()
    assert old.value.call == "cuDriverGetVersion"
    fake_cuda.fake_set_driver_version(12050)
    assert Device().driver_version == 12050


def test_no_device_and_no_such_device(fake_cuda: ctypes.CDLL) -> None:
    with pytest.raises(CudaError, match="no CUDA device 3: found 1, counted from 0") as missing:
        PartitionBank(device=3)
    assert missing.value.code == 101
    fake_cuda.fake_set_devices(0)
    with pytest.raises(CudaError, match="CUDA_VISIBLE_DEVICES") as none:
        Device()
    assert (none.value.code, none.value.name, none.value.call) == (100, "CUDA_ERROR_NO_DEVICE", "cuInit")


@pytest.mark.parametrize("priorities", [(-6, 0), (-1, 1), (99, 0)])
def test_a_priority_out_of_range_is_refused(fake_cuda: ctypes.CDLL, priorities: tuple[int, int]) -> None:
    with pytest.raises(CudaError, match=r"out of range: device 0 has -5 \(first\) to 0 \(last\)"):
        create_split(64, 0, False, *priorities)
    assert live(fake_cuda)[:2] == (0, 0)


def test_a_refusal_says_what_is_possible(fake_cuda: ctypes.CDLL) -> None:
    del fake_cuda
    with pytest.raises(CudaError, match="at least 8; ask for 8 to 128 in steps of 8, or in finer steps"):
        plan_split(4)
    with pytest.raises(CudaError, match="takes 132 and leaves no remainder; ask for 2 to 130 in steps of 2"):
        plan_split(131, ignore_coscheduling=True)
    with pytest.raises(CudaError, match="the device has fewer"):
        plan_split(133)


def test_the_error_is_one_type_known_by_its_public_name() -> None:
    assert semipd.CudaError is CudaError
    assert issubclass(CudaError, RuntimeError)
    assert f"{CudaError.__module__}.{CudaError.__qualname__}" == "semipd.CudaError"
    with pytest.raises(AttributeError, match="no attribute 'CudaErr'"):
        semipd.CudaErr  # noqa: B018


# The bank


@pytest.mark.parametrize("step", [2, 4, 8, 16])
def test_a_bank_has_every_multiple_and_two_streams_on_the_whole_device(fake_cuda: ctypes.CDLL, step: int) -> None:
    with PartitionBank(step_sms=step) as bank:
        assert [split.prefill.sms for split in bank.splits] == list(range(step, SMS, step))
        for split in bank.splits:
            assert bank.pick(split.prefill.sms) is split
            assert split.prefill.sms + split.decode.sms == SMS
            assert sms_of(fake_cuda, split.decode.stream) == split.decode.sms
            assert split.ignore_coscheduling == (split.prefill.sms % 8 != 0)
        for partition, priority in ((bank.whole_high, -5), (bank.whole_normal, 0)):
            assert (partition.sms, partition.priority) == (SMS, priority)
            assert sms_of(fake_cuda, partition.stream) == SMS
        streams = [p.stream for s in bank.splits for p in (s.prefill, s.decode)]
        assert len(set(streams)) == len(streams) == live(fake_cuda)[0]
        assert bank.memory_bytes == len(streams) << 20  # the fake takes 1 MiB a green context
        assert bank.creation_s > 0
    with PartitionBank(step_sms=step) as again:
        assert again.memory_bytes == 0
    assert left(fake_cuda) == (0, 0, 0)


def test_a_bank_of_named_sizes(fake_cuda: ctypes.CDLL) -> None:
    del fake_cuda
    with PartitionBank(prefill_sms=[64, 44, 64], prefill_priority=-2, decode_priority=-3) as bank:
        names = [(split.allocation.name, split.ignore_coscheduling) for split in bank.splits]
        assert names == [("44/88", True), ("64/68", False)]
        assert (bank.pick(44).prefill.priority, bank.pick(44).decode.priority) == (-2, -3)
        with pytest.raises(InputError, match=r"no split with 48 prefill SMs .* one of \[44, 64\]"):
            bank.pick(48)


@pytest.mark.parametrize("step", [0, -8, 3])
def test_a_step_that_no_split_can_have(fake_cuda: ctypes.CDLL, step: int) -> None:
    del fake_cuda
    with pytest.raises(InputError, match=f"step_sms: found {step}, expected a positive multiple of 2"):
        PartitionBank(step_sms=step)


@pytest.mark.parametrize("size", [-2, 0, 45, 132, 134])
def test_a_size_that_no_split_can_have(fake_cuda: ctypes.CDLL, size: int) -> None:
    del fake_cuda
    with pytest.raises(InputError, match=f"prefill_sms: found {size}, expected multiples of 2 from 2 to 131"):
        PartitionBank(prefill_sms=[64, size])


def test_closed_means_closed_and_closing_again_does_nothing(fake_cuda: ctypes.CDLL) -> None:
    bank = PartitionBank(step_sms=64)
    split = bank.pick(64)
    bank.close()
    assert left(fake_cuda) == (0, 0, 0)
    bank.close()
    split.close()
    assert bank.closed
    assert split.prefill.closed
    with pytest.raises(RuntimeError, match="this bank of partitions is closed"):
        bank.pick(64)
    for use in (split.prefill.synchronize, lambda: split.prefill.stream):
        with pytest.raises(RuntimeError, match="this partition of 64 SMs is closed"):
            use()
    assert split.prefill.sms == 64


def test_partitions_keep_what_they_need_alive(fake_cuda: ctypes.CDLL) -> None:
    prefill = PartitionBank().pick(64).prefill
    gc.collect()
    assert left(fake_cuda) == (1, 1, 2)
    assert sms_of(fake_cuda, prefill.stream) == 64
    prefill.synchronize()
    del prefill
    assert left(fake_cuda) == (0, 0, 0)


# Green contexts are reused


def test_a_thousand_rounds_on_every_size_take_the_memory_of_one_round(fake_cuda: ctypes.CDLL) -> None:
    keep = PrimaryContext(Device())
    free = keep.free_bytes
    sizes = range(2, SMS, 2)
    for size in sizes:
        for _ in range(1000):
            create_split(size, keep, ignore_coscheduling=size % 8 != 0).close()
    assert (free - keep.free_bytes, fake_cuda.fake_lost_bytes()) == (2 * len(sizes) << 20, 0)
    del keep


KINDS = [(size, ignore) for size in (8, 60, 64) for ignore in (False, True)]


@each_example_resets_nothing
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.booleans(), st.integers(0, 99)), max_size=40))
def test_live_partitions_never_share_a_context_and_there_are_no_more_than_were_ever_live(
    fake_cuda: ctypes.CDLL, steps: list[tuple[tuple[int, bool], bool, int]]
) -> None:
    release_idle()
    partitions: list[tuple[tuple[int, bool, bool], Partition]] = []  # with size, flag and side
    most: Counter[tuple[int, bool, bool]] = Counter()
    for (size, ignore), closes, index in steps:
        if closes and partitions:
            partitions.pop(index % len(partitions))[1].close()
        else:
            split = create_split(size, 0, ignore)
            partitions += [((size, ignore, False), split.prefill), ((size, ignore, True), split.decode)]
        most |= Counter(kind for kind, _ in partitions)
        assert len({green_of(fake_cuda, part) for _, part in partitions}) == len(partitions)
        assert live(fake_cuda)[:2] == (most.total(), len(partitions))
        for (size_of, ignored, rest), part in partitions:
            group = granted(size_of, ignored)
            assert group is not None
            assert sms_of(fake_cuda, part.stream) == part.sms == (SMS - group if rest else group)
    for _, part in partitions:
        part.close()


def test_a_context_is_not_reused_on_another_device(fake_cuda: ctypes.CDLL) -> None:
    fake_cuda.fake_set_devices(2)
    create_split(64, 0).close()
    with create_split(64, 1):
        assert fake_cuda.fake_live_green() == 4


def test_idle_contexts_keep_the_primary_context_until_they_are_released(fake_cuda: ctypes.CDLL) -> None:
    context = PrimaryContext(Device())
    used, idle = create_split(64, context), create_split(64, context)
    idle.close()
    assert live(fake_cuda) == (4, 2, 5)
    release_idle()
    assert live(fake_cuda) == (2, 2, 3)
    used.close()
    release_idle()
    release_idle()
    assert fake_cuda.fake_lost_bytes() == 4 << 20  # what destroying costs while the primary context lives
    create_split(64, context).close()
    del context
    assert live(fake_cuda) == (2, 0, 3)
    release_idle()
    assert live(fake_cuda) == (0, 0, 0)
    assert fake_cuda.fake_lost_bytes() == 0


@pytest.mark.parametrize("how", ["close", "drop"])
def test_a_context_whose_work_failed_is_not_reused(
    fake_cuda: ctypes.CDLL, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    split = create_split(64)
    prefill, decode = split.prefill, split.decode
    del split
    sound, broken = green_of(fake_cuda, prefill), green_of(fake_cuda, decode)
    prefill.close()
    fake_cuda.fake_fail(ctypes.c_long(2), 719)  # the wait, after making the context current
    if how == "close":
        with pytest.raises(CudaError, match="waiting for the work of a partition of 68 SMs"):
            decode.close()
    else:
        del decode
        assert "semipd: cuStreamSynchronize failed" in capfd.readouterr().err
    assert live(fake_cuda)[:2] == (1, 0)
    with create_split(64) as again:
        assert green_of(fake_cuda, again.prefill) == sound
        assert green_of(fake_cuda, again.decode) != broken


def test_threads_that_create_close_and_release_never_share_a_context(fake_cuda: ctypes.CDLL) -> None:
    taken: set[int] = set()
    shared: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        for i in range(200):
            with create_split(64) as split:
                greens = {green_of(fake_cuda, split.prefill), green_of(fake_cuda, split.decode)}
                with lock:
                    shared.extend(taken & greens)
                    taken.update(greens)
                with lock:
                    taken.difference_update(greens)
            if i % 10 == 0:
                release_idle()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared == []
    assert live(fake_cuda)[0] <= 8
    assert left(fake_cuda) == (0, 0, 0)


def test_a_process_that_ends_with_idle_contexts_calls_nothing_of_the_driver(fake_libcuda: Path) -> None:
    program = (
        "import ctypes, os\n"
        "from semipd.partition import create_split\n"
        "create_split(64).close()\n"
        "fake = ctypes.CDLL(os.environ['SEMIPD_LIBCUDA'])\n"
        "print(fake.fake_live_green())\n"
        "fake.fake_forbid_calls()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        env={**elsewhere(), "SEMIPD_LIBCUDA": str(fake_libcuda)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


# Work in flight


@pytest.mark.parametrize("how", ["close", "drop"])
def test_streams_are_destroyed_after_their_work(fake_cuda: ctypes.CDLL, how: str) -> None:
    split = create_split(64)
    make_busy(fake_cuda, split.prefill.stream)
    make_busy(fake_cuda, split.decode.stream)
    if how == "close":
        split.close()
    del split
    assert fake_cuda.fake_waited() == 2  # the fixture holds it against us if a busy stream was destroyed


def test_waiting_lets_other_threads_run_and_a_pick_beside_close_raises(fake_cuda: ctypes.CDLL) -> None:
    bank = PartitionBank(step_sms=64)
    make_busy(fake_cuda, bank.whole_normal.stream)
    fake_cuda.fake_set_wait_ms(400)
    closing = threading.Thread(target=bank.close)
    closing.start()
    while not bank.closed:
        time.sleep(0.001)
    with pytest.raises(RuntimeError, match="closed"):
        bank.pick(64)
    assert closing.is_alive()  # so this thread ran while that one waited in the driver
    bank.close()  # returns when the other one has released everything
    assert left(fake_cuda) == (0, 0, 0)
    closing.join()


def test_closing_beside_a_wait_leaves_the_stream_to_the_waiter(fake_cuda: ctypes.CDLL) -> None:
    split = create_split(64)
    make_busy(fake_cuda, split.prefill.stream)
    fake_cuda.fake_set_wait_ms(300)
    waiting = threading.Thread(target=split.prefill.synchronize)
    waiting.start()
    time.sleep(0.1)
    split.close()
    waiting.join()
    assert left(fake_cuda) == (0, 0, 0)


def close_while_used(bank: PartitionBank) -> list[str]:
    """Errors other than that the bank or a partition is closed, with four threads at work and two closing."""
    unexpected: list[str] = []
    start = threading.Barrier(6)

    def use() -> None:
        start.wait()
        try:
            for _ in range(200):
                bank.pick(32).prefill.synchronize()
        except RuntimeError as error:
            if "closed" not in str(error):
                unexpected.append(str(error))

    def close() -> None:
        start.wait()
        bank.close()

    threads = [threading.Thread(target=target) for target in (use, use, use, use, close, close)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return unexpected


def test_many_threads_use_and_close_one_bank(fake_cuda: ctypes.CDLL) -> None:
    for _ in range(20):
        assert close_while_used(PartitionBank(step_sms=32)) == []
        assert live(fake_cuda)[1] == 0


# Failures


def use_everything() -> None:
    device = Device.current()
    assert device.name
    assert device.compute_capability
    for _ in range(2):  # new green contexts, then idle ones
        with PartitionBank(step_sms=44) as bank:
            for split in bank.splits:
                split.decode.synchronize()
            bank.whole_high.synchronize()
    release_idle()


def test_whichever_call_fails_it_is_named_and_nothing_is_left(
    fake_cuda: ctypes.CDLL, capfd: pytest.CaptureFixture[str]
) -> None:
    use_everything()
    total = fake_cuda.fake_calls()
    assert total > 100
    for call in range(1, total + 1):
        fake_cuda.fake_fail(ctypes.c_long(call), OUT_OF_MEMORY)
        failure: tuple[int, str, str, str] | None = None
        try:
            use_everything()
        except CudaError as error:
            failure = (error.code, error.name, error.call, str(error))
        failed = fake_cuda.fake_failed_call().decode().removesuffix("_v2")
        stderr = capfd.readouterr().err
        if failure is None:  # while releasing, where nothing may be raised
            assert f"semipd: {failed} failed with CUDA_ERROR_OUT_OF_MEMORY (2) while releasing" in stderr
        else:
            assert failure[:3] == (OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", failed)
            assert "out of memory; free device memory or create fewer splits" in failure[3]
        assert left(fake_cuda) == (0, 0, 0), failed
        assert fake_cuda.fake_misuse() == 0, failed
        assert fake_cuda.fake_context_depth() == 0, failed


def test_what_work_did_wrong_is_raised_by_close_after_everything_is_released(fake_cuda: ctypes.CDLL) -> None:
    bank = PartitionBank(step_sms=64)
    fake_cuda.fake_fail(ctypes.c_long(2), 719)  # the first wait, after making the context current
    with pytest.raises(CudaError, match="waiting for the work of a partition of 132 SMs") as fault:
        bank.close()
    assert (fault.value.code, fault.value.call) == (719, "cuStreamSynchronize")
    assert left(fake_cuda) == (0, 0, 0)


def test_a_context_outlives_the_device_object_it_came_from(fake_cuda: ctypes.CDLL) -> None:
    context = PrimaryContext(Device())
    with create_split(64, context) as split:
        assert isinstance(split, Split)
        assert live(fake_cuda) == (2, 2, 3)
    assert left(fake_cuda) == (0, 0, 1)
    del context


# Sanitizers


def cuda_include() -> Path:
    """Where cuda.h is: a toolkit's folder, or the wheel's."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    wheels = [Path(path, "nvidia", name) for path in sys.path for name in ("cu13", "cuda_runtime")]
    for root in [*(Path(root) for root in roots if root), *wheels]:
        if (root / "include" / "cuda.h").exists():
            return root / "include"
    raise FileNotFoundError("cuda.h: set CUDA_HOME or pip install 'nvidia-cuda-runtime>=13'")


def test_the_sanitizers_find_nothing(fake_libcuda: Path, tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None, "this test needs a C++ compiler (c++ or g++)"
    sanitize = ["-std=c++17", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    trivial = tmp_path / "trivial.cpp"
    trivial.write_text("int main() { return 0; }\n")
    if subprocess.run(
        [compiler, *sanitize, trivial, "-o", tmp_path / "trivial"], capture_output=True, check=False
    ).returncode:
        pytest.skip(f"{compiler} has no AddressSanitizer and UBSan")
    program = tmp_path / "asan_main"
    sources = [ROOT / "csrc" / "green_context.cpp", ROOT / "tests" / "fake_cuda" / "asan_main.cpp"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    include = [f"-I{ROOT / 'csrc'}", "-isystem", str(cuda_include())]
    built = subprocess.run(
        [compiler, *sanitize, *warnings, *include, *map(str, sources), "-o", str(program), "-ldl", "-pthread"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [program],
        env={**os.environ, "SEMIPD_LIBCUDA": str(fake_libcuda)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "calls failed in turn" in done.stdout
