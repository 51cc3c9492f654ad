"""All figures that the results below a folder allow, from their files alone; and what was left out, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

from slosched.analysis.drawn import Drawn
from slosched.analysis.legends import short
from slosched.analysis.share_bars import Bar, Panel, draw_bars
from slosched.analysis.share_cdfs import Latencies, draw_cdfs
from slosched.analysis.share_points import (
    Alone,
    TradeOff,
    draw_knob,
    draw_mixes,
    draw_overhead,
    draw_tradeoff,
)
from slosched.errors import InvalidConfig, UnknownName
from slosched.output_files import check_folder, write_file
from slosched.share.drawing_mixes import bar_of, draw_dedicated, mixes_of, published_mixes
from slosched.share.drawing_runs import SEGMENTS, SINGLE, stops_at_boundaries
from slosched.share.figures import JobMetrics
from slosched.share.found_runs import (
    FoundRun,
    alone_run,
    ends_of_priority,
    find_runs,
    mean_of,
    numbers_within,
    rows_of,
)
from slosched.share_spec import BoundaryKind, Mode
from slosched.units import NS_PER_MS

#: Single runs that get figures of their own; the others are drawn by naming their folder.
SINGLES = 8
TEXT = "figures.txt"
ALONE = "alone"
#: The kinds of figures; the names of their files begin so.
KINDS = (
    *("latencies", "modes", "methods", "trade-off", "knob", "overhead", "dedicated", "mixes"),
    *SINGLE,
)

Say = Callable[[str], None]


class Drawing:
    """Collects the files of figures, of the kinds in `only` (empty: all). `left_out` says what could not be."""

    def __init__(self, out: Path, only: Collection[str] = ()) -> None:
        self.out, self._only = out, only
        self.files: list[Path] = []
        self.left_out: list[str] = []
        self._texts: list[str] = []
        self._stems: set[str] = set()

    def add(self, name: str, draw: Callable[[str], Drawn]) -> None:
        """Draw the figure `name`, which begins with its kind; `draw` gets the stem of its files."""
        if self._only and name.split()[0] not in self._only:
            return
        wanted = re.sub(r"[^A-Za-z0-9._+-]+", "_", name)[:110].strip("._") or "figure"
        stem, number = wanted, 2
        while stem.lower() in self._stems:
            stem, number = f"{wanted}_{number}", number + 1
        try:
            drawn = draw(stem)
        except InvalidConfig as error:
            if "nothing to draw" not in str(error):
                raise
            self.left_out.append(f"{name}: {str(error).removeprefix('nothing to draw: ')}")
            return
        self._stems.add(stem.lower())
        self.files += drawn.files
        self._texts.append(f"{name}\n{drawn.text}\n")

    def wants(self, kinds: Iterable[str]) -> bool:
        """True if one of `kinds` is to be drawn."""
        return not self._only or any(kind in self._only for kind in kinds)

    def finish(self) -> list[Path]:
        lines = [f"left out: {line}" for line in self.left_out]
        write_file(self.out / TEXT, "\n".join([*self._texts, *lines, ""]).encode())
        return [*self.files, self.out / TEXT]


def draw_all(
    directory: Path,
    out: Path,
    *,
    say: Say = print,
    singles: int = SINGLES,
    only: Collection[str] = (),
) -> list[Path]:
    """Draw what the runs below `directory` allow into `out`; return the files, and say what was left out.

    figures.txt has the numbers. `only`: some of KINDS. Raises InvalidConfig if there is no run, a kind is not
    known or a file cannot be written, and MissingPackage without matplotlib.
    """
    check_folder(out)
    for kind in only:
        if kind not in KINDS:
            raise UnknownName("kind of figure", kind, list(KINDS))
    drawing = Drawing(out, only)
    runs = find_runs(directory, drawing.left_out.append)
    for run in runs:
        if not run.counts:
            why = run.result.unavailable.removeprefix(f"{run.result.mode}: ")
            why = why or "no request ended in its window"
            drawing.left_out.append(f"{run.mix}, {run.method}: {why}")
    used = [run for run in runs if run.counts]
    for mix, group in _by_mix(used).items():
        _of_mix(drawing, mix, group, used)
    _across_mixes(drawing, used)
    _of_single_runs(drawing, used, singles)
    files = drawing.finish()
    for line in drawing.left_out:
        say(f"left out: {line}")
    return files


def _by_mix(runs: Iterable[FoundRun]) -> dict[str, list[FoundRun]]:
    """Shared runs by what shares; sizes of images are part of it."""
    found: dict[tuple[object, ...], list[FoundRun]] = {}
    for run in runs:
        if run.result.mode is not Mode.EXCLUSIVE:
            key = (run.mix, tuple((job.name, job.size) for job in run.jobs))
            found.setdefault(key, []).append(run)
    made: dict[str, list[FoundRun]] = {}
    for (mix, *_), group in found.items():
        name, number = str(mix), 2
        while name in made:
            name, number = f"{mix} {number}", number + 1
        made[name] = group
    return made


def by_method(runs: Iterable[FoundRun]) -> dict[str, list[FoundRun]]:
    """The repeats of each method: the mode, the point of the sweep, or both where a point has several modes."""
    those = list(runs)
    modes: dict[str, set[Mode]] = {}
    for run in those:
        modes.setdefault(run.point, set()).add(run.result.mode)
    by_point = len(modes) > 1 and all(len(found) == 1 for found in modes.values())
    found: dict[str, list[FoundRun]] = {}
    for run in those:
        found.setdefault(run.point if by_point and run.point else run.method, []).append(run)
    order = list(Mode)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (order.index(item[1][0].result.mode), numbers_within(item[0])),
        )
    )


# -------------------------------------------------------------------------------------- one mix


def _of_mix(
    drawing: Drawing, mix: str, group: Sequence[FoundRun], runs: Sequence[FoundRun]
) -> None:
    methods = by_method(group)
    out = drawing.out
    places = range(len(group[0].spec.jobs))
    names = [job.name for job in group[0].spec.jobs]
    jobs = [Latencies(names[place], _latencies_ms(place, methods, runs)) for place in places]
    drawing.add(
        f"latencies {mix}", lambda stem: draw_cdfs(jobs, out, stem, title=f"Latencies, {mix}")
    )
    drawing.add(f"modes {mix}", lambda stem: _draw_modes(mix, methods, runs, out, stem))
    drawing.add(f"methods {mix}", lambda stem: _draw_methods(mix, methods, out, stem))
    ends = ends_of_priority(group[0].jobs)
    if ends is None and drawing.wants(("trade-off",)):
        drawing.left_out.append(f"trade-off {mix}: all jobs have one priority")
    if ends is None:
        return
    high, low = ends
    points = [_tradeoff(method, those, high, low) for method, those in methods.items()]
    alone = Alone(
        mean_of([_job(run, high).solo_mean_ms for run in group]),
        mean_of([_job(run, low).solo_mean_ms for run in group]),
    )
    drawing.add(
        f"trade-off {mix}",
        lambda stem: draw_tradeoff(points, alone, out, stem, high=names[high], low=names[low]),
    )
    swept = [point for point in points if math.isfinite(point.knob)]
    if len({point.knob for point in swept}) > 1:
        knob = f"Modules between two boundaries of {names[low]}"
        drawing.add(
            f"knob {mix}",
            lambda stem: draw_knob(
                swept, alone, out, stem, knob=knob, high=names[high], low=names[low]
            ),
        )
    waits = [wait for run in group if (wait := _overhead(run, low)) is not None]
    drawing.add(
        f"overhead {mix}",
        lambda stem: draw_overhead(
            [x for x, _ in waits], [y for _, y in waits], out, stem, job=names[low]
        ),
    )


def _job(run: FoundRun, place: int) -> JobMetrics:
    found = run.job_metrics(place)
    assert found is not None, "a shared run has every job of its spec"
    return found


def _latencies_ms(
    place: int, methods: dict[str, list[FoundRun]], runs: Sequence[FoundRun]
) -> dict[str, Sequence[float]]:
    first = next(iter(methods.values()))[0]
    made: dict[str, Sequence[float]] = {}
    alone = alone_run(runs, first.spec.jobs[place], first.point)
    if alone is not None:
        made[ALONE] = [row.latency_ns / NS_PER_MS for row in rows_of(alone.result.jobs[0])]
    for method, those in methods.items():
        made[method] = [
            row.latency_ns / NS_PER_MS
            for run in those
            for found in run.result.jobs
            if found.job == place
            for row in rows_of(found)
        ]
    return made


def _draw_modes(
    mix: str,
    methods: dict[str, list[FoundRun]],
    runs: Sequence[FoundRun],
    out: Path,
    stem: str,
) -> Drawn:
    first = next(iter(methods.values()))[0]
    jobs = first.spec.jobs
    places = range(len(jobs))
    solos = [alone_run(runs, job, first.point) for job in jobs]

    def panel(
        title: str,
        unit: str,
        value: Callable[[JobMetrics], float | None],
        alone: Callable[[JobMetrics], float | None] | None = None,
    ) -> Panel:
        bars: dict[str, Sequence[Bar]] = {}
        if alone is not None:
            bars[ALONE] = [bar_of([alone(_job(first, place))]) for place in places]
        elif any(solos):
            bars[ALONE] = [
                bar_of([value(each.metrics.jobs[0])]) if each else Bar() for each in solos
            ]
        for method, those in methods.items():
            bars[method] = [bar_of([value(_job(run, place)) for run in those]) for place in places]
        return Panel(title, unit, [job.name for job in jobs], bars)

    panels = [
        panel("Throughput", "requests/s", lambda job: job.throughput_per_s),
        panel(
            "p99 (the maximum of fewer than 100)",
            "ms",
            lambda job: job.latency.p99_ms if job.latency else None,
        ),
        panel(
            "Energy by device time",
            "J/request",
            lambda job: job.joules_per_request,
            # A run alone has its clients' think time, in which the GPU is idle: that is not the work's.
            lambda job: job.solo_joules_per_request,
        ),
    ]
    return draw_bars(
        panels,
        out,
        stem,
        title=f"By mode, {mix}",
        columns=3 if len(methods) < 6 and len(jobs) < 7 else 1,
    )


def _draw_methods(mix: str, methods: dict[str, list[FoundRun]], out: Path, stem: str) -> Drawn:
    jobs = next(iter(methods.values()))[0].spec.jobs

    def panel(title: str, value: Callable[[JobMetrics], float | None]) -> Panel:
        bars: dict[str, Sequence[Bar]] = {
            job.name: [
                bar_of([value(_job(run, place)) for run in those]) for those in methods.values()
            ]
            for place, job in enumerate(jobs)
        }
        return Panel(title, "", list(methods), bars, percent=True)

    def missed(job: JobMetrics) -> float | None:
        return job.misses.share if job.misses.share is not None else job.misses.deft_share

    panels = [
        panel("Mean latency above that alone", lambda job: job.inflation.all),
        panel("SLO misses (1.6 times alone unless set)", missed),
    ]
    return draw_bars(panels, out, stem, title=f"Inflation and misses, {short(mix, 26)}")


def _tradeoff(method: str, runs: Sequence[FoundRun], high: int, low: int) -> TradeOff:
    highs, lows = [_job(run, high) for run in runs], [_job(run, low) for run in runs]
    high_ms = [job.latency.mean_ms if job.latency else None for job in highs]
    low_ms = [job.inflation.apart_mean_ms for job in lows]
    boundary = runs[0].spec.jobs[low].boundary
    bounded = boundary.kind in (BoundaryKind.SYNC, BoundaryKind.EVENT)
    return TradeOff(
        name=method,
        high_ms=mean_of(high_ms),
        low_ms=mean_of(low_ms),
        high_sem=_sem(high_ms, highs[0].latency.sem_ms if highs[0].latency else None),
        low_sem=_sem(low_ms, lows[0].inflation.apart_sem_ms),
        knob=float(boundary.every) if bounded else math.nan,
    )


def _sem(means: Sequence[float | None], of_one: float | None) -> float:
    """The standard error over repeats; with one, that over its requests."""
    known = [value for value in means if value is not None]
    if len(known) < 2:
        return math.nan if of_one is None else of_one
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known))


def _overhead(run: FoundRun, low: int) -> tuple[float, float] | None:
    """(boundaries of a request at which it waits, what a request without overlap takes more in ms)."""
    job, found = run.spec.jobs[low], _job(run, low)
    prepared = next((each.prepared for each in run.result.jobs if each.job == low), None)
    if prepared is None or prepared.boundaries <= 0:
        return None
    if found.inflation.apart_mean_ms is None or found.solo_mean_ms is None:
        return None
    every = 1 if job.boundary.kind is BoundaryKind.LAYER else job.boundary.every
    if job.boundary.kind not in (BoundaryKind.LAYER, BoundaryKind.SYNC, BoundaryKind.EVENT):
        return None
    waits = prepared.boundaries // max(1, every)
    return float(waits), found.inflation.apart_mean_ms - found.solo_mean_ms


# ------------------------------------------------------------------------------------ across mixes


def _across_mixes(drawing: Drawing, runs: Sequence[FoundRun]) -> None:
    out = drawing.out
    shared = [run for run in runs if run.result.mode is not Mode.EXCLUSIVE]
    if not shared:
        drawing.left_out.append("figures of modes: only runs of models alone are there")
        return
    for mode in dict.fromkeys(run.result.mode for run in shared):
        those = [run for run in shared if run.result.mode is mode]
        drawing.add(
            f"dedicated {mode}",
            partial(draw_dedicated, those, mode, out),
        )
    series = mixes_of(shared)
    measured = {
        mix
        for each in series
        for mix, values in each.values.items()
        if any(map(math.isfinite, values))
    }
    published = [each for each in published_mixes() if measured & set(each.values)]
    title = "Published then, and here now" if published else "What sharing brings"
    drawing.add("mixes", lambda stem: draw_mixes([*published, *series], out, stem, title=title))


# ------------------------------------------------------------------------------------- single runs


def _of_single_runs(drawing: Drawing, runs: Sequence[FoundRun], singles: int) -> None:
    first = {(run.mix, run.method): run for run in reversed(runs)}
    # Shared runs first: runs alone say less.
    order = sorted(
        first.values(),
        key=lambda run: (run.result.mode is Mode.EXCLUSIVE, numbers_within(str(run.folder))),
    )
    for run in order[:singles]:
        name = f"{run.mix} {run.method}"
        for kind, draw in SINGLE.items():
            if kind == SEGMENTS and not stops_at_boundaries(run):
                continue  # nothing is missing there
            drawing.add(f"{kind} {name}", partial(draw, run, drawing.out))
    if len(order) > singles and drawing.wants(SINGLE):
        drawing.left_out.append(
            f"figures of single runs: the first {singles} of {len(order)} have them; name the folder of "
            "another run to draw its own"
        )
