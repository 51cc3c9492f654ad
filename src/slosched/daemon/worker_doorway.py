"""Where controllers' messages enter a worker: read, decoded, and given to its brain with their frames kept."""

from __future__ import annotations

from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.interface import FromController
from slosched.core.worker.kinds import takes_inputs
from slosched.core.worker.stepping import Stepper
from slosched.daemon.backends.base import Backend, Frame, calls_of
from slosched.errors import MalformedMessage
from slosched.messages import Call, ChildReply, ControllerToWorker
from slosched.transport.bundles import ActionBundle, ForWorkers, with_frames
from slosched.transport.codec import MAX_MESSAGE_BYTES, decode_for_worker, total_bytes
from slosched.transport.sockets import BadMessages


class WorkerDoorway:
    """Gives `brain`, by way of its `stepper`, what controllers say, and `backend` the tensors it wants."""

    def __init__(
        self, brain: WorkerBrain, stepper: Stepper, backend: Backend, *, bad: BadMessages
    ) -> None:
        self._brain, self._stepper = brain, stepper
        self._backend, self._calls = backend, calls_of(backend)
        self._bad = bad

    def receive(self, peer: bytes, frames: list[Frame], *, now_ns: int) -> bool:
        """Take one message of `peer`. True if the brain was given something."""
        try:
            if not frames:
                raise MalformedMessage("an empty message")
            if total_bytes(frames) > MAX_MESSAGE_BYTES:
                raise MalformedMessage(
                    f"a message of {total_bytes(frames)} bytes; {MAX_MESSAGE_BYTES} are allowed"
                )
            messages = _with_inputs(decode_for_worker(frames[0]), frames[1:])
        except MalformedMessage as error:
            self._brain.note_bad_message()
            self._bad.note(peer, str(error))
            return False
        for message, tensors in messages:
            self._backend.glance()
            self._take(peer, message, tensors, now_ns)
        return True

    def _take(
        self, peer: bytes, message: ControllerToWorker, tensors: list[Frame], now_ns: int
    ) -> None:
        """Give one message to the brain, and keep its frames if the brain wants them."""
        sizes = tuple([len(frame) for frame in tensors])
        key = self._stepper.handle(FromController(peer, message, sizes), now_ns=now_ns)
        if key is None:
            return
        if isinstance(message, ChildReply):
            self._deliver(key, message, tensors)
        elif tensors and isinstance(message, Call) and self._calls is not None:
            self._calls.keep(key, tensors)
        elif tensors:
            self._backend.keep_inputs(key, tensors)

    def _deliver(self, key: int, message: ChildReply, frames: list[Frame]) -> None:
        """Before the brain lets the call go on, which it does in the step that follows."""
        if self._calls is not None:
            self._calls.deliver(
                key, message.child, code=message.code, reason=message.reason, frames=frames
            )


def _with_inputs(
    message: ForWorkers, frames: list[Frame]
) -> list[tuple[ControllerToWorker, list[Frame]]]:
    """Each message with its own frames. Raises MalformedMessage if they do not belong to it."""
    messages: list[tuple[ControllerToWorker, list[Frame]]]
    if isinstance(message, ActionBundle):
        messages = [*with_frames(message.actions, message.frames, frames)]
    else:
        messages = [(message, frames)]
    for each, its in messages if frames else ():
        if its and not takes_inputs(each):
            raise MalformedMessage(f"{type(each).__name__} with {len(its)} frame(s) behind it")
    return messages
