"""One request and its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from slosched.fronts.asked import Answered
from slosched.fronts.errors import FrontError
from slosched.fronts.http import bodies
from slosched.fronts.http.answers import Answer, Rejected, error_answer
from slosched.fronts.service import Caller, Running
from slosched.transport.codec import Frame


class Exchange:
    """A request: its head, then its body, and what runs for it. `answer` is called once.

    `local` says that the client is on this host. `headers` has those that are heeded, by names in lower case.
    """

    __slots__ = (
        "_reply",
        "body",
        "caller",
        "headers",
        "local",
        "method",
        "name",
        "path",
        "query",
        "read",
        "route",
        "running",
        "task",
        "version",
    )

    def __init__(
        self,
        method: str,
        target: str,
        headers: dict[bytes, bytes],
        *,
        local: bool,
        reply: Callable[[Exchange, Answer], None],
    ) -> None:
        self.method, self.headers, self.local = method, headers, local
        self.path, _, self.query = target.partition("?")
        self.body: Frame | bytearray = b""
        self.name = self.version = ""  # of the model or region in the path
        self.route: Any = None  # routes.Route; the routes alone look at it
        self.caller: Caller | None = None
        self.read: bodies.Read | None = None
        self.running: Running | None = None
        #: What a client that leaves cancels, as it does `running`.
        self.task: asyncio.Task[None] | None = None
        self._reply = reply

    @property
    def token(self) -> str:
        """The name of the token that asks; empty where none is needed."""
        return "" if self.caller is None else self.caller.name

    def header(self, name: bytes) -> str | None:
        """The text of a header; None where the request has none."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def answer(self, answer: Answer) -> None:
        self._reply(self, answer)

    def ended(self, outcome: Answered | FrontError) -> None:
        """The end of the inference that `read` asked for (service.OnEnd)."""
        read = self.read
        assert read is not None
        try:
            if isinstance(outcome, FrontError):
                raise outcome
            self._reply(self, bodies.answer(read, outcome))
        except FrontError as error:
            self._reply(self, error_answer(error))
        except Exception as error:
            self._reply(self, internal_error(error))

    def abandon(self) -> None:
        """The client has left: cancel its inference. What else it asked for goes on."""
        if self.running is not None:
            self.running.cancel()
        if self.task is not None:
            self.task.cancel()


def internal_error(error: Exception) -> Answer:
    """The answer where the gateway itself is wrong; the loop's handler shows the place."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": "a request by HTTP failed", "exception": error}
    )
    return error_answer(Rejected(500, f"internal error: {type(error).__name__}: {error}"))
