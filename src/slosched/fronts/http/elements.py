"""Elements of tensors as JSON has them, and as bytes: C order, little endian.

NaN, Infinity and -Infinity are read and written, which JSON does not have but Triton and its clients do.

FP16 and BF16 have no form in the protocol's JSON; `PLAIN` of them are numbers all the same, for plain answers.
BYTES are texts in JSON, and in bytes each is four bytes of size and the UTF-8 text.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from slosched.fronts.datatypes import SIZES
from slosched.signature import element_bytes, elements
from slosched.transport.codec import Frame

#: array's letter of each number that JSON can carry.
_LETTERS = {
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP32": "f",
    "FP64": "d",
}
#: Datatypes that travel as binary data alone.
BINARY_ONLY = ("FP16", "BF16")
#: Lists in lists; a tensor has at most 16 dimensions and a batch.
_MOST_DEPTH = 17

#: json takes half of a surrogate pair for a character.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

#: Elements, and lists, that the JSON of one request may have. Each is an object of Python for a moment; all
#: take up to some 0.2 s, in which nothing else is served.
MOST_ELEMENTS, MOST_LISTS = 2**21, 2**17

_floats = msgspec.json.Decoder(list[float])
_whole = msgspec.json.Decoder(list[int])
_texts = msgspec.json.Decoder(list[str])
_anything = msgspec.json.Decoder()


class Objects:
    """Counts what the values of one request in JSON make objects of. What stands in texts is counted, too."""

    def __init__(self) -> None:
        self._lists = self._elements = 0

    def add(self, raw: msgspec.Raw) -> None:
        """Raises ValueError, with a sentence, where they are too many."""
        text = bytes(raw)
        self._lists += text.count(b"[") + text.count(b"{")
        self._elements += text.count(b",") + 1
        for count, most, what in (
            (self._lists, MOST_LISTS, "lists"),
            (self._elements, MOST_ELEMENTS, "elements"),
        ):
            if count > most:
                raise ValueError(
                    f"there are more than {most:,} {what}, the most in a request's JSON; give one list, or "
                    "binary data"
                )


def from_json(raw: msgspec.Raw, datatype: str, count: int) -> bytes:
    """The bytes of `count` elements of JSON, in one list or in lists of lists.

    Raises ValueError with a sentence for another number of elements, and for one that is not of the datatype.
    """
    values = _quick(raw, datatype)
    if values is None:
        try:
            values = flat(_anything.decode(raw))
        except msgspec.DecodeError:
            values = flat(odd_json(bytes(raw)))
    if len(values) != count:
        raise ValueError(
            f"Shape does not match true shape of 'data' field: {len(values)} elements came, and the shape has "
            f"{count}"
        )
    return to_bytes(values, datatype)


def _quick(raw: msgspec.Raw, datatype: str) -> list[Any] | None:
    """The elements where they are one list of the right type, which is the usual case; else None."""
    if datatype in ("FP32", "FP64"):
        decoder: msgspec.json.Decoder[Any] = _floats
    elif datatype == "BYTES":
        decoder = _texts
    elif datatype in _LETTERS:
        decoder = _whole
    else:
        return None
    try:
        found: list[Any] = decoder.decode(raw)
    except msgspec.DecodeError:
        return None
    return found


def odd_json(text: bytes) -> Any:
    """What JSON with NaN and infinities has. Raises ValueError, also for a number that is too large."""
    if b"NaN" not in text and b"Infinity" not in text:
        raise ValueError("it is not JSON, or has a number that is too large")
    if text.count(b"[") + text.count(b"{") > MOST_LISTS:
        raise ValueError(f"it has NaN or infinity, and more than {MOST_LISTS:,} lists")
    if _SURROGATE.search(text):
        raise ValueError("it has NaN or infinity, and a character written as two surrogates")
    return json.loads(text.decode(), parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("it has a number that is too large")
    return value


def numbers_to_json(values: list[Any]) -> bytes:
    """A list of numbers as JSON, also those that are not finite."""
    text = msgspec.json.encode(values)
    return json.dumps(values, separators=(",", ":")).encode() if b"n" in text else text  # null


def flat(value: object) -> list[Any]:
    """The elements of a list of lists in C order; an element alone is a list of one. Raises ValueError."""
    if not isinstance(value, list):
        return [value]
    for _ in range(_MOST_DEPTH):
        lists = sum(isinstance(each, list) for each in value)
        if not lists:
            return value
        if lists != len(value):
            raise ValueError("a list has elements beside lists")
        value = list(itertools.chain.from_iterable(value))
    raise ValueError(f"lists are nested in more than {_MOST_DEPTH} levels")


def regular(value: object) -> tuple[list[Any], tuple[int, ...]]:
    """The elements of lists of lists in C order, and their shape.

    Raises ValueError where lists differ in length.
    """
    if not isinstance(value, list):
        return [value], ()
    shape: list[int] = []
    level: list[Any] = [value]
    while level and isinstance(level[0], list):
        if len(shape) == _MOST_DEPTH:
            raise ValueError(f"lists are nested in more than {_MOST_DEPTH} levels")
        if not all(isinstance(each, list) and len(each) == len(level[0]) for each in level):
            raise ValueError("lists of different lengths came")
        shape.append(len(level[0]))
        level = list(itertools.chain.from_iterable(level))
    return level, tuple(shape)


def nested(values: Sequence[Any], shape: Sequence[int]) -> Any:
    """`values` in lists of lists of this shape; the only one itself where the shape is empty."""
    if not shape:
        return values[0]
    for extent in reversed(shape[1:]):
        values = [list(values[at : at + extent]) for at in range(0, len(values), extent or 1)]
    return list(values)


def to_bytes(values: list[Any], datatype: str) -> bytes:
    """The bytes of elements as JSON has them. Raises ValueError with a sentence."""
    kinds = set(map(type, values))
    if datatype == "BYTES":
        _only(kinds, {str}, datatype)
        try:
            return element_bytes([each.encode() for each in values])
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair, which is not Unicode") from None
    if datatype == "BOOL":
        _only(kinds, {bool}, datatype)
        return bytes(values)
    letter = _LETTERS.get(datatype)
    if letter is None and datatype not in BINARY_ONLY:
        raise ValueError(f"there is no datatype {datatype[:40]!r}")
    whole = letter is not None and letter not in "fd"
    _only(kinds, {int} if whole else {int, float}, datatype)
    try:
        if datatype == "FP16":
            return struct.pack(f"<{len(values)}e", *values)
        if datatype == "BF16":
            return _brain_floats(values)
        packed = array(letter or "", values)
    except (OverflowError, struct.error):
        raise ValueError(f"a number does not fit into {datatype}") from None
    if letter == "f" and not _kept(values, packed):
        raise ValueError(f"a number does not fit into {datatype}")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _only(kinds: set[type], allowed: set[type], datatype: str) -> None:
    if not kinds <= allowed:
        theirs = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
        wrong = (kinds - allowed).pop()
        name = theirs.get(wrong, "null" if wrong is type(None) else "a number")
        if wrong is float:
            name = "a number that is not whole"
        raise ValueError(f"{name} is among the elements, which are {datatype}")


def _brain_floats(values: list[Any]) -> bytes:
    """The upper half of each float32, rounded to even."""
    packed = array("f", values)
    halves = array("H")
    for word in array("I", packed.tobytes()):
        finite = word & 0x7F800000 != 0x7F800000
        halves.append((word + (0x7FFF + (word >> 16 & 1) if finite else 0)) >> 16)
    words = array("I", [half << 16 for half in halves])
    if not _kept(values, array("f", words.tobytes())):
        raise OverflowError
    return halves.tobytes()


def _kept(values: list[Any], packed: Sequence[float]) -> bool:
    """Whether what was finite still is."""
    if math.isfinite(sum(packed)):
        return True
    return all(
        math.isfinite(there) or not math.isfinite(value)
        for value, there in zip(values, packed, strict=True)
    )


def values_of(data: Frame, datatype: str, count: int) -> list[Any]:
    """The elements of a tensor's bytes as Python has them; texts of BYTES.

    Raises ValueError where there are not as many, and for BYTES that are not UTF-8.
    """
    view = memoryview(data)
    if datatype == "BYTES":
        found = elements(view)
        if len(found) != count:
            raise ValueError(f"{len(found)} elements came, and the shape has {count}")
        return [each.decode() for each in found]
    if len(view) != SIZES.get(datatype, -1) * count:
        raise ValueError(f"{len(view)} bytes came for {count} elements of {datatype}")
    if datatype == "FP16":
        return list(struct.unpack(f"<{count}e", view))
    if datatype == "BF16":
        words = array("H", view.tobytes())
        return list(array("f", array("I", [word << 16 for word in words]).tobytes()))
    if datatype == "BOOL":
        return [byte != 0 for byte in view]
    if sys.byteorder == "big":
        swapped = array(_LETTERS[datatype], view.tobytes())
        swapped.byteswap()
        return swapped.tolist()
    return array(_LETTERS[datatype], view.tobytes()).tolist()
