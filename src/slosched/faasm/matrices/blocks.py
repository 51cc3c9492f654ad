"""The blocks of the two matrices and of their product: where they lie, what is in them, how much they are.

Both matrices are square, float32, with values uniform within [0, 1). A product that is split s times is 8
products of blocks of half the size, s times over: 1, 9, 73 or 585 calls for s = 0..3. That is the plain scheme
with 8 multiplications, not Strassen's (pyfaasm's matrix code has the same).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
Name = Literal["a", "b"]
NAMES: tuple[Name, Name] = ("a", "b")

_ITEM_BYTES = 4
#: Rows that are made or compared at a time, so that what is needed beside a matrix stays small.
_SLAB = 256
#: Units in the last place of 1 (2 ** -24) by which a float32 product may differ, for each sqrt(size).
_TOLERANCE = 8.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What each call of one product is told.

    `prefix` begins the keys of its blocks. `kernel` computes the leaves. With `pushes` each block is sent to
    the global tier when it is written: hosts share nothing else. With `near` calls say which of them need the
    same blocks. With `alone` each call has its own copy of what it reads, as an instance without a shared local
    tier has.
    """

    size: int
    splits: int
    seed: int = 0
    prefix: str = "matrices"
    kernel: str = "numpy"
    pushes: bool = False
    near: bool = False
    alone: bool = False


def edge(size: int, level: int, place: int) -> int:
    """The first row of the block row `place` of 2 ** level; those of the next level nest in them exactly."""
    return place * size >> level


def shape(size: int, level: int, row: int, col: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    return (
        edge(size, level, row + 1) - edge(size, level, row),
        edge(size, level, col + 1) - edge(size, level, col),
    )


def input_key(plan: Plan, name: Name, row: int, col: int) -> str:
    """The key of a block of A or B, at the level of the leaves."""
    return f"{plan.prefix}/{name}/{row}-{col}"


def product_key(plan: Plan, level: int, row: int, inner: int, col: int) -> str:
    """The key of A[row, inner] @ B[inner, col] at a level; that of level 0 is the whole product."""
    return f"{plan.prefix}/{level}/{row}-{inner}-{col}"


def keys(plan: Plan) -> Iterator[str]:
    """All keys that a product has in the state."""
    width = range(2**plan.splits)
    yield from (input_key(plan, "a", row, col) for row in width for col in width)
    yield from (input_key(plan, "b", row, col) for row in width for col in width)
    for level in range(plan.splits + 1):
        places = range(2**level)
        for row in places:
            for inner in places:
                yield from (product_key(plan, level, row, inner, col) for col in places)


def calls(splits: int) -> int:
    """The number of calls of a product: the leaves, and what merges them."""
    return sum(8**level for level in range(splits + 1))


def travelling_bytes(size: int, splits: int) -> int:
    """What the calls of a product read and write, in bytes; all of it moves if they share nothing.

    A call reads two matrices and writes one, or reads eight halves and writes one: 12 n^2 (2^(s+1) - 1), which
    is 84 n^2 for 2 splits. Exact where 2^s divides n.
    """
    return 3 * _ITEM_BYTES * size * size * ((2 << splits) - 1)


def stored_bytes(size: int, splits: int) -> int:
    """What one copy of all blocks takes, in bytes: both matrices, and the products of every level."""
    return _ITEM_BYTES * size * size * ((2 << splits) + 1)


def operations(size: int) -> int:
    """Floating-point operations of the product: 2 n^3, whatever the splits."""
    return 2 * size**3


def block_values(seed: int, name: Name, size: int, level: int, row: int, col: int) -> Matrix:
    """A block of A or B. Any process makes any block: an element depends on seed, matrix and place alone.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) of the
    element's number, of which 24 bits are the value.
    """
    top, bottom = edge(size, level, row), edge(size, level, row + 1)
    left, right = edge(size, level, col), edge(size, level, col + 1)
    found = np.empty((bottom - top, right - left), np.float32)
    stream = np.uint64(_mixed(np.array([2 * seed + (name == "b")], np.uint64))[0])
    columns = np.arange(left, right, dtype=np.uint64)
    for begin in range(top, bottom, _SLAB):
        end = min(begin + _SLAB, bottom)
        rows = np.arange(begin, end, dtype=np.uint64)[:, None] * np.uint64(size)
        mixed = _mixed(rows + columns + stream)
        found[begin - top : end - top] = (mixed >> np.uint64(40)).astype(np.float32) * 2.0**-24
    return found


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def tolerance(size: int) -> float:
    """The largest error of a right product, relative to its largest element.

    8 sqrt(n) 2^-24: sums of n float32 products in any order stay far below it (rounding errors are as good as
    independent), and one wrong block is far above.
    """
    return _TOLERANCE * math.sqrt(size) * 2.0**-24


class Truth:
    """A @ B in float64, against which products are compared. It is computed once, when it is first needed."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self._product: npt.NDArray[np.float64] | None = None

    def error(self, product: Matrix) -> float:
        """The largest difference of any element, relative to the largest one; inf for NaN or another shape."""
        if self._product is None:
            a, b = (
                block_values(self.seed, name, self.size, 0, 0, 0).astype(np.float64)
                for name in NAMES
            )
            self._product = a @ b
        right = self._product
        if product.shape != right.shape:
            return math.inf
        largest = 0.0
        for begin in range(0, self.size, _SLAB):
            rows = slice(begin, begin + _SLAB)
            most = float(np.abs(product[rows] - right[rows]).max())
            if math.isnan(most):
                return math.inf
            largest = max(largest, most)
        return largest / float(right.max())
