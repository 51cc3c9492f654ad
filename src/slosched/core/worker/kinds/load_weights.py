"""LoadWeights: an instance's weights into free pages of a GPU."""

from __future__ import annotations

from slosched.codes import ActionType, Code
from slosched.core.worker.interface import EvictPages, Op, OpDone, OpKind
from slosched.core.worker.kinds.base import Acceptance, ActionKind, Fault, peer_span
from slosched.core.worker.lanes import Role
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import PendingAction, Step
from slosched.messages import LoadWeights, LoadWeightsResult


class LoadWeightsKind(ActionKind[LoadWeights]):
    message = LoadWeights
    action_type = ActionType.LOAD_WEIGHTS

    def __init__(self, pipeline: Pipeline, acceptance: Acceptance) -> None:
        super().__init__(pipeline, acceptance)
        self._load = Step(Role.LOAD, self._start, self._ended)

    def check(self, action: PendingAction[LoadWeights], frames: tuple[int, ...]) -> Fault | None:
        return self._locate(action, action.message, Code.LOAD_WEIGHTS_UNKNOWN_MODEL)

    def begin(self, action: PendingAction[LoadWeights], now_ns: int) -> None:
        assert action.gpu is not None
        self._pipeline.enqueue(action.gpu.lanes[Role.LOAD], action.earliest_ns, action, self._load)

    def _start(self, action: PendingAction[LoadWeights], now_ns: int) -> None:
        if self._pipeline.late(action, Code.LOAD_WEIGHTS_TOO_LATE, now_ns):
            return
        gpu, instance = action.gpu, action.instance
        assert gpu is not None and instance is not None
        model_id, cache = instance.model_id, gpu.cache
        if cache.holds(model_id):  # a reload: the old pages go first (Clockwork)
            self._ledger.evict(gpu, model_id)
        pages = instance.pages[gpu.gpu_id]
        version = cache.begin_load(model_id, pages)
        if version is None:
            reason = (
                f"the weights take {pages} page(s), {cache.free_pages} of {cache.pages} are "
                f"free on GPU {gpu.gpu_id}: evict first"
            )
            self._ledger.fail(action, Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE, reason, now_ns)
            return
        action.weights_version = version
        op = Op(
            op_id=self._ledger.next_seq(),
            kind=OpKind.LOAD_WEIGHTS,
            gpu_id=gpu.gpu_id,
            model_id=model_id,
            action_id=action.key,
            model_name=instance.name,
            earliest_ns=action.earliest_ns,
            latest_ns=action.latest_ns,
        )
        self._pipeline.launch(gpu.lanes[Role.LOAD], action, op)

    def _ended(self, action: PendingAction[LoadWeights], done: OpDone, now_ns: int) -> None:
        gpu, instance = action.gpu, action.instance
        assert gpu is not None and instance is not None
        model_id = instance.model_id
        if done.code:
            gpu.cache.fail_load(model_id, action.weights_version)
            self._ledger.effects.append(EvictPages(gpu.gpu_id, model_id))
            self._ledger.fail(action, done.code, done.reason, now_ns)
        elif gpu.cache.finish_load(model_id, action.weights_version):
            self._answer(action, done, now_ns)
        else:
            reason = f"the weights of model id {model_id} were changed while they were loading"
            self._ledger.fail(action, Code.LOAD_WEIGHTS_CONCURRENT_MODIFICATION, reason, now_ns)

    def _answer(self, action: PendingAction[LoadWeights], done: OpDone, now_ns: int) -> None:
        clock = self._clock
        result = LoadWeightsResult(
            session=action.message.session,
            action_id=action.message.action_id,
            span=peer_span(clock, done.span),
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
        )
        self._ledger.answer(action, result)
