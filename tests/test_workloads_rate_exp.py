"""rate-exp and rate-list: steps, arrivals, parsing."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from slosched.errors import InvalidConfig, InvalidDuration, UnknownName
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads import Workload, parse_workload
from slosched.workloads.engine import open_loop_arrivals


def made(text: str) -> Workload:
    name, *values = text.split()
    return parse_workload(name, values)


def test_the_rates_go_from_the_first_to_the_last() -> None:
    sweep = made("rate-exp m 1 poisson 25ms 400 1000 50 add 10")
    steps = sweep.steps()
    assert [step.text for step in steps] == [f"{rate}/s" for rate in range(400, 1001, 50)]
    assert [step.start_ns for step in steps] == [i * 10 * NS_PER_S for i in range(13)]
    assert {step.slo_ns for step in steps} == {25 * NS_PER_MS}
    assert sweep.duration_ns == 130 * NS_PER_S
    doubled = made("rate-exp m 3 poisson 2.9 100 800 2 mul 1s")
    assert [step.text for step in doubled.steps()] == ["100/s", "200/s", "400/s", "800/s"]
    assert {step.slo_factor for step in doubled.steps()} == {2.9}
    assert doubled.models() == (("m", 3),)


def test_a_list_keeps_its_order() -> None:
    steps = made("rate-list m 1 poisson 25ms 850,300,600.5 2").steps()
    assert [step.text for step in steps] == ["850/s", "300/s", "600.5/s"]


@pytest.mark.parametrize("dist", ["poisson", "fixed-rate"])
def test_each_step_has_its_rate_over_all_copies(dist: str) -> None:
    arrivals = list(open_loop_arrivals(made(f"rate-list m 4 {dist} 25ms 400,2000 10"), seed=3))
    sent = Counter(a.step for a in arrivals)
    for step, rate in ((0, 400), (1, 2000)):
        slack = 5 * (rate * 10) ** 0.5 if dist == "poisson" else 4
        assert abs(sent[step] - rate * 10) <= slack
    assert {a.instance for a in arrivals} == {0, 1, 2, 3}
    assert all(a.slo_ns == 25 * NS_PER_MS for a in arrivals)


def test_fixed_rate_arrivals_are_even() -> None:
    arrivals = list(open_loop_arrivals(made("rate-list m 1 fixed-rate 25ms 100,200 1")))
    gaps = {b.at_ns - a.at_ns for a, b in pairwise(arrivals) if a.step == b.step}
    assert gaps == {10 * NS_PER_MS, 5 * NS_PER_MS}


def test_the_same_seed_gives_the_same_requests() -> None:
    sweep = made("rate-exp m 2 poisson 25ms 100 200 100 add 2")
    assert list(open_loop_arrivals(sweep, seed=1)) == list(open_loop_arrivals(sweep, seed=1))
    assert list(open_loop_arrivals(sweep, seed=1)) != list(open_loop_arrivals(sweep, seed=2))


def test_it_is_described_in_a_line() -> None:
    assert made("rate-list m 2 poisson 25ms 300,600 10").describe() == (
        "rate-list: 2 x m, poisson 300 and 600/s in total, in 2 steps of 10s, SLO 25ms, 20s in all"
    )
    assert made("rate-exp m 1 poisson 0 100 1000 100 add 1").describe() == (
        "rate-exp: 1 x m, poisson 100/s to 1000/s in total, in 10 steps of 1s, default SLO, 10s in all"
    )


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("rate-exp m 1 poisson 25ms 400 1000 50 add", InvalidConfig, "takes 9 values, not 8"),
        ("rate-exp m 1 bursty 25ms 400 1000 50 add 1", UnknownName, "distribution 'bursty'"),
        ("rate-exp m 1 poisson 25ms 400 1000 50 sub 1", UnknownName, "rate-op 'sub'"),
        ("rate-exp m 1 poisson 25ms 400 100 50 add 1", InvalidConfig, "rate-end is below"),
        ("rate-exp m 1 poisson 25ms 400 1000 1 mul 1", InvalidConfig, "must be above 1"),
        ("rate-exp m 0 poisson 25ms 400 1000 50 add 1", InvalidConfig, "copies"),
        ("rate-exp m 1 poisson 0ms 400 1000 50 add 1", InvalidConfig, "slo must be above 0"),
        ("rate-exp m 1 poisson 25parsec 400 1000 50 add 1", InvalidConfig, "slo"),
        ("rate-exp m 1 poisson 25ms 1 1000000 0.01 add 1", InvalidConfig, "more than 10000"),
        ("rate-exp m 1 poisson 25ms 400 1000 50 add 1x", InvalidDuration, "the period|period"),
        ("rate-list m 1 poisson 25ms 300,,600 1", InvalidConfig, "rates must be a number"),
        ("rate-list m 1 poisson 25ms 300,-1 1", InvalidConfig, "rates must be above 0"),
    ],
)
def test_what_is_wrong_is_named(text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        made(text)
