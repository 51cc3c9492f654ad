"""Latencies of a set of requests: mean, error of the mean and percentiles. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from slosched.units import NS_PER_MS

#: A p99 of fewer values says nothing: the maximum stands in its place.
LEAST_FOR_P99 = 100
PERCENTILES = (0, 50, 90, 99, 100)


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds over `n` values. `sem_ms` is the standard error of the mean (None with one value).

    With fewer than LEAST_FOR_P99 values `p99_ms` is the maximum, and `p99_is_maximum` says so.
    """

    n: int
    mean_ms: float
    sem_ms: float | None
    p0_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p100_ms: float
    p99_is_maximum: bool = False


def latency_of(values_ns: Sequence[int]) -> Latency | None:
    """The latencies of `values_ns`, in ns; None without a value."""
    if not values_ns:
        return None
    values = np.asarray(values_ns, np.float64) / NS_PER_MS
    low, middle, high, highest, most = percentiles(values_ns)
    few = len(values) < LEAST_FOR_P99
    return Latency(
        n=len(values),
        mean_ms=float(values.mean()),
        sem_ms=float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None,
        p0_ms=low,
        p50_ms=middle,
        p90_ms=high,
        p99_ms=most if few else highest,
        p100_ms=most,
        p99_is_maximum=few,
    )


def percentiles(values_ns: Sequence[int]) -> tuple[float, ...]:
    """PERCENTILES in ms with numpy's interpolation whatever their number, as HotCarbon's files have them."""
    found = np.percentile(np.asarray(values_ns, np.float64) / NS_PER_MS, PERCENTILES)
    return tuple(float(each) for each in found)
