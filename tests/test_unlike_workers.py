"""Workers that offer different models under one name, and workers beyond `max_gpus`."""

from __future__ import annotations

import pytest

from made_messages import an_error, an_infer
from scheduler_rig import EXEC_MS, MS, Rig
from slosched.cli.status_text import status_text
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import FromClient, Note, SendFailed
from slosched.daemon.status import status_report
from slosched.messages import (
    Infer,
    ListModelsReply,
    ListModelsRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    ModelInfo,
    Span,
)

OLD, NEW = (4,), (8,)


def prepared(
    rig: Rig,
    worker_id: int,
    session: int,
    *,
    shape: tuple[int, ...] = OLD,
    pages: int = 1,
    scale: float = 1.0,
) -> None:
    """Answer every LoadModel of this session of the worker, with inputs of `shape`."""
    for action in rig.to_worker(LoadModel, worker_id):
        if action.session == session:
            rig.from_worker(
                LoadModelResult(
                    session=session,
                    action_id=action.action_id,
                    span=Span(0, 0, 0),
                    copies=action.copies,
                    batch_sizes=tuple(EXEC_MS),
                    exec_ns=tuple(round(ms * scale * MS) for ms in EXEC_MS.values()),
                    weights_ns=8 * MS,
                    weights_bytes=pages * 2**24,
                    pages=pages,
                    input_shape=shape,
                    input_dtype="float32",
                    output_shape=(2,),
                    output_dtype="float32",
                    random_weights=True,
                    received_ns=rig.now_ns,
                    sent_ns=rig.now_ns,
                ),
                worker_id,
            )
    rig.step()


def lose(rig: Rig, worker_id: int, session: int) -> None:
    rig.handle(
        SendFailed(
            worker_id,
            an_infer(session, 1),
        )
    )
    rig.step()


def ask(rig: Rig, request_id: int) -> None:
    rig.handle(FromClient(b"c", LoadModelRequest(request_id, "net", 1)))
    rig.step()


def loaded(rig: Rig, request_id: int) -> ModelInfo:
    (reply,) = [r for r in rig.to_client(LoadModelReply) if r.request_id == request_id]
    assert reply.code == Code.OK, reply.reason
    return reply.models[0]


def serves(rig: Rig, worker_id: int, shape: tuple[int, ...]) -> bool:
    """Whether a request with an input of `shape` goes to the worker."""
    before = len(rig.to_worker(Infer, worker_id))
    rig.infer(slo_ms=50, shape=shape, dtype="float32", input_bytes=4 * shape[0])
    rig.step()
    return len(rig.to_worker(Infer, worker_id)) == before + 1


# ------------------------------------------------------------------------------ two unlike ones


@pytest.mark.parametrize("first_ends", ["before", "after"])
def test_the_only_worker_that_prepared_a_model_is_lost_while_an_unlike_one_prepares_it(
    first_ends: str,
) -> None:
    rig = Rig(workers=2)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    ask(rig, 900)
    prepared(rig, 0, 50, pages=1)
    if first_ends == "before":
        lose(rig, 0, 50)
    prepared(rig, 1, 51, pages=7, shape=NEW)
    if first_ends == "after":
        lose(rig, 0, 50)
    rig.weights_loaded(1)
    assert loaded(rig, 900).input_shape == NEW
    assert rig.scheduler.cluster.models[0].pages == 7
    assert serves(rig, 1, NEW)


def test_a_model_that_no_worker_has_any_more_is_an_error_and_not_the_end() -> None:
    rig = Rig(workers=2)
    rig.hello()
    rig.join(0, session=50)
    ask(rig, 900)
    prepared(rig, 0, 50)
    for worker in rig.scheduler.cluster.workers.values():
        worker.prepared.clear()  # by any fault in the controller
    for model in rig.scheduler.cluster.models.values():
        model.state = model.state.LOADING
    ask(rig, 901)
    (reply,) = [r for r in rig.to_client(LoadModelReply) if r.request_id == 901]
    assert reply.code != Code.OK and reply.reason


def test_a_worker_cannot_answer_for_the_preparation_of_another() -> None:
    rig = Rig(workers=2)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    ask(rig, 900)
    (mine,) = rig.to_worker(LoadModel, 0)
    rig.from_worker(
        an_error(51, mine.action_id, Code.RUNTIME_ERROR, "not mine"),
        1,
    )
    prepared(rig, 1, 51)
    prepared(rig, 0, 50)
    rig.weights_loaded(0)
    rig.weights_loaded(1)
    assert loaded(rig, 900).input_shape == OLD
    assert 0 in rig.scheduler.cluster.workers[0].instances


# ------------------------------------------------------------------------------ rolling upgrade


def upgraded() -> Rig:
    """Two workers with the old shape; the first one comes back with the new."""
    rig = Rig(workers=2)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    ask(rig, 900)
    prepared(rig, 0, 50)
    prepared(rig, 1, 51)
    rig.weights_loaded(0)
    rig.weights_loaded(1)
    lose(rig, 0, 50)
    rig.join(0, session=60)
    prepared(rig, 0, 60, shape=NEW, pages=3, scale=2.0)
    return rig


def test_while_both_shapes_are_there_the_later_one_is_not_used_and_status_says_why() -> None:
    rig = upgraded()
    assert serves(rig, 1, OLD) and not serves(rig, 0, OLD)
    ask(rig, 901)
    assert loaded(rig, 901).input_shape == OLD
    report = status_report(rig.scheduler, now_ns=rig.now_ns)
    words = report["workers"][0]["put_aside"]["net"]
    assert (
        "float32[8]" in words and "float32[4]" in words and report["workers"][1]["put_aside"] == {}
    )
    assert "worker 0 put net aside: it offers another" in status_text("a:1", report)
    assert any("offers another 'net'" in e.text for e in rig.effects if isinstance(e, Note))


def test_once_the_last_worker_with_the_old_shape_is_gone_the_new_one_is_taken() -> None:
    rig = upgraded()
    waiting = [rig.infer(slo_ms=500, shape=OLD, dtype="float32", input_bytes=16) for _ in range(20)]
    lose(rig, 1, 51)
    rig.weights_loaded(0)
    queued = [request for request in waiting if rig.reply(request).code == Code.INVALID_REQUEST]
    assert len(queued) >= 10 and "takes input float32[8]" in rig.reply(queued[0]).reason
    ask(rig, 901)
    info = loaded(rig, 901)
    assert (info.input_shape, info.b1_ns, info.model_id) == (NEW, 4 * MS, 0)
    assert serves(rig, 0, NEW)
    old = rig.infer(slo_ms=50, shape=OLD, dtype="float32", input_bytes=16)
    rig.step()
    assert rig.reply(old).code == Code.INVALID_REQUEST
    assert status_report(rig.scheduler, now_ns=rig.now_ns)["workers"][0]["put_aside"] == {}
    rig.join(1, session=61)
    prepared(rig, 1, 61, shape=NEW, pages=3, scale=2.0)
    rig.weights_loaded(1)
    assert 0 in rig.scheduler.cluster.workers[1].instances
    rig.checker.recount()


def test_more_copies_are_not_made_of_the_shape_that_is_not_used() -> None:
    rig = upgraded()
    rig.handle(FromClient(b"c", LoadModelRequest(901, "net", 2)))
    rig.step()
    prepared(rig, 0, 60, shape=NEW, pages=3)  # the first to answer
    prepared(rig, 1, 51)
    rig.weights_loaded(1)
    (reply,) = [r for r in rig.to_client(LoadModelReply) if r.request_id == 901]
    assert [info.input_shape for info in reply.models] == [OLD, OLD]
    lose(rig, 1, 51)
    rig.weights_loaded(0)
    assert {0, 1} == set(rig.scheduler.cluster.workers[0].instances)


def test_a_single_worker_may_come_back_with_another_shape() -> None:
    rig, _ = Rig.ready()
    rig.join(session=70)
    prepared(rig, 0, 70, shape=NEW, pages=2)
    rig.weights_loaded()
    ask(rig, 901)
    assert loaded(rig, 901).input_shape == NEW
    assert serves(rig, 0, NEW)


# --------------------------------------------------------------------------------- max_gpus


def test_a_worker_beyond_max_gpus_prepares_nothing_and_does_not_set_b1() -> None:
    rig = Rig(SchedulerConfig(max_gpus=1), workers=2)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    ask(rig, 900)
    prepared(rig, 1, 51, scale=0.5)
    prepared(rig, 0, 50)
    rig.weights_loaded(0)
    assert loaded(rig, 900).b1_ns == 2 * MS
    assert not rig.to_worker(LoadModel, 1)
    rig.join(1, session=52)  # not when it comes back, either
    assert not rig.to_worker(LoadModel, 1)


def test_what_only_a_worker_beyond_max_gpus_offers_is_not_offered() -> None:
    rig = Rig(SchedulerConfig(max_gpus=1), workers=2)
    rig.hello()
    rig.join(0, session=50, put_aside=(("net", "it crashed"),))  # offers "other" alone
    rig.join(1, session=51)
    rig.handle(FromClient(b"c", ListModelsRequest(899)))
    ask(rig, 900)
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.code != Code.OK and not rig.to_worker(LoadModel)
    (listed,) = rig.to_client(ListModelsReply)
    assert listed.loadable == ("other",)
