"""The ladder as a table, beside the published one, and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slosched.errors import MissingPackage
from slosched.faasm.frame import Frame

#: Table 3 of the paper, on one host (Xeon E5-2660, 32 GB), of a no-op.
PUBLISHED = (
    {"start": "Docker", "init_ms": 2800.0, "cpu_cycles": 251e6, "pss_mb": 1.3, "capacity": 8_000},
    {"start": "Faaslet", "init_ms": 5.2, "cpu_cycles": 1_400.0, "pss_mb": 0.2, "capacity": 70_000},
    {
        "start": "Proto-Faaslet",
        "init_ms": 0.5,
        "cpu_cycles": 650.0,
        "pss_mb": 0.09,
        "capacity": 100_000,
    },
)
#: What stands for what.
_BESIDE = {"Docker": "L4", "Faaslet": "L3", "Proto-Faaslet": "fork"}
_NOTE = (
    "ms: from the wish to the moment at which a picture (or nothing) can be answered; calls of slosched "
    "from the "
    "client and back, so that they include the answer, and wait for no fork where a process stands ready. "
    "cpu_ms: of "
    "the process that starts. pss_mb: what one more instance takes beside the others. fit: computed from "
    "that and "
    "from the memory that was available; the table fit has what was tried."
)
#: The kind of the records of what was tried.
FILL = "fill"
_FIT_NOTE = (
    "computed: memory that was available by what one more instance takes. held: instances that were there at "
    "the same time, and right of them those that answered rightly while all were asked (the network in float64 "
    "is the truth; a fork is held to its template's answer; a no-op has to answer). stopped_by: the bound "
    "(--fill), or memory, of which a tenth stays free. peak_pss_mb and gpu_gb_s: the bill of the trial."
)
_BESIDE_NOTE = (
    "The paper's rows are a no-op on another machine, in wasm and in Docker. Ours are processes of "
    "Python, which no "
    "rung makes as small as a Faaslet; what can be compared is the ratio between the rungs. Cycles were "
    "not read here: "
    "the CPU time stands for them. No container was started, so that Docker stands beside a new process."
)


def show(frame: Frame) -> None:
    """The tables and the figure, from the records alone."""
    tried = [each for each in frame.records() if each.get("kind") == FILL]
    records = [each for each in frame.records() if each.get("kind") != FILL]
    rows = [_row(each) for each in records]
    frame.table("coldstart", rows, note=_NOTE)
    frame.table("fit", fits(records, tried), note=_FIT_NOTE)
    frame.table("beside-table-3", _beside(records), note=_BESIDE_NOTE)
    try:
        from slosched.analysis.faasm_coldstart import Bar, draw_ladder
    except MissingPackage as error:
        frame.say(f"no figure: {error}")
        return
    bars = [
        Bar(
            group=str(each["what"]),
            name=_named(each),
            ms=float(each["ms"]),
            least_ms=float(each["least_ms"]),
            most_ms=float(each["most_ms"]),
        )
        for what in dict.fromkeys(str(each["what"]) for each in records)
        for each in records
        if each["what"] == what
    ]
    bars += [
        Bar(group="published, no-op", name=str(each["start"]), ms=float(str(each["init_ms"])))
        for each in PUBLISHED
    ]
    draw_ladder(bars, frame.figure("coldstart"), device=str(records[0]["device"]))


def _named(each: Mapping[str, Any]) -> str:
    rung, start = str(each["rung"]), str(each["start"])
    return start if start.startswith(rung) else f"{rung}  {start}"


def _row(each: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("what", "rung", "start", "n", "ms", "least_ms", "most_ms", "cpu_ms")
    parts = ("import_ms", "load_ms", "pss_mb", "rss_mb", "gpu_mb", "fit")
    return {field: each.get(field) for field in (*fields, *parts)}


def fits(records: list[dict[str, Any]], tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was computed beside what was tried."""
    computed = {
        (each["what"], each["rung"], each["start"]): each.get("fit")
        for each in records
        if each.get("fit") is not None
    }
    more = ("most", "held", "right", "stopped_by", "start_s", "pss_mb", "gpu_mb", "peak_pss_mb")
    return [
        {
            "what": each["what"],
            "rung": each["rung"],
            "start": each["start"],
            "computed": computed.get((each["what"], each["rung"], each["start"])),
            **{name: each.get(name) for name in more},
            "gpu_gb_s": each.get("gpu_gb_s_integral"),
        }
        for each in tried
    ]


def _beside(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each published row, and the rung that stands for it."""
    rows: list[dict[str, Any]] = []
    for each in PUBLISHED:
        rung = _BESIDE[str(each["start"])]
        mine = [
            record
            for record in records
            if record["rung"] == rung and not str(record["start"]).startswith("call")
        ]
        rows += [_beside_row(each, record) for record in mine or [{}]]
    return rows


def _beside_row(each: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "published": each["start"],
        "init_ms": each["init_ms"],
        "cycles": each["cpu_cycles"],
        "its_pss_mb": each["pss_mb"],
        "capacity": each["capacity"],
        "here": f"{record['what']}, {record['start']}" if record else None,
        "ms": record.get("ms"),
        "cpu_ms": record.get("cpu_ms"),
        "pss_mb": record.get("pss_mb"),
        "fit": record.get("fit"),
    }
