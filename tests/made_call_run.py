"""Logs of calls made of whole cloth, each number known: a tree of calls, and what each awaited.

All times are ms after the start of the run. `parent` asks for two children, awaits both, asks for a third after
the second part and awaits that; the second child fails.

    parent    0 runs 2, suspended until 9, runs 1, suspended until 14, runs 1, ends at 15
    child 0   asked at 1, begins at 2.5, runs 4, ends at 6.5
    child 1   asked at 2, begins at 6.5, ends at 9 with code 104
    child 2   asked at 3 of the run, begins at 11, runs 3, ends at 14
"""

from __future__ import annotations

from pathlib import Path

from slosched.core.scheduler.interface import CallPart, CallRecord
from slosched.telemetry import call_log, call_part_log

START_NS = 1_700_000_000_000_000_000
MS = 1_000_000


def a_call(key: int, arrival_ms: float, end_ms: float, **more: object) -> CallRecord:
    """A call of `f` that was refused, but for `more`: times of CallRecord are given in ms without `_ns`."""
    values: dict[str, object] = {
        "key": key,
        "request_id": 1,
        "user_id": 0,
        "function": "f",
        "arrival_ns": START_NS + round(arrival_ms * MS),
        "end_ns": START_NS + round(end_ms * MS),
        "code": 0,
    }
    for name, value in more.items():
        if name == "start":
            assert isinstance(value, int | float)
            values["start_ns"] = START_NS + round(value * MS)
        elif name in ("exec", "suspended", "asked_ran", "slo"):
            assert isinstance(value, int | float)
            values[f"{name}_ns"] = round(value * MS)
        else:
            values[name] = value
    return CallRecord(**values)  # type: ignore[arg-type]


def a_part(
    key: int, part: int, begin_ms: float, end_ms: float, awaits: tuple[int, ...] = ()
) -> CallPart:
    begin_ns, end_ns = (START_NS + round(at * MS) for at in (begin_ms, end_ms))
    return CallPart(key=key, part=part, begin_ns=begin_ns, end_ns=end_ns, awaits=awaits)


def family() -> tuple[list[CallRecord], list[CallPart]]:
    """The calls of the head of this file, in the order in which they end, and their parts."""
    on = {"worker_id": 0, "gpu_id": 0}
    calls = [
        a_call(
            2, 1.2, 6.5, parent=1, child=0, asked_ran=1, function="leaf", start=2.5, exec=4, **on
        ),
        a_call(
            3,
            2.1,
            9,
            parent=1,
            child=1,
            asked_ran=2,
            function="leaf",
            start=6.5,
            code=104,
            exec=2.5,
            **on,
        ),
        a_call(
            4, 10.1, 14, parent=1, child=2, asked_ran=3, function="last", start=11, exec=3, **on
        ),
        a_call(
            1,
            0,
            15,
            function="parent",
            start=0,
            exec=4,
            suspended=11,
            children=3,
            in_bytes=100,
            out_bytes=8,
            slo=20,
            **on,
        ),
    ]
    parts = [
        a_part(1, 0, 0, 2, (0, 1)),
        a_part(2, 0, 2.5, 6.5),
        a_part(1, 1, 9, 10, (2,)),
        a_part(4, 0, 11, 14),
        a_part(1, 2, 14, 15),
    ]
    return calls, parts


def write_calls(
    directory: Path, calls: list[CallRecord], parts: list[CallPart] | None = None
) -> None:
    """Write the two logs into `directory`."""
    (directory / call_log.FILE_NAME).write_bytes(
        call_log.HEADER.encode() + b"\n" + call_log.call_rows(calls) + b"\n" * bool(calls)
    )
    if parts is not None:
        (directory / call_part_log.FILE_NAME).write_bytes(
            call_part_log.HEADER.encode()
            + b"\n"
            + call_part_log.call_part_rows(parts)
            + b"\n" * bool(parts)
        )
