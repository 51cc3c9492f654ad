"""Repeats of a run: their mean and interval, and what is left out."""

from __future__ import annotations

import math

import msgspec
import pytest

from slosched.share.carbon import read_constants
from slosched.share.outputs import Summary, summary_of
from slosched.share.repeats import over_repeats
from slosched.share_spec import Job, JobResult, Mode, Request, RunResult, ShareSpec, Status

MS, S = 1_000_000, 1_000_000_000
SPEC = ShareSpec(jobs=(Job(name="a", model="bert"),))
CONSTANTS = read_constants()


def summary(each_ms: int, *, repeat: int = 0, mode: Mode = Mode.TM, solo_ms: int = 10) -> Summary:
    def run(took: int) -> RunResult:
        rows = tuple(
            Request(
                job=0, number=k, arrived_ns=k * took, started_ns=k * took, ended_ns=(k + 1) * took
            )
            for k in range(10 * S // took)
        )
        jobs = (JobResult(job=0, requests=rows),)
        return RunResult(mode=mode, repeat=repeat, jobs=jobs, begin_ns=0, end_ns=10 * S)

    return summary_of(SPEC, run(each_ms * MS), {0: run(solo_ms * MS)}, constants=CONSTANTS)


def test_three_repeats_have_a_students_interval() -> None:
    found, other = over_repeats(
        [summary(20), summary(25, repeat=1), summary(50, repeat=2), summary(10, mode=Mode.MPS)]
    )
    # STP 0.5, 0.4 and 0.2.
    assert found.stp is not None and found.stp.mean == pytest.approx(1.1 / 3)
    deviation = math.sqrt(sum((x - 1.1 / 3) ** 2 for x in (0.5, 0.4, 0.2)) / 2)
    assert found.stp.half == pytest.approx(4.303 * deviation / math.sqrt(3), rel=1e-3)
    assert (found.repeats, found.left_out, found.mode, other.mode) == (3, 0, "tm", "mps-uncap")
    (job,) = found.jobs
    assert job.mean_ms is not None and job.mean_ms.mean == pytest.approx(95 / 3)
    assert job.missed_share is None and found.energy_ratio is None and found.total_g is None
    assert other.stp is not None and other.stp.half is None


def test_what_is_not_complete_is_counted_and_left_out() -> None:
    good = summary(20)
    jobs = (msgspec.structs.replace(good.metrics.jobs[0], status=Status.DIED),)
    broken = msgspec.structs.replace(
        good, metrics=msgspec.structs.replace(good.metrics, jobs=jobs, complete=False)
    )
    (found,) = over_repeats([broken, good])
    assert (found.repeats, found.left_out) == (1, 1)
    assert found.stp is not None and found.stp.mean == pytest.approx(0.5)
    (none,) = over_repeats([broken])
    assert none.repeats == 0 and none.jobs == () and none.stp is None
    assert over_repeats([]) == ()
