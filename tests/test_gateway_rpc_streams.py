"""ModelStreamInfer: answers as they come, errors beside them, bounds, and every end that a stream can have."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as client

from rpc_rig import TOKEN, WITHIN_S, EchoService, Served, a_request, serving
from slosched.fronts.errors import FrontError, Refusal, Status
from slosched.fronts.rpc import streams
from slosched.fronts.rpc.messages import SERVICE, InferRequest, StreamResponse


class RawStream:
    """A stream whose test decides when each message is sent and read. `end` half-closes it."""

    def __init__(self, channel: grpc.Channel, **options: Any) -> None:
        self._requests: queue.Queue[bytes | None] = queue.Queue()
        method = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        self.call = method(self._messages(), timeout=WITHIN_S, **options)

    def _messages(self) -> Iterator[bytes]:
        while (found := self._requests.get()) is not None:
            yield found

    def send(self, *requests: bytes) -> None:
        for each in requests:
            self._requests.put(each)

    def end(self) -> None:
        self._requests.put(None)

    def next(self) -> Any:
        return StreamResponse.FromString(next(self.call))

    def ids(self, count: int) -> list[str]:
        return [self.next().infer_response.id for _ in range(count)]


@pytest.fixture
def held() -> Iterator[Served]:
    with serving(EchoService(hold=True)) as served:
        yield served


@pytest.fixture
def channel(held: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(held.address) as made:
        yield made


def test_a_stream_ends_when_its_token_is_gone_and_what_runs_is_answered(
    held: Served, channel: grpc.Channel
) -> None:
    stream = RawStream(channel)
    stream.send(a_request("before"))
    held.until(lambda: len(held.service.begun) == 1)
    held.service.needs_token = True
    stream.send(a_request("after"))
    [served] = held.front._streams._open
    held.until(lambda: served.refused is not None)
    held.do(held.service.release)
    assert stream.ids(1) == ["before"]
    with pytest.raises(grpc.RpcError):
        stream.next()
    assert stream.call.code() is grpc.StatusCode.UNAUTHENTICATED
    assert dict(stream.call.trailing_metadata())["www-authenticate"]
    assert len(held.service.asked) == 1


def test_answers_come_as_they_are_there(held: Served, channel: grpc.Channel) -> None:
    stream = RawStream(channel)
    stream.send(*map(a_request, "abc"))
    held.until(lambda: len(held.service.begun) == 3)
    held.do(lambda: held.service.release(last_first=True))
    assert stream.ids(3) == ["c", "b", "a"]
    stream.send(a_request("d"))
    held.until(lambda: len(held.service.begun) == 1)
    stream.end()  # what is in flight is answered all the same
    held.do(held.service.release)
    assert stream.ids(1) == ["d"]
    assert list(stream.call) == [] and stream.call.code() is grpc.StatusCode.OK


def test_requests_without_an_id_are_answered_in_their_order(
    held: Served, channel: grpc.Channel
) -> None:
    stream = RawStream(channel)
    stream.send(a_request("", b"1"), a_request("a", b"2"), b"\xff", a_request("", b"3"))
    held.until(lambda: len(held.service.begun) == 3)
    held.do(lambda: held.service.release(last_first=True))

    def answer() -> bytes:
        found = stream.next()
        if found.error_message:
            return b"error"
        data: bytes = found.infer_response.raw_output_contents[0]
        return data

    answers = [answer() for _ in range(4)]
    assert [each for each in answers if each != b"2"] == [b"1", b"error", b"3"]
    assert answers[0] == b"2"  # it has an id, and its answer was there before the first
    stream.end()
    assert list(stream.call) == []


def test_tritonclients_stream(held: Served) -> None:
    held.service.hold = False
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    array = np.arange(4, dtype=np.float32).reshape(1, 4)
    given = client.InferInput("in", [1, 4], "FP32")
    given.set_data_from_numpy(array)
    asks = client.InferenceServerClient(held.address)
    try:
        asks.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(5):
            asks.async_stream_infer(
                "echo", [given], request_id=str(number), enable_empty_final_response=True, timeout=7
            )
        for number in range(5):
            result, error = answers.get(timeout=WITHIN_S)
            assert error is None and (result.as_numpy("out") == array).all()
            response = result.get_response()
            assert response.id == str(number)
            assert response.parameters["triton_final_response"].bool_param
        assert {each.slo_ns for each in held.service.asked} == {7_000}
        asks.stop_stream()
    finally:
        asks.close()


def test_an_error_is_an_answer_and_the_stream_continues(
    held: Served, channel: grpc.Channel
) -> None:
    service = held.service
    service.hold = False
    stream = RawStream(channel)
    refusal = Refusal(code=7, time_left_ns=3_000)
    service.fails = FrontError(Status.UNAVAILABLE, "no time left", refusal)
    stream.send(a_request("a"))
    answer = stream.next()
    assert answer.error_message == "no time left" and answer.infer_response.id == "a"
    parameters = answer.infer_response.parameters
    assert {name: each.int64_param for name, each in parameters.items()} == {
        "slosched-code": 7,
        "slosched-time-left-us": 3,
    }
    service.fails = None
    for wrong, words, name in (
        (b"\xff", "is not a ModelInferRequest", ""),
        (b"", "", ""),
        (
            InferRequest(id="x", inputs=[{"name": "y"}]).SerializeToString(),
            "unable to find data",
            "x",
        ),
    ):
        stream.send(wrong)
        answer = stream.next()
        assert words in answer.error_message and answer.infer_response.id == name
    service.fails = RuntimeError("a bug")
    held.do(lambda: None)
    stream.send(a_request("b"))
    assert stream.next().error_message == "internal error: RuntimeError: a bug"
    service.fails, service.in_time = None, False
    stream.send(a_request("c"))
    answer = stream.next()
    assert not answer.error_message and "slosched-in-time" in answer.infer_response.parameters
    stream.end()
    assert list(stream.call) == [] and stream.call.code() is grpc.StatusCode.OK


def test_the_deadline_of_a_stream_is_not_that_of_its_requests(
    held: Served, channel: grpc.Channel
) -> None:
    held.service.hold = False
    stream = RawStream(channel)
    stream.send(a_request("a"))
    stream.ids(1)
    stream.end()
    stream = RawStream(channel, metadata=(("slosched-slo", "25ms"),))
    stream.send(a_request("b"), a_request("c", parameters={"timeout": {"int64_param": 9}}))
    stream.ids(2)
    stream.end()
    assert [each.slo_ns for each in held.service.asked] == [0, 25_000_000, 9_000]


def test_a_client_that_leaves_cancels_its_requests(held: Served, channel: grpc.Channel) -> None:
    stream = RawStream(channel)
    stream.send(*map(a_request, "abc"))
    held.until(lambda: len(held.service.begun) == 3)
    stream.call.cancel()
    held.until(lambda: len(held.service.cancelled) == 3)
    assert not held.service.begun
    other = RawStream(channel)  # the same connection serves on
    held.service.hold = False
    other.send(a_request("d"))
    assert other.ids(1) == ["d"]
    other.end()


def test_requests_in_flight_have_a_bound(
    held: Served, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST", 3)
    stream = RawStream(channel)
    stream.send(*map(a_request, "abcde"))
    held.until(lambda: len(held.service.begun) == 3)
    held.do(lambda: held.service.begun[1].end(held.service.end_of(held.service.begun[1].asked)))
    assert stream.ids(1) == ["b"]
    held.until(lambda: [each.asked.id for each in held.service.begun] == ["a", "c", "d"])
    held.service.hold = False
    held.do(held.service.release)
    assert sorted(stream.ids(4)) == ["a", "c", "d", "e"]
    stream.end()
    assert list(stream.call) == []


def test_a_client_that_takes_no_answers_is_not_read(
    held: Served, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers stay here: at most MOST_BYTES and one more, and what grpc and the kernel hold."""
    monkeypatch.setattr(streams, "MOST_BYTES", 2**20)
    held.service.hold = False
    stream = RawStream(channel)
    big = bytes(2**20)
    count = 60
    stream.send(*(a_request(str(number), big) for number in range(count)))
    threading.Event().wait(0.3)  # time in which it could read them all
    taken = held.do(lambda: len(held.service.asked))
    assert taken < count
    assert stream.ids(count) == [str(number) for number in range(count)]
    stream.end()
    assert list(stream.call) == []


def test_a_token_leaves_others_room_for_streams() -> None:
    with serving(max_connections=9) as served, grpc.insecure_channel(served.address) as made:

        def opened(name: str) -> RawStream:
            stream = RawStream(made, metadata=(("authorization", name),))
            stream.send(a_request("a"))
            return stream

        open_ = [opened("greedy") for _ in range(8)]
        assert [each.ids(1) for each in open_] == [["a"]] * 8
        with pytest.raises(grpc.RpcError, match="8 streams are open, 8 of token 'greedy'"):
            opened("greedy").next()
        open_.append(opened("modest"))
        assert open_[-1].ids(1) == ["a"]
        for each in open_:
            each.end()
            assert list(each.call) == []


def test_streams_have_a_bound() -> None:
    with serving(max_connections=2) as served, grpc.insecure_channel(served.address) as made:
        first, second = RawStream(made), RawStream(made)
        for each in (first, second):
            each.send(a_request("a"))
            assert each.ids(1) == ["a"]
        third = RawStream(made)
        with pytest.raises(grpc.RpcError, match="2 streams are open"):
            next(third.call)
        third.end()
        first.end()
        assert list(first.call) == []
        fourth = RawStream(made)
        fourth.send(a_request("b"))
        assert fourth.ids(1) == ["b"]
        for each in (second, fourth):
            each.end()
            assert list(each.call) == []


def test_a_token_is_asked_for_at_the_beginning() -> None:
    service = EchoService(needs_token=True)
    with serving(service) as served, grpc.insecure_channel(served.address) as made:
        stream = RawStream(made)
        stream.send(a_request("a"))
        with pytest.raises(grpc.RpcError) as caught:
            next(stream.call)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        stream.end()
        stream = RawStream(made, metadata=(("authorization", TOKEN),))
        stream.send(a_request("a"))
        assert stream.ids(1) == ["a"]
        stream.end()


def test_a_drain_ends_idle_streams_and_answers_what_is_in_flight(
    held: Served, channel: grpc.Channel
) -> None:
    idle, busy = RawStream(channel), RawStream(channel)
    held.service.hold = False
    idle.send(a_request("a"))
    assert idle.ids(1) == ["a"]
    held.service.hold = True
    busy.send(a_request("b"))
    held.until(lambda: len(held.service.begun) == 1)
    with ThreadPoolExecutor(1) as threads:
        drained = threads.submit(held.run, held.front.drain(WITHIN_S))
        with pytest.raises(grpc.RpcError) as caught:
            next(idle.call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "the gateway is shutting down"
        assert not drained.done()
        held.do(held.service.release)
        assert busy.ids(1) == ["b"]
        with pytest.raises(grpc.RpcError, match="shutting down"):
            next(busy.call)
        drained.result(WITHIN_S)
    idle.end()
    busy.end()
    assert not held.service.cancelled


def test_a_drain_cancels_what_does_not_end(held: Served, channel: grpc.Channel) -> None:
    stream = RawStream(channel)
    stream.send(a_request("a"))
    held.until(lambda: len(held.service.begun) == 1)
    held.run(held.front.drain(0.05))
    held.until(lambda: len(held.service.cancelled) == 1)
    with pytest.raises(grpc.RpcError):
        next(stream.call)
    stream.end()
