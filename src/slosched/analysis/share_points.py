"""Figures of shared GPUs as points: trade-offs, a knob's two effects, overhead by boundaries, then and now.

The first two are Deft's (plot_jct_scatter.py, plot_jct_2y.py): what the low job pays for what the high one
gains. The third is its cost of waiting for the device. The last compares STP and energy with published ones.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.compare import t95
from slosched.analysis.drawn import Drawn, columns_text
from slosched.analysis.legends import (
    legend_below,
    look_of,
    percent,
    short_all,
    size_with_legend,
)
from slosched.errors import InvalidConfig
from slosched.output_files import write_file

#: Guide lines of a trade-off: this share above the latency alone.
GUIDE = 0.1
#: The columns of Deft's jct_scatter_plot.csv.
TRADEOFF_COLUMNS = (
    *("sync", "xvals_abs", "yvals_abs", "xerrs_abs", "yerrs_abs"),
    *("xvals", "yvals", "xerrs", "yerrs"),
)


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """Mean latencies in ms with their standard errors (NaN: unknown). `low_ms` is of the low job's requests
    that overlap none of the high one; `knob` is what is swept."""

    name: str
    high_ms: float
    low_ms: float
    high_sem: float = math.nan
    low_sem: float = math.nan
    knob: float = math.nan


@dataclass(frozen=True)
class Alone:
    """Mean latencies in ms of both jobs alone; NaN: unknown."""

    high_ms: float = math.nan
    low_ms: float = math.nan


@dataclass(frozen=True)
class Fit:
    """y = a x + b by least squares. Halves of the 95 % intervals are NaN with two points."""

    a: float
    b: float
    a_half: float = math.nan
    b_half: float = math.nan
    r2: float = math.nan


@dataclass(frozen=True)
class Mixes:
    """(STP, energy ratio) by mix; NaN: unknown. What is `published` is drawn hollow."""

    name: str
    values: Mapping[str, tuple[float, float]]
    published: bool = False


# ------------------------------------------------------------------------------------- trade-offs


def draw_tradeoff(
    points: Sequence[TradeOff], alone: Alone, out: Path, stem: str, *, high: str, low: str
) -> Drawn:
    """Draw the low job's mean latency against the high one's, in ms and (if both ran alone) as inflation.

    Bars are standard errors; lines are GUIDE above the latency alone. Also writes STEM.csv in Deft's columns.
    Raises InvalidConfig without a point that has both, MissingPackage.
    """
    from slosched.analysis import style

    shown = [point for point in points if math.isfinite(point.high_ms + point.low_ms)]
    if not shown:
        raise InvalidConfig("nothing to draw: no run has requests of both jobs")
    labels = short_all([point.name for point in shown], 34)
    relative = math.isfinite(alone.high_ms + alone.low_ms)
    with style.look():
        size = size_with_legend(8.8 if relative else 5.6, 3.9, labels)
        figure = style.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, 2 if relative else 1, squeeze=False)[0]
        _scatter(axes[0], labels, [(p.high_ms, p.low_ms, p.high_sem, p.low_sem) for p in shown])
        axes[0].set_xlabel(f"Latency of {_brief(high)} (ms)")
        axes[0].set_ylabel(f"Latency of {_brief(low)}\nwithout overlap (ms)")
        if relative:
            _guides(axes[0], alone.high_ms, alone.low_ms)
            inflated = [_inflated(point, alone) for point in shown]
            _scatter(axes[1], labels, inflated)
            _guides(axes[1], 0.0, 0.0)
            for ax, set_label in (
                (axes[1].xaxis, axes[1].set_xlabel),
                (axes[1].yaxis, axes[1].set_ylabel),
            ):
                ax.set_major_formatter(style.FuncFormatter(lambda value, _: percent(value)))
                set_label(f"Inflation of {_brief(high if ax is axes[1].xaxis else low)}")
            figure.suptitle(
                f"Trade-off between {_brief(high)} and {_brief(low)}\n"
                "bars: standard errors; dashed: alone; dotted: 10 % above",
                x=0.01,
                ha="left",
                fontsize=10,
            )
        legend_below(figure, axes[0], labels)
        files = style.save(figure, out, stem)
    rows = [
        (
            _knob(point),
            point.high_ms,
            point.low_ms,
            point.high_sem,
            point.low_sem,
            *_inflated(point, alone),
        )
        for point in shown
    ]
    write_file(out / f"{stem}.csv", _csv_text(rows))
    numbers = {
        point.name: dict(zip(TRADEOFF_COLUMNS[1:], row[1:], strict=True))
        for point, row in zip(shown, rows, strict=True)
    }
    table = columns_text(
        ("point", "high ms", "low ms", "high inflation", "low inflation"),
        [(p.name, p.high_ms, p.low_ms, *_inflated(p, alone)[:2]) for p in shown],
    )
    return Drawn([*files, out / f"{stem}.csv"], numbers, table)


def _inflated(point: TradeOff, alone: Alone) -> tuple[float, float, float, float]:
    return (
        point.high_ms / alone.high_ms - 1,
        point.low_ms / alone.low_ms - 1,
        point.high_sem / alone.high_ms,
        point.low_sem / alone.low_ms,
    )


def _scatter(
    ax: Any,
    labels: Sequence[str],
    values: Sequence[tuple[float, float, float, float]],
) -> None:
    for place, (label, (x, y, x_sem, y_sem)) in enumerate(zip(labels, values, strict=True)):
        colour, marker = look_of(place)
        ax.errorbar(
            x,
            y,
            xerr=x_sem if math.isfinite(x_sem) else None,
            yerr=y_sem if math.isfinite(y_sem) else None,
            color=colour,
            marker=marker,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle="",
            elinewidth=1.1,
            capsize=2,
            label=label,
        )
    ax.margins(0.12)


def _guides(ax: Any, high: float, low: float) -> None:
    from slosched.analysis.style import PALE

    guides = (GUIDE, GUIDE) if not high and not low else (GUIDE * high, GUIDE * low)
    for line, at, above in ((ax.axvline, high, guides[0]), (ax.axhline, low, guides[1])):
        line(at, color=PALE, linestyle="--", linewidth=0.9, zorder=1)
        line(at + above, color=PALE, linestyle=":", linewidth=1.2, zorder=1)


def _brief(name: str) -> str:
    from slosched.analysis.legends import short

    return short(name, 26)


def _knob(point: TradeOff) -> object:
    if not math.isfinite(point.knob):
        return point.name
    return int(point.knob) if float(point.knob).is_integer() else point.knob


def _csv_text(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(TRADEOFF_COLUMNS)
    writer.writerows([_plain_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _plain_cell(value: object) -> object:
    return "" if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------ a knob


def draw_knob(
    points: Sequence[TradeOff],
    alone: Alone,
    out: Path,
    stem: str,
    *,
    knob: str,
    high: str,
    low: str,
) -> Drawn:
    """Draw both jobs against the knob, each on an axis of its own: as inflation if both ran alone, else in ms.

    The knob has a logarithmic axis where all its values are above 0. Raises InvalidConfig, MissingPackage.
    """
    from slosched.analysis import style

    shown = sorted(
        (p for p in points if math.isfinite(p.knob + p.high_ms + p.low_ms)), key=lambda p: p.knob
    )
    if not shown:
        raise InvalidConfig(f"nothing to draw: no run has both jobs and a value of {knob}")
    relative = math.isfinite(alone.high_ms + alone.low_ms)
    series = [
        _inflated(p, alone) if relative else (p.high_ms, p.low_ms, p.high_sem, p.low_sem)
        for p in shown
    ]
    names = short_all([f"{high} (left)", f"{low} (right)"], 40)
    unit = "Inflation" if relative else "Latency (ms)"
    with style.look():
        figure = style.Figure(figsize=size_with_legend(6.6, 3.6, names), layout="constrained")
        left = figure.subplots()
        right = left.twinx()
        right.spines["right"].set_visible(True)
        right.grid(visible=False)
        handles = []
        for place, (ax, name) in enumerate(zip((left, right), names, strict=True)):
            colour, marker = look_of(place)
            errors = [row[2 + place] for row in series]
            handles.append(
                ax.errorbar(
                    [p.knob for p in shown],
                    [row[place] for row in series],
                    yerr=errors if all(map(math.isfinite, errors)) else None,
                    color=colour,
                    marker=marker,
                    linewidth=1.5,
                    elinewidth=1.0,
                    capsize=2,
                    label=name,
                )
            )
            ax.set_ylabel(unit, color=colour)
            ax.tick_params(axis="y", labelcolor=colour)
            if relative:
                ax.yaxis.set_major_formatter(style.FuncFormatter(lambda value, _: percent(value)))
        if all(p.knob > 0 for p in shown) and len({p.knob for p in shown}) > 1:
            left.set_xscale("log")
            style.write_out(left.xaxis)
        left.set_xlabel(knob)
        left.set_title("What the knob does to both jobs")
        figure.legend(handles, names, loc="outside lower left", ncols=2)
        files = style.save(figure, out, stem)
    rows = [(p.knob, *row[:2]) for p, row in zip(shown, series, strict=True)]
    numbers = {
        "knob": [r[0] for r in rows],
        "high": [r[1] for r in rows],
        "low": [r[2] for r in rows],
    }
    return Drawn(files, numbers, columns_text((knob, f"high, {unit}", f"low, {unit}"), rows))


# ---------------------------------------------------------------------------------------- overhead


def fit_line(x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """The line through points by least squares, with Student's 95 % intervals; None if all x are equal."""
    n = len(x)
    if n < 2 or len(set(x)) < 2:
        return None
    mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
    sxx = math.fsum((each - mean_x) ** 2 for each in x)
    syy = math.fsum((each - mean_y) ** 2 for each in y)
    a = math.fsum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True)) / sxx
    b = mean_y - a * mean_x
    rest = math.fsum((q - a * p - b) ** 2 for p, q in zip(x, y, strict=True))
    r2 = 1 - rest / syy if syy > 0 else math.nan
    if n == 2:
        return Fit(a, b, r2=r2)
    error = math.sqrt(rest / (n - 2))
    quantile = t95(n - 2)
    a_half = quantile * error / math.sqrt(sxx)
    b_half = quantile * error * math.sqrt(1 / n + mean_x**2 / sxx)
    return Fit(a, b, a_half, b_half, r2)


def draw_overhead(
    boundaries: Sequence[float], overhead_ms: Sequence[float], out: Path, stem: str, *, job: str
) -> Drawn:
    """Draw what a request of `job` takes more, in ms, by the boundaries at which it waited, and a line.

    `text` has the fit (ms a boundary, ms in all) with its intervals. Raises InvalidConfig, MissingPackage.
    """
    from slosched.analysis import style

    points = sorted(
        (x, y) for x, y in zip(boundaries, overhead_ms, strict=True) if math.isfinite(x + y)
    )
    if not points:
        raise InvalidConfig("nothing to draw: no run has boundaries and a run alone beside it")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    fit = fit_line(xs, ys)
    line = _fit_text(fit, len(points))
    with style.look():
        figure = style.Figure(figsize=(6.4, 3.9), layout="constrained")
        ax = figure.subplots()
        ax.plot(xs, ys, linestyle="", marker="o", markersize=6.5, color=look_of(0)[0])
        if fit is not None:
            ends = [0.0, max(xs)]
            ax.plot(ends, [fit.a * x + fit.b for x in ends], color=look_of(1)[0], linewidth=1.4)
        ax.axhline(0, color=style.PALE, linewidth=0.8)
        ax.set_xlabel("Boundaries of a request at which it waits for the device")
        ax.set_ylabel("More than alone (ms)")
        ax.set_title(f"Overhead of {_brief(job)}\n{line}", fontsize=10)
        files = style.save(figure, out, stem)
    numbers: dict[str, Any] = {"boundaries": xs, "overhead_ms": ys}
    if fit is not None:
        numbers["fit"] = {
            "a_ms": fit.a,
            "a_half": fit.a_half,
            "b_ms": fit.b,
            "b_half": fit.b_half,
            "r2": fit.r2,
        }
    table = columns_text(("boundaries", "overhead ms"), points)
    return Drawn(files, numbers, f"{line}\n{table}")


def _fit_text(fit: Fit | None, points: int) -> str:
    if fit is None:
        return "no line: the points do not differ in their boundaries"
    if not math.isfinite(fit.a_half):
        return f"{1000 * fit.a:.3g} us per boundary, {fit.b:+.3g} ms, from {points} points: no interval"
    return (
        f"{1000 * fit.a:.3g} ± {1000 * fit.a_half:.2g} us per boundary, "
        f"{fit.b:+.3g} ± {fit.b_half:.2g} ms (95 %, {points} points)"
    )


# ------------------------------------------------------------------------------------ then and now


def draw_mixes(series: Sequence[Mixes], out: Path, stem: str, *, title: str) -> Drawn:
    """Draw STP and energy ratio by mix: published values hollow, measured ones filled, a row for each mix.

    Raises InvalidConfig without a value, MissingPackage.
    """
    from slosched.analysis import style

    # Our own come first: they have the colours.
    series = [
        each
        for each in sorted(series, key=lambda each: each.published)
        if any(math.isfinite(v) for pair in each.values.values() for v in pair)
    ]
    mixes = sorted(
        {mix for each in series for mix in each.values}, key=lambda mix: (mix.count("+"), mix)
    )
    if not mixes:
        raise InvalidConfig("nothing to draw: no mix has an STP or an energy ratio")
    panels = [
        (panel, label)
        for panel, label in enumerate(
            ("STP (more is better)", "Energy / energy alone (less is better)")
        )
        if any(math.isfinite(pair[panel]) for each in series for pair in each.values.values())
    ]
    names = short_all([each.name for each in series], 34)
    rows = dict(zip(mixes, short_all(mixes, 44), strict=True))
    with style.look():
        wide = 2.4 + 3.4 * len(panels)
        size = size_with_legend(wide, 1.2 + max(0.36, 0.06 * len(series)) * len(mixes), names)
        figure = style.Figure(figsize=size, layout="constrained")
        [axes] = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        for ax, (panel, label) in zip(axes, panels, strict=True):
            for place, (each, name) in enumerate(zip(series, names, strict=True)):
                _mix_points(ax, panel, place, each, name, mixes, len(series))
            ax.axvline(1, color=style.PALE, linestyle="--", linewidth=0.9, zorder=1)
            for edge in range(1, len(mixes)):
                ax.axhline(edge - 0.5, color="#efefef", linewidth=0.6, zorder=0)
            ax.set_xlabel(label)
            ax.grid(visible=False, axis="y")
        axes[0].set_yticks(range(len(mixes)), [rows[mix] for mix in mixes])
        axes[0].set_ylim(len(mixes) - 0.5, -0.5)
        axes[0].set_title(title)
        legend_below(figure, axes[0], names)
        files = style.save(figure, out, stem)
    table = [
        (mix, each.name, *each.values[mix])
        for mix in mixes
        for each in series
        if mix in each.values
    ]
    numbers = {each.name: {mix: list(pair) for mix, pair in each.values.items()} for each in series}
    return Drawn(files, numbers, columns_text(("mix", "where", "STP", "energy ratio"), table))


def _mix_points(
    ax: Any,
    panel: int,
    place: int,
    each: Mixes,
    name: str,
    mixes: Sequence[str],
    count: int,
) -> None:
    colour, marker = look_of(place)
    if each.published:
        colour = "#777777"
    # Each series has a height of its own within a row, so that equal values do not hide one another.
    shift = 0.62 * ((place + 0.5) / count - 0.5)
    found = [
        (each.values[mix][panel], row + shift)
        for row, mix in enumerate(mixes)
        if mix in each.values and math.isfinite(each.values[mix][panel])
    ]
    ax.plot(
        [x for x, _ in found],
        [y for _, y in found],
        linestyle="",
        marker=marker,
        markersize=5,
        color=colour,
        markerfacecolor="white" if each.published else colour,
        markeredgewidth=1.1,
        label=name,
    )
