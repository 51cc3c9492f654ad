"""Arguments and results of calls as bytes, and back.

A frame is a sequence of MessagePack objects, so any language can read it: the size of the head (a uint 32),
the head, and for each array its bytes (a bin 32); nil bytes pad, so that each array begins at a multiple of
64 bytes and is used where it lies. The head is `[args, kwargs]` for arguments and `[value]` for a result. In
it stand, as extension types: 1, an array: `[dtype, shape, offset]`, the offset counted from the first
array's; 2, a numpy scalar: `[dtype, bytes]`; 3, a tuple: the array of its elements. Nothing else is taken:
what comes out has the types that went in, except that arrays are read-only, and memory-mapped ones are plain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from slosched.functions.errors import MalformedPayload, PayloadTooLarge
from slosched.functions.function import MAX_PAYLOAD_BYTES

Buffer = bytes | memoryview

_ARRAY, _SCALAR, _TUPLE = 1, 2, 3
_TEXTS = frozenset((str, bytes))
_NUMBERS = frozenset((type(None), bool, int, float))
_SCALARS = _NUMBERS | _TEXTS
_KEYS = frozenset((str, int, bytes))
_PLAIN_ARRAYS = (np.ndarray, np.memmap)
#: Bool, integers, floats, complex, times, and texts and bytes of a fixed width.
_DTYPE = re.compile(r"[<>|][biufcmMSU][0-9]{1,9}(\[[0-9]{0,6}[a-zA-Z]{1,2}\])?")
_KINDS = "biufcmMSU"
_ALIGN = 64
_HEAD = 5  # bytes of the uint 32 before the head, and of the head of a bin 32
#: Deeper values are refused; a list that contains itself is one.
MOST_LEVELS = 64
_MOST_EMPTY = 2**31

_encoder = msgspec.msgpack.Encoder()


def encode(
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    most_bytes: int = MAX_PAYLOAD_BYTES,
) -> list[Buffer]:
    """Arguments as the parts of one frame, in order. Arrays that are contiguous are not copied.

    Raises TypeError, with the place (`args[1]["x"]: a set`), for what cannot travel, PayloadTooLarge.
    """
    return _Encoding().frame([list(args), dict(kwargs or {})], ("args", "kwargs"), most_bytes)


def encode_result(value: Any, *, most_bytes: int = MAX_PAYLOAD_BYTES) -> list[Buffer]:
    """What a call returned, as `encode`. In errors the value is called `result`."""
    return _Encoding().frame([value], ("result",), most_bytes)


def size_of(parts: Sequence[Buffer]) -> int:
    """The number of bytes of a frame that is in parts."""
    return sum(map(len, parts))


def joined(parts: Sequence[Buffer]) -> bytes:
    """The frame in one piece, which is a copy unless it has one part of bytes."""
    if len(parts) == 1 and isinstance(parts[0], bytes):
        return parts[0]
    return b"".join(parts)


def decode(frame: Buffer) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a frame. Arrays are read-only views of it. An empty frame has no arguments.

    Raises MalformedPayload.
    """
    if not len(frame):
        return (), {}
    found = _Decoding(frame).value()
    if len(found) != 2 or type(found[0]) is not list or type(found[1]) is not dict:
        raise MalformedPayload("a frame without arguments: its head is not [args, kwargs]")
    if not set(map(type, found[1])) <= {str}:
        raise MalformedPayload("a frame whose arguments are not named by texts")
    return tuple(found[0]), found[1]


def decode_result(frame: Buffer) -> Any:
    """The value of a frame, as `decode`. An empty frame is None. Raises MalformedPayload."""
    if not len(frame):
        return None
    found = _Decoding(frame).value()
    if len(found) != 1:
        raise MalformedPayload("a frame without a result: its head is not [value]")
    return found[0]


class _Unsupported(Exception):
    """A value that cannot travel; `path` leads to it, outermost last."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.path: list[str] = []


class _Unencodable(Exception):
    """A number or text in a tuple has no form in MessagePack; its place is looked for from the outside."""


class _Encoding:
    """One frame in the making."""

    def __init__(self) -> None:
        self._arrays: list[npt.NDArray[Any]] = []
        self._end = 0  # of the last array, counted from the first one's begin

    def frame(self, roots: list[Any], names: tuple[str, ...], most_bytes: int) -> list[Buffer]:
        plain: list[Any] = []
        for name, root in zip(names, roots, strict=True):
            try:
                plain.append(self._plain(root, 0))
            except _Unsupported as error:
                raise TypeError(f"{name}{''.join(reversed(error.path))}: {error.what}") from None
            except _Unencodable as error:
                _find_unencodable(root, name)
                raise TypeError(f"{name}: {error}") from None
        head = self._packed(plain, roots, names)
        size = _first_array(len(head)) + self._end if self._arrays else _HEAD + len(head)
        if size > most_bytes:
            what = "a result" if names == ("result",) else "arguments"
            raise _too_large(f"{what} of {size:,}", most_bytes)
        return self._parts(head)

    def _parts(self, head: bytes) -> list[Buffer]:
        begin = b"\xce" + len(head).to_bytes(4, "big") + head
        if not self._arrays:
            return [begin]
        parts: list[Buffer] = [begin]
        at, offset = len(begin), 0
        first = _first_array(len(head))
        for array in self._arrays:
            pad = first + offset - _HEAD - at
            parts.append(b"\xc0" * pad + b"\xc6" + array.nbytes.to_bytes(4, "big"))
            parts.append(array.reshape(-1).view(np.uint8).data)
            at = first + offset + array.nbytes
            offset = _next_array(offset + array.nbytes)
        return parts

    def _plain(self, value: Any, level: int) -> Any:
        """`value` as msgspec encodes it."""
        kind = type(value)
        if kind in _SCALARS:
            if kind in _TEXTS and len(value) > MAX_PAYLOAD_BYTES:
                raise _too_large(f"a {kind.__name__} of {len(value):,}")
            return value
        if level > MOST_LEVELS:
            raise _Unsupported(
                f"it is nested more than {MOST_LEVELS} levels deep, or contains itself"
            )
        if kind is list:
            return self._elements(value, level)
        if kind is tuple:
            return msgspec.msgpack.Ext(_TUPLE, self._tuple(value, level))
        if kind is dict:
            return self._entries(value, level)
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, np.generic):
            dtype = _dtype_text(value.dtype)
            return msgspec.msgpack.Ext(_SCALAR, _encoder.encode([dtype, value.tobytes()]))
        raise _Unsupported(f"{_article(kind)}{_hint(value)}")

    def _packed(self, plain: Any, roots: Sequence[Any], names: Sequence[str]) -> bytes:
        """`plain` as MessagePack. A number or text that has no form there is looked for in `roots`."""
        try:
            return _encoder.encode(plain)
        except (OverflowError, UnicodeEncodeError, ValueError) as error:
            for name, root in zip(names, roots, strict=True):
                _find_unencodable(root, name)
            raise TypeError(f"{' or '.join(names)}: {error}") from None

    def _tuple(self, value: tuple[Any, ...], level: int) -> bytes:
        plain = self._elements(value, level)
        try:
            return _encoder.encode(plain)
        except (OverflowError, UnicodeEncodeError, ValueError) as error:
            raise _Unencodable(str(error)) from None

    def _elements(self, values: Sequence[Any], level: int) -> Any:
        # The usual long list, without a step for each element.
        if set(map(type, values)) <= _NUMBERS:
            return values if type(values) is list else list(values)
        plain = []
        for place, each in enumerate(values):
            try:
                plain.append(self._plain(each, level + 1))
            except _Unsupported as error:
                error.path.append(f"[{place}]")
                raise
        return plain

    def _entries(self, values: dict[Any, Any], level: int) -> dict[Any, Any]:
        plain = {}
        for key, each in values.items():
            if type(key) not in _KEYS:
                raise _Unsupported(
                    f"a dict with the key {key!r}, {_article(type(key))}; keys are str, int or bytes"
                )
            try:
                plain[key] = self._plain(each, level + 1)
            except _Unsupported as error:
                error.path.append(_place(key))
                raise
        return plain

    def _array(self, value: npt.NDArray[Any]) -> msgspec.msgpack.Ext:
        if type(value) not in _PLAIN_ARRAYS:
            raise _Unsupported(
                f"{_article(type(value))}; numpy.asarray(...) makes a plain array of it"
            )
        dtype = _dtype_text(value.dtype)
        offset = _next_array(self._end) if self._arrays else 0
        if value.nbytes and offset + value.nbytes > MAX_PAYLOAD_BYTES:
            raise _too_large(f"arrays of {offset + value.nbytes:,}")
        array: npt.NDArray[Any] = np.asarray(value)
        if not array.flags.c_contiguous:
            array = array.copy(order="C")
        if array.nbytes:
            self._end = offset + array.nbytes
            self._arrays.append(array)
        return msgspec.msgpack.Ext(_ARRAY, _encoder.encode([dtype, array.shape, offset]))


def _first_array(head_bytes: int) -> int:
    """Where the first array begins: behind the head, with room for the head of its own object."""
    return -(-(_HEAD + head_bytes + _HEAD) // _ALIGN) * _ALIGN


def _next_array(end: int) -> int:
    return -(-(end + _HEAD) // _ALIGN) * _ALIGN


def _too_large(what: str, most_bytes: int = MAX_PAYLOAD_BYTES) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"{what} bytes; at most {most_bytes:,} travel. Pass a part, or share an array through ctx.state"
    )


def _dtype_text(dtype: np.dtype[Any]) -> str:
    if dtype.kind not in _KINDS or not _DTYPE.fullmatch(dtype.str):
        raise _Unsupported(
            f"a numpy value of the dtype {dtype}; dtypes of numbers, times and texts of a fixed width travel"
        )
    return dtype.str


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[:1].lower() in 'aeiou' else 'a'} {kind.__name__}"


def _place(key: str | int | bytes) -> str:
    """A key of a dict, in a path."""
    if isinstance(key, str) and key.isprintable() and '"' not in key:
        return f'["{key}"]'
    return f"[{key!r}]"


def _hint(value: object) -> str:
    if isinstance(value, bytearray | memoryview):
        return "; bytes(...) makes bytes of it"
    if isinstance(value, tuple):
        return "; tuple(...) makes a plain tuple of it"
    if isinstance(value, set | frozenset):
        return "; sorted(...) makes a list of it"
    if hasattr(value, "__array__") and hasattr(value, "device"):
        return "; give it as a numpy array on the host"
    return "; None, numbers, texts, bytes, lists, tuples, dicts and numpy arrays travel"


def _find_unencodable(value: Any, path: str) -> None:
    """Raise TypeError with the place of a number or text for which MessagePack has no form."""
    if type(value) is int and not -(2**63) <= value < 2**64:
        raise TypeError(f"{path}: an int of {value.bit_length()} bits; at most 64 travel")
    if type(value) in (str, bytes):
        _check_text(value, path)
    elif type(value) is dict:
        for key, each in value.items():
            _find_unencodable(key, f"{path} (key)")
            _find_unencodable(each, f"{path}{_place(key)}")
    elif type(value) in (list, tuple):
        for place, each in enumerate(value):
            _find_unencodable(each, f"{path}[{place}]")


def _check_text(value: str | bytes, path: str) -> None:
    if len(value) >= 2**32:
        raise TypeError(f"{path}: {len(value):,} characters; fewer than 2**32 travel")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise TypeError(f"{path}: a text that cannot be written as UTF-8") from None


class _Decoding:
    """One frame being read. It comes from a peer: nothing in it is trusted."""

    def __init__(self, frame: Buffer) -> None:
        view = memoryview(frame)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B")
        self._frame = view.toreadonly()
        self._levels = 0
        self._decoder = msgspec.msgpack.Decoder(ext_hook=self._extension)

    def value(self) -> list[Any]:
        frame = self._frame
        if len(frame) < _HEAD or frame[0] != 0xCE:
            _malformed("a frame that does not begin with the size of its head")
        size = int.from_bytes(frame[1:_HEAD], "big")
        if _HEAD + size > len(frame):
            _malformed(f"a head of {size} bytes in a frame of {len(frame)}")
        self._first = _first_array(size)
        found = self._decoded(frame[_HEAD : _HEAD + size])
        if type(found) is not list:
            _malformed("a head that is not an array")
        return found

    def _decoded(self, data: Buffer) -> Any:
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
            _malformed(f"not MessagePack of a payload: {error}")

    def _extension(self, code: int, data: memoryview) -> Any:
        self._levels += 1
        if self._levels > MOST_LEVELS + 2:
            _malformed(f"a value that is nested more than {MOST_LEVELS} levels deep")
        try:
            fields = self._decoded(data)
            if type(fields) is not list:
                _malformed(f"an extension {code} without an array in it")
            if code == _TUPLE:
                return tuple(fields)
            if code == _ARRAY and len(fields) == 3:
                return self._array(*fields)
            if code == _SCALAR and len(fields) == 2:
                return _scalar(*fields)
            _malformed(f"an extension {code} of {len(fields)} elements")
        finally:
            self._levels -= 1

    def _array(self, dtype_text: object, shape: object, offset: object) -> npt.NDArray[Any]:
        dtype = _dtype(dtype_text)
        if type(shape) is not list or len(shape) > 32 or type(offset) is not int or offset < 0:
            _malformed("an array without a shape")
        if not all(type(each) is int and 0 <= each < 2**62 for each in shape):
            _malformed("an array whose shape is not of whole numbers")
        count = math.prod(shape)
        try:
            if count * dtype.itemsize == 0:
                if count > _MOST_EMPTY:
                    _malformed("an array of more elements than travel")
                empty = np.empty(shape, dtype)
                empty.setflags(write=False)
                return empty
            begin = self._first + offset
            if begin + count * dtype.itemsize > len(self._frame):
                _malformed(
                    f"an array of {count * dtype.itemsize} bytes that the frame does not have"
                )
            return np.frombuffer(self._frame, dtype, count, begin).reshape(shape)
        except (ValueError, OverflowError, MemoryError) as error:
            _malformed(f"an array that cannot be: {error}")


def _scalar(dtype_text: object, data: object) -> Any:
    dtype = _dtype(dtype_text)
    if type(data) is not bytes or len(data) != dtype.itemsize:
        _malformed(f"a numpy scalar of {dtype} without its bytes")
    return np.frombuffer(data, dtype)[0] if data else np.zeros((), dtype)[()]


def _dtype(text: object) -> np.dtype[Any]:
    if type(text) is not str or not _DTYPE.fullmatch(text):
        _malformed("a dtype that does not travel")
    try:
        return np.dtype(text)
    except (TypeError, ValueError) as error:
        _malformed(f"a dtype that numpy has not: {error}")


def _malformed(text: str) -> NoReturn:
    raise MalformedPayload(f"a payload cannot be read: {text}")
