"""One HTTP connection: its bytes as requests, one at a time, and their answers in order.

The head of a request is read into the connection's own buffer and parsed at once; a body of a known length is
received straight into memory of its own, which the inference then keeps. What a client sends behind a request
waits in the buffer, and when that is full in the socket. A connection is in one phase:

    HEAD    waits for a request; expires after `idle_s`, or `head_s` from a request's first byte
    BODY    receives a body of a known length
    CHUNKS  receives a chunked body
    BUSY    a request is served; bytes are read on, because that is how a client's end is noticed
    SKIP    a request was answered without its body, which is thrown away as it comes
    LINGER  the last answer is written; what comes is thrown away until the client ends, or for `linger_s`

A client that closes its side while an inference runs has left, and the inference is cancelled. Any other
request is still answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Callable
from typing import Final, cast

from slosched.addresses import is_loopback
from slosched.fronts.errors import FrontError
from slosched.fronts.http.answers import Answer, Rejected, error_answer, head
from slosched.fronts.http.bounds import HEAD_BYTES, NEVER, Bounds
from slosched.fronts.http.chunks import Chunks, Inflation
from slosched.fronts.http.door import Body, Door
from slosched.fronts.http.exchange import Exchange
from slosched.fronts.http.heads import Head

_HEAD: Final = 0
_BODY: Final = 1
_CHUNKS: Final = 2
_BUSY: Final = 3
_SKIP: Final = 4
_LINGER: Final = 5

#: Bodies up to this have memory of their own at once.
_ZEROED = 1024**2
#: Answers up to this are joined and written at once.
_SMALL = 64 * 1024


class Connection(asyncio.BufferedProtocol):
    """`joined` says whether there is room for it; `left` is called at its end."""

    _transport: asyncio.Transport

    def __init__(
        self,
        bounds: Bounds,
        door: Door,
        *,
        joined: Callable[[Connection], bool],
        left: Callable[[Connection], None],
    ) -> None:
        self._bounds, self._door = bounds, door
        self._joined, self._left = joined, left
        self._head = bytearray(HEAD_BYTES)
        self._view = memoryview(self._head)
        self._have = 0  # bytes in `_head` that are not used yet
        self._searched = 0  # of them without the end of a head
        self._phase = _HEAD
        self.expires = NEVER  # at this tick
        self._advancing = False
        # The request that is read or served
        self._exchange: Exchange | None = None
        self._body: Body | None = None
        self._room = self._view[:0]  # for the rest of the body
        self._chunks = Chunks(0)
        self._skip = 0
        self._held, self._holder = 0, ""  # bytes of a body, and the token whose they are
        self._keep = True
        self._version = ""  # of HTTP
        # What the transport says
        self._closed = False
        self._ended = False  # the client sends no more
        self._reading = True
        self._stalled = False  # the client does not take what is written
        self._unsent = 0
        self._untaken = 0  # of it that is counted in the bounds

    @property
    def waits(self) -> bool:
        """Whether it is in no request, so that it may be closed."""
        return self._phase == _HEAD

    # --------------------------------------------------------------------- the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self._local = bool(peer) and is_loopback(str(peer[0]).partition("%")[0])
        self.expires = self._bounds.after(self._bounds.limits.head_s)
        if not self._joined(self) and not transport.is_closing():
            self._refuse(Rejected(503, "too many connections are open (--max-connections)"), -1)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._phase == _BODY:
            return self._room
        if self._phase == _SKIP:
            return self._bounds.scratch[: self._skip]
        if self._phase == _LINGER:
            return self._bounds.scratch
        return self._view[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        phase = self._phase
        if phase == _BODY:
            if not self._hold(nbytes):
                self._refuse(self._door.too_much(), -1)
                return
            self._room = self._room[nbytes:]
            if not self._room:
                self._serve()
        elif phase == _SKIP:
            self._skipped(nbytes)
        elif phase != _LINGER:
            if phase == _HEAD and not self._have:
                self.expires = self._bounds.after(self._bounds.limits.head_s)
            self._have += nbytes
            if phase != _BUSY:
                self._advance()
            self._pause_or_resume()

    def eof_received(self) -> bool:
        self._ended = True
        exchange = self._exchange
        if self._phase != _BUSY or exchange is None:
            return False
        if exchange.running is not None or exchange.task is not None:
            return False  # its client has left; connection_lost cancels
        return self._transport.get_extra_info("ssl_object") is None

    def pause_writing(self) -> None:
        self._stalled = True
        self._unsent = self._transport.get_write_buffer_size()
        self.expires = self._bounds.after(self._bounds.limits.untaken_s)

    def resume_writing(self) -> None:
        self._stalled = False
        self._taken()
        if self._phase == _BUSY:
            self.expires = NEVER
        elif self._phase in (_HEAD, _SKIP):
            self._wait()
            self._advance()
            self._pause_or_resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self.expires = NEVER
        exchange, self._exchange = self._exchange, None
        self._release()
        self._taken()
        self._left(self)
        if exchange is not None:
            exchange.abandon()

    # ----------------------------------------------------------------------------- ends

    def expired(self) -> None:
        """What it waits for did not come in time."""
        if self._transport.is_closing() and not self._stalled:
            self._transport.abort()
        elif self._stalled:
            unsent = self._transport.get_write_buffer_size()
            if unsent + self._bounds.limits.taken_bytes <= self._unsent:
                self._unsent = unsent
                self.expires = self._bounds.after(self._bounds.limits.untaken_s)
            else:
                self._transport.abort()
        elif self._phase in (_LINGER, _SKIP):
            self._transport.abort()
        elif self._phase == _HEAD and not self._have:
            self._transport.close()
        else:
            what = "head" if self._phase == _HEAD else "body"
            self._refuse(Rejected(408, f"the {what} of the request did not come in time"), -1)

    def drain(self) -> None:
        """Close at the end of the request that it is in."""
        if self._phase == _HEAD and not self._stalled:
            self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    # --------------------------------------------------------------------------- requests

    def _advance(self) -> None:
        """Go on with the bytes that are there, until more must come or a request is served."""
        if self._advancing:
            return
        self._advancing = True
        try:
            more = True
            while more and self._have and not self._stalled and not self._closed:
                if self._phase == _HEAD:
                    more = self._take_head()
                elif self._phase == _CHUNKS:
                    more = self._take_chunks()
                elif self._phase == _SKIP:
                    taken = min(self._skip, self._have)
                    self._use(taken)
                    self._skipped(taken)
                else:
                    more = False
        finally:
            self._advancing = False
        if self._ended and self._phase == _HEAD and not self._stalled:
            self._transport.close()  # what came before the client's end is answered

    def _pause_or_resume(self) -> None:
        """Leave further bytes in the socket while there is no room for them."""
        room = self._phase in (_BODY, _SKIP, _LINGER) or self._have < HEAD_BYTES
        if room != self._reading and not self._transport.is_closing():
            self._reading = room
            if room:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _use(self, count: int) -> None:
        """The first `count` bytes of the buffer are used."""
        self._have -= count
        self._searched = 0
        if self._have:
            self._head[: self._have] = self._head[count : count + self._have]

    def _take_head(self) -> bool:
        """Take a request's head from the buffer; False if it has not all come."""
        buffer, have = self._head, self._have
        if buffer[0] == 13 and (have == 1 or buffer[1] == 10):  # an empty line, from old clients
            self._use(2 if have > 1 else 0)
            return have > 1
        end = buffer.find(b"\r\n\r\n", max(0, self._searched - 3), have) + 4
        if end < 4:
            self._searched = have
            if not 65 <= buffer[0] <= 90 or buffer.find(b"\n\n", 0, have) >= 0:
                what = "TLS, and this port has none" if buffer[0] == 22 else "not an HTTP request"
                self._refuse(Rejected(400, f"this is {what}"), -1)
            elif have == HEAD_BYTES:
                self._refuse(Rejected(431, f"a head has at most {HEAD_BYTES} bytes"), -1)
            return False
        try:
            found = Head(self._view[:end])
        except Rejected as error:
            self._refuse(error, -1)
            return False
        self._keep, self._version = found.keep, found.version
        self._begin(found)
        if self._phase != _LINGER:
            self._use(end)
            self._begin_body()
        return True

    def _begin(self, found: Head) -> None:
        """Decide on a request by its head: what it asks for, and the form of its body."""
        exchange = Exchange(
            found.method,
            found.target.decode("latin-1"),
            found.headers,
            local=self._local,
            reply=self._reply,
        )
        body = None
        try:
            found.check()
            body = self._door.body(exchange, self._version)
            self._door.admit(exchange)
            self._door.check(exchange, body)
            if not self._bounds.has_room(body.size, exchange.token):
                raise self._door.too_much()
            if body.size:
                exchange.body = _memory(body.size)
        except (FrontError, Rejected) as error:
            skip = -1 if body is None or body.chunked or body.expects else body.size
            self._refuse(error, skip if skip <= self._bounds.most_bytes else -1, found.method)
            return
        self._exchange, self._body = exchange, body

    def _begin_body(self) -> None:
        body = self._body
        if body is None:  # refused
            self._wait()
            return
        self._body = None
        exchange = self._exchange
        assert exchange is not None
        if body.expects:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if body.chunked:
            self._phase, self._chunks = _CHUNKS, Chunks(body.most)
            self.expires = self._bounds.body_by(body.most)
            return
        if not body.size:
            self._serve()
            return
        content = memoryview(exchange.body)
        taken = min(self._have, body.size)
        if not self._hold(taken):
            self._refuse(self._door.too_much(), -1)
            return
        content[:taken] = self._view[:taken]
        self._use(taken)
        if taken == body.size:
            self._serve()
            return
        self._phase, self._room = _BODY, content[taken:]
        self.expires = self._bounds.body_by(body.size)

    def _take_chunks(self) -> bool:
        chunks = self._chunks
        try:
            taken = chunks.feed(self._head, self._have)
            if not self._hold(len(chunks.body) - self._held):
                raise self._door.too_much()
        except Rejected as error:
            self._refuse(error, -1)
            return False
        self._use(taken)
        if chunks.done:
            exchange, self._chunks = self._exchange, Chunks(0)
            assert exchange is not None
            exchange.body = chunks.body
            self._serve()
        return taken > 0

    def _serve(self) -> None:
        """The request has come whole."""
        self._phase, self.expires = _BUSY, NEVER
        self._room = self._view[:0]
        exchange = self._exchange
        assert exchange is not None
        if exchange.body and b"content-encoding" in exchange.headers:
            self._inflate(exchange)
        else:
            self._door.serve(exchange)

    def _inflate(self, exchange: Exchange) -> None:
        """Inflate a body, which may take a tenth of a second, in a thread; then serve it."""
        encoding = exchange.header(b"content-encoding") or ""
        self._inflate_on(
            exchange, Inflation(exchange.body, encoding, self._door.most_bytes(exchange))
        )

    def _inflate_on(self, exchange: Exchange, inflation: Inflation) -> None:
        def stepped(future: asyncio.Future[int]) -> None:
            if self._exchange is not exchange or future.cancelled():
                return
            try:
                if not self._hold(future.result()):
                    raise self._door.too_much()
            except Rejected as error:
                self._reply(exchange, error_answer(error))
            else:
                if inflation.done:
                    exchange.body = inflation.content
                    self._door.serve(exchange)
                else:
                    self._inflate_on(exchange, inflation)

        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, inflation.step).add_done_callback(stepped)

    # ---------------------------------------------------------------------------- answers

    def _reply(self, exchange: Exchange, answer: Answer) -> None:
        """Write the answer of the request that is served, and go on with what waits behind it."""
        if self._exchange is not exchange:
            return  # its client has left
        self._exchange = None
        self._release()
        self._write(answer, exchange.method, close=not self._keep or self._bounds.draining)
        if not self._transport.is_closing():
            self._phase = _HEAD
            self._wait()
            self._advance()
            self._pause_or_resume()

    def _write(self, answer: Answer, method: str, *, close: bool) -> None:
        start = head(answer, date=self._bounds.date, close=close, keep=self._version == "1.0")
        if method == "HEAD":
            self._transport.write(start)
        elif sum(map(len, answer.parts)) <= _SMALL:
            self._transport.write(b"".join((start, *answer.parts)))
        else:
            self._transport.writelines((start, *answer.parts))
        if self._stalled and not self._count_untaken():
            self._transport.abort()  # answers that no client takes would fill the memory
        elif close:
            self.expires = self._bounds.after(self._bounds.limits.untaken_s)
            self._transport.close()

    def _count_untaken(self) -> bool:
        """Count the answer that its client does not take at once; False if there are too many of these."""
        bounds, size = self._bounds, self._transport.get_write_buffer_size()
        if bounds.untaken + size > bounds.most_held:
            return False
        bounds.untaken += size
        self._untaken += size
        return True

    def _taken(self) -> None:
        self._bounds.untaken -= self._untaken
        self._untaken = 0

    def _refuse(self, error: FrontError | Rejected, skip: int, method: str = "GET") -> None:
        """Answer without serving. The next `skip` bytes are the body; -1: where it ends is not known.

        A socket that is closed before all that came is read is reset, and its client may lose the answer.
        """
        self._exchange, self._body = None, None
        self._room, self._chunks = self._view[:0], Chunks(0)
        self._release()
        answer = error_answer(error)
        if skip < 0 or not self._keep or self._bounds.draining:
            start = head(answer, date=self._bounds.date, close=True, keep=False)
            parts = () if method == "HEAD" else answer.parts
            self._transport.write(b"".join((start, *parts)))
            self._phase, self._have = _LINGER, 0
            self.expires = self._bounds.after(self._bounds.limits.linger_s)
            if self._transport.can_write_eof():
                self._transport.write_eof()
        else:
            self._write(answer, method, close=False)
            self._phase, self._skip = (_SKIP, skip) if skip else (_HEAD, 0)
            self._wait()

    def _skipped(self, count: int) -> None:
        self._skip -= count
        if not self._skip:
            self._phase = _HEAD
            self._wait()

    def _wait(self) -> None:
        """The time that the client has for what comes next."""
        if self._stalled:
            return
        if self._phase == _SKIP:
            self.expires = self._bounds.body_by(self._skip)
        elif self._phase == _HEAD:
            limits = self._bounds.limits
            self.expires = self._bounds.after(limits.head_s if self._have else limits.idle_s)

    def _hold(self, size: int) -> bool:
        """Count bytes of a body that have come: what a client announces and does not send holds no memory."""
        if not self._held and self._exchange is not None:
            self._holder = self._exchange.token
        if not self._bounds.hold(size, self._holder):
            return False
        self._held += size
        return True

    def _release(self) -> None:
        self._bounds.release(self._held, self._holder)
        self._held = 0


def _memory(size: int) -> bytearray | memoryview:
    """Memory for a body. That of a large one is the kernel's until it is written, page by page.

    A bytearray is zeroed: it would take all that a client announces, and time. Raises Rejected where there is
    none.
    """
    try:
        if size <= _ZEROED:
            return bytearray(size)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # not every kernel has large pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        return memoryview(pages)
    except (MemoryError, OSError):
        raise Rejected(503, f"there is no memory for a request of {size} bytes") from None
