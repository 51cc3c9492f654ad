"""Tables and figures of both experiments, from the records and the raw files of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slosched.errors import MissingPackage
from slosched.faasm.frame import Frame
from slosched.faasm.inference import claims
from slosched.faasm.inference.choices import ABOUT
from slosched.faasm.inference.measures import capacity_of
from slosched.faasm.inference.requests import read_outcomes
from slosched.units import NS_PER_MS

Record = Mapping[str, Any]

EMULATED = "container: its start is EMULATED (a sleep), and instances are processes of this host."
_UNITS = (
    "Latencies in ms from the intended time. p99_all counts what was not answered (timed out, refused, "
    "failed) as "
    "infinite. A rate counts answers within the run."
)


def show_latency(frame: Frame) -> None:
    """The tables of inference-latency, and the CDFs by system."""
    records = frame.records()
    frame.table("latency", [_row(each, ()) for each in records], note=f"{_UNITS} {EMULATED}")
    _show_shared(frame, records)
    panels = {
        system: {
            _load(each): each
            for each in records
            if each["system"] == system and each["loop"] == "closed"
        }
        for system in _systems(records)
    }
    _draw_cdfs(frame, "latency-cdf", panels, records)


def show_throughput(frame: Frame) -> None:
    """The tables of inference-throughput, medians against throughput, and the CDFs by rule."""
    records = frame.records()
    capacity = [each for each in records if each["loop"] == "capacity"]
    frame.table("capacity", [_capacity_row(each, capacity) for each in capacity], note=_CAPACITY)
    loads = [each for each in records if each["loop"] != "capacity"]
    frame.table(
        "load",
        [_row(each, ("fraction", "think_ms", "offered_per_s")) for each in loads],
        note=_UNITS,
    )
    _show_shared(frame, records)
    frame.table("throughput-claims", claims.claims(records), note=claims.WHY)
    _draw_throughput(frame, loads, records)
    open_ = [each for each in loads if each["loop"] == "open"]
    middle = _middle(
        sorted({float(each["fraction"]) for each in open_ if float(each["fraction"]) < 1})
    )
    panels: dict[str, dict[str, Record]] = {}
    for each in open_:
        if each["fraction"] == middle:
            panels.setdefault(f"{_load(each)}, at {middle:g} of its capacity", {})[
                each["system"]
            ] = each
    _draw_cdfs(frame, "throughput-cdf", panels, records)


_CAPACITY = (
    "capacity_per_s: a closed loop without think times, two requests for each instance. of_container: the "
    "same as a "
    f"multiple of what the container system has under the same rule. {EMULATED}"
)


def _show_shared(frame: Frame, records: Sequence[Record]) -> None:
    """What both say of warm requests beside cold ones, of refusals, of answers, and of the systems."""
    frame.table("warm-beside-cold", claims.warm_beside_cold(records), note=claims.WARM_NOTE)
    outcomes = {str(each["raw"]): read_outcomes(frame.raw(str(each["raw"]))) for each in records}
    frame.table("refusals", claims.refusals(records, outcomes), note=claims.REFUSALS_NOTE)
    frame.table("answers", claims.answers(records), note=claims.ANSWERS_NOTE)
    frame.table("systems", [{"system": each, "is": ABOUT[each]} for each in _systems(records)])


def _row(each: Record, more: Sequence[str]) -> dict[str, Any]:
    return {
        "system": each["system"],
        "loop": each["loop"],
        "cold": each["cold"],
        "rung": each["rung"],
        **{field: each.get(field) for field in more},
        "n": each["n"],
        "cold_ratio": each["cold_ratio"],
        "per_s": each["achieved_per_s"],
        "p50": each["p50_ms"],
        "p99": each["p99_ms"],
        "p99_all": infinite(each, "p99_all_ms"),
        "warm_p50": each["warm_p50_ms"],
        "warm_p99": each["warm_p99_ms"],
        "cold_p50": each["cold_p50_ms"],
        "cold_p99": each["cold_p99_ms"],
        "timeout": each["timeout"],
        "refused": each["refused"],
        "failed": each["failed"],
        "pss_mb": each["peak_pss_mb"],
        "cpu_s": each["cpu_s"],
        **_gpu(each),
    }


def _gpu(each: Record) -> dict[str, Any]:
    """Peak and bill of the GPU's memory, where there is one."""
    if "gpu_peak_mb" not in each:
        return {}
    return {"gpu_mb": each["gpu_peak_mb"], "gpu_gb_s": each["gpu_gb_s_integral"]}


def infinite(each: Record, field: str) -> float | None:
    """A percentile that counts unanswered requests: infinite where it falls on one."""
    value = each[field]
    return math.inf if value is None and each["n"] else value


def _capacity_row(each: Record, capacity: Sequence[Record]) -> dict[str, Any]:
    beside = [
        capacity_of(other)
        for other in capacity
        if other["system"] == "container" and other["cold"] == each["cold"]
    ]
    return {
        "system": each["system"],
        "cold": each["cold"],
        "rung": each["rung"],
        "instances": each["instances"],
        "capacity_per_s": capacity_of(each),
        "of_container": capacity_of(each) / beside[0] if beside and beside[0] else None,
        "p50": each["p50_ms"],
        "p99": each["p99_ms"],
        "pss_mb": each["peak_pss_mb"],
        "largest_process_mb": each["largest_pss_mb"],
        "cpu_s": each["cpu_s"],
        **_gpu(each),
    }


def _systems(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(str(each["system"]) for each in records))


def _load(each: Record) -> str:
    """How a panel or a line calls a rule."""
    return "all warm" if each["cold"] == "none" else f"cold {each['cold']}, {each['rung']}"


def _middle(values: Sequence[float]) -> float:
    return values[-1] if values else math.nan


# ---------------------------------------------------------------------------------------- figures


def _draw_cdfs(
    frame: Frame, name: str, panels: Mapping[str, Mapping[str, Record]], records: Sequence[Record]
) -> None:
    try:
        from slosched.analysis.faasm_inference import Cdf, draw_cdfs
    except MissingPackage as error:
        frame.say(f"no figures: {error}")
        return
    drawn = {
        title: {
            label: Cdf(
                [
                    outcome.latency_ns / NS_PER_MS
                    for outcome in read_outcomes(frame.raw(str(each["raw"])))
                    if outcome.status == "ok"
                ],
                int(each["n"]),
            )
            for label, each in lines.items()
            if each["n"]
        }
        for title, lines in panels.items()
    }
    drawn = {title: lines for title, lines in drawn.items() if lines}
    if drawn:
        draw_cdfs(drawn, frame.figure(name), note=_note(records))


def _draw_throughput(frame: Frame, loads: Sequence[Record], records: Sequence[Record]) -> None:
    try:
        from slosched.analysis.faasm_inference import draw_throughput
    except MissingPackage as error:
        frame.say(f"no figures: {error}")
        return
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for each in loads:
        if each["loop"] == "open" and each["p50_ms"] is not None:
            curve = panels.setdefault(_load(each), {}).setdefault(str(each["system"]), [])
            curve.append((each["offered_per_s"], each["achieved_per_s"], each["p50_ms"]))
    drawn = {
        title: {name: [(x, y) for _, x, y in sorted(curve)] for name, curve in curves.items()}
        for title, curves in panels.items()
    }
    if drawn:  # a run that was stopped, or whose systems answered nothing, may have none
        draw_throughput(drawn, frame.figure("throughput"), note=_note(records))


def _note(records: Sequence[Record]) -> str:
    first = records[0]
    instances = "1 instance" if first["instances"] == 1 else f"{first['instances']} instances"
    return (
        f"MobileNet v1 ({first['network']}, random weights) on {str(first['device']).upper()}, {instances}; "
        "container starts are EMULATED"
    )
