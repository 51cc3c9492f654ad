"""The client's brain alone: what it sends, what its callers hear, and what it does when things go wrong."""

from __future__ import annotations

from typing import Any

from fake_controller import model_info
from slosched.codes import Code
from slosched.core.client.alarms import Alarms
from slosched.core.client.brain import LOST_AFTER_TICKS, TICK_NS, ClientBrain
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
    Overloaded,
    Replied,
    Restarted,
    SendFailed,
    Status,
    Unload,
    Why,
)
from slosched.core.client.requests import GRACE_NS, LOAD_AGAIN_NS
from slosched.message_types import FunctionInfo
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    Goodbye,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
    Refused,
    StatusReply,
    StatusRequest,
    UnloadModelReply,
    Welcome,
)
from slosched.transport.bundles import MAX_BUNDLED
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
SLO_NS = 100 * MS


class Rig:
    """A brain, its clock, and what it did."""

    def __init__(self, **given: Any) -> None:
        self.now_ns = 10**12
        self.brain = ClientBrain(address="there:1", incarnation=5, **given)
        self.effects: list[Effect] = []

    def do(self, event: Event) -> int | None:
        number = self.brain.handle(event, now_ns=self.now_ns)
        self.effects += self.brain.schedule(now_ns=self.now_ns)
        return number

    def hears(self, message: Any) -> None:
        self.do(message)

    def passes(self, ns: int) -> None:
        """Let time pass, with a wake-up whenever the brain asks for one."""
        ends_ns = self.now_ns + ns
        while (wake_ns := self.brain.next_wakeup_ns()) is not None and wake_ns <= ends_ns:
            self.now_ns = max(self.now_ns, wake_ns)
            self.effects += self.brain.schedule(now_ns=self.now_ns)
        self.now_ns = ends_ns

    def take(self, kind: type[Any]) -> list[Any]:
        """The effects of `kind` so far; they are taken out."""
        taken = [e for e in self.effects if isinstance(e, kind)]
        self.effects = [e for e in self.effects if not isinstance(e, kind)]
        return taken

    def welcome(self, incarnation: int = 7, default_slo_ns: int = 0) -> None:
        self.hears(Welcome(3, incarnation, "0", "FAKE", default_slo_ns))

    def opened(self) -> Rig:
        self.do(Open())
        self.welcome()
        self.effects.clear()
        return self

    def load(self, copies: int = 1, first_id: int = 0) -> tuple[HeldModel, ...]:
        number = self.do(Load("toy", copies, 60 * NS_PER_S))
        [request] = self.take(LoadModelRequest)
        self.hears(LoadModelReply(request.request_id, 0, "", infos(first_id, copies)))
        [replied] = self.take(Replied)
        assert replied.request_id == number
        models: tuple[HeldModel, ...] = replied.models
        return models

    def infer(self, model: HeldModel, **given: Any) -> int:
        number = self.do(Infer(model, SLO_NS, **given))
        assert number is not None
        return number


def infos(first_id: int, copies: int) -> tuple[Any, ...]:
    import msgspec

    return tuple(
        msgspec.structs.replace(model_info(first_id + copy), copy=copy) for copy in range(copies)
    )


def reply(request_id: int, code: int = 0) -> InferReply:
    return InferReply(request_id, code, "", 0, SLO_NS, 3 * MS, code == 0)


def test_hello_goes_out_until_it_is_answered() -> None:
    rig = Rig(name="me", weight=2.0)
    rig.do(Open())
    rig.passes(1200 * MS)
    assert rig.take(ClientHello) == [ClientHello(PROTOCOL_VERSION, 5, "me", 2.0)] * 3
    assert not rig.take(ClientHeartbeat)
    rig.welcome()
    assert rig.take(Greeted) and rig.brain.greeted
    rig.passes(2 * NS_PER_S)
    assert len(rig.take(ClientHeartbeat)) == 2


def test_without_a_connection_hello_is_tried_each_20_ms() -> None:
    rig = Rig()
    rig.do(Open())
    [hello] = rig.take(ClientHello)
    rig.do(SendFailed(hello))
    rig.passes(20 * MS)
    assert len(rig.take(ClientHello)) == 1


def test_a_controller_that_refuses_the_hello() -> None:
    rig = Rig()
    rig.do(Open())
    rig.hears(Refused(-1, 6, "another version"))
    assert rig.take(NotWelcome) == [NotWelcome("another version")]


def test_a_request_is_answered_once_however_often_its_reply_comes() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    number = rig.infer(model)
    [request] = rig.take(InferRequest)
    assert (request.request_id, request.model_id, request.slo_ns) == (number, 0, SLO_NS)
    rig.hears(reply(number))
    rig.hears(reply(number))
    assert rig.take(InferReply) == [reply(number)]
    assert rig.brain.requests.repeated == 1
    rig.hears(reply(99))
    assert not rig.take(InferReply) and len(rig.brain.requests) == 0


def test_a_cancelled_request_is_cancelled_at_the_controller_and_not_heard_of_again() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    number = rig.infer(model, bounded=True)
    rig.do(Cancel(number))
    rig.hears(reply(number, Code.CANCELLED))
    assert rig.take(CancelRequest) == [CancelRequest(number)]
    assert not rig.take(InferReply) and rig.brain.alarms == 1
    rig.do(Cancel(number))
    assert not rig.take(CancelRequest)


def test_a_bounded_request_ends_at_its_slo_and_a_grace() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    bounded, own = rig.infer(model, bounded=True), rig.infer(model, bounded=True, within_ns=50 * MS)
    endless = rig.infer(model)
    rig.passes(50 * MS)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (own, Why.LIMIT) and "50ms" in failed.reason
    for _ in range(5):  # the controller lives
        rig.passes(NS_PER_S)
        rig.welcome()
    assert not rig.take(Failed)
    rig.passes(SLO_NS + GRACE_NS - 5 * NS_PER_S)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (bounded, Why.LOST)
    assert "the SLO and 5s" in failed.reason
    assert {m.request_id for m in rig.take(CancelRequest)} == {own, bounded}
    assert len(rig.brain.requests) == 1 and rig.brain.requests.awaits(endless)


def test_a_restarted_controller_loses_what_it_had_and_the_models_follow() -> None:
    rig = Rig().opened()
    first, second = rig.load(copies=2)
    lost = [rig.infer(first, bounded=True, waits=True), rig.infer(second)]
    rig.take(InferRequest)
    rig.welcome(incarnation=8)
    assert {f.request_id for f in rig.take(Failed)} == set(lost)
    assert rig.take(Restarted) == [Restarted(lost=2, models=2)]
    assert (rig.brain.restarts, rig.brain.lost_requests) == (1, 2)
    [load] = rig.take(LoadModelRequest)
    assert (load.name, load.copies) == ("toy", 2)
    waits = rig.infer(second, bounded=True, waits=True)
    assert not rig.take(InferRequest) and "not loaded again yet" in rig.brain.unready(second)
    assert rig.infer(first) == 0  # it does not wait
    rig.hears(LoadModelReply(load.request_id, 0, "", infos(40, 2)))
    assert not rig.take(Replied)  # no caller asked
    [request] = rig.take(InferRequest)
    assert (request.request_id, request.model_id) == (waits, 41)
    assert first.info.model_id == 40 and not rig.brain.unready(first)
    rig.hears(reply(waits))
    assert [a.request_id for a in rig.take(InferReply)] == [waits]
    assert rig.brain.alarms == 1 and not len(rig.brain.questions)


def test_models_are_loaded_again_until_it_succeeds_and_through_a_second_restart() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    rig.welcome(incarnation=8)
    [load] = rig.take(LoadModelRequest)
    rig.hears(LoadModelReply(load.request_id, Code.INITIALIZING, "no worker yet"))
    assert "no worker yet" in rig.brain.unready(model)
    waits = rig.infer(model, bounded=True, waits=True)
    rig.passes(500 * MS)
    [load] = rig.take(LoadModelRequest)  # it is lost, as the process is
    rig.welcome(incarnation=9)
    [again] = rig.take(LoadModelRequest)
    rig.hears(LoadModelReply(load.request_id, 0, "", infos(3, 1)))
    assert rig.brain.unready(model)  # the old process's answer
    rig.hears(LoadModelReply(again.request_id, 0, "", infos(4, 1)))
    [request] = rig.take(InferRequest)
    assert (request.request_id, request.model_id) == (waits, 4)


def test_a_model_that_is_never_loaded_again_ends_who_waits_for_it() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    rig.welcome(incarnation=8)
    waits = rig.infer(model, bounded=True, waits=True)
    rig.take(Failed)
    for _ in range(LOAD_AGAIN_NS // NS_PER_S):
        rig.passes(NS_PER_S)
        rig.welcome(incarnation=8)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (waits, Why.LOST)
    assert "not loaded again within" in failed.reason


def test_what_was_unloaded_is_not_loaded_again() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    number = rig.do(Unload("toy", False, NS_PER_S))
    assert number is not None
    rig.hears(UnloadModelReply(number, 0, "", 1, 0))
    rig.welcome(incarnation=8)
    rig.passes(NS_PER_S)
    assert not rig.take(LoadModelRequest)
    failing = rig.infer(model, waits=True)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (failing, Why.WITHDRAWN)


def test_a_controller_that_forgot_us_gets_a_hello_and_the_request_again() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    waits, plain = rig.infer(model, waits=True), rig.infer(model)
    rig.take(InferRequest)
    rig.hears(Refused(waits, 6, "say hello first"))
    rig.hears(Refused(plain, 6, "say hello first"))
    assert len(rig.take(ClientHello)) == 1
    [answer] = rig.take(InferReply)
    assert answer.request_id == plain and answer.model_id == -1
    assert "say hello first" in answer.reason
    rig.welcome()
    assert [m.request_id for m in rig.take(InferRequest)] == [waits]
    rig.hears(Refused(waits, 6, "malformed"))  # the second time it is an answer
    assert [a.request_id for a in rig.take(InferReply)] == [waits]


def test_questions_are_asked_again_after_a_refusal_a_silence_and_a_restart() -> None:
    rig = Rig().opened()
    number = rig.do(Status(True, 60 * NS_PER_S))
    assert number is not None
    assert rig.take(StatusRequest) == [StatusRequest(number, True)]
    rig.hears(Refused(number, 6, "say hello first"))
    assert not rig.take(StatusRequest)
    rig.welcome()
    [second] = rig.take(StatusRequest)
    rig.passes(4 * NS_PER_S)
    [third] = rig.take(StatusRequest)
    rig.welcome(incarnation=8)
    [fourth] = rig.take(StatusRequest)
    for asked in (second, third):
        rig.hears(StatusReply(asked.request_id, {}))
    assert not rig.take(Replied)
    rig.hears(StatusReply(fourth.request_id, {"a": 1}))
    rig.hears(StatusReply(fourth.request_id, {"a": 1}))
    [replied] = rig.take(Replied)
    assert replied.request_id == number
    assert rig.brain.alarms == 1


def test_a_load_that_is_asked_again_may_be_answered_under_any_of_its_ids() -> None:
    rig = Rig().opened()
    number = rig.do(Load("toy", 1, 60 * NS_PER_S))
    rig.passes(4 * NS_PER_S)
    first, second = rig.take(LoadModelRequest)
    rig.hears(LoadModelReply(second.request_id, Code.LIMIT_REACHED, "too many loads"))
    assert not rig.take(Replied)  # the first message is one of those
    rig.hears(LoadModelReply(first.request_id, 0, "", infos(0, 1)))
    rig.hears(LoadModelReply(second.request_id, 0, "", infos(0, 1)))
    [replied] = rig.take(Replied)
    assert replied.request_id == number and rig.brain.alarms == 1
    assert not rig.brain.questions._by_wire_id


def test_a_question_ends_when_its_time_has_passed() -> None:
    rig = Rig().opened()
    number = rig.do(Status(False, NS_PER_S))
    rig.passes(NS_PER_S)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (number, Why.UNANSWERED)
    assert failed.reason == "the controller at there:1 did not answer status within 1s"


def test_a_load_waits_for_a_worker_as_long_as_it_may() -> None:
    rig = Rig().opened()
    number = rig.do(Load("toy", 1, 1200 * MS))
    for _ in range(3):
        [request] = rig.take(LoadModelRequest)
        rig.hears(LoadModelReply(request.request_id, Code.INITIALIZING, "no worker"))
        rig.passes(500 * MS)
    [replied] = rig.take(Replied)
    assert (replied.request_id, replied.reply.reason) == (number, "no worker")


def test_silence_ends_what_knows_no_time_limit() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    default = rig.do(Infer(model, bounded=True))
    timed = rig.do(Infer(model, 20 * NS_PER_S, bounded=True))
    asked = rig.do(Status(False, 60 * NS_PER_S))
    rig.passes((LOST_AFTER_TICKS + 1) * TICK_NS)
    assert {f.request_id for f in rig.take(Failed)} == {default, asked}
    assert "silent" in rig.brain.lost and len(rig.take(ClientHello)) >= LOST_AFTER_TICKS
    rig.welcome()
    assert not rig.brain.lost and timed is not None and rig.brain.requests.awaits(timed)


def test_requests_that_cannot_be_sent_are_lost() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    number = rig.infer(model)
    [request] = rig.take(InferRequest)
    rig.do(SendFailed(request))
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (number, Why.LOST)


def test_while_the_controller_is_crowded_requests_gather() -> None:
    rig = Rig(full=MAX_BUNDLED).opened()
    [model] = rig.load()
    number = rig.infer(model, bundled=True)
    rig.do(Overloaded((number,), Code.CONTROLLER_OVERLOADED, "too many"))
    [answer] = rig.take(InferReply)
    assert answer.code == Code.CONTROLLER_OVERLOADED
    rig.take(InferRequest)
    for _ in range(3):
        rig.infer(model, bundled=True)
    assert not rig.take(InferRequest) and rig.brain.requests.gathered == 3
    rig.passes(2 * MS)
    assert len(rig.take(InferRequest)) == 3
    for _ in range(MAX_BUNDLED):
        rig.infer(model, bundled=True)
    assert len(rig.take(InferRequest)) == MAX_BUNDLED
    rig.passes(NS_PER_S)
    rig.infer(model, bundled=True)
    assert len(rig.take(InferRequest)) == 1


def test_a_round_trip_is_told_once_with_a_later_request() -> None:
    rig = Rig(from_send=True)
    rig.do(Open())
    assert rig.take(ClientHello)[0].slo_from_send
    rig.welcome()
    [model] = rig.load()
    number = rig.infer(model)
    rig.passes(4 * MS)
    rig.hears(reply(number))  # 3 ms of it at the controller
    for _ in range(2):
        rig.infer(model)
    assert [m.round_trip_ns for m in rig.take(InferRequest)] == [0, MS, 0]


def test_closing_ends_everything() -> None:
    rig = Rig().opened()
    [model] = rig.load()
    ends = {rig.infer(model, bounded=True), rig.do(Status(False, NS_PER_S))}
    rig.do(Close())
    assert {f.request_id for f in rig.take(Failed)} == ends and len(rig.take(Goodbye)) == 1
    rig.do(Close())
    assert not rig.take(Goodbye) and rig.brain.next_wakeup_ns() is None
    assert rig.infer(model) == rig.infer(model, waits=True) == 0


def test_nothing_grows_with_the_number_of_requests() -> None:
    rig = Rig(from_send=True).opened()
    [model] = rig.load()
    for _ in range(2000):
        rig.hears(reply(rig.infer(model, bounded=True, waits=True, within_ns=NS_PER_S)))
        rig.effects.clear()
    brain = rig.brain
    assert len(brain.requests) == 0 and brain.alarms == 1
    assert len(brain._alarms._heap) < 200
    kept = [
        value for value in vars(brain.requests).values() if isinstance(value, (dict, set, list))
    ]
    assert not any(kept)


def test_alarms_ring_in_order_and_once() -> None:
    alarms = Alarms()
    for key, at_ns in (("b", 20), ("a", 10), ("c", 20), ("d", 30)):
        alarms.set(key, at_ns)
    alarms.set("a", 25)
    alarms.unset("d")
    assert alarms.next_ns() == 20
    assert [*alarms.due(25)] == ["b", "c", "a"]
    assert alarms.next_ns() is None and len(alarms) == 0


def _called(rig: Rig, **given: Any) -> int:
    """A call of a function with a limit of 10 s, sent to the controller."""
    import msgspec

    [info] = infos(0, 1)
    info = msgspec.structs.replace(info, function=FunctionInfo(limit_ns=10 * NS_PER_S))
    rig.do(Load("toy", 1, 60 * NS_PER_S))
    [request] = rig.take(LoadModelRequest)
    rig.hears(LoadModelReply(request.request_id, 0, "", (info,)))
    [replied] = rig.take(Replied)
    return rig.infer(replied.models[0], bounded=True, has_input=True, **given)


def _hears_for(rig: Rig, ns: int) -> None:
    for _ in range(ns // NS_PER_S):
        rig.passes(NS_PER_S)
        rig.welcome()


def test_a_call_that_runs_on_after_its_deadline_is_waited_for_up_to_its_functions_limit() -> None:
    rig = Rig().opened()
    number = _called(rig)
    _hears_for(rig, SLO_NS + GRACE_NS + 9 * NS_PER_S)
    assert not rig.take(Failed) and not rig.take(CancelRequest)
    rig.hears(InferReply(number, 105, "the time of a call", 0, 0, 0, False))
    assert [reply.code for reply in rig.take(InferReply)] == [105]
    late = _called(rig)
    _hears_for(rig, 2 * GRACE_NS + 12 * NS_PER_S)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (late, Why.LIMIT)
    assert "did not end within the limit of its function" in failed.reason
    assert rig.take(CancelRequest)


def test_a_late_call_of_a_controller_that_is_silent_is_lost() -> None:
    rig = Rig().opened()
    number = _called(rig)
    rig.passes(SLO_NS + GRACE_NS + 2 * TICK_NS)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (number, Why.LOST)


def test_a_late_call_keeps_its_callers_own_limit() -> None:
    rig = Rig().opened()
    number = _called(rig, within_ns=8 * NS_PER_S)
    _hears_for(rig, 8 * NS_PER_S)
    [failed] = rig.take(Failed)
    assert (failed.request_id, failed.why) == (number, Why.LIMIT)
    assert "timeout_s" in failed.reason
