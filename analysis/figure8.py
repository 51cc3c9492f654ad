"""Figure 8: six GPUs, deadlines in the foreground, closed loops in the background.

    .venv/bin/python analysis/figure8.py [--scale published] [--live] [--tables]

Foreground: 6 copies of ResNet-50, 200 requests/s in total, SLO 1 to 100 times b1 by 1.5. Background
(copies, requests outstanding to each): none, (12, 16), (48, 4), without an SLO to speak of (one day).
Published steps last 30 s, quick ones 6 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes import Part, Recipe, infer5, main

from slosched.analysis.drawn import Drawn
from slosched.analysis.fig8 import plot_fig8
from slosched.units import NS_PER_S

BACKGROUNDS = ((0, 0), (12, 16), (48, 4))
STEPS = 12
#: Seconds of a step and of a window.
LENGTHS_S = {"quick": (6, 2), "published": (30, 5)}
ONE_DAY_NS = 86_400 * NS_PER_S


def parts(scale: str) -> list[Part]:
    step_s, _ = LENGTHS_S[scale]
    return [
        Part(
            f"m{copies}-c{concurrency}",
            f"slo-exp-2 resnet50_v2 6 poisson 200 1 100 1.5 mul {step_s} {copies} {concurrency} 0",
            infer5(slo_ns=ONE_DAY_NS),
            STEPS * step_s * NS_PER_S,
        )
        for copies, concurrency in BACKGROUNDS
    ]


def draw(runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig8(runs, out, window_ns=LENGTHS_S[scale][1] * NS_PER_S)


if __name__ == "__main__":
    main(Recipe(8, "Deadlines in the foreground beside closed loops.", parts, draw))
