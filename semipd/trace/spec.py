"""The generator specification of a trace: a small document that ``fit`` makes and ``synth`` draws from."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from semipd.core import FloatArray, InputError
from semipd.trace.columns import MAX_TOKENS

MAX_WINDOWS = 10_000
MAX_DURATION_S = 1e9
MIN_BURSTINESS = 1e-3
MAX_BURSTINESS = 1e6

Text = Annotated[str, Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, le=MAX_DURATION_S)]
Rate = Annotated[float, Field(ge=0, le=1e15)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
# YAML and JSON know lists only: strict applies to what is in them.
Level = Annotated[float, Field(ge=0, le=1)]
Levels = Annotated[tuple[Level, ...], Field(strict=False, min_length=2)]
Rates = Annotated[tuple[Rate, ...], Field(strict=False, min_length=1, max_length=MAX_WINDOWS)]
Quantiles = Annotated[tuple[Tokens, ...], Field(strict=False)]
Bins = Annotated[tuple[Quantiles, ...], Field(strict=False, min_length=1)]


class TraceSpec(BaseModel):
    """Where a trace came from, and what is kept of it.

    ``rate_rps[i]`` is the arrival rate in the i-th window of ``window_s`` (the last one ends at ``duration_s``).
    ``burstiness`` b is vLLM's: gaps within a window are Gamma with shape b, so their CV is 1/sqrt(b).
    Lengths in tokens are given at ``quantile_levels``: of all prompts, and of the outputs in each of equally
    filled bins of ascending prompt length.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, defer_build=True)

    name: Text
    source: Text
    licence: Text
    attribution: Text
    source_sha256: str
    command: str
    duration_s: Seconds
    window_s: Seconds
    rate_rps: Rates
    burstiness: Annotated[float, Field(ge=MIN_BURSTINESS, le=MAX_BURSTINESS)]
    quantile_levels: Levels
    prompt_quantiles_tokens: Quantiles
    output_quantiles_tokens_by_prompt_bin: Bins

    @field_validator("rate_rps")
    @classmethod
    def _one_rate_a_window(cls, rates: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        if not any(rates):
            raise ValueError("at least one rate above 0")
        if "duration_s" in info.data and "window_s" in info.data:
            windows = window_count(info.data["duration_s"], info.data["window_s"])
            if len(rates) != windows:
                raise ValueError(f"{windows} rates, one for every window_s of duration_s begun")
        return rates

    @field_validator("quantile_levels")
    @classmethod
    def _levels_span_0_to_1(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if levels[0] != 0 or levels[-1] != 1 or any(b <= a for a, b in pairwise(levels)):
            raise ValueError("ascending levels from 0 to 1")
        return levels

    @field_validator("prompt_quantiles_tokens")
    @classmethod
    def _prompt_quantiles_fit(cls, values: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        return _quantiles(values, info)

    @field_validator("output_quantiles_tokens_by_prompt_bin")
    @classmethod
    def _output_quantiles_fit(cls, bins: tuple[tuple[int, ...], ...], info: ValidationInfo) -> Any:
        return tuple(_quantiles(values, info) for values in bins)

    def window_edges_s(self) -> FloatArray:
        """Edges of the windows, from 0 to ``duration_s``."""
        return window_edges_s(self.duration_s, self.window_s)


def window_count(duration_s: float, window_s: float) -> int:
    """Windows of ``window_s`` begun in ``duration_s``."""
    # Rounded, since 1.1 / 0.1 is a little over 11 and would begin a twelfth window of no width.
    return max(1, math.ceil(round(duration_s / window_s, 9)))


def window_edges_s(duration_s: float, window_s: float) -> FloatArray:
    """Edges of those windows, the last one cut at ``duration_s``."""
    starts = np.arange(window_count(duration_s, window_s), dtype=np.float64) * window_s
    return np.append(starts, duration_s)


def load_spec(path: str | Path) -> TraceSpec:
    """Read a specification, YAML or JSON. Raises InputError naming the file and the field."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: found no readable text ({error}), expected a trace specification") from None
    try:
        document = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"{path}: found broken {path.suffix or 'YAML'} ({where}), expected a document") from None
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise InputError(f"{path}: found a {kind}, expected the fields of a trace specification")
    try:
        return TraceSpec.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_fault(error)}") from None


def save_spec(spec: TraceSpec, path: str | Path) -> None:
    """Write a specification, as JSON when the path ends in ``.json``, else as YAML. Raises InputError if it cannot."""
    path = Path(path)
    document = spec.model_dump(mode="json")
    if path.suffix == ".json":
        text = json.dumps(document, indent=1) + "\n"
    else:
        text = yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(
            f"{path}: found no writable place ({error.strerror}), expected one for a specification"
        ) from None


def _quantiles(values: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    levels = info.data.get("quantile_levels", values)
    if len(values) != len(levels):
        raise ValueError(f"{len(levels)} values, one for every quantile level")
    if any(b < a for a, b in pairwise(values)):
        raise ValueError("values that never fall")
    return values


def _first_fault(error: ValidationError) -> str:
    """``field: found ..., expected ...`` of the first thing that is wrong."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{where}: found no such field, expected one"
    if fault["type"] == "extra_forbidden":
        return f"{where}: found an unknown field, expected only {', '.join(TraceSpec.model_fields)}"
    found = repr(fault["input"])
    expected = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{where}: found {found if len(found) <= 60 else found[:57] + '...'}, expected {expected}"
