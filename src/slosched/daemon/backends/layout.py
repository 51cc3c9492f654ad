"""How the rows of a batch lie in memory: a request's frame becomes a row, and a row becomes its answer's frame.

A batch of a class (batch size, length) is one block of `batch` rows of equal size. A row is the frame of a
request of the class's length (signature.py), with the most room that BYTES may take; so each tensor of the
batch is a strided view of the block. A shorter request is padded at the end of each dimension that varies, and
its outputs are cut there. The row of a model with one tensor of numbers of a fixed shape is its frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.signature import (
    BYTES,
    VARIES,
    Tensor,
    aligned,
    element_bytes,
    elements,
    joined,
    places,
    row_bytes,
    single,
    split,
)

Array = npt.NDArray[Any]
#: Arrays (batch, *shape) by the name of the tensor; one of BYTES holds `bytes` objects.
Arrays = Mapping[str, Array]
#: The size of a piece of a copy on the host, after which another may be begun later (11 us, H200).
PIECE_BYTES = 256 * 1024


class Layout:
    """The rows of a batch of `tensors` at `length` (0: none varies). `pads`, by name, fill shorter requests.

    The last tensor of a `scored` layout is a judge's score, a float32 for each request: it has its place in the
    rows, and none in the frames that answer.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        length: int = 0,
        pads: Mapping[str, float] | None = None,
        *,
        scored: bool = False,
    ) -> None:
        self.tensors, self.length, self.scored = tuple(tensors), length, scored
        #: Those that a frame has.
        self.framed = self.tensors[:-1] if scored else self.tensors
        self._pads = dict(pads or {})
        self._places = places(self.tensors, length)
        #: A frame is a row, byte by byte.
        self.plain = single(self.tensors) is not None and not scored
        size = row_bytes(self.tensors, length)
        # Each row begins where any dtype may; that of an only tensor does anyway.
        self.row_bytes = size if len(self.tensors) == 1 else aligned(size)

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """The strides, in bytes, of the view of a batch's block that is `tensor`."""
        shape, item = self._stored(tensor)
        inner, step = [], np.dtype(item).itemsize
        for extent in reversed(shape):
            inner.append(step)
            step *= extent
        return (self.row_bytes, *reversed(inner))

    def _stored(self, tensor: Tensor) -> tuple[tuple[int, ...], str]:
        """Shape and dtype as a row has them: BYTES are their bytes."""
        if tensor.dtype == BYTES:
            return (tensor.max_bytes,), "uint8"
        return tensor.shape_at(self.length), tensor.dtype

    def parts(self) -> Iterator[tuple[Tensor, int, tuple[int, ...], str]]:
        """(tensor, its first byte in a row, its shape and dtype there) of each."""
        for tensor, (at, _) in zip(self.tensors, self._places, strict=True):
            yield (tensor, at, *self._stored(tensor))

    def _framed_parts(self) -> Iterator[tuple[Tensor, int, tuple[int, ...], str]]:
        return islice(self.parts(), len(self.framed))

    def views(self, memory: Array, batch: int) -> dict[str, Array]:
        """Each tensor (batch, *shape) in `memory`, uint8, of `batch` rows; of BYTES (batch, max_bytes)."""
        return {
            tensor.name: np.ndarray((batch, *shape), dtype, memory.data, at, self.strides(tensor))
            for tensor, at, shape, dtype in self.parts()
        }

    # ------------------------------------------------------------------------------ requests

    def copies(
        self, row: Array, frame: bytes | memoryview, length: int
    ) -> Iterator[tuple[Array, Array]]:
        """What to copy, in pieces: (to, from). `row` is then that of a request of `length` with this frame.

        Raises ValueError if the frame is not one of such a request.
        """
        if not self.plain and length > self.length:
            raise ValueError(f"a request of length {length} in a class of length {self.length}")
        own = split(self.tensors, length, frame)
        for (tensor, at, shape, dtype), part in zip(self.parts(), own, strict=True):
            source: Array
            if tensor.dtype == BYTES:
                source = np.frombuffer(part, np.uint8)
                yield from _pieces(row[at : at + len(part)], source)
                continue
            to: Array = np.ndarray(shape, dtype, row.data, at)
            source = np.frombuffer(part, dtype).reshape(tensor.shape_at(length))
            for axis in _varying(tensor) if length < self.length else ():
                rest = to[(*(slice(None),) * axis, slice(length, None))]
                pad = np.asarray(self._pads.get(tensor.name, 0), dtype)
                yield from _pieces(rest, np.broadcast_to(pad, rest.shape))
            yield from _pieces(_cut(tensor, to, length), source)

    def write(self, row: Array, frame: bytes | memoryview, length: int) -> None:
        """`copies`, all at once. Raises ValueError."""
        for to, source in self.copies(row, frame, length):
            to[...] = source

    def read(self, row: Array, length: int) -> bytes | memoryview:
        """The frame of a request of `length` whose answers are in `row`."""
        parts: list[bytes | memoryview] = []
        for tensor, at, shape, dtype in self._framed_parts():
            if tensor.dtype == BYTES:
                parts.append(element_bytes(_elements(tensor, row[at : at + tensor.max_bytes])))
                continue
            whole: Array = np.ndarray(shape, dtype, row.data, at)
            parts.append(_cut(tensor, whole, length).tobytes())
        return joined(parts)

    def answer(self, row: Array, length: int) -> tuple[memoryview, Iterator[tuple[Array, Array]]]:
        """The same where no tensor is of BYTES, to be filled in pieces: the frame, and (to, from) of each."""
        frame = np.zeros(row_bytes(self.framed, length), np.uint8)
        begins = [begin for begin, _ in places(self.framed, length)]

        def pieces() -> Iterator[tuple[Array, Array]]:
            for (tensor, at, shape, dtype), begin in zip(self._framed_parts(), begins, strict=True):
                whole: Array = np.ndarray(shape, dtype, row.data, at)
                to: Array = np.ndarray(tensor.shape_at(length), dtype, frame.data, begin)
                yield from _pieces(to, _cut(tensor, whole, length))

        return frame.data, pieces()

    def scores(self, memory: Array, given: Sequence[int]) -> tuple[float, ...]:
        """The scores in the rows of `memory`, uint8: one for each of `given`, NaN where that is 0."""
        at, _ = self._places[-1]
        found: Array = np.ndarray(len(given), "float32", memory.data, at, (self.row_bytes,))
        return tuple(
            [score if size else math.nan for score, size in zip(found.tolist(), given, strict=True)]
        )

    # -------------------------------------------------------------------------------- arrays

    def pack(self, arrays: Arrays, memory: Array | None = None) -> Array:
        """A block (batch, row_bytes) of uint8 with these tensors; in `memory`, if it is given.

        Raises ValueError for BYTES that take more than they may.
        """
        batch = len(next(iter(arrays.values())))
        if memory is None:
            memory = np.zeros(batch * self.row_bytes, np.uint8)
        views = self.views(memory, batch)
        for tensor in self.tensors:
            if tensor.dtype == BYTES:
                for row, values in zip(views[tensor.name], arrays[tensor.name], strict=True):
                    part = element_bytes(_flat(values))
                    if len(part) > len(row):
                        raise ValueError(
                            f"{tensor} has {len(part):,} bytes, and at most {len(row):,} are allowed"
                        )
                    row[: len(part)] = np.frombuffer(part, np.uint8)
            else:
                views[tensor.name][...] = arrays[tensor.name]
        return memory[: batch * self.row_bytes].reshape(batch, self.row_bytes)

    def unpack(self, memory: Array, batch: int) -> dict[str, Array]:
        """The tensors of `batch` rows, as copies."""
        found: dict[str, Array] = {}
        for name, view in self.views(memory, batch).items():
            (tensor,) = (each for each in self.tensors if each.name == name)
            if tensor.dtype == BYTES:
                found[name] = np.empty((batch, *tensor.shape), object)
                for row in range(batch):
                    values = np.empty(math.prod(tensor.shape), object)
                    values[:] = _elements(tensor, view[row])
                    found[name][row] = values.reshape(tensor.shape)
            else:
                found[name] = view.copy()
        return found

    def padded(self, arrays: Arrays, length: int) -> dict[str, Array]:
        """`arrays` of requests of `length`, as they run in this class."""
        found: dict[str, Array] = {}
        for tensor in self.tensors:
            array = arrays[tensor.name]
            if tensor.varies:
                shape = (len(array), *tensor.shape_at(self.length))
                whole = np.full(shape, self._pads.get(tensor.name, 0), array.dtype)
                _cut(tensor, whole, length, batched=True)[...] = array
                array = whole
            found[tensor.name] = array
        return found

    def cut(self, arrays: Arrays, length: int) -> dict[str, Array]:
        """The part of `arrays`, answers of this class, that belongs to requests of `length`."""
        return {
            tensor.name: _cut(tensor, arrays[tensor.name], length, batched=True)
            for tensor in self.tensors
        }


class Layouts:
    """The layouts of a model's inputs and outputs, by length class. `scored` is said of the outputs."""

    def __init__(
        self,
        takes: Sequence[Tensor],
        gives: Sequence[Tensor],
        pads: Mapping[str, float],
        *,
        scored: bool = False,
    ) -> None:
        self._takes, self._gives, self._pads, self._scored = takes, gives, pads, scored
        self._at: dict[int, tuple[Layout, Layout]] = {}

    def at(self, length: int) -> tuple[Layout, Layout]:
        """(of the inputs, of the outputs) in the class of `length`; 0: there is none."""
        found = self._at.get(length)
        if found is None:
            gives = Layout(self._gives, length, scored=self._scored)
            found = Layout(self._takes, length, self._pads), gives
            self._at[length] = found
        return found


def made_up(
    tensors: Sequence[Tensor], batch: int, seed: int, *, length: int = 0, high: int = 0
) -> dict[str, Array]:
    """Inputs at random, (batch, *shape) by name, the same for the same seed: floats in 0..1, integers in
    0..high-1 (0 and 1 where `high` is less). An input whose name ends in "mask" is ones, so that everything is
    looked at.
    """
    random = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for tensor in tensors:
        shape = (batch, *tensor.shape_at(length))
        if tensor.dtype == BYTES:
            found[tensor.name] = _words(tensor, shape, random)
            continue
        dtype = np.dtype(tensor.dtype)
        if tensor.name.endswith("mask"):
            found[tensor.name] = np.ones(shape, dtype)
        elif dtype.kind == "f":
            found[tensor.name] = random.random(shape, dtype=np.float32).astype(dtype)
        else:
            found[tensor.name] = random.integers(0, max(2, high), shape).astype(dtype)
    return found


#: Letters of a made-up text, at most.
_LETTERS = 16


def _words(tensor: Tensor, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    room = tensor.max_bytes // max(1, math.prod(tensor.shape)) - 4
    letters = max(0, min(_LETTERS, room))
    values = np.empty(math.prod(shape), object)
    for place in range(len(values)):
        values[place] = bytes(random.integers(97, 123, letters).astype(np.uint8))
    return values.reshape(shape)


def _varying(tensor: Tensor) -> list[int]:
    return [axis for axis, extent in enumerate(tensor.shape) if extent == VARIES]


def _cut(tensor: Tensor, whole: Array, length: int, *, batched: bool = False) -> Array:
    """The part of `whole`, of one request or of a batch, that has `length` along each dimension that varies."""
    inner = tuple(slice(length if extent == VARIES else None) for extent in tensor.shape)
    return whole[(*((slice(None),) if batched else ()), *inner, ...)]


def _flat(values: Any) -> list[bytes]:
    return list(np.asarray(values, object).reshape(-1))


def _elements(tensor: Tensor, room: Array) -> list[bytes]:
    """Those that begin at the begin of `room`. Raises ValueError if that is not enough for them."""
    found = elements(room.tobytes(), math.prod(tensor.shape))
    if sum(4 + len(each) for each in found) > len(room) or len(found) < math.prod(tensor.shape):
        raise ValueError(f"the elements of {tensor} are cut off")
    return found


def _pieces(to: Array, source: Array) -> Iterator[tuple[Array, Array]]:
    """A copy, in pieces of at most PIECE_BYTES along the leading dimensions."""
    if source.nbytes <= PIECE_BYTES:
        if source.size:
            yield to, source
        return
    each = source.nbytes // len(source)
    if each > PIECE_BYTES:
        for place in range(len(source)):
            yield from _pieces(to[place], source[place])
        return
    step = PIECE_BYTES // each
    for begin in range(0, len(source), step):
        yield to[begin : begin + step], source[begin : begin + step]
