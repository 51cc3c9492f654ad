"""SMART: its timetable, its epochs, its placement and what it drops."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_messages import an_error, an_infer_result
from scheduler_rig import MS, T0, Rig
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.scheduler.policies.published.smart import _Durations
from slosched.core.scheduler.policies.published.smart_timetable import Batch, timetable
from slosched.core.scheduler.residency import add_residency
from slosched.core.scheduler.state import Instance
from slosched.messages import (
    EvictWeights,
    Infer,
    LoadWeights,
    Span,
)
from slosched.sim.harness import Demand, Network, Outcome, Simulation
from slosched.units import NS_PER_S
from slosched.workloads.slo_exp_1 import parse_slo_exp_1

SMART = SchedulerConfig(policy="SMART")
MODEL = Instance(0, "net", 0)


# ------------------------------------------------------------------------------- the timetable


def batch(deadline: int, duration: int, earliest: int = 0) -> Batch:
    return Batch(MODEL, [], duration, earliest, deadline)


def starts(batches: list[Batch]) -> tuple[dict[int, int], list[int]]:
    """(position in `batches` -> start, positions of those without a place)."""
    placed, stash = timetable(batches)
    found = {batches.index(b): b.start_ns for b in placed}
    return found, [batches.index(b) for b in stash]


def test_batches_without_conflict_keep_their_order_and_move_to_the_left() -> None:
    assert starts([batch(30, 5), batch(10, 5), batch(20, 5)]) == ({1: 0, 2: 5, 0: 10}, [])
    assert starts([batch(10, 5, 3), batch(30, 5, 20)]) == ({0: 3, 1: 20}, [])


def test_conflicting_ones_fill_holes_from_the_latest_time_on() -> None:
    # 40 stands alone at 35; the others overlap. 30 goes to 25..30 and 31, for which nothing is left
    # between 30 and 31, before it to 20..25; then all move to the left.
    assert starts([batch(40, 5), batch(30, 5), batch(31, 5)]) == ({2: 0, 1: 5, 0: 10}, [])


def test_room_that_moving_to_the_left_makes_is_used_at_the_end() -> None:
    # They overlap. 10 takes 2..10, which leaves no hole of 3 before it and none behind it until 12.
    # When it has moved to 0..8 there is.
    assert starts([batch(10, 8), batch(12, 3)]) == ({0: 0, 1: 8}, [])


def test_what_fits_nowhere_stays_in_the_stash() -> None:
    found, stash = starts([batch(10, 6), batch(10, 6), batch(12, 2)])
    assert found == {0: 0, 2: 6} and stash == [1]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(0, 60)),
        max_size=12,
    )
)
def test_no_place_overlaps_another_begins_too_early_or_ends_too_late(
    shapes: list[tuple[int, int, int]],
) -> None:
    batches = [batch(e + d + slack, d, e) for e, d, slack in shapes]
    placed, stash = timetable(batches)
    assert sorted(map(id, placed + stash)) == sorted(map(id, batches))
    assert all(a.end_ns <= b.start_ns for a, b in pairwise(placed))
    assert all(b.earliest_ns <= b.start_ns and b.end_ns <= b.deadline_ns for b in placed)
    assert bool(placed) == bool(batches)


# ----------------------------------------------------------------------------- golden decisions


def warm(copies: int = 1, gpus: int = 1) -> tuple[Rig, tuple[int, ...]]:
    """A rig whose models were loaded for one request each, which expired; idle at T0 + 100 ms."""
    rig, models = Rig.ready(SMART, copies=copies, gpus=gpus)
    ids = tuple(m.model_id for m in models)
    for position, model in enumerate(ids):
        rig.now_ns = T0 + 20 * position * MS
        request = rig.infer(model, slo_ms=19)
        rig.step(20 * position + 1)
        rig.now_ns = T0 + (20 * position + 14) * MS
        rig.weights_loaded()
        rig.step(20 * position + 16)
        assert rig.reply(request).code == 4
    rig.now_ns = T0 + 100 * MS
    rig.effects.clear()
    return rig, ids


def sent(rig: Rig) -> list[tuple[int, int, float]]:
    """(model, batch, latest start in ms from T0) of every Infer, in order."""
    return [(a.model_id, a.batch_size, (a.latest_ns - T0) / MS) for a in rig.to_worker(Infer)]


def test_it_decides_once_in_a_millisecond_and_only_while_something_waits() -> None:
    rig, (model,) = warm()
    assert rig.scheduler.next_wakeup_ns() != T0 + 101 * MS
    rig.now_ns = T0 + 100 * MS + 300_000
    rig.infer(model, slo_ms=100)
    rig.step()
    assert not rig.to_worker(Infer)
    assert rig.scheduler.next_wakeup_ns() == T0 + 101 * MS
    rig.step(100.9)
    assert not rig.to_worker(Infer)
    rig.step(101)
    # It starts 2 ms after the decision, or up to 1.5 ms later.
    assert sent(rig) == [(model, 1, 104.5)]


def test_batches_are_as_large_as_the_queue_and_go_by_deadline() -> None:
    rig, (a, b) = warm(copies=2)
    for _ in range(7):
        rig.infer(a, slo_ms=100)
    rig.infer(b, slo_ms=60)
    rig.step(101)
    # 7 = 4 + 2 + 1; b is the most urgent. 103..105, then 105..110, and what starts after 108 waits.
    assert sent(rig) == [(b, 1, 104.5), (a, 4, 106.5)]
    assert len(rig.scheduler.cluster.models[a].queue.requests) == 3


def test_a_batch_is_no_larger_than_its_first_deadline_allows() -> None:
    rig, (model,) = warm()
    for _ in range(8):
        rig.infer(model, slo_ms=13)  # internally 9 ms: until 109; all eight would run until 112
    rig.step(101)
    assert sent(rig) == [(model, 4, 104.5)]


@pytest.mark.parametrize(
    ("slo_ms", "served"),
    [
        (9.01, True),  # 4 ms early: 105.01, and 103 + 2 ms is in time
        (8.99, False),
        (20, True),
        (3, False),  # the deadline it is planned by has passed before it arrived
    ],
)
def test_the_deadline_is_taken_early_and_the_hopeless_are_dropped(
    slo_ms: float, served: bool
) -> None:
    rig, (model,) = warm()
    request = rig.infer(model, slo_ms=slo_ms)
    rig.step(101)
    assert len(rig.to_worker(Infer)) == served
    if not served:
        assert rig.reply(request).code == 4
        assert "no place was found: waited 1ms, could start in 2ms" in rig.reply(request).reason


def test_a_failed_action_fails_its_requests() -> None:
    rig, (model,) = warm()
    request = rig.infer(model, slo_ms=100)
    rig.step(101)
    (infer,) = rig.to_worker(Infer)
    rig.from_worker(an_error(infer.session, infer.action_id, 81, "late", action_type=2))
    rig.step(106)
    assert rig.reply(request).code == 81


def test_an_estimate_is_the_longest_and_from_a_hundred_samples_on_the_99th() -> None:
    durations = _Durations(5 * MS)
    assert durations.work == 5 * MS * 1380
    for duration_ms in (3, 1, 2):  # the first replaces the profile's
        durations.add(duration_ms * MS, 1000)
        assert durations.work == 3 * MS * 1000
    for _ in range(96):
        durations.add(MS, 1000)
    assert durations.work == 3 * MS * 1000
    durations.add(MS, 1000)  # the hundredth: the longest is left out
    assert durations.work == 2 * MS * 1000
    durations.add(4 * MS, 1000)  # pushes the 3 ms out
    assert durations.work == 2 * MS * 1000
    durations.add(4 * MS, 1000)
    assert durations.work == 4 * MS * 1000


def test_plans_follow_what_was_measured_at_the_clock_of_the_gpu() -> None:
    rig, (model,) = warm()
    # The longest is 2 ms at 1380 MHz, which is 4 ms on a GPU that went down to 690.
    for at_ms, clock_mhz, expected_ms in ((100, 1380, 2), (110, 690, 2), (120, 690, 4)):
        rig.now_ns = T0 + at_ms * MS
        rig.infer(model, slo_ms=100)
        rig.step(at_ms + 1)
        (infer,) = rig.outstanding()
        assert infer.expected_duration_ns == expected_ms * MS
        rig.now_ns = T0 + (at_ms + 6) * MS
        begin_ns = T0 + (at_ms + 3) * MS
        span = Span(begin_ns, begin_ns + 2 * MS, 2 * MS)
        rig.from_worker(
            an_infer_result(
                infer.session,
                infer.action_id,
                span,
                gpu_clock_before_mhz=clock_mhz,
                gpu_clock_mhz=clock_mhz,
                received_ns=infer.earliest_ns,
                sent_ns=span.end_ns,
            )
        )
        rig.step()


# ------------------------------------------------------------------------------------- weights


def test_the_most_asked_for_model_goes_first_and_each_to_the_least_loaded_gpu() -> None:
    rig, models = Rig.ready(SMART, copies=3, gpus=2)
    ids = [m.model_id for m in models]
    for model, count in zip(ids, (1, 2, 3), strict=True):
        for _ in range(count):
            rig.infer(model, slo_ms=100)
    rig.step(1)
    # Loads: 3 x 2 + 8 on GPU 0, 2 x 2 + 8 on GPU 1, which has less: the third goes there later.
    loads = [(a.model_id, a.gpu_id) for a in rig.to_worker(LoadWeights)]
    assert loads == [(ids[2], 0), (ids[1], 1)]
    assert {a.latest_ns for a in rig.to_worker(LoadWeights)} == {T0 + round(4.5 * MS)}
    for at_ms in range(2, 9):  # the bus is taken until 3 + 8 + 1.5 ms; the window is 3 ms
        rig.step(at_ms)
    assert len(rig.to_worker(LoadWeights)) == 2
    rig.step(10)
    assert [(a.model_id, a.gpu_id) for a in rig.to_worker(LoadWeights)][2:] == [(ids[0], 1)]


def test_nothing_is_sent_before_the_weights_are_there() -> None:
    rig, (model,) = Rig.ready(SMART)
    rig.infer(model.model_id, slo_ms=100)
    for at_ms in range(1, 12):
        rig.step(at_ms)
    assert not rig.to_worker(Infer) and len(rig.to_worker(LoadWeights)) == 1
    rig.now_ns = T0 + 12 * MS
    rig.weights_loaded()
    rig.step(13)
    assert len(rig.to_worker(Infer)) == 1


def test_who_cannot_wait_for_the_weights_is_dropped_before_they_are_asked_for() -> None:
    rig, (model,) = Rig.ready(SMART, gpus=1)
    # 1 + 2 + 1.5 + 8 + 2 ms is later than 18 - 4.
    hopeless = rig.infer(model.model_id, slo_ms=18)
    rig.step(1)
    assert rig.reply(hopeless).code == 4


def test_the_least_recently_used_is_evicted_and_the_load_follows_when_the_bus_is_free() -> None:
    rig, models = Rig.ready(SMART, copies=3, pages=2)
    a, b, c = (m.model_id for m in models)
    for position, model in enumerate((a, b, a)):
        rig.now_ns = T0 + position * 30 * MS
        rig.infer(model, slo_ms=28)
        rig.step(position * 30 + 1)
        rig.now_ns = T0 + (position * 30 + 13) * MS
        rig.weights_loaded()
        for at_ms in (14, 15, 16):
            rig.step(position * 30 + at_ms)
        for infer in rig.outstanding():
            rig.now_ns = T0 + (position * 30 + 21) * MS
            rig.finish(infer, begin_ms=(infer.earliest_ns - T0) / MS + 1)
        rig.step()
    rig.effects.clear()
    rig.now_ns = T0 + 100 * MS
    rig.infer(c, slo_ms=100)
    rig.step(101)
    assert [x.model_id for x in rig.to_worker(EvictWeights)] == [b]
    assert not rig.to_worker(LoadWeights)  # the eviction takes the bus until 103 + 1 + 1.5 ms
    rig.step(102)
    assert not rig.to_worker(LoadWeights)
    rig.step(103)
    assert [x.model_id for x in rig.to_worker(LoadWeights)] == [c]


def test_a_failed_load_is_found_out_and_tried_again() -> None:
    rig, (model,) = Rig.ready(SMART)
    rig.infer(model.model_id, slo_ms=1000)
    rig.step(1)
    (load,) = rig.to_worker(LoadWeights)
    rig.from_worker(an_error(load.session, load.action_id, 51, "late", action_type=1))
    rig.step(6)
    assert len(rig.to_worker(LoadWeights)) == 1  # a pause of 100 ms
    rig.step(107)
    assert len(rig.to_worker(LoadWeights)) == 2


def test_requests_are_dealt_out_to_the_gpus_that_hold_their_model() -> None:
    rig, (model,) = warm(gpus=2)
    cluster = rig.scheduler.cluster
    other = next(g for g in cluster.gpus.values() if model not in g.resident)
    other.free_pages -= 1  # as if it had been copied there; the policy never does
    add_residency(other, cluster.models[model])
    cluster.changes.execs(other)
    ids = [rig.infer(model, slo_ms=100) for _ in range(4)]
    rig.step(101)
    taken = {
        action.gpu.gpu_id: [r.request_id for r in action.requests]
        for action in cluster.actions.values()
    }
    assert taken == {0: ids[::2], 1: ids[1::2]}


def test_the_last_gpu_takes_the_queue_with_it() -> None:
    rig, (model,) = Rig.ready(SMART)
    request = rig.infer(model.model_id, slo_ms=100_000)
    for at_ms in range(160, 1200, 160):
        rig.step(at_ms)
    assert rig.reply(request).code == 1
    late = rig.infer(model.model_id)
    rig.step()
    assert rig.reply(late).code == 8


# ------------------------------------------------------------------------------ in virtual time


def run(rate: float, factor: float, seconds: int = 1) -> Outcome:
    network = Network(to_worker_ns=900_000, from_worker_ns=250_000)
    simulation = Simulation(SMART, load_profile("fig7"), network=network)
    models = simulation.load("resnet50", 12)
    simulation.run(models, [Demand(i * 3 * MS, i % 12, 0.0, NS_PER_S) for i in range(48)])
    simulation.outcome = Outcome()
    spec = parse_slo_exp_1(f"net 12 poisson {rate} {factor} {factor} 2 mul {seconds}".split())
    demands = [Demand(a.at_ns, a.user_id, a.slo_factor, a.slo_ns) for a in spec.arrivals(1)]
    return simulation.run(models, demands)


def test_it_serves_a_moderate_load_and_batches_a_high_one() -> None:
    assert run(600, 7.59375).satisfaction() > 0.995
    crowded = run(2400, 17.1)
    assert crowded.satisfaction() > 0.93
    assert {r.code for r in crowded.requests} <= {0, 4}
    assert sum(r.batch_size for r in crowded.requests) / len(crowded.requests) > 1.3
    # What runs is in time, less what the constants of the network get wrong.
    served = [r for r in crowded.requests if r.code == 0]
    assert sum(r.deadline_met for r in served) / len(served) > 0.995


def test_cold_models_come_and_go_within_the_pages_there_are() -> None:
    small = ModelProfile("net", {1: 2 * MS, 2: 3 * MS, 4: 5 * MS}, 4 * MS, 3 * 2**24)
    profile = GpuProfile("small", {"net": small}, weights_cache_bytes=8 * 2**24)
    simulation = Simulation(SMART, profile, gpus_per_worker=(2,))
    models = simulation.load("net", 8)
    demands = [Demand(i * 20 * MS, (i // 10) % 8, 0.0, 100 * MS) for i in range(400)]
    outcome = simulation.run(models, demands)
    assert outcome.satisfaction() > 0.95
    assert sum(r.cold for r in outcome.requests) > 20


def test_a_flood_of_lenient_requests_is_planned_in_parts() -> None:
    net = ModelProfile("net", {1: 2 * MS}, 4 * MS, 2**24)
    profile = GpuProfile("one", {"net": net}, weights_cache_bytes=2**27)
    simulation = Simulation(SMART, profile, gpus_per_worker=(1,))
    models = simulation.load("net", 1)
    demands = [Demand(i, 0, 0.0, 20 * NS_PER_S) for i in range(200)]
    outcome = simulation.run(models, demands)
    assert outcome.satisfaction() == 1.0
