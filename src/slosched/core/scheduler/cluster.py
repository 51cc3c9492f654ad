"""The cluster: workers, GPUs and models, the predictions for them, and the actions that are under way.

Policies decide, and act through the verbs of this class (`send_*`). What an action takes, and what its end
gives back, is up to its kind (actions/); action_ends.py carries each end to the policy and the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slosched.codes import ActionType
from slosched.config import SchedulerConfig
from slosched.core.scheduler.actions import make_kinds
from slosched.core.scheduler.actions.infer import OVERDUE_SHARE, inputs_of
from slosched.core.scheduler.actions.kind import Outcome
from slosched.core.scheduler.cascades import Cascades
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.gpus_by_free_time import GpusByFreeTime
from slosched.core.scheduler.interface import ActionDone, Effect, ToWorker
from slosched.core.scheduler.near_places import NearPlaces
from slosched.core.scheduler.paths import Paths
from slosched.core.scheduler.residency import drop_residency
from slosched.core.scheduler.slices import Slices
from slosched.core.scheduler.state import (
    ActionState,
    Gpu,
    Instance,
    Queue,
    Request,
    Worker,
    WorkerState,
)

#: Evictions have no deadline.
_NEVER_NS = 2**62


class Cluster:
    """Workers, GPUs and models, and the actions that are under way on them."""

    def __init__(self, config: SchedulerConfig, *, emit: Callable[[Effect], None]) -> None:
        self.config = config
        self.slices = Slices()  # long work, of policies too
        self.changes = Changes()
        self.workers: dict[int, Worker] = {}
        self.gpus: dict[int, Gpu] = {}  # by index; only those of joined workers
        self.hosts = 0  # number of these that are slots of a host
        self.models: dict[int, Instance] = {}
        self.cascades = Cascades(config.cascades, config.cascade)
        self.emit = self.cascades.naming(emit)
        self.actions: dict[int, ActionState] = {}
        self.near = NearPlaces()
        #: Models that the policy itself has loaded, besides those of clients: name -> copies.
        self.own_models: dict[str, int] = {}
        self.serves_functions = False  # the policy does
        #: Models that a joined worker put aside and none offers: name -> words for a client (sessions.py).
        self.put_aside: dict[str, str] = {}
        #: GPUs of joined workers, the one that is free soonest first.
        self.free_order = GpusByFreeTime(self.gpus, self.changes)
        self.paths = Paths(self.workers, self.changes)
        self.kinds = make_kinds(self.config, self.changes, self.paths)
        self._next_action_id = 1

    # ----------------------------------------------------------------------- predictions

    def earliest_start_ns(self, gpu: Gpu, now_ns: int) -> int:
        """When an Infer decided now can be promised to start on `gpu`."""
        return max(now_ns + gpu.worker.transit.margin_ns, gpu.exec.busy_until_ns)

    def likely_start_ns(self, gpu: Gpu, now_ns: int) -> int:
        """When an Infer decided now will start on `gpu` as often as not."""
        return max(now_ns + gpu.worker.transit.expected_ns, gpu.exec.busy_until_ns)

    def reports(self, gpu: Gpu, now_ns: int) -> bool:
        """False if an exec's report is later than nine in ten are: send nothing more until it comes."""
        outstanding = gpu.exec.outstanding
        if len(outstanding) < gpu.exec.width:
            return True
        late_ns = now_ns - gpu.exec.busy_until_ns - gpu.worker.returns.margin_ns
        return late_ns <= outstanding[0].expected_duration_ns // OVERDUE_SHARE

    def reopen(self, gpu: Gpu) -> None:
        """Whether `gpu` may be given work has changed (`held`)."""
        if gpu.index in self.gpus:
            self.changes.execs(gpu)

    def joined(self) -> list[Worker]:
        """Workers with a session, in the order of their numbers."""
        return [w for w in self.workers.values() if w.state is WorkerState.JOINED]

    def present(self) -> list[Worker]:
        """Workers that have not left, in the order of their numbers."""
        return [w for w in self.workers.values() if w.state is not WorkerState.LEFT]

    def serving(self) -> list[Worker]:
        """Joined workers with GPUs in use; one beyond `max_gpus` has none, and one that drains gives its up."""
        return [worker for worker in self.joined() if worker.gpus and not worker.retired]

    def is_function(self, name: str) -> bool:
        """Whether a joined worker offers a function of this name."""
        return any(name in worker.functions for worker in self.workers.values())

    def next_action_id(self) -> int:
        action_id = self._next_action_id
        self._next_action_id += 1
        return action_id

    # --------------------------------------------------------------------------- actions

    def send_infer(
        self,
        gpu: Gpu,
        requests: Sequence[Request],
        batch_class: int,
        *,
        now_ns: int,
        start_ns: int,
        duration_ns: int,
        latest_ns: int,
        queue: Queue | None = None,
        priority: int = 0,
    ) -> ActionState:
        """Commit `requests` (all QUEUED) to one action of `batch_class` on `gpu`.

        They are of one queue; `queue` says what runs if they are of several length classes of an instance, and
        where there are none: then it serves no client, and the worker makes up the inputs (a policy's own
        load; the worker must allow inputs of zero bytes). With a `priority` above 0 it interrupts what runs.
        A request for a function goes alone, as a Call.
        """
        queue = queue or requests[0].queue
        action_type = ActionType.INFER
        if queue.instance.function is not None:
            action_type = ActionType.CALL
            self.near.sent(requests[0], gpu.worker.worker_id)
        return self._send(
            ActionState(
                action_id=self.next_action_id(),
                action_type=action_type,
                gpu=gpu,
                instance=queue.instance,
                queue=queue,
                requests=tuple(requests),
                batch_class=batch_class,
                sent_ns=now_ns,
                expected_start_ns=start_ns,
                expected_duration_ns=duration_ns,
                latest_ns=latest_ns,
                priority=priority,
            )
        )

    def send_load(
        self, gpu: Gpu, model: Instance, *, now_ns: int, start_ns: int, latest_ns: int
    ) -> ActionState:
        """Start to copy `model`'s weights to `gpu`. The pages must be free."""
        return self._send(
            ActionState(
                action_id=self.next_action_id(),
                action_type=ActionType.LOAD_WEIGHTS,
                gpu=gpu,
                instance=model,
                sent_ns=now_ns,
                expected_start_ns=start_ns,
                expected_duration_ns=gpu.transfer(model).expected_ns,
                latest_ns=latest_ns,
            )
        )

    def send_evict(self, gpu: Gpu, model: Instance, *, now_ns: int) -> ActionState:
        """Give `model`'s pages on `gpu` back. No Infer of it may be outstanding there."""
        return self._send(
            ActionState(
                action_id=self.next_action_id(),
                action_type=ActionType.EVICT_WEIGHTS,
                gpu=gpu,
                instance=model,
                sent_ns=now_ns,
                expected_start_ns=now_ns,
                expected_duration_ns=0,
                latest_ns=_NEVER_NS,
            )
        )

    def _send(self, action: ActionState) -> ActionState:
        """Put it on the books and on the wire."""
        kind = self.kinds[action.action_type]
        self.actions[action.action_id] = action
        kind.reserve(action)
        worker_id, message = action.gpu.worker.worker_id, kind.message(action)
        if action.requests:
            keys = tuple([request.key for request in action.requests])
            self.emit(ToWorker(worker_id, message, keys, inputs_of(action.requests)))
        else:
            self.emit(ToWorker(worker_id, message))
        return action

    def record(self, action: ActionState, outcome: Outcome, *, now_ns: int, met: int = 0) -> None:
        """Have telemetry write of an action that has ended; `met` of its requests were in time."""
        kind = self.kinds[action.action_type]
        self.emit(ActionDone(kind.record(action, outcome, met, now_ns)))

    def in_use(self, gpu: Gpu, model: Instance) -> bool:
        """True if an Infer or a call of `model` is outstanding on `gpu`."""
        if gpu.suspended and any(a.instance is model for a in gpu.suspended.values()):
            return True
        return any(a.instance is model for a in gpu.exec.outstanding)

    # ------------------------------------------------------------------- coming and going

    def add_gpu(self, gpu: Gpu) -> None:
        """Take a GPU of a worker that joined into use."""
        self.gpus[gpu.index] = gpu
        self.hosts += gpu.host
        self._came_or_went(gpu)

    def remove_gpu(self, gpu: Gpu) -> list[ActionState]:
        """Forget a GPU whose worker was lost; returns the actions that were outstanding there."""
        lost = [*gpu.exec.drain(), *gpu.load.drain(), *gpu.suspended.values()]
        gpu.suspended.clear()
        gpu.prepare.drain()
        for action in lost:
            self.actions.pop(action.action_id, None)
        if not gpu.retired:
            self._take_off(gpu)
        return lost

    def retire_gpu(self, gpu: Gpu) -> None:
        """Take a GPU off the books: nothing new is sent there. What is outstanding will be reported."""
        gpu.retired = True
        self._take_off(gpu)

    def _take_off(self, gpu: Gpu) -> None:
        self.hosts -= self.gpus.pop(gpu.index).host
        for model in list(gpu.resident.values()):
            drop_residency(gpu, model)
        for model in gpu.loading.values():
            model.loading_on.pop(gpu.index, None)
        gpu.loading.clear()
        self._came_or_went(gpu)

    def _came_or_went(self, gpu: Gpu) -> None:
        self.paths.workers_changed()
        self.changes.execs(gpu)
        self.changes.loads(gpu)
