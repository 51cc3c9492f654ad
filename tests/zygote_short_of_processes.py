"""A zygote whose host refuses it the first process that it asks for."""

from __future__ import annotations

import errno
import os
import socket

from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.zygote import Zygote


def main(fd: int) -> None:
    fork = os.fork

    def refused() -> int:
        os.fork = fork
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    os.fork = refused
    Zygote(socket.socket(fileno=fd), _serve).run()


def _serve(end: socket.socket) -> None:
    packets.send(end, b"started")
    end.recv(1)
