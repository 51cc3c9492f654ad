"""Clockwork's workloads: models, counts, rates, steps and groups of each."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from arrival_statistics import assert_poisson_count, assert_uniform, drain, serve
from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads import Workload, parse_workload
from slosched.workloads.base import Arrival, ModelUse
from slosched.workloads.zoo import zoo_models


def made(text: str) -> Workload:
    name, *args = text.split()
    return parse_workload(name, args)


def in_10_ms(arrival: Arrival) -> tuple[int, bool, int]:
    return 10 * NS_PER_MS, True, 100 * NS_PER_MS


# ------------------------------------------------------------------------------------ open loops


def test_poisson_open_loop_shares_its_rate() -> None:
    workload = made("poisson-open-loop 12 600")
    assert workload.models() == (ModelUse("resnet50_v2", 12),) and workload.duration_ns is None
    arrivals = drain(workload, duration_ns=40 * NS_PER_S)
    assert_poisson_count(len(arrivals), 24_000)
    for count in Counter(a.instance for a in arrivals).values():
        assert_poisson_count(count, 2000)
    times = [a.at_ns for a in arrivals]
    # Their superposition is Poisson again.
    assert_uniform(1 - 2.718281828459045 ** (-(b - a) * 600 / NS_PER_S) for a, b in pairwise(times))
    assert all(a.user_id == a.instance and a.slo_factor == a.slo_ns == 0 for a in arrivals)


def test_comparison_experiment_has_its_defaults() -> None:
    workload = made("comparison_experiment")
    assert workload.models() == (ModelUse("resnet50_v2", 15),)
    assert_poisson_count(len(drain(workload, duration_ns=10 * NS_PER_S)), 10_000)
    assert made("comparison_experiment 15") == workload
    assert made("comparison_experiment 3 60").models() == (ModelUse("resnet50_v2", 3),)


def test_fill_memory_has_the_codes_rates() -> None:
    workload = made("fill_memory")
    assert workload.models() == (ModelUse("resnet50_v2", 411),)
    counts = Counter(a.instance for a in drain(workload, duration_ns=20 * NS_PER_S))
    assert_poisson_count(counts[0], 20_000)
    assert_poisson_count(sum(counts[i] for i in range(1, 11)), 2000)
    assert_poisson_count(sum(counts[i] for i in range(11, 411)), 8000)
    assert len(counts) == 411


def test_scalability_exp_1_sweeps_the_rate() -> None:
    workload = made("scalability-exp-1 4 100 1600 2 mul 10")
    assert workload.duration_ns == 50 * NS_PER_S
    assert [step.text for step in workload.steps()] == [
        "100/s",
        "200/s",
        "400/s",
        "800/s",
        "1600/s",
    ]
    arrivals = drain(workload)
    for step, count in sorted(Counter(a.step for a in arrivals).items()):
        assert_poisson_count(count, 1000 * 2**step)
    assert all(a.step == a.at_ns // (10 * NS_PER_S) for a in arrivals)
    added = made("scalability-exp-1 4 500 1500 500 add 500ms")
    assert [step.text for step in added.steps()] == ["500/s", "1000/s", "1500/s"]
    assert added.duration_ns == 1500 * NS_PER_MS


def test_bursty_experiment_adds_a_model_each_second() -> None:
    workload = made("bursty_experiment 40 5s")
    assert workload.models() == (ModelUse("resnet50_v2", 41),)
    assert workload.groups == ("major", "minor") and workload.duration_ns == 45 * NS_PER_S
    arrivals = drain(workload)
    minor = [a for a in arrivals if a.instance == 40]
    assert_poisson_count(len(minor), 200 * 45)
    major = [a for a in arrivals if a.instance < 40]
    assert_poisson_count(len(major), 1000 * 40)
    assert min(a.at_ns for a in major) >= 5 * NS_PER_S
    # Instance k is active from second k on, and all active ones have equal shares.
    assert all(a.at_ns >= (5 + a.instance) * NS_PER_S for a in major)
    last = Counter(a.instance for a in major if a.at_ns >= 35 * NS_PER_S)
    for instance in range(30):
        assert_poisson_count(last[instance], sum(1000 / n for n in range(31, 41)))
    assert [step.start_ns for step in workload.steps()] == [0, 5 * NS_PER_S]
    published = made("bursty_experiment")
    assert published.models() == (ModelUse("resnet50_v2", 3601),)
    assert published.duration_ns == 3900 * NS_PER_S
    assert len(made("bursty_experiment 3 0").steps()) == 1


# ---------------------------------------------------------------------------------- closed loops


@pytest.mark.parametrize(
    ("text", "copies", "concurrency"),
    [
        ("spam", 100, 100),
        ("single-spam", 100, 1000),
        ("simple", 2, 1),
        ("comparison_experiment2", 15, 16),
        ("comparison_experiment2 3 5", 3, 5),
    ],
)
def test_closed_loops_start_with_their_concurrency(
    text: str, copies: int, concurrency: int
) -> None:
    workload = made(text)
    assert workload.models() == (ModelUse("resnet50_v2", copies),)
    assert workload.duration_ns is None
    arrivals = drain(workload, duration_ns=NS_PER_S)
    assert {a.at_ns for a in arrivals} == {0}
    assert set(Counter(a.instance for a in arrivals).values()) == {concurrency}
    assert len(arrivals) == copies * concurrency


def test_users_are_as_published() -> None:
    assert {a.user_id for a in drain(made("spam resnet18_v2"), duration_ns=1)} == {0}
    assert made("spam resnet18_v2").models() == (ModelUse("resnet18_v2", 100),)
    assert {a.user_id for a in drain(made("comparison_experiment2 4 2"), duration_ns=1)} == {
        0,
        1,
        2,
        3,
    }


def test_simple_parametric_divides_its_copies_and_stops() -> None:
    sent = serve(made("simple-parametric 7 3 2 50"), in_10_ms, duration_ns=10 * NS_PER_S)
    assert Counter(a.user_id for a, _, _ in sent) == {0: 50, 1: 50, 2: 50}
    shares = {user: {a.instance for a, _, _ in sent if a.user_id == user} for user in range(3)}
    assert shares == {0: {0, 1, 2}, 1: {3, 4, 5}, 2: {6}}  # three each, rounded up
    turns = [a.instance for a, _, _ in sent if a.user_id == 0]
    assert turns == [i % 3 for i in range(50)]
    # No instance is left for the last two of five clients.
    sent = serve(made("simple-parametric 3 5 1 4"), in_10_ms, duration_ns=NS_PER_S)
    assert Counter(a.user_id for a, _, _ in sent) == {0: 4, 1: 4, 2: 4}
    # A cap below the concurrency is kept too.
    assert len(serve(made("simple-parametric 1 1 10 3"), in_10_ms, duration_ns=NS_PER_S)) == 3


def test_simple_slo_factor_changes_each_copys_factor() -> None:
    workload = made("simple-slo-factor")
    assert workload.groups == ("multiplied", "added", "back and forth")
    sent = serve(workload, lambda a: (200 * NS_PER_MS, True, NS_PER_S), duration_ns=45 * NS_PER_S)
    by_step: dict[int, dict[int, float]] = {}
    for arrival, _, _ in sent:
        assert arrival.step == arrival.at_ns // (10 * NS_PER_S)
        by_step.setdefault(arrival.step, {})[arrival.instance] = arrival.slo_factor
    assert by_step == {
        0: {0: 4.0, 1: 4.0, 2: 10.0},
        1: {0: 5.0, 1: 5.0, 2: 1.0},
        2: {0: 6.25, 1: 6.0, 2: 10.0},
        3: {0: 7.8125, 1: 7.0, 2: 1.0},
        4: {0: 9.765625, 1: 8.0, 2: 10.0},
    }
    assert workload.steps()[1].text == "5x / 5x / 1x"


# ------------------------------------------------------------------------------------- slo-exp-2


def test_slo_exp_2_is_slo_exp_1_before_a_background() -> None:
    foreground = made("slo-exp-1 m 2 poisson 200 2 32 2 mul 7")
    both = made("slo-exp-2 m 2 poisson 200 2 32 2 mul 7 4 3 100")
    assert both.models() == (ModelUse("m", 6),) and both.groups == ("foreground", "background")
    assert both.duration_ns == 35 * NS_PER_S and both.steps() == foreground.steps()
    sent = serve(both, in_10_ms, duration_ns=60 * NS_PER_S, seed=5)
    ahead = [(a.at_ns, a.instance, a.slo_factor) for a, _, _ in sent if a.instance < 2]
    assert ahead == [(a.at_ns, a.instance, a.slo_factor) for a in drain(foreground, seed=5)]
    behind = [a for a, _, _ in sent if a.instance >= 2]
    assert min(a.at_ns for a in behind) == 10 * NS_PER_S
    assert {(a.slo_factor, a.slo_ns) for a in behind} == {(100.0, 0)}
    assert {a.user_id for a in behind} == {2, 3, 4, 5}
    # Closed loops of 3 with answers after 10 ms: 300/s each until the foreground ends.
    assert len(behind) == 4 * 3 * 2500


def test_slo_exp_2_may_have_no_background_and_any_slo() -> None:
    alone = made("slo-exp-2 m 6 poisson 200 1 100 1.5 mul 30 0 0 0")
    assert alone.models() == (ModelUse("m", 6),) and "no background" in alone.describe()
    timed = made("slo-exp-2 m 1 poisson 1 10ms 20ms 2 mul 30s 1 1 2s")
    background = [a for a in drain(timed) if a.instance == 1]
    assert [(a.slo_factor, a.slo_ns) for a in background] == [(0.0, 2 * NS_PER_S)]
    with pytest.raises(InvalidConfig, match="concurrency-bg"):
        made("slo-exp-2 m 6 poisson 200 1 100 1.5 mul 30 1 0 0")


# --------------------------------------------------------------------------------------- example


def test_example_gives_every_model_of_the_zoo_five_kinds_of_arrivals() -> None:
    workload = made("example")
    names = zoo_models()
    assert workload.models() == tuple(ModelUse(name) for name in names) and len(names) == 61
    sent = serve(workload, lambda a: (100 * NS_PER_MS, True, NS_PER_S), duration_ns=20 * NS_PER_S)
    kinds = Counter(a.stream % 5 for a, _, _ in sent)
    assert all(a.instance == a.user_id == a.stream // 5 for a, _, _ in sent)
    fixed = [a.at_ns for a, _, _ in sent if a.stream == 0]
    assert fixed == [i * NS_PER_S // 5 for i in range(1, 100)]
    assert_poisson_count(kinds[1], 61 * 200)
    assert kinds[3] == 61 * 200
    # Bursts begin at once: 10/s while on, and on for more than the third that they are later.
    assert 61 * 200 / 3 < kinds[2] < 61 * 200
    assert 61 * 100 < kinds[4] < 61 * 200


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("simple 3", "simple takes 0 values, not 1: none"),
        ("poisson-open-loop 12", "takes 2 values, not 1: NUM-MODELS RATE (for example: 12 600)"),
        ("poisson-open-loop 0 600", "num-models must be within 1..100000, not 0"),
        ("poisson-open-loop 3 nan", "rate must be above 0 and at most 1e+09, not nan"),
        ("comparison_experiment 3 -1", "total-requests must be above 0"),
        ("comparison_experiment2 3 1.5", "concurrency must be a whole number, not '1.5'"),
        ("simple-parametric 1 1 1 0", "requests must be within 1..1000000000000, not 0"),
        ("scalability-exp-1 4 100 50 2 mul 10", "rate-max is below rate-min"),
        ("scalability-exp-1 4 100 500 1 mul 10", "rate-factor must be above 1 with rate-op mul"),
        (
            "scalability-exp-1 4 1 1e9 1e-6 add 10",
            "more than 10000 steps; take a larger rate-factor",
        ),
        ("scalability-exp-1 4 100 500 2 mul 0", "period must be above 0 and at most 10^6 s"),
        ("bursty_experiment 10 -3", "negative"),
        ("slo-exp-2 m 2 poisson 200 2 32 2 mul 7 4 1 -1", "slo-bg must be a multiple"),
        ("slo-exp-2 m 2 poisson 200 2 32 2 mul 7 4 1", "takes 12 values, not 11"),
        ("gamma m 2 100 0", "cv must be a finite number > 0, not 0"),
        ("gamma m 2 100 1000", "cv must be within 0.01..100"),
        ("ramp m 2 0 0", "rate-start and rate-end are both 0"),
        ("on-off m 2 100 0 1s", "on must be above 0"),
        ("zipf m 2 100 11", "exponent must be within 0..10"),
        ("zipf m 100000 1 10", "take fewer copies or a smaller exponent"),
        (
            "gamma m 2 100 1 60s soon",
            "slo must be a multiple of the exec time (2.9), a duration (10ms) or 0",
        ),
        ("azure 0", "num-workers must be within 1..100000, not 0"),
        ("azure 1 maybe", "use-all-models must be 1 or 0, not 'maybe'"),
        ("azure 1 1 1 5", "memory-load-factor must be within 1..4, not 5"),
        ("azure 1 1 1 4 60 15", "trace must be within 1..14, not 15"),
        ("azure_scalability_exp 40 0.1 4 1.5 60", "takes 6 values, not 5"),
        ("azure_scalability_exp 40 0.1 4 1 60 4", "load-factor-inc must be above 1"),
    ],
)
def test_wrong_values_are_named(text: str, words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        made(text)
    assert words in str(caught.value)


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(UnknownName, match="rate-op 'sub'; known: add, mul"):
        made("scalability-exp-1 4 100 500 2 sub 10")
