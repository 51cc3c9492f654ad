"""The laboratory's tables: laboratory.md from results/simulator.json, scaling.json and log_reading.json.

.venv/bin/python benchmarks/laboratory.py           # write laboratory.md
.venv/bin/python benchmarks/laboratory.py --check   # say whether it is up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from scaling import CURVES, GROWTH_LIMIT
from tables import table

HERE = Path(__file__).resolve().parent
PAGE = HERE / "laboratory.md"


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text())
    return document


def _machine(host: dict[str, Any] | str) -> str:
    if isinstance(host, str):
        return host
    return f"{host.get('cpu_model')}, {host.get('cpu_count')} cores, Python {host.get('python')}"


def simulator(document: dict[str, Any]) -> str:
    """How fast a simulation is, against its limits."""
    rows = []
    for found in document["cases"].values():
        limits, verdicts = found["limits"], []
        if "limit_s" in limits:
            ratio = found["wall_s"] / limits["limit_s"]
            verdict = "met" if ratio <= 1 else "**missed**"
            verdicts.append(f"{ratio:.2f} of {limits['limit_s']:.0f} s: {verdict}")
        if "speed" in limits:
            ratio = found["speed"] / limits["speed"]
            verdict = "met" if ratio >= 1 else "**missed**"
            verdicts.append(f"{ratio:.1f} x the {limits['speed']:g} asked: {verdict}")
        if "limit_mib" in limits:
            ratio = found["peak_mib"] / limits["limit_mib"]
            verdict = "met" if ratio <= 1 else "**missed**"
            verdicts.append(f"{ratio:.2f} of {limits['limit_mib']:.0f} MiB: {verdict}")
        rows.append(
            (
                found["what"],
                "; ".join(verdicts),
                f"{found['speed']:.2f}",
                f"{found['wall_s']:.1f}",
                f"{found['cpu_s']:.1f}",
                f"{found['cpu_us_per_request']:.0f}",
                f"{found['peak_mib']:.0f}",
            )
        )
    heads = (
        "run",
        "against its limit",
        "virtual s per s",
        "wall s",
        "CPU s",
        "CPU us/request",
        "MiB",
    )
    return f"{table(heads, rows)}\n\n*{document['date']}, {_machine(document['machine'])}.*"


def scaling(document: dict[str, Any]) -> str:
    """What a decision costs as clusters grow: each curve's worst point against its first."""
    rows = []
    for name, (key, words) in CURVES.items():
        points = document["parts"][name]
        worst = max(point[key] for point in points) / points[0][key]
        across = "gpus" if "gpus" in points[0] and name.startswith("gpus") else "models"
        curve = ", ".join(f"{point[across]}: {point[key]:.0f}" for point in points)
        verdict = "met" if worst < GROWTH_LIMIT else "**missed**"
        unit = "action" if key.endswith("action") else "request"
        rows.append((words, f"{worst:.2f}", f"< {GROWTH_LIMIT}: {verdict}", unit, curve))
    heads = ("curve", "worst / first", "target", "per", "CPU us by GPUs or models")
    return f"{table(heads, rows)}\n\n*{_machine(document['machine'])}.*"


def log_reading(document: dict[str, Any]) -> str:
    """Reading and plotting ten million rows."""
    target = document["target"]
    rows = []
    for found in document["results"]:
        seconds, size = found["cpu_s"] / target["s"], found["peak_bytes"] / target["bytes"]
        verdict = "met" if max(seconds, size) < 1 else "**missed**"
        rows.append(
            (
                found["part"],
                f"{seconds:.2f}",
                f"{size:.2f}",
                verdict,
                f"{found['cpu_s']:.1f}",
                f"{found['wall_s']:.1f}",
                f"{found['peak_bytes'] / 2**30:.2f}",
            )
        )
    heads = ("part", "of 60 s of CPU", "of 6 GiB", "target", "CPU s", "wall s", "GiB")
    return f"{document['rows']:,} rows.\n\n{table(heads, rows)}\n\n*{_machine(document['host'])}.*"


def page() -> str:
    """The whole page."""
    return "\n".join(
        (
            "# The laboratory: speed and memory",
            "",
            "Written by [laboratory.py](laboratory.py) from [results/](results/); each section names what",
            "made its numbers. Ratios to the target come first. CPU time is what a process used itself;",
            "wall time also counts what ran beside it.",
            "",
            "## How fast a simulation is: [simulator.py](simulator.py)",
            "",
            simulator(_read("simulator")),
            "",
            "## What a decision costs as clusters grow: [scaling.py](scaling.py)",
            "",
            scaling(_read("scaling")),
            "",
            "## Ten million rows: [log_reading.py](log_reading.py)",
            "",
            log_reading(_read("log_reading")),
            "",
            "## Is the simulator right: [validate.py](validate.py)",
            "",
            "[results/validate.md](results/validate.md) has each step live and simulated.",
            "",
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if out of date"
    )
    options = parser.parse_args()
    text = page()
    if options.check:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        if not fresh:
            print("laboratory.md is out of date; run benchmarks/laboratory.py", file=sys.stderr)
        return int(not fresh)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
