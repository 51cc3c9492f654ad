"""Instances that no client uses any more are unloaded after a while, from the workers' host memory, too.

An instance outlives its clients, because loading again costs more than keeping. But clients come and go, with
ever new names and more copies: an instance that no client has used for `keep_unused_ns` goes, and every unused
one at once when a load was refused because there are too many instances (`max_instances`). Copies go from the
last one back, so that those that are left are still the first ones of their name.

First the weights go, by evictions; an instance is unloaded when no action of it is under way anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note, ToWorker
from slosched.core.scheduler.policies import unloads_unused
from slosched.core.scheduler.slices import Work
from slosched.core.scheduler.state import Model, ModelState, Worker
from slosched.messages import UnloadModel
from slosched.units import NS_PER_S, format_duration

_EVERY_NS = NS_PER_S


class Unused:
    """Looks for unused instances once a second. `busy` says whether loads of a name are under way."""

    def __init__(
        self, cluster: Cluster, by_name: dict[str, list[Model]], busy: Callable[[str], bool]
    ) -> None:
        self._cluster, self._by_name, self._busy = cluster, by_name, busy
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
        before_ns = now_ns - keep_ns
        names = [
            n for n, models in self._by_name.items() if models and _goes(models[-1], before_ns)
        ]
        self.crowded = self.crowded and bool(names)
        if names:
            self._sweeping = True
            self._cluster.slices.begin(self._sweep(names, before_ns, now_ns))

    def _sweep(self, names: list[str], before_ns: int, now_ns: int) -> Work:
        for name in names:
            yield 1
            models, count = self._by_name.get(name, []), 0
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
                if unused_ns:
                    why = f"no client has used them for {format_duration(unused_ns)}"
                text = f"{count} instance(s) of {name!r} are unloaded: {why}"
                self._cluster.emit(Note("info", text))
        self._sweeping = False

    def _is_idle(self, model: Model) -> bool:
        if model.resident_on or model.loading_on:
            return False
        return not any(action.model is model for action in self._cluster.actions.values())

    def _evict(self, model: Model, now_ns: int) -> None:
        for gpu in list(model.resident_on.values()):
            if not self._cluster.in_use(gpu, model):
                self._cluster.send_evict(gpu, model, now_ns=now_ns)

    def _unload(self, model: Model) -> None:
        cluster = self._cluster
        model.state = ModelState.FAILED
        del cluster.models[model.model_id]
        for worker in cluster.joined():
            if self._has(worker, model):
                unload = UnloadModel(worker.session, cluster.next_action_id(), model.model_id)
                cluster.emit(ToWorker(worker.worker_id, unload))
            for gpu in worker.gpus:
                gpu.failed_loads.pop(model.model_id, None)
        for callback in cluster.on_unload:
            callback(model)

    def _has(self, worker: Worker, model: Model) -> bool:
        """Take `model` from what `worker` has. False if it has not."""
        unlike = worker.unlike.get(model.name)
        if unlike is not None and unlike.models and unlike.models[-1] is model:
            unlike.models.pop()
            return True
        return worker.instances.pop(model.model_id, None) is not None

    def _forget(self, name: str) -> None:
        """Its last instance is unloaded: the workers have nothing of it any more."""
        del self._by_name[name]
        for worker in self._cluster.joined():
            worker.prepared.pop(name, None)
            worker.unlike.pop(name, None)


def _goes(model: Model, before_ns: int) -> bool:
    return (
        not model.clients
        and not model.queue
        and model.state is ModelState.LOADED
        and max(model.unused_since_ns, model.last_used_ns) <= before_ns
    )
