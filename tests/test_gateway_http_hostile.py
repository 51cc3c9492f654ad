"""What comes over a connection that no good client sends: each is answered well, and what runs is not lost."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import struct
import zlib
from collections.abc import Iterator

import pytest

from gateway_http_rig import FakeService, Raw, Reply, Served, inference, request, served, x_of
from slosched.fronts.http.bounds import HEAD_BYTES, Limits
from slosched.fronts.http.chunks import STEP, Inflation

INFER = "/v2/models/echo/infer"
BODY = json.dumps(x_of(1, 2, 3, 4)).encode()
QUICK = Limits(
    tick_s=0.02,
    head_s=1.0,
    idle_s=1.0,
    body_s=1.0,
    body_bytes_per_s=10**9,
    untaken_s=0.5,
    linger_s=0.5,
)


@pytest.fixture(params=["uvloop", "asyncio"])
def gateway(request: pytest.FixtureRequest) -> Iterator[Served]:
    with served(loop=request.param, max_request_bytes=200_000) as running:
        yield running
        assert not running.failures
        assert running.front._bounds.held == 0


def is_well(gateway: Served) -> None:
    """Another connection is served, and holds nothing of the last one."""
    with Raw(gateway.port) as client:
        assert client.ask(inference(x_of(1, 2))).status == 200


def until_held(gateway: Served, size: int) -> None:
    """Wait until `size` bytes of bodies have come whose requests are not answered."""
    gateway.until(lambda: gateway.front._bounds.held == size)


def last_reply(gateway: Served, sent: bytes) -> Reply:
    """The answer to what ends its connection."""
    with Raw(gateway.port) as client:
        reply = client.ask(sent)
        assert client.ended()
    is_well(gateway)
    return reply


# ------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"hello\r\n", 400, "not an HTTP request"),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, "TLS"),
        (b"GET / HTTP/1.1\nHost: localhost\n\n", 400, "not an HTTP request"),
        (b"FETCH / HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, "method"),
        (b"GET / HTTP/1.1\r\nhost : localhost\r\n\r\n", 400, "not an HTTP request"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: \x00\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n", 400, "not an HTTP request"),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400, "Host"),
        (b"GET /v2 HTTP/1.1\r\nhost: a\r\nhost: localhost\r\n\r\n", 400, "host is repeated"),
        (b"GET /" + b"a" * HEAD_BYTES, 431, "head has at most"),
        (
            b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 101 + b"host: localhost\r\n\r\n",
            431,
            "100 headers",
        ),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: localhost\r\n\r\n", 405, "not a proxy"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1"),
        (b"GET /v2 HTTP/2.0\r\nhost: localhost\r\n\r\n", 505, "HTTP/1.1"),
        (b"GET /v2 RTSP/1.0\r\nhost: localhost\r\n\r\n", 505, "HTTP/1.1"),
    ],
)
def test_a_head_that_is_wrong(gateway: Served, sent: bytes, status: int, words: str) -> None:
    reply = last_reply(gateway, sent)
    assert (reply.status, reply.headers["connection"]) == (status, "close")
    assert words in reply.error


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("content-length: 5", "content-length: 6"), 400),
        (("content-length: 5", "transfer-encoding: chunked"), 400),
        (("content-length: -1",), 400),
        (("content-length: 0x5",), 400),
        (("content-length: " + "9" * 30,), 400),
        (("content-length: 200001",), 413),
        (("content-length: 99999999999999",), 413),
        (("transfer-encoding: gzip, chunked",), 501),
        (("transfer-encoding: identity",), 400),
        (("transfer-encoding: chunked", "transfer-encoding: chunked"), 400),
        (("content-length: 5", "expect: coffee"), 417),
    ],
)
def test_a_length_that_is_wrong(gateway: Served, lines: tuple[str, ...], status: int) -> None:
    assert last_reply(gateway, request(INFER, b"", *lines, method="POST")).status == status


def test_the_rest_of_a_body_that_is_too_large_is_read_so_that_its_client_gets_the_answer(
    gateway: Served,
) -> None:
    with Raw(gateway.port) as client:
        client.send(request(INFER, b"", "content-length: 30000000", method="POST"))
        client.send(b"x" * 5_000_000)
        assert client.reply().status == 413
    is_well(gateway)


def test_a_request_that_is_refused_by_its_head_leaves_the_connection_in_step(
    gateway: Served,
) -> None:
    with Raw(gateway.port) as client:
        assert client.ask(request("/nope", b"GET /v2 HTTP/1.1\r\n" * 9000)).status == 404
        assert client.ask(request("/nope", b"x")).error == "Not Found"
        assert client.ask(request("/v2", b"x" * 20)).status == 405
        assert client.ask(inference(x_of(1))).status == 200


def test_an_upgrade_is_not_taken_and_the_request_is_served(gateway: Served) -> None:
    lines = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk")
    with Raw(gateway.port) as client:
        assert client.ask(request("/v2", b"", *lines)).status == 200
        assert client.ask(request(INFER, BODY, *lines)).status == 200
        assert client.ask(request("/v2")).status == 200


def test_empty_lines_before_a_request_are_left_out(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        client.send(b"\r")
        gateway.until(lambda: True)
        client.send(b"\n\r\n")
        assert client.ask(request("/v2")).status == 200
        assert client.ask(b"\r\n\r\n", request(INFER, BODY)).status == 200


def test_a_target_may_be_a_whole_address(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        assert client.ask(request("http://localhost:1/v2/health/live")).status == 200
        assert client.ask(request("http://elsewhere/v2/health/live")).status == 421
        assert client.ask(request("ftp://localhost/v2")).status == 400
        assert client.ask(request("*", method="OPTIONS")).status == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("127.0.0.9", 200),
        ("evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("8.8.8.8", 421),
        ("", 421),
    ],
)
def test_only_requests_for_this_host_are_answered_on_loopback(
    gateway: Served, host: str, status: int
) -> None:
    with Raw(gateway.port) as client:
        assert client.ask(request("/v2", host=host)).status == status


def test_a_web_page_of_another_origin_may_ask_for_nothing(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        for origin, status in (
            ("http://evil.example", 403),
            ("null", 403),
            ("http://localhost:3", 200),
        ):
            assert client.ask(request(INFER, BODY, f"origin: {origin}")).status == status


def test_with_tokens_any_host_may_be_named() -> None:
    with (
        served(FakeService("secret"), tokens="tokens.toml") as gateway,
        Raw(gateway.port) as client,
    ):
        lines = ("authorization: Bearer secret",)
        assert client.ask(request("/v2", b"", *lines, host="gateway.example")).status == 200
        wrong = client.ask(request(INFER, BODY, "authorization: Bearer x"))
        assert wrong.status == 401 and wrong.headers["www-authenticate"].startswith("Bearer")
        assert client.ask(request(INFER, BODY)).status == 401
        assert client.ask(request("/metrics")).status == 401
        assert client.ask(request("/v2/health/ready")).status == 200
        assert not gateway.service.asked


# --------------------------------------------------------------------------- bodies in parts


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + end


CHUNKED = ("transfer-encoding: chunked",)


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_chunks_are_put_together_however_they_come(gateway: Served, piece: int) -> None:
    sent = chunked(BODY[:10], BODY[10:], end=b"0;a=b\r\nx-trailer: y\r\n\r\n")
    whole = request(INFER, b"", *CHUNKED, method="POST") + sent + request("/v2")
    with Raw(gateway.port) as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(whole), piece):
            client.send(whole[at : at + piece])
        assert client.reply().json["outputs"][0]["data"] == [1, 2, 3, 4]
        assert client.reply().json["name"] == "fake"


def test_spaces_around_a_header_are_not_its_value(gateway: Served) -> None:
    lines = (
        f"content-length: {len(BODY)} \t",
        "expect:100-continue ",
        "content-encoding: identity ",
    )
    with Raw(gateway.port) as client:
        assert (
            client.ask(request(INFER, b"", *lines, method="POST", host="\tlocalhost ")).status
            == 100
        )
        assert client.ask(BODY).status == 200


def test_a_large_chunked_body(gateway: Served) -> None:
    values = [float(each) for each in range(20_000)]
    body = json.dumps(x_of(*values)).encode()
    parts = [body[at : at + 30_000] for at in range(0, len(body), 30_000)]
    with Raw(gateway.port) as client:
        reply = client.ask(request(INFER, b"", *CHUNKED, method="POST"), chunked(*parts))
        assert reply.json["outputs"][0]["data"] == values


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"zz\r\n", 400),
        (b"-1\r\n", 400),
        (b"0x10\r\n", 400),
        (b"1_0\r\n", 400),
        (b"\r\n", 400),
        (b"5\r\nabcdefg\r\n", 400),
        (b"5;" + b"a" * 400, 400),
        (b"fffffffffffffffff\r\n", 400),
        (b"ffffffffffffffff\r\n", 413),
        (b"30d41\r\n", 413),
        (b"0\r\n" + b"a: b\r\n" * 2000, 431),
        # Where another program's line ends, this one's must not go on: the two would see different requests.
        (b"5;a\nbcdef\r\n", 400),
        (b"5;a\n", 400),
        (b"5;a\rb\r\nabcde\r\n", 400),
        (b"0\r\na: b\n\r\n", 400),
        (b"0\r\na: b\rc\r\n\r\n", 400),
        (b"0\r\nGET /v2 HTTP/1.1\r\n\r\n", 400),
        (b"0\r\na: b\r\n c\r\n\r\n", 400),
        (b"".join(b"1;%b\r\nx\r\n" % (b"a" * 200) for _ in range(200)), 400),
    ],
)
def test_chunks_that_are_wrong(gateway: Served, sent: bytes, status: int) -> None:
    assert last_reply(gateway, request(INFER, b"", *CHUNKED, method="POST") + sent).status == status


def test_a_client_that_expects_100_continue_gets_it_or_the_final_answer(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        head = request(
            INFER, b"", f"content-length: {len(BODY)}", "expect: 100-continue", method="POST"
        )
        assert client.ask(head).status == 100
        assert client.ask(BODY).status == 200
        refused = head.replace(INFER.encode(), b"/v2/nope")
        assert client.ask(refused).status == 404
        assert client.ended()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "GZIP"])
def test_a_compressed_body_is_inflated(gateway: Served, encoding: str) -> None:
    packed = zlib.compress(BODY) if encoding == "deflate" else gzip.compress(BODY)
    with Raw(gateway.port) as client:
        asked = request(INFER, packed, f"content-encoding: {encoding}")
        client.send(asked, asked)
        for _ in range(2):
            assert client.reply().json["outputs"][0]["data"] == [1, 2, 3, 4]
        assert client.ask(request(INFER, BODY, "content-encoding: identity")).status == 200


@pytest.mark.parametrize(
    ("packed", "encoding", "status"),
    [
        (BODY, "gzip", 400),
        (gzip.compress(BODY)[:-9], "gzip", 400),
        (gzip.compress(BODY) + b"more", "gzip", 400),
        (gzip.compress(bytes(10_000_000)), "gzip", 413),
        (BODY, "br", 415),
        (gzip.compress(gzip.compress(BODY)), "gzip, gzip", 415),
    ],
    ids=[
        "plain",
        "cut off",
        "with more behind",
        "a bomb",
        "unknown",
        "twice",
    ],  # gzip writes the time
)
def test_a_compressed_body_that_is_wrong(
    gateway: Served, packed: bytes, encoding: str, status: int
) -> None:
    with Raw(gateway.port) as client:
        assert client.ask(request(INFER, packed, f"content-encoding: {encoding}")).status == status
        assert client.ask(request("/v2")).status == 200


def test_a_body_is_inflated_no_further_than_its_bytes_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred requests of 64 kB that inflate to 64 MiB each would be gigabytes before any is refused."""
    steps: list[int] = []
    step = Inflation.step

    def counted(self: Inflation) -> int:
        steps.append(step(self))
        return steps[-1]

    monkeypatch.setattr(Inflation, "step", counted)
    bomb = request(INFER, gzip.compress(bytes(20_000_000)), "content-encoding: gzip")
    most = 3 * STEP
    with (
        served(max_request_bytes=30_000_000, max_in_flight_bytes=most) as gateway,
        Raw(gateway.port) as client,
    ):
        assert client.ask(bomb).status == 429
        assert max(steps) <= STEP + 1 and sum(steps) <= most + STEP + 1
        assert client.ask(inference(x_of(1))).status == 200
        assert gateway.front._bounds.held == 0


# ------------------------------------------------------------------------- order and leaving


def test_pipelined_requests_are_answered_in_order_one_at_a_time(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        client.send(inference(x_of(1), model="slow"), inference(x_of(2)), request("/v2"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        assert [asked.model for asked in gateway.service.asked] == ["slow"]
        gateway.finish()
        assert [client.reply().status for _ in range(3)] == [200, 200, 200]
        assert [asked.model for asked in gateway.service.asked] == ["slow", "echo"]


def test_a_thousand_pipelined_requests_wait_in_the_socket_where_the_buffer_is_full(
    gateway: Served,
) -> None:
    one = request("/v2/health/live")
    with Raw(gateway.port) as client:
        client.send(inference(x_of(1), model="slow"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        client.send(one * 1000)
        gateway.finish()
        assert {client.reply().status for _ in range(1001)} == {200}
        assert client.ask(inference(x_of(1))).status == 200


def test_a_client_that_leaves_cancels_its_inference(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        client.send(inference(x_of(1), model="slow"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        assert gateway.service.cancelled == 0
    gateway.until(lambda: gateway.service.cancelled == 1)
    with Raw(gateway.port) as client:  # one that resets, with more behind its request
        client.send(inference(x_of(1), model="slow"), request("/v2") * 3)
        gateway.until(lambda: len(gateway.service.slow) == 2)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gateway.until(lambda: gateway.service.cancelled == 2)
    with Raw(gateway.port) as client:  # one that closes its side alone
        client.send(request("/v1/infer/slow", b'{"inputs": [1, 2, 3, 4]}'))
        gateway.until(lambda: len(gateway.service.slow) == 3)
        client.socket.shutdown(socket.SHUT_WR)
        gateway.until(lambda: gateway.service.cancelled == 3)
        assert client.ended()
    is_well(gateway)


def test_a_client_that_leaves_in_its_body(gateway: Served) -> None:
    for sent in (b"abc", b"a" * 50_000):
        with Raw(gateway.port) as client:
            client.send(request(INFER, b"", "content-length: 100000", method="POST"), sent)
            until_held(gateway, len(sent))
        until_held(gateway, 0)
    assert not gateway.service.asked


def test_requests_before_a_client_s_half_close_are_answered(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        client.send(request("/v2/models/grid"), request("/v2"), request("/v2/models/words"))
        client.socket.shutdown(socket.SHUT_WR)
        assert [client.reply().json["name"] for _ in range(3)] == ["grid", "fake", "words"]
        assert client.ended()


def test_connection_close_and_http_1_0(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        assert client.ask(request("/v2", b"", "connection: close")).headers["connection"] == "close"
        assert client.ended()
    with Raw(gateway.port) as client:
        old = b"GET /v2 HTTP/1.0\r\nconnection: keep-alive\r\n\r\n"
        assert client.ask(old).headers["connection"] == "keep-alive"
        assert client.ask(old).status == 200
        assert client.ask(b"GET /v2 HTTP/1.0\r\n\r\n").status == 200
        assert client.ended()


def test_head_has_the_length_and_not_the_body(gateway: Served) -> None:
    with Raw(gateway.port) as client:
        client.send(request("/v2", method="HEAD"), request("/v2"))
        head = client.reply(head_only=True)
        whole = client.reply()
        assert int(head.headers["content-length"]) == len(whole.body) > 0


# ------------------------------------------------------------------------------------ bounds


def test_a_client_that_is_slow_is_told_and_closed() -> None:
    with served(limits=QUICK) as gateway, contextlib.ExitStack() as stack:
        head, body, silent, idle = (stack.enter_context(Raw(gateway.port)) for _ in range(4))
        head.send(b"GET /v2 HT")
        body.send(request(INFER, b"", "content-length: 9", method="POST"), b"abc")
        assert idle.ask(request("/v2")).status == 200
        for client, what in ((head, "head"), (body, "body")):
            reply = client.reply()
            assert reply.status == 408 and what in reply.error
        assert all(client.ended() for client in (head, body, silent, idle))
        is_well(gateway)


def test_a_head_that_drips_does_not_buy_time() -> None:
    with served(limits=QUICK) as gateway, Raw(gateway.port) as client:
        client.socket.settimeout(0.02)
        status = 0
        for _ in range(500):
            try:
                client.send(b"G")
                status = client.reply().status
                break
            except TimeoutError:
                continue
            except (ConnectionError, EOFError):
                break
        assert status in (400, 408)


def test_a_long_inference_is_no_slow_client() -> None:
    with served(limits=QUICK) as gateway, Raw(gateway.port) as client:
        client.send(inference(x_of(1), model="slow"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        tick = gateway.front._bounds.tick
        gateway.until(lambda: gateway.front._bounds.tick > tick + 60)
        gateway.finish()
        assert client.reply().status == 200


def test_a_client_that_takes_no_answers_is_dropped() -> None:
    with served(limits=QUICK) as gateway, Raw(gateway.port) as client:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        form = {"binary_data_size": 10**7}
        x = {"name": "x", "datatype": "UINT8", "shape": [1, 10**7], "parameters": form}
        body = {"inputs": [x], "parameters": {"binary_data_output": True}}
        client.send(inference(body, bytes(10**7)))
        gateway.until(lambda: len(gateway.service.asked) == 1)
        gateway.until(lambda: gateway.front.connections == 0)
        is_well(gateway)


def test_where_there_are_too_many_connections_one_that_waits_makes_way() -> None:
    with served(max_connections=2) as gateway, Raw(gateway.port) as busy, Raw(gateway.port) as idle:
        busy.send(inference(x_of(1), model="slow"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        assert idle.ask(request("/v2")).status == 200
        with Raw(gateway.port) as second:
            assert second.ask(request("/v2")).status == 200
            assert idle.ended()
            second.send(inference(x_of(1), model="slow"))
            gateway.until(lambda: len(gateway.service.slow) == 2)
            with Raw(gateway.port) as third:
                assert third.reply().status == 503
                assert third.ended()
            gateway.finish()
            assert busy.reply().status == second.reply().status == 200


def test_few_of_those_that_are_too_many_get_an_answer_and_none_stays() -> None:
    with served(max_connections=1) as gateway, Raw(gateway.port) as busy:
        busy.send(inference(x_of(1), model="slow"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        with contextlib.ExitStack() as stack:
            more = [stack.enter_context(Raw(gateway.port)) for _ in range(100)]
            answered = 0
            for each in more:
                with contextlib.suppress(EOFError, ConnectionError):
                    assert each.reply().status == 503
                    answered += 1
            assert answered >= 64
        gateway.until(lambda: not gateway.front._turned_away)
        gateway.finish()
        assert busy.reply().status == 200


def test_bodies_of_all_clients_together_are_bounded() -> None:
    running = served(max_in_flight_bytes=1000, max_request_bytes=900)
    with running as gateway, Raw(gateway.port) as first, Raw(gateway.port) as other:
        first.send(request(INFER, b"", "content-length: 900", method="POST"), b" " * 899)
        until_held(gateway, 899)
        refused = other.ask(request(INFER, BODY.ljust(102)))
        assert refused.status == 429 and refused.headers["retry-after"] == "1"
        chunks = other.ask(
            request(INFER, b"", *CHUNKED, method="POST") + chunked(b" " * 102, end=b"")
        )
        assert chunks.status == 429 and other.ended()
        assert "JSON" in first.ask(b" ").error
        # Two announce what only one of them may have: the second is ended when it sends it.
        with Raw(gateway.port) as second:
            for each in (first, second):
                each.send(request(INFER, b"", "content-length: 600", method="POST"), b" " * 100)
            until_held(gateway, 200)
            first.send(b" " * 499)
            until_held(gateway, 699)
            assert second.ask(b" " * 400).status == 429 and second.ended()
        assert "JSON" in first.ask(b" ").error
    assert gateway.front._bounds.held == 0


def test_a_drain_answers_what_runs_and_closes_the_rest() -> None:
    with served() as gateway, Raw(gateway.port) as busy, Raw(gateway.port) as idle:
        busy.send(inference(x_of(1), model="slow"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        assert idle.ask(request("/v2")).status == 200
        ending = gateway.loop.call_soon_threadsafe(
            lambda: gateway.loop.create_task(gateway.front.drain(10.0))
        )
        assert idle.ended() and ending is not None
        gateway.finish()
        reply = busy.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert busy.ended()
        gateway.until(lambda: gateway.front.connections == 0)
        with pytest.raises(ConnectionError):
            Raw(gateway.port)


def test_a_drain_ends_at_its_limit() -> None:
    with served() as gateway, Raw(gateway.port) as busy:
        busy.send(inference(x_of(1), model="slow"))
        gateway.until(lambda: len(gateway.service.slow) == 1)
        gateway.do(lambda: gateway.front.drain(0.05))
        assert busy.ended()
        gateway.until(lambda: gateway.service.cancelled == 1)


def test_a_fault_of_the_gateway_is_500_and_ends_nothing_else() -> None:
    with served() as gateway, Raw(gateway.port) as client:
        reply = client.ask(inference(x_of(1), model="broken"))
        assert reply.status == 500 and "RuntimeError" in reply.error
        assert client.ask(request("/v2")).status == 200
        assert len(gateway.failures) == 1
