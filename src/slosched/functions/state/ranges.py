"""Parts of an array: its elements as ranges, or as what NumPy indexes them by.

Ranges are an int64 array of shape (n, 2), each row [start, stop), ascending, disjoint. The values of several
ranges travel as one block, in order, without what lies between them. Where elements are scattered, nothing here
takes a step of Python for each range: a push of 10,000 of them holds locks meanwhile.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ranges = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


_ONE_RANGE, _MASK, _PLACES = b"r", b"m", b"p"


class Part:
    """Elements of a flat array, ascending. It is not changed once it is made.

    `where` indexes a flat array by them: a slice if they are neighbours, otherwise their indices (int64).
    """

    def __init__(self, where: slice | npt.NDArray[np.int64]) -> None:
        self.where = where

    @property
    def count(self) -> int:
        where = self.where
        return int(where.stop - where.start) if isinstance(where, slice) else len(where)

    @cached_property
    def ranges(self) -> Ranges:
        """The same as ranges, none beside another."""
        where = self.where
        if isinstance(where, slice):
            return np.array([[where.start, where.stop]] if self.count else [], np.int64).reshape(
                -1, 2
            )
        gaps = np.flatnonzero(where[1:] - where[:-1] != 1)
        starts = where[np.concatenate([[0], gaps + 1])]
        stops = where[np.concatenate([gaps, [-1]])] + 1
        return np.stack([starts, stops], axis=1)

    def mask(self, size: int) -> npt.NDArray[np.bool_]:
        """The same as a mask of `size` elements."""
        found = np.zeros(size, np.bool_)
        found[self.where] = True
        return found

    def packed(self, size: int) -> bytes:
        """The same as bytes, for an array of `size` elements: a range, or the shorter of a mask and indices."""
        if isinstance(self.where, slice):
            return _ONE_RANGE + np.array([self.where.start, self.where.stop], np.int64).tobytes()
        if size // 8 < self.where.nbytes:
            return _MASK + np.packbits(self.mask(size)).tobytes()
        return _PLACES + self.where.tobytes()


def unpacked(data: bytes, size: int) -> Part:
    """The part whose `packed(size)` is `data`."""
    kind, rest = data[:1], memoryview(data)[1:]
    if kind == _MASK:
        bits = np.unpackbits(np.frombuffer(rest, np.uint8), count=size)
        return part_of(bits.view(np.bool_))
    numbers = np.frombuffer(rest, np.int64)
    return Part(slice(int(numbers[0]), int(numbers[1])) if kind == _ONE_RANGE else numbers)


def part_of(mask: npt.NDArray[np.bool_]) -> Part:
    """The true elements of a flat mask."""
    count = int(np.count_nonzero(mask))
    first = int(mask.argmax()) if count else 0
    if mask[first : first + count].all():
        return Part(slice(first, first + count))
    return Part(np.flatnonzero(mask))


def within(ranges: Ranges) -> Part:
    """The elements in the ranges."""
    if len(ranges) <= 1:
        start, stop = ranges[0] if len(ranges) else (0, 0)
        return Part(slice(int(start), int(stop)))
    return Part(indices(ranges))


def whole(size: int) -> Ranges:
    """The range of everything; none if `size` is 0."""
    return np.array([[0, size]] if size else np.empty((0, 2)), np.int64).reshape(-1, 2)


def runs(mask: npt.NDArray[np.bool_]) -> Ranges:
    """The runs of true elements of a flat mask."""
    padded = np.zeros(len(mask) + 2, np.bool_)
    padded[1:-1] = mask
    return np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)


def total(ranges: Ranges) -> int:
    """The number of elements (or bytes) in the ranges."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def indices(ranges: Ranges) -> npt.NDArray[np.int64]:
    """Each index in the ranges, ascending."""
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    shift = np.repeat(ranges[:, 0] - (ends - lengths), lengths)
    return np.asarray(np.arange(int(lengths.sum()), dtype=np.int64) + shift)


def gathered(values: npt.NDArray[Any], part: Part) -> npt.NDArray[Any]:
    """A copy of these elements of flat `values`."""
    found = values[part.where]
    return found.copy() if isinstance(part.where, slice) else found


def cut(ranges: Ranges, size: int) -> list[tuple[int, Ranges]]:
    """The ranges by blocks of `size`: each block's number with its part, relative to the block's start."""
    if not len(ranges):
        return []
    first, last = ranges[:, 0] // size, (ranges[:, 1] - 1) // size
    counts = last - first + 1
    block = indices(np.stack([first, last + 1], axis=1)) if (counts > 1).any() else first
    owner = np.repeat(np.arange(len(ranges)), counts)
    starts = np.maximum(ranges[owner, 0], block * size) - block * size
    stops = np.minimum(ranges[owner, 1], (block + 1) * size) - block * size
    pieces = np.stack([starts, stops], axis=1)
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1), len(block)]
    return [(int(block[a]), pieces[a:b]) for a, b in itertools.pairwise(edges)]
