"""faasm.md: the page of faasm.py's results, ratios first. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from faasm_parts import PARTS
from faasm_ratios import (
    MATRICES,
    Parts,
    Record,
    Records,
    milliseconds,
    moved_mb,
    number,
    products_of,
    ratios,
    records_of,
    sgd_runs,
    times,
)

from slosched.faasm.names import REPLACED

RESULTS = Path(__file__).resolve().parent.parent / "results" / "faasm.json"
PAGE = Path(__file__).resolve().parent / "faasm.md"
_HEAD = (
    "# Faasm's experiments on a GPU\n\n"
    "Written by [faasm.py](faasm.py). Networks have **random weights** and matrices random values; every "
    "answer and every product below was compared with the same in float64 on the CPU. " + REPLACED
)

Rows = Iterable[Sequence[str]]


def page(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    found: Parts = document["parts"]
    parts = {name: found[name] for name in dict.fromkeys([*PARTS, *found]) if name in found}
    about = dict.fromkeys(str(each["about"]) for each in parts.values())
    lines = [_HEAD, "", *(f"*{each}*" for each in about)]
    lines += _table(("ratio", "found", "of"), ratios(parts))
    lines += _coldstart(records_of(parts, "coldstart"))
    lines += _matrices(parts)
    lines += _inference("Latency at low load", records_of(parts, "latency"))
    lines += _inference("Throughput", records_of(parts, "throughput"))
    lines += _sgd(records_of(parts, "sgd"))
    lines += _parts(parts)
    missing = dict(document["left_out"])
    missing |= {name: each["why"] for name, each in parts.items() if not each["complete"]}
    if missing:
        lines += ["", "## Not measured", "", *(f"- {key}: {why}" for key, why in missing.items())]
    return "\n".join(lines) + "\n"


def _table(headings: Sequence[str], rows: Rows) -> list[str]:
    made = [f"| {' | '.join(row)} |" for row in rows]
    if not made:
        return []
    return ["", f"| {' | '.join(headings)} |", f"| :-- |{' --: |' * (len(headings) - 1)}", *made]


# ----------------------------------------------------------------------------------------- sections


def _coldstart(records: Records) -> list[str]:
    ladder = [each for each in records if each.get("kind") != "fill"]
    tried = [each for each in records if each.get("kind") == "fill"]
    if not records:
        return []
    lines = ["", "## The ladder of cold starts"]
    lines += _table(
        (
            "start",
            "rung",
            "ms",
            "least",
            "most",
            "CPU ms",
            "PSS MB",
            "RSS MB",
            "GPU MB",
            "fit, computed",
        ),
        (
            [
                *(f"{each['what']}: {each['start']}", str(each["rung"])),
                *(
                    number(each.get(name))
                    for name in (
                        "ms",
                        "least_ms",
                        "most_ms",
                        "cpu_ms",
                        "pss_mb",
                        "rss_mb",
                        "gpu_mb",
                        "fit",
                    )
                ),
            ]
            for each in ladder
        ),
    )
    lines += _table(
        (
            "tried",
            "at most",
            "held",
            "right",
            "stopped by",
            "start s",
            "PSS MB",
            "GPU MB",
            "GPU GB-s",
        ),
        (
            [
                f"{each['what']}: {each['start']}",
                *(number(each[name]) for name in ("most", "held", "right")),
                str(each["stopped_by"]),
                *(
                    number(each.get(name))
                    for name in ("start_s", "pss_mb", "gpu_mb", "gpu_gb_s_integral")
                ),
            ]
            for each in tried
        ),
    )
    return [
        *lines,
        "",
        "PSS, RSS and GPU memory: of one more instance in the first table, of all in the second.",
    ]


def _matrices(parts: Parts) -> list[str]:
    rows = []
    for name in MATRICES:
        found = products_of(records_of(parts, name))
        for (system, size, splits), records in sorted(
            found.items(), key=lambda item: (item[0][1], item[0][2])
        ):
            whole = milliseconds(found.get(("whole", size, 0)))
            first = records[0]
            rows.append(
                [
                    f"{name.partition('-')[2].partition('-')[0]} {system}"
                    if "16384" not in name
                    else f"torch {system}",
                    *(
                        number(size),
                        number(splits),
                        number(milliseconds(records)),
                        times(milliseconds(records), whole),
                    ),
                    number(median(each["device_copy_ns"] for each in records) / 1e6),
                    f"{max(each['error'] for each in records):.1e}",
                    f"{first['tolerance']:.1e}",
                    *(
                        number(first.get(field))
                        for field in ("peak_pss_mb", "gpu_peak_mb", "gpu_gb_s_integral")
                    ),
                ]
            )
    if not rows:
        return []
    note = (
        "TF32 is off. whole: one A @ B in one process. local: the calls inline. slots: merges in 8 slots of "
        "the host, leaves on the GPU's lane, one at a time. GPU GB-s: the bill of all repeats of a cell, with "
        "their starts."
    )
    heads = (
        "kernel, system",
        "rows",
        "splits",
        "ms",
        "to whole",
        "copies ms",
        "error",
        "tolerance",
        "PSS MB",
        "GPU MB",
        "GPU GB-s",
    )
    return ["", "## Matrices", *_table(heads, rows), "", note]


def _inference(title: str, records: Records) -> list[str]:
    rows = [
        [
            f"{each['system']}, {each['loop']}{_at(each)}",
            *(
                str(each["cold"]),
                str(each["rung"]),
                number(each["n"]),
                number(each["achieved_per_s"]),
            ),
            *(
                number(each[name])
                for name in ("warm_p50_ms", "warm_p99_ms", "cold_p50_ms", "cold_p99_ms")
            ),
            *(number(each[name]) for name in ("refused", "timeout")),
            number(each.get("wrong")),
            *(number(each.get(name)) for name in ("gpu_peak_mb", "gpu_gb_s_integral")),
        ]
        for each in records
    ]
    if not rows:
        return []
    heads = (
        "system, load",
        "cold",
        "rung",
        "n",
        "per s",
        "warm p50",
        "p99",
        "cold p50",
        "p99",
        "refused",
        "late",
        "wrong",
        "GPU MB",
        "GPU GB-s",
    )
    by = sorted({str(each["gpu_by"]) for each in records if "gpu_by" in each})
    note = f"GPU memory is told by {' and '.join(by)}. " if by else ""
    first = records[0]
    note += (
        f"MobileNet v1 ({first['network']}), {first['instances']} instance(s) of each system. slosched "
        "runs calls on a GPU's lane one at a time; the other systems' processes share the GPU as the driver "
        "lets them. Latencies in ms."
    )
    return ["", f"## {title}", *_table(heads, rows), "", note]


def _at(each: Record) -> str:
    if each.get("fraction") is not None:
        return f" at {each['fraction']:g}"
    return (
        f", think {each['think_ms']:g} ms"
        if each.get("think_ms") and each["loop"] == "closed"
        else ""
    )


def _sgd(records: Records) -> list[str]:
    runs = sgd_runs(records)
    if not runs:
        return []
    heads = (
        "system",
        "workers",
        "train s",
        "target s",
        "loss",
        "MB moved",
        "peak PSS MB",
        "GB-s paper",
        "GB-s integral",
        "CPU s",
    )
    rows = [
        [
            system,
            str(workers),
            *(
                number(each["train_s"]),
                number(each["target_s"]),
                format(each["loss"], ".4f"),
                number(moved_mb(each)),
            ),
            *(
                number(each.get(name))
                for name in ("peak_pss_mb", "gb_s_instances", "gb_s_integral", "cpu_s")
            ),
        ]
        for (system, workers), each in runs.items()
    ]
    epochs = max((int(each.get("epochs") or 0) for each in runs.values()), default=0)
    note = (
        f"{epochs} epochs, one seed; no GPU. shared: one copy of the state for the host; copies: one for each "
        "instance, as the paper's containers have. The paper: 2x speed, 10x less memory, 70 % less network."
    )
    left = [f"- {each['key']}: {each['why']}" for each in records if each.get("why")]
    return [
        "",
        "## sgd on the host's cores",
        *_table(heads, rows),
        "",
        note,
        *(["", *left] if left else []),
    ]


def _parts(parts: Parts) -> list[str]:
    def memory(value: int | None) -> str:
        return "-" if value is None else f"{value / 1e6:,.0f}"

    rows = [
        [
            f"`{each['command']}`",
            f"{each['seconds']:.0f}",
            "complete" if each["complete"] else "not complete",
            memory(each["gpu_before_bytes"]),
            memory(each["gpu_after_bytes"]),
            {True: "yes", False: "NO", None: "-"}[each["gpu_equal"]],
        ]
        for each in parts.values()
    ]
    heads = ("command", "s", "end", "GPU MB before", "after", "given back")
    return ["", "## What ran", *_table(heads, rows)]
