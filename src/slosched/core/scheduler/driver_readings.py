"""What the driver of one GPU says, as heartbeats bring it: utilisation, memory, temperature, power, energy."""

from __future__ import annotations

from slosched.messages import GpuStats


class DriverReadings:
    """The last reading and when it came. Only the worker's heartbeats change it (sessions.py)."""

    __slots__ = ("joined_energy_mj", "stats", "stats_ns")

    def __init__(self) -> None:
        self.stats: GpuStats | None = None
        self.stats_ns = 0
        #: The count of energy when the worker joined, mJ; -1: unknown.
        self.joined_energy_mj = -1

    def note(self, stats: GpuStats, *, now_ns: int) -> None:
        last_mj = self.stats.energy_mj if self.stats is not None else -1
        # A counter that went back was reset, with the driver: count from there.
        if self.joined_energy_mj < 0 or 0 <= stats.energy_mj < last_mj:
            self.joined_energy_mj = stats.energy_mj
        self.stats, self.stats_ns = stats, now_ns
