"""ClearCache: every GPU gives up the weights that no inference uses. Answered at once."""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.core.worker.kinds.base import ActionKind, Fault
from slosched.core.worker.state import PendingAction
from slosched.messages import ClearCache, ClearCacheResult


class ClearCacheKind(ActionKind[ClearCache]):
    message = ClearCache
    action_type = ActionType.CLEAR_CACHE

    def check(self, action: PendingAction[ClearCache], frames: tuple[int, ...]) -> Fault | None:
        return None

    def begin(self, action: PendingAction[ClearCache], now_ns: int) -> None:
        ledger, clock = self._ledger, self._clock
        for gpu in ledger.gpus.values():
            for model_id in gpu.cache.model_ids():
                if gpu.cache.resident(model_id) and not gpu.in_use(model_id):
                    ledger.evict(gpu, model_id)
        result = ClearCacheResult(
            session=action.message.session,
            action_id=action.message.action_id,
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
        )
        ledger.answer(action, result)
