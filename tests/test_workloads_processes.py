"""Arrival processes of other shapes: gaps and counts against theory, with fixed seeds."""

from __future__ import annotations

import math
from itertools import islice, pairwise, takewhile

import pytest

from arrival_statistics import assert_poisson_count, assert_uniform, gamma_cdf
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S
from slosched.workloads.processes import Gamma, OnOff, Piece, Pieces, Poisson, Ramp, poisson_pieces


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0])
def test_gamma_gaps_have_their_distribution(cv: float) -> None:
    rate = 500.0
    times = [0, *islice(Gamma(rate, cv).arrivals(7), 8000)]
    shape = 1 / cv**2
    # Gaps are rounded to ns, which shows in the density of a bursty process at 0: spread them.
    gaps = [max(b - a, 0.5) for a, b in pairwise(times)]
    close = [gap for gap in gaps if gap > 100]
    floor = gamma_cdf(shape, 100 * rate * shape / NS_PER_S)
    assert abs(len(close) / len(gaps) - (1 - floor)) < 4 * math.sqrt(0.25 / len(gaps))
    assert_uniform(
        (gamma_cdf(shape, gap * rate * shape / NS_PER_S) - floor) / (1 - floor) for gap in close
    )


def test_gamma_gaps_have_their_mean_and_cv() -> None:
    n, rate, cv = 40_000, 1000.0, 3.0
    times = [0, *islice(Gamma(rate, cv).arrivals(1), n)]
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / n
    assert mean == pytest.approx(NS_PER_S / rate, rel=4 * cv / math.sqrt(n))
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / n)
    assert spread / mean == pytest.approx(cv, rel=0.1)


def test_a_cv_that_means_nothing_is_refused() -> None:
    for cv in (0.0, -1.0, math.nan, math.inf, 1000.0):
        with pytest.raises(InvalidConfig, match="cv must be within"):
            Gamma(1.0, cv)


@pytest.mark.parametrize(
    ("start", "end"), [(100.0, 900.0), (900.0, 100.0), (0.0, 800.0), (800.0, 0.0)]
)
def test_a_ramp_is_an_exact_inhomogeneous_poisson_process(start: float, end: float) -> None:
    length_ns = 20 * NS_PER_S
    times = list(Ramp(start, end, length_ns).arrivals(3))
    assert_poisson_count(len(times), (start + end) / 2 * 20)
    assert times == sorted(times) and times[-1] <= length_ns
    # Given their number, the times are independent with the integrated rate as distribution.
    area = (start + end) / 2
    shares = [t / length_ns for t in times]
    assert_uniform((start * x + (end - start) * x * x / 2) / area for x in shares)


def test_a_flat_ramp_is_poisson() -> None:
    times = list(Ramp(300.0, 300.0, 30 * NS_PER_S).arrivals(5))
    assert_uniform(1 - math.exp(-(b - a) * 300 / NS_PER_S) for a, b in pairwise([0, *times]))


def test_pieces_carry_what_is_left_over_their_borders() -> None:
    # Pieces far shorter than a gap: drawing anew at each border would be seen at once.
    ms = NS_PER_S // 1000
    rates = (40.0, 0.0, 400.0, 100.0)
    pieces = tuple((i * ms, (i + 1) * ms, rates[i % 4]) for i in range(40_000))
    times = list(Pieces(pieces).arrivals(11))
    assert_poisson_count(len(times), sum(rates) / 4 * 40)
    assert all((t // ms) % 4 != 1 for t in times)

    def work(t: int) -> float:
        whole, rest = divmod(t, 4 * ms)
        inside = sum(rate * min(max(rest - i * ms, 0), ms) for i, rate in enumerate(rates))
        return (whole * sum(rates) * ms + inside) / NS_PER_S

    # Exact: in units of the integrated rate the gaps are Exp(1).
    assert_uniform(1 - math.exp(-(work(b) - work(a))) for a, b in pairwise([0, *times]))


def test_pieces_may_leave_gaps_and_end() -> None:
    pieces: list[Piece] = [
        (5, 10, 0.0),
        (NS_PER_S, 2 * NS_PER_S, 200.0),
        (9 * NS_PER_S, 10 * NS_PER_S, 200.0),
    ]
    times = list(poisson_pieces(pieces, 2))
    assert {t // NS_PER_S for t in times} == {1, 9}
    assert_poisson_count(len(times), 400)
    assert list(poisson_pieces([], 2)) == []


def test_constant_pieces_are_the_poisson_process() -> None:
    pieces = tuple((i * NS_PER_S, (i + 1) * NS_PER_S, 50.0) for i in range(100))
    split = list(Pieces(pieces).arrivals(4))
    whole = list(Pieces(((0, 100 * NS_PER_S, 50.0),)).arrivals(4))
    assert len(split) == len(whole)
    assert all(abs(a - b) <= 1 for a, b in zip(split, whole, strict=True))  # one rounds more often


def test_on_off_is_on_for_its_share() -> None:
    process = OnOff(1000.0, NS_PER_S // 20, 3 * NS_PER_S // 20)
    length_ns = 400 * NS_PER_S
    times = list(takewhile(lambda t: t < length_ns, process.arrivals(1)))
    # 2,000 cycles of 0.2 s: the share of time on is 1/4, give or take 2 %.
    assert len(times) / 400 == pytest.approx(250, rel=0.08)
    # A gap within a burst is the sooner of the next request (1,000/s) and the end (20/s); nearly
    # all gaps that span a pause are longer than 5 ms.
    short = [b - a for a, b in pairwise(times) if b - a < 5_000_000]
    cut = 1 - math.exp(-5 * 1.02)
    assert_uniform((1 - math.exp(-gap * 1.02 / 1e6)) / cut for gap in short)


def test_on_off_starts_as_one_finds_it() -> None:
    process = OnOff(1e6, NS_PER_S, 3 * NS_PER_S)
    on = sum(next(process.arrivals(seed)) < 100_000 for seed in range(800))
    assert abs(on - 200) < 4 * math.sqrt(800 * 0.25 * 0.75)


def test_published_bursts_begin_with_a_request_at_once() -> None:
    process = OnOff(0.001, NS_PER_S, 2 * NS_PER_S, published=True)
    starts = list(islice(process.arrivals(9), 3000))
    assert starts[0] == 0
    # With a rate of nearly 0 only the first requests of bursts are left: cycles of 3 s.
    assert starts[-1] / len(starts) == pytest.approx(3 * NS_PER_S, rel=0.06)


def test_the_bursts_do_not_move_with_the_rate() -> None:
    slow = OnOff(1e-6, NS_PER_S, NS_PER_S, published=True)
    fast = OnOff(5.0, NS_PER_S, NS_PER_S, published=True)
    starts = list(islice(slow.arrivals(3), 50))
    assert set(starts) <= set(takewhile(lambda t: t <= starts[-1], fast.arrivals(3)))


def test_a_process_gives_the_same_times_anew() -> None:
    for process in (Gamma(10, 2), OnOff(50, 10**9, 10**9), Poisson(10), Ramp(1, 9, 10**10)):
        assert list(islice(process.arrivals(4), 50)) == list(islice(process.arrivals(4), 50))
        assert list(islice(process.arrivals(4), 50)) != list(islice(process.arrivals(5), 50))
