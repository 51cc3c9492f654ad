"""What a model takes and gives: named tensors, and how those of one request lie in one frame.

A request's inputs travel as one frame, and its outputs as another: its tensors in the order of the signature,
each in C order and beginning at a multiple of `ALIGN_BYTES`. So the frame of a single tensor is the tensor.
A dimension of -1 is the request's *length*, the same number for all its tensors. A model with such a dimension
has *length classes*; a request runs in one that is at least as long as itself, its inputs padded and its
outputs cut.

A tensor of BYTES has elements of any size: each is four bytes, little endian, that say its size, and the bytes
themselves. Its shape is fixed, and all its elements together take at most `max_bytes`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import msgspec

from slosched.units import tensor_bytes

#: A shape's dimension that is the request's length.
VARIES = -1
#: The dtype of texts and payloads.
BYTES = "BYTES"
ALIGN_BYTES = 16
#: What a model with one input or one output calls it where nothing else is known.
ONLY_INPUT, ONLY_OUTPUT = "input", "output"
#: The most inputs, or outputs, that a model has, and the most length classes.
MOST_TENSORS, MOST_LENGTHS = 64, 64
#: The most dimensions of a tensor, and elements along one, and the most bytes of a BYTES tensor.
MOST_DIMENSIONS, MOST_ALONG, MOST_BYTES = 16, 2**31 - 1, 2**31 - 1

_Extent = Annotated[int, msgspec.Meta(ge=VARIES, le=MOST_ALONG)]
_Word = Annotated[str, msgspec.Meta(max_length=256)]


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """One input or output of a model: numpy's name of a dtype or BYTES, and the shape of one request."""

    name: _Word
    dtype: _Word
    shape: Annotated[tuple[_Extent, ...], msgspec.Meta(max_length=MOST_DIMENSIONS)]
    max_bytes: Annotated[int, msgspec.Meta(ge=0, le=MOST_BYTES)] = 0  # of BYTES

    @property
    def varies(self) -> bool:
        return VARIES in self.shape

    def shape_at(self, length: int) -> tuple[int, ...]:
        """The shape for a request of `length`."""
        return tuple(length if extent == VARIES else extent for extent in self.shape)

    def bytes_at(self, length: int) -> int:
        """Bytes for a request of `length`; the most that BYTES may take."""
        if self.dtype == BYTES:
            return self.max_bytes
        return tensor_bytes(self.shape_at(length), self.dtype)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"


Tensors = Annotated[tuple[Tensor, ...], msgspec.Meta(max_length=MOST_TENSORS)]


def described(inputs: Sequence[Tensor], outputs: Sequence[Tensor] = ()) -> str:
    """The signature as people read it: `ids int64[-1], mask int64[-1] -> logits float32[2]`."""
    texts = [", ".join(map(str, tensors)) for tensors in (inputs, outputs)]
    return " -> ".join(texts) if outputs else texts[0]


def digest(inputs: Sequence[Tensor]) -> int:
    """A number that differs (but for one case in 2^32) where the inputs do; never 0."""
    return zlib.crc32(described(inputs).encode()) or 1


def single(tensors: Sequence[Tensor]) -> Tensor | None:
    """The only one, if its shape is fixed and it holds numbers: a frame is then the tensor and no more."""
    if len(tensors) != 1 or tensors[0].varies or tensors[0].dtype == BYTES:
        return None
    return tensors[0]


def aligned(size: int) -> int:
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def places(tensors: Sequence[Tensor], length: int) -> tuple[tuple[int, int], ...]:
    """(first byte, bytes) of each tensor in the row of a request of `length`.

    A row differs from a frame where a tensor holds BYTES: it has room for the most that they may take.
    """
    found, at = [], 0
    for tensor in tensors:
        at = aligned(at)
        size = tensor.bytes_at(length)
        found.append((at, size))
        at += size
    return tuple(found)


def row_bytes(tensors: Sequence[Tensor], length: int) -> int:
    """Bytes of a row. Without BYTES, a request's frame has exactly as many."""
    if not tensors:
        return 0
    at, size = places(tensors, length)[-1]
    return at + size


def split(
    tensors: Sequence[Tensor], length: int, frame: bytes | memoryview
) -> tuple[memoryview, ...]:
    """The bytes of each tensor of a request of `length`, as its frame has them.

    Raises ValueError with a sentence if the frame is not one of such a request.
    """
    view = memoryview(frame).cast("B")
    parts, at = [], 0
    for tensor in tensors:
        at = aligned(at)
        size = tensor.bytes_at(length)
        if tensor.dtype == BYTES:
            size = _elements_end(tensor, view, at) - at
        if at + size > len(view):
            raise ValueError(_wrong_size(tensors, length, len(view)))
        parts.append(view[at : at + size])
        at += size
    if at != len(view):
        raise ValueError(_wrong_size(tensors, length, len(view)))
    return tuple(parts)


def joined(parts: Sequence[bytes | memoryview]) -> bytes | memoryview:
    """One frame of the bytes of each tensor; that of a single tensor is not copied."""
    if len(parts) == 1:
        return parts[0]
    frame = bytearray()
    for part in parts:
        frame += bytes(-len(frame) % ALIGN_BYTES)
        frame += part
    return memoryview(frame)


def _elements_end(tensor: Tensor, view: memoryview, at: int) -> int:
    """Where the elements of a BYTES tensor that begin at `at` end. Raises ValueError."""
    begin = at
    for _ in range(math.prod(tensor.shape)):
        if at + 4 > len(view):
            raise ValueError(f"the elements of {tensor} are cut off")
        at += 4 + int.from_bytes(view[at : at + 4], "little")
    if at - begin > tensor.max_bytes:
        raise ValueError(
            f"{tensor} has {at - begin:,} bytes, and at most {tensor.max_bytes:,} are allowed"
        )
    return at


def _wrong_size(tensors: Sequence[Tensor], length: int, size: int) -> str:
    at = f" at length {length}" if any(tensor.varies for tensor in tensors) else ""
    return f"{size:,} bytes came, and {described(tensors)}{at} has {row_bytes(tensors, length):,}"


def elements(part: bytes | memoryview, count: int = MOST_BYTES) -> list[bytes]:
    """The elements of a BYTES tensor, whose bytes `split` has checked: `count`, where more lies behind."""
    found: list[bytes] = []
    at = 0
    while at < len(part) and len(found) < count:
        size = int.from_bytes(part[at : at + 4], "little")
        found.append(bytes(part[at + 4 : at + 4 + size]))
        at += 4 + size
    return found


def element_bytes(values: Sequence[bytes]) -> bytes:
    """The bytes of a BYTES tensor with these elements, in C order."""
    return b"".join(len(value).to_bytes(4, "little") + value for value in values)


def signature_error(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], lengths: Sequence[int]
) -> str:
    """What is wrong with a signature, in a sentence; empty if nothing is."""
    for kind, tensors in (("input", inputs), ("output", outputs)):
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names) or not all(names):
            return f"each {kind} needs a name of its own, not {names}"
        for tensor in tensors:
            wrong = _tensor_error(tensor)
            if wrong:
                return f"{kind} {wrong}"
    if any(tensor.varies for tensor in inputs) != bool(lengths):
        return (
            f"{described(inputs)} has a dimension of -1, and no lengths are given"
            if not lengths
            else f"lengths {list(lengths)} are given, and no input has a dimension of -1"
        )
    if any(tensor.varies for tensor in outputs) and not lengths:
        return f"{described(outputs)} has a dimension of -1, and no input has one"
    rising = all(a < b for a, b in pairwise(lengths))
    if lengths and (lengths[0] < 1 or not rising or len(lengths) > MOST_LENGTHS):
        return f"lengths must rise from 1 or more, at most {MOST_LENGTHS} of them, not {list(lengths)[:8]}"
    if lengths and lengths[-1] > MOST_ALONG:
        return f"lengths end at {MOST_ALONG}, not {lengths[-1]}"
    return ""


def score_error(outputs: Sequence[Tensor], score: str) -> str:
    """What speaks against `score`, the last of `outputs`, as a judge's score, in a sentence; empty if nothing
    does.
    """
    last = outputs[-1] if outputs else None
    if last is None or last.name != score:
        return f"its score {score!r} must be the last of its outputs"
    if len(outputs) == 1:
        return f"it has no output but its score {score!r}, so that it would answer with nothing"
    if last.dtype != "float32" or last.shape not in ((), (1,)):
        return (
            f"{last} cannot be its score: that is one float32 for each request, of shape [] or [1]"
        )
    return ""


def _tensor_error(tensor: Tensor) -> str:
    if any(extent == 0 for extent in tensor.shape):
        return f"{tensor}: a dimension is at least 1, or -1 where it varies"
    if tensor.dtype == BYTES:
        if tensor.varies:
            return f"{tensor}: a shape of BYTES is fixed"
        return "" if tensor.max_bytes else f"{tensor}: BYTES need max_bytes"
    return "" if tensor_bytes((), tensor.dtype) else f"{tensor}: unknown dtype"
