"""DIRECT: each request goes straight to the GPU that its number says (reference code, DirectController).

A test of workers and the wire, not a scheduler: worker 0 alone is used; even request ids go to its
second GPU, odd ones to its first (all of them, if it has no other). A request whose weights are not
there has them loaded; every request is an Infer of its own, with ten seconds to start in. Nothing is
batched, refused for lateness or evicted, and a failed action fails its request.

A load is taken to last 7 ms: no Infer starts sooner after its LoadWeights was sent. The published code
sends both at once, and the Infer fails if the load does not end in time. Here an Infer waits until its
weights were reported, since nothing is ever sent to weights that are not there.
"""

from __future__ import annotations

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.queues import append, take_appended
from slosched.core.scheduler.state import ActionState, Gpu, Model, Request
from slosched.units import NS_PER_MS, NS_PER_S

_WORKER = 0
_ASSUMED_LOAD_NS = 7 * NS_PER_MS
_START_WITHIN_NS = 10 * NS_PER_S


class Direct:
    """See the head of this file."""

    replans = False

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        self._cluster = cluster
        self._refusals = refusals
        self._waiting: dict[int, tuple[Request, Gpu]] = {}  # by request key
        self._available_ns: dict[tuple[int, int], int] = {}  # (GPU index, model id)
        self._now_ns = 0

    # -------------------------------------------------------------------------------- facts

    def enqueue(self, request: Request, *, now_ns: int) -> None:
        worker = self._cluster.workers.get(_WORKER)
        gpus = worker.gpus if worker is not None else []
        if not gpus:
            reason = f"DIRECT uses worker {_WORKER} alone, and it is not connected"
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, reason)
            return
        gpu = gpus[1] if request.request_id % 2 == 0 and len(gpus) > 1 else gpus[0]
        model = request.model
        if model.model_id not in gpu.worker.instances:
            reason = f"worker {_WORKER}, which alone DIRECT uses, has not prepared this model"
            self._refusals.refuse(request, Code.COULD_NOT_START_IN_TIME, reason)
            return
        present = model.model_id in gpu.resident or model.model_id in gpu.loading
        if not present and gpu.free_pages < model.pages:
            reason = (
                f"{gpu.name} has {gpu.free_pages} free page(s), the weights take {model.pages}, and "
                "DIRECT evicts nothing"
            )
            self._refusals.refuse(request, Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE, reason)
            return
        if not present:
            self._load(gpu, model, now_ns)
        append(model.queue, request)
        self._waiting[request.key] = (request, gpu)

    def _load(self, gpu: Gpu, model: Model, now_ns: int) -> None:
        start_ns = max(now_ns + gpu.worker.transit.expected_ns, gpu.weights.busy_until_ns)
        latest_ns = now_ns + _START_WITHIN_NS
        self._cluster.send_load(gpu, model, now_ns=now_ns, start_ns=start_ns, latest_ns=latest_ns)
        self._available_ns[gpu.index, model.model_id] = now_ns + _ASSUMED_LOAD_NS

    def forget(self, request: Request) -> None:
        take_appended(request.model.queue, request)
        del self._waiting[request.key]

    def action_done(
        self, action: ActionState, *, code: int, end_ns: int, duration_ns: int, clock_mhz: int
    ) -> None:
        if action.requests or code == Code.OK:
            return
        for request, gpu in list(self._waiting.values()):
            if gpu is action.gpu and request.model is action.model:
                self.forget(request)
                self._refusals.refuse(
                    request, code, f"its weights could not be loaded on {gpu.name}"
                )

    def gpu_added(self, gpu: Gpu) -> None:
        """Nothing is kept per GPU."""

    def gpu_removed(self, gpu: Gpu) -> None:
        for request, its_gpu in list(self._waiting.values()):
            if its_gpu is gpu:
                self.forget(request)
                reason = f"worker {gpu.worker.worker_id} was lost, and DIRECT uses no other"
                self._refusals.refuse(request, Code.CANCELLED, reason)
        for place in [p for p in self._available_ns if p[0] == gpu.index]:
            del self._available_ns[place]

    def model_loaded(self, model: Model, gpus: list[Gpu], *, now_ns: int) -> None:
        """Weights move only by demand."""

    def settled(self, model: Model) -> bool:
        return True

    # ----------------------------------------------------------------------------- decisions

    def plan(self, *, now_ns: int) -> None:
        self._now_ns = now_ns
        for request, gpu in list(self._waiting.values()):
            model = request.model
            if model.model_id not in gpu.resident or self._due_ns(request, gpu) > now_ns:
                continue
            self.forget(request)
            self._cluster.send_infer(
                gpu,
                [request],
                1,
                now_ns=now_ns,
                start_ns=self._cluster.likely_start_ns(gpu, now_ns),
                duration_ns=gpu.exec_table(model).single.expected_ns,
                latest_ns=now_ns + _START_WITHIN_NS,
            )

    def _due_ns(self, request: Request, gpu: Gpu) -> int:
        return self._available_ns.get((gpu.index, request.model.model_id), 0)

    def next_wakeup_ns(self) -> int | None:
        times = (self._due_ns(*waiting) for waiting in self._waiting.values())
        return min((t for t in times if t > self._now_ns), default=None)
