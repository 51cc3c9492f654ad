"""Signatures: tensors of one request in one frame, and what is wrong with a signature, in words."""

from __future__ import annotations

import pytest

from slosched.gpu_profile import ModelProfile
from slosched.signature import (
    BYTES,
    Tensor,
    described,
    digest,
    element_bytes,
    elements,
    joined,
    places,
    row_bytes,
    signature_error,
    single,
    split,
)

IDS = Tensor("ids", "int64", (-1,))
MASK = Tensor("mask", "uint8", (-1,))
PIXELS = Tensor("pixels", "float32", (3, 4))
TEXT = Tensor("text", BYTES, (2,), max_bytes=64)
HIDDEN = Tensor("hidden", "float32", (-1, 8))


def test_a_single_tensor_is_its_frame() -> None:
    data = bytes(range(48))
    assert joined([data]) is data
    (part,) = split((PIXELS,), 0, data)
    assert bytes(part) == data
    assert row_bytes((PIXELS,), 0) == 48
    assert single((PIXELS,)) is PIXELS


@pytest.mark.parametrize("tensors", [(IDS,), (TEXT,), (PIXELS, PIXELS), ()])
def test_what_is_no_single_tensor_of_numbers(tensors: tuple[Tensor, ...]) -> None:
    assert single(tensors) is None


@pytest.mark.parametrize("length", [1, 5, 16, 17])
def test_frames_and_rows_agree(length: int) -> None:
    tensors = (MASK, IDS, PIXELS)
    parts = [bytes([i]) * t.bytes_at(length) for i, t in enumerate(tensors, start=1)]
    frame = joined(parts)
    assert len(frame) == row_bytes(tensors, length)
    assert [bytes(part) for part in split(tensors, length, frame)] == parts
    for (at, size), part in zip(places(tensors, length), parts, strict=True):
        assert at % 16 == 0
        assert bytes(frame[at : at + size]) == part


def test_bytes_have_elements_of_any_size() -> None:
    values = [b"", "über".encode()]
    part = element_bytes(values)
    frame = joined([part, bytes(48)])
    text, pixels = split((TEXT, PIXELS), 0, frame)
    assert elements(text) == values
    assert len(pixels) == 48
    assert row_bytes((TEXT, PIXELS), 0) == 64 + 48


@pytest.mark.parametrize(
    ("tensors", "length", "frame", "words"),
    [
        ((IDS, MASK), 4, bytes(4), "at length 4 has 36"),
        ((PIXELS,), 0, bytes(49), "49 bytes came"),
        ((TEXT,), 0, b"\x04\0\0\0ab", "are cut off"),
        ((TEXT,), 0, b"\x04\0\0\0abcd\1\0", "are cut off"),
        ((TEXT,), 0, element_bytes([bytes(60), b""]), "at most 64 are allowed"),
        ((TEXT,), 0, b"\xff\xff\xff\xff" * 2, "are cut off"),
        ((TEXT,), 0, element_bytes([b"a", b"b"]) + b"!", "came"),
    ],
)
def test_a_frame_of_another_request_is_refused(
    tensors: tuple[Tensor, ...], length: int, frame: bytes, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        split(tensors, length, frame)


def test_a_digest_tells_signatures_apart() -> None:
    signatures = [(IDS,), (MASK,), (IDS, MASK), (MASK, IDS), (PIXELS,), (TEXT,)]
    assert len({digest(each) for each in signatures}) == len(signatures)
    assert all(digest(each) > 0 for each in signatures)
    assert described((IDS, MASK), (HIDDEN,)) == (
        "ids int64[-1], mask uint8[-1] -> hidden float32[-1, 8]"
    )


@pytest.mark.parametrize(
    ("inputs", "outputs", "lengths", "words"),
    [
        ((IDS, IDS), (HIDDEN,), (8,), "a name of its own"),
        ((IDS,), (HIDDEN,), (), "no lengths are given"),
        ((PIXELS,), (PIXELS,), (8,), "no input has a dimension of -1"),
        ((PIXELS,), (HIDDEN,), (), "no input has one"),
        ((IDS,), (HIDDEN,), (8, 8), "must rise"),
        ((IDS,), (HIDDEN,), (0, 8), "must rise"),
        ((Tensor("a", "complex3", (1,)),), (PIXELS,), (), "unknown dtype"),
        ((Tensor("a", BYTES, (1,)),), (PIXELS,), (), "max_bytes"),
        ((Tensor("a", BYTES, (-1,), 9),), (PIXELS,), (8,), "is fixed"),
        ((Tensor("a", "int8", (0,)),), (PIXELS,), (), "at least 1, or -1"),
    ],
)
def test_what_is_wrong_with_a_signature(
    inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], lengths: tuple[int, ...], words: str
) -> None:
    assert words in signature_error(inputs, outputs, lengths)


def test_right_signatures_have_nothing_wrong() -> None:
    assert signature_error((IDS, MASK), (HIDDEN,), (4, 8)) == ""
    assert signature_error((PIXELS, TEXT), (PIXELS,), ()) == ""


def test_a_profile_knows_its_signature() -> None:
    plain = ModelProfile("plain", {1: 10}, 1, 1, input_shape=(3,), output_dtype="int8")
    assert plain.takes == (Tensor("input", "float32", (3,)),)
    assert plain.gives == (Tensor("output", "int8", (1000,)),)
    assert plain.lengths == ()
    bert = ModelProfile(
        "bert",
        {1: 1},
        1,
        1,
        inputs=(IDS, MASK),
        outputs=(HIDDEN,),
        exec_ns_at={16: {1: 20, 2: 30}, 8: {1: 10}},
    )
    assert bert.lengths == (8, 16)
    assert bert.exec_ns == {1: 20, 2: 30}
    assert (bert.input_shape, bert.input_dtype, bert.output_shape) == ((16,), "int64", (16, 8))
    assert bert.times(8) == {1: 10}
    assert bert.interpolated().exec_ns_at == {8: {1: 10}, 16: {1: 20, 2: 30}}
