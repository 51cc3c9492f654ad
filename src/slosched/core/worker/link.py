"""The worker's side of its one session: its controller, the heartbeat, the two clocks.

    no session --hello--> serving A --the same hello again--> serving A (same session)
    serving A --hello of A, which has lost this worker--> handing over --> serving A (a new session)
    serving A --hello of B, A heard within a second--> refused
    serving A --hello of B, A silent--> handing over (A's running work ends first) --> serving B

What the worker holds belongs to a cluster, which a controller names in its hello: the next controller of that
cluster finds it as it was, and any other one finds the worker empty.

A session's number is the worker's incarnation plus the count of sessions before it, so an action that was
meant for an earlier session, or for an earlier process of this worker, is never taken for one of the open
session.
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
#: A controller that was not heard for this long, two heartbeats and some, may be gone.
_SERVED_NS = 500 * NS_PER_MS
#: A new session begins with quick exchanges, so that the clocks agree before the first action.
_QUICK_EXCHANGES = 8
_QUICK_NS = 5 * NS_PER_MS
#: An answer to an older heartbeat is ignored.
_ACK_WITHIN_NS = 10 * NS_PER_S


class HelloOutcome(Enum):
    #: The session that is open, or about to be, is the one that it asks for.
    REPEATED = auto()
    #: The same controller lost this worker: end the session, keep the prepared models.
    RENEWED = auto()
    #: A new controller: end the old session; forget its models unless both are of one cluster.
    TAKE_OVER = auto()


@dataclass(frozen=True, slots=True)
class Identity:
    """How a worker describes itself in a Welcome."""

    incarnation: int
    version: str
    host: str
    pid: int
    device: str


class Link:
    """Sessions, heartbeat times and clock conversion. Times are on the worker's clock."""

    def __init__(self, incarnation: int, *, heartbeat_ns: int = HEARTBEAT_NS) -> None:
        self._next_session = incarnation
        self._heartbeat_ns = heartbeat_ns
        self._quick_left = 0
        self._heard_ns = 0
        self._controller = 0  # incarnation of the controller that is served, or will be
        self._times_lost = 0  # the largest count in its hellos: how often it has lost this worker
        self.session: int | None = None
        self._last_action = -1  # of this session
        self.peer = b""
        self.clock = ClockSync()
        self.due_ns = 0
        self.handing_over = False
        self.forgetting = False  # the next session is of another cluster
        self.keeps_weights = False  # the next session begins with the weights that are there
        self._cluster = ""  # of the controller that is served, or will be
        self._held_cluster = ""  # of what the worker holds

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
        same = known and message.incarnation == self._controller
        if same and message.times_lost <= self._times_lost:
            # It was sent before the Welcome arrived, or it is an old hello that came late.
            if message.times_lost == self._times_lost:
                self.peer, self._heard_ns = peer, now_ns
            return HelloOutcome.REPEATED
        if same:
            # It says hello only after it has given up the session and everything queued in it, so none of that
            # may still run beside what it sends next.
            self.peer, self._heard_ns = peer, now_ns
            self.session = None
            self._times_lost = message.times_lost
            self._hands_over_to(message)
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
        self.forgetting = not message.cluster or message.cluster != self._held_cluster
        self._hands_over_to(message)
        return HelloOutcome.TAKE_OVER

    def _hands_over_to(self, message: ControllerHello) -> None:
        self.handing_over = True
        self._cluster = message.cluster
        self.keeps_weights = bool(message.cluster) and message.keeps_weights

    @property
    def tells_inventory(self) -> bool:
        """The controller is of a cluster, and takes over what the worker holds of it."""
        return bool(self._cluster)

    @property
    def answers(self) -> tuple[int, int]:
        """Incarnation and `times_lost` of the hello that the open session answers."""
        return self._controller, self._times_lost

    def open(self, *, now_ns: int) -> int:
        """Begin a new session, as nothing of the old one runs any more. Returns its number."""
        self.handing_over = self.forgetting = False
        self._held_cluster = self._cluster
        self.session = self._next_session
        self._last_action = -1
        self._next_session = (self._next_session + 1) & (2**63 - 1)
        self.clock = ClockSync()
        self._quick_left = _QUICK_EXCHANGES
        self.due_ns = now_ns
        return self.session

    def is_served(self, *, now_ns: int) -> bool:
        known = self.session is not None or self.handing_over
        return known and now_ns - self._heard_ns < _SERVED_NS

    def is_new(self, action_id: int) -> bool:
        """False for an action that came before: within a session ids ascend, in the order of sending."""
        if action_id <= self._last_action:
            return False
        self._last_action = action_id
        return True

    def heard(self, now_ns: int) -> None:
        self._heard_ns = now_ns

    def acknowledge(self, peer: bytes, ack: HeartbeatAck, *, now_ns: int) -> bool:
        """Take the answer to a heartbeat. False if it does not belong to this session."""
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

    def heartbeat_sent(self, *, now_ns: int) -> None:
        """A heartbeat goes out now: set the time of the next one."""
        if self._quick_left > 0:
            self._quick_left -= 1
            self.due_ns = now_ns + _QUICK_NS
        else:
            self.due_ns = now_ns + self._heartbeat_ns
