"""Synthetic examples in the shape of RCV1-v2, for machines without it. Losses are not those of Reuters.

The shape is that of the published set: 47,236 features, 75.6 non-zeros in a row on average, rows of length 1,
47.4 % positive. Numbers of non-zeros are log-normal; features are drawn without replacement by a
Zipf-Mandelbrot law, so that some collide in most rows, as words do: uniform ones would hide the conflicts that
HOGWILD! has. Values are logarithmic tf-idf. Labels are the side of a planted sparse plane, 3 % of them flipped,
so the loss has a floor.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from slosched.faasm.sgd.compiled import compiled
from slosched.faasm.sgd.examples import Examples, Rows, Size, examples_of
from slosched.faasm.sgd.randomness import shuffled, stream, uniform

MEAN_NONZEROS = 75.6
_SIGMA = 0.6  # of the logarithm of a row's length: 1 % have fewer than 16, 1 % more than 255
_SHORTEST, _LONGEST = 4, 1224
#: Popularity of rank r: (r + _FLATTENED) ** -_STEEPNESS.
_FLATTENED, _STEEPNESS = 30.0, 1.2
_AGAIN = 0.4  # that a word that stands in a text stands there once more
_POSITIVE, _FLIPPED = 0.474, 0.03
#: The plane has this part of the most popular features: words that tell a topic.
_COMMON, _PLANTED = 3_000, 0.1
#: Names of streams.
_LENGTHS, _RANKS, _DRAWS, _TIMES, _PLANE, _FLIPS = range(6)


def synthetic(size: Size, seed: int) -> Examples:
    """The examples of a size and seed: the same each time."""
    total = size.train + size.held_out
    lengths = _lengths(total, size.features, stream(seed, _LENGTHS))
    offsets = np.zeros(total + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    columns = np.empty(offsets[-1], np.int32)
    values = np.empty(offsets[-1], np.float64)
    # Popular features have any number, as the words of a dictionary do.
    names = shuffled(size.features, seed, _RANKS).astype(np.int32)
    popularity = np.cumsum((np.arange(size.features) + 1 + _FLATTENED) ** -_STEEPNESS)
    popularity /= popularity[-1]
    keys = stream(seed, _DRAWS), stream(seed, _TIMES)
    _draw(offsets, names, popularity, keys[0], keys[1], columns, values)
    trained = offsets[size.train]
    counts = np.bincount(columns[:trained], minlength=size.features).astype(np.int32)
    rarity = np.log((size.train + 1) / np.maximum(counts, 1))
    _weigh(offsets, columns, rarity, values)
    plane = np.zeros(size.features)
    plane[names] = _plane(size.features, stream(seed, _PLANE))
    labels = _labels(offsets, columns, values, plane, size.train, stream(seed, _FLIPS))
    return examples_of(
        Rows(offsets, columns, values, labels),
        held_out=size.held_out,
        features=size.features,
        origin=f"synthetic, in the shape of RCV1-v2, seed {seed}",
        counts=counts,
    )


@compiled
def _lengths(rows: int, features: int, key: np.uint64) -> npt.NDArray[np.int64]:
    """Log-normal numbers with the mean MEAN_NONZEROS (Box and Muller)."""
    found = np.empty(rows, np.int64)
    middle = math.log(MEAN_NONZEROS) - _SIGMA * _SIGMA / 2
    longest = min(_LONGEST, features)
    for row in range(rows):
        radius = math.sqrt(-2.0 * math.log(1.0 - uniform(key, 2 * row)))
        normal = radius * math.cos(2.0 * math.pi * uniform(key, 2 * row + 1))
        length = round(math.exp(middle + _SIGMA * normal))
        found[row] = min(max(length, min(_SHORTEST, longest)), longest)
    return found


@compiled
def _draw(
    offsets: npt.NDArray[np.int64],
    names: npt.NDArray[np.int32],
    popularity: npt.NDArray[np.float64],
    draws: np.uint64,
    times: np.uint64,
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[np.float64],
) -> None:
    """Draw each row's features without replacement, and 1 + the logarithm of how often each stands there."""
    taken = np.full(len(names), -1, np.int64)  # the last row that has the feature
    at = 0
    for row in range(len(offsets) - 1):
        start, stop = offsets[row], offsets[row + 1]
        k = start
        while k < stop:
            rank = int(np.searchsorted(popularity, uniform(draws, at), side="right"))
            at += 1
            feature = names[min(rank, len(names) - 1)]
            if taken[feature] != row:
                taken[feature] = row
                columns[k] = feature
                k += 1
        columns[start:stop].sort()
        for k in range(start, stop):
            often = math.floor(math.log(1.0 - uniform(times, k)) / math.log(_AGAIN))
            values[k] = 1.0 + math.log(1.0 + often)


@compiled
def _weigh(
    offsets: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int32],
    rarity: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
) -> None:
    """Multiply by the rarity of each feature, and give each row length 1."""
    for row in range(len(offsets) - 1):
        square = 0.0
        for k in range(offsets[row], offsets[row + 1]):
            values[k] *= rarity[columns[k]]
            square += values[k] * values[k]
        length = math.sqrt(square)
        for k in range(offsets[row], offsets[row + 1]):
            values[k] /= length


@compiled
def _plane(features: int, key: np.uint64) -> npt.NDArray[np.float64]:
    """By rank: normal numbers for a part of the common features, zeros elsewhere."""
    found = np.zeros(features)
    for j in range(min(features, _COMMON)):
        if uniform(key, 3 * j) < _PLANTED:
            radius = math.sqrt(-2.0 * math.log(1.0 - uniform(key, 3 * j + 1)))
            found[j] = radius * math.cos(2.0 * math.pi * uniform(key, 3 * j + 2))
    return found


def _labels(
    offsets: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int32],
    values: npt.NDArray[np.float64],
    plane: npt.NDArray[np.float64],
    train: int,
    key: np.uint64,
) -> npt.NDArray[np.float64]:
    """1 or -1 by the side of the plane, which is moved so that the part _POSITIVE of `train` is 1."""
    sides = np.add.reduceat(plane[columns] * values, offsets[:-1])
    border = float(np.quantile(sides[:train], 1 - _POSITIVE))
    labels = np.where(sides > border, 1.0, -1.0)
    flips = np.array([uniform(key, row) < _FLIPPED for row in range(len(labels))])
    labels[flips] *= -1
    return labels
