"""Calls of functions that are still being made ready: they wait, as a client's load does."""

from __future__ import annotations

from chains_rig import CallRig
from scheduler_rig import MS
from slosched.codes import Code
from slosched.core.scheduler.interface import FromClient, SendFailed
from slosched.messages import Call, FunctionInfo, LoadModel, LoadModelReply, LoadModelRequest


def two(**more: FunctionInfo) -> tuple[CallRig, Call, int]:
    """A running call of "f"; its worker is still preparing "slow"."""
    rig = CallRig({"f": FunctionInfo(), "slow": more.get("slow", FunctionInfo())}, slots=2)
    rig.enter(prepares=("f",))
    rig.handle(FromClient(b"c", LoadModelRequest(1, "f")))
    request_id = rig.call("f", slo_ms=3000)
    rig.later(1)
    call = rig.one()
    rig.now_ns += MS
    return rig, call, request_id


def becomes_ready(rig: CallRig) -> None:
    rig.prepare("slow")
    rig.weights_loaded()
    rig.steps()


def test_a_child_of_a_function_that_is_being_made_ready_waits_for_it() -> None:
    rig, parent, request_id = two()
    rig.chain(parent, 0, "slow", size=7)
    rig.step()
    rig.suspend(parent, 0)
    rig.later(500)
    assert not rig.child_replies() and rig.scheduler.arrived == 2
    becomes_ready(rig)
    (child,) = [each for each in rig.outstanding_calls() if each.action_id != parent.action_id]
    assert child.model_id == rig.id_of("slow") and child.input_size == 7
    rig.now_ns += 2 * MS
    rig.result(child)
    rig.step()
    assert [each.code for each in rig.child_replies()] == [Code.OK]
    rig.resume(parent)
    rig.now_ns += MS
    rig.result(parent)
    rig.step()
    assert rig.reply(request_id).code == Code.OK
    assert rig.scheduler.idle


def test_it_waits_until_its_deadline_and_not_longer() -> None:
    rig, parent, _ = two()
    rig.chain(parent, 0, "slow", slo_ns=50 * MS)
    rig.step()
    due_ns = rig.scheduler.next_wakeup_ns()
    assert due_ns is not None and due_ns <= rig.now_ns + 50 * MS
    rig.later(49)
    assert not rig.child_replies()
    rig.later(2)
    (reply,) = rig.child_replies()
    assert reply.code == Code.TIMED_OUT and "'slow' was not ready in time" in reply.reason
    becomes_ready(rig)
    assert len(rig.child_replies()) == 1


def test_a_load_that_fails_refuses_what_waited_for_it_and_what_comes_later() -> None:
    rig, parent, _ = two()
    rig.chain(parent, 0, "slow")
    rig.step()
    rig.functions["slow"] = FunctionInfo(size_classes=17)
    rig.prepare("slow")
    rig.steps()
    rig.chain(parent, 1, "slow")
    rig.step()
    replies = rig.child_replies()
    assert [each.code for each in replies] == [Code.UNKNOWN_MODEL] * 2
    assert all("cannot be loaded: " in each.reason for each in replies)


def test_what_waited_is_checked_against_the_function_that_came() -> None:
    rig, parent, _ = two(slow=FunctionInfo(size_classes=2, max_payload_bytes=10))
    rig.chain(parent, 0, "slow", size_class=2)
    rig.chain(parent, 1, "slow", size=11)
    rig.chain(parent, 2, "slow", size_class=1)
    rig.step()
    becomes_ready(rig)
    replies = rig.child_replies()
    assert [each.child for each in replies] == [0, 1]
    assert "no class 2" in replies[0].reason and "at most 10" in replies[1].reason
    assert [each.size_class for each in rig.outstanding_calls()] == [0, 1]


def test_what_waits_ends_with_its_parent_or_when_that_takes_it_back() -> None:
    rig, parent, _ = two()
    rig.chain(parent, 0, "slow")
    rig.chain(parent, 1, "slow")
    rig.step()
    rig.take_back(parent, 0)
    rig.step()
    assert [(each.child, each.code) for each in rig.child_replies()] == [(0, Code.CANCELLED)]
    rig.now_ns += 2 * MS
    rig.result(parent)
    rig.steps()
    becomes_ready(rig)
    assert not rig.outstanding_calls() and rig.scheduler.idle


def test_calls_wait_for_a_worker_that_has_come_back_to_prepare_what_it_offers() -> None:
    """Its function is known, and for a moment it runs nowhere."""
    rig = CallRig.serving()
    rig.call()
    rig.step()
    rig.handle(SendFailed(0, rig.one()))
    rig.steps()
    refused = rig.call()
    rig.step()
    assert rig.reply(refused).code == Code.COULD_NOT_START_IN_TIME
    rig.enter(prepares=(), resident=False)
    waits = rig.call()
    rig.later(100)
    assert not rig.answered(waits)
    assert rig.to_worker(LoadModel)[-1].name == "f"
    rig.prepare("f")
    rig.weights_loaded()
    rig.steps()
    rig.now_ns += 2 * MS
    rig.result(rig.outstanding_calls()[-1])
    rig.step()
    assert rig.reply(waits).code == Code.OK


def test_a_function_that_no_worker_offers_is_refused_at_once_with_those_that_there_are() -> None:
    rig, parent, _ = two()
    rig.chain(parent, 0, "slov")
    rig.step()
    (reply,) = rig.child_replies()
    assert reply.code == Code.UNKNOWN_MODEL
    assert "no worker offers a function 'slov'" in reply.reason and "slow" in reply.reason
    rig.handle(FromClient(b"c", LoadModelRequest(7, "slov")))
    rig.step()
    last = rig.to_client(LoadModelReply)[-1]
    assert last.code == Code.UNKNOWN_MODEL and "slow" in last.reason
