"""The metrics of cascades. Their labels are names of the operator's, of stages and of verdicts."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from slosched.core.scheduler.scheduler import Scheduler
from slosched.daemon.cascade_status import cascade_reports
from slosched.daemon.metric_parts import Part, family
from slosched.telemetry.cascade_tally import CascadeTally

#: Name, text, and field of a stage in cascade_status.py.
_OF_STAGES = (
    ("cascade_requests_queued", "Requests that wait for the stage.", "queued"),
    ("cascade_planned_gpus", "GPUs that the last plan gives the stage.", "gpus"),
)


def cascade_families(scheduler: Scheduler, counted: CascadeTally) -> Iterator[Part]:
    """Every family, and none for a controller that serves no cascade."""
    if not scheduler.cluster.cascades.by_name:
        return
    reports = cascade_reports(scheduler, counted.report())
    yield from family(
        CounterMetricFamily,
        "cascade_verdicts",
        "Stages of the cascade's requests that ended so.",
        ("cascade", "verdict"),
        (
            ((each["name"], verdict.replace(" ", "_")), n)
            for each in reports
            for verdict, n in each["verdicts"].items()
        ),
    )
    yield from family(
        GaugeMetricFamily,
        "cascade_threshold",
        "Score from which on a light answer is accepted.",
        ("cascade",),
        (((each["name"],), each["threshold"]) for each in reports),
    )
    for name, text, key in _OF_STAGES:
        yield from family(
            GaugeMetricFamily,
            name,
            text,
            ("cascade", "stage"),
            (
                ((each["name"], stage["stage"]), stage[key])
                for each in reports
                for stage in each["stages"]
                if stage[key] is not None
            ),
        )
