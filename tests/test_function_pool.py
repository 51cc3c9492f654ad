"""How many processes wait for the calls of a function: as many as the last second wanted, within bounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from function_rig import FunctionRig
from slosched.clock import now_ns
from slosched.core.worker.interface import CallAwaits, Op, OpDone
from slosched.daemon.backends.functions.demand import MOST_MORE, Demand, spares_of
from slosched.units import NS_PER_MS, NS_PER_S

SLOTS = 2


@pytest.fixture
def rig() -> Iterator[FunctionRig]:
    with FunctionRig(slots=SLOTS) as made:
        yield made


def test_the_demand_of_the_last_second_counts_and_is_forgotten() -> None:
    demand = Demand(restores=False)
    for in_use in (1, 5, 2):
        demand.took(NS_PER_S, in_use)
    assert demand.spares(NS_PER_S, 3, 0) == 5
    assert demand.spares(NS_PER_S, 3, 4) == 3  # the others are in use
    assert demand.spares(2 * NS_PER_S + 999 * NS_PER_MS, 3, 0) == 5
    assert demand.spares(3 * NS_PER_S, 3, 0) == 3
    demand = Demand(restores=True)
    for _ in range(9):
        demand.took(NS_PER_S, 1)
    assert demand.spares(NS_PER_S, 3, 0) == 9
    for _ in range(1000):
        demand.took(NS_PER_S, 1)
    assert demand.spares(NS_PER_S, 3, 0) == 3 + MOST_MORE
    assert demand.spares(9 * NS_PER_S, 3, 0) == 3


def test_many_functions_have_a_process_for_each_slot() -> None:
    assert spares_of(4, restores=False, others=10) == 5
    assert spares_of(4, restores=True, others=10) == 9
    assert spares_of(16, restores=True, others=16) == 16


def waiting(rig: FunctionRig, name: str) -> int:
    return len(rig.backend.calls.pids(name))


def settle(rig: FunctionRig, name: str, count: int) -> None:
    """Wait until `count` processes of the function wait for calls, and no more are on their way."""
    give_up_ns = now_ns() + 30 * NS_PER_S
    while waiting(rig, name) < count and now_ns() < give_up_ns:
        rig.poll()
    assert waiting(rig, name) == count


def test_a_fan_out_of_twice_the_slots_finds_a_process_for_each_call(rig: FunctionRig) -> None:
    """Parent and children are of one function; the parent keeps its process."""
    rig.load("tree")
    settle(rig, "tree", SLOTS + 1)
    root = rig.begin("tree", 1, 2 * SLOTS, load=False)
    assert isinstance(rig.wait(root.op_id), CallAwaits)
    _run_in_slots(rig, "tree", 2 * SLOTS, (0, 1))
    rig.backend.calls.end(root.action_id, "it is over")


def test_a_fan_out_finds_them_also_where_each_call_takes_a_new_one(rig: FunctionRig) -> None:
    rig.load("counts_anew")
    settle(rig, "counts_anew", 2 * SLOTS + 1)
    _run_in_slots(rig, "counts_anew", 2 * SLOTS + 1, ())
    # The next second has as many more as this one took.
    settle(rig, "counts_anew", 2 * SLOTS + 1)
    many = 2 * SLOTS + 5
    for _ in range(many):
        rig.done(rig.begin("counts_anew", load=False))
    give_up_ns = now_ns() + 30 * NS_PER_S
    most = 0
    while most <= 2 * SLOTS + 1 and now_ns() < give_up_ns:
        rig.done(rig.begin("counts_anew", load=False))
        rig.poll()
        most = max(most, waiting(rig, "counts_anew"))
    assert 2 * SLOTS + 1 < most <= 2 * SLOTS + 1 + MOST_MORE


def _run_in_slots(rig: FunctionRig, name: str, count: int, args: tuple[int, ...]) -> None:
    """Run calls, two at a time as the lane does; none of them waits for a process."""
    running: list[Op] = []
    for _ in range(count):
        if len(running) == SLOTS:
            done = rig.done(running.pop(0))
            assert isinstance(done, OpDone) and not done.code
        running.append(rig.begin(name, *args, load=False))
        assert not rig.backend.calls._waiting, "a call waits for a process"
    for op in running:
        assert not rig.done(op).code
