"""The scheduler's hands: every action that is sent, and everything that is learnt from its result.

Policies decide; they do it through the verbs of this class, so that page accounting, predictions,
telemetry and the state of requests are kept in one place whatever the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slosched.codes import ActionType, Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.gpus_by_free_time import GpusByFreeTime
from slosched.core.scheduler.interface import ActionDone, ActionRecord, Effect, ToWorker
from slosched.core.scheduler.paths import Paths
from slosched.core.scheduler.slices import Slices
from slosched.core.scheduler.state import (
    ActionState,
    Executor,
    Gpu,
    Model,
    Request,
    RequestState,
    Worker,
    WorkerState,
)
from slosched.messages import (
    NO_SPAN,
    ErrorResult,
    EvictWeights,
    EvictWeightsResult,
    Infer,
    InferResult,
    LoadWeights,
    LoadWeightsResult,
    Span,
)
from slosched.units import tensor_bytes

ActionResult = ErrorResult | InferResult | LoadWeightsResult | EvictWeightsResult

#: An action is overdue when it takes longer than expected by this part of it.
OVERDUE_SHARE = 8
#: Evictions have no deadline.
_NEVER_NS = 2**62
#: Of an Infer: its worker has no weights of the instance any more.
_WEIGHTS_GONE = (Code.EXEC_WEIGHTS_MISSING, Code.MODEL_PROCESS_ENDED)


class Cluster:
    """Workers, GPUs and models, and the actions that are under way on them."""

    def __init__(self, config: SchedulerConfig, *, emit: Callable[[Effect], None]) -> None:
        self.config = config
        self.emit = emit
        self.slices = Slices()  # long work, of policies too
        self.workers: dict[int, Worker] = {}
        self.gpus: dict[int, Gpu] = {}  # by index; only those of joined workers
        self.models: dict[int, Model] = {}
        self.actions: dict[int, ActionState] = {}
        #: Models that the policy itself has loaded, whoever else asks for them: name -> copies.
        self.own_models: dict[str, int] = {}
        #: Models that a joined worker put aside and none offers: name -> words for a client (sessions.py).
        self.put_aside: dict[str, str] = {}
        #: GPUs of joined workers, the one that is free soonest first.
        self.free_order = GpusByFreeTime()
        self.paths = Paths(self.workers)
        #: Change feeds. When a GPU's outstanding execs or resident weights change, or it joins or leaves, it is
        #: added to every dict in this list, keyed by GPU index. Consumers drain their own.
        self.news: list[dict[int, Gpu]] = []
        #: Callbacks that run for each GPU on which loads began or ended, or that joined or left.
        self.on_load: list[Callable[[Gpu], None]] = []
        #: Callbacks that run for each instance that is unloaded.
        self.on_unload: list[Callable[[Model], object]] = []
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
        if not outstanding:
            return True
        late_ns = now_ns - gpu.exec.busy_until_ns - gpu.worker.returns.margin_ns
        return late_ns <= outstanding[0].expected_duration_ns // OVERDUE_SHARE

    def _loads_changed(self, gpu: Gpu) -> None:
        for told in self.on_load:
            told(gpu)

    def _load_ended(self, action: ActionState, *, end_ns: int) -> None:
        gpu, model = action.gpu, action.model
        gpu.weights.finish(action, end_ns=end_ns)
        gpu.loading.pop(model.model_id, None)
        model.loading_on.pop(gpu.index, None)
        self._loads_changed(gpu)

    def reopen(self, gpu: Gpu) -> None:
        """Whether `gpu` may be given work has changed (`held`)."""
        if gpu.index in self.gpus:
            self._changed(gpu)

    def _changed(self, gpu: Gpu) -> None:
        self.free_order.move(gpu)
        for news in self.news:
            news[gpu.index] = gpu

    def joined(self) -> list[Worker]:
        """Workers with a session, in the order of their numbers."""
        return [w for w in self.workers.values() if w.state is WorkerState.JOINED]

    def action_of(
        self, worker: Worker, action_id: int, kind: ActionType | None = None
    ) -> ActionState | None:
        """The outstanding action of that number, if it is `worker`'s (and of `kind`)."""
        action = self.actions.get(action_id)
        if action is None or action.gpu.worker is not worker:
            return None
        return action if kind is None or action.action_type is kind else None

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
        model: Model | None = None,
    ) -> ActionState:
        """Commit `requests` (one model, all QUEUED) to one action of `batch_class` on `gpu`.

        Without requests it serves nobody: `model` says what runs, and the worker makes up the inputs
        (a policy's own load; the worker must allow inputs of zero bytes).
        """
        model = model or requests[0].model
        action = self._new_action(
            ActionType.INFER,
            gpu,
            model,
            tuple(requests),
            batch_class,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=duration_ns,
            latest_ns=latest_ns,
        )
        estimator = gpu.tables[model.name].estimators.get(batch_class)
        if estimator is not None:
            # No more than makes it overdue: a stall is for the worker's refusals and replanning.
            spread_ns = estimator.margin_ns - estimator.expected_ns
            action.spread_ns = min(spread_ns, duration_ns // OVERDUE_SHARE)
        keys, sizes, made_up = [], [], -1
        for request in requests:
            request.move(RequestState.IN_FLIGHT)
            request.attempts += 1
            keys.append(request.key)
            if request.input_bytes:
                sizes.append(request.input_bytes)
            else:
                made_up = self._generated_bytes(model) if made_up < 0 else made_up
                sizes.append(made_up)
        # Most recently used last: what stands first is the first to be evicted.
        gpu.resident.pop(model.model_id, None)
        gpu.resident[model.model_id] = model
        model.last_used_ns = now_ns
        gpu.exec.add(action)
        self._changed(gpu)
        self.emit(
            ToWorker(
                gpu.worker.worker_id,
                Infer(
                    session=gpu.worker.session,
                    action_id=action.action_id,
                    model_id=model.model_id,
                    gpu_id=gpu.gpu_id,
                    earliest_ns=now_ns,
                    latest_ns=latest_ns,
                    expected_duration_ns=duration_ns,
                    batch_size=batch_class,
                    request_count=len(requests) or batch_class,
                    input_sizes=tuple(sizes),
                ),
                tuple(keys),
            )
        )
        return action

    def _generated_bytes(self, model: Model) -> int:
        """Size of the input that the controller makes up, if it was told to (Clockwork, INFER5)."""
        if not self.config.generate_inputs or model.result is None:
            return 0
        return tensor_bytes(model.result.input_shape, model.result.input_dtype)

    def send_load(
        self, gpu: Gpu, model: Model, *, now_ns: int, start_ns: int, latest_ns: int
    ) -> ActionState:
        """Start to copy `model`'s weights to `gpu`. The pages must be free."""
        assert gpu.free_pages >= model.pages, "a load needs free pages; evict first"
        duration_ns = gpu.transfer(model).expected_ns
        action = self._new_action(
            ActionType.LOAD_WEIGHTS,
            gpu,
            model,
            (),
            1,
            now_ns=now_ns,
            start_ns=start_ns,
            duration_ns=duration_ns,
            latest_ns=latest_ns,
        )
        gpu.free_pages -= model.pages
        gpu.loading[model.model_id] = model
        model.loading_on[gpu.index] = gpu
        gpu.weights.add(action)
        self._loads_changed(gpu)
        self.emit(
            ToWorker(
                gpu.worker.worker_id,
                LoadWeights(
                    session=gpu.worker.session,
                    action_id=action.action_id,
                    model_id=model.model_id,
                    gpu_id=gpu.gpu_id,
                    earliest_ns=now_ns,
                    latest_ns=latest_ns,
                    expected_duration_ns=duration_ns,
                ),
            )
        )
        return action

    def send_evict(self, gpu: Gpu, model: Model, *, now_ns: int) -> ActionState:
        """Give `model`'s pages on `gpu` back. No Infer of it may be outstanding there."""
        action = self._new_action(
            ActionType.EVICT_WEIGHTS,
            gpu,
            model,
            (),
            1,
            now_ns=now_ns,
            start_ns=now_ns,
            duration_ns=0,
            latest_ns=_NEVER_NS,
        )
        self._drop_residency(gpu, model)
        gpu.free_pages += model.pages
        gpu.weights.outstanding.append(action)  # takes no time: the prediction stays
        self.emit(
            ToWorker(
                gpu.worker.worker_id,
                EvictWeights(
                    session=gpu.worker.session,
                    action_id=action.action_id,
                    model_id=model.model_id,
                    gpu_id=gpu.gpu_id,
                    earliest_ns=0,
                    latest_ns=_NEVER_NS,
                ),
            )
        )
        return action

    def _new_action(
        self,
        kind: ActionType,
        gpu: Gpu,
        model: Model,
        requests: tuple[Request, ...],
        batch_class: int,
        *,
        now_ns: int,
        start_ns: int,
        duration_ns: int,
        latest_ns: int,
    ) -> ActionState:
        action = ActionState(
            self.next_action_id(), kind, gpu, model, requests, batch_class, now_ns,
            now_ns + gpu.worker.transit.expected_ns,  # reaches the worker
            start_ns, duration_ns, latest_ns, len(model.queue),
        )  # fmt: skip
        self.actions[action.action_id] = action
        return action

    # --------------------------------------------------------------------------- results

    def in_use(self, gpu: Gpu, model: Model) -> bool:
        """True if an Infer of `model` is outstanding on `gpu`."""
        return any(a.model is model for a in gpu.exec.outstanding)

    def add_residency(self, gpu: Gpu, model: Model) -> None:
        gpu.resident[model.model_id] = model
        model.resident_on[gpu.index] = gpu
        self._changed(gpu)

    def _drop_residency(self, gpu: Gpu, model: Model) -> None:
        gpu.resident.pop(model.model_id, None)
        model.resident_on.pop(gpu.index, None)

    def infer_finished(self, action: ActionState, result: InferResult, *, now_ns: int) -> None:
        """Correct the GPU's prediction and the estimators; the caller answers the requests."""
        gpu = action.gpu
        del self.actions[action.action_id]
        self._exec_ended(action, end_ns=result.exec.end_ns)
        gpu.busy_ns += result.exec.duration_ns
        gpu.clock_mhz = result.gpu_clock_mhz
        gpu.tables[action.model.name].estimators[action.batch_class].add(result.exec.duration_ns)
        # Loads come in bursts and wait behind one another on the wire: they would teach the wrong lesson.
        self.paths.learn(
            gpu.worker,
            there_ns=result.received_ns - action.sent_ns,
            back_ns=now_ns - result.exec.end_ns,
        )

    def _exec_ended(self, action: ActionState, *, end_ns: int) -> None:
        action.gpu.exec.finish(action, end_ns=end_ns)
        self._changed(action.gpu)

    def load_finished(self, action: ActionState, result: LoadWeightsResult, *, now_ns: int) -> None:
        gpu, model = action.gpu, action.model
        del self.actions[action.action_id]
        self._load_ended(action, end_ns=result.span.end_ns)
        gpu.transfer(model).add(result.span.duration_ns)
        gpu.failed_loads.pop(model.model_id, None)
        self.add_residency(gpu, model)
        self._log(action, Code.OK, now_ns, result.span, result, goodput_ns=result.span.duration_ns)

    def evict_finished(
        self, action: ActionState, result: EvictWeightsResult, *, now_ns: int
    ) -> None:
        del self.actions[action.action_id]
        action.gpu.weights.outstanding.remove(action)
        self._log(action, Code.OK, now_ns, result.span, result)

    def failed(
        self, action: ActionState, code: int, *, now_ns: int, result: ErrorResult | None
    ) -> None:
        """The action did not happen: give its pages and its place on the GPU back."""
        gpu, model = action.gpu, action.model
        del self.actions[action.action_id]
        if action.action_type is ActionType.INFER:
            self._exec_ended(action, end_ns=now_ns)
            if code in _WEIGHTS_GONE and model.model_id in gpu.resident:
                # The worker does not have what we thought it had: our pages go back to free.
                self._drop_residency(gpu, model)
                gpu.free_pages += model.pages
        elif action.action_type is ActionType.LOAD_WEIGHTS:
            self._load_ended(action, end_ns=now_ns)
            gpu.free_pages += model.pages
            gpu.load_failed(model, now_ns=now_ns)
        else:
            gpu.weights.outstanding.remove(action)
        self._log(action, code, now_ns, NO_SPAN, result)

    def answered(self, action: ActionState, result: InferResult, *, now_ns: int, met: int) -> None:
        """The requests of a finished Infer were answered, `met` of them in time: log it."""
        goodput_ns = result.exec.duration_ns * met // max(1, len(action.requests))
        self._log(action, Code.OK, now_ns, result.exec, result, goodput_ns=goodput_ns)

    def _log(
        self,
        action: ActionState,
        code: int,
        now_ns: int,
        span: Span,
        result: ActionResult | None,
        *,
        goodput_ns: int = 0,
    ) -> None:
        infer = result if isinstance(result, InferResult) else None
        self.emit(
            ActionDone(
                ActionRecord(
                    action_id=action.action_id,
                    action_type=action.action_type,
                    code=code,
                    worker_id=action.gpu.worker.worker_id,
                    gpu_id=action.gpu.gpu_id,
                    model_id=action.model.model_id,
                    batch_size=len(action.requests) or 1,
                    sent_ns=action.sent_ns,
                    expected_duration_ns=action.expected_duration_ns,
                    expected_start_ns=action.expected_start_ns,
                    expected_complete_ns=action.expected_end_ns,
                    result_received_ns=now_ns,
                    processed_ns=now_ns,
                    requests_queued=action.requests_queued,
                    copies_loaded=action.copies_loaded,
                    goodput_ns=goodput_ns,
                    exec=span,
                    copy_output_end_ns=infer.copy_output.end_ns if infer else 0,
                    worker_received_ns=result.received_ns if result else 0,
                    worker_sent_ns=result.sent_ns if result else 0,
                    gpu_clock_expected_mhz=action.gpu.clock_mhz,
                    gpu_clock_before_mhz=infer.gpu_clock_before_mhz if infer else 0,
                    gpu_clock_mhz=infer.gpu_clock_mhz if infer else 0,
                )
            )
        )

    # ------------------------------------------------------------------- coming and going

    def add_gpu(self, gpu: Gpu) -> None:
        """Take a GPU of a worker that joined into use."""
        self.gpus[gpu.index] = gpu
        self.free_order.add(gpu)
        self.paths.workers_changed()
        self._changed(gpu)
        self._loads_changed(gpu)

    def remove_gpu(self, gpu: Gpu) -> list[ActionState]:
        """Forget a GPU whose worker was lost; returns its outstanding actions, already logged."""
        lost: list[ActionState] = []
        for executor in (gpu.exec, gpu.weights):
            lost.extend(_drain(executor))
        self.gpus.pop(gpu.index, None)
        self.free_order.remove(gpu)
        self.paths.workers_changed()
        self._changed(gpu)
        for model in list(gpu.resident.values()):
            self._drop_residency(gpu, model)
        for model in gpu.loading.values():
            model.loading_on.pop(gpu.index, None)
        gpu.loading.clear()
        self._loads_changed(gpu)
        for action in lost:
            self.actions.pop(action.action_id, None)
        return lost

    def log_lost(self, action: ActionState, *, now_ns: int) -> None:
        self._log(action, Code.CANCELLED, now_ns, NO_SPAN, None)


def _drain(executor: Executor) -> list[ActionState]:
    drained = list(executor.outstanding)
    executor.outstanding.clear()
    return drained
