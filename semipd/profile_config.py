"""What ``semipd profile`` measures, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from semipd.config import Axis, NotNegative, Positive, PositiveFloat, Strict
from semipd.padding import decode_sizes, prefill_sizes

ProfileMode = Literal["split", "capped", "priority", "mixed"]


class Axes(Strict):
    """Values of some variables, each a field."""

    @property
    def values(self) -> tuple[tuple[int, ...], ...]:
        """In the order of the names."""
        return tuple(getattr(self, name) for name in type(self).model_fields)


class PrefillAxes(Axes):
    """Where a rectangle of prefill batches starts: new tokens, and the keys that each attends to on average."""

    tokens: Axis
    mean_context: Axis


class DecodeAxes(Axes):
    """Where a rectangle of decode batches starts: sequences, and the cached tokens that they read together."""

    batch: Axis
    kv_tokens: Axis


class More(Axes):
    """More values of the variables of both phases; none by default."""

    tokens: tuple[Positive, ...] = ()
    mean_context: tuple[Positive, ...] = ()
    batch: tuple[Positive, ...] = ()
    kv_tokens: tuple[Positive, ...] = ()


class ProfileConfig(Strict):
    """What ``semipd profile`` measures of a model.

    ``prefill_sms``: what prefill has in a split; ``capped_sms``: which of them are measured capped, too. ``prefill``,
    ``decode``: each phase alone. ``prefill_spine``, ``decode_spine``: more tokens and batches, measured at the least
    mean context and KV tokens only. ``both_prefill``, ``both_decode``: both at once; ``both_more``: other values of any
    of these, each with all of the others' (a sparse grid); ``mixed_more``: the same for fused batches, as ``both_more``
    where other basic values are given than the defaults.
    Of a spine and of these, what is not between the ends is left out. From there on, values are added where the
    cost model errs by more than ``tolerance``, as time allows; beside each other, up to ``ragged`` random batches in
    every way of sharing instead, more where it errs more. KV tokens that do not fit into memory are left out.
    ``backends``: attention kernels that prefill may use, of which the fastest is taken on each partition.

    ``warmup_s``: small runs before all else, at most for so long. ``settle_ms``: load before a measurement of decode,
    or of prefill on less than half of the SMs; ``limited_settle_ms`` before one of what may reach the power limit,
    after which the device rests for ``rest_share`` of the time that it was loaded. ``measure_ms``: length of a
    measurement, with long steps at most about ``limit_ms``. ``holdout``: random points to measure last, and to hold the
    cost model against. ``peak_tflops``, ``peak_tbps``: of the device, to estimate how long it will take.
    """

    prefill_sms: Axis = (16, 32, 48, 64, 80, 96, 112)
    capped_sms: tuple[Positive, ...] = (64, 96)
    modes: Annotated[tuple[ProfileMode, ...], Field(min_length=1)] = ("split", "capped", "priority", "mixed")
    prefill: PrefillAxes = PrefillAxes(tokens=(16, 128, 512, 4096, 8192), mean_context=(64, 1024, 4096, 16384, 32768))
    prefill_spine: tuple[Positive, ...] = (*prefill_sizes(1024), *range(1152, 2048, 128), 3072, 4096, 6144)
    decode: DecodeAxes = DecodeAxes(batch=(1, 8, 24, 32, 96, 256), kv_tokens=(512, 16384, 131072, 655360))
    decode_spine: tuple[Positive, ...] = decode_sizes(256)
    both_prefill: PrefillAxes = PrefillAxes(tokens=(16, 512, 4096), mean_context=(64, 16384))
    both_decode: DecodeAxes = DecodeAxes(batch=(8, 256), kv_tokens=(512, 524288))
    both_more: More = More()
    mixed_more: More = More(tokens=(96, 1024, 1920), mean_context=(4096,), batch=(32, 96), kv_tokens=(32768, 131072))
    backends: Annotated[tuple[Literal["fa2", "fa3", "fa3-sized"], ...], Field(min_length=1)] = ("fa2", "fa3-sized")
    tolerance: PositiveFloat = 0.03
    ragged: Annotated[int, Field(ge=0)] = 200
    warmup_s: NotNegative = 5.0
    settle_ms: NotNegative = 20.0
    limited_settle_ms: NotNegative = 70.0
    rest_share: NotNegative = 0.25
    measure_ms: PositiveFloat = 50.0
    limit_ms: PositiveFloat = 200.0
    holdout: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    limit_s: PositiveFloat | None = 480.0
    max_num_seqs: Positive = 256
    max_num_batched_tokens: Positive = 8192
    block_size: Positive = 16
    num_blocks: Positive | None = None
    peak_tflops: PositiveFloat = 700.0
    peak_tbps: PositiveFloat = 4.2

    @model_validator(mode="before")
    @classmethod
    def _more_of_what(cls, data: Any) -> Any:
        """The default of ``mixed_more`` goes with those of the basic values."""
        own = isinstance(data, dict) and ("both_prefill" in data or "both_decode" in data)
        return {"mixed_more": data.get("both_more", {})} | data if own else data

    @model_validator(mode="after")
    def _can_run(self) -> ProfileConfig:
        for name, prefill in (("prefill", self.prefill), ("both_prefill", self.both_prefill)):
            if max(prefill.tokens) > self.max_num_batched_tokens:
                raise ValueError(
                    f"{name}.tokens: found {max(prefill.tokens)}; expected at most max_num_batched_tokens, "
                    f"{self.max_num_batched_tokens}"
                )
        for name, decode in (("decode", self.decode), ("both_decode", self.both_decode)):
            if max(decode.batch) > self.max_num_seqs:
                raise ValueError(
                    f"{name}.batch: found {max(decode.batch)}; expected at most max_num_seqs, {self.max_num_seqs}"
                )
            if min(decode.kv_tokens) < 2 * max(decode.batch):
                raise ValueError(
                    f"{name}.kv_tokens: found {min(decode.kv_tokens)}; expected at least two for each of "
                    f"{max(decode.batch)} sequences"
                )
        if "split" not in self.modes:
            raise ValueError("modes: split is missing; a profile has at least the splits")
        return self
