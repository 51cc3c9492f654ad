"""The energy of a window from NVML's samples: by the counter, by integration, and how far apart both are. Pure.

The counter is the primary figure: it counts since the driver was loaded and misses nothing between samples.
Integrated power is the check. Times are of CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from slosched.share_spec import PowerSample
from slosched.units import NS_PER_S

#: The source of energy in virtual time: nothing was measured.
COMPUTED = "computed"
#: Samples must cover this part of a window; the rest is taken to be like it.
_COVERED = 0.95

Series = NDArray[np.float64]


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Energy of one window. None: not known.

    `difference` is integrated / counter - 1. `active_j` is the energy above that of an idle GPU. `source` is
    "counter", "integrated", COMPUTED or "" (none; `problem` says why).
    """

    window_s: float
    joules: float | None = None
    source: str = ""
    counter_j: float | None = None
    integrated_j: float | None = None
    difference: float | None = None
    idle_watts: float | None = None
    active_j: float | None = None
    mean_watts: float | None = None
    max_watts: float | None = None
    mean_utilization: float | None = None
    max_temperature: int | None = None
    max_memory_used: int | None = None
    samples: int = 0
    samples_per_s: float = 0.0
    throttle: int = 0  # all reasons that were seen, or-ed
    problem: str = ""


def energy_of(
    power: Sequence[PowerSample],
    begin_ns: int,
    end_ns: int,
    *,
    idle_watts: float = -1.0,
    problem: str = "",
) -> Energy:
    """The energy between `begin_ns` and `end_ns`. `idle_watts` below 0 is unknown."""
    window_s = max(end_ns - begin_ns, 0) / NS_PER_S
    if window_s <= 0:
        return Energy(window_s=window_s, problem=problem or "the window is empty")
    if not power:
        return Energy(window_s=window_s, problem=problem or "no power was sampled")
    counter_j = counter_joules(power, begin_ns, end_ns)
    integrated_j = integrated_joules(power, begin_ns, end_ns)
    joules = integrated_j if counter_j is None else counter_j
    inside = [sample for sample in power if begin_ns <= sample.at_ns <= end_ns]
    idle = idle_watts if idle_watts >= 0 else None
    if joules is None and not problem:
        problem = f"the samples cover less than {100 * _COVERED:.0f} % of the window"
    used = [sample.utilization for sample in inside if sample.utilization >= 0]
    return Energy(
        window_s=window_s,
        joules=joules,
        source="" if joules is None else "integrated" if counter_j is None else "counter",
        counter_j=counter_j,
        integrated_j=integrated_j,
        difference=integrated_j / counter_j - 1 if counter_j and integrated_j is not None else None,
        idle_watts=idle,
        active_j=joules - idle * window_s if joules is not None and idle is not None else None,
        mean_watts=joules / window_s if joules is not None else None,
        max_watts=max((sample.watts for sample in inside if sample.watts >= 0), default=None),
        mean_utilization=float(np.mean(used)) if used else None,
        max_temperature=max((s.temperature for s in inside if s.temperature >= 0), default=None),
        max_memory_used=max((s.memory_used for s in inside if s.memory_used >= 0), default=None),
        samples=len(inside),
        samples_per_s=len(inside) / window_s,
        throttle=_reasons(inside),
        problem=problem,
    )


def counter_joules(power: Sequence[PowerSample], begin_ns: int, end_ns: int) -> float | None:
    """What the energy counter rose by. None if it does not cover the window, or fell (a reloaded driver)."""
    known = [(sample.at_ns, sample.energy_mj) for sample in power if sample.energy_mj >= 0]
    if len(known) < 2:
        return None
    origin_mj = known[0][1]
    at = np.array([at_ns - begin_ns for at_ns, _ in known], np.float64) / NS_PER_S
    counted = np.array([energy_mj - origin_mj for _, energy_mj in known], np.float64) / 1000
    if np.any(np.diff(counted) < 0):
        return None
    span = _span(at, (end_ns - begin_ns) / NS_PER_S)
    if span is None:
        return None
    low, high, scale = span
    return float(np.interp(high, at, counted) - np.interp(low, at, counted)) * scale


def integrated_joules(power: Sequence[PowerSample], begin_ns: int, end_ns: int) -> float | None:
    """The integral of sampled power by trapezoids. None if the samples do not cover the window."""
    known = [(sample.at_ns - begin_ns, sample.watts) for sample in power if sample.watts >= 0]
    if len(known) < 2:
        return None
    at = np.array([at_ns for at_ns, _ in known], np.float64) / NS_PER_S
    watts = np.array([each for _, each in known])
    span = _span(at, (end_ns - begin_ns) / NS_PER_S)
    if span is None:
        return None
    low, high, scale = span
    between = (at > low) & (at < high)
    times = np.concatenate(([low], at[between], [high]))
    drawn = np.interp(times, at, watts)
    return float(np.sum((drawn[1:] + drawn[:-1]) / 2 * np.diff(times))) * scale


def mean_watts(power: Sequence[PowerSample], begin_ns: int, end_ns: int) -> float:
    """Mean power of a phase, such as the idle time before a run, by energy; -1 if it is not known."""
    energy = energy_of(power, begin_ns, end_ns)
    return -1.0 if energy.mean_watts is None else energy.mean_watts


def _span(at: Series, window_s: float) -> tuple[float, float, float] | None:
    """The part of the window 0..window_s that samples cover, and its scale to the whole. None: too little."""
    low, high = max(0.0, float(at[0])), min(window_s, float(at[-1]))
    if high - low < _COVERED * window_s or high <= low:
        return None
    return low, high, window_s / (high - low)


def _reasons(samples: Sequence[PowerSample]) -> int:
    reasons = 0
    for sample in samples:
        reasons |= max(sample.throttle, 0)
    return reasons
