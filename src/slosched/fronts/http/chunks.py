"""Bodies in other forms than one piece of a known length: chunked transfer, and gzip or deflate.

httptools has a decoder of chunks, too, but does not say where in the bytes that it was fed a body ends, behind
which the next request begins.
"""

from __future__ import annotations

import re
import zlib
from enum import Enum, auto

from slosched.fronts.http.answers import Rejected
from slosched.transport.codec import Frame

#: Bytes of a line with a chunk's size and its extensions, of all extensions beyond those of the content, and of
#: all trailers.
_MOST_LINE, _MOST_EXTENSIONS, _MOST_TRAILERS = 256, 16384, 8192
_HEX = frozenset(b"0123456789abcdefABCDEF")
_TRAILER = re.compile(rb"[\w!#$%&'*+.^`|~-]+:[^\0\r\n]*")


class _At(Enum):
    SIZE = auto()
    DATA = auto()
    BEHIND_DATA = auto()  # the CRLF of a chunk's end
    TRAILERS = auto()
    END = auto()


class Chunks:
    """Collects a chunked body of at most `most` bytes (RFC 9112, section 7.1).

    Lines end in CRLF, and have neither CR nor LF in them: a proxy for which one ends there would find the next
    request elsewhere.
    """

    def __init__(self, most: int) -> None:
        self.body = bytearray()
        self._most = most
        self._at = _At.SIZE
        self._left = 0  # of the chunk
        self._extensions = self._trailers = 0

    @property
    def done(self) -> bool:
        return self._at is _At.END

    def feed(self, data: bytearray, size: int) -> int:
        """Take from the first `size` bytes of `data`; returns how many. Raises Rejected."""
        at = 0
        while at < size and self._at is not _At.END:
            if self._at is _At.DATA:
                take = min(self._left, size - at)
                self.body += memoryview(data)[at : at + take]
                at, self._left = at + take, self._left - take
                if not self._left:
                    self._at = _At.BEHIND_DATA
                continue
            end = data.find(b"\r\n", at, size)
            if data.find(b"\n", at, size if end < 0 else end) >= 0:
                raise Rejected(400, "a line of the chunked body ends in LF alone")
            if end < 0:
                if size - at > (_MOST_TRAILERS if self._at is _At.TRAILERS else _MOST_LINE):
                    raise Rejected(400, "a line of the chunked body is too long")
                break
            self._line(bytes(data[at:end]))
            at = end + 2
        return at

    def _line(self, line: bytes) -> None:
        if self._at is _At.SIZE:
            self._left = self._size(line)
            self._at = _At.DATA if self._left else _At.TRAILERS
        elif self._at is _At.BEHIND_DATA:
            if line:
                raise Rejected(400, "a chunk is longer than its size says")
            self._at = _At.SIZE
        elif line:
            if _TRAILER.fullmatch(line) is None:
                raise Rejected(400, "a trailer is not a header")
            self._trailers += len(line) + 2
            if self._trailers > _MOST_TRAILERS:
                raise Rejected(
                    431, f"the trailers have more than {_MOST_TRAILERS} bytes, which is the most"
                )
        else:
            self._at = _At.END

    def _size(self, line: bytes) -> int:
        if len(line) > _MOST_LINE:
            raise Rejected(400, "a line of the chunked body is too long")
        if b"\r" in line:
            raise Rejected(400, "a line of the chunked body has a CR in it")
        digits = line.partition(b";")[0].rstrip(b" \t")
        self._extensions += len(line) - len(digits)
        if self._extensions > _MOST_EXTENSIONS + len(self.body):
            raise Rejected(400, "the chunks have more bytes of extensions than of content")
        if not digits or len(digits) > 16 or not _HEX.issuperset(digits):
            raise Rejected(400, "the size of a chunk is not a hexadecimal number")
        size = int(digits, 16)
        if len(self.body) + size > self._most:
            raise Rejected(413, f"a request has at most {self._most} bytes")
        return size


#: zlib's window bits of the encodings that Triton takes.
_WINDOWS = {"gzip": 31, "deflate": 15}
ENCODINGS = frozenset(_WINDOWS)


#: Bytes that one step inflates, and compressed bytes that zlib gets at a time.
STEP, _FED = 1024**2, 64 * 1024


class Inflation:
    """Inflates a compressed body of at most `most` bytes of content, step by step.

    Its connection counts the content between steps, because a body can inflate to a thousand times its size.
    """

    def __init__(self, body: Frame | bytearray, encoding: str, most: int) -> None:
        self.content = bytearray()
        self._body, self._at = memoryview(body), 0
        self._encoding, self._most = encoding, most
        self._inflater = zlib.decompressobj(_WINDOWS[encoding])

    @property
    def done(self) -> bool:
        return self._inflater.eof

    def step(self) -> int:
        """Inflate further; returns by how many bytes, at most STEP. Raises Rejected where that fails."""
        begun = len(self.content)
        while not self.done and len(self.content) - begun < STEP:
            self._feed(STEP - (len(self.content) - begun))
        if self.done and (self._inflater.unused_data or self._at < len(self._body)):
            text = f"there are bytes behind the end of the {self._encoding} body"
            raise Rejected(400, text)
        return len(self.content) - begun

    def _feed(self, room: int) -> None:
        data: Frame = self._inflater.unconsumed_tail
        if not data:
            data = self._body[self._at : self._at + _FED]
            self._at += len(data)
        try:
            more = self._inflater.decompress(data, room)
        except zlib.error:
            raise Rejected(400, f"the body is not in {self._encoding} form") from None
        self.content += more
        if len(self.content) > self._most:
            raise Rejected(
                413, f"a request has at most {self._most} bytes, also when it is inflated"
            )
        if not more and not len(data) and not self.done:
            raise Rejected(400, f"the {self._encoding} body is cut off")
