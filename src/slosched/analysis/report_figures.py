"""The figures of a report as SVG for a page: matplotlib's, with text that stays text and the page's colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from slosched.analysis import style
from slosched.analysis.fig7 import sweep_figure
from slosched.analysis.fig10 import error_figure
from slosched.analysis.panels import Panel, Series, panels_figure
from slosched.analysis.report_actions import ClassErrors
from slosched.analysis.report_cascade import CascadeOverTime
from slosched.analysis.report_data import OverTime, Tail
from slosched.analysis.tables import StepSummary
from slosched.analysis.tails import tail_axis

_WIDTH_IN = 9.0

#: Colours of the figures -> what the page calls them; it has a light and a dark one of each.
_NAMED = {
    "#ffffff": "--paper",
    style.INK: "--ink",
    "#000000": "--ink",
    style.PALE: "--pale",
    "#e4e4e4": "--grid",
    **{colour: f"--c{place}" for place, colour in enumerate(style.COLOURS[:6])},
}
_COLOUR = re.compile("|".join(_NAMED), re.IGNORECASE)
_BY_LOWER = {colour.lower(): name for colour, name in _NAMED.items()}
_FONT = re.compile(r"font: ((?:[a-z0-9]+ )*)([\d.]+px) [^;\"]*")


@dataclass(frozen=True)
class Figure:
    """One figure of the page. `caption` says in a sentence what to see; it may hold HTML."""

    key: str
    title: str
    caption: str
    svg: str


def page_svg(document: str, key: str, label: str) -> str:
    """Make matplotlib's SVG document a part of a page: no ids of others, no links, a label, our colours."""
    body = document[document.index("<svg") :]
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = rest.replace('id="', f'id="{key}-').replace("url(#", f"url(#{key}-")
    rest = rest.replace('xlink:href="#', f'href="#{key}-')
    rest = _FONT.sub(r"font: \1\2 var(--font)", rest)
    rest = _COLOUR.sub(lambda found: f"var({_BY_LOWER[found.group().lower()]})", rest)
    rest = re.sub(r"\n\s*", "\n", rest)
    title = escape(label)
    return f'<svg class="drawn" {box.group()} role="img" aria-label="{title}"><title>{title}</title>{rest}'


def sweep(runs: Sequence[tuple[str, Sequence[StepSummary]]], key: str, label: str) -> str:
    """Satisfaction, goodput and latency by SLO."""
    with style.look(text_color=style.INK):
        return page_svg(style.svg_of(sweep_figure(runs)), key, label)


def over_time(numbers: OverTime, key: str, label: str) -> str:
    """Offered and in time, and latencies, over time."""
    panels = [
        Panel(
            "Offered and in time",
            "requests/s",
            (
                Series("offered", numbers.offered_rps, 1, dashed=True),
                Series("in time", numbers.in_time_rps, 0),
            ),
        ),
        Panel(
            "Latency of what was served",
            "ms",
            (Series("median", numbers.p50_ms, 0), Series("p99", numbers.p99_ms, 1)),
            log=True,
        ),
    ]
    if any(numbers.cold_rps):
        panels.append(Panel("Cold starts", "per s", (Series("", numbers.cold_rps, 2),)))
    return _panels(panels, numbers.middle_s, key, label)


def cascade(numbers: CascadeOverTime, key: str, label: str) -> str:
    """The threshold, what it came to, and how long requests waited for each stage."""
    waits = (
        Series("light", numbers.light_wait_s, 0),
        Series("heavy", numbers.heavy_wait_s, 1, dashed=True),
    )
    panels = [
        Panel("Threshold", "score", (Series("", numbers.threshold, 2),)),
        Panel(
            "Answers from the light program",
            "share",
            (Series("", numbers.light_share, 0),),
            top=1.05,
        ),
        Panel("Median wait for the stage", "s", waits),
    ]
    if not any(value == value for value in numbers.threshold):
        del panels[0]
    return _panels(panels, numbers.middle_s, key, label)


def lost(numbers: OverTime, key: str, label: str) -> str:
    """What was not in time over time, by reason."""
    series = [
        Series(name, values, place % 6)
        for place, (name, values) in enumerate(numbers.lost_rps.items())
    ]
    title = "Not in time" if len(series) > 1 else f"Not in time: {series[0].name}"
    return _panels([Panel(title, "requests/s", series)], numbers.middle_s, key, label, tall=True)


def _panels(
    panels: Sequence[Panel], middle_s: Sequence[float], key: str, label: str, *, tall: bool = False
) -> str:
    what = "Time since the first request"
    with style.look(text_color=style.INK):
        figure = panels_figure(panels, middle_s, what=what, width_in=_WIDTH_IN)
        if tall:
            figure.set_size_inches(_WIDTH_IN, 2.9)
        return page_svg(style.svg_of(figure), key, label)


def latency(tails: Sequence[Tail], slos_ms: Sequence[float], key: str, label: str) -> str:
    """The distribution of latencies, each further nine with as much room as the last."""
    with style.look(text_color=style.INK):
        figure = style.Figure(figsize=(_WIDTH_IN, 4.0), layout="constrained")
        ax = figure.subplots()
        for place, each in enumerate(tails):
            ax.plot(
                each.quantiles_ms,
                each.nines,
                color=style.COLOURS[place],
                label=each.view,
                linestyle="-" if place == 0 else (0, (4, 1.8)),
            )
        if len(slos_ms) <= _MOST_SLOS:
            for slo in slos_ms:
                ax.axvline(slo, color=style.PALE, linewidth=0.9, linestyle=":", zorder=1)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        subs = (
            (1,) if high > 500 * low else (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 6, 8)
        )
        ax.xaxis.set_major_locator(style.LogLocator(base=10, subs=subs))
        ax.xaxis.set_minor_locator(style.NullLocator())
        ax.xaxis.set_major_formatter(style.FuncFormatter(lambda value, _: f"{value:g}"))
        tail_axis(ax, max(each.nines[-1] for each in tails))
        dotted = "; SLO dotted" if slos_ms and len(slos_ms) <= _MOST_SLOS else ""
        ax.set_xlabel(f"Latency of what was served (ms){dotted}")
        ax.set_ylabel("Percentile of requests")
        figure.legend(loc="outside upper right", ncols=2)
        return page_svg(style.svg_of(figure), key, label)


_MOST_SLOS = 20


def errors(sides: Sequence[Any], key: str, label: str) -> str:
    """How far predictions were off."""
    with style.look(text_color=style.INK):
        return page_svg(style.svg_of(error_figure(sides, width_in=_WIDTH_IN)), key, label)


def batches(classes: Sequence[ClassErrors], key: str, label: str) -> str:
    """How many requests were served in batches of each size."""
    infers = [c for c in classes if c.name.startswith("batch ")]
    sizes = [c.name.removeprefix("batch ") for c in infers]
    total = sum(c.requests for c in infers)
    with style.look(text_color=style.INK):
        figure = style.Figure(figsize=(_WIDTH_IN, 2.7), layout="constrained")
        ax = figure.subplots()
        shares = [100 * c.requests / total for c in infers]
        drawn = ax.bar(range(len(infers)), shares, 0.7, color=style.COLOURS[0], zorder=3)
        if len(infers) <= 20:
            ax.bar_label(drawn, [f"{share:.3g} %" for share in shares], padding=2, fontsize=9)
        every = -(-len(sizes) // 24)
        ax.set_xticks(range(0, len(sizes), every), sizes[::every])
        ax.set_xlim(-0.6, max(len(sizes), 4) - 0.4)
        ax.set_ylim(0, 1.15 * max(shares))
        ax.set_xlabel("Batch size (requests in one inference)")
        ax.set_ylabel("Share of requests (%)")
        ax.grid(visible=False, axis="x")
        return page_svg(style.svg_of(figure), key, label)
