"""The load-generating client in virtual time: the live client's session round the same load driver.

It says hello, loads the workload's models one kind after the other and waits for each (the controller
answers when their first weights are where they will be), sends what the driver says is due, a heartbeat
each second, and goodbye. Its clock is the world's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

from slosched.codes import Code
from slosched.config import CLIENT_HEARTBEAT_NS
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies import about
from slosched.errors import InvalidConfig, SloschedError
from slosched.loadgen.driver import LoadDriver
from slosched.loadgen.instances import copies_by_name, in_workload_order
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
    ModelInfo,
    Refused,
    Welcome,
)
from slosched.signature import digest, row_bytes
from slosched.sim.cluster import SimCluster
from slosched.sim.marks import Framed
from slosched.sim.network import SMALL_MESSAGE_BYTES, Wire
from slosched.telemetry.client_log import ClientRecord
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import Arrival, ClientUse, Workload
from slosched.workloads.composed import senders_of
from slosched.workloads.engine import Engine
from slosched.workloads.zoo import profile_hint

IDENTITY = b"client"
_INCARNATION = 7
#: The first request may be due this long after the models are loaded, as live.
_START_AFTER_NS = 50 * NS_PER_MS
#: Answers are awaited for the largest SLO sent and this much longer, as live.
_GRACE_NS = 2 * NS_PER_S


class _Sender(NamedTuple):
    """One of the clients that share a workload."""

    identity: bytes
    wire: Wire
    use: ClientUse


class LoadFailed(SloschedError):
    """The controller could not load a model of the workload; the message has its words."""


class UnknownModel(LoadFailed):
    """The workload names a model that the profile does not have, or asks for it in an impossible way."""

    exit_code = 2


class Phase(Enum):
    """Where a client stands."""

    HELLO = auto()
    LOADING = auto()
    SENDING = auto()
    DRAINING = auto()  # everything was sent; answers are awaited
    DONE = auto()


class SimClient:
    """One client of `cluster`. `on_record` gets every request once; `on_done` is called at its end.

    With `inputs` each request but each `without_input`-th brings one with a mark of its own, and each answer
    is held to it. `phase` says where it stands, `driver` counts (None while models are loading), `problem`
    says why it ended early.
    """

    def __init__(
        self,
        cluster: SimCluster,
        workload: Workload,
        engine: Engine,
        *,
        inputs: bool,
        without_input: int = 0,
        on_record: Callable[[ClientRecord], None] | None,
        on_done: Callable[[], None],
    ) -> None:
        self.phase = Phase.HELLO
        self.driver: LoadDriver | None = None
        self.models: list[ModelInfo] = []
        self._kernel = cluster.kernel
        self._marks = cluster.marks
        self._wire = cluster.add_client(IDENTITY, self._arrived if inputs else self._receive)
        self._engine = engine
        #: Who sends each group of the workload, as identity, wire and hello; empty: this client does.
        self._senders = self._join_senders(cluster, senders_of(workload))
        self._uses = workload.models()
        self._to_load = list(copies_by_name(self._uses).items())
        self._loaded: dict[str, tuple[ModelInfo, ...]] = {}
        self._inputs = inputs
        self._without_input = without_input
        self._output_bytes: dict[int, int] = {}  # by model id; empty where none come
        self._on_record = on_record
        self._on_done = on_done
        self._on_reply: Callable[[InferReply], None] | None = None
        self._input_bytes: dict[int, int] = {}  # by model id, at the greatest length
        self._default_slo_ns = 0
        self._echoes = False  # a controller that answers without running anything: no outputs
        self._next_id = 1
        self._due_ns = -1  # of the armed wake-up; -1: none is
        self.failure: SloschedError | None = None

    # ------------------------------------------------------------------------------- session

    def _join_senders(self, cluster: SimCluster, uses: Sequence[ClientUse]) -> list[_Sender]:
        joined = {"": _Sender(IDENTITY, self._wire, ClientUse("simulation"))}
        for use in uses:
            if use.name not in joined:
                identity = f"client {use.name}".encode()
                joined[use.name] = _Sender(
                    identity,
                    cluster.add_client(identity, partial(self._arrived, client=identity)),
                    use,
                )
        return [joined[use.name] for use in uses]

    def start(self) -> None:
        """Say hello; the rest follows from the answers."""
        self._say(ClientHello(PROTOCOL_VERSION, _INCARNATION, "simulation"))
        for identity, wire, (name, weight) in self._others():
            hello = ClientHello(PROTOCOL_VERSION, _INCARNATION, name, weight)
            wire.send(FromClient(identity, hello))
        self._kernel.at(self._kernel.now_ns + CLIENT_HEARTBEAT_NS, self._beat)

    def _others(self) -> list[_Sender]:
        """The senders beside this client itself, each once."""
        return [s for s in dict.fromkeys(self._senders) if s.identity != IDENTITY]

    def _say(self, message: ClientMessage) -> None:
        self._wire.send(FromClient(IDENTITY, message))

    def _say_for_all(self, message: ClientMessage) -> None:
        self._say(message)
        for identity, wire, _ in self._others():
            wire.send(FromClient(identity, message))

    def _beat(self, _: None) -> None:
        if self.phase is not Phase.DONE:
            self._say_for_all(ClientHeartbeat(self._kernel.now_ns))
            self._kernel.at(self._kernel.now_ns + CLIENT_HEARTBEAT_NS, self._beat)

    def _arrived(self, message: ControllerToClient | Framed, client: bytes = IDENTITY) -> None:
        """Something came over the connection of `client`: hold an answer to its request's mark."""
        if isinstance(message, Framed):
            reply: InferReply = message.message
            awaited = self._awaits(reply.request_id)
            self._marks.compare(client, reply.request_id, message.frames, awaited=awaited)
            self._receive(reply)
            return
        if self._output_bytes and type(message) is InferReply and not message.code:
            wanted = self._brings_input(message.request_id, self._output_bytes, message.model_id)
            self._marks.without_output(client, message, wanted=wanted)
        self._receive(message)

    def _awaits(self, request_id: int) -> bool:
        """False if an answer to the request is thrown away."""
        return True

    def _brings_input(self, request_id: int, sizes: dict[int, int], model_id: int) -> bool:
        """True if the request brings an input, and `sizes` has bytes for its model."""
        every = self._without_input
        return (not every or request_id % every != 0) and sizes.get(model_id, 0) > 0

    def _receive(self, message: ControllerToClient | Framed) -> None:
        if type(message) is InferReply:
            if self._on_reply is not None:
                self._on_reply(message)
                if self.phase is Phase.DRAINING or self._due_ns < 0:
                    self._end_if_quiet()
        elif isinstance(message, Welcome):
            self._default_slo_ns = message.default_slo_ns
            self._echoes = not about(message.policy).runs_models
            if self.phase is Phase.HELLO:
                self._load_next()
        elif isinstance(message, LoadModelReply):
            self._load_reply(message)
        elif isinstance(message, Refused):
            self._fail(LoadFailed(message.reason))

    def _fail(self, error: SloschedError) -> None:
        self.failure = error
        self._finish()

    def _finish(self) -> None:
        self.phase = Phase.DONE
        self._on_done()

    # ------------------------------------------------------------------------------- loading

    def _load_next(self) -> None:
        self.phase = Phase.LOADING
        if self._to_load:
            name, copies = self._to_load[0]
            self._say(LoadModelRequest(self._new_id(), name, copies))
        else:
            self.models = in_workload_order(self._uses, self._loaded)
            self._send_from_now()

    def _load_reply(self, reply: LoadModelReply) -> None:
        name, copies = self._to_load.pop(0)
        if reply.code:
            hint = profile_hint(name) if reply.code == Code.UNKNOWN_MODEL else ""
            wrong = reply.code in (Code.UNKNOWN_MODEL, Code.INVALID_REQUEST)
            kind = UnknownModel if wrong else LoadFailed
            self._fail(kind(f"cannot load {name!r}: {reply.reason}{hint}"))
            return
        self._loaded[name] = reply.models[:copies]
        self._load_next()

    def _new_id(self) -> int:
        request_id = self._next_id
        self._next_id = request_id + 1
        return request_id

    # ------------------------------------------------------------------------------- sending

    def _send_from_now(self) -> None:
        if not self.models:
            self._fail(InvalidConfig("the workload uses no model"))
            return
        self._input_bytes = self._sizes(self.models)
        self.phase = Phase.SENDING
        kernel = self._kernel
        driver = self.driver = LoadDriver(
            self,
            self.models,
            self._engine,
            clock=lambda: kernel.now_ns,
            on_record=self._on_record,
            on_due=self._arm,
        )
        due_ns = driver.start(kernel.now_ns + _START_AFTER_NS)
        kernel.at_end_of(driver.end_ns, self._stop_sending)
        self._armed_until(due_ns)

    def _sizes(self, models: Sequence[ModelInfo]) -> dict[int, int]:
        longest = {i.model_id: i.lengths[-1] if i.lengths else 0 for i in models}
        sizes = {i.model_id: row_bytes(i.inputs, longest[i.model_id]) for i in models}
        if self._inputs and not self._echoes:
            self._output_bytes.update(
                (i.model_id, row_bytes(i.outputs, longest[i.model_id])) for i in models
            )
        return sizes if self._inputs else dict.fromkeys(sizes, 0)

    def _arm(self, due_ns: int) -> None:
        if self.phase is Phase.SENDING and (self._due_ns < 0 or due_ns < self._due_ns):
            self._due_ns = due_ns
            self._kernel.at(due_ns, self._wake, due_ns)

    def _wake(self, due_ns: int) -> None:
        if due_ns != self._due_ns or self.phase is not Phase.SENDING:
            return  # an earlier one came in between
        self._due_ns = -1
        assert self.driver is not None
        self._armed_until(self.driver.issue_due())

    def _armed_until(self, due_ns: int | None) -> None:
        if due_ns is not None:
            self._arm(due_ns)
        else:
            self._end_if_quiet()

    def _stop_sending(self, _: None) -> None:
        """The workload's time is over: wait for the answers, but not for ever."""
        if self.phase is not Phase.SENDING:
            return
        assert self.driver is not None
        self.phase = Phase.DRAINING
        slo_ns = max(self.driver.max_slo_ns, self._default_slo_ns)
        self._kernel.at(self._kernel.now_ns + slo_ns + _GRACE_NS, self._give_up)
        self._end_if_quiet()

    def end_sending(self) -> None:
        """End the workload now, before its time."""
        self._stop_sending(None)

    def _end_if_quiet(self) -> None:
        """End when nothing is outstanding and nothing is due any more."""
        driver = self.driver
        if driver is None or driver.unanswered or self.phase is Phase.DONE:
            return
        if self.phase is Phase.DRAINING or driver.next_due_ns() is None:
            self._finish()

    def _give_up(self, _: None) -> None:
        if self.phase is Phase.DRAINING:
            self._finish()

    def leave(self) -> None:
        """Count what is unanswered as NO_ANSWER, and say goodbye."""
        self.phase = Phase.DONE
        if self.driver is not None:
            self.driver.give_up()
        self._say_for_all(Goodbye())

    # ----------------------------------------------------------------- the driver's submitter

    def flush(self) -> tuple[int, ...]:
        """Nothing waits: a message costs no CPU here."""
        return ()

    def submit(
        self, model: ModelInfo, arrival: Arrival, on_reply: Callable[[InferReply], None]
    ) -> int:
        """Send one request now; returns its id."""
        self._on_reply = on_reply
        identity, wire = IDENTITY, self._wire
        if self._senders:
            identity, wire, _ = self._senders[self._engine.group(arrival)]
        request_id = self._next_id
        self._next_id = request_id + 1
        if self._brings_input(request_id, self._input_bytes, model.model_id):
            message = InferRequest(
                request_id=request_id,
                model_id=model.model_id,
                slo_factor=arrival.slo_factor,
                slo_ns=arrival.slo_ns,
                user_id=arrival.user_id,
                shape=model.input_shape,
                dtype=model.input_dtype,
                length=arrival.length,
                signature=digest(model.inputs) if arrival.length else 0,
            )
            input_bytes = self._input_bytes[model.model_id]
            output_bytes = self._output_bytes.get(model.model_id, 0)
            if arrival.length:
                input_bytes = row_bytes(model.inputs, arrival.length)
                output_bytes = row_bytes(model.outputs, arrival.length)
            payload = self._marks.input(identity, request_id, input_bytes, output_bytes)
            framed = Framed(FromClient(identity, message), (payload,))
            wire.send(framed, SMALL_MESSAGE_BYTES + input_bytes)
        else:
            message = InferRequest(
                request_id=request_id,
                model_id=model.model_id,
                slo_factor=arrival.slo_factor,
                slo_ns=arrival.slo_ns,
                user_id=arrival.user_id,
                length=arrival.length,
            )
            wire.send(FromClient(identity, message))
        return request_id

    def cancel(self, request_id: int) -> None:
        """Tell the controller that the answer is not wanted any more."""
        self._say(CancelRequest(request_id))
