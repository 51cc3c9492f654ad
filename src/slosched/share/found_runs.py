"""The runs of sharing experiments below a folder, as their files have them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from slosched.errors import InvalidConfig
from slosched.share.carbon import Footprint
from slosched.share.figures import JobMetrics, RunMetrics
from slosched.share.metrics import metrics_of
from slosched.share.outputs import SUMMARY, read_summary
from slosched.share.result_paths import RUN, SPEC, jobs_of
from slosched.share_spec import Job, JobResult, Mode, Request, RunResult, ShareSpec
from slosched.units import NS_PER_S

#: Runs that are read of one folder at most.
MOST_RUNS = 10_000
#: Parts of a run's path below the folder of its experiment: label, mix, mix with batches, mode, repeat.
_PARTS = 5


class FoundRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `point` is the folder of its experiment where several are below one folder, as of a sweep.

    Where runs of several devices are there, the device's label is part of it.
    """

    folder: Path
    point: str
    spec: ShareSpec
    result: RunResult
    metrics: RunMetrics
    carbon: Footprint | None = None

    @property
    def jobs(self) -> list[Job]:
        """The jobs that ran."""
        return jobs_of(self.spec, self.result)

    @property
    def mix(self) -> str:
        """The models in a fixed order, so that a+b is b+a; with their batches and numbers where not 1."""
        parties = Counter(
            job.model if job.batch == 1 else f"{job.model}-{job.batch}" for job in self.jobs
        )
        return "+".join(
            party if number == 1 else f"{number}x{party}"
            for party, number in sorted(parties.items())
        )

    @property
    def method(self) -> str:
        """How the jobs shared: the mode, and the point of the sweep."""
        mode = self.result.mode.value
        return f"{mode}, {self.point}" if self.point and self.point != self.mix else mode

    @property
    def counts(self) -> bool:
        """False for a mode that the machine lacks, and for a run without a request."""
        return not self.result.unavailable and any(each.n for each in self.metrics.jobs)

    def job_metrics(self, place: int) -> JobMetrics | None:
        """The figures of the spec's job at `place`."""
        return next((each for each in self.metrics.jobs if each.job == place), None)

    def after_s(self, at_ns: int) -> float:
        return (at_ns - self.result.begin_ns) / NS_PER_S


def find_runs(directory: Path, left_out: Callable[[str], None]) -> list[FoundRun]:
    """All runs below `directory`, in the order of their paths. What cannot be read is given to `left_out`.

    Raises InvalidConfig if `directory` is not a folder or nothing below it is a run.
    """
    found, problems = [], []

    def skipped(problem: str) -> None:
        problems.append(problem)
        left_out(problem)

    for folder, spec, result in runs_below(directory, skipped):
        try:
            found.append(_found(folder, directory, spec, result))
        except InvalidConfig as error:
            skipped(str(error))
    if not found:
        first = f" ({problems[0]})" if problems else ""
        raise InvalidConfig(
            f"{directory} has no result of slosched share: no {RUN} that can be read{first}"
        )
    if len({run.spec.label for run in found}) < 2:
        return found
    return [
        msgspec.structs.replace(run, point="/".join(filter(None, (run.spec.label, run.point))))
        for run in found
    ]


def _refuse(problem: str) -> None:
    raise InvalidConfig(problem)


def runs_below(
    directory: Path, left_out: Callable[[str], None] = _refuse
) -> Iterator[tuple[Path, ShareSpec, RunResult]]:
    """The folder, spec and result of each run below `directory`, in the order of their paths.

    What cannot be read is given to `left_out`, which may raise. Raises InvalidConfig if `directory` is not a
    folder.
    """
    if not directory.is_dir():
        raise InvalidConfig(f"{directory} is not a folder with results of slosched share")
    files = sorted(path for path in directory.rglob(RUN) if path.is_file())
    if len(files) > MOST_RUNS:
        left_out(f"{len(files) - MOST_RUNS:,} runs: only the first {MOST_RUNS:,} are read")
    for path in files[:MOST_RUNS]:
        try:
            spec, result = _read(path.parent)
        except InvalidConfig as error:
            left_out(str(error))
            continue
        yield path.parent, spec, result


def _read(folder: Path) -> tuple[ShareSpec, RunResult]:
    result: RunResult = _decoded(folder / RUN, RunResult)
    spec: ShareSpec = _decoded(folder / SPEC, ShareSpec)
    if any(not 0 <= each.job < len(spec.jobs) for each in result.jobs):
        raise InvalidConfig(f"{folder / RUN} has a job that {SPEC} beside it lacks")
    together = result.mode is not Mode.EXCLUSIVE and not result.unavailable
    if together and len(result.jobs) != len(spec.jobs):
        raise InvalidConfig(f"{folder / RUN} lacks a job that {SPEC} beside it has")
    return spec, result


def _found(folder: Path, directory: Path, spec: ShareSpec, result: RunResult) -> FoundRun:
    parts = folder.relative_to(directory).parts
    carbon = None
    if (folder / SUMMARY).is_file():
        summary = read_summary(folder / SUMMARY)
        metrics, carbon = summary.metrics, summary.carbon
        if {each.job for each in metrics.jobs} != {each.job for each in result.jobs}:
            raise InvalidConfig(f"{folder / SUMMARY} is of other jobs than {RUN} beside it")
    else:
        metrics = metrics_of(spec, result)
    return FoundRun(
        folder=folder,
        point="/".join(parts[:-_PARTS]),
        spec=spec,
        result=result,
        metrics=metrics,
        carbon=carbon,
    )


def _decoded(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeError, InvalidConfig) as error:
        raise InvalidConfig(f"{path} is not a result of a sharing experiment: {error}") from None


# ------------------------------------------------------------------------------------------ questions


def alone_run(runs: Sequence[FoundRun], job: Job, point: str) -> FoundRun | None:
    """The run in which a job like `job` was alone, best of the same point."""
    fitting = [
        run
        for run in runs
        if run.result.mode is Mode.EXCLUSIVE and run.counts and _like(run.jobs, job)
    ]
    return next((run for run in fitting if run.point == point), fitting[0] if fitting else None)


def _like(jobs: Sequence[Job], job: Job) -> bool:
    def looks(each: Job) -> tuple[object, ...]:
        return (each.model, each.batch, each.size, each.dtype, each.run, each.clients)

    return len(jobs) == 1 and looks(jobs[0]) == looks(job)


def rows_of(found: JobResult) -> list[Request]:
    """The requests that figures show: neither warm-ups nor cut ones."""
    return [row for row in found.requests if row.counts]


def ends_of_priority(jobs: Sequence[Job]) -> tuple[int, int] | None:
    """The places of a job with the highest and one with the lowest priority; None if all are equal."""
    order = sorted(range(len(jobs)), key=lambda place: jobs[place].priority)
    if not order or jobs[order[0]].priority == jobs[order[-1]].priority:
        return None
    return order[-1], order[0]


def mean_of(values: Sequence[float | None]) -> float:
    """The mean of the known values; NaN without one."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan


def numbers_within(text: str) -> list[tuple[bool, float, str]]:
    """So that every_4 stands before every_10."""
    return [
        (part.isdigit(), float(part) if part.isdigit() else 0.0, part)
        for part in re.split(r"(\d+)", text)
    ]
