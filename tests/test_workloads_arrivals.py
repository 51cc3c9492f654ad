"""Arrival processes: counts, gaps, streams."""

from __future__ import annotations

import math
from itertools import islice, pairwise, takewhile

import pytest

from slosched.errors import InvalidConfig
from slosched.workloads.arrivals import FixedRateArrivals, PoissonArrivals


def test_fixed_rate_arrivals_are_exact_and_start_after_one_gap() -> None:
    arrivals = list(islice(FixedRateArrivals(600), 600_000))
    assert arrivals[0] == 1_666_667
    assert arrivals[2] == 5_000_000
    assert arrivals[599] == 1_000_000_000
    # Half an hour on, nothing has accumulated.
    assert arrivals[-1] == 1000 * 1_000_000_000
    assert {b - a for a, b in pairwise(arrivals)} == {1_666_666, 1_666_667}


def test_fixed_rate_gaps_sum_to_the_arrivals() -> None:
    arrivals = FixedRateArrivals(7.3)
    total = 0
    for gap, at in zip(islice(arrivals.gaps(), 1000), arrivals, strict=False):
        total += gap
        assert total == at


def test_poisson_count_matches_its_rate() -> None:
    # 200 s at 500/s: 100,000 expected, standard deviation 316.
    count = sum(1 for _ in takewhile(lambda at: at < 200 * 10**9, PoissonArrivals(500, seed=3)))
    assert abs(count - 100_000) < 4 * 316


def test_poisson_gaps_are_exponential() -> None:
    n, rate = 20_000, 1200.0
    gaps = sorted(islice(PoissonArrivals(rate, seed=11).gaps(), n))
    assert sum(gaps) / n == pytest.approx(1e9 / rate, rel=0.03)
    # Kolmogorov-Smirnov against 1 - exp(-rate x); 1.63 / sqrt(n) is the 1 % bound.
    cdf = [1 - math.exp(-gap * rate / 1e9) for gap in gaps]
    distance = max(max((i + 1) / n - f, f - i / n) for i, f in enumerate(cdf))
    assert distance < 1.63 / math.sqrt(n)


def test_poisson_gaps_are_independent() -> None:
    gaps = list(islice(PoissonArrivals(1000, seed=5).gaps(), 20_000))
    mean = sum(gaps) / len(gaps)
    variance = sum((g - mean) ** 2 for g in gaps) / len(gaps)
    covariance = sum((a - mean) * (b - mean) for a, b in pairwise(gaps)) / len(gaps)
    assert abs(covariance / variance) < 4 / math.sqrt(len(gaps))


def test_the_same_seed_gives_the_same_stream_and_others_another() -> None:
    arrivals = PoissonArrivals(100, seed=2)
    first = list(islice(arrivals, 100))
    assert first == list(islice(arrivals, 100))
    assert first == list(islice(PoissonArrivals(100, seed=2), 100))
    assert first != list(islice(PoissonArrivals(100, seed=3), 100))


def test_the_stream_of_a_seed_never_changes() -> None:
    # Golden: a run's figures can be drawn again only if its arrivals can be made again.
    assert list(islice(PoissonArrivals(50, seed=0), 4)) == GOLDEN


GOLDEN = [37_212_142, 65_584_725, 76_498_988, 82_491_834]


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, 1e300, 1e-300])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    with pytest.raises(InvalidConfig, match="rate"):
        PoissonArrivals(rate, seed=0)
    with pytest.raises(InvalidConfig, match="rate"):
        FixedRateArrivals(rate)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="seed"):
        PoissonArrivals(1, seed=-1)
