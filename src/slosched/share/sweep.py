"""Runs the points of a sweep, one after the other, and keeps what each came to.

    OUT/<folder of the point>/...   what `run_experiment` writes: specs, runs, files (of mixes: OUT/...)
    OUT/points/<point>.json         that the point is done, of which experiment, and its figures
    OUT/sweep.csv                   a row for each point and mode, from all points that are done
    OUT/figures/                    drawn at the end

A point that is done with the same experiment is not run again. Ctrl-C keeps what is there: the point that ran
is run again next time, and `run_experiment` keeps those of its runs that were complete.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from slosched.analysis.compare import Estimate
from slosched.clock import now_ns
from slosched.errors import InvalidConfig, SloschedError
from slosched.output_files import make_folder, write_file
from slosched.share.axes import Point
from slosched.share.figures import JobMetrics, RunMetrics
from slosched.share.result_paths import RUN
from slosched.share.run import distinct
from slosched.share.sweep_fit import BoundaryFit, fits_of
from slosched.share_spec import Mode, ShareSpec, Status
from slosched.sim.run import source_digest
from slosched.units import NS_PER_S, format_duration

POINTS = "points"
TABLE = "sweep.csv"
FIGURES = "figures"
#: Points of one sweep that may fail before it is given up.
_MOST_FAILED_IN_TURN = 3

Say = Callable[[str], None]
#: Runs one experiment into a folder; its figures are then read from there. Raises SloschedError.
RunPoint = Callable[[ShareSpec, Path], Sequence[RunMetrics]]


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A point that was run: point.json. `failed` says why there are no figures, or which are missing."""

    digest: str
    settings: dict[str, str | int | float | bool]
    runs: tuple[RunMetrics, ...]
    failed: str = ""


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep came to. `stopped`: it was interrupted; `left` points are not done.

    `fits` are a and b of Deft's predictor where distances of boundaries vary.
    """

    table: Path
    done: int
    kept: int
    failed: dict[str, str]
    left: int
    stopped: bool
    fits: tuple[BoundaryFit, ...] = ()


def run_sweep(
    points: Sequence[Point],
    out: Path,
    *,
    run: RunPoint,
    say: Say = print,
    stopped: Callable[[], bool] = lambda: False,
    resume: bool = True,
    draw: bool = True,
    now: Callable[[], int] = now_ns,
) -> Swept:
    """Run `points` into `out` and write sweep.csv after each. A point that fails is named, and the rest runs.

    At the end all figures that the results allow are drawn into OUT/figures (not if `draw` is False).

    sweep.csv is also written if KeyboardInterrupt ends it. Raises InvalidConfig if `out` cannot be written, or
    two points have one folder.
    """
    make_folder(out)
    _check_folders(points)
    sweep = _Sweep(points, out, run, say, stopped)
    if resume:
        sweep.keep()
    try:
        sweep.run(now)
    finally:
        table = write_table(points, sweep.done, out)
    fits = fits_of((p.spec, sweep.done[p.folder].runs) for p in points if p.folder in sweep.done)
    for fit in fits:
        say(f"cost of boundaries: {fit.text}")
    if draw and sweep.done and not sweep.stop:
        _draw(out, say)
    return Swept(
        table=table,
        done=len(sweep.done),
        kept=sweep.kept,
        failed=sweep.failed,
        left=len(points) - len(sweep.done),
        stopped=sweep.stop,
        fits=tuple(fits),
    )


class _Sweep:
    """A sweep while it runs."""

    def __init__(
        self,
        points: Sequence[Point],
        out: Path,
        run: RunPoint,
        say: Say,
        stopped: Callable[[], bool],
    ) -> None:
        self.points, self.out, self._run = points, out, run
        self._say, self._stopped = say, stopped
        self.done: dict[str, Done] = {}
        self.failed: dict[str, str] = {}
        self.kept = 0
        self.stop = False

    def keep(self) -> None:
        """Take over what is done already."""
        for point in self.points:
            kept = _kept(point, self.out)
            if kept is not None:
                self.done[point.folder] = kept
        self.kept = len(self.done)
        if self.kept:
            self._say(f"{self.kept} of {len(self.points)} points are done already and are kept")

    def run(self, now: Callable[[], int]) -> None:
        """Run the points that are not done, until `stopped` or too many fail."""
        rest = [point for point in self.points if point.folder not in self.done]
        in_turn, begun_ns = 0, now()
        for number, point in enumerate(rest, start=1):
            if self._stopped():
                self.stop = True
                return
            self._say(f"point {self.kept + number} of {len(self.points)}: {point.name}")
            ended = _run_point(point, self.out, self._run)
            if self._stopped():  # it may have been cut short
                self.stop = True
                return
            self._record(point, ended)
            in_turn = 0 if ended.runs else in_turn + 1
            if in_turn >= _MOST_FAILED_IN_TURN:
                self._say(f"{in_turn} points failed one after the other; the sweep ends")
                return
            left = len(rest) - number
            if left:
                left_s = max(1, round((now() - begun_ns) / NS_PER_S / number * left))
                what = "1 point" if left == 1 else f"{left} points"
                self._say(f"about {format_duration(left_s * NS_PER_S)} left ({what})")

    def _record(self, point: Point, ended: Done) -> None:
        if ended.runs:
            self.done[point.folder] = ended
        if ended.failed:
            self.failed[point.folder] = ended.failed
            self._say(f"{point.name}: {ended.failed}")
        else:
            made = msgspec.json.format(msgspec.json.encode(ended)) + b"\n"
            write_file(self.out / POINTS / f"{point.folder}.json", made)
        write_table(self.points, self.done, self.out)


def digest_of(spec: ShareSpec) -> str:
    """What a finished point must have been made of to stand for `spec`: it, and our own source."""
    text = msgspec.json.encode(spec, order="deterministic") + source_digest().encode()
    return hashlib.sha256(text).hexdigest()[:16]


def _run_point(point: Point, out: Path, run: RunPoint) -> Done:
    runs: tuple[RunMetrics, ...] = ()
    try:
        place = out if point.together else out / point.folder
        if not point.together:
            take_solos(point.spec, out, place)
        runs = tuple(run(point.spec, place))
        failed = _what_failed(runs) if runs else "it left no results"
    except SloschedError as error:
        failed = str(error) or type(error).__name__
    return Done(digest=digest_of(point.spec), settings=point.settings, runs=runs, failed=failed)


def _what_failed(runs: Sequence[RunMetrics]) -> str:
    """What ended otherwise than it should; a mode that the machine lacks is not tried again."""
    wrong = [
        f"{each.name} in {run.mode} {each.status}" + (f" ({each.reason})" if each.reason else "")
        for run in runs
        if not run.unavailable
        for each in run.jobs
        if each.status not in (Status.OK, Status.UNAVAILABLE)
    ]
    return "; ".join(dict.fromkeys(wrong))


def _kept(point: Point, out: Path) -> Done | None:
    """The point's figures if it is done; a file that cannot be read counts as not done."""
    try:
        kept = msgspec.json.decode((out / POINTS / f"{point.folder}.json").read_bytes(), type=Done)
    except (OSError, msgspec.DecodeError, ValueError):
        return None
    # Another machine, or this one mended, may have what was missing.
    complete = not kept.failed and not any(run.unavailable for run in kept.runs)
    return kept if complete and kept.digest == digest_of(point.spec) else None


def _check_folders(points: Sequence[Point]) -> None:
    if not points:
        raise InvalidConfig("a sweep has at least one point")
    seen: set[str] = set()
    for point in points:
        if point.folder.lower() in seen:
            raise InvalidConfig(f"two points have the folder {point.folder}")
        seen.add(point.folder.lower())


def take_solos(spec: ShareSpec, out: Path, place: Path) -> None:
    """Copy the runs of models alone that other points below `out` have into `place`, where it lacks them.

    `run_experiment` keeps those that were made of the same, and replaces the others.
    """
    from slosched.share.experiment import solo_path

    paths = {
        solo_path(spec, job, repeat)
        for job in distinct(spec.jobs)
        for repeat in range(spec.repeats)
    }
    for path in sorted(paths):
        if (place / path).exists():
            continue
        for source in sorted(out.glob(f"*/{path.as_posix()}/{RUN}"))[:1]:
            for file in sorted(source.parent.iterdir()):
                if file.is_file():
                    write_file(place / path / file.name, file.read_bytes())


def _draw(out: Path, say: Say) -> None:
    try:
        from slosched.share.drawing import draw_all

        files = draw_all(out, out / FIGURES, say=say)
    except SloschedError as error:
        say(f"no figures: {error}")
        return
    say(f"{len(files)} files of figures are in {out / FIGURES}")


# ------------------------------------------------------------------------------------------- the table


def write_table(points: Sequence[Point], done: dict[str, Done], out: Path) -> Path:
    """Write sweep.csv of the points that are done, in the order of `points`; return its path."""
    rows = [
        row
        for point in points
        if point.folder in done
        for row in rows_of(point, done[point.folder].runs)
    ]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or ["point"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / TABLE, text.getvalue().encode())
    return out / TABLE


def rows_of(point: Point, runs: Sequence[RunMetrics]) -> list[dict[str, Any]]:
    """A row for each mode of the point: means over repeats and, with more than one, halves of 95 % intervals.

    Columns of a job begin with its place among the jobs: job0_p99_ms.
    """
    rows = []
    for mode in dict.fromkeys(run.mode for run in runs):
        those = [run for run in runs if run.mode is mode]
        # Alone, each job has a run of its own; a repeat is then one of them all.
        if mode is Mode.EXCLUSIVE and len(point.spec.jobs) > 1:
            continue
        row: dict[str, Any] = {"point": point.folder, **point.settings, "mode": mode.value}
        row["repeats"] = len(those)
        row["status"] = _status(those)
        for column, values in _values(those).items():
            estimate = Estimate.of([value for value in values if value is not None])
            row[column] = "" if estimate is None else estimate.mean
            if len(those) > 1:
                half = estimate.half if estimate is not None else None
                row[f"{column}_half"] = "" if half is None else half
        for place, job in enumerate(point.spec.jobs):
            row[f"job{place}_name"] = job.name
        rows.append(row)
    return rows


def _status(runs: Sequence[RunMetrics]) -> str:
    if any(run.unavailable for run in runs):
        return "unavailable"
    return _what_failed(runs) or "ok"


def _values(runs: Sequence[RunMetrics]) -> dict[str, list[float | None]]:
    """By column, a value of each run."""
    made: dict[str, list[float | None]] = {
        "stp": [run.stp for run in runs],
        "antt": [run.antt for run in runs],
        "jain": [run.jain for run in runs],
        "throughput_per_s": [run.throughput_per_s for run in runs],
        "energy_ratio": [run.energy_ratio for run in runs],
        "joules_per_request": [run.joules_per_request for run in runs],
        "mean_watts": [run.energy.mean_watts for run in runs],
        "preemption_p50_ms": [p.p50_ms if (p := run.pauses.preempted) else None for run in runs],
        "preemption_p99_ms": [p.p99_ms if (p := run.pauses.preempted) else None for run in runs],
    }
    for place in sorted({job.job for run in runs for job in run.jobs}):
        jobs = [next((job for job in run.jobs if job.job == place), None) for run in runs]
        for name, value in _JOB_COLUMNS.items():
            made[f"job{place}_{name}"] = [value(job) if job is not None else None for job in jobs]
    return made


_JOB_COLUMNS: dict[str, Callable[[JobMetrics], float | None]] = {
    "n": lambda job: float(job.n),
    "throughput_per_s": lambda job: job.throughput_per_s,
    "mean_ms": lambda job: job.latency.mean_ms if job.latency else None,
    "p50_ms": lambda job: job.latency.p50_ms if job.latency else None,
    "p99_ms": lambda job: job.latency.p99_ms if job.latency else None,
    "solo_mean_ms": lambda job: job.solo_mean_ms,
    "inflation": lambda job: job.inflation.all,
    "inflation_overlapping": lambda job: job.inflation.overlapping,
    "inflation_apart": lambda job: job.inflation.apart,
    "apart_mean_ms": lambda job: job.inflation.apart_mean_ms,
    "normalized": lambda job: job.normalized,
    "miss_share": lambda job: job.misses.share,
    "deft_miss_share": lambda job: job.misses.deft_share,
    "joules_per_request": lambda job: job.joules_per_request,
}
