"""A request's tensors as frames of a model's rows, and rows' outputs as tensors again.

In the protocol a model takes a batch: each shape has one dimension more, in front, and a request of n rows is
n of the controller's (signature.py has a row's layout). The frame of a single input of a fixed shape is the
memory of the request itself. What does not fit is refused in Triton's words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from slosched.clients.tensors import inputs_of, outputs_of
from slosched.fronts.asked import Asked, NamedTensor
from slosched.fronts.datatypes import OF_NUMPY, TO_NUMPY
from slosched.fronts.errors import FrontError, Status
from slosched.message_types import ModelInfo
from slosched.signature import BYTES, VARIES, Tensor, joined, single, split
from slosched.transport.codec import MAX_MESSAGE_BYTES, Frame

#: Triton's word for a request without an id.
_NO_ID = "<id_unknown>"
_BATCHED = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended "
    "to each input shape. If you want to specify the full shape including the batch dim in your input dims "
    "config, try setting max_batch_size to zero. See the model configuration docs for more info on "
    "max_batch_size."
)


class Rows(NamedTuple):
    """The rows of one request: a frame each, and their length (0 where no dimension varies)."""

    frames: Sequence[Frame]
    length: int


class Form:
    """What requests and answers of one model look like. `name` is what the protocol calls it.

    `max_batch` is the greatest batch that the model runs.
    """

    def __init__(self, name: str, info: ModelInfo) -> None:
        self.name, self.info = name, info
        self.inputs, self.outputs = inputs_of(info), outputs_of(info)
        self.max_batch = max(info.batch_sizes, default=1)
        self._places = {tensor.name: place for place, tensor in enumerate(self.inputs)}
        self._output_places = {tensor.name: place for place, tensor in enumerate(self.outputs)}
        self._only_input, self._only_output = single(self.inputs), single(self.outputs)
        self._row_bytes = self._only_input.bytes_at(0) if self._only_input is not None else 0
        self._output_bytes = self._only_output.bytes_at(0) if self._only_output is not None else 0
        self._input_types = tuple(OF_NUMPY.get(each.dtype, "") for each in self.inputs)
        self._output_types = tuple(OF_NUMPY.get(each.dtype, "") for each in self.outputs)

    # ---------------------------------------------------------------------------- requests

    def rows(self, asked: Asked) -> Rows:
        """The frames of a request's rows. Raises FrontError, 400 (413: too many bytes for one row)."""
        if asked.wanted:
            self._check_wanted(asked)
        given: Sequence[NamedTensor] = asked.inputs
        if self._is_usual(given) and len(given[0].data) <= MAX_MESSAGE_BYTES:
            return Rows(self._frames(asked, given, given[0].shape[0], 0), 0)
        given = self._in_order(asked)
        count = self._count(asked, given)
        length = 0
        for place in range(len(given) - 1, -1, -1):  # as Triton, whose first error clients see
            tensor = given[place]
            found = self._check(asked, place, tensor, count)
            if length and found and found != length:
                raise self._wrong(
                    asked,
                    f"inputs of model '{self.name}' share one length, and input '{tensor.name}' has {found} "
                    f"where others have {length}",
                )
            length = length or found
        if count < 1:
            raise self._wrong(asked, f"inference request batch-size must be >= 1 for '{self.name}'")
        if count > self.max_batch:
            raise self._wrong(
                asked,
                f"inference request batch-size must be <= {self.max_batch} for '{self.name}'",
            )
        frames = self._frames(asked, given, count, length)
        for frame in frames:
            if len(frame) > MAX_MESSAGE_BYTES:
                raise FrontError(
                    Status.TOO_LARGE,
                    f"{_of(asked)}a row has {len(frame):,} bytes; at most {MAX_MESSAGE_BYTES:,} travel",
                )
        return Rows(frames, length)

    def _is_usual(self, given: Sequence[NamedTensor]) -> bool:
        """Whether it is the one input of a fixed shape, with nothing wrong: the common case."""
        only = self._only_input
        if only is None or len(given) != 1:
            return False
        tensor = given[0]
        shape = tensor.shape
        return (
            tensor.name == only.name
            and tensor.datatype == self._input_types[0]
            and len(shape) > 0
            and shape[1:] == only.shape
            and 1 <= shape[0] <= self.max_batch
            and len(tensor.data) == shape[0] * self._row_bytes
        )

    def _check_wanted(self, asked: Asked) -> None:
        for wanted in asked.wanted:
            if wanted.name not in self._output_places:
                raise _refused(
                    f"unexpected inference output '{_short(wanted.name)}' for model '{self.name}'"
                )

    def _count(self, asked: Asked, given: Sequence[NamedTensor]) -> int:
        """The number of rows, on which all inputs must agree. Raises FrontError."""
        count: int | None = None
        for place in range(len(given) - 1, -1, -1):
            tensor = given[place]
            if not tensor.shape:
                raise self._wrong(
                    asked,
                    f"input '{tensor.name}' has no shape but model requires batch dimension for "
                    f"'{self.name}'",
                )
            if len(tensor.shape) != len(self.inputs[place].shape) + 1:
                raise self._wrong_shape(asked, tensor, self.inputs[place])
            if count not in (None, tensor.shape[0]):
                raise self._wrong(
                    asked,
                    f"input '{tensor.name}' batch size does not match other inputs for '{self.name}'",
                )
            count = tensor.shape[0]
        return -1 if count is None else count

    def _in_order(self, asked: Asked) -> list[NamedTensor]:
        """The request's inputs in the order of the signature. Raises FrontError."""
        given = asked.inputs
        if len(given) == 1 and len(self.inputs) == 1 and given[0].name == self.inputs[0].name:
            return [given[0]]
        found: dict[int, NamedTensor] = {}
        for tensor in given:
            place = self._places.get(tensor.name)
            if place is None:
                raise _refused(
                    f"unexpected inference input '{_short(tensor.name)}' for model '{self.name}'"
                )
            if place in found:
                raise self._wrong(asked, f"input '{tensor.name}' already exists in request")
            found[place] = tensor
        if len(found) < len(self.inputs):
            got = ",".join(f"'{each.name}'" for each in given)
            lacks = ",".join(
                f"'{name}'" for name, place in self._places.items() if place not in found
            )
            raise self._wrong(
                asked,
                f"expected {len(self.inputs)} inputs but got {len(given)} inputs for model '{self.name}'. Got "
                f"input(s) [{got}], but missing required input(s) [{lacks}]. Please provide all required "
                "input(s).",
            )
        return [found[place] for place in range(len(self.inputs))]

    def _check(self, asked: Asked, place: int, tensor: NamedTensor, count: int) -> int:
        """The length of one input; 0 if it has none. Raises FrontError unless it fits, as `count` rows."""
        wanted, datatype = self.inputs[place], self._input_types[place]
        if tensor.datatype != datatype:
            raise self._wrong(
                asked,
                f"inference input '{tensor.name}' data-type is '{_datatype(tensor.datatype)}', but model "
                f"'{self.name}' expects '{datatype}'",
            )
        shape, length = tensor.shape, 0
        fits = count >= 0
        if wanted.varies:
            length = shape[1 + wanted.shape.index(VARIES)]
            fits = fits and 1 <= length <= self.info.lengths[-1]
        if not fits or shape[1:] != (wanted.shape if not length else wanted.shape_at(length)):
            raise self._wrong_shape(asked, tensor, wanted)
        if wanted.dtype != BYTES:
            size = max(count, 1) * wanted.bytes_at(length)
            if len(tensor.data) != size and count <= self.max_batch:
                raise self._wrong(
                    asked,
                    f"input byte size mismatch for input '{tensor.name}' for model '{self.name}'. Expected "
                    f"{size}, got {len(tensor.data)}",
                )
        return length

    def _wrong_shape(self, asked: Asked, tensor: NamedTensor, wanted: Tensor) -> FrontError:
        expected = ",".join(map(str, (-1, *wanted.shape)))
        got = ",".join(map(str, tensor.shape[:32]))
        up_to = f", -1 up to {self.info.lengths[-1]}" if wanted.varies else ""
        return self._wrong(
            asked,
            f"unexpected shape for input '{tensor.name}' for model '{self.name}'. Expected "
            f"[{expected}]{up_to}, got [{got}]. {_BATCHED}",
        )

    def _frames(
        self, asked: Asked, given: Sequence[NamedTensor], count: int, length: int
    ) -> Sequence[Frame]:
        if self._only_input is not None:
            data = given[0].data
            if count == 1:
                return (data,)
            view, size = memoryview(data), self._row_bytes
            return [view[at : at + size] for at in range(0, count * size, size)]
        parts = [
            self._parts(asked, place, tensor, count, length) for place, tensor in enumerate(given)
        ]
        return [joined([each[row] for each in parts]) for row in range(count)]

    def _parts(
        self, asked: Asked, place: int, tensor: NamedTensor, count: int, length: int
    ) -> list[memoryview]:
        """The bytes of one input for each row."""
        wanted, view = self.inputs[place], memoryview(tensor.data)
        if wanted.dtype == BYTES:
            return self._bytes_parts(asked, wanted, tensor.name, view, count)
        size = wanted.bytes_at(length)
        return [view[at : at + size] for at in range(0, count * size, size)]

    def _bytes_parts(
        self, asked: Asked, wanted: Tensor, name: str, view: memoryview, count: int
    ) -> list[memoryview]:
        parts, at, found, each = [], 0, 0, math.prod(wanted.shape)
        for _ in range(count):
            begin = at
            for _ in range(each):
                if at == len(view):
                    raise self._wrong(
                        asked,
                        f"expected {each * count} string elements for inference input '{name}' for model "
                        f"'{self.name}', got {found}",
                    )
                at = self._element_end(asked, name, view, at)
                found += 1
            if at - begin > wanted.max_bytes:
                raise self._wrong(
                    asked,
                    f"input '{name}' of a row has {at - begin:,} bytes with four for each element, and model "
                    f"'{self.name}' takes at most {wanted.max_bytes:,}",
                )
            parts.append(view[begin:at])
        if at != len(view):
            self._element_end(asked, name, view, at)
            raise self._wrong(
                asked,
                f"unexpected number of string elements {found + 1} for inference input '{name}' for model "
                f"'{self.name}', expecting {found}",
            )
        return parts

    def _element_end(self, asked: Asked, name: str, view: memoryview, at: int) -> int:
        """Where the element that begins at `at` ends. Raises FrontError."""
        if at + 4 > len(view):
            raise self._wrong(
                asked,
                f"incomplete string length indicator for inference input '{name}' for model '{self.name}', "
                f"expecting 4 bytes but only {len(view) - at} bytes available. Please make sure the string "
                "length indicator is in one buffer.",
            )
        size = int.from_bytes(view[at : at + 4], "little")
        if size > len(view) - at - 4:
            raise _refused(
                f"incomplete string data for inference input '{name}', expecting string of length {size} but "
                f"only {len(view) - at - 4} bytes available"
            )
        return at + 4 + size

    def _wrong(self, asked: Asked, text: str) -> FrontError:
        return _refused(f"{_of(asked)}{text}")

    # ----------------------------------------------------------------------------- answers

    def answer(self, asked: Asked, frames: Sequence[Frame], length: int) -> tuple[NamedTensor, ...]:
        """The outputs that the request wants (all, if it does not say), of the frames of its rows.

        Raises ValueError if the frames are not the model's outputs.
        """
        count = len(frames)
        only = self._only_output
        if only is not None:
            size = self._output_bytes
            if any(len(frame) != size for frame in frames):
                raise ValueError(f"{len(frames[0])} bytes came for {only}")
            data = frames[0] if count == 1 else b"".join(frames)
            return (NamedTensor(only.name, self._output_types[0], (count, *only.shape), data),)
        rows = [split(self.outputs, length, frame) for frame in frames]
        places: Sequence[int] = range(len(self.outputs))
        if asked.wanted:
            # As Triton: once, however often it is asked for, and in the model's order.
            places = sorted({self._output_places[each.name] for each in asked.wanted})
        return tuple(
            self._named(
                place,
                rows[0][place] if count == 1 else b"".join(row[place] for row in rows),
                count,
                length,
            )
            for place in places
        )

    def _named(self, place: int, data: Frame, count: int, length: int) -> NamedTensor:
        tensor = self.outputs[place]
        shape = (count, *tensor.shape_at(length))
        return NamedTensor(tensor.name, self._output_types[place], shape, data)


def _refused(text: str) -> FrontError:
    return FrontError(Status.INVALID_ARGUMENT, text)


def _datatype(text: str) -> str:
    return text if text in TO_NUMPY else "<invalid>"


def _of(asked: Asked) -> str:
    """Triton's words before an error of a request."""
    return f"[request id: {_short(asked.id) or _NO_ID}] "


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
