"""The workloads by name, and how each is written on a command line or in a TOML table.

`WORKLOAD_KINDS` is the one place where a name becomes a workload. A package offers its own as entry points of
the group `slosched.workloads` (docs/my_own_policy.md).
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass

from slosched.errors import ExtensionError
from slosched.extensions import Origin, Registry, check_interface, origin_of
from slosched.workloads import (
    azure_kinds,
    bursty_experiment,
    cascade_trace,
    closed_loops,
    mix,
    open_loops,
    rate_exp,
    replay,
    scalability_exp_1,
    shapes,
    slo_exp_1,
    slo_exp_2,
    zoo,
)
from slosched.workloads.base import Workload
from slosched.workloads.kinds import WORKLOAD_INTERFACE, Kind, Parameter

#: The published ones first, in the order of Clockwork's help; then ours.
KINDS: tuple[Kind, ...] = (
    zoo.EXAMPLE,
    open_loops.FILL_MEMORY,
    closed_loops.SPAM,
    closed_loops.SINGLE_SPAM,
    closed_loops.SIMPLE,
    closed_loops.SIMPLE_SLO_FACTOR,
    closed_loops.SIMPLE_PARAMETRIC,
    open_loops.POISSON_OPEN_LOOP,
    scalability_exp_1.KIND,
    slo_exp_1.KIND,
    slo_exp_2.KIND,
    open_loops.COMPARISON_EXPERIMENT,
    closed_loops.COMPARISON_EXPERIMENT_2,
    *azure_kinds.KINDS,
    bursty_experiment.KIND,
    *rate_exp.KINDS,
    *shapes.KINDS,
    mix.KIND,
    replay.KIND,
    cascade_trace.KIND,
)

#: The built-in ones by name.
WORKLOADS: dict[str, Kind] = {kind.name: kind for kind in KINDS}


def _from_outside(name: str, thing: object) -> Kind:
    """The workload that a package offers as `name` ("": as module:attribute). Raises ExtensionError."""
    if not isinstance(thing, Kind):
        raise ExtensionError("is not a Kind (slosched.workloads.kinds.Kind)")
    check_interface(thing.interface, WORKLOAD_INTERFACE)
    if name and thing.name != name:
        raise ExtensionError(f"calls itself {thing.name!r}; name the entry point after it")
    return thing


#: Every workload: the built-in ones, those of installed packages, and module:kind.
WORKLOAD_KINDS: Registry[Kind] = Registry(
    "workload", "slosched.workloads", lambda: WORKLOADS, _from_outside
)


def origins(workload: Workload) -> list[Origin]:
    """Where the code of `workload` and of its parts comes from, as far as that is not slosched."""
    found = {(each.package, each.target): each for each in _origins(workload)}
    return [found[key] for key in sorted(found)]


def _origins(value: object) -> list[Origin]:
    found: list[Origin] = []
    if isinstance(value, list | tuple):
        for each in value:
            found += _origins(each)
    elif is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        origin = origin_of(f"{kind.__module__}:{kind.__qualname__}")
        found += [] if origin is None else [origin]
        for field in fields(value):
            found += _origins(getattr(value, field.name))
    return found


__all__ = ["KINDS", "WORKLOADS", "WORKLOAD_KINDS", "Kind", "Parameter", "origins"]
