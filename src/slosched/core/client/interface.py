"""What goes into the client's brain and what comes out of it. Times are the client's, in ns.

Messages come in and go out as they are: a ControllerToClient is an event, a ClientMessage among the effects is
to be sent (behind an InferRequest its input, if it has one), and an InferReply among them is the answer to its
request.

A shell (clients/ live, sim/ in virtual time) turns its callers' wishes and the controller's messages into
events, and effects into sends and answers. Tensors stay with the shell, by the id of their request.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from slosched.messages import (
    ClientMessage,
    ControllerToClient,
    DrainWorkerReply,
    InferReply,
    ListModelsReply,
    LoadModelReply,
    ModelInfo,
    StatusReply,
    UnloadModelReply,
)
from slosched.signature import digest, single

QuestionReply = LoadModelReply | UnloadModelReply | ListModelsReply | StatusReply | DrainWorkerReply


class HeldModel:
    """An instance that a caller holds. It stays the same when a restarted controller loads it under another id.

    `info` is what the controller that is called `incarnation` said of it, and `unloaded` true once this client
    has given the model up.
    """

    __slots__ = ("dtype", "incarnation", "info", "shape", "signature", "unloaded")

    def __init__(self, info: ModelInfo, incarnation: int) -> None:
        self.loaded(info, incarnation)

    def loaded(self, info: ModelInfo, incarnation: int) -> None:
        """The controller `incarnation` has it, as `info` says."""
        self.info = info
        self.incarnation = incarnation
        self.unloaded = False
        #: How an InferRequest describes its inputs: shape and dtype of a single fixed one, else a digest.
        self.shape: tuple[int, ...] = ()
        self.dtype = ""
        self.signature = 0
        if not info.inputs or single(info.inputs) is not None:
            self.shape, self.dtype = info.input_shape, info.input_dtype
        else:
            self.signature = digest(info.inputs)


class _Fact(msgspec.Struct, frozen=True, gc=False):
    """Base of what is made per request: cheaper than a dataclass, and no work for the collector."""


# ------------------------------------------------------------------------------------- events


class Open(_Fact, frozen=True, gc=False):
    """Say hello until the controller answers (Greeted, or NotWelcome)."""


class Close(_Fact, frozen=True, gc=False):
    """Say goodbye. What is unanswered fails, and nothing is sent any more."""


class Overloaded(_Fact, frozen=True, gc=False):
    """The controller refused these requests unread."""

    request_ids: tuple[int, ...]
    code: int
    reason: str


class SendFailed(_Fact, frozen=True, gc=False):
    """The message could not be queued: there is no connection, or too much waits."""

    message: ClientMessage


class Load(_Fact, frozen=True, gc=False):
    """Load `copies` instances, within `within_ns`. Ends with Replied or Failed, as all questions do."""

    name: str
    copies: int
    within_ns: int


class Unload(_Fact, frozen=True, gc=False):
    name: str
    force: bool
    within_ns: int


class ListModels(_Fact, frozen=True, gc=False):
    within_ns: int


class Status(_Fact, frozen=True, gc=False):
    brief: bool
    within_ns: int


class Drain(_Fact, frozen=True, gc=False):
    """Take the worker of that name, number or address out of use; with `undo` back."""

    worker: str
    undo: bool
    within_ns: int


Question = Load | Unload | ListModels | Status | Drain


class Infer(_Fact, frozen=True, gc=False):
    """One inference on `model`. Ends with an InferReply or Failed, unless it is cancelled.

    `has_input`: its inputs follow in a frame. `length`: of its varying dimensions. `bundled`: it may travel
    with others that are asked for before the next `schedule`. `bounded`: it ends when there is no answer
    within its SLO and a grace; without a known SLO also when the controller falls silent. `waits`: until its
    model is loaded again, if the controller was restarted; others are not taken then. `within_ns`: the
    caller's own limit, of a bounded one (0: none). A call of a function has its arguments as input and its size
    class as `length`, and should run where the last call `near` the same key did (empty: anywhere).
    """

    model: HeldModel
    slo_ns: int = 0
    slo_factor: float = 0.0
    user_id: int = 0
    has_input: bool = False
    length: int = 0
    bundled: bool = False
    bounded: bool = False
    waits: bool = False
    within_ns: int = 0
    near: str = ""


class Cancel(_Fact, frozen=True, gc=False):
    """The caller does not want the answer any more."""

    request_id: int


Event = Open | Close | ControllerToClient | Overloaded | SendFailed | Question | Infer | Cancel

# ------------------------------------------------------------------------------------ effects


class Why(IntEnum):
    """Why a request or question ends without an answer."""

    LOST = 0  # the controller is gone, was restarted, or cannot be reached
    LIMIT = 1  # a request's own limit has passed
    UNANSWERED = 2  # a question's time has passed
    REFUSED = 3  # by the controller, which did not take the message
    WITHDRAWN = 4  # its model was unloaded


class Failed(_Fact, frozen=True, gc=False):
    """Instead of an InferReply or Replied: a request or question ends without an answer."""

    request_id: int
    why: Why
    reason: str
    code: int = 0


class Replied(_Fact, frozen=True, gc=False):
    """A question is answered; a load also with what the caller now holds."""

    request_id: int
    reply: QuestionReply
    models: tuple[HeldModel, ...] = ()


class Greeted(_Fact, frozen=True, gc=False):
    """The controller has answered the hello."""


class NotWelcome(_Fact, frozen=True, gc=False):
    """The controller refuses this client, for example because it speaks another version of the protocol."""

    reason: str


class Restarted(_Fact, frozen=True, gc=False):
    """Another controller process answers: `lost` requests failed with the one before.

    The `models` (their number) that callers hold are being loaded again.
    """

    lost: int
    models: int


Effect = ClientMessage | InferReply | Failed | Replied | Greeted | NotWelcome | Restarted
