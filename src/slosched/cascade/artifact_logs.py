"""The three CSV files of DiffServe's artifact, one row for each second from the first request on.

Their form is the artifact's, byte for byte: the headers, no column of time, lines that end in CR LF (it
writes them with Python's csv module), whole numbers for counts and Python's shortest text of a float for
thresholds. Two differences are on purpose. A file holds one run, where the artifact appends to what is
there. And a request counts in the second in which the controller answers it; the artifact notices a dropped
one only after 2 SLOs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from slosched.cascade.outcome import Flags, Ints, Outcome
from slosched.codes import Verdict
from slosched.output_files import write_file
from slosched.units import NS_PER_S

SLO_FILE = "slo_timeouts_per_second.csv"
THRESHOLD_FILE = "thres_per_second.csv"
QUERIES_FILE = "query_num_per_second.csv"

#: The artifact calls the stages of every cascade by the models of its first one.
_HEADERS = {
    SLO_FILE: ("succeed", "timeout", "drop", "total"),
    THRESHOLD_FILE: ("threshold",),
    QUERIES_FILE: ("sdturbo", "sdv15"),
}


def write_artifact_logs(outcome: Outcome, folder: Path) -> list[Path]:
    """Write the three files into `folder`, in place of those that are there; return their paths.

    Raises InvalidConfig if one cannot be written, OutOfResources if the disk is full.
    """
    paths = []
    for name, data in artifact_logs(outcome).items():
        paths.append(folder / name)
        write_file(paths[-1], data)
    return paths


def artifact_logs(outcome: Outcome) -> dict[str, bytes]:
    """The bytes of each file by its name."""
    rows = {
        SLO_FILE: _slo_rows(outcome),
        THRESHOLD_FILE: _threshold_rows(outcome),
        QUERIES_FILE: _query_rows(outcome),
    }
    return {name: _csv(header, rows[name]) for name, header in _HEADERS.items()}


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def slo_counts(outcome: Outcome) -> dict[str, Ints]:
    """Per second: answers within the SLO (succeed), later ones (timeout), requests without one (drop), total.

    Each counts in the second in which the controller answers.
    """
    late = outcome.answered & ~outcome.ok
    counts = {
        "succeed": _per_second(outcome, outcome.end_ns, outcome.ok),
        "timeout": _per_second(outcome, outcome.end_ns, late),
        "drop": _per_second(outcome, outcome.end_ns, ~outcome.answered),
    }
    return {**counts, "total": counts["succeed"] + counts["timeout"] + counts["drop"]}


def thresholds(outcome: Outcome) -> list[float]:
    """The threshold in force at the end of each second; 1 where none is known, as in the artifact."""
    ticks = np.arange(1, outcome.seconds + 1, dtype=np.int64) * NS_PER_S
    return [1.0 if np.isnan(value) else float(value) for value in outcome.threshold_at(ticks)]


def query_counts(outcome: Outcome) -> tuple[Ints, Ints]:
    """Per second the requests that reached the light program, and those that reached the heavy one.

    One that ended without any stage counts as a request of the light program, unless the run has only
    requests that went straight to the heavy one.
    """
    straight = outcome.verdict == int(Verdict.BLIND_HEAVY)
    if straight.any() and not (outcome.judged | outcome.light).any():
        straight = np.ones(len(outcome), np.bool_)
    light = _per_second(outcome, outcome.arrival_ns, ~straight)
    at_ns = np.where(straight, outcome.arrival_ns, outcome.heavy_ns)
    return light, _per_second(outcome, at_ns, straight | (outcome.heavy_ns >= 0))


def _per_second(outcome: Outcome, at_ns: Ints, counted: Flags) -> Ints:
    found = np.bincount(at_ns[counted] // NS_PER_S, minlength=outcome.seconds)
    return found.astype(np.int64)


def _slo_rows(outcome: Outcome) -> Iterable[Sequence[object]]:
    counts = slo_counts(outcome)
    return zip(*(counts[name].tolist() for name in _HEADERS[SLO_FILE]), strict=True)


def _threshold_rows(outcome: Outcome) -> Iterable[Sequence[object]]:
    return [(value,) for value in thresholds(outcome)]


def _query_rows(outcome: Outcome) -> Iterable[Sequence[object]]:
    light, heavy = query_counts(outcome)
    return zip(light.tolist(), heavy.tolist(), strict=True)
