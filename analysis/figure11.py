"""Figure 11: how much load one controller carries, by the number of emulated GPUs. Live only.

    .venv/bin/python analysis/figure11.py [--scale published] [--tables]

What a controller can carry is a question about CPU time, which virtual time does not have. So
worker, controller and client run as processes on this machine, and **share its cores**: on two cores the
three saturate them together, at a few thousand requests/s. That is a lower bound of what a controller
with cores of its own carries (the published one had 18, on a machine of its own), and it means something only
if nothing else runs: the table says the load average before.

Quick: N of 1 to 8, the load grows to at most 9,600 requests/s, steps and windows of 2 s, one trial.
Published: N of 10 to 150, `azure_scalability_exp N 0.1 4 1.5 60 4`, three trials of ten minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes import Part, Recipe, infer5, main

from slosched.analysis.drawn import Drawn
from slosched.analysis.fig11 import plot_fig11
from slosched.units import NS_PER_MS, NS_PER_S

#: Requests/s for each GPU at load factor 1, about.
_RATE_PER_GPU = 1200
_QUICK_MOST_RPS = 9600
WINDOWS_S = {"quick": 2, "published": 60}


def parts(scale: str) -> list[Part]:
    if scale == "published":
        return [
            _part(gpus, trial, 4.0, 60, 4) for gpus in range(10, 151, 10) for trial in (1, 2, 3)
        ]
    return [
        _part(gpus, 1, min(4.0, _QUICK_MOST_RPS / (_RATE_PER_GPU * gpus)), 2, 1)
        for gpus in (1, 2, 4, 8)
    ]


def _part(gpus: int, trial: int, most: float, step_s: int, memory: int) -> Part:
    steps, factor = 0, 0.1
    while factor <= most:
        steps, factor = steps + 1, factor * 1.5
    return Part(
        f"n{gpus}-trial{trial}",
        f"azure_scalability_exp {gpus} 0.1 {most:g} 1.5 {step_s} {memory}",
        infer5(max_exec_ns=25 * NS_PER_MS),
        steps * step_s * NS_PER_S,
        gpus=gpus,
        profile="zoo61",
        seed=trial,
    )


def draw(runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig11(runs, out, window_ns=WINDOWS_S[scale] * NS_PER_S)


if __name__ == "__main__":
    main(Recipe(11, "How much load one controller carries.", parts, draw, live_only=True))
