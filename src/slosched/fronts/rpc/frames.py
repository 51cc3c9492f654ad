"""Requests and answers as bytes, so that tensors are not copied into protobuf's messages and out of them again.

An inference has its tensors in a repeated field of bytes, outside the messages that describe them. A request is
parted into these fields, as views, and all others, which protobuf parses; in an answer they stand behind what
protobuf has made. Both are the same to a peer: fields of a message may come in any order (protobuf's encoding
guide, "Field Order").
"""

from __future__ import annotations

from collections.abc import Iterable

from slosched.transport.codec import Frame

#: The tags of ModelInferRequest.raw_input_contents, ModelInferResponse.raw_output_contents and
#: ModelStreamInferResponse.infer_response: field number and wire type.
RAW_INPUT = 7 << 3 | 2
_RAW_OUTPUT = 6 << 3 | 2
_INFER_RESPONSE = 2 << 3 | 2
#: A request has a field for each input, output, parameter and tensor.
MOST_FIELDS = 1024
_MOST_TAG = 2**32 - 1


def parted(data: bytes, tag: int = RAW_INPUT) -> tuple[bytes | memoryview, list[memoryview]]:
    """The bytes of all other fields, and the contents of each field of `tag`, which are views of `data`.

    Raises ValueError with a sentence if `data` is not a message, or has more than MOST_FIELDS fields.
    """
    view, end = memoryview(data), len(data)
    rest: list[memoryview] = []
    found: list[memoryview] = []
    at = rest_from = count = 0
    while at < end:
        begin = at
        count += 1
        if count > MOST_FIELDS:
            raise ValueError(f"it has more than {MOST_FIELDS} fields")
        key, at = _varint(data, at)
        kind = key & 7
        size = 0
        if kind == 2:
            size, at = _varint(data, at)
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:  # groups, which the protocol does not have
            raise ValueError(f"wire type {kind} at byte {begin}")
        at += size
        if at > end or key > _MOST_TAG:
            raise ValueError(f"the field at byte {begin} is cut off")
        if key == tag:
            found.append(view[at - size : at])
            if begin > rest_from:
                rest.append(view[rest_from:begin])
            rest_from = at
    if not found:
        return data, found
    if end > rest_from:
        rest.append(view[rest_from:end])
    return (rest[0] if len(rest) == 1 else b"".join(rest)), found


#: Bytes of a value by its wire type.
_FIXED = {1: 8, 5: 4}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = shift = 0
    while shift < 70 and at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"the number at byte {at} does not end")


def varint(value: int) -> bytes:
    """A number that is not negative, as protobuf has it."""
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def response(head: bytes, tensors: Iterable[Frame], *, in_stream: bool = False) -> bytes:
    """A ModelInferResponse, or a ModelStreamInferResponse with it, of its fields but one and of its tensors."""
    parts: list[Frame] = [head]
    for each in tensors:
        parts.append(_RAW_OUTPUT.to_bytes(1, "little") + varint(len(each)))
        parts.append(each)
    if in_stream:
        size = sum(map(len, parts))
        parts.insert(0, _INFER_RESPONSE.to_bytes(1, "little") + varint(size))
    return b"".join(parts)
