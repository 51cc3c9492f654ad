"""The metrics of functions. A `function` is a name; beyond MOST_FUNCTIONS of them the others count together."""

from __future__ import annotations

from collections.abc import Iterator, Set

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from slosched.codes import ActionType
from slosched.core.scheduler.scheduler import Scheduler
from slosched.daemon.function_status import function_reports, slots_of
from slosched.daemon.metric_parts import (
    OF_GPU,
    PART_STEPS,
    LaneTable,
    Part,
    Table,
    family,
    gpu_labels,
    label,
    lane_families,
    table_families,
)
from slosched.telemetry.call_tally import FunctionTally
from slosched.telemetry.tally import Tally
from slosched.units import NS_PER_S

_COUNTED: Table[FunctionTally] = (
    ("function_calls_begun", "Calls that began, of those that have ended.", lambda t: t.began),
    ("function_cold_calls", "Calls that began after a cold start.", lambda t: t.cold),
    ("function_children", "Calls that the calls asked for.", lambda t: t.children),
    ("function_run_seconds", "Time that calls ran in a slot.", lambda t: t.ran_ns / NS_PER_S),
    (
        "function_suspended_seconds",
        "Time that calls awaited children, and then a slot.",
        lambda t: t.suspended_ns / NS_PER_S,
    ),
    (
        "function_wait_seconds",
        "Time from the arrival of calls to their begin.",
        lambda t: t.waited_ns / NS_PER_S,
    ),
    ("function_argument_bytes", "Bytes of arguments.", lambda t: t.in_bytes),
    ("function_result_bytes", "Bytes of results.", lambda t: t.out_bytes),
)
#: Name, text, and field of a device in function_status.py.
_OF_HOSTS = (
    ("host_slots", "Calls that the host runs at a time.", "slots"),
    ("host_running_calls", "Slots of the host that have a call.", "running"),
    ("host_suspended_calls", "Calls on the host that have begun and hold no slot.", "suspended"),
)
#: Name, text, kind of action, and what its lane counted.
_OF_LANES: LaneTable = (
    (
        "host_busy_seconds",
        "Time that finished calls ran in the slots of the host.",
        int(ActionType.CALL),
        lambda lane: lane.exec_ns / NS_PER_S,
    ),
    (
        "host_cold_starts",
        "Functions that the host made ready.",
        int(ActionType.LOAD_WEIGHTS),
        lambda lane: lane.count,
    ),
    (
        "host_cold_start_seconds",
        "Time of making them ready.",
        int(ActionType.LOAD_WEIGHTS),
        lambda lane: lane.exec_ns / NS_PER_S,
    ),
)
#: The same of a function.
_OF_FUNCTIONS = (
    ("function_calls_queued", "Calls that wait for an action.", "queued"),
    ("function_ready", "Devices on which a call needs no cold start.", "ready_on"),
)


def function_families(
    scheduler: Scheduler, tally: Tally, seen: Set[tuple[int, int]]
) -> Iterator[Part]:
    """Every family, and none for a controller to which no worker offers a function or slots.

    `seen` are the hosts that were ever there, as (worker, device).
    """
    counted = tally.calls
    hosts = [gpu for worker in scheduler.cluster.present() for gpu in worker.gpus if gpu.host]
    functions = [m for m in list(scheduler.cluster.models.values()) if m.function is not None]
    if not (hosts or functions or counted.functions):
        return
    yield None
    tallies = counted.functions
    yield from family(
        CounterMetricFamily,
        "function_calls",
        "Calls that ended, by code.",
        ("function", "code"),
        (
            ((name, label(code)), n)
            for name, each in tallies.items()
            for code, n in sorted(each.by_code.items())
        ),
    )
    yield from table_families(
        CounterMetricFamily,
        ("function",),
        _COUNTED,
        [((function,), each) for function, each in tallies.items()],
    )
    reports: list[dict[str, object]] = []
    for at in range(0, len(functions), PART_STEPS):
        reports += function_reports(functions[at : at + PART_STEPS], {})
        yield None
    for name, text, key in _OF_FUNCTIONS:
        yield from family(
            GaugeMetricFamily,
            name,
            text,
            ("function",),
            (((str(each["name"]),), _number(each[key])) for each in reports),
        )
    yield from lane_families(_OF_LANES, tally.lanes, sorted(seen))
    for name, text, key in _OF_HOSTS:
        yield from family(
            GaugeMetricFamily,
            name,
            text,
            OF_GPU,
            ((gpu_labels(gpu), _number(slots_of(gpu)[key])) for gpu in hosts),
        )


def _number(value: object) -> float:
    assert isinstance(value, int)
    return float(value)
