"""Arrival processes: when requests are due, as integer nanoseconds after the start of a run.

An arrival process depends on its rate and seed alone, so a live run and a simulated one send the
same requests. The first request comes after one gap and nothing limits how many are unanswered
(open loop), as in Clockwork's workload engine (PoissonOpenLoop, FixedRate).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from fractions import Fraction

from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S


def _checked_rate(rate_per_s: float) -> float:
    # Clocks count in ns: a faster process would never leave an instant.
    if not 1e-9 <= rate_per_s <= 1e9:  # and NaN is not
        raise InvalidConfig(f"a rate must be within 1e-9..1e9 requests/s, not {rate_per_s}")
    return rate_per_s


class PoissonArrivals:
    """A Poisson process: exponential gaps of mean 1 / `rate_per_s`, one stream per `seed`.

    Iterating gives endless absolute offsets in ns that never decrease; each iteration starts the
    same stream anew. Raises InvalidConfig for a rate beyond 1e-9..1e9, or a seed < 0.
    """

    def __init__(self, rate_per_s: float, seed: int) -> None:
        if seed < 0:
            raise InvalidConfig(f"a seed must be at least 0, not {seed}")
        self.rate_per_s = _checked_rate(rate_per_s)
        self.seed = seed

    def gaps(self) -> Iterator[int]:
        """Yield the gaps between arrivals, in ns."""
        uniform = random.Random(self.seed).random
        mean_ns = NS_PER_S / self.rate_per_s
        log = math.log
        while True:
            yield int(-log(1.0 - uniform()) * mean_ns + 0.5)

    def __iter__(self) -> Iterator[int]:
        at_ns = 0
        for gap_ns in self.gaps():
            at_ns += gap_ns
            yield at_ns


class FixedRateArrivals:
    """One arrival every 1 / `rate_per_s`: the n-th at exactly n / rate, rounded to the ns.

    Offsets are computed from n and not summed, so that rounding never accumulates. All instances
    of one rate are in phase. Raises InvalidConfig for a rate beyond 1e-9..1e9.
    """

    def __init__(self, rate_per_s: float) -> None:
        self.rate_per_s = _checked_rate(rate_per_s)

    def gaps(self) -> Iterator[int]:
        """Yield the gaps between arrivals, in ns; they differ by 1 ns at most."""
        before_ns = 0
        for at_ns in self:
            yield at_ns - before_ns
            before_ns = at_ns

    def __iter__(self) -> Iterator[int]:
        period = NS_PER_S / Fraction(self.rate_per_s)
        numerator, denominator = period.numerator, period.denominator
        n = 0
        while True:
            n += 1
            yield (2 * n * numerator + denominator) // (2 * denominator)


Arrivals = PoissonArrivals | FixedRateArrivals
