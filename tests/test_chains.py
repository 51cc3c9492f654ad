"""Calls that make calls: children, suspensions, limits, and what follows when one of them ends."""

from __future__ import annotations

import pytest

from chains_rig import CallRig, others, with_parent
from scheduler_rig import MS
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.chains import MOST_DEPTH
from slosched.core.scheduler.interface import (
    ClientLost,
    Drain,
    FromClient,
    Keep,
    Note,
    SendFailed,
    ToWorker,
)
from slosched.messages import Call, ChildReply, Goodbye

# ---------------------------------------------------------------------------- children


def test_a_child_is_a_request_of_its_own_and_its_answer_goes_to_its_parent() -> None:
    rig, parent, request_id = with_parent("f", "g", slots=2)
    rig.chain(parent, 0, "g", size=17)
    effects = rig.step()
    (child,) = others(rig, parent)
    assert child.model_id == rig.id_of("g")
    assert (child.parent_id, child.call_id) == (0, 1)
    assert child.deadline_ns == parent.deadline_ns - 1000  # what its parent has, less a microsecond
    (sent,) = [e for e in effects if isinstance(e, ToWorker) and e.message is child]
    assert [value.size for value in sent.inputs if value] == [17]
    assert [e.owner for e in effects if isinstance(e, Keep)] == [1]
    rig.now_ns += 2 * MS
    rig.result(child, size=5)
    effects = rig.step()
    (reply,) = rig.child_replies()
    assert (reply.session, reply.action_id, reply.child) == (parent.session, parent.action_id, 0)
    assert (reply.code, reply.output_size, reply.worker_id) == (0, 5, 0)
    (sent,) = [e for e in effects if isinstance(e, ToWorker) and e.message is reply]
    assert [value.size for value in sent.inputs if value] == [5]
    assert not rig.answered(request_id)
    rig.now_ns += 2 * MS
    rig.result(parent, ran_ms=4, children=1)
    rig.step()
    assert rig.reply(request_id).code == 0
    child_record, record = rig.calls_done()
    assert (child_record.parent, child_record.child, child_record.request_id) == (0, 0, request_id)
    assert (record.parent, record.child, record.children) == (-1, -1, 1)


def test_a_child_has_its_own_slo_within_what_is_left_of_its_parents() -> None:
    rig, parent, _ = with_parent(slots=4)
    rig.chain(parent, 0, slo_ns=20 * MS, ran_ns=123)
    rig.chain(parent, 1, slo_ns=5000 * MS, near="key", near_child=0)
    rig.step()
    first, second = others(rig, parent)
    assert first.deadline_ns == rig.at(21)
    assert second.deadline_ns == parent.deadline_ns - 1000
    rig.now_ns += 2 * MS
    rig.result(first)
    rig.result(second)
    rig.step()
    records = rig.calls_done()
    assert [each.asked_ran_ns for each in records] == [123, 0]
    assert [(each.near, each.near_child) for each in records] == [("", -1), ("key", 0)]


def test_a_hopeless_child_is_refused_at_once_and_the_reason_reaches_its_parent() -> None:
    rig, parent, _ = with_parent(slots=4)
    rig.chain(parent, 0, slo_ns=MS)
    rig.step()
    (reply,) = rig.child_replies()
    assert reply.code == Code.COULD_NOT_START_IN_TIME and "the deadline is in 1ms" in reply.reason
    assert (reply.output_size, reply.worker_id) == (0, -1)
    assert others(rig, parent) == []


def test_a_child_of_a_call_past_its_deadline_is_hopeless() -> None:
    rig, parent, _ = with_parent(slots=4)
    rig.step(1500)
    rig.chain(parent, 0)
    rig.step()
    assert rig.child_replies()[0].code == Code.COULD_NOT_START_IN_TIME


def test_an_error_of_a_child_reaches_its_parent_with_its_lines() -> None:
    rig, parent, request_id = with_parent(slots=2)
    rig.chain(parent, 0)
    rig.step()
    (child,) = others(rig, parent)
    rig.now_ns += 2 * MS
    rig.error(child, Code.CALL_RAISED, "Traceback\nValueError: 3")
    rig.step()
    (reply,) = rig.child_replies()
    assert (reply.code, reply.reason) == (Code.CALL_RAISED, "Traceback\nValueError: 3")
    assert not rig.answered(request_id)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({"function": "nothing"}, Code.UNKNOWN_MODEL, "function 'nothing'; they offer: f"),
        ({"size_class": 1}, Code.INVALID_REQUEST, "there is no class 1"),
        ({"size": 101}, Code.INVALID_REQUEST, "takes at most 100"),
    ],
)
def test_a_child_that_cannot_be_is_answered_in_words(
    more: dict[str, object], code: Code, words: str
) -> None:
    rig, parent, _ = with_parent(slots=2, info={"max_payload_bytes": 100})
    rig.chain(parent, 0, **more)  # type: ignore[arg-type]
    rig.step()
    (reply,) = rig.child_replies()
    assert reply.code == code and words in reply.reason
    assert rig.scheduler.arrived == 1  # it never was a request


def test_a_model_is_no_function_for_a_child() -> None:
    rig = CallRig.serving("f", gpus=1, slots=2)
    rig.load_beside()
    rig.call()
    rig.step()
    rig.chain(rig.one(), 0, "net")
    rig.step()
    assert rig.child_replies()[0].code == Code.UNKNOWN_MODEL


def test_a_child_whose_arguments_are_missing_is_not_run() -> None:
    rig, parent, _ = with_parent(slots=2)
    rig.chain(parent, 0, size=0)
    message = rig.child_request(parent, 1, input_size=9)
    rig.tell(message, 0)
    rig.step()
    (reply,) = rig.child_replies()
    assert (reply.child, reply.code) == (1, Code.INVALID_REQUEST)
    assert "did not come with it" in reply.reason


def test_a_child_that_comes_twice_runs_once() -> None:
    rig, parent, _ = with_parent(slots=4)
    for _ in range(2):
        rig.chain(parent, 0)
    rig.step()
    assert len(others(rig, parent)) == 1
    rig.now_ns += 2 * MS
    rig.result(others(rig, parent)[0])
    rig.chain(parent, 0)
    rig.step()
    assert len(rig.child_replies()) == 1 and not others(rig, parent)


def test_a_call_is_so_deep_at_most() -> None:
    rig, parent, _ = with_parent(slots=2)
    call = rig.scheduler.clients[b"c"].requests[1].call
    assert call is not None
    call.depth = MOST_DEPTH - 1
    rig.chain(parent, 0)
    rig.step()
    (child,) = others(rig, parent)
    rig.chain(child, 0)
    rig.step()
    (reply,) = rig.child_replies()
    assert reply.code == Code.LIMIT_REACHED and "1000 calls above it" in reply.reason


def test_a_call_has_so_many_unanswered_children_at_most() -> None:
    rig, parent, _ = with_parent()
    call = rig.scheduler.clients[b"c"].requests[1].call
    assert call is not None
    for child in range(10_001):
        rig.chain(parent, child)
    rig.steps()
    (reply,) = rig.child_replies()
    assert (reply.child, reply.code) == (10_000, Code.LIMIT_REACHED)
    assert len(call.children) == 10_000
    rig.error(parent, Code.CALL_RAISED)
    rig.steps()
    assert rig.scheduler.idle and not rig.scheduler.arrivals.children


def test_children_count_as_requests_of_the_client_at_the_root() -> None:
    config = SchedulerConfig(max_client_requests=3, max_client_bytes=100)
    rig, parent, _ = with_parent(config=config)
    rig.chain(parent, 0, size=90)
    rig.chain(parent, 1, size=90)
    rig.chain(parent, 2)
    rig.chain(parent, 3)
    rig.steps()
    bytes_reply, count_reply = rig.child_replies()
    assert (bytes_reply.child, bytes_reply.code) == (1, Code.LIMIT_REACHED)
    assert "--max-client-bytes" in bytes_reply.reason
    assert (count_reply.child, count_reply.code) == (3, Code.LIMIT_REACHED)
    assert "--max-client-requests" in count_reply.reason
    assert rig.scheduler.limits.input_bytes == 94
    rig.error(parent, Code.CALL_RAISED)
    rig.steps()
    assert rig.scheduler.limits.input_bytes == 0 and not rig.scheduler.clients[b"c"].requests


# ---------------------------------------------------------------------------- suspensions


def test_a_call_that_awaits_gives_its_slot_to_its_child_and_takes_it_again() -> None:
    rig, parent, request_id = with_parent(slots=1)
    rig.chain(parent, 0)
    rig.step()
    (host,) = rig.scheduler.cluster.gpus.values()
    rig.now_ns += MS
    rig.suspend(parent, 0, ran_ms=1.25)
    assert list(host.suspended) == [parent.action_id]
    assert parent.action_id not in {a.action_id for a in host.exec.outstanding}
    rig.step()
    (child,) = others(rig, parent)
    rig.now_ns += 2 * MS
    rig.result(child)
    rig.step()
    rig.now_ns += MS
    rig.resume(parent)
    assert not host.suspended and parent.action_id in {a.action_id for a in host.exec.outstanding}
    rig.now_ns += MS
    rig.result(parent, ran_ms=4.25, children=1)  # it reports the whole, from its first begin
    rig.step()
    assert rig.reply(request_id).code == 0
    record = rig.calls_done()[-1]
    first, _, last = rig.parts_done()
    assert (first.awaits, first.part, last.part) == ((0,), 0, 1)
    assert record.start_ns == first.begin_ns
    assert last.end_ns == rig.now_ns - MS // 4


def test_a_suspended_call_has_the_time_that_it_ran_in_its_record_and_teaches_it() -> None:
    rig, parent, _ = with_parent(slots=1)
    rig.chain(parent, 0)
    rig.now_ns += MS
    rig.suspend(parent, 0, ran_ms=1)
    rig.later(1)
    (child,) = others(rig, parent)
    rig.later(10)
    rig.result(child)
    rig.later(1)
    rig.resume(parent)
    rig.later(2)
    rig.returned(parent, began_ms=0.75, ran_ms=3)
    rig.step()
    record = rig.calls_done()[-1]
    assert record.exec_ns == 3 * MS
    assert record.start_ns + record.exec_ns + record.suspended_ns == rig.now_ns - MS // 4
    (host,) = rig.scheduler.cluster.gpus.values()
    assert host.busy_ns == 4 * MS  # of it and its child


def test_nested_calls_end_with_one_slot() -> None:
    """1 -> 4 -> 16, played with one slot: a call that awaits holds none."""
    rig = CallRig.serving(slots=1)
    request_id = rig.call(slo_ms=100_000)
    rig.steps()
    waiting: dict[int, int] = {}  # by action: children without an answer
    depth_of = {0: 0}
    parents: dict[int, Call] = {}
    replies = 0
    for _ in range(400):
        if rig.answered(request_id):
            break
        rig.later(1.5)
        for reply in rig.child_replies()[replies:]:
            replies += 1
            waiting[reply.action_id] -= 1
            if waiting[reply.action_id] == 0:
                parent = parents.pop(reply.action_id)
                rig.resume(parent)
                rig.later(0.5)
                rig.returned(parent, began_ms=(rig.now_ns - rig.at(0)) / MS - 1, ran_ms=0.75)
                rig.steps()
        running = [c for c in rig.outstanding_calls() if c.action_id not in waiting]
        if not running:
            continue
        call = running[0]
        depth = depth_of[call.call_id]
        if depth == 2:
            rig.result(call)
        else:
            for child in range(4):
                depth_of[rig.scheduler.arrived] = depth + 1
                rig.chain(call, child)
            waiting[call.action_id], parents[call.action_id] = 4, call
            rig.suspend(call, 0, 1, 2, 3)
        rig.steps()
    assert rig.reply(request_id).code == 0
    assert len(rig.calls_done()) == 21 and rig.scheduler.idle
    assert not rig.outstanding_calls()


def test_the_worker_of_a_suspended_call_drains_until_that_has_ended() -> None:
    rig, parent, request_id = with_parent(slots=1, workers=2)
    home = rig.worker_of(parent)
    rig.chain(parent, 0)
    rig.suspend(parent, 0)
    worker = rig.scheduler.cluster.workers[home]
    rig.scheduler.sessions.drain(worker, now_ns=rig.now_ns)
    rig.steps()
    (child,) = others(rig, parent)
    assert rig.worker_of(child) != home and worker.standing == "draining"
    rig.now_ns += 2 * MS
    rig.result(child)
    rig.later(1)
    rig.resume(parent)
    rig.later(1)
    rig.returned(parent, began_ms=0.75, ran_ms=1)
    rig.steps()
    assert rig.reply(request_id).code == 0
    assert worker.standing == "drained"


# -------------------------------------------------------------------------------- ends


def grown() -> tuple[CallRig, Call, Call, int]:
    """A call suspended for a child that is suspended for children: one runs, and others are queued."""
    rig, parent, request_id = with_parent(slots=1)
    rig.chain(parent, 0)
    rig.suspend(parent, 0)
    rig.later(1)
    (middle,) = others(rig, parent)
    for child in range(4):
        rig.chain(middle, child)
    rig.suspend(middle, 0, 1, 2, 3)
    rig.later(1)
    assert others(rig, parent, middle)
    return rig, parent, middle, request_id


@pytest.mark.parametrize(
    "how", ["cancelled", "client left", "client lost", "raised", "died", "lost"]
)
def test_the_end_of_a_call_ends_all_that_it_began(how: str) -> None:
    rig, parent, middle, request_id = grown()
    running = others(rig, parent, middle)
    if how == "cancelled":
        rig.cancel(request_id)
    elif how == "client left":
        rig.handle(FromClient(b"c", Goodbye()))
    elif how == "client lost":
        rig.handle(ClientLost(b"c"))
    elif how == "raised":
        rig.error(parent, Code.CALL_RAISED)
    elif how == "died":
        rig.error(parent, Code.MODEL_PROCESS_ENDED)
    else:
        rig.handle(SendFailed(0, parent))
    rig.steps()
    assert rig.scheduler.idle and not rig.scheduler.arrivals.children
    assert len(rig.calls_done()) == 6
    assert rig.child_replies() == []  # no call is left that waits for them
    ended = {call.action_id for call in (middle, *running)}
    if how in ("cancelled", "client left", "client lost"):
        ended.add(parent.action_id)
    assert set(rig.cancels()) == (set() if how == "lost" else ended)
    for call in rig.outstanding_calls():
        rig.error(call, Code.CANCELLED)
    rig.steps()
    assert not rig.outstanding_calls() and not rig.scheduler.cluster.actions


def test_children_whose_parent_returned_without_awaiting_them_are_taken_back() -> None:
    rig, parent, request_id = with_parent(slots=1)
    for child in range(3):
        rig.chain(parent, child)
    rig.later(1)
    rig.result(parent, children=3)
    rig.steps()
    assert rig.reply(request_id).code == 0
    assert [each.code for each in rig.calls_done()] == [1, 1, 1, 0]
    assert rig.scheduler.idle


def test_a_child_that_is_taken_back_is_answered_with_code_1_wherever_it_is() -> None:
    rig, parent, _ = with_parent(slots=1)
    for child in range(2):
        rig.chain(parent, child)
    rig.suspend(parent, 0, 1)
    rig.step()
    (running,) = others(rig, parent)
    rig.take_back(parent, 0)
    rig.take_back(parent, 1)
    rig.take_back(parent, 1)
    rig.take_back(parent, 7)
    rig.steps()
    codes = [(each.child, each.code) for each in rig.child_replies()]
    assert codes == [(0, 1), (1, 1)]
    assert rig.cancels() == [running.action_id]


def test_the_death_of_a_child_is_told_and_its_siblings_go_on() -> None:
    rig, parent, request_id = with_parent(slots=3)
    for child in range(2):
        rig.chain(parent, child)
    rig.step()
    first, second = others(rig, parent)
    rig.now_ns += 2 * MS
    rig.error(first, Code.MODEL_PROCESS_ENDED, "signal 11")
    rig.steps()
    (reply,) = rig.child_replies()
    assert (reply.child, reply.code, reply.reason) == (0, Code.MODEL_PROCESS_ENDED, "signal 11")
    assert set(rig.outstanding_calls()) == {parent, second} and not rig.answered(request_id)


def test_an_idempotent_parent_that_begins_again_has_children_of_its_own() -> None:
    rig, parent, request_id = with_parent(slots=2, info={"idempotent": True})
    rig.chain(parent, 0)
    rig.step()
    (child,) = others(rig, parent)
    rig.now_ns += 2 * MS
    rig.error(parent, Code.MODEL_PROCESS_ENDED)
    rig.steps()
    assert rig.cancels() == [child.action_id]
    rig.error(child, Code.CANCELLED)
    rig.later(1)
    again = rig.one()
    assert again.call_id == parent.call_id
    rig.chain(again, 0)
    rig.step()
    (second,) = others(rig, again)
    rig.now_ns += 2 * MS
    rig.result(second)
    rig.step()
    (reply,) = rig.child_replies()
    assert (reply.action_id, reply.code) == (again.action_id, 0)
    assert not rig.answered(request_id)


def test_a_worker_that_is_lost_with_parent_and_child_is_told_nothing() -> None:
    rig, parent, _, request_id = grown()
    rig.handle(SendFailed(0, parent))
    rig.steps()
    assert rig.reply(request_id).code == Code.CANCELLED
    assert "was lost" in rig.reply(request_id).reason
    assert not rig.child_replies() and not rig.cancels()


def test_a_controller_that_drains_takes_children_and_no_calls() -> None:
    rig, parent, request_id = with_parent(slots=2)
    rig.handle(Drain())
    rig.chain(parent, 0)
    refused = rig.call()
    rig.step()
    assert rig.reply(refused).code == Code.SHUTTING_DOWN
    (child,) = others(rig, parent)
    rig.now_ns += 2 * MS
    rig.result(child)
    rig.result(parent, children=1)
    rig.steps()
    assert rig.reply(request_id).code == 0 and rig.scheduler.idle


def test_a_controller_that_ends_answers_the_root_and_takes_no_more_children() -> None:
    rig, parent, middle, request_id = grown()
    for _ in range(10):
        effects = rig.scheduler.abandon(now_ns=rig.now_ns)
        rig.checker.check(effects, now_ns=rig.now_ns)
        rig.effects += effects
    assert rig.reply(request_id).code == Code.SHUTTING_DOWN and rig.scheduler.idle
    rig.chain(parent, 1)
    rig.chain(middle, 4)
    assert rig.scheduler.idle


# -------------------------------------------------------------------------- lost messages


def test_a_call_that_awaits_what_was_never_asked_for_is_told_so() -> None:
    rig, parent, _ = with_parent()
    rig.chain(parent, 0)
    rig.suspend(parent, 0, 1, 2)
    rig.steps()
    lost = [(each.child, each.code) for each in rig.child_replies()]
    assert lost == [(1, Code.CANCELLED), (2, Code.CANCELLED)]
    assert "was lost" in rig.child_replies()[0].reason


def test_a_worker_that_does_not_let_a_call_go_on_is_lost() -> None:
    """The answer of a child was lost on its way, with a connection that broke for a moment."""
    rig, parent, request_id = with_parent()
    rig.chain(parent, 0)
    rig.suspend(parent, 0)
    rig.later(1)
    (child,) = others(rig, parent)
    rig.later(2)
    rig.result(child)
    rig.wait(4000, parent)
    assert not rig.answered(request_id)
    rig.wait(3000, parent)
    assert rig.reply(request_id).code == Code.CANCELLED
    notes = [e.text for e in rig.effects if isinstance(e, Note)]
    assert any("does not go on with call 0" in note for note in notes)


def test_a_call_that_waits_long_for_a_slot_is_not_stuck() -> None:
    rig, parent, request_id = with_parent(info={"limit_ns": 60_000 * MS, "slo_ns": 60_000 * MS})
    rig.chain(parent, 0)
    rig.suspend(parent, 0)
    rig.later(1)
    (child,) = others(rig, parent)
    long = rig.call(slo_ms=100_000)
    rig.later(1)
    (other,) = others(rig, parent, child)
    rig.later(1)
    rig.result(child)
    rig.wait(10_000, parent, other)
    assert not rig.answered(request_id) and not rig.answered(long)


def test_words_of_a_call_that_has_ended_are_ignored() -> None:
    rig, parent, _ = with_parent(slots=2)
    rig.now_ns += MS
    rig.result(parent)
    rig.chain(parent, 0)
    rig.suspend(parent)
    rig.resume(parent)
    rig.take_back(parent, 0)
    rig.steps()
    assert rig.scheduler.idle and not rig.child_replies()


def test_a_cancelled_call_gets_no_children_and_no_answers() -> None:
    rig, parent, request_id = with_parent(slots=2)
    rig.chain(parent, 0)
    rig.step()
    (child,) = others(rig, parent)
    rig.cancel(request_id)
    rig.chain(parent, 1)
    rig.steps()
    rig.now_ns += 2 * MS
    rig.result(child)
    rig.steps()
    assert rig.scheduler.idle and not rig.child_replies()
    assert set(rig.cancels()) == {parent.action_id, child.action_id}


# ------------------------------------------------------------------------------ invariants


def test_a_body_that_would_begin_twice_is_seen() -> None:
    rig, parent, _ = with_parent()
    request = rig.scheduler.clients[b"c"].requests[1]
    rig.error(parent, Code.EXEC_TOO_LATE)
    rig.checker._calls._begun[request.key] = 1  # as if it had begun
    with pytest.raises(InvariantViolated, match="may run the body of a call a second time"):
        rig.step()


def test_a_child_that_would_be_answered_twice_is_seen() -> None:
    rig, parent, _ = with_parent(slots=2)
    rig.chain(parent, 0)
    rig.step()
    (child,) = others(rig, parent)
    rig.now_ns += 2 * MS
    rig.result(child)
    effects = rig.scheduler.schedule(now_ns=rig.now_ns)
    again = next(
        e for e in effects if isinstance(e, ToWorker) and isinstance(e.message, ChildReply)
    )
    with pytest.raises(InvariantViolated, match=r"child 0 of action \d+ is answered a second time"):
        rig.checker.check([again, *effects], now_ns=rig.now_ns)
