"""Figures of `slosched exp matrices`: duration against size and against splits, and what moved against size.

Each draws `path`.png and .pdf. Series are by title: places on the x axis, and what was measured at each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from slosched.analysis.style import COLOURS, INK, MARKERS, PALE, Figure, look, save

#: Values of each repeat at a place on the x axis.
Points = Sequence[tuple[int, Sequence[float]]]
_EMULATED = "hosts and instances are emulated on one machine"


def draw_durations(series: Mapping[str, Points], path: Path, *, calls: int) -> list[Path]:
    """Milliseconds against the rows of the matrices: medians, and bars from the least to the most."""
    with look():
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        _lines(axes, series, list(series))
        axes.set_xscale("log")
        axes.set_yscale("log")
        _size_ticks(axes, series)
        axes.set_xlabel("rows of the matrices")
        axes.set_ylabel("ms")
        axes.set_title(f"A @ B by {calls} calls and by one process")
        _legend(figure, axes)
        return save(figure, path.parent, path.name, forms=("png", "pdf"))


def draw_splits(series: Mapping[str, Points], path: Path, *, size: int) -> list[Path]:
    """Milliseconds against splits, at one size."""
    with look():
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        _lines(axes, series, list(series))
        axes.set_yscale("log")
        axes.set_xticks(range(4), [f"{n}\n{calls}" for n, calls in enumerate((1, 9, 73, 585))])
        axes.set_xlabel("splits, and calls")
        axes.set_ylabel("ms")
        axes.set_title(f"What dividing costs, {size:,} rows")
        _legend(figure, axes)
        return save(figure, path.parent, path.name, forms=("png", "pdf"))


def draw_bytes(
    series: Mapping[str, Sequence[tuple[int, float]]],
    path: Path,
    *,
    most: Sequence[tuple[int, float]],
    none: Sequence[str],
    order: Sequence[str],
) -> list[Path]:
    """MB between calls and the global tier against size.

    `most` is all that calls read and write; the systems of `none` moved nothing. `order` has the titles in the
    order of their colours in the other figures.
    """
    with look():
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            *zip(*most, strict=True),
            color=PALE,
            linestyle="--",
            label="all that calls read and write",
        )
        points = {title: [(x, [y]) for x, y in values] for title, values in series.items()}
        _lines(axes, points, order)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _size_ticks(axes, {"most": [(x, [y]) for x, y in most]})
        axes.set_xlabel("rows of the matrices")
        axes.set_ylabel("MB")
        axes.set_title("What moves between calls and the store")
        _legend(figure, axes)
        if none:
            text = f"nothing moves: {', '.join(none)}\n{_EMULATED}"
            style = {"ha": "right", "va": "bottom", "fontsize": 8, "color": INK}
            axes.text(0.99, 0.02, text, transform=axes.transAxes, **style)
        return save(figure, path.parent, path.name, forms=("png", "pdf"))


def _lines(axes: Any, series: Mapping[str, Points], order: Sequence[str]) -> None:
    for title, points in series.items():
        place = order.index(title)
        found = sorted(points)
        middles = [median(values) for _, values in found]
        below = [middle - min(values) for middle, (_, values) in zip(middles, found, strict=True)]
        above = [max(values) - middle for middle, (_, values) in zip(middles, found, strict=True)]
        axes.errorbar(
            [x for x, _ in found],
            middles,
            yerr=[below, above],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="-" if place < len(COLOURS) else ":",
            capsize=2,
            label=title,
        )


def _size_ticks(axes: Any, series: Mapping[str, Points]) -> None:
    sizes = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(sizes, [f"{each:,}" for each in sizes])
    axes.set_xticks([], minor=True)


def _legend(figure: Any, axes: Any) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8.5)
