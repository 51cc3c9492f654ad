"""Figure 6: thousands of models that wake one after another on one GPU (OSDI'20, §6.2).

One model, the *minor*, is requested all the time; the *major* ones join second by second until
their weights fill the GPU's memory and then have to be loaded for nearly every request. Time counts
from the first request to a major model; windows are 10 s long.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slosched.analysis.drawn import Drawn, columns_text, plain
from slosched.analysis.panels import Panel, Series, draw_panels
from slosched.analysis.runs import read_actions, read_requests
from slosched.analysis.windows import Mask, Windows
from slosched.codes import ActionType
from slosched.errors import InvalidConfig
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S

WINDOW_NS = 10 * NS_PER_S
_REQUESTS = (
    "t",
    "user_id",
    "model_id",
    "result",
    "latency",
    "deadline",
    "deadline_met",
    "is_coldstart",
)
_ACTIONS = ("t", "action_type", "status", "worker_id", "gpu_id", "worker_exec_duration", "goodput")
_NAN = float("nan")


@dataclass(frozen=True)
class _Numbers:
    """A value for each window. Utilisations and cold starts are percent, latencies ms."""

    start_s: list[float]
    goodput_minor_rps: list[float]
    goodput_major_rps: list[float]
    latency_p50_ms: list[float]
    latency_max_ms: list[float]
    coldstart_percent: list[float]
    pci_percent: list[float]
    gpu_percent: list[float]
    gpu_goodput_percent: list[float]
    major_models_so_far: list[int]


def plot_fig6(
    run_dir: Path, out: Path, *, window_ns: int = WINDOW_NS, minor: int | None = None
) -> Drawn:
    """Draw the run into the directory `out` as fig6.png and .pdf.

    `minor` is the user id of the minor stream; without it that of the first request, since the minor
    one is alone until the others join. Raises InvalidConfig if the run lacks one of the two logs or has only
    one stream, MalformedLog, MissingPackage.
    """
    requests = read_requests(run_dir, only=_REQUESTS)
    actions = read_actions(run_dir, only=_ACTIONS)
    arrivals = requests["t"] - requests["latency"]
    if minor is None:
        minor = int(requests["user_id"][int(np.argmin(arrivals))])
    is_minor = requests["user_id"] == minor
    if is_minor.all() or not is_minor.any():
        raise InvalidConfig(
            f"{run_dir} has no requests but those of user {minor}, or none of it; the figure shows a "
            "minor stream beside major ones (workload bursty_experiment). --minor names the former"
        )
    start_ns = int(arrivals[~is_minor].min())
    windows = Windows(requests["t"], window_ns, start_ns, int(requests["t"].max()))
    numbers = _measure(requests, actions, windows, start_ns, is_minor)
    slo_ms = float(np.median(requests["deadline"])) / NS_PER_MS
    files = draw_panels(
        _panels(numbers, slo_ms),
        [start + windows.width_s / 2 for start in numbers.start_s],
        out,
        "fig6",
        what="Time since the first request to a major model",
    )
    document = {"window_ns": window_ns, "minor": minor, "slo_ms": slo_ms, **numbers.__dict__}
    return Drawn(files, plain(document), _text(numbers))


def _measure(
    requests: LogTable, actions: LogTable, windows: Windows, start_ns: int, is_minor: Mask
) -> _Numbers:
    served, met = requests["result"] == 0, requests["deadline_met"] == 1
    p50, most = windows.quantiles(requests["latency"], [0.5, 1.0], served)
    cold, rows = windows.counts(requests["is_coldstart"] == 1), windows.counts()
    ends_ns = start_ns + windows.width_ns * np.arange(1, windows.count + 1)
    return _Numbers(
        start_s=windows.starts_s(),
        goodput_minor_rps=windows.rates(met & is_minor),
        goodput_major_rps=windows.rates(met & ~is_minor),
        latency_p50_ms=[value / NS_PER_MS for value in p50],
        latency_max_ms=[value / NS_PER_MS for value in most],
        coldstart_percent=[
            100 * c / r if r else _NAN for c, r in zip(cold.tolist(), rows.tolist(), strict=True)
        ],
        **_utilisation(actions, windows.width_ns, start_ns, windows.count),
        major_models_so_far=_models_so_far(requests, ~is_minor, ends_ns),
    )


def _utilisation(
    actions: LogTable, width_ns: int, start_ns: int, count: int
) -> dict[str, list[float]]:
    """What share of the time of all GPUs (or of the way to them) the work of each window took."""
    # An end beyond the last row keeps as many windows as the requests have.
    windows = Windows(actions["t"], width_ns, start_ns, start_ns + count * width_ns)
    gpus = len(np.unique(actions["worker_id"] * 1_000_000 + actions["gpu_id"]))
    good = actions["status"] == 0
    kind, busy = actions["action_type"], actions["worker_exec_duration"]
    loads, infers = good & (kind == ActionType.LOAD_WEIGHTS), good & (kind == ActionType.INFER)

    def percent(sums: Any) -> list[float]:
        values: list[float] = (100 * sums / (width_ns * gpus)).tolist()
        return values

    return {
        "pci_percent": percent(windows.sums(busy, loads)),
        "gpu_percent": percent(windows.sums(busy, infers)),
        "gpu_goodput_percent": percent(windows.sums(actions["goodput"], infers)),
    }


def _models_so_far(requests: LogTable, major: Mask, ends_ns: Any) -> list[int]:
    """How many major models had been requested by each window's end."""
    models = requests["model_id"][major]
    arrivals = (requests["t"] - requests["latency"])[major]
    order = np.argsort(arrivals, kind="stable")
    _, firsts = np.unique(models[order], return_index=True)
    found = np.searchsorted(np.sort(arrivals[order][firsts]), ends_ns)
    so_far: list[int] = found.tolist()
    return so_far


def _panels(numbers: _Numbers, slo_ms: float) -> list[Panel]:
    return [
        Panel(
            "Goodput",
            "requests/s",
            (
                Series("major models", numbers.goodput_major_rps, 0),
                Series("minor model", numbers.goodput_minor_rps, 1),
            ),
        ),
        Panel(
            "Latency of what was served",
            "ms",
            (
                Series("median", numbers.latency_p50_ms, 0),
                Series("largest", numbers.latency_max_ms, 1),
            ),
            log=True,
            level=(slo_ms, "SLO"),
        ),
        Panel("Cold starts", "% of requests", (Series("", numbers.coldstart_percent, 0),)),
        Panel(
            "Utilisation",
            "% of time",
            (
                Series("PCIe (loads)", numbers.pci_percent, 1),
                Series("GPU", numbers.gpu_percent, 0),
                Series("GPU, work in time", numbers.gpu_goodput_percent, 2, dashed=True),
            ),
            top=105,
        ),
        Panel("Major models so far", "models", (Series("", numbers.major_models_so_far, 0),)),
    ]


def _text(numbers: _Numbers) -> str:
    headings = (
        "from s",
        "major r/s",
        "minor r/s",
        "p50 ms",
        "max ms",
        "cold %",
        "PCIe %",
        "GPU %",
        "models",
    )
    rows = zip(
        numbers.start_s,
        numbers.goodput_major_rps,
        numbers.goodput_minor_rps,
        numbers.latency_p50_ms,
        numbers.latency_max_ms,
        numbers.coldstart_percent,
        numbers.pci_percent,
        numbers.gpu_percent,
        numbers.major_models_so_far,
        strict=True,
    )
    return columns_text(headings, rows)
