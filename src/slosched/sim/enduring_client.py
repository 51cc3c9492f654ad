"""A client that goes on whatever fails: for simulated runs with faults.

It does in its session what the live one does (clients/session.py): hello again while the controller is
silent or has forgotten it, requests of a controller that died fail. On top it does what an application
would that must go on: it loads its models again after a controller's restart or a failed load, and gives
a request up when its SLO and a grace have passed without an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slosched.codes import Code
from slosched.config import CLIENT_HEARTBEAT_NS
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies import about
from slosched.errors import ConnectionLost
from slosched.loadgen.instances import copies_by_name, in_workload_order
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    ControllerToClient,
    InferReply,
    LoadModelReply,
    LoadModelRequest,
    ModelInfo,
    Refused,
    Welcome,
)
from slosched.sim.client import IDENTITY, LoadFailed, Phase, SimClient
from slosched.sim.marks import Framed
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import Arrival

_INCARNATION = 7
_HELLO_EVERY_NS = 500 * NS_PER_MS
#: A load is asked for again when it failed, and when it was not answered within this time.
_LOAD_AGAIN_NS = 500 * NS_PER_MS
_LOAD_PATIENCE_NS = 4 * NS_PER_S
_GRACE_NS = 2 * NS_PER_S


class EnduringClient(SimClient):
    """A SimClient that outlives faults. `pause` and `resume` make its process stand still."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._held: list[tuple[Callable[[Any], None], Any]] | None = None  # a list: it stands still
        self._controller = 0  # its incarnation; 0 before the first Welcome
        self._heard = False
        self._greeting = False  # a hello is not answered yet
        self._load_id = 0
        self._load_asked_ns = 0
        self._reloading = False
        self._present: dict[int, ModelInfo] = {}  # by the id that the driver knows
        self._give_up_ns: dict[int, int] = {}  # by request id, of the unanswered
        self._left = False

    # ------------------------------------------------------------------------- standing still

    def pause(self) -> None:
        if self._held is None:
            self._held = []

    def resume(self) -> None:
        held, self._held = self._held or [], None
        for do, arg in held:
            do(arg)

    def _holds(self, do: Callable[[Any], None], arg: Any) -> bool:
        if self._held is None:
            return False
        self._held.append((do, arg))
        return True

    def _wake(self, due_ns: int) -> None:
        if not self._holds(self._wake, due_ns):
            super()._wake(due_ns)

    def _stop_sending(self, _: None) -> None:
        if not self._holds(self._stop_sending, None):
            super()._stop_sending(None)

    def _give_up(self, _: None) -> None:
        if not self._holds(self._give_up, None):
            super()._give_up(None)

    # ------------------------------------------------------------------------------- session

    def start(self) -> None:
        self._kernel.at(self._kernel.now_ns, self._hello)
        self._kernel.at(self._kernel.now_ns + CLIENT_HEARTBEAT_NS, self._beat)

    def _hello(self, _: None = None) -> None:
        """Say hello, and again until it is answered."""
        if self._holds(self._hello, None) or self.phase is Phase.DONE:
            return
        self._greeting = True
        self._say(ClientHello(PROTOCOL_VERSION, _INCARNATION, "simulation"))
        if not self._controller:
            self._kernel.at(self._kernel.now_ns + _HELLO_EVERY_NS, self._hello_again)

    def _hello_again(self, _: None) -> None:
        if not self._controller:
            self._hello()

    def _beat(self, _: None) -> None:
        if self._holds(self._beat, None) or self._left:
            return
        now_ns = self._kernel.now_ns
        self._kernel.at(now_ns + CLIENT_HEARTBEAT_NS, self._beat)
        if not self._controller:
            return  # a controller that does not know this client would refuse it
        self._say(ClientHeartbeat(now_ns))
        if self._greeting or not self._heard:
            self._hello()
        self._heard = False
        if self._load_id and now_ns - self._load_asked_ns > _LOAD_PATIENCE_NS:
            self._ask_for_next()
        for request_id in [i for i, until_ns in self._give_up_ns.items() if until_ns < now_ns]:
            self._say(CancelRequest(request_id))
            self._lost(request_id)

    def _receive(self, message: ControllerToClient | Framed) -> None:
        if self._holds(self._receive, message) or self.phase is Phase.DONE:
            return
        self._heard = True
        if isinstance(message, Welcome):
            self._welcome(message)
        elif isinstance(message, Refused):
            self._refused(message)
        elif isinstance(message, LoadModelReply):
            if message.request_id == self._load_id:
                self._load_reply(message)
        else:
            if isinstance(message, InferReply):
                self._give_up_ns.pop(message.request_id, None)
            super()._receive(message)

    def _welcome(self, message: Welcome) -> None:
        before, self._controller = self._controller, message.incarnation
        self._greeting = False
        self._default_slo_ns = message.default_slo_ns
        self._echoes = not about(message.policy).runs_models
        if before == message.incarnation:
            return
        if self.phase is Phase.HELLO or self.phase is Phase.LOADING:
            self._load_everything()
        elif before:  # it was restarted: it knows neither our models nor our requests
            for request_id in list(self._give_up_ns):
                self._lost(request_id)
            self._reloading = True
            self._load_everything()

    def _refused(self, message: Refused) -> None:
        if message.request_id < 0 and not self._controller:
            self._fail(LoadFailed(message.reason))
            return
        if message.request_id in self._give_up_ns:
            del self._give_up_ns[message.request_id]
            reply = InferReply(message.request_id, message.code, message.reason, -1, 0, 0, False)
            super()._receive(reply)
        elif message.request_id == self._load_id:
            self._load_later()
        if not self._greeting:  # it has forgotten us
            self._hello()

    # ------------------------------------------------------------------------------- loading

    def _load_everything(self) -> None:
        self._to_load = list(copies_by_name(self._uses).items())
        self._loaded = {}
        self._load_next()

    def _load_next(self) -> None:
        if not self._reloading:
            self.phase = Phase.LOADING
        if self._to_load:
            self._ask_for_next()
            return
        self._load_id = 0
        infos = in_workload_order(self._uses, self._loaded)
        if self._reloading:
            self._reloading = False
            known = zip(self.models, infos, strict=True)
            self._present = {old.model_id: new for old, new in known}
            self._input_bytes = self._sizes(infos)
            return
        self.models = infos
        self._present = {info.model_id: info for info in infos}
        self._send_from_now()

    def _ask_for_next(self) -> None:
        name, copies = self._to_load[0]
        self._load_id = self._new_id()
        self._load_asked_ns = self._kernel.now_ns
        self._say(LoadModelRequest(self._load_id, name, copies))

    def _load_reply(self, reply: LoadModelReply) -> None:
        if reply.code == Code.UNKNOWN_MODEL:
            super()._load_reply(reply)
        elif reply.code:
            self._load_later()
        else:
            name, copies = self._to_load.pop(0)
            self._loaded[name] = reply.models[:copies]
            self._load_next()

    def _load_later(self) -> None:
        load_id = self._load_id
        self._kernel.at(self._kernel.now_ns + _LOAD_AGAIN_NS, self._load_again, load_id)

    def _load_again(self, load_id: int) -> None:
        if not self._holds(self._load_again, load_id) and load_id == self._load_id:
            self._ask_for_next()

    # -------------------------------------------------------------------------------- requests

    def _lost(self, request_id: int) -> None:
        """It will not be answered."""
        del self._give_up_ns[request_id]
        if self.driver is not None:
            self.driver.lost(request_id)
            if self.phase is Phase.DRAINING or self._due_ns < 0:
                self._end_if_quiet()

    def submit(
        self, model: ModelInfo, arrival: Arrival, on_reply: Callable[[InferReply], None]
    ) -> int:
        if self._reloading:
            raise ConnectionLost("the controller was restarted", code=Code.CANCELLED)
        request_id = super().submit(self._present[model.model_id], arrival, on_reply)
        slo_ns = arrival.slo_ns or round(arrival.slo_factor * model.b1_ns) or self._default_slo_ns
        self._give_up_ns[request_id] = self._kernel.now_ns + slo_ns + _GRACE_NS
        return request_id

    def _awaits(self, request_id: int) -> bool:
        return self._held is None and request_id in self._give_up_ns

    def leave(self) -> None:
        self._left = True
        super().leave()

    def cancel(self, request_id: int) -> None:
        self._give_up_ns.pop(request_id, None)
        super().cancel(request_id)

    def _say(self, message: Any) -> None:
        self._wire.send(FromClient(IDENTITY, message))
