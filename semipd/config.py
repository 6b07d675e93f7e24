"""Configuration files: strict schemas, one clear line for whatever is wrong, overrides by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from semipd.core import InputError
from semipd.shipped import shipped_files
from semipd.slo import Slo

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Strict(BaseModel):
    """Base of every schema: an unknown key is an error, never dropped in silence; numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


TraceFormatName = Literal[
    "azure-csv",
    "mooncake-jsonl",
    "bailian-jsonl",
    "llmservingsim-jsonl",
    "burstgpt-csv",
    "vidur-csv",
    "splitwise-csv",
    "servegen-tar",
]


class ArrivalsConfig(Strict):
    """When requests arrive (``semipd.trace.Arrivals``): as the trace says, or drawn."""

    process: Literal["trace", "poisson", "gamma", "ramp", "constant"] = "trace"
    rate_rps: PositiveFloat | None = None
    burstiness: PositiveFloat | None = None
    end_rate_rps: PositiveFloat | None = None


class TraceConfig(Strict):
    """Which requests: a file or a shipped trace's name, how much of it, and when they arrive.

    What changes a trace is applied in this order (``semipd.trace.Reshape``, docs/traces.md): a window of its time,
    dequantised time stamps, thinning, replication with jitter, another arrival process, a time warp. ``seed`` is that
    of whatever is drawn. ``closed_loop``: later turns of a session are sent after the turn before has ended
    (``semipd.client.ClosedLoop``), not when they arrived.
    """

    path: str = "azure-conv-synth.csv"
    format: TraceFormatName | None = None
    limit: Positive | None = None
    start_s: NotNegative = 0.0
    end_s: PositiveFloat | None = None
    dequantise_s: PositiveFloat | None = None
    thin: Annotated[float, Field(gt=0, le=1)] = 1.0
    replicate: Positive = 1
    jitter_s: NotNegative = 1.0
    every_s: NotNegative = 0.0
    arrivals: ArrivalsConfig = ArrivalsConfig()
    rate_scale: PositiveFloat = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    closed_loop: bool = False


class SchedulerOptions(Strict):
    """Batching and KV cache, under vLLM's names (docs/scheduling.md says what each does)."""

    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 8192
    block_size: Positive = 16
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    watermark: Annotated[float, Field(ge=0, lt=1)] = 0.01
    enable_prefix_caching: bool = False
    decode_steps: Positive | None = None
    num_blocks: Positive | None = None


class SloConfig(Strict):
    """Latency targets, seconds."""

    ttft_s: PositiveFloat
    tpot_s: PositiveFloat


def shipped_slos() -> dict[str, Path]:
    """Files of the latency targets that come with the package, by name (``mlperf-8b``)."""
    return {path.stem: path for path in shipped_files("configs/slo")}


def load_slo(name: str) -> Slo:
    """Shipped targets by their name, else those of a YAML file. Raises InputError as ``load`` does."""
    path = shipped_slos().get(name, Path(name))
    found = load(path, SloConfig)
    return Slo(found.ttft_s, found.tpot_s, path.stem)


class Workload(Strict):
    """What is replayed, on what, and by which targets it is judged: a shipped name, a YAML file, or TTFT and TPOT.

    ``predictor_error``: by how much the times that policies predict with are off (``semipd.cost.Misjudged``), drawn
    with ``predictor_seed``; at 0 they predict with what the simulation runs on. ``strict``: refuse a simulation that
    looks a step time up outside the measured grid, instead of clamping it to the edge and counting it.
    ``variation_seed``: step times vary as measured (``semipd.variation``), drawn with this seed; null for the measured
    medians.
    """

    trace: TraceConfig = TraceConfig()
    profile: str = "h200/llama-3-8b"
    slo: str | SloConfig = "mlperf-8b-interactive"
    scheduler: SchedulerOptions = SchedulerOptions()
    predictor_error: Annotated[float, Field(ge=0, le=2)] = 0.0
    predictor_seed: Annotated[int, Field(ge=0)] = 0
    strict: bool = False
    variation_seed: Annotated[int, Field(ge=0)] | None = None

    @field_validator("slo")
    @classmethod
    def _known(cls, found: str | SloConfig) -> str | SloConfig:
        if isinstance(found, str) and found not in (names := shipped_slos()) and not _is_file(found):
            known = ", ".join(sorted(names))
            raise ValueError(f"found {found!r}; expected ttft_s and tpot_s, a YAML file of them, or one of {known}")
        return found

    @property
    def targets(self) -> Slo:
        """The latency targets. Raises InputError for a file that does not say them."""
        found = self.slo
        return load_slo(found) if isinstance(found, str) else Slo(found.ttft_s, found.tpot_s)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # no name of a file, such as one too long
        return False


class ReplayConfig(Workload):
    """One replay, under one policy. ``model`` and ``weights``: what executors other than the simulation run.

    ``model`` is a YAML file as in configs/models; ``weights`` a checkpoint's folder, random ones when not given.
    """

    policy: str = "adaptive"
    model: str | None = None
    weights: str | None = None

    def settled(self) -> ReplayConfig:
        """With the targets themselves instead of a file's name, for that file may change."""
        if not isinstance(self.slo, str) or self.slo in shipped_slos():
            return self
        targets = self.targets
        return self.model_copy(update={"slo": SloConfig(ttft_s=targets.ttft_s, tpot_s=targets.tpot_s)})


class CompareConfig(Workload):
    """One comparison: the same replay under several policies. ``policies`` empty means all of them.

    The default is the shipped comparison: three times the rate of the shipped trace, where a Llama-3-8B is near the
    capacity of an H200.
    """

    trace: TraceConfig = TraceConfig(rate_scale=3.0)
    policies: tuple[str, ...] = ()


class Attention(Strict):
    """Grouped-query attention to measure."""

    query_heads: Positive = 64
    kv_heads: Positive = 8
    head_dim: Positive = 128
    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    @model_validator(mode="after")
    def _groups(self) -> Attention:
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads: found {self.query_heads}; expected a multiple of kv_heads, which is {self.kv_heads}"
            )
        return self


class PrefillGrid(Strict):
    """Prefill batches: equal prompts (``seqs`` x ``seq_tokens`` after ``seq_context``), or a rectangular grid."""

    seqs: Positive | None = None
    seq_tokens: Positive | None = None
    seq_context: Annotated[int, Field(ge=0)] = 0
    tokens: tuple[Positive, ...] = ()
    mean_context: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> PrefillGrid:
        _either(
            {"seqs": self.seqs, "seq_tokens": self.seq_tokens},
            {"tokens": self.tokens, "mean_context": self.mean_context},
        )
        if self.tokens and self.seq_context:
            raise ValueError("seq_context belongs to seqs and seq_tokens; in a grid mean_context says it")
        return self


class DecodeGrid(Strict):
    """Decode batches: ``batch`` sequences of ``context`` tokens, or a grid over batches and total KV tokens."""

    batch: Positive | None = None
    context: Positive | None = None
    batches: tuple[Positive, ...] = ()
    kv_tokens: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> DecodeGrid:
        _either({"batch": self.batch, "context": self.context}, {"batches": self.batches, "kv_tokens": self.kv_tokens})
        return self


def _either(one: dict[str, object], grid: dict[str, object]) -> None:
    """Raises ValueError unless everything of one and nothing of the other is given."""
    given = [[name for name, value in way.items() if value] for way in (one, grid)]
    if given not in ([list(one), []], [[], list(grid)]):
        found = " and ".join(given[0] + given[1]) or "none"
        raise ValueError(f"found {found}; expected {' and '.join(one)}, or the lists {' and '.join(grid)}")


Backend = Literal["fa2", "fa3", "fa3-sized"]
Backends = Annotated[tuple[Backend, ...], Field(min_length=1)]
SharedMode = Literal["split", "capped", "priority", "streams"]
Axis = Annotated[tuple[Positive, ...], Field(min_length=1)]


class FixedWork(Strict):
    """Hybrid's fixed work: layers of prefill and of decode that are started together, or run in turn."""

    prefill_steps: Positive = 10
    decode_steps: Positive = 100


class SweepConfig(Strict):
    """What every sweep has: the attention, how often, for how long at most.

    ``runs`` is the samples of each point. Before a measurement the same load runs for ``settle_ms``, so that a GPU at
    its power limit has settled its clocks.
    """

    attention: Attention = Attention()
    runs: Positive = 10
    settle_ms: NotNegative = 60.0
    limit_s: PositiveFloat | None = None


class PartitionSweep(SweepConfig):
    """A sweep over partitions. ``sms`` names their sizes instead of steps of ``step_sms``.

    With ``rest_ms`` each run of fixed work follows so long an idle time instead of load, as a burst would.
    """

    step_sms: Literal[2, 4, 6, 8, 16, 32] = 8
    sms: tuple[Positive, ...] = ()
    rest_ms: NotNegative = 0.0


class PrefillSweep(PartitionSweep):
    """Prefill alone. ``partitions``: the sizes prefill gets in a split, those left to decode, or both."""

    kind: Literal["prefill"] = "prefill"
    partitions: Literal["primary", "remainder", "both"] = "primary"
    backends: Backends = ("fa2", "fa3", "fa3-sized")
    prefill: PrefillGrid = PrefillGrid(seqs=32, seq_tokens=4096)


class DecodeSweep(PartitionSweep):
    """Decode alone; ``partitions`` as for prefill."""

    kind: Literal["decode"] = "decode"
    partitions: Literal["primary", "remainder", "both"] = "primary"
    decode: DecodeGrid = DecodeGrid(batch=128, context=4096)


class HybridSweep(PartitionSweep):
    """Both at once, in every way of ``modes``; ``sms`` are the prefill sizes.

    ``work``: the fixed work whose total time is measured, null for none; it needs one batch of each phase.
    ``contention``: whether each phase's steady-state time beside the other is measured. ``solo_prefill``: a
    prefill table to take the fastest backend of each (partition, batch) from, instead of measuring ``backends``.
    """

    kind: Literal["hybrid"] = "hybrid"
    backends: Backends = ("fa2", "fa3", "fa3-sized")
    solo_prefill: str | None = None
    prefill: PrefillGrid = PrefillGrid(seqs=4, seq_tokens=4096)
    decode: DecodeGrid = DecodeGrid(batch=128, context=4096)
    modes: Annotated[tuple[SharedMode, ...], Field(min_length=1)] = ("split", "capped", "priority", "streams")
    contention: bool = True
    work: FixedWork | None = FixedWork()

    @model_validator(mode="after")
    def _something_to_measure(self) -> HybridSweep:
        if self.work is None and not self.contention:
            raise ValueError("work is null and contention false, which leaves nothing to measure")
        if self.work is not None and not (self.prefill.seqs and self.decode.batch):
            raise ValueError("fixed work needs one prefill and one decode batch; with a grid set work to null")
        return self


class MixedSweep(SweepConfig):
    """Fused batches on the whole device: chunks of prompts (``prefill``) with a decode batch, in one call.

    Chunks are given by their prompt tokens; the decode batch's come on top. By default they have the mean context of a
    prompt of 4096 tokens. ``in_turn_backends``: those that prefill is measured alone with, for the baseline.
    """

    kind: Literal["mixed"] = "mixed"
    backends: Annotated[tuple[Literal["fa2", "fa3"], ...], Field(min_length=1)] = ("fa2", "fa3")
    in_turn_backends: Backends = ("fa2", "fa3", "fa3-sized")
    prefill: PrefillGrid = PrefillGrid(tokens=(256, 512, 1024, 2048), mean_context=(2048,))
    decode: DecodeGrid = DecodeGrid(batch=128, context=4096)

    @model_validator(mode="after")
    def _a_baseline_for_each(self) -> MixedSweep:
        missing = [name for name in self.backends if name not in self.in_turn_backends]
        if missing:
            raise ValueError(f"in_turn_backends lacks {', '.join(missing)} of backends; expected all of these, too")
        return self


Schema = TypeVar("Schema", bound=BaseModel)


def load(path: Path, schema: type[Schema], overrides: tuple[str, ...] = ()) -> Schema:
    """Read a YAML file into a schema, after applying ``a.b=c`` overrides.

    Raises InputError naming the file and field, what was found and what was expected.
    """
    return build(read_yaml(path), schema, str(path), overrides)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises InputError when there is none."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a YAML file") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        row = f"row {where.line + 1}: " if where is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}: {row}not YAML: {problem}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: found {type(data).__name__}; expected a mapping of names to values")
    return data


def build(data: dict[str, Any], schema: type[Schema], source: str, overrides: tuple[str, ...] = ()) -> Schema:
    """Validate a mapping. Raises InputError as ``load`` does, ``source`` being the file's name."""
    for override in overrides:
        _set(data, override)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = _closest(error.errors())
        loc = tuple(part for part in first["loc"] if part not in UNION_PARTS)
        where = ": ".join([source, ".".join(map(str, loc))] if loc else [source])
        said = first["type"] in ("missing", "extra_forbidden", "value_error")  # the message itself says what was found
        found = "" if said else f"found {_shown(first['input'])}; "
        message = {
            "missing": "missing; expected a value",
            "extra_forbidden": "unknown; expected one of " + ", ".join(_names(schema, first["loc"])),
            "value_error": first["msg"].removeprefix("Value error, "),
        }.get(first["type"], first["msg"][:1].lower() + first["msg"][1:].replace("Input should be", "expected"))
        message = message.replace("input should be", "expected")
        raise InputError(f"{where}: {found}{message}") from None


UNION_PARTS = ("str", "SloConfig")  # pydantic names the alternative it tried; a reader knows the field


def _closest(errors: Sequence[Any]) -> Any:
    """The first error; where alternatives were tried at its place, that of the one that went deepest."""
    place = errors[0]["loc"][:1]
    return max((e for e in errors if e["loc"][:1] == place), key=lambda e: len(e["loc"]))


def _shown(value: object) -> str:
    """A value on part of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _names(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Names a mapping may have at the place of an error."""
    model: type[BaseModel] = schema
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        options = getattr(field.annotation, "__args__", (field.annotation,)) if field else ()
        inner = [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            break
        model = inner[0]
    return sorted(model.model_fields)


def _set(data: dict[str, Any], override: str) -> None:
    """Apply one ``a.b=c``; the value is read as YAML."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise InputError(f"--set {override}: expected NAME=VALUE, such as trace.rate_scale=2")
    *parents, last = name.split(".")
    place = data
    for parent in parents:
        inner = place.get(parent)
        if not isinstance(inner, dict):  # as a preset's name gives way to targets
            inner = place[parent] = {}
        place = inner
    try:
        place[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not YAML") from None
