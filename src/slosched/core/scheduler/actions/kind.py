"""What a kind of action is on the controller's side: its message, what it takes, how it ends, its record.

The end itself, which is the same for every kind, is in action_ends.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from slosched.codes import ActionType, Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.interface import ActionRecord
from slosched.core.scheduler.paths import Paths
from slosched.core.scheduler.state import ActionState
from slosched.messages import NO_SPAN, ControllerToWorker, ErrorResult, Span


class Outcome(NamedTuple):
    """How an action ended. `result` is the worker's message, or None if the worker was lost.

    `span` is when it ran on its lane (`NO_SPAN` if it failed), on the controller's clock, ns.
    """

    code: int
    reason: str = ""
    span: Span = NO_SPAN
    result: Any = None
    clock_mhz: int = 0  # mean of the GPU's clocks before and after, of an Infer

    @property
    def ok(self) -> bool:
        return self.code == Code.OK


class Kind(ABC):
    """One kind of action. Its methods change what the scheduler's books say of the action's GPU and model."""

    action_type: ClassVar[ActionType]
    result_type: ClassVar[type]
    #: Its requests are answered when it ends, and its record says how many were in time.
    carries_requests: ClassVar[bool] = False
    #: Its result tells of copies, clocks and segments.
    is_infer: ClassVar[bool] = False

    def __init__(self, config: SchedulerConfig, changes: Changes, paths: Paths) -> None:
        self._config, self._changes, self._paths = config, changes, paths

    @abstractmethod
    def message(self, action: ActionState) -> ControllerToWorker:
        """The message that has the worker do it."""

    @abstractmethod
    def reserve(self, action: ActionState) -> None:
        """It is about to be sent: take the time on its lane and the memory that it needs."""

    @abstractmethod
    def outcome(self, action: ActionState, result: Any, *, now_ns: int) -> Outcome:
        """What the worker's result says, as far as that can be (`plausible`)."""

    @abstractmethod
    def finished(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        """It was done: correct the predictions, and learn from what it took."""

    @abstractmethod
    def failed(self, action: ActionState, outcome: Outcome, *, now_ns: int) -> None:
        """It did not happen: give back what `reserve` took."""

    def _take_exec(self, action: ActionState) -> None:
        """Put `action` on its GPU's exec lane; its instance is the one used last."""
        self._used(action)
        action.gpu.exec.add(action)
        self._changes.execs(action.gpu)

    def _used(self, action: ActionState) -> None:
        gpu, model = action.gpu, action.instance
        # Most recently used last: what stands first is the first to be evicted.
        gpu.resident.pop(model.model_id, None)
        gpu.resident[model.model_id] = model
        model.last_used_ns = action.sent_ns

    def record(self, action: ActionState, outcome: Outcome, met: int, now_ns: int) -> ActionRecord:
        """What telemetry says of it; `met` of its requests were answered in time."""
        result, span = outcome.result, outcome.span
        reported = result is not None
        ran = reported and not isinstance(result, ErrorResult)
        infer = ran and self.is_infer
        return ActionRecord(
            action_id=action.action_id,
            action_type=self.action_type,
            code=outcome.code,
            worker_id=action.gpu.worker.worker_id,
            gpu_id=action.gpu.gpu_id,
            model_id=action.instance.model_id,
            batch_size=len(action.requests) or 1,
            sent_ns=action.sent_ns,
            expected_duration_ns=action.expected_duration_ns,
            expected_start_ns=action.expected_start_ns,
            expected_complete_ns=action.expected_end_ns,
            result_received_ns=now_ns,
            processed_ns=now_ns,
            requests_queued=action.requests_queued,
            copies_loaded=action.copies_loaded,
            goodput_ns=self.goodput_ns(action, outcome, met),
            exec=span,
            copy_output_end_ns=result.copy_output.end_ns if infer else 0,
            worker_received_ns=result.received_ns if reported else 0,
            worker_sent_ns=result.sent_ns if reported else 0,
            gpu_clock_expected_mhz=action.gpu.clock_mhz,
            gpu_clock_before_mhz=result.gpu_clock_before_mhz if infer else 0,
            gpu_clock_mhz=result.gpu_clock_mhz if infer else 0,
            segments=result.segments if infer else (),
        )

    def goodput_ns(self, action: ActionState, outcome: Outcome, met: int) -> int:
        """The part of its time that was of use (Clockwork, telemetry.md)."""
        return 0
