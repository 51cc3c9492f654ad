"""The load driver with closed loops and several SLOs, and where a run stands, on a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from fake_controller import B1_NS, model_info
from slosched.errors import ConnectionLost
from slosched.loadgen.driver import LoadDriver
from slosched.loadgen.progress import FOREVER_NS, ProgressMeter
from slosched.loadgen.results import run_result
from slosched.messages import InferReply, ModelInfo
from slosched.telemetry.client_log import NO_ANSWER, ClientRecord
from slosched.workloads.base import Arrival, ModelUse, Step, Stream
from slosched.workloads.engine import Engine
from slosched.workloads.streams import ClosedLoop, OpenLoop

MS = 1_000_000
START = 10**18


@dataclass(frozen=True)
class Mixed:
    """A closed loop of 1 (SLO 40 ms), and an open one each 10 ms with an SLO of 4 times b1."""

    name: str = "mixed"
    duration_ns: int | None = None
    groups: tuple[str, ...] = ("",)

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse("toy", 2),)

    def steps(self) -> tuple[Step, ...]:
        return (Step(0, 0, slo_factor=2.0), Step(1, 50 * MS, label="later"))

    def streams(self, seed: int) -> Sequence[Stream]:
        ticks = (i * 10 * MS for i in range(1, 10**9))
        return (
            ClosedLoop(1, (0,), user_id=1, slo=(0.0, 40 * MS)),
            OpenLoop(ticks, (1,), user_id=2, slo=(4.0, 0)),
        )

    def describe(self) -> str:
        return "mixed: both kinds of loops"


class World:
    """A clock, a peer that answers when told to, and a shell that wakes when it was told to."""

    def __init__(self, duration_ns: int) -> None:
        self.now_ns = START
        self.broken = False
        self.asked: list[tuple[int, int]] = []  # (ns after the start, user)
        self.woken: list[int] = []  # what on_due said, after the start
        self.records: list[ClientRecord] = []
        self._on_reply: Callable[[InferReply], None] | None = None
        self.engine = Engine(Mixed(), duration_ns=duration_ns)
        self.driver = LoadDriver(
            self,
            [model_info(0), model_info(1)],
            self.engine,
            clock=lambda: self.now_ns,
            on_record=self.records.append,
            on_due=lambda at_ns: self.woken.append(at_ns - START),
        )

    def submit(
        self, model: ModelInfo, arrival: Arrival, on_reply: Callable[[InferReply], None]
    ) -> int:
        if self.broken:
            raise ConnectionLost("no connection", code=1)
        self._on_reply = on_reply
        self.asked.append((self.now_ns - START, arrival.user_id))
        return len(self.asked)

    def flush(self) -> tuple[int, ...]:
        return ()

    def cancel(self, request_id: int) -> None:
        return

    def answer(self, request_id: int, code: int = 0, slo_ns: int = 40 * MS) -> None:
        assert self._on_reply is not None
        self._on_reply(InferReply(request_id, code, "", 0, slo_ns, 3 * MS, code == 0))

    def until(self, at_ns: int) -> None:
        """Let time pass, with a shell that sends at each due time."""
        while (due_ns := self.driver.next_due_ns()) is not None and due_ns <= START + at_ns:
            self.now_ns = max(self.now_ns, due_ns)
            self.driver.issue_due()
        self.now_ns = START + at_ns


def test_an_answer_makes_the_next_request_of_its_loop_due_and_says_so() -> None:
    world = World(100 * MS)
    assert world.driver.start(START) == START  # the closed loop begins at once
    world.until(3 * MS)
    world.answer(1)
    assert world.woken == [3 * MS] and world.driver.next_due_ns() == START + 3 * MS
    world.until(5 * MS)
    assert world.asked == [(0, 1), (3 * MS, 1)]
    world.answer(2, code=8)  # refused: its loop goes on at the deadline, 40 ms after it was sent
    assert world.woken == [3 * MS, 43 * MS]
    world.until(60 * MS)
    assert [at for at, user in world.asked if user == 1] == [0, 3 * MS, 43 * MS]
    assert [at for at, user in world.asked if user == 2] == [i * 10 * MS for i in range(1, 7)]


def test_a_request_that_could_not_go_out_is_followed_at_its_deadline() -> None:
    world = World(100 * MS)
    world.driver.start(START)
    world.broken = True
    world.until(1 * MS)
    world.broken = False
    assert world.woken == [40 * MS]
    assert [(r.code, r.slo_ns) for r in world.records] == [(NO_ANSWER, 40 * MS)]
    world.until(41 * MS)
    assert (40 * MS, 1) in world.asked


def test_each_request_keeps_its_own_slo() -> None:
    world = World(100 * MS)
    world.driver.start(START)
    world.until(20 * MS)
    assert world.driver.max_slo_ns == 40 * MS
    world.driver.give_up()
    assert {r.user_id: r.slo_ns for r in world.records} == {1: 40 * MS, 2: 4 * B1_NS}


def test_a_second_answer_is_of_no_account() -> None:
    world = World(100 * MS)
    world.driver.start(START)
    world.until(1 * MS)
    world.answer(1)
    world.answer(1)
    assert len(world.records) == 1 and world.driver.tallies[0].answered == 1


def test_a_run_that_ended_early_has_its_goodput_per_second_that_it_sent() -> None:
    world = World(200 * MS)
    world.driver.start(START)
    world.until(60 * MS)
    tallies = world.driver.tallies
    whole = run_result(Mixed(), world.engine, tallies, elapsed_ns=0)
    part = run_result(Mixed(), world.engine, tallies, elapsed_ns=0, sent_until_ns=70 * MS)
    assert [step.duration_ns for step in whole.steps] == [50 * MS, 150 * MS]
    assert [step.duration_ns for step in part.steps] == [50 * MS, 20 * MS]


def test_the_meter_tells_step_rate_and_satisfaction() -> None:
    world = World(100 * MS)
    world.driver.start(START)
    meter = ProgressMeter(world.driver, world.engine)
    first = meter.at(world.now_ns)
    assert (first.step, first.label, first.rate_per_s, first.satisfaction) == (1, "SLO 2x", 0, 0)
    world.until(60 * MS)
    world.answer(1)
    world.answer(2, code=4)
    where = meter.at(world.now_ns)
    assert (where.step, where.steps, where.label, where.sent) == (2, 2, "later", 7)
    assert where.rate_per_s == pytest.approx(7 / 0.06)
    assert where.satisfaction == 0  # the first came after 60 of its 40 ms
    assert (where.elapsed_s, where.total_s) == (0.06, 0.1)
    # Seldom asked, it still has a rate: that of the time since it was asked last.
    assert meter.at(world.now_ns + 7_000 * MS).rate_per_s == 0


def test_a_run_without_an_end_has_no_total() -> None:
    world = World(FOREVER_NS)
    world.driver.start(START)
    assert math.isinf(ProgressMeter(world.driver, world.engine).at(START + 5 * MS).total_s)
