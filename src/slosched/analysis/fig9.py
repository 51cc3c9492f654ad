"""Figure 9: a cluster under a trace of thousands of functions, minute by minute (OSDI'20, §6.5).

The first ten minutes are left out; windows are 60 s long. The batch size is the published mean over
requests, sum(b^2) / sum(b); a cold model is one that had a cold start within the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slosched.analysis.drawn import Drawn, columns_text, plain
from slosched.analysis.panels import Panel, Series, draw_panels
from slosched.analysis.runs import read_actions, read_requests
from slosched.analysis.windows import Windows
from slosched.codes import ActionType
from slosched.errors import InvalidConfig
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

WINDOW_NS = 60 * NS_PER_S
SKIP_NS = 600 * NS_PER_S
_REQUESTS = ("t", "model_id", "result", "latency", "deadline", "deadline_met", "is_coldstart")
_ACTIONS = ("t", "action_type", "status", "batch_size")


@dataclass(frozen=True)
class _Numbers:
    """A value for each window. Latencies are those of served requests, in ms."""

    start_s: list[float]
    throughput_rps: list[float]
    goodput_rps: list[float]
    latency_p50_ms: list[float]
    latency_p99_ms: list[float]
    latency_max_ms: list[float]
    batch_size: list[float]
    cold_models: list[int]
    coldstarts_per_s: list[float]


def plot_fig9(
    run_dir: Path, out: Path, *, window_ns: int = WINDOW_NS, skip_ns: int = SKIP_NS
) -> Drawn:
    """Draw the run into the directory `out` as fig9.png and .pdf.

    The first `skip_ns` after the first answer are left out. Raises InvalidConfig if the run is not longer
    than that and a window, or lacks one of the two logs, MalformedLog, MissingPackage.
    """
    requests = read_requests(run_dir, only=_REQUESTS)
    actions = read_actions(run_dir, only=_ACTIONS)
    first_ns, last_ns = int(requests["t"].min()), int(requests["t"].max())
    if last_ns - first_ns < skip_ns + window_ns:
        raise InvalidConfig(
            f"{run_dir} lasted {format_duration(last_ns - first_ns)}; the figure leaves out the first "
            f"{format_duration(skip_ns)} and counts in windows of {format_duration(window_ns)}. For a "
            "short run give --skip and --window, for example --skip 5s --window 2s"
        )
    start_ns = first_ns + skip_ns
    windows = Windows(requests["t"], window_ns, start_ns, last_ns)
    numbers = _measure(requests, windows, batch_sizes(actions, start_ns, window_ns, windows.count))
    slo_ms = float(np.median(requests["deadline"])) / NS_PER_MS
    files = draw_panels(
        _panels(numbers, slo_ms),
        [start + windows.width_s / 2 for start in numbers.start_s],
        out,
        "fig9",
        what=f"Time, from {format_duration(skip_ns)} after the first answer",
    )
    totals = _totals(requests, start_ns)
    document = {"window_ns": window_ns, "skip_ns": skip_ns, "slo_ms": slo_ms, "totals": totals}
    return Drawn(files, plain(document | numbers.__dict__), _text(numbers, totals))


def batch_sizes(actions: LogTable, start_ns: int, width_ns: int, count: int) -> list[float]:
    """Return for each window sum(b^2) / sum(b) of its inferences; NaN where there were none."""
    windows = Windows(actions["t"], width_ns, start_ns, start_ns + count * width_ns)
    infers = (actions["action_type"] == ActionType.INFER) & (actions["status"] == 0)
    batch = actions["batch_size"]
    squares, sums = windows.sums(batch**2, infers), windows.sums(batch, infers)
    sizes: list[float] = (squares / np.where(sums, sums, np.nan)).tolist()
    return sizes


def _measure(requests: LogTable, windows: Windows, batches: list[float]) -> _Numbers:
    served, cold = requests["result"] == 0, requests["is_coldstart"] == 1
    p50, p99, most = (
        [value / NS_PER_MS for value in series]
        for series in windows.quantiles(requests["latency"], [0.5, 0.99, 1.0], served)
    )
    return _Numbers(
        start_s=windows.starts_s(),
        throughput_rps=windows.rates(),
        goodput_rps=windows.rates(requests["deadline_met"] == 1),
        latency_p50_ms=p50,
        latency_p99_ms=p99,
        latency_max_ms=most,
        batch_size=batches,
        cold_models=windows.distinct(requests["model_id"], cold),
        coldstarts_per_s=windows.rates(cold),
    )


def _totals(requests: LogTable, start_ns: int) -> dict[str, float]:
    counted = requests["t"] >= start_ns
    met = int(np.count_nonzero(requests["deadline_met"][counted]))
    rows = int(np.count_nonzero(counted))
    served = counted & (requests["result"] == 0)
    late = served & (requests["deadline_met"] == 0)
    return {
        "requests": rows,
        "satisfaction": met / rows,
        "served_late": int(np.count_nonzero(late)),
        "not_served": rows - int(np.count_nonzero(served)),
        "models": len(np.unique(requests["model_id"][counted])),
    }


def _panels(numbers: _Numbers, slo_ms: float) -> list[Panel]:
    return [
        Panel(
            "Throughput and goodput",
            "requests/s",
            (
                Series("answered", numbers.throughput_rps, 1, dashed=True),
                Series("in time", numbers.goodput_rps, 0),
            ),
        ),
        Panel(
            "Latency of what was served",
            "ms",
            (
                Series("median", numbers.latency_p50_ms, 0),
                Series("p99", numbers.latency_p99_ms, 2),
                Series("largest", numbers.latency_max_ms, 1),
            ),
            log=True,
            level=(slo_ms, "SLO"),
        ),
        Panel("Batch size, mean over requests", "requests", (Series("", numbers.batch_size),)),
        Panel("Models with a cold start", "models", (Series("", numbers.cold_models),)),
        Panel("Cold starts", "per s", (Series("", numbers.coldstarts_per_s),)),
    ]


def _text(numbers: _Numbers, totals: dict[str, float]) -> str:
    headings = (
        "from s",
        "answered r/s",
        "goodput r/s",
        "p50 ms",
        "p99 ms",
        "max ms",
        "batch",
        "cold models",
        "cold/s",
    )
    rows = zip(
        numbers.start_s,
        numbers.throughput_rps,
        numbers.goodput_rps,
        numbers.latency_p50_ms,
        numbers.latency_p99_ms,
        numbers.latency_max_ms,
        numbers.batch_size,
        numbers.cold_models,
        numbers.coldstarts_per_s,
        strict=True,
    )
    summary = (
        f"{totals['requests']} requests to {totals['models']} models, "
        f"{_share(totals['satisfaction'])} in time; {totals['not_served']} not served, "
        f"{totals['served_late']} served late"
    )
    return f"{columns_text(headings, rows)}\n{summary}"


def _share(value: float) -> str:
    """In percent, rounded down: one request missed among a million is not 100 %."""
    return f"{int(value * 1_000_000) / 10_000:.4f} %"
