"""Replies that take longer to make than a request should wait: a part at a time, between the steps.

A list of 10,000 models takes tens of milliseconds to encode, a status to build as well. All such replies share
one slice of each turn of the event loop, a part of each in turn: a short one overtakes a long one, and many
clients that ask at once hold up requests no longer than one does.

This class reads the scheduler and changes nothing in it; its parts run when no step does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from slosched import clock
from slosched.core.scheduler.interface import StatusAsked
from slosched.core.scheduler.scheduler import Scheduler
from slosched.daemon.in_slices import PART_BYTES, Slice
from slosched.daemon.status import Counted, status_parts
from slosched.messages import StatusReply
from slosched.transport.bundles import ForClients
from slosched.transport.codec import encode, is_long, pieces_of

#: Called with the client, the reply and its bytes.
Send = Callable[[bytes, ForClients, bytes], None]


class LongReplies:
    """`send` is called for each reply that is ready, and `failed` with an exception that a part raised."""

    def __init__(
        self, scheduler: Scheduler, *, send: Send, failed: Callable[[Exception], None]
    ) -> None:
        self._scheduler, self._send, self._failed = scheduler, send, failed
        #: What the shell counts, for status reports.
        self.counted: Counted = dict
        self._works: deque[Iterator[None]] = deque()
        self._task: asyncio.Task[None] | None = None

    def encode(self, client: bytes, message: ForClients) -> None:
        """Encode the long `message`, then send it; later messages to the client may overtake it."""
        self._begin(self._encoding(client, message))

    def status(self, asked: StatusAsked) -> None:
        """Build the report, then send it unless the client is gone by then."""
        self._begin(self._reporting(asked))

    async def finish(self, *, within_s: float) -> None:
        """Wait until nothing is left, at most `within_s`."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=within_s)

    def close(self) -> None:
        """Give up what is left."""
        self._works.clear()
        if self._task is not None:
            self._task.cancel()

    def _begin(self, work: Iterator[None]) -> None:
        self._works.append(work)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        slice_ = Slice()
        try:
            while self._works:
                try:
                    next(self._works[0])
                except StopIteration:
                    self._works.popleft()
                else:
                    self._works.rotate(-1)
                if slice_.is_over():
                    await slice_.rest()
        except Exception as error:
            self._failed(error)
        finally:
            self._task = None

    def _encoding(self, client: bytes, message: ForClients) -> Iterator[None]:
        parts: list[bytes] = []
        made: list[bytes] = []
        size = 0
        for piece in pieces_of(message):
            made.append(piece)
            size += len(piece)
            if size >= PART_BYTES:
                parts.append(b"".join(made))
                made, size = [], 0
            yield
        self._send(client, message, b"".join([*parts, *made]))

    def _reporting(self, asked: StatusAsked) -> Iterator[None]:
        client = self._scheduler.clients.get(asked.client)
        if client is None:
            return
        report: dict[str, Any] = {}
        yield from status_parts(
            report,
            self._scheduler,
            now_ns=clock.now_ns(),
            brief=asked.brief,
            counted=self.counted,
        )
        if client.gone:
            return
        message = StatusReply(asked.request_id, report)
        if is_long(message):
            yield from self._encoding(asked.client, message)
        else:
            self._send(asked.client, message, encode(message))
