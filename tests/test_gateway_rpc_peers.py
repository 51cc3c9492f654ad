"""What gRPC's connections hold: how it is counted, and which are ended when it is too much."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from rpc_rig import WITHIN_S, EchoService, Served, a_request, call, channel, serving
from slosched.fronts.rpc import peers, server
from slosched.fronts.rpc.kernel import Connection, connections, own_memory_bytes
from slosched.fronts.rpc.messages import SERVICE, InferResponse
from slosched.fronts.rpc.peers import Peers

MB = 1024**2


class Wires:
    """Connections that are made up: by their peer the bytes that came, and which were ended."""

    def __init__(self, **received: int) -> None:
        self.received = received
        self.ended: list[str] = []
        self.said: list[str] = []

    @contextlib.contextmanager
    def __call__(self, port: int) -> Iterator[list[Any]]:
        yield [Wire(self, name, size) for name, size in self.received.items()]


class Wire:
    def __init__(self, wires: Wires, peer: str, received: int) -> None:
        self._wires, self.peer, self.received = wires, peer, received

    def end(self) -> None:
        self._wires.ended.append(self.peer)
        del self._wires.received[self.peer]


class Memory:
    """What a process has for itself, of which `give_back` may free some."""

    def __init__(self, used: int, free: int = 0) -> None:
        self.used, self.free = used, free

    def __call__(self) -> int:
        return self.used

    def give_back(self) -> None:
        self.used -= self.free
        self.free = 0


def of(wires: Wires, memory: Memory | None = None) -> Peers:
    """The peers of these, with bounds of 10 MB of answers and 100 MB of memory."""
    memory = memory or Memory(0)
    return Peers(
        most_untaken=10 * MB,
        most_memory=100 * MB,
        memory=memory,
        give_back=memory.give_back,
        connected=wires,
        announce=wires.said.append,
    )


# ---------------------------------------------------------------------------------- by counts


def test_beyond_the_bound_of_answers_the_connection_with_most_of_them_is_ended() -> None:
    wires = Wires(greedy=0, modest=0)
    found = of(wires)
    greedy, modest = found.of("greedy"), found.of("modest")
    theirs = [found.holds(greedy, 3 * MB) for _ in range(2)]
    own = found.holds(modest, 4 * MB)
    assert found.untaken == 10 * MB and not wires.ended
    found.holds(modest, 1)
    assert wires.ended == ["greedy"] and found.untaken == 4 * MB + 1
    for each in (*theirs, own, own):
        found.taken(each)
    assert found.untaken == 1 and modest.untaken == 1
    found.holds(greedy, MB)  # an RPC that has not noticed yet
    assert found.untaken == 1 and found.of("greedy") is not greedy


def test_an_answer_that_is_not_taken_in_time_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [10**18]
    monkeypatch.setattr(peers, "now_ns", lambda: now[0])
    wires = Wires(slow=0, dead=0, waits=0)
    found = of(wires)
    slow, dead = found.holds(found.of("slow"), 4 * MB), found.holds(found.of("dead"), 1)
    found.sends(slow)
    found.sends(dead)
    found.holds(found.of("waits"), MB)  # for those before it on its stream
    for after_s, ended in ((29, []), (31, ["dead"]), (45, ["dead"]), (47, ["dead", "slow"])):
        now[0] = 10**18 + after_s * 10**9
        asyncio.run(found.look())
        assert wires.ended == ended
    assert found.untaken == MB


def test_beyond_the_bound_of_memory_those_are_ended_that_hold_most() -> None:
    wires = Wires(idle=500 * MB, half=60 * MB, part=20 * MB, unknown=15 * MB, small=MB - 1)
    found = of(wires, Memory(140 * MB, free=30 * MB))
    for _ in range(500):
        found.of("idle").got(MB)  # all that came is answered
    found.of("part").got(10 * MB)
    found.of("half")
    asyncio.run(found.look())
    assert wires.ended == ["half"]  # 20 MB too many, and then below by a tenth
    found = of(wires, Memory(10**12))
    found.of("idle").got(600 * MB)
    asyncio.run(found.look())
    assert sorted(wires.ended) == ["half", "part", "unknown"]
    assert [each.partition(":")[0] for each in wires.said] == [
        "the gateway has more memory than --max-memory"
    ] * 2  # each Peers tells it once a minute


def test_a_look_that_fails_is_told_and_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(peers, "_AFTER_FAULT_S", 0.001)
    wires, memory = Wires(half=60 * MB), Memory(10**12)
    found = of(wires, memory)
    told: list[dict[str, Any]] = []

    def give_back() -> None:
        if not told:
            raise RuntimeError("a fault of this test")

    found._give_back = give_back

    async def work() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, each: told.append(each))
        looks = asyncio.create_task(found.look_after())
        async with asyncio.timeout(WITHIN_S):
            while not wires.ended:
                await asyncio.sleep(0.001)
        looks.cancel()

    asyncio.run(work())
    assert len(told) == 1


def test_memory_that_was_only_kept_is_given_back_and_nobody_is_ended() -> None:
    wires, memory = Wires(half=60 * MB), Memory(140 * MB, free=40 * MB)
    found = of(wires, memory)
    asyncio.run(found.look())
    assert memory.used == 100 * MB and not wires.ended
    asyncio.run(found.look())
    assert not wires.ended


def test_connections_that_are_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_MOST_PEERS", 3)
    wires = Wires(b=0)
    found = of(wires)
    kept = found.of("b")
    for name in ("a", "c", "d"):
        found.of(name)
    assert found.of("b") is kept and list(found._peers) == ["b", "d"]


# -------------------------------------------------------------------------------- on sockets


def half_a_message(port: int, size: int, method: str = "ModelInfer") -> socket.socket:
    """A connection that has sent the beginning of a request, `size` bytes of 60 MB."""

    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return (
            struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
        )

    def header(name: str, value: str) -> bytes:
        return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()

    head = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/{SERVICE}/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    message = b"\0" + struct.pack(">I", 60 * MB) + bytes(size)
    made = socket.create_connection(("127.0.0.1", port), WITHIN_S)
    made.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    made.sendall(frame(1, 4, 1, b"".join(header(*each) for each in head.items())))
    for at in range(0, len(message), 16384):
        made.sendall(frame(0, 0, 1, message[at : at + 16384]))
    return made


def is_ended(raw: socket.socket) -> bool:
    """Whether the peer ends the connection. Waits for that."""
    try:
        while raw.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_half_messages_end_their_connection_and_no_other(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_WORTH_BYTES", 16 * 1024)
    with serving() as served, channel(served) as made:
        stop = threading.Event()

        def requests() -> Iterator[bytes]:
            yield a_request("1", bytes(100_000))
            stop.wait(WITHIN_S)
            yield a_request("2")

        stream = made.stream_stream(f"/{SERVICE}/ModelStreamInfer")(requests(), timeout=WITHIN_S)
        next(stream)
        assert call(made, "ModelInfer", a_request(data=bytes(100_000)))
        with contextlib.ExitStack() as stack:
            raw = [
                stack.enter_context(half_a_message(served.front.port, 40_000, method)) for _ in "ab"
            ]
            served.until(lambda: _received(served) >= 280_000)
            served.front.peers._memory = Memory(2**40)
            assert all(map(is_ended, raw))
            served.front.peers._memory = Memory(0)
            assert call(made, "ModelInfer", a_request())
            stop.set()
            assert next(stream)


def test_a_connection_without_an_rpc_ends_and_its_client_makes_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "_IDLE_WITHIN_MS", 100)
    with serving() as served, channel(served) as made:
        for _ in range(2):
            assert call(made, "ServerLive", b"")
            served.until(lambda: not _names(served))


def _names(served: Served) -> list[str]:
    with connections(served.front.port) as found:
        return [each.peer for each in found]


def _received(served: Served) -> int:
    with connections(served.front.port) as found:
        return sum(each.received for each in found)


def test_untaken_answers_end_their_connection_and_no_other() -> None:
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_receive_message_length", -1),
    ]
    request = a_request(data=bytes(400_000))
    with serving(max_in_flight_bytes=MB) as served, channel(served) as made:
        with grpc.insecure_channel(served.address, options=options) as greedy:
            # The client asks for a stream and does not read it, so the answer stays where it is.
            asks = greedy.stream_stream(f"/{SERVICE}/ModelInfer")
            held = [asks(iter([request]), timeout=WITHIN_S) for _ in range(2)]
            served.until(lambda: served.front.peers.untaken > 800_000)
            held.append(asks(iter([request]), timeout=WITHIN_S))
            codes = [each.code() for each in held]
            assert codes == [grpc.StatusCode.UNAVAILABLE] * 3
        answer = InferResponse.FromString(call(made, "ModelInfer", request))
        assert len(answer.raw_output_contents[0]) == 400_000
        served.until(lambda: served.front.peers.untaken == 0)


def test_a_stream_s_answers_count_until_they_are_written_or_it_ends() -> None:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    service = EchoService(hold=True)
    with serving(service) as served:
        found = served.front.peers
        with grpc.insecure_channel(served.address, options=options) as made:
            requests = [a_request(name, bytes(300_000)) for name in ("", "b", "")]
            stream = made.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter(requests))
            served.until(lambda: len(service.begun) == 3)
            served.do(lambda: service.begun[2].end(service.end_of(requests_of(service)[2])))
            assert found.untaken > 300_000  # it waits for the first
            served.do(service.release)
            assert found.untaken > 600_000
            assert len([*stream]) == 3
            served.until(lambda: found.untaken == 0)
            stream = made.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter(requests))
            served.until(lambda: len(service.begun) == 3)
            served.do(service.release)
            assert found.untaken > 600_000
            stream.cancel()
            served.until(lambda: found.untaken == 0)


def requests_of(service: EchoService) -> list[Any]:
    return [each.asked for each in service.begun]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_s_connections_have_grpc_s_names(host: str) -> None:
    try:
        socket.create_server(
            (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ).close()
    except OSError:
        pytest.skip(f"{host} cannot be had here")
    with serving(bind=host) as served:
        address = f"[{host}]" if ":" in host else host
        with grpc.insecure_channel(f"{address}:{served.front.port}") as made:
            call(made, "ServerLive", b"")
            with connections(served.front.port) as found:
                [name] = served.front.peers._peers
                [received] = [each.received for each in found if each.peer == name]
                assert received > len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


def test_a_dual_stack_port_names_its_clients_by_their_own_kind() -> None:
    with serving(bind="*") as served, channel(served) as made:
        call(made, "ServerLive", b"")
        with connections(served.front.port) as found:
            assert {each.peer.partition(":")[0] for each in found} <= {"ipv4", "ipv6"}
            assert not any("ffff" in each.peer for each in found)
        assert {*served.front.peers._peers} <= {each.peer for each in found}


def test_the_kernel_tells_memory_and_only_the_port_s_connections() -> None:
    before = own_memory_bytes()
    kept = bytes(range(256)) * (16 * 4096)
    assert before < own_memory_bytes() - len(kept) // 2
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as mine:
            theirs, _ = listener.accept()
            mine.sendall(b"12345")
            with theirs, connections(port) as found:
                [it] = found
                assert isinstance(it, Connection) and it.received == 5
                name = mine.getsockname()
                assert it.peer == f"ipv4:127.0.0.1:{name[1]}"
                it.end()
                assert theirs.recv(10) in (b"", b"12345")
                assert is_ended(mine)
        with connections(port) as found:
            assert not found
