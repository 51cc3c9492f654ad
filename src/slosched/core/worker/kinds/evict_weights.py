"""EvictWeights: an instance's pages on a GPU become free. Instant, but behind the loads queued before it."""

from __future__ import annotations

from slosched.codes import ActionType, Code
from slosched.core.worker.interface import OpDone
from slosched.core.worker.kinds.base import Acceptance, ActionKind, Fault, peer_span
from slosched.core.worker.lanes import Role
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import PendingAction, Step
from slosched.messages import EvictWeights, EvictWeightsResult, Span


class EvictWeightsKind(ActionKind[EvictWeights]):
    message = EvictWeights
    action_type = ActionType.EVICT_WEIGHTS

    def __init__(self, pipeline: Pipeline, acceptance: Acceptance) -> None:
        super().__init__(pipeline, acceptance)
        self._evict = Step(Role.LOAD, self._start, self._ended)

    def check(self, action: PendingAction[EvictWeights], frames: tuple[int, ...]) -> Fault | None:
        return self._locate(action, action.message, Code.EVICT_WEIGHTS_UNKNOWN_MODEL)

    def begin(self, action: PendingAction[EvictWeights], now_ns: int) -> None:
        assert action.gpu is not None
        self._pipeline.enqueue(action.gpu.lanes[Role.LOAD], action.earliest_ns, action, self._evict)

    def _start(self, action: PendingAction[EvictWeights], now_ns: int) -> None:
        if self._pipeline.late(action, Code.EVICT_WEIGHTS_TOO_LATE, now_ns):
            return
        gpu, instance = action.gpu, action.instance
        assert gpu is not None and instance is not None
        model_id = instance.model_id
        if gpu.in_use(model_id):
            reason = f"model id {model_id} has inferences queued or running on GPU {gpu.gpu_id}"
            self._ledger.fail(action, Code.WEIGHTS_IN_USE, reason, now_ns)
        elif not gpu.cache.holds(model_id):
            reason = f"model id {model_id} has no weights on GPU {gpu.gpu_id}"
            self._ledger.fail(action, Code.EVICT_WEIGHTS_NOT_IN_CACHE, reason, now_ns)
        else:
            self._ledger.evict(gpu, model_id)
            self._answer(action, now_ns)

    def _ended(self, action: PendingAction[EvictWeights], done: OpDone, now_ns: int) -> None:
        raise AssertionError("an eviction launches no op")

    def _answer(self, action: PendingAction[EvictWeights], now_ns: int) -> None:
        clock = self._clock
        result = EvictWeightsResult(
            session=action.message.session,
            action_id=action.message.action_id,
            span=peer_span(clock, Span(now_ns, now_ns, 0)),
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
        )
        self._ledger.answer(action, result)
