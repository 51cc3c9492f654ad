"""The curve of a capacity plan: the share in time over the number of GPUs, from plan.json alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import Drawn, columns_text
from slosched.errors import InvalidConfig
from slosched.text_files import read_text

#: Nines between the end of the axis and the target, and between its end and the best share below 1. A share
#: of 1 is drawn at the end.
_ABOVE_TARGET, _ABOVE_POINTS = 1.0, 0.4


def read_plan(path: Path) -> dict[str, Any]:
    """The plan.json at `path`, or in that directory. Raises InvalidConfig."""
    at = path / "plan.json" if path.is_dir() else path
    text = read_text(at, "")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidConfig(f"{at} is not a JSON file: {error}") from None
    if not isinstance(document, dict) or "points" not in document or "target" not in document:
        raise InvalidConfig(f"{at} is not a plan: it lacks points or target")
    return document


def plan_text(document: Mapping[str, Any]) -> str:
    """The numbers of GPUs that were tried, a row for each."""
    grouped = len(document["models"]) > 1
    headings = ["GPUs", "requests", "in time %", "from", "to"]
    headings += ["worst model %"] if grouped else []
    headings += ["reaches target"]
    rows: list[list[object]] = []
    for point in document["points"]:
        judged = point["judged"]
        sure = judged["low"] >= document["target"]
        maybe = judged["point"] >= document["target"]
        row: list[object] = [point["gpus"], point["sent"]]
        row += [_percent(point[name]) for name in ("satisfaction", "low", "high")]
        row += [_percent(min(m["satisfaction"] for m in point["models"]))] if grouped else []
        row.append("yes" if sure else "not surely" if maybe else "no")
        rows.append(row)
    return columns_text(headings, rows)


def _percent(share: float) -> str:
    """With as many digits as the nines need: 99.9987, and 100 only for what is."""
    return "100" if share == 1 else f"{math.floor(share * 1e6) / 1e4:.4f}"


def plot_plan(document: Mapping[str, Any], out: Path) -> Drawn:
    """Draw the curve with its intervals into `out` as plan.png and plan.pdf.

    The axis counts nines: 0.9, 0.99, 0.999 are as far apart. Raises InvalidConfig for a plan without
    points, MissingPackage without matplotlib.
    """
    from slosched.analysis import style

    points = document["points"]
    if not points:
        raise InvalidConfig("nothing to draw: the plan simulated nothing")
    nines = [_nines(p["judged"]["point"]) for p in points if p["judged"]["point"] < 1]
    top = max(_nines(document["target"]) + _ABOVE_TARGET, max(nines, default=0.0) + _ABOVE_POINTS)
    with style.look():
        figure = style.Figure(figsize=(7.2, 4.4), layout="constrained")
        ax = figure.subplots()
        _curve(ax, document, top)
        _nines_axis(ax, top)
        ax.set_xlabel(f"GPUs ({document['profile']})")
        ax.set_xlim(min(p["gpus"] for p in points) - 0.6, max(p["gpus"] for p in points) + 0.6)
        ax.xaxis.set_major_locator(style.FixedLocator(_ticks([p["gpus"] for p in points])))
        ax.set_title(_title(document))
        files = style.save(figure, out, "plan")
    return Drawn(files, dict(document), plan_text(document))


def _curve(ax: Any, document: Mapping[str, Any], top: float) -> None:
    from slosched.analysis.style import COLOURS, INK, PALE

    points = document["points"]
    gpus = [point["gpus"] for point in points]
    judged = [point["judged"] for point in points]
    heights = [min(_nines(j["point"]), top) for j in judged]
    lows = [min(_nines(j["low"]), top) for j in judged]
    highs = [min(_nines(j["high"]), top) for j in judged]
    ax.fill_between(gpus, lows, highs, color=COLOURS[0], alpha=0.15, linewidth=0)
    ax.vlines(gpus, lows, highs, color=COLOURS[0], linewidth=1.4)
    ax.plot(gpus, heights, color=COLOURS[0], marker="o", clip_on=False, zorder=3)
    for x, found in zip(gpus, judged, strict=True):
        if found["point"] == 1:
            ax.plot([x], [top], color=COLOURS[0], marker="^", markersize=9, clip_on=False, zorder=4)
            ax.annotate(
                "all",
                (x, top),
                xytext=(8, -14),
                textcoords="offset points",
                color=COLOURS[0],
                fontsize=9,
            )
    target = _nines(document["target"])
    ax.axhline(target, color=PALE, linewidth=1.0, linestyle=":", zorder=1)
    ax.annotate(
        f"target {document['target']:g}",
        (0, target),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        color=PALE,
        fontsize=9,
    )
    if document["gpus"] is not None:
        ax.axvline(document["gpus"], color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1)
        ax.annotate(
            f"{document['gpus']} GPUs",
            (document["gpus"], 0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 6),
            textcoords="offset points",
            color=INK,
            fontsize=9.5,
        )


def _nines(share: float) -> float:
    return math.inf if share >= 1 else -math.log10(1 - share)


def _nines_axis(ax: Any, top: float) -> None:
    from slosched.analysis.style import FixedLocator, NullLocator

    shares = [0.0, 0.5, *(1 - 10.0**-n for n in range(1, math.floor(top) + 1))]
    ax.set_ylim(0, top)
    ax.yaxis.set_major_locator(FixedLocator([_nines(share) for share in shares]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticklabels([f"{share:.10g}" for share in shares])
    ax.set_ylabel("In time (share of requests)")


def _ticks(gpus: Sequence[int]) -> list[int]:
    """Whole numbers of GPUs, at most about a dozen."""
    low, high = min(gpus), max(gpus)
    step = max(1, math.ceil((high - low) / 12))
    return list(range(low, high + 1, step))


def _title(document: Mapping[str, Any]) -> str:
    what = (
        "Share in time"
        if document["judged"] == "all requests"
        else "The worst model's share in time"
    )
    return f"{what}, {document['policy']}; bars: 95 % over {len(document['seeds'])} seeds' tenths"
