"""The lanes of a worker by role, and how many slots each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from slosched.messages import HOST_PARTS


class Role(IntEnum):
    """What a lane is for."""

    LOAD = 0  # weights onto the GPU
    INPUT = 1
    EXEC = 2
    OUTPUT = 3
    HOST = 4  # preparing models in host memory; it belongs to the worker and to no GPU
    PREPARE = 5  # host parts of calls, beside what has the exec lane


@dataclass(frozen=True, slots=True)
class LaneSpec:
    """`width`: how many ops run at a time. `preemptive`: an op may be interrupted between two segments."""

    role: Role
    width: int = 1
    preemptive: bool = False

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"a lane needs at least one slot, not {self.width}")


#: A GPU runs one op of each role at a time (Clockwork §4.2), so each of its lanes keeps one timeline; but for
#: host parts, which do not run on it.
EXEC_LANE = LaneSpec(Role.EXEC)
GPU_LANES: Sequence[LaneSpec] = (
    LaneSpec(Role.LOAD),
    LaneSpec(Role.INPUT),
    EXEC_LANE,
    LaneSpec(Role.OUTPUT),
    LaneSpec(Role.PREPARE, HOST_PARTS),
)
HOST_LANE = LaneSpec(Role.HOST)
#: The exec lane of a GPU whose execs are interrupted for urgent ones.
PREEMPTIVE_EXEC_LANE = LaneSpec(Role.EXEC, preemptive=True)
PREEMPTIVE_LANES: Sequence[LaneSpec] = tuple(
    PREEMPTIVE_EXEC_LANE if lane is EXEC_LANE else lane for lane in GPU_LANES
)


def host_lanes(slots: int) -> Sequence[LaneSpec]:
    """The lanes of a host's slots: functions are made ready one at a time, and `slots` calls run."""
    return LaneSpec(Role.LOAD), LaneSpec(Role.EXEC, slots)


def gpu_lanes(*, preemptive: bool) -> Sequence[LaneSpec]:
    """The lanes of a GPU, the exec lane `preemptive` or not."""
    return PREEMPTIVE_LANES if preemptive else GPU_LANES
