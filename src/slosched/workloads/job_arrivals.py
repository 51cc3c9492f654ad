"""When the requests of a job of a sharing experiment arrive, where its clients are an open loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isfinite

from slosched.errors import InvalidConfig
from slosched.share_spec import Arriving, Clients
from slosched.units import NS_PER_S
from slosched.workloads.arrivals import FixedRateArrivals, PoissonArrivals
from slosched.workloads.processes import Gamma

#: A later arrival is a slip: 10^6 s.
_LATEST_S = 1e6


def seed_of(seed: int, repeat: int, job: int) -> int:
    """The seed of the arrivals of a job, by its place, in one repeat of an experiment with `seed`."""
    return (seed + 1_000_003 * repeat) * 1_009 + job


def arrivals_of(clients: Clients, seed: int) -> Iterator[int]:
    """Yield the arrival times of an open loop in ns after the job's start, ascending; none for a closed one.

    The same clients and seed give the same times, live and in virtual time. Raises InvalidConfig at the call
    for a rate beyond 1e-9..1e9 requests/s, a cv beyond 0.01..100, or a trace that is not of rising times
    within 0..10^6 s.
    """
    return iter(_times(clients, seed))


def _times(clients: Clients, seed: int) -> Iterable[int]:
    rate = clients.rate_per_s
    match clients.arriving:
        case Arriving.CLOSED:
            return ()
        case Arriving.POISSON:
            return PoissonArrivals(rate, seed)
        case Arriving.CONSTANT:
            return FixedRateArrivals(rate)
        case Arriving.GAMMA:
            PoissonArrivals(rate, seed)  # checks the rate and the seed
            return Gamma(rate, clients.cv).arrivals(seed)
        case Arriving.TRACE:
            return _trace(clients.trace)


def _trace(times_s: tuple[float, ...]) -> Iterable[int]:
    before = 0.0
    for place, at in enumerate(times_s):
        if not isfinite(at) or not 0 <= at <= _LATEST_S:
            raise InvalidConfig(
                f"arrival {place} of the trace is {at}: it must be within 0..{_LATEST_S:g} s"
            )
        if at < before:
            raise InvalidConfig(
                f"arrival {place} of the trace is at {at} s, before the one in front of it ({before} s): "
                "sort the trace"
            )
        before = at
    return (round(at * NS_PER_S) for at in times_s)
