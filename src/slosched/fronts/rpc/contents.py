"""Typed contents: the elements of a tensor in a repeated field of their type, instead of its bytes."""

from __future__ import annotations

from array import array
from typing import Any

from slosched.fronts.errors import FrontError, Status
from slosched.signature import element_bytes

#: Elements that one tensor may have in this form: each is an object of Python for a moment.
MOST_ELEMENTS = 2**20
#: The field of InferTensorContents by datatype, and the typecode of `array` for its elements. FP16 and BF16
#: have no field.
_FIELDS = {
    "BOOL": ("bool_contents", "B"),
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BYTES": ("bytes_contents", ""),
}


def content_bytes(name: str, datatype: str, contents: Any) -> bytes:
    """The bytes of an input from its InferTensorContents, whatever its shape says. Raises FrontError, 400."""
    field, typecode = _FIELDS.get(datatype, ("", ""))
    if not field:
        raise _bad(f"input '{name}' of datatype {datatype!r} must be in raw_input_contents")
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if any(each != field for each in filled):
        raise _bad(f"input '{name}' of datatype {datatype} must be in {field}, not in {filled[0]}")
    values = getattr(contents, field)
    if len(values) > MOST_ELEMENTS:
        raise _bad(
            f"input '{name}' has {len(values):,} elements; more than {MOST_ELEMENTS:,} must be in "
            "raw_input_contents"
        )
    if datatype == "BYTES":
        return element_bytes(values)
    try:
        return array(typecode, values).tobytes()
    except OverflowError:
        raise _bad(f"input '{name}' has an element that is not within {datatype}") from None


def _bad(text: str) -> FrontError:
    return FrontError(Status.INVALID_ARGUMENT, text)
