"""Programs in steps whose parts are cut too, in virtual time: boundaries within a step, right bytes, fallbacks.

Each node of a part leaves its result in the graph pool for the next one, and the last alone makes it right.
"""

from __future__ import annotations

from typing import Any

import pytest

from fake_cuda import MS, STEP_SHARE, FakeDriver, SteppedProgram
from slosched.daemon.backends.cuda.choice import TOO_SLOW, Wish
from slosched.daemon.backends.cuda.cutting import Cutter
from slosched.daemon.backends.cuda.cutting_parts import PartCutter
from slosched.daemon.backends.cuda.driver import DeviceFault, OutOfDeviceMemory
from slosched.daemon.backends.cuda.groups import Ends, Group, bounds_of, halved
from slosched.daemon.backends.cuda.program import Class, Cut
from slosched.daemon.backends.cuda.steps import SteppedRun
from slosched.daemon.backends.cuda.timing import StepTimes, Stopwatch
from test_cuda_cutting import Prepared as Whole
from test_cuda_preemption import LONG_NS, SHORT_NS, US, Rig, interrupted
from test_cuda_steps import Prepared

STEPS, NODES = 5, 60
#: The first and the last part take 4 ms each, and a step 14.4 ms.
WHOLE_NS = 80 * MS
STEP_NS, REST_NS = round(WHOLE_NS * STEP_SHARE / STEPS), round(WHOLE_NS * (1 - STEP_SHARE) / 2)
FINE = Wish(part_ns=MS)


def made(exec_ns: int = WHOLE_NS, *, wish: Wish = FINE, **more: Any) -> Prepared:
    more = {"steps": STEPS, "nodes": NODES} | more
    return Prepared({1: exec_ns}, wish=wish, **more)


def cut_of(prepared: Prepared) -> Cut:
    cut = prepared.program.cut_of(Class(1))
    assert cut is not None
    return cut


def at_each_step(prepared: Prepared, why: str) -> None:
    """It can be interrupted between its parts alone, a note says why, and no graph is left behind."""
    cut = cut_of(prepared)
    assert cut.boundary_ns == pytest.approx(STEP_NS, rel=0.02) and len(cut.segment_ns) <= STEPS + 2
    assert "between its parts alone" in cut.note and why in cut.note
    assert any(why in note for note in prepared.notes)
    assert prepared.driver.graphs == 2 * 3, "three parts of two sets"
    prepared.program.release()
    assert prepared.driver.graphs == 0


def test_a_boundary_comes_every_millisecond_and_a_step_is_predicted_as_before() -> None:
    fine, coarse = made(), made(wish=Wish())
    cut = cut_of(fine)
    assert cut.boundary_ns <= 1.13 * MS and cut.in_flight == 1 and not cut.note
    assert len(cut.segment_ns) >= WHOLE_NS / (1.13 * MS)
    assert sum(cut.segment_ns) == pytest.approx(WHOLE_NS, rel=0.01)
    assert fine.profile.step_ns[1] == pytest.approx(coarse.profile.step_ns[1], rel=0.002)
    bubbles_ns = cut.bubble_ns * len(cut.bounds)
    assert fine.profile.exec_ns[1] == pytest.approx(WHOLE_NS + bubbles_ns, rel=0.01)
    assert cut_of(coarse).boundary_ns == pytest.approx(STEP_NS, rel=0.02)


def test_the_segments_of_a_step_are_made_once_and_each_step_has_the_same() -> None:
    prepared = made()
    for run in prepared.program.stepped_runs(Class(1)):
        assert len(run.parts) == len(run.pieces.begin) + STEPS * len(run.pieces.step) + len(
            run.pieces.finish
        )
        assert 14 <= len(run.pieces.step) <= 18 and len(run.launches) > STEPS * 14
    graphs = sum(sum(map(len, run.pieces)) for run in prepared.program.stepped_runs(Class(1)))
    assert prepared.driver.graphs == graphs < 2 * 30
    times = cut_of(prepared).segment_ns
    assert len(set(times)) < 2 + 30, "the segments of each step take what those of the others take"
    prepared.program.release()
    assert prepared.driver.graphs == 0


def test_short_parts_stay_whole_and_several_steps_may_make_a_segment() -> None:
    """The first part of 2 ms is cut; of the steps of 0.36 ms two make a segment."""
    prepared = made(40 * MS, steps=100)
    run = prepared.program.stepped_runs(Class(1))[0]
    assert len(run.pieces.begin) in (2, 3) and len(run.pieces.step) == 1
    assert len(cut_of(prepared).segment_ns) <= 60
    assert cut_of(prepared).boundary_ns <= 1.13 * MS
    whole = made(8 * MS, steps=10)  # steps of 0.72 ms, and 0.4 ms at the ends
    assert not any(len(part) > 1 for part in whole.program.stepped_runs(Class(1))[0].pieces)
    assert not cut_of(whole).note


def test_boundaries_that_cost_more_come_less_often() -> None:
    lengths = []
    for gap_ns in (2_000, 60_000):
        cut = cut_of(made(gap_ns=gap_ns))
        more = len(cut.bounds) - (STEPS + 1)  # than between its parts
        assert gap_ns * more <= 0.031 * WHOLE_NS
        lengths.append(cut.boundary_ns)
    assert lengths[0] <= 1.13 * MS < 1.5 * MS < lengths[1] <= 9 * MS
    cut = cut_of(made(gap_ns=700_000))
    assert len(cut.segment_ns) <= STEPS + 2 and "slow it down by more than 2%" in cut.note


def test_a_segment_that_is_very_short_is_not_worth_a_boundary() -> None:
    groups = [Group(0, 1, 1_200), Group(1, 2, 5), Group(2, 3, 1_000), Group(3, 4, 400)]
    assert bounds_of(groups, 1_000) == (1, 2, 3)
    assert bounds_of(groups, 1_000, least_ns=125) == (2, 3)
    groups = [Group(0, 1, 1_200), Group(1, 2, 5), Group(2, 3, 1_200), Group(3, 4, 5)]
    assert bounds_of(groups, 1_000, least_ns=125) == (2,)


class Uneven(SteppedProgram):
    """Half of a step's time lies in a tenth of its nodes."""

    def _work(self, takes_ns: int, action: Any, result: Any) -> None:
        super()._work(takes_ns, action, result)
        recorded: list[Any] = self.driver._captures.get(self._stream, [])
        if takes_ns < 50 * MS or not recorded:
            return
        long, short = self.nodes // 10, self.nodes - self.nodes // 10
        for node, (_, does) in enumerate(list(recorded)):
            recorded[node] = (round(takes_ns / 2 / (long if node < long else short)), does)


def test_where_more_groups_are_needed_than_can_be_timed_the_longest_are_halved() -> None:
    groups = [Group(4 * each, 4 * each + 4, 900 + each) for each in range(6)]
    assert halved(groups, 100, Ends(), most=8)[:4] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert len(halved(groups, 100, Ends(), most=8)) == 8
    cut = cut_of(made(200 * MS, steps=3, nodes=600, kind=Uneven))  # steps of 60 ms
    assert cut.boundary_ns <= 1.2 * MS and not cut.note


# ----------------------------------------------------------------------------------- fallbacks


class Branched(SteppedProgram):
    """The captured parts in `branches` form no chains, in each set."""

    branches: tuple[int, ...] = (0, 1, 2)

    def _end_capture(self, token: Any) -> Any:
        captured = super()._end_capture(token)
        self.captures = getattr(self, "captures", -1) + 1
        captured.branched = self.captures % 3 in self.branches
        return captured


class LastBranched(Branched):
    branches = (2,)


def test_pieces_that_are_shorter_than_they_seemed_are_not_worth_a_boundary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = Stopwatch.steps

    def shorter(self: Stopwatch, run: SteppedRun, for_ns: int, *, most: int = 0) -> StepTimes:
        times = steps(self, run, for_ns, most=most)
        if len(run.pieces.step) == 1:
            return times
        parts = ([max(1, ns // 1000) for ns in part] for part in times[1:])
        return StepTimes(times.steps, *parts)

    monkeypatch.setattr(Stopwatch, "steps", shorter)
    at_each_step(made(), TOO_SLOW)


def test_what_is_no_chain_stays_whole() -> None:
    at_each_step(made(kind=Branched), "not chains")
    prepared = made(kind=LastBranched)
    cut = cut_of(prepared)
    assert cut.boundary_ns == pytest.approx(REST_NS, rel=0.01)
    assert cut.note == "its last part in one piece: not a chain"
    assert len(cut.segment_ns) > STEPS * 14


def test_a_part_of_one_node_stays_whole() -> None:
    prepared = made(nodes=1, wish=Wish(part_ns=5 * MS))
    at_each_step(prepared, "no part has a place")


@pytest.mark.parametrize("fault", ["pool", "left out", "memory", "refused"])
def test_pieces_that_cannot_be_had_or_answer_otherwise_are_given_up(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment, count = FakeDriver.segment, 0

    def spoilt(
        self: FakeDriver, captured: Any, chain: Any, begin: int, end: int, active: int | None
    ) -> Any:
        nonlocal count
        count += 1
        if fault == "memory" and count > 70:
            raise OutOfDeviceMemory("no room")
        if fault == "refused" and count > 70:
            raise DeviceFault("this graph cannot be cloned")
        graph = segment(self, captured, chain, begin, end, active)
        if fault == "pool" and begin:
            graph.later = False  # it writes over the pool first
        if fault == "left out" and begin and end < len(chain) and len(graph.steps) > 1:
            graph.steps.pop()
        return graph

    monkeypatch.setattr(FakeDriver, "segment", spoilt)
    why = {"memory": "no room", "refused": "cannot be cloned"}.get(fault, "answers otherwise")
    at_each_step(made(), why)


def test_a_device_that_is_lost_meanwhile_is_not_taken_for_a_graph_that_cannot_be_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(self: FakeDriver, *args: Any) -> Any:
        self.fault = "the GPU has gone"
        self.check()

    monkeypatch.setattr(FakeDriver, "segment", lost)
    with pytest.raises(DeviceFault, match="has gone"):
        made()


def test_the_comparison_disturbs_the_pool_between_parts_and_all_else_within_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    launch = PartCutter._launch_disturbed

    def noted(self: PartCutter, program: Any, run: Any) -> None:
        def noting(all_of_it: bool, disturb: Any) -> Any:
            def noted(stream: Any) -> None:
                seen.append(all_of_it)
                disturb(stream)

            return noted

        before = program.disturb, program.disturb_beside
        program.disturb = noting(True, before[0])
        program.disturb_beside = noting(False, before[1])
        launch(self, program, run)
        program.disturb, program.disturb_beside = before

    monkeypatch.setattr(PartCutter, "_launch_disturbed", noted)
    run = made().program.stepped_runs(Class(1))[0]
    begin, step, finish = map(len, run.pieces)
    within = [False] * (begin - 1) + [True] + ([False] * (step - 1) + [True]) * 3
    assert seen == [True, *within, *[False] * (finish - 1), True] * 2


# ------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("in_flight", [1, 2])
def test_interruptions_within_any_step_leave_every_answer_right(in_flight: int) -> None:
    rig = Rig(steps=STEPS, nodes=10, in_flight=in_flight)
    step_ns = LONG_NS * STEP_SHARE / STEPS
    assert rig.cut.boundary_ns <= in_flight * (step_ns / 2 + 1)
    paused = 0
    for turn in range(10):
        first = 100 * turn
        rig.bring(first, 0)
        long = rig.exec(first, 0)
        for number in range(1, 4):
            rig.run((turn * 137 + number * 911) % 2000 * US)
            rig.bring(first + number, 1, priority=1)
            asked_ns = rig.clock.now_ns
            urgent = rig.until(rig.exec(first + number, 1, priority=1))
            if long not in rig.done:
                assert urgent.span.begin_ns - asked_ns <= rig.cut.boundary_ns + 20 * US
            rig.answer(first + number, 1)
        done = rig.until(long)
        rig.answer(first, 0)
        paused += len(done.segments)
        assert done.span.duration_ns == pytest.approx(LONG_NS, rel=0.02)
        assert done.pause_ns == 0 or done.pause_ns >= SHORT_NS
    assert paused > 20


def test_within_a_part_the_pool_is_the_interrupted_runs_own() -> None:
    """The same interruption between two parts is harmless (test_cuda_steps.py)."""
    wrong = 0
    for at_ns in range(600 * US, 2_600 * US, 200 * US):
        rig = Rig(steps=STEPS, nodes=10, twins_pool=0)
        rig.bring(1, 0)
        long = rig.exec(1, 0)
        rig.run(at_ns)
        rig.until(rig.exec(2, 1, priority=1, input_sizes=()))
        rig.until(long)
        try:
            rig.answer(1, 0)
        except AssertionError:
            wrong += 1
    assert 0 < wrong < 10


def test_the_next_run_of_the_set_begins_anew() -> None:
    rig = Rig(steps=STEPS, nodes=10)
    for action in (1, 3):
        rig.bring(action, 0)
        rig.until(rig.exec(action, 0))
        rig.answer(action, 0)
    long, _ = interrupted(Rig(steps=STEPS, nodes=10))
    assert long


@pytest.mark.parametrize("steps", [0, STEPS])
def test_whatever_is_measured_runs_with_the_models_own_weights(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other bytes in the place of buffers that a model indexes by, the GPU would be lost."""
    ran: list[set[bytes]] = []
    cut = Cutter.cut

    def noted(self: Cutter, program: Any, *args: Any, **more: Any) -> str:
        program.ran_with.clear()
        why = cut(self, program, *args, **more)
        ran.append(set(program.ran_with))
        return why

    monkeypatch.setattr(Cutter, "cut", noted)
    if steps:
        made()
    else:
        Whole({1: 8 * MS})
    assert [len(each) for each in ran] == [1]
