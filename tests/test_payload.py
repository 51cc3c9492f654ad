"""Payloads of calls: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from slosched.functions.errors import MalformedPayload, PayloadTooLarge
from slosched.functions.function import MAX_PAYLOAD_BYTES
from slosched.functions.payload import (
    decode,
    decode_result,
    encode,
    encode_result,
    joined,
    size_of,
)

_DTYPES = hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes()
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_ARRAYS = hnp.arrays(_DTYPES, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
_SCALARS = (
    hnp.from_dtype(np.dtype("f4"))
    | hnp.from_dtype(np.dtype("M8[ms]"))
    | hnp.from_dtype(np.dtype("?"))
)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | _TEXTS
    | st.binary(max_size=8)
    | _ARRAYS
    | _SCALARS
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(_TEXTS | st.integers(0, 9) | st.binary(max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


def same(one: Any, two: Any) -> bool:
    """Equal in type, shape and every bit that counts."""
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray | np.generic):
        alike = one.dtype == two.dtype and one.shape == two.shape
        return alike and bool(one.tobytes() == two.tobytes())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return [*one] == [*two] and all(same(one[key], two[key]) for key in one)
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(two)
    return bool(one == two)


@settings(max_examples=150, deadline=None)
@given(st.lists(_VALUES, max_size=4), st.dictionaries(_TEXTS, _VALUES, max_size=3))
def test_what_goes_in_comes_out(args: list[Any], kwargs: dict[str, Any]) -> None:
    parts = encode(args, kwargs)
    frame = joined(parts)
    assert len(frame) == size_of(parts)
    assert same(decode(frame), (tuple(args), kwargs))
    assert same(decode_result(joined(encode_result([args, kwargs]))), [args, kwargs])


@settings(max_examples=60, deadline=None)
@given(_VALUES, st.binary(min_size=1, max_size=3), st.floats(0, 1))
def test_a_damaged_frame_is_read_or_refused(value: Any, noise: bytes, place: float) -> None:
    frame = bytearray(joined(encode_result(value)))
    at = int(place * (len(frame) - 1))
    frame[at : at + len(noise)] = noise
    for damaged in (bytes(frame), bytes(frame[:at])):
        try:
            decode_result(damaged)
        except MalformedPayload:
            continue


def test_arrays_are_read_only_views_that_begin_at_64_bytes() -> None:
    arrays = [np.arange(n, dtype=np.uint8) for n in (1, 60, 64, 1000)]
    frame = joined(encode(arrays))
    whole = np.frombuffer(frame, np.uint8)
    for array, given_array in zip(decode(frame)[0], arrays, strict=True):
        assert np.array_equal(array, given_array) and not array.flags.writeable
        begin = array.ctypes.data - whole.ctypes.data
        assert begin % 64 == 0 and 0 < begin < len(frame)
        with pytest.raises(ValueError):
            array.flags.writeable = True
    writable = bytearray(frame)
    [first, *_], _ = decode(memoryview(writable))
    assert not first.flags.writeable


def test_contiguous_arrays_are_not_copied_and_others_keep_their_values() -> None:
    array = np.arange(12.0).reshape(3, 4)
    parts = encode([array])
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in parts)
    for view in (array.T, array[:, ::2], array[::-1], np.asfortranarray(array), np.array(7)):
        [back], _ = decode(joined(encode([view])))
        assert back.shape == view.shape and np.array_equal(back, view)


def test_a_frame_is_messagepack_that_another_reader_understands() -> None:
    frame = joined(encode([(1, "a"), np.arange(3, dtype="<i4")], {"k": 2}))
    reader = msgpack.Unpacker()
    reader.feed(frame)
    size, head, *rest = reader
    assert size == len(msgpack.packb(head)) and head[1] == {"k": 2}
    assert msgpack.unpackb(head[0][0].data) == [1, "a"]
    assert msgpack.unpackb(head[0][1].data) == ["<i4", [3], 0]
    [data] = [each for each in rest if each is not None]
    assert np.frombuffer(data, "<i4").tolist() == [0, 1, 2]


def test_an_empty_frame_has_no_arguments_and_is_no_result() -> None:
    assert decode(b"") == ((), {}) and decode_result(b"") is None
    assert decode(joined(encode([]))) == ((), {})
    assert decode_result(joined(encode_result(None))) is None


class Point(NamedTuple):
    x: int


class Loud(int):
    pass


def _cycle() -> list[Any]:
    values: list[Any] = []
    values.append({"x": (values,)})
    return values


def _nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1}, r"args\[1\]: a set; sorted"),
        ([0, {"x": {1}}], r'args\[1\]\[1\]\["x"\]: a set'),
        ((1, (2, object())), r"args\[1\]\[1\]\[1\]: an object"),
        (Point(1), r"args\[1\]: a Point; tuple"),
        (Loud(1), r"args\[1\]: a Loud"),
        (bytearray(b"x"), r"args\[1\]: a bytearray; bytes"),
        (2**64, r"args\[1\]: an int of 65 bits; at most 64"),
        ([(1, -(2**63) - 1)], r"args\[1\]\[0\]\[1\]: an int of 64 bits"),
        ({"a": ("\ud800",)}, r"args\[1\]\[\"a\"\]\[0\]: a text that cannot be written as UTF-8"),
        ({"\ud800": 1}, r"\(key\): a text"),
        ({(1, 2): 3}, r"args\[1\]: a dict with the key \(1, 2\), a tuple"),
        (np.array([None]), r"args\[1\]: a numpy value of the dtype object"),
        (np.zeros(2, "i4,f8"), r"args\[1\]: a numpy value of the dtype \["),
        (np.ma.zeros(2), r"args\[1\]: a MaskedArray; numpy.asarray"),
        (_cycle(), "nested more than 64 levels deep, or contains itself"),
        (_nested(70, lambda x: (x,)), "nested more than 64 levels"),
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value)),
)
def test_what_cannot_travel_is_named_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encode([0, value])
    with pytest.raises(TypeError, match=message.replace(r"args\[1\]", r"kwargs\[\"k\"\]")):
        encode([], {"k": value})
    with pytest.raises(TypeError, match=message.replace(r"args\[1\]", "result")):
        encode_result(value)


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: [x], lambda x: {"x": x}], ids="tld")
def test_sixty_levels_travel(wrap: Callable[[Any], Any]) -> None:
    value = _nested(60, wrap)
    assert same(decode_result(joined(encode_result(value))), value)


def test_larger_payloads_than_travel_are_refused_before_they_are_copied() -> None:
    gigabyte = np.broadcast_to(np.zeros(1), (2**27,))  # 1 GB that takes 8 bytes
    for value in (gigabyte, [np.zeros(1), gigabyte[: 2**23]]):
        with pytest.raises(PayloadTooLarge, match="bytes; at most 67,043,328 travel"):
            encode([value])
    with pytest.raises(PayloadTooLarge, match="a bytes of"):
        encode([bytes(MAX_PAYLOAD_BYTES + 1)])
    with pytest.raises(PayloadTooLarge, match="at most 100 travel"):
        encode([b"x" * 100], most_bytes=100)
    with pytest.raises(PayloadTooLarge, match="a result of"):
        encode_result(np.zeros(100), most_bytes=800)
    assert size_of(encode([b"x" * 80], most_bytes=100)) <= 100


def _frame(head: Any, tail: bytes = b"") -> bytes:
    packed: bytes = msgpack.packb(head)
    return b"\xce" + len(packed).to_bytes(4, "big") + packed + tail


def _ext(code: int, value: Any) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(value))


def _nested_tuples(levels: int) -> msgpack.ExtType:
    value = _ext(3, [])
    for _ in range(levels):
        value = _ext(3, [value])
    return value


@pytest.mark.parametrize(
    "frame",
    [
        b"x",
        b"\xce\xff\xff\xff\xff",
        b"\xce\x00\x00\x00\x05\x91",
        _frame({"a": 1}),
        _frame([1, 2, 3]),
        _frame([_ext(9, [1])]),
        _frame([_ext(1, ["<f8", [4], 0])]),  # without its bytes
        _frame([_ext(1, ["<f8", [-1], 0])]),
        _frame([_ext(1, ["<f8", [2**61, 2**61], 0])]),
        _frame([_ext(1, ["<f8", [0, 2**61, 2**61], 0])], bytes(64)),
        _frame([_ext(1, ["<U0", [2**40], 0])]),
        _frame([_ext(1, ["<f8", [1], -64])], bytes(200)),
        _frame([_ext(1, ["|O8", [1], 0])], bytes(200)),
        _frame([_ext(1, ["i4,f8", [1], 0])], bytes(200)),
        _frame([_ext(1, ["<f3", [1], 0])], bytes(200)),
        _frame([_ext(1, ["<f8", [1]])]),
        _frame([_ext(1, 5)]),
        _frame([_ext(2, ["<f8", b"123"])]),
        _frame([_ext(2, ["<M8[xy]", b"12345678"])]),
        _frame([_ext(3, {"a": 1})]),
        _frame([_nested_tuples(300)]),
        _frame([msgpack.ExtType(3, b"\x91")]),
    ],
)
def test_frames_of_a_peer_are_read_or_refused_whatever_they_hold(frame: bytes) -> None:
    with pytest.raises(MalformedPayload):
        decode_result(frame)


def test_arguments_are_not_a_result_and_names_are_texts() -> None:
    with pytest.raises(MalformedPayload, match="without a result"):
        decode_result(joined(encode([1])))
    with pytest.raises(MalformedPayload, match="without arguments"):
        decode(joined(encode_result(1)))
    with pytest.raises(MalformedPayload, match="named by texts"):
        decode(_frame([[], {1: 2}]))
