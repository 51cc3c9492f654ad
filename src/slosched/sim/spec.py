"""What a simulation is: a workload, a scheduler, GPUs, a network, their disturbances, and a seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from slosched.config import EmulationNoise, GpuProfile, SchedulerConfig
from slosched.errors import InvalidConfig
from slosched.field_types import check_types
from slosched.sim.faults import FaultPlan
from slosched.sim.network import Network
from slosched.workloads.base import Workload


@dataclass(frozen=True)
class WorkerClocks:
    """How far the workers' clocks are from the controller's.

    Each worker's offset is drawn evenly from -`offset_ns`..`offset_ns`, its drift from
    -`drift_ppm`..`drift_ppm` (parts per million; quartz has some tens).
    """

    offset_ns: int = 0
    drift_ppm: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.offset_ns < 0 or not 0 <= self.drift_ppm <= 10_000:
            raise InvalidConfig("clocks: offset_ns must be >= 0, drift_ppm within 0..10000")


@dataclass(frozen=True)
class SimSpec:
    """Everything that a simulated run depends on.

    `profiles` holds one profile for all GPUs, or one for each; the GPUs of one worker are equal.
    `duration_ns` ends the workload sooner, and is needed for one that never ends. With `inputs`
    each request brings an input of its model's size, which takes time on the network's cards. Each
    `without_input`-th request then brings none all the same (0: all bring one). `check` holds the
    invariants at every step. `faults` break things; the client then continues whatever fails.
    Controllers of one `cluster_id` take over from each other; without one, each finds the workers empty.
    Raises InvalidConfig for what cannot be.
    """

    workload: Workload
    scheduler: SchedulerConfig
    profiles: tuple[GpuProfile, ...]
    gpus: int = 6
    gpus_per_worker: int = 1
    network: Network = field(default_factory=Network)
    noise: EmulationNoise = field(default_factory=EmulationNoise)
    clocks: WorkerClocks = field(default_factory=WorkerClocks)
    seed: int = 0
    duration_ns: int | None = None
    inputs: bool = False
    without_input: int = 0
    check: bool = False
    faults: FaultPlan | None = None
    cluster_id: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        if self.gpus < 1 or self.gpus_per_worker < 1:
            raise InvalidConfig(
                f"gpus and gpus_per_worker must be at least 1, not {self.gpus} and "
                f"{self.gpus_per_worker}"
            )
        if len(self.profiles) not in (1, self.gpus):
            raise InvalidConfig(
                f"give one profile for all GPUs or one for each of the {self.gpus}, not "
                f"{len(self.profiles)}"
            )
        if self.without_input < 0:
            raise InvalidConfig(f"without_input must be at least 0, not {self.without_input}")
        if self.seed < 0:
            raise InvalidConfig(f"a seed must be at least 0, not {self.seed}")
        if self.duration_ns is not None and self.duration_ns <= 0:
            raise InvalidConfig("the duration must be above 0")
        if self.faults is not None:
            self.faults.check([len(profiles) for profiles in self.worker_profiles()])
        for worker_id, profiles in enumerate(self.worker_profiles()):
            if any(profile != profiles[0] for profile in profiles):
                raise InvalidConfig(
                    f"worker {worker_id} would have GPUs of different profiles; unequal GPUs need "
                    "workers of their own (gpus_per_worker 1)"
                )

    def worker_profiles(self) -> list[tuple[GpuProfile, ...]]:
        """For each worker the profiles of its GPUs. The last worker may have fewer than the others."""
        each = self.profiles * self.gpus if len(self.profiles) == 1 else self.profiles
        step = self.gpus_per_worker
        return [each[first : first + step] for first in range(0, self.gpus, step)]

    def seeds(self) -> dict[str, int]:
        """The seed of each source of chance. Arrivals have the spec's own, as in a live run."""
        derived = {name: sub_seed(self.seed, name) for name in ("durations", "network", "clocks")}
        return {"arrivals": self.seed, **derived}


def sub_seed(seed: int, purpose: str) -> int:
    """A seed for `purpose`, far from those of other purposes and of other seeds (SHA-256, 56 bits)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")
