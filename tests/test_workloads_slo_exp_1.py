"""slo-exp-1: steps, arrivals, parsing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from decimal import localcontext
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slosched.errors import InvalidConfig, InvalidDuration, UnknownName
from slosched.workloads import WORKLOADS, parse_workload, workload_from_table
from slosched.workloads.base import instance_seed
from slosched.workloads.slo_exp_1 import SloExp1


def spec(text: str) -> SloExp1:
    workload = parse_workload("slo-exp-1", text.split())
    assert isinstance(workload, SloExp1)
    return workload


def factors(text: str) -> list[float]:
    return [step.slo_factor for step in spec(text).steps()]


def test_the_seeds_sweep_has_twelve_steps_and_lasts_360_s() -> None:
    sweep = spec("resnet50_v2 12 poisson 600 1 100 1.5 mul 30")
    steps = sweep.steps()
    assert [round(step.slo_factor, 2) for step in steps] == [
        1,
        1.5,
        2.25,
        3.38,
        5.06,
        7.59,
        11.39,
        17.09,
        25.63,
        38.44,
        57.67,
        86.50,
    ]
    assert [step.start_ns for step in steps] == [i * 30 * 10**9 for i in range(12)]
    assert sweep.duration_ns == 360 * 10**9


def test_the_documented_examples() -> None:
    assert factors("resnet50_v2 4 poisson 100 2 32 2 mul 7") == [2, 4, 8, 16, 32]
    assert factors("resnet50_v2 4 poisson 100 10 100 10 add 3") == [10.0 * i for i in range(1, 11)]


def test_float_drift_does_not_lose_an_inclusive_end() -> None:
    assert factors("m 1 poisson 1 0.1 0.3 0.1 add 1") == [0.1, 0.2, 0.3]
    assert len(factors("m 1 poisson 1 0.1 100 0.1 add 1")) == 1000
    assert factors("m 1 poisson 1 1 1.331 1.1 mul 1") == [1, 1.1, 1.21, 1.331]
    # An end printed with few digits still counts as reached.
    assert len(factors("m 1 poisson 1 1 86.49755859 1.5 mul 1")) == 12


def test_steps_do_not_depend_on_the_callers_decimal_context() -> None:
    with localcontext() as context:
        context.prec = 3
        steps = factors("m 1 poisson 1 1 100 1.5 mul 1")
    assert steps[-1] == 1.5**11


def test_one_step_when_start_is_end() -> None:
    assert factors("m 1 poisson 1 5 5 2 mul 1") == [5]


def test_decimals_are_taken_as_written() -> None:
    assert factors("m 1 poisson 1 2.9 6 2 mul 1") == [2.9, 5.8]


def test_absolute_slos() -> None:
    steps = spec("m 1 poisson 1 10ms 40ms 2 mul 1").steps()
    assert [step.slo_ns for step in steps] == [10_000_000, 20_000_000, 40_000_000]
    assert [step.slo_factor for step in steps] == [0, 0, 0]
    steps = spec("m 1 poisson 1 10ms 0.025s 5ms add 1").steps()
    assert [step.slo_ns for step in steps] == [10**7, 15 * 10**6, 2 * 10**7, 25 * 10**6]
    assert steps[0].text == "10ms"


def test_periods_are_seconds_or_durations() -> None:
    assert spec("m 1 poisson 1 1 2 2 mul 30").period_ns == 30 * 10**9
    assert spec("m 1 poisson 1 1 2 2 mul 0.5").period_ns == 5 * 10**8
    assert spec("m 1 poisson 1 1 2 2 mul 250ms").period_ns == 25 * 10**7


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("m 1 poisson 1 1 2 2 mul", InvalidConfig, "takes 9 values, not 8"),
        ("m 1 normal 1 1 2 2 mul 1", UnknownName, "distribution 'normal'"),
        ("m 1 poisson 1 1 2 2 sub 1", UnknownName, "slo-op 'sub'"),
        ("m 0 poisson 1 1 2 2 mul 1", InvalidConfig, "copies"),
        ("m x poisson 1 1 2 2 mul 1", InvalidConfig, "copies must be a whole number"),
        ("m 1 poisson 0 1 2 2 mul 1", InvalidConfig, "rate"),
        ("m 1 poisson nan 1 2 2 mul 1", InvalidConfig, "rate"),
        ("m 1 poisson many 1 2 2 mul 1", InvalidConfig, "rate must be a number"),
        ("m 1 poisson 1 nan 2 2 mul 1", InvalidConfig, "slo-start"),
        ("m 1 poisson 1 -1 2 2 mul 1", InvalidConfig, "slo-start"),
        ("m 1 poisson 1 0 2 2 mul 1", InvalidConfig, "slo-start"),
        ("m 1 poisson 1 1 inf 2 mul 1", InvalidConfig, "slo-end"),
        ("m 1 poisson 1 3 2 2 mul 1", InvalidConfig, "below slo-start"),
        ("m 1 poisson 1 1 2 1 mul 1", InvalidConfig, "above 1"),
        ("m 1 poisson 1 1 2 0.5 mul 1", InvalidConfig, "above 1"),
        ("m 1 poisson 1 1 2 0 add 1", InvalidConfig, "slo-factor"),
        ("m 1 poisson 1 1 2 -1 add 1", InvalidConfig, "slo-factor"),
        ("m 1 poisson 1 1 100 1e-9 add 1", InvalidConfig, "steps"),
        ("m 1 poisson 1 1 2 2 mul 0", InvalidConfig, "period"),
        ("m 1 poisson 1 1 2 2 mul -3", InvalidDuration, "negative"),
        ("m 1 poisson 1 1 2 2 mul soon", InvalidDuration, "soon"),
        ("m 1 poisson 1 10ms 2 2 mul 1", InvalidConfig, "both"),
        ("m 1 poisson 1 10ms 20ms 5 add 1", InvalidConfig, "must be a duration"),
        ("m 1 poisson 1 10 20 5ms add 1", InvalidConfig, "must be a bare number"),
        ("m 1 poisson 1 10xs 20xs 2 mul 1", InvalidDuration, "unknown unit"),
    ],
)
def test_wrong_values_are_named(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        spec(text)
    assert words in str(caught.value)


def test_fixed_rate_arrivals_are_counted_exactly_and_in_phase() -> None:
    arrivals = list(spec("m 4 fixed-rate 100 1 2 2 mul 2").arrivals())
    # 25/s each; the arrival that is due at the very end is not sent.
    assert len(arrivals) == 4 * (4 * 25) - 4
    assert [a.at_ns for a in arrivals[:8]] == [40_000_000] * 4 + [80_000_000] * 4
    assert [a.user_id for a in arrivals[:8]] == [0, 1, 2, 3, 0, 1, 2, 3]
    # An arrival at the border belongs to the step that begins there.
    at_border = [a for a in arrivals if a.at_ns == 2 * 10**9]
    assert {a.slo_factor for a in at_border} == {2.0}


def test_arrivals_are_ordered_numbered_and_carry_their_steps_slo() -> None:
    sweep = spec("m 12 poisson 2400 1 4 2 mul 1")
    arrivals = list(sweep.arrivals(seed=5))
    assert [a.seq for a in arrivals] == list(range(len(arrivals)))
    assert all((a.at_ns, a.user_id) < (b.at_ns, b.user_id) for a, b in pairwise(arrivals))
    assert all(a.step == a.at_ns // 10**9 and a.slo_factor == 2.0**a.step for a in arrivals)
    assert abs(len(arrivals) - 7200) < 4 * 85
    per_copy = Counter(a.user_id for a in arrivals)
    assert sorted(per_copy) == list(range(12))
    assert all(abs(n - 600) < 5 * 24.5 for n in per_copy.values())


def test_the_same_seed_gives_the_same_arrivals() -> None:
    sweep = spec("m 3 poisson 300 1 4 2 mul 1")
    assert list(sweep.arrivals(1)) == list(sweep.arrivals(1))
    assert list(sweep.arrivals(1)) != list(sweep.arrivals(2))


def test_seeds_share_no_streams() -> None:
    seeds = {instance_seed(seed, i) for seed in range(10) for i in range(48)}
    assert len(seeds) == 480
    assert [instance_seed(0, i) for i in range(3)] == [0, 1, 2]


def test_copies_have_their_own_streams() -> None:
    arrivals = list(islice(spec("m 2 poisson 100 1 1 2 mul 60").arrivals(), 200))
    first, second = ([a.at_ns for a in arrivals if a.user_id == i] for i in (0, 1))
    assert not {*first} & {*second}


def test_arrivals_do_not_depend_on_the_hash_seed() -> None:
    program = (
        "from slosched.workloads import parse_workload as p;"
        "w = p('slo-exp-1', 'm 7 poisson 700 1 4 2 mul 1'.split());"
        "print(list(w.arrivals(3)), w.steps())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


@given(
    start=st.floats(0.01, 50),
    ratio=st.floats(1.01, 100),
    factor=st.floats(1.01, 10),
    period_ns=st.integers(1, 10**12),
)
def test_steps_rise_within_their_ends(
    start: float, ratio: float, factor: float, period_ns: int
) -> None:
    sweep = SloExp1("m", 1, "poisson", 1, start, start * ratio, factor, "mul", period_ns)
    steps = sweep.steps()
    assert steps[0].slo_factor == start
    assert all(a.slo_factor < b.slo_factor for a, b in pairwise(steps))
    assert steps[-1].slo_factor <= sweep.slo_end * (1 + 1e-8)
    assert steps[-1].slo_factor * factor > sweep.slo_end
    assert [step.start_ns for step in steps] == [i * period_ns for i in range(len(steps))]


def test_the_registry() -> None:
    assert "slo-exp-1" in WORKLOADS
    sweep = parse_workload("slo-exp-1", ["m", "2", "poisson", "10", "1", "4", "2", "mul", "3"])
    assert "2 x m, poisson 10/s in total, SLO 1x to 4x in 3 steps of 3s, 9s" in sweep.describe()
    with pytest.raises(UnknownName, match="workload 'azur'"):
        parse_workload("azur", [])


def test_the_seeds_experiment_as_a_file_says_what_the_command_says() -> None:
    path = Path(__file__).parent.parent / "workloads" / "fig7.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    assert workload_from_table(table) == spec("resnet50_v2 12 poisson 600 1 100 1.5 mul 30")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workload": "azur"}, "workload 'azur'"),
        ({"speed": 3}, "key of slo-exp-1 'speed'"),
        ({"rate": "many"}, "rate must be a number"),
        ({"copies": 1.5}, "copies must be a whole number"),
    ],
)
def test_wrong_keys_and_values_of_a_file_are_named(change: dict[str, object], words: str) -> None:
    path = Path(__file__).parent.parent / "workloads" / "fig7.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(InvalidConfig) as caught:
        workload_from_table({**table, **change})
    assert words in str(caught.value)
    del table["period"]
    with pytest.raises(InvalidConfig, match="lacks period"):
        workload_from_table(table)
