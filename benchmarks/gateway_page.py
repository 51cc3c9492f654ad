"""The tables of benchmarks/gateway.md, from the results of gateway_cost.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
BEGIN, END = "<!-- tables: made by gateway_cost.py -->", "<!-- end of tables -->"
_NAMES = {"small": "1 kB", "large": "602 kB"}

Record = dict[str, Any]


def page(document: Record, path: Path) -> str:
    """The text of the page at `path` with new tables. Raises ValueError without their place."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must have one {BEGIN} and one {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(document)}\n\n{END}{after}"


def tables(document: Record) -> str:
    """CPU and latency of each way beside the native client's, as medians of the rounds."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in document["runs"]):
        native = runs_of(document, model, "native")
        ways = dict.fromkeys(run["way"] for run in document["runs"])
        rows += [_row(_NAMES[model], way, runs_of(document, model, way), native) for way in ways]
    headings = [
        "input",
        "by",
        "CPU / native's",
        "gateway us",
        "controller us",
        "worker us",
        "client us",
        "added p50 ms",
        "added p99 ms",
        "p50 ms",
        "p99 ms",
    ]
    return "\n\n".join([table(headings, rows), _provenance(document)])


def runs_of(document: Record, model: str, way: str) -> list[Record]:
    """The runs of one way in the order of the rounds."""
    found = [run for run in document["runs"] if (run["model"], run["way"]) == (model, way)]
    return sorted(found, key=lambda run: int(run["round"]))


def servers_us(run: Record) -> float:
    """CPU of everything but the client."""
    return float(sum(us for part, us in run["cpu_us"].items() if part != "client"))


def _row(model: str, way: str, runs: Sequence[Record], native: Sequence[Record]) -> tuple[str, ...]:
    def cpu(part: str) -> str:
        values = [run["cpu_us"][part] for run in runs if part in run["cpu_us"]]
        return f"{statistics.median(values):.0f}" if values else "-"

    ratios = [servers_us(a) / servers_us(b) for a, b in zip(runs, native, strict=True)]
    added = [_added(runs, native, field) for field in ("p50_ns", "p99_ns")]
    if way == "native":
        added = ["-", "-"]
    return (
        model,
        way,
        f"{statistics.median(ratios):.2f}",
        *(cpu(part) for part in ("gateway", "controller", "worker", "client")),
        *added,
        *(_ms(statistics.median(run[field] for run in runs)) for field in ("p50_ns", "p99_ns")),
    )


def _added(runs: Sequence[Record], native: Sequence[Record], field: str) -> str:
    """The median of the differences to the native client in the same round."""
    return _ms(statistics.median(a[field] - b[field] for a, b in zip(runs, native, strict=True)))


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.2f}"


def _provenance(document: Record) -> str:
    runs = document["runs"]
    total: Callable[[str], int] = lambda field: sum(run[field] for run in runs)  # noqa: E731
    voids = sum(bool(reasons) for run in runs for reasons in run["voids"])
    kept = sum(bool(run["void"]) for run in runs)
    rounds = 1 + max(run["round"] for run in runs)
    return (
        f"*{document['rate']} requests/s, {rounds} rounds; {total('answered'):,} of {total('sent'):,} requests "
        f"answered and {total('compared'):,} answers compared, none wrong. {voids} runs were disturbed by the "
        f"machine, of which {kept} stand in the table. slosched {document['slosched']} "
        f"({document['commit'] or 'no checkout'}); {document['machine']}. "
        f"{document['seconds'] / 60:.0f} minutes.*"
    )


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, [":--", ":--", *["--:"] * (len(headings) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
