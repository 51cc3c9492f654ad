"""Typed contents: the elements of a tensor in a repeated field of their type, instead of its bytes."""

from __future__ import annotations

from array import array
from typing import Any

from slosched.fronts.errors import FrontError, Status
from slosched.fronts.rpc.frames import parted
from slosched.signature import element_bytes

#: Elements that the inputs of one request may have in this form, where each is an object of Python for a
#: moment: whole numbers, and BYTES, which count as four. All take up to 30 ms, in which nothing else is served.
MOST_ELEMENTS = 2**18
_OF_BYTES = 4
#: The field of InferTensorContents by datatype, and the typecode of `array` for whole numbers. FP16 and
#: BF16 have no field.
_FIELDS = {
    "BOOL": ("bool_contents", ""),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", ""),
    "FP64": ("fp64_contents", ""),
    "BYTES": ("bytes_contents", ""),
}


class TypedContents:
    """Reads the typed contents of one request."""

    def __init__(self) -> None:
        self._room = MOST_ELEMENTS

    def bytes_of(self, name: str, datatype: str, contents: Any) -> bytes:
        """The bytes of an input from its InferTensorContents, whatever its shape says.

        Raises FrontError, 400.
        """
        field, typecode = _FIELDS.get(datatype, ("", ""))
        if not field:
            raise _bad(f"input '{name}' of datatype {datatype!r} must be in raw_input_contents")
        filled = [descriptor.name for descriptor, _ in contents.ListFields()]
        if any(each != field for each in filled):
            raise _bad(
                f"input '{name}' of datatype {datatype} must be in {field}, not in {filled[0]}"
            )
        if datatype in _PACKED:
            return _packed(contents, field)
        values = getattr(contents, field)
        self._room -= len(values) * (_OF_BYTES if datatype == "BYTES" else 1)
        if self._room < 0:
            raise _bad(
                f"input '{name}' has {len(values):,} elements; more than {MOST_ELEMENTS:,} whole numbers, "
                f"or {MOST_ELEMENTS // _OF_BYTES:,} BYTES, must be in raw_input_contents"
            )
        if datatype == "BYTES":
            return element_bytes(values)
        try:
            return array(typecode, values).tobytes()
        except OverflowError:
            raise _bad(f"input '{name}' has an element that is not within {datatype}") from None


#: Their elements lie in protobuf's bytes as in a tensor's.
_PACKED = ("BOOL", "FP32", "FP64")


def _packed(contents: Any, field: str) -> bytes:
    """The contents of a field as protobuf writes them, without an object for each element."""
    contents.DiscardUnknownFields()
    tag = contents.DESCRIPTOR.fields_by_name[field].number << 3 | 2
    _, found = parted(contents.SerializeToString(), tag)
    return b"".join(found)


def _bad(text: str) -> FrontError:
    return FrontError(Status.INVALID_ARGUMENT, text)
