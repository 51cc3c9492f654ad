"""UnloadModel: an instance is forgotten, with its weights on every GPU. Answered at once."""

from __future__ import annotations

from slosched.codes import ActionType, Code
from slosched.core.worker.kinds.base import ActionKind, Fault
from slosched.core.worker.state import PendingAction
from slosched.messages import UnloadModel, UnloadModelResult


class UnloadModelKind(ActionKind[UnloadModel]):
    message = UnloadModel
    action_type = ActionType.UNLOAD_MODEL

    def check(self, action: PendingAction[UnloadModel], frames: tuple[int, ...]) -> Fault | None:
        ledger, model_id = self._ledger, action.message.model_id
        instance = ledger.instances.get(model_id)
        if instance is None:
            return Code.UNKNOWN_MODEL, f"model id {model_id} was not loaded"
        if any(other.instance is instance for other in ledger.unanswered.values()):
            return Code.WEIGHTS_IN_USE, f"model id {model_id} has work queued or running"
        return None

    def begin(self, action: PendingAction[UnloadModel], now_ns: int) -> None:
        ledger, model_id = self._ledger, action.message.model_id
        for gpu in ledger.gpus.values():
            if gpu.cache.holds(model_id):
                ledger.evict(gpu, model_id)
        ledger.forget(model_id)
        clock = self._clock
        result = UnloadModelResult(
            session=action.message.session,
            action_id=action.message.action_id,
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
        )
        ledger.answer(action, result)
