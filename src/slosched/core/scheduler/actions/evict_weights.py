"""EvictWeights: give an instance's pages on a GPU back. It takes no time on any lane."""

from __future__ import annotations

from slosched.codes import ActionType, Code
from slosched.core.scheduler.actions.kind import Kind, Outcome
from slosched.core.scheduler.residency import drop_residency
from slosched.core.scheduler.state import ActionState
from slosched.messages import EvictWeights, EvictWeightsResult


class EvictWeightsKind(Kind):
    """The pages are free as soon as it is sent: the load lane keeps the order in which actions were sent."""

    action_type = ActionType.EVICT_WEIGHTS
    result_type = EvictWeightsResult

    def message(self, action: ActionState) -> EvictWeights:
        return EvictWeights(
            session=action.gpu.worker.session,
            action_id=action.action_id,
            model_id=action.instance.model_id,
            gpu_id=action.gpu.gpu_id,
            earliest_ns=0,
            latest_ns=action.latest_ns,
        )

    def reserve(self, action: ActionState) -> None:
        gpu, model = action.gpu, action.instance
        drop_residency(gpu, model)
        gpu.free_pages += model.pages
        gpu.load.outstanding.append(action)  # takes no time: the prediction stays

    def outcome(self, action: ActionState, result: EvictWeightsResult, *, now_ns: int) -> Outcome:
        return Outcome(Code.OK, "", result.span, result)

    def finished(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        action.gpu.load.outstanding.remove(action)

    def failed(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        action.gpu.load.outstanding.remove(action)
