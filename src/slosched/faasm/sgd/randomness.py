"""Random numbers by their position: the same on every machine, whatever the order in which they are drawn.

SplitMix64 (Steele, Lea and Flood, OOPSLA'14): number n of a stream is a mix of the stream's key and n.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slosched.faasm.sgd.compiled import compiled

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


@compiled
def mixed(key: np.uint64) -> np.uint64:
    """A 64-bit number that looks unrelated to those of other keys."""
    key = (key ^ (key >> _30)) * _FIRST
    key = (key ^ (key >> _27)) * _SECOND
    return key ^ (key >> _31)


@compiled
def number(key: np.uint64, n: int) -> np.uint64:
    """Number n of the stream of that key."""
    return mixed(np.uint64(key) + (np.uint64(n) + np.uint64(1)) * _GAMMA)


@compiled
def uniform(key: np.uint64, n: int) -> float:
    """Number n of the stream as a float within [0, 1)."""
    return float(number(key, n) >> _11) / 9007199254740992.0


def stream(*names: int) -> np.uint64:
    """The key of the stream with these numbers for a name."""
    key = np.uint64(0)
    for each in names:
        key = np.uint64(
            number(key, each % 2**63)
        )  # numba returns an int, which it would take as a signed one
    return key


@compiled
def _shuffle(order: npt.NDArray[np.int64], key: np.uint64) -> None:
    for i in range(len(order) - 1, 0, -1):
        # The modulo favours small numbers by at most one part in 2 ** 32: lengths stay below 2 ** 31.
        j = np.int64((number(key, i) >> np.uint64(1)) % np.uint64(i + 1))
        order[i], order[j] = order[j], order[i]


def shuffled(length: int, *names: int) -> npt.NDArray[np.int64]:
    """The numbers 0 .. length - 1 in the random order of the stream `names` (Fisher and Yates)."""
    order = np.arange(length, dtype=np.int64)
    _shuffle(order, stream(*names))
    return order
