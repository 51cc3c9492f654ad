"""The models: which instances exist, who uses them, and loading them into the workers.

A client asks for `copies` instances of a name. Instances that exist already are shared, the missing
ones are made on every worker; a second sweep therefore reuses what the first one loaded. An instance
that no client uses stays, because loading again costs more than keeping, but it is the first whose
weights are evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slosched.codes import Code
from slosched.config import canonical_model
from slosched.core.scheduler.cascade_loads import CascadeLoads
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note, ToClient
from slosched.core.scheduler.inventory import Inventory
from slosched.core.scheduler.model_ids import ModelIds
from slosched.core.scheduler.preparations import ModelLoaded, Preparations
from slosched.core.scheduler.slices import A_PART, Work
from slosched.core.scheduler.state import Client, Gpu, Instance, ModelState, Request, Worker
from slosched.core.scheduler.unloading import Unloading
from slosched.core.scheduler.versions import left_out_by_all, meant, why_left_out
from slosched.errors import known_names, shown_name
from slosched.messages import (
    ListModelsReply,
    ListModelsRequest,
    LoadModelReply,
    LoadModelRequest,
    ModelInfo,
    Result,
)
from slosched.units import NS_PER_S

MAX_COPIES = 100_000
#: Models of one load that a step looks at, of those that it awaits.
_LOOKED_AT = 300
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
    models: list[Instance]
    give_up_ns: int
    loaded: bool = False  # all its models are LOADED; only first weights are awaited
    seen: int = -1  # the catalog's `news` when it was last looked at whether they are loaded
    measured: int = 0  # how many of its models, from the first, are LOADED
    settled: int = 0  # how many of its models, from the first, need no more waiting
    answered: bool = False
    name: str = ""  # canonical; that of a version, where the message has a plain name (versions.py)

    def __post_init__(self) -> None:
        self.name = canonical_model(self.message.name)


class Catalog:
    """All model instances. `on_loaded` tells the policy where a model's weights can go from now on.

    `on_changed` runs for a model whose input shape or dtype has changed, `end_request` for one that an operator
    unloads while requests wait for it.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        takes_over: bool,
        on_loaded: ModelLoaded,
        on_changed: Callable[[Instance], None],
        settled: Callable[[Instance], bool],
        end_request: Callable[[Request, int, str], None],
    ) -> None:
        self._cluster = cluster
        self._slices = cluster.slices
        self._settled = settled
        self._by_name: dict[str, list[Instance]] = {}
        self.waiting: list[_Waiting] = []  # loads that are not answered yet
        self._ids = ModelIds()
        self._preparations = Preparations(
            cluster, self._by_name, self._ids, on_loaded=on_loaded, on_changed=on_changed
        )
        self.inventory = Inventory(
            cluster, self._by_name, self._ids, self._preparations, takes_over=takes_over
        )
        self._cascade_loads = CascadeLoads(cluster.cascades, cluster.models.get)
        self._making: dict[str, None] = {}  # names of which many instances are made, in slices
        self._telling: list[str] = []  # names of loads that are being answered
        self.hurried = False  # `advance` stopped before it had to wait for anything
        self.unloading = Unloading(
            cluster, self._by_name, self._ids, busy=self._under_way, end_request=end_request
        )

    # --------------------------------------------------------------------- clients' wishes

    def request_load(self, client: Client, message: LoadModelRequest, *, now_ns: int) -> None:
        if not 1 <= message.copies <= MAX_COPIES:
            reason = f"copies must be within 1..{MAX_COPIES}, not {message.copies}"
            self._reply(client, message, Code.INVALID_REQUEST, reason)
            return
        if message.name in self._cluster.cascades.by_name and message.copies > 1:
            reason = f"{message.name!r} is a cascade, which is loaded once; ask for 1 copy"
            self._reply(client, message, Code.INVALID_REQUEST, reason)
            return
        most = self._cluster.config.max_client_loads
        if sum(each.client is client for each in self.waiting) >= most:
            reason = (
                f"{most} loads of this client wait already, as many as --max-client-loads allows"
            )
            self._reply(client, message, Code.LIMIT_REACHED, reason)
            return
        if not self._cluster.serves_functions and self._cluster.is_function(message.name):
            policy = self._cluster.config.policy
            reason = f"{message.name!r} is a function, and {policy} serves models alone; INFER5 serves both"
            self._reply(client, message, Code.INVALID_REQUEST, reason)
            return
        serving = self._cluster.serving()
        missing = sum(
            max(0, message.copies - len(self._by_name.get(meant(name, serving), ())))
            for name in self._cascade_loads.programs(message.name)
        )
        most = self._cluster.config.max_instances
        if missing and len(self._cluster.models) + missing > most:
            self.unloading.crowded = True
            reason = (
                f"--max-instances allows {most}, and there are {len(self._cluster.models)} already; those "
                "that no client uses are unloaded now, so ask once more"
            )
            self._reply(client, message, Code.LIMIT_REACHED, reason)
            return
        for each in self._cascade_loads.begin(client, message) or [message]:
            self.waiting.append(_Waiting(client, each, [], now_ns + _HOLD_NS))
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
            infos += [each.info() for each in self._cluster.cascades.by_name.values() if each.ready]
            loadable = self.loadable()
            functions = {name: None for w in self._cluster.serving() for name in w.functions}
            among = tuple(name for name in loadable if name in functions)
            reply = ListModelsReply(
                message.request_id,
                tuple(infos),
                loadable,
                among,
                left_out_by_all(self._cluster.serving()),
            )
            self._cluster.emit(ToClient(client.identity, reply))

    def function(self, name: str) -> Instance | None:
        """The function `name`, if it is ready on a worker."""
        models = self._by_name.get(canonical_model(name), ())
        ready = (m for m in models if m.state is ModelState.LOADED and not m.taken)
        found = next(ready, None)
        return found if found is not None and found.function is not None else None

    def is_loading(self, name: str) -> bool:
        """Whether instances of `name` are being prepared, or waited for."""
        name = canonical_model(name)
        waits = any(each.name == name for each in self.waiting)
        return waits or self._preparations.under_way(name)

    def failure_of(self, name: str) -> tuple[int, str] | None:
        """How the last load of `name` that failed did so: a code and words."""
        return self._preparations.failures.get(canonical_model(name))

    def loadable(self) -> tuple[str, ...]:
        """Names that at least one joined worker offers, sorted."""
        names = {n: None for w in self._cluster.serving() for n in w.loadable}
        if not self._cluster.serves_functions:
            names = {name: None for name in names if not self._cluster.is_function(name)}
        for cascade in self._cluster.cascades.by_name.values():
            if cascade.spec.light.model in names and cascade.spec.heavy.model in names:
                names[cascade.spec.name] = None
        return tuple(sorted(names))

    def release(self, client: Client) -> Work:
        """The client is gone and waits for no load; what is returned takes it from its models' users."""
        self._cascade_loads.forget(client)
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
                        model.unused_since_ns = self.unloading.now_ns
            yield A_PART // 4

    # --------------------------------------------------------------------- workers' answers

    def worker_joined(self, worker: Worker, gpus: list[Gpu], *, now_ns: int) -> None:
        """`gpus` of the worker are used from now on: give it every model that exists, or has it already."""
        self._preparations.changes += 1
        self.inventory.awaits_workers(now_ns=now_ns)  # from the first one on
        if len(gpus) < len(worker.gpus):
            there = list(worker.instances.values())
            self._slices.begin(self._preparations.take_to(worker, gpus, there, now_ns))
        elif gpus and worker.inventory:
            self.inventory.begin(worker, now_ns=now_ns)
        elif gpus:
            for name, models in self._by_name.items():
                if models and name in worker.loadable:
                    self._preparations.begin(worker, name, models, now_ns=now_ns)
        for name, copies in self._wanted_of(worker).items():
            wish = LoadModelRequest(-1, name, copies)
            self.waiting.append(_Waiting(None, wish, [], now_ns + _HOLD_NS))
        self.advance(now_ns=now_ns)

    def _wanted_of(self, worker: Worker) -> dict[str, int]:
        """Models and copies that are loaded without a client: the policy's own, and each function once."""
        wanted = dict(self._cluster.own_models)
        if not self._cluster.serves_functions or not worker.gpus:
            return wanted
        waits = {each.message.name for each in self.waiting if each.client is None}
        missing = [n for n in worker.functions if not self._by_name.get(n) and n not in waits]
        room = max(0, self._cluster.config.max_instances - len(self._cluster.models))
        if len(missing) > room:
            left = len(missing) - room
            text = (
                f"worker {worker.label}: --max-instances leaves no room for {left} of its functions"
            )
            self._cluster.emit(Note("warning", text))
        return wanted | dict.fromkeys(missing[:room], 1)

    def offered(self, worker: Worker, fresh: Sequence[str], *, now_ns: int) -> None:
        """`worker` can prepare the models `fresh` as well from now on: it gets what exists of them."""
        self._preparations.changes += 1
        if worker in self._cluster.serving() and not self.inventory.looks_at(worker):
            for name in fresh:
                if self._by_name.get(name):
                    self._preparations.begin_missing(worker, name, now_ns=now_ns)
        self.advance(now_ns=now_ns)

    def worker_lost(self, worker: Worker, *, now_ns: int) -> None:
        self.inventory.worker_lost(worker, now_ns=now_ns)
        self._preparations.worker_lost(worker, now_ns=now_ns)
        self.advance(now_ns=now_ns)

    def ended(self, worker: Worker, result: Result, *, now_ns: int) -> bool:
        """Take in the end of a LoadModel, or of an unload of what a worker brought along; False: of neither."""
        if self.inventory.ended(worker, result):
            return True
        if not self._preparations.ended(worker, result, now_ns=now_ns):
            return False
        self.advance(now_ns=now_ns)
        return True

    def forgotten(self, worker: Worker, *, now_ns: int) -> str:
        """A LoadModel, or an unload, that `worker` lost, in words; empty: there is none."""
        return self._preparations.forgotten(worker, now_ns=now_ns) or self.inventory.forgotten(
            worker, now_ns=now_ns
        )

    def _under_way(self, name: str) -> bool:
        """Whether a client waits for instances of `name`, or they are made or prepared."""
        return (
            name in self._making
            or name in self._telling
            or self._preparations.under_way(name)
            or any(each.name == name for each in self.waiting)
            or name in self._cluster.own_models
            or self._cluster.is_function(name)
        )

    # ------------------------------------------------------------------------------ progress

    def advance(self, *, now_ns: int) -> None:
        """Move every waiting load as far as it goes. Cheap when nothing waits."""
        self.hurried = False
        self._preparations.expire(now_ns)
        if self.waiting:
            before = len(self.waiting)
            self.waiting = [w for w in self.waiting if not self._advance_one(w, now_ns)]
            if self._cluster.hosts and 0 < len(self.waiting) < before:
                self.hurried = True  # one may have waited for another

    def _advance_one(self, waiting: _Waiting, now_ns: int) -> bool:
        """Returns True when `waiting` was answered."""
        message, client = waiting.message, waiting.client
        joined = self._cluster.serving()
        if not joined:
            if now_ns < waiting.give_up_ns:
                return False
            reason = "no worker is connected to the controller; start one and try again"
            self._reply(client, message, Code.INITIALIZING, reason)
            return True
        if not waiting.loaded:
            if waiting.seen == self._preparations.changes:
                return False  # it was looked at, and nothing has happened since
            waiting.seen = self._preparations.changes
            if not waiting.models:
                waiting.name = meant(message.name, joined)
            if not self._load(waiting, waiting.name, joined, now_ns):
                return waiting.answered
        if not self._all_settled(waiting):
            return False
        name = waiting.name
        self._telling.append(name)
        self._slices.begin(self._tell(client, message, waiting.models, name))
        return True

    def _all_settled(self, waiting: _Waiting) -> bool:
        """True once the first weights of all its models have come; looks at some of them each time."""
        models = waiting.models
        for model in models[waiting.measured : waiting.measured + _LOOKED_AT]:
            if model.state is ModelState.FAILED:  # the last worker was lost in between
                waiting.loaded, waiting.seen = False, -1
                return False
            if model.state is not ModelState.LOADED or model.adopted:
                self._preparations.measure(model)
                model.state, model.adopted = ModelState.LOADED, False
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
        self, client: Client | None, message: LoadModelRequest, models: list[Instance], name: str
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
            left_out = why_left_out(name, joined)
            if left_out:
                reason = f"cannot load {name!r}: {left_out}"
                self._reply(client, message, Code.INVALID_MODEL_PATH, reason)
                waiting.answered = True
                return False
            known = known_names(name, self.loadable())
            asked = message.name if canonical_model(message.name) == name else name
            reason = f"no worker offers {shown_name(asked)}; they offer: {known}"
            self._reply(client, message, Code.UNKNOWN_MODEL, reason)
            waiting.answered = True
            return False
        if not waiting.models:
            if self.inventory.under_way(name) or self.inventory.awaits_workers(now_ns=now_ns):
                waiting.seen = -1  # time passes without a change
                return False
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
            code, reason = self._preparations.failures.get(name, lost)
            self._reply(client, message, code, f"cannot load {name!r}: {reason}")
            waiting.answered = True
            return False
        unloaded = state is ModelState.LOADING
        if unloaded and self._preparations.under_way(name):
            return False
        if unloaded and self._preparations.reference(name) is None:
            self._preparations.give_up(
                name, Code.CANCELLED, "no worker has it any more; ask once more"
            )
            return self._load(waiting, name, joined, now_ns)
        waiting.loaded = True
        return True

    def abandon(self) -> None:
        """Answer the loads that wait: the process ends."""
        for waiting in self.waiting:
            reason = "the controller is shutting down"
            self._reply(waiting.client, waiting.message, Code.SHUTTING_DOWN, reason)
        self.waiting.clear()
        self.hurried = False

    def used_by(self, client: Client, model: Instance) -> None:
        """`client` uses `model` until it leaves."""
        model.taken = False
        model.clients[client.identity] = client
        client.models[model.model_id] = model

    def _instances(self, name: str, copies: int, *, now_ns: int) -> list[Instance]:
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
        first_id = self._ids.take(missing)  # all in a row: one LoadModel names them
        first_copy = len(self._by_name[name])
        fresh: list[Instance] = []
        for at in range(0, missing, A_PART):
            some = [
                Instance(first_id + place, name, first_copy + place, unused_since_ns=now_ns)
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
        self._preparations.changes += 1
        for worker in self._cluster.serving():
            if name in worker.loadable and not self.inventory.looks_at(worker):
                self._preparations.begin(worker, name, fresh, now_ns=now_ns)

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
                what = f"{self._cluster.config.policy} cannot have its models"
                if message.name not in self._cluster.own_models:
                    what = f"the function {shown_name(message.name)} cannot be called"
                self._cluster.emit(Note("warning", f"{what}: {reason}"))
            return
        reply: LoadModelReply | None = LoadModelReply(message.request_id, int(code), reason, models)
        if self._cascade_loads:
            assert reply is not None
            reply = self._cascade_loads.replied(message, reply)
        if reply is not None:
            self._cluster.emit(ToClient(client.identity, reply))
