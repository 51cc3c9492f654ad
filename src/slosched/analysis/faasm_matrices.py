"""Figures of `slosched exp matrices`: duration against size and against splits, and what moved against size.

Each draws `path`.png and .pdf. Series are by title: places on the x axis, and what was measured there. `order`
has all titles, so that a system looks the same in every figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from slosched.analysis.style import COLOURS, MARKERS, PALE, Figure, look, save, write_out

#: Values of each repeat at a place on the x axis.
Points = Sequence[tuple[int, Sequence[float]]]
_CALLS = (1, 9, 73, 585)


@dataclass(frozen=True)
class Moved:
    """What calls moved at a size: MB in all, and the part of what they read that was pulled."""

    size: int
    megabytes: float
    pulled: float


def draw_durations(
    series: Mapping[str, Points], path: Path, *, calls: int, order: Sequence[str], note: str = ""
) -> list[Path]:
    """Milliseconds against the rows of the matrices: medians, and bars from the least to the most."""
    with look():
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        _lines(axes, series, order)
        axes.set_xscale("log")
        axes.set_yscale("log")
        write_out(axes.yaxis)
        _size_ticks(axes, sorted({x for points in series.values() for x, _ in points}))
        axes.set_ylabel("Duration (ms)")
        axes.set_title(f"A @ B by {_counted(calls)} and by one process")
        _legend(figure, axes, note)
        return save(figure, path.parent, path.name, forms=("png", "pdf"))


def draw_splits(
    series: Mapping[str, Points], path: Path, *, size: int, order: Sequence[str], note: str = ""
) -> list[Path]:
    """Milliseconds against splits, at one size."""
    with look():
        figure = Figure(figsize=(7.6, 4.6), layout="constrained")
        axes = figure.subplots()
        _lines(axes, series, order)
        axes.set_yscale("log")
        write_out(axes.yaxis)
        axes.set_xticks(range(len(_CALLS)), [f"{n}\n{calls}" for n, calls in enumerate(_CALLS)])
        axes.set_xlabel("Splits, and below them the number of calls")
        axes.set_ylabel("Duration (ms)")
        axes.set_title(f"What dividing costs, {size:,} rows")
        _legend(figure, axes, note)
        return save(figure, path.parent, path.name, forms=("png", "pdf"))


def draw_bytes(
    series: Mapping[str, Sequence[Moved]],
    path: Path,
    *,
    most: Sequence[tuple[int, float]],
    none: Sequence[str],
    order: Sequence[str],
    note: str = "",
) -> list[Path]:
    """Left: MB between calls and the global tier against size. Right: the part of what is read that was pulled.

    `most` is all that calls read and write; the systems of `none` moved nothing.
    """
    with look():
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        label = "all that calls read and write"
        left.plot(*zip(*most, strict=True), color=PALE, linestyle="--", label=label, zorder=5)
        megabytes = {
            title: [(each.size, [each.megabytes]) for each in found]
            for title, found in series.items()
        }
        pulled = {
            title: [(each.size, [each.pulled]) for each in found] for title, found in series.items()
        }
        _lines(left, megabytes, order)
        _lines(right, pulled, order)
        for axes in (left, right):
            axes.set_xscale("log")
            _size_ticks(axes, [size for size, _ in most])
        left.set_yscale("log")
        write_out(left.yaxis)
        left.set_ylabel("MB moved")
        left.set_title("Between calls and the store")
        right.set_ylim(0, 1.05)
        right.set_ylabel("Part of what is read that is pulled")
        right.set_title("What was not there already")
        _legend(
            figure, left, "\n".join([f"nothing moves: {'; '.join(none)}"] * bool(none) + [note])
        )
        return save(figure, path.parent, path.name, forms=("png", "pdf"))


def _lines(axes: Any, series: Mapping[str, Points], order: Sequence[str]) -> None:
    for place, title in enumerate(order):
        if title not in series:
            continue
        found = sorted(series[title])
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


def _size_ticks(axes: Any, sizes: Sequence[int]) -> None:
    shown = [size for n, size in enumerate(sizes) if not n or n == len(sizes) - 1 or _far(sizes, n)]
    axes.set_xticks(shown, [f"{each:,}" for each in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("Rows of the matrices")


def _far(sizes: Sequence[int], place: int) -> bool:
    """Whether the label of that size has room beside those of its neighbours on a log scale."""
    return sizes[place] >= 1.5 * sizes[place - 1] and sizes[-1] >= 1.5 * sizes[place]


def _legend(figure: Any, axes: Any, note: str) -> None:
    """The legend beside the axes, and the note below them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8.5)
    if note:
        figure.supxlabel(note, fontsize=8)


def _counted(calls: int) -> str:
    return "one call" if calls == 1 else f"{calls} calls"
