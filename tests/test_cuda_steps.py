"""Programs in steps on the CUDA device, in virtual time: right bytes, times by the step, boundaries.

Each launch of a part writes over the whole pool first, as other programs' runs may, so a state that lies there
gives wrong answers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fake_cuda import (
    MS,
    ROW_IN,
    STEP_SHARE,
    FakeDriver,
    FakeProgram,
    FakeStream,
    SteppedProgram,
    VirtualClock,
)
from slosched.daemon.backends.checking import OneTensor
from slosched.daemon.backends.cuda.choice import Aim, Wish
from slosched.daemon.backends.cuda.cutting import Cutter
from slosched.daemon.backends.cuda.preemption import Preemption, boundaries_ns
from slosched.daemon.backends.cuda.preparing import Bench, Source
from slosched.daemon.backends.cuda.program import Class
from slosched.daemon.backends.cuda.recorded import CHECKED_STEPS
from slosched.daemon.backends.cuda.segments import Gate
from slosched.daemon.backends.cuda.steps import SteppedRun
from slosched.gpu_profile import ModelProfile
from test_cuda_answers import _AlwaysOn
from test_cuda_preemption import LONG_NS, PAGE, Rig, interrupted

STEPS = 10


class Prepared:
    """A program in steps that a bench has prepared, with `--preempt` if it may be interrupted."""

    def __init__(
        self,
        exec_ns: dict[int, int],
        *,
        steps: int = STEPS,
        preempt: bool = True,
        in_pool: bool = False,
        wish: Wish = Wish(),
        gap_ns: int = 0,
        nodes: int = 1,
        kind: type[SteppedProgram] = SteppedProgram,
    ) -> None:
        self.nodes, self.kind = nodes, kind
        clock = VirtualClock()
        driver = self.driver = FakeDriver(clock, gap_ns=gap_ns)
        self.program = self._program(exec_ns, steps, in_pool)
        image = driver.pinned_block(PAGE)
        assert image.host is not None
        image.host[:] = np.random.default_rng(1).integers(0, 256, PAGE)
        stream, gate, background = driver.stream(-2), Gate(clock), _AlwaysOn(clock)
        urgent: Any = Bench(driver, background, FakeStream(-5, pool=1), clock=clock)
        cutter = Cutter(driver, background, stream, gate, Aim())
        preemption = Preemption(driver, cutter, urgent, clock=clock) if preempt else None
        bench = Bench(driver, background, stream, clock=clock, preemption=preemption, gate=gate)

        def twin() -> FakeProgram:
            return self._program(exec_ns, steps, in_pool, FakeStream(-5, pool=1))

        model = OneTensor("net", (ROW_IN,), "uint8")
        source = Source(self.program, image.host, model, True, (), twin, wish)
        self.notes: list[str] = []
        self.profile: ModelProfile = bench.profile(
            source, image, list(exec_ns), max_exec_ns=10**9, note=self.notes.append
        )

    def _program(
        self, exec_ns: dict[int, int], steps: int, in_pool: bool, stream: FakeStream | None = None
    ) -> SteppedProgram:
        program = self.kind(
            "net",
            self.driver,
            PAGE,
            {},
            steps=steps,
            in_pool=in_pool,
            stream=stream,
            nodes=self.nodes,
        )
        program.exec_ns = exec_ns
        return program


def test_it_is_measured_by_the_step_and_cut_between_steps() -> None:
    made = Prepared({1: 8 * MS, 4: 20 * MS})
    program, profile = made.program, made.profile
    assert all(program.captured(of) for of in program.classes) and not program.not_captured
    assert profile.steps == STEPS
    for batch, whole_ns in ((1, 8 * MS), (4, 20 * MS)):
        step_ns = whole_ns * STEP_SHARE / STEPS
        assert profile.step_ns[batch] == pytest.approx(step_ns, rel=0.01)
        assert profile.exec_ns[batch] == pytest.approx(whole_ns, rel=0.01)
        cut = program.cut_of(Class(batch))
        assert cut is not None and cut.boundary_ns == pytest.approx(step_ns, rel=0.02)
        # The parts before and after the steps are short: they need no boundary of their own.
        assert STEPS <= len(cut.segment_ns) <= STEPS + 2
    assert boundaries_ns(program, profile)[0].keys() == {1, 4}
    program.release()
    assert made.driver.graphs == 0


def test_its_answers_are_checked_in_few_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty steps of a large model take seconds, and a check of every class is dozens of runs."""
    seen, launch = [], SteppedRun.launch

    def noted(run: SteppedRun, stream: Any, *, steps: int = 0) -> None:
        seen.append(steps)
        launch(run, stream, steps=steps)

    monkeypatch.setattr(SteppedRun, "launch", noted)
    made = Prepared({1: 8 * MS, 4: 20 * MS}, steps=50, preempt=False)
    assert set(seen) == {CHECKED_STEPS} and made.program.few_steps == 0
    run = made.program.stepped_runs(Class(1))[0]
    assert len(run.parts) == 52 and made.profile.steps == 50


def test_long_steps_are_boundaries_without_a_run_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cutter, "_compared", None)  # what would run it whole
    made = Prepared({1: 60 * MS})
    cut = made.program.cut_of(Class(1))
    assert cut is not None and cut.in_flight == 1
    assert cut.boundary_ns == pytest.approx(60 * MS * STEP_SHARE / STEPS, rel=0.02)


def test_short_steps_are_put_together_to_segments_that_are_worth_their_boundaries() -> None:
    cut = Prepared({1: 20 * MS}, steps=400, gap_ns=3_000).program.cut_of(Class(1))
    assert cut is not None and 2 < len(cut.segment_ns) < 400 // 2


def test_without_preemption_it_is_launched_whole_and_measured_by_the_step() -> None:
    made = Prepared({1: 8 * MS}, preempt=False)
    assert made.program.cut_of(Class(1)) is None
    assert made.profile.step_ns[1] == pytest.approx(8 * MS * STEP_SHARE / STEPS, rel=0.01)


def test_a_short_one_has_a_twin_of_its_own_that_runs_in_steps() -> None:
    program = Prepared({1: MS // 2}, steps=2).program
    twin = program.urgent
    assert twin is not None and twin.stepped_runs(Class(1))
    states = [program.stepped_runs(Class(1))[0], twin.stepped_runs(Class(1))[0]]
    assert states[0] is not states[1]


def test_a_state_that_other_runs_may_write_over_is_found_out() -> None:
    made = Prepared({1: 8 * MS}, in_pool=True)
    assert not made.program.captured(Class(1))
    assert "answered wrongly" in made.program.not_captured
    assert made.profile.steps == 0 and made.program.cut_of(Class(1)) is None


@pytest.mark.parametrize("in_flight", [1, 2])
def test_interruptions_between_any_two_steps_leave_every_answer_right(in_flight: int) -> None:
    rig = Rig(steps=STEPS, in_flight=in_flight)
    for turn in range(8):
        first = 100 * turn
        rig.bring(first, 0)
        long = rig.exec(first, 0)
        for number in range(1, 4):
            rig.run((turn * 137 + number * 911) % 2000 * 1_000)
            rig.bring(first + number, 1, priority=1)
            rig.until(rig.exec(first + number, 1, priority=1))
            rig.answer(first + number, 1)
        done = rig.until(long)
        rig.answer(first, 0)
        assert done.span.duration_ns == pytest.approx(LONG_NS, rel=0.02)


def test_what_interrupts_it_may_even_write_to_the_pool_that_it_uses() -> None:
    """Nothing of it lies there between two steps."""
    rig = Rig(steps=STEPS, twins_pool=0)
    long, _ = interrupted(rig)
    rig.until(long)
    rig.answer(1, 0)


def test_the_fake_notices_a_state_in_the_pool() -> None:
    rig = Rig(steps=STEPS, state_in_pool=True)
    rig.bring(1, 0)
    rig.until(rig.exec(1, 0))
    with pytest.raises(AssertionError, match="action 1"):
        rig.answer(1, 0)


def test_a_profile_of_steps_has_the_times_of_all_batches() -> None:
    good = ModelProfile("net", {1: 100, 4: 200}, 1, 1, steps=5, step_ns={1: 18, 4: 36})
    assert good.interpolated().step_ns[2] == 24
    for wrong in ({1: 18}, {1: 18, 4: 41}, {1: 0, 4: 36}, {}):
        with pytest.raises(Exception, match="step"):
            replace(good, step_ns=wrong)
    with pytest.raises(Exception, match="length"):
        replace(good, exec_ns_at={8: {1: 100, 4: 200}})
