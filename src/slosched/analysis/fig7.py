"""Figure 7: how much of the workload is satisfied as its SLO grows (Clockwork, OSDI'20, §6.3).

The default form has one point per SLO step: satisfaction over the SLO multiplier, and below it
goodput and latency. `published=True` draws the paper's own form instead (`fig7_published`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.fig7_published import draw_published
from slosched.analysis.runs import labels, open_run
from slosched.analysis.tables import CLIENT_VIEW, CONTROLLER_VIEW, StepSummary, summarise_run
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS

#: More steps than this crowd the axis, and only some are labelled.
_MOST_TICKS = 14

#: How the client's judgement is drawn.
_DASHED: dict[str, Any] = {"linestyle": (0, (4, 1.8)), "linewidth": 1.3}


def plot_fig7(run_dirs: Sequence[Path], out: Path, *, published: bool = False) -> list[Path]:
    """Draw the runs into the directory `out` as PNG and PDF; return the paths written.

    A run directory holds a request log, a client log or both; the path of a request log is accepted too.
    The published form also writes the two TSV files of the published plotter. Raises InvalidConfig
    if a directory holds no run or nothing can be drawn, MissingPackage without matplotlib.
    """
    runs = [open_run(Path(path)) for path in run_dirs]
    if not runs:
        raise InvalidConfig("nothing to draw: name at least one run directory")
    if published:
        return draw_published(runs, out)
    from slosched.analysis import style

    with style.look():
        steps = [summarise_run(run) for run in runs]
        figure = sweep_figure(list(zip(labels(runs), steps, strict=True)))
        return style.save(figure, out, "fig7")


@dataclass(frozen=True)
class _Curve:
    """The steps of one run, one sweep, one side's view."""

    label: str
    colour: str
    marker: str
    client: bool
    steps: list[StepSummary]


def sweep_figure(runs: Sequence[tuple[str, Sequence[StepSummary]]]) -> Any:
    """Return the figure of runs, each with its label. To be made and saved within `style.look()`.

    Raises InvalidConfig without any step.
    """
    from slosched.analysis import style

    curves = _curves(runs)
    if not curves:
        raise InvalidConfig("nothing to draw: the logs hold no requests yet")
    # An absolute SLO has no multiplier, so one such step turns the axis to time.
    factors = all(step.slo_factor > 0 for curve in curves for step in curve.steps)
    figure = style.Figure(figsize=(9.0, 7.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08, hspace=0.04, wspace=0.04)
    axes = figure.subplot_mosaic(
        [["satisfaction", "satisfaction"], ["goodput", "latency"]], height_ratios=[1.25, 1]
    )
    _draw_satisfaction(axes["satisfaction"], curves, factors)
    _draw_goodput(axes["goodput"], curves, factors)
    _draw_latency(axes["latency"], curves, factors)
    for ax in axes.values():
        _scale_x(ax, curves, factors, full_width=ax is axes["satisfaction"])
    _legend(figure, curves)
    return figure


def _curves(runs: Sequence[tuple[str, Sequence[StepSummary]]]) -> list[_Curve]:
    from slosched.analysis.style import COLOURS, MARKERS

    curves: list[_Curve] = []
    place = 0
    for label, summaries in runs:
        sweeps = sorted({s.sweep for s in summaries})
        for sweep in sweeps:
            name = label if len(sweeps) == 1 else f"{label}, sweep {sweep + 1}"
            colour = COLOURS[place % len(COLOURS)]
            marker = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
            place += 1
            for view in (CONTROLLER_VIEW, CLIENT_VIEW):
                steps = [s for s in summaries if s.sweep == sweep and s.view == view]
                steps.sort(key=lambda s: (s.slo_factor, s.slo_ns))
                if steps:
                    curves.append(_Curve(name, colour, marker, view == CLIENT_VIEW, steps))
    return curves


def _x(step: StepSummary, factors: bool) -> float:
    return step.slo_factor if factors else step.slo_ns / NS_PER_MS


def _line(ax: Any, curve: _Curve, factors: bool, values: Sequence[float], **more: Any) -> None:
    look: dict[str, Any] = {
        "color": curve.colour,
        "marker": curve.marker,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "clip_on": False,
        "zorder": 3,
    }
    if curve.client:
        # Behind the controller's curve, so that it shows only where the two differ.
        look |= _DASHED | {
            "markerfacecolor": "white",
            "markeredgecolor": curve.colour,
            "markeredgewidth": 1.1,
            "zorder": 2.5,
        }
    ax.plot([_x(s, factors) for s in curve.steps], values, **(look | more))


def _draw_satisfaction(ax: Any, curves: Sequence[_Curve], factors: bool) -> None:
    for curve in curves:
        _line(ax, curve, factors, [s.satisfaction for s in curve.steps])
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.50", "0.75", "1"])
    ax.set_ylabel("Satisfaction (share of all requests)")
    sides = {curve.client for curve in curves}
    only = (
        ""
        if len(sides) > 1
        else f", judged by the {CLIENT_VIEW if True in sides else CONTROLLER_VIEW}"
    )
    ax.set_title(f"Workload satisfaction{only}")


def _draw_goodput(ax: Any, curves: Sequence[_Curve], factors: bool) -> None:
    for curve in _one_side(curves):
        _line(ax, curve, factors, [s.goodput_rps for s in curve.steps])
    top = max((s.goodput_rps for c in curves for s in c.steps if s.goodput_rps >= 0), default=0.0)
    ax.set_ylim(0, max(top * 1.08, 1.0))
    ax.set_ylabel("In time (requests/s)")
    ax.set_title("Goodput")


def _draw_latency(ax: Any, curves: Sequence[_Curve], factors: bool) -> None:
    from slosched.analysis.style import PALE, FuncFormatter, LogLocator, NullLocator

    chosen = _one_side(curves)
    for curve in chosen:
        p50 = [s.p50_ns / NS_PER_MS for s in curve.steps]
        p99 = [s.p99_ns / NS_PER_MS for s in curve.steps]
        _line(ax, curve, factors, p50, linestyle="-", linewidth=1.6, markersize=4.5)
        _line(ax, curve, factors, p99, linestyle=(0, (1.2, 1.2)), linewidth=1.6, markersize=4.5)
    steps = sorted((s for c in chosen for s in c.steps), key=lambda s: _x(s, factors))
    if steps and _same_b1(steps, factors):
        places, slos = [_x(s, factors) for s in steps], [s.slo_ns / NS_PER_MS for s in steps]
        line = {"color": PALE, "linewidth": 1.1, "zorder": 1.5}
        if places[0] == places[-1]:
            ax.axhline(slos[-1], **line)
        else:
            ax.plot(places, slos, **line)
        ax.annotate(
            "SLO",
            (places[-1], slos[-1]),
            xytext=(-16, 1),
            textcoords="offset points",
            ha="right",
            va="top" if places[0] == places[-1] else "center",
            color=PALE,
            fontsize=9,
        )
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylabel("Latency of successes (ms)")
    ax.set_title("Latency: p50 solid, p99 dotted")


def _one_side(curves: Sequence[_Curve]) -> list[_Curve]:
    """The controller's curves where there are any: two sides in a small panel would be a thicket."""
    return [c for c in curves if not c.client] or list(curves)


def _same_b1(steps: Sequence[StepSummary], factors: bool) -> bool:
    """True if one SLO line holds for all runs: a multiplier means the same time in each."""
    if not factors:
        return True
    units = [s.slo_ns / s.slo_factor for s in steps]
    return max(units) < 1.05 * min(units)


def _scale_x(ax: Any, curves: Sequence[_Curve], factors: bool, *, full_width: bool) -> None:
    from slosched.analysis.style import FixedLocator, FuncFormatter, NullLocator

    places = sorted({_x(step, factors) for curve in curves for step in curve.steps})
    ax.set_xscale("log")
    margin = (places[-1] / places[0]) ** 0.025 if places[0] < places[-1] else 2.0
    ax.set_xlim(places[0] / margin, places[-1] * margin)
    ticks = _thin(places, _MOST_TICKS if full_width else _MOST_TICKS // 2)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    ax.set_xlabel("SLO multiplier (times b1)" if factors else "SLO (ms)")


def _thin(places: Sequence[float], most: int) -> list[float]:
    stride = math.ceil(len(places) / most)
    return list(places[::stride])


def _tick(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _legend(figure: Any, curves: Sequence[_Curve]) -> None:
    """Above the panels the runs; below them, where both judge, which line is whose judgement."""
    from slosched.analysis.style import INK, Line2D

    handles: dict[str, Any] = {}
    for c in curves:
        handles.setdefault(c.label, Line2D([], [], color=c.colour, marker=c.marker))
    columns = min(len(handles), 3)
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns)
    if len({c.client for c in curves}) > 1:
        solid = Line2D([], [], color=INK, label=f"judged by the {CONTROLLER_VIEW}")
        dashed = Line2D([], [], color=INK, label=f"judged by the {CLIENT_VIEW}", **_DASHED)
        figure.legend(handles=[solid, dashed], loc="outside lower left", ncols=2)
