"""A worker's registrar: when it asks, what it proves, and what it tells its operator."""

from __future__ import annotations

from msgspec.structs import replace

from slosched.codes import Code
from slosched.core.join_proof import is_proven
from slosched.core.worker.registrar import Registrar
from slosched.join_messages import Challenge, Register, Registered, RegistrationRefused
from slosched.messages import (
    PROTOCOL_VERSION,
)
from slosched.units import NS_PER_MS, NS_PER_S

KEY = b"k" * 32
MESSAGE = Register(
    protocol=PROTOCOL_VERSION, incarnation=7, name="alpha", host="10.0.0.1", port=12345
)


class Tried:
    """A registrar in virtual time; `sent` and `notes` have what it said."""

    def __init__(self, key: bytes = b"") -> None:
        self.registrar = Registrar("ctl:12346", MESSAGE, key)
        self.now_ns = 10 * NS_PER_S
        self.sent: list[Register] = []
        self.notes: list[str] = []

    def answer(self, message: Challenge | Registered | RegistrationRefused) -> None:
        sent, notes = self.registrar.handle(message, now_ns=self.now_ns)
        self.sent += sent
        self.notes += [note.text for note in notes]

    def run(self, ms: int, *, served: bool = False) -> int:
        """Let time pass, and return how often it asked."""
        before, until_ns = len(self.sent), self.now_ns + ms * NS_PER_MS
        while self.now_ns < until_ns:
            if self.now_ns >= self.registrar.due_ns:
                sent, notes = self.registrar.schedule(served=served, now_ns=self.now_ns)
                self.sent += sent
                self.notes += [note.text for note in notes]
            self.now_ns += 10 * NS_PER_MS
        return len(self.sent) - before


def test_it_asks_again_and_again_with_growing_pauses_and_says_so_once() -> None:
    tried = Tried()
    assert tried.run(1_500) == 4  # after 0, 200, 600 and 1,400 ms
    assert not tried.notes
    assert 28 <= tried.run(60_000) <= 31  # each two seconds, for ever
    assert tried.notes == ["the controller at ctl:12346 does not answer; trying again"]
    assert set(tried.sent) == {MESSAGE}


def test_without_a_connection_it_looks_often_and_asks_as_soon_as_there_is_one() -> None:
    tried = Tried()
    for _ in range(200):
        tried.run(60)
        tried.registrar.not_sent(now_ns=tried.now_ns)
    assert tried.notes == ["the controller at ctl:12346 does not answer; trying again"]
    assert tried.run(1_500) == 4  # with the first pauses, now that it is answered by nothing


def test_it_is_quiet_while_a_controller_is_heard_and_asks_soon_when_it_is_not() -> None:
    tried = Tried()
    tried.run(10_000)
    tried.answer(Registered(3))
    assert tried.notes[-1] == "registered with the controller at ctl:12346 as worker 3 (alpha)"
    assert tried.run(5_000, served=True) == 0
    assert tried.run(300) == 2


def test_a_challenge_is_answered_with_a_proof_at_once() -> None:
    tried = Tried(KEY)
    tried.run(10)
    tried.answer(Challenge(b"n" * 32))
    proven = tried.sent[-1]
    assert proven.nonce == b"n" * 32 and is_proven(KEY, proven)
    assert not is_proven(b"x" * 32, proven) and not is_proven(KEY, replace(proven, name="b"))
    assert replace(proven, nonce=b"", proof=b"") == MESSAGE
    assert not tried.notes


def test_a_challenge_without_a_key_is_a_refusal_that_says_what_to_give() -> None:
    tried = Tried()
    for _ in range(5):
        tried.run(2_000)
        tried.answer(Challenge(b"n" * 32))
    assert len(tried.notes) == 1 and "--join-key FILE" in tried.notes[0]
    assert set(tried.sent) == {MESSAGE}


def test_a_refusal_is_told_once_for_each_reason_and_one_that_may_pass_only_when_it_lasts() -> None:
    tried = Tried()
    tried.run(200)
    tried.answer(RegistrationRefused(Code.INITIALIZING, "the name is in use"))
    assert not tried.notes
    for _ in range(30):
        tried.run(200)
        tried.answer(RegistrationRefused(Code.INITIALIZING, "the name is in use"))
    assert len(tried.notes) == 1 and "the name is in use" in tried.notes[0]
    tried.answer(RegistrationRefused(Code.INVALID_REQUEST, "full"))
    assert len(tried.notes) == 2 and "refuses this worker: full" in tried.notes[1]


def test_a_drained_worker_says_so_and_asks_seldom() -> None:
    tried = Tried()
    tried.run(100)
    tried.answer(Registered(3, drained=True))
    assert tried.notes == ["worker 3 (alpha) is drained by an operator: it waits to be taken back"]
    asked = 0
    for _ in range(10):
        asked += tried.run(2_000)
        tried.answer(Registered(3, drained=True))
    assert asked <= 11 and len(tried.notes) == 1
