"""Panels one above the other that share an axis of time: what figures 6 and 9 are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Series:
    """One line: a value for each window. `colour` is its place in the palette."""

    name: str
    values: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel. A `log` axis leaves out what is not above 0; `top` fixes the upper end."""

    title: str
    unit: str
    series: Sequence[Series]
    log: bool = False
    top: float | None = None
    #: A level to be marked, and its name: an SLO.
    level: tuple[float, str] | None = None


def draw_panels(
    panels: Sequence[Panel],
    times_s: Sequence[float],
    out: Path,
    stem: str,
    *,
    what: str,
    width_in: float = 8.6,
) -> list[Path]:
    """Draw `panels` over `times_s`, the middles of the windows, into `out`; return the paths.

    `what` says from when the time counts. Raises MissingPackage, InvalidConfig.
    """
    from slosched.analysis import style

    with style.look():
        figure = panels_figure(panels, times_s, what=what, width_in=width_in)
        return style.save(figure, out, stem)


def panels_figure(
    panels: Sequence[Panel], times_s: Sequence[float], *, what: str, width_in: float = 8.6
) -> Any:
    """Return the figure that `draw_panels` saves. To be made and saved within `style.look()`."""
    from slosched.analysis import style

    scale, unit = _unit(times_s)
    figure = style.Figure(figsize=(width_in, 1.75 * len(panels) + 0.5), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.05, w_pad=0.06)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, [time / scale for time in times_s])
    axes[-1].set_xlabel(f"{what} ({unit})")
    axes[-1].set_xlim(left=min(0.0, times_s[0] / scale))
    return figure


def _unit(times_s: Sequence[float]) -> tuple[float, str]:
    span_s = times_s[-1]
    if span_s > 3 * 3600:
        return 3600.0, "h"
    return (60.0, "min") if span_s > 300 else (1.0, "s")


def _draw(ax: Any, panel: Panel, times: Sequence[float]) -> None:
    from slosched.analysis.style import COLOURS, PALE, FuncFormatter, LogLocator, NullLocator

    single = len(times) == 1
    for series in panel.series:
        values = [value if value > 0 or not panel.log else float("nan") for value in series.values]
        ax.plot(
            times,
            values,
            color=COLOURS[series.colour],
            label=series.name,
            linewidth=1.5,
            linestyle=(0, (3, 1.5)) if series.dashed else "-",
            marker="o" if single else "",
        )
    if panel.level is not None:
        height, name = panel.level
        ax.axhline(height, color=PALE, linewidth=1.0, linestyle=":", zorder=1)
        ax.annotate(
            name,
            (1, height),
            xycoords=("axes fraction", "data"),
            xytext=(-2, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            color=PALE,
            fontsize=8,
        )
    if panel.log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        subs = (
            (1,) if high > 300 * low else (1, 2, 5) if high > 6 * low else (1, 1.5, 2, 3, 4, 6, 8)
        )
        ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        known = [v for s in panel.series for v in s.values if v == v]
        # All zeros stand on an axis that reads as such, and not on one to a billionth.
        ax.set_ylim(0, panel.top or 1.12 * max(known, default=0.0) or 1.0)
    ax.set_ylabel(panel.unit)
    ax.set_title(panel.title)
    if len(panel.series) > 1:
        # Beside the title, where no line can be.
        ax.legend(
            loc="lower right",
            bbox_to_anchor=(1, 0.98),
            ncols=len(panel.series),
            fontsize=8.5,
            borderaxespad=0.1,
            handlelength=1.6,
            columnspacing=1.2,
        )
