"""The head of one request, as httptools parses it."""

from __future__ import annotations

import contextlib

import httptools

from slosched.fronts.http.answers import Rejected

#: The headers that are read; one that stands twice makes a request wrong.
HEEDED = frozenset(
    {
        b"host",
        b"origin",
        b"authorization",
        b"content-length",
        b"content-encoding",
        b"transfer-encoding",
        b"expect",
        b"inference-header-content-length",
        b"slosched-slo",
    }
)
MOST_HEADERS = 100


class Head:
    """A parsed head. `headers` has those that are heeded, by their names in lower case.

    `keep` says whether the connection may stay after the answer, `version` is HTTP's.
    """

    __slots__ = ("_count", "_parser", "_repeated", "headers", "keep", "method", "target", "version")

    def __init__(self, text: memoryview) -> None:
        """Parse a whole head, its empty line included. Raises Rejected where it is not one."""
        self.target, self.method, self.version = b"", "", ""
        self.headers: dict[bytes, bytes] = {}
        self.keep = False
        self._count, self._repeated = 0, b""
        parser = httptools.HttpRequestParser(self)
        self._parser: httptools.HttpRequestParser | None = parser
        try:
            # An offer to upgrade may be left.
            with contextlib.suppress(httptools.HttpParserUpgrade):
                parser.feed_data(text)
        except httptools.HttpParserError as error:
            raise Rejected(400, f"this is not an HTTP request: {error}") from None
        finally:
            self._parser = None  # which holds this
        self.method = parser.get_method().decode()
        if self.version == "1.0":  # httptools takes RTSP/1.0 for it
            line = bytes(text).lstrip(b"\r\n").partition(b"\r\n")[0]
            self.version = "1.0" if line.endswith(b" HTTP/1.0") else "other"

    def check(self) -> None:
        """Raises Rejected where a header is repeated that may not be, or there are too many."""
        if self._repeated:
            raise Rejected(400, f"the header {self._repeated.decode('latin-1')} is repeated")
        if self._count > MOST_HEADERS:
            raise Rejected(431, f"a request has at most {MOST_HEADERS} headers")

    # ------------------------------------------------------------ what httptools calls

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count += 1
        name = name.lower()
        if name in HEEDED:
            if name in self.headers:
                self._repeated = name
            self.headers[name] = value.strip(b" \t")

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        self.keep = parser.should_keep_alive()
        self.version = parser.get_http_version()
