"""Carries out the effects of a worker's brain: sends to controllers, and has the backend prepare and drop.

What one controller is sent in a turn of the loop leaves at its end as one message, where it may wait
(transport/outbox.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from slosched.clock import Clock
from slosched.codes import ActionType
from slosched.core.worker.interface import (
    DropInputs,
    Effect,
    EndCall,
    EvictPages,
    ModelPrepared,
    Note,
    PrepareModel,
    ReleaseModel,
    ToController,
)
from slosched.daemon.backends.base import Backend, Frame, calls_of
from slosched.messages import (
    CallNews,
    CallResult,
    ChildRequest,
    ErrorResult,
    Result,
    SessionMessage,
)
from slosched.transport.bundles import ResultBundle
from slosched.transport.outbox import Outbox
from slosched.transport.sockets import Router

#: Results of calls wait for others for at most this time, and this number of them.
_HELD_NS = 300_000
_HELD_AT_MOST = 16
_OF_CALLS = (CallResult, *get_args(CallNews))


class WorkerPerformer:
    """`prepared` is called with what a PrepareModel made, in the thread that made it."""

    def __init__(
        self,
        backend: Backend,
        router: Router,
        *,
        announce: Callable[[str], None],
        prepared: Callable[[ModelPrepared], None],
        clock: Clock,
    ) -> None:
        self._backend, self._calls = backend, calls_of(backend)
        self._announce, self._prepared, self._clock = announce, prepared, clock
        # A failed send needs no handling: a controller that is gone, or does not read, misses heartbeats.
        self._outbox: Outbox[bytes, Result | CallNews] = Outbox(
            router.send, ResultBundle, failed=lambda peer, message: None
        )
        self._held = 0  # results of calls in the outbox; -1: there is more in it
        self.held_until_ns = 0  # they wait until then; 0: they do not

    def flush(self, *, at_once: bool) -> None:
        """Send what was said. Unless it must go `at_once`, results of calls alone wait a little for others: a
        message costs more than a call that does nothing.
        """
        if 0 < self._held < _HELD_AT_MOST and not at_once:
            now_ns = self._clock()
            self.held_until_ns = self.held_until_ns or now_ns + _HELD_NS
            if now_ns < self.held_until_ns:
                return
        self._held = self.held_until_ns = 0
        self._outbox.flush()

    def perform(self, effect: Effect, now_ns: int) -> None:
        """Do what `effect` says. The Stepper has those that launch and withdraw."""
        if isinstance(effect, ToController):
            message = effect.message
            frames: list[Frame] = []
            if isinstance(message, ChildRequest):
                if self._calls is not None and message.input_size and effect.output_of is not None:
                    frames.append(self._calls.payload(effect.output_of, message.child))
            elif effect.output_of is not None:
                sizes = getattr(message, "output_sizes", ())
                frames.extend(self._backend.take_outputs(effect.output_of, sizes))
            self._backend.glance()
            if isinstance(message, SessionMessage) and self._may_gather(message):
                self._outbox.put(effect.peer, message, frames)
                alone = self._held >= 0 and isinstance(message, CallResult)
                self._held = self._held + 1 if alone else -1
            else:
                self._outbox.send(effect.peer, message, frames)
        elif isinstance(effect, DropInputs):
            self._backend.drop_inputs(effect.action_id)
        elif isinstance(effect, EvictPages):
            self._backend.evict(effect.gpu_id, effect.model_id)
        elif isinstance(effect, PrepareModel):
            self._backend.prepare(effect, done=self._prepared)
        elif isinstance(effect, ReleaseModel):
            self._backend.release(effect)
        elif isinstance(effect, EndCall):
            if self._calls is not None:
                self._calls.end(effect.action_id, effect.reason)
        elif isinstance(effect, Note):
            self._announce(effect.text)

    def _may_gather(self, message: SessionMessage) -> bool:
        """Whether a result may wait until the turn of the loop ends.

        A real device's go out at once: its next operation may take longer than a send.
        """
        if isinstance(message, ErrorResult):
            return self._backend.exact or message.action_type == ActionType.CALL
        return self._backend.exact or isinstance(message, _OF_CALLS)
