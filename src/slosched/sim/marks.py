"""Whose answer is it? Inputs and outputs of the simulator carry the request's own mark.

An input travels as a Payload: the size of the live frame, and its first MARK_BYTES. It goes where the live
frame goes (a Value of the controller, the frames behind an Infer and its result), an emulated GPU repeats it
in the output of the same row, and the client that gets an answer compares. So an output of another row, action,
request or client is seen at once, and so is one that is missing or was not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from slosched.core.invariants import InvariantViolated
from slosched.core.worker.emulated import MARK_BYTES
from slosched.messages import InferReply

#: A mark is the client's tag, the request's id, and the bytes of the output that is due (0: not said).
_TAG, _ID, _SIZE = 6, 6, MARK_BYTES - 12


class Payload:
    """A frame of `size` bytes that begins with `mark`. Its length is `size`."""

    __slots__ = ("mark", "size")

    def __init__(self, mark: bytes, size: int) -> None:
        self.mark = mark
        self.size = size

    def __len__(self) -> int:
        return self.size


class Framed(NamedTuple):
    """A message, or the event that it becomes, with the frames behind it."""

    message: Any
    frames: Sequence[Payload]


def made_up(size: int) -> Payload:
    """An input that the controller makes for a request that brings none."""
    return Payload(b"made up", size)


class Marks:
    """Makes the inputs of one cluster's clients, and holds their answers to them.

    `story(request_ids)` tells what is known of the requests with these ids, of any client. `compared`
    counts the answers whose mark was compared.
    """

    def __init__(self, story: Callable[[Sequence[int]], str]) -> None:
        self.compared = 0
        self._story = story
        self._tags: dict[bytes, bytes] = {}  # by client
        self._who: dict[bytes, bytes] = {}  # client by tag

    def of(self, client: bytes, request_id: int, output_size: int = 0) -> bytes:
        """The MARK_BYTES that no other request has."""
        tag = self._tags.get(client)
        if tag is None:
            tag = self._tags[client] = blake2b(client, digest_size=_TAG).digest()
            self._who[tag] = client
        return tag + request_id.to_bytes(_ID, "big") + output_size.to_bytes(_SIZE, "big")

    def input(self, client: bytes, request_id: int, size: int, output_size: int = 0) -> Payload:
        """The input of a new request; an output of `output_size` bytes is due (0: of any size)."""
        return Payload(self.of(client, request_id, output_size), size)

    def compare(
        self, client: bytes, request_id: int, frames: Sequence[Payload], *, awaited: bool = True
    ) -> None:
        """`client` got `frames` behind the answer to its request. Raises InvariantViolated.

        One that is not `awaited` may be of another model: a new controller takes what was on its way to the
        old one, with that one's model ids, and the client throws its answer away.
        """
        self.compared += 1
        wanted = self.of(client, request_id)[: _TAG + _ID]
        got = f"{len(frames)} outputs"
        ids = [request_id]
        if len(frames) == 1:
            mark, size = frames[0].mark, frames[0].size
            due = int.from_bytes(mark[_TAG + _ID :], "big")
            got = self._text_of(mark)
            if mark[: _TAG + _ID] == wanted[:size]:
                if not awaited or due in (0, size) or len(mark) < MARK_BYTES:
                    return
                got = f"{size} bytes instead of {due}, as of another model,"
            elif len(mark) == MARK_BYTES:
                ids.append(int.from_bytes(mark[_TAG : _TAG + _ID], "big"))
        name = client.decode("ascii", "replace")
        raise InvariantViolated(
            f"{name} got {got} for an answer to its request {request_id}\n{self._story(ids)}"
        )

    def without_output(self, client: bytes, reply: InferReply, *, wanted: bool) -> None:
        """`client` got `reply` with nothing behind it. Raises InvariantViolated if an output is `wanted`."""
        if wanted:
            name = client.decode("ascii", "replace")
            story = self._story([reply.request_id])
            raise InvariantViolated(
                f"{name} got no output for its request {reply.request_id}, which had an input\n{story}"
            )

    def _text_of(self, mark: bytes) -> str:
        who = self._who.get(mark[:_TAG])
        if who is None or len(mark) < MARK_BYTES:
            return f"an output of no request ({mark!r})"
        name = who.decode("ascii", "replace")
        return f"the output of {name}'s request {int.from_bytes(mark[_TAG : _TAG + _ID], 'big')}"
