"""Runs the points of a sweep, one after the other, and keeps what each came to.

    OUT/<folder of the point>/...        what `run_experiment` writes: spec, runs, files
    OUT/<folder of the point>/point.json  that the point is done, of which experiment, and its figures
    OUT/sweep.csv                         a row for each point and mode, from all points that are done
    OUT/figures/                          drawn at the end

A point that is done with the same experiment is not run again. Ctrl-C keeps what is there: the point that ran
is run again next time, and `run_experiment` keeps those of its runs that were complete.
"""

from __future__ import annotations

import csv
import hashlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from slosched.analysis.compare import Estimate
from slosched.errors import InvalidConfig, SloschedError
from slosched.output_files import check_folder, write_file
from slosched.share.axes import Point
from slosched.share.figures import JobMetrics, RunMetrics
from slosched.share_spec import Mode, ShareSpec, Status
from slosched.units import NS_PER_S, format_duration

POINT = "point.json"
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
    """What a sweep came to. `stopped`: it was interrupted; `left` points are not done."""

    table: Path
    done: int
    kept: int
    failed: dict[str, str]
    left: int
    stopped: bool


def run_sweep(
    points: Sequence[Point],
    out: Path,
    *,
    run: RunPoint,
    say: Say = print,
    stopped: Callable[[], bool] = lambda: False,
    resume: bool = True,
    now: Callable[[], float] = time.monotonic,
) -> Swept:
    """Run `points` into `out` and write sweep.csv after each. A point that fails is named, and the rest runs.

    sweep.csv is also written if KeyboardInterrupt ends it. Raises InvalidConfig if `out` cannot be written, or
    two points have one folder.
    """
    check_folder(out)
    _check_folders(points)
    done: dict[str, Done] = {}
    if resume:
        done = {point.folder: kept for point in points if (kept := _kept(point, out)) is not None}
    kept_count = len(done)
    if kept_count:
        say(f"{kept_count} of {len(points)} points are done already and are kept")
    open_points = [point for point in points if point.folder not in done]
    failed: dict[str, str] = {}
    in_turn, begun_s, stop = 0, now(), False
    try:
        for number, point in enumerate(open_points, start=1):
            if stopped():
                stop = True
                break
            say(f"point {kept_count + number} of {len(points)}: {point.name}")
            ended = _run_point(point, out, run)
            if stopped():  # it may have been cut short
                stop = True
                break
            if ended.runs:
                done[point.folder] = ended
                in_turn = 0
            else:
                in_turn += 1
            if ended.failed:
                failed[point.folder] = ended.failed
                say(f"{point.name}: {ended.failed}")
            else:
                _write_point(point, out, ended)
            write_table(points, done, out)
            if in_turn >= _MOST_FAILED_IN_TURN:
                say(f"{in_turn} points failed in turn; the sweep ends")
                break
            left = len(open_points) - number
            if left:
                each_s = (now() - begun_s) / number
                say(
                    f"about {format_duration(round(each_s * left) * NS_PER_S)} left ({left} points)"
                )
    finally:
        table = write_table(points, done, out)
    return Swept(
        table=table,
        done=len(done),
        kept=kept_count,
        failed=failed,
        left=len(points) - len(done),
        stopped=stop,
    )


def digest_of(spec: ShareSpec) -> str:
    """What a finished point must have been made of to stand for `spec`."""
    return hashlib.sha256(msgspec.json.encode(spec, order="deterministic")).hexdigest()[:16]


def _run_point(point: Point, out: Path, run: RunPoint) -> Done:
    runs: tuple[RunMetrics, ...] = ()
    try:
        runs = tuple(run(point.spec, out / point.folder))
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


def _write_point(point: Point, out: Path, ended: Done) -> None:
    write_file(out / point.folder / POINT, msgspec.json.format(msgspec.json.encode(ended)) + b"\n")


def _kept(point: Point, out: Path) -> Done | None:
    """The point's figures if it is done; a file that cannot be read counts as not done."""
    try:
        kept = msgspec.json.decode((out / point.folder / POINT).read_bytes(), type=Done)
    except (OSError, msgspec.DecodeError, ValueError):
        return None
    return kept if kept.digest == digest_of(point.spec) and not kept.failed else None


def _check_folders(points: Sequence[Point]) -> None:
    if not points:
        raise InvalidConfig("a sweep has at least one point")
    seen: set[str] = set()
    for point in points:
        if point.folder.lower() in seen:
            raise InvalidConfig(f"two points have the folder {point.folder}")
        seen.add(point.folder.lower())


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
