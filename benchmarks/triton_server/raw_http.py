"""HTTP by hand: any bytes are sent, and what comes back is read as it is."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_WITHIN_S = 10.0
_MOST_BYTES = 64 * 1024**2

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class HttpAnswer:
    """An answer; status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def message(
    method: str, path: str, body: bytes = b"", headers: Headers = (), *, length: bool = True
) -> bytes:
    """A request; with `length` it says its body's."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in headers]
    if length and (body or method in ("POST", "PUT")):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def exchange(port: int, data: bytes, *, head: bool = False) -> HttpAnswer:
    """Send `data` to 127.0.0.1 and read one final answer. Raises OSError, also if none comes in time."""
    with socket.create_connection(("127.0.0.1", port), timeout=_WITHIN_S) as connection:
        # It may have answered, and closed, before it had read everything.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        return _read(connection, head)


def _read(connection: socket.socket, head: bool) -> HttpAnswer:
    seen = bytearray()
    while True:
        while b"\r\n\r\n" not in seen:
            if not _more(connection, seen):
                return HttpAnswer(0)
        first, _, rest = bytes(seen).partition(b"\r\n\r\n")
        lines = first.decode("latin-1").split("\r\n")
        status = int(lines[0].split(" ")[1])
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        if status != 100:
            break
        seen = bytearray(rest)
    seen = bytearray(rest)
    if head or status in (204, 304):
        return HttpAnswer(status, headers)
    if "chunked" in headers.get("transfer-encoding", ""):
        return HttpAnswer(status, headers, _chunks(connection, seen))
    size = int(headers.get("content-length", "-1"))
    while (size < 0 or len(seen) < size) and _more(connection, seen):
        pass
    return HttpAnswer(status, headers, bytes(seen[:size] if size >= 0 else seen))


def _chunks(connection: socket.socket, seen: bytearray) -> bytes:
    body = bytearray()
    while True:
        while b"\r\n" not in seen:
            if not _more(connection, seen):
                return bytes(body)
        first, _, rest = bytes(seen).partition(b"\r\n")
        size = int(first.split(b";")[0], 16)
        seen = bytearray(rest)
        while len(seen) < size + 2:
            if not _more(connection, seen):
                return bytes(body)
        if not size:
            return bytes(body)
        body += seen[:size]
        del seen[: size + 2]


def _more(connection: socket.socket, seen: bytearray) -> bool:
    try:
        data = connection.recv(1 << 20)
    except ConnectionResetError:
        return False
    seen += data
    if len(seen) > _MOST_BYTES:
        raise OSError("the answer is too long")
    return bool(data)


def json_of(body: bytes) -> Any:
    """The body as JSON; None if it is not."""
    try:
        return json.loads(body)
    except ValueError:
        return None
