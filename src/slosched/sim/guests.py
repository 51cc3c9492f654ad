"""Further clients of a fuzz case: they send bursts, compare the answers, and go with requests unanswered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slosched.codes import Code
from slosched.config import CLIENT_HEARTBEAT_NS
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies import about
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHeartbeat,
    ClientHello,
    ClientMessage,
    ControllerToClient,
    Goodbye,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
    ModelInfo,
    Refused,
    UnloadModelReply,
    UnloadModelRequest,
    Welcome,
)
from slosched.signature import digest, row_bytes
from slosched.sim.cluster import SimCluster
from slosched.sim.marks import Framed
from slosched.sim.network import SMALL_MESSAGE_BYTES
from slosched.units import NS_PER_MS, NS_PER_S

#: How a guest leaves: it says goodbye, its connection breaks, or it falls silent.
GOODBYE, BREAKS, SILENT = "says goodbye", "breaks off", "falls silent"
#: Or it stays a while: its process is started again, with requests of the same numbers; or it sends but does
#: not read, until the controller can keep no more for it.
AGAIN, DEAF = "is started again", "reads nothing"
WAYS = (GOODBYE, BREAKS, SILENT, AGAIN, DEAF)
_AGAIN_NS = NS_PER_S
#: A new process says hello this long after the old one died: messages on their way to that one are lost.
_STARTS_NS = 5 * NS_PER_MS
#: Messages kept for a peer that does not read (live: 10,000, and what the kernel takes).
_ROOM = 12
_DEAF_NS = 800 * NS_PER_MS
#: A guest that unloaded its model loads it again after this.
_LOADS_AGAIN_NS = 300 * NS_PER_MS
_STAYS_NS = NS_PER_S


@dataclass(frozen=True)
class GuestPlan:
    """A client called `name` comes at `comes_ns` for the model `model`.

    It loads `copies` instances. From when they are loaded it sends bursts of `burst` requests with the SLO
    `slo_ns` to the last one, one burst each `every_ns`, and goes at `goes_ns` right after another, in `way`.
    At `unloads_ns` (-1: never), or when it has the model, it unloads it right behind a burst, with `force` also
    from under other clients, and if it `loads_again`, does so a little later. Times are after the start.
    """

    name: str
    model: str
    comes_ns: int
    goes_ns: int
    every_ns: int
    burst: int
    slo_ns: int
    way: str
    weight: float = 1.0
    copies: int = 1
    unloads_ns: int = -1
    force: bool = False
    loads_again: bool = True


class Guest:
    """Carries `plan` out on `cluster`, whose time 0 is now.

    With `inputs` requests bring one, but each `without_input`-th. `log` gets a line when it goes.
    """

    def __init__(
        self,
        plan: GuestPlan,
        cluster: SimCluster,
        *,
        inputs: bool,
        without_input: int,
        log: Callable[[str], None],
    ) -> None:
        self.identity = plan.name.encode()
        self.sent = 0
        self.answered = 0
        self._plan, self._cluster, self._log = plan, cluster, log
        self._inputs, self._without_input = inputs, without_input
        self._kernel = cluster.kernel
        self._wire = cluster.add_client(self.identity, self._arrived)
        self._model: ModelInfo | None = None
        self._echoes = self._welcomed = False
        self._gone = False
        self._next_id = 1
        self._life = 1
        self._mark = self.identity  # whose the marks of this life are
        self._unread: list[ControllerToClient | Framed] | None = None  # a list: it reads nothing
        start_ns = self._kernel.now_ns
        self._kernel.at(start_ns + plan.comes_ns, self._come)
        self._kernel.at(start_ns + plan.goes_ns, self._go)
        if plan.unloads_ns >= 0:
            self._kernel.at(start_ns + plan.unloads_ns, self._unload)

    def _say(self, message: ClientMessage) -> None:
        self._wire.send(FromClient(self.identity, message))

    def _come(self, _: Any) -> None:
        """Say hello, and again each second until the model is loaded."""
        if self._gone or self._model is not None:
            return
        self._say(ClientHello(PROTOCOL_VERSION, self._life, self._plan.name, self._plan.weight))
        self._kernel.at(self._kernel.now_ns + _AGAIN_NS, self._come)

    def _beat(self, model: ModelInfo) -> None:
        if not self._gone and self._model is model:
            self._say(ClientHeartbeat(self._kernel.now_ns))
            self._kernel.at(self._kernel.now_ns + CLIENT_HEARTBEAT_NS, self._beat, model)

    # ---------------------------------------------------------------------------- receiving

    def _arrived(self, message: ControllerToClient | Framed) -> None:
        if self._unread is not None:
            self._unread.append(message)
        elif not self._gone and (self._welcomed or isinstance(message, Welcome)):
            self._read(message)

    def _read(self, message: ControllerToClient | Framed) -> None:
        if isinstance(message, Framed):
            self.answered += 1
            reply: InferReply = message.message
            self._cluster.marks.compare(self._mark, reply.request_id, message.frames)
        elif isinstance(message, InferReply):
            self.answered += 1
            if message.request_id >= self._next_id:
                raise InvariantViolated(
                    f"{self._plan.name} is answered request {message.request_id}, which it did not send"
                )
            if not message.code:
                wanted = self._brings_input(message.request_id) and not self._echoes
                self._cluster.marks.without_output(self._mark, message, wanted=wanted)
            elif message.code == Code.INVALID_REQUEST and self._uses(message.model_id):
                self._model = None  # another client has unloaded it
                self._come(None)
        elif isinstance(message, Welcome):
            self._welcomed = True
            self._echoes = not about(message.policy).runs_models
            if self._model is None:
                self._say(LoadModelRequest(0, self._plan.model, self._plan.copies))
        elif isinstance(message, LoadModelReply):
            if not message.code and self._model is None:
                self._model = message.models[-1]
                self._beat(self._model)
                self._burst(self._model)
        elif isinstance(message, UnloadModelReply):
            kept = f"{message.unloaded} unloaded, {message.kept} kept"
            self._log(f"{self._plan.name} is told: {message.reason or kept}")
        elif isinstance(message, Refused) and self._model is not None:
            self._model = None  # a controller that does not know us: begin anew
            self._come(None)

    def _uses(self, model_id: int) -> bool:
        return self._model is not None and self._model.model_id == model_id

    # ------------------------------------------------------------------------------ sending

    def _brings_input(self, request_id: int) -> bool:
        every = self._without_input
        return self._inputs and (not every or request_id % every != 0)

    def _burst(self, model: ModelInfo) -> None:
        if not self._gone and self._model is model:
            self._burst_now(model)
            self._kernel.at(self._kernel.now_ns + self._plan.every_ns, self._burst, model)

    def _burst_now(self, model: ModelInfo) -> None:
        for _ in range(self._plan.burst):
            self._send(model)

    def _send(self, model: ModelInfo) -> None:
        request_id = self._next_id
        self._next_id += 1
        self.sent += 1
        slo_ns = self._plan.slo_ns
        if not self._brings_input(request_id):
            self._say(
                InferRequest(
                    request_id=request_id, model_id=model.model_id, slo_factor=0.0, slo_ns=slo_ns
                )
            )
            return
        # With length classes a guest asks at all lengths in turn.
        length = request_id % model.lengths[-1] + 1 if model.lengths else 0
        size = row_bytes(model.inputs, length)
        message = InferRequest(
            request_id=request_id,
            model_id=model.model_id,
            slo_factor=0.0,
            slo_ns=slo_ns,
            user_id=0,
            shape=() if length else model.input_shape,
            dtype="" if length else model.input_dtype,
            length=length,
            signature=digest(model.inputs) if length else 0,
        )
        output_size = row_bytes(model.outputs, length)
        payload = self._cluster.marks.input(self._mark, request_id, size, output_size)
        framed = Framed(FromClient(self.identity, message), (payload,))
        self._wire.send(framed, SMALL_MESSAGE_BYTES + size)

    # ---------------------------------------------------------------------------- unloading

    def _unload(self, _: Any) -> None:
        """Unload the model with requests for it unanswered."""
        if self._gone or self._unread is not None:
            return
        if self._model is None:
            self._kernel.at(self._kernel.now_ns + _LOADS_AGAIN_NS, self._unload)
            return
        self._burst_now(self._model)
        self._log(f"{self._plan.name} unloads {self._plan.model!r}")
        self._say(UnloadModelRequest(0, self._plan.model, self._plan.force))
        self._model = None
        if self._plan.loads_again:
            self._kernel.at(self._kernel.now_ns + _LOADS_AGAIN_NS, self._come)

    # ------------------------------------------------------------------------------- going

    def _go(self, _: Any) -> None:
        if self._model is not None:
            self._burst_now(self._model)
        waiting, way = self.sent - self.answered, self._plan.way
        self._log(f"{self._plan.name} {way} with {waiting} requests unanswered")
        if way == AGAIN:
            self._die()
        elif way == DEAF:
            self._unread = []
            self._cluster.controller.room[self.identity] = _ROOM
            self._kernel.at(self._kernel.now_ns + _DEAF_NS, self._read_again)
        else:
            self._leave(way)

    def _leave(self, way: str) -> None:
        self._gone = True
        if way == GOODBYE:
            self._say(Goodbye())
        elif way == BREAKS:
            self._cluster.controller.room[self.identity] = 0

    def _die(self) -> None:
        """The process ends; the next one knows nothing of its requests, and counts from 1 again."""
        self._model, self._welcomed = None, False
        self._life += 1
        self._next_id = 1
        self.sent = self.answered = 0
        self._mark = self.identity + b" again"
        now_ns = self._kernel.now_ns
        self._kernel.at(now_ns + _STARTS_NS, self._come)
        self._kernel.at(now_ns + _STAYS_NS, self._says_goodbye)

    def _read_again(self, _: Any) -> None:
        """It reads what was kept for it; its next request shows whether it is still known."""
        unread, self._unread = self._unread or [], None
        self._cluster.controller.room.pop(self.identity, None)
        for message in unread:
            self._arrived(message)
        self._kernel.at(self._kernel.now_ns + _STAYS_NS, self._says_goodbye)

    def _says_goodbye(self, _: Any) -> None:
        self._log(f"{self._plan.name} says goodbye with {self.sent - self.answered} unanswered")
        self._leave(GOODBYE)
