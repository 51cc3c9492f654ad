"""Policies of cascades in the simulator: golden runs, load that changes, workers that die, little memory."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cascade_runs import GOLDEN, ONE, POLICIES, CascadeRun, run, spec_of
from scheduler_rig import MS
from slosched.codes import Verdict
from slosched.sim.faults import Fault, FaultPlan
from slosched.units import NS_PER_S

#: Verdicts of stages after which a request is answered.
LIGHT = {"ACCEPTED", "FORCED", "INSTEAD", "OUTRANKED", "BLIND_LIGHT"}
HEAVY = {"HEAVY", "BLIND_HEAVY"}


def shares(made: CascadeRun) -> tuple[float, float]:
    """The share of requests in time, and that of heavy answers."""
    met = made.requests["deadline_met"].tolist()
    heavy = sum(made.verdicts.get(name, 0) for name in HEAVY)
    return sum(met) / len(met), heavy / len(met)


def check_books(made: CascadeRun) -> None:
    """Every answer has its stage, and every deferral an end."""
    assert made.result.complete
    ends = sum(made.verdicts.get(name, 0) for name in LIGHT | HEAVY)
    assert ends == made.codes.get("OK", 0)
    deferred = made.verdicts.get("DEFERRED", 0)
    went_on = sum(made.verdicts.get(name, 0) for name in ("HEAVY", "INSTEAD", "OUTRANKED"))
    assert went_on <= deferred <= went_on + sum(made.codes.values()) - made.codes.get("OK", 0)
    assert len(made.requests["t"]) == sum(step.sent for step in made.result.steps)


# ---------------------------------------------------------------------------------- golden runs


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_gives_its_golden_numbers_and_the_same_bytes_again(
    policy: str, tmp_path: Path
) -> None:
    golden = json.loads(GOLDEN.read_text())[policy]
    first = run(spec_of(policy), tmp_path / "first")
    assert first.numbers() == golden, "meant? .venv/bin/python tests/cascade_runs.py"
    check_books(first)
    short, again, other = (
        run(spec_of(policy, seconds=4, seed=seed), tmp_path / str(place)).digest
        for place, seed in enumerate((1, 1, 2))
    )
    assert short == again != other


def test_every_policy_has_a_golden_run() -> None:
    assert list(json.loads(GOLDEN.read_text())) == list(POLICIES)


# ------------------------------------------------------------------------------------ ours


@pytest.mark.parametrize("trace", ["fixed_2", "fixed_20", "fixed_60"])
def test_ours_has_no_violation_at_a_load_that_the_light_program_can_carry(
    trace: str, tmp_path: Path
) -> None:
    made = run(spec_of("CASCADE", trace, seconds=15), tmp_path)
    check_books(made)
    assert shares(made)[0] == 1.0
    assert set(made.verdicts) <= LIGHT | {"DEFERRED", "HEAVY"}


def test_the_threshold_falls_when_the_demand_doubles_and_rises_after_it(tmp_path: Path) -> None:
    lines = [f"{round(at * 1000)},{place % 4999 + 1}" for place, at in enumerate(_waves())]
    trace = tmp_path / "trace.txt"
    trace.write_text("\n".join(lines) + "\n")
    made = run(spec_of("CASCADE", str(trace), seconds=90), tmp_path)
    before, during, after = (
        mean_threshold(made, *times) for times in ((20, 30), (40, 58), (75, 88))
    )
    assert during < 0.75 * before and after > 1.25 * during
    assert shares(made)[0] > 0.995


def _waves() -> list[float]:
    """Arrivals at 6/s, at 12/s from 30 s to 60 s, and at 6/s again."""
    slow = [place / 6 for place in range(180)]
    fast = [30 + place / 12 for place in range(360)]
    return [*slow, *fast, *[60 + at for at in slow]]


def mean_threshold(made: CascadeRun, from_s: float, until_s: float) -> float:
    start_ns = int(made.plans["t"][0])
    found = [
        threshold
        for t, threshold in zip(
            made.plans["t"].tolist(), made.plans["threshold"].tolist(), strict=True
        )
        if from_s * NS_PER_S <= t - start_ns < until_s * NS_PER_S
    ]
    return float(sum(found) / len(found))


def test_a_fixed_threshold_holds_for_the_whole_run(tmp_path: Path) -> None:
    made = run(spec_of("CASCADE", fixed_threshold=0.1), tmp_path / "ours")
    for verdict, score in zip(made.stages["verdict"], made.stages["score"], strict=True):
        if verdict == Verdict.ACCEPTED:
            assert score >= 0.1
        elif verdict == Verdict.DEFERRED:
            assert score < 0.1
    plans = run(spec_of("DIFFSERVE", fixed_threshold=0.1), tmp_path / "theirs").plans
    pairs = zip(plans["threshold"].tolist(), plans["feasible"].tolist(), strict=True)
    assert {threshold for threshold, feasible in pairs if feasible} == {0.1}


# --------------------------------------------------------------------------------- the plans


def test_the_plans_use_every_gpu_and_say_what_they_are_made_for(tmp_path: Path) -> None:
    made = run(spec_of("DIFFSERVE", "fixed_8", seconds=30, gpus=6), tmp_path)
    plans = made.plans
    times = plans["t"].tolist()
    assert len(times) == 7 or len(times) == 6
    assert all(b - a >= 5 * NS_PER_S for a, b in pairwise(times[1:]))
    both = [a + b for a, b in zip(plans["light_gpus"], plans["heavy_gpus"], strict=True)]
    assert set(both) == {6}
    assert all(0 <= threshold <= 1 for threshold in plans["threshold"].tolist())
    assert plans["demand"].tolist()[-1] == pytest.approx(8, rel=0.35)
    assert all(plans["light_batch"].tolist()) and all(plans["heavy_batch"].tolist())


def test_every_plan_comes_at_the_time_that_is_asked_for(tmp_path: Path) -> None:
    made = run(spec_of("DIFFSERVE", seconds=12, plan_every_ns=2 * NS_PER_S), tmp_path)
    steps = {round((b - a) / NS_PER_S) for a, b in pairwise(made.plans["t"][1:].tolist())}
    assert steps == {2}


def test_random_routing_is_worse_than_the_least_loaded_gpu(tmp_path: Path) -> None:
    options: dict[str, Any] = {"over_provision": 1.2, "drop_at": 1.5}
    least = run(spec_of("DIFFSERVE", "fixed_16", gpus=8, seconds=60, **options), tmp_path / "least")
    drawn = run(
        spec_of("DIFFSERVE", "fixed_16", gpus=8, seconds=60, routing="random", **options),
        tmp_path / "random",
    )
    assert shares(drawn)[0] < shares(least)[0] - 0.02
    check_books(least)
    check_books(drawn)


def test_with_aimd_batches_grow_and_are_halved(tmp_path: Path) -> None:
    made = run(spec_of("DIFFSERVE", "fixed_12", seconds=60, batching="aimd"), tmp_path)
    check_books(made)
    batches = made.plans["heavy_batch"].tolist()
    pairs = list(pairwise(batches))
    assert any(b > a for a, b in pairs) and any(b < a for a, b in pairs)
    assert all(b in (max(1, a // 2), a, 2 * a) for a, b in pairs[1:])


def test_without_the_queue_term_more_plans_are_feasible(tmp_path: Path) -> None:
    made = {
        term: run(
            spec_of("DIFFSERVE", "double_8to16", seconds=40, queue_term=term), tmp_path / str(term)
        )
        for term in (True, False)
    }
    with_term, without = (sum(made[term].plans["feasible"].tolist()) for term in (True, False))
    assert without >= with_term
    assert made[True].digest != made[False].digest


def test_a_drop_at_zero_drops_nothing(tmp_path: Path) -> None:
    made = run(spec_of("CLIPPER-HEAVY", "fixed_8", drop_at=0.0), tmp_path)
    assert "TIMED_OUT" not in made.codes, "what still waits is cancelled when the client leaves"
    assert max(made.requests["latency"].tolist()) > 8 * NS_PER_S


def test_a_fixed_batch_is_that_of_the_clippers(tmp_path: Path) -> None:
    made = run(spec_of("CLIPPER-LIGHT", "fixed_60", fixed_batch=2), tmp_path)
    assert max(made.stages["batch_size"].tolist()) == 2
    assert set(made.verdicts) == {"BLIND_LIGHT"}


def test_batch_sizes_that_the_cascade_lacks_are_not_planned() -> None:
    """The first plan has batches of 8 in the artifact; a small cascade may not offer them."""
    from slosched.core.scheduler.policies.published.diffserve.systems import _first_batch

    assert [_first_batch(sizes) for sizes in ((1, 2, 4), (1, 2, 4, 8, 16), (1,), (1, 16))] == [
        4,
        8,
        1,
        1,
    ]


# ------------------------------------------------------------------------------ what is lost


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["crash", "leave", "partition"])
def test_a_worker_that_dies_loses_no_request(policy: str, kind: str, tmp_path: Path) -> None:
    """It is there in both stages: GPUs take roles in order, so the first and the last one die."""
    faults = FaultPlan(
        tuple(
            Fault(kind, f"worker {worker}", at_s * NS_PER_S, for_ns=700 * MS)
            for worker, at_s in ((0, 5), (3, 8), (1, 11), (2, 11))
        )
    )
    made = run(spec_of(policy, "fixed_6", seconds=20, faults=faults), tmp_path)
    check_books(made)
    late = made.requests["t"] > made.requests["t"][0] + 18 * NS_PER_S
    assert made.requests["deadline_met"][late].mean() > 0.5, "it serves again"


@pytest.mark.parametrize("policy", POLICIES)
def test_all_workers_gone_and_back(policy: str, tmp_path: Path) -> None:
    """Without a GPU no policy asks to be woken for ever, and the next GPU is put to use."""
    crashes = tuple(
        Fault("crash", f"worker {worker}", 4 * NS_PER_S, for_ns=2 * NS_PER_S) for worker in range(2)
    )
    spec = spec_of(policy, "fixed_2", gpus=2, seconds=20, faults=FaultPlan(crashes))
    made = run(spec, tmp_path)
    check_books(made)
    late = made.requests["t"] > made.requests["t"][0] + 14 * NS_PER_S
    assert made.requests["deadline_met"][late].mean() > 0.5


@pytest.mark.parametrize("policy", POLICIES)
def test_weights_that_could_not_be_loaded_at_first_are_loaded_later(
    policy: str, tmp_path: Path
) -> None:
    spoilt = tuple(
        Fault("spoil", f"worker {worker} GPU 0", 0, for_ns=NS_PER_S, probability=1.0)
        for worker in range(2)
    )
    spec = spec_of(policy, "fixed_1", gpus=2, seconds=30, faults=FaultPlan(spoilt))
    made = run(spec, tmp_path)
    late = made.requests["t"] > made.requests["t"][0] + 15 * NS_PER_S
    assert made.requests["deadline_met"][late].mean() > 0.5


# ------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("policy", POLICIES)
def test_gpus_with_room_for_one_program_take_roles(policy: str, tmp_path: Path) -> None:
    made = run(spec_of(policy, memory_bytes=ONE), tmp_path)
    check_books(made)
    assert shares(made)[0] > 0.4
    of = {
        gpu: {
            stage
            for stage, worker, batch in zip(
                made.stages["model_id"].tolist(),
                made.stages["worker_id"].tolist(),
                made.stages["batch_size"].tolist(),
                strict=True,
            )
            if worker == gpu and batch
        }
        for gpu in range(4)
    }
    if policy == "DIFFSERVE-STATIC":
        assert all(len(stages) == 1 for stages in of.values()), "each has one role all along"
    if policy not in ("CLIPPER-LIGHT", "CLIPPER-HEAVY"):
        assert len({stage for stages in of.values() for stage in stages}) == 2


def test_requests_that_no_gpu_can_serve_any_more_are_answered(tmp_path: Path) -> None:
    """One GPU with room for one program: the first plan defers all, and the second has no heavy GPU."""
    made = run(spec_of("DIFFSERVE", gpus=1, memory_bytes=ONE), tmp_path)
    check_books(made)
    assert set(made.codes) == {"OK", "TIMED_OUT"}
    assert max(made.requests["latency"].tolist()) < 7 * NS_PER_S


# --------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("policy", ["CASCADE", "DIFFSERVE"])
def test_sixty_four_gpus(policy: str, tmp_path: Path) -> None:
    made = run(spec_of(policy, "fixed_100", gpus=64, seconds=12), tmp_path)
    check_books(made)
    in_time, heavy = shares(made)
    # Theirs defers everything for the first five seconds.
    assert in_time > (0.99 if policy == "CASCADE" else 0.6) and heavy > 0.2
    assert len(set(made.stages["worker_id"].tolist())) > 50
