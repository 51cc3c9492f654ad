"""Distributions of shared GPUs: latencies by method, and the times of the segments of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import Drawn, columns_text
from slosched.analysis.legends import (
    columns_of,
    fitting,
    legend_below,
    look_of,
    short,
    short_all,
    size_with_legend,
)
from slosched.errors import InvalidConfig

#: Panels of latencies, or curves of segments, that a figure shows at most.
MOST_CURVES = 12


@dataclass(frozen=True)
class Latencies:
    """Latencies in ms of one job under several methods, by their names."""

    job: str
    by_method: dict[str, Sequence[float]]


def draw_cdfs(jobs: Sequence[Latencies], out: Path, stem: str, *, title: str) -> Drawn:
    """Draw the distribution of latencies: a panel for each of MOST_CURVES jobs, a curve for each method.

    Raises InvalidConfig without a request, MissingPackage.
    """
    from slosched.analysis import style

    used = [job for job in jobs if any(len(values) for values in job.by_method.values())]
    used = used[:MOST_CURVES]
    if not used:
        raise InvalidConfig("nothing to draw: the runs have no requests")
    names = list(dict.fromkeys(name for job in used for name in job.by_method))
    labels = dict(zip(names, short_all(names, 40), strict=True))
    columns = min(3, len(used))
    rows = math.ceil(len(used) / columns)
    with style.look():
        size = size_with_legend(max(6.0, 3.1 * columns), 0.6 + 2.6 * rows, list(labels.values()))
        figure = style.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for ax, job in zip(axes, used, strict=False):
            _draw_cdf(ax, job.by_method, labels)
            ax.set_xlabel("Latency (ms)")
            ax.set_title(short(job.job, 34), fontsize=10)
        for ax in axes[len(used) :]:
            ax.set_visible(False)
        for ax in axes[::columns]:
            ax.set_ylabel("Share of requests")
        figure.suptitle(
            fitting(figure, title),
            x=0.01,
            ha="left",
            fontsize=11,
            fontweight="bold",
        )
        _legend_of_all(figure, axes, list(labels.values()))
        files = style.save(figure, out, stem)
    table = [
        (job.job, name, len(values), _percentile(values, 50), _percentile(values, 99))
        for job in used
        for name, values in job.by_method.items()
        if len(values)
    ]
    return Drawn(
        files,
        {job.job: {name: sorted(v) for name, v in job.by_method.items()} for job in used},
        columns_text(("job", "method", "requests", "p50 ms", "p99 ms"), table),
    )


def draw_segments(
    segments_ms: Mapping[str, Sequence[float]], out: Path, stem: str, *, title: str
) -> Drawn:
    """Draw the distribution of the times between two boundaries: what a job that interrupts waits for.

    There is a curve for each of MOST_CURVES jobs.
    Raises InvalidConfig if no job has a boundary, MissingPackage.
    """
    from slosched.analysis import style

    used = {name: sorted(values) for name, values in segments_ms.items() if len(values)}
    if not used:
        raise InvalidConfig("nothing to draw: no job of the run has segments")
    shown = list(used)[:MOST_CURVES]
    labels = dict(zip(shown, short_all(shown, 40), strict=True))
    title += f" ({len(shown)} of {len(used)} jobs)" if len(shown) < len(used) else ""
    with style.look():
        size = size_with_legend(6.4, 3.2, list(labels.values()))
        figure = style.Figure(figsize=size, layout="constrained")
        ax = figure.subplots()
        _draw_cdf(ax, used, labels)
        if ax.get_xscale() == "linear":
            ax.set_xlim(left=0)
        ax.set_xlabel("Time between two boundaries (ms)")
        ax.set_ylabel("Share of segments")
        ax.set_title(fitting(figure, title))
        legend_below(figure, ax, list(labels.values()))
        files = style.save(figure, out, stem)
    rows = [
        (name, len(values), _percentile(values, 50), _percentile(values, 99), values[-1])
        for name, values in used.items()
    ]
    columns = ("job", "segments", "p50 ms", "p99 ms", "longest ms")
    return Drawn(files, dict(used), columns_text(columns, rows))


def _draw_cdf(ax: Any, curves: Mapping[str, Sequence[float]], labels: Mapping[str, str]) -> None:
    values_of_all: list[float] = []
    for place, (name, label) in enumerate(labels.items()):
        values = sorted(curves.get(name, ()))
        if not values:
            continue
        values_of_all += values
        shares = [(rank + 1) / len(values) for rank in range(len(values))]
        ax.plot([values[0], *values], [0.0, *shares], drawstyle="steps-post", color=look_of(place)[0],
                linewidth=1.5, linestyle=("-", "--", ":", "-.")[place // 7 % 4], label=label)  # fmt: skip
    if min(values_of_all) > 0 and max(values_of_all) / min(values_of_all) > 20:
        from slosched.analysis.style import write_out

        ax.set_xscale("log")
        write_out(ax.xaxis)
    ax.set_ylim(0, 1.03)


def _legend_of_all(figure: Any, axes: Sequence[Any], names: Sequence[str]) -> None:
    """One legend for several panels of which each may lack a curve."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    shown = [name for name in names if name in found]
    figure.legend(
        [found[name] for name in shown],
        shown,
        loc="outside lower left",
        ncols=columns_of(figure.get_figwidth(), shown),
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    import numpy as np

    return float(np.percentile(np.asarray(values, float), percent))
