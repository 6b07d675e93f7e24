"""The executor on a real GPU: flashinfer against plain torch, and law 11 in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from semipd.core import Allocation, Mode, Phase, Request, Run
from semipd.cost import ConstantCost
from semipd.driver import replay
from semipd.model_config import ModelConfig
from semipd.policies import make_policy
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.slo import Slo

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]
torch = pytest.importorskip("torch")
pytest.importorskip("flashinfer")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from plain_forward import plain_logits  # noqa: E402 - after the check for a device

from semipd.attention import Attention, TorchAttention  # noqa: E402 - likewise
from semipd.flashinfer_attention import FlashinferAttention  # noqa: E402 - likewise
from semipd.flight import LOOK_AHEAD  # noqa: E402 - likewise
from semipd.ops import FlashinferOps, TorchOps  # noqa: E402 - likewise
from semipd.paged_kv import PagedKvCache, Ragged  # noqa: E402 - likewise
from semipd.sequences import random_prompts  # noqa: E402 - likewise
from semipd.torch_executor import TorchExecutor, open_executor  # noqa: E402 - likewise

MODEL = ModelConfig(
    hidden_size=512, layers=6, query_heads=4, kv_heads=2, head_dim=128, intermediate_size=1024, vocab_size=500,
    rope_theta=1e4, max_positions=4096, qk_norm=True,
)  # fmt: skip
TIE = 0.1  # of logits with a standard deviation of 1
SIZES = [48, 64, 96]  # decode on the 4 SMs beside 128 is not possible: cuBLAS's kernels do not start there
POLICIES = ("exclusive", "static-48", "static-96", "capped-48", "priority", "chunked-100", "adaptive")


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module")
def cache() -> PagedKvCache:
    kv = PagedKvCache(MODEL, 600, 16, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for tensor in (kv.keys, kv.values):
        tensor.normal_(generator=generator)
    return kv


def batch(new: list[int], context: list[int]) -> Ragged:
    pages = [-(-(n + c) // 16) for n, c in zip(new, context, strict=True)]
    order = np.random.default_rng(0).permutation(600)
    ends = [0, *np.cumsum(pages).tolist()]
    return Ragged.of(new, context, [order[a:b].tolist() for a, b in pairwise(ends)], 16)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.float() - expected.float()).norm() < 1e-2 * expected.float().norm())


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa3-sized"])
@pytest.mark.parametrize(
    ("new", "context"),
    [
        ([1000], [0]),
        ([5, 300, 1, 64], [100, 0, 777, 31]),
        ([1], [0]),
        ([40, 16], [4000, 1000]),
    ],  # keys of the last: split
)
def test_prefill_attention_is_that_of_plain_torch(
    backend: str, new: list[int], context: list[int], cache: PagedKvCache
) -> None:
    ragged = batch(new, context)
    q = torch.randn(ragged.rows, 4, 128, device="cuda", dtype=torch.bfloat16)
    flashinfer: Attention = FlashinferAttention(MODEL, cache, 8, lambda sms: backend)  # noqa: ARG005
    reference = TorchAttention(cache).prefill(132)
    reference.plan(ragged)
    expected = reference.run(3, q)
    for sms in (132, 64, 8):
        plan = flashinfer.prefill(sms)
        plan.plan(ragged)
        assert close(plan.run(3, q), expected)


def test_attention_of_a_fused_batch_is_that_of_plain_torch(cache: PagedKvCache) -> None:
    plans = [attention.mixed() for attention in (TorchAttention(cache), FlashinferAttention(MODEL, cache, 8))]
    for new, context in (
        ([1, 1, 1, 300, 64], [1000, 5, 333, 0, 100]),
        ([1, 1, 20], [6000, 5, 0]),
    ):  # keys split: second
        ragged = batch(new, context)
        q = torch.randn(ragged.rows, 4, 128, device="cuda", dtype=torch.bfloat16)
        for plan in plans:
            plan.plan(ragged)
        expected, found = (plan.run(2, q) for plan in plans)
        assert close(found, expected)


def test_decode_attention_is_that_of_plain_torch_and_follows_the_last_plan(cache: PagedKvCache) -> None:
    flashinfer = FlashinferAttention(MODEL, cache, 160)
    plans = {(rows, sms): flashinfer.decode(rows, sms) for rows in (4, 8, 160) for sms in (132, 20)}
    long = [0] * 159 + [6000]  # more sequences than fill the device once, one of them long: its keys are split
    for context in ([100, 0, 2000, 17], [1, 2, 3, 4, 500, 600, 700, 800], long, [2500, 15, 16, 17]):
        ragged = batch([1] * len(context), context)
        q = torch.randn(ragged.rows, 4, 128, device="cuda", dtype=torch.bfloat16)
        reference = TorchAttention(cache).decode(ragged.rows, 132)
        reference.plan(ragged)
        for sms in (132, 20):
            plan = plans[ragged.rows, sms]
            plan.plan(ragged)
            assert close(plan.run(1, q), reference.run(1, q))


def test_fused_operations_are_those_of_plain_torch() -> None:
    from semipd.model import rope_table

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    x, residual, weight, wide = random(33, 512), random(33, 512), random(512), random(33, 2048)
    qkv, positions = random(33, 8 * 128), torch.randint(4096, (33,), device="cuda")
    table = rope_table(MODEL, "cuda")
    found, expected = [], []
    for ops, out in ((TorchOps(), expected), (FlashinferOps(), found)):
        q, k = (part.unflatten(-1, (-1, 128)) for part in qkv.clone().split((512, 256, 256), dim=-1)[:2])
        out += [ops.norm(x, weight, 1e-5), *ops.add_norm(x.clone(), residual.clone(), weight, 1e-5)]
        out += [ops.norm(q, weight[:128], 1e-5)]  # before q is rotated, which fused kernels do in place
        out += [*ops.add_norm(x.clone(), None, weight, 1e-5), *ops.rotate(q, k, positions, table), ops.silu_mul(wide)]
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def executor() -> Iterator[TorchExecutor]:
    with open_executor(MODEL, device="cuda", num_blocks=64, max_num_seqs=16, prefill_sms=SIZES) as opened:
        yield opened


@pytest.mark.parametrize("policy", POLICIES)
def test_law_11_tokens_are_the_likeliest_of_a_plain_forward_pass_up_to_ties(
    policy: str, executor: TorchExecutor
) -> None:
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    cost = ConstantCost(1e-3, 1e-3, layers=MODEL.layers, device_sms=sms, granularity_sms=48)
    config = SchedulerConfig(num_blocks=64, max_num_seqs=16, max_num_batched_tokens=150, watermark=0.0)
    scheduler = Scheduler(config, make_policy(policy, cost, Slo(1, 1)), device_sms=sms, layers=MODEL.layers)
    executor.follow(scheduler.blocks.tokens)
    rng = np.random.default_rng(0)
    start_s = executor.now()
    requests = [Request(i, start_s + i / 500, int(rng.integers(20, 200)), int(rng.integers(1, 120))) for i in range(24)]
    list(replay(requests, scheduler, executor))
    assert scheduler.preemptions > 0
    assert scheduler.dropped == []
    exact = 0
    for request in requests:
        tokens = list(executor.tokens(request.id))
        assert len(tokens) == request.output_len
        prompt = random_prompts(MODEL.vocab_size)(request).tolist()
        logits = plain_logits(MODEL, executor.engine.model.weights, prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        behind = logits.max(dim=-1).values - chosen
        assert float(behind.max()) < TIE
        exact += int((behind == 0).sum())
    assert exact > 0.9 * sum(request.output_len for request in requests)


@pytest.mark.parametrize("tokens", [5, 300])
def test_captured_layers_and_launched_ones_choose_the_same_token_up_to_ties(tokens: int) -> None:
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    at, chosen = Allocation(Mode.EXCLUSIVE, sms, sms), []
    request = Request(7, 0.0, tokens, 1)
    for captured_tokens in (0, 512):
        with open_executor(MODEL, device="cuda", num_blocks=64, captured_tokens=captured_tokens) as opened:
            for run_id in (1, 2):  # the second time by what the first one captured
                opened.launch(Run(run_id, Phase.PREFILL, (request,), (tokens,), (0,), sms, MODEL.layers, at, (True,)))
                opened.wait(None)
                chosen.append(opened.tokens(request.id)[0])
            prompt = random_prompts(MODEL.vocab_size)(request).tolist()
            logits = plain_logits(MODEL, opened.engine.model.weights, prompt)[-1]
    assert all(float(logits.max() - logits[token]) < TIE for token in chosen)


def test_a_yield_takes_effect_within_the_look_ahead(executor: TorchExecutor) -> None:
    at = Allocation(Mode.SPLIT, 64, torch.cuda.get_device_properties("cuda").multi_processor_count - 64)
    request = Request(1000, 0.0, 900, 1)
    executor.launch(Run(10**6, Phase.PREFILL, (request,), (900,), (0,), 64, MODEL.layers, at, (True,)))
    executor.wait(executor.now() + 1e-4)
    before = executor.steps_done(10**6)
    executor.yield_(10**6)
    (record,) = executor.wait(None)
    assert 1 <= record.steps <= before + LOOK_AHEAD
