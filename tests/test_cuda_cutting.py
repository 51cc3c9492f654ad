"""Where a long class is cut, which models get a twin, and what that costs: on a driver in virtual time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest

from fake_cuda import MS, ROW_IN, FakeDriver, FakeProgram, FakeStream, VirtualClock
from slosched.daemon.backends.checking import OneTensor
from slosched.daemon.backends.cuda.choice import TAUS_NS, Aim, Wish, chosen, waiting_ns
from slosched.daemon.backends.cuda.cutting import Cutter
from slosched.daemon.backends.cuda.driver import OutOfDeviceMemory
from slosched.daemon.backends.cuda.groups import Group, bounds_of, halved
from slosched.daemon.backends.cuda.preemption import Preemption, boundaries_ns, urgent_ns
from slosched.daemon.backends.cuda.preparing import Bench, Source
from slosched.daemon.backends.cuda.program import Class, Cut, side_of
from slosched.daemon.backends.cuda.segments import Gate
from slosched.gpu_profile import ModelProfile
from test_cuda_answers import _AlwaysOn
from test_cuda_preemption import PAGE, SHARES, US


def test_segments_are_put_together_up_to_tau_and_long_groups_are_halved() -> None:
    groups = [Group(0, 3, 100), Group(3, 5, 50), Group(5, 6, 300), Group(6, 9, 10)]
    assert bounds_of(groups, 150) == (5, 6) and bounds_of(groups, 1000) == ()
    places = [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 9)]  # the node and the small group stay
    assert halved(groups, 40) == places
    assert halved([Group(0, 8, 100), Group(8, 12, 100)], 40) == [(0, 4), (4, 8), (8, 10), (10, 12)]


def test_the_time_until_a_boundary_is_that_of_the_segments_in_flight() -> None:
    assert Cut((1, 2), (5, 9, 7), 1).boundary_ns == 9
    assert Cut((1, 2), (5, 9, 7), 2).boundary_ns == 16
    assert Cut((1, 2), (5, 9, 7), 1, bubble_ns=4).bubbles_ns == 8


@pytest.mark.parametrize(
    ("behind_ns", "bubble_ns", "wish", "in_flight"),
    [
        (100, 100, Wish(), 1),
        (1_000, 1_500, Wish(), 2),  # 1 % and 2.5 %
        (2_500, 0, Wish(), None),
        (100, 100, Wish(in_flight=2), 2),
        (100, 5_000, Wish(in_flight=1), None),
        (2_500, 5_000, Wish(boundary_ns=1), 2),
        (2_500, 5_000, Wish(boundary_ns=1, in_flight=1), 1),
    ],
)
def test_one_segment_in_flight_unless_the_host_makes_that_too_slow(
    behind_ns: int, bubble_ns: int, wish: Wish, in_flight: int | None
) -> None:
    times = [100_000 + behind_ns] * 11
    bounds, whole_ns = tuple(range(10)), sum(times) - 10 * behind_ns
    found = chosen(bounds, times, bubble_ns, wish, whole_ns=whole_ns, aim=Aim())
    assert (found.cut.in_flight if found else None) == in_flight


def test_a_costly_boundary_may_slow_a_run_by_three_percent() -> None:
    times, bounds = [300_000] * 11, tuple(range(10))
    for whole_ns, had in ((sum(times) - 80_000, True), (sum(times) - 110_000, False)):
        found = chosen(bounds, times, 0, Wish(), whole_ns=whole_ns, aim=Aim())
        assert (found is not None) == had


def test_the_mean_wait_is_that_of_a_random_moment() -> None:
    assert waiting_ns([10, 10, 10], 1) == 5
    assert waiting_ns([10, 10, 10], 2) == pytest.approx((15 + 15 + 5) / 3)
    uneven, draw = [3, 20, 1, 7], Random(1)
    for in_flight in (1, 2):
        total = 0.0
        for _ in range(20_000):
            at = draw.uniform(0, sum(uneven))
            place, end = 0, uneven[0]
            while end < at:
                place += 1
                end += uneven[place]
            total += sum(uneven[: place + in_flight]) - at
        assert waiting_ns(uneven, in_flight) == pytest.approx(total / 20_000, rel=0.03)


def test_tau_follows_the_urgent_requests_share_and_slo() -> None:
    """Short SLOs and much urgent work: short segments. Long SLOs, or little: few boundaries."""
    lengths = []
    for aim in (Aim(0.9, 2 * MS), Aim(0.5, 10 * MS), Aim(0.05, 10 * MS), Aim(0.5, 1000 * MS)):
        cut = Prepared({1: 20 * MS}, gap_ns=3_000, aim=aim, shares=(1 / 200,) * 200).program.cut_of(
            Class(1)
        )
        assert cut is not None
        assert (len(cut.segment_ns) - 1) * 3_000 <= 0.021 * 20 * MS
        lengths.append(len(cut.segment_ns))
    assert lengths[0] > lengths[1] > lengths[2] >= lengths[3]


def test_one_in_flight_where_waiting_counts_and_two_where_boundaries_do() -> None:
    times, bounds = [300_000] * 11, tuple(range(10))
    whole_ns = sum(times) - 10_000
    found = {}
    for slo_ns in (MS, 100 * MS):
        choice = chosen(bounds, times, 4_000, Wish(), whole_ns=whole_ns, aim=Aim(0.5, slo_ns))
        assert choice is not None
        found[slo_ns] = choice.cut.in_flight
    assert found == {MS: 1, 100 * MS: 2}


@dataclass
class Prepared:
    """A program that was prepared with `--preempt`."""

    exec_ns: dict[int, int]
    gap_ns: int = 0
    wish: Wish = field(default_factory=Wish)
    aim: Aim = field(default_factory=Aim)
    shares: tuple[float, ...] = SHARES
    kind: type[FakeProgram] = FakeProgram
    twin_kind: type[FakeProgram] = FakeProgram
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        clock = VirtualClock()
        driver = self.driver = FakeDriver(clock, gap_ns=self.gap_ns)
        program = self.kind("net", driver, PAGE, {}, shares=self.shares, **self.options)
        program.exec_ns = self.exec_ns
        self.program = program
        image = driver.pinned_block(PAGE)
        assert image.host is not None
        image.host[:] = np.random.default_rng(1).integers(0, 256, PAGE)
        stream, gate, background = driver.stream(-2), Gate(clock), _AlwaysOn(clock)
        urgent = Bench(driver, background, FakeStream(-5, pool=1), clock=clock)
        preemption = Preemption(
            driver,
            Cutter(driver, background, stream, gate, self.aim),
            urgent,
            clock=clock,
        )
        bench = Bench(
            driver,
            background,
            stream,
            clock=clock,
            preemption=preemption,
            gate=gate,
        )
        model = OneTensor("net", (ROW_IN,), "uint8")
        source = Source(program, image.host, model, True, (), self._twin, self.wish)
        self.notes: list[str] = []
        batches = list(self.exec_ns)
        profile = bench.profile(source, image, batches, max_exec_ns=10**9, note=self.notes.append)
        self.profile = dict(profile.exec_ns)
        self.boundaries_ns = boundaries_ns(source.program, profile)

    def _twin(self) -> FakeProgram:
        stream = FakeStream(-5, pool=1)
        program = self.twin_kind("net", self.driver, PAGE, {}, shares=self.shares, stream=stream)
        program.exec_ns = self.exec_ns
        return program


def test_a_long_class_is_cut_at_the_smallest_tau_and_a_short_model_gets_a_twin() -> None:
    made = Prepared({1: MS // 2, 4: 8 * MS}, gap_ns=200)
    program = made.program
    cut = program.cut_of(Class(4))
    assert cut is not None and program.cut_of(Class(1)) is None
    assert cut.in_flight == 1 and max(cut.segment_ns) >= 0.2 * 8 * MS  # a node of a fifth of it
    small = sorted(cut.segment_ns)[:-2]
    assert small and max(small) <= 0.05 * 8 * MS + 20 * US  # no two of the other nodes fit into tau
    assert program.urgent is not None and side_of(program, 1, Class(1)) is program.urgent
    assert side_of(program, 0, Class(1)) is program
    assert program.urgent.classes == (Class(1),) and side_of(program, 1, Class(4)) is program
    assert urgent_ns(program, ModelProfile("net", made.profile, 1, 1)) == made.profile[1]
    single_ns = made.profile[1]
    assert made.boundaries_ns == {0: {1: single_ns, 4: cut.boundary_ns}}
    assert made.profile[4] == pytest.approx(8 * MS, rel=0.02)
    assert "1 of 2 classes in segments and 1 in a twin for urgent runs" in program.preemption
    program.release()
    assert made.driver.graphs == 0


def test_the_more_a_boundary_costs_the_longer_the_segments() -> None:
    counts = []
    for gap_ns in (500, 6_000, 30_000):
        cut = Prepared({1: 20 * MS}, gap_ns=gap_ns).program.cut_of(Class(1))
        assert cut is not None
        slower = (len(cut.segment_ns) - 1) * gap_ns / (20 * MS)
        assert slower <= 0.031
        counts.append(len(cut.segment_ns))
    assert counts[0] >= counts[1] > counts[2]
    assert Prepared({1: 2 * MS}, gap_ns=200_000).program.cut_of(Class(1)) is None


def test_a_gpu_that_becomes_slower_meanwhile_is_cut_as_finely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By 3 % every 100 ms, as one does that becomes warm: more than all boundaries cost."""
    counts = []
    for slower_per_ns in (0.0, 0.3e-9):

        def elapsed_ns(self: FakeDriver, start: Any, end: Any, by: float = slower_per_ns) -> int:
            took_ns: int = end.at_ns - start.at_ns
            return round(took_ns * math.exp(by * end.at_ns))

        monkeypatch.setattr(FakeDriver, "elapsed_ns", elapsed_ns)
        made = Prepared({1: 20 * MS}, gap_ns=2_000, shares=(1 / 400,) * 400)
        cut = made.program.cut_of(Class(1))
        assert cut is not None
        counts.append(len(cut.segment_ns))
    assert counts[1] >= 0.7 * counts[0] > 20


def test_a_boundary_that_the_file_gives_is_had() -> None:
    made = Prepared({1: 20 * MS}, gap_ns=300_000, wish=Wish(boundary_ns=2 * MS, in_flight=1))
    cut = made.program.cut_of(Class(1))
    assert cut is not None and cut.in_flight == 1 and len(cut.segment_ns) >= 9


def test_a_long_model_has_a_twin_only_if_its_table_says_so() -> None:
    assert Prepared({1: 8 * MS}).program.urgent is None
    program = Prepared({1: MS, 2: 2 * MS, 4: 4 * MS}).program  # and measured otherwise afterwards:
    exec_ns = {1: MS, 2: 3 * MS, 4: 2_900_000}
    assert urgent_ns(program, ModelProfile("net", exec_ns, 1, 1)) == MS
    declared = Prepared({1: 8 * MS, 4: 12 * MS}, wish=Wish(urgent=True)).program
    assert declared.urgent is not None and declared.urgent.classes == declared.classes


def test_what_is_no_chain_and_what_is_not_captured_runs_as_today() -> None:
    class Branched(FakeProgram):
        def _end_capture(self, token: Any) -> Any:
            captured = super()._end_capture(token)
            captured.branched = True
            return captured

    made = Prepared({1: 8 * MS}, kind=Branched)
    assert made.program.cut_of(Class(1)) is None and made.boundaries_ns == {}
    assert any("not one chain" in note for note in made.notes)
    plain = Prepared({1: MS}, options={"remembers": True})
    assert plain.program.urgent is None and not plain.program.preemption
    assert any("plain execution" in note for note in plain.notes)


def test_segments_that_answer_otherwise_are_not_used() -> None:
    segment = FakeDriver.segment

    def spoilt(
        self: FakeDriver, captured: Any, chain: Any, begin: int, end: int, active: int
    ) -> Any:
        graph = segment(self, captured, chain, begin, end, active)
        if begin:
            graph.later = False  # it writes over the pool first
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeDriver, "segment", spoilt)
        made = Prepared({1: 8 * MS})
    assert made.program.cut_of(Class(1)) is None
    assert any("answer otherwise" in note for note in made.notes)


def test_a_twin_that_answers_wrongly_or_finds_no_memory_is_given_up() -> None:
    class Remembering(FakeProgram):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options, remembers=True)

    class Hungry(FakeProgram):
        def add_class(self, of: Class, *, capture: bool = True) -> None:
            raise OutOfDeviceMemory("no room")

    for kind, words in ((Remembering, "answered wrongly"), (Hungry, "no room")):
        made = Prepared({1: MS // 2}, twin_kind=kind)
        assert made.program.urgent is None and made.profile[1] > 0
        assert any("interrupts nothing" in note and words in note for note in made.notes)


def test_the_times_that_are_tried_ascend() -> None:
    assert list(TAUS_NS) == sorted(TAUS_NS)
