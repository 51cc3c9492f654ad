"""A device as the eager lane uses it: a stream of its own on a CUDA device, or the CPU with the same calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from slosched.clock import now_ns
from slosched.errors import InvalidConfig, OutOfResources

_cuda: Any = torch.cuda  # torch gives its streams and events no types


class OutOfDeviceMemory(OutOfResources):
    """A model does not fit into the device's memory, beside what is there."""


class Timeline(Protocol):
    """Work in order on one device. A mark is a point in that order."""

    device: torch.device

    def entered(self) -> Any:
        """A context in which torch's work goes to this timeline."""

    def synchronize(self) -> None:
        """Wait until all work of this timeline is done."""

    def mark(self, passed: Any = None) -> Any:
        """A mark behind all work up to now, with the device's time: a new one, or one that is `passed`."""

    def fence(self, passed: Any = None) -> Any:
        """A mark without a time, which costs less: a new one, or one that is `passed` and used again."""

    def wait(self, mark: Any) -> None:
        """Wait on the host until the device has passed `mark`."""

    def between_ns(self, first: Any, last: Any) -> int:
        """The device's time from mark to mark; both are passed."""

    def memory(self) -> tuple[int, int]:
        """Bytes that this process had allocated and reserved on the device at most, since `forget_peak`."""

    def forget_peak(self) -> None:
        """Give back what is not used, and count the most memory from now on."""


class HostTimeline:
    """The CPU: work is done when torch's call returns."""

    device = torch.device("cpu")

    @contextmanager
    def entered(self) -> Iterator[None]:
        yield

    def synchronize(self) -> None:
        pass

    def mark(self, passed: int | None = None) -> int:
        return now_ns()

    def fence(self, passed: int | None = None) -> int:
        return 0

    def wait(self, mark: int) -> None:
        pass

    def between_ns(self, first: int, last: int) -> int:
        return last - first

    def memory(self) -> tuple[int, int]:
        return (0, 0)

    def forget_peak(self) -> None:
        pass


class CudaTimeline:
    """A stream of its own, which neither waits for the default stream nor is waited for by it."""

    def __init__(self, device: torch.device, priority: int | None) -> None:
        self.device = device
        self.stream = _cuda.Stream(device=device, priority=priority or 0)

    @contextmanager
    def entered(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def synchronize(self) -> None:
        self.stream.synchronize()

    def mark(self, passed: Any = None) -> Any:
        event = _cuda.Event(enable_timing=True) if passed is None else passed
        event.record(self.stream)
        return event

    def fence(self, passed: Any = None) -> Any:
        event = _cuda.Event() if passed is None else passed
        event.record(self.stream)
        return event

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def between_ns(self, first: Any, last: Any) -> int:
        return round(1e6 * float(first.elapsed_time(last)))

    def memory(self) -> tuple[int, int]:
        return (
            torch.cuda.max_memory_allocated(self.device),
            torch.cuda.max_memory_reserved(self.device),
        )

    def forget_peak(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


def open_timeline(name: str, priority: int | None) -> Timeline:
    """The device `name`, "cpu" or "cuda:0". Raises InvalidConfig for any other, or one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidConfig(f"device {name!r}: an eager model runs on cpu or cuda:N") from None
    if device.type == "cpu":
        return HostTimeline()
    if device.type != "cuda":
        raise InvalidConfig(f"device {name!r}: an eager model runs on cpu or cuda:N")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InvalidConfig(f"device {name!r}: torch sees {count} CUDA devices here")
    return CudaTimeline(torch.device("cuda", device.index or 0), priority)
