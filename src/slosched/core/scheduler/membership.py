"""Who belongs to the cluster: workers register under names, and operators drain them.

    unknown --registers--> a place (silent) --answers the hello--> joined --goodbye--> left
    joined --drain--> draining --what it holds has ended--> drained --undo, or a new process--> silent
    joined --lost--> silent --registers, perhaps at another address--> silent

A name has one place, which keeps its number. A process that registers under the name of one that is joined
waits until that is lost: two living workers would take turns at the place for ever. Who must prove that it
holds the join key is decided here: each worker where the controller has a key; and without a key only
connections from this host are taken. Whatever a stranger can make grow is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from slosched.addresses import is_loopback, network_address
from slosched.codes import Code
from slosched.core.join_proof import is_proven, nth_nonce
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.foreign_text import printable
from slosched.core.scheduler.interface import Joining, Note, ToClient
from slosched.core.scheduler.sessions import Sessions
from slosched.core.scheduler.state import Client, Worker, WorkerState
from slosched.errors import InvalidConfig
from slosched.join_messages import (
    Challenge,
    MembershipReply,
    Register,
    Registered,
    RegistrationRefused,
)
from slosched.messages import (
    PROTOCOL_VERSION,
    DrainWorkerReply,
    DrainWorkerRequest,
)
from slosched.units import NS_PER_S

#: Nonces that were sent and not used; the oldest goes first.
_NONCES_KEPT = 1024
_NOTE_EVERY_NS = 60 * NS_PER_S
_NAME_CHARS = 128


@dataclass(frozen=True, slots=True)
class JoinRules:
    """The join key (empty: none), and 32 random bytes from which nonces are drawn."""

    key: bytes = b""
    nonce_seed: bytes = b""


class Membership:
    """The places of the cluster's workers, which `sessions` keeps."""

    def __init__(self, cluster: Cluster, sessions: Sessions, rules: JoinRules) -> None:
        self._cluster, self._sessions, self._rules = cluster, sessions, rules
        self._nonces: dict[bytes, bytes] = {}  # by peer, in the order of their making
        self._nonces_made = 0
        self._refused = 0  # since the last note
        self._note_due_ns = 0

    # ---------------------------------------------------------------------------- registering

    def register(self, event: Joining, *, now_ns: int) -> None:
        """A worker asks for a place: give it one, have it prove itself, or refuse it."""
        reply = self._reply(event)
        if isinstance(reply, RegistrationRefused) and reply.code != Code.INITIALIZING:
            self._note_refusal(event, reply.reason, now_ns)
        self._cluster.emit(ToClient(event.peer, reply))

    def _reply(self, event: Joining) -> MembershipReply:
        message, key = event.message, self._rules.key
        if message.protocol != PROTOCOL_VERSION:
            return _refused(
                f"this controller speaks protocol {PROTOCOL_VERSION}, the worker {message.protocol}: "
                "install the same version of slosched on both"
            )
        nonce = self._nonces.pop(event.peer, b"")  # it holds once
        if key:
            if not message.proof:
                return self._challenge(event.peer)
            if not nonce or message.nonce != nonce or not is_proven(key, message):
                return _refused("its join key is not this controller's (--join-key)")
        elif not is_loopback(event.source):
            return _refused(
                "a worker on another host needs a join key: make one with `slosched keys join FILE` and "
                "give it to both with --join-key FILE"
            )
        name = message.name
        if not name or name != printable(name, _NAME_CHARS) or name.isdecimal():
            return _refused(
                f"a worker's name is 1 to {_NAME_CHARS} printable characters, and not a number"
            )
        try:
            address = network_address(message.host or event.source, message.port)
        except InvalidConfig as error:
            return _refused(str(error))
        return self._place(message, address)

    def _challenge(self, peer: bytes) -> Challenge:
        if len(self._nonces) >= _NONCES_KEPT:
            del self._nonces[next(iter(self._nonces))]
        self._nonces_made += 1
        nonce = self._nonces[peer] = nth_nonce(self._rules.nonce_seed, self._nonces_made)
        return Challenge(nonce)

    def _place(self, message: Register, address: str) -> MembershipReply:
        """Find the place of the worker's name, or make one."""
        name, incarnation = message.name, message.incarnation
        worker = self._known(name, address)
        if worker is None:
            full = self._make_room()
            if full:
                return _refused(full)
            worker = self._sessions.new_place(name, incarnation, address)
            self._note("info", f"worker {worker.label} has registered")
            return Registered(worker.worker_id)
        same = worker.incarnation in (0, incarnation)
        if worker.state is WorkerState.JOINED:
            if not same or worker.address != address:
                return RegistrationRefused(
                    Code.INITIALIZING,
                    f"the name {name!r} is in use by a worker at {worker.address}: give another --name, or "
                    "end that one",
                )
            worker.name, worker.incarnation = name, incarnation
            return Registered(worker.worker_id)
        if worker.state is WorkerState.DRAINED and same:
            return Registered(worker.worker_id, drained=True)
        if not same or worker.address != address or worker.state is WorkerState.LEFT:
            before = worker.address
            self._sessions.take_place(worker, name, incarnation, address)
            moved = f", which was at {before}" if before != address else ""
            self._note("info", f"worker {worker.label} has registered again{moved}")
        else:
            worker.name, worker.incarnation = name, incarnation
        return Registered(worker.worker_id)

    def _known(self, name: str, address: str) -> Worker | None:
        """The worker of this name; else one of the list, at this address, that has no name yet."""
        workers = self._cluster.workers.values()
        named = next((worker for worker in workers if worker.name == name), None)
        if named is not None:
            return named
        return next((w for w in workers if not w.name and w.address == address), None)

    def _make_room(self) -> str:
        """Why there is no room for another worker; empty if there is."""
        workers, most = self._cluster.workers, self._cluster.config.max_workers
        if len(self._cluster.present()) >= most:
            return f"--max-workers allows {most}, and there are as many"
        if len(workers) >= 2 * most:
            self._sessions.forget_left()
        return ""

    # ------------------------------------------------------------------------------- draining

    def drain(self, client: Client, message: DrainWorkerRequest, *, now_ns: int) -> None:
        """An operator takes a worker out of use, or back."""
        operators = self._cluster.config.operators
        reply = DrainWorkerReply(message.request_id, Code.INVALID_REQUEST)
        worker = self._named(message.worker)
        if client.name not in operators:
            named = f"names {', '.join(operators)}" if operators else "names none"
            reason = f"only operators may drain workers: --operators {named}"
        elif worker is None:
            known = ", ".join(
                w.name or w.address or str(w.worker_id) for w in self._cluster.present()
            )
            shown = printable(message.worker, _NAME_CHARS)
            reason = f"there is no worker {shown!r}; there are: {known or 'none'}"
        else:
            reason = ""
            if message.undo:
                self._sessions.undrain(worker)
            elif not worker.draining:
                self._note("info", f"worker {worker.label} is drained by {client.name}")
                self._sessions.drain(worker, now_ns=now_ns)
            reply = DrainWorkerReply(
                message.request_id, Code.OK, worker_id=worker.worker_id, state=worker.standing
            )
        if reason:
            reply = DrainWorkerReply(message.request_id, Code.INVALID_REQUEST, reason)
        self._cluster.emit(ToClient(client.identity, reply))

    def _named(self, text: str) -> Worker | None:
        """The worker of this name, number or address."""
        present = self._cluster.present()
        for field in ("name", "address"):
            for worker in present:
                if text and getattr(worker, field) == text:
                    return worker
        return next((worker for worker in present if str(worker.worker_id) == text), None)

    # ---------------------------------------------------------------------------------- notes

    def _note_refusal(self, event: Joining, reason: str, now_ns: int) -> None:
        """Tell the operator, once a minute at most."""
        self._refused += 1
        if now_ns < self._note_due_ns:
            return
        self._note_due_ns = now_ns + _NOTE_EVERY_NS
        count, self._refused = self._refused, 0
        name, source = printable(event.message.name, _NAME_CHARS), printable(event.source, 64)
        many = f"{count} registrations of workers were refused; the last: " if count > 1 else ""
        self._note(
            "warning", f"{many}worker {name!r} from {source or 'unknown'} is refused: {reason}"
        )

    def _note(self, level: str, text: str) -> None:
        self._cluster.emit(Note(level, text))


def _refused(reason: str) -> RegistrationRefused:
    return RegistrationRefused(Code.INVALID_REQUEST, reason)
