"""What clients of the HTTP side may take together, and how long they may take for it.

Times are counted in ticks of the server's one timer, so that a request reads no clock and arms no timer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slosched.fronts.callers import MOST_OF_FREE

#: Never, in ticks.
NEVER = 2**62
#: The head of a request, with what a client sends behind a request before it has its answer.
HEAD_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a client may take, in seconds."""

    tick_s: float = 0.5
    head_s: float = 10.0  # from the first byte of a request, or the connection's beginning
    idle_s: float = 120.0  # between two requests
    body_s: float = 10.0  # and for each `body_bytes_per_s` of the body a second more
    body_bytes_per_s: int = 1024**2
    untaken_s: float = (
        30.0  # within this a client takes `taken_bytes` of an answer, or the rest of it
    )
    taken_bytes: int = 256 * 1024
    linger_s: float = 2.0  # reading on after an error, so that the client gets to read the answer


class Bounds:
    """The sums over all connections: of bodies that are read or served, and of answers that are not taken.

    `most_held` bounds each of the two. A token has bodies of at most MOST_OF_FREE times what is left free.
    """

    def __init__(self, *, most_bytes: int, most_held: int, limits: Limits) -> None:
        self.most_bytes, self.most_held, self.limits = most_bytes, most_held, limits
        self.held = self.untaken = 0
        self._by_token: dict[str, int] = {}  # of `held`
        self.tick = 0
        self.draining = False
        self.date = b""  # a whole header line
        self.scratch = memoryview(bytearray(64 * 1024))  # for what is read and thrown away

    def after(self, seconds: float) -> int:
        """The tick that is at least `seconds` away."""
        return self.tick + 1 + math.ceil(seconds / self.limits.tick_s)

    def body_by(self, size: int) -> int:
        """The tick by which a body of `size` bytes must have come."""
        return self.after(self.limits.body_s + size / self.limits.body_bytes_per_s)

    def has_room(self, size: int, token: str) -> bool:
        """Whether a body of `size` bytes may come; `token` is empty where none is needed."""
        free = self.most_held - self.held - size
        return free >= 0 and (
            not token or self._by_token.get(token, 0) + size <= MOST_OF_FREE * free
        )

    def hold(self, size: int, token: str) -> bool:
        """Count a body of `size` bytes; False if there are too many already."""
        if not self.has_room(size, token):
            return False
        self.held += size
        if token and size:
            self._by_token[token] = self._by_token.get(token, 0) + size
        return True

    def release(self, size: int, token: str) -> None:
        """What `hold` counted is held no more."""
        self.held -= size
        if token and size:
            self._by_token[token] -= size
            if not self._by_token[token]:
                del self._by_token[token]
