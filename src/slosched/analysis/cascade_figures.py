"""Figures of model cascades: threshold, violations and quality over time, and quality against violations.

The three over time are those of DiffServe's artifact (MLSys'25, Figure 5), each a file of its own. Their
values come from the caller, who says by `note` where they are not what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.legends import legend_below, look_of, size_with_legend
from slosched.errors import InvalidConfig

THRESHOLD = "confidence_threshold"
VIOLATIONS = "slo_violation_ratio"
FID = "fid"
#: The kinds of figures over time: title and label of the axis. The file is CASCADE_KIND.
KINDS = {
    THRESHOLD: ("Confidence threshold", "Threshold"),
    VIOLATIONS: ("SLO violation ratio", "Share of requests"),
    FID: ("FID at the share of light answers", "FID (less is better)"),
}
#: The smallest height of an axis of FIDs.
_LEAST_SPAN = 1.0
#: Width, and height without the legend.
_SIZE_IN = (8.6, 3.0)


@dataclass(frozen=True)
class Curve:
    """A line over time. `colour` is its place in the palette; a curve of steps holds each value until the next
    time. NaN leaves a gap."""

    name: str
    times_s: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    dashed: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Point:
    """A policy as a point: means over seeds, and half of their 95 % intervals (0: one seed)."""

    name: str
    violation_ratio: float
    fid: float
    violation_half: float = 0.0
    fid_half: float = 0.0


def draw_over_time(
    cascade: str, curves: Mapping[str, Sequence[Curve]], out: Path, *, note: str = ""
) -> list[Path]:
    """Draw each kind of `curves` into `out` as CASCADE_KIND.png and .pdf; return the paths.

    `note` stands in every title, and "published" in the names: what was measured is not overwritten. Raises
    InvalidConfig if nothing can be drawn or a file cannot be written, MissingPackage without matplotlib.
    """
    from slosched.analysis import style

    paths: list[Path] = []
    for kind, lines in curves.items():
        if not any(_finite(line.values) for line in lines):
            continue  # nothing is known of it, as of the FID of a cascade without a table
        with style.look():
            figure = _over_time(f"{KINDS[kind][0]}, {cascade}{_below(note)}", kind, lines)
            name = f"{cascade}_{kind}_published" if note else f"{cascade}_{kind}"
            paths += style.save(figure, out, name)
    if not paths:
        raise InvalidConfig("nothing to draw: the run has no requests")
    return paths


def draw_scatter(
    cascade: str, points: Sequence[Point], out: Path, *, bound_fid: float | None = None
) -> list[Path]:
    """Draw FID against violations into `out` as CASCADE_quality_violations.png and .pdf; return the paths.

    `bound_fid` is a line that no policy without a violation goes below. Raises as `draw_over_time` does.
    """
    from slosched.analysis import style

    shown = [point for point in points if math.isfinite(point.fid + point.violation_ratio)]
    if not shown:
        raise InvalidConfig("nothing to draw: no run has both violations and a FID")
    with style.look():
        return style.save(_scatter(cascade, shown, bound_fid), out, f"{cascade}_quality_violations")


def _scatter(cascade: str, points: Sequence[Point], bound_fid: float | None) -> Any:
    from slosched.analysis import style

    names = [point.name for point in points] + ["clairvoyant fluid bound"]
    figure = style.Figure(figsize=size_with_legend(6.4, 4.0, names), layout="constrained")
    ax = figure.subplots()
    for place, point in enumerate(points):
        colour, marker = look_of(place)
        low, high = _within_shares(point)
        ax.errorbar(
            point.violation_ratio,
            point.fid,
            xerr=[[low], [high]] if point.violation_half else None,
            yerr=point.fid_half or None,
            color=colour,
            marker=marker,
            markersize=7.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            elinewidth=1.2,
            linestyle="",
            capsize=2,
            zorder=_order(place),
            label=point.name,
        )
    if bound_fid is not None and math.isfinite(bound_fid):
        ax.axhline(bound_fid, color=style.PALE, linestyle=":", label=names[-1])
    # No ratio is below 0: the axis leaves room for a marker there, and none for a tick.
    right = max(point.violation_ratio + _within_shares(point)[1] for point in points) or 1.0
    ax.set_xlim(-0.03 * right, 1.03 * right)
    ax.set_xlabel("SLO violation ratio")
    ax.set_ylabel("FID by the table (less is better)")
    ax.set_title(f"Quality and violations, {cascade}")
    legend_below(figure, ax, names)
    return figure


def _within_shares(point: Point) -> tuple[float, float]:
    """How far the interval of a violation ratio reaches down and up: a share is within 0..1."""
    half, ratio = point.violation_half, point.violation_ratio
    return max(0.0, min(half, ratio)), max(0.0, min(half, 1 - ratio))


def _over_time(title: str, kind: str, lines: Sequence[Curve]) -> Any:
    from slosched.analysis import style

    names = [line.name for line in lines]
    figure = style.Figure(figsize=size_with_legend(*_SIZE_IN, names), layout="constrained")
    ax = figure.subplots()
    for line in lines:
        colour, _ = look_of(line.colour)
        ax.plot(
            line.times_s,
            line.values,
            color=colour,
            linestyle=(0, (3, 1.5)) if line.dashed else "-",
            linewidth=1.5,
            drawstyle="steps-post" if line.steps else "default",
            zorder=_order(line.colour),
            clip_on=False,  # a marker at the edge is whole
            label=line.name,
            **_markers(line, lines),
        )
    if kind != FID:
        top = max((max(_finite(line.values), default=0.0) for line in lines), default=0.0) or 1.0
        ax.set_ylim(-0.03 * top, 1.05 * top)  # so that a curve at 0 is not half behind the axis
    else:
        _widen(ax, [value for line in lines for value in _finite(line.values)])
    ax.set_xlim(left=0)
    ax.set_xlabel("Time from the first request (s)")
    ax.set_ylabel(KINDS[kind][1])
    ax.set_title(title)
    legend_below(figure, ax, names)
    return figure


def _widen(ax: Any, fids: Sequence[float]) -> None:
    """Give the axis of FIDs at least _LEAST_SPAN: less than that apart they are about the same."""
    low, high = min(fids), max(fids)
    if high - low < _LEAST_SPAN:
        middle = (low + high) / 2
        ax.set_ylim(middle - _LEAST_SPAN / 2, middle + _LEAST_SPAN / 2)


def _order(place: int) -> float:
    """The zorder of the policy at `place`: the first one is above the others."""
    return 3 + 1 / (1 + place)


def _markers(line: Curve, lines: Sequence[Curve]) -> dict[str, Any]:
    """Markers along a curve among several, each curve's at other times: curves that coincide show so."""
    count, points = len({each.colour for each in lines}), len(line.times_s)
    if points == 1:
        return {"marker": "o"}
    if count == 1 or line.dashed or not points:
        return {}
    every = max(count, points // 10)
    look = {"marker": look_of(line.colour)[1], "markersize": 6, "markeredgecolor": "white"}
    return {
        **look,
        "markeredgewidth": 0.5,
        "markevery": (line.colour * every // count % points, every),
    }


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _below(note: str) -> str:
    """A line of its own: both together are wider than the figure."""
    return f"\n({note})" if note else ""
