"""A workload against a running controller: load its models, send, count, log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from slosched.clients.aio import AsyncClient, connect
from slosched.clients.inference import Model
from slosched.clients.load import LiveLoad, steady_process
from slosched.clock import now_ns
from slosched.errors import InvalidConfig
from slosched.loadgen.inputs import InputPool
from slosched.loadgen.instances import copies_by_name, in_workload_order
from slosched.loadgen.progress import FOREVER_NS, ProgressMeter
from slosched.loadgen.results import RunProgress, RunResult, StepTally, run_result
from slosched.telemetry.client_log import FILE_NAME, HEADER, ClientRecord, client_rows
from slosched.telemetry.manifest import (
    ManifestNotWritten,
    finish_manifest,
    read_manifest,
    write_manifest,
)
from slosched.telemetry.run_dir import CLIENT_MANIFEST, MANIFEST, claim_run_dir
from slosched.telemetry.source import code_from_outside
from slosched.telemetry.writer import LogWriter
from slosched.workloads.base import Workload
from slosched.workloads.composed import senders_of
from slosched.workloads.engine import Engine
from slosched.workloads.registry import origins

#: A controller gives up a model that a worker does not prepare within ten minutes.
_LOAD_TIMEOUT_S = 660.0
#: Restarts of the controller that a result tells one by one.
_RESTARTS_TOLD = 10

_T = TypeVar("_T")


class _Stopped(Exception):
    """`stop` was set before anything was sent."""


async def run_workload(
    address: str,
    workload: Workload,
    *,
    inputs: bool = True,
    seed: int = 0,
    duration_ns: int | None = None,
    out: Path | None = None,
    progress: Callable[[RunProgress], None] | None = None,
    stop: asyncio.Event | None = None,
    name: str = "",
    weight: float = 1.0,
    slo_from_send: bool = False,
) -> RunResult:
    """Run `workload` against the controller at `address` and return what came of it.

    With `inputs`, each request carries a random input of the model's shape; without, the worker
    makes them. `seed` chooses the arrivals. `duration_ns` ends the run sooner than the workload
    would; one that never ends by itself then goes on until `stop` is set. `out` becomes a run
    directory with `client_log.tsv` and a manifest; one that holds a run is not overwritten, a
    numbered one in it is taken (see `RunResult.run_dir`). `progress` is called about five times a
    second. Setting `stop` ends the run early and leaves a valid partial run. The controller knows the
    client by `name` (the workload's if empty) and `weight`. SLOs count from arrival at the controller, as
    Clockwork's do, or with `slo_from_send` from the client's send to its receipt, as the library's do.

    Raises PeerUnreachable, ProtocolMismatch, InvalidRequest (unknown model), RequestFailed and
    InvalidConfig before anything is sent; once it runs, a controller that falls silent ends it with a
    `problem`. A restarted one is told among the warnings: its models are loaded again and the run goes on, and
    requests that were in flight count as not answered.
    """
    stop = stop or asyncio.Event()
    names = dict.fromkeys(sender.name for sender in senders_of(workload))
    if len(names) > 1:
        raise InvalidConfig(
            f"a client is one process, and this mix has several ({', '.join(n or 'this' for n in names)}): "
            "give each a file of its own and start it with --name and --weight, or simulate the mix"
        )
    if duration_ns is None and workload.duration_ns is None:
        duration_ns = FOREVER_NS
    engine = Engine(workload, seed=seed, duration_ns=duration_ns)
    restarts: list[str] = []
    try:
        connecting = connect(
            address,
            name=name or workload.name,
            weight=weight,
            slo_from_send=slo_from_send,
            on_restart=restarts.append,
        )
        async with await _unless_stopped(connecting.open(), stop) as client:
            models = await _unless_stopped(_load(client, workload), stop)
            run = _Run(client, models, workload, engine, inputs, seed, out, progress, restarts)
            return await run.run(stop)
    except _Stopped:
        nothing = [StepTally()] * (len(engine.steps) * len(engine.groups))
        return run_result(workload, engine, nothing, problem="stopped", inputs=inputs, elapsed_ns=0)


async def _load(client: AsyncClient, workload: Workload) -> list[Model]:
    """Load everything; return the instances in the workload's order. One name after the other, so
    that the same workload finds the same model ids."""
    uses = workload.models()
    if not uses:
        raise InvalidConfig(f"the workload {workload.name} uses no model")
    loaded = {
        name: await client.load(name, copies, timeout_s=_LOAD_TIMEOUT_S)
        for name, copies in copies_by_name(uses).items()
    }
    return in_workload_order(uses, loaded)


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
    """One run with its log, from the first request to the last answer."""

    def __init__(
        self,
        client: AsyncClient,
        models: list[Model],
        workload: Workload,
        engine: Engine,
        inputs: bool,
        seed: int,
        out: Path | None,
        progress: Callable[[RunProgress], None] | None,
        restarts: list[str],
    ) -> None:
        self._restarts = restarts
        self._client, self._models = client, models
        self._workload, self._engine = workload, engine
        self._inputs, self._seed, self._progress = inputs, seed, progress
        self._random_weights = any(model.info.random_weights for model in models)
        self._warnings: list[str] = []
        self._run_dir: Path | None = None
        self._manifest = MANIFEST
        self._log: LogWriter | None = None
        infos = [model.info for model in models]
        self._load = LiveLoad(
            client,
            models,
            engine,
            inputs=InputPool(infos, seed=seed) if inputs else None,
            on_record=self._on_record,
            default_slo_ns=client.controller.default_slo_ns,
        )
        self._meter = ProgressMeter(self._load.driver, engine)
        if out is not None:
            self._open_log(out)

    def _open_log(self, out: Path) -> None:
        shared = read_manifest(out).get("kind") == "controller"
        self._manifest = CLIENT_MANIFEST if shared else MANIFEST
        self._run_dir = claim_run_dir(out, manifest=self._manifest)
        self._log = LogWriter(
            self._run_dir / FILE_NAME, HEADER, rows=client_rows, on_error=self._warnings.append
        )
        endless = self._engine.end_ns >= FOREVER_NS
        extra = {
            "workload": self._workload.describe(),
            "duration_ns": None if endless else self._engine.end_ns,
            "controller": {
                "address": self._client.address,
                "version": self._client.controller.version,
                "policy": self._client.controller.policy,
            },
            **code_from_outside(origins(self._workload)),
            "inputs": self._inputs,
            "random_weights": self._random_weights,
            "b1_ns": {model.name: model.b1_ns for model in self._models},
            "models": [model.model_id for model in self._models],
        }
        write_manifest(
            self._run_dir,
            "client",
            self._workload,
            {"arrivals": self._seed, "inputs": self._seed},
            extra,
            name=self._manifest,
        )

    def _on_record(self, record: ClientRecord) -> None:
        if self._log is not None:
            self._log.append(record)

    async def run(self, stop: asyncio.Event) -> RunResult:
        begin_ns = now_ns()
        problem = "cancelled"
        try:
            with steady_process():
                problem = await self._load.run(stop, on_poll=self._poll)
        finally:
            # Also when the task is cancelled: what was sent so far is a valid partial run.
            self._load.driver.give_up()
            if self._log is not None:
                counts = self._log.close()
                if counts.dropped:
                    self._warnings.append(f"{counts.dropped} rows of {FILE_NAME} were dropped")
            result = self._finish(problem, now_ns() - begin_ns)
        return result

    def _finish(self, problem: str, elapsed_ns: int) -> RunResult:
        result = run_result(
            self._workload,
            self._engine,
            self._load.driver.tallies,
            problem=problem,
            inputs=self._inputs,
            random_weights=self._random_weights,
            elapsed_ns=elapsed_ns,
            sent_until_ns=self._load.sent_until_ns,
            run_dir=self._run_dir,
            warnings=(*self._restarts[:_RESTARTS_TOLD], *self._warnings),
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
            self._progress(self._meter.at(now_ns()))
        return self._client.lost
