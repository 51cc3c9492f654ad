"""Figure 7 in the published form, as the artifact's plotter draws it (Clockwork, sec63_fig7).

Windows of a little more than 4 s in completion order, whatever the SLO steps: a window that
straddles two steps is one point. The TSV files hold these windows, each at the time of its last answer, and
the look, the styles and the size are the published ones too. Two things differ: the TSV files need no
equal lengths (shorter columns end in empty cells), and the *picture* puts each window at its middle, with
windows that keep the published share of a step, 4 s of 30 s, where steps are shorter. At its end, a window
as long as a step would stand in the next step, whose SLO it does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.runs import Run
from slosched.analysis.windows import closing_rows
from slosched.errors import InvalidConfig
from slosched.output_files import utf8, write_file
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S

WINDOW_NS = 4 * NS_PER_S

#: A window's share of a step, as published.
_SHARE_OF_STEP = 4 / 30

_STEM = "fig7_dist=poisson"
_SIZE_INCHES = (10.0, 2.5)
_WIDTHS = {12: 1.0, 48: 3.0}
_RATES: dict[float, tuple[str, str]] = {
    600: ("grey", "solid"),
    1200: ("mediumturquoise", "dotted"),
    2400: ("orange", "dashed"),
}
#: matplotlib's own look, which the artifact's figures have: a frame, no grid, black.
_LOOK: dict[str, Any] = {
    "axes_spines_top": True,
    "axes_spines_right": True,
    "axes_grid": False,
    "axes_edgecolor": "black",
    "axes_labelcolor": "black",
    "axes_labelsize": 13,
    "xtick_color": "black",
    "ytick_color": "black",
    "xtick_labelsize": 10,
    "ytick_labelsize": 10,
    "legend_frameon": True,
    "legend_fontsize": 8,
}
#: For runs that the paper does not have.
_OTHER_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
#: The run whose SLO changes make the ticks: N=12, R=600.
_TICK_RUN = (12, 600.0)


@dataclass(frozen=True)
class Curve:
    """`satisfaction` of each window; `at_ns` is its end, `from_ns` its start, after the first answer."""

    at_ns: list[int]
    satisfaction: list[float]
    from_ns: list[int]

    @property
    def middles_ns(self) -> list[float]:
        return [(begin + end) / 2 for begin, end in zip(self.from_ns, self.at_ns, strict=True)]


def published_windows(log: LogTable, width_ns: int = WINDOW_NS) -> Curve:
    """Return the curve of a request log, windowed as published (or with another width).

    The last row is left out (the original's could be torn), and so is the last, unfinished window.
    """
    times = published_rows(log, "t")
    if not len(times):
        return Curve([], [], [])
    closing = np.array(closing_rows(times, width_ns), dtype=np.intp)
    # Rows and requests in time up to each closing row, and from them those of each window.
    rows = np.diff(closing, prepend=-1)
    met = np.cumsum(published_rows(log, "deadline_met") != 0)
    good = np.diff(met[closing], prepend=0)
    opening = np.concatenate([[0], closing[:-1] + 1]) if len(closing) else closing
    first = times.min()
    return Curve(
        (times[closing] - first).tolist(),
        (1 - (rows - good) / rows).tolist(),
        (times[opening] - first).tolist(),
    )


def drawn_width_ns(log: LogTable) -> int:
    """The width of the windows in the picture: 4 s, or less where the run's steps are below 30 s."""
    starts = sorted(at for at, _ in slo_changes(log))
    if len(starts) < 2:
        return WINDOW_NS
    return min(WINDOW_NS, max(1, int(np.median(np.diff(starts)) * _SHARE_OF_STEP)))


def slo_changes(log: LogTable) -> list[tuple[int, str]]:
    """Return when each SLO was first answered for user 0 (ns after the first answer), with its label.

    In order of the SLOs. Where there is no user 0, the least one stands in. An absolute SLO, which
    the original does not know, is labelled in ms.
    """
    times = published_rows(log, "t")
    users = published_rows(log, "user_id")
    if not len(times):
        return []
    first, rows = int(times.min()), np.flatnonzero(users == users.min())
    times, factors = times[rows], published_rows(log, "slo_factor")[rows]
    absolute = np.where(factors > 0, 0, published_rows(log, "deadline")[rows])
    changes: list[tuple[int, str]] = []
    for factor in np.unique(factors).tolist():
        for deadline_ns in np.unique(absolute[factors == factor]).tolist():
            at = times[(factors == factor) & (absolute == deadline_ns)].min()
            text = f"{factor:4.1f}" if factor > 0 else f"{deadline_ns / NS_PER_MS:g} ms"
            changes.append((int(at) - first, text))
    return changes


def draw_published(runs: Sequence[Run], out: Path) -> list[Path]:
    """Draw the runs' request logs into `out`; return the paths of the PNG, the PDF and two TSVs."""
    from slosched.analysis import style

    logs = []
    for run in sorted(runs, key=lambda run: (run.copies, run.rate)):
        if run.requests is None:
            raise InvalidConfig(
                f"{run.path} has no request log; the published form is drawn from it"
            )
        logs.append((run, run.requests, published_windows(run.requests)))
    if not any(curve.at_ns for _, _, curve in logs):
        raise InvalidConfig("nothing to draw: no run is longer than one window of 4 s")
    ticks = slo_changes(_tick_log(logs))
    with style.look(**_LOOK):
        figure = style.Figure(figsize=_SIZE_INCHES)
        _draw(figure.subplots(), logs, ticks)
        paths = style.save(figure, out, _STEM, bbox_inches="tight")
    changes: list[list[object]] = [[t for t, _ in ticks], [text for _, text in ticks]]
    paths.append(
        _write_columns(
            out / f"{_STEM}_slo_multiplier_changes.tsv",
            ["SLO_multiplier_TS", "SLO_multiplier_val"],
            changes,
        )
    )
    names: list[str] = []
    columns: list[list[object]] = []
    for run, _, curve in logs:
        name = f"N={run.copies}_R={run.rate:g}"
        if f"{name}_TS" in names:
            name += f"_{run.path.resolve().name}"
        names += [f"{name}_TS", f"{name}_WS"]
        columns += [list(curve.at_ns), list(curve.satisfaction)]
    paths.append(_write_columns(out / f"{_STEM}_workload_satisfaction.tsv", names, columns))
    return paths


def published_rows(log: LogTable, column: str) -> NDArray[Any]:
    """The rows that the plotters read: all but the last line of the file, torn or whole."""
    values = log[column]
    return values if log.truncated else values[:-1]


def _tick_log(logs: Sequence[tuple[Run, LogTable, Curve]]) -> LogTable:
    for run, log, _ in logs:
        if (run.copies, round(run.rate, -1)) == _TICK_RUN:
            return log
    return logs[0][1]


def _draw(
    ax: Any, logs: Sequence[tuple[Run, LogTable, Curve]], ticks: Sequence[tuple[int, str]]
) -> None:
    others = iter(_OTHER_COLOURS * len(logs))
    ends: list[int] = []
    for run, log, _ in logs:
        known = _RATES.get(round(run.rate, -1))
        colour, line = known if known is not None else (next(others), "solid")
        drawn = published_windows(log, drawn_width_ns(log))
        ends += drawn.at_ns[-1:]
        ax.plot(
            drawn.middles_ns,
            drawn.satisfaction,
            label=f"N={run.copies}, R={run.rate:g}",
            linewidth=_WIDTHS.get(run.copies, 1.5),
            color=colour,
            linestyle=line,
        )
    for t, _ in ticks:
        ax.axvline(t, color="grey", linestyle="dashed", linewidth=0.5, zorder=0.5)
    ax.set_xticks([t for t, _ in ticks], [text for _, text in ticks], rotation=90)
    start = ticks[0][0] if ticks else 0
    ax.set_xlim(start, max(ends))
    ax.set_xlabel("SLO Multiplier")
    ax.set_ylabel("Workload Satisfaction")
    # What the published figure shows; left to itself the axis would magnify a run that is all 1.
    ax.set_ylim(-0.05, 1.05)
    ax.legend(loc="lower right")


def _write_columns(path: Path, names: Sequence[str], columns: Sequence[Sequence[object]]) -> Path:
    rows = [names, *zip_longest(*columns, fillvalue="")]
    text = "".join("\t".join(str(cell) for cell in row) + "\n" for row in rows)
    write_file(path, utf8(text).encode())
    return path
