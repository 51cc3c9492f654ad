"""Which of DiffServe's plans with the greatest threshold is taken."""

from __future__ import annotations

from dataclasses import replace

from slosched.core.scheduler.policies.published.diffserve.allocator import Problem, allocate
from slosched.workloads.cascades import load_cascade


def test_the_first_of_equal_plans_does_not_depend_on_the_present_one() -> None:
    spec = load_cascade("sdturbo")
    problem = Problem(
        gpus=16,
        demand=10.0,
        light_ns=spec.light_ns,
        heavy_ns=spec.heavy.exec_ns,
        scores=spec.scores,
        slo_ns=spec.slo_ns,
    )
    now = replace(allocate(problem), light_gpus=3, heavy_gpus=13)
    first = [allocate(replace(problem, now=each, first=True)) for each in (None, now)]
    assert first[0] == first[1]
    kept = allocate(replace(problem, now=now))
    assert kept.threshold == first[0].threshold and kept.light_gpus >= first[0].light_gpus
