"""What a kind of action is on the worker's side.

The brain calls `check` when the action arrives, then `begin`. `begin` answers at once, or lets the action wait
for its first step; each step begins the next one or ends the action, through the ledger's `answer` or `fail`. A
new kind is a file here; a device learns the operations that are new.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic

from slosched.codes import ActionType, Code
from slosched.core.clock_sync import ClockSync
from slosched.core.worker.offers import Offers
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import M, PendingAction
from slosched.messages import Action, Call, EvictWeights, Infer, LoadModel, LoadWeights, Span

#: A code, and what is wrong in words.
Fault = tuple[Code, str]


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What this worker takes: its offers, and whether it makes inputs up."""

    offers: Offers
    zero_size_inputs: bool = True


class ActionKind(ABC, Generic[M]):
    """One kind, for actions whose message is a `message`. Each brain has one object of each kind."""

    message: ClassVar[type[Action]]
    action_type: ActionType
    takes_inputs: bool = False  # frames may follow the message

    def __init__(self, pipeline: Pipeline, acceptance: Acceptance) -> None:
        self._pipeline = pipeline
        self._ledger = pipeline.ledger
        self._acceptance = acceptance

    @abstractmethod
    def check(self, action: PendingAction[M], frames: tuple[int, ...]) -> Fault | None:
        """What is wrong with the action on arrival; `frames` are the bytes of the frames behind it.

        Fills in the window, the GPU and the instance. Times are not judged here but when a step would start
        (Clockwork §2.4).
        """

    @abstractmethod
    def begin(self, action: PendingAction[M], now_ns: int) -> None:
        """The action was found sound: let it wait for its first step, or answer it."""

    # ------------------------------------------------------------------ what the kinds share

    @property
    def _clock(self) -> ClockSync:
        return self._ledger.link.clock

    def _set_window(
        self,
        action: PendingAction[M],
        message: LoadModel | LoadWeights | EvictWeights | Infer | Call,
    ) -> Fault | None:
        """Convert the window of `message` to the worker's clock."""
        earliest_ns, latest_ns = message.earliest_ns, message.latest_ns
        if earliest_ns > latest_ns:
            after_ns = earliest_ns - latest_ns
            reason = f"earliest {earliest_ns} lies {after_ns} ns after latest {latest_ns}"
            return Code.INVALID_ACTION, reason
        clock = self._clock
        action.earliest_ns = clock.to_local_ns(earliest_ns)
        action.latest_ns = clock.to_local_ns(latest_ns)
        return None

    def _locate(
        self,
        action: PendingAction[M],
        message: LoadWeights | EvictWeights | Infer | Call,
        unknown_model: Code,
    ) -> Fault | None:
        """Find the GPU and the instance that `message` names, then convert its window."""
        ledger = self._ledger
        gpu = ledger.gpus.get(message.gpu_id)
        if gpu is None:
            known = ", ".join(str(gpu_id) for gpu_id in ledger.gpus)
            return Code.INVALID_GPU, f"no GPU {message.gpu_id}; this worker has {known}"
        instance = ledger.instances.get(message.model_id)
        if instance is None:
            return unknown_model, f"model id {message.model_id} was not loaded"
        on_host = instance.function is not None and not instance.function.gpu
        if on_host != gpu.info.host:
            wants, has = ("a host", "a GPU") if on_host else ("a GPU", "a host")
            reason = f"{instance.name!r} runs on {wants}, and device {gpu.gpu_id} is {has}"
            return Code.INVALID_GPU, reason
        action.gpu, action.instance = gpu, instance
        return self._set_window(action, message)


def peer_span(clock: ClockSync, span: Span) -> Span:
    """`span` on the controller's clock."""
    if clock.offset_ns == 0:
        return span  # as it is: the worker shares the controller's clock
    return Span(clock.to_peer_ns(span.begin_ns), clock.to_peer_ns(span.end_ns), span.duration_ns)
