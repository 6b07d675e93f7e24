"""Attention kernels and their timing on a real GPU: right results for every plan, saturated windows, fixed work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

from semipd.points import DecodeWork, PrefillWork, Sharing

if TYPE_CHECKING:
    from semipd.bench import GpuBench
    from semipd.kernels import MixedKernel

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(400)]
torch = pytest.importorskip("torch")
pytest.importorskip("flashinfer")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

TOLERANCE = 1e-2  # relative Frobenius norm; bf16 operands against float32


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal GQA in float32: q [n, heads, d] are the last n of k's and v's [m, kv_heads, d] positions."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    n, m = scores.shape[1:]
    future = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
    return (scores.masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa3-sized"])
@pytest.mark.parametrize(
    "work",
    [
        PrefillWork.prompts(2, 1024),
        PrefillWork.prompts(5, 333),
        PrefillWork.prompts(1, 100, 1500),
        PrefillWork.prompts(16, 32),
        PrefillWork.prompts(1, 1),
    ],
)
def test_a_prefill_plan_for_any_number_of_ctas_gives_the_reference(backend: str, work: PrefillWork) -> None:
    from semipd.kernels import Gqa, PrefillKernel

    kernel = PrefillKernel(Gqa(), work, backend, seed=work.tokens)
    kv_len = work.seq_tokens + work.seq_context
    q, k, v = kernel.q[0], kernel.k[0], kernel.v[0]
    expected = torch.cat(
        [
            reference(
                q[i * work.seq_tokens : (i + 1) * work.seq_tokens],
                k[i * kv_len : (i + 1) * kv_len],
                v[i * kv_len : (i + 1) * kv_len],
            )
            for i in range(work.seqs)
        ]
    )
    for ctas in (1, 7, 44, 64, 131, 132, 8):
        kernel.size_to(ctas)
        kernel.out.fill_(float("nan"))
        kernel.launch(0)
        assert error(kernel.out, expected) < TOLERANCE, ctas


@pytest.mark.parametrize("work", [DecodeWork(1, 5000), DecodeWork(7, 7 * 333 + 3), DecodeWork(128, 128 * 100)])
def test_decode_gives_the_reference(work: DecodeWork) -> None:
    from semipd.kernels import DecodeKernel, Gqa

    kernel = DecodeKernel(Gqa(), work, seed=work.batch)
    kernel.out.fill_(float("nan"))
    kernel.launch(0)
    pages = kernel.page_ids.to("cuda")
    expected, first = [], 0
    for i, length in enumerate(work.lengths()):
        count = -(-length // kernel.page_size)
        cached = kernel.cache[0][pages[first : first + count].long()]  # [pages, 2, page_size, kv_heads, d]
        k, v = (cached[:, j].reshape(-1, *cached.shape[3:])[:length] for j in (0, 1))
        expected.append(reference(kernel.q[0][i : i + 1], k, v))
        first += count
    assert error(kernel.out, torch.cat(expected)) < TOLERANCE


def paged_reference(kernel: MixedKernel, q_lens: list[int], kv_lens: list[int]) -> torch.Tensor:
    """Sequence by sequence, from the pages that each has."""
    expected, first, row = [], 0, 0
    for queries, length in zip(q_lens, kv_lens, strict=True):
        count = -(-length // kernel.page_size)
        cached = kernel.pages.cache[0][
            kernel.pages.ids[first : first + count].long()
        ]  # [pages, 2, page_size, heads, d]
        k, v = (cached[:, j].reshape(-1, *cached.shape[3:])[:length] for j in (0, 1))
        expected.append(reference(kernel.q[0][row : row + queries], k, v))
        first, row = first + count, row + queries
    return torch.cat(expected)


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (PrefillWork.prompts(1, 256, 1920), DecodeWork(128, 128 * 100)),
        (PrefillWork.prompts(3, 333), DecodeWork(7, 7 * 333 + 3)),
        (PrefillWork.prompts(1, 1), DecodeWork(1, 5000)),
    ],
)
def test_a_fused_batch_gives_the_reference(backend: str, prefill: PrefillWork, decode: DecodeWork) -> None:
    from semipd.kernels import Gqa, MixedKernel

    kernel = MixedKernel(Gqa(), prefill, decode, backend, seed=decode.batch)
    kernel.out.fill_(float("nan"))
    kernel.launch(0)
    q_lens = [1] * decode.batch + [prefill.seq_tokens] * prefill.seqs
    kv_lens = decode.lengths() + [prefill.seq_context + prefill.seq_tokens] * prefill.seqs
    assert error(kernel.out, paged_reference(kernel, q_lens, kv_lens)) < TOLERANCE


@pytest.fixture(scope="module")
def bench() -> Iterator[GpuBench]:
    from semipd.bench import GpuBench
    from semipd.kernels import Gqa

    with GpuBench(Gqa()) as made:
        yield made


PREFILL, DECODE = PrefillWork.prompts(4, 4096), DecodeWork(128, 128 * 4096)


def test_a_partition_of_half_the_sms_takes_about_twice_as_long(bench: GpuBench) -> None:
    whole, half = (np.median(bench.prefill(PREFILL, "fa2", n, 5)) for n in (132, 64))
    assert 1.8 < half / whole < 2.2


def test_fa3_sized_is_smooth_where_fa3_moves_in_stairs(bench: GpuBench) -> None:
    stairs, sized = (np.median(bench.prefill(PREFILL, b, 120, 5)) for b in ("fa3", "fa3-sized"))
    assert sized < 0.8 * stairs


def test_each_phase_is_slower_while_the_other_runs(bench: GpuBench) -> None:
    alone = bench.prefill(PREFILL, "fa2", 64, 5), bench.decode(DECODE, "fa2", 68, 5)
    both = bench.both(PREFILL, "fa2", DECODE, "fa2", Sharing("split", 64, 68), 5)
    for contended, solo in zip(both, alone, strict=True):
        assert len(contended) >= 5
        assert np.median(contended) > np.median(solo)


def test_fixed_work_takes_no_less_than_its_longer_phase_and_no_more_than_both_in_turn(bench: GpuBench) -> None:
    split = bench.total(PREFILL, "fa2", DECODE, "fa2", Sharing("split", 64, 68), (10, 100), 3)
    turn = bench.total(PREFILL, "fa2", DECODE, "fa2", Sharing("in-turn", 132, 132), (10, 100), 3)
    assert np.allclose(split[:, 2], split[:, :2].max(axis=1))
    assert np.median(split[:, 2]) < np.median(turn[:, 2])
    assert np.median(split[:, 2]) > 100 * np.median(bench.decode(DECODE, "fa2", 132, 5))


def test_a_fused_batch_takes_longer_with_a_larger_chunk(bench: GpuBench) -> None:
    small, large = (bench.mixed(PrefillWork.at(n, 2048), DECODE, "fa2", 5) for n in (256, 4096))
    assert min(len(small), len(large)) >= 5
    assert 0 < np.median(small) < np.median(large)
