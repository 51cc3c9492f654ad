"""Cells of digits to columns of numbers, and of names to columns of texts, a whole block of text at once.

Ten million rows are read in seconds only if no cell becomes a Python object. Eight digits are one
64-bit word here, and are turned into a number by three multiplications (Lemire's and Muła's way
to parse eight digits), for every row of a column in one numpy operation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Places = NDArray[np.int64]

#: A cell is at most this long: a sign and the 19 digits of an int64. `Block` pads its text with it.
_LONGEST = 20
_MINUS, _ZERO, _TAB = 0x2D, 0x30, 0x09
_WORD = 8

_EIGHT_ZEROS = np.uint64(0x3030303030303030)
_HIGH_BITS = np.uint64(0x8080808080808080)
_ABOVE_NINE = np.uint64(0x7676767676767676)  # added to a byte above 9, it sets the high bit
_LARGEST = np.uint64(2**63 - 1)


class NotNumbers(ValueError):
    """The block holds something else than rows of such cells."""


class Block:
    """Whole lines of text, cut into cells. Raises NotNumbers unless each line has `columns` cells."""

    def __init__(self, text: bytes, columns: int) -> None:
        # Words are read backwards from a cell's end, so that the first cell needs something before it.
        self._bytes = np.frombuffer(bytes(3 * _WORD) + text, np.uint8)
        # Tab and newline are 9 and 10; whatever is below wraps round to far above.
        ends = np.flatnonzero((self._bytes - np.uint8(_TAB)) <= 1)
        if len(ends) % columns:
            raise NotNumbers
        # One row for each column, so that what follows reads memory in order.
        self._ends: Places = np.ascontiguousarray(ends.reshape(-1, columns).T, dtype=np.int64)
        last = self._bytes[self._ends[-1]] == 10
        if not last.all() or np.count_nonzero(self._bytes == 10) != len(last):
            raise NotNumbers
        self.rows = len(last)
        # A word at every byte. Void words may lie at any address, which integers may not.
        self._words = np.ndarray((len(self._bytes) - 7,), "V8", self._bytes.data, 0, (1,))

    def integers(self, column: int) -> NDArray[np.int64]:
        """Return an int64 for each row. Raises NotNumbers if a cell is not an integer of 64 bits."""
        starts, ends = self._starts(column), self._ends[column]
        negative = self._bytes[starts] == _MINUS
        signed = bool(negative.any())
        lengths = ends - starts - negative if signed else ends - starts
        longest = int(lengths.max())
        if int(lengths.min()) < 1 or longest >= _LONGEST:
            raise NotNumbers
        if longest == 1:
            digits = self._bytes[ends - 1] - np.uint8(_ZERO)
            if (digits > 9).any():
                raise NotNumbers
            values = digits.astype(np.uint64)
        else:
            values = self._eight(ends, lengths)
            scale = 10**_WORD
            for before in range(_WORD, longest, _WORD):
                # A cell that is shorter has no digits there and adds 0.
                rest = np.maximum(lengths - before, 0)
                values += self._eight(ends - before, rest) * np.uint64(scale)
                scale *= 10**_WORD
            if longest == _LONGEST - 1 and (values > _LARGEST).any():
                raise NotNumbers
        result: NDArray[np.int64] = values.view(np.int64)
        return np.where(negative, -result, result) if signed else result

    def _eight(self, ends: Places, lengths: Places) -> Words:
        """The last eight digits, or the `lengths` there are, of the cells that end before `ends`."""
        words: Words = self._words[ends - _WORD].view("<u8")
        # The first character is the lowest byte: what stands before the cell is shifted out, and
        # zeros come in. A shift by 64 bits would be none, hence the two halves.
        half = (np.maximum(_WORD - lengths, 0) * 4).astype(np.uint64)
        words = (words ^ _EIGHT_ZEROS) >> half >> half << half << half
        if (((words + _ABOVE_NINE) | words) & _HIGH_BITS).any():
            raise NotNumbers
        words = (words * np.uint64(10 * 2**8 + 1)) >> np.uint64(8)
        words &= np.uint64(0x00FF00FF00FF00FF)
        words = (words * np.uint64(100 * 2**16 + 1)) >> np.uint64(16)
        words &= np.uint64(0x0000FFFF0000FFFF)
        return (words * np.uint64(10_000 * 2**32 + 1)) >> np.uint64(32)

    def floats(self, column: int) -> NDArray[np.float64]:
        """Return a float64 for each row. Raises NotNumbers if a cell is not a number.

        Made for columns of few distinct values: each distinct text is parsed once.
        """
        cells, which = self._distinct(column)
        return np.array([_float(cell) for cell in cells])[which]

    def texts(self, column: int) -> NDArray[np.object_]:
        """Return a str for each row, one object per distinct text. Raises NotNumbers if one is not UTF-8."""
        cells, which = self._distinct(column)
        try:
            return np.array([cell.decode() for cell in cells], dtype=np.object_)[which]
        except UnicodeDecodeError:
            raise NotNumbers from None

    def _distinct(self, column: int) -> tuple[list[bytes], NDArray[np.intp]]:
        """The distinct cells of a column, and for each row the place of its own among them."""
        starts, ends = self._starts(column), self._ends[column]
        width = int((ends - starts).max())
        # The texts, left-aligned and filled up with tabs, as rows of bytes.
        places = starts[:, None] + np.arange(width)
        inside = places < ends[:, None]
        texts = np.where(inside, self._bytes[np.minimum(places, ends[:, None])], _TAB)
        if not texts.all():  # numpy's texts end at a NUL
            raise NotNumbers
        if width <= _WORD:
            keys = np.full((self.rows, _WORD), _TAB, np.uint8)
            keys[:, :width] = texts
            distinct, which = np.unique(keys.view("<u8").ravel(), return_inverse=True)
            cells = [int(key).to_bytes(_WORD, "little") for key in distinct]
        else:
            rows = np.ascontiguousarray(texts, dtype=np.uint8).view(f"S{width}").ravel()
            distinct_rows, which = np.unique(rows, return_inverse=True)
            cells = [bytes(row) for row in distinct_rows]
        return [cell.rstrip(b"\t") for cell in cells], which

    def _starts(self, column: int) -> Places:
        if column:
            starts: Places = self._ends[column - 1] + 1
            return starts
        return np.concatenate((np.array([3 * _WORD]), self._ends[-1][:-1] + 1))


def _float(cell: bytes) -> float:
    """The number that `cell` is. Stricter than float(): no spaces, no underscores."""
    if cell.split() != [cell] or b"_" in cell:
        raise NotNumbers
    try:
        return float(cell)
    except ValueError:
        raise NotNumbers from None
