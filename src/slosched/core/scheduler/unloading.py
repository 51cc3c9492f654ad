"""Instances leave the workers' host memory: those that no client uses, and those that a client unloads.

An instance outlives its clients, because loading again costs more than keeping. But clients come and go, with
ever new names and more copies: what no client has used for `keep_unused_ns` goes, and everything unused goes
at once when a load was refused because there are too many instances (`max_instances`). A client may unload a
model (UnloadModelRequest): it gives up its own use, and what no other client uses goes at once. Copies go from
the last one back, so that those that are left are still the first ones of their name.

First the weights go, by evictions; an instance is unloaded when no action of it is under way anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note, ToClient, ToWorker
from slosched.core.scheduler.model_ids import ModelIds
from slosched.core.scheduler.policies import unloads_unused
from slosched.core.scheduler.slices import A_PART, ANSWER, Work
from slosched.core.scheduler.state import (
    Client,
    Instance,
    ModelState,
    Request,
    RequestState,
    Worker,
)
from slosched.core.scheduler.versions import loaded_under
from slosched.errors import shown_name
from slosched.messages import UnloadModel, UnloadModelReply, UnloadModelRequest
from slosched.units import NS_PER_S, format_duration

_EVERY_NS = NS_PER_S


class Unloading:
    """Looks for what is to go once a second. `busy` says whether loads of a name are under way, and
    `end_request` answers a request whose model an operator unloads.
    """

    def __init__(
        self,
        cluster: Cluster,
        by_name: dict[str, list[Instance]],
        ids: ModelIds,
        *,
        busy: Callable[[str], bool],
        end_request: Callable[[Request, int, str], None],
    ) -> None:
        self._cluster, self._by_name, self._ids, self._busy = cluster, by_name, ids, busy
        self._end_request = end_request
        #: Names that a client unloaded: their instances go however lately they were used.
        self._asked: dict[str, None] = {}
        self._unloads = unloads_unused(cluster.config)
        self._due_ns = 0
        self._sweeping = False
        self.now_ns = 0  # of the last tick
        self.crowded = False  # a load was refused: whatever is unused should go now

    def tick(self, *, now_ns: int) -> None:
        """Begin to unload what has been unused for long enough."""
        self.now_ns = now_ns
        if now_ns < self._due_ns or self._sweeping or not self._unloads:
            return
        self._due_ns = now_ns + _EVERY_NS
        keep_ns = 0 if self.crowded else self._cluster.config.keep_unused_ns
        names = {}
        for name, models in self._by_name.items():
            before_ns = now_ns if name in self._asked else now_ns - keep_ns
            if models and _goes(models[-1], before_ns):
                names[name] = before_ns
            elif not models or models[-1].clients:
                self._asked.pop(name, None)
        self.crowded = self.crowded and bool(names)
        if names:
            self._sweeping = True
            self._cluster.slices.begin(self._sweep(names, now_ns))

    # --------------------------------------------------------------------- a client unloads

    def unload(self, client: Client, message: UnloadModelRequest) -> None:
        """Take `client`'s use of a model away, with `force` every client's, and answer it."""
        operators = self._cluster.config.operators
        names = loaded_under(message.name, self._by_name)
        if not self._unloads:
            config = self._cluster.config
            options = f"--fidelity {config.fidelity} and --placement {config.placement}"
            reason = f"{config.policy} keeps every instance that was loaded, with {options}"
            self._refuse(client, message, reason)
        elif message.force and client.name not in operators:
            named = f"names {', '.join(operators)}" if operators else "names none"
            reason = f"only operators may unload what others use: --operators {named}"
            self._refuse(client, message, reason)
        elif message.name in self._cluster.cascades.by_name:
            spec = self._cluster.cascades.by_name[message.name].spec
            programs = f"{spec.light.model!r} and {spec.heavy.model!r}"
            self._refuse(client, message, f"{spec.name!r} is a cascade: unload {programs}")
        elif not names:
            code, shown = Code.UNKNOWN_MODEL, shown_name(message.name)
            self._refuse(client, message, f"no instance of {shown} is loaded", code)
        else:
            self._cluster.slices.begin(self._give_up(client, message, names))

    def _refuse(
        self,
        client: Client,
        message: UnloadModelRequest,
        reason: str,
        code: Code = Code.INVALID_REQUEST,
    ) -> None:
        reply = UnloadModelReply(message.request_id, code, reason)
        self._cluster.emit(ToClient(client.identity, reply))

    def _give_up(self, client: Client, message: UnloadModelRequest, names: list[str]) -> Work:
        gone = kept = 0
        for name in names:
            yield from self._give_up_one(client, name, force=message.force)
            models = self._by_name.get(name, [])
            last = next((at for at in range(len(models), 0, -1) if models[at - 1].clients), 0)
            gone, kept = gone + len(models) - last, kept + last
            self._asked[name] = None
        if not client.gone:
            reply = UnloadModelReply(message.request_id, Code.OK, unloaded=gone, kept=kept)
            self._cluster.emit(ToClient(client.identity, reply))
        self._due_ns = 0

    def _give_up_one(self, client: Client, name: str, *, force: bool) -> Work:
        users = {client.identity: client}
        for model in list(self._by_name.get(name, ())):
            if force:
                model.taken = True  # else a client that goes on sending would use it again
                users.update((i, user) for i, user in model.clients.items() if user is not None)
            for user in users.values():
                if model.clients.pop(user.identity, None) is not None:
                    user.models.pop(model.model_id, None)
            yield len(users)
        for user in users.values():
            yield from self._end_waiting(user, name)

    def _end_waiting(self, user: Client, name: str) -> Work:
        """Answer the requests of `user` that wait for `name`; what is in flight will be served."""
        for at, request in enumerate(list(user.requests.values())):
            if at % A_PART == 0:
                yield A_PART // 4
            waits = request.state in (RequestState.QUEUED, RequestState.ASIDE)
            if waits and request.instance.name == name:
                self._end_request(request, Code.CANCELLED, f"its model {name!r} was unloaded")
                yield ANSWER

    # ------------------------------------------------------------------------------- sweeps

    def _sweep(self, names: dict[str, int], now_ns: int) -> Work:
        for name, before_ns in names.items():
            yield 1
            models, count = self._by_name.get(name, []), 0
            asked = name in self._asked
            ends = True  # whether `place` is the last that is left
            place = len(models) - 1
            while 0 <= place < len(models) and _goes(models[place], before_ns):
                if self._busy(name) or self._by_name.get(name) is not models:
                    break
                model = models[place]
                if ends and self._is_idle(model):
                    models.pop()
                    self._unload(model)
                    count += 1
                else:
                    ends = False  # once its weights are gone, and those of the others behind it
                    self._evict(model, now_ns)
                place -= 1
                yield 4 + len(self._cluster.workers)
            if not models and self._by_name.get(name) is models:
                self._forget(name)
            if count:
                unused_ns = now_ns - before_ns
                why = "no client uses them, and there are too many"
                if asked:
                    why = "a client asked for it"
                elif unused_ns:
                    why = f"no client has used them for {format_duration(unused_ns)}"
                text = f"{count} instance(s) of {name!r} are unloaded: {why}"
                self._cluster.emit(Note("info", text))
        self._sweeping = False

    def _is_idle(self, model: Instance) -> bool:
        if model.resident_on or model.loading_on:
            return False
        return not any(action.instance is model for action in self._cluster.actions.values())

    def _evict(self, model: Instance, now_ns: int) -> None:
        for gpu in list(model.resident_on.values()):
            if not self._cluster.in_use(gpu, model):
                self._cluster.send_evict(gpu, model, now_ns=now_ns)

    def _unload(self, model: Instance) -> None:
        cluster = self._cluster
        model.state = ModelState.FAILED
        del cluster.models[model.model_id]
        self._ids.retire(model.model_id)
        for worker in cluster.joined():
            if self._has(worker, model):
                unload = UnloadModel(worker.session, cluster.next_action_id(), model.model_id)
                cluster.emit(ToWorker(worker.worker_id, unload))
            for gpu in worker.gpus:
                gpu.load_pauses.clear(model.model_id)
        cluster.changes.unloaded(model)

    def _has(self, worker: Worker, model: Instance) -> bool:
        """Take `model` from what `worker` has. False if it has not."""
        unlike = worker.unlike.get(model.name)
        if unlike is not None and unlike.models and unlike.models[-1] is model:
            unlike.models.pop()
            return True
        return worker.instances.pop(model.model_id, None) is not None

    def _forget(self, name: str) -> None:
        """Its last instance is unloaded: the workers have nothing of it any more."""
        del self._by_name[name]
        self._asked.pop(name, None)
        for worker in self._cluster.joined():
            worker.prepared.pop(name, None)
            worker.unlike.pop(name, None)


def _goes(model: Instance, before_ns: int) -> bool:
    return (
        not model.clients
        and not model.waits
        and model.state is ModelState.LOADED
        and max(model.unused_since_ns, model.last_used_ns) <= before_ns
    )
