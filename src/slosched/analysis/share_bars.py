"""Figures of shared GPUs as bars: inflation and misses by method, figures by mode, shared and dedicated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import Drawn, columns_text
from slosched.analysis.legends import (
    columns_of,
    fitting,
    look_of,
    percent,
    short_all,
    size_with_legend,
)
from slosched.errors import InvalidConfig

#: Groups that a figure shows at most; a sweep of more is a matter of the other figures.
MOST_GROUPS = 32


@dataclass(frozen=True)
class Bar:
    """A value with half of its 95 % interval (0: none). NaN: unknown, and not drawn."""

    value: float = math.nan
    half: float = 0.0


@dataclass(frozen=True)
class Panel:
    """Groups of bars: `bars[name][group]`. `percent`: values are shares. `level` is a line to compare with."""

    title: str
    unit: str
    groups: Sequence[str]
    bars: dict[str, Sequence[Bar]]
    percent: bool = False
    level: float | None = None


def draw_bars(
    panels: Sequence[Panel], out: Path, stem: str, *, title: str, columns: int = 1
) -> Drawn:
    """Draw `panels` in a grid of `columns`; bars of one name have one colour in all of them.

    A panel whose bars are far apart has a logarithmic axis; one without a value is left out, and named in
    `numbers["left_out"]`. Raises InvalidConfig if no panel is left, MissingPackage.
    """
    from slosched.analysis import style

    shown = [panel for panel in panels if _values(panel)]
    if not shown:
        raise InvalidConfig(f"nothing to draw: {title} has no value")
    names = list(dict.fromkeys(name for panel in shown for name in panel.bars))
    labels = dict(zip(names, short_all(names, 36), strict=True))
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    with style.look():
        figure = style.Figure(figsize=_size(shown, columns, rows, labels), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax, panel in zip(axes, shown, strict=False):
            _draw_panel(ax, panel, names)
        for ax in axes[len(shown) :]:
            ax.set_visible(False)
        figure.suptitle(
            fitting(figure, title),
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
        if len(names) > 1:
            patches = [
                style.Rectangle((0, 0), 1, 1, color=look_of(place)[0])
                for place in range(len(names))
            ]
            figure.legend(patches, list(labels.values()), loc="outside lower left",
                          ncols=columns_of(figure.get_figwidth(), list(labels.values())))  # fmt: skip
        files = style.save(figure, out, stem)
    return Drawn(files, _numbers(panels, shown), _table(shown))


def _size(
    panels: Sequence[Panel], columns: int, rows: int, labels: dict[str, str]
) -> tuple[float, float]:
    widest = max(min(len(p.groups), MOST_GROUPS) * max(1, len(p.bars)) for p in panels)
    width = min(14.0, columns * min(9.0, max(3.6, 0.9 + 0.22 * widest)))
    longest = max(len(group) for panel in panels for group in panel.groups)
    slanted = 0.055 * min(longest, 34)
    return size_with_legend(max(width, 5.4), rows * (2.3 + slanted) + 0.3, list(labels.values()))


def _draw_panel(ax: Any, panel: Panel, names: Sequence[str]) -> None:
    from slosched.analysis import style

    groups = list(panel.groups[:MOST_GROUPS])
    present = [name for name in names if name in panel.bars]
    width = 0.82 / len(present)
    values = _values(panel)
    log = min(values) > 0 and max(values) / min(values) > 30
    for slot, name in enumerate(present):
        bars = panel.bars[name][:MOST_GROUPS]
        at = [group + (slot + 0.5) * width - 0.41 for group in range(len(groups))]
        ax.bar(
            at,
            [bar.value for bar in bars],
            width=0.92 * width,
            color=look_of(names.index(name))[0],
            yerr=[bar.half if bar.half > 0 else math.nan for bar in bars],
            error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": style.INK},
        )
        for x, bar in zip(at, bars, strict=True):
            if not math.isfinite(bar.value):
                ax.text(
                    x, 0.01, "?", transform=ax.get_xaxis_transform(), ha="center", color=style.PALE
                )
    written = percent if panel.percent else "{:,.10g}".format
    if log:
        ax.set_yscale("log")
        style.write_out(ax.yaxis, written)
    if panel.level is not None:
        ax.axhline(panel.level, color=style.PALE, linestyle="--", linewidth=0.9)
    if panel.percent:
        if not log:
            ax.yaxis.set_major_formatter(style.FuncFormatter(lambda value, _: percent(value)))
        if not any(values):
            ax.set_ylim(0, 1)
    slant = sum(map(len, groups)) > 44 or len(groups) > 8
    more = len(panel.groups) - len(groups)
    ax.set_xticks(
        range(len(groups)),
        short_all(groups, 34),
        rotation=35 if slant else 0,
        ha="right" if slant else "center",
        rotation_mode="anchor",
        fontsize=8 if slant else 9,
    )
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.grid(visible=False, axis="x")
    ax.set_ylabel(panel.unit)
    ax.set_title(f"{panel.title}{f' (the first {len(groups)})' if more else ''}", fontsize=10)


def _values(panel: Panel) -> list[float]:
    return [bar.value for bars in panel.bars.values() for bar in bars if math.isfinite(bar.value)]


def _numbers(panels: Sequence[Panel], shown: Sequence[Panel]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        panel.title: {
            name: {
                group: [bar.value, bar.half] for group, bar in zip(panel.groups, bars, strict=True)
            }
            for name, bars in panel.bars.items()
        }
        for panel in shown
    }
    left_out = [panel.title for panel in panels if panel not in shown]
    return numbers | ({"left_out": left_out} if left_out else {})


def _table(panels: Sequence[Panel]) -> str:
    rows = [
        (panel.title, group, name, bar.value)
        for panel in panels
        for name, bars in panel.bars.items()
        for group, bar in zip(panel.groups, bars, strict=True)
    ]
    return columns_text(("figure", "group", "bar", "value"), rows)
