"""Rows of a batch: frames are spread and padded, answers are cut, whatever the tensors are."""

from __future__ import annotations

import numpy as np
import pytest

from slosched.daemon.backends import layout as layouts
from slosched.daemon.backends.layout import Layout, made_up
from slosched.signature import BYTES, Tensor, element_bytes, joined, row_bytes

IDS = Tensor("ids", "int64", (-1,))
MASK = Tensor("mask", "uint8", (-1,))
PAIRS = Tensor("pairs", "float32", (3, -1, -1))
TEXT = Tensor("text", BYTES, (2,), 64)
FIXED = Tensor("fixed", "float16", (5,))
MIXED = (IDS, MASK, TEXT, PAIRS, FIXED)


def frame_of(tensors: tuple[Tensor, ...], row: dict[str, np.ndarray]) -> bytes:
    """The frame of one request, made by hand."""
    parts: list[bytes | memoryview] = [
        element_bytes(list(row[t.name])) if t.dtype == BYTES else row[t.name].tobytes()
        for t in tensors
    ]
    return bytes(joined(parts))


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("piece_bytes", [8, 50, 2**18])
def test_a_frame_becomes_a_padded_row_and_a_row_its_frame_again(
    length: int, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "PIECE_BYTES", piece_bytes)
    layout = Layout(MIXED, 7, {"ids": 9})
    memory = np.full(3 * layout.row_bytes, 0xEE, np.uint8)
    rows = made_up(MIXED, 3, 1, length=length, high=100)
    for place in range(3):
        row = memory[place * layout.row_bytes : (place + 1) * layout.row_bytes]
        frame = frame_of(MIXED, {name: array[place] for name, array in rows.items()})
        layout.write(row, frame, length)
        assert bytes(layout.read(row, length)) == frame
    found, wanted = layout.unpack(memory, 3), layout.padded(rows, length)
    assert {name: array.shape for name, array in found.items()} == {
        "ids": (3, 7),
        "mask": (3, 7),
        "text": (3, 2),
        "pairs": (3, 3, 7, 7),
        "fixed": (3, 5),
    }
    for name, array in found.items():
        assert array.dtype == wanted[name].dtype and (array == wanted[name]).all(), name
    assert (found["ids"][:, length:] == 9).all() and (found["pairs"][:, :, length:] == 0).all()
    cut = layout.cut(found, length)
    assert all((cut[name] == rows[name]).all() for name in rows)
    assert (layout.pack(wanted)[0] == layout.pack(found)[0]).all()


def test_views_are_of_the_memory_itself_and_rows_are_aligned() -> None:
    layout = Layout((Tensor("a", "uint8", (5,)), Tensor("b", "int64", (2,))))
    assert layout.row_bytes % 16 == 0 and not layout.plain
    memory = np.zeros(4 * layout.row_bytes, np.uint8)
    views = layout.views(memory, 4)
    views["b"][2] = 7, 8
    assert bytes(layout.read(memory[2 * layout.row_bytes : 3 * layout.row_bytes], 0)) == (
        bytes(16) + np.array([7, 8]).tobytes()
    )


def test_the_row_of_an_only_fixed_tensor_is_its_frame() -> None:
    layout = Layout((FIXED,))
    assert layout.plain and layout.row_bytes == row_bytes((FIXED,), 0) == 10
    row = np.zeros(10, np.uint8)
    layout.write(row, bytes(range(10)), 0)
    assert bytes(row) == bytes(range(10)) == bytes(layout.read(row, 0))


@pytest.mark.parametrize(
    ("frame", "length", "words"),
    [
        (b"", 3, "0 bytes came"),
        (bytes(8 * 4), 3, "ids int64.-1., mask uint8.-1. at length 3 has 35"),
        (bytes(80), 8, "length 8 in a class of length 7"),
    ],
)
def test_a_frame_that_is_not_one_is_refused(frame: bytes, length: int, words: str) -> None:
    layout = Layout((IDS, MASK), 7)
    with pytest.raises(ValueError, match=words):
        layout.write(np.zeros(layout.row_bytes, np.uint8), frame, length)


def test_made_up_inputs_are_the_same_for_a_seed_and_masks_are_ones() -> None:
    first, again, other = (made_up(MIXED, 2, seed, length=4, high=9) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in first)
    assert (first["ids"] != other["ids"]).any() and (first["text"] != other["text"]).all()
    assert (first["mask"] == 1).all() and first["ids"].max() <= 8
