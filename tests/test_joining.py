"""Joining a running batch at a step, simulated: every request gets its own steps, in time, and no GPU does more
than its profile says."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice, pairwise

import pytest

from slosched.cascade.joining import (
    AT_START,
    JOINING,
    RULES,
    WITH_ROOM,
    Capacity,
    Served,
    Span,
    Stage,
    StepTimes,
    capacity,
    room_size,
    simulate,
)
from slosched.errors import InvalidConfig, UnknownName
from slosched.gpu_profile import ModelProfile
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.arrivals import PoissonArrivals

STEPS = 50
#: exec 1.78 s for one, 2.16 s for two, and 0.78 s for each further one: SD v1.5's, about.
EXEC_MS = {1: 1780, 2: 2160, 4: 3680, 8: 6790}
SLO_NS = 5 * NS_PER_S


def model(**more: object) -> ModelProfile:
    exec_ns = {batch: ms * NS_PER_MS for batch, ms in EXEC_MS.items()}
    return ModelProfile(name="heavy", exec_ns=exec_ns, weights_ns=0, weights_bytes=0, **more)  # type: ignore[arg-type]


TIMES = StepTimes.of(model(), STEPS)
#: A twentieth of each exec comes behind the steps.
TAILED = StepTimes.of(
    model(
        steps=STEPS,
        step_ns={batch: ms * NS_PER_MS * 95 // 100 // STEPS for batch, ms in EXEC_MS.items()},
    ),
    STEPS,
)
STAGES = {
    "one GPU": Stage(TIMES, SLO_NS),
    "three GPUs": Stage(TIMES, SLO_NS, gpus=3),
    "with a tail": Stage(TAILED, SLO_NS, gpus=2),
    "with pauses": Stage(TAILED, SLO_NS, gpus=2, light_share=0.13),
}


def arrivals(stage: Stage, load: float, seed: int, count: int = 300) -> list[int]:
    rate = load * stage.gpus * capacity(stage.times, stage.slo_ns).per_s
    return list(islice(PoissonArrivals(rate, seed), count))


def traced(stage: Stage, arrivals_ns: list[int], rule: str) -> tuple[Served, list[Span]]:
    spans: list[Span] = []
    return simulate(stage, arrivals_ns, rule, on_span=spans.append), spans


every_run = pytest.mark.parametrize(
    ("name", "rule", "load"),
    [(name, rule, load) for name in STAGES for rule in RULES for load in (0.3, 0.9, 1.5)],
)


@every_run
def test_every_request_gets_its_own_steps_and_no_others(name: str, rule: str, load: float) -> None:
    stage = STAGES[name]
    served, spans = traced(stage, arrivals(stage, load, seed=1), rule)
    assert len(served.answers) > 30
    by_gpu = defaultdict(list)
    for span in spans:
        by_gpu[span.gpu].append(span)
    for answer in served.answers:
        aboard = [s for s in by_gpu[answer.gpu] if answer.start_ns <= s.start_ns < answer.end_ns]
        assert sum(span.steps for span in aboard) == STEPS
        assert (aboard[0].start_ns, aboard[-1].end_ns) == (answer.start_ns, answer.end_ns)
    # And the sizes are of exactly these requests.
    assert sum(s.steps * s.size for s in spans) == STEPS * len(served.answers)


@every_run
def test_a_gpu_does_one_step_at_a_time_and_no_faster_than_its_profile(
    name: str, rule: str, load: float
) -> None:
    stage = STAGES[name]
    served, spans = traced(stage, arrivals(stage, load, seed=2), rule)
    ends: dict[int, int] = {}
    for span in spans:
        assert span.start_ns >= ends.get(span.gpu, 0)
        ends[span.gpu] = span.end_ns
        assert span.end_ns - span.start_ns >= span.steps * stage.times.step_ns[span.size - 1]
    least_ns = min(stage.times.run_ns(b) / b for b in range(1, stage.times.largest + 1))
    assert served.gpu_ns >= 0.9999 * least_ns
    pure_ns = sum(s.end_ns - s.start_ns for s in spans) * (1 - stage.light_share)
    assert served.busy_ns == pytest.approx(pure_ns, rel=1e-6)


@every_run
def test_no_answer_is_late_and_no_request_is_served_twice_or_early(
    name: str, rule: str, load: float
) -> None:
    stage = STAGES[name]
    due_ns = arrivals(stage, load, seed=3)
    served = simulate(stage, due_ns, rule)
    assert served.offered == len(due_ns) and served.in_time == len(served.answers) / len(due_ns)
    for answer in served.answers:
        assert answer.arrival_ns <= answer.start_ns < answer.end_ns
        assert answer.end_ns <= answer.arrival_ns + stage.slo_ns
    answered = [answer.arrival_ns for answer in served.answers]
    assert len(set(answered)) == len(answered) and set(answered) <= set(due_ns)


@pytest.mark.parametrize("name", STAGES)
def test_a_request_alone_is_served_the_same_by_every_rule(name: str) -> None:
    stage = STAGES[name]
    alone = {rule: simulate(stage, [7], rule) for rule in RULES}
    first = alone[AT_START]
    assert all(served == first for served in alone.values())
    assert first.mean_ns == stage.times.slowed(stage.light_share).run_ns(1)
    assert first.gpu_ns == stage.times.run_ns(1)


@pytest.mark.parametrize("rule", RULES)
def test_the_same_arrivals_give_the_same_answers(rule: str) -> None:
    stage = STAGES["three GPUs"]
    once, again, other = (simulate(stage, arrivals(stage, 0.9, seed), rule) for seed in (1, 1, 2))
    assert once == again != other


def test_one_that_joins_waits_for_a_step_and_not_for_the_run() -> None:
    stage, at_ns = STAGES["one GPU"], NS_PER_S
    ends = {
        rule: [each.end_ns for each in simulate(stage, [0, at_ns], rule).answers] for rule in RULES
    }
    one_ns, two_ns = TIMES.step_ns[:2]
    assert ends[AT_START] == [STEPS * one_ns, 2 * STEPS * one_ns]
    joins = -(-at_ns // one_ns)  # the boundary behind its arrival
    first_ns = joins * one_ns + (STEPS - joins) * two_ns
    assert ends[JOINING] == ends[WITH_ROOM] == [first_ns, first_ns + joins * one_ns]


def test_none_joins_that_would_make_one_aboard_late() -> None:
    """The SLO allows five at once; a sixth would make all late, and waits until the first are done."""
    stage = Stage(TIMES, 4700 * NS_PER_MS)
    assert capacity(TIMES, stage.slo_ns).size == 5
    due_ns = [0, 1, 2, 3, 4, NS_PER_S]
    served, spans = traced(stage, due_ns, JOINING)
    assert max(span.size for span in spans) == 5 and served.in_time == 5 / 6


def test_a_request_goes_to_the_least_crowded_gpu() -> None:
    served = simulate(STAGES["three GPUs"], [0, 1, 2, 3, 4, 5], JOINING)
    counts = [sum(answer.gpu == gpu for answer in served.answers) for gpu in range(3)]
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("load", [0.4, 0.7])
def test_the_latencies_are_those_of_queueing_theory(load: float) -> None:
    """Batches of one are an M/D/1 queue; joining, where a batch saves nothing, is processor sharing."""
    step_ns, steps = NS_PER_MS, 20
    alone = Stage(StepTimes(steps, (step_ns,), (0,)), 10**6 * NS_PER_S)
    shared_ns = tuple(size * step_ns for size in range(1, 101))
    shared = Stage(StepTimes(steps, shared_ns, (0,) * 100), 10**6 * NS_PER_S)
    run_ns = steps * step_ns
    due_ns = list(islice(PoissonArrivals(load / run_ns * NS_PER_S, 1), 8000))
    waits_ns = run_ns * load / (2 * (1 - load))
    assert simulate(alone, due_ns, AT_START).mean_ns == pytest.approx(run_ns + waits_ns, rel=0.05)
    # And about half of a step until the next boundary.
    expected_ns = run_ns / (1 - load)
    assert simulate(shared, due_ns, JOINING).mean_ns == pytest.approx(expected_ns, rel=0.07)


def test_an_overload_does_not_make_batches_small_where_room_is_kept() -> None:
    stage = Stage(TIMES, SLO_NS, gpus=8)
    due_ns = arrivals(stage, 1.3, seed=1, count=1000)
    served = {rule: simulate(stage, due_ns, rule) for rule in RULES}
    assert served[WITH_ROOM].in_time > served[AT_START].in_time > served[JOINING].in_time
    assert served[WITH_ROOM].gpu_ns < served[JOINING].gpu_ns


def test_what_arrives_before_the_count_begins_is_served_and_not_counted() -> None:
    served = simulate(STAGES["one GPU"], [0, NS_PER_S], JOINING, since_ns=1)
    assert (served.offered, len(served.answers), served.all_answers) == (1, 1, 2)
    nothing = simulate(STAGES["one GPU"], [], JOINING)
    assert nothing.offered == 0 and nothing.in_time == 1 and nothing.mean_ns != nothing.mean_ns


def test_step_times_come_from_the_profile() -> None:
    assert TIMES.largest == TAILED.largest == 8
    assert TIMES.run_ns(1) == TAILED.run_ns(1) == 1780 * NS_PER_MS
    assert TIMES.tail_ns == (0,) * 8 and TAILED.tail_ns[0] == 89 * NS_PER_MS
    assert TIMES.run_ns(3) == 2920 * NS_PER_MS  # between two and four
    assert all(a < b for a, b in pairwise(TIMES.step_ns))
    assert all(
        slow == 2 * fast
        for slow, fast in zip(TIMES.slowed(0.5).step_ns, TIMES.step_ns, strict=True)
    )


def test_the_capacity_is_that_of_the_best_size_in_time() -> None:
    assert capacity(TIMES, 4 * NS_PER_S) == Capacity(4 / 3.68, 4, 0.0)
    with_light = capacity(TIMES, 4 * NS_PER_S, light_ns=80 * NS_PER_MS)
    assert with_light.size == 4
    assert with_light.light_share == pytest.approx(0.08)
    assert with_light.per_s == pytest.approx(1.0)
    assert capacity(TIMES, NS_PER_S) == Capacity(0.0, 0, 0.0)
    assert [room_size(TIMES, 4 * NS_PER_S, gpus) for gpus in (1, 8)] == [3, 4]


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(UnknownName, match="rule"):
        simulate(STAGES["one GPU"], [], "leaving")
    with pytest.raises(InvalidConfig, match="ascend"):
        simulate(STAGES["one GPU"], [2, 1], JOINING)
    with pytest.raises(InvalidConfig, match="at least one step"):
        StepTimes.of(model(), 0)
    with pytest.raises(InvalidConfig, match="has 50 steps, not 20"):
        StepTimes.of(model(steps=50, step_ns=dict.fromkeys(EXEC_MS, 1)), 20)
    with pytest.raises(InvalidConfig, match="each batch size"):
        StepTimes(1, (1, 2), (0,))
    with pytest.raises(InvalidConfig, match="above 0"):
        StepTimes(1, (0,), (0,))
    with pytest.raises(InvalidConfig, match="at least one GPU"):
        Stage(TIMES, SLO_NS, gpus=0)
    with pytest.raises(InvalidConfig, match="light_share"):
        TIMES.slowed(1.0)
