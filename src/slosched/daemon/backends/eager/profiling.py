"""The kernels of one request, as Deft's predictor counts them: their number and how long they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from slosched.daemon.backends.eager.device import Timeline

_NO_KERNELS = ("Memcpy", "Memset")


class Kernels(NamedTuple):
    """The kernels that a request launches, and their times on the device; 0 on the CPU, which launches none."""

    number: int
    mean_ns: int
    longest_ns: int


def kernels_of(run: Callable[[], None], timeline: Timeline) -> Kernels:
    """The kernels that `run` launches, after torch's profiler. The run itself takes longer than others."""
    if timeline.device.type != "cuda":
        return Kernels(0, 0, 0)
    profiler: Any = torch.profiler
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as found:
        run()
        timeline.synchronize()
    return summed(found.events())


def summed(events: Any) -> Kernels:
    """The kernels among the profiler's events."""
    cuda: Any = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]  # torch names it in C++
    times = [
        round(1000 * event.time_range.elapsed_us())
        for event in events
        if event.device_type == cuda and not event.name.startswith(_NO_KERNELS)
    ]
    if not times:
        return Kernels(0, 0, 0)
    return Kernels(len(times), sum(times) // len(times), max(times))
