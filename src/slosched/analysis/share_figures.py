"""Figures of shared GPUs over time: latency against the end, lanes of requests, what waits, and power.

The picture of latencies is Deft's (plot_jct_timeseries.py): the latency (JCT) of each job against its end.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from slosched.analysis.drawn import Drawn, columns_text
from slosched.analysis.legends import (
    fitting,
    legend_below,
    look_of,
    short,
    short_all,
    size_with_legend,
)
from slosched.errors import InvalidConfig
from slosched.text_files import open_lines
from slosched.units import NS_PER_S

#: No request of a file takes longer: 30 years.
LONGEST_MS = 1e12
#: Lanes that a figure shows at most, and requests of the busiest of them.
MOST_LANES = 24
MOST_BARS = 80
#: Queues that a figure shows at most, and steps of one of them.
MOST_QUEUES = 12
MOST_STEPS = 600
_NEEDED = ("start_timestamp_ns", "end_timestamp_ns", "jct_ms")


@dataclass(frozen=True)
class Pause:
    """In s, as in its Lane."""

    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Lane:
    """The requests of one job, in s from the begin of the window; the three lists go together."""

    name: str
    arrived_s: Sequence[float]
    started_s: Sequence[float]
    ended_s: Sequence[float]
    pauses: Sequence[Pause] = ()


@dataclass(frozen=True)
class Queued:
    """How many requests of a job wait: `waiting[i]` from `at_s[i]` on, and none before the first.

    Times rise, in s from the begin of the window.
    """

    name: str
    at_s: Sequence[float]
    waiting: Sequence[int]

    @property
    def most(self) -> int:
        return max(self.waiting, default=0)

    def mean(self, end_s: float) -> float:
        """The mean over the time from 0 to `end_s`."""
        bounds_s = pairwise([*self.at_s, end_s])
        spans = zip(bounds_s, self.waiting, strict=True)
        return math.fsum((until - at) * number for (at, until), number in spans) / end_s


@dataclass(frozen=True)
class Phase:
    """A part of a power trace, such as the idle time."""

    name: str
    begin_s: float
    end_s: float


# ---------------------------------------------------------------------------------- Deft's picture


def read_jct(path: Path, *, first_row: bool = True) -> tuple[list[float], list[float]]:
    """(ends in s of the monotonic clock, latencies in ms) of a file in Deft's format, in order of the file.

    Without `first_row` the first one, which Deft's runner writes for its warm-up, is left out. Raises
    InvalidConfig with the line that is wrong.
    """
    ends_s, latencies_ms = [], []
    with open_lines(path, "the latencies") as lines:
        reader = csv.DictReader(lines, skipinitialspace=True)
        missing = [name for name in _NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise InvalidConfig(
                f"{path} is not a file of latencies in Deft's format: it has no column {missing[0]}"
            )
        for row in reader:
            try:
                end_ns, latency_ms = int(row["end_timestamp_ns"]), float(row["jct_ms"])
            except (TypeError, ValueError):
                raise InvalidConfig(
                    f"{path}, line {reader.line_num}: the end must be whole ns and the latency a number"
                ) from None
            if not 0 <= latency_ms <= LONGEST_MS:
                raise InvalidConfig(
                    f"{path}, line {reader.line_num}: the latency is {latency_ms:g}; it must be within "
                    f"0..{LONGEST_MS:g} ms"
                )
            if not 0 <= end_ns < 2**63:
                raise InvalidConfig(
                    f"{path}, line {reader.line_num}: the end is not within 0..2^63 ns"
                )
            ends_s.append(end_ns / NS_PER_S)
            latencies_ms.append(latency_ms)
    skipped = 0 if first_row else 1
    return ends_s[skipped:], latencies_ms[skipped:]


def draw_jct(a: Path, b: Path, target: Path, *, first_row: bool = False) -> Drawn:
    """Draw the latencies of two jobs from files in Deft's format into `target` as jct_vs_t.jpg and .png.

    Time 0 is the first end of both. The first row of each file is left out, as Deft does, unless `first_row`.
    Raises InvalidConfig if a file cannot be read or written, or both have no more rows; MissingPackage.
    """
    found = {
        f"Model {letter} ({path.stem})": read_jct(path, first_row=first_row)
        for letter, path in (("A", a), ("B", b))
    }
    ends = [end for series, _ in found.values() for end in series]
    if not ends:
        raise InvalidConfig(f"nothing to draw: {a} and {b} have no request behind their first row")
    zero = min(ends)
    return draw_latencies(
        {name: ([end - zero for end in ends], ms) for name, (ends, ms) in found.items()},
        target,
        "jct_vs_t",
        forms=("jpg", "png"),
    )


def draw_latencies(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    out: Path,
    stem: str,
    *,
    title: str = "Latency of each job",
    forms: Sequence[str] = ("png", "pdf"),
) -> Drawn:
    """Draw latencies in ms against ends in s, a series for each job, into `out`. Raises as `draw_jct`."""
    from slosched.analysis import style

    shown = {name: values for name, values in series.items() if len(values[0])}
    if not shown:
        raise InvalidConfig("nothing to draw: the run has no requests")
    labels = short_all(list(shown), 44)
    with style.look():
        figure = style.Figure(figsize=size_with_legend(8.6, 3.6, labels), layout="constrained")
        ax = figure.subplots()
        for place, (label, (ends, latencies)) in enumerate(
            zip(labels, shown.values(), strict=True)
        ):
            colour, marker = look_of(place)
            many = len(ends) > 150
            # A line between points says only in which order they came; among hundreds it hides them.
            ax.plot(
                ends,
                latencies,
                linestyle="" if many else "-",
                linewidth=0.6,
                color=colour,
                marker=marker,
                markersize=2.2 if len(ends) > 600 else 3.2 if many else 4.5,
                markeredgewidth=0,
                alpha=0.55 if len(ends) > 600 else 0.9,
            )
            ax.plot([], [], linestyle="", color=colour, marker=marker, label=label)
        _latency_axis(ax, [value for _, values in shown.values() for value in values])
        ax.set_xlabel("End of the request (s)")
        ax.set_title(fitting(figure, title))
        legend_below(figure, ax, labels)
        files = style.save(figure, out, stem, forms=forms)
    rows = [
        (name, len(values), math.fsum(values) / len(values), min(values), max(values))
        for name, (_, values) in shown.items()
    ]
    return Drawn(
        files,
        {name: {"end_s": list(ends), "latency_ms": list(ms)} for name, (ends, ms) in shown.items()},
        columns_text(("job", "requests", "mean ms", "least ms", "most ms"), rows),
    )


def _latency_axis(ax: Any, values: Sequence[float]) -> None:
    """From 0, or by powers of ten where short and long jobs are together."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 30:
        from slosched.analysis.style import write_out

        ax.set_yscale("log")
        write_out(ax.yaxis)
    else:
        ax.set_ylim(0, 1.08 * high if high > 0 else 1.0)
    ax.set_ylabel("Latency (ms)")


# ------------------------------------------------------------------------------------ lanes, power


def draw_lanes(lanes: Sequence[Lane], out: Path, stem: str, *, title: str) -> Drawn:
    """Draw when requests waited (thin), ran (thick) and were paused (hatched), a lane for each job.

    Shown is the part of the run from the first request of the rarest job in which the busiest lane has
    MOST_BARS requests at most, of MOST_LANES lanes. Raises InvalidConfig, MissingPackage.
    """
    from slosched.analysis import style

    used = [lane for lane in lanes if len(lane.ended_s)]
    if not used:
        raise InvalidConfig("nothing to draw: the run has no requests")
    shown = used[:MOST_LANES]
    begin_s, end_s = _part_shown(shown)
    labels = short_all([lane.name for lane in shown])
    numbers: dict[str, Any] = {"from_s": begin_s, "to_s": end_s, "lanes": {}}
    with style.look(axes_grid=False):
        figure = style.Figure(figsize=(8.6, 1.5 + 0.42 * len(shown)), layout="constrained")
        ax = figure.subplots()
        for place, lane in enumerate(shown):
            bars = _bars_between(lane, begin_s, end_s)
            _draw_lane(ax, place, lane, bars, (begin_s, end_s))
            numbers["lanes"][lane.name] = bars
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.set_yticks(range(len(shown)), labels)
        ax.set_xlim(begin_s, end_s)
        ax.set_xlabel("Time since the window began (s)")
        more = f" ({len(shown)} of {len(used)} jobs)" if len(used) > len(shown) else ""
        ax.set_title(
            f"{fitting(figure, title + more)}\nthin: waiting; thick: running; hatched: paused for another job",
            fontsize=10,
        )
        files = style.save(figure, out, stem)
    rows = [(lane.name, len(numbers["lanes"][lane.name]), len(lane.ended_s)) for lane in shown]
    return Drawn(files, numbers, columns_text(("job", "requests shown", "requests"), rows))


def _part_shown(lanes: Sequence[Lane]) -> tuple[float, float]:
    rarest = min(lanes, key=lambda lane: len(lane.ended_s))
    last = max(end for lane in lanes for end in lane.ended_s)
    origin = min(arrived for lane in lanes for arrived in lane.arrived_s)
    first = max(origin, min(rarest.arrived_s))
    end_s = last
    for lane in lanes:
        behind = sorted(end for end in lane.ended_s if end > first)
        if len(behind) > MOST_BARS:
            end_s = min(end_s, behind[MOST_BARS - 1])
    begin_s = max(origin, first - 0.1 * (end_s - first))
    return begin_s, end_s if end_s > begin_s else begin_s + 1e-3


def _bars_between(lane: Lane, begin_s: float, end_s: float) -> list[tuple[float, float, float]]:
    rows = zip(lane.arrived_s, lane.started_s, lane.ended_s, strict=True)
    return [row for row in rows if row[2] >= begin_s and row[0] <= end_s]


def _draw_lane(
    ax: Any,
    place: int,
    lane: Lane,
    bars: Sequence[tuple[float, float, float]],
    shown: tuple[float, float],
) -> None:
    colour, _ = look_of(place)
    waits = [(arrived, started - arrived) for arrived, started, _ in bars]
    runs = [(started, ended - started) for _, started, ended in bars]
    pauses = [
        (pause.begin_s, pause.end_s - pause.begin_s)
        for pause in lane.pauses
        if pause.end_s >= shown[0] and pause.begin_s <= shown[1]
    ]
    ax.broken_barh(waits, (place - 0.06, 0.12), facecolors=colour, alpha=0.55, linewidth=0)
    # A white edge keeps requests apart that follow one another at once.
    ax.broken_barh(runs, (place - 0.32, 0.64), facecolors=colour, edgecolor="white", linewidth=0.5)
    ax.broken_barh(
        pauses,
        (place - 0.32, 0.64),
        facecolors="white",
        edgecolor=colour,
        hatch="////",
        linewidth=0.5,
    )


def draw_queues(
    queues: Sequence[Queued], end_s: float, out: Path, stem: str, *, title: str
) -> Drawn:
    """Draw how many requests of each job wait, from 0 to `end_s`: a panel for each of MOST_QUEUES jobs.

    Where a job's number changes more than MOST_STEPS times, a line shows its mean in MOST_STEPS equal times,
    and a shade the most. Raises InvalidConfig if no job has a request, MissingPackage.
    """
    from slosched.analysis import style

    if not queues or end_s <= 0:
        raise InvalidConfig("nothing to draw: the run has no requests")
    shown = queues[:MOST_QUEUES]
    with style.look():
        figure = style.Figure(figsize=(8.6, 1.2 + 1.25 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for place, (ax, queue) in enumerate(zip(axes, shown, strict=True)):
            colour, _ = look_of(place)
            line, most = queue_lines(queue, end_s)
            if most is not None:
                ax.fill_between(*most, step="post", color=colour, alpha=0.25, linewidth=0)
            ax.plot(*line, drawstyle="steps-post", color=colour, linewidth=1.2)
            ax.set_ylim(0, 1.08 * max(queue.most, 1))
            ax.yaxis.set_major_locator(style.WholeLocator(4, integer=True))
            ax.set_title(short(queue.name, 60), fontsize=10, loc="left")
        axes[-1].set_xlim(0, end_s)
        axes[-1].set_xlabel("Time since the window began (s)")
        figure.supylabel("Requests that wait", fontsize=10)
        more = f" ({len(shown)} of {len(queues)} jobs)" if len(queues) > len(shown) else ""
        if any(len(queue.at_s) > MOST_STEPS for queue in shown):
            more += (
                f"\nshaded: the most in {1000 * end_s / MOST_STEPS:.3g} ms; the line is the mean"
            )
        figure.suptitle(
            fitting(figure, title) + more, x=0.01, ha="left", fontsize=11, fontweight="bold"
        )
        files = style.save(figure, out, stem)
    rows = [(q.name, q.mean(end_s), q.most, q.waiting[-1] if q.waiting else 0) for q in shown]
    return Drawn(
        files,
        {q.name: {"time_s": list(q.at_s), "waiting": list(q.waiting)} for q in shown},
        columns_text(("job", "mean waiting", "most", "at the end"), rows),
    )


Line = tuple[Sequence[float], Sequence[float]]


def queue_lines(queue: Queued, end_s: float) -> tuple[Line, Line | None]:
    """What is drawn of a queue: its steps, or the means and the most of equal times."""
    at_s, waiting = [0.0, *queue.at_s, end_s], [0, *queue.waiting, 0]
    waiting[-1] = waiting[-2]
    if len(queue.at_s) <= MOST_STEPS:
        return (at_s, waiting), None
    sums, most = [0.0] * MOST_STEPS, [0.0] * MOST_STEPS
    wide_s = end_s / MOST_STEPS
    for (begin_s, number), until_s in zip(zip(at_s, waiting, strict=True), at_s[1:], strict=False):
        place = min(int(begin_s / wide_s), MOST_STEPS - 1)
        while place < MOST_STEPS and place * wide_s < until_s:
            inside_s = min(until_s, (place + 1) * wide_s) - max(begin_s, place * wide_s)
            sums[place] += number * max(0.0, inside_s)
            most[place] = max(most[place], number)
            place += 1
    edges = [place * wide_s for place in range(MOST_STEPS + 1)]
    means = [each / wide_s for each in sums]
    return (edges, [*means, means[-1]]), (edges, [*most, most[-1]])


def draw_power(
    times_s: Sequence[float],
    watts: Sequence[float],
    phases: Sequence[Phase],
    out: Path,
    stem: str,
    *,
    title: str,
    average: Sequence[float] = (),
) -> Drawn:
    """Draw sampled power over time with its phases. `average` is what the driver averages; NaN: unknown.

    Raises InvalidConfig without a sample, MissingPackage.
    """
    from slosched.analysis import style

    if not times_s:
        raise InvalidConfig("nothing to draw: power was not sampled")
    names = ["sampled", "the driver's average"] if average else ["sampled"]
    with style.look():
        figure = style.Figure(figsize=size_with_legend(8.6, 3.2, names), layout="constrained")
        ax = figure.subplots()
        few = {"marker": "o", "markersize": 3} if len(times_s) < 40 else {}
        ax.plot(times_s, watts, color=look_of(0)[0], linewidth=1.1, label=names[0], **few)
        if average:
            ax.plot(times_s, average, color=look_of(1)[0], linewidth=1.1, label=names[1], **few)
        top = max(value for value in [*watts, *average] if math.isfinite(value)) or 1.0
        ax.set_ylim(0, 1.18 * top)
        span = max(max(times_s) - min(times_s), 1e-9)
        for place, phase in enumerate(phases):
            if place % 2:
                ax.axvspan(phase.begin_s, phase.end_s, color="#f1f1f1", linewidth=0, zorder=0)
            # A phase too short for its name has none; its shade shows it.
            middle = (phase.begin_s + phase.end_s) / 2
            wide = (phase.end_s - phase.begin_s) / span > 0.011 * len(phase.name)
            if wide and min(times_s) <= middle <= max(times_s):
                ax.text(middle, 1.1 * top, phase.name, ha="center", color=style.PALE, fontsize=9)
        ax.set_xlim(min(times_s), max(times_s) if len(times_s) > 1 else min(times_s) + 1)
        ax.set_xlabel("Time since the window began (s)")
        ax.set_ylabel("Power (W)")
        ax.set_title(fitting(figure, title))
        legend_below(figure, ax, names)
        files = style.save(figure, out, stem)
    means = {phase.name: _mean_between(times_s, watts, phase) for phase in phases}
    rows = [(p.name, p.begin_s, p.end_s, means[p.name]) for p in phases]
    return Drawn(
        files,
        {"time_s": list(times_s), "watts": list(watts), "mean_watts": means},
        columns_text(("phase", "from s", "to s", "mean of samples W"), rows),
    )


def _mean_between(times_s: Sequence[float], watts: Sequence[float], phase: Phase) -> float:
    inside = [
        value
        for at, value in zip(times_s, watts, strict=True)
        if phase.begin_s <= at <= phase.end_s
    ]
    return math.fsum(inside) / len(inside) if inside else math.nan
