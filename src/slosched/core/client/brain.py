"""The client's brain: the session with a controller, and everything that its callers wait for.

    closed --Open--> greeting --Welcome--> open        hello every 0.5 s, 20 ms where there is no connection
    greeting --Refused--> NotWelcome
    open --five ticks without a word--> lost           hello with every silent tick
    lost --a word--> open
    open --Welcome of another incarnation--> open      what was in flight is lost; held models are loaded again
    any --Close--> closed for good

Silence is counted in ticks that happened and not in time, so that a machine that stood still does not declare
its peer dead. The class is pure: every call brings the time, and a shell performs the effects (clients/ live,
sim/ in virtual time). Inferences are requests.py's, questions are questions.py's, models held.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slosched.codes import Code
from slosched.config import CLIENT_HEARTBEAT_NS, canonical_model
from slosched.core.client.alarms import Alarms
from slosched.core.client.held import Held
from slosched.core.client.interface import (
    Cancel,
    Close,
    Drain,
    Effect,
    Event,
    Failed,
    Greeted,
    HeldModel,
    Infer,
    ListModels,
    Load,
    NotWelcome,
    Open,
    Overloaded,
    Question,
    QuestionReply,
    Replied,
    Restarted,
    SendFailed,
    Status,
    Unload,
    Why,
)
from slosched.core.client.questions import Open as OpenQuestion
from slosched.core.client.questions import Questions
from slosched.core.client.requests import Requests
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHeartbeat,
    ClientHello,
    DrainWorkerReply,
    DrainWorkerRequest,
    Goodbye,
    InferReply,
    InferRequest,
    ListModelsReply,
    ListModelsRequest,
    LoadModelReply,
    LoadModelRequest,
    Refused,
    StatusReply,
    StatusRequest,
    UnloadModelReply,
    UnloadModelRequest,
    Welcome,
)
from slosched.units import NS_PER_MS, format_duration

#: The heartbeat, and the pause between two looks at whether the controller lives.
TICK_NS = CLIENT_HEARTBEAT_NS
#: Ticks in a row without a word after which the controller counts as lost.
LOST_AFTER_TICKS = 5
_HELLO_EVERY_NS = 500 * NS_PER_MS
_SEND_AGAIN_NS = 20 * NS_PER_MS
_ASKS = (
    LoadModelRequest,
    UnloadModelRequest,
    ListModelsRequest,
    StatusRequest,
    DrainWorkerRequest,
)
#: Within: of loads that the brain asks for itself, which have no end.
_NO_LIMIT_NS = 2**62
CLOSED = "the client was closed"


class ClientBrain:
    """One client. `incarnation` is random, one per process start; `address` is the controller's, for messages.

    `full` is how many requests one message carries at most. With `from_send` SLOs count from this client's
    sends to its receipts, else from arrival at the controller. `grace_ns` replaces requests.GRACE_NS.

    `controller` is what the controller said of itself (None before its Welcome), `lost` says in words that it
    has fallen silent. `restarts` counts other controllers that answered here, `lost_requests` what was in
    flight then.
    """

    def __init__(
        self,
        *,
        address: str,
        incarnation: int,
        name: str = "",
        weight: float = 1.0,
        full: int = 1,
        from_send: bool = False,
        grace_ns: int | None = None,
    ) -> None:
        self._address = address
        self._hello = ClientHello(PROTOCOL_VERSION, incarnation, name, weight, from_send)
        self.controller: Welcome | None = None
        self.lost = ""
        self.restarts = self.lost_requests = 0
        self.next_id = 1
        self.held = Held()
        self._effects: list[Effect] = []
        emit = self._emit
        self._alarms = Alarms()
        self.questions = Questions(
            self._alarms, new_id=self._new_id, emit=emit, address=address, answered=self._answered
        )
        self.requests = Requests(
            self._alarms,
            emit=emit,
            address=address,
            full=full,
            grace_ns=grace_ns,
            from_send=from_send,
        )
        self._there = 0  # the incarnation whose Welcome is the last; 0: none yet
        self._begun = self._closed = self._greeted = False
        self._heard = False
        self._silent_ticks = 0
        self._handlers: dict[type, Callable[[Any, int], int | None]] = {
            Infer: self._infer,
            Cancel: self._cancel,
            Overloaded: self._overloaded,
            SendFailed: self._send_failed,
            Open: self._open,
            Close: self._close,
            **dict.fromkeys((Load, Unload, ListModels, Status, Drain), self._ask),
            InferReply: self.requests.replied,
            Welcome: self._welcome,
            Refused: self._refused,
            **dict.fromkeys(
                (LoadModelReply, UnloadModelReply, ListModelsReply, StatusReply, DrainWorkerReply),
                self._replied,
            ),
        }

    # ------------------------------------------------------------------------- three verbs

    def handle(self, event: Event, *, now_ns: int) -> int | None:
        """Take in a fact. For an Infer or a question, returns the number that its end is told under.

        0 for an Infer that does not wait and cannot be sent now: `unready` says why.
        """
        return self._handlers[type(event)](event, now_ns)

    def schedule(self, *, now_ns: int) -> list[Effect]:
        """Do what is due; returns what the shell must do, in order."""
        next_ns = self._alarms.next_ns()
        if next_ns is not None and next_ns <= now_ns:
            for key in self._alarms.due(now_ns):
                self._ring(key, now_ns)
        effects, self._effects = self._effects, []
        if self.requests.gathered:
            effects += self.requests.take_gathered(now_ns)
        return effects

    def next_wakeup_ns(self) -> int | None:
        """When `schedule` next has something to do, if no event comes before."""
        return self._alarms.next_ns()

    # ------------------------------------------------------------------------ what is asked

    @property
    def greeted(self) -> bool:
        """True if the controller knows this client, as far as that is known here."""
        return self._greeted

    @property
    def alarms(self) -> int:
        """Times that are set: the heartbeat, and the limits of what is not answered."""
        return len(self._alarms)

    def unready(self, model: HeldModel) -> str:
        """Why an Infer on `model` cannot be sent now; empty if it can."""
        if model.incarnation == self._there and not model.unloaded:
            return ""
        name = model.info.name
        if self._closed:
            return CLOSED
        if model.unloaded:
            return f"model {name!r} was unloaded through this client; load it again"
        return (
            f"the controller at {self._address} was restarted, and model {name!r} is not loaded again yet"
            f"{self.questions.why_not_loaded}"
        )

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _new_id(self) -> int:
        number = self.next_id
        self.next_id = number + 1
        return number

    def _ready(self, model: HeldModel) -> bool:
        return self._greeted and model.incarnation == self._there

    def _infer(self, event: Infer, now_ns: int) -> int:
        model = event.model
        request_id = self.next_id
        if model.incarnation == self._there and not model.unloaded:
            self.next_id = request_id + 1
            if self._greeted or not event.waits:
                self.requests.send(request_id, event, now_ns)
            else:
                self.requests.wait(request_id, event, now_ns)
            return request_id
        if not event.waits or self._closed:
            return 0
        self.next_id = request_id + 1
        if model.unloaded:
            reason = self.unready(model)
            self._emit(Failed(request_id, Why.WITHDRAWN, reason, int(Code.CANCELLED)))
        else:
            self.requests.wait(request_id, event, now_ns)
        return request_id

    def _ask(self, event: Question, now_ns: int) -> int:
        return self.questions.ask(event, now_ns=now_ns, greeted=self._there != 0)

    def _cancel(self, event: Cancel, now_ns: int) -> None:
        if not self.questions.cancel(event.request_id):
            self.requests.cancel(event.request_id)

    # ------------------------------------------------------------------------------ session

    def _open(self, event: Open, now_ns: int) -> None:
        if not self._begun:
            self._begun = True
            self._alarms.set("tick", now_ns + TICK_NS)
        self._greeted = False
        self._say_hello(now_ns)

    def _say_hello(self, now_ns: int) -> None:
        self._emit(self._hello)
        if not self._there:  # later the tick repeats it
            self._alarms.set("hello", now_ns + _HELLO_EVERY_NS)

    def _close(self, event: Close, now_ns: int) -> None:
        if self._closed:
            return
        self._closed = True
        self._there = 0  # nothing is ready any more
        self._emit(Goodbye())
        self._alarms.unset("tick")
        self._alarms.unset("hello")
        self.questions.drop_own()
        self.questions.fail_all(CLOSED)
        self.requests.fail_all(CLOSED)

    def _ring(self, key: Any, now_ns: int) -> None:
        if key == "tick":
            self._tick(now_ns)
        elif key == "gather":
            self.requests.gather_no_longer()
        elif key == "hello":
            if not self._there:
                self._say_hello(now_ns)
        elif key[0] == "ask":
            self.questions.ask_again(key[1], now_ns)
        elif key[0] == "end":
            self.questions.limit_passed(key[1], now_ns)
        else:
            self.requests.limit_passed(key[1], now_ns, self.questions.why_not_loaded)

    def _tick(self, now_ns: int) -> None:
        """Tell the controller that we live, and find out whether it does."""
        self._alarms.set("tick", now_ns + TICK_NS)
        if not self._there:
            return  # one that does not know us yet would refuse a heartbeat that is ahead of our hello
        self._emit(ClientHeartbeat(now_ns))
        if self._heard or self.requests.heard:
            self._heard = self.requests.heard = False
            self._silent_ticks = 0
            if not self._greeted:
                self._say_hello(now_ns)
            return
        self._silent_ticks += 1
        self._say_hello(now_ns)  # it answers with its incarnation, so a restart shows as well
        # Each tick from then on: a request made during the silence ends as well.
        if self._silent_ticks >= LOST_AFTER_TICKS:
            silent_ns = LOST_AFTER_TICKS * CLIENT_HEARTBEAT_NS
            self.lost = f"the controller at {self._address} has been silent for {format_duration(silent_ns)}"
            self.questions.fail_all(self.lost)
            self.requests.silent(self.lost)

    # ------------------------------------------------------------------- from the controller

    def _overloaded(self, event: Overloaded, now_ns: int) -> None:
        self._heard = True
        self.requests.overloaded(event.request_ids, event.code, event.reason, now_ns)

    def _welcome(self, message: Welcome, now_ns: int) -> None:
        if self._closed:
            return
        self._heard = True
        before, self._there = self._there, message.incarnation
        self.controller = message
        self.requests.default_slo_ns = message.default_slo_ns
        self.lost, self._greeted = "", True
        self._alarms.unset("hello")
        self._emit(Greeted())
        anew = before not in (0, message.incarnation)
        if anew:
            self._restarted()
        self.questions.welcomed(now_ns, anew=anew)
        if anew:
            self._load_again(now_ns)
        self.requests.sendable_again(self._ready, now_ns)

    def _restarted(self) -> None:
        """It is another process, which knows neither our models nor our requests."""
        self.restarts += 1
        self.questions.drop_own()
        lost = self.requests.lose_sent(
            f"the controller at {self._address} was restarted; send the request again"
        )
        self.lost_requests += lost
        self._emit(Restarted(lost, self.held.missing(self._there)))

    def _load_again(self, now_ns: int) -> None:
        self.questions.why_not_loaded = ""
        for name, copies in self.held.to_load_again():
            load = Load(name, copies, _NO_LIMIT_NS)
            self.questions.ask(load, now_ns=now_ns, greeted=True, own=True)

    def _answered(self, open_: OpenQuestion, reply: QuestionReply, now_ns: int) -> None:
        """A question has its answer: what it changes here, and the word to its caller."""
        question = open_.question
        models: tuple[HeldModel, ...] = ()
        if isinstance(question, Load) and isinstance(reply, LoadModelReply) and not reply.code:
            infos = reply.models[: question.copies]
            models = self.held.loaded(question.name, infos, self._there)
            self.requests.sendable_again(self._ready, now_ns)
        elif isinstance(question, Unload) and isinstance(reply, UnloadModelReply):
            self._unloaded(question.name, reply.code)
        if not open_.own:
            self._emit(Replied(open_.number, reply, models))

    def _unloaded(self, name: str, code: int) -> None:
        if code not in (Code.OK, Code.UNKNOWN_MODEL):
            return
        self.held.unloaded(name)
        for each in self.held.under(name) or [canonical_model(name)]:
            self.questions.drop_own(each)
            reason = f"model {each!r} was unloaded through this client; load it again"
            self.requests.withdrawn(each, reason)

    def _replied(self, reply: QuestionReply, now_ns: int) -> None:
        self._heard = True
        self.questions.replied(reply, now_ns)

    def _refused(self, message: Refused, now_ns: int) -> None:
        if self._closed:
            return
        self._heard = True
        if not self._there:
            if message.request_id < 0:
                self._alarms.unset("hello")
                self._emit(NotWelcome(message.reason))
            return
        reason = f"the controller at {self._address} refuses: {message.reason}"
        if not self.questions.refused(message.request_id, message.code, reason, now_ns):
            self.requests.refused(message.request_id, message.code, reason, now_ns)
        if self._greeted:  # it may have forgotten us, after a restart or a long silence
            self._greeted = False
            self._say_hello(now_ns)

    def _send_failed(self, event: SendFailed, now_ns: int) -> None:
        message = event.message
        if isinstance(message, InferRequest):
            self.requests.send_failed(message.request_id)
        elif isinstance(message, _ASKS):
            self.questions.send_failed(message.request_id, now_ns)
        elif message is self._hello and not self._there:
            self._alarms.set("hello", now_ns + _SEND_AGAIN_NS)
