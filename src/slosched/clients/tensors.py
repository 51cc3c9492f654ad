"""Callers' arrays and texts as the one frame of a request, and an answer's frame as arrays by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from slosched.codes import Code
from slosched.errors import InvalidRequest, RequestFailed
from slosched.messages import ModelInfo
from slosched.signature import (
    BYTES,
    ONLY_INPUT,
    ONLY_OUTPUT,
    VARIES,
    Tensor,
    described,
    element_bytes,
    elements,
    joined,
    single,
    split,
)
from slosched.transport.codec import MAX_MESSAGE_BYTES, Frame

Array = npt.NDArray[Any]
#: What one input may be given as: an array, or for BYTES a text, bytes, or a list or array of them.
Value = Any
Inputs = Value | Mapping[str, Value]


class Packed(NamedTuple):
    """The inputs of one request: their frame, and its length (0 where no dimension varies)."""

    frame: Frame
    length: int


def inputs_of(info: ModelInfo) -> tuple[Tensor, ...]:
    """The model's inputs; a controller that knows no signatures tells the one input's shape and dtype."""
    return info.inputs or (Tensor(ONLY_INPUT, info.input_dtype, info.input_shape),)


def outputs_of(info: ModelInfo) -> tuple[Tensor, ...]:
    """The model's outputs, as `inputs_of`."""
    return info.outputs or (Tensor(ONLY_OUTPUT, info.output_dtype, info.output_shape),)


def signature_text(info: ModelInfo) -> str:
    """The signature as people read it, with the longest length if a dimension varies."""
    text = described(inputs_of(info), outputs_of(info))
    return f"{text}, -1 up to {info.lengths[-1]}" if info.lengths else text


def pack(info: ModelInfo, given: Inputs) -> Packed:
    """The frame of one request's inputs: a mapping by name, or the only input itself. It is a copy.

    Raises InvalidRequest, with the signature, for a wrong name, shape, dtype or length. Nothing is converted: a
    silent cast would hide a mistake and cost time.
    """
    tensors = inputs_of(info)
    values = _by_name(info, tensors, given)
    only = single(tensors)
    if only is not None:
        array = values[only.name]
        _check_only(info, array)
        return Packed(array.tobytes(), 0)
    length, parts = 0, []
    for tensor in tensors:
        value = values[tensor.name]
        if tensor.dtype == BYTES:
            parts.append(_pack_bytes(info, tensor, value))
            continue
        found = _length(info, tensor, value)
        if found and length and found != length:
            raise _wrong(
                info,
                f"the inputs are of different lengths: {tensor.name} of {found}, others of {length}",
            )
        length = length or found
        parts.append(value.tobytes())
    if info.lengths and length > info.lengths[-1]:
        raise _wrong(info, f"an input of length {length} is longer than the longest class")
    frame = joined(parts)
    if len(frame) > MAX_MESSAGE_BYTES:
        raise _wrong(
            info, f"the inputs have {len(frame)} bytes; at most {MAX_MESSAGE_BYTES} travel"
        )
    return Packed(frame, length)


def unpack(info: ModelInfo, frame: Frame, length: int) -> dict[str, Array]:
    """The outputs of a request of `length`, as arrays of their own. Raises RequestFailed if they do not fit."""
    tensors = outputs_of(info)
    try:
        parts = split(tensors, length, frame)
        return {
            tensor.name: _unpack_one(tensor, length, part)
            for tensor, part in zip(tensors, parts, strict=True)
        }
    except (TypeError, ValueError) as error:
        raise RequestFailed(
            f"the output of model {info.name!r} has {len(frame)} bytes, which are no {described(tensors)}: "
            f"{error}",
            code=Code.RUNTIME_ERROR,
        ) from None


def _by_name(info: ModelInfo, tensors: tuple[Tensor, ...], given: Inputs) -> Mapping[str, Value]:
    names = [tensor.name for tensor in tensors]
    if not isinstance(given, Mapping):
        if len(names) == 1:
            return {names[0]: given}
        raise _wrong(info, f"the model has {len(names)} inputs: give a dict of {', '.join(names)}")
    missing = [name for name in names if name not in given]
    unknown = [str(name) for name in given if name not in names]
    if missing or unknown:
        lacks = f"it lacks {', '.join(missing)}" if missing else ""
        has = f"it has no {', '.join(unknown[:8])}" if unknown else ""
        raise _wrong(info, f"wrong names of inputs: {' and '.join(filter(None, (lacks, has)))}")
    return given


def _check_only(info: ModelInfo, array: Value) -> None:
    """The checks of a model with one input of a fixed shape."""
    if not isinstance(array, np.ndarray):
        raise _wrong(
            info,
            f"the input must be a numpy array, not {type(array).__name__}; numpy.asarray(...) makes one of "
            f"dtype {info.input_dtype} and shape {info.input_shape}",
        )
    if array.shape != info.input_shape:
        hint = ""
        if array.shape == (1, *info.input_shape):
            hint = "; send one input without its batch dimension (array[0])"
        raise _wrong(
            info,
            f"model {info.name!r} takes an input of shape {info.input_shape}, not {array.shape}{hint}",
        )
    if array.dtype != _dtype(info, info.input_dtype):
        raise _wrong(
            info,
            f"model {info.name!r} takes {info.input_dtype} of shape {info.input_shape}, not "
            f"{array.dtype}; convert it first with array.astype('{info.input_dtype}')",
        )
    if array.nbytes > MAX_MESSAGE_BYTES:
        raise _wrong(
            info, f"the input has {array.nbytes} bytes; at most {MAX_MESSAGE_BYTES} travel"
        )


def _dtype(info: ModelInfo, name: str) -> np.dtype[Any]:
    try:
        return np.dtype(name)
    except TypeError:
        raise _wrong(
            info, f"model {info.name!r} takes {name}, a dtype that numpy has not"
        ) from None


def _length(info: ModelInfo, tensor: Tensor, value: Value) -> int:
    """The length of an array of numbers; 0 if none of its dimensions varies. Raises InvalidRequest."""
    if not isinstance(value, np.ndarray):
        raise _wrong(info, f"{tensor.name} must be a numpy array, not {type(value).__name__}")
    if value.dtype != _dtype(info, tensor.dtype):
        raise _wrong(
            info,
            f"{tensor.name} must be {tensor.dtype}, not {value.dtype}; convert it first with "
            f"array.astype('{tensor.dtype}')",
        )
    lengths = {
        extent
        for extent, wanted in zip(value.shape, tensor.shape, strict=False)
        if wanted == VARIES
    }
    length = max(lengths, default=0)
    if value.shape != tensor.shape_at(length) or (tensor.varies and not length):
        hint = ""
        if value.ndim == len(tensor.shape) + 1 and value.shape[0] == 1:
            hint = "; send one request without its batch dimension (array[0])"
        raise _wrong(info, f"{tensor.name} has the wrong shape {value.shape}{hint}")
    return length


def _pack_bytes(info: ModelInfo, tensor: Tensor, value: Value) -> bytes:
    array = np.asarray(value, dtype=object)
    if not array.shape and math.prod(tensor.shape) == 1:  # a text alone
        array = array.reshape(tensor.shape)
    if array.shape != tensor.shape:
        raise _wrong(
            info, f"{tensor.name} takes texts or bytes of shape {tensor.shape}, not {array.shape}"
        )
    values = []
    for each in array.ravel():
        if isinstance(each, str):
            try:
                each = each.encode()
            except UnicodeEncodeError:
                raise _wrong(info, f"{tensor.name}: a text cannot be written as UTF-8") from None
        if not isinstance(each, bytes | bytearray | memoryview):
            raise _wrong(info, f"{tensor.name} takes texts or bytes, not {type(each).__name__}")
        values.append(bytes(each))
    part = element_bytes(values)
    if len(part) > tensor.max_bytes:
        raise _wrong(
            info,
            f"{tensor.name} has {len(part):,} bytes with four for each element, and at most "
            f"{tensor.max_bytes:,} are taken",
        )
    return part


def _unpack_one(tensor: Tensor, length: int, part: memoryview) -> Array:
    if tensor.dtype == BYTES:
        array = np.empty(tensor.shape, dtype=object)
        array.ravel()[:] = elements(part)
        return array
    return np.frombuffer(part, dtype=np.dtype(tensor.dtype)).reshape(tensor.shape_at(length)).copy()


def _wrong(info: ModelInfo, text: str) -> InvalidRequest:
    return InvalidRequest(
        f"{text}. Model {info.name!r}: {signature_text(info)}", code=Code.INVALID_REQUEST
    )
