"""Figure 5: one GPU, 15 copies of ResNet-50, 16 requests outstanding to each; six SLOs.

    .venv/bin/python analysis/figure5.py [--scale published] [--live] [--tables]

The paper compares Clockwork with Clipper and INFaaS. Here INFER5 stands beside the published code's
behaviour (INFER5:paper) and two reactive schedulers: AIMD batching as Clipper's, and FIFO. Inputs
travel, as published. A live run (--scale published) takes 30 minutes for each of the 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes import Part, Recipe, infer5, main

from slosched.analysis.drawn import Drawn
from slosched.analysis.fig5 import plot_fig5
from slosched.units import NS_PER_MS, NS_PER_S

SLOS_MS = (10, 25, 50, 100, 250, 500)
SCHEDULERS = (("INFER5", "best"), ("INFER5", "paper"), ("AIMD", "best"), ("FIFO", "best"))
WORKLOAD = "comparison_experiment2 15 16"
#: Seconds of a run, of its counted part, and of what follows that.
LENGTHS_S = {"quick": (20, 15, 1), "published": (1800, 600, 60)}


def parts(scale: str) -> list[Part]:
    return [
        Part(
            f"{policy.lower()}-{fidelity}-{slo_ms}ms",
            WORKLOAD,
            infer5(slo_ns=slo_ms * NS_PER_MS, policy=policy, fidelity=fidelity),
            LENGTHS_S[scale][0] * NS_PER_S,
            gpus=1,
            inputs=True,
        )
        for policy, fidelity in SCHEDULERS
        for slo_ms in SLOS_MS
    ]


def draw(runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    _, window_s, margin_s = LENGTHS_S[scale]
    return plot_fig5(runs, out, window_ns=window_s * NS_PER_S, margin_ns=margin_s * NS_PER_S)


if __name__ == "__main__":
    main(
        Recipe(
            5,
            "Goodput and latency of one GPU under closed loops, by SLO.",
            parts,
            draw,
            left_out=("nines", "quantiles_ms"),
        )
    )
