"""host:port in every spelling, and IPv6 from the command line to the socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import urllib.request
from pathlib import Path

import pytest
import zmq

from fake_controller import FakeController
from slosched.addresses import parse_address, parse_bind
from slosched.cli.values import looks_like_address, worker_addresses
from slosched.clients.blocking import Client
from slosched.daemon.http import HttpServer, json_answer
from slosched.errors import AddressInUse, InvalidConfig
from slosched.experiment.children import Children
from slosched.transport import sockets
from slosched.transport.sockets import Dealer, Router


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this host has no IPv6")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("gpu01:1", "gpu01", 1),
        ("gpu-01.rack_2.example.org.:65535", "gpu-01.rack_2.example.org.", 65535),
        ("127.0.0.1:12346", "127.0.0.1", 12346),
        ("[::1]:12346", "::1", 12346),
        ("[0:0:0::1]:5", "::1", 5),
        ("[FE80::A%eth0]:5", "fe80::a%eth0", 5),
        ("[::ffff:10.0.0.1]:5", "::ffff:a00:1", 5),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port, port)
    assert looks_like_address(text) and len(worker_addresses([text])) == 1


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("gpu01", "host:port"),
        ("gpu01:", "host:port"),
        (":5", "host:port"),
        ("", "host:port"),
        ("a:b", "host:port"),
        ("a:-1", "host:port"),
        ("a:\u0665", "host:port"),
        ("a b:5", "host:port"),
        ("tcp://a:5", "host:port"),
        ("[zz]:1", "not a host"),
        ("[]:1", "not a host"),
        ("[127.0.0.1]:1", "not a host"),
        ("[::1%]:1", "not a host"),
        ("-a:1", "not a host"),
        ("::1", "brackets"),
        ("::1:12346", "brackets"),
        ("a:0", "1..65535"),
        ("a:65536", "1..65535"),
        (f"a:{'9' * 5000}", "1..65535"),
        ("a:1-2", "host:port"),
    ],
)
def test_what_is_no_address_is_refused_at_once(text: str, wrong: str) -> None:
    with pytest.raises(InvalidConfig, match=wrong):
        parse_address(text)
    with pytest.raises(InvalidConfig, match=wrong):  # libzmq would take most, and try for ever
        Dealer(text)


def test_a_name_that_has_ipv6_addresses_alone_is_reached_by_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    families = {"six": (socket.AF_INET6,), "both": (socket.AF_INET6, socket.AF_INET)}
    asked: list[str] = []
    answered = threading.Event()

    def look_up(name: str, port: None) -> list[tuple[int, str]]:
        asked.append(name)
        if name == "silent":
            answered.wait(60)
        if name not in families:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(family, "") for family in families[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(sockets, "_LOOK_UP_WITHIN_S", 0.05)
    for name, ipv6_on in (("six", 1), ("both", 0), ("unknown", 0), ("silent", 0), ("127.0.0.1", 0)):
        dealer = Dealer(f"{name}:5")
        assert dealer._socket.getsockopt(zmq.IPV6) == ipv6_on, name
        dealer.close()
    answered.set()
    assert asked == ["six", "both", "unknown", "silent"]


def test_workers_of_ipv6_are_expanded_and_compared() -> None:
    assert worker_addresses(["[::1]:5-6,a:7"]) == ("[::1]:5", "[::1]:6", "a:7")
    with pytest.raises(InvalidConfig, match="named twice"):
        worker_addresses(["[::1]:5", "[0::1]:5"])


def test_what_a_daemon_listens_on() -> None:
    for text, host in (("::1", "::1"), ("[::1]", "::1"), ("::", "::"), ("*", "*"), ("lo", "lo")):
        assert parse_bind(text) == host
    for wrong in ("", "127.0.0.1:5", "a b", "[a]", "zz::"):
        with pytest.raises(InvalidConfig, match="cannot listen on"):
            parse_bind(wrong)
        with pytest.raises(InvalidConfig, match="cannot listen on"):
            Router(wrong, 0)


@ipv6
@pytest.mark.parametrize("bind", ["::1", "[::1]", "::"])
def test_a_client_reaches_an_ipv6_controller(bind: str) -> None:
    with FakeController(host=parse_bind(bind)) as controller:
        with Client(f"[::1]:{controller.port}") as client:
            [model] = client.load("toy")
            assert client.infer(model).ok
        if bind == "::":  # all interfaces, of both kinds
            with Client(f"127.0.0.1:{controller.port}") as client:
                assert client.load("toy")
        with pytest.raises(AddressInUse, match="in use"):
            Router(bind, controller.port)


@ipv6
def test_http_answers_on_both_loopback_addresses() -> None:
    async def work() -> None:
        server = HttpServer({"/": lambda _: json_answer(200, {"a": 1})})
        await server.start("127.0.0.1", 0)
        for host in ("127.0.0.1", "[::1]", "localhost"):
            url = f"http://{host}:{server.port}/"
            with await asyncio.to_thread(urllib.request.urlopen, url, None, 10) as answer:
                assert json.loads(answer.read()) == {"a": 1}
        await server.close()
        with pytest.raises(OSError):
            await asyncio.open_connection("::1", server.port)

    asyncio.run(asyncio.wait_for(work(), 30))


@ipv6
@pytest.mark.processes
def test_daemons_over_ipv6(tmp_path: Path) -> None:
    with Children() as children:
        common = ["--bind", "::1", "--port", "0"]
        worker = ["worker", "--device", "emulated", *common]
        port = children.wait_ready(children.start("worker", worker, tmp_path / "w"), within_s=60)
        arguments = ["controller", "INFER5", "--workers", f"[::1]:{port}", *common]
        arguments += ["--http-port", "-1", "--log-dir", str(tmp_path / "run")]
        started = children.start("controller", arguments, tmp_path / "c")
        port = children.wait_ready(started, within_s=60)
        with Client(f"[::1]:{port}") as client:
            [model] = client.load("resnet50_v2")
            assert client.infer(model, slo="1s").ok
