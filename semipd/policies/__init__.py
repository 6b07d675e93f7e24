"""Policies: from the load, how the two phases share the device. One file a policy."""

from __future__ import annotations

from typing import Protocol

from semipd.core import Allocation, InputError, Load, Slo
from semipd.cost import CostModel
from semipd.policies.adaptive import Adaptive
from semipd.policies.exclusive import Exclusive, whole_device
from semipd.policies.static import Static

__all__ = ["Adaptive", "Exclusive", "Policy", "Static", "all_names", "chosen", "make_policy", "whole_device"]


class Policy(Protocol):
    """Chooses the allocation.

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
    """The policy of a name: ``exclusive``, ``static-N`` or ``adaptive``.

    Raises InputError listing the names for an unknown one, and the measured splits for an unmeasured N.
    """
    if name == "exclusive":
        return Exclusive(cost.device_sms)
    if name == "adaptive":
        return Adaptive(cost, slo)
    kind, _, count = name.partition("-")
    if kind != "static":
        raise InputError(f"policy: found {name!r}; expected exclusive, static-N (N prefill SMs) or adaptive")
    for split in cost.splits:
        if str(split.prefill_sms) == count:
            return Static(split, cost.device_sms)
    measured = ", ".join(str(split.prefill_sms) for split in cost.splits)
    raise InputError(f"policy: found {name!r}; expected static-N with N one of the measured prefill SMs: {measured}")


def chosen(policy: Policy, cost: CostModel) -> tuple[Allocation, ...]:
    """The splits that a policy can choose while both phases have work; what serves them is made ready for these."""
    if isinstance(policy, Exclusive):
        return ()
    return (policy.split,) if isinstance(policy, Static) else cost.splits


def all_names(cost: CostModel) -> tuple[str, ...]:
    """Every policy that can be made of these measurements: exclusive, each static split, adaptive."""
    return ("exclusive", *(f"static-{split.prefill_sms}" for split in cost.splits), "adaptive")
