"""Figure 8: can closed loops in the background disturb deadlines in the foreground? (OSDI'20, §6.4).

One run for each background. Foreground: the share in time of each window of a little more than 5 s,
in order of completion, as published. Background: requests in time per second of such windows, on an
axis of its own to the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.drawn import Drawn, columns_text, plain
from slosched.analysis.fig7_published import slo_changes
from slosched.analysis.runs import policy_of, read_requests, stated
from slosched.analysis.windows import Times, closing_rows
from slosched.errors import InvalidConfig
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_S, format_duration

WINDOW_NS = 5 * NS_PER_S
#: User ids below this are the foreground's in the published experiment.
_PUBLISHED_FOREGROUND = 6
_COLUMNS = ("t", "user_id", "slo_factor", "deadline", "deadline_met")


@dataclass(frozen=True)
class Curves:
    """One run. Times are s after its first answer, at the ends of windows."""

    run: str
    label: str
    foreground: int
    foreground_at_s: list[float]
    satisfaction: list[float]
    background_at_s: list[float]
    background_rps: list[float]
    foreground_requests: int
    foreground_in_time: int
    background_in_time: int
    slo_changes_s: list[tuple[float, str]]


def plot_fig8(
    run_dirs: Sequence[Path],
    out: Path,
    *,
    window_ns: int = WINDOW_NS,
    foreground: int | None = None,
) -> Drawn:
    """Draw the runs into the directory `out` as fig8.png and .pdf.

    Requests with a user id below `foreground` are the foreground's; without it the manifest says how
    many instances it has, else 6 as published. Raises InvalidConfig if a run has no request log or no
    foreground, or is shorter than a window, MalformedLog, MissingPackage.
    """
    if not run_dirs:
        raise InvalidConfig("nothing to draw: name at least one run directory")
    curves = [_measure(Path(path), window_ns, foreground) for path in run_dirs]
    document = {"window_ns": window_ns, "runs": [plain(asdict(c)) for c in curves]}
    return Drawn(_draw(curves, out), document, _text(curves))


def _measure(path: Path, window_ns: int, foreground: int | None) -> Curves:
    log = read_requests(path, only=_COLUMNS)
    if foreground is None:
        foreground = _foreground(path)
    in_front = log["user_id"] < foreground
    first_ns = int(log["t"].min())
    front_t, front_met = log["t"][in_front], log["deadline_met"][in_front]
    back_t, back_met = log["t"][~in_front], log["deadline_met"][~in_front]
    if not len(front_t):
        raise InvalidConfig(
            f"{path} has no requests of users below {foreground}, the foreground; "
            "--foreground says how many instances it has"
        )
    at_s, rows, met, _ = _windows(front_t, front_met, window_ns, first_ns)
    if not at_s:
        raise InvalidConfig(
            f"{path} is shorter than one window of {format_duration(window_ns)}; "
            "give a shorter --window"
        )
    back_at_s, _, back_in_time, seconds = _windows(back_t, back_met, window_ns, first_ns)
    return Curves(
        run=str(path),
        label=_label(path, log, ~in_front),
        foreground=foreground,
        foreground_at_s=at_s,
        satisfaction=(met / rows).tolist(),
        background_at_s=back_at_s,
        background_rps=(back_in_time / seconds).tolist(),
        foreground_requests=len(front_met),
        foreground_in_time=int(np.count_nonzero(front_met)),
        background_in_time=int(np.count_nonzero(back_met)),
        slo_changes_s=[(at_ns / NS_PER_S, text.strip()) for at_ns, text in slo_changes(log)],
    )


def _windows(
    times: Times, met: NDArray[np.int64], window_ns: int, first_ns: int
) -> tuple[list[float], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For each window: its end in s, its rows, those in time, and how many s it spans."""
    closing = np.array(closing_rows(times, window_ns), dtype=np.intp)
    rows = np.diff(closing, prepend=-1)
    good = np.diff(np.cumsum(met != 0)[closing], prepend=0)
    opening = np.concatenate(([0], closing[:-1] + 1))[: len(closing)]
    seconds = (times[closing] - times[opening]) / NS_PER_S
    at_s: list[float] = ((times[closing] - first_ns) / NS_PER_S).tolist()
    return at_s, rows, good, seconds


def _foreground(path: Path) -> int:
    section = stated(path, "foreground")
    copies = section.get("copies") if isinstance(section, Mapping) else None
    return copies if isinstance(copies, int) else _PUBLISHED_FOREGROUND


def _label(path: Path, log: LogTable, background: NDArray[np.bool_]) -> str:
    """ "INFER5: M=12, C=16" as far as the manifest or the log says so."""
    copies, concurrency = stated(path, "copies_bg"), stated(path, "concurrency_bg")
    if copies is None:
        copies = len(np.unique(log["user_id"][background]))
    load = f"M={copies}" + (f", C={concurrency}" if concurrency else "")
    policy = policy_of(path)
    return (f"{policy}: " if policy else "") + (load if copies else "no background")


def _draw(curves: Sequence[Curves], out: Path) -> list[Path]:
    from slosched.analysis import style

    with style.look():
        figure = style.Figure(figsize=(9.6, 4.4), layout="constrained")
        ax = figure.subplots()
        ax.set_title("Foreground in time (solid, left) and background throughput (dashed, right)")
        behind = ax.twinx()
        behind.grid(visible=False)
        behind.spines["right"].set_visible(True)
        ax.set_zorder(behind.get_zorder() + 1)
        ax.patch.set_visible(False)
        for place, curve in enumerate(curves):
            colour = style.COLOURS[place % len(style.COLOURS)]
            ax.plot(
                curve.foreground_at_s,
                curve.satisfaction,
                color=colour,
                label=curve.label,
                marker=style.MARKERS[place % len(style.MARKERS)],
                markersize=4,
                linewidth=1.6,
                clip_on=False,
            )
            if curve.background_at_s:
                behind.fill_between(
                    curve.background_at_s,
                    curve.background_rps,
                    color=colour,
                    alpha=0.10,
                    linewidth=0,
                )
                behind.plot(
                    curve.background_at_s,
                    curve.background_rps,
                    color=colour,
                    linewidth=1.1,
                    linestyle=(0, (2, 1.5)),
                    alpha=0.8,
                )
        ax.set_ylim(0, 1.03)
        ax.set_ylabel("Foreground satisfaction")
        top = max((rate for c in curves for rate in c.background_rps), default=1.0)
        behind.set_ylim(0, 1.35 * top)
        behind.set_ylabel("Background in time (requests/s), dashed")
        _ticks(ax, curves[0])
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        return style.save(figure, out, "fig8")


def _ticks(ax: Any, curve: Curves) -> None:
    """The SLOs of the first run, each where it begins; the seconds where there is only one."""
    if len(curve.slo_changes_s) < 2:
        ax.set_xlabel("Time (s)")
        return
    ax.set_xticks(
        [at_s for at_s, _ in curve.slo_changes_s], [text for _, text in curve.slo_changes_s]
    )
    ax.grid(visible=True, axis="x", linestyle="--")
    ax.set_xlabel("SLO multiplier of the foreground, from here on")
    ax.set_xlim(left=0)


def _text(curves: Sequence[Curves]) -> str:
    rows = [
        (
            c.label,
            c.foreground_requests,
            100 * c.foreground_in_time / c.foreground_requests,
            min(c.satisfaction),
            c.background_in_time,
            float(np.median(c.background_rps)) if c.background_rps else None,
        )
        for c in curves
    ]
    headings = (
        "run",
        "FG requests",
        "in time %",
        "worst window",
        "BG in time",
        "BG median r/s",
    )
    return columns_text(headings, rows)
