"""What a report says of a cascade, in numbers: verdicts, what the threshold did, and how long stages took.

Everything comes from `stages.tsv`; each cascade of a run is counted on its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.runs import find_log
from slosched.analysis.windows import Windows, nice_width_ns
from slosched.codes import Verdict
from slosched.loadgen.verdict import least_samples
from slosched.telemetry import stage_log
from slosched.telemetry.table import read_table
from slosched.units import NS_PER_S
from slosched.verdicts import gives_answer, gives_light_after_all, is_heavy

_READ = (
    "t",
    "waited",
    "start",
    "exec",
    "batch_size",
    "worker_id",
    "gpu_id",
    "verdict",
    "threshold",
    "cascade",
)
_MOST_WINDOWS = 120

_ALL = [int(verdict) for verdict in Verdict if verdict != Verdict.NONE]
_HEAVY = [verdict for verdict in _ALL if is_heavy(verdict)]
_HEAVY_ANSWERS = [verdict for verdict in _HEAVY if gives_answer(verdict)]
_ANSWERS = [v for v in _ALL if gives_answer(v) or gives_light_after_all(v)]

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class StageTimes:
    """The runs of one stage, and the number of GPUs that they were on.

    Times are p50 and p99 in ns: until its exec, of the exec, and until its result. The first and the last count
    from when a request entered the stage's queue. p99 is NaN of too few runs.
    """

    name: str
    runs: int
    gpus: int
    mean_batch: float
    wait_ns: tuple[float, float]
    exec_ns: tuple[float, float]
    whole_ns: tuple[float, float]


@dataclass(frozen=True)
class CascadeOverTime:
    """A value for each window of `width_s`, by when a stage ended; times in s after the start. NaN: none."""

    width_s: float
    middle_s: list[float]
    threshold: list[float]
    light_share: list[float]
    light_wait_s: list[float]
    heavy_wait_s: list[float]


@dataclass(frozen=True)
class CascadeNumbers:
    """How the stages of the cascade `name` ended.

    `light` and `heavy` count answers, by the program that they are from.
    """

    name: str
    verdicts: list[tuple[int, int]]
    light: int
    heavy: int
    stages: list[StageTimes]
    over_time: CascadeOverTime | None


def measure_cascades(path: Path, start_ns: int) -> list[CascadeNumbers]:
    """Read the stages of a run that began at `start_ns`, for each cascade with a verdict, by name.

    Raises MalformedLog.
    """
    log_path = find_log(path, stage_log.FILE_NAME)
    if log_path is None:
        return []
    log = read_table(log_path, stage_log.COLUMNS, only=_READ)
    given = log["verdict"] != Verdict.NONE
    columns = {name: column[given] for name, column in log.columns.items()}
    names = columns.pop("cascade")
    return [_measure(name, columns, names == name, start_ns) for name in sorted(set(names))]


def _measure(name: str, of_all: Columns, rows: NDArray[np.bool_], start_ns: int) -> CascadeNumbers:
    """The numbers of the cascade `name`, whose stages are `rows`; there is one at least."""
    columns = {key: column[rows] for key, column in of_all.items()}
    verdict = columns["verdict"]
    counts = [(each, int(np.count_nonzero(verdict == each))) for each in _ALL]
    answers = sum(count for each, count in counts if each in _ANSWERS)
    heavy = sum(count for each, count in counts if each in _HEAVY_ANSWERS)
    return CascadeNumbers(
        name=name,
        verdicts=[pair for pair in counts if pair[1]],
        light=answers - heavy,
        heavy=heavy,
        stages=_stages(columns),
        over_time=_over_time(columns, start_ns),
    )


def _stages(columns: Columns) -> list[StageTimes]:
    found = []
    of_heavy, ran = np.isin(columns["verdict"], _HEAVY), columns["exec"] > 0
    for name, rows in (("light", ran & ~of_heavy), ("heavy", ran & of_heavy)):
        runs = int(np.count_nonzero(rows))
        if runs:
            mean_batch = float(columns["batch_size"][rows].mean())
            times = (_quantiles(columns[key][rows]) for key in ("start", "exec", "waited"))
            gpus = zip(columns["worker_id"][rows], columns["gpu_id"][rows], strict=True)
            found.append(StageTimes(name, runs, len(set(gpus)), mean_batch, *times))
    return found


def _quantiles(values: NDArray[Any]) -> tuple[float, float]:
    p50, p99 = np.quantile(values, (0.5, 0.99)).tolist()
    return p50, p99 if len(values) >= least_samples() else float("nan")


def _over_time(columns: Columns, start_ns: int) -> CascadeOverTime | None:
    ended_ns, verdict = columns["t"], columns["verdict"]
    end_ns = int(ended_ns.max())
    width_ns = nice_width_ns(end_ns - start_ns, _MOST_WINDOWS)
    if end_ns - start_ns < 2 * width_ns:
        return None
    windows = Windows(ended_ns, width_ns, start_ns, end_ns)
    of_heavy, ran = np.isin(verdict, _HEAVY), columns["exec"] > 0
    judged = (columns["threshold"] >= 0) & ~of_heavy
    answers = np.isin(verdict, _ANSWERS)
    light_answers = answers & ~np.isin(verdict, _HEAVY_ANSWERS)
    light_wait, heavy_wait = (
        windows.quantiles(columns["start"], [0.5], rows)[0]
        for rows in (ran & ~of_heavy, ran & of_heavy)
    )
    return CascadeOverTime(
        width_s=windows.width_s,
        middle_s=[start + windows.width_s / 2 for start in windows.starts_s()],
        threshold=_quotients(windows.sums(columns["threshold"], judged), windows.counts(judged)),
        light_share=_quotients(windows.counts(light_answers), windows.counts(answers)),
        light_wait_s=[wait / NS_PER_S for wait in light_wait],
        heavy_wait_s=[wait / NS_PER_S for wait in heavy_wait],
    )


def _quotients(above: NDArray[Any], below: NDArray[Any]) -> list[float]:
    """NaN where `below` is 0."""
    return [
        a / b if b else float("nan") for a, b in zip(above.tolist(), below.tolist(), strict=True)
    ]
