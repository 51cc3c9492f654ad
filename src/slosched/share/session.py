"""Jobs that are loaded once, in one mode, and run in one window or several.

    power is sampled - the GPU is idle - members load and warm up - all are ready - windows - all end

Each step has a time-out. A job that fails, dies or hangs ends with a typed result, and the others run on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from slosched.clock import anchor_ns, monotonic_ns
from slosched.errors import SloschedError
from slosched.share.about import about_run
from slosched.share.energy import mean_watts
from slosched.share.keeper import FOLDER, Keeper
from slosched.share.members import COMMAND, Member, Members
from slosched.share.mps import Mps, client_settings, mps_daemon
from slosched.share.power_log import PowerLog
from slosched.share.row_files import read_rows
from slosched.share_spec import (
    Interruption,
    Job,
    JobResult,
    Mode,
    Order,
    Prepared,
    Request,
    RunResult,
    ShareSpec,
    Status,
    Urgent,
)
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

Say = Callable[[str], None]
Stopped = Callable[[], bool]

#: Modes in which one process holds all jobs.
ONE_PROCESS = (Mode.STREAMS, Mode.PREEMPT)
#: From the order to begin to the begin, which each member must have heard by then.
_BEGIN_AFTER_NS = 300 * NS_PER_MS
#: Beyond the time in which a member itself gives up what runs.
_GRACE_NS = 10 * NS_PER_S
_SAY_EVERY_NS = 10 * NS_PER_S
#: The sampler of power has its first sample within this time.
_SAMPLER_WITHIN_NS, _LOOK_NS = 10 * NS_PER_S, 20 * NS_PER_MS
#: Rows are small: a request takes about 200 bytes.
_ROOM_IN_MEMORY = 1 << 30
#: In less, the power of a card and the throughput of long requests say little.
SHORTEST_WINDOW_NS = 10 * NS_PER_S


class Interrupted(SloschedError):
    """The experiment was stopped before anything was measured."""


class Session:
    """The members of `jobs` (by their places in the spec) under `mode`. Use it as a context.

    `work` is a folder for logs. `deadlines` and `expected` come from each job's solo run: the SLO and the time
    of a request, in ns. `urgent` is what interrupts the jobs that their member tunes; with `measure` members
    measure what a tuner needs, and have no window. Entering waits until all jobs are ready or failed. Raises
    SloschedError if MPS or a process does not start; Interrupted if `stopped()` is true before all are ready.
    """

    def __init__(
        self,
        spec: ShareSpec,
        mode: Mode,
        work: Path,
        *,
        jobs: Mapping[int, Job] | None = None,
        repeat: int = 0,
        say: Say,
        stopped: Stopped,
        deadlines: Mapping[int, int] | None = None,
        expected: Mapping[int, int] | None = None,
        urgent: Mapping[int, Urgent] | None = None,
        measure: bool = False,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.spec, self.mode, self.repeat = spec, mode, repeat
        self.jobs = dict(jobs if jobs is not None else enumerate(spec.jobs))
        self._work, self._say, self._stopped = work, say, stopped
        self._deadlines, self._expected = dict(deadlines or {}), dict(expected or {})
        self._urgent, self._measure = dict(urgent or {}), measure
        self._keeper = Keeper()
        self._members = Members(command, self._keeper)
        self._stack = contextlib.ExitStack()
        self._power: PowerLog | None = None
        self._power_from_ns = 0
        self._idle_watts = -1.0
        self._about: dict[str, str] = {}

    # ------------------------------------------------------------------------------ preparation

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._work.mkdir(parents=True, exist_ok=True)
            folder = _memory_folder()
            keeper = stack.enter_context(self._keeper)
            keeper.keep(FOLDER, folder)
            stack.callback(keeper.release, FOLDER, folder)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            self._power = stack.enter_context(
                PowerLog(self.spec.device, self._work, every_ns=self.spec.power_every_ns)
            )
            self._idle()
            mps = (
                stack.enter_context(mps_daemon(self._say, keeper))
                if self.mode is Mode.MPS
                else None
            )
            stack.enter_context(self._members)
            self._start(folder, mps)
            self._wait_ready()
            self._check_mps(mps)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _idle(self) -> None:
        """Measure the power of the idle GPU, before any of our processes holds it."""
        assert self._power is not None
        power = self._power
        self._power_from_ns = monotonic_ns()
        if not self.spec.device.startswith("cuda") or not self.spec.idle_ns:
            return
        self._say(f"{self.mode}: idle for {format_duration(self.spec.idle_ns)}")
        # The sampler takes a second to start, and a phase counts only if samples cover it.
        give_up_ns = monotonic_ns() + _SAMPLER_WITHIN_NS
        while not power.begun and not power.problem and monotonic_ns() < give_up_ns:
            if not paused(_LOOK_NS, self._stopped):
                self._check_stopped()
        began_ns = monotonic_ns()
        if not paused(self.spec.idle_ns, self._stopped):
            self._check_stopped()
        ended_ns = monotonic_ns()
        self._idle_watts = mean_watts(power.samples(began_ns, ended_ns), began_ns, ended_ns)
        if power.problem:
            self._say(f"power is not measured: {power.problem}")

    def _check_stopped(self) -> None:
        if self._stopped():
            raise Interrupted(f"{self.mode}: stopped before all models were ready")

    def _start(self, folder: Path, mps: Mps | None) -> None:
        settings = client_settings(self.jobs) if mps is not None else {}
        groups = [self.jobs] if self.mode in ONE_PROCESS else [{p: j} for p, j in self.jobs.items()]
        for number, jobs in enumerate(groups):
            places = list(jobs)
            order = Order(
                mode=self.mode,
                device=self.spec.device,
                jobs=jobs,
                policy=self.spec.policy,
                seed=self.spec.seed,
                rows=str(folder / f"rows{number}"),
                gate=str(folder / "gate") if self.mode is Mode.GATE else "",
                deadline_times_ns={p: self._deadlines[p] for p in places if p in self._deadlines},
                expected_ns={p: self._expected[p] for p in places if p in self._expected},
                prepare_within_ns=self.spec.prepare_within_ns,
                finish_within_ns=self.spec.finish_within_ns,
                least_jobs=self.spec.least_jobs,
                linger_ns=self.spec.linger_ns,
                stop=self.spec.stop,
                repeat=self.repeat,
                measure=self._measure,
                urgent={p: self._urgent[p] for p in places if p in self._urgent},
            )
            name = "all" if len(places) > 1 else jobs[places[0]].name
            log = self._work / f"{name}.log"
            log.unlink(missing_ok=True)
            env = mps.environment(settings[places[0]]) if mps is not None else dict(os.environ)
            self._members.start(order, log, env={**threads_of(len(groups)), **env})

    def _wait_ready(self) -> None:
        members = self._members
        began_ns, told_ns = monotonic_ns(), monotonic_ns()
        names = ", ".join(job.name for job in self.jobs.values())
        self._say(f"{self.mode}: loading {names}")

        def each() -> bool:
            nonlocal told_ns
            self._check_stopped()
            if monotonic_ns() - told_ns >= _SAY_EVERY_NS:
                told_ns = monotonic_ns()
                waiting = [self._names(m) for m in members.all if not _settled(m)]
                self._say(f"{self.mode}: still loading {', '.join(waiting)}")
            return False

        within_ns = self.spec.prepare_within_ns
        if not members.wait(
            lambda: all(_settled(m) for m in members.all), began_ns + within_ns, each=each
        ):
            for member in members.all:
                if not _settled(member):
                    problem = f"it was not ready within {format_duration(within_ns)}"
                    members.kill(member, Status.TIMED_OUT, problem)
        for place, job in self.jobs.items():
            status, reason = self._how(place)
            if status is not Status.OK:
                self._say(f"{self.mode}: {job.name} is not ready: {status}: {reason}")

    def prepared(self, place: int) -> tuple[Prepared | None, str]:
        """What the member said of the job at `place`, or why it is not ready."""
        status, reason = self._how(place)
        found = self._member(place).prepared.get(place)
        return found, "" if status is Status.OK else reason or str(status)

    def _names(self, member: Member) -> str:
        return ", ".join(self.jobs[place].name for place in member.order.jobs)

    def _check_mps(self, mps: Mps | None) -> None:
        """A process that does not find the daemon runs without MPS and says nothing: ask the daemon."""
        if mps is None:
            return
        ours = {member.pid for member in self._members.all if member.serves and member.prepared}
        try:
            served = len(ours & mps.clients())
        except SloschedError as error:
            self._say(str(error))
            return
        self._about["mps_clients"] = f"{served} of {len(ours)}"
        if served < len(ours):
            self._say(f"mps: the daemon names {served} of the {len(ours)} processes as its clients")

    # --------------------------------------------------------------------------------- windows

    def window(
        self, jobs: Sequence[int] = (), *, repeat: int | None = None, duration_ns: int | None = None
    ) -> RunResult:
        """Run `jobs` (empty: all) together for `duration_ns` (None: the spec's).

        Ctrl-C or `stopped` ends it early: what was measured is in the result. Jobs that are not ready are in it
        with their status.
        """
        places = tuple(jobs or self.jobs)
        for member in self._members.all:
            if member.gone:  # how its jobs ended in the last window says nothing of this one
                for place in member.prepared:
                    member.ended.pop(place, None)
        length_ns = self.spec.duration_ns if duration_ns is None else duration_ns
        active = [m for m in self._members.all if any(p in m.prepared for p in places)]
        active = [m for m in active if m.serves]
        at_ns = monotonic_ns() + _BEGIN_AFTER_NS
        until_ns = at_ns + length_ns
        stopped_ns: int | None = None
        if active:
            names = ", ".join(self.jobs[p].name for m in active for p in m.prepared if p in places)
            self._say(f"{self.mode}: running {names} for {format_duration(length_ns)}")
            self._members.begin(active, at_ns, until_ns, places)
            stopped_ns = self._run(active, places, until_ns)
        ended_ns = monotonic_ns()
        found = [self._result(place, at_ns) for place in places]
        begin_ns, end_ns = common_window(
            found, self.jobs, at_ns, until_ns if stopped_ns is None else min(stopped_ns, until_ns)
        )
        power = self._power
        assert power is not None
        result = RunResult(
            mode=self.mode,
            repeat=self.repeat if repeat is None else repeat,
            jobs=tuple(found),
            begin_ns=begin_ns,
            end_ns=end_ns,
            power=power.samples(self._power_from_ns, ended_ns),
            power_problem=power.problem,
            idle_watts=self._idle_watts,
            about={
                **about_run(self.spec.device),
                **power.about,
                **self._about,
                "epoch_minus_monotonic_ns": str(anchor_ns()),
                **({} if stopped_ns is None else {"stopped": "before its end"}),
            },
        )
        self._power_from_ns = ended_ns
        return result

    def _run(self, active: Sequence[Member], places: Sequence[int], until_ns: int) -> int | None:
        """Hear the members to the end of the window; returns when it was stopped, if it was."""
        members = self._members
        finish_ns = self.spec.finish_within_ns + _GRACE_NS
        stopped_ns: int | None = None
        told_ns = monotonic_ns()

        def over() -> bool:
            return all(m.gone or not m.open_jobs(places) for m in active)

        def each() -> bool:
            nonlocal told_ns
            if monotonic_ns() - told_ns >= _SAY_EVERY_NS:
                told_ns = monotonic_ns()
                self._say(self._progress(active, places))
            return stopped_ns is None and self._stopped()

        give_up_ns = until_ns + finish_ns
        while True:
            try:
                if members.wait(over, give_up_ns, each=each):
                    return stopped_ns
                stop = stopped_ns is None and self._stopped()
            except KeyboardInterrupt:
                if stopped_ns is not None:
                    raise  # a second one ends at once
                stop = True
            if not stop:
                break
            stopped_ns = monotonic_ns()
            give_up_ns = min(give_up_ns, stopped_ns + finish_ns)
            self._say(f"{self.mode}: stopping; what runs ends")
            members.end(active)
        for member in active:
            if not member.gone and member.open_jobs(places):
                within = format_duration(finish_ns)
                members.kill(
                    member, Status.TIMED_OUT, f"it did not end within {within} after the window"
                )
        return stopped_ns

    def _progress(self, active: Sequence[Member], places: Sequence[int]) -> str:
        parts = []
        for member in active:
            for place in member.prepared:
                if place not in places:
                    continue
                state = member.problem or str(member.progress.get(place, 0))
                if place in member.ended:
                    state = str(member.ended[place].status)
                parts.append(f"{self.jobs[place].name} {state}")
        return f"{self.mode}: requests ended: {', '.join(parts)}"

    # --------------------------------------------------------------------------------- results

    def _result(self, place: int, at_ns: int) -> JobResult:
        """What `place` did in the window that began at `at_ns`."""
        member = self._member(place)
        rows = read_rows(Path(member.order.rows), place, at_ns)
        status, reason = self._how(place)
        end = member.ended.get(place)
        wrong = sum(1 for row in rows if isinstance(row, Request) and row.differs)
        if wrong and status is Status.OK:
            reason = f"{wrong} answer(s) are not that of its first request"
            self._say(f"{self.mode}: {self.jobs[place].name}: {reason}")
        return JobResult(
            job=place,
            status=status,
            reason=reason,
            pid=member.pid,
            requests=tuple(row for row in rows if isinstance(row, Request)),
            interruptions=tuple(row for row in rows if isinstance(row, Interruption)),
            prepared=member.prepared.get(place),
            memory_allocated=end.memory_allocated if end else 0,
            memory_reserved=end.memory_reserved if end else 0,
            left=end.left if end else 0,
        )

    def _how(self, place: int) -> tuple[Status, str]:
        member = self._member(place)
        end = member.ended.get(place)
        if end is not None:
            return end.status, end.reason
        if member.problem:
            return member.status, member.problem
        if member.ready and place not in member.prepared:
            return Status.FAILED, "its process is ready without it and does not say why"
        return Status.OK, ""

    def _member(self, place: int) -> Member:
        return next(m for m in self._members.all if place in m.order.jobs)


def threads_of(members: int) -> dict[str, str]:
    """The environment by which `members` that load at once share the cores.

    With a thread for each core in every process, loading GPT-J beside three others took 135 s in place of 18 s
    (16 cores): threads that wait for work spin.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {"OMP_NUM_THREADS": str(max(1, cores // members))}


def paused(length_ns: int, stopped: Stopped) -> bool:
    """Wait for `length_ns`; False if it was stopped meanwhile."""
    pause, until_ns = threading.Event(), monotonic_ns() + length_ns
    while (left_ns := until_ns - monotonic_ns()) > 0:
        if stopped():
            return False
        pause.wait(min(0.1, left_ns / NS_PER_S))
    return True


def _settled(member: Member) -> bool:
    """True if nothing more is to come of its preparation."""
    return member.ready or member.gone or not member.open_jobs()


def common_window(
    results: Sequence[JobResult], jobs: Mapping[int, Job], at_ns: int, until_ns: int
) -> tuple[int, int]:
    """The time in which all jobs were there: from the last start to the first end of a job with a count.

    The whole time where there is none, or no job ran.
    """
    ran = [each for each in results if each.requests]
    begin_ns = at_ns + max((jobs[each.job].start_after_ns for each in ran), default=0)
    end_ns = until_ns
    for each in ran:
        real = [row for row in each.requests if not row.warmup]
        if jobs[each.job].count and len(real) >= jobs[each.job].count:
            end_ns = min(end_ns, max(row.ended_ns for row in real))
    return (begin_ns, end_ns) if begin_ns < end_ns else (at_ns, max(at_ns, until_ns))


def _memory_folder() -> Path:
    """A folder for rows and the gate: in memory where there is room, so that no write waits for a disk."""
    for parent in ("/dev/shm", None):
        with contextlib.suppress(OSError):
            if parent is None or shutil.disk_usage(parent).free > _ROOM_IN_MEMORY:
                return Path(tempfile.mkdtemp(prefix="slosched-share-", dir=parent))
    raise SloschedError("no temporary folder can be written; set TMPDIR to one")
