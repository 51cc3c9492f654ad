"""Take-over: what a worker holds when it joins is used, and nothing of it is prepared or loaded again.

An instance is named by its cluster and its number. A worker keeps what it prepared for a cluster, and tells the
next controller of it, or the same one after a loss, in its Welcome (`Prepared`): state comes from the workers,
and there is no journal to trust. For each instance:

- one that this controller knows is used where it is;
- one that it does not know is made, with its number, unless this controller unloaded it;
- what cannot be used (unloaded meanwhile, another name, prepared with other options, one too many) is unloaded.

Then the worker prepares what it lacks, and the other workers what they lack. Until all this is done, in several
steps, the pages of weights that are not looked at yet count as taken (`Gpu.brought`).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note, ToWorker
from slosched.core.scheduler.length_classes import lengths_of, with_signature
from slosched.core.scheduler.model_ids import ModelIds
from slosched.core.scheduler.preparations import (
    A_TAKING,
    TAKEN_AT_ONCE,
    Preparations,
    Taking,
)
from slosched.core.scheduler.slices import Work
from slosched.core.scheduler.state import Instance, ModelState, Worker, WorkerState
from slosched.messages import (
    ErrorResult,
    Prepared,
    Result,
    UnloadModel,
    UnloadModelResult,
    WorkerWelcome,
)
from slosched.units import NS_PER_S

#: A worker leaves its controller after a second of silence, and is greeted twice a second.
_AWAITED_NS = 2 * NS_PER_S
#: An UnloadModel is answered at once: it was lost if it is not by then.
_ANSWERED_WITHIN_NS = 5 * NS_PER_S


def brought_weights(worker: Worker, resident: tuple[int, ...]) -> dict[int, int]:
    """Pages of the weights that a GPU holds as it is taken into use, by model id.

    They are of instances that the worker's Welcome tells; later, of those that are used there.
    """
    if not worker.inventory:
        known = worker.instances
        return {i: known[i].pages for i in resident if i in known}
    runs = sorted((first, each.result.pages) for each in worker.inventory for first, _ in each.runs)
    return {i: runs[bisect_right(runs, (i, 2**62)) - 1][1] for i in resident}


def with_signatures(message: WorkerWelcome) -> WorkerWelcome:
    """`message` with the signature of each model that the worker brings along."""
    if not message.inventory:
        return message
    entries = [replace(e, result=with_signature(e.result)) for e in message.inventory]
    return replace(message, inventory=tuple(entries))


@dataclass(slots=True, eq=False)
class _Clearing:
    """An UnloadModel of an instance that is not used. Its pages are free when it is answered."""

    worker: Worker
    model_id: int
    sent_ns: int


class Inventory:
    """Adopts what workers bring along. `by_name` are the catalog's instances.

    `takes_over`: this controller may follow another one of its cluster.
    """

    def __init__(
        self,
        cluster: Cluster,
        by_name: dict[str, list[Instance]],
        ids: ModelIds,
        preparations: Preparations,
        *,
        takes_over: bool,
    ) -> None:
        self._cluster, self._by_name, self._ids = cluster, by_name, ids
        self._preparations = preparations
        self._adopting: list[Taking] = []  # names of workers that are not looked at yet
        self._clearing: dict[int, _Clearing] = {}  # by action id
        self._takes_over = takes_over
        self._until_ns = -1  # workers are awaited until then
        self.adopted = 0  # pairs of an instance and a worker, so far

    # -------------------------------------------------------------------------------- facts

    def begin(self, worker: Worker, *, now_ns: int) -> None:
        """Look at what `worker` brought along, in slices; then it is asked to prepare what it lacks."""
        entries, worker.inventory = worker.inventory, ()
        for each in entries:
            self._ids.saw(max(first + count for first, count in each.runs) - 1)
        takings = [self._preparations.take_name(worker, each.name) for each in entries]
        self._adopting += takings
        self._cluster.slices.begin(self._adopt_all(entries, takings, now_ns))

    def looks_at(self, worker: Worker) -> bool:
        """Whether what `worker` brought is still looked at. It gets no LoadModel: ids may be in use there."""
        return any(taking.worker is worker for taking in self._adopting)

    def awaits_workers(self, *, now_ns: int) -> bool:
        """True at the start of a controller of a cluster while a worker is silent that may bring models along.

        Until then no instances are made for clients: their numbers may be in use on that worker.
        """
        if self._until_ns < 0:
            self._until_ns = now_ns + (_AWAITED_NS if self._takes_over else 0)
        return now_ns < self._until_ns and any(
            worker.state is WorkerState.SILENT for worker in self._cluster.workers.values()
        )

    def under_way(self, name: str) -> bool:
        """Whether instances of `name` are still to be adopted: none is made anew meanwhile."""
        return any(taking.name == name for taking in self._adopting)

    def ended(self, worker: Worker, result: Result) -> bool:
        """Take in the end of an unload; False if `result` is about something else."""
        clearing = self._clearing.get(result.action_id)
        if clearing is None or clearing.worker is not worker:
            return False
        if not isinstance(result, UnloadModelResult | ErrorResult):
            return False
        del self._clearing[result.action_id]
        if isinstance(result, ErrorResult) and result.code != Code.UNKNOWN_MODEL:
            return True  # it holds them still, and is about to end
        for gpu in worker.gpus:
            gpu.free_pages += gpu.brought.pop(clearing.model_id, 0)
            self._cluster.changes.loads(gpu)
        return True

    def forgotten(self, worker: Worker, *, now_ns: int) -> str:
        """An unload that `worker` should have answered long ago, in words; empty: there is none."""
        for action_id, each in self._clearing.items():
            if each.worker is worker and now_ns - each.sent_ns > _ANSWERED_WITHIN_NS:
                return f"UnloadModel {action_id}"
        return ""

    def worker_lost(self, worker: Worker, *, now_ns: int) -> None:
        names = [each.name for each in self._adopting if each.worker is worker]
        self._adopting = [each for each in self._adopting if each.worker is not worker]
        for name in names:
            self._have_others_prepare(worker, name, now_ns)
        for action_id in [i for i, each in self._clearing.items() if each.worker is worker]:
            del self._clearing[action_id]

    # ------------------------------------------------------------------------------ adopting

    def _adopt_all(self, entries: tuple[Prepared, ...], takings: list[Taking], now_ns: int) -> Work:
        worker, before = takings[0].worker, self.adopted
        made: list[str] = []
        for each, taking in zip(entries, takings, strict=True):
            known = len(self._by_name.get(each.name, ()))
            yield from self._adopt(each, taking, now_ns)
            if not self._preparations.still(taking):
                return  # the worker was lost
            if len(self._by_name.get(each.name, ())) > known:
                made.append(each.name)
        self._adopting = [taking for taking in self._adopting if taking not in takings]
        for name in list(self._by_name):
            self._preparations.begin_missing(worker, name, now_ns=now_ns)
        for name in made:
            self._have_others_prepare(worker, name, now_ns)
        for taking in takings:
            self._preparations.taken(taking)
        count = self.adopted - before
        if count:
            weights = sum(len(gpu.resident) for gpu in worker.gpus)
            text = (
                f"worker {worker.label} brought {count} instance(s) and weights of {weights} along"
            )
            self._cluster.emit(Note("info", text))

    def _adopt(self, entry: Prepared, taking: Taking, now_ns: int) -> Work:
        """Use what can be used of one name, and unload the rest."""
        worker, name, result = taking.worker, entry.name, with_signature(entry.result)
        preparations = self._preparations
        used: list[Instance] = []
        usable = self._is_usable(entry, worker)
        for some in _parts(entry):
            if not preparations.still(taking):
                return
            for model_id in some:
                model = self._cluster.models.get(model_id)
                if usable and model is None and self._may_make(name, model_id):
                    model = self._make(entry, model_id, now_ns)
                if usable and model is not None and model.name == name:
                    used.append(model)
                else:
                    self._clear(worker, model_id, now_ns)
            yield len(some) * A_TAKING
        if used and preparations.is_like(name, result):
            worker.has_prepared(name, result)
            for at in range(0, len(used), TAKEN_AT_ONCE):
                if not preparations.still(taking):
                    return
                for model in used[at : at + TAKEN_AT_ONCE]:
                    if model.state is ModelState.FAILED:  # given up meanwhile
                        self._clear(worker, model.model_id, now_ns)
                        continue
                    preparations.take_one(worker, result, model, now_ns)
                    self.adopted += 1
                yield TAKEN_AT_ONCE * (A_TAKING + len(worker.gpus))
        elif any(model.model_id in gpu.brought for model in used for gpu in worker.gpus):
            # Its weights would hold pages for nothing: it prepares them anew, and they are set aside then.
            for model in used:
                self._clear(worker, model.model_id, now_ns)
        elif used:
            preparations.keep_unlike(worker, result, used)

    def _is_usable(self, entry: Prepared, worker: Worker) -> bool:
        """Whether it was prepared as this controller would have it prepared."""
        config = self._cluster.config
        if entry.result.function is not None and not self._cluster.serves_functions:
            return False
        same = (entry.max_batch, entry.max_exec_ns) == (config.max_batch, config.max_exec_ns)
        return same and entry.name in worker.loadable

    def _may_make(self, name: str, model_id: int) -> bool:
        """Whether an instance that a worker brings and that is not known exists from now on."""
        crowded = len(self._cluster.models) >= self._cluster.config.max_instances
        # What is being prepared was made by this controller, and stands behind all that it knew.
        making = any(m.state is ModelState.LOADING for m in self._by_name.get(name, ())[-1:])
        return not (crowded or making or self._ids.is_retired(model_id))

    def _make(self, entry: Prepared, model_id: int, now_ns: int) -> Instance:
        have = self._by_name.setdefault(entry.name, [])
        result = self._preparations.reference(entry.name) or with_signature(entry.result)
        model = Instance(
            model_id=model_id,
            name=entry.name,
            copy=len(have),
            state=ModelState.LOADED,
            pages=result.pages,
            result=result,
            unused_since_ns=now_ns,
            adopted=True,
        )
        model.set_lengths(lengths_of(result))
        model.set_function(result.function)
        insort(have, model, key=lambda each: each.model_id)
        self._cluster.models[model_id] = model
        self._preparations.measure(model)
        return model

    def _clear(self, worker: Worker, model_id: int, now_ns: int) -> None:
        action_id = self._cluster.next_action_id()
        self._clearing[action_id] = _Clearing(worker, model_id, now_ns)
        unload = UnloadModel(worker.session, action_id, model_id)
        self._cluster.emit(ToWorker(worker.worker_id, unload))

    def _have_others_prepare(self, worker: Worker, name: str, now_ns: int) -> None:
        """Instances of `name` were made as `worker` has them: the other workers prepare what they lack."""
        if not self._by_name.get(name):
            return
        for other in self._cluster.serving():
            if other is not worker and not self.looks_at(other):
                self._preparations.begin_missing(other, name, now_ns=now_ns)


def _parts(entry: Prepared) -> Iterator[range]:
    """The ids of its instances, some at a time."""
    for first, count in entry.runs:
        for at in range(first, first + count, TAKEN_AT_ONCE):
            yield range(at, min(at + TAKEN_AT_ONCE, first + count))
