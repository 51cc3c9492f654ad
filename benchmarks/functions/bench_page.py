"""The tables of functions.md, made from the results and never typed. Ratios come first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1
BEGIN, END = "<!-- tables: made by functions/run.py -->", "<!-- end of tables -->"
OURS = "slosched"
DASK = ("dask-processes", "dask-threads")
TITLES = {
    "slosched": "slosched",
    "dask-processes": "Dask, processes",
    "dask-threads": "Dask, threads",
    "pool": "multiprocessing.Pool",
    "executor": "ProcessPoolExecutor",
    "local": "engine local, inline",
}
P50_GOAL_NS = 1_000_000
RATE_GOAL = 3.0
_NONE = "–"  # noqa: RUF001 (a dash in a table)

Record = dict[str, Any]


def tables(document: Record) -> str:
    """All tables that the results have rows for."""
    made = [
        _no_op(document),
        _chains(document),
        _graph(document),
        _failing(document),
        _state(document),
        _kills(document),
    ]
    return "\n\n".join([*filter(None, made), _machine(document)])


def page(document: Record, path: Path) -> str:
    """The text of the page at `path` with new tables. Raises ValueError without their place."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must have one {BEGIN} and one {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(document)}\n\n{END}{after}"


# ------------------------------------------------------------------------------- the parts


def of(document: Record, system: str, part: str, field: str) -> list[float]:
    """A field of a part in each repeat, in order."""
    runs = [run for run in document["runs"] if (run["system"], run["part"]) == (system, part)]
    return [run[field] for run in sorted(runs, key=lambda run: run["repeat"]) if field in run]


def median(document: Record, system: str, part: str, field: str) -> float | None:
    values = of(document, system, part, field)
    return statistics.median(values) if values else None


def ratio(document: Record, system: str, part: str, field: str) -> float | None:
    """Ours by the system's: the median of the ratios of the repeats."""
    pairs = zip(of(document, OURS, part, field), of(document, system, part, field), strict=False)
    found = [ours / theirs for ours, theirs in pairs]
    return statistics.median(found) if found and system != OURS else None


def dask_rates(run: Record) -> dict[str, float]:
    """The calls/s of one repeat of Dask: calls, bare tasks, and either with the send intervals patched."""
    hurried = run.get("hurried", {})
    found = {
        "calls": run.get("calls_per_s"),
        "bare tasks": run.get("bare_per_s"),
        "calls, patched": hurried.get("calls_per_s"),
        "bare tasks, patched": hurried.get("bare_per_s"),
    }
    return {name: rate for name, rate in found.items() if rate is not None}


def best_dask_ratio(document: Record, kinds: Sequence[str]) -> float | None:
    """Our calls/s by the best that Dask's processes or threads showed in each repeat; the median."""
    best: dict[int, float] = {}
    for run in document["runs"]:
        if run["system"] in DASK and run["part"] == "no_op":
            rates = [rate for kind, rate in dask_rates(run).items() if kind in kinds]
            best[run["repeat"]] = max(best.get(run["repeat"], 0.0), *rates)
    ours = {
        run["repeat"]: run["calls_per_s"]
        for run in document["runs"]
        if (run["system"], run["part"]) == (OURS, "no_op")
    }
    found = [rate / best[n] for n, rate in ours.items() if best.get(n)]
    return statistics.median(found) if found else None


def _systems(document: Record, part: str) -> list[str]:
    seen = {run["system"] for run in document["runs"] if run["part"] == part}
    return [name for name in TITLES if name in seen]


def _no_op(document: Record) -> str:
    rows = []
    for name in _systems(document, "no_op"):
        rows.append(
            (
                TITLES[name],
                _times(ratio(document, name, "no_op", "p50_ns")),
                _times(ratio(document, name, "no_op", "calls_per_s")),
                _ms(median(document, name, "no_op", "p50_ns")),
                _ms(median(document, name, "no_op", "p99_ns")),
                _whole(median(document, name, "no_op", "calls_per_s")),
                _whole(median(document, name, "no_op", "bare_per_s")),
                _whole(median(document, name, "no_op", "cpu_us")),
            )
        )
        runs = [run for run in document["runs"] if run["system"] == name and "hurried" in run]
        if runs:
            first = runs[0]["hurried"]
            middle = {key: statistics.median(run["hurried"][key] for run in runs) for key in first}
            rows.append(
                (
                    f"{TITLES[name]}, send intervals patched to 0",
                    _NONE,
                    _NONE,
                    _ms(middle["p50_ns"]),
                    _ms(middle["p99_ns"]),
                    _whole(middle["calls_per_s"]),
                    _whole(middle.get("bare_per_s")),
                    _whole(middle.get("cpu_us")),
                )
            )
    if not rows:
        return ""
    heads = ("no-op", "p50, ours / this", "calls/s, ours / this", "p50 ms", "p99 ms", "calls/s")
    return f"### No-op\n\n{_table((*heads, 'bare tasks/s', 'CPU us per call'), rows)}{_goals(document)}"


def _goals(document: Record) -> str:
    p50 = median(document, OURS, "no_op", "p50_ns")
    calls = best_dask_ratio(document, ["calls"])
    settings = best_dask_ratio(document, ["calls", "bare tasks"])
    patched = best_dask_ratio(
        document, ["calls", "bare tasks", "calls, patched", "bare tasks, patched"]
    )
    if p50 is None or calls is None or settings is None:
        return ""
    refused = sum(of(document, OURS, "no_op", "refused"))
    return (
        f"\n\nThe controller refused {refused:,.0f} calls of slosched's, as it could not keep up.\n\n"
        f"Goals: p50 < 1 ms {_met(p50 < P50_GOAL_NS)}. Calls/s {RATE_GOAL:.0f} times Dask's best: "
        f"{_times(calls)} times the same calls on Dask ({_met(calls >= RATE_GOAL)}), "
        f"{_times(settings)} times its best with bare tasks ({_met(settings >= RATE_GOAL)}), "
        f"{_times(patched)} times that of a patched Dask."
    )


def _chains(document: Record) -> str:
    rows = [
        (
            TITLES[name],
            _times(ratio(document, name, "chains", "in_turn_ns")),
            _times(ratio(document, name, "chains", "at_once_ns")),
            _ms(median(document, name, "chains", "in_turn_ns")),
            _ms(median(document, name, "chains", "at_once_ns")),
            _ms(median(document, name, "chains", "tree_ns")),
        )
        for name in _systems(document, "chains")
    ]
    if not rows:
        return ""
    heads = (
        "a child costs",
        "in turn, ours / this",
        "at once, ours / this",
        "in turn, ms",
        "at once, ms",
        "1 + 8 + 64 calls, ms",
    )
    return f"### Chains\n\n{_table(heads, rows)}"


def _graph(document: Record) -> str:
    rows = []
    for name in _systems(document, "graph"):
        took = median(document, name, "graph", "ns")
        rows.append(
            (
                TITLES[name],
                _times(ratio(document, name, "graph", "ns")),
                _ms(took),
                _ms(None if took is None else took / 585),
                f"{max(of(document, name, 'graph', 'error')):.1e}",
            )
        )
    if not rows:
        return ""
    side = next(run["side"] for run in document["runs"] if run["part"] == "graph")
    numpys = [run["numpy_ns"] for run in document["runs"] if run["part"] == "graph"]
    heads = ("585 calls", "ours / this", "ms", "ms per call", "largest error")
    return (
        f"### A graph of 585 calls\n\n{_table(heads, rows)}\n\n"
        f"A @ B with {side} x {side} float64; numpy alone takes {_ms(statistics.median(numpys))} ms."
    )


def _failing(document: Record) -> str:
    rows = [
        (
            TITLES[name],
            _times(ratio(document, name, "failing", "ns")),
            _ms(median(document, name, "failing", "ns")),
            _ms(median(document, name, "failing", "without_ns")),
        )
        for name in _systems(document, "failing")
    ]
    if not rows:
        return ""
    n = next(run["children"] for run in document["runs"] if run["part"] == "failing")
    heads = (f"{n} children, 20 % fail", "ours / this", "ms", "ms if none fails")
    return f"### Failing children\n\n{_table(heads, rows)}"


def _state(document: Record) -> str:
    texts = []
    for name, part in document["state"].items():
        rows = []
        for title, size in part["sizes"].items():
            pushes = size["push"]
            rows.append(
                (
                    title,
                    _times(size["without"]["ns"] / size["local_tier"]["ns"]),
                    _ms(size["local_tier"]["ns"]),
                    _ms(size["without"]["ns"]),
                    _ms(size["new_version"]["ns"]),
                    *(
                        f"{_ms(each['ns'])} ms, {_bytes(each['pushed_bytes'])}"
                        for each in pushes.values()
                    ),
                )
            )
        shares = [f"push_partial of {part}" for part in next(iter(part["sizes"].values()))["push"]]
        heads = (
            "array",
            "without / with local tier",
            "get, local tier, ms",
            "get without it, ms",
            "pull of a new version, ms",
            *shares,
        )
        texts.append(
            f"### State, in calls on {TITLES[name]}\n\n{_table(heads, rows)}\n\nStore: {part['store']}."
        )
    return "\n\n".join(texts)


def _kills(document: Record) -> str:
    rows = []
    for name, part in document["kills"].items():
        failed = sum(part["failed"].values())
        rows.append(
            (
                TITLES[name],
                str(part["unanswered"]),
                str(part["bodies_twice"]),
                str(part["wrong"]),
                str(part["kills"]),
                f"{part['calls']:,}",
                f"{part['returned']:,}",
                f"{failed:,}: "
                + ", ".join(f"{count} {code}" for code, count in part["failed"].items()),
                str(part["processes_left"]),
            )
        )
    if not rows:
        return ""
    heads = (
        "kill -9 at random",
        "unanswered",
        "bodies begun twice",
        "wrong values",
        "kills",
        "calls of clients",
        "returned",
        "failed, by code",
        "processes left",
    )
    seconds = max(part["seconds"] for part in document["kills"].values())
    return f"### Kills\n\n{_table(heads, rows)}\n\nUp to {seconds:.0f} s for each."


# --------------------------------------------------------------------------------- figures


def _machine(document: Record) -> str:
    versions = ", ".join(f"{name} {text}" for name, text in document["versions"].items() if text)
    loads = [run["load"] for run in document["runs"]]
    load = f"load average {statistics.median(loads):.1f} (median of the parts); " if loads else ""
    return (
        f"*{document['date']}, {document['slots']} slots, {document['seconds']:.0f} s in all; {load}"
        f"{document['machine']}; {versions}.*"
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, [":--", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return _NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ms(ns: float | None) -> str:
    """Milliseconds, rounded up at the third digit, so that no rounding meets a goal."""
    if ns is None:
        return _NONE
    value = ns / 1e6
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    rounded = math.ceil(value / unit - 1e-9) * unit
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def _whole(value: float | None) -> str:
    return _NONE if value is None else f"{math.floor(value):,}"


def _bytes(count: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _met(holds: bool) -> str:
    return "met" if holds else "**missed**"
