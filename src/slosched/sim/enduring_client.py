"""A client that goes on whatever fails: for simulated runs with faults.

Its session is the live one (core/client), which says hello again, loads its models again after a controller's
restart and names lost what was in flight. On top it does what an application would that must go on: it asks
again for a first load that failed, and gives a request up when its SLO and a grace have passed.

Its requests are counted: each ends once for its caller, with an answer or as lost, and at the end nothing is
kept of any (`check_quiet`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slosched.codes import Code
from slosched.core.client.interface import Failed, HeldModel
from slosched.core.invariants import InvariantViolated
from slosched.messages import ControllerToClient, InferReply, LoadModelReply, ModelInfo
from slosched.sim.client import Phase, SimClient
from slosched.sim.marks import Framed
from slosched.units import NS_PER_MS
from slosched.workloads.base import Arrival

#: A load that failed is asked for again after this time.
_LOAD_AGAIN_NS = 500 * NS_PER_MS


class EnduringClient(SimClient):
    """A SimClient that outlives faults. `pause` and `resume` make its process stand still."""

    bounded = True
    slo_from_send = True

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._unended: set[int] = set()  # requests that were submitted and have no end yet
        self._standing: list[tuple[Callable[[Any], None], Any]] | None = (
            None  # a list: it stands still
        )

    # ------------------------------------------------------------------------- standing still

    def pause(self) -> None:
        if self._standing is None:
            self._standing = []

    def resume(self) -> None:
        waited, self._standing = self._standing or [], None
        for do, arg in waited:
            do(arg)

    def _stands(self, do: Callable[[Any], None], arg: Any) -> bool:
        if self._standing is None:
            return False
        self._standing.append((do, arg))
        return True

    def _wake(self, due_ns: int) -> None:
        if not self._stands(self._wake, due_ns):
            super()._wake(due_ns)

    def _stop_sending(self, _: None) -> None:
        if not self._stands(self._stop_sending, None):
            super()._stop_sending(None)

    def _give_up(self, _: None) -> None:
        if not self._stands(self._give_up, None):
            super()._give_up(None)

    def _ring(self, armed: Any) -> None:
        if not self._stands(self._ring, armed):
            super()._ring(armed)

    def _arrived(self, sender: Any, message: ControllerToClient | Framed) -> None:
        if not self._stands(self._read, (sender, message)):
            super()._arrived(sender, message)

    def _read(self, waited: tuple[Any, ControllerToClient | Framed]) -> None:
        self._arrived(*waited)

    # ------------------------------------------------------------------------------ the truth

    def submit(
        self, model: ModelInfo, arrival: Arrival, on_reply: Callable[[InferReply], None]
    ) -> int:
        request_id = super().submit(model, arrival, on_reply)
        self._unended.add(request_id)
        return request_id

    def cancel(self, request_id: int) -> None:
        self._unended.discard(request_id)
        super().cancel(request_id)

    def _ended(self, request_id: int) -> None:
        if request_id not in self._unended:
            raise InvariantViolated(f"the client's request {request_id} ends a second time")
        self._unended.remove(request_id)

    def _answered(self, reply: InferReply) -> None:
        self._ended(reply.request_id)
        super()._answered(reply)

    def check_models(self) -> None:
        """Raise InvariantViolated unless each model that is held is one of the present controller's."""
        dangling = [why for held in self._held if (why := self.brain.unready(held))]
        if dangling:
            raise InvariantViolated(
                f"{len(dangling)} models are held and not loaded: {dangling[0]}"
            )

    def check_quiet(self) -> None:
        """Raise InvariantViolated if anything is kept of requests, while none is in flight."""
        brain = self.brain
        kept = {
            "requests without an end": len(self._unended),
            "requests of the session": len(brain.requests),
            "questions": len(brain.questions),
            "alarms": max(0, brain.alarms - 1),  # its heartbeat
            "models beyond those of the workload": len(brain.held) - len(set(self._held)),
        }
        left = [f"{count} {what}" for what, count in kept.items() if count]
        if left:
            raise InvariantViolated(f"the client keeps {', '.join(left)}")

    # ------------------------------------------------------------------------------- loading

    def _load_reply(self, reply: LoadModelReply, models: tuple[HeldModel, ...]) -> None:
        if reply.code and reply.code != Code.UNKNOWN_MODEL:
            self._load_later()
        else:
            super()._load_reply(reply, models)

    def _failed(self, failed: Failed) -> None:
        if self.phase is Phase.LOADING:
            self._load_later()
        else:
            self._ended(failed.request_id)
            super()._failed(failed)

    def _load_later(self) -> None:
        self._kernel.at(self._kernel.now_ns + _LOAD_AGAIN_NS, self._load_again)

    def _load_again(self, _: None) -> None:
        if not self._stands(self._load_again, None) and self.phase is Phase.LOADING:
            self._load_next()
