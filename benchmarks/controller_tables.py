"""The tables of controller.md, made from the results and never typed.

A void window counts in no figure; how many there were is told. Shares are rounded down, costs up, so that
no rounding meets a target. A figure that misses what is asked for is printed in bold with "missed".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from targets import ORIGINAL

HERE = Path(__file__).resolve().parent
PAGE = HERE / "controller.md"

Window = dict[str, Any]

#: GPUs and requests/s: satisfied, controller cores and CPU us a request of Clockwork's C++ controller, measured
#: on such a machine; what ours must have in time; and, if not None, the cores that it may take.
RATE_CELLS: dict[tuple[int, int], tuple[float, float, float, float, float | None]] = {
    (6, 600): (0.997, 0.67, 1121.0, 0.995, 0.15),
    (6, 2400): (0.976, 0.78, 326.0, 0.995, None),
    (6, 4800): (0.998, 0.82, 172.0, 0.995, None),
    (12, 9600): (0.992, 0.96, 101.0, 0.995, None),
    (24, 19200): (0.975, 1.00, 53.0, 0.98, None),
}
TIGHT_RATES = (600, 1200, 2400)
TIGHT_STEPS = 5
#: SLO and rate of one GPU -> the least share in time.
SINGLE_RATES: dict[tuple[str, int], float] = {
    ("15ms", 520): 0.99,
    ("25ms", 790): 0.99,
    ("100ms", 1000): 0.99,
    ("25ms", 1200): 0.70,
}
OVERLOAD_RATES = (800, 1000, 1200, 2000, 5000, 10190)
#: An SLO that a running batch often makes impossible, so that many are refused as they come.
REFUSED_AT_ONCE = ("10ms", 10190)
_LATE = 0.01
_GOODPUT_HELD = 0.95
_REFUSAL_MS = 2.0


def clean_of(windows: list[Window]) -> list[Window]:
    """The windows that count; all of them if none does, which `_counts` then says."""
    return [w for w in windows if not w["void"]] or windows


def _counts(windows: list[Window]) -> str:
    void = sum(bool(w["void"]) for w in windows)
    note = "" if void < len(windows) else ", all disturbed"
    return f"{len(windows) - void}" + (f" ({void} void{note})" if void else "")


def _share(value: float) -> str:
    return f"{math.floor(value * 10_000 + 1e-9) / 10_000:.4f}"


def _held(text: str, met: bool) -> str:
    return text if met else f"**{text} missed**"


def rate(record: dict[str, Any]) -> str:
    lines = [
        "| GPUs, R | in time, client (original; asked) | CPU us/request (original; ratio) "
        "| cores: controller (original), client, worker | issue delay p50 / p99 ms "
        "| stalled, worst ms | windows |",
        "|---|---|---|---|---|---|---|",
    ]
    for (gpus, requests), (share, cores, cpu_us, asked, most) in RATE_CELLS.items():
        found = [w for w in record["windows"] if (w["gpus"], w["rate"]) == (gpus, requests)]
        if not found:
            continue
        clean = clean_of(found)
        in_time = median(w["in_time"] / w["sent"] for w in clean)
        ours_us = median(1e6 * w["cpu_s"]["controller"] / w["sent"] for w in clean)
        used = {
            name: median(w["cpu_s"][name] / w["duration_s"] for w in clean)
            for name in ("controller", "client", "worker")
        }
        delays = " / ".join(
            f"{median(w[f'issue_delay_{p}_ns'] for w in clean) / 1e6:.2f}" for p in ("p50", "p99")
        )
        stall = max(w["disturbance"]["longest_stall_ns"] for w in clean) / 1e6
        ours = _held(f"{used['controller']:.2f}", most is None or used["controller"] <= most)
        limit = "" if most is None else f"; at most {most}"
        lines.append(
            f"| {gpus}, {requests:,} | {_held(_share(in_time), in_time >= asked)} ({share}; {asked}) "
            f"| {_held(f'{ours_us:.0f}', ours_us < cpu_us)} ({cpu_us:.0f}; {ours_us / cpu_us:.2f}) "
            f"| {ours} ({cores}{limit}), {used['client']:.2f}, {used['worker']:.2f} | {delays} "
            f"| {stall:.1f} | {_counts(found)} |"
        )
    return "\n".join(lines)


def tight(record: dict[str, Any]) -> str:
    lines = [
        "| R | SLO | met, controller: median (least to most) | C++ original | in time, client | windows |",
        "|---|---|---|---|---|---|",
    ]
    for requests in TIGHT_RATES:
        for slo, original in ORIGINAL[requests].items():
            found = [w for w in record["windows"] if (w["rate"], w["slo"]) == (requests, slo)]
            if not found:
                continue
            clean = clean_of(found)
            met = sorted(w["met"] / w["sent"] for w in clean)
            middle = median(met)
            asked = original if original < 0.99 else original - 0.005
            good = middle > asked if original < 0.99 else middle >= asked
            lines.append(
                f"| {requests:,} | {slo} | {_held(_share(middle), good)} ({_share(met[0])} to "
                f"{_share(met[-1])}) | {original} | {_share(median(w['in_time'] / w['sent'] for w in clean))} "
                f"| {_counts(found)} |"
            )
    return "\n".join(lines)


def single(record: dict[str, Any]) -> str:
    lines = [
        "| R | SLO | in time, client: median (asked) | answered late | p50 / p99 ms | windows |",
        "|---|---|---|---|---|---|",
    ]
    for (slo, requests), asked in SINGLE_RATES.items():
        found = [w for w in record["windows"] if (w["slo"], w["rate"]) == (slo, requests)]
        if not found:
            continue
        clean = clean_of(found)
        in_time = median(w["in_time"] / w["sent"] for w in clean)
        late = median(w["late"] / w["sent"] for w in clean)
        latency = " / ".join(
            f"{median(w[f'latency_{p}_ns'] for w in clean) / 1e6:.2f}" for p in ("p50", "p99")
        )
        lines.append(
            f"| {requests:,} | {slo} | {_held(_share(in_time), in_time >= asked)} ({asked}) "
            f"| {_held(f'{late:.4f}', late <= _LATE)} | {latency} | {_counts(found)} |"
        )
    return "\n".join(lines)


def overload(record: dict[str, Any]) -> str:
    rows = {
        requests: [w for w in record["windows"] if (w["slo"], w["rate"]) == ("100ms", requests)]
        for requests in OVERLOAD_RATES
    }
    at_once = [w for w in record["windows"] if (w["slo"], w["rate"]) == REFUSED_AT_ONCE]
    goodput = {
        requests: median(w["in_time"] / w["duration_s"] for w in clean_of(found))
        for requests, found in rows.items()
        if found
    }
    peak = max(goodput.values())
    lines = [
        "| R | goodput, client, requests/s (of peak) | given up: left of the SLO at the answer, ms, p50 "
        "(1 % less than) | controller cores, CPU us/request | issue delay p99 ms | windows |",
        "|---|---|---|---|---|---|",
    ]
    for requests, good in goodput.items():
        found = rows[requests]
        clean = clean_of(found)
        held = good >= _GOODPUT_HELD * peak or requests < 1_000
        p50, p1 = (median(w[f"given_up_left_{p}_ns"] for w in clean) / 1e6 for p in ("p50", "p1"))
        given_up = f"{p50:.2f} ({p1:.2f})" if p50 else "none"
        cores = median(w["cpu_s"]["controller"] / w["duration_s"] for w in clean)
        cpu_us = median(1e6 * w["cpu_s"]["controller"] / w["sent"] for w in clean)
        delay = median(w["issue_delay_p99_ns"] for w in clean) / 1e6
        lines.append(
            f"| {requests:,} | {_held(f'{good:.0f} ({good / peak:.3f})', held)} | {given_up} "
            f"| {cores:.2f}, {cpu_us:.0f} | {delay:.2f} | {_counts(found)} |"
        )
    if at_once:
        lines += ["", _refused(at_once)]
    return "\n".join(lines)


def _refused(found: list[Window]) -> str:
    clean = clean_of(found)
    p50, p99 = (median(w[f"refusal_{p}_ns"] for w in clean) / 1e6 for p in ("p50", "p99"))
    share = median(w["codes"].get("8", 0) / w["sent"] for w in clean)
    slo, requests = REFUSED_AT_ONCE
    return (
        f"At {requests:,}/s with an SLO of {slo} {share:.0%} are refused as they come, and answered "
        f"{_held(f'{p50:.2f} / {p99:.2f} ms', p99 < _REFUSAL_MS)} (p50 / p99) after their send. Windows: "
        f"{_counts(found)}."
    )


def memory(record: dict[str, Any]) -> str:
    instance = (record["instances_bytes"] - record["before_bytes"]) / record["instances"]
    request = (record["queued_bytes"] - record["instances_bytes"]) / record["queued"]
    mib = {
        name: record[f"{name}_bytes"] / 2**20 for name in ("before", "instances", "queued", "after")
    }
    return (
        f"An idle instance takes {instance:,.0f} bytes of the controller ({record['instances']:,} of them: "
        f"{mib['before']:.1f} to {mib['instances']:.1f} MiB), a queued request {request:,.0f} "
        f"({record['queued']:,} of them: to {mib['queued']:.1f} MiB). When their client has left: "
        f"{mib['after']:.1f} MiB.\n\nUnder ten times the capacity of its GPU "
        f"({record['overload_rate']:,} requests/s, SLO 100 ms) it is "
        f"{record['overload_first_bytes'] / 2**20:.1f} MiB after a quarter of {record['overload_s']:.0f} s, "
        f"{record['overload_last_bytes'] / 2**20:.1f} MiB at their end, at most "
        f"{record['overload_most_bytes'] / 2**20:.1f}."
    )


def floor(record: dict[str, Any]) -> str:
    return (
        f"At {record['rate']} requests/s it takes {record['cores']:.2f} cores, {record['cpu_us']:.0f} us a "
        f"request ({record['requests']:,} requests)."
    )


_HEADS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "rate": (
        "Requests a second",
        "SLO 100 times the model's own time, 12 copies of ResNet-50. Medians of the windows.",
        rate,
    ),
    "floor": (
        "The floor",
        "A process in the controller's place that passes each message on and decides nothing, on the same "
        "sockets and event loop ([controller_floor.py](controller_floor.py)).",
        floor,
    ),
    "tight": (
        "Tight SLOs",
        "Six GPUs, 12 copies, repeats interleaved. Asked: ahead of the original where that is below 0.99, "
        "within 0.005 elsewhere, as the controller counts.",
        tight,
    ),
    "single": (
        "One GPU, one model",
        "Capacity 1,019 requests/s, profile v100-linear: batches of any size, as on the device that the rates "
        "asked for were found on.",
        single,
    ),
    "single-padded": (
        "One GPU, one model, padded batches",
        "The same on profile v100, whose batches are padded to 1, 2, 4, 8 or 16. `slosched max-rate INFER5 "
        "resnet50_v2 --slo 15ms --gpus 1` tells for either profile what holds in virtual time.",
        single,
    ),
    "overload": (
        "Overload",
        "One GPU, one model, SLO 100 ms. Asked: from capacity on at least 95 % of the highest goodput, and "
        "99 % of refusals within 2 ms.",
        overload,
    ),
    "memory": ("Memory", "Resident memory of the controller's process.", memory),
}


def render(name: str, record: dict[str, Any]) -> str:
    return _HEADS[name][2](record)


def write(results: Path) -> None:
    """Make controller.md from the results."""
    parts = json.loads(results.read_text(encoding="utf-8"))["parts"]
    text = [
        "# The controller's speed",
        "",
        "Made by [controller.py](controller.py) from [results/controller.json](results/controller.json). All "
        "processes on one machine, emulated GPUs of profile v100, no inputs, `schedule_ahead` 5 ms; *in time* "
        "counts from the scheduled send of a request, *met* from its arrival at the controller. The figures of "
        "the C++ original are of Clockwork's published code on such a machine. How windows are watched and "
        "voided: [README.md](README.md).",
    ]
    for name, (title, what, make) in _HEADS.items():
        if name not in parts:
            continue
        record = parts[name]
        machine, versions = record["machine"], record["versions"]
        text += [
            "",
            f"## {title}",
            "",
            what,
            "",
            make(record),
            "",
            f"{record['ran_at'][:10]}, commit {versions['commit']}, {machine['cpu_model']}, "
            f"{machine['cpu_usable']} cores, {machine['platform']}, Python {machine['python']}, "
            f"pyzmq {versions['pyzmq']}, uvloop {versions['uvloop']}, msgspec {versions['msgspec']}.",
        ]
    PAGE.write_text("\n".join(text) + "\n", encoding="utf-8")
