"""Which of the calls that wait goes to which worker: near what it belongs to, and deeper ones first."""

from __future__ import annotations

import random

from chains_rig import CallRig, others, with_parent
from scheduler_rig import MS
from slosched.codes import Code
from slosched.core.scheduler.near_places import MOST_KEYS, NearPlaces
from slosched.core.worker.call_scripts import EmulatedFunction, Run, Script
from slosched.messages import Call
from slosched.sim.calls import CallArrival, CallSpec, codes, simulate_calls
from slosched.sim.hosts import HostPlan


def test_a_child_goes_where_its_sibling_went() -> None:
    rig, parent, _ = with_parent(workers=3, slots=8)
    for child in range(6):
        rig.chain(parent, child)
    rig.step()
    went = [rig.worker_of(each) for each in others(rig, parent)]
    assert sorted(set(went)) == [0, 1, 2]
    for child in range(6):
        rig.chain(parent, 6 + child, near_child=child)
    before = others(rig, parent)
    rig.step()
    near = [rig.worker_of(each) for each in others(rig, parent, *before)]
    assert near == went


def test_a_call_goes_where_the_last_one_with_its_key_went() -> None:
    rig = CallRig.serving(workers=3, slots=4)
    rig.call()
    rig.call(near="weights")
    rig.step()
    home = rig.worker_of(rig.outstanding_calls()[1])
    assert home == 1
    for _ in range(3):
        rig.call(near="weights")
    rig.call(near="other")
    rig.step()
    went = [rig.worker_of(each) for each in rig.outstanding_calls()[2:]]
    assert went == [home, home, home, 0]


def test_near_does_not_wait_for_a_worker_that_is_busy() -> None:
    rig = CallRig.serving(workers=2, slots=1)
    for _ in range(40):  # a call takes 20 ms
        rig.call(near="key")
        rig.step()
        call = rig.one()
        rig.now_ns += 21 * MS
        rig.result(call, ran_ms=20)
        rig.beat(0)
        rig.beat(1)
        rig.step()
    rig.call(near="key")
    rig.step()
    home = rig.worker_of(rig.one())
    rig.now_ns += MS
    rig.call(near="key")
    rig.step()
    other = rig.outstanding_calls()[1]
    assert rig.worker_of(other) != home


def test_near_waits_for_a_slot_that_opens_within_an_exchange() -> None:
    rig = CallRig.serving(workers=2, slots=1)
    rig.call(near="key")
    rig.step(0)
    home = rig.worker_of(rig.one())
    rig.step(1.0)  # it ends at 1.5 ms, and a message takes 0.5 ms
    rig.call(near="key")
    rig.step()
    second = rig.outstanding_calls()[1]
    assert rig.worker_of(second) == home


def test_a_slot_that_opens_takes_what_is_near_it_first() -> None:
    rig = CallRig.serving("f", "g", workers=2, slots=1)
    rig.call("f", near="a")
    rig.call("f", near="b")
    rig.step(0)
    at_a, at_b = rig.outstanding_calls()
    for _ in range(3):  # all are due at once
        rig.call("g", slo_ms=900, near="b")
        rig.call("g", slo_ms=900, near="a")
    for _ in range(3):
        rig.later(2)
        for call in rig.outstanding_calls():
            rig.result(call)
        rig.steps()
    calls = [each for each in rig.to_worker(Call) if each.model_id == rig.id_of("g")]
    assert len(calls) >= 4
    home = {"a": rig.worker_of(at_a), "b": rig.worker_of(at_b)}
    for call in calls:
        key = "b" if call.call_id % 2 == 0 else "a"
        assert rig.worker_of(call) == home[key], call


def test_near_does_not_go_before_what_is_due_much_sooner() -> None:
    rig = CallRig.serving(slots=1)
    rig.call(near="key")
    rig.step(0)
    near = rig.call(slo_ms=900, near="key")
    urgent = rig.call(slo_ms=5)
    rig.step(1.2)
    rig.result(rig.outstanding_calls()[0], ran_ms=0.4)
    rig.steps()
    waiting = rig.scheduler.clients[b"c"].requests
    assert waiting[urgent].attempts == 1 and waiting[near].attempts == 0


def test_keys_that_are_remembered_have_a_bound() -> None:
    rig, _, _ = with_parent()
    request = rig.scheduler.clients[b"c"].requests[1]
    assert request.call is not None
    places = NearPlaces()
    for number in range(MOST_KEYS + 10):
        request.call.near = f"key {number}"
        places.sent(request, number)
    assert len(places._workers) == MOST_KEYS
    assert places.worker_of(request) == MOST_KEYS + 9
    request.call.near = "key 3"
    assert places.worker_of(request) == -1


def test_deeper_calls_of_one_deadline_go_first() -> None:
    rig, parent, _ = with_parent("f", "g", slots=1)
    for child in range(2):
        rig.chain(parent, child)
    rig.suspend(parent, 0, 1)
    rig.later(1)
    first = others(rig, parent)[0]
    rig.chain(first, 0, "g")
    rig.suspend(first, 0)
    for call in others(rig, parent, first):  # what was on its way already
        rig.error(call, Code.EXEC_TOO_LATE)
    rig.later(1)
    calls = others(rig, parent, first)
    assert calls[0].model_id == rig.id_of("g")


def served(near: bool) -> int:
    """How many of 800 calls two hosts serve in time that are asked for a fifth more than they can."""
    draw = random.Random(1)
    at_ns, arrivals = 0, []
    for _ in range(800):
        at_ns += round(draw.expovariate(1.2 * 4 / (2 * MS)))
        key = f"key {draw.randrange(16)}"
        arrivals.append(
            CallArrival(at_ns=at_ns, function="f", slo_ns=50 * MS, near=key if near else "")
        )
    function = EmulatedFunction(name="f", scripts=(Script((Run(2 * MS),)),), cold_ns=MS)
    host = HostPlan(functions=(function,), slots=2)
    outcome = simulate_calls(CallSpec(hosts=(host, host), arrivals=tuple(arrivals)))
    return codes(outcome)[0]


def test_near_costs_little_under_overload() -> None:
    """What is sent near counts as served: else the forecast would refuse more than it has to."""
    assert served(near=True) > 0.95 * served(near=False)
