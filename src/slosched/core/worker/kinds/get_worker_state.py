"""GetWorkerState: which instances the worker knows, and which weights its GPUs hold. Answered at once."""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.core.worker.kinds.base import ActionKind, Fault
from slosched.core.worker.state import PendingAction
from slosched.messages import GetWorkerState, WorkerStateResult


class GetWorkerStateKind(ActionKind[GetWorkerState]):
    message = GetWorkerState
    action_type = ActionType.GET_WORKER_STATE

    def check(self, action: PendingAction[GetWorkerState], frames: tuple[int, ...]) -> Fault | None:
        return None

    def begin(self, action: PendingAction[GetWorkerState], now_ns: int) -> None:
        ledger, clock = self._ledger, self._clock
        result = WorkerStateResult(
            session=action.message.session,
            action_id=action.message.action_id,
            gpus=tuple(gpu.report() for gpu in ledger.gpus.values()),
            models=tuple((i.model_id, i.name) for i in ledger.instances.values()),
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
        )
        ledger.answer(action, result)
