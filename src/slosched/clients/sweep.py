"""An SLO sweep against a running controller: load the copies, send, count, log.

Two judges, and every figure says which: the *client* counts a request as in time when its answer
came within the SLO of the scheduled send; the *controller* counts from the request's arrival there
until its answer departs, as Clockwork's telemetry does.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slosched.clients.aio import AsyncClient, connect
from slosched.clients.inference import Model
from slosched.clients.load import InputPool, OpenLoopDriver, StepTally, steady_process
from slosched.clock import now_ns
from slosched.codes import code_name
from slosched.telemetry.client_log import FILE_NAME, HEADER, NO_ANSWER, ClientRecord, format_client
from slosched.telemetry.manifest import (
    ManifestNotWritten,
    finish_manifest,
    read_manifest,
    write_manifest,
)
from slosched.telemetry.run_dir import CLIENT_MANIFEST, MANIFEST, claim_run_dir
from slosched.telemetry.writer import LogWriter
from slosched.units import NS_PER_MS, NS_PER_S, format_duration
from slosched.workloads import Workload
from slosched.workloads.base import Step
from slosched.workloads.slo_exp_1 import SloExp1

#: A run whose sends were late by more than this (p99) measured its own client, and is invalid.
ISSUE_DELAY_BOUND_NS = 2 * NS_PER_MS
_LOAD_TIMEOUT_S = 120.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class SweepProgress:
    """Where a sweep stands. `step` counts from 1; `satisfaction` is the client's, so far.

    `rate_per_s` is what was sent in about the last second.
    """

    step: int
    steps: int
    elapsed_s: float
    total_s: float
    slo: str
    rate_per_s: float
    satisfaction: float
    sent: int = 0


@dataclass(frozen=True)
class StepResult:
    """One SLO step. Latencies are of successes, from the scheduled send, in ns (0: there were none).

    `in_time` is the client's count, `met` the controller's; `codes` counts every request that was
    sent by its outcome in words.
    """

    index: int
    slo: str
    slo_factor: float
    slo_ns: int
    sent: int
    in_time: int
    met: int
    codes: dict[str, int]
    latency_p50_ns: int
    latency_p99_ns: int
    issue_delay_p50_ns: int
    issue_delay_p99_ns: int

    @property
    def satisfaction(self) -> float:
        """Client, from the scheduled send: in time / sent."""
        return self.in_time / self.sent if self.sent else 0.0

    @property
    def controller_satisfaction(self) -> float:
        """Controller, from the arrival there: deadline met / sent."""
        return self.met / self.sent if self.sent else 0.0


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep, or the part of it that ran.

    `complete` is False if it was stopped or the controller went away: `problem` says which.
    `valid` is False if p99 of the issue delay is above its bound: the client, or the machine it runs
    on, was too slow for the figures to mean anything. `run_dir` is None where nothing was written.
    """

    workload: str
    steps: tuple[StepResult, ...]
    complete: bool
    problem: str
    issue_delay_p50_ns: int
    issue_delay_p99_ns: int
    inputs: bool
    random_weights: bool
    elapsed_ns: int
    run_dir: Path | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def sent(self) -> int:
        return sum(step.sent for step in self.steps)

    @property
    def satisfaction(self) -> float:
        """Client, from the scheduled send, over all steps."""
        return sum(s.in_time for s in self.steps) / self.sent if self.sent else 0.0

    @property
    def controller_satisfaction(self) -> float:
        """Controller, from the arrival there, over all steps."""
        return sum(s.met for s in self.steps) / self.sent if self.sent else 0.0

    @property
    def valid(self) -> bool:
        return self.issue_delay_p99_ns <= ISSUE_DELAY_BOUND_NS

    @property
    def verdict(self) -> str:
        """Whether the run counts, in words."""
        measured = format_duration(self.issue_delay_p99_ns)
        bound = format_duration(ISSUE_DELAY_BOUND_NS)
        if not self.valid:
            return (
                f"INVALID: issue delay p99 {measured} is above its bound of {bound}; the client "
                "sent late, so take a lower rate, --no-inputs or a quieter machine"
            )
        partial = "" if self.complete else f" part of a run ({self.problem})"
        return f"valid{partial}: issue delay p99 {measured}, bound {bound}"

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON and for the manifest. Times in ns."""
        return {
            "workload": self.workload,
            "complete": self.complete,
            "problem": self.problem,
            "valid": self.valid,
            "verdict": self.verdict,
            "sent": self.sent,
            "satisfaction_client_from_scheduled_send": self.satisfaction,
            "satisfaction_controller_from_arrival": self.controller_satisfaction,
            "issue_delay_p50_ns": self.issue_delay_p50_ns,
            "issue_delay_p99_ns": self.issue_delay_p99_ns,
            "issue_delay_bound_ns": ISSUE_DELAY_BOUND_NS,
            "inputs": self.inputs,
            "random_weights": self.random_weights,
            "elapsed_ns": self.elapsed_ns,
            "run_dir": str(self.run_dir) if self.run_dir is not None else None,
            "warnings": list(self.warnings),
            "steps": [
                {
                    **asdict(step),
                    "satisfaction_client_from_scheduled_send": step.satisfaction,
                    "satisfaction_controller_from_arrival": step.controller_satisfaction,
                }
                for step in self.steps
            ],
        }


class _Stopped(Exception):
    """`stop` was set before anything was sent."""


async def run_slo_exp_1(
    address: str,
    spec: SloExp1,
    *,
    inputs: bool = True,
    seed: int = 0,
    out: Path | None = None,
    progress: Callable[[SweepProgress], None] | None = None,
    stop: asyncio.Event | None = None,
) -> SweepResult:
    """Run the sweep `spec` against the controller at `address` and return what came of it.

    With `inputs`, each request carries a random input of the model's shape; without, the worker
    makes them. `seed` chooses the arrivals. `out` becomes a run directory with `client_log.tsv` and
    a manifest; one that holds a run is not overwritten, a numbered one in it is taken (see
    `SweepResult.run_dir`). `progress` is called about five times a second. Setting `stop` ends the
    sweep early and leaves a valid partial run.

    Raises PeerUnreachable, ProtocolMismatch, InvalidRequest (unknown model), RequestFailed and
    InvalidConfig before anything is sent; once it runs, a lost controller ends it with a `problem`.
    """
    stop = stop or asyncio.Event()
    async with connect(address, name=spec.describe().partition(":")[0]) as client:
        try:
            models = await _unless_stopped(
                client.load(spec.model, spec.copies, timeout_s=_LOAD_TIMEOUT_S), stop
            )
        except _Stopped:
            return _result(spec, [], "stopped", inputs, False, 0)
        run = _Run(client, models, spec, inputs, seed, out, progress)
        return await run.run(stop)


async def _unless_stopped(work: Coroutine[Any, Any, _T], stop: asyncio.Event) -> _T:
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _Stopped
        return task.result()
    finally:
        stopped.cancel()
        task.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


class _Run:
    """One sweep with its log, from the first request to the last answer."""

    def __init__(
        self,
        client: AsyncClient,
        models: list[Model],
        spec: Workload,
        inputs: bool,
        seed: int,
        out: Path | None,
        progress: Callable[[SweepProgress], None] | None,
    ) -> None:
        self._client, self._models, self._spec = client, models, spec
        self._inputs, self._seed, self._progress = inputs, seed, progress
        self._steps = spec.steps()
        self._warnings: list[str] = []
        self._run_dir: Path | None = None
        self._manifest = MANIFEST
        self._log: LogWriter | None = None
        infos = [model.info for model in models]
        self._driver = OpenLoopDriver(
            client,
            infos,
            spec.arrivals(seed),
            steps=len(self._steps),
            inputs=InputPool(infos, seed=seed) if inputs else None,
            on_record=self._on_record,
        )
        self._sent_before: list[tuple[int, int]] = []  # (time, sent), of about the last second
        if out is not None:
            self._open_log(out)

    def _open_log(self, out: Path) -> None:
        shared = read_manifest(out).get("kind") == "controller"
        self._manifest = CLIENT_MANIFEST if shared else MANIFEST
        self._run_dir = claim_run_dir(out, manifest=self._manifest)
        self._log = LogWriter(self._run_dir / FILE_NAME, HEADER, on_error=self._warnings.append)
        extra = {
            "workload": self._spec.describe(),
            "controller": {
                "address": self._client.address,
                "version": self._client.controller.version,
                "policy": self._client.controller.policy,
            },
            "inputs": self._inputs,
            "random_weights": self._models[0].info.random_weights,
            "b1_ns": self._models[0].b1_ns,
            "models": [model.model_id for model in self._models],
        }
        write_manifest(
            self._run_dir,
            "client",
            self._spec,
            {"arrivals": self._seed, "inputs": self._seed},
            extra,
            name=self._manifest,
        )

    def _on_record(self, record: ClientRecord) -> None:
        if self._log is not None:
            self._log.append(format_client(record))

    async def run(self, stop: asyncio.Event) -> SweepResult:
        begin_ns = now_ns()
        problem = "cancelled"
        try:
            with steady_process():
                problem = await self._driver.run(stop, on_poll=self._poll)
        finally:
            # Also when the task is cancelled: what was sent so far is a valid partial run.
            self._driver.give_up()
            if self._log is not None:
                counts = self._log.close()
                if counts.dropped:
                    self._warnings.append(f"{counts.dropped} rows of {FILE_NAME} were dropped")
            result = self._finish(problem, now_ns() - begin_ns)
        return result

    def _finish(self, problem: str, elapsed_ns: int) -> SweepResult:
        result = _result(
            self._spec,
            self._driver.tallies,
            problem,
            self._inputs,
            self._models[0].info.random_weights,
            elapsed_ns,
            self._run_dir,
            tuple(self._warnings),
        )
        if self._run_dir is not None:
            try:
                finish_manifest(self._run_dir, result.as_dict(), name=self._manifest)
            except ManifestNotWritten as error:
                self._warnings.append(str(error))
        return result

    def _poll(self) -> str:
        """Report progress; return words if the run cannot go on."""
        if self._progress is not None:
            self._progress(self._where())
        if self._client.controller.incarnation != self._models[0].incarnation:
            return "the controller was restarted during the run"
        return self._client.lost

    def _where(self) -> SweepProgress:
        now = now_ns()
        sent = self._driver.sent
        self._sent_before.append((now, sent))
        while now - self._sent_before[0][0] > 1.1 * NS_PER_S:
            self._sent_before.pop(0)
        then, before = self._sent_before[0]
        answered = sum(tally.answered for tally in self._driver.tallies)
        in_time = sum(tally.in_time for tally in self._driver.tallies)
        total_ns = self._spec.duration_ns
        return SweepProgress(
            step=self._driver.step + 1,
            steps=len(self._steps),
            elapsed_s=min(max(0, now - self._driver.start_ns), total_ns) / NS_PER_S,
            total_s=total_ns / NS_PER_S,
            slo=self._steps[self._driver.step].text,
            rate_per_s=(sent - before) * NS_PER_S / (now - then) if now > then else 0.0,
            satisfaction=in_time / answered if answered else 0.0,
            sent=sent,
        )


def _result(
    spec: Workload,
    tallies: list[StepTally],
    problem: str,
    inputs: bool,
    random_weights: bool,
    elapsed_ns: int,
    run_dir: Path | None = None,
    warnings: tuple[str, ...] = (),
) -> SweepResult:
    delays = array("q")
    for tally in tallies:
        delays.extend(tally.issue_delays)
    return SweepResult(
        workload=spec.describe(),
        # A step that was never reached says nothing.
        steps=tuple(
            _step_result(step, tally)
            for step, tally in zip(spec.steps(), tallies, strict=False)
            if tally.sent
        ),
        complete=not problem,
        problem=problem,
        issue_delay_p50_ns=_percentile(delays, 50),
        issue_delay_p99_ns=_percentile(delays, 99),
        inputs=inputs,
        random_weights=random_weights,
        elapsed_ns=elapsed_ns,
        run_dir=run_dir,
        warnings=warnings,
    )


def _step_result(step: Step, tally: StepTally) -> StepResult:
    return StepResult(
        index=step.index,
        slo=step.text,
        slo_factor=step.slo_factor,
        slo_ns=tally.slo_ns,
        sent=tally.sent,
        in_time=tally.in_time,
        met=tally.met,
        codes={
            "no answer" if code == NO_ANSWER else code_name(code): count
            for code, count in sorted(tally.codes.items())
        },
        latency_p50_ns=_percentile(tally.latencies, 50),
        latency_p99_ns=_percentile(tally.latencies, 99),
        issue_delay_p50_ns=_percentile(tally.issue_delays, 50),
        issue_delay_p99_ns=_percentile(tally.issue_delays, 99),
    )


def _percentile(values: array[int], percent: float) -> int:
    if not values:
        return 0
    return round(float(np.percentile(np.frombuffer(values, dtype=np.int64), percent)))
