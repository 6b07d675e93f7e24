"""A minute of the Azure conversation trace served on a real GPU by an 8B model: everything completes, law 11 holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from semipd.config import ReplayConfig, TraceConfig, load
from semipd.model_config import ModelConfig
from semipd.policies import chosen, make_policy, whole_device
from semipd.replay import Setup, prepare, run
from semipd.scheduler import Scheduler
from semipd.scheduler_config import SchedulerConfig
from semipd.sim import SimExecutor

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]
torch = pytest.importorskip("torch")
pytest.importorskip("flashinfer")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from plain_forward import plain_logits  # noqa: E402 - after the check for a device

from semipd.sequences import random_prompts  # noqa: E402
from semipd.torch_executor import TorchExecutor, open_executor  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
REAL = Path(os.environ.get("SEMIPD_TRACES") or REPOSITORY.parent / "shared" / "traces") / "azure-2023"
SECONDS = 60.0
CHECKED = 12  # requests whose tokens are held against a plain forward pass
BLOCKS = 30_000
# Rotary scaling, which the plain forward pass has not, changes nothing up to 8,192 tokens but the frequencies.
MODEL = load(REPOSITORY / "configs" / "models" / "llama-3-8b.yaml", ModelConfig).model_copy(
    update={"rope_scaling": None}
)


@pytest.fixture
def executor() -> Iterator[TorchExecutor]:
    """A new one for each replay: its clock starts with it."""
    with open_executor(MODEL, device="cuda", num_blocks=BLOCKS, max_num_seqs=256, prefill_sms=[64]) as opened:
        yield opened


def a_minute_of_conversations() -> Setup:
    real = REAL / "AzureLLMInferenceTrace_conv.csv"
    path = str(real) if real.exists() else "azure-conv-synth.csv"
    whole = prepare(ReplayConfig(trace=TraceConfig(path=path), slo="mlperf-8b"))
    first = int((whole.trace.arrival_s < whole.trace.arrival_s[0] + SECONDS).sum())
    return prepare(ReplayConfig(trace=TraceConfig(path=path, limit=first), slo="mlperf-8b"))


@pytest.mark.parametrize("policy", ["static-64", "exclusive"])
def test_a_minute_of_conversations_is_served_and_law_11_holds_up_to_ties(policy: str, executor: TorchExecutor) -> None:
    """A tie: in bfloat16 no logit is off by more than the largest error of a plain pass in bfloat16."""
    setup = a_minute_of_conversations()
    sms = setup.cost.device_sms
    config = SchedulerConfig(num_blocks=BLOCKS)
    made = make_policy(policy, setup.predictor, setup.slo)
    scheduler = Scheduler(config, made, device_sms=sms, layers=executor.layers)
    executor.follow(scheduler.blocks.tokens)
    executor.prepare((whole_device(sms), *chosen(made, setup.cost)), config.max_num_batched_tokens)
    outcome = run(setup, policy, scheduler, executor)
    simulated = run(
        setup, policy, Scheduler(config, made, device_sms=sms, layers=setup.cost.layers), SimExecutor(setup.cost)
    )
    print(outcome.summary.to_json())
    assert outcome.complete
    assert outcome.summary.completed == len(setup.trace)
    assert outcome.summary.to_json().keys() == simulated.summary.to_json().keys()

    requests = list(setup.trace.requests())
    exact = tokens_checked = 0
    for request in requests[:: max(1, len(requests) // CHECKED)]:
        tokens = list(executor.tokens(request.id))
        assert len(tokens) == request.output_len
        whole = random_prompts(MODEL.vocab_size)(request).tolist() + tokens
        weights = executor.engine.model.weights
        logits = plain_logits(MODEL, weights, whole)[request.prompt_len - 1 : -1]
        rounded = plain_logits(MODEL, weights, whole, torch.bfloat16)[request.prompt_len - 1 : -1]
        chosen_logits = logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        behind = logits.max(dim=-1).values - chosen_logits
        assert float(behind.max()) <= 2 * float((rounded - logits).abs().max())
        exact += int((behind == 0).sum())
        tokens_checked += len(tokens)
    print(f"{exact} of {tokens_checked} tokens are the likeliest in float32, too")
    assert exact > 0.8 * tokens_checked
