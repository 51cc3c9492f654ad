"""exact_time.md from exact_time.json: each target with what was measured, and the tables behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import table

HERE = Path(__file__).resolve().parent
#: What is committed.
RESULTS = HERE.parent / "results" / "exact_time.json"
PAGE = HERE / "exact_time.md"
FORMAT = 1
_PEERS = {"peer_slosched": "slosched", "peer_asyncio": "asyncio, eager", "peer_mosec": "mosec"}


class BadResults(Exception):
    """A file of results is none, or another version's."""


def read_results(path: Path) -> dict[str, Any]:
    """The document at `path`. Raises BadResults."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise BadResults(f"{path}: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadResults(f"{path} has not format {FORMAT}; run exact_time.py")
    return document


def verdict(check: Mapping[str, Any]) -> str:
    """met, **missed**, n/a without a value, or "" without a bound."""
    value, bound = check["value"], check["bound"]
    if not bound:
        return ""
    if value is None:
        return "n/a"
    sign, _, limit = bound.partition(" ")
    holds = {
        "<": value < float(limit),
        "<=": value <= float(limit),
        ">": value > float(limit),
        ">=": value >= float(limit),
    }[sign]
    return "met" if holds else "**missed**"


def number(value: float | None) -> str:
    """Four significant digits, and never rounded over a bound by more than the last of them."""
    if value is None:
        return "n/a"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _with_unit(text: str, unit: str) -> str:
    return f"{text} {unit}".strip() if text != "n/a" else text


def targets(document: Mapping[str, Any]) -> str:
    """Every check of every row. A row that failed or did not fit says so."""
    lines = []
    for name, row in document["rows"].items():
        disturbed = "; ".join(row.get("void", ()))
        # What holds for the whole row stands beside its first line.
        beside = [(name, disturbed)] + [("", "")] * len(row["checks"])
        lines += [
            (
                check["what"],
                _with_unit(check["bound"], check["unit"]) if check["bound"] else "",
                _with_unit(number(check["value"]), check["unit"]),
                verdict(check),
                *words,
            )
            for check, words in zip(row["checks"], beside, strict=False)
        ]
    for kind in ("failed", "skipped"):
        lines += [
            (f"row {name}", "", kind, "**not measured**", name, _one_line(text))
            for name, text in document[kind].items()
        ]
    heads = ("quantity", "target", "measured", "verdict", "row", "the machine meanwhile")
    return table(heads, lines)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")[:300]


def profile(document: Mapping[str, Any]) -> str:
    """Batch sizes: the worker's profile, alone, back to back, and plain graphs."""
    row = document["rows"].get("profile")
    if row is None:
        return ""
    figures = row["figures"]
    graphs = document["rows"].get("graphs", {}).get("figures", {}).get("back_to_back_ns", {})
    (model,) = figures["profile"]["models"].values()
    lines = []
    for size, ns in model["exec_ns"].items():
        alone = figures["exec_alone_ns"].get(size, {})
        queued, plain = figures["back_to_back_ns"].get(size), graphs.get(size)
        lines.append(
            (
                size,
                ms(ns),
                ms(alone.get("p50")),
                ms(alone.get("p99")),
                ms(queued),
                ms(plain),
                "n/a" if not queued else number(int(size) * 1e9 / queued),
            )
        )
    heads = (
        "batch",
        "profile ms",
        "alone p50",
        "alone p99",
        "back to back through the worker",
        "plain graph back to back",
        "images/s through the worker",
    )
    return table(heads, lines)


def ms(ns: float | None) -> str:
    return "n/a" if ns is None else f"{ns / 1e6:.3f}"


def sweep(document: Mapping[str, Any]) -> str:
    """slo-exp-1 step by step."""
    row = document["rows"].get("slo_exp_1")
    if row is None:
        return ""
    lines = [
        (
            rate,
            step["slo"],
            f"{100 * step['live']:.2f}",
            f"{100 * step['simulated']:.2f}",
            f"{step['points']:+.2f}",
            step["rule"],
            "met" if step["holds"] else "**missed**",
            f"{100 * step['live_controller']:.2f}",
            str(step["sent"]),
            ms(step["issue_delay_p99_ns"]),
        )
        for rate, found in row["figures"].items()
        for step in found["steps"]
    ]
    heads = (
        "R",
        "SLO",
        "in time, live %",
        "simulated %",
        "points",
        "rule",
        "verdict",
        "met, controller %",
        "sent",
        "issue delay p99 ms",
    )
    return table(heads, lines)


def peers(document: Mapping[str, Any]) -> str:
    """Satisfaction by rate and SLO of the three servers, and their latencies."""
    found = {
        words: {(c["meant_rate"], c["meant_slo_ms"]): c for c in row["figures"]["cells"]}
        for name, words in _PEERS.items()
        if (row := document["rows"].get(name)) is not None
    }
    if not found:
        return ""
    places = sorted({place for cells in found.values() for place in cells})
    lines = []
    for rate, slo in places:
        line = [f"{rate:g}", f"{slo:g}"]
        for cells in found.values():
            cell = cells.get((rate, slo))
            share = None if cell is None else cell["satisfaction"]
            line.append("n/a" if share is None else f"{100 * share:.2f}")
        for cells in found.values():
            cell = cells.get((rate, slo)) or {}
            p50, p99 = cell.get("latency_p50_ns"), cell.get("latency_p99_ns")
            line.append(f"{ms(p50)} / {ms(p99)}")
        lines.append(line)
    heads = [
        "R",
        "SLO ms",
        *(f"{words}: in time %" for words in found),
        *(f"{words}: p50 / p99 ms" for words in found),
    ]
    return table(heads, lines)


def origin(document: Mapping[str, Any], *, awake_where: str = "where everything runs") -> str:
    """What was measured on, in one paragraph."""
    gpu, host, versions = document["gpu"], document["machine"], document["versions"]
    what = gpu.get("name") or f"device {document['settings']['device']}"
    driver = f", driver {gpu['driver_version']}" if gpu.get("driver_version") else ""
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    meter = document.get("meter") or {}
    awake = document.get("awake_cpus") or []
    held = f" `slosched awake` on {len(awake)} CPUs, {awake_where}." if awake else ""
    scale = document["settings"]["scale"]
    dry = "" if scale == 1 else f" **A dry run at scale {scale:g}: its figures mean nothing.**"
    return (
        f"*{document['ran_at'][:10]}, {what}{driver}; {libraries}; {host['cpu_model']}, "
        f"{host['cpu_usable']} cores, {host['platform']}, Python {host['python']}. Stall meter: "
        f"{meter.get('priority', 'none')}, {len(meter.get('cpus', ()))} CPUs.{held} "
        f"{document['seconds']:.0f} s in all.*{dry}"
    )


def notes_of(document: Mapping[str, Any]) -> list[str]:
    """What else a reader should know of the rows: other commits, missing options, clocks."""
    notes = []
    missing = document.get("options_not_offered")
    if missing:
        notes.append(f"**The worker did not offer `{' '.join(missing)}`; measured without.**")
    commits: dict[str, list[str]] = {}
    for name, row in document["rows"].items():
        commits.setdefault(row.get("commit", "unknown"), []).append(name)
    if len(commits) > 1:
        parts = [f"{commit}: {', '.join(names)}" for commit, names in commits.items()]
        notes.append(f"The rows were measured at different commits ({'; '.join(parts)}).")
    gpu = document["rows"].get("lateness", {}).get("figures", {}).get("gpu")
    if gpu:
        notes.append(
            f"During the row lateness the driver said: SM clock {gpu['sm_clock_mhz']['p50']:.0f} MHz, "
            f"{gpu['power_mw']['p50'] / 1000:.0f} W, {gpu['temperature_c']['max']:.0f} degrees at most, "
            f"throttle reasons {', '.join(f'{mask:#x}' for mask in gpu['throttle_reasons'])}."
        )
    clocks = document["rows"].get("prediction", {}).get("figures", {}).get("gpu_clock_mhz")
    if clocks and clocks["greatest"]:
        notes.append(
            f"GPU clock during the row prediction: {clocks['least']} to {clocks['greatest']} MHz, "
            f"median {clocks['median']}."
        )
    return notes


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    parts = [
        "# Exact time on a GPU",
        "",
        "Written by [exact_time.py](exact_time.py) from [its results](../results/exact_time.json), as found. "
        "Completion is `expected_exec_complete` against `worker_exec_complete` of the action log; in time is "
        "the client's judgement, from the scheduled send.",
        "",
        targets(document),
        "",
        origin(document),
    ]
    for note in notes_of(document):
        parts += ["", note]
    for heading, text in (
        ("The model, by batch size", profile(document)),
        ("slo-exp-1 on one GPU, live and simulated", sweep(document)),
        ("Beside two other servers: open loop, one model, no inputs", peers(document)),
    ):
        if text:
            parts += ["", f"## {heading}", "", text]
    return "\n".join(parts) + "\n"
