"""Figure 11: how much load one controller can carry, by the number of GPUs (OSDI'20, §6.6).

One run for each number of GPUs N and each trial, under a load that grows in steps. Left: offered
load, goodput and batch size over time, for one N. Right: the best window's goodput of each run, and
for each N the median over its trials. Windows are 60 s long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from slosched.analysis.drawn import Drawn, columns_text, plain
from slosched.analysis.fig9 import batch_sizes
from slosched.analysis.runs import read_actions, read_requests, stated
from slosched.analysis.windows import Windows
from slosched.errors import InvalidConfig
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_S

WINDOW_NS = 60 * NS_PER_S
#: The number of GPUs that the published left panel shows.
_PUBLISHED_AT = 40
_REQUESTS = ("t", "latency", "deadline_met")
_ACTIONS = ("t", "action_type", "status", "batch_size", "worker_id", "gpu_id")


@dataclass(frozen=True)
class Trial:
    """One run; a value for each window. `satisfaction` is that of the best window."""

    run: str
    gpus: int
    start_s: list[float]
    offered_rps: list[float]
    goodput_rps: list[float]
    batch_size: list[float]
    best_goodput_rps: float
    satisfaction: float


def plot_fig11(
    run_dirs: Sequence[Path], out: Path, *, window_ns: int = WINDOW_NS, at: int | None = None
) -> Drawn:
    """Draw the runs into the directory `out` as fig11.png and .pdf.

    The left panel shows the first run with `at` GPUs; without it the published 40, or the most there
    are. Raises InvalidConfig if a run lacks a log or is shorter than a window, MalformedLog,
    MissingPackage.
    """
    if not run_dirs:
        raise InvalidConfig("nothing to draw: name at least one run directory")
    trials = sorted((_measure(Path(path), window_ns) for path in run_dirs), key=lambda t: t.gpus)
    numbers = sorted({trial.gpus for trial in trials})
    if at is None:
        at = _PUBLISHED_AT if _PUBLISHED_AT in numbers else numbers[-1]
    if at not in numbers:
        raise InvalidConfig(
            f"no run has {at} GPUs; --at takes one of {', '.join(map(str, numbers))}"
        )
    shown = next(trial for trial in trials if trial.gpus == at)
    document = {
        "window_ns": window_ns,
        "at": at,
        "median_best_goodput_rps": {n: _median(trials, n) for n in numbers},
        "trials": [asdict(trial) for trial in trials],
    }
    return Drawn(_draw(trials, shown, out), plain(document), _text(trials))


def _measure(path: Path, window_ns: int) -> Trial:
    requests = read_requests(path, only=_REQUESTS)
    actions = read_actions(path, only=_ACTIONS)
    arrivals = requests["t"] - requests["latency"]
    start_ns, end_ns = int(arrivals.min()), int(arrivals.max())
    offered = Windows(arrivals, window_ns, start_ns, end_ns)
    answered = Windows(requests["t"], window_ns, start_ns, end_ns)
    met = requests["deadline_met"] == 1
    goodput, sent = answered.rates(met), offered.rates()
    best = int(np.argmax(goodput))
    return Trial(
        run=str(path),
        gpus=_gpus(path, actions),
        start_s=offered.starts_s(),
        offered_rps=sent,
        goodput_rps=goodput,
        batch_size=batch_sizes(actions, start_ns, window_ns, offered.count),
        best_goodput_rps=goodput[best],
        satisfaction=goodput[best] / sent[best] if sent[best] else float("nan"),
    )


def _gpus(path: Path, actions: LogTable) -> int:
    """How many GPUs the run had: what its manifest says, else how many did something."""
    gpus = stated(path, "gpus")
    if isinstance(gpus, int):
        return gpus
    return len(np.unique(actions["worker_id"] * 1_000_000 + actions["gpu_id"]))


def _median(trials: Sequence[Trial], gpus: int) -> float:
    return median(trial.best_goodput_rps for trial in trials if trial.gpus == gpus)


# ------------------------------------------------------------------------------------- drawing


def _draw(trials: Sequence[Trial], shown: Trial, out: Path) -> list[Path]:
    from slosched.analysis import style

    with style.look():
        figure = style.Figure(figsize=(10.0, 4.6), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.07, w_pad=0.1)
        axes = figure.subplot_mosaic(
            [["load", "best"], ["batch", "best"]], height_ratios=[2.2, 1], width_ratios=[1.1, 1]
        )
        _draw_load(axes["load"], axes["batch"], shown)
        _draw_best(axes["best"], trials)
        return style.save(figure, out, "fig11")


def _draw_load(load: Any, batch: Any, shown: Trial) -> None:
    from slosched.analysis.style import COLOURS

    width_s = shown.start_s[1] - shown.start_s[0] if len(shown.start_s) > 1 else 1.0
    middles = [start + width_s / 2 for start in shown.start_s]
    look = {"marker": "o", "markersize": 3.5}
    load.plot(
        middles,
        shown.offered_rps,
        color=COLOURS[1],
        linestyle=(0, (3, 1.5)),
        label="offered",
        **look,
    )
    load.plot(middles, shown.goodput_rps, color=COLOURS[0], label="in time", **look)
    load.set_ylim(bottom=0)
    load.set_ylabel("Requests/s")
    load.set_title(f"N = {shown.gpus} GPU{'s' if shown.gpus > 1 else ''}")
    load.legend(loc="upper left")
    load.tick_params(labelbottom=False)
    batch.plot(middles, shown.batch_size, color=COLOURS[2], **look)
    known = [size for size in shown.batch_size if size == size]
    batch.set_ylim(0, 1.15 * max(known, default=1.0))
    batch.set_ylabel("Batch size")
    batch.set_xlabel("Time (s)")
    batch.set_xlim(load.get_xlim())


def _draw_best(ax: Any, trials: Sequence[Trial]) -> None:
    from slosched.analysis.style import COLOURS, PALE, WholeLocator

    numbers = sorted({trial.gpus for trial in trials})
    medians = [_median(trials, n) for n in numbers]
    ax.plot(
        [trial.gpus for trial in trials],
        [trial.best_goodput_rps for trial in trials],
        linestyle="",
        marker="o",
        markersize=4,
        color=COLOURS[0],
        alpha=0.4,
        label="each trial",
    )
    ax.plot(numbers, medians, color=COLOURS[0], marker="D", label="median of trials")
    # What the fewest GPUs did, as if it went on like that.
    ax.plot(
        [0, numbers[-1]],
        [0, medians[0] / numbers[0] * numbers[-1]],
        color=PALE,
        linewidth=1.0,
        linestyle=":",
        label=f"N = {numbers[0]} in proportion",
    )
    ax.set_xlim(0, numbers[-1] * 1.05)
    ax.xaxis.set_major_locator(WholeLocator(integer=True))
    ax.set_ylim(0, 1.35 * max(trial.best_goodput_rps for trial in trials) or 1.0)
    ax.set_xlabel("GPUs (N)")
    ax.set_ylabel("Requests/s in time")
    ax.set_title("Best window of each run")
    ax.legend(loc="upper left")


def _text(trials: Sequence[Trial]) -> str:
    numbers = sorted({trial.gpus for trial in trials})
    rows = []
    for n in numbers:
        chosen = [trial for trial in trials if trial.gpus == n]
        best = _median(trials, n)
        nearest = min(chosen, key=lambda trial: abs(trial.best_goodput_rps - best))
        rows.append((str(n), len(chosen), best, best / n, 100 * nearest.satisfaction))
    headings = ("GPUs", "trials", "best goodput r/s", "per GPU", "in time then %")
    return columns_text(headings, rows)
