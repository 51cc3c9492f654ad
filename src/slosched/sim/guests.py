"""Further clients of a fuzz case: they send bursts, compare the answers, and go with requests unanswered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slosched.config import CLIENT_HEARTBEAT_NS
from slosched.core.scheduler.interface import FromClient
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
    Welcome,
)
from slosched.sim.cluster import SimCluster
from slosched.sim.marks import Framed
from slosched.sim.network import SMALL_MESSAGE_BYTES
from slosched.units import NS_PER_S, tensor_bytes

#: How a guest goes: it says goodbye, its connection breaks, or it is heard of no more.
GOODBYE, BREAKS, SILENT = "says goodbye", "breaks off", "falls silent"
WAYS = (GOODBYE, BREAKS, SILENT)
_AGAIN_NS = NS_PER_S


@dataclass(frozen=True)
class GuestPlan:
    """A client called `name` comes at `comes_ns` for the model `model`.

    From when that is loaded it sends bursts of `burst` requests with the SLO `slo_ns`, one each
    `every_ns`, and goes at `goes_ns` right after another burst, in `way`. Times are after the start.
    """

    name: str
    model: str
    comes_ns: int
    goes_ns: int
    every_ns: int
    burst: int
    slo_ns: int
    way: str


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
        self._echoes = False
        self._gone = False
        self._next_id = 1
        start_ns = self._kernel.now_ns
        self._kernel.at(start_ns + plan.comes_ns, self._come)
        self._kernel.at(start_ns + plan.goes_ns, self._go)

    def _say(self, message: ClientMessage) -> None:
        self._wire.send(FromClient(self.identity, message))

    def _come(self, _: Any) -> None:
        """Say hello, and again each second until the model is loaded."""
        if self._gone or self._model is not None:
            return
        self._say(ClientHello(PROTOCOL_VERSION, 7, self._plan.name))
        self._kernel.at(self._kernel.now_ns + _AGAIN_NS, self._come)

    def _beat(self, model: ModelInfo) -> None:
        if not self._gone and self._model is model:
            self._say(ClientHeartbeat(self._kernel.now_ns))
            self._kernel.at(self._kernel.now_ns + CLIENT_HEARTBEAT_NS, self._beat, model)

    # ---------------------------------------------------------------------------- receiving

    def _arrived(self, message: ControllerToClient | Framed) -> None:
        if self._gone:
            return
        if isinstance(message, Framed):
            self.answered += 1
            reply: InferReply = message.message
            self._cluster.marks.compare(self.identity, reply.request_id, message.frames)
        elif isinstance(message, InferReply):
            self.answered += 1
            if not message.code:
                wanted = self._brings_input(message.request_id) and not self._echoes
                self._cluster.marks.without_output(self.identity, message, wanted=wanted)
        elif isinstance(message, Welcome):
            self._echoes = message.policy == "ECHO"
            if self._model is None:
                self._say(LoadModelRequest(0, self._plan.model, 1))
        elif isinstance(message, LoadModelReply):
            if not message.code and self._model is None:
                self._model = message.models[0]
                self._beat(self._model)
                self._burst(self._model)
        elif isinstance(message, Refused) and self._model is not None:
            self._model = None  # a controller that does not know us: begin anew
            self._come(None)

    # ------------------------------------------------------------------------------ sending

    def _brings_input(self, request_id: int) -> bool:
        every = self._without_input
        return self._inputs and (not every or request_id % every != 0)

    def _burst(self, model: ModelInfo) -> None:
        if self._gone or self._model is not model:
            return
        for _ in range(self._plan.burst):
            self._send(model)
        self._kernel.at(self._kernel.now_ns + self._plan.every_ns, self._burst, model)

    def _send(self, model: ModelInfo) -> None:
        request_id = self._next_id
        self._next_id += 1
        self.sent += 1
        slo_ns = self._plan.slo_ns
        if not self._brings_input(request_id):
            self._say(InferRequest(request_id, model.model_id, 0.0, slo_ns))
            return
        shape, dtype = model.input_shape, model.input_dtype
        size = tensor_bytes(shape, dtype)
        message = InferRequest(request_id, model.model_id, 0.0, slo_ns, 0, shape, dtype)
        payload = self._cluster.marks.input(self.identity, request_id, size)
        framed = Framed(FromClient(self.identity, message), (payload,))
        self._wire.send(framed, SMALL_MESSAGE_BYTES + size)

    def _go(self, _: Any) -> None:
        if self._model is not None:
            self._burst(self._model)
        self._gone = True
        waiting = self.sent - self.answered
        self._log(f"{self._plan.name} {self._plan.way} with {waiting} requests unanswered")
        if self._plan.way == GOODBYE:
            self._say(Goodbye())
        elif self._plan.way == BREAKS:
            self._cluster.controller.gone.add(self.identity)
