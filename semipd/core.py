"""The nouns every other module speaks in.

Units are in the names: seconds (``_s``), tokens and SMs everywhere. A *run* is a stretch of work of one phase
on one partition; it is made of *steps* (for prefill one layer, for decode one token of every sequence in the
batch) and can be interrupted at a step boundary.

Nothing here is changed once it is made. What a replay makes by the million is not ``frozen``, and its methods are
written out, and so compiled with the rest of the module: that is several times as fast as what ``dataclass`` makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


class InputError(Exception):
    """Input that cannot be used: one line naming file, row and field, what was found and what was expected.

    The command line prints it as ``error: ...`` and exits with code 2.
    """


class Phase(str, Enum):
    """What a run does: one of the two phases of serving a request, or a fused batch of both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Mode(str, Enum):
    """How the two phases share the GPU (DESIGN: modes a policy can choose)."""

    SPLIT = "split"
    CAPPED = "capped"
    PRIORITY = "priority"
    MIXED = "mixed"
    EXCLUSIVE = "exclusive"


# Members by names of their own, for the hottest paths: on its class a member is slow to look up before Python 3.12.
PREFILL, DECODE, FUSED = Phase.PREFILL, Phase.DECODE, Phase.MIXED
ONE_AT_A_TIME = (Mode.EXCLUSIVE, Mode.MIXED)
"""Modes in which at most one run is in flight."""


class Allocation(NamedTuple):
    """What a policy chooses: a mode, and the SMs each phase may use while both have work.

    In ``EXCLUSIVE`` one phase at a time has the whole device, ``first`` while it has work; in ``PRIORITY`` and
    ``MIXED`` both have it together. Both counts equal the device there; in ``CAPPED`` that of decode does.
    ``chunk_tokens``: in ``MIXED`` the most tokens of a fused batch, one for each decoding sequence included (vLLM's
    ``max_num_batched_tokens``); 0 in the other modes.
    """

    mode: Mode
    prefill_sms: int
    decode_sms: int
    chunk_tokens: int = 0
    first: Phase = Phase.PREFILL

    @property
    def name(self) -> str:
        """Key of ``time_in_split``: ``64/68``, ``capped-64``, ``priority``, ``mixed`` or ``full``."""
        if self.mode is Mode.SPLIT:
            return f"{self.prefill_sms}/{self.decode_sms}"
        if self.mode is Mode.CAPPED:
            return f"capped-{self.prefill_sms}"
        return "full" if self.mode is Mode.EXCLUSIVE else self.mode.value

    def sms(self, phase: Phase) -> int:
        """SMs of one phase's partition; in ``MIXED`` those of the whole device."""
        return self.prefill_sms if phase is PREFILL else self.decode_sms


@dataclass(slots=True, init=False, unsafe_hash=True)
class Request:
    """One request of a trace.

    ``output_len`` (tokens) is the oracle: executors stop a sequence there, no scheduler or policy reads it.
    ``prefix_block_ids`` name the prompt's blocks of ``prefix_block_size`` tokens (Mooncake ``hash_ids``).
    """

    id: int
    arrival_s: float
    prompt_len: int
    output_len: int
    prefix_block_ids: tuple[int, ...]
    prefix_block_size: int

    def __init__(
        self,
        id: int,  # noqa: A002 - what it is called
        arrival_s: float,
        prompt_len: int,
        output_len: int,
        prefix_block_ids: tuple[int, ...] = (),
        prefix_block_size: int = 0,
    ) -> None:
        self.id = id
        self.arrival_s = arrival_s
        self.prompt_len = prompt_len
        self.output_len = output_len
        self.prefix_block_ids = prefix_block_ids
        self.prefix_block_size = prefix_block_size


@dataclass(slots=True, eq=False, init=False)
class PrefillShape:
    """A prefill batch as the cost model sees it.

    ``tokens``: new tokens of the batch. ``pairs``: query-key pairs they attend to, sum of q * (c + q / 2) over
    the batch's prompts with q new tokens after c cached ones. ``contexts``: sum of c + q / 2 over the prompts; that of
    one prompt unless given. ``new_tokens``, ``context_lens``: each prompt's q and c; empty when they are not known.
    """

    tokens: int
    pairs: float
    contexts: float
    new_tokens: tuple[int, ...]
    context_lens: tuple[int, ...]

    def __init__(
        self,
        tokens: int,
        pairs: float,
        contexts: float | None = None,
        new_tokens: tuple[int, ...] = (),
        context_lens: tuple[int, ...] = (),
    ) -> None:
        self.tokens = tokens
        self.pairs = pairs
        self.contexts = self.mean_context if contexts is None else contexts
        self.new_tokens = new_tokens
        self.context_lens = context_lens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrefillShape) and (
            self.tokens,
            self.pairs,
            self.contexts,
            self.new_tokens,
            self.context_lens,
        ) == (other.tokens, other.pairs, other.contexts, other.new_tokens, other.context_lens)

    def __hash__(self) -> int:
        return hash((self.tokens, self.pairs, self.contexts))

    @property
    def mean_context(self) -> float:
        """Keys a query attends to on average, ``pairs / tokens``; 0 without any."""
        return self.pairs / self.tokens if self.tokens else 0.0

    @staticmethod
    def of(new_tokens: tuple[int, ...], context_lens: tuple[int, ...]) -> PrefillShape:
        """Shape of a ragged batch: new tokens and cached tokens of each prompt."""
        contexts = [context_lens[i] + q / 2 for i, q in enumerate(new_tokens)]
        pairs = sum([q * contexts[i] for i, q in enumerate(new_tokens)])
        return PrefillShape(sum(new_tokens), pairs, sum(contexts), new_tokens, context_lens)


@dataclass(slots=True, eq=False, init=False)
class DecodeShape:
    """A decode batch: ``batch`` sequences that read ``kv_tokens`` cached tokens in all."""

    batch: int
    kv_tokens: int

    def __init__(self, batch: int, kv_tokens: int) -> None:
        self.batch = batch
        self.kv_tokens = kv_tokens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DecodeShape) and self.batch == other.batch and self.kv_tokens == other.kv_tokens

    def __hash__(self) -> int:
        return hash((self.batch, self.kv_tokens))


@dataclass(slots=True, eq=False, init=False)
class Run:
    """Work to launch: a phase, its requests and the partition it runs on.

    Prefill: ``new_tokens[i]`` prompt tokens of ``requests[i]`` after ``context_lens[i]`` cached ones, for the
    ``max_steps`` layers that are left. Decode: at most ``max_steps`` steps of one unchanged batch, sequence i
    having ``context_lens[i]`` cached tokens (``new_tokens[i]`` is 1); it ends early when a sequence is finished.
    ``allocation`` says which partition ``sms`` belongs to, and so what it may run beside. ``emits[i]``: whether
    the end of a prefill run's last layer gives ``requests[i]`` a token, its prompt being complete then; in decode
    every step gives every sequence one, and it is empty.

    Mixed: one step, which is all layers, of a fused batch. The first ``decodes`` requests are decoding, with one new
    token each; the others have a piece of their prompt in it. ``emits[i]`` as in prefill, always true for the former.
    """

    id: int
    phase: Phase
    requests: tuple[Request, ...]
    new_tokens: tuple[int, ...]
    context_lens: tuple[int, ...]
    sms: int
    max_steps: int
    allocation: Allocation
    emits: tuple[bool, ...]
    decodes: int

    def __init__(
        self,
        id: int,  # noqa: A002 - what it is called
        phase: Phase,
        requests: tuple[Request, ...],
        new_tokens: tuple[int, ...],
        context_lens: tuple[int, ...],
        sms: int,
        max_steps: int,
        allocation: Allocation,
        emits: tuple[bool, ...] = (),
        decodes: int = 0,
    ) -> None:
        self.id = id
        self.phase = phase
        self.requests = requests
        self.new_tokens = new_tokens
        self.context_lens = context_lens
        self.sms = sms
        self.max_steps = max_steps
        self.allocation = allocation
        self.emits = emits
        self.decodes = decodes

    @property
    def prefill_shape(self) -> PrefillShape:
        """Shape of this run as prefill; of a fused batch, its prompts."""
        return PrefillShape.of(self.new_tokens[self.decodes :], self.context_lens[self.decodes :])

    @property
    def decode_shape(self) -> DecodeShape:
        """Shape of this run's first step as decode; of a fused batch, its decoding sequences, which may be none.

        The token that each sequence processes attends to itself.
        """
        batch = self.decodes if self.phase is FUSED else len(self.requests)
        return DecodeShape(batch, sum(self.context_lens[:batch]) + batch)


@dataclass(slots=True, eq=False, init=False)
class StepRecord:
    """What a run did: it started at ``start_s`` and completed a step at each of ``ends_s``.

    ``finished``: ids of the requests whose last token this run produced.
    ``extrapolated``: how many of its cost look-ups fell outside the measured grid, of ``lookups``. ``steps``: done;
    ``end_s``: of the last one, or ``start_s`` when the run was stopped before its first boundary.
    """

    run: Run
    start_s: float
    ends_s: FloatArray
    finished: tuple[int, ...]
    lookups: int
    extrapolated: int
    steps: int = field(init=False)
    end_s: float = field(init=False)

    def __init__(
        self,
        run: Run,
        start_s: float,
        ends_s: FloatArray,
        finished: tuple[int, ...] = (),
        lookups: int = 0,
        extrapolated: int = 0,
    ) -> None:
        self.run = run
        self.start_s = start_s
        self.ends_s = ends_s
        self.finished = finished
        self.lookups = lookups
        self.extrapolated = extrapolated
        self.steps = len(ends_s)
        self.end_s = ends_s.item(-1) if self.steps else start_s


@dataclass(slots=True, init=False)
class Load:
    """All that a policy may know when it decides. Output lengths are not in it (law 7).

    ``prefill``: the batch in flight or next in line, None without prefill work; ``decode`` likewise.
    ``split``: the split in force or, while a phase has the whole device, the last one; None before the first.
    """

    now_s: float
    waiting_requests: int
    waiting_tokens: int
    oldest_wait_s: float
    prefill: PrefillShape | None
    decode: DecodeShape | None
    kv_free_share: float
    split: Allocation | None

    def __init__(
        self,
        now_s: float,
        waiting_requests: int,
        waiting_tokens: int,
        oldest_wait_s: float,
        prefill: PrefillShape | None,
        decode: DecodeShape | None,
        kv_free_share: float,
        split: Allocation | None,
    ) -> None:
        self.now_s = now_s
        self.waiting_requests = waiting_requests
        self.waiting_tokens = waiting_tokens
        self.oldest_wait_s = oldest_wait_s
        self.prefill = prefill
        self.decode = decode
        self.kv_free_share = kv_free_share
        self.split = split
