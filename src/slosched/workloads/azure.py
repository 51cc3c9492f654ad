"""The azure workloads: function invocations replayed on thousands of models (OSDI'20 §6.5, §6.6).

Each function of a trace (azure_trace.py) is one stream, a Poisson process whose rate is its count in
the trace's current interval, times a scale. Counts are calls per minute; `interval` only says how fast
one goes through them. Functions are dealt to models in blocks, most invoked first: row i of n goes to
model (models * i) / n.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

from slosched.units import format_duration
from slosched.workloads.azure_source import TraceSource
from slosched.workloads.azure_trace import Counts
from slosched.workloads.base import ModelUse, Step, instance_seed
from slosched.workloads.processes import Piece, poisson_pieces
from slosched.workloads.streams import OpenLoop

SECONDS_PER_COUNT = 60
#: Added to a stream's seed for where it starts in the trace: beyond every stream's own.
_START_SEEDS = 1 << 97


@dataclass(frozen=True, slots=True)
class ScaleStep:
    """The scale from `start_ns` until `end_ns`; `label` is what it is called ("" for the only one)."""

    start_ns: int
    end_ns: int
    scale: float
    label: str = ""


def trace_pieces(
    counts: Sequence[int], *, interval_ns: int, scales: Iterable[ScaleStep], offset_ns: int = 0
) -> Iterator[Piece]:
    """The rate of one function over time: its counts, again and again, from `offset_ns` into them.

    Intervals without calls are left out. Ends with the last of `scales`, which ascend without gaps.
    """
    called = array("I", compress(range(len(counts)), counts))
    whole_ns = len(counts) * interval_ns
    for step in scales:
        per_count = step.scale / SECONDS_PER_COUNT
        into_ns = (offset_ns + step.start_ns) % whole_ns
        pass_ns = step.start_ns - into_ns  # when this pass through the trace began
        first = bisect_left(called, into_ns // interval_ns)
        while pass_ns < step.end_ns:
            for place in range(first, len(called)):
                index = called[place]
                start_ns = pass_ns + index * interval_ns
                if start_ns >= step.end_ns:
                    break
                end_ns = min(start_ns + interval_ns, step.end_ns)
                yield max(start_ns, step.start_ns), end_ns, counts[index] * per_count
            pass_ns += whole_ns
            first = 0


@dataclass(frozen=True)
class TraceReplay:
    """Every function of a trace (or the `functions` most invoked ones) as a Poisson stream.

    `striped` deals functions to models in turn and not in blocks; `random_start` begins each at a
    place of its own in the trace. `scales` say how long it lasts. The trace is read when streams are
    made; that raises InvalidConfig for a malformed file.
    """

    name: str
    args: tuple[str, ...]
    source: TraceSource
    uses: tuple[ModelUse, ...] = field(repr=False)
    interval_ns: int
    scales: tuple[ScaleStep, ...]
    random_start: bool = False
    striped: bool = False
    functions: int | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        return ("",)

    @property
    def duration_ns(self) -> int:
        """Until the last scale ends; a shorter trace begins anew."""
        return self.scales[-1].end_ns

    def models(self) -> tuple[ModelUse, ...]:
        return self.uses

    def steps(self) -> tuple[Step, ...]:
        """One for each scale, with the controller's default SLO."""
        return tuple(
            Step(index, step.start_ns, label=step.label) for index, step in enumerate(self.scales)
        )

    def streams(self, seed: int) -> tuple[OpenLoop, ...]:
        """One for each function that is called at all; user id and seed are its place by calls."""
        trace = self.source.load()
        rows = trace.rows[: self.functions]
        models = sum(use.copies for use in self.uses)
        return tuple(
            OpenLoop(
                self._arrivals(counts, instance_seed(seed, row)),
                (row % models if self.striped else models * row // len(rows),),
                user_id=row,
            )
            for row, counts in enumerate(rows)
            if any(counts)
        )

    def _arrivals(self, counts: Counts, seed: int) -> Iterator[int]:
        offset_ns = 0
        if self.random_start:
            whole_ns = len(counts) * self.interval_ns
            offset_ns = random.Random(seed + _START_SEEDS).randrange(whole_ns)
        pieces = trace_pieces(
            counts, interval_ns=self.interval_ns, scales=self.scales, offset_ns=offset_ns
        )
        return poisson_pieces(pieces, seed)

    def describe(self) -> str:
        """The workload in one line: what is sent, how fast and how long."""
        models = sum(use.copies for use in self.uses)
        first, last = self.scales[0].scale, self.scales[-1].scale
        scale = f"scale {first:.4g}" + (f" to {last:.4g}" if last != first else "")
        called = "every function"
        if self.functions is not None:
            called = f"the {self.functions} most invoked"
        return (
            f"{self.name}: {called} of {self.source.describe()} at {scale} on {models} models, "
            f"{format_duration(self.interval_ns)} for each minute of it, "
            f"{format_duration(self.duration_ns)} in all"
        )
