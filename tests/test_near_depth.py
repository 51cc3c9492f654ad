"""Calls that should be near something, in a deep graph: they keep their places, and few are unfinished."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from slosched.core.worker.emulated_calls import AwaitAll, Chain, EmulatedFunction, Run, Script, Step
from slosched.messages import FunctionInfo
from slosched.sim.calls import CallArrival, CallOutcome, CallSpec, simulate_calls
from slosched.sim.hosts import HostPlan
from slosched.units import NS_PER_S, NS_PER_US

_SLO_NS = 600 * NS_PER_S
_PLACES = 8


def _products(*, near: bool) -> tuple[EmulatedFunction, ...]:
    """1 + 8 + 64 calls that await, and 512 leaves, as of a product of matrices with 3 splits."""

    def split(function: str, number: int, place: int, count: int = 1) -> Chain:
        key = f"place {place}" if near else ""
        return Chain(function, count, numbers=(number,), near=key)

    def awaits(*chains: Step) -> Script:
        return Script((Run(100 * NS_PER_US), *chains, AwaitAll(), Run(300 * NS_PER_US)))

    places = range(_PLACES)
    root = awaits(*(split("split", 1 + place, place) for place in places))
    upper = [awaits(split("split", 1 + _PLACES + place, place, 8)) for place in places]
    lower = [awaits(split("leaf", 0, place, 8)) for place in places]
    info = FunctionInfo(slo_ns=_SLO_NS)
    return (
        EmulatedFunction(name="split", scripts=(root, *upper, *lower), info=info),
        EmulatedFunction(name="leaf", scripts=(Script((Run(500 * NS_PER_US),)),), info=info),
    )


def _ran(workers: int, slots: int, *, near: bool) -> CallOutcome:
    host = HostPlan(_products(near=near), slots=slots)
    arrival = CallArrival(at_ns=0, function="split", slo_ns=_SLO_NS)
    outcome = simulate_calls(CallSpec(hosts=(host,) * workers, arrivals=(arrival,)))
    assert len(outcome.calls) == 585
    assert not any(call.code for call in outcome.calls)
    return outcome


def _most_unfinished(outcome: CallOutcome) -> int:
    """The most calls of a worker that had begun and not ended at a time, leaves left out."""
    changes = []
    for call in outcome.calls:
        if call.function == "split":
            changes += [(call.start_ns, 1, call.worker_id), (call.end_ns, -1, call.worker_id)]
    now, most = Counter[int](), 0
    for _, change, worker_id in sorted(changes):
        now[worker_id] += change
        most = max(most, now[worker_id])
    return most


@pytest.mark.parametrize(("workers", "slots"), [(1, 1), (1, 2), (2, 1), (4, 1)])
def test_near_calls_leave_few_unfinished(workers: int, slots: int) -> None:
    """Each has a process: with `near` there were 19 to 28, and 3 to 8 without."""
    by_depth = _most_unfinished(_ran(workers, slots, near=False))
    assert by_depth <= 8
    assert _most_unfinished(_ran(workers, slots, near=True)) <= 8 * slots


@pytest.mark.parametrize(("workers", "slots"), [(2, 1), (4, 1), (2, 4)])
def test_near_calls_keep_their_places(workers: int, slots: int) -> None:
    """Most calls of a key run on one worker; by chance it would be one in `workers`, and some more."""
    places: dict[str, Counter[int]] = defaultdict(Counter)
    for call in _ran(workers, slots, near=True).calls:
        if call.near:
            places[call.near][call.worker_id] += 1
    kept = sum(max(each.values()) for each in places.values())
    assert kept > 0.8 * sum(sum(each.values()) for each in places.values())
