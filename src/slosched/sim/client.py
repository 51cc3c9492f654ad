"""The load-generating client in virtual time: the client's brain round the same load driver as live.

It says hello, loads the workload's models one kind after the other and waits for each (the controller
answers when their first weights are where they will be), sends what the driver says is due, and goodbye.
Its session is core/client's, as the live one's is; its clock is the world's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto

from slosched.codes import Code
from slosched.core.client.brain import ClientBrain
from slosched.core.client.interface import (
    Cancel,
    Close,
    Effect,
    Event,
    Failed,
    Greeted,
    HeldModel,
    Infer,
    Load,
    NotWelcome,
    Open,
    Replied,
)
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies import about
from slosched.errors import ConnectionLost, InvalidConfig, SloschedError
from slosched.loadgen.driver import LoadDriver
from slosched.loadgen.instances import copies_by_name, in_workload_order
from slosched.messages import (
    ClientMessage,
    ControllerToClient,
    InferReply,
    InferRequest,
    LoadModelReply,
    Message,
    ModelInfo,
)
from slosched.signature import row_bytes
from slosched.sim.cluster import SimCluster
from slosched.sim.marks import Framed
from slosched.sim.network import SMALL_MESSAGE_BYTES
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
GRACE_NS = 2 * NS_PER_S
#: A load has no end of its own: the run ends, or its faults do.
_NO_LIMIT_NS = 2**61


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


class _Sender:
    """One session: the client's own, or one of the clients that share a workload."""

    __slots__ = ("armed_ns", "brain", "identity", "wire")

    def __init__(
        self,
        cluster: SimCluster,
        identity: bytes,
        use: ClientUse,
        arrived: Callable[[_Sender, ControllerToClient | Framed], None],
        *,
        from_send: bool,
    ) -> None:
        self.identity = identity
        self.brain = ClientBrain(
            address="the controller's",
            incarnation=_INCARNATION,
            name=use.name,
            weight=use.weight,
            from_send=from_send,
            grace_ns=GRACE_NS,
        )
        self.wire = cluster.add_client(identity, lambda message: arrived(self, message))
        self.armed_ns = -1  # of the brain's wake-up; -1: none is armed


class SimClient:
    """One client of `cluster`. `on_record` gets every request once; `on_done` is called at its end.

    With `inputs` each request but each `without_input`-th brings one with a mark of its own, and each answer
    is held to it. `phase` says where it stands, `driver` counts (None while models are loading), `problem`
    says why it ended early.
    """

    #: Whether requests end at their SLO and a grace without an answer, and each second one waits while its
    #: model is loaded again (EnduringClient).
    bounded = False
    #: Whether SLOs count from the client's send to its receipt; a workload's count from arrival.
    slo_from_send = False

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
        self._engine = engine
        self._own = self._new_sender(cluster, IDENTITY, ClientUse("simulation"))
        #: Every session, and who sends each group of the workload (empty: this client does).
        self._sessions = [self._own]
        self._senders = self._join_senders(cluster, senders_of(workload))
        self._uses = workload.models()
        self._to_load = list(copies_by_name(self._uses).items())
        self._loaded: dict[str, tuple[HeldModel, ...]] = {}
        self._held: list[HeldModel] = []  # as `models`
        self._inputs = inputs
        self._without_input = without_input
        self._bringing: dict[int, HeldModel] = {}  # models of the unanswered requests with inputs
        self._on_record = on_record
        self._on_done = on_done
        self._on_reply: Callable[[InferReply], None] | None = None
        self._due_ns = -1  # of the armed wake-up; -1: none is
        self.failure: SloschedError | None = None

    # ------------------------------------------------------------------------------- session

    def _new_sender(self, cluster: SimCluster, identity: bytes, use: ClientUse) -> _Sender:
        return _Sender(cluster, identity, use, self._arrived, from_send=self.slo_from_send)

    def _join_senders(self, cluster: SimCluster, uses: Sequence[ClientUse]) -> list[_Sender]:
        joined = {"": self._own}
        for use in uses:
            if use.name not in joined:
                identity = f"client {use.name}".encode()
                joined[use.name] = self._new_sender(cluster, identity, use)
                self._sessions.append(joined[use.name])
        return [joined[use.name] for use in uses]

    @property
    def brain(self) -> ClientBrain:
        """That of the client's own session."""
        return self._own.brain

    def start(self) -> None:
        """Say hello; the rest follows from the answers."""
        for sender in self._sessions:
            self._do(sender, Open())

    def _do(self, sender: _Sender, event: Event) -> int | None:
        """One event, and all that follows from it."""
        number = sender.brain.handle(event, now_ns=self._kernel.now_ns)
        self._step(sender)
        return number

    def _step(self, sender: _Sender) -> None:
        brain, now_ns = sender.brain, self._kernel.now_ns
        for effect in brain.schedule(now_ns=now_ns):
            self._perform(sender, effect)
        wake_ns = brain.next_wakeup_ns()
        if wake_ns is not None and not 0 <= sender.armed_ns <= wake_ns:
            sender.armed_ns = wake_ns
            self._kernel.at(wake_ns, self._ring, (sender, wake_ns))

    def _ring(self, armed: tuple[_Sender, int]) -> None:
        sender, wake_ns = armed
        if sender.armed_ns == wake_ns:  # else an earlier one came in between
            sender.armed_ns = -1
            self._step(sender)

    def _perform(self, sender: _Sender, effect: Effect) -> None:
        if isinstance(effect, InferReply):
            self._answered(effect)
        elif isinstance(effect, Message):
            self._send(sender, effect)
        elif self.phase is Phase.DONE:
            return
        elif isinstance(effect, Failed):
            self._failed(effect)
        elif isinstance(effect, Replied):
            if isinstance(effect.reply, LoadModelReply):
                self._load_reply(effect.reply, effect.models)
        elif isinstance(effect, NotWelcome):
            self._fail(LoadFailed(effect.reason))
        elif isinstance(effect, Greeted) and sender is self._own and self.phase is Phase.HELLO:
            self._load_next()

    def _send(self, sender: _Sender, message: ClientMessage) -> None:
        held = self._bringing.get(message.request_id) if type(message) is InferRequest else None
        if held is not None and isinstance(message, InferRequest):
            length = message.length or _longest(held.info)
            input_bytes = row_bytes(held.info.inputs, length)
            output_bytes = row_bytes(held.info.outputs, length)
            payload = self._marks.input(
                sender.identity, message.request_id, input_bytes, output_bytes
            )
            framed = Framed(FromClient(sender.identity, message), (payload,))
            sender.wire.send(framed, SMALL_MESSAGE_BYTES + input_bytes)
        else:
            sender.wire.send(FromClient(sender.identity, message))

    def _arrived(self, sender: _Sender, message: ControllerToClient | Framed) -> None:
        """Something came over the connection of `sender`: hold an answer to its request's mark."""
        if isinstance(message, Framed):
            reply: InferReply = message.message
            awaited = sender.brain.requests.awaits(reply.request_id)
            self._marks.compare(sender.identity, reply.request_id, message.frames, awaited=awaited)
            self._do(sender, reply)
            return
        if self._bringing and type(message) is InferReply and not message.code:
            held = self._bringing.get(message.request_id)
            wanted = held is not None and self._has_output(held.info)
            self._marks.without_output(sender.identity, message, wanted=wanted)
        self._do(sender, message)

    def _has_output(self, info: ModelInfo) -> bool:
        """False under a controller that answers without running anything: no outputs come."""
        welcome = self.brain.controller
        runs_models = welcome is not None and about(welcome.policy).runs_models
        return runs_models and row_bytes(info.outputs, _longest(info)) > 0

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
            self._do(self._own, Load(name, copies, _NO_LIMIT_NS))
        else:
            self._send_from_now()

    def _load_reply(self, reply: LoadModelReply, models: tuple[HeldModel, ...]) -> None:
        name, _ = self._to_load[0]
        if reply.code:
            hint = profile_hint(name) if reply.code == Code.UNKNOWN_MODEL else ""
            wrong = reply.code in (Code.UNKNOWN_MODEL, Code.INVALID_REQUEST)
            kind = UnknownModel if wrong else LoadFailed
            self._fail(kind(f"cannot load {name!r}: {reply.reason}{hint}"))
            return
        self._to_load.pop(0)
        self._loaded[name] = models
        self._load_next()

    # ------------------------------------------------------------------------------- sending

    def _send_from_now(self) -> None:
        self._held = in_workload_order(self._uses, self._loaded)
        self.models = [held.info for held in self._held]
        if not self.models:
            self._fail(InvalidConfig("the workload uses no model"))
            return
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
        slo_ns = max(self.driver.max_slo_ns, self.brain.requests.default_slo_ns)
        self._kernel.at(self._kernel.now_ns + slo_ns + GRACE_NS, self._give_up)
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
        for sender in self._sessions:
            self._do(sender, Close())

    def _answered(self, reply: InferReply) -> None:
        self._bringing.pop(reply.request_id, None)
        if self._on_reply is not None and self.phase is not Phase.DONE:
            self._on_reply(reply)
            self._after_an_end()

    def _failed(self, failed: Failed) -> None:
        """A request is lost. (A load without an answer has failed.)"""
        self._bringing.pop(failed.request_id, None)
        if self.phase is Phase.LOADING:
            self._fail(LoadFailed(failed.reason))
        elif self.driver is not None:
            self.driver.lost(failed.request_id)
            self._after_an_end()

    def _after_an_end(self) -> None:
        if self.phase is Phase.DRAINING or self._due_ns < 0:
            self._end_if_quiet()

    # ----------------------------------------------------------------- the driver's submitter

    def flush(self) -> tuple[int, ...]:
        """Nothing waits: a message costs no CPU here."""
        return ()

    def submit(
        self, model: ModelInfo, arrival: Arrival, on_reply: Callable[[InferReply], None]
    ) -> int:
        """Send one request now; returns its id. Raises ConnectionLost while its model is loaded again."""
        self._on_reply = on_reply
        sender = self._own
        if self._senders:
            sender = self._senders[self._engine.group(arrival)]
            sender.brain.next_id = self._next_id()
        brain, held = sender.brain, self._held[arrival.instance]
        waits = self.bounded and brain.next_id % 2 == 0
        has_input = self._brings_input(brain.next_id, held.info)
        if has_input:
            self._bringing[brain.next_id] = held
        request_id = self._do(
            sender,
            Infer(
                held,
                arrival.slo_ns,
                arrival.slo_factor,
                arrival.user_id,
                has_input,
                arrival.length,
                bundled=True,
                bounded=self.bounded,
                waits=waits,
            ),
        )
        if not request_id:
            self._bringing.pop(brain.next_id, None)
            raise ConnectionLost(brain.unready(held), code=Code.CANCELLED)
        return request_id

    def _next_id(self) -> int:
        """All sessions of one client draw their ids from one row."""
        return max(sender.brain.next_id for sender in self._sessions)

    def _brings_input(self, request_id: int, info: ModelInfo) -> bool:
        every = self._without_input
        return (
            self._inputs
            and (not every or request_id % every != 0)
            and row_bytes(info.inputs, _longest(info)) > 0
        )

    def cancel(self, request_id: int) -> None:
        """Tell the controller that the answer is not wanted any more."""
        self._bringing.pop(request_id, None)
        for sender in self._sessions:
            if sender.brain.requests.awaits(request_id):
                self._do(sender, Cancel(request_id))


def _longest(info: ModelInfo) -> int:
    """The greatest length of the model's inputs; 0 where no dimension varies."""
    return info.lengths[-1] if info.lengths else 0
