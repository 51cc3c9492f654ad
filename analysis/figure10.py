"""Figure 10: how far predictions were off in the run of Figure 9, whose runs it takes.

    .venv/bin/python analysis/figure10.py [--scale published] [--live] [--tables]

In a simulation the errors are those that were put in: execs vary by 0.3 % (recipes.NOISE), and what is
shown is how much of it the estimators and the plan let through. What a real machine adds shows --live.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from figure9 import parts
from recipes import Recipe, main

from slosched.analysis.drawn import Drawn
from slosched.analysis.fig10 import plot_fig10


def draw(runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig10(runs[0], out)


if __name__ == "__main__":
    main(
        Recipe(10, "How far predictions of loads and inferences were off.", parts, draw, runs_of=9)
    )
