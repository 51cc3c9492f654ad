"""The socket over which a worker registers with its controller, round the registrar (core/worker/registrar.py).

It is looked at between two turns of the worker's loop, and seldom: a registration takes tens of milliseconds.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from slosched.config import WorkerConfig
from slosched.core.worker.interface import Note
from slosched.core.worker.registrar import Registrar
from slosched.errors import InvalidConfig, MalformedMessage
from slosched.join_key import read_join_key
from slosched.join_messages import Register
from slosched.messages import PROTOCOL_VERSION
from slosched.transport.codec import decode_membership, encode
from slosched.transport.sockets import JOINS, Dealer
from slosched.units import NS_PER_MS

#: Time between two looks at the socket while an answer may come.
_LOOK_NS = 10 * NS_PER_MS


class Registration:
    """Registers the worker that listens on `port` under `config`. `announce` gets a line for each change.

    Raises InvalidConfig for a join key or an address that cannot be read.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        port: int,
        incarnation: int,
        device: str,
        announce: Callable[[str], None],
    ) -> None:
        key = read_join_key(config.join_key) if config.join_key else b""
        message = Register(
            protocol=PROTOCOL_VERSION,
            incarnation=incarnation,
            name=config.name or default_name(device, port),
            host=_address_of(config.advertise) if config.advertise else "",
            port=port,
        )
        self._registrar = Registrar(config.controller, message, key)
        self._dealer = Dealer(config.controller, identity=JOINS + os.urandom(16))
        self._announce = announce
        self.due_ns = 0

    def turn(self, *, served: bool, now_ns: int) -> None:
        """Take in answers, and ask for a place when it is time to."""
        registrar = self._registrar
        for frames in self._dealer.receive():
            try:
                message = decode_membership(frames[0] if frames else b"")
            except MalformedMessage:
                continue  # a Refused: its port is not a controller's, or an older one
            self._perform(*registrar.handle(message, now_ns=now_ns), now_ns)
        if now_ns >= registrar.due_ns:
            self._perform(*registrar.schedule(served=served, now_ns=now_ns), now_ns)
        self.due_ns = registrar.due_ns
        if registrar.waits:
            self.due_ns = min(self.due_ns, now_ns + _LOOK_NS)

    def _perform(self, messages: list[Register], notes: list[Note], now_ns: int) -> None:
        for message in messages:
            if not self._dealer.send([encode(message)]):
                self._registrar.not_sent(now_ns=now_ns)
        for note in notes:
            self._announce(note.text if note.level == "info" else f"warning: {note.text}")

    def close(self) -> None:
        self._dealer.close()


def default_name(device: str, port: int) -> str:
    """The same for each process of a real GPU; other devices of a host differ in their port."""
    host = socket.gethostname()
    return f"{host}/{device}" if device.startswith("cuda") else f"{host}/{device}:{port}"


def _address_of(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except (OSError, UnicodeError):
        raise InvalidConfig(f"--advertise {host!r}: this host is not known") from None
