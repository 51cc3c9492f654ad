"""Workers that register, prove the join key, return elsewhere, are drained and leave: the controller's side."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.join_proof import proof_of
from slosched.core.scheduler.interface import (
    ConnectWorker,
    FromClient,
    Joining,
    Note,
    SendFailed,
    ToClient,
)
from slosched.core.scheduler.membership import JoinRules
from slosched.core.scheduler.state import WorkerState
from slosched.join_messages import Challenge, Register, Registered, RegistrationRefused
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    DrainWorkerReply,
    DrainWorkerRequest,
    Infer,
    LoadModel,
    WorkerGoodbye,
)

KEY = bytes(range(32))
RULES = JoinRules(KEY, b"seed")
OPERATED = SchedulerConfig(operators=("ops",))


def a_registration(name: str = "alpha", port: int = 12345, **fields: Any) -> Register:
    known: dict[str, Any] = {"protocol": PROTOCOL_VERSION, "incarnation": 7, "host": ""}
    return Register(name=name, port=port, **known | fields)


class Joins(Rig):
    """A rig whose workers register."""

    def __init__(
        self, config: SchedulerConfig | None = None, *, rules: JoinRules | None = None
    ) -> None:
        super().__init__(config, workers=0, join=rules or JoinRules())

    def register(
        self, message: Register | None = None, peer: bytes = b"w", source: str = "127.0.0.1"
    ) -> Any:
        """The answer to a registration."""
        before = len(self.effects)
        self.handle(Joining(peer, source, message or a_registration()))
        self.step()
        sent = [effect for effect in self.effects[before:] if isinstance(effect, ToClient)]
        answers = [effect.message for effect in sent if effect.client == peer]
        assert len(answers) == 1, answers
        return answers[0]

    def prove(self, message: Register, *, key: bytes = KEY, **changed: Any) -> Any:
        """Register, answer the challenge, and return the answer to that. `changed` after the proof was made."""
        challenge = self.register(message, source="10.0.0.9")
        assert isinstance(challenge, Challenge)
        claim = replace(message, nonce=challenge.nonce)
        proven = replace(claim, proof=proof_of(key, claim))
        return self.register(replace(proven, **changed), source="10.0.0.9")

    def drain(self, worker: str, *, undo: bool = False, client: bytes = b"ops") -> DrainWorkerReply:
        self.hello(client)
        self.handle(FromClient(client, DrainWorkerRequest(3, worker, undo)))
        self.step()
        return self.to_client(DrainWorkerReply)[-1]

    def wait(self, ms: int, *, beats: tuple[int, ...] = ()) -> None:
        """Let time pass; the workers `beats` go on saying something."""
        for _ in range(0, ms, 10):
            self.now_ns += 10 * MS
            for worker_id in beats:
                self.scheduler.sessions.heard(self.scheduler.cluster.workers[worker_id])
            self.step()

    def connections(self) -> list[tuple[int, str]]:
        return [(e.worker_id, e.address) for e in self.effects if isinstance(e, ConnectWorker)]

    def notes(self) -> list[str]:
        return [e.text for e in self.effects if isinstance(e, Note)]

    def state(self, worker_id: int = 0) -> WorkerState:
        return self.scheduler.cluster.workers[worker_id].state


def test_a_worker_that_registers_is_connected_to_and_greeted_as_one_of_the_list() -> None:
    rig = Joins()
    assert rig.register() == Registered(0)
    assert rig.connections() == [(0, "127.0.0.1:12345")]
    rig.wait(200)
    assert rig.to_worker(ControllerHello, 0)
    rig.join(0)
    rig.hello()
    assert len(rig.load()) == 1
    assert rig.register() == Registered(0)  # again, as it never heard of it
    assert len(rig.connections()) == 1
    assert rig.register(a_registration("beta", 12346)) == Registered(1)


def test_the_address_that_a_worker_advertises_is_taken_and_a_name_of_a_host_is_not() -> None:
    rig = Joins(rules=RULES)
    assert rig.prove(a_registration(host="10.1.2.3")) == Registered(0)
    assert rig.prove(a_registration("six", host="fd00::1")) == Registered(1)
    assert rig.connections() == [(0, "10.1.2.3:12345"), (1, "[fd00::1]:12345")]
    refused = rig.prove(a_registration("beta", host="gpu01"))
    assert isinstance(refused, RegistrationRefused) and "'gpu01'" in refused.reason


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    assert isinstance(Joins().register(a_registration(port=port)), RegistrationRefused)


@pytest.mark.parametrize("name", ["", "12", "a\nb", "x" * 129])
def test_a_name_that_could_not_be_shown_or_told_from_a_number_is_refused(name: str) -> None:
    refused = Joins().register(a_registration(name))
    assert isinstance(refused, RegistrationRefused) and "printable" in refused.reason


def test_without_a_key_only_workers_of_this_host_register() -> None:
    rig = Joins()
    for source in ("10.0.0.9", "", "fd00::1", "128.0.0.1"):
        refused = rig.register(source=source)
        assert isinstance(refused, RegistrationRefused) and "slosched keys join" in refused.reason
    for place, source in enumerate(("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1")):
        assert rig.register(a_registration(f"worker {place}", 1 + place), source=source) == (
            Registered(place)
        )


def test_a_key_is_proven_and_never_sent() -> None:
    rig = Joins(rules=RULES)
    assert rig.prove(a_registration()) == Registered(0)
    assert KEY not in repr(rig.effects).encode()


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "beta"},
        {"host": "10.6.6.6"},
        {"port": 6666},
        {"incarnation": 8},
        {"nonce": b"n" * 32},
        {"proof": b"p" * 32},
    ],
)
def test_a_proof_holds_for_what_it_was_made_for_alone(changed: dict[str, Any]) -> None:
    rig = Joins(rules=RULES)
    assert isinstance(rig.prove(a_registration(), **changed), RegistrationRefused)
    assert not rig.scheduler.cluster.workers


def test_another_key_a_proof_that_was_listened_to_and_an_old_nonce_are_refused() -> None:
    rig = Joins(rules=RULES)
    assert isinstance(rig.prove(a_registration(), key=KEY[::-1]), RegistrationRefused)
    challenge = rig.register(a_registration())
    claim = replace(a_registration(), nonce=challenge.nonce)
    proven = replace(claim, proof=proof_of(KEY, claim))
    # From another connection, which has a nonce of its own or none.
    assert isinstance(rig.register(proven, peer=b"x"), RegistrationRefused)
    other = rig.register(a_registration(), peer=b"y")
    assert other.nonce != challenge.nonce
    assert isinstance(rig.register(proven, peer=b"y"), RegistrationRefused)
    assert rig.register(proven) == Registered(0)
    assert isinstance(rig.register(proven), RegistrationRefused)  # the second time


def test_strangers_make_nothing_grow_and_are_noted_once_a_minute() -> None:
    rig = Joins(rules=RULES)
    for number in range(3000):
        rig.handle(Joining(f"{number}".encode(), "10.0.0.9", a_registration()))
        bad = a_registration(nonce=b"n" * 32, proof=b"p" * 32)
        rig.handle(Joining(b"bad", "10.0.0.9", bad))
    rig.step()
    assert len(rig.scheduler.membership._nonces) <= 1024
    assert sum("refused" in text for text in rig.notes()) == 1
    rig.now_ns += 61_000 * MS
    rig.register(bad, peer=b"bad")
    assert any("3000 registrations of workers were refused" in text for text in rig.notes())


def test_a_worker_of_another_version_is_told_so() -> None:
    refused = Joins().register(a_registration(protocol=1))
    assert isinstance(refused, RegistrationRefused) and "same version" in refused.reason


def test_a_worker_that_returns_under_its_name_takes_its_place_at_another_port() -> None:
    rig = Joins()
    rig.register()
    rig.join(0)
    again = a_registration(port=23456, incarnation=8)
    refused = rig.register(again)
    assert isinstance(refused, RegistrationRefused) and refused.code == Code.INITIALIZING
    rig.wait(1000)  # the old process is silent: lost
    assert rig.register(again) == Registered(0)
    assert rig.connections() == [(0, "127.0.0.1:12345"), (0, "127.0.0.1:23456")]
    assert list(rig.scheduler.cluster.workers) == [0]
    rig.join(0, session=60)
    assert rig.state() is WorkerState.JOINED


def test_the_number_of_workers_is_bounded_and_those_that_left_make_room() -> None:
    rig = Joins(SchedulerConfig(max_workers=2))
    rig.register()
    rig.register(a_registration("beta", 2))
    refused = rig.register(a_registration("gamma", 3))
    assert isinstance(refused, RegistrationRefused) and "--max-workers" in refused.reason
    for round_ in range(20):
        rig.join(0 if not round_ else 1 + round_, session=100 + round_)
        rig.from_worker(WorkerGoodbye(100 + round_), 0 if not round_ else 1 + round_)
        rig.step()
        assert rig.register(a_registration(f"next {round_}", 10 + round_)) == Registered(2 + round_)
        assert len(rig.scheduler.cluster.workers) <= 5


def test_a_worker_that_says_goodbye_leaves_and_may_return_in_its_place() -> None:
    rig = Joins()
    rig.register()
    rig.join(0)
    rig.from_worker(WorkerGoodbye(50), 0)
    rig.step()
    assert rig.state() is WorkerState.LEFT and rig.connections()[-1] == (0, "")
    rig.effects.clear()
    rig.wait(1500)
    assert not rig.to_worker(ControllerHello) and not rig.notes()
    rig.handle(SendFailed(0, ControllerHello(PROTOCOL_VERSION, 1, times_lost=0)))
    assert rig.register(a_registration(incarnation=8)) == Registered(0)
    assert rig.connections() == [(0, "127.0.0.1:12345")]


def test_a_worker_that_stays_silent_is_given_up_in_the_end() -> None:
    rig = Joins()
    rig.register()
    for _ in range(4_000):
        rig.now_ns += 160 * MS
        rig.step()
    assert rig.state() is WorkerState.LEFT
    assert any("was silent for 600s" in text for text in rig.notes()), rig.notes()[-1]


# --------------------------------------------------------------------------------- the list


def test_a_listed_worker_that_registers_too_has_one_place() -> None:
    rig = Rig(workers=1)
    worker = rig.scheduler.cluster.workers[0]
    worker.address = "127.0.0.1:12345"
    rig.handle(Joining(b"w", "127.0.0.1", a_registration()))
    assert list(rig.scheduler.cluster.workers) == [0] and worker.name == "alpha"
    rig.join(0)
    rig.from_worker(WorkerGoodbye(50), 0)
    rig.step()
    assert worker.state is WorkerState.SILENT  # it is on the list: it is greeted again


def test_a_process_that_is_listed_under_another_address_is_used_once() -> None:
    rig = Rig(workers=1)
    rig.scheduler.cluster.workers[0].address = "[::1]:12345"
    rig.handle(Joining(b"w", "127.0.0.1", a_registration()))
    assert list(rig.scheduler.cluster.workers) == [0, 1]
    rig.join(1, session=70)
    rig.join(0, session=70)  # its newest greeter
    states = [worker.state for worker in rig.scheduler.cluster.workers.values()]
    assert states == [WorkerState.JOINED, WorkerState.LEFT]
    assert len(rig.scheduler.cluster.gpus) == 1


# --------------------------------------------------------------------------------- draining


def two_workers(policy: str = "INFER5") -> tuple[Joins, Any]:
    rig = Joins(SchedulerConfig(policy=policy, operators=("ops",)))
    for worker_id, name in enumerate(("alpha", "beta")):
        rig.register(a_registration(name, 1 + worker_id))
        rig.join(worker_id, session=50 + worker_id)
    rig.hello()
    (model,) = rig.load()
    rig.effects.clear()
    return rig, model


@pytest.mark.parametrize("policy", ["INFER5", "FIFO", "EDF", "REJECT", "AIMD"])
def test_a_drained_worker_ends_what_it_holds_and_gets_nothing_new(policy: str) -> None:
    rig, model = two_workers(policy)
    requests = [rig.infer(model, slo_ms=2_000) for _ in range(6)]
    rig.step()
    running = rig.outstanding(0)
    assert running
    assert rig.drain("alpha") == DrainWorkerReply(3, 0, "", 0, "draining")
    sent = len(rig.to_worker(Infer, 0))
    for ms in range(10, 400, 10):
        rig.now_ns = T0 + ms * MS
        if ms < 300:
            requests.append(rig.infer(model, slo_ms=1_000))
        for worker_id in (0, 1):
            for infer in rig.outstanding(worker_id):
                rig.finish(infer, begin_ms=ms - 9.5, worker_id=worker_id)
            rig.scheduler.sessions.heard(rig.scheduler.cluster.workers[worker_id])
        rig.step()
    assert len(rig.to_worker(Infer, 0)) == sent
    assert {rig.reply(request).code for request in requests} == {0}
    assert rig.state(0) is WorkerState.DRAINED and rig.state(1) is WorkerState.JOINED
    assert any("is drained: it is out of use" in text for text in rig.notes())
    assert not any("lost" in text for text in rig.notes())


def test_a_drained_worker_comes_back_by_undo_with_its_models_prepared_anew() -> None:
    rig, _ = two_workers()
    assert rig.drain("0").state == "drained"  # it holds nothing
    rig.effects.clear()
    rig.wait(2000, beats=(1,))
    assert not rig.to_worker(ControllerHello, 0)
    assert rig.register(a_registration(port=1)) == Registered(0, drained=True)
    assert rig.drain("alpha", undo=True).state == "silent"
    rig.wait(200, beats=(1,))
    assert rig.to_worker(ControllerHello, 0)
    rig.join(0, session=60)
    assert rig.state() is WorkerState.JOINED and rig.to_worker(LoadModel, 0)


def test_a_new_process_of_a_drained_worker_is_used() -> None:
    rig, _ = two_workers()
    rig.drain("127.0.0.1:1")
    assert rig.state() is WorkerState.DRAINED
    assert rig.register(a_registration(port=1, incarnation=8)) == Registered(0)
    assert rig.state() is WorkerState.SILENT
    assert not rig.scheduler.cluster.workers[0].draining


def test_an_undo_while_it_drains_brings_it_back_once_that_has_ended() -> None:
    rig, model = two_workers()
    for _ in range(4):
        rig.infer(model, slo_ms=2_000)
    rig.step()
    assert rig.drain("alpha").state == "draining"
    assert rig.drain("alpha", undo=True).state == "joined"
    rig.now_ns += 10 * MS
    for infer in rig.outstanding(0):
        rig.finish(infer, begin_ms=1)
    rig.step()
    assert rig.state() is WorkerState.SILENT


def test_only_operators_drain_and_only_workers_that_are_there() -> None:
    rig, _ = two_workers()
    refused = rig.drain("alpha", client=b"c")
    assert refused.code == Code.INVALID_REQUEST and "--operators names ops" in refused.reason
    unknown = rig.drain("gamma")
    assert unknown.code == Code.INVALID_REQUEST and "alpha, beta" in unknown.reason
    assert rig.state() is WorkerState.JOINED


def test_a_worker_that_is_lost_while_it_drains_is_drained() -> None:
    rig, model = two_workers()
    requests = [rig.infer(model, slo_ms=9_000) for _ in range(4)]
    rig.step()
    rig.drain("alpha")
    rig.wait(1000, beats=(1,))
    assert rig.state() is WorkerState.DRAINED
    for _ in range(20):
        rig.now_ns += 10 * MS
        for infer in rig.outstanding(1):
            begin_ms = (rig.now_ns - T0) / MS - 9.5
            rig.finish(infer, begin_ms=begin_ms, worker_id=1)
        rig.step()
    assert {rig.reply(request).code for request in requests} == {0}
