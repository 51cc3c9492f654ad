"""What calls pay for state: a pull with and without the copy of their host, and what a partial push sends.

Another host's writes are those of this program, under a folder of shared memory of its own. Store, calls and
writer are on one machine, so no network is in these times.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bench_functions as called
import numpy as np
from bench_systems import OnEngine

from slosched.functions.state.state import State

Record = dict[str, Any]

#: Elements of 8 bytes: the weights of RCV1 (378 kB), and 100 MB.
SIZES = {"378 kB": 47_236, "100 MB": 12_500_000}
QUICK_SIZES = {"378 kB": 47_236}
_FOLDER = "SLOSCHED_STATE_FOLDER"
PARTS = (0.01, 1.0)


@contextmanager
def another_host() -> Iterator[None]:
    """What opens a State inside shares no copy with other processes of this machine."""
    before = os.environ.get(_FOLDER)
    os.environ[_FOLDER] = f"slosched-bench-{os.getpid()}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FOLDER]
        else:
            os.environ[_FOLDER] = before


def state(
    system: OnEngine, namespace: str, store: str, sizes: dict[str, int], repeats: int
) -> Record:
    """The times of calls on `system`, whose state is that namespace."""
    found: Record = {}
    with another_host():
        theirs = State(namespace, store)
    with theirs:
        for title, size in sizes.items():
            found[title] = _of_size(system, theirs, namespace, store, f"a{size}", size, repeats)
    return found


def _of_size(
    system: OnEngine, theirs: State, namespace: str, store: str, key: str, size: int, repeats: int
) -> Record:
    array = theirs.array(key, size)
    pulls, gets, alone = [], [], []
    for n in range(repeats):
        array.set(np.full(size, float(n + 1)))
        array.push()
        pulls.append(_right(system.one(called.state_pull, key, size), n + 1))
        gets.append(_right(system.one(called.state_get, key, size), n + 1))
        alone.append(_right(system.one(called.state_alone, namespace, store, key, size), n + 1))
    pushes = {
        f"{part:.0%}": [system.one(called.state_push, key, size, part) for _ in range(repeats)]
        for part in PARTS
    }
    return {
        "bytes": size * 8,
        "new_version": _median(pulls),
        "local_tier": _median(gets),
        "without": _median(alone),
        "push": {part: _median(each) for part, each in pushes.items()},
        "repeats": repeats,
    }


def _right(answer: Record, last: float) -> Record:
    if answer["last"] != last:
        raise AssertionError(f"a call saw {answer['last']} and not {last}")
    return answer


def _median(answers: list[Record]) -> Record:
    """Medians of what several calls told."""
    keys = [key for key in answers[0] if key not in ("last", "process")]
    return {key: statistics.median(each[key] for each in answers) for key in keys}
