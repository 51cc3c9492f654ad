"""Figure 7: how low can the SLO go? Six GPUs, the published six runs, drawn in both forms.

    .venv/bin/python analysis/figure7.py [--scale published] [--live] [--tables]

N = 12 and 48 copies of ResNet-50, R = 600, 1,200 and 2,400 requests/s, SLO 1 to 100 times b1 by 1.5.
Published steps last 30 s (live: 36 minutes in all), quick ones 4 s (live: 5 minutes). Inputs are off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipes import Part, Recipe, infer5, main

from slosched.analysis.drawn import Drawn, columns_text
from slosched.analysis.fig7 import plot_fig7
from slosched.analysis.runs import open_run
from slosched.analysis.tables import CONTROLLER_VIEW, StepSummary, as_json, summarise_run
from slosched.units import NS_PER_S

COPIES, RATES, STEPS = (12, 48), (600, 1200, 2400), 12
PERIODS_S = {"quick": 4, "published": 30}


def parts(scale: str) -> list[Part]:
    period_s = PERIODS_S[scale]
    return [
        Part(
            f"n{copies}-r{rate}",
            f"slo-exp-1 resnet50_v2 {copies} poisson {rate} 1 100 1.5 mul {period_s}",
            infer5(),
            STEPS * period_s * NS_PER_S,
        )
        for copies in COPIES
        for rate in RATES
    ]


def draw(runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    files = [path for form in (False, True) for path in plot_fig7(runs, out, published=form)]
    names = [part.name for part in parts(scale)]
    steps = {name: summarise_run(open_run(run)) for name, run in zip(names, runs, strict=True)}
    numbers = {"runs": {name: as_json(found) for name, found in steps.items()}}
    return Drawn(files, numbers, _table(steps))


def _table(steps: dict[str, list[StepSummary]]) -> str:
    """A line for each run, a column for each SLO; percent in time, cut off and not rounded."""
    views = {name: [s for s in found if s.view == CONTROLLER_VIEW] for name, found in steps.items()}
    slos = [step.slo_text for step in next(iter(views.values()))]
    rows = [
        (name, *(f"{int(1000 * s.satisfied / s.requests) / 10:.1f}" for s in found))
        for name, found in views.items()
    ]
    return columns_text(("% in time", *slos), rows) + "\njudged by the controller, from arrival"


if __name__ == "__main__":
    main(Recipe(7, "Satisfaction by SLO, six runs.", parts, draw))
