"""The two drawings of a report that are SVG made by hand: how busy GPUs were, and what they did when.

Everything has a title, which a browser shows under the mouse. Colours are CSS variables of the page, so
that the drawings are as light or dark as it is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from slosched.analysis.intervals import DONE, FAILED, LATE, OUTCOMES, PARTLY, Gpu
from slosched.analysis.report_actions import Excerpt, Lane, Utilisation
from slosched.codes import ActionType, code_name
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: Units of a drawing's width. Text of 12 units is legible where a page is 750 px wide and more.
_WIDTH = 960
_LEFT, _RIGHT = 88, 16
_FONT = 13
#: Models with a colour of their own.
COLOURS = 6
_LEVELS = 20
_CHARACTER = 7.4
_TIMES = "\u00d7"

#: Heights of the predicted and of the actual boxes of a lane.
_HEIGHTS = {"exec": (9, 19), "weights": (6, 11)}
_GAP = 14


class _Scale:
    """Places of times (any unit) along the drawing, between its margins."""

    def __init__(self, first: float, last: float, right: int = _RIGHT) -> None:
        self.first, self.last = first, last
        self.left, self.right = float(_LEFT), float(_WIDTH - right)

    def __call__(self, at: float) -> float:
        share = (at - self.first) / (self.last - self.first)
        return min(self.right, max(self.left, self.left + share * (self.right - self.left)))

    def ticks(self) -> list[float]:
        """Five to ten round times."""
        rough = (self.last - self.first) / 8
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
        first = math.ceil(self.first / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.last / step + 1e-9) + 1)]


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="made" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{_FONT}" text-anchor="{anchor}"'
        f"{f' class={kind}' if kind else ''}>{escape(text)}</text>"
    )


def _axis(scale: _Scale, top: float, bottom: float, what: str) -> list[str]:
    """Lines through the drawing at round times, their numbers, and what they are."""
    parts = []
    for tick in scale.ticks():
        x = scale(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
        parts.append(_text(x, bottom + 16, f"{tick:.10g}", anchor="middle", kind="tick"))
    middle = (scale.left + scale.right) / 2
    return [*parts, _text(middle, bottom + 35, what, anchor="middle", kind="axis")]


# ------------------------------------------------------------------------------------ utilisation


def utilisation_svg(used: Utilisation) -> str:
    """A row for each GPU, the darker the busier; under it, thin, the copying of weights."""
    scale = _Scale(used.edges_s[0], used.edges_s[-1], right=72)
    loads = bool((used.loads > 0).any())
    height = max(7.0, min(22.0, 420 / len(used.gpus)))
    thin = max(3.0, height / 3) if loads else 0.0
    pitch = height + thin + 3
    every = math.ceil(15 / pitch)
    parts, top = [], 24.0
    parts.append(_text(_WIDTH - 8, 14, "whole run", anchor="end", kind="tick"))
    for place, gpu in enumerate(used.gpus):
        y = top + place * pitch
        share, load_share = used.exec_share[place], used.load_share[place]
        title = f"{gpu}: executing {100 * share:.1f} % of the run"
        if loads:
            title += f", copying weights {100 * load_share:.1f} %"
        parts.append(f"<g><title>{title}</title>")
        parts.append(_strip(scale, used.edges_s, used.exec[place], y, height, "c0"))
        if loads:
            parts.append(_strip(scale, used.edges_s, used.loads[place], y + height, thin, "c1"))
        if place % every == 0:
            parts.append(_text(_LEFT - 8, y + height / 2 + 5, str(gpu), anchor="end"))
            percent = f"{100 * share:.0f} %"
            parts.append(_text(_WIDTH - 8, y + height / 2 + 5, percent, anchor="end"))
        parts.append("</g>")
    bottom = top + len(used.gpus) * pitch + 2
    axis = _axis(scale, top - 4, bottom, "Time since the first request (s)")
    return _svg(
        bottom + 44,
        "How busy each GPU was over the whole run, in percent of the time",
        axis + parts,
    )


def _strip(
    scale: _Scale,
    edges: Sequence[float],
    shares: Sequence[float],
    y: float,
    height: float,
    colour: str,
) -> str:
    """Cells of one row; neighbours of a level are one box."""
    levels = [round(_LEVELS * min(1.0, float(share))) for share in shares]
    boxes = [
        f'<rect x="{scale.left:.1f}" y="{y:.1f}" width="{scale.right - scale.left:.1f}" '
        f'height="{height:.1f}" class="empty"/>'
    ]
    begin = 0
    for end in range(1, len(levels) + 1):
        if end < len(levels) and levels[end] == levels[begin]:
            continue
        if levels[begin]:
            # Rounded alike at both ends, so that no gap is between neighbours.
            x, until = round(scale(edges[begin]), 1), round(scale(edges[end]), 1)
            boxes.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{until - x:.1f}" height="{height:.1f}" '
                f'class="{colour}" fill-opacity="{levels[begin] / _LEVELS:.2f}"/>'
            )
        begin = end
    return "".join(boxes)


# --------------------------------------------------------------------------------------- timeline


def coloured_models(excerpt: Excerpt) -> list[int]:
    """The models that have a colour of their own, in the order of the colours: those that took most time."""
    busy: Counter[int] = Counter()
    for _, lanes in excerpt.gpus:
        for lane in lanes:
            models, took = lane.rows["model_id"].tolist(), lane.intervals.took.tolist()
            for model, ns in zip(models, took, strict=True):
                busy[model] += ns
    return sorted(sorted(busy), key=lambda model: -busy[model])[:COLOURS]


def timeline_svg(excerpt: Excerpt) -> str:
    """For each GPU what was predicted (pale, above) and what was done (below), coloured by model."""
    scale = _Scale(0.0, (excerpt.end_ns - excerpt.start_ns) / NS_PER_MS)
    colours = {model: place for place, model in enumerate(coloured_models(excerpt))}
    parts: list[str] = []
    y = 10.0
    for gpu, lanes in excerpt.gpus:
        top = y
        for lane in lanes:
            parts += _lane(lane, gpu, scale, excerpt.start_ns, colours, y)
            predicted, actual = _HEIGHTS[lane.executor]
            y += predicted + actual + 4
        parts.append(_text(_LEFT - 8, top + 20, str(gpu), anchor="end"))
        if any(lane.executor == "weights" for lane in lanes) and len(lanes) > 1:
            parts.append(_text(_LEFT - 8, y - 6, "loads", anchor="end", kind="tick"))
        y += _GAP
    bottom = y - _GAP + 4
    what = f"ms since {excerpt.start_ns / NS_PER_S:.10g} s after the first request"
    label = (
        f"What {len(excerpt.gpus)} GPUs did from {format_duration(excerpt.start_ns)} to "
        f"{format_duration(excerpt.end_ns)} after the first request, and above it what was predicted"
    )
    return _svg(bottom + 44, label, [*_axis(scale, 4, bottom, what), *parts])


def _lane(
    lane: Lane, gpu: Gpu, scale: _Scale, start_ns: int, colours: dict[int, int], y: float
) -> Iterator[str]:
    at, rows = lane.intervals, lane.rows
    predicted, actual = _HEIGHTS[lane.executor]

    def place(ns: int) -> float:
        return scale((int(ns) - start_ns) / NS_PER_MS)

    for row in range(len(at.ran)):
        model = int(rows["model_id"][row])
        colour = f"m{colours[model]}" if model in colours else "mx"
        parts = [f"<g class={colour}><title>{_tooltip(lane, gpu, row)}</title>"]
        if at.expects[row] and place(at.due[row]) > place(at.due_begin[row]):
            parts.append(_box(place(at.due_begin[row]), place(at.due[row]), y, predicted, "due"))
        x, until = place(at.begin[row]), place(at.end[row])
        below = y + predicted + 1
        if at.ran[row] and until > x:
            kind = {LATE: "did late", PARTLY: "did partly"}.get(int(at.outcome[row]), "did")
            parts.append(_box(x, until, below, actual, kind))
            if lane.executor == "exec":
                parts.append(
                    _label(x, until, below + actual - 5, model, int(rows["batch_size"][row]))
                )
        elif at.outcome[row] == FAILED and scale.left < x < scale.right:
            parts.append(_text(x, below + actual - 5, "✕", anchor="middle", kind="fail"))
        parts.append("</g>")
        if len(parts) > 2:
            yield "".join(parts)


def _box(x: float, until: float, y: float, height: float, kind: str) -> str:
    width = max(until - x - 0.6, 0.6)
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" class="{kind}"/>'


def _label(x: float, until: float, y: float, model: int, batch: int) -> str:
    """The longest name that fits into the box."""
    room = (until - x - 4) / _CHARACTER
    text = next(
        (t for t in (f"m{model} {_TIMES}{batch}", f"{_TIMES}{batch}") if len(t) <= room), ""
    )
    return _text((x + until) / 2, y, text, anchor="middle", kind="in") if text else ""


def _tooltip(lane: Lane, gpu: Gpu, row: int) -> str:
    """What the browser shows of an action."""
    at, rows = lane.intervals, lane.rows
    kind = int(rows["action_type"][row])
    what = {ActionType.LOAD_WEIGHTS: "load of ", ActionType.EVICT_WEIGHTS: "eviction of "}
    parts = [f"{what.get(kind, '')}model {rows['model_id'][row]}"]  # type: ignore[call-overload]
    if kind == ActionType.INFER:
        parts.append(f"batch {rows['batch_size'][row]}")
    parts.append(str(gpu))
    if at.expects[row]:
        parts.append(f"predicted {format_duration(int(rows['expected_exec_duration'][row]))}")
    if at.ran[row]:
        parts.append(f"took {format_duration(int(at.took[row]))}")
        if at.expects[row]:
            behind = int(rows["worker_exec_complete"][row] - rows["expected_exec_complete"][row])
            word = "after" if behind >= 0 else "before"
            parts.append(f"ended {format_duration(abs(behind))} {word} its predicted end")
    outcome = int(at.outcome[row])
    if outcome == FAILED:
        parts.append(f"failed: {code_name(int(rows['status'][row]))}")
    elif outcome != DONE:
        parts.append(OUTCOMES[outcome])
    return escape(", ".join(parts))
