"""Scheduling policies by TYPE. A new one is a file here, in baselines/ or in published/, or another package's.

`POLICY_TYPES` is the one place where a TYPE becomes a policy. A package offers its own as entry points of the
group `slosched.policies` (docs/my_own_policy.md). Looking one up imports its module, and decides nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from slosched.config import FIDELITIES, PLACEMENTS, SchedulerConfig
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import POLICY_INTERFACE, About
from slosched.core.scheduler.policies.base import Policy, Refusals
from slosched.core.scheduler.policies.placements import PLACEMENT_RULES
from slosched.discovery import classes_in
from slosched.errors import ExtensionError, InvalidConfig
from slosched.extensions import Registry, check_interface, missing_from, outside_row
from slosched.units import format_duration


def _by_type(*, one_cascade: bool) -> dict[str, dict[str, type[Policy]]]:
    """Every class of these packages that says what it is, in the order of `slosched controller --help`.

    Either those that serve models, or those that serve one cascade.
    """
    names = ("", ".baselines", ".published", ".published.diffserve")
    classes = [each for name in names for each in classes_in(__name__ + name)]
    policies: list[type[Policy]] = [
        each
        for each in classes
        if isinstance(vars(each).get("about"), About) and each.about.one_cascade == one_cascade
    ]
    found: dict[str, dict[str, type[Policy]]] = {}
    for policy in sorted(policies, key=lambda each: (each.about.rank, each.about.type)):
        for fidelity in policy.about.fidelities:
            found.setdefault(policy.about.type, {})[fidelity] = policy
    return found


#: The built-in ones: TYPE -> fidelity -> policy; and those that serve one cascade.
POLICIES = _by_type(one_cascade=False)
CASCADE_POLICIES = _by_type(one_cascade=True)


def _from_outside(type_: str, thing: object) -> Mapping[str, type[Policy]]:
    """The policy that a package offers as `type_` ("": as module:class), by fidelity. Raises ExtensionError."""
    if not inspect.isclass(thing):
        raise ExtensionError("is not a class")
    policy = cast(type[Policy], thing)
    described = vars(policy).get("about")
    if not isinstance(described, About):
        raise ExtensionError(
            "has no `about` of its own (slosched.core.scheduler.policies.about.About)"
        )
    check_interface(described.interface, POLICY_INTERFACE)
    missing = missing_from(Policy, policy)
    if missing:
        raise ExtensionError(f"lacks the methods {', '.join(missing)} of a policy")
    if type_ and described.type != type_:
        raise ExtensionError(f"calls itself {described.type!r}; name the entry point after it")
    if FIDELITIES[0] not in described.fidelities or not set(described.fidelities) <= set(
        FIDELITIES
    ):
        raise ExtensionError(
            f"names the fidelities {described.fidelities}; write {FIDELITIES[:1]} or {FIDELITIES}"
        )
    return dict.fromkeys(described.fidelities, policy)


#: Every TYPE: the built-in ones, those of installed packages, and module:class.
POLICY_TYPES: Registry[Mapping[str, type[Policy]]] = Registry(
    "scheduler TYPE", "slosched.policies", lambda: POLICIES | CASCADE_POLICIES, _from_outside
)


def policy_class(type_: str, fidelity: str = "best") -> type[Policy]:
    """The class of a TYPE. Raises UnknownName, which lists those that exist, or ExtensionError."""
    by_fidelity = POLICY_TYPES.get(type_)
    if fidelity not in by_fidelity:
        raise InvalidConfig(
            f"{type_} has no fidelity {fidelity!r}; it has {' and '.join(by_fidelity)}"
        )
    return by_fidelity[fidelity]


def type_and_fidelity(text: str) -> tuple[str, str]:
    """The TYPE and the fidelity of "INFER5", "INFER5:paper", "module:class" or "module:class:paper".

    The fidelity is empty where `text` has none.
    """
    head, colon, last = text.rpartition(":")
    if colon and (last in FIDELITIES or head in POLICY_TYPES):
        return head, last
    return text, ""


def about(type_: str, fidelity: str = "best") -> About:
    """What the policy of a TYPE says about itself. Raises UnknownName, ExtensionError."""
    return policy_class(type_, fidelity).about


def make_policy(config: SchedulerConfig, cluster: Cluster, refusals: Refusals) -> Policy:
    """Make the policy that `config` names. Raises UnknownName, ExtensionError."""
    return policy_class(config.policy, config.fidelity)(cluster, refusals)


def resolved(config: SchedulerConfig) -> SchedulerConfig:
    """Return the same options with every None replaced by its default.

    Raises UnknownName for an unknown TYPE, InvalidConfig for an option that its policy cannot heed.
    """
    policy = about(config.policy, config.fidelity)
    _check(config, policy)
    defaults = policy.defaults_under(config.fidelity)
    ahead_ns = defaults.schedule_ahead_ns
    if config.generate_inputs:
        ahead_ns = defaults.generated_ahead_ns
    return replace(
        config,
        schedule_ahead_ns=_given(config.schedule_ahead_ns, ahead_ns),
        max_exec_ns=_given(config.max_exec_ns, defaults.max_exec_ns),
        max_batch=_given(config.max_batch, defaults.max_batch),
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _check(config: SchedulerConfig, policy: About) -> None:
    if policy.one_cascade and len(config.cascades) != 1:
        raise InvalidConfig(
            f"{config.policy} serves one cascade: name it with --cascade, for example --cascade sdturbo "
            f"(given: {len(config.cascades)})"
        )
    places_itself = not policy.takes_placement or config.fidelity == "paper"
    if config.placement != PLACEMENTS[0] and places_itself:
        raise InvalidConfig(
            f"placement {config.placement!r} has no effect under {config.policy} ({config.fidelity}), which "
            "places weights in its own way; leave it out"
        )
    ahead_ns, least_ns = config.schedule_ahead_ns, policy.least_ahead_ns
    if least_ns and ahead_ns is not None and ahead_ns <= least_ns:
        raise InvalidConfig(
            f"schedule_ahead must be above {format_duration(least_ns)} under {config.policy} "
            f"({config.fidelity}), not {format_duration(ahead_ns)}: it lets nothing start sooner than that, so "
            "nothing would ever be sent"
        )


def unloads_unused(config: SchedulerConfig) -> bool:
    """Whether instances that no client uses may be unloaded under `config`; the published code keeps all."""
    return (
        config.fidelity == "best"
        and about(config.policy).unloads_unused
        and PLACEMENT_RULES[config.placement].unloads_unused
    )


def adopts_weights(config: SchedulerConfig) -> bool:
    """Whether weights that a worker brings along are used under `config`: published code has its own books."""
    return config.fidelity == "best" and not about(config.policy).published


def serves_functions(config: SchedulerConfig) -> bool:
    """Whether functions are served under `config`; the published rule of placement knows no hosts."""
    serves = about(config.policy, config.fidelity).serves_functions
    return serves and config.placement != "demand"


def summaries() -> list[tuple[str, str]]:
    """(TYPE, one line about it) of every TYPE, in the order of the help; then those of packages.

    Imports every package that offers a policy; one that cannot be used says why in its line.
    """
    lines = [(type_, about(type_).summary) for type_ in (*POLICIES, *CASCADE_POLICIES)]
    for each in POLICY_TYPES.outside():
        classes = list(each.thing.values()) if each.thing else []
        lines.append(outside_row(each, classes[0].about.summary if classes else ""))
    return lines
