"""What the kernel knows of this process: its memory, and the connections on a port of it.

Elsewhere than on Linux nothing is known: no memory is used, and there are no connections.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

#: tcpi_bytes_received, 8 bytes, in the struct tcp_info of linux/tcp.h.
_RECEIVED_AT = 128
_MAPPED = "::ffff:"
_STATM, _DESCRIPTORS = Path("/proc/self/statm"), Path("/proc/self/fd")


def own_memory_bytes() -> int:
    """The memory that this process has for itself: without files and what it shares."""
    try:
        _, resident, shared, *_ = _STATM.read_bytes().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def give_memory_back() -> None:
    """Give memory that was freed back to the system; glibc keeps it otherwise, behind what is still in use."""
    with suppress(OSError, AttributeError):  # another libc gives it back by itself
        ctypes.CDLL(None).malloc_trim(0)


class Connection(NamedTuple):
    """A TCP connection. `peer` is its name as grpc has it, `received` its bytes since its beginning."""

    peer: str
    received: int
    socket: socket.socket

    def end(self) -> None:
        """End it for all who use it."""
        with suppress(OSError):  # it has ended already
            self.socket.shutdown(socket.SHUT_RDWR)


@contextmanager
def connections(port: int) -> Iterator[list[Connection]]:
    """The connections of this process whose own end is `port`. The block may end them."""
    with ExitStack() as stack:
        found = []
        for each in _sockets():
            stack.callback(each.close)
            with suppress(OSError):  # one that listens, or has ended
                if each.getsockname()[1] == port:
                    peer = _peer_name(each.getpeername())
                    info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
                    received = int.from_bytes(info[_RECEIVED_AT:], "little")
                    found.append(Connection(peer, received, each))
        yield found


def _sockets() -> Iterator[socket.socket]:
    """Second descriptors of this process's TCP sockets."""
    try:
        numbers = [int(each.name) for each in _DESCRIPTORS.iterdir()]
    except OSError:
        return
    for number in numbers:
        with suppress(OSError):  # that of the folder that was listed
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                found = socket.socket(fileno=os.dup(number))
                if found.family in (socket.AF_INET, socket.AF_INET6) and (
                    found.type == socket.SOCK_STREAM
                ):
                    yield found
                else:
                    found.close()


def _peer_name(address: tuple[str, int]) -> str:
    """ipv4:127.0.0.1:40000, ipv6:%5B::1%5D:40000."""
    host, port = address[:2]
    if host.startswith(_MAPPED) and "." in host:
        host = host.removeprefix(_MAPPED)
    if ":" in host:
        return f"ipv6:{quote(f'[{host}]', safe=':')}:{port}"
    return f"ipv4:{host}:{port}"
