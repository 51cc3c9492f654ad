"""Whether a controller uses what its workers hold: held against the workers themselves, and not their reports.

- No weights are loaded onto a GPU that holds them, and no instance is prepared where it is prepared: after a
  restart of the controller in the same cluster, after a loss, and at any other time.
- When all is quiet, controller and worker agree about the weights on each GPU and its free pages.
"""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.state import Gpu, WorkerState
from slosched.messages import ControllerToWorker, LoadModel, LoadWeights, UnloadModel
from slosched.sim.cluster import SimCluster
from slosched.sim.node import WorkerNode


class TakeOverTruth:
    """Watches what the controllers of `cluster` send. Without `keeps_models` each session begins empty."""

    def __init__(self, cluster: SimCluster, *, keeps_models: bool) -> None:
        self._cluster, self._keeps_models = cluster, keeps_models
        #: By worker: the session, and the instances that are unloaded in it.
        self._unloaded: dict[int, tuple[int, set[int]]] = {}
        cluster.controller.on_action_sent = self._sent

    def _sent(self, worker_id: int, message: ControllerToWorker) -> None:
        worker = self._cluster.workers[worker_id]
        node = worker.node
        if not isinstance(message, LoadModel | LoadWeights | UnloadModel):
            return
        session, unloaded = self._unloaded.get(worker_id, (-1, set()))
        if session != message.session:
            unloaded = set()
            self._unloaded[worker_id] = message.session, unloaded
        if isinstance(message, UnloadModel):
            unloaded.add(message.model_id)
        elif node is None or node.brain.session != message.session or worker.leaves:
            return  # it will not be taken
        elif isinstance(message, LoadWeights):
            self._check_load(node, worker_id, message)
        elif self._keeps_models:
            ids = set(range(message.model_id, message.model_id + message.copies))
            again = sorted(ids & set(node.brain.model_ids) - unloaded)
            if again:
                raise InvariantViolated(
                    f"worker {worker_id} is to prepare models {again[:10]}, which it holds"
                )
            unloaded -= ids

    def _check_load(self, node: WorkerNode, worker_id: int, message: LoadWeights) -> None:
        model_id, gpu_id = message.model_id, message.gpu_id
        if model_id not in _resident(node, gpu_id):
            return
        for action in self._cluster.controller.scheduler.cluster.actions.values():
            gpu, evicts = action.gpu, action.action_type is ActionType.EVICT_WEIGHTS
            is_this_gpu = gpu.worker.worker_id == worker_id and gpu.gpu_id == gpu_id
            if is_this_gpu and evicts and action.instance.model_id == model_id:
                return  # it is being evicted
        raise InvariantViolated(
            f"worker {worker_id} is to load weights of model {model_id} onto GPU {gpu_id}, which holds them"
        )

    def check_agreement(self, *, weights_may_be_lost: bool) -> None:
        """Nothing is under way. Raises InvariantViolated if controller and workers disagree.

        `weights_may_be_lost`: processes of models ended, and only the next Infer shows that to the controller.
        """
        for worker in self._cluster.controller.scheduler.cluster.workers.values():
            node = self._cluster.workers[worker.worker_id].node
            if worker.state is not WorkerState.JOINED or node is None:
                continue
            for gpu in worker.gpus:
                if not gpu.loading and not gpu.load.outstanding:
                    _compare(gpu, node, weights_may_be_lost)


def _compare(gpu: Gpu, node: WorkerNode, weights_may_be_lost: bool) -> None:
    if gpu.brought:
        raise InvariantViolated(f"{gpu.name}: weights of {list(gpu.brought)} are not looked at")
    there, known = _resident(node, gpu.gpu_id), set(gpu.resident)
    if not (there <= known if weights_may_be_lost else there == known):
        raise InvariantViolated(f"{gpu.name} holds {sorted(there)}, the books say {sorted(known)}")
    free_pages = node.brain.free_pages(gpu.gpu_id)
    if free_pages != gpu.free_pages and there == known:
        raise InvariantViolated(
            f"{gpu.name} has {free_pages} free pages, the books {gpu.free_pages}"
        )


def _resident(node: WorkerNode, gpu_id: int) -> set[int]:
    """The instances that hold pages there; one that is loading does."""
    return {
        i for report in node.brain.gpu_reports() if report.gpu_id == gpu_id for i in report.resident
    }
