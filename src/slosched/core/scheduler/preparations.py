"""LoadModels: which worker prepares which instances, and from when they are used there.

A name must mean the same on all workers where it is used: the same tensors, and weights of the same number of
pages; for a version of a repository the same files, too. A worker that prepared something else under a name
keeps it unused until the others are gone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note, ToWorker
from slosched.core.scheduler.length_classes import lengths_of, with_signature
from slosched.core.scheduler.model_ids import ModelIds
from slosched.core.scheduler.residency import adopt_residency
from slosched.core.scheduler.slices import Work
from slosched.core.scheduler.state import (
    Gpu,
    Instance,
    ModelState,
    Unlike,
    Worker,
)
from slosched.core.scheduler.validation import model_error
from slosched.messages import ErrorResult, LoadModel, LoadModelResult, Result
from slosched.signature import described
from slosched.units import NS_PER_S

#: Instances that are taken into use between two looks at what a step has left, and units of each beside
#: those for its GPUs.
TAKEN_AT_ONCE, A_TAKING = 10, 4
_PREPARE_WITHIN_NS = 600 * NS_PER_S
#: A LoadModel is with its worker by then, and heartbeats count it, or it was lost on the way.
_REACHES_WITHIN_NS = 5 * NS_PER_S


class ModelLoaded(Protocol):
    """Tells the policy that `model` is in the host memory of the worker of `gpus`."""

    def __call__(self, model: Instance, gpus: list[Gpu], *, now_ns: int) -> None: ...


@dataclass(slots=True, eq=False)
class Taking:
    """A worker has prepared instances of `name`, which are taken into use in slices."""

    worker: Worker
    name: str


@dataclass(slots=True, eq=False)
class _Preparation:
    """A LoadModel that one worker works on."""

    worker: Worker
    models: list[Instance]
    latest_ns: int


class Preparations:
    """The LoadModels under way, and what the workers prepared. `by_name` are the catalog's instances.

    `on_loaded` tells the policy where a model's weights can go from now on. `on_changed` runs for a model whose
    input shape or dtype has changed.
    """

    def __init__(
        self,
        cluster: Cluster,
        by_name: dict[str, list[Instance]],
        ids: ModelIds,
        *,
        on_loaded: ModelLoaded,
        on_changed: Callable[[Instance], None],
    ) -> None:
        self._cluster, self._by_name, self._ids = cluster, by_name, ids
        self._slices = cluster.slices
        self._on_loaded, self._on_changed = on_loaded, on_changed
        self._preparing: dict[int, _Preparation] = {}  # by action id
        self._taking: list[Taking] = []
        self.failures: dict[str, tuple[int, str]] = {}  # by name: the last worker's code and reason
        self.changes = 0  # counts what may have changed whether instances are loaded

    # ------------------------------------------------------------------------------ begin, end

    def begin(self, worker: Worker, name: str, models: list[Instance], *, now_ns: int) -> None:
        """One LoadModel for each run of consecutive ids."""
        for run in _runs(models):
            action_id = self._cluster.next_action_id()
            self._preparing[action_id] = _Preparation(worker, run, now_ns + _PREPARE_WITHIN_NS)
            self.failures.pop(name, None)
            config = self._cluster.config
            assert config.max_batch is not None and config.max_exec_ns is not None
            action = LoadModel(
                session=worker.session,
                action_id=action_id,
                name=name,
                model_id=run[0].model_id,
                copies=len(run),
                max_batch=config.max_batch,
                max_exec_ns=config.max_exec_ns,
                earliest_ns=0,
                latest_ns=now_ns + _PREPARE_WITHIN_NS,
            )
            self._cluster.emit(ToWorker(worker.worker_id, action))

    def ended(self, worker: Worker, result: Result, *, now_ns: int) -> bool:
        """Take in the end of a LoadModel; False if `result` is about something else."""
        preparation = self._preparing.get(result.action_id)
        if preparation is None or preparation.worker is not worker:
            return False
        if not isinstance(result, LoadModelResult | ErrorResult):
            return False
        self.changes += 1
        del self._preparing[result.action_id]
        if isinstance(result, LoadModelResult):
            self._prepared(preparation, result, now_ns)
        else:
            name = preparation.models[0].name
            text = f"worker {worker.label} cannot load {name!r}: {result.reason}"
            self._cluster.emit(Note("warning", text))
            self.give_up(name, result.code, result.reason)
        return True

    def _prepared(self, preparation: _Preparation, result: LoadModelResult, now_ns: int) -> None:
        worker = preparation.worker
        name = preparation.models[0].name
        result = with_signature(result)
        wrong = model_error(result)
        if wrong:
            self._cluster.emit(
                Note("warning", f"worker {worker.label} offers {name!r}, but {wrong}")
            )
            self.give_up(name, Code.RUNTIME_ERROR, wrong)
            return
        if self.is_like(name, result):
            self._take(worker, result, preparation.models, now_ns)
        else:
            self.keep_unlike(worker, result, preparation.models)

    def is_like(self, name: str, result: LoadModelResult) -> bool:
        """Whether `result` is what `name` means on the workers where it is used, or none uses it."""
        reference = self.reference(name)
        return reference is None or _signature(reference) == _signature(result)

    def keep_unlike(self, worker: Worker, result: LoadModelResult, models: list[Instance]) -> None:
        """`models` are prepared on `worker`, and are not used there: they differ from those of the others."""
        name = models[0].name
        reference = self.reference(name)
        assert reference is not None
        differs = (
            f"it offers another {name!r} than the others ({_described(result)} against "
            f"{_described(reference)})"
        )
        text = f"worker {worker.label}: {differs}: it is not used there until they are gone"
        self._cluster.emit(Note("warning", text))
        reason = f"{differs}; it is used when no worker with the other is left"
        unlike = worker.unlike.setdefault(name, Unlike(result, [], reason))
        unlike.models.extend(models)

    def begin_missing(self, worker: Worker, name: str, *, now_ns: int) -> None:
        """Have `worker` prepare the instances of `name` that it neither has nor prepares."""
        there = set(worker.instances)
        if name in worker.unlike:
            there.update(model.model_id for model in worker.unlike[name].models)
        for each in self._preparing.values():
            if each.worker is worker:
                there.update(model.model_id for model in each.models)
        missing = [model for model in self._by_name[name] if model.model_id not in there]
        if missing and name in worker.loadable:
            self.begin(worker, name, missing, now_ns=now_ns)

    def take_name(self, worker: Worker, name: str) -> Taking:
        """Instances of `name` are about to be taken into use on `worker`, in slices."""
        taking = Taking(worker, name)
        self._taking.append(taking)
        return taking

    def still(self, taking: Taking) -> bool:
        """False once the worker was lost, or drains."""
        return taking in self._taking and not taking.worker.retired

    def taken(self, taking: Taking) -> None:
        """What was being taken into use is."""
        self._taking.remove(taking)
        self.changes += 1

    def under_way(self, name: str) -> bool:
        return any(p.models[0].name == name for p in self._preparing.values()) or any(
            taking.name == name for taking in self._taking
        )

    def expire(self, now_ns: int) -> None:
        """Give up what workers did not finish in time."""
        while self._preparing:
            action_id, oldest = next(iter(self._preparing.items()))
            if now_ns <= oldest.latest_ns:
                break
            self.changes += 1
            del self._preparing[action_id]
            reason = f"worker {oldest.worker.label} did not finish within ten minutes"
            self.give_up(oldest.models[0].name, Code.LOAD_MODEL_TOO_LATE, reason)

    def worker_lost(self, worker: Worker, *, now_ns: int) -> None:
        for action_id, preparation in list(self._preparing.items()):
            if preparation.worker is worker:
                del self._preparing[action_id]
        self._taking = [taking for taking in self._taking if taking.worker is not worker]
        self.changes += 1
        self._take_unlike(now_ns)
        reason = f"worker {worker.label} was lost while it loaded the model"
        for name in list(self._by_name):
            self.give_up(name, Code.CANCELLED, reason)

    def give_up(self, name: str, code: int, reason: str) -> None:
        """A preparation of `name` ended badly. Was it the last hope of some instances?"""
        self.failures[name] = (code, reason)
        if self.under_way(name):
            return
        ready = any(name in w.prepared for w in self._cluster.joined())
        if ready or name not in self._by_name:
            return
        failed = [m for m in self._by_name[name] if m.state is ModelState.LOADING]
        for model in failed:
            model.state = ModelState.FAILED
            self._cluster.models.pop(model.model_id, None)
            self._ids.retire(model.model_id)
        if failed:
            self._by_name[name] = [m for m in self._by_name[name] if m.state is ModelState.LOADED]

    # ----------------------------------------------------------------------------- use

    def reference(self, name: str) -> LoadModelResult | None:
        """What the models of `name` are on the workers where they are used."""
        found = (w.prepared[name] for w in self._cluster.joined() if name in w.prepared)
        return next(found, None)

    def _take(
        self, worker: Worker, result: LoadModelResult, models: list[Instance], now_ns: int
    ) -> None:
        """`models` are used on `worker` from now on; they may be others than their last worker had."""
        name = models[0].name
        worker.has_prepared(name, result)
        taking = self.take_name(worker, name)
        self._slices.begin(self._take_some(taking, result, models, now_ns))

    def _take_some(
        self, taking: Taking, result: LoadModelResult, models: list[Instance], now_ns: int
    ) -> Work:
        worker = taking.worker
        for at in range(0, len(models), TAKEN_AT_ONCE):
            if not self.still(taking):
                return  # the worker was lost
            for model in models[at : at + TAKEN_AT_ONCE]:
                self.take_one(worker, result, model, now_ns)
            yield TAKEN_AT_ONCE * (A_TAKING + len(worker.gpus))
        self.taken(taking)

    def take_to(self, worker: Worker, gpus: list[Gpu], models: list[Instance], now_ns: int) -> Work:
        """`models` are prepared, and GPUs of their worker are used that were not before."""
        for at in range(0, len(models), TAKEN_AT_ONCE):
            if gpus[0] not in worker.gpus or worker.retired:
                return  # the worker was lost, or drains
            for model in models[at : at + TAKEN_AT_ONCE]:
                self._use_on(gpus, model, now_ns)
            yield TAKEN_AT_ONCE * (A_TAKING + len(gpus))

    def take_one(
        self, worker: Worker, result: LoadModelResult, model: Instance, now_ns: int
    ) -> None:
        before = model.result
        if before is None or _signature(before) != _signature(result):
            model.result, model.pages = result, result.pages
            if model.state is ModelState.LOADED:
                self.measure(model)
            if before is not None and _tensors(before) != _tensors(result):
                self._on_changed(model)
            model.set_lengths(lengths_of(result))
            model.set_function(result.function)
        elif result.urgent_ns > before.urgent_ns:  # its first worker may be without --preempt
            model.result = msgspec.structs.replace(before, urgent_ns=result.urgent_ns)
        worker.instances[model.model_id] = model
        self._use_on(worker.gpus, model, now_ns)

    def _use_on(self, gpus: list[Gpu], model: Instance, now_ns: int) -> None:
        """`model` is prepared for those of `gpus` that may run it; some may hold its weights already."""
        gpus = [gpu for gpu in gpus if gpu.serves(model)]
        for gpu in gpus:
            if adopt_residency(gpu, model):
                self._cluster.changes.execs(gpu)
        self._on_loaded(model, gpus, now_ns=now_ns)

    def _take_unlike(self, now_ns: int) -> None:
        """A worker was lost: what was kept from use because of its models may be used now."""
        for worker in self._cluster.serving():
            for name, unlike in list(worker.unlike.items()):
                reference = self.reference(name)
                if reference is None or _signature(reference) == _signature(unlike.result):
                    del worker.unlike[name]
                    text = f"worker {worker.label}: its {name!r} is used now: the other is gone"
                    self._cluster.emit(Note("info", text))
                    self._take(worker, unlike.result, unlike.models, now_ns)

    def forgotten(self, worker: Worker, *, now_ns: int) -> str:
        """A LoadModel that was sent long ago and that `worker` does not know, in words; empty: there is none.

        It was lost, or its result was, with a connection that broke too briefly for either side to notice.
        """
        if worker.beat.session != worker.session:
            return ""  # its first heartbeat has not come
        sent_before_ns = now_ns - _REACHES_WITHIN_NS
        old = [
            action_id
            for action_id, preparation in self._preparing.items()
            if preparation.worker is worker
            and preparation.latest_ns - _PREPARE_WITHIN_NS < sent_before_ns
        ]
        return f"LoadModel {old[0]}" if len(old) > max(0, worker.beat.preparing) else ""

    def measure(self, model: Instance) -> None:
        """The fastest GPU's profiled b1 becomes the unit of the model's SLO factors."""
        assert model.result is not None
        has = [w.prepared[model.name] for w in self._cluster.serving() if model.name in w.prepared]
        model.b1_ns = min(r.exec_ns[0] for r in has or [model.result])  # the smallest batch is 1
        model.weights_ns = model.result.weights_ns


def _described(result: LoadModelResult) -> str:
    if result.function is not None:
        where = "GPUs" if result.function.gpu else "hosts"
        sizes = result.function.size_classes
        return f"a function for {where}, {sizes} size class(es), {result.pages} page(s)"
    lengths = lengths_of(result)
    classes = f", lengths {', '.join(map(str, lengths))}" if lengths else ""
    files = f", files {result.digest[:8]}" if result.digest else ""
    return f"{described(result.inputs, result.outputs)}{classes}, {result.pages} page(s){files}"


def _signature(result: LoadModelResult) -> tuple[object, ...]:
    """What must be the same on all workers: the tensors, the pages of weights, and a version's files."""
    function = result.function
    kind = None if function is None else (function.gpu, function.size_classes)
    return (*_tensors(result), result.pages, kind, result.digest)


def _tensors(result: LoadModelResult) -> tuple[object, ...]:
    return result.inputs, result.outputs, lengths_of(result)


def _runs(models: list[Instance]) -> Iterator[list[Instance]]:
    """Split into runs of consecutive ids, which ascend: one LoadModel names a first id and a count."""
    start, places = 0, range(len(models))
    while start < len(models):
        # Less its place, an id stays the same to the end of its run, and grows behind it.
        less = models[start].model_id - start
        end = bisect_right(places, less, lo=start, key=lambda at: models[at].model_id - at)
        yield models[start:end]
        start = end
