"""Figures 5 to 11: which runs each needs at which scale, and how it is drawn from their directories.

The one table of these experiments (Clockwork, OSDI'20, §6): runs on hosts, on this host and in virtual time
all come from it. Scales: `published` is as long and as large as in the paper; `quick` takes a simulation two
minutes of CPU at most; `smoke` is as short as can be drawn, to see that hosts, files and figure work.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import Drawn, columns_text
from slosched.analysis.fig5 import plot_fig5
from slosched.analysis.fig6 import plot_fig6
from slosched.analysis.fig7 import plot_fig7
from slosched.analysis.fig8 import plot_fig8
from slosched.analysis.fig9 import plot_fig9
from slosched.analysis.fig10 import plot_fig10
from slosched.analysis.fig11 import plot_fig11
from slosched.analysis.runs import open_run
from slosched.analysis.tables import CONTROLLER_VIEW, StepSummary, as_json, summarise_run
from slosched.config import SchedulerConfig
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_MS, NS_PER_S

SCALES = ("smoke", "quick", "published")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run of a figure (a configuration): its name, the workload's command, and what serves it.

    `duration_ns` ends a workload that would continue; a live run needs it always. `gpus` is the number of
    GPUs that serve; `profile` is what emulated ones are. With `inputs` each request carries an input.
    """

    name: str
    workload: str
    scheduler: SchedulerConfig
    duration_ns: int
    gpus: int = 6
    profile: str = "v100"
    inputs: bool = False
    seed: int = 1

    @property
    def words(self) -> list[str]:
        """The workload as `slosched client` takes it: a name and its values, or a TOML file."""
        return shlex.split(self.workload)

    def described(self) -> dict[str, Any]:
        """What the run is, for manifests and tables: fit for JSON."""
        scheduler = self.scheduler
        return {
            "name": self.name,
            "workload": self.workload,
            "scheduler": f"{scheduler.policy}:{scheduler.fidelity}",
            "max_batch": scheduler.max_batch,
            "gpus": self.gpus,
            "profile": self.profile,
            "seed": self.seed,
        }


#: (the runs' parts, their directories, scale, where to) -> what was drawn.
Draw = Callable[[Sequence[Part], Sequence[Path], str, Path], Drawn]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure: `parts` of a scale, and how it is drawn.

    `live_only`: virtual time has no answer to the figure's question. `whole`: it is drawn from all parts or not
    at all. `inputs_on_hosts`: the published runs sent inputs from a client on a host of its own. `runs_of` is
    the figure whose runs these are, if that is another one (0: its own). `left_out` are keys of the numbers
    that take too much space in a committed table.
    """

    number: int
    text: str
    parts: Callable[[str], list[Part]]
    draw: Draw
    live_only: bool = False
    inputs_on_hosts: bool = False
    runs_of: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"fig{self.number}"


def figure_named(name: str) -> Figure:
    """The figure "fig7". Raises UnknownName."""
    for figure in FIGURES.values():
        if figure.name == name:
            return figure
    raise UnknownName("experiment", name, [figure.name for figure in FIGURES.values()])


def chosen_parts(figure: Figure, scale: str, names: Sequence[str] = ()) -> list[Part]:
    """The figure's parts at a scale, in the table's order; only those of `names`, whose case does not matter.

    Raises UnknownName, and InvalidConfig for a name that is given twice.
    """
    if scale not in SCALES:
        raise UnknownName("scale", scale, list(SCALES))
    parts = figure.parts(scale)
    known = [part.name for part in parts]
    wanted = [name.lower() for name in names]
    for place, name in enumerate(wanted):
        if name not in known:
            raise UnknownName(f"configuration of {figure.name}", name, known)
        if name in wanted[:place]:
            raise InvalidConfig(f"the configuration {name} is named twice")
    return [part for part in parts if not wanted or part.name in wanted]


def infer5(
    *,
    max_exec_ns: int = 250 * NS_PER_MS,
    slo_ns: int = 100 * NS_PER_MS,
    policy: str = "INFER5",
    fidelity: str = "best",
) -> SchedulerConfig:
    """The options of the published experiments: schedule_ahead 5 ms, max_exec 250 ms, max_batch 8.

    The last two are the published code's defaults; slosched's own would batch 16, which serves more and delays
    urgent requests longer.
    """
    return SchedulerConfig(
        policy=policy,
        fidelity=fidelity,
        schedule_ahead_ns=5 * NS_PER_MS,
        default_slo_ns=slo_ns,
        max_exec_ns=max_exec_ns,
        max_batch=8,
        max_gpus=10_000,
    )


# ------------------------------------------------------------------------------------- Figure 5

_SLOS_MS = (10, 25, 50, 100, 250, 500)
_SCHEDULERS = (("INFER5", "best"), ("INFER5", "paper"), ("AIMD", "best"), ("FIFO", "best"))
#: Seconds of a run, of its counted part, and of what follows that.
_FIG5_S = {"smoke": (4, 2, 1), "quick": (20, 15, 1), "published": (1800, 600, 60)}


def _fig5_parts(scale: str) -> list[Part]:
    return [
        Part(
            name=f"{policy.lower()}-{fidelity}-{slo_ms}ms",
            workload="comparison_experiment2 15 16",
            scheduler=infer5(slo_ns=slo_ms * NS_PER_MS, policy=policy, fidelity=fidelity),
            duration_ns=_FIG5_S[scale][0] * NS_PER_S,
            gpus=1,
            inputs=True,
        )
        for policy, fidelity in _SCHEDULERS
        for slo_ms in _SLOS_MS
    ]


def _draw_fig5(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    _, window_s, margin_s = _FIG5_S[scale]
    return plot_fig5(runs, out, window_ns=window_s * NS_PER_S, margin_ns=margin_s * NS_PER_S)


# ------------------------------------------------------------------------------------- Figure 6

#: Major models, lead-in in s, window in s.
_FIG6_SIZES = {"smoke": (6, 2, 1), "quick": (300, 5, 5), "published": (3600, 300, 10)}


def _fig6_parts(scale: str) -> list[Part]:
    models, lead_s, _ = _FIG6_SIZES[scale]
    return [
        Part(
            name="bursty",
            workload=f"bursty_experiment {models} {lead_s}",
            scheduler=infer5(),
            duration_ns=(models + lead_s) * NS_PER_S,
            gpus=1,
        )
    ]


def _draw_fig6(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig6(runs[0], out, window_ns=_FIG6_SIZES[scale][2] * NS_PER_S)


# ------------------------------------------------------------------------------------- Figure 7

_FIG7_COPIES, _FIG7_RATES = (12, 48), (600, 1200, 2400)
#: How the SLO grows, number of steps, seconds of each.
_FIG7_SWEEPS = {"smoke": ("3", 5, 1), "quick": ("1.5", 12, 4), "published": ("1.5", 12, 30)}


def _fig7_parts(scale: str) -> list[Part]:
    factor, steps, period_s = _FIG7_SWEEPS[scale]
    return [
        Part(
            name=f"n{copies}-r{rate}",
            workload=f"slo-exp-1 resnet50_v2 {copies} poisson {rate} 1 100 {factor} mul {period_s}",
            scheduler=infer5(),
            duration_ns=steps * period_s * NS_PER_S,
        )
        for copies in _FIG7_COPIES
        for rate in _FIG7_RATES
    ]


def _draw_fig7(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    files = [path for form in (False, True) for path in plot_fig7(runs, out, published=form)]
    names = [part.name for part in parts]
    steps = {name: summarise_run(open_run(run)) for name, run in zip(names, runs, strict=True)}
    numbers = {"runs": {name: as_json(found) for name, found in steps.items()}}
    return Drawn(files, numbers, _fig7_table(steps))


def _fig7_table(steps: dict[str, list[StepSummary]]) -> str:
    """A line for each run, a column for each SLO; percent in time, cut off and not rounded.

    A client that stalled for longer than a step has no requests in it, and its run no number.
    """
    views = {
        name: {s.slo_text: f"{int(1000 * s.satisfied / s.requests) / 10:.1f}" for s in found}
        for name, every in steps.items()
        for found in [[s for s in every if s.view == CONTROLLER_VIEW]]
    }
    slos = [*max(views.values(), key=len)]
    rows = [(name, *(found.get(slo) for slo in slos)) for name, found in views.items()]
    return columns_text(("% in time", *slos), rows) + "\njudged by the controller, from arrival"


# ------------------------------------------------------------------------------------- Figure 8

_BACKGROUNDS = ((0, 0), (12, 16), (48, 4))
#: How the SLO grows, number of steps, seconds of a step and of a window.
_FIG8_SWEEPS = {
    "smoke": ("3", 5, 4, 1),
    "quick": ("1.5", 12, 6, 2),
    "published": ("1.5", 12, 30, 5),
}
_ONE_DAY_NS = 86_400 * NS_PER_S


def _fig8_parts(scale: str) -> list[Part]:
    factor, steps, step_s, _ = _FIG8_SWEEPS[scale]
    foreground = f"slo-exp-2 resnet50_v2 6 poisson 200 1 100 {factor} mul {step_s}"
    return [
        Part(
            name=f"m{copies}-c{concurrency}",
            workload=f"{foreground} {copies} {concurrency} 0",
            scheduler=infer5(slo_ns=_ONE_DAY_NS),
            duration_ns=steps * step_s * NS_PER_S,
        )
        for copies, concurrency in _BACKGROUNDS
    ]


def _draw_fig8(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig8(runs, out, window_ns=_FIG8_SWEEPS[scale][3] * NS_PER_S)


# ------------------------------------------------------------------------------- Figures 9 and 10

#: What is left out at the start, and the window, in s.
_FIG9_WINDOWS_S = {"smoke": (2, 1), "quick": (10, 2), "published": (600, 60)}


def _fig9_parts(scale: str) -> list[Part]:
    # Workers, models and rate of the trace, seconds of a minute of it, GPUs, and the length of the run in s.
    workload, gpus, length_s = {
        "smoke": ("azure 1 1 0.5 1 1 1 0", 1, 8),
        "quick": ("azure 3 1 1.0 4 1 1 0", 3, 60),
        "published": ("azure 8 1 1.0 4 60 1 0", 6, 8 * 3600),
    }[scale]
    return [
        Part(
            name="azure",
            workload=workload,
            scheduler=infer5(),
            duration_ns=length_s * NS_PER_S,
            gpus=gpus,
            profile="zoo61",
        )
    ]


def _draw_fig9(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    skip_s, window_s = _FIG9_WINDOWS_S[scale]
    return plot_fig9(runs[0], out, window_ns=window_s * NS_PER_S, skip_ns=skip_s * NS_PER_S)


def _draw_fig10(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig10(runs[0], out)


# ------------------------------------------------------------------------------------ Figure 11

#: Load factor 1 is this number of requests/s for each GPU.
_RATE_PER_GPU = 1200
#: Numbers of GPUs, trials, the highest rate of all in requests/s (0: no limit), seconds of a step, and
#: how much of the models' memory is asked for (as the workload counts it).
_FIG11_SIZES: dict[str, tuple[Sequence[int], int, int, int, int]] = {
    "smoke": ((1, 2), 1, 600, 2, 1),
    "quick": ((1, 2, 4, 8), 1, 9600, 2, 1),
    "published": (range(10, 151, 10), 3, 0, 60, 4),
}


def _fig11_parts(scale: str) -> list[Part]:
    numbers, trials, limit_rps, step_s, memory = _FIG11_SIZES[scale]
    return [
        _fig11_part(gpus, trial, limit_rps, step_s, memory)
        for gpus in numbers
        for trial in range(1, trials + 1)
    ]


def _fig11_part(gpus: int, trial: int, limit_rps: int, step_s: int, memory: int) -> Part:
    most = min(4.0, limit_rps / (_RATE_PER_GPU * gpus)) if limit_rps else 4.0
    steps, factor = 0, 0.1
    while factor <= most:
        steps, factor = steps + 1, factor * 1.5
    return Part(
        name=f"n{gpus}-trial{trial}",
        workload=f"azure_scalability_exp {gpus} 0.1 {most:g} 1.5 {step_s} {memory}",
        scheduler=infer5(max_exec_ns=25 * NS_PER_MS),
        duration_ns=steps * step_s * NS_PER_S,
        gpus=gpus,
        profile="zoo61",
        seed=trial,
    )


def _draw_fig11(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig11(runs, out, window_ns=_FIG11_SIZES[scale][3] * NS_PER_S)


# ------------------------------------------------------------------------------------- the table

FIGURES = {
    figure.number: figure
    for figure in (
        Figure(
            number=5,
            text="Goodput and latency of one GPU under closed loops, by SLO.",
            parts=_fig5_parts,
            draw=_draw_fig5,
            inputs_on_hosts=True,
            left_out=("nines", "quantiles_ms"),
        ),
        Figure(
            number=6,
            text="Thousands of models that wake one by one on one GPU.",
            parts=_fig6_parts,
            draw=_draw_fig6,
        ),
        Figure(
            number=7,
            text="Satisfaction by SLO, six runs.",
            parts=_fig7_parts,
            draw=_draw_fig7,
            inputs_on_hosts=True,
        ),
        Figure(
            number=8,
            text="Deadlines in the foreground beside closed loops.",
            parts=_fig8_parts,
            draw=_draw_fig8,
        ),
        Figure(
            number=9,
            text="A cluster under a trace of thousands of functions.",
            parts=_fig9_parts,
            draw=_draw_fig9,
        ),
        Figure(
            number=10,
            text="How far predictions of loads and inferences were off.",
            parts=_fig9_parts,
            draw=_draw_fig10,
            runs_of=9,
        ),
        Figure(
            number=11,
            text="How much load one controller carries.",
            parts=_fig11_parts,
            draw=_draw_fig11,
            live_only=True,
        ),
    )
}
