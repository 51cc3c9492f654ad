"""Whether a request is let in, decided by its head, before its body has come.

A gateway on a loopback address without tokens answers only to requests *for* a loopback name: any page in the
operator's browser could use it otherwise, by a name of its own that it points at 127.0.0.1 (DNS rebinding). It
takes none that a page of another origin sends, either.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from slosched.addresses import is_loopback
from slosched.fronts.http.answers import Rejected
from slosched.fronts.http.bounds import Bounds
from slosched.fronts.http.chunks import ENCODINGS
from slosched.fronts.http.exchange import Exchange
from slosched.fronts.http.routes import Routes
from slosched.fronts.service import Service


class Body(NamedTuple):
    """The form of a request's body. `size` is 0 for a chunked one, `most` the bytes that it may have."""

    size: int
    chunked: bool
    expects: bool  # the client waits for 100 Continue
    most: int = 0


class Door:
    """Decides on requests, and hands those to the routes that came whole. `own_host`: see above."""

    def __init__(self, service: Service, routes: Routes, bounds: Bounds, *, own_host: bool) -> None:
        self._service, self._routes, self._bounds = service, routes, bounds
        self._own_host = own_host
        self.serve = routes.serve

    def body(self, exchange: Exchange, version: str) -> Body:
        """The form of the body, as the head of this version of HTTP says it. Raises Rejected.

        Where the next request begins is not known when it does.
        """
        old = version == "1.0"
        headers = exchange.headers
        length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
        expect = headers.get(b"expect")
        if version not in ("1.0", "1.1"):
            raise Rejected(505, "this speaks HTTP/1.1")
        if exchange.method == "CONNECT":
            raise Rejected(405, "this is not a proxy")
        if not old and b"host" not in headers:
            raise Rejected(400, "a request has a header Host")
        size = 0
        if length is not None:
            if not length.isdigit() or len(length) > 18:
                raise Rejected(400, "Content-Length is not a number of bytes")
            size = int(length)
        if coding is not None and (coding.strip().lower() != b"chunked" or old):
            raise Rejected(501, "the only transfer encoding that is taken is chunked")
        if expect is not None and expect.lower() != b"100-continue":
            raise Rejected(417, "the only expectation that is met is 100-continue")
        expects = expect is not None and not old and (size > 0 or coding is not None)
        return Body(size, coding is not None, expects, self._bounds.most_bytes)

    def admit(self, exchange: Exchange) -> None:
        """Whether the client may ask for that. Raises Rejected or FrontError."""
        host = exchange.headers.get(b"host")
        path = exchange.path
        if not path.startswith("/"):
            scheme, _, rest = path.partition("://")
            if scheme.lower() not in ("http", "https") or not rest:
                raise Rejected(400, "the target of a request is a path, or http://HOST/PATH")
            authority, slash, path = rest.partition("/")
            exchange.path, host = slash + path, authority.encode("latin-1")
        if self._own_host:
            self._check_host(host, exchange.headers.get(b"origin"))
        route = self._routes.find(exchange)
        if route.needs_caller:
            exchange.caller = self._service.caller(exchange.header(b"authorization") or "")

    def _check_host(self, host: bytes | None, origin: bytes | None) -> None:
        if host is not None and not _is_here(host):  # HTTP/1.0 has none, and no browser speaks it
            raise Rejected(
                421,
                "this answers only to localhost, 127.0.0.1 and [::1] as the host; with --tokens to others, too",
            )
        if origin is not None and not _is_here(origin.partition(b"://")[2]):
            raise Rejected(403, "this takes no requests of web pages that are not of this host")

    def check(self, exchange: Exchange, body: Body) -> None:
        """Whether the body may come. Raises Rejected."""
        most = self.most_bytes(exchange)
        if body.size > most:
            option = " (--max-request)" if most == self._bounds.most_bytes else ""
            raise Rejected(
                413, f"the request has {body.size} bytes; at most {most} are taken{option}"
            )
        encoding = exchange.headers.get(b"content-encoding")
        if encoding is None:
            return
        text = encoding.decode("latin-1").strip().lower()
        if text in ("", "identity"):
            del exchange.headers[b"content-encoding"]
        elif text in ENCODINGS:
            exchange.headers[b"content-encoding"] = text.encode()
        else:
            raise Rejected(
                415, "Unsupported compression type", b"accept-encoding: gzip, deflate\r\n"
            )

    def most_bytes(self, exchange: Exchange) -> int:
        """The bytes that the body of a request may have."""
        return self._routes.most_bytes(exchange.route, self._bounds.most_bytes)

    def too_much(self) -> Rejected:
        """The error where bodies of all clients together are at their bound."""
        return Rejected(
            429,
            f"requests of {self._bounds.most_held} bytes together are in flight, which is the most "
            "(--max-in-flight-bytes)",
            b"retry-after: 1\r\n",
        )


@lru_cache(maxsize=64)
def _is_here(host: bytes) -> bool:
    """Whether HOST or HOST:PORT names this machine to itself."""
    text = host.decode("latin-1").lower()
    name, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        name, port = text, ""
    if port and not port.isdecimal():
        return False
    return name == "localhost" or is_loopback(name.removeprefix("[").removesuffix("]"))
