"""Figures of `slosched exp inference-latency` and `inference-throughput`: medians against throughput, and CDFs.

Each draws `path`.png and .pdf. The form is that of Faasm's figure 7 (USENIX ATC'20); the systems are other
ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from slosched.analysis.legends import legend_below, look_of, size_with_legend
from slosched.analysis.style import INK, Figure, look, save, write_out


@dataclass(frozen=True)
class Cdf:
    """Latencies in ms of the requests that were answered, and the number of all, with the others."""

    latencies_ms: Sequence[float]
    count: int


#: (achieved throughput per s, median in ms), in the order of the rates.
Curve = Sequence[tuple[float, float]]


def draw_throughput(
    panels: Mapping[str, Mapping[str, Curve]], path: Path, *, note: str = ""
) -> list[Path]:
    """Median latency against achieved throughput: a panel for each rule of cold starts, a line for each
    system."""
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    with look():
        figure, places = _panels(len(panels), names)
        for axes, (title, curves) in zip(places, panels.items(), strict=False):
            for name, curve in curves.items():
                colour, marker = look_of(names.index(name))
                axes.plot(*zip(*curve, strict=True), color=colour, marker=marker, label=name)
            axes.set_yscale("log")
            write_out(axes.yaxis)
            axes.set_xlim(left=0)
            axes.set_xlabel("Answers per second, achieved")
            axes.set_ylabel("Median latency (ms)")
            axes.set_title(title)
        _legend(figure, places, names, note)
        return save(figure, path.parent, path.name)


def draw_cdfs(panels: Mapping[str, Mapping[str, Cdf]], path: Path, *, note: str = "") -> list[Path]:
    """Shares of all requests that were answered within a latency; a line that ends below 1 has unanswered
    ones."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    every = [
        value for lines in panels.values() for cdf in lines.values() for value in cdf.latencies_ms
    ]
    least, largest = min(every, default=1.0), max(every, default=1.0)
    with look():
        figure, places = _panels(len(panels), names)
        for axes, (title, lines) in zip(places, panels.items(), strict=False):
            for name, cdf in lines.items():
                colour, _ = look_of(names.index(name))
                values = sorted(cdf.latencies_ms)
                if not values:
                    continue
                shares = [(place + 1) / cdf.count for place in range(len(values))]
                axes.plot(
                    [values[0], *values, 1.3 * largest],
                    [0.0, *shares, shares[-1]],
                    color=colour,
                    drawstyle="steps-post",
                    label=name,
                )
            axes.set_xscale("log")
            write_out(axes.xaxis)
            axes.set_xlim(least / 1.3, 1.3 * largest)
            axes.set_ylim(0, 1.02)
            axes.set_xlabel("Latency from the intended time (ms)")
            axes.set_ylabel("Share of requests")
            axes.set_title(title)
        _legend(figure, places, names, note)
        return save(figure, path.parent, path.name)


def _panels(count: int, names: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure with room for that many panels, two or three in a row."""
    columns = min(count, 3 if count > 4 else 2)
    rows = ceil(count / columns)
    figure = Figure(
        figsize=size_with_legend(4.4 * columns, 3.4 * rows + 0.3, names), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    places = [axes for row in grid for axes in row]
    for place, axes in enumerate(places):
        axes.set_visible(place < count)
        axes.tick_params(which="both", labelbottom=True, labelleft=True)
    return figure, places[:count]


def _legend(figure: Any, places: Sequence[Any], names: Sequence[str], note: str) -> None:
    """One legend for all panels, below them, and the note above."""
    legend_below(figure, _Labelled(places), names)
    if note:
        figure.suptitle(note, fontsize=8.5, color=INK)


class _Labelled:
    """The lines of all panels, each label once, as legend_below asks one of axes."""

    def __init__(self, places: Sequence[Any]) -> None:
        self._places = places

    def get_legend_handles_labels(self) -> tuple[list[Any], list[str]]:
        found: dict[str, Any] = {}
        for axes in self._places:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
        return list(found.values()), list(found)
