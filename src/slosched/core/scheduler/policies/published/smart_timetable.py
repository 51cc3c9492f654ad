"""Where SMART puts batches on one GPU's time: as late as possible, then into holes, then to the left.

1. Every batch is put where it would end at its deadline. Those that overlap another one are taken out
   again, into the *stash*.
2. Each in the stash, the earliest deadline first, goes behind the last one if it ends in time there;
   else, at the latest possible time, into a hole between two others or before the first.
3. All are moved to the left as far as they can be. That makes room at the end, so 2 and 3 are repeated
   until nothing more leaves the stash.
"""

from __future__ import annotations

from dataclasses import dataclass

from slosched.core.scheduler.state import Instance, Request


@dataclass(slots=True, eq=False)
class Batch:
    """Requests of one model that run together. Times in ns on the controller's clock."""

    model: Instance
    requests: list[Request]
    duration_ns: int
    earliest_ns: int
    deadline_ns: int  # of the most urgent request; at least earliest + duration
    start_ns: int = 0

    @property
    def end_ns(self) -> int:
        return self.start_ns + self.duration_ns


def timetable(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return the batches that have a place, by start, and those that have none."""
    placed, stash = _without_conflicts(sorted(batches, key=lambda b: b.deadline_ns))
    while True:
        left = [batch for batch in stash if not _place(batch, placed)]
        _shift_left(placed)
        if len(left) in (0, len(stash)):
            return placed, left
        stash = left


def _without_conflicts(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Put each of `batches` (by deadline) as late as possible; part those that overlap from the rest."""
    for batch in batches:
        batch.start_ns = batch.deadline_ns - batch.duration_ns
    overlaps = [False] * len(batches)
    first_start_ns = None  # of all that end later
    for i in range(len(batches) - 1, -1, -1):
        batch = batches[i]
        overlaps[i] = (first_start_ns is not None and first_start_ns < batch.end_ns) or (
            i > 0 and batches[i - 1].end_ns > batch.start_ns
        )
        if first_start_ns is None or batch.start_ns < first_start_ns:
            first_start_ns = batch.start_ns
    placed = [b for b, o in zip(batches, overlaps, strict=True) if not o]
    return placed, [b for b, o in zip(batches, overlaps, strict=True) if o]


def _place(batch: Batch, placed: list[Batch]) -> bool:
    """Find room for `batch` among `placed` (by start). True if there was some."""
    if placed:
        start_ns = max(batch.earliest_ns, placed[-1].end_ns)
        if start_ns + batch.duration_ns <= batch.deadline_ns:
            batch.start_ns = start_ns
            placed.append(batch)
            return True
    for position in range(len(placed), -1, -1):
        end_ns = batch.deadline_ns
        if position < len(placed):
            end_ns = min(end_ns, placed[position].start_ns)
        free_from_ns = batch.earliest_ns
        if position > 0:
            free_from_ns = max(free_from_ns, placed[position - 1].end_ns)
        if end_ns - batch.duration_ns >= free_from_ns:
            batch.start_ns = end_ns - batch.duration_ns
            placed.insert(position, batch)
            return True
        if end_ns - batch.duration_ns < batch.earliest_ns:
            return False  # the holes before this one are earlier still
    return False


def _shift_left(placed: list[Batch]) -> None:
    free_from_ns = 0
    for batch in placed:
        batch.start_ns = max(batch.earliest_ns, free_from_ns)
        free_from_ns = batch.end_ns
