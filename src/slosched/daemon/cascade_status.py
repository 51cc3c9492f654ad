"""What a controller says of its cascades: the same numbers in the status, on the live page and in /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slosched.codes import Verdict
from slosched.core.scheduler.cascades import Cascade
from slosched.core.scheduler.scheduler import Scheduler
from slosched.verdicts import verdict_name

#: Names of the verdicts that are counted.
VERDICTS = tuple(verdict_name(verdict) for verdict in Verdict if verdict != Verdict.NONE)


def cascade_reports(scheduler: Scheduler, counted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each cascade that is configured; [] without any. `counted` is CascadeTally.report.

    `gpus` of a stage are those that the last plan gives it, and None without a plan: a policy may serve both
    programs on every GPU.
    """
    return [_report(cascade, counted) for cascade in scheduler.cluster.cascades.by_name.values()]


def _report(cascade: Cascade, counted: Mapping[str, Any]) -> dict[str, Any]:
    spec = cascade.spec
    given = counted.get("verdicts", {}).get(spec.name, {})
    gpus = counted.get("planned_gpus", {}).get(spec.name, {})
    return {
        "name": spec.name,
        "ready": cascade.ready,
        "threshold": cascade.threshold,
        "stages": [
            {
                "stage": name,
                "model": stage.model,
                "queued": 0 if queue is None else len(queue.requests),
                "gpus": gpus.get(name),
                "gpus_resident": 0 if queue is None else len(queue.instance.resident_on),
            }
            for name, stage, queue in (
                ("light", spec.light, cascade.light),
                ("heavy", spec.heavy, cascade.heavy),
            )
        ],
        "verdicts": {name: given.get(name, 0) for name in VERDICTS},
    }
