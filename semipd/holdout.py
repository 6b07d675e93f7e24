"""Held-out points: random ragged batches that no table is made from, and how far models of their times are off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from semipd.areas import Area
from semipd.config import build
from semipd.core import Allocation, DecodeShape, FloatArray, InputError, Mode, Phase, PrefillShape
from semipd.model_config import ModelConfig
from semipd.points import HoldoutPoint, Spread, whole_numbers
from semipd.profile import Profile
from semipd.profile_config import ProfileConfig
from semipd.profiler import Progress
from semipd.ragged import Decodes, Prompts
from semipd.roofline import fitted
from semipd.stopwatch import Stopwatch
from semipd.table_files import TableWriter, read_points
from semipd.trials import Ranges, Times, Trial, as_text, decodes, predicted, prompts

NONE = "-"
"""Stands for the batch of a phase that is idle."""


@dataclass(frozen=True)
class SoloOnly:
    """What a model says when what the phases do to each other is left out; a fused step is one after the other."""

    times: Times
    device: Allocation

    @property
    def layers(self) -> int:
        """Of the model."""
        return self.times.layers

    def prefill_s(self, shape: PrefillShape, at: Allocation, beside: DecodeShape | None) -> tuple[float, bool]:
        """Alone."""
        del beside
        return self.times.prefill_s(shape, at, None)

    def decode_s(
        self, shape: DecodeShape, at: Allocation, beside: PrefillShape | None, steps: int = 1
    ) -> tuple[FloatArray, int]:
        """Alone."""
        del beside
        return self.times.decode_s(shape, at, None, steps)

    def mixed_s(self, chunk: PrefillShape, decode: DecodeShape | None) -> tuple[float, bool]:
        """All layers of the prompts, then the decode step."""
        seconds, outside = self.times.prefill_s(chunk, self.device, None)
        seconds *= self.layers
        if decode is not None:
            step_s, beyond = self.times.decode_s(decode, self.device, None)
            seconds, outside = seconds + float(step_s[0]), outside or beyond > 0
        return seconds, outside


def trials(config: ProfileConfig, areas: Iterable[Area]) -> Iterator[Trial]:
    """``config.holdout`` random trials: one of six is prefill alone, one decode alone, one a fused batch, if any.

    In the others the phases run beside each other. Tokens, contexts, batches and KV tokens are drawn log-uniformly, and
    dealt unevenly: to up to eight prompts and to all sequences, whose lengths have a standard deviation of about half
    their mean.
    """
    rng = np.random.default_rng(config.seed)
    places: dict[str, list[Allocation]] = {"prefill": [], "decode": [], "hybrid": [], "mixed": []}
    for area in areas:
        places[area.table].append(area.at)
    kinds = [kind for kind in ("prefill", "decode", "hybrid", "hybrid", "hybrid", "mixed") if places[kind]]
    alone = Ranges.of(config.prefill, config.decode)
    both = Ranges.of(config.both_prefill, config.both_decode)
    for i in range(config.holdout):
        kind = kinds[i % len(kinds)]
        ranges, at = alone if kind in ("prefill", "decode") else both, places[kind][rng.integers(len(places[kind]))]
        prefill = prompts(rng, ranges) if kind != "decode" else None
        yield Trial(at, prefill, decodes(rng, ranges) if kind != "prefill" else None)


def measure(drawn: Sequence[Trial], stopwatch: Stopwatch, table: TableWriter[HoldoutPoint]) -> Iterator[Progress]:
    """Measure the trials that the table lacks."""
    for done, trial in enumerate(drawn):
        at, prefill, decode = trial.at, trial.prefill, trial.decode
        phases = [Phase.PREFILL] if prefill else []
        if decode:
            phases = [Phase.MIXED] if prefill and at.mode is Mode.MIXED else [*phases, Phase.DECODE]
        yield Progress(done, len(drawn), at.name)
        if all(table.has(_point(phase, trial, NO_SPREAD).key) for phase in phases):
            continue
        spreads: tuple[Spread, ...] = ()
        if prefill and decode:
            mixed = at.mode is Mode.MIXED
            spreads = (stopwatch.mixed(prefill, decode, at),) if mixed else stopwatch.both(prefill, decode, at)
        elif prefill:
            spreads = (stopwatch.prefill(prefill, at),)
        elif decode:
            spreads = (stopwatch.decode(decode, at),)
        table.add(*(_point(phase, trial, spread) for phase, spread in zip(phases, spreads, strict=True)))
    yield Progress(len(drawn), len(drawn), "done")


NO_SPREAD = Spread(1, 1.0, 1.0, 1.0)


def _point(phase: Phase, trial: Trial, spread: Spread) -> HoldoutPoint:
    prefill, decode = trial.prefill, trial.decode
    return HoldoutPoint(
        phase=phase.value,
        mode=trial.at.mode.value,
        prefill_sms=trial.at.prefill_sms,
        decode_sms=trial.at.decode_sms,
        new_tokens=as_text(prefill.new_tokens) if prefill else NONE,
        context_lens=as_text(prefill.context_lens) if prefill else NONE,
        decode_lens=as_text(decode.lengths) if decode else NONE,
        steps=spread.steps,
        median_ms=spread.median_ms,
        p10_ms=spread.p10_ms,
        p90_ms=spread.p90_ms,
    )


@dataclass(frozen=True, slots=True)
class Errors:
    """Predicted / measured - 1 of a model at so many ``points``: median and 95th percentile of the size, and the mean.

    ``outside``: look-ups outside the model's measured grid.
    """

    points: int
    median: float
    p95: float
    bias: float
    outside: int


GROUPS = ("prefill alone", "prefill beside", "decode alone", "decode beside", "mixed")


def held_out(profile: Profile) -> dict[str, dict[str, Errors]]:
    """How far models are off at a profile's held-out points, by group and model; nothing when it has none.

    The models: ``table``, ``solo`` and, if it is known which model was run, ``roofline``. Points in modes that
    the tables refuse are left out.

    Raises InputError as ``read_table`` and ``Profile.cost`` do.
    """
    path = profile.folder / "holdout.csv"
    if not path.exists():
        return {}
    cost, sms = profile.cost(), profile.device_sms
    models: dict[str, Times] = {"table": cost, "solo": SoloOnly(cost, Allocation(Mode.EXCLUSIVE, sms, sms))}
    if profile.model is not None:
        described = build(dict(profile.model), ModelConfig, f"{profile.folder / 'profile.json'}: model")
        models["roofline"] = fitted(described, sms, profile.prefill.points, profile.decode.points)
    refused = {mode.value for mode in cost.refused}
    return errors([p for p in read_points(path, HoldoutPoint) if p.mode not in refused], models, path)


def as_document(found: Mapping[str, Mapping[str, Errors]]) -> dict[str, dict[str, dict[str, float]]]:
    """As JSON, by group and model."""
    return {group: {name: asdict(each) for name, each in of.items()} for group, of in found.items()}


def errors(points: Sequence[HoldoutPoint], models: Mapping[str, Times], source: Path) -> dict[str, dict[str, Errors]]:
    """By group and model, how far models are off; groups without points are left out.

    Raises InputError naming the row that cannot be read, KeyError for an allocation that a model does not have.
    """
    found: dict[str, dict[str, list[tuple[float, bool]]]] = {}
    for row, point in enumerate(points, 2):
        trial = _trial(point, f"{source}: row {row}")
        beside = trial.prefill is not None and trial.decode is not None
        group = point.phase if point.phase == Phase.MIXED.value else f"{point.phase} {'beside' if beside else 'alone'}"
        for name, model in models.items():
            predicted_ms, outside = predicted(model, point.phase, trial)
            found.setdefault(group, {}).setdefault(name, []).append((predicted_ms / point.median_ms - 1, outside))
    return {group: {name: _errors(cases) for name, cases in found[group].items()} for group in GROUPS if group in found}


def _errors(cases: Sequence[tuple[float, bool]]) -> Errors:
    off = np.array([error for error, _ in cases])
    median, p95 = np.percentile(np.abs(off), [50, 95])
    return Errors(len(off), float(median), float(p95), float(off.mean()), sum(outside for _, outside in cases))


def _trial(point: HoldoutPoint, where: str) -> Trial:
    phases: dict[str, tuple[str, ...]] = {"prefill": (point.new_tokens,), "decode": (point.decode_lens,)}
    phases["mixed"] = (point.new_tokens, point.decode_lens)
    if point.phase not in phases or point.mode not in {mode.value for mode in Mode}:
        raise InputError(
            f"{where}: phase, mode: found {point.phase}, {point.mode}; expected prefill, decode or mixed, and a mode"
        )
    if NONE in phases[point.phase]:
        raise InputError(f"{where}: found no batch of {point.phase}; expected one")
    at = Allocation(Mode(point.mode), point.prefill_sms, point.decode_sms)
    new, context, lengths = (
        _numbers(getattr(point, name), f"{where}: {name}") for name in ("new_tokens", "context_lens", "decode_lens")
    )
    if len(new) != len(context):
        raise InputError(f"{where}: context_lens: found {len(context)} numbers; expected {len(new)} as in new_tokens")
    return Trial(at, Prompts(new, context) if new else None, Decodes(lengths) if lengths else None)


def _numbers(text: str, where: str) -> tuple[int, ...]:
    return () if text == NONE else whole_numbers(text, where, f"whole numbers, or {NONE} for no batch")
