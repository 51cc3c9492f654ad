"""Where the trace of an azure workload comes from: a file of AZURE_TRACE_DIR, or the generator."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from slosched.errors import InvalidConfig
from slosched.workloads.azure_synthetic import synthetic_trace
from slosched.workloads.azure_trace import (
    DAY_MINUTES,
    SYNTHETIC_ROWS,
    Trace,
    file_names,
    file_stamp,
    read_trace,
)

DIRECTORY_VARIABLE = "AZURE_TRACE_DIR"


@dataclass(frozen=True)
class TraceSource:
    """Where a trace comes from: the file at `path`, or, without one, the generator with seed `number`."""

    number: int
    path: Path | None = None

    def load(self) -> Trace:
        """The trace; the two used last are kept. Raises what read_trace raises."""
        return _load(self, file_stamp(self.path) if self.path else None)

    def describe(self) -> str:
        """Where it comes from, in words."""
        if self.path:
            return f"trace {self.path}"
        return (
            f"a synthetic trace (seed {self.number}, {SYNTHETIC_ROWS} functions; "
            f"{DIRECTORY_VARIABLE} names a directory of real ones)"
        )


@lru_cache(maxsize=2)
def _load(source: TraceSource, stamp: object) -> Trace:
    if source.path:
        return read_trace(source.path)
    return synthetic_trace(rows=SYNTHETIC_ROWS, minutes=DAY_MINUTES, seed=source.number)


def find_trace(number: int) -> TraceSource:
    """Trace `number` of AZURE_TRACE_DIR, or a synthetic one where that is not set.

    Raises InvalidConfig if the directory holds no such file.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE, "")
    if not directory:
        return TraceSource(number)
    names = file_names(number)
    for name in names:
        path = Path(directory) / name
        if path.is_file():
            return TraceSource(number, path)
    raise InvalidConfig(
        f"{DIRECTORY_VARIABLE} is {directory}, which holds neither {names[0]} nor {names[1]}; unset "
        "it to replay a synthetic trace, or make one there (slosched azure-trace)"
    )
