"""Who a worker works for: hello, heartbeats, take-over, stale actions, two clocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from made_messages import an_infer
from slosched.codes import Code
from slosched.config import HEARTBEAT_NS
from slosched.core.worker.interface import (
    FromController,
    ModelPrepared,
    PrepareModel,
    ReleaseModel,
)
from slosched.messages import (
    NO_SPAN,
    PROTOCOL_VERSION,
    ControllerHello,
    ErrorResult,
    GetWorkerState,
    HeartbeatAck,
    InferResult,
    LoadModel,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    WorkerRefused,
    WorkerStateResult,
    WorkerWelcome,
)
from slosched.units import NS_PER_S
from worker_rig import EXEC_NS, FOREVER_NS, MS, PEER, WEIGHTS_NS, VirtualWorker

OTHER = b"other"


def test_the_welcome_says_everything() -> None:
    welcome = VirtualWorker(gpus=3).hello()
    assert (welcome.protocol, welcome.session) == (PROTOCOL_VERSION, 100)
    assert [gpu.gpu_id for gpu in welcome.gpus] == [0, 1, 2]
    assert welcome.gpus[0].pages == 10 and welcome.gpus[0].resident == ()
    assert welcome.loadable == ("net", "other")


def test_another_protocol_is_refused_naming_both() -> None:
    worker = VirtualWorker()
    worker.give(ControllerHello(PROTOCOL_VERSION + 1, 7, times_lost=0))
    refused = worker.answer()
    assert isinstance(refused, WorkerRefused) and refused.code == Code.INVALID_REQUEST
    assert f"protocol {PROTOCOL_VERSION + 1}" in refused.reason
    assert f"protocol {PROTOCOL_VERSION}" in refused.reason


def test_a_silent_worker_sends_nothing_before_hello() -> None:
    worker = VirtualWorker()
    worker.run(NS_PER_S)
    assert not worker.sent and not worker.beats and worker.brain.next_wakeup_ns() is None


def test_heartbeats_are_quick_at_first_and_then_every_200_ms() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.run(2 * NS_PER_S)
    times = [beat.sent_ns for beat in worker.beats]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[:7] == [5 * MS] * 7
    assert gaps[8:] and set(gaps[8:]) == {HEARTBEAT_NS}


def test_heartbeats_say_what_is_prepared_and_go_on_meanwhile() -> None:
    worker = VirtualWorker(prepares=False)
    worker.hello()
    worker.load_model("net", 0)
    worker.load_model("other", 1)
    worker.run(NS_PER_S)
    last = worker.beats[-1]
    assert last.activity == "preparing net (1 more waiting)" and last.pending == 2


def test_the_same_controller_gets_a_new_session_with_its_models_but_neither_queue_nor_pages() -> (
    None
):
    worker = VirtualWorker().serving()
    worker.infer(earliest=worker.now + 20 * MS)
    worker.give(ControllerHello(PROTOCOL_VERSION, 7, times_lost=1), peer=b"reconnected")
    cancelled, welcome = worker.answers()
    assert isinstance(cancelled, ErrorResult) and cancelled.code == Code.CANCELLED
    assert isinstance(welcome, WorkerWelcome)
    assert welcome.session == 101 and welcome.gpus[0].resident == ()
    worker.run(50 * MS)
    assert worker.answers() == [], "nothing of the old session runs beside the new one"
    worker.give(GetWorkerState(worker.session, worker.action_id()), peer=b"reconnected")
    assert worker.answers() == [], "and its number is no longer taken"
    worker.give(GetWorkerState(101, 2), peer=b"reconnected")
    state = worker.answer()
    assert isinstance(state, WorkerStateResult) and len(state.models) == 2


def test_a_renewed_session_begins_when_what_runs_has_ended() -> None:
    worker = VirtualWorker().serving(loaded=False)
    worker.load_weights()
    worker.give(ControllerHello(PROTOCOL_VERSION, 7, times_lost=1))
    assert not any(isinstance(message, WorkerWelcome) for _, message in worker.sent)
    worker.run(50 * MS)
    welcomes = [message for _, message in worker.sent if isinstance(message, WorkerWelcome)]
    assert [w.gpus[0].resident for w in welcomes] == [()], "and its pages are free"


def test_a_second_controller_is_refused_while_the_first_is_heard() -> None:
    worker = VirtualWorker().serving()
    worker.run(900 * MS)
    worker.sent.clear()
    worker.give(GetWorkerState(worker.session, worker.action_id()))
    worker.answers()
    worker.run(900 * MS)
    worker.sent.clear()
    worker.give(ControllerHello(PROTOCOL_VERSION, 8, times_lost=0), peer=OTHER)
    assert worker.sent[0][0] == OTHER
    refused = worker.answer()
    assert isinstance(refused, WorkerRefused) and "another controller" in refused.reason
    worker.give(GetWorkerState(worker.session, worker.action_id()))
    assert isinstance(worker.answer(), WorkerStateResult)


def test_a_new_controller_takes_over_a_worker_whose_own_is_silent() -> None:
    worker = VirtualWorker().serving()
    worker.run(2 * NS_PER_S)
    worker.answers()
    worker.infer(batch=4)  # heard again just now, so the next hello must wait
    worker.infer()
    worker.run(1 * MS)
    worker.brain._link._heard_ns -= 2 * NS_PER_S
    worker.give(ControllerHello(PROTOCOL_VERSION, 8, times_lost=0), peer=OTHER)
    # What was queued is answered to the old one; the new one waits until the running op has ended.
    cancelled = worker.sent[-1]
    assert cancelled[0] == PEER
    assert isinstance(cancelled[1], ErrorResult) and cancelled[1].code == Code.CANCELLED
    assert not any(isinstance(message, WorkerWelcome) for _, message in worker.sent)
    worker.sent.clear()
    worker.run(EXEC_NS[4])
    (first_peer, first), (second_peer, second) = worker.sent[:2]
    assert first_peer == PEER and isinstance(first, InferResult) and first.session == 100
    assert second_peer == OTHER and isinstance(second, WorkerWelcome)
    assert second.session == 101 and second.gpus[0].resident == ()
    assert worker.brain.free_pages(0) == 10
    released = [e.model_id for e in worker.effects if isinstance(e, ReleaseModel)]
    assert released == [0, 1]


def test_actions_of_another_session_are_dropped_and_counted() -> None:
    worker = VirtualWorker().serving()
    for session in (99, 101):
        worker.give(
            LoadWeights(
                session,
                50,
                model_id=1,
                gpu_id=0,
                earliest_ns=0,
                latest_ns=FOREVER_NS,
                expected_duration_ns=0,
            )
        )
        worker.give(an_infer(session, 51, latest_ns=FOREVER_NS))
    assert not worker.answers()
    worker.run(NS_PER_S)
    assert worker.beats[-1].dropped == 4


def test_a_second_copy_of_an_action_is_dropped_and_counted() -> None:
    """Weights would be loaded again beside an Infer that uses them, and the controller counts them once."""
    worker = VirtualWorker().serving()
    again = LoadWeights(
        worker.session,
        worker.action_id(),
        model_id=0,
        gpu_id=0,
        earliest_ns=0,
        latest_ns=FOREVER_NS,
        expected_duration_ns=0,
    )
    worker.give(again)
    worker.run(100 * MS)
    assert len(worker.answers()) == 1
    worker.give(again)
    worker.run(NS_PER_S)
    assert not worker.answers() and worker.beats[-1].dropped == 1


def test_actions_before_any_hello_are_dropped() -> None:
    worker = VirtualWorker()
    worker.give(GetWorkerState(100, 1))
    assert not worker.answers() and worker.brain.dropped == 1


def test_a_preparation_of_the_old_session_does_not_reach_the_new_one() -> None:
    worker = VirtualWorker(prepares=False)
    worker.hello()
    old_key = worker.load_model("net", 0)
    assert old_key is not None
    worker.run(3 * NS_PER_S)
    worker.sent.clear()
    worker.give(ControllerHello(PROTOCOL_VERSION, 8, times_lost=0), peer=OTHER)
    cancelled, welcome = worker.answers()
    assert isinstance(cancelled, ErrorResult) and cancelled.code == Code.CANCELLED
    assert isinstance(welcome, WorkerWelcome)
    worker.session = welcome.session
    new_key = worker.load_model("other", 0)  # the same id, another model
    prepares = [effect for effect in worker.effects if isinstance(effect, PrepareModel)]
    assert [p.action_id for p in prepares] == [old_key]
    for key, name in ((old_key, "net"), (new_key, "other")):
        assert key is not None
        done = ModelPrepared(key, worker.profile.models[name], NO_SPAN)
        worker.stepper.handle(done, now_ns=worker.now)
        worker.stepper.step(worker.now)
    assert isinstance(worker.answer(), LoadModelResult)
    assert ReleaseModel(0, "net", last=True) in worker.effects
    worker.load_model("other", 0)
    assert isinstance(worker.answer(), LoadModelResult)


@pytest.mark.parametrize("offset_ns", [-3 * NS_PER_S // 4, 0, 5 * NS_PER_S])
def test_windows_are_kept_on_the_controllers_clock(offset_ns: int) -> None:
    """Our clock is `offset_ns` ahead of the controller's; all messages speak the controller's time."""
    worker = VirtualWorker(now=10 * NS_PER_S)
    worker.hello()
    for _ in range(8):  # both ways take 1 ms
        beat = worker.beats[-1]
        theirs = beat.sent_ns + 1 * MS - offset_ns
        worker.run(2 * MS)
        worker.give(HeartbeatAck(beat.sent_ns, theirs, theirs))
        worker.run(3 * MS)
    last = worker.beats[-1]
    assert (last.clock_offset_ns, last.clock_error_ns) == (offset_ns, 1 * MS)
    worker.answers()
    worker.load_model()
    worker.answer()
    worker.load_weights()
    worker.run(WEIGHTS_NS)
    begin = worker.now - WEIGHTS_NS - offset_ns
    loaded = worker.answer()
    assert (loaded.span.begin_ns, loaded.received_ns) == (begin, begin)
    assert loaded.sent_ns == loaded.span.end_ns
    start = worker.now - offset_ns + 30 * MS
    worker.infer(earliest=start, latest=start)
    worker.run(100 * MS)
    answer = worker.answer()
    assert answer.exec.begin_ns == start
    assert answer.copy_output.end_ns == start + EXEC_NS[1] == answer.sent_ns


def test_acknowledgements_that_cannot_be_are_counted_and_ignored() -> None:
    worker = VirtualWorker()
    worker.hello()
    beat = worker.beats[-1]
    bad = [
        (PEER, HeartbeatAck(worker.now + NS_PER_S, 0, 0)),  # of the future
        (
            PEER,
            HeartbeatAck(0, 0, 0) if worker.now > 10 * NS_PER_S else HeartbeatAck(-(10**11), 0, 0),
        ),
        (OTHER, HeartbeatAck(beat.sent_ns, 0, 0)),  # of a stranger
    ]
    for peer, ack in bad:
        worker.stepper.handle(FromController(peer, ack), now_ns=worker.now)
    assert worker.brain.dropped == 3 and not worker.brain._link.clock.synchronised


def test_a_load_repeated_while_it_is_prepared_is_prepared_once() -> None:
    worker = VirtualWorker(prepares=False)
    worker.hello()
    key = worker.load_model("net", 0)
    worker.load_model("net", 0)
    assert key is not None
    worker.stepper.handle(
        ModelPrepared(key, worker.profile.models["net"], NO_SPAN), now_ns=worker.now
    )
    worker.stepper.step(worker.now)
    first, second = worker.answers()
    assert isinstance(first, LoadModelResult) and isinstance(second, LoadModelResult)
    assert second.action_id == first.action_id + 1
    assert sum(isinstance(effect, PrepareModel) for effect in worker.effects) == 1


def test_two_loads_of_the_same_id_as_different_models() -> None:
    worker = VirtualWorker(prepares=False)
    worker.hello()
    key = worker.load_model("net", 0)
    worker.load_model("other", 0)
    assert key is not None
    done = ModelPrepared(key, replace(worker.profile.models["net"]), NO_SPAN)
    worker.stepper.handle(done, now_ns=worker.now)
    worker.stepper.step(worker.now)
    first, second = worker.answers()
    assert isinstance(first, LoadModelResult)
    assert isinstance(second, ErrorResult) and second.code == Code.INVALID_MODEL_ID


def test_a_load_model_message_carries_a_negative_window_as_nonsense() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.give(
        LoadModel(
            worker.session,
            1,
            name="net",
            model_id=0,
            copies=1,
            max_batch=16,
            max_exec_ns=NS_PER_S,
            earliest_ns=10,
            latest_ns=5,
        )
    )
    assert worker.error()[0] == Code.INVALID_ACTION


def test_a_hello_that_comes_again_changes_nothing_and_is_welcomed_again() -> None:
    worker = VirtualWorker()
    hello = ControllerHello(PROTOCOL_VERSION, 7, times_lost=2)
    worker.give(hello)
    first = worker.answer()
    assert isinstance(first, WorkerWelcome)
    worker.session = first.session
    worker.load_model()
    assert isinstance(worker.answer(), LoadModelResult)
    worker.load_weights()
    for late in (hello, ControllerHello(PROTOCOL_VERSION, 7, times_lost=1)):
        worker.give(late)
        again = worker.answer()
        assert isinstance(again, WorkerWelcome) and again.session == first.session
    worker.run(WEIGHTS_NS)
    assert isinstance(worker.answer(), LoadWeightsResult), "the session goes on"
    worker.give(ControllerHello(PROTOCOL_VERSION, 7, times_lost=3))
    renewed = worker.answer()
    assert isinstance(renewed, WorkerWelcome) and renewed.session != first.session
