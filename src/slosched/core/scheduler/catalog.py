"""The models: which instances exist, who uses them, and loading them into the workers.

A client asks for `copies` instances of a name. Instances that exist already are shared, the missing
ones are made on every worker; a second sweep therefore reuses what the first one loaded. An instance
that no client uses stays, because loading again costs more than keeping, but it is the first whose
weights are evicted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from slosched.codes import Code
from slosched.config import canonical_model
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note, ToClient, ToWorker
from slosched.core.scheduler.slices import A_PART, Work
from slosched.core.scheduler.state import Client, Gpu, Model, ModelState, Unlike, Worker
from slosched.core.scheduler.unused import Unused
from slosched.core.scheduler.validation import what_is_wrong_with_model
from slosched.errors import known_names, shown_name
from slosched.messages import (
    ErrorResult,
    ListModelsReply,
    ListModelsRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    ModelInfo,
)
from slosched.units import NS_PER_S

MAX_COPIES = 100_000
#: Models of one load that a step looks at, of those that it awaits.
_LOOKED_AT = 300
#: Instances that are taken into use between two looks at what a step has left, and units of each beside
#: those for its GPUs.
_TAKEN_AT_ONCE, _A_TAKING = 10, 4
#: A load asked for before any worker joined is held this long (Clockwork holds 12 s).
_HOLD_NS = 12 * NS_PER_S
_PREPARE_WITHIN_NS = 600 * NS_PER_S
#: A LoadModel is with its worker by then, and heartbeats tell of it, or it was lost on the way.
_REACHES_WITHIN_NS = 5 * NS_PER_S


@dataclass(slots=True, eq=False)
class _Waiting:
    """A LoadModelRequest that is not answered yet. `client` is None for a wish of the policy."""

    client: Client | None
    message: LoadModelRequest
    models: list[Model]
    give_up_ns: int
    loaded: bool = False  # all its models are LOADED; only first weights are awaited
    seen: int = -1  # the catalog's `news` when it was last looked at whether they are loaded
    measured: int = 0  # how many of its models, from the first, are LOADED
    settled: int = 0  # how many of its models, from the first, need no more waiting
    answered: bool = False


@dataclass(slots=True, eq=False)
class _Taking:
    """A worker has prepared instances of `name`, which are taken into use in slices."""

    worker: Worker
    name: str


@dataclass(slots=True, eq=False)
class _Preparation:
    """A LoadModel that one worker works on."""

    worker: Worker
    models: list[Model]
    latest_ns: int


class Catalog:
    """All model instances. `on_loaded` tells the policy where a model's weights can go from now on.

    `on_changed` runs for a model whose input shape or dtype has changed.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        on_loaded: Callable[[Model, list[Gpu], int], None],
        on_changed: Callable[[Model], None],
        settled: Callable[[Model], bool],
    ) -> None:
        self._cluster = cluster
        self._slices = cluster.slices
        self._on_loaded = on_loaded
        self._on_changed = on_changed
        self._settled = settled
        self._by_name: dict[str, list[Model]] = {}
        self.waiting: list[_Waiting] = []  # loads that are not answered yet
        self._preparing: dict[int, _Preparation] = {}  # by action id
        self._making: dict[str, None] = {}  # names of which many instances are made, in slices
        self._taking: list[_Taking] = []
        self._telling: list[str] = []  # names of loads that are being answered
        self._failures: dict[str, tuple[int, str]] = {}  # by name: the last worker's reason
        self._next_model_id = 0
        self._news = 0  # counts what may have changed whether models are loaded
        self.hurried = False  # `advance` stopped before it had to wait for anything
        self.unused = Unused(cluster, self._by_name, self._under_way)

    # --------------------------------------------------------------------- clients' wishes

    def request_load(self, client: Client, message: LoadModelRequest, *, now_ns: int) -> None:
        if not 1 <= message.copies <= MAX_COPIES:
            reason = f"copies must be within 1..{MAX_COPIES}, not {message.copies}"
            self._reply(client, message, Code.INVALID_REQUEST, reason)
            return
        most = self._cluster.config.max_client_loads
        if sum(each.client is client for each in self.waiting) >= most:
            reason = (
                f"{most} loads of this client wait already, as many as --max-client-loads allows"
            )
            self._reply(client, message, Code.LIMIT_REACHED, reason)
            return
        there = len(self._by_name.get(canonical_model(message.name), ()))
        most = self._cluster.config.max_instances
        if message.copies > there and len(self._cluster.models) + message.copies - there > most:
            self.unused.crowded = True
            reason = (
                f"--max-instances allows {most}, and there are {len(self._cluster.models)} already; those "
                "that nobody uses are unloaded now, so ask once more"
            )
            self._reply(client, message, Code.LIMIT_REACHED, reason)
            return
        self.waiting.append(_Waiting(client, message, [], now_ns + _HOLD_NS))
        self.advance(now_ns=now_ns)

    def list_models(self, client: Client, message: ListModelsRequest) -> None:
        self._slices.begin(self._list(client, message))

    def _list(self, client: Client, message: ListModelsRequest) -> Work:
        models = list(self._cluster.models.values())
        infos: list[ModelInfo] = []
        for at in range(0, len(models), A_PART):
            part = models[at : at + A_PART]
            infos += [m.info() for m in part if m.state is ModelState.LOADED]
            yield A_PART
        if not client.gone:
            reply = ListModelsReply(message.request_id, tuple(infos), self.loadable())
            self._cluster.emit(ToClient(client.identity, reply))

    def loadable(self) -> tuple[str, ...]:
        """Names that at least one joined worker offers, sorted."""
        names = {n: None for w in self._serving() for n in w.loadable}
        return tuple(sorted(names))

    def _serving(self) -> list[Worker]:
        """Joined workers with GPUs in use; one beyond `max_gpus` has none."""
        return [worker for worker in self._cluster.joined() if worker.gpus]

    def release(self, client: Client) -> Work:
        """The client is gone and waits for no load; what is returned takes it from its models' users."""
        self.waiting = [w for w in self.waiting if w.client is not client]
        self.hurried = self.hurried and bool(self.waiting)
        return self._release(client)

    def _release(self, client: Client) -> Work:
        models = client.models
        while models:
            for model in [models.popitem()[1] for _ in range(min(len(models), A_PART))]:
                if model.clients.get(client.identity) is client:  # it may have come back meanwhile
                    del model.clients[client.identity]
                    if not model.clients:
                        model.unused_since_ns = self.unused.now_ns
            yield A_PART // 4

    # --------------------------------------------------------------------- workers' answers

    def worker_joined(self, worker: Worker, gpus: list[Gpu], *, now_ns: int) -> None:
        """`gpus` of the worker are used from now on: give it every model that exists, or has it already."""
        self._news += 1
        if len(gpus) < len(worker.gpus):
            there = list(worker.instances.values())
            self._slices.begin(self._take_to(worker, gpus, there, now_ns))
        elif gpus:
            for name, models in self._by_name.items():
                if models and name in worker.loadable:
                    self._prepare(worker, name, models, now_ns=now_ns)
        for name, copies in self._cluster.own_models.items():
            wish = LoadModelRequest(-1, name, copies)
            self.waiting.append(_Waiting(None, wish, [], now_ns + _HOLD_NS))
        self.advance(now_ns=now_ns)

    def worker_lost(self, worker: Worker, *, now_ns: int) -> None:
        for action_id, preparation in list(self._preparing.items()):
            if preparation.worker is worker:
                del self._preparing[action_id]
        self._taking = [taking for taking in self._taking if taking.worker is not worker]
        self._news += 1
        self._take_unlike(now_ns)
        reason = f"worker {worker.label} was lost while it loaded the model"
        for name in list(self._by_name):
            self._give_up(name, Code.CANCELLED, reason)
        self.advance(now_ns=now_ns)

    def prepared(self, worker: Worker, result: LoadModelResult, *, now_ns: int) -> None:
        preparation = self._ended(worker, result.action_id)
        if preparation is None:
            return
        name = preparation.models[0].name
        wrong = what_is_wrong_with_model(result)
        if wrong:
            self._cluster.emit(
                Note("warning", f"worker {worker.label} offers {name!r}, but {wrong}")
            )
            self._give_up(name, Code.RUNTIME_ERROR, wrong)
            self.advance(now_ns=now_ns)
            return
        reference = self._reference(name)
        if reference is None or _signature(reference) == _signature(result):
            self._take(worker, result, preparation.models, now_ns)
        else:
            differs = (
                f"it offers another {name!r} than the others (tensors, pages: "
                f"{_signature(result)} against {_signature(reference)})"
            )
            text = f"worker {worker.label}: {differs}: it is not used there until they are gone"
            self._cluster.emit(Note("warning", text))
            reason = f"{differs}; it is used when no worker with the other is left"
            unlike = worker.unlike.setdefault(name, Unlike(result, [], reason))
            unlike.models.extend(preparation.models)
        self.advance(now_ns=now_ns)

    def _reference(self, name: str) -> LoadModelResult | None:
        """What the models of `name` are on the workers where they are used."""
        found = (w.prepared[name] for w in self._cluster.joined() if name in w.prepared)
        return next(found, None)

    def _take(
        self, worker: Worker, result: LoadModelResult, models: list[Model], now_ns: int
    ) -> None:
        """`models` are used on `worker` from now on; they may be others than their last worker had."""
        name = models[0].name
        worker.prepared[name] = result
        taking = _Taking(worker, name)
        self._taking.append(taking)
        self._slices.begin(self._take_some(taking, result, models, now_ns))

    def _take_some(
        self, taking: _Taking, result: LoadModelResult, models: list[Model], now_ns: int
    ) -> Work:
        worker = taking.worker
        for at in range(0, len(models), _TAKEN_AT_ONCE):
            if taking not in self._taking:
                return  # the worker was lost
            for model in models[at : at + _TAKEN_AT_ONCE]:
                self._take_one(worker, result, model, now_ns)
            yield _TAKEN_AT_ONCE * (_A_TAKING + len(worker.gpus))
        self._taking.remove(taking)
        self._news += 1

    def _take_to(self, worker: Worker, gpus: list[Gpu], models: list[Model], now_ns: int) -> Work:
        """`models` are prepared, and GPUs of their worker are used that were not before."""
        for at in range(0, len(models), _TAKEN_AT_ONCE):
            if gpus[0] not in worker.gpus:
                return  # the worker was lost
            for model in models[at : at + _TAKEN_AT_ONCE]:
                self._on_loaded(model, gpus, now_ns)
            yield _TAKEN_AT_ONCE * (_A_TAKING + len(gpus))

    def _take_one(self, worker: Worker, result: LoadModelResult, model: Model, now_ns: int) -> None:
        before = model.result
        if before is None or _signature(before) != _signature(result):
            model.result, model.pages = result, result.pages
            if model.state is ModelState.LOADED:
                self._measure(model, self._serving())
            if before is not None and _tensors(before) != _tensors(result):
                self._on_changed(model)
        worker.instances[model.model_id] = model
        self._on_loaded(model, worker.gpus, now_ns)

    def _take_unlike(self, now_ns: int) -> None:
        """A worker was lost: what was kept from use because of its models may be used now."""
        for worker in self._serving():
            for name, unlike in list(worker.unlike.items()):
                reference = self._reference(name)
                if reference is None or _signature(reference) == _signature(unlike.result):
                    del worker.unlike[name]
                    text = f"worker {worker.label}: its {name!r} is used now: the other is gone"
                    self._cluster.emit(Note("info", text))
                    self._take(worker, unlike.result, unlike.models, now_ns)

    def forgotten(self, worker: Worker, *, now_ns: int) -> int | None:
        """A LoadModel that was sent long ago and of which `worker` knows nothing; None: there is none.

        It was lost, or its result was, with a connection that broke too briefly for anybody to notice.
        """
        if worker.beat.session != worker.session:
            return None  # its first heartbeat has not come
        sent_before_ns = now_ns - _REACHES_WITHIN_NS
        old = [
            action_id
            for action_id, preparation in self._preparing.items()
            if preparation.worker is worker
            and preparation.latest_ns - _PREPARE_WITHIN_NS < sent_before_ns
        ]
        return old[0] if len(old) > max(0, worker.beat.preparing) else None

    def preparation_failed(self, worker: Worker, result: ErrorResult, *, now_ns: int) -> bool:
        """True if `result` was about a LoadModel of ours."""
        preparation = self._ended(worker, result.action_id)
        if preparation is None:
            return False
        name = preparation.models[0].name
        self._cluster.emit(
            Note("warning", f"worker {worker.label} cannot load {name!r}: {result.reason}")
        )
        self._give_up(name, result.code, result.reason)
        self.advance(now_ns=now_ns)
        return True

    def _ended(self, worker: Worker, action_id: int) -> _Preparation | None:
        """The LoadModel of that number, if it is `worker`'s; it is under way no more."""
        preparation = self._preparing.get(action_id)
        if preparation is None or preparation.worker is not worker:
            return None
        self._news += 1
        return self._preparing.pop(action_id)

    def _preparing_name(self, name: str) -> bool:
        return any(p.models[0].name == name for p in self._preparing.values()) or any(
            taking.name == name for taking in self._taking
        )

    def _under_way(self, name: str) -> bool:
        """Whether somebody waits for instances of `name`, or they are made or prepared."""
        return (
            name in self._making
            or name in self._telling
            or self._preparing_name(name)
            or any(canonical_model(each.message.name) == name for each in self.waiting)
            or name in self._cluster.own_models
        )

    def _give_up(self, name: str, code: int, reason: str) -> None:
        """A preparation of `name` ended badly. Was it the last hope of some instances?"""
        self._failures[name] = (code, reason)
        if self._preparing_name(name):
            return
        ready = any(name in w.prepared for w in self._cluster.joined())
        if ready or name not in self._by_name:
            return
        failed = [m for m in self._by_name[name] if m.state is ModelState.LOADING]
        for model in failed:
            model.state = ModelState.FAILED
            self._cluster.models.pop(model.model_id, None)
        if failed:
            self._by_name[name] = [m for m in self._by_name[name] if m.state is ModelState.LOADED]

    # ------------------------------------------------------------------------------ progress

    def advance(self, *, now_ns: int) -> None:
        """Move every waiting load as far as it goes. Cheap when nothing waits."""
        self.hurried = False
        while self._preparing:
            action_id, oldest = next(iter(self._preparing.items()))
            if now_ns <= oldest.latest_ns:
                break
            self._news += 1
            del self._preparing[action_id]
            reason = f"worker {oldest.worker.label} did not finish within ten minutes"
            self._give_up(oldest.models[0].name, Code.LOAD_MODEL_TOO_LATE, reason)
        if self.waiting:
            self.waiting = [w for w in self.waiting if not self._advance_one(w, now_ns)]

    def _advance_one(self, waiting: _Waiting, now_ns: int) -> bool:
        """Returns True when `waiting` was answered."""
        message, client = waiting.message, waiting.client
        name = canonical_model(message.name)
        joined = self._serving()
        if not joined:
            if now_ns < waiting.give_up_ns:
                return False
            reason = "no worker is connected to the controller; start one and try again"
            self._reply(client, message, Code.INITIALIZING, reason)
            return True
        if not waiting.loaded:
            if waiting.seen == self._news:
                return False  # it was looked at, and nothing has happened since
            waiting.seen = self._news
            if not self._load(waiting, name, joined, now_ns):
                return waiting.answered
        if not self._all_settled(waiting, joined):
            return False
        self._telling.append(name)
        self._slices.begin(self._tell(client, message, waiting.models, name))
        return True

    def _all_settled(self, waiting: _Waiting, joined: list[Worker]) -> bool:
        """True once the first weights of all its models have come; looks at some of them each time."""
        models = waiting.models
        for model in models[waiting.measured : waiting.measured + _LOOKED_AT]:
            if model.state is ModelState.FAILED:  # the last worker was lost in between
                waiting.loaded, waiting.seen = False, -1
                return False
            if model.state is not ModelState.LOADED:
                self._measure(model, joined)
                model.state = ModelState.LOADED
            waiting.measured += 1
        if waiting.measured < len(models):
            self.hurried = True
            return False
        for model in models[waiting.settled : waiting.settled + _LOOKED_AT]:
            if not self._settled(model):
                return False
            waiting.settled += 1
        if waiting.settled < len(models):
            self.hurried = True
            return False
        return True

    def _tell(
        self, client: Client | None, message: LoadModelRequest, models: list[Model], name: str
    ) -> Work:
        """Answer a load: its client uses these models from now on."""
        infos: list[ModelInfo] = []
        for at in range(0, len(models), A_PART):
            if client is None or client.gone:
                break
            for model in models[at : at + A_PART]:
                self.used_by(client, model)
                infos.append(model.info())
            yield A_PART
        self._telling.remove(name)
        if client is not None and not client.gone:
            self._reply(client, message, Code.OK, "", tuple(infos))

    def _load(self, waiting: _Waiting, name: str, joined: list[Worker], now_ns: int) -> bool:
        """True once all instances are in host memory. If they cannot be, `waiting` is answered."""
        message, client = waiting.message, waiting.client
        if not any(name in worker.loadable for worker in joined):
            aside = self._cluster.put_aside.get(name)
            if aside is not None:
                reason = f"cannot load {name!r}: {aside}"
                self._reply(client, message, Code.PROCESS_ENDED, reason)
                waiting.answered = True
                return False
            known = known_names(name, self.loadable())
            reason = f"no worker knows the model {shown_name(message.name)}; they offer: {known}"
            self._reply(client, message, Code.UNKNOWN_MODEL, reason)
            waiting.answered = True
            return False
        if not waiting.models:
            waiting.models = self._instances(name, message.copies, now_ns=now_ns)
            if not waiting.models:
                return False
        # Loaded ones stand before all others, and what fails is all the others.
        state = waiting.models[-1].state
        if state is ModelState.FAILED:
            lost = (
                Code.CANCELLED,
                "it was given up before, and is being tried again; ask once more",
            )
            code, reason = self._failures.get(name, lost)
            self._reply(client, message, code, f"cannot load {name!r}: {reason}")
            waiting.answered = True
            return False
        unloaded = state is ModelState.LOADING
        if unloaded and self._preparing_name(name):
            return False
        if unloaded and self._reference(name) is None:
            self._give_up(name, Code.CANCELLED, "no worker has it any more; ask once more")
            return self._load(waiting, name, joined, now_ns)
        waiting.loaded = True
        return True

    def _measure(self, model: Model, joined: list[Worker]) -> None:
        """The fastest GPU's profiled b1 becomes the unit of the model's SLO factors."""
        assert model.result is not None
        has = [w.prepared[model.name] for w in joined if model.name in w.prepared]
        model.b1_ns = min(r.exec_ns[0] for r in has or [model.result])  # the smallest batch is 1
        model.weights_ns = model.result.weights_ns
        model.cold_ns = max(1, model.weights_ns + model.b1_ns)

    def abandon(self) -> None:
        """Answer the loads that wait: the process ends."""
        for waiting in self.waiting:
            reason = "the controller is shutting down"
            self._reply(waiting.client, waiting.message, Code.SHUTTING_DOWN, reason)
        self.waiting.clear()
        self.hurried = False

    def used_by(self, client: Client, model: Model) -> None:
        """`client` uses `model` until it leaves."""
        model.clients[client.identity] = client
        client.models[model.model_id] = model

    def _instances(self, name: str, copies: int, *, now_ns: int) -> list[Model]:
        """The first `copies` instances of `name`; makes what is missing on every worker.

        Empty while many are made: that takes several steps.
        """
        have = self._by_name.setdefault(name, [])
        missing = copies - len(have)
        if missing > 0 and name not in self._making:
            self._making[name] = None
            if missing <= A_PART:
                self._make_now(name, missing, now_ns)
            else:
                self._slices.begin(self._make(name, missing, now_ns))
        return [] if len(self._by_name[name]) < copies else self._by_name[name][:copies]

    def _make_now(self, name: str, missing: int, now_ns: int) -> None:
        for _ in self._make(name, missing, now_ns):
            pass

    def _make(self, name: str, missing: int, now_ns: int) -> Work:
        first_id = self._next_model_id  # all in a row: one LoadModel names them
        self._next_model_id += missing
        first_copy = len(self._by_name[name])
        fresh: list[Model] = []
        for at in range(0, missing, A_PART):
            some = [
                Model(first_id + place, name, first_copy + place, unused_since_ns=now_ns)
                for place in range(at, min(at + A_PART, missing))
            ]
            fresh += some
            self._cluster.models.update((model.model_id, model) for model in some)
            yield A_PART
        have = self._by_name[name]
        if len(have) != first_copy:  # some of them were given up meanwhile
            for copy, model in enumerate(fresh, len(have)):
                model.copy = copy
        have.extend(fresh)
        del self._making[name]
        self._news += 1
        for worker in self._serving():
            if name in worker.loadable:
                self._prepare(worker, name, fresh, now_ns=now_ns)

    def _prepare(self, worker: Worker, name: str, models: list[Model], *, now_ns: int) -> None:
        """One LoadModel for each run of consecutive ids."""
        for run in _runs(models):
            action_id = self._cluster.next_action_id()
            self._preparing[action_id] = _Preparation(worker, run, now_ns + _PREPARE_WITHIN_NS)
            self._failures.pop(name, None)
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

    def _reply(
        self,
        client: Client | None,
        message: LoadModelRequest,
        code: int,
        reason: str,
        models: tuple[ModelInfo, ...] = (),
    ) -> None:
        if client is None:
            if code != Code.OK:
                policy = self._cluster.config.policy
                self._cluster.emit(Note("warning", f"{policy} cannot have its models: {reason}"))
            return
        reply = LoadModelReply(message.request_id, int(code), reason, models)
        self._cluster.emit(ToClient(client.identity, reply))


def _signature(result: LoadModelResult) -> tuple[object, ...]:
    """What must be the same on all workers: the tensors, and the pages the weights take."""
    return (*_tensors(result), result.pages)


def _tensors(result: LoadModelResult) -> tuple[object, ...]:
    return result.input_shape, result.input_dtype, result.output_shape, result.output_dtype


def _runs(models: list[Model]) -> Iterator[list[Model]]:
    """Split into runs of consecutive ids, which ascend: one LoadModel names a first id and a count."""
    start, places = 0, range(len(models))
    while start < len(models):
        # Less its place, an id stays the same to the end of its run, and grows behind it.
        less = models[start].model_id - start
        end = bisect_right(places, less, lo=start, key=lambda at: models[at].model_id - at)
        yield models[start:end]
        start = end
