"""The client of a simulated graph of calls: what it sends, and what it holds answers to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from slosched.codes import Code
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import FromClient
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    ClientMessage,
    ControllerToClient,
    Goodbye,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
    Refused,
    Welcome,
)
from slosched.sim.cluster import SimCluster
from slosched.sim.marks import Framed, Payload
from slosched.sim.network import SMALL_MESSAGE_BYTES
from slosched.units import NS_PER_MS, NS_PER_S

CALLER = b"caller"
#: A load that no worker could serve is asked for again after this time.
_AGAIN_NS = 200 * NS_PER_MS


@dataclass(frozen=True, kw_only=True)
class CallArrival:
    """A client's call: `at_ns` after the start. It follows script `number` of its function.

    The name may be that of a model too: then it is an inference without an input. It is taken back
    `cancel_after_ns` after it was sent (-1: it is not).
    """

    at_ns: int
    function: str
    slo_ns: int = 0
    number: int = 0
    size_class: int = 0
    near: str = ""
    in_bytes: int = 64
    cancel_after_ns: int = -1


@dataclass(slots=True)
class Answered:
    """What became of one arrival. `replies` has one answer when all is well.

    It has none if it is `lost`: the controller died that had it, or the caller left.
    """

    arrival: CallArrival
    mark: bytes
    sent_ns: int = -1
    answered_ns: int = -1
    replies: list[InferReply] = field(default_factory=list)
    lost: bool = False

    @property
    def code(self) -> int:
        return self.replies[0].code if self.replies else -1


class Caller:
    """Says hello, loads `names`, sends calls and counts the answers. Those of the `models` are inferences.

    Under a new controller it begins anew: calls without an answer are lost, because they may have run, and
    those that come before everything is loaded again wait.
    """

    def __init__(self, cluster: SimCluster, names: Sequence[str], models: Collection[str]) -> None:
        self._kernel = cluster.kernel
        self._names, self._models = names, models
        self._wire = cluster.add_client(CALLER, self._receive)
        self._asked = 0
        self._loading: dict[int, str] = {}
        self.model_ids: dict[str, int] = {}
        self.problem = ""
        self._by_request: dict[int, Answered] = {}
        self._open: dict[int, Answered] = {}  # by request
        self._waiting: list[Answered] = []  # for the models of a new controller
        self._controller = -1  # its incarnation
        self.gone = False

    @property
    def unanswered(self) -> int:
        """Calls that an answer is due for."""
        return len(self._open) + len(self._waiting)

    @property
    def ready(self) -> bool:
        """All that it calls is loaded."""
        return len(self.model_ids) == len(self._names)

    def start(self) -> None:
        self._hello()
        self._beat(None)

    def leave(self, _: object = None) -> None:
        """Say goodbye. What has no answer gets none."""
        if not self.gone:
            self.gone = True
            self._say(Goodbye())
            self._lose_open()
            for answered in self._waiting:
                answered.lost = True
            self._waiting.clear()

    def _hello(self) -> None:
        self._say(ClientHello(PROTOCOL_VERSION, 7, "calls"))

    def _load(self) -> None:
        for name in self._names:
            self._asked += 1
            self._loading[self._asked] = name
            self._say(LoadModelRequest(self._asked, name))

    def _lose_open(self) -> None:
        for answered in self._open.values():
            answered.lost = True
        self._open.clear()

    def _greeted(self, welcome: Welcome) -> None:
        if welcome.incarnation == self._controller:
            return
        self._controller = welcome.incarnation
        self._lose_open()
        self._loading.clear()
        self.model_ids.clear()
        self._load()

    def call(self, answered: Answered) -> None:
        arrival = answered.arrival
        if self.gone:
            answered.lost = True
            return
        if not self.ready:
            self._waiting.append(answered)
            return
        self._asked = request_id = self._asked + 1
        self._by_request[request_id] = self._open[request_id] = answered
        answered.sent_ns = self._kernel.now_ns
        request = InferRequest(
            request_id=request_id,
            model_id=self.model_ids[arrival.function],
            slo_ns=arrival.slo_ns,
            length=arrival.size_class,
            near=arrival.near,
        )
        event = FromClient(CALLER, request)
        if arrival.in_bytes and arrival.function not in self._models:
            payload = Payload(answered.mark, arrival.in_bytes)
            self._wire.send(Framed(event, (payload,)), SMALL_MESSAGE_BYTES + arrival.in_bytes)
        else:
            self._wire.send(event)
        if arrival.cancel_after_ns >= 0:
            at_ns = self._kernel.now_ns + arrival.cancel_after_ns
            self._kernel.at(at_ns, self._say, CancelRequest(request_id))

    def pause(self) -> None:
        """The caller has nothing that could stand still: its calls are sent at their times."""

    def resume(self) -> None:
        """Nothing stood still."""

    def _say(self, message: ClientMessage) -> None:
        self._wire.send(FromClient(CALLER, message))

    def _beat(self, _: object) -> None:
        if not self.gone:
            self._say(ClientHeartbeat(self._kernel.now_ns))
            self._kernel.at(self._kernel.now_ns + NS_PER_S, self._beat)

    def _receive(self, message: ControllerToClient | Framed) -> None:
        frames: tuple[Payload, ...] = ()
        if isinstance(message, Framed):
            frames, message = tuple(message.frames), message.message
        if isinstance(message, Welcome):
            self._greeted(message)
        elif isinstance(message, Refused):
            self._hello()  # a new controller, which has not heard of it
        elif isinstance(message, LoadModelReply):
            self._loaded(message)
        elif isinstance(message, InferReply):
            self._answered(message, frames)

    def _loaded(self, reply: LoadModelReply) -> None:
        name = self._loading.pop(reply.request_id, None)
        if name is None:
            return  # the controller that had to answer is gone
        if not reply.code:
            self.model_ids[name] = reply.models[0].model_id
        elif reply.code in (Code.INVALID_REQUEST, Code.LIMIT_REACHED):
            self.problem = f"cannot load the function {name!r}: {reply.reason}"
        else:  # no worker that has it is there
            self._kernel.at(self._kernel.now_ns + _AGAIN_NS, self._load_again, name)
        if self.ready:
            waiting, self._waiting = self._waiting, []
            for answered in waiting:
                self.call(answered)

    def _load_again(self, name: str) -> None:
        if not self.gone and name not in self.model_ids and name not in self._loading.values():
            self._asked += 1
            self._loading[self._asked] = name
            self._say(LoadModelRequest(self._asked, name))

    def _answered(self, reply: InferReply, frames: tuple[Payload, ...]) -> None:
        answered = self._by_request[reply.request_id]
        self._open.pop(reply.request_id, None)
        if answered.lost:
            return  # the answer and the loss crossed
        answered.replies.append(reply)
        name = answered.arrival.function
        if len(answered.replies) > 1:
            codes = [each.code for each in answered.replies]
            raise InvariantViolated(f"a call of {name!r} is answered more than once: {codes}")
        answered.answered_ns = self._kernel.now_ns
        if frames and (reply.code or frames[0].mark != answered.mark):
            got = frames[0].mark.hex()
            raise InvariantViolated(f"a call of {name!r} got the result of another: {got}")
