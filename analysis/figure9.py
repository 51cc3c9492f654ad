"""Figure 9: a cluster under a trace of function invocations on thousands of models.

    .venv/bin/python analysis/figure9.py [--scale published] [--live] [--tables]

Published: 6 GPUs, 4,026 models, `azure 8` (about 9,600 requests/s), 8 hours. Quick: 3 GPUs, 793 models,
3,600 requests/s, one second for each minute of the trace, 60 s. The trace is synthetic unless
AZURE_TRACE_DIR names the data set; models are those of the profile zoo61.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes import Part, Recipe, infer5, main

from slosched.analysis.drawn import Drawn
from slosched.analysis.fig9 import plot_fig9
from slosched.units import NS_PER_S

#: What is left out, and the window, in s.
WINDOWS_S = {"quick": (10, 2), "published": (600, 60)}


def parts(scale: str) -> list[Part]:
    if scale == "published":
        return [
            Part("azure", "azure 8 1 1.0 4 60 1 0", infer5(), 8 * 3600 * NS_PER_S, profile="zoo61")
        ]
    quick = "azure 3 1 1.0 4 1 1 0"
    return [Part("azure", quick, infer5(), 60 * NS_PER_S, gpus=3, profile="zoo61")]


def draw(runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    skip_s, window_s = WINDOWS_S[scale]
    return plot_fig9(runs[0], out, window_ns=window_s * NS_PER_S, skip_ns=skip_s * NS_PER_S)


if __name__ == "__main__":
    main(Recipe(9, "A cluster under a trace of thousands of functions.", parts, draw))
