"""Figure 6: one GPU and more models than its memory holds; one more becomes active each second.

    .venv/bin/python analysis/figure6.py [--scale published] [--live] [--tables]

A V100's 1,376 pages hold 196 copies of ResNet-50. Published: 3,600 major models after 300 s of the
minor one alone, 65 minutes. Quick: 300 major models after 5 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes import Part, Recipe, infer5, main

from slosched.analysis.drawn import Drawn
from slosched.analysis.fig6 import plot_fig6
from slosched.units import NS_PER_S

#: Major models, lead-in in s, window in s.
SIZES = {"quick": (300, 5, 5), "published": (3600, 300, 10)}


def parts(scale: str) -> list[Part]:
    models, lead_s, _ = SIZES[scale]
    workload = f"bursty_experiment {models} {lead_s}"
    return [Part("bursty", workload, infer5(), (models + lead_s) * NS_PER_S, gpus=1)]


def draw(runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig6(runs[0], out, window_ns=SIZES[scale][2] * NS_PER_S)


if __name__ == "__main__":
    main(Recipe(6, "Thousands of models that wake one by one on one GPU.", parts, draw))
