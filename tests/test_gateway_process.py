"""The gateway as a process, and its service before a real controller: start, restarts, signals, options."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import certificates
from gateway_rig import Ends, real, run, service, until
from live_gateway import LOOPBACK, serving
from slosched.cli.app import app
from slosched.clients.aio import connect
from slosched.experiment.children import Child, Children
from slosched.fronts.asked import Answered, Asked, NamedTensor
from slosched.fronts.errors import FrontError, Status

MODEL = "resnet50"
SHAPE = (3, 224, 224)
SLOW = ("--default-slo", "20s")


def get(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of one request; with a body it is a POST."""
    request = urllib.request.Request(f"http://{address}{path}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_for(holds: Callable[[], object], within_s: float = 30.0) -> None:
    ends_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends_s, "it did not come to hold"
        time.sleep(0.02)


def body(rows: int = 1) -> tuple[bytes, dict[str, str]]:
    """An inference with binary data, and its headers."""
    data = np.ones((rows, *SHAPE), np.float32).tobytes()
    tensor = {
        "name": "input",
        "datatype": "FP32",
        "shape": [rows, *SHAPE],
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def infer(address: str, rows: int = 1, **headers: str) -> tuple[int, Any]:
    content, of_body = body(rows)
    status, text = get(address, f"/v2/models/{MODEL}/infer", content, **of_body, **headers)
    return status, json.loads(text)


@contextlib.contextmanager
def alone(folder: Path, *words: str) -> Iterator[tuple[Child, str]]:
    """A gateway without a controller, and its HTTP address."""
    with Children() as children:
        words = ("gateway", "--http-port", "0", "--grpc-port", "-1", *words)
        process = children.start("gateway", list(words), folder / "gateway.log")
        port = children.wait_ready(process, within_s=60)
        yield process, f"127.0.0.1:{port}"


def free_port() -> int:
    """One that no process gets by asking for any: those begin at 32768."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.processes
def test_it_starts_before_its_controller_and_survives_the_next(tmp_path: Path) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    with alone(tmp_path, "--controller", address) as (process, http), Children() as children:
        assert get(http, "/v2/health/live")[0] == 200
        assert get(http, "/v2/health/ready")[0] == 400
        wait_for(lambda: "no controller has answered" in process.text())
        worker = children.start(
            "worker", ["worker", "--device", "emulated", *LOOPBACK], tmp_path / "w"
        )
        at = f"127.0.0.1:{children.wait_ready(worker, within_s=60)}"
        for life in range(2):
            words = [
                "controller",
                "INFER5",
                "--workers",
                at,
                "--bind",
                "127.0.0.1",
                "--port",
                str(port),
            ]
            words += ["--http-port", "-1", "--log-dir", str(tmp_path / f"run{life}"), *SLOW]
            controller = children.start(f"controller{life}", words, tmp_path / f"c{life}")
            children.wait_ready(controller, within_s=60)
            wait_for(lambda: get(http, "/v2/health/ready")[0] == 200)
            wait_for(lambda: infer(http)[0] == 200)
            if not life:
                controller.process.kill()
                controller.process.wait(30)
        assert "slosched_gateway_controller_restarts 1.0" in get(http, "/metrics")[1].decode()
        assert "answers" in process.text()


@pytest.mark.processes
def test_a_signal_answers_what_runs_and_ends_with_0(tmp_path: Path) -> None:
    statuses: list[int] = []

    def ask(address: str) -> None:
        try:
            statuses.append(infer(address, 16)[0])
        except (urllib.error.URLError, ConnectionError):
            statuses.append(0)  # it came after the port was closed

    with serving(tmp_path, controller=SLOW) as gateway:
        assert infer(gateway.http)[0] == 200
        asking = [threading.Thread(target=ask, args=(gateway.http,)) for _ in range(6)]
        for each in asking:
            each.start()
        metric = b"gateway_in_flight 0.0"
        wait_for(lambda: metric not in get(gateway.http, "/metrics")[1] or statuses)
        gateway.process.process.send_signal(signal.SIGTERM)
        for each in asking:
            each.join(30)
        assert gateway.process.process.wait(30) == 0
        with pytest.raises(urllib.error.URLError):
            get(gateway.http, "/v2/health/live")
    assert len(statuses) == 6 and 200 in statuses and set(statuses) <= {0, 200, 503}


@pytest.mark.processes
def test_a_hangup_reads_the_tokens_again(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text('[tokens.a]\ntoken = "first-token"\n')
    path.chmod(0o644)
    with alone(tmp_path, "--tokens", str(path)) as (process, http):
        assert "chmod 600" in process.text()
        assert get(http, "/v2/health/live")[0] == 200  # probes need no token
        assert get(http, "/v2")[0] == get(http, "/metrics")[0] == 401
        assert get(http, "/v2", Authorization="Bearer first-token")[0] == 200
        path.write_text("nonsense")
        process.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "what was read before stays" in process.text())
        assert get(http, "/v2", Authorization="Bearer first-token")[0] == 200
        path.write_text('[tokens.a]\ntoken = "second-token"\n')
        process.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "read again" in process.text())
        assert get(http, "/v2", Authorization="Bearer first-token")[0] == 401
        assert get(http, "/v2", Authorization="Bearer second-token")[0] == 200


@pytest.mark.processes
def test_what_a_peer_breaks_on_the_grpc_port_fills_no_log(tmp_path: Path) -> None:
    certificate, key = certificates.made(tmp_path)
    words = ("--tls-cert", str(certificate), "--tls-key", str(key), "--grpc-port", "0")
    with alone(tmp_path, *words) as (process, _):
        wait_for(lambda: "no controller has answered" in process.text())
        before = process.text()
        found = re.search(r"gRPC with TLS on \S+:(\d+)", before)
        assert found is not None
        trusting = ssl.create_default_context(cafile=str(certificate))
        trusting.set_alpn_protocols(["h2"])
        for wrong in (b"GET / HTTP/1.1\r\n\r\n", b"\x17\x03\x03\x00\x20" + bytes(32)):
            plain = socket.create_connection(("127.0.0.1", int(found[1])), 30)
            with trusting.wrap_socket(plain, server_hostname="localhost") as secure:
                with socket.socket(fileno=os.dup(secure.fileno())) as below:
                    below.sendall(wrong)  # within the connection, and no record of it
                with contextlib.suppress(OSError):
                    while secure.recv(4096):
                        pass
        assert process.text() == before


def test_what_cannot_be_served_is_refused_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.toml").write_text("[tokens.a]\n")
    (tmp_path / "gateway.toml").write_text("http_prot = 1\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        wrong: dict[tuple[str, ...], tuple[int, str]] = {
            ("--http-port", "-1", "--grpc-port", "-1"): (2, "nothing would be served"),
            ("--controller", "nonsense"): (2, "not a host:port"),
            ("--tls-cert", "a.pem"): (2, "go together"),
            ("--tls-cert", "a.pem", "--tls-key", "b.pem"): (2, "a.pem"),
            ("--tokens", "none.toml"): (2, "none.toml"),
            ("--tokens", "tokens.toml"): (2, "needs token or sha256"),
            ("--config", "gateway.toml"): (2, "http_prot"),
            ("--model-control", "sometimes"): (2, "on-demand"),
            ("--max-in-flight", "0"): (2, "within 1..1000000"),
            ("--http-port", port, "--grpc-port", "-1"): (4, "in use"),
            ("--http-port", "-1", "--grpc-port", port): (4, "in use"),
        }
        for words, (code, text) in wrong.items():
            done = CliRunner().invoke(app, ["gateway", *words])
            assert (done.exit_code, text in done.stderr) == (code, True), (words, done.stderr)
            assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from slosched.errors import MissingPackage
    from slosched.fronts.gateway import GatewayServer
    from slosched.gateway_config import GatewayConfig

    for name in [
        n for n in sys.modules if n.startswith(("slosched.fronts.http", "slosched.fronts.rpc"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    for absent, ports in (("httptools", {"grpc_port": -1}), ("grpc", {"http_port": -1})):

        async def work(ports: Any = ports) -> None:
            with pytest.raises(MissingPackage, match=r"pip install 'slosched\[gateway\]'"):
                GatewayServer(GatewayConfig(**ports), announce=lambda text: None)

        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, absent, None)
            asyncio.run(work())


def test_a_gateway_file_says_what_the_options_say(tmp_path: Path) -> None:
    from slosched.cli.gateway import _from_file
    from slosched.gateway_config import GatewayConfig

    shipped = Path(__file__).parent.parent / "daemon" / "gateway.toml"
    assert _from_file(shipped, GatewayConfig()) == GatewayConfig()
    path = tmp_path / "gateway.toml"
    path.write_text('tokens = "tokens.toml"\nmax_request = "1MiB"\nload = ["a", "b:2"]\n')
    found = _from_file(path, GatewayConfig())
    assert found.tokens == str(tmp_path / "tokens.toml")
    assert (found.max_request_bytes, found.load) == (2**20, ("a", "b:2"))


def image(rows: int, seed: int) -> NamedTensor:
    array = np.random.default_rng(seed).random((rows, *SHAPE), dtype=np.float32)
    return NamedTensor("input", "FP32", array.shape, array.tobytes())


@pytest.mark.processes
def test_answers_are_their_own_requests_under_mixed_load(tmp_path: Path) -> None:
    """An emulated answer repeats the first bytes of its row's input, so a mix-up shows."""

    async def work() -> None:
        async with real(tmp_path) as controller, service(f"127.0.0.1:{controller.port}") as gateway:
            ends = Ends(gateway)
            who = gateway.caller("")
            await until(gateway.ready)
            asks = [
                Asked(model=MODEL, inputs=(image(1 + seed % 5, seed),), slo_ns=20 * 10**9)
                for seed in range(60)
            ]
            answers = await asyncio.gather(*(gateway.infer(each, who) for each in asks))
            for wanted, answer in zip(asks, answers, strict=True):
                rows = wanted.inputs[0].shape[0]
                sent = np.frombuffer(wanted.inputs[0].data, np.float32).reshape(rows, -1)
                [output] = answer.outputs
                found = np.frombuffer(output.data, np.float32).reshape(output.shape)
                assert output.shape == (rows, 1000)
                assert np.array_equal(found[:, :4], sent[:, :4])
            refused = await ends.of(Asked(model=MODEL, inputs=(image(4, 1),), slo_ns=1_000))
            assert isinstance(refused, FrontError) and refused.refusal is not None
            assert refused.refusal.predicted_exec_ns > 0
            await until(lambda: controller.scheduler.arrived == controller.scheduler.answered)

    run(work())


@pytest.mark.processes
def test_a_model_that_an_operator_forces_out_comes_back(tmp_path: Path) -> None:
    """It holds the words by which the gateway knows that from other invalid requests."""

    async def work() -> None:
        async with real(tmp_path, operators=("boss",)) as controller:
            address = f"127.0.0.1:{controller.port}"
            async with service(address) as gateway, connect(address, name="boss") as boss:
                ends = Ends(gateway)
                await until(gateway.ready)
                wanted = Asked(model=MODEL, inputs=(image(1, 3),), slo_ns=10**10)
                assert isinstance(await ends.of(wanted), Answered)
                await boss.unload(MODEL, force=True)
                error = await ends.of(wanted)
                assert isinstance(error, FrontError) and error.status is Status.UNAVAILABLE
                assert "was unloaded at the controller" in error.text
                assert isinstance(await ends.of(wanted), Answered)

    run(work())


def test_the_page_s_table_of_metrics_is_what_is_served() -> None:
    from slosched.fronts.counting import Counting

    counting = Counting()
    counting.ended("toy", "ok", "")
    counting.answered("toy", 5_000_000)

    async def served() -> str:
        async with service("127.0.0.1:9") as gateway:
            return counting.text([*gateway._gauges()], lambda _: True).decode()

    text = asyncio.run(served())
    kinds = dict(re.findall(r"^# TYPE (slosched_\S+) (\S+)$", text, re.MULTILINE))
    page = (Path(__file__).parent.parent / "docs" / "gateway.md").read_text()
    rows = re.findall(r"^\| `(slosched_gateway_\S+)` \| (\w+) \|([^|]*)\|", page, re.MULTILINE)
    assert {name: kind for name, kind, _ in rows} == kinds
    for name, _, labels in rows:
        found = re.search(rf"^{name}(?:_bucket)?(?:{{(.*?)}})? ", text, re.MULTILINE)
        assert found is not None
        shown = {each.partition("=")[0] for each in (found[1] or "").split(",") if each}
        assert shown - {"le"} == {each for each in labels.strip().split(", ") if each}, name


@pytest.mark.processes
def test_the_controller_counts_the_requests_of_clients_that_left_as_cancelled(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        async with real(tmp_path) as controller, service(f"127.0.0.1:{controller.port}") as gateway:
            ends = Ends(gateway)
            await until(gateway.ready)
            wanted = Asked(model=MODEL, inputs=(image(16, 5),), slo_ns=30 * 10**9)
            assert isinstance(await ends.of(wanted), Answered)
            scheduler = controller.scheduler
            for _ in range(20):  # a machine that stands still may serve all of them first
                sent = scheduler.arrived + 12 * 16
                running = [ends.begin(wanted) for _ in range(12)]  # far more than runs at a time
                while scheduler.arrived < sent:
                    await asyncio.sleep(0.002)
                for each in running:
                    each.cancel()
                await until(lambda: scheduler.answered == scheduler.arrived)
                if scheduler.by_code.get(1):
                    break
            assert scheduler.by_code[1] > 0
            assert gateway.running == 0

    run(work())
