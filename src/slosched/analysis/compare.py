"""Several policies on the same arrivals: means over seeds, their intervals, and one figure.

Each policy serves the same arrivals for each seed, so policies are compared seed by seed: the interval
of a *difference* to the first policy is over the seeds' own differences, in which what the arrivals
have in common cancels out. Intervals are Student's, 95 %, over seeds; one seed has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import columns_text, plain
from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunResult, StepResult, pooled_verdict
from slosched.loadgen.verdict import Verdict
from slosched.units import NS_PER_MS, format_duration, format_share

#: Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
)

#: The row of a table that sums up all steps.
ALL_STEPS = "all"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. `half` is half the width of its 95 % interval; None with one seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """The estimate from one value for each seed; None without values."""
        if not values:
            return None
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, t95(count - 1) * math.sqrt(variance / count))


def t95(degrees: int) -> float:
    # Beyond the table within 0.003 of the quantile.
    return _T95[degrees - 1] if degrees <= len(_T95) else 1.96 + 2.4 / degrees


@dataclass(frozen=True)
class Cell:
    """The results of one policy in one step (and group). Shares and latencies are the client's.

    `lead` is the share in time less the first policy's; ratios are of means, to the first policy's.
    `p99_ns` is of successes, from seeds with enough of them. `holds` is from all seeds' requests
    together; there is no verdict over all steps. None where there is no data.
    """

    policy: str
    satisfaction: Estimate
    lead: Estimate | None
    goodput_rps: Estimate
    goodput_ratio: float | None
    p99_ns: Estimate | None
    p99_ratio: float | None
    holds: Verdict | None


@dataclass(frozen=True)
class ComparedStep:
    """One step (and group) of the workload with a cell for each policy, in their order."""

    index: int  # -1: all steps
    slo: str
    group: str
    slo_factor: float
    slo_ns: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Comparison:
    """Policies on one workload. The last steps sum up all of them, if there are several."""

    workload: str
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[ComparedStep, ...]

    @property
    def swept(self) -> tuple[ComparedStep, ...]:
        """The steps without their sums."""
        return tuple(step for step in self.steps if step.index >= 0)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON. Times in ns; None for what is not known."""
        return {
            "workload": self.workload,
            "policies": list(self.policies),
            "seeds": list(self.seeds),
            "interval": "Student's t over seeds, 95 %, half width",
            "steps": [
                {
                    "step": step.index if step.index >= 0 else ALL_STEPS,
                    "slo": step.slo,
                    "group": step.group,
                    "slo_factor": step.slo_factor,
                    "slo_ns": step.slo_ns,
                    "policies": {cell.policy: _cell_document(cell) for cell in step.cells},
                }
                for step in self.steps
            ],
        }


def _cell_document(cell: Cell) -> dict[str, Any]:
    def pair(estimate: Estimate | None) -> dict[str, Any] | None:
        return None if estimate is None else {"mean": estimate.mean, "half": estimate.half}

    document = {
        "satisfaction": pair(cell.satisfaction),
        "satisfaction_lead": pair(cell.lead),
        "goodput_rps": pair(cell.goodput_rps),
        "goodput_ratio": cell.goodput_ratio,
        "p99_ns": pair(cell.p99_ns),
        "p99_ratio": cell.p99_ratio,
        "holds": None if cell.holds is None else cell.holds.as_dict(),
    }
    cleaned = plain(document)
    assert isinstance(cleaned, dict)
    return cleaned


# ----------------------------------------------------------------------------------- comparing

Runs = Mapping[str, Mapping[int, RunResult]]
_Place = tuple[int, str]  # (index of a step, or -1 for all; group)


def compare_runs(runs: Runs) -> Comparison:
    """Compare `runs`: policy -> seed -> result, the first policy being what others are held against.

    Raises InvalidConfig without runs, or where a policy lacks a seed or ran another workload.
    """
    policies = tuple(runs)
    if not policies or not all(runs.values()):
        raise InvalidConfig("nothing to compare: there are no runs")
    seeds = tuple(runs[policies[0]])
    workload = next(iter(runs[policies[0]].values())).workload
    for policy, by_seed in runs.items():
        if tuple(by_seed) != seeds:
            raise InvalidConfig(f"{policy} was run with seeds {list(by_seed)}, not {list(seeds)}")
        for result in by_seed.values():
            if result.workload != workload:
                raise InvalidConfig(f"{policy} ran {result.workload!r}, not {workload!r}")
    tallied = {p: {s: _by_place(result) for s, result in runs[p].items()} for p in policies}
    # In order of the steps; one that only some runs reached counts over those.
    shapes: dict[_Place, StepResult] = {}
    for steps_by_seed in tallied.values():
        for steps in steps_by_seed.values():
            for place, step in steps.items():
                shapes.setdefault(place, step)
    places = sorted(shapes, key=lambda place: (place[0] < 0, *place))
    if len({index for index, _ in places}) == 2:  # one step and its sum, which says the same
        places = [place for place in places if place[0] >= 0]
    return Comparison(
        workload, policies, seeds, tuple(_step(place, shapes[place], tallied) for place in places)
    )


def _by_place(result: RunResult) -> dict[_Place, StepResult]:
    """The steps of a run by place, and the sums over all steps of each group."""
    steps = {(step.index, step.group): step for step in result.steps}
    for group in dict.fromkeys(step.group for step in result.steps):
        steps[-1, group] = _sum([step for step in result.steps if step.group == group])
    return steps


def _sum(steps: Sequence[StepResult]) -> StepResult:
    """Counts over several steps. Percentiles do not add up: 0 says that there is none."""
    return StepResult(
        index=-1,
        slo=ALL_STEPS,
        group=steps[0].group,
        slo_factor=0.0,
        slo_ns=0,
        duration_ns=sum(step.duration_ns for step in steps),
        sent=sum(step.sent for step in steps),
        in_time=sum(step.in_time for step in steps),
        met=sum(step.met for step in steps),
        codes={},
        latency_p50_ns=0,
        latency_p99_ns=0,
        issue_delay_p50_ns=0,
        issue_delay_p99_ns=0,
    )


_Tallied = Mapping[str, Mapping[int, Mapping[_Place, StepResult]]]


def _step(place: _Place, shape: StepResult, tallied: _Tallied) -> ComparedStep:
    first = next(iter(tallied.values()))
    base = {seed: steps[place] for seed, steps in first.items() if place in steps}
    cells = []
    for policy, by_seed in tallied.items():
        own = {seed: steps[place] for seed, steps in by_seed.items() if place in steps}
        if own:
            cells.append(_cell(policy, own, base))
    return ComparedStep(
        index=shape.index,
        slo=shape.slo,
        group=shape.group,
        slo_factor=shape.slo_factor,
        slo_ns=shape.slo_ns,
        cells=tuple(cells),
    )


def _cell(policy: str, own: Mapping[int, StepResult], base: Mapping[int, StepResult]) -> Cell:
    def estimate(
        steps: Mapping[int, StepResult], value_of: Callable[[StepResult], float]
    ) -> Estimate | None:
        return Estimate.of([value_of(step) for step in steps.values()])

    def p99(steps: Mapping[int, StepResult]) -> Estimate | None:
        claimed = [step.claimed_p99_ns for step in steps.values()]
        return Estimate.of([float(p99_ns) for p99_ns in claimed if p99_ns])

    satisfaction = estimate(own, lambda step: step.satisfaction)
    goodput = estimate(own, lambda step: step.goodput_rps)
    assert satisfaction is not None and goodput is not None
    both = [seed for seed in own if seed in base]
    return Cell(
        policy=policy,
        satisfaction=satisfaction,
        lead=Estimate.of([own[seed].satisfaction - base[seed].satisfaction for seed in both]),
        goodput_rps=goodput,
        goodput_ratio=_ratio(goodput, estimate(base, lambda step: step.goodput_rps)),
        p99_ns=p99(own),
        p99_ratio=_ratio(p99(own), p99(base)),
        holds=None
        if any(s.index < 0 for s in own.values())
        else pooled_verdict(list(own.values())),
    )


def _ratio(value: Estimate | None, base: Estimate | None) -> float | None:
    if value is None or base is None or base.mean == 0:
        return None
    return value.mean / base.mean


# ------------------------------------------------------------------------------------- as text


def comparison_text(comparison: Comparison) -> str:
    """Return the comparison as a table: for each step a row for each policy, ratios to the first."""
    first = comparison.policies[0]
    grouped = any(step.group for step in comparison.steps)
    several = len(comparison.seeds) > 1
    headings = ["policy", "step", *(["group"] if grouped else []), "deadline", "holds", "in time %"]
    headings += ["+-"] if several else []
    headings += [f"points to {first}", *(["+-"] if several else [])]
    headings += ["goodput/s", "ratio", "p99 ms", "ratio"]
    rows: list[list[object]] = []
    for step in comparison.steps:
        for cell in step.cells:
            row: list[object] = [cell.policy, step.slo, *([step.group] if grouped else [])]
            row.append(format_duration(step.slo_ns) if step.slo_ns else "-")
            row.append("-" if cell.holds is None else cell.holds.short)
            row += _with_interval(cell.satisfaction, several)
            row += _with_interval(None if cell.policy == first else cell.lead, several, signed=True)
            row += [f"{cell.goodput_rps.mean:.1f}", _two_places(cell.goodput_ratio)]
            row.append("-" if cell.p99_ns is None else f"{cell.p99_ns.mean / NS_PER_MS:.2f}")
            row.append(_two_places(cell.p99_ratio))
            rows.append(row)
    return columns_text(headings, rows)


def _with_interval(share: Estimate | None, several: bool, *, signed: bool = False) -> list[object]:
    """A share, or with `signed` a difference of shares, in per cent; and half of its interval if there are
    several seeds."""
    if share is None:
        return ["-", "-"] if several else ["-"]
    mean = f"{100 * share.mean:+.2f}" if signed else format_share(share.mean).removesuffix(" %")
    half = "-" if share.half is None else f"{100 * share.half:.2f}"
    return [mean, half] if several else [mean]


def _two_places(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# ------------------------------------------------------------------------------------- drawing


def draw_comparison(
    comparison: Comparison, out: Path, bounds: Sequence[Mapping[str, Any]] = ()
) -> list[Path]:
    """Draw satisfaction over the steps, a line for each policy, into `out` as PNG and PDF.

    The interval over seeds is shaded. A workload with one step is drawn as bars, one with groups of
    streams as a panel for each. `bounds` (dicts of CellBounds) become two lines of a sweep without
    groups. Returns the paths. Raises MissingPackage without matplotlib.
    """
    from slosched.analysis import style

    groups = list(dict.fromkeys(step.group for step in comparison.swept))
    with style.look():
        size = (9.0, 4.8) if len(groups) == 1 else (9.0, 1.2 + 3.0 * len(groups))
        figure = style.Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(groups), 1, squeeze=False)[:, 0]
        swept = len({step.index for step in comparison.swept}) > 1
        for ax, group in zip(panels, groups, strict=True):
            steps = [step for step in comparison.swept if step.group == group]
            (_draw_lines if swept else _draw_bars)(ax, comparison, steps)
            if group:
                ax.set_title(group)
            elif swept:
                _draw_bounds(ax, steps, bounds)
        if swept:
            drawn = _BOUND_LINES if bounds and groups == [""] else ()
            _legend(figure, comparison, drawn)
        return style.save(figure, out, "compare")


def _look(comparison: Comparison, policy: str) -> tuple[str, str]:
    """(colour, marker) of a policy; the same in every panel."""
    from slosched.analysis.style import COLOURS, MARKERS

    place = comparison.policies.index(policy)
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _draw_lines(ax: Any, comparison: Comparison, steps: Sequence[ComparedStep]) -> None:
    places, ticks, name = _x_axis(steps)
    for policy in comparison.policies:
        points = [
            (x, cell.satisfaction)
            for x, step in zip(places, steps, strict=True)
            for cell in step.cells
            if cell.policy == policy
        ]
        colour, marker = _look(comparison, policy)
        xs, means = [x for x, _ in points], [share.mean for _, share in points]
        ax.plot(
            xs,
            means,
            color=colour,
            marker=marker,
            markeredgecolor="white",
            markeredgewidth=0.7,
            clip_on=False,
            zorder=3 + 1 / (1 + comparison.policies.index(policy)),
        )
        halves = [share.half or 0.0 for _, share in points]
        low = [max(0.0, mean - half) for mean, half in zip(means, halves, strict=True)]
        high = [min(1.0, mean + half) for mean, half in zip(means, halves, strict=True)]
        ax.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0, zorder=2)
    _share_axis(ax.yaxis, ax.set_ylim)
    ax.set_ylabel("In time (share of all requests)")
    _scale_x(ax, places, ticks, name + _interval_words(comparison, "shaded"))


#: What a bound is called in the legend, where it stands, and its line.
_BOUND_LINES = (("upper bound", "best_upper", ":"), ("achievable", "achievable", "--"))


def _draw_bounds(
    ax: Any, steps: Sequence[ComparedStep], bounds: Sequence[Mapping[str, Any]]
) -> None:
    from slosched.analysis.style import PALE

    by_index = {bound["index"]: bound for bound in bounds}
    places, *_ = _x_axis(steps)
    for _, key, line in _BOUND_LINES:
        points = [
            (x, by_index[step.index][key])
            for x, step in zip(places, steps, strict=True)
            if step.index in by_index
        ]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        ax.plot(xs, ys, color=PALE, linestyle=line, linewidth=1.2, marker="", zorder=2)


def _x_axis(steps: Sequence[ComparedStep]) -> tuple[list[float], list[str], str]:
    """Where the steps stand, what their ticks say, and what the axis is called."""
    factors = [step.slo_factor for step in steps]
    slos = [step.slo_ns / NS_PER_MS for step in steps]
    if all(factors) and len(set(factors)) == len(factors):
        return factors, [f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in factors], "SLO (times b1)"
    if all(slos) and len(set(slos)) == len(slos):
        return slos, [f"{x:.3g}" if x < 100 else f"{x:.0f}" for x in slos], "SLO (ms)"
    return [step.index + 1.0 for step in steps], [step.slo for step in steps], "Step"


_MOST_TICKS = 14


def _scale_x(ax: Any, places: Sequence[float], ticks: Sequence[str], name: str) -> None:
    from slosched.analysis.style import FixedLocator, NullLocator

    if not name.startswith("Step"):
        ax.set_xscale("log")
        margin = (max(places) / min(places)) ** 0.025
        ax.set_xlim(min(places) / margin, max(places) * margin)
    stride = math.ceil(len(places) / _MOST_TICKS)
    ax.xaxis.set_major_locator(FixedLocator(list(places[::stride])))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels(list(ticks[::stride]))
    ax.set_xlabel(name)


def _share_axis(axis: Any, set_limits: Callable[[float, float], object]) -> None:
    set_limits(0, 1)
    axis.set_ticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.50", "0.75", "1"])


def _draw_bars(ax: Any, comparison: Comparison, steps: Sequence[ComparedStep]) -> None:
    from slosched.analysis.style import INK

    (step,) = steps
    names = [f"{cell.policy}\n{format_share(cell.satisfaction.mean, 1)}" for cell in step.cells]
    for place, cell in enumerate(step.cells):
        share = cell.satisfaction
        colour, _ = _look(comparison, cell.policy)
        ax.barh(place, share.mean, color=colour, height=0.62, zorder=2)
        if share.half is not None:
            low, high = max(0.0, share.mean - share.half), min(1.0, share.mean + share.half)
            ax.plot([low, high], [place, place], color=INK, linewidth=1.2, zorder=3)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    _share_axis(ax.xaxis, ax.set_xlim)
    ax.set_xlabel(f"In time (share of all requests){_interval_words(comparison, 'line')}")


def _interval_words(comparison: Comparison, drawn_as: str) -> str:
    """What the shade, or the line across a bar, means."""
    count = len(comparison.seeds)
    return f"; {drawn_as}: 95 % interval over {count} seeds" if count > 1 else ""


def _legend(figure: Any, comparison: Comparison, lines: Sequence[tuple[str, str, str]]) -> None:
    from slosched.analysis.style import PALE, Line2D

    handles = []
    for policy in comparison.policies:
        colour, marker = _look(comparison, policy)
        handles.append(Line2D([], [], color=colour, marker=marker, label=policy))
    for name, _, line in lines:
        handles.append(Line2D([], [], color=PALE, linestyle=line, marker="", label=name))
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 6))
