"""What hostile or broken clients may send to the gRPC port, and its bounds."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest

from rpc_rig import WITHIN_S, EchoService, Served, a_request, call, channel, failure, serving
from slosched.fronts.rpc import calls
from slosched.fronts.rpc.messages import SERVICE, InferResponse, methods


@pytest.fixture(scope="module")
def echo() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.mark.parametrize("method", [each for each in methods() if each != "ModelStreamInfer"])
def test_no_bytes_break_a_method(echo: Served, method: str) -> None:
    with channel(echo) as made:
        for data in (b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x7f", b"\x00"):
            failed = failure(made, method, data)
            assert failed.code() in (
                grpc.StatusCode.INVALID_ARGUMENT,
                grpc.StatusCode.UNAVAILABLE,  # trace and log settings
            )
        assert call(made, "ServerLive", b"")


def test_fields_of_a_later_protocol_are_harmless(echo: Served) -> None:
    with channel(echo) as made:
        later = a_request() + b"\xa2\x06\x05later" + b"\x98\x06\x01"
        found = InferResponse.FromString(call(made, "ModelInfer", later))
        assert list(found.raw_output_contents) == [b"abc"]


def test_requests_have_a_bound() -> None:
    with serving(max_request_bytes=1000) as served, channel(served) as made:
        failed = failure(made, "ModelInfer", bytes(1000 + 64 * 1024 + 1))
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        bomb = failure(made, "ModelInfer", bytes(2**22), compression=grpc.Compression.Gzip)
        assert bomb.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with serving() as served, channel(served) as made:
        failed = failure(made, "ModelReady", b"\x0a\x80\x80\x40" + b"a" * 2**20)
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "at most 1,048,576" in failed.details()
        long = failure(made, "ServerLive", metadata=(("x", "y" * 40_000),))
        assert long.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        squeezed = call(made, "ModelInfer", a_request(), compression=grpc.Compression.Gzip)
        assert list(InferResponse.FromString(squeezed).raw_output_contents) == [b"abc"]


def test_connections_have_a_bound() -> None:
    with serving(max_connections=2) as served, contextlib.ExitStack() as stack:

        def connected() -> grpc.Channel:
            alone = [("grpc.use_local_subchannel_pool", 1)]
            return stack.enter_context(grpc.insecure_channel(served.address, options=alone))

        first, second, third = connected(), connected(), connected()
        assert call(first, "ServerLive", b"") and call(second, "ServerLive", b"")
        assert failure(third, "ServerLive").code() is grpc.StatusCode.UNAVAILABLE
        assert call(first, "ServerLive", b"")


def test_rpcs_have_a_bound_and_health_has_room() -> None:
    service = EchoService(hold=True)
    with serving(service, max_in_flight=4, max_connections=2) as served, channel(served) as made:
        held = [made.unary_unary(f"/{SERVICE}/ModelInfer").future(a_request()) for _ in range(69)]
        served.until(lambda: len(service.begun) == 69)  # the service refuses what is beyond 4
        assert call(made, "ServerLive", b"")
        held.append(made.unary_unary(f"/{SERVICE}/ModelInfer").future(a_request()))
        served.until(lambda: len(service.begun) == 70)
        failed = failure(made, "ModelInfer", a_request())
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        served.do(service.release)
        assert all(each.result(WITHIN_S) for each in held)
        assert call(made, "ServerLive", b"")


def test_a_request_that_does_not_arrive_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_ARRIVES_WITHIN_S", 0.1)
    with serving() as served, channel(served) as made:
        release = threading.Event()

        def nothing() -> Iterator[bytes]:
            release.wait(WITHIN_S)
            yield from ()

        with pytest.raises(grpc.RpcError) as caught:
            made.stream_unary(f"/{SERVICE}/ModelInfer")(nothing(), timeout=WITHIN_S)
        release.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not arrive within 0.1 s" in caught.value.details()
        with pytest.raises(grpc.RpcError, match="ended without a request"):
            made.stream_unary(f"/{SERVICE}/ModelInfer")(iter(()), timeout=WITHIN_S)
        assert call(made, "ServerLive", b"")


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady"])
def test_a_method_without_a_token_is_not_waited_for_long(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_BARE_ARRIVES_WITHIN_S", 0.1)
    service = EchoService(needs_token=True)
    with serving(service) as served, channel(served) as made:
        release = threading.Event()

        def nothing() -> Iterator[bytes]:
            release.wait(WITHIN_S)
            yield from ()

        with pytest.raises(grpc.RpcError) as caught:
            made.stream_unary(f"/{SERVICE}/{method}")(nothing(), timeout=WITHIN_S)
        release.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_bytes_that_are_not_http2_do_not_disturb_others(echo: Served) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    huge_frame = preface + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"
    for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), huge_frame, preface):
        with socket.create_connection(("127.0.0.1", echo.front.port), WITHIN_S) as raw:
            raw.sendall(data)
    with channel(echo) as made:
        assert call(made, "ServerLive", b"")
