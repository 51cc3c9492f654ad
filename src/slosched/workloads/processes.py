"""Arrival processes as values: what a workload says of one, and `arrivals(seed)`, its times.

Times are ns after the start, ascending. A process is plain data, so that a workload can be compared,
printed and sent to another process; the seed comes with the run.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite, log, sqrt
from typing import Protocol

from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S
from slosched.workloads.arrivals import FixedRateArrivals, PoissonArrivals

#: From, until (ns after the start) and the rate in requests/s.
Piece = tuple[int, int, float]
#: Added to a stream's seed for its bursts: beyond every stream's own.
_BURST_SEEDS = 1 << 96


class Process(Protocol):
    """When requests are due."""

    def arrivals(self, seed: int) -> Iterable[int]:
        """The times, anew; endless where the process is."""


@dataclass(frozen=True, slots=True)
class Poisson:
    """Exponential gaps of mean 1 / rate."""

    rate_per_s: float

    def arrivals(self, seed: int) -> Iterable[int]:
        return PoissonArrivals(self.rate_per_s, seed)


@dataclass(frozen=True, slots=True)
class FixedRate:
    """One request every 1 / rate, the first after one gap."""

    rate_per_s: float

    def arrivals(self, seed: int) -> Iterable[int]:
        return FixedRateArrivals(self.rate_per_s)


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps of mean 1 / rate and coefficient of variation `cv`.

    cv 1 is Poisson; below it is more regular, above it burstier. Raises InvalidConfig for a cv beyond
    0.01..100.
    """

    rate_per_s: float
    cv: float

    def __post_init__(self) -> None:
        if not 0.01 <= self.cv <= 100:
            raise InvalidConfig(f"cv must be within 0.01..100, not {self.cv:g}")

    def arrivals(self, seed: int) -> Iterator[int]:
        draw = random.Random(seed).gammavariate
        shape = 1 / self.cv**2
        scale_ns = NS_PER_S / self.rate_per_s / shape
        at_ns = 0.0  # gaps far below 1 ns add up, so they are not rounded one by one
        while True:
            at_ns += draw(shape, scale_ns)
            if not isfinite(at_ns) or at_ns >= 2**62:
                return
            yield int(at_ns + 0.5)


@dataclass(frozen=True, slots=True)
class Ramp:
    """A Poisson process whose rate goes linearly from `start_per_s` to `end_per_s` in `length_ns`.

    Exact: unit-rate Poisson points are put through the inverse of the integrated rate, which is a
    square root. It ends with the ramp.
    """

    start_per_s: float
    end_per_s: float
    length_ns: int

    def arrivals(self, seed: int) -> Iterator[int]:
        uniform = random.Random(seed).random
        start = self.start_per_s / NS_PER_S
        slope = (self.end_per_s - self.start_per_s) / NS_PER_S / self.length_ns
        area = (self.start_per_s + self.end_per_s) / 2 / NS_PER_S * self.length_ns
        work = 0.0
        while True:
            work += -log(1.0 - uniform())
            if work >= area:
                return
            # The root of start * t + slope * t^2 / 2 = work that is also right for slope 0.
            root = sqrt(max(0.0, start * start + 2 * slope * work))
            yield int(2 * work / (start + root) + 0.5)


def poisson_pieces(pieces: Iterable[Piece], seed: int) -> Iterator[int]:
    """A Poisson process whose rate is constant on each of `pieces`, and 0 between them.

    Exact: a sample of Exp(1) is used up at the rate of the moment, and what is left of it at a
    border is carried over (Clockwork's TraceReplay). `pieces` ascend and do not overlap.
    """
    uniform = random.Random(seed).random
    work = -log(1.0 - uniform())
    for start_ns, end_ns, rate_per_s in pieces:
        if rate_per_s <= 0.0:
            continue
        per_ns = rate_per_s / NS_PER_S
        length = end_ns - start_ns
        offset = work / per_ns
        while offset < length:
            yield start_ns + int(offset)
            work = -log(1.0 - uniform())
            offset += work / per_ns
        work = (offset - length) * per_ns


@dataclass(frozen=True, slots=True)
class Pieces:
    """A Poisson process of piecewise constant rate (see poisson_pieces). It ends with them."""

    pieces: tuple[Piece, ...]

    def arrivals(self, seed: int) -> Iterator[int]:
        return poisson_pieces(self.pieces, seed)


@dataclass(frozen=True, slots=True)
class EvenPieces:
    """Equal gaps of 1 / rate on each of `pieces`, the first request of each after one gap."""

    pieces: tuple[Piece, ...]

    def arrivals(self, seed: int) -> Iterator[int]:
        for start_ns, end_ns, rate_per_s in self.pieces:
            for offset_ns in FixedRateArrivals(rate_per_s):
                if start_ns + offset_ns >= end_ns:
                    break
                yield start_ns + offset_ns


@dataclass(frozen=True, slots=True)
class OnOff:
    """Bursts of a Poisson process: on and off for exponential times of means `on_ns`, `off_ns`.

    It starts as one finds it at any moment: on with probability on / (on + off). With `published` it
    is Clockwork's BurstyPoissonOpenLoop, which starts within a burst (its draw of where to start
    is scaled by 2^64 while its generator gives 31 bits) and begins every burst with a request.
    """

    rate_per_s: float
    on_ns: int
    off_ns: int
    published: bool = False

    def arrivals(self, seed: int) -> Iterator[int]:
        # Streams of their own, so that the bursts do not move when the rate changes.
        bursts = self._bursts(random.Random(seed + _BURST_SEEDS))
        requests = random.Random(seed)
        mean_ns = NS_PER_S / self.rate_per_s
        for start_ns, end_ns in bursts:
            at_ns = float(start_ns)
            if self.published:
                yield start_ns
            while True:
                at_ns += -log(1.0 - requests.random()) * mean_ns
                if at_ns >= end_ns:
                    break  # exponential gaps have no memory: the next burst draws anew
                yield int(at_ns)

    def _bursts(self, draws: random.Random) -> Iterator[tuple[int, int]]:
        def draw_ns(mean_ns: int) -> int:
            return int(-log(1.0 - draws.random()) * mean_ns + 0.5)

        at_ns = 0
        share_on = self.on_ns / (self.on_ns + self.off_ns)
        if not self.published and draws.random() >= share_on:
            at_ns = draw_ns(self.off_ns)
        while at_ns < 2**62:
            end_ns = at_ns + draw_ns(self.on_ns)
            yield at_ns, end_ns
            at_ns = end_ns + draw_ns(self.off_ns)
