"""Progress of simulations: how fast virtual time passes, and how many runs are done."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slosched.cli.output import RunDisplay, beside, run_display
from slosched.clock import now_ns
from slosched.loadgen.results import RunProgress
from slosched.units import NS_PER_S

if TYPE_CHECKING:
    from slosched.sim.jobs import JobsProgress

_PLAIN_EVERY_S = 5.0


class SimDisplay:
    """Shows one simulation, with the speed at which virtual time passes. A context manager."""

    def __init__(self, title: str) -> None:
        self._display: RunDisplay = run_display(title)
        self._begun_ns = now_ns()

    def __enter__(self) -> SimDisplay:
        self._display.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.__exit__(*error)

    def __call__(self, progress: RunProgress) -> None:
        wall_s = max((now_ns() - self._begun_ns) / NS_PER_S, 1e-3)
        label = f"{progress.label}  {speed_text(progress.elapsed_s / wall_s)}"
        self._display(replace(progress, label=label))


def speed_text(times: float) -> str:
    """Virtual over wall time, in words."""
    return f"{times:.1f} x real time" if times < 10 else f"{times:.0f} x real time"


class JobsDisplay:
    """Shows a list of simulations: a bar on a terminal, plain lines elsewhere. A context manager.

    `names` are what the runs are called, in their order.
    """

    def __init__(self, names: list[str], *, title: str = "simulating") -> None:
        self._names = names
        self._title = title
        self._begun_ns = now_ns()
        self._next_s = 0.0
        self._done = -1
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> JobsDisplay:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn(self._title),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                auto_refresh=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=float(len(self._names)))
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: JobsProgress) -> None:
        done, parts = float(progress.done), []
        for index, where in progress.running.items():
            share = where.elapsed_s / where.total_s if math.isfinite(where.total_s) else 0.0
            done += min(share, 1.0)
            parts.append(f"{self._names[index]} {100 * share:.0f} %")
        text = f"{progress.done}/{progress.total} done  {'; '.join(parts)}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text, refresh=True)
            return
        wall_s = (now_ns() - self._begun_ns) / NS_PER_S
        if progress.done == self._done and wall_s < self._next_s:
            return
        self._done, self._next_s = progress.done, wall_s + _PLAIN_EVERY_S
        beside(f"{self._title}: {wall_s:5.0f} s  {text}")
