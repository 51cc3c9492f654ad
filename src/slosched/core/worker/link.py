"""The worker's side of its one session: who the controller is, the heartbeat, the two clocks.

    nobody --hello--> serving A --the same hello again--> serving A (same session)
    serving A --hello of A, which has lost us--> handing over --> serving A (a new session)
    serving A --hello of B, A heard within a second--> refused
    serving A --hello of B, A silent--> handing over (A's running work ends first) --> serving B

A session's number is the worker's incarnation plus the count of sessions before it, so actions that
were meant for an earlier session, or for an earlier life of the worker, cannot be taken for ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from slosched.codes import Code
from slosched.config import HEARTBEAT_NS
from slosched.core.clock_sync import ClockSync
from slosched.messages import PROTOCOL_VERSION, ControllerHello, HeartbeatAck, WorkerRefused
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: A controller heard within this time keeps its worker.
_KEEP_NS = NS_PER_S
#: A new session begins with quick exchanges, so that the clocks agree before the first action.
_QUICK_EXCHANGES = 8
_QUICK_NS = 5 * NS_PER_MS
#: An answer to a heartbeat older than this is none of ours.
_ACK_WITHIN_NS = 10 * NS_PER_S


class HelloOutcome(Enum):
    REPEATED = auto()  # the session that is open, or about to be, is the one that it asks for
    RENEWED = auto()  # the same controller lost us: end the old session, keep the prepared models
    TAKE_OVER = auto()  # a new controller: end the old session, forget its models


@dataclass(frozen=True, slots=True)
class Identity:
    """What a worker says of itself in a Welcome."""

    incarnation: int
    version: str
    host: str
    pid: int
    device: str
    loadable: tuple[str, ...]
    put_aside: tuple[tuple[str, str], ...] = ()


class Link:
    """Sessions, heartbeat times and clock conversion. Times without a word are the worker's."""

    def __init__(self, incarnation: int, *, heartbeat_ns: int = HEARTBEAT_NS) -> None:
        self._next_session = incarnation
        self._heartbeat_ns = heartbeat_ns
        self._quick_left = 0
        self._heard_ns = 0
        self._controller = 0  # the incarnation that we serve, or will
        self._times_lost = 0  # the count in that controller's last hello
        self.session: int | None = None
        self.peer = b""
        self.clock = ClockSync()
        self.due_ns = 0
        self.handing_over = False
        self.forgetting = False  # the next session is another controller's

    def hello(
        self, peer: bytes, message: ControllerHello, *, version: str, now_ns: int
    ) -> HelloOutcome | WorkerRefused:
        if message.protocol != PROTOCOL_VERSION:
            return WorkerRefused(
                Code.INVALID_REQUEST,
                f"the controller speaks protocol {message.protocol}, this worker (slosched {version}) "
                f"protocol {PROTOCOL_VERSION}: install the same version on both",
            )
        known = self.session is not None or self.handing_over
        ours = known and message.incarnation == self._controller
        if ours and message.times_lost <= self._times_lost:
            # It was said before the Welcome came, and waited; or it is an old one that came late.
            if message.times_lost == self._times_lost:
                self.peer, self._heard_ns = peer, now_ns
            return HelloOutcome.REPEATED
        if ours:
            # It says hello only when it has given our session up and everything that was queued in
            # it, so nothing of that may still run beside what it sends next.
            self.peer, self._heard_ns = peer, now_ns
            self.session = None
            self._times_lost = message.times_lost
            self.handing_over = True
            return HelloOutcome.RENEWED
        silent_ns = now_ns - self._heard_ns
        if known and silent_ns < _KEEP_NS:
            return WorkerRefused(
                Code.INITIALIZING,
                "it is in use by another controller, which was heard "
                f"{format_duration(silent_ns)} ago; it becomes free {format_duration(_KEEP_NS)} after that one "
                "goes silent",
            )
        self.peer, self._controller, self._heard_ns = peer, message.incarnation, now_ns
        self.session = None
        self._times_lost = message.times_lost
        self.handing_over = self.forgetting = True
        return HelloOutcome.TAKE_OVER

    def open(self, *, now_ns: int) -> int:
        """Nothing of the old session runs any more: begin the new one. Returns its number."""
        self.handing_over = self.forgetting = False
        self.session = self._next_session
        self._next_session = (self._next_session + 1) & (2**63 - 1)
        self.clock = ClockSync()
        self._quick_left = _QUICK_EXCHANGES
        self.due_ns = now_ns
        return self.session

    def heard(self, now_ns: int) -> None:
        self._heard_ns = now_ns

    def acknowledge(self, peer: bytes, ack: HeartbeatAck, *, now_ns: int) -> bool:
        """Take the answer to a heartbeat. False if it is none of this session's."""
        age_ns = now_ns - ack.heartbeat_sent_ns
        if self.session is None or peer != self.peer or not 0 <= age_ns < _ACK_WITHIN_NS:
            return False
        self._heard_ns = now_ns
        return self.clock.add(
            sent_ns=ack.heartbeat_sent_ns,
            received_ns=ack.received_ns,
            answered_ns=ack.sent_ns,
            returned_ns=now_ns,
        )

    def next_heartbeat_ns(self) -> int | None:
        return None if self.session is None else self.due_ns

    def heartbeat_sent(self, *, now_ns: int) -> None:
        """One heartbeat goes out now: when is the next?"""
        if self._quick_left > 0:
            self._quick_left -= 1
            self.due_ns = now_ns + _QUICK_NS
        else:
            self.due_ns = now_ns + self._heartbeat_ns
