"""The figure of `slosched exp coldstart`: what each rung of the ladder takes, on a logarithmic scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slosched.analysis.style import COLOURS, INK, PALE, Figure, look, save, write_out


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One start: its median in ms, and the least and the most where they are known."""

    group: str
    name: str
    ms: float
    least_ms: float = 0.0
    most_ms: float = 0.0


def draw_ladder(bars: Sequence[Bar], path: Path, *, device: str) -> list[Path]:
    """Draw `path`.png and .pdf: a bar for each start, in its order, with a colour for each group."""
    groups = list(dict.fromkeys(each.group for each in bars))
    with look():
        figure = Figure(figsize=(8.6, 1.1 + 0.3 * len(bars)), layout="constrained")
        axes = figure.subplots()
        for group in groups:
            mine = [(place, each) for place, each in enumerate(bars) if each.group == group]
            published = group.startswith("published")
            colour = PALE if published else COLOURS[groups.index(group) % len(COLOURS)]
            axes.barh(
                [place for place, _ in mine],
                [each.ms for _, each in mine],
                color="white" if published else colour,
                edgecolor=colour,
                label=group,
                height=0.7,
            )
            for place, each in mine:
                if each.most_ms:
                    axes.plot(
                        [each.least_ms, each.most_ms], [place, place], color=INK, linewidth=1.0
                    )
                at = max(each.ms, each.most_ms)
                axes.annotate(
                    f"{each.ms:,.0f} ms" if each.ms >= 100 else f"{each.ms:.3g} ms",
                    (at, place),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
        axes.set_yticks(range(len(bars)), [each.name for each in bars])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(right=6 * max(max(each.ms, each.most_ms) for each in bars))
        write_out(axes.xaxis)
        axes.set_xlabel(
            "Time (ms): the bar is the median, the line goes from the least to the most"
        )
        axes.set_title(f"The ladder of cold starts, {device.upper()}")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=len(groups))
        return save(figure, path.parent, path.name)
