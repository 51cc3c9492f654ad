"""Figures of the cascade of digits: quality by heavy share and by cost, the scores, and a page of images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.output_files import write_file

CURVES, SAMPLES = "curves", "samples"
_YLABEL = "Frechet distance (digits), less is better"
_SHARE = "Share of requests answered by the heavy program"


def draw_curves(document: Mapping[str, Any], out: Path) -> Path:
    """Draw what `measure` returned into `out` as curves.png; return the path.

    Raises MissingPackage without matplotlib, and what `write_file` raises.
    """
    from slosched.analysis import style

    with style.look():
        figure = style.Figure(figsize=(10.4, 7.6), layout="constrained")
        (by_share, by_cost), (difference, scores) = figure.subplots(2, 2)
        for place, (rule, points) in enumerate(document["curves"].items()):
            for ax, key in ((by_share, "heavy_share"), (by_cost, "cost_ms")):
                _draw_rule(ax, style, rule, points, key, place)
        _draw_real(by_share, by_cost, style, document["ends"]["real"])
        _label(by_share, "Quality by heavy share", _SHARE)
        _label(by_cost, "Quality by cost", "Mean exec time of a request (ms)")
        by_cost.set_xlim(left=0)
        _draw_difference(difference, style, document["judge_less_random"])
        _draw_scores(scores, style, document)
        handles, labels = by_share.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=5)
        return _png(figure, out, CURVES)


def _draw_rule(
    ax: Any, style: Any, rule: str, points: Sequence[Mapping[str, float]], key: str, place: int
) -> None:
    ax.plot(
        [each[key] for each in points],
        [each["frechet"] for each in points],
        color=style.COLOURS[place % len(style.COLOURS)],
        marker=style.MARKERS[place % len(style.MARKERS)],
        linestyle=":" if rule.startswith("oracle") else "-",
        linewidth=1.5,
        label=rule,
    )


def _draw_real(one: Any, other: Any, style: Any, real: Mapping[str, float]) -> None:
    for ax in (one, other):
        label = f"{real['images']:.0f} real images, learnt from"
        ax.axhline(real["frechet"], color=style.PALE, linestyle="--", linewidth=1, label=label)


def _draw_difference(ax: Any, style: Any, found: Sequence[Mapping[str, float]]) -> None:
    """The judge's distance less the random one, with paired intervals; below 0 the judge is better."""
    middle = np.array([each["value"] for each in found])
    low, high = (np.array([each[key] for each in found]) for key in ("low", "high"))
    ax.errorbar(
        [each["heavy_share"] for each in found],
        middle,
        yerr=[(middle - low).clip(0), (high - middle).clip(0)],
        color=style.COLOURS[0],
        marker=style.MARKERS[0],
        linewidth=1.5,
        capsize=3,
    )
    ax.axhline(0, color=style.INK, linewidth=1)
    ax.set_xlim(0, 1)
    ax.set_title("Judge less random, paired 95 % intervals")
    ax.set_xlabel(_SHARE)
    ax.set_ylabel("Difference; below 0 the judge is better")


def _label(ax: Any, title: str, xlabel: str) -> None:
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(_YLABEL)
    ax.set_ylim(bottom=0)


def _draw_scores(ax: Any, style: Any, document: Mapping[str, Any]) -> None:
    """Distributions of the judge's scores of light, heavy and real images, as shares below each score."""
    for place, (name, found) in enumerate(document["score_curves"].items()):
        ax.plot(
            found["thresholds"],
            found["deferred"],
            color=style.COLOURS[place],
            linestyle=("-", "--", ":")[place % 3],
            linewidth=1.5,
            label=name,
        )
    ax.set_title("The judge's scores")
    ax.set_xlabel("Score: P(real)")
    ax.set_ylabel("Share of images below it; f(t) for light")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.legend(loc="upper left")


def draw_samples(
    rows: Sequence[tuple[str, npt.NDArray[np.float32]]], out: Path, title: str
) -> Path:
    """Draw rows of images (n, 1, 8, 8), ink within 0..1, each with its name, into `out` as samples.png.

    Raises as `draw_curves` does.
    """
    from slosched.analysis import style

    with style.look():
        height = 0.5 + 0.44 * len(rows)
        figure = style.Figure(figsize=(9.6, height), layout="constrained")
        axes = figure.subplots(len(rows), 1)
        for ax, (name, images) in zip(axes, rows, strict=True):
            ax.imshow(1 - _strip(images), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            for side in ax.spines.values():
                side.set_visible(False)
        figure.suptitle(title, fontsize=9)
        return _png(figure, out, SAMPLES)


def _strip(images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Images side by side, with a pale line between two."""
    padded = [np.pad(each[0], 1, constant_values=0.12) for each in images]
    return np.concatenate(padded, 1)


def _png(figure: Any, out: Path, stem: str) -> Path:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None}, dpi=130)
    path = out / f"{stem}.png"
    write_file(path, drawn.getvalue())
    return path
