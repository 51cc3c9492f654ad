"""What a lane of graphs needs of the GPU: models that are prepared as a worker prepares them, one class each.

Nothing is served while models are prepared here, so there is no background thread. The weights' cache has
exactly the pages that the models need, since other processes share the GPU, and host copies of weights are
given back once they are loaded. Every object here is one of this stage alone (streams, graph pools,
workspaces), so several stages may run in one process beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from slosched.clock import Clock
from slosched.core.share.tuner import boundary_cost_ns, tunable, tuning_of
from slosched.daemon.backends.cuda.choice import Wish
from slosched.daemon.backends.cuda.device import CudaDevice
from slosched.daemon.backends.cuda.program import Class, Cut
from slosched.daemon.backends.cuda.recorded import RecordedProgram
from slosched.share_spec import BoundaryKind, Job, Pieces, Tuning, Urgent
from slosched.units import NS_PER_MS

#: Weights lie in pages of this size.
PAGE_BYTES = 16 * 2**20
#: Parts of a model in steps that take longer are cut. A boundary costs the GPU some 9 us (H200, one in flight),
#: so one every millisecond costs less than one per cent.
PART_NS = NS_PER_MS


@dataclass
class Made:
    """A job's model, prepared: what runs, and what is to be said of it."""

    name: str  # what the device knows it by
    program: RecordedProgram
    of: Class
    notes: list[str] = field(default_factory=list)
    held_bytes: int = 0  # on the device, beside what torch counts

    @property
    def cut(self) -> Cut | None:
        return self.program.cut_of(self.of)


class Stage(Protocol):
    """A GPU for one lane. `build` each job, then `allocate`, then `prepare` each that was built."""

    @property
    def device(self) -> CudaDevice:
        """There from `allocate` on."""

    @property
    def clock(self) -> Clock: ...

    def build(self, number: int, job: Job) -> None:
        """Make the model on the host. Raises what is wrong with it."""

    def allocate(self) -> None:
        """Take the memory for the weights of all models. Raises OutOfDeviceMemory."""

    def prepare(self, number: int) -> Made:
        """Capture, check, measure and cut. Raises what is wrong, InvalidConfig if it cannot be captured."""

    def enter(self) -> None:
        """Another thread uses the stage from now on; it calls this."""

    def loaded(self, number: int) -> None:
        """The weights are on the device: what the host has of them can go."""

    def memory(self, number: int) -> tuple[int, int]:
        """Bytes on the device, allocated and reserved at most."""

    def close(self) -> None:
        """Give everything back; idempotent."""


#: Opens the stage of these jobs; True: they interrupt each other (levels.py).
OpenStage = Callable[[Mapping[int, Job], bool], Stage]


def program_name(number: int, job: Job) -> str:
    """What the device knows the model of a job by: two jobs may have the same one."""
    return f"{job.model}#{number}"


def is_cut(job: Job, level: int, highest: int, *, by_deadline: bool = False) -> bool:
    """True if the job may be interrupted: another one is above it, or all have one priority or go by deadlines,
    which leaves it to the policy; and it does not refuse.
    """
    return (
        level < highest or not highest or by_deadline
    ) and job.boundary.kind is not BoundaryKind.NONE


def wish_of(job: Job) -> Wish:
    """What is wished for a job's cut: boundaries within steps too, since no policy here counts steps."""
    return Wish(in_flight=1 if job.boundary.depth == 1 else 0, part_ns=PART_NS)


def cut_notes(made: Made, job: Job, *, wanted: bool, lines: list[str]) -> None:
    """Join segments as the job says, and put into words how it is interrupted."""
    if not wanted:
        return
    every = job.boundary.every
    if made.cut is not None and every > 1 and not tunable(job.boundary):
        made.program.join_segments(made.of, every)
    cut = made.cut
    if cut is not None and len(cut.segment_ns) > 1:
        made.notes.append(
            f"{len(cut.segment_ns)} segments, {cut.in_flight} in flight, "
            f"at most {cut.boundary_ns / 1e6:.3f} ms to a boundary"
            + (f" ({cut.note})" if cut.note else "")
        )
        return
    why = [line for line in lines if "is not interrupted" in line]
    made.notes.append(why[-1] if why else "not interrupted: it is short")


def tune_cut(made: Made, job: Job, urgent: Urgent | None) -> Tuning | None:
    """Join the segments of a job that asks for the tuner; None if it does not, or is not interrupted.

    A piece is a segment as preparation cut it, so the tuner can take fewer boundaries, and never more. How many
    segments are in flight was chosen with the cut, by measurement, and stays.
    """
    cut = made.cut
    if urgent is None or cut is None or len(cut.segment_ns) < 2 or not tunable(job.boundary):
        return None
    # 0: the next segment is launched already, which still costs its launch.
    cost_ns = cut.bubble_ns or boundary_cost_ns(BoundaryKind.SEGMENT, cut.in_flight)
    pieces = Pieces(
        pieces=len(cut.segment_ns),
        exec_ns=sum(cut.segment_ns),
        longest_ns=max(cut.segment_ns),
        costs_ns={cut.in_flight: cost_ns},
    )
    kind = msgspec.structs.replace(job.boundary, kind=BoundaryKind.SEGMENT)
    segments = msgspec.structs.replace(job, boundary=kind)
    boundary, tuning = tuning_of(segments, pieces, urgent, depths=(cut.in_flight,), unit="segments")
    if tuning is not None and boundary.every > 1:
        made.program.join_segments(made.of, boundary.every)
        joined = made.cut
        if joined is not None:
            made.notes.append(
                f"tuned: {boundary.every} segments joined, so that {len(joined.segment_ns)} are left, at most "
                f"{joined.boundary_ns / 1e6:.3f} ms to a boundary"
            )
    return tuning
