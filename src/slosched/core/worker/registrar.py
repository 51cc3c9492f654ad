"""The worker's side of membership: it registers with a controller, and goes on trying for as long as it lives.

    looking --Registered--> registered --greeted--> served --its controller is silent--> looking
    looking --RegistrationRefused--> refused --a later try--> registered

While a controller is heard, this one or another, the worker asks for nothing. Each change of state is one line
for the operator. Times are on the worker's clock.
"""

from __future__ import annotations

from msgspec.structs import replace

from slosched.codes import Code
from slosched.core.join_proof import proof_of
from slosched.core.worker.interface import Note
from slosched.join_messages import Challenge, MembershipReply, Register, Registered
from slosched.units import NS_PER_MS, NS_PER_S

#: The pause between two tries doubles from the first to the second of these.
_FIRST_PAUSE_NS, _LONGEST_PAUSE_NS = 200 * NS_PER_MS, 2 * NS_PER_S
#: A look whether the connection is there costs microseconds, and the controller nothing.
_CONNECTED_SOON_NS = 50 * NS_PER_MS
#: A silence or a refusal that passes within this time is not reported.
_REPORTED_AFTER_NS = 2 * NS_PER_S


class Registrar:
    """Decides when to register what. `message` has no proof; `key` is the join key, or empty.

    `controller` is the address, for notes.
    """

    def __init__(self, controller: str, message: Register, key: bytes) -> None:
        self._controller, self._message, self._key = controller, message, key
        self._since_ns = -1  # from when it has not been served; -1: it is
        self._last_line = ""  # of the operator's
        self._pause_ns = _FIRST_PAUSE_NS
        self._asked_ns = -1  # of a try that has no answer; -1: there is none
        self.due_ns = 0  # of the next `schedule`

    @property
    def waits(self) -> bool:
        """True while an answer of the controller may come."""
        return self._asked_ns >= 0

    def handle(self, message: MembershipReply, *, now_ns: int) -> tuple[list[Register], list[Note]]:
        """Take in an answer of the controller; returns what to send, and notes."""
        self._asked_ns = -1
        if isinstance(message, Challenge):
            if not self._key:
                return [], self._refused("it wants a join key; give it with --join-key FILE")
            claim = replace(self._message, nonce=message.nonce)
            self._asked_ns = now_ns
            return [replace(claim, proof=proof_of(self._key, claim))], []
        if isinstance(message, Registered):
            self._pause_ns = min(self._pause_ns, NS_PER_S)
            place = f"worker {message.worker_id} ({self._message.name})"
            if message.drained:
                self._pause_ns = _LONGEST_PAUSE_NS
                return [], self._change(
                    f"{place} is drained by an operator: it waits to be taken back"
                )
            where = f"registered with the controller at {self._controller} as {place}"
            return [], self._change(where)
        lasts = self._since_ns >= 0 and now_ns - self._since_ns > _REPORTED_AFTER_NS
        if message.code == Code.INITIALIZING and not lasts:
            return [], []
        return [], self._refused(message.reason)

    def schedule(self, *, served: bool, now_ns: int) -> tuple[list[Register], list[Note]]:
        """Ask for a place if it is time to; `served`: a controller was heard lately."""
        if served:
            self._since_ns = -1
            self._pause_ns, self._asked_ns = _FIRST_PAUSE_NS, -1
            self._last_line = ""
            self.due_ns = now_ns + _FIRST_PAUSE_NS // 2
            return [], []
        if self._since_ns < 0:
            self._since_ns = now_ns
        notes: list[Note] = []
        if self.waits and now_ns - self._since_ns > _REPORTED_AFTER_NS:
            text = f"the controller at {self._controller} does not answer; trying again"
            notes = self._change(text, level="warning")
        self._asked_ns = now_ns
        self.due_ns = now_ns + self._pause_ns
        self._pause_ns = min(2 * self._pause_ns, _LONGEST_PAUSE_NS)
        return [self._message], notes

    def not_sent(self, *, now_ns: int) -> None:
        """There is no connection: nothing was asked. Once there is one, the controller is asked soon."""
        self._pause_ns = _FIRST_PAUSE_NS
        self.due_ns = now_ns + _CONNECTED_SOON_NS

    def _refused(self, reason: str) -> list[Note]:
        text = f"the controller at {self._controller} refuses this worker: {reason}; trying again"
        return self._change(text, level="warning")

    def _change(self, text: str, level: str = "info") -> list[Note]:
        if text == self._last_line:
            return []
        self._last_line = text
        return [Note(level, text)]
