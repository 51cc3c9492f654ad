"""Bundles with frames: each message keeps its own, and a bundle that states others is malformed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from slosched.config import WorkerConfig
from slosched.core.worker.emulated import MARK_BYTES
from slosched.daemon.steps import _from_worker
from slosched.daemon.worker import WorkerServer
from slosched.errors import MalformedMessage
from slosched.messages import (
    GetWorkerState,
    InferReply,
    InferRequest,
    InferResult,
    WorkerStateResult,
)
from slosched.transport import outbox as module
from slosched.transport.bundles import (
    MAX_BUNDLED,
    ActionBundle,
    ReplyBundle,
    RequestBundle,
    ResultBundle,
    with_frames,
)
from slosched.transport.codec import (
    Frame,
    decode_for_client,
    encode,
    message_from_client,
)
from slosched.transport.outbox import FULL_BYTES, FULL_FRAMES, SMALL_BYTES, Outbox
from worker_rig import BareController

Sent = list[tuple[str, Any, list[Frame]]]


def reply(request_id: int) -> InferReply:
    return InferReply(request_id, 0, "", 3, 5, 4, True)


def an_outbox(sent: Sent, *, always: bool = False) -> Outbox[str, InferReply]:
    def send(peer: str, frames: list[Frame]) -> bool:
        sent.append((peer, decode_for_client(frames[0]), frames[1:]))
        return True

    return Outbox(
        send,
        lambda replies, counts: ReplyBundle(replies, counts),
        failed=lambda peer, message: None,
        always=always,
    )


def received(sent: Sent, peer: str) -> list[tuple[int, list[Frame]]]:
    """The answers of `peer` in order, each with its frames, as a receiver splits them."""
    found: list[tuple[int, list[Frame]]] = []
    for to, message, frames in sent:
        if to != peer:
            continue
        if isinstance(message, ReplyBundle):
            together = with_frames(message.replies, message.frames, frames)
            found += [(each.request_id, its) for each, its in together]
        else:
            found.append((message.request_id, frames))
    return found


# ----------------------------------------------------------------------------------- sending


def test_small_frames_travel_with_their_messages_in_one_message_for_each_peer() -> None:
    sent: Sent = []
    outbox = an_outbox(sent)
    outbox.put("a", reply(1), [b"one"])
    outbox.put("a", reply(2))
    outbox.put("b", reply(3), [b"three"])
    outbox.put("a", reply(4), [b"f", b"our"])
    assert sent == []
    outbox.flush()
    assert len(sent) == 2
    assert received(sent, "a") == [(1, [b"one"]), (2, []), (4, [b"f", b"our"])]
    assert sent[1] == ("b", reply(3), [b"three"])


def test_a_large_frame_travels_alone_and_the_order_is_kept() -> None:
    sent: Sent = []
    outbox = an_outbox(sent)
    large = bytes(SMALL_BYTES + 1)
    outbox.put("a", reply(1), [b"one"])
    outbox.put("a", reply(2), [b"two"])
    outbox.put("a", reply(3), [large])
    assert [len(frames) for _, _, frames in sent] == [2, 1]  # at once, behind what waited
    assert sent[1] == ("a", reply(3), [large])
    outbox.put("a", reply(4), [b"four"])
    outbox.flush()
    assert [number for number, _ in received(sent, "a")] == [1, 2, 3, 4]


@pytest.mark.parametrize("frames", [[bytes(SMALL_BYTES)], [b"x"] * 50, []])
def test_a_bundle_has_a_bound_of_messages_bytes_and_frames(frames: list[Frame]) -> None:
    sent: Sent = []
    outbox = an_outbox(sent)
    for number in range(200):
        outbox.put("a", reply(number), frames)
    outbox.flush()
    assert received(sent, "a") == [(number, frames) for number in range(200)]
    for _, message, behind in sent:
        assert len(getattr(message, "replies", (message,))) <= MAX_BUNDLED
        assert len(behind) < FULL_FRAMES + len(frames)
        assert sum(map(len, behind)) < FULL_BYTES + SMALL_BYTES


def test_a_sender_may_always_send_bundles() -> None:
    sent: Sent = []
    outbox = an_outbox(sent, always=True)
    outbox.put("a", reply(1), [bytes(SMALL_BYTES + 1)])
    outbox.put("a", reply(2))
    outbox.flush()
    assert [message for _, message, _ in sent] == [
        ReplyBundle((reply(1),), (1,)),
        ReplyBundle((reply(2),)),
    ]


def test_what_cannot_be_sent_is_told_for_each_message_of_a_bundle() -> None:
    failed: list[int] = []
    outbox: Outbox[str, InferReply] = Outbox(
        lambda peer, frames: False,
        lambda replies, counts: ReplyBundle(replies, counts),
        failed=lambda peer, message: failed.append(message.request_id),
    )
    outbox.put("a", reply(1), [b"one"])
    outbox.put("a", reply(2))
    outbox.put("a", reply(3), [bytes(module.SMALL_BYTES + 1)])
    assert failed == [1, 2, 3]


# --------------------------------------------------------------------------------- receiving

#: What is stated for a bundle of two messages, and how many frames come.
WRONG = [
    ((), 1),
    ((1,), 1),
    ((1, 1, 0), 2),
    ((1, 1), 1),
    ((1, 1), 3),
    ((0, 0), 1),
    ((1, 0), 0),
    ((1024, 1024), 2),
]


@pytest.mark.parametrize(("counts", "came"), WRONG)
def test_counts_that_do_not_fit_the_frames_are_malformed(
    counts: tuple[int, ...], came: int
) -> None:
    frames: list[Frame] = [b"frame"] * came
    with pytest.raises(MalformedMessage):
        with_frames((reply(1), reply(2)), counts, frames)
    requests = (InferRequest(request_id=1, model_id=3), InferRequest(request_id=2, model_id=3))
    with pytest.raises(MalformedMessage):
        message_from_client([encode(RequestBundle(requests, 1, counts)), *frames])
    state = WorkerStateResult(1, 1, gpus=(), models=(), received_ns=0, sent_ns=0)
    with pytest.raises(MalformedMessage):
        _from_worker([encode(ResultBundle((state, state), counts)), *frames])


def test_counts_have_bounds_where_they_are_decoded() -> None:
    requests = (InferRequest(request_id=1, model_id=3),)
    for wrong in ((-1,), (1025,), (0,) * (MAX_BUNDLED + 1), (2**61,)):
        with pytest.raises(MalformedMessage, match="Expected"):
            message_from_client([encode(RequestBundle(requests, 1, wrong))])


def test_a_request_in_a_bundle_has_one_frame_at_most() -> None:
    requests = (InferRequest(request_id=1, model_id=3), InferRequest(request_id=2, model_id=3))
    bundle = RequestBundle(requests, 1, (2, 0))
    with pytest.raises(MalformedMessage, match="more than one frame"):
        message_from_client([encode(bundle), b"a", b"b"])
    fine = RequestBundle(requests, 1, (0, 1))
    assert message_from_client([encode(fine), b"b"]) == fine


def test_only_a_bundle_of_a_client_has_many_frames() -> None:
    request = encode(InferRequest(request_id=1, model_id=3))
    with pytest.raises(MalformedMessage, match="in 3 frames"):
        message_from_client([request, b"a", b"b"])
    with pytest.raises(MalformedMessage, match="at most"):
        message_from_client([request, *[b"a"] * (MAX_BUNDLED + 1)])


# ----------------------------------------------------------------------------------- a worker


@pytest.fixture
def server() -> Iterator[WorkerServer]:
    with WorkerServer(WorkerConfig(device="emulated", port=0, bind="127.0.0.1")) as server:
        yield server


@pytest.fixture
def controller(server: WorkerServer) -> Iterator[BareController]:
    controller = BareController(server.port)
    yield controller
    controller.close()


def test_a_worker_gives_each_action_of_a_bundle_its_own_inputs(controller: BareController) -> None:
    controller.hello()
    controller.load("resnet50")
    size = 3 * 224 * 224 * 4
    inputs = [bytes([mark]) * size for mark in (5, 6, 7)]
    actions = (
        controller.infer_message(2, sizes=(size, size)),
        GetWorkerState(controller.session, controller.action_id()),
        controller.infer_message(1, sizes=(size,)),
    )
    controller.send_frames([encode(ActionBundle(actions, (2, 0, 1))), *inputs])
    outputs: dict[int, list[bytes]] = {}
    states = 0
    while len(outputs) < 2 or not states:
        result, frames = controller.receive()
        states += isinstance(result, WorkerStateResult)
        if isinstance(result, InferResult):
            outputs[result.action_id] = [frame[:MARK_BYTES] for frame in frames]
    marks = [bytes([mark]) * MARK_BYTES for mark in (5, 6, 7)]
    assert outputs == {actions[0].action_id: marks[:2], actions[2].action_id: marks[2:]}


def test_a_worker_refuses_a_bundle_that_is_wrong_and_goes_on(
    server: WorkerServer, controller: BareController
) -> None:
    controller.hello()
    actions = (GetWorkerState(controller.session, 1), GetWorkerState(controller.session, 2))
    for counts, came in [*WRONG, ((1, 0), 1)]:  # the last: a message that takes none
        controller.send_frames([encode(ActionBundle(actions, counts)), *[b"frame"] * came])
    asked = GetWorkerState(controller.session, 3)
    result = controller.ask(asked)
    assert isinstance(result, WorkerStateResult) and result.action_id == 3
    assert server._doorway._bad.count == len(WRONG) + 1
