"""The book of a worker: its GPUs, its instances, which actions are not answered yet, and what goes out.

An action has one end, `_end`: it releases the action's weights, takes it off the book and sends its one result.
So no action is answered twice, and an action that is still on the book when all is quiet was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slosched.config import canonical_model
from slosched.core.worker.calls import MOST_CALLS, Calls
from slosched.core.worker.interface import (
    DropInputs,
    Effect,
    EvictPages,
    ReleaseModel,
    ToController,
)
from slosched.core.worker.lanes import GPU_LANES, HOST_LANE, LaneSpec
from slosched.core.worker.link import Link
from slosched.core.worker.state import GpuState, Instance, Lane, PendingAction
from slosched.messages import MAX_TEXT, NO_SPAN, ErrorResult, GpuInfo, Result, Span


class Ledger:
    """Shared by the brain, which accepts actions, the kinds, which know their steps, and the pipeline."""

    def __init__(
        self,
        gpus: Sequence[GpuInfo],
        link: Link,
        lanes: Sequence[LaneSpec] = GPU_LANES,
        most_calls: int = MOST_CALLS,
    ) -> None:
        self.link = link
        self.gpus = {info.gpu_id: GpuState(info, lanes) for info in gpus}
        self.host = Lane(HOST_LANE)
        self.instances: dict[int, Instance] = {}  # by model id
        self.calls = Calls(most_calls)
        #: By key, in the order of arrival.
        self.unanswered: dict[int, PendingAction[Any]] = {}
        self.effects: list[Effect] = []
        self.errors = 0
        self._seq = 0

    def next_seq(self) -> int:
        """A number that was never used: keys, op ids and the order in queues."""
        self._seq += 1
        return self._seq

    def take_effects(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        return effects

    # ------------------------------------------------------------------- the end of an action

    def answer(
        self, action: PendingAction[Any], message: Result, output_of: int | None = None
    ) -> None:
        """The action ended well. `output_of`: its key, if its outputs follow the message."""
        self._end(action, message, output_of)

    def fail(
        self,
        action: PendingAction[Any],
        code: int,
        reason: str,
        now_ns: int,
        *,
        part: Span = NO_SPAN,
    ) -> None:
        """Answer it with a code. `part` is what a call ran last, on the controller's clock."""
        self.errors += 1
        if action.kind.takes_inputs:
            self.effects.append(DropInputs(action.key))
        clock = self.link.clock
        message = ErrorResult(
            session=action.message.session,
            action_id=action.message.action_id,
            action_type=int(action.kind.action_type),
            code=int(code),
            reason=reason[:MAX_TEXT],
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
            part=part,
        )
        self._end(action, message, None)

    def _end(self, action: PendingAction[Any], message: Result, output_of: int | None) -> None:
        if action.uses_weights:
            self.release_weights(action)
        if action.call is not None:
            self.calls.end(action.call)
        del self.unanswered[action.key]
        self.effects.append(ToController(action.peer, message, output_of))

    # ---------------------------------------------------------------------------- weights

    def use_weights(self, action: PendingAction[Any]) -> None:
        """Keep the weights of the action's instance on its GPU until `release_weights`, or its end."""
        assert action.gpu is not None and action.instance is not None
        action.gpu.use(action.instance.model_id)
        action.uses_weights = True

    def release_weights(self, action: PendingAction[Any]) -> None:
        assert action.gpu is not None and action.instance is not None
        action.gpu.release(action.instance.model_id)
        action.uses_weights = False

    def evict(self, gpu: GpuState, model_id: int) -> None:
        gpu.cache.evict(model_id)
        self.effects.append(EvictPages(gpu.gpu_id, model_id))

    # -------------------------------------------------------------------------- instances

    def forget(self, model_id: int) -> None:
        """The instance is gone; the last one of its name frees the host memory."""
        name = self.instances.pop(model_id).name
        self.effects.append(ReleaseModel(model_id, name, last=not self.name_in_use(name)))

    def name_in_use(self, name: str) -> bool:
        """True if an instance of that canonical name is known, or being prepared."""
        preparing = [*(entry[2] for entry in self.host.queue), *self.host.started]
        return any(instance.name == name for instance in self.instances.values()) or any(
            canonical_model(action.prepares) == name for action in preparing if action.prepares
        )
