"""`simulate`: a spec in, the files and the result of a run out. The same scheduler, workers and load
driver as live, in virtual time.
"""

from __future__ import annotations

import functools
import gc
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from slosched.clock import now_ns
from slosched.core.scheduler.interface import ActionRecord, Note, RequestRecord
from slosched.core.scheduler.policies import POLICY_TYPES, resolved
from slosched.loadgen.progress import ProgressMeter
from slosched.loadgen.results import RunProgress, RunResult, StepTally, run_result
from slosched.output_files import utf8_document
from slosched.sim.client import Phase
from slosched.sim.run_files import RunFiles
from slosched.sim.spec import SimSpec
from slosched.sim.world import World
from slosched.telemetry.client_log import ClientRecord
from slosched.telemetry.manifest import finish_manifest, write_manifest
from slosched.telemetry.run_dir import claim_run_dir
from slosched.telemetry.source import code_from_outside, file_sha256, folder_sha256
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.engine import Engine
from slosched.workloads.registry import origins

KIND = "simulation"

#: `progress` and `stop` are asked each time that this much virtual time has passed.
_SLICE_NS = 50 * NS_PER_MS
#: After the client has left, the cluster runs for this time, so that the last actions have their rows.
_SETTLE_NS = NS_PER_S // 2
#: `progress` is called at most this often, in wall time.
_PROGRESS_EVERY_NS = NS_PER_S // 5
_MOST_NOTES = 200

Progress = Callable[[RunProgress], None]


def simulate(
    spec: SimSpec,
    *,
    out: Path | None = None,
    progress: Progress | None = None,
    manifest: Mapping[str, object] | None = None,
    stop: Callable[[], bool] | None = None,
) -> RunResult:
    """Run `spec` and return what came of it, as a live client would.

    `out` becomes a run directory with the controller's and the client's logs and a manifest (kind
    "simulation"; entries of `manifest` are added); one that holds a run is not overwritten, a numbered
    one in it is taken (`RunResult.run_dir`). `progress` is called about five times a second. `stop` is
    asked each 50 ms of virtual time; when it says so, or on KeyboardInterrupt, a valid partial run is
    left (`complete` False).

    Raises InvalidConfig for a spec that cannot run, LoadFailed when a model cannot be loaded,
    RowsNotWritten when the disk is full, InvariantViolated if `spec.check` finds one.
    """
    engine = Engine(spec.workload, seed=spec.seed, duration_ns=spec.duration_ns)
    directory = None if out is None else claim_run_dir(Path(out))
    if directory is not None:
        extra = {
            "workload": spec.workload.describe(),
            "spec_sha256": spec_digest(spec),
            "source": source_digest(),
            **(manifest or {}),
        }
        write_manifest(directory, KIND, spec_document(spec), spec.seeds(), extra)
    run = _Run(spec, engine, directory)
    with _few_collections():
        return run.run(progress, stop)


class _Run:
    """One simulation with its files."""

    def __init__(self, spec: SimSpec, engine: Engine, directory: Path | None) -> None:
        self._spec = spec
        self._engine = engine
        self._directory = directory
        self._files = None if directory is None else RunFiles(directory)
        self._notes: list[str] = []
        files = self._files
        world = World(
            spec,
            engine,
            on_request=_no_row if files is None else files.on_request,
            on_action=_no_row if files is None else files.on_action,
            on_note=self._note,
            on_client=None if files is None else files.on_client,
        )
        self._kernel, self._cluster, self._client = world.kernel, world.cluster, world.client
        if files is not None:
            self._cluster.controller.on_stage = files.on_stage
            self._cluster.controller.on_plan = files.on_plan
            self._cluster.controller.on_call = files.on_call
            self._cluster.controller.on_call_part = files.on_call_part
        self._sent_until_ns: int | None = None
        self._meter: ProgressMeter | None = None

    def _note(self, note: Note) -> None:
        if note.level == "warning" and len(self._notes) < _MOST_NOTES:
            self._notes.append(note.text)

    def run(self, progress: Progress | None, stop: Callable[[], bool] | None) -> RunResult:
        begin_ns, wall_ns = self._kernel.now_ns, now_ns()
        problem = "an error ended it"
        try:
            ended = self._until_done(progress, stop)
            self._wind_up()
            problem = ended
        except KeyboardInterrupt:
            problem = "stopped"
        finally:
            # After an error the world may be half a step: nothing moves any more, but what was sent so
            # far is a valid partial run.
            if self._client.driver is not None:
                self._client.driver.give_up()
            rows = self._files.close() if self._files is not None else {}
            elapsed_ns = self._kernel.now_ns - begin_ns
            result = self._result(problem, elapsed_ns, rows, now_ns() - wall_ns)
        if self._client.failure is not None:
            raise self._client.failure
        return result

    def _until_done(self, progress: Progress | None, stop: Callable[[], bool] | None) -> str:
        kernel, client = self._kernel, self._client
        client.start()
        shown_ns = 0
        while client.phase is not Phase.DONE:
            kernel.run_until(kernel.now_ns + _SLICE_NS)
            if progress is not None and now_ns() - shown_ns >= _PROGRESS_EVERY_NS:
                shown_ns = now_ns()
                self._show(progress)
            if stop is not None and stop():
                return "stopped"
        if progress is not None:
            self._show(progress)
        return "" if client.failure is None else str(client.failure)

    def _show(self, progress: Progress) -> None:
        driver = self._client.driver
        if driver is None:
            return
        if self._meter is None:
            self._meter = ProgressMeter(driver, self._engine)
        progress(self._meter.at(self._kernel.now_ns))

    def _wind_up(self) -> None:
        """The client leaves, the cluster comes to rest, the controller ends."""
        if self._client.driver is not None:
            self._sent_until_ns = self._kernel.now_ns - self._client.driver.start_ns
        self._client.leave()
        self._kernel.run_until(self._kernel.now_ns + _SETTLE_NS)
        self._cluster.controller.recount()
        self._cluster.controller.abandon()

    def _result(
        self, problem: str, elapsed_ns: int, rows: dict[str, int], wall_ns: int
    ) -> RunResult:
        driver, client = self._client.driver, self._client
        tallies = driver.tallies if driver is not None else _no_tallies(self._engine)
        result = run_result(
            self._spec.workload,
            self._engine,
            tallies,
            problem=problem,
            inputs=self._spec.inputs,
            random_weights=any(info.random_weights for info in client.models),
            elapsed_ns=elapsed_ns,
            sent_until_ns=self._sent_until_ns if problem else None,
            run_dir=self._directory,
            warnings=tuple(self._notes),
        )
        if self._directory is not None:
            scheduler = self._cluster.controller.scheduler
            outcome = {
                **result.as_dict(),
                "requests_arrived": scheduler.arrived,
                "requests_answered": scheduler.answered,
                "requests_by_code": {str(c): n for c, n in sorted(scheduler.by_code.items())},
                **rows,
                "network": self._cluster.traffic(),
                "events": self._kernel.events,
                "wall_ns": wall_ns,
            }
            finish_manifest(self._directory, outcome)
        return result


def _no_row(record: RequestRecord | ActionRecord | ClientRecord) -> None:
    return


def _no_tallies(engine: Engine) -> list[StepTally]:
    return [StepTally() for _ in range(len(engine.steps) * len(engine.groups))]


@contextmanager
def _few_collections() -> Iterator[None]:
    """What is alive stays alive for the whole run, and records die by their counts: collect seldom."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


# ---------------------------------------------------------------------------------- identity


def spec_document(spec: SimSpec) -> dict[str, Any]:
    """The spec as plain dicts and lists: what the manifest says, and what tells two specs apart.

    A file that the workload reads stands there with its path and the SHA-256 of its bytes, and code of another
    package with its version and the SHA-256 of its source.
    """
    document = _plain(spec)
    assert isinstance(document, dict)
    document["scheduler"] = _plain(resolved(spec.scheduler))
    document["workload"] = {
        "name": spec.workload.name,
        "text": spec.workload.describe(),
        "spec": _plain(spec.workload),
    }
    policy = POLICY_TYPES.origin(spec.scheduler.policy)
    return document | code_from_outside([policy, *origins(spec.workload)])


def spec_digest(spec: SimSpec) -> str:
    """SHA-256 over `spec_document`: equal for specs that give the same bytes with the same version."""
    return hashlib.sha256(
        msgspec.json.encode(utf8_document(spec_document(spec)), order="sorted")
    ).hexdigest()


@functools.cache
def source_digest() -> str:
    """SHA-256 over the package's own source files, names and bytes, as they were when first asked for."""
    return folder_sha256(Path(__file__).parents[1])


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: _plain(getattr(value, name)) for name in value._fields}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return {"path": str(value), "sha256": file_sha256(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__
