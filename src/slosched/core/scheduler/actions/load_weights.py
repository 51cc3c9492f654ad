"""LoadWeights: copy an instance's weights from host memory into pages of a GPU, on its load lane."""

from __future__ import annotations

import msgspec

from slosched.codes import ActionType, Code
from slosched.core.scheduler.actions.kind import Kind, Outcome
from slosched.core.scheduler.residency import add_residency
from slosched.core.scheduler.state import ActionState
from slosched.core.scheduler.validation import plausible
from slosched.messages import LoadWeights, LoadWeightsResult


class LoadWeightsKind(Kind):
    """Takes the load lane and the instance's pages; teaches the time of a load."""

    action_type = ActionType.LOAD_WEIGHTS
    result_type = LoadWeightsResult

    def message(self, action: ActionState) -> LoadWeights:
        return LoadWeights(
            session=action.gpu.worker.session,
            action_id=action.action_id,
            model_id=action.instance.model_id,
            gpu_id=action.gpu.gpu_id,
            earliest_ns=action.sent_ns,
            latest_ns=action.latest_ns,
            expected_duration_ns=action.expected_duration_ns,
        )

    def reserve(self, action: ActionState) -> None:
        gpu, model = action.gpu, action.instance
        assert gpu.free_pages >= model.pages, "a load needs free pages; evict first"
        gpu.free_pages -= model.pages
        gpu.loading[model.model_id] = model
        model.loading_on[gpu.index] = gpu
        gpu.load.add(action)
        self._changes.loads(gpu)

    def outcome(self, action: ActionState, result: LoadWeightsResult, *, now_ns: int) -> Outcome:
        span = plausible(result.span, sent_ns=action.sent_ns, now_ns=now_ns)
        if span is not result.span:
            result = msgspec.structs.replace(result, span=span)
        return Outcome(Code.OK, "", span, result)

    def finished(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        gpu, model = action.gpu, action.instance
        self._ended(action, end_ns=outcome.span.end_ns)
        gpu.transfer(model).add(outcome.span.duration_ns)
        gpu.load_pauses.clear(model.model_id)
        if not gpu.retired:
            add_residency(gpu, model)
        self._changes.execs(gpu)

    def failed(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        gpu, model = action.gpu, action.instance
        self._ended(action, end_ns=now_ns)
        gpu.free_pages += model.pages
        gpu.load_pauses.failed(model.model_id, now_ns=now_ns)

    def _ended(self, action: ActionState, *, end_ns: int) -> None:
        gpu, model = action.gpu, action.instance
        gpu.load.finish(action, end_ns=end_ns)
        gpu.loading.pop(model.model_id, None)
        model.loading_on.pop(gpu.index, None)
        self._changes.loads(gpu)

    def goodput_ns(self, action: ActionState, outcome: Outcome, met: int) -> int:
        return outcome.span.duration_ns
