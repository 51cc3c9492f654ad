"""Reads the originals' published results into our figures: Deft's logs, HotCarbon's trees.

Deft's CSVs, and the text lines "JCT <unix ns> <priority> <ms>" that it wrote before April 2023, have every job:
they become a RunResult, of which share/metrics.py makes the same figures as of our own runs. HotCarbon's trees
have percentiles (share/import_hotcarbon.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from slosched.errors import InvalidConfig
from slosched.share.deft_files import HEADER
from slosched.share.figures import RunMetrics
from slosched.share.import_hotcarbon import read_hotcarbon
from slosched.share.imported import Imported, ImportedJob, of_metrics, with_solos
from slosched.share.metrics import metrics_of
from slosched.share_spec import Job, JobResult, Mode, Request, RunResult, ShareSpec
from slosched.text_files import read_text
from slosched.units import NS_PER_MS

__all__ = [
    "Imported",
    "ImportedJob",
    "deft_metrics",
    "deft_run",
    "of_metrics",
    "read_deft_requests",
    "read_hotcarbon",
    "with_solos",
]

_LINE = re.compile(r"JCT (\d{1,20}) (?:(\d+) )?(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*")
_COLUMNS = HEADER.split(",")
_MOST_NS = 2**63 - 1


def read_deft_requests(path: Path, *, drop_first: bool = True) -> tuple[Request, ...]:
    """The jobs of one log of Deft's, a CSV or text lines, in the order of their ends.

    `drop_first` leaves the first row out, which is the warm-up in Deft's own files; ours have none unless that
    was asked for. Raises InvalidConfig with the line if it is not such a log or has no further row.
    """
    lines = read_text(path, "Deft's log").splitlines()
    if lines and lines[0].strip() == HEADER:
        rows = _csv_rows(path, lines)
    else:
        rows = _text_rows(path, lines)
    rows = rows[1:] if drop_first else rows
    if not rows:
        raise InvalidConfig(f"{path} has no job{' behind the warm-up' if drop_first else ''}")
    return tuple(
        Request(job=0, number=number, arrived_ns=start, started_ns=start, ended_ns=end)
        for number, (start, end) in enumerate(sorted(rows, key=lambda row: row[1]))
    )


def deft_run(
    logs: Mapping[str, Path],
    priorities: Mapping[str, int] | None = None,
    *,
    drop_first: bool = True,
) -> tuple[ShareSpec, RunResult]:
    """Logs of jobs that shared a GPU, by the jobs' names, in the form of our own runs.

    The window is that in which all of them were there. Raises InvalidConfig, also if there is no such window:
    logs of different runs, or of clocks that do not agree (a CSV beside text lines).
    """
    if not logs:
        raise InvalidConfig("no log is named")
    jobs, found = [], []
    for place, (name, path) in enumerate(logs.items()):
        priority = (priorities or {}).get(name, 0)
        jobs.append(Job(name=name, model=name, priority=priority))
        rows = read_deft_requests(path, drop_first=drop_first)
        mine = tuple(
            Request(
                job=place,
                number=row.number,
                arrived_ns=row.arrived_ns,
                started_ns=row.started_ns,
                ended_ns=row.ended_ns,
            )
            for row in rows
        )
        found.append(JobResult(job=place, requests=mine))
    begin_ns = max(min(row.arrived_ns for row in each.requests) for each in found)
    end_ns = min(max(row.ended_ns for row in each.requests) for each in found)
    if end_ns <= begin_ns:
        named = ", ".join(str(path) for path in logs.values())
        raise InvalidConfig(f"{named}: their jobs did not run at the same time")
    spec = ShareSpec(jobs=tuple(jobs), modes=(Mode.TM,))
    result = RunResult(mode=Mode.TM, repeat=0, jobs=tuple(found), begin_ns=begin_ns, end_ns=end_ns)
    return spec, result


def deft_metrics(
    logs: Mapping[str, Path],
    solos: Mapping[str, Path] | None = None,
    priorities: Mapping[str, int] | None = None,
    *,
    drop_first: bool = True,
) -> RunMetrics:
    """All figures of logs that belong together. `solos`: logs of the same jobs alone. Raises InvalidConfig."""
    spec, result = deft_run(logs, priorities, drop_first=drop_first)
    unknown = sorted(set(solos or {}) - set(logs))
    if unknown:
        raise InvalidConfig(f"{unknown[0]!r} has a log alone and none in company")
    alone = {
        place: deft_run({name: path}, drop_first=drop_first)[1]
        for place, name in enumerate(logs)
        if (path := (solos or {}).get(name)) is not None
    }
    # How long they were to run is not in the logs.
    return msgspec.structs.replace(metrics_of(spec, result, alone), planned_s=0.0)


def _csv_rows(path: Path, lines: Sequence[str]) -> list[tuple[int, int]]:
    rows = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.split(",")
        if not line:
            continue
        if number == len(lines) and len(cells) < len(_COLUMNS):
            break  # the program was killed while it wrote
        try:
            start, end = int(cells[0]), int(cells[1])
            jct_ms = float(cells[2])
        except (ValueError, IndexError):
            raise InvalidConfig(
                f"{path}: line {number} is not a row of {HEADER}: {line[:100]!r}"
            ) from None
        _check(path, number, start, end, jct_ms)
        rows.append((start, end))
    return rows


def _text_rows(path: Path, lines: Sequence[str]) -> list[tuple[int, int]]:
    """Lines between others (kernel marks, warnings); the time is that of the end."""
    rows = []
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        end, jct_ms = int(match[1]), float(match[3])
        if not math.isfinite(jct_ms):
            raise InvalidConfig(f"{path}: line {number}: a job took {jct_ms} ms")
        start = end - round(jct_ms * NS_PER_MS)
        _check(path, number, start, end, jct_ms)
        rows.append((start, end))
    if not rows:
        raise InvalidConfig(
            f"{path} is not a log of Deft's: it has neither the columns {HEADER} nor lines "
            '"JCT <unix ns> <priority> <ms>"'
        )
    return rows


def _check(path: Path, number: int, start: int, end: int, jct_ms: float) -> None:
    if not 0 <= start <= end <= _MOST_NS:
        raise InvalidConfig(f"{path}: line {number}: a job from {start} to {end} ns")
    if abs((end - start) / NS_PER_MS - jct_ms) > max(1.0, 0.01 * jct_ms):
        raise InvalidConfig(
            f"{path}: line {number}: jct_ms is {jct_ms}, but its times are "
            f"{(end - start) / NS_PER_MS} ms apart"
        )
