"""several_gpus.md from several_gpus.json: what is measured, how to run it, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exact_table import ms, notes_of, number, origin, targets
from tables import table

HERE = Path(__file__).resolve().parent
#: What is committed.
RESULTS = HERE.parent / "results" / "several_gpus.json"
PAGE = HERE / "several_gpus.md"

_ABOUT = """\
# Figure 7 on several GPUs of one host

    benchmarks/gpu/several_gpus.sh OUT                    # every GPU of the host: 1, 2, 4 or 6 of them
    benchmarks/gpu/several_gpus.sh OUT --gpus 1           # the first one alone
    benchmarks/gpu/several_gpus.sh OUT --rows profile,n12_r2400_scaled,simulated
    benchmarks/gpu/several_gpus.sh OUT --resume FILE      # go on where the run of that several_gpus.json ended
    benchmarks/gpu/several_gpus.sh OUT --emulated 2 --scale 0.1    # a dry run, without a GPU

A run takes nine minutes at most (`--budget-s`). It writes each row as soon as it is measured, and measures no
row that is there already, so that a second run adds what did not fit. OUT gets five files: `several_gpus.json`,
`.md` (this page), `.log` and `.profile.toml`, and `logs.tgz`. Simulations that did not end in time can follow
anywhere, without a GPU: `several_gpus.py --simulate OUT/several_gpus.json`.

Each GPU has a worker process (`slosched worker --device cuda:I`) with CPUs of its own; so have the controller
and the client. Everything else (the benchmark, the right answers, simulations) stays on the remaining CPUs.

- `profile`: exec and load times of ResNet-50 on GPU 0, which the simulator takes.
- `lateness`: how late 5,000 planned inferences start on each GPU, on all at once, each 85 % busy.
- `loads`: loads of weights over PCIe: each GPU alone, then 2, 4 and all at once. The profile takes what a load
  takes while all GPUs load.
- `nN_rR`: slo-exp-1 with N copies at R requests/s, 5 s a step. `scaled`: R is for six V100s, and is sent times
  GPUs / 6 and times the ratio of batch-1 speeds. `inputs`: each request brings its input.
  `n12_r2400_scaled` has ten steps, from 1.5 to 58 times batch 1; the others have four, from 3.4 to 39 times.
- `kill`: 12 copies at R = 1,200 scaled, SLO 100 ms; after 4 s the process of the last GPU's worker is killed
  (SIGKILL). The simulator crashes the same worker for as long as the real one served nothing.
- `cold`: 3,000 instances, Zipf popularity with exponent 0.9, 300 requests/s for each GPU, SLO 100 ms.
- `answers`: all answers of a mixed load of six models compared with a direct forward pass, as in
  [exact_time.md](exact_time.md); it runs last, where time is left.
- `simulated`: each run beside the simulator with this run's profile, noise and delays. A step holds with
  99.9 % in time where the simulator says 99.95 % or more; elsewhere within 2 points of it, from 3.4 times
  batch 1 up.

Beside each live run a second client sends 0.5 % of the rate (at least 5 requests/s) with inputs whose right
answers are known, from a direct forward pass in float32 on the CPU, and compares every answer. The simulations
leave these requests out. Answers of emulated GPUs are known as well: they begin as the inputs do.
"""


def page(document: Mapping[str, Any] | None) -> str:
    """The whole page; without results, what will be measured."""
    if document is None:
        return _ABOUT + "\nNothing has been measured yet.\n"
    parts = [_ABOUT, "## What was found", "", targets(document), ""]
    parts.append(origin(document, awake_where="those that serve"))
    parts += ["", f"*{document['settings']['gpus']} GPU(s).*"]
    for note in notes_of(document):
        parts += ["", note]
    for heading, text in (
        ("GPUs at once", gpus_at_once(document)),
        ("Loads of weights", loads(document)),
        ("Live and simulated", sweeps(document)),
        ("A worker killed", killed(document)),
    ):
        if text:
            parts += ["", f"## {heading}", "", text]
    return "\n".join(parts) + "\n"


def _figures(document: Mapping[str, Any], row: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = document["rows"].get(row, {}).get("figures", {})
    return found


def gpus_at_once(document: Mapping[str, Any]) -> str:
    """Start lateness of each GPU."""
    lines = []
    for each in _figures(document, "lateness").get("gpus", ()):
        late = each["late_ns"]
        micros = [
            number(None if late[p] is None else late[p] / 1000) for p in ("p50", "p99", "max")
        ]
        lines.append(
            (
                str(each["gpu"]),
                ms(each["exec_1_ns"]),
                *micros,
                str(late["n"]),
                f"{100 * each['busy']:.1f}",
                str(each["failed"]),
            )
        )
    heads = (
        "GPU",
        "batch 1 ms",
        "late p50 us",
        "p99 us",
        "greatest us",
        "starts",
        "busy %",
        "failed",
    )
    return table(heads, lines) if lines else ""


def loads(document: Mapping[str, Any]) -> str:
    """Load times by number of GPUs that load."""
    figures = _figures(document, "loads")
    if not figures:
        return ""
    topology = document.get("topology", "")
    named = [(f"GPU {gpu} alone", found) for gpu, found in enumerate(figures["alone_ns"])]
    named += [(f"{count} at once", found) for count, found in figures["together_ns"].items()]
    lines = [
        (name, ms(found["p50"]), ms(found["p99"]), ms(found["max"]), str(found["n"]))
        for name, found in named
    ]
    text = table(("loading", "p50 ms", "p99 ms", "greatest ms", "loads"), lines)
    return f"{text}\n\n```\n{topology}\n```" if topology else text


def sweeps(document: Mapping[str, Any]) -> str:
    """Every step of every run, beside the simulator where its simulation has ended."""
    simulated = _figures(document, "simulated").get("runs", {})
    lines = []
    for name, row in document["rows"].items():
        figures = row.get("figures", {})
        if "live" not in figures:
            continue
        theirs = {step["slo"]: step for step in simulated.get(name, {}).get("steps", ())}
        for step in figures["live"]["steps"]:
            share = step["in_time"] / step["sent"] if step["sent"] else 0.0
            beside = theirs.get(step["slo"])
            lines.append(
                (
                    name,
                    f"{figures['sent_rate']:g}",
                    step["slo"],
                    f"{100 * share:.2f}",
                    *_beside(beside),
                    str(step["sent"]),
                    ms(step["latency_p99_ns"]),
                    ms(step["issue_delay_p99_ns"]),
                )
            )
    heads = (
        "run",
        "sent/s",
        "SLO",
        "in time, live %",
        "simulated %",
        "points",
        "rule",
        "verdict",
        "sent",
        "p99 ms",
        "issue delay p99 ms",
    )
    return table(heads, lines) if lines else ""


def _beside(step: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    if step is None:
        return ("n/a", "n/a", "", "")
    verdict = "" if not step["rule"] else "met" if step["holds"] else "**missed**"
    return f"{100 * step['simulated']:.2f}", f"{step['points']:+.2f}", step["rule"], verdict


def killed(document: Mapping[str, Any]) -> str:
    """What became of the requests when a worker was killed."""
    found = _figures(document, "kill").get("fate")
    if not found:
        return ""
    lines = [
        (words, str(count), where)
        for where, outcomes in (
            ("in flight at the kill", found["in_flight"]),
            ("failed from the kill on", found["failed"]),
        )
        for words, count in outcomes.items()
    ]
    lines.append(("served, but late", str(found["late"]), "from the kill on"))
    return table(("outcome", "requests", "of those"), lines)
