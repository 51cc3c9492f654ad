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

from slosched.errors import InvalidConfig

THRESHOLD = "confidence_threshold"
VIOLATIONS = "slo_violation_ratio"
FID = "fid"
#: The kinds of figures over time: title and label of the axis. The file is CASCADE_KIND.
KINDS = {
    THRESHOLD: ("Confidence threshold", "Threshold"),
    VIOLATIONS: ("SLO violation ratio", "Share of requests"),
    FID: ("FID by the share served", "FID (less is better)"),
}
_SIZE_IN = (8.6, 3.4)


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
            figure = _over_time(f"{KINDS[kind][0]} of {cascade}{_in_brackets(note)}", kind, lines)
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
        figure = style.Figure(figsize=(6.4, 4.4), layout="constrained")
        ax = figure.subplots()
        for place, point in enumerate(shown):
            ax.errorbar(
                point.violation_ratio,
                point.fid,
                xerr=point.violation_half or None,
                yerr=point.fid_half or None,
                color=style.COLOURS[place % len(style.COLOURS)],
                marker=style.MARKERS[place % len(style.MARKERS)],
                linestyle="",
                capsize=2,
                label=point.name,
            )
        if bound_fid is not None and math.isfinite(bound_fid):
            ax.axhline(bound_fid, color=style.PALE, linestyle=":", label="clairvoyant fluid bound")
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
        ax.set_xlabel("SLO violation ratio")
        ax.set_ylabel("FID by the table (less is better)")
        ax.set_title(f"Quality and violations of {cascade}")
        ax.legend()
        return style.save(figure, out, f"{cascade}_quality_violations")


def _over_time(title: str, kind: str, lines: Sequence[Curve]) -> Any:
    from slosched.analysis import style

    figure = style.Figure(figsize=_SIZE_IN, layout="constrained")
    ax = figure.subplots()
    for line in lines:
        ax.plot(
            line.times_s,
            line.values,
            color=style.COLOURS[line.colour % len(style.COLOURS)],
            linestyle=(0, (3, 1.5)) if line.dashed else "-",
            linewidth=1.5,
            marker="o" if len(line.times_s) == 1 else "",
            drawstyle="steps-post" if line.steps else "default",
            label=line.name,
        )
    if kind != FID:
        top = max((max(_finite(line.values), default=0.0) for line in lines), default=0.0)
        ax.set_ylim(0, 1.05 * top or 1.0)
    ax.set_xlim(left=0)
    ax.set_xlabel("Time from the first request (s)")
    ax.set_ylabel(KINDS[kind][1])
    ax.set_title(title)
    figure.legend(loc="outside lower left", ncols=3)
    return figure


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _in_brackets(note: str) -> str:
    return f" ({note})" if note else ""
