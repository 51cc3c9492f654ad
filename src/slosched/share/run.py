"""One mode of an experiment, once: on this machine's GPU or CPU, or in virtual time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from slosched.clock import monotonic_ns
from slosched.errors import SloschedError
from slosched.share.about import about_run
from slosched.share.members import COMMAND
from slosched.share.mps import mps_missing
from slosched.share.session import SHORTEST_WINDOW_NS, Interrupted, Say, Session, Stopped, paused
from slosched.share.spec_check import COMMAND_MODES
from slosched.share_spec import (
    Boundary,
    Job,
    JobResult,
    Mode,
    Prepared,
    RunResult,
    ShareSpec,
    Status,
    Urgent,
)
from slosched.units import format_duration

EMULATED = "emulated"
#: Where a GPU's driver shows that there is one, on Linux and under WSL.
_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")


def unavailable(spec: ShareSpec, mode: Mode) -> str:
    """Why this machine cannot run `mode`, or "". Nothing is started."""
    if spec.device == EMULATED:
        return ""
    if mode not in COMMAND_MODES and any(job.command for job in spec.jobs):
        return f"{mode}: a program of one's own needs a process of its own: tm or mps"
    on_gpu = spec.device.startswith("cuda")
    if on_gpu and not any(Path(each).exists() for each in _DRIVERS):
        return f"{mode}: this machine has no NVIDIA driver; take --device cpu or emulated"
    if mode is Mode.MPS:
        return mps_missing() if on_gpu else "mps: it is a service of NVIDIA GPUs"
    if mode is Mode.PREEMPT and not on_gpu:
        return "preempt: the serving lane runs graphs of a GPU; mode gate runs on the CPU"
    return ""


def run_mode(
    spec: ShareSpec,
    mode: Mode,
    repeat: int,
    work: Path,
    *,
    say: Say,
    stopped: Stopped,
    deadlines: Mapping[int, int] | None = None,
    expected: Mapping[int, int] | None = None,
    urgent: Mapping[int, Urgent] | None = None,
    command: Sequence[str] = COMMAND,
) -> tuple[RunResult, ...]:
    """Run all jobs of `spec` together under `mode`; EXCLUSIVE: each distinct one by itself, a result each.

    `work` is a folder for logs. `deadlines` and `expected` (ns, by job) come from solo runs, `urgent` is what
    interrupts the jobs that their member tunes. What the machine lacks is in the result's `unavailable`, what a
    job does wrong in its status. Raises Interrupted if it was stopped before anything was measured;
    OutOfResources and InvalidConfig if the folder cannot be written.
    """
    if mode is Mode.EXCLUSIVE:
        return tuple(
            run_alone(spec, place, repeat, work, say=say, stopped=stopped, command=command)
            for place in distinct(spec.jobs)
        )
    if spec.device == EMULATED:
        return (_virtual(spec, mode, repeat, deadlines or {}, stopped=stopped),)
    if why := unavailable(spec, mode):
        return (without(mode, repeat, range(len(spec.jobs)), why, spec.device),)
    if spec.duration_ns < SHORTEST_WINDOW_NS:
        say(
            f"warning: a window of {format_duration(spec.duration_ns)} is short; power and long requests need "
            f"{format_duration(SHORTEST_WINDOW_NS)}"
        )
    make = functools.partial(
        Session,
        spec,
        mode,
        work,
        repeat=repeat,
        deadlines=deadlines,
        expected=expected,
        urgent=urgent,
        command=command,
    )
    return (_once(make, range(len(spec.jobs)), spec, mode, repeat, say=say, stopped=stopped),)


def run_alone(
    spec: ShareSpec,
    place: int,
    repeat: int,
    work: Path,
    *,
    say: Say,
    stopped: Stopped,
    command: Sequence[str] = COMMAND,
) -> RunResult:
    """The job at `place` by itself, in a process of its own. See `run_mode`."""
    mode = Mode.EXCLUSIVE
    if spec.device == EMULATED:
        return _virtual(spec, mode, repeat, {}, stopped=stopped, jobs=(place,))
    if why := unavailable(spec, mode):
        return without(mode, repeat, (place,), why, spec.device)
    make = functools.partial(
        Session,
        spec,
        mode,
        work,
        jobs={place: solo_job(spec.jobs[place])},
        repeat=repeat,
        command=command,
    )
    return _once(make, (place,), spec, mode, repeat, say=say, stopped=stopped)


def measure_alone(
    spec: ShareSpec,
    place: int,
    job: Job,
    work: Path,
    *,
    say: Say,
    stopped: Stopped,
    command: Sequence[str] = COMMAND,
) -> tuple[Prepared | None, str]:
    """`job`, which stands at `place`, in a process that measures its boundaries and ends; or why it could not.

    Raises Interrupted if it was stopped before.
    """
    quick = msgspec.structs.replace(spec, idle_ns=0)  # its power is not asked for
    try:
        with Session(
            quick,
            Mode.EXCLUSIVE,
            work,
            jobs={place: job},
            say=say,
            stopped=stopped,
            measure=True,
            command=command,
        ) as session:
            return session.prepared(place)
    except Interrupted:
        raise
    except SloschedError as error:
        return None, str(error)


def _once(
    make: Callable[..., Session],
    places: Sequence[int],
    spec: ShareSpec,
    mode: Mode,
    repeat: int,
    *,
    say: Say,
    stopped: Stopped,
) -> RunResult:
    """One window of a session; what does not start at all makes the mode unavailable."""
    try:
        with make(say=say, stopped=stopped) as session:
            result = session.window()
        if "stopped" not in result.about and spec.device.startswith("cuda"):
            paused(spec.cool_down_ns, stopped)
        return result
    except Interrupted:
        raise
    except SloschedError as error:
        if mode is not Mode.MPS:
            raise
        say(f"{mode} is unavailable: {error}")
        return without(mode, repeat, places, str(error), spec.device)


def without(mode: Mode, repeat: int, places: Sequence[int], why: str, device: str) -> RunResult:
    """The result of a mode that this machine lacks."""
    now = monotonic_ns()
    return RunResult(
        mode=mode,
        repeat=repeat,
        jobs=tuple(JobResult(job=place, status=Status.UNAVAILABLE, reason=why) for place in places),
        begin_ns=now,
        end_ns=now,
        unavailable=why,
        about=about_run(device),
    )


def distinct(jobs: Sequence[Job]) -> dict[int, tuple[int, ...]]:
    """The places of jobs that differ alone: the first of its kind -> all places of that kind."""
    kinds: dict[Job, list[int]] = {}
    for place, job in enumerate(jobs):
        if not job.command:  # a program has no requests, so it has no baseline
            kinds.setdefault(_kind(job), []).append(place)
    return {places[0]: tuple(places) for places in kinds.values()}


def _kind(job: Job) -> Job:
    return msgspec.structs.replace(solo_job(job), name="job")


def solo_job(job: Job) -> Job:
    """The job as it runs alone: without what concerns others only."""
    return msgspec.structs.replace(
        job,
        priority=0,
        start_after_ns=0,
        slo_ns=0,
        slo_times_solo=0.0,
        thread_percentage=0,
        boundary=Boundary(),
    )


def _virtual(
    spec: ShareSpec,
    mode: Mode,
    repeat: int,
    deadlines: Mapping[int, int],
    *,
    stopped: Stopped,
    jobs: Sequence[int] | None = None,
) -> RunResult:
    from slosched.share.virtual import run_mode_virtual

    def check() -> None:
        if stopped():
            raise Interrupted(f"{mode}: stopped; nothing of this run is kept")

    if deadlines:
        with_slo = tuple(
            msgspec.structs.replace(job, slo_ns=deadlines.get(place, job.slo_ns))
            for place, job in enumerate(spec.jobs)
        )
        spec = msgspec.structs.replace(spec, jobs=with_slo)
    result = run_mode_virtual(spec, mode, repeat, jobs=jobs, check=check)
    return msgspec.structs.replace(result, about={**about_run(spec.device), **result.about})
