"""The workloads by name, and how each is written on a command line or in a TOML table."""

from __future__ import annotations

from slosched.workloads import (
    azure_kinds,
    bursty_experiment,
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
from slosched.workloads.kinds import Kind, Parameter

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
)

#: By name.
WORKLOADS: dict[str, Kind] = {kind.name: kind for kind in KINDS}

__all__ = ["KINDS", "WORKLOADS", "Kind", "Parameter"]
