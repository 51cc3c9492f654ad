"""Any order of actions on a CUDA device whose long runs can be interrupted: the worker's books stay right."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from fake_cuda import MS, FakeProgram, FakeStream
from slosched.codes import Code
from slosched.core.worker.lanes import gpu_lanes
from slosched.daemon.backends.cuda.program import Class
from slosched.daemon.backends.cuda.segments import Gate
from slosched.messages import ErrorResult, EvictWeights, Infer, InferResult, LoadWeights
from test_cuda_preemption import cut_program
from test_cuda_property import FOREVER_NS, MODELS, World

#: Its batch of 4 is cut; "only" has a twin.
LONG, SHORT = "three", "only"
LONG_NS = 12 * MS


class Preempting(World):
    """A world in which some actions of the short model interrupt the long one."""

    def preemption(self) -> dict[str, Any]:
        nbytes, exec_ns, _ = MODELS[LONG]
        times = exec_ns | {4: LONG_NS}
        shares = (0.1,) * 10
        program = FakeProgram(LONG, self.driver, nbytes, times, shares=shares)
        cut_program(program, Class(4), 2 * MS, self.draw.choice((1, 2)))
        self.programs[LONG] = program
        nbytes, exec_ns, _ = MODELS[SHORT]
        stream = FakeStream(-5, pool=1)
        self.twin = FakeProgram(SHORT, self.driver, nbytes, exec_ns, stream=stream)
        self.programs[SHORT].urgent = self.twin
        self.lanes = gpu_lanes(preemptive=True)
        return {"urgent_stream": FakeStream(-5, pool=1), "gate": Gate(self.clock)}

    def priority(self, name: str) -> int:
        return self.draw.randint(0, 1) if name != LONG else 0

    def results(self) -> list[InferResult]:
        return [answer for answer, _ in self.answers.values() if isinstance(answer, InferResult)]

    def give_infer(self, name: str, batch: int, *, priority: int = 0) -> int:
        window = {"earliest_ns": 0, "latest_ns": FOREVER_NS, "gpu_id": 0}
        return self.give(
            Infer,
            MODELS[name][2].start,
            [],
            expected_duration_ns=0,
            batch_size=batch,
            request_count=1,
            priority=priority,
            **window,
        )

    def act_in_favour(self) -> None:
        """Load or run the long and the short model, whatever their windows."""
        window = {"earliest_ns": 0, "latest_ns": FOREVER_NS, "gpu_id": 0}
        name = self.draw.choice((LONG, SHORT))
        if self.draw.random() < 0.3:
            first = MODELS[name][2].start
            self.give(LoadWeights, first, [], expected_duration_ns=0, **window)
        else:
            urgent = name == SHORT
            self.give_infer(name, 1 if urgent else 4, priority=int(urgent))

    def interrupted(self) -> tuple[int, int]:
        """(the long action, the urgent one that runs in its place); both models are loaded."""
        self.start()
        window = {"earliest_ns": 0, "latest_ns": FOREVER_NS, "gpu_id": 0}
        for name in (LONG, SHORT):
            first = MODELS[name][2].start
            self.give(LoadWeights, first, [], expected_duration_ns=0, **window)
        self.run(20 * MS)
        long = self.give_infer(LONG, 4)
        self.run(3 * MS)
        urgent = self.give_infer(SHORT, 1, priority=1)
        while not self.twin.launches:
            self.run(20_000)
        assert long not in self.answers and urgent not in self.answers
        return long, urgent


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_actions(seed: int) -> None:
    world = Preempting(seed)
    world.start()
    for _ in range(100):
        world.act()
        if world.draw.random() < 0.5:  # else a run is interrupted too seldom
            world.act_in_favour()
        if world.draw.random() < 0.6:
            world.run(world.draw.choice((10_000, MS // 3, 2 * MS)))
    world.run(2_000 * MS)
    world.check_answers()
    assert world.brain.idle and world.device.idle
    assert world.device.free_pages == world.brain.free_pages(0)
    spans = sorted(
        (span.begin_ns, span.end_ns)
        for result in world.results()
        for span in (result.segments or (result.exec,))
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    for result in world.results():
        if result.segments:
            whole_ns = sum(span.duration_ns for span in result.segments)
            assert result.exec.duration_ns == whole_ns and result.pause_ns > 0
    assert sum(bool(result.segments) for result in world.results()) > 0
    assert world.twin.launches


def test_weights_of_an_interrupted_run_are_not_evicted() -> None:
    world = Preempting(1)
    long, urgent = world.interrupted()
    window = {"earliest_ns": 0, "latest_ns": FOREVER_NS, "gpu_id": 0}
    evict = world.give(EvictWeights, MODELS[LONG][2].start, [], **window)
    world.run(100 * MS)
    answer = world.answers[evict][0]
    assert isinstance(answer, ErrorResult) and answer.code == Code.WEIGHTS_IN_USE
    done = world.answers[long][0]
    assert isinstance(done, InferResult) and len(done.segments) == 2
    assert isinstance(world.answers[urgent][0], InferResult)


def test_a_worker_that_shuts_down_lets_the_interrupted_run_end() -> None:
    world = Preempting(2)
    long, urgent = world.interrupted()
    waiting = world.give_infer(LONG, 1)
    world.brain.shutdown(now_ns=world.clock.now_ns)
    world.run(100 * MS)
    assert world.brain.idle and world.device.idle
    assert isinstance(world.answers[long][0], InferResult)
    assert isinstance(world.answers[urgent][0], InferResult)
    answer = world.answers[waiting][0]
    assert isinstance(answer, ErrorResult) and answer.code == Code.CANCELLED


@pytest.mark.parametrize("seed", range(3))
def test_a_gpu_that_is_lost_under_load_leaves_nothing_unanswered(seed: int) -> None:
    world = Preempting(seed)
    world.start()
    for step in range(60):
        world.act()
        world.run(world.draw.choice((10_000, MS // 3)))
        if step == 40:
            world.driver.fault = "unspecified launch failure"
    world.run(500 * MS)
    world.check_answers()
    assert world.brain.idle and world.device.lost
