"""Many simulations over several processes: started here, ended here, and resumed where they stopped.

Each process is spawned, serves one job after the other over its own pipe, and is killed by the kernel
when its parent dies (Linux). A job whose directory holds a complete run of the same spec, over the same
files, made by this very source, is read back and not run again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from slosched.child_processes import end_with_parent
from slosched.clock import now_ns
from slosched.errors import InvalidConfig, SloschedError
from slosched.loadgen.results import RunProgress, RunResult, StepResult
from slosched.sim.run import KIND, simulate, source_digest, spec_digest
from slosched.sim.spec import SimSpec
from slosched.telemetry.manifest import read_manifest
from slosched.units import NS_PER_S
from slosched.version import __version__

_WAIT_S = 0.5
#: A process that is told to stop writes its files and ends within this.
_STOP_WITHIN_NS = 10 * NS_PER_S


@dataclass(frozen=True)
class Job:
    """One simulation, with the directory that it writes (None: nothing is written)."""

    spec: SimSpec
    out: Path | None = None


class JobFailed(SloschedError):
    """A simulation ended with an error; the message says which and why."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class JobsProgress:
    """How far `run_many` is. `running` says where each running job stands, by its place in the list."""

    done: int
    total: int
    running: dict[int, RunProgress]


OnProgress = Callable[[JobsProgress], None]
#: Asked some times a second; True ends everything as Ctrl-C does.
Stop = Callable[[], bool]


def finished_run(job: Job) -> RunResult | None:
    """The result of a complete run of the job's spec in its directory; None: there is none."""
    if job.out is None:
        return None
    digest = ""
    for directory in (job.out, *sorted(job.out.glob("run-*"))):
        document = read_manifest(directory)
        if document.get("kind") != KIND or not document.get("complete"):
            continue
        digest = digest or spec_digest(job.spec)
        made_by = document.get("slosched"), document.get("source")
        if document.get("spec_sha256") == digest and made_by == (__version__, source_digest()):
            return _result_of(document, directory)
    return None


def run_many(
    jobs: Sequence[Job],
    *,
    processes: int = 1,
    progress: OnProgress | None = None,
    stop: Stop | None = None,
) -> list[RunResult]:
    """Run every job and return the results in the jobs' order.

    `progress` is called when something changes, at most some times a second for each process. Ctrl-C
    stops what runs, whose files are then valid partial runs, and is raised again; so is KeyboardInterrupt
    soon after `stop` says True. The first job that fails ends the others likewise and is raised:
    JobFailed, from one process also what `simulate` raises.
    """
    if processes < 1:
        raise InvalidConfig(f"the number of processes must be at least 1, not {processes}")
    results: list[RunResult | None] = [finished_run(job) for job in jobs]
    waiting = [index for index, result in enumerate(results) if result is None]
    if min(processes, len(waiting)) <= 1:
        for index in waiting:
            _interrupt_if(stop)
            results[index] = _run_here(jobs[index], index, results, progress, stop)
    else:
        pool = _Pool(jobs, results, waiting, progress, stop)
        try:
            pool.run(min(processes, len(waiting)))
        finally:
            pool.end()
    if progress is not None:
        progress(JobsProgress(len(jobs), len(jobs), {}))
    return [result for result in results if result is not None]


def _run_here(
    job: Job,
    index: int,
    results: list[RunResult | None],
    progress: OnProgress | None,
    stop: Stop | None,
) -> RunResult:
    def show(where: RunProgress) -> None:
        if progress is not None:
            done = sum(result is not None for result in results)
            progress(JobsProgress(done, len(results), {index: where}))

    result = simulate(job.spec, out=job.out, progress=show, stop=stop)
    if not result.complete and result.problem == "stopped":
        raise KeyboardInterrupt  # simulate() made a valid partial run of it
    return result


def _interrupt_if(stop: Stop | None) -> None:
    if stop is not None and stop():
        raise KeyboardInterrupt


class _Pool:
    """The processes of one `run_many`, and what each of them does."""

    def __init__(
        self,
        jobs: Sequence[Job],
        results: list[RunResult | None],
        waiting: list[int],
        progress: OnProgress | None,
        stop: Stop | None,
    ) -> None:
        self._jobs, self._results = jobs, results
        self._waiting = waiting
        self._progress = progress
        self._stop = stop
        self._processes: dict[Connection, BaseProcess] = {}
        self._running: dict[Connection, int] = {}
        self._where: dict[int, RunProgress] = {}

    def run(self, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        for _ in range(count):
            _interrupt_if(self._stop)
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
            self._give(ours)
        while self._running:
            heard = wait(list(self._running), timeout=_WAIT_S)
            _interrupt_if(self._stop)  # first: a child that the same signal ended is not a failure
            for ready in heard:
                assert isinstance(ready, Connection)
                self._hear(ready)
            self._show()

    def _give(self, connection: Connection) -> None:
        """The next job for a process that has none; it ends when there is none."""
        if not self._waiting:
            self._running.pop(connection, None)
            return
        index = self._running[connection] = self._waiting.pop(0)
        try:
            connection.send(self._jobs[index])
        except OSError:
            raise self._ended(connection) from None

    def _hear(self, connection: Connection) -> None:
        index = self._running[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            raise self._ended(connection) from None
        if isinstance(message, RunProgress):
            self._where[index] = message
            return
        self._where.pop(index, None)
        if isinstance(message, RunResult):
            self._results[index] = message
            self._give(connection)
            return
        text, exit_code = message
        raise JobFailed(f"run {index + 1} of {len(self._jobs)}: {text}", exit_code)

    def _ended(self, connection: Connection) -> JobFailed:
        """The process at that connection died: what to raise."""
        process = self._processes[connection]
        process.join(_WAIT_S)  # its pipe closes somewhat before there is an exit code
        return JobFailed(
            f"the process of run {self._running[connection] + 1} ended (exit code {process.exitcode}); "
            "it may have been killed for its memory: take fewer --jobs"
        )

    def _show(self) -> None:
        if self._progress is not None:
            done = sum(result is not None for result in self._results)
            where = {index: self._where[index] for index in sorted(self._where)}
            self._progress(JobsProgress(done, len(self._jobs), where))

    def end(self) -> None:
        """End every process: those that run leave a valid partial run."""
        for connection in self._processes:
            with contextlib.suppress(OSError):
                connection.send(None)
        until_ns = now_ns() + _STOP_WITHIN_NS
        for connection, process in self._processes.items():
            while process.is_alive() and now_ns() < until_ns:
                with contextlib.suppress(EOFError, OSError):
                    if connection.poll(_WAIT_S / 10):
                        connection.recv()  # a full pipe must not keep it from ending
                process.join(0.01)
            if process.is_alive():
                process.kill()
                process.join(_WAIT_S)
            connection.close()


# ------------------------------------------------------------------------------- the process


def _serve(connection: Connection, parent: int) -> None:
    """Run the jobs that come, until None comes or the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent hears it and tells us
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before the kernel was told
    with contextlib.suppress(EOFError, OSError):
        while (job := connection.recv()) is not None:
            connection.send(_attempt(connection, job))


def _attempt(connection: Connection, job: Job) -> object:
    try:
        return simulate(
            job.spec,
            out=job.out,
            progress=connection.send,
            stop=lambda: _told_to_stop(connection),
        )
    except SloschedError as error:
        return str(error), error.exit_code
    except Exception as error:
        return f"{type(error).__name__}: {error}", 70


def _told_to_stop(connection: Connection) -> bool:
    """True if the parent has said something: while a job runs it only ever says to stop."""
    return connection.poll()


# --------------------------------------------------------------------------------- read back


def _result_of(document: dict[str, Any], directory: Path) -> RunResult:
    """The RunResult that a manifest was finished with."""
    outcome = document["outcome"]
    names = {field.name for field in fields(StepResult)}
    steps = tuple(
        StepResult(**{name: value for name, value in step.items() if name in names})
        for step in outcome["steps"]
    )
    plain = {
        field.name: outcome[field.name]
        for field in fields(RunResult)
        if field.name in outcome and field.name not in ("steps", "warnings", "run_dir")
    }
    result = RunResult(**plain, steps=steps, complete=True, warnings=tuple(outcome["warnings"]))
    return replace(result, run_dir=directory)
