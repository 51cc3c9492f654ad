"""Parts of an array as ranges: an int64 array of shape (n, 2), each row [start, stop), ascending, disjoint.

The bytes of several ranges travel as one block, in order, without what lies between them.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

Ranges = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def whole(size: int) -> Ranges:
    """The range of everything; none if `size` is 0."""
    return np.array([[0, size]] if size else np.empty((0, 2)), np.int64).reshape(-1, 2)


def runs(mask: npt.NDArray[np.bool_]) -> Ranges:
    """The runs of true elements of a flat mask."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).astype(np.int64)


def total(ranges: Ranges) -> int:
    """The number of elements (or bytes) in the ranges."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def indices(ranges: Ranges) -> npt.NDArray[np.int64]:
    """Each index in the ranges, ascending."""
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    shift = np.repeat(ranges[:, 0] - (ends - lengths), lengths)
    return np.asarray(np.arange(int(lengths.sum()), dtype=np.int64) + shift)


def gathered(values: npt.NDArray[Any], ranges: Ranges) -> npt.NDArray[Any]:
    """A copy of the elements of flat `values` in the ranges."""
    if len(ranges) == 1:
        return values[ranges[0, 0] : ranges[0, 1]].copy()
    return values[indices(ranges)]


def scattered(values: npt.NDArray[Any], ranges: Ranges, data: npt.NDArray[Any]) -> None:
    """Write `data` to the ranges of flat `values`."""
    if len(ranges) == 1:
        values[ranges[0, 0] : ranges[0, 1]] = data
    else:
        values[indices(ranges)] = data


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
