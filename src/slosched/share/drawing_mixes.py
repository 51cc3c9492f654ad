"""What figures compare across mixes: STP and energy beside the published, shared against dedicated GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from slosched.analysis.compare import Estimate
from slosched.analysis.drawn import Drawn
from slosched.analysis.share_bars import Bar, Panel, draw_bars
from slosched.analysis.share_points import Mixes
from slosched.share.found_runs import FoundRun, mean_of, numbers_within
from slosched.share.published_figures import hotcarbon_sets
from slosched.share_spec import Mode


def bar_of(values: Sequence[float | None]) -> Bar:
    """The mean of repeats with its interval."""
    estimate = Estimate.of([value for value in values if value is not None])
    return Bar() if estimate is None else Bar(estimate.mean, estimate.half or 0.0)


def mixes_of(runs: Sequence[FoundRun]) -> list[Mixes]:
    """Our own (STP, energy ratio) by mix, means over repeats; a series for each label and mode.

    Points of a sweep that have one mix are series of their own.
    """
    points: dict[tuple[str, str, str], set[str]] = {}
    for run in runs:
        points.setdefault((run.spec.label, run.result.mode.value, run.mix), set()).add(run.point)
    found: dict[str, dict[str, list[FoundRun]]] = {}
    for run in sorted(runs, key=lambda run: numbers_within(run.point)):
        key = (run.spec.label, run.result.mode.value, run.mix)
        name = f"{key[0]} {key[1]}" if len(points[key]) == 1 else f"{key[0]} {run.method}"
        found.setdefault(name, {}).setdefault(run.mix, []).append(run)
    return [
        Mixes(
            name,
            {
                mix: (
                    mean_of([run.metrics.stp for run in those]),
                    mean_of([run.metrics.energy_ratio for run in those]),
                )
                for mix, those in by_mix.items()
            },
        )
        for name, by_mix in found.items()
    ]


def published_mixes() -> list[Mixes]:
    """HotCarbon's (STP, energy ratio) by mix, without its runs of one model."""
    return [
        Mixes(
            f"{each.device} {each.mode}, published",
            {
                "+".join(sorted(run.models)): (
                    run.stp,
                    math.nan if run.energy_ratio is None else run.energy_ratio,
                )
                for run in each.runs
                if len(run.models) > 1
            },
            published=True,
        )
        for each in hotcarbon_sets()
    ]


def draw_dedicated(runs: Sequence[FoundRun], mode: Mode, out: Path, stem: str) -> Drawn:
    """HotCarbon's two by two: the work of the window on one shared GPU, and on a GPU for each model."""
    several = len({(run.mix, run.point) for run in runs}) > len({run.mix for run in runs})
    groups: dict[str, list[FoundRun]] = {}
    one = len({run.mix for run in runs}) == 1
    for run in sorted(runs, key=lambda run: numbers_within(run.point)):
        both = run.point if one and run.point else f"{run.mix}, {run.point}"
        groups.setdefault(both if several else run.mix, []).append(run)
    shared, dedicated = f"shared ({mode})", "a GPU for each model"

    def panel(title: str, unit: str, place: int) -> Panel:
        both = [[_dedicated(run)[place] for run in those] for those in groups.values()]
        return Panel(
            title,
            unit,
            list(groups),
            {
                shared: [bar_of([one for one, _ in values]) for values in both],
                dedicated: [bar_of([two for _, two in values]) for values in both],
            },
        )

    panels = [
        panel("Time until the work is done", "s", 0),
        panel("GPU time", "GPU s", 1),
        panel("Energy while GPUs work", "kJ", 2),
        panel("Embodied carbon", "g CO2e", 3),
    ]
    if all(run.carbon is not None and run.carbon.usd is not None for run in runs):
        panels[1] = panel("Cost of GPU time", "USD", 4)
    return draw_bars(panels, out, stem, title=f"Shared against dedicated GPUs, {mode}", columns=2)


def _dedicated(run: FoundRun) -> list[tuple[float | None, float | None]]:
    """(shared, dedicated) makespan, GPU time, energy in kJ, embodied carbon and cost of one run."""
    metrics, carbon = run.metrics, run.carbon
    alone_s = metrics.gpu_s_alone
    if alone_s is None:
        return [(None, None)] * 5
    spans = [
        job.work / job.solo_throughput_per_s for job in metrics.jobs if job.solo_throughput_per_s
    ]
    joules = metrics.energy.joules, metrics.energy_alone_j
    scale = alone_s / metrics.window_s if metrics.window_s else 0.0
    grams, usd = (carbon.embodied_g, carbon.usd) if carbon is not None else (None, None)
    return [
        (metrics.window_s, max(spans, default=None)),
        (metrics.window_s, alone_s),
        _pair(*(None if each is None else each / 1000 for each in joules)),
        (grams, None if grams is None else grams * scale),
        (usd, None if usd is None else usd * scale),
    ]


def _pair(one: float | None, two: float | None) -> tuple[float | None, float | None]:
    return (one, two) if one is not None and two is not None else (None, None)
