"""Policies: from the load, how the two phases share the device. One file a policy."""

from __future__ import annotations

import re
from typing import Protocol

from semipd.core import Allocation, InputError, Load, Mode, Phase
from semipd.cost import CostModel
from semipd.policies.adaptive import Adaptive
from semipd.policies.static import Static, whole_device
from semipd.slo import Slo

__all__ = ["Adaptive", "Policy", "Static", "all_names", "chosen", "in_order", "make_policy", "whole_device"]

CHUNKS = (256, 512, 1024, 2048)
"""Tokens of a fused batch that are compared by default. Published baselines have 1,024; to be fair they are swept."""

KINDS = {
    "exclusive": "",
    "exclusive-decode": "",
    "static": "prefill SMs",
    "capped": "prefill SMs",
    "priority": "",
    "chunked": "tokens of a step",
    "adaptive": "",
}
"""Names of policies in their order, and what the number after a dash is, for those that have one."""


class Policy(Protocol):
    """Chooses the allocation. A protocol: policies need not, and where this is compiled cannot, inherit from it.

    The scheduler asks when a prefill batch is about to start, when the decode batch changes and when a phase
    becomes idle or busy, never at every decode step.
    """

    @property
    def name(self) -> str:
        """What results call it."""
        ...

    def decide(self, load: Load) -> Allocation:
        """The allocation for this load. Pure: equal loads give equal answers, whatever was asked before."""
        ...


def make_policy(name: str, cost: CostModel, slo: Slo) -> Policy:
    """The policy of a name, as ``KINDS`` has them: ``exclusive``, ``static-64``, ``chunked-512`` and so on.

    Raises InputError for an unknown name, a mode that was not measured and a number that was not.
    """
    sms = cost.device_sms
    kind, number = _parts(name)
    if kind == "adaptive":
        return Adaptive(cost, slo)
    if kind == "exclusive":
        return Static(name, whole_device(sms), sms)
    if kind == "exclusive-decode":
        return Static(name, whole_device(sms, Phase.DECODE), sms)
    mode = {"static": Mode.SPLIT, "capped": Mode.CAPPED, "priority": Mode.PRIORITY, "chunked": Mode.MIXED}[kind]
    measured = [at for at in cost.allocations if at.mode is mode]
    if not measured:
        raise InputError(f"policy: found {name!r}, which was not measured: {cost.refused[mode]}")
    if mode is Mode.MIXED:
        most = max(at.chunk_tokens for at in measured)
        if not 1 <= number <= most:
            raise InputError(f"policy: found {name!r}; expected chunked-N with N from 1 to the {most} tokens measured")
        return Static(name, Allocation(mode, sms, sms, number), sms)
    for at in measured:
        if mode is Mode.PRIORITY or at.prefill_sms == number:
            return Static(name, at, sms)
    sizes = ", ".join(str(at.prefill_sms) for at in measured)
    raise InputError(f"policy: found {name!r}; expected {kind}-N with N one of the measured prefill SMs: {sizes}")


def _parts(name: str) -> tuple[str, int]:
    """Kind and number of a policy, 0 for a kind without one. Raises InputError for a name that none has."""
    if name in KINDS and not KINDS[name]:
        return name, 0
    found = re.fullmatch(r"([a-z]+)-(0|[1-9][0-9]*)", name)
    if found and KINDS.get(found[1]):
        return found[1], int(found[2])
    names = ", ".join(f"{kind}-N ({unit})" if unit else kind for kind, unit in KINDS.items())
    raise InputError(f"policy: found {name!r}; expected one of {names}")


def in_order(name: str) -> tuple[int, int]:
    """Key to list policies by: in the order of ``KINDS``, then by number."""
    kind, number = _parts(name)
    return list(KINDS).index(kind), number


def chosen(policy: Policy, cost: CostModel) -> tuple[Allocation, ...]:
    """What a policy can choose while both phases have work, but one at a time; executors are made ready for these."""
    if isinstance(policy, Static):
        return () if policy.allocation.mode is Mode.EXCLUSIVE else (policy.allocation,)
    return cost.splits


def all_names(cost: CostModel) -> tuple[str, ...]:
    """Every policy that can be made of these measurements, in order; of chunks, those of ``CHUNKS``."""
    of_modes = {Mode.SPLIT: "static", Mode.CAPPED: "capped"}
    names = ["exclusive", "exclusive-decode", "adaptive"]
    names += [f"{of_modes[at.mode]}-{at.prefill_sms}" for at in cost.allocations if at.mode in of_modes]
    names += ["priority" for at in cost.allocations if at.mode is Mode.PRIORITY]
    names += [
        f"chunked-{n}" for at in cost.allocations if at.mode is Mode.MIXED for n in CHUNKS if n <= at.chunk_tokens
    ]
    return tuple(sorted(names, key=in_order))
