"""The shell's long work, in slices of the event loop: no request waits for a report of 10,000 instances."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from slosched import clock

#: Long work lets others run after this time and the end of its current part: about 0.5 ms in all.
SLICE_NS = 200_000
#: Bytes of a long text that are kept, and written, together.
PART_BYTES = 64 * 1024
#: Words of JSON between two looks at the time: some fifty microseconds.
_PIECES = 128


class Slice:
    """The time that long work has until the event loop's next turn."""

    __slots__ = ("_ends_ns", "_now_ns")

    def __init__(self, now_ns: Callable[[], int] = clock.now_ns) -> None:
        self._now_ns = now_ns
        self._ends_ns = now_ns() + SLICE_NS

    def is_over(self) -> bool:
        """Whether it is time to `rest`."""
        return self._now_ns() >= self._ends_ns

    async def rest(self) -> None:
        """Let the event loop run whatever else is due, and begin the next slice."""
        await asyncio.sleep(0)
        self._ends_ns = self._now_ns() + SLICE_NS


async def json_parts(body: Any) -> list[bytes]:
    """`body` as indented JSON and a newline, made in slices, in parts that need not be joined."""
    return [part async for part in _parts(_json_pieces(body))]


async def _parts(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    made: list[bytes] = []
    size, slice_ = 0, Slice()
    for piece in pieces:
        made.append(piece)
        size += len(piece)
        if size >= PART_BYTES:
            yield b"".join(made)
            made, size = [], 0
        if slice_.is_over():
            await slice_.rest()
    if made:
        yield b"".join(made)


def _json_pieces(body: Any) -> Iterator[bytes]:
    texts: list[str] = []
    for text in json.JSONEncoder(indent=1).iterencode(body):
        texts.append(text)
        if len(texts) >= _PIECES:
            yield "".join(texts).encode()
            texts.clear()
    yield ("".join(texts) + "\n").encode()
