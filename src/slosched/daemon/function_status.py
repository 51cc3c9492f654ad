"""What a controller says of its functions and their slots: in the status, on the live page and in /metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from slosched.codes import Code, code_name
from slosched.core.scheduler.state import Gpu, Instance, ModelState
from slosched.units import NS_PER_US

_LONGEST_NAME = 300
#: No call of the function has ended.
_NO_CALLS: Mapping[str, Any] = {"calls": 0, "codes": {}}


def function_reports(
    instances: Iterable[Instance], counted: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The functions among `instances`; [] without any. `counted` is CallTally.report. Times in ns.

    `ready_on` is the number of devices on which a call needs no cold start. `expected_ns` is what the function
    said of a call, or its loading measured.
    """
    reports = []
    for each in instances:
        info = each.function
        if info is None or each.state is ModelState.FAILED:
            continue
        reports.append(
            {
                "name": each.name,
                "state": each.state.name.lower(),
                "gpu": info.gpu,
                "size_classes": info.size_classes,
                "idempotent": info.idempotent,
                "slo_ns": info.slo_ns,
                "limit_ns": info.limit_ns,
                "queued": each.queued,
                "ready_on": len(each.resident_on),
                "expected_ns": each.b1_ns,
                **counted.get(each.name, _NO_CALLS),
            }
        )
    return reports


def slots_of(gpu: Gpu) -> dict[str, Any]:
    """How a device that runs calls is used.

    `slots` is the number of calls that run at a time; `running` counts also those that are on their way.
    `suspended` ones await children, or wait for a slot again.
    """
    running = min(len(gpu.exec.outstanding), gpu.exec.width)
    return {
        "host": gpu.host,
        "slots": gpu.exec.width,
        "running": running,
        "suspended": len(gpu.suspended),
    }


def function_row(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report in a row of the live page: times are means of the calls that began, in us."""
    began = max(1, report.get("began", 0))
    return {
        "name": report["name"][:_LONGEST_NAME],
        "gpu": report["gpu"],
        "queued": report["queued"],
        "ready_on": report["ready_on"],
        "calls": report["calls"],
        "failed": report["calls"] - report["codes"].get(code_name(Code.OK), 0),
        "cold": report.get("cold", 0),
        "wait_us": report.get("waited_ns", 0) / began / NS_PER_US,
        "run_us": report.get("ran_ns", 0) / began / NS_PER_US,
        "suspended_us": report.get("suspended_ns", 0) / began / NS_PER_US,
    }
