"""Questions to the controller: loads, unloads, lists and status. Each has one answer, and each an end.

    asked --reply--> Replied                asked --its time is over--> Failed (UNANSWERED)
    asked --INITIALIZING--> asked again after 0.5 s, until its time is over
    asked --nothing for 4, 8, 16 s ...--> asked again; the first answer to any of its messages counts
    asked --refused (the controller forgot us)--> asked again after its Welcome; twice: Failed (REFUSED)
    asked --another controller says Welcome--> asked again
    asked --five silent ticks--> Failed (LOST)

What the brain asks for itself, to load again what its callers hold, has no end but an answer of code 0.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.config import canonical_model
from slosched.core.client.alarms import Alarms
from slosched.core.client.interface import (
    Drain,
    Effect,
    Failed,
    Load,
    Question,
    QuestionReply,
    Status,
    Unload,
    Why,
)
from slosched.messages import (
    ClientMessage,
    DrainWorkerRequest,
    ListModelsRequest,
    LoadModelReply,
    LoadModelRequest,
    StatusRequest,
    UnloadModelRequest,
)
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: A load that found no worker yet is asked for again after this time, and one of our own that failed.
AGAIN_NS = 500 * NS_PER_MS
#: The longest pause between two tries of our own.
_OWN_AGAIN_NS = 4 * NS_PER_S
#: A question may have been lost when no answer has come for this long, and for twice as long each further time.
_PATIENCE_NS = 4 * NS_PER_S
#: While there is no connection.
_SEND_AGAIN_NS = 20 * NS_PER_MS


class Open:
    """One question that is not answered yet."""

    __slots__ = (
        "again_ns",
        "asked",
        "ends_ns",
        "last",
        "number",
        "own",
        "patience_ns",
        "question",
        "refused",
        "wire_ids",
    )

    def __init__(self, number: int, question: Question, ends_ns: int, own: bool) -> None:
        self.number = number  # what the caller knows it by
        self.question = question
        self.ends_ns = ends_ns
        self.own = own  # the brain's, not a caller's
        #: Of its messages that may still be answered; empty: it waits for a Welcome, or for its next turn.
        self.wire_ids: list[int] = []
        self.asked = False
        self.patience_ns = _PATIENCE_NS
        self.again_ns = AGAIN_NS
        self.refused = False
        self.last: LoadModelReply | None = None  # of code INITIALIZING


class Questions:
    """The open questions. `new_id` draws message ids; `answered(open, reply, now_ns)` takes each answer.

    Alarms have the keys ("ask", number) and ("end", number).
    """

    def __init__(
        self,
        alarms: Alarms,
        *,
        new_id: Callable[[], int],
        emit: Callable[[Effect], None],
        address: str,
        answered: Callable[[Open, QuestionReply, int], None],
    ) -> None:
        self._alarms, self._new_id, self._emit = alarms, new_id, emit
        self._address = address
        self._answered = answered
        self._open: dict[int, Open] = {}  # by number
        self._by_wire_id: dict[int, Open] = {}
        self.why_not_loaded = (
            ""  # the controller's last words about a load of our own, behind a colon
        )

    def __len__(self) -> int:
        return len(self._open)

    def ask(self, question: Question, *, now_ns: int, greeted: bool, own: bool = False) -> int:
        """Ask; returns the number under which the answer comes."""
        number = self._new_id()
        open_ = Open(number, question, now_ns + question.within_ns, own)
        self._open[number] = open_
        if not own:
            self._alarms.set(("end", number), open_.ends_ns)
        if greeted:
            self._send(open_, now_ns)
        return number

    def _send(self, open_: Open, now_ns: int) -> None:
        wire_id = self._new_id() if open_.asked else open_.number
        open_.asked = True
        open_.wire_ids.append(wire_id)
        self._by_wire_id[wire_id] = open_
        self._emit(_message(open_.question, wire_id))
        self._alarms.set(("ask", open_.number), now_ns + open_.patience_ns)
        open_.patience_ns *= 2

    def ask_again(self, number: int, now_ns: int) -> None:
        """The pause of a question is over."""
        open_ = self._open.get(number)
        if open_ is not None:
            self._send(open_, now_ns)

    def welcomed(self, now_ns: int, *, anew: bool) -> None:
        """The controller knows us (again): ask what it refused, or, if it is `anew` another one, everything."""
        for open_ in [*self._open.values()]:
            if anew:
                self._forget_messages(open_)
            if not open_.wire_ids:
                open_.patience_ns, open_.again_ns = _PATIENCE_NS, AGAIN_NS
                self._send(open_, now_ns)

    def _forget_messages(self, open_: Open) -> None:
        for wire_id in open_.wire_ids:
            del self._by_wire_id[wire_id]
        open_.wire_ids.clear()

    # ------------------------------------------------------------------------------- answers

    def replied(self, reply: QuestionReply, now_ns: int) -> None:
        open_ = self._taken(reply.request_id)
        if open_ is None:
            return  # answered before, or given up
        if isinstance(reply, LoadModelReply) and reply.code:
            if reply.code == Code.LIMIT_REACHED and open_.wire_ids:
                return  # too many loads are waited for, and an earlier message of this one is among them
            if open_.own:
                self.why_not_loaded = f": {reply.reason}"
            if open_.own or self._comes_up(open_, reply, now_ns):
                self._pause(open_, now_ns)
                return
        self._take_off(open_)
        self._answered(open_, reply, now_ns)

    def _taken(self, wire_id: int) -> Open | None:
        """Whose message `wire_id` was; it is answered by now."""
        open_ = self._by_wire_id.pop(wire_id, None)
        if open_ is not None:
            open_.wire_ids.remove(wire_id)
        return open_

    def _comes_up(self, open_: Open, reply: LoadModelReply, now_ns: int) -> bool:
        """No worker is there yet, and the caller has time to wait for one."""
        if reply.code != Code.INITIALIZING:
            return False
        open_.last = reply
        return now_ns + AGAIN_NS < open_.ends_ns

    def _pause(self, open_: Open, now_ns: int) -> None:
        open_.patience_ns = _PATIENCE_NS
        self._alarms.set(("ask", open_.number), now_ns + open_.again_ns)
        if open_.own:
            open_.again_ns = min(2 * open_.again_ns, _OWN_AGAIN_NS)

    def refused(self, wire_id: int, code: int, reason: str, now_ns: int) -> bool:
        """The controller did not take the message `wire_id`. False if no question sent it."""
        open_ = self._taken(wire_id)
        if open_ is None:
            return False
        if open_.own:
            self._pause(open_, now_ns)
        elif open_.refused:
            self._fail(open_, Why.REFUSED, reason, code)
        else:
            open_.refused = True
            self._forget_messages(open_)
            self._alarms.unset(("ask", open_.number))
        return True

    def send_failed(self, wire_id: int, now_ns: int) -> None:
        open_ = self._taken(wire_id)
        if open_ is not None:
            open_.patience_ns = _PATIENCE_NS
            self._alarms.set(("ask", open_.number), now_ns + _SEND_AGAIN_NS)

    # ---------------------------------------------------------------------------------- ends

    def limit_passed(self, number: int, now_ns: int) -> None:
        open_ = self._open.get(number)
        if open_ is None:
            return
        if open_.last is not None:  # what it said before tells more: no worker was there
            self._take_off(open_)
            self._answered(open_, open_.last, now_ns)
            return
        within = format_duration(open_.question.within_ns)
        what = _words(open_.question)
        self._fail(
            open_,
            Why.UNANSWERED,
            f"the controller at {self._address} did not answer {what} within {within}",
        )

    def cancel(self, number: int) -> bool:
        """Its caller does not wait any more. False if there is no such question."""
        open_ = self._open.get(number)
        if open_ is not None:
            self._take_off(open_)
        return open_ is not None

    def fail_all(self, reason: str) -> None:
        """None of the callers' is answered any more."""
        for open_ in [each for each in self._open.values() if not each.own]:
            self._fail(open_, Why.LOST, reason)

    def drop_own(self, name: str = "") -> None:
        """Give up what the brain asked for itself: all, or the loads of `name`."""
        for open_ in [each for each in self._open.values() if each.own]:
            asked = open_.question
            if not name or (isinstance(asked, Load) and canonical_model(asked.name) == name):
                self._take_off(open_)

    def _fail(self, open_: Open, why: Why, reason: str, code: int = Code.CANCELLED) -> None:
        self._take_off(open_)
        self._emit(Failed(open_.number, why, reason, int(code)))

    def _take_off(self, open_: Open) -> None:
        del self._open[open_.number]
        self._forget_messages(open_)
        self._alarms.unset(("ask", open_.number))
        self._alarms.unset(("end", open_.number))


def _message(question: Question, wire_id: int) -> ClientMessage:
    if isinstance(question, Load):
        return LoadModelRequest(wire_id, question.name, question.copies)
    if isinstance(question, Unload):
        return UnloadModelRequest(wire_id, question.name, question.force)
    if isinstance(question, Status):
        return StatusRequest(wire_id, question.brief)
    if isinstance(question, Drain):
        return DrainWorkerRequest(wire_id, question.worker, question.undo)
    return ListModelsRequest(wire_id)


def _words(question: Question) -> str:
    if isinstance(question, Load):
        return f"load {question.name!r}"
    if isinstance(question, Unload):
        return f"unload {question.name!r}"
    if isinstance(question, Drain):
        return f"drain {question.worker!r}"
    return "status" if isinstance(question, Status) else "models"
