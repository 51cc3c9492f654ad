"""The live controller under faults: real processes, real sockets, every request answered once."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from slosched import AsyncClient, Unloaded, connect
from slosched.codes import Code
from slosched.errors import DeadlineExceeded, InvalidRequest, RequestFailed
from slosched.experiment.children import Child, Children
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHello,
    InferRequest,
    Refused,
    StatusRequest,
    Welcome,
)
from slosched.telemetry.action_log import read_action_log
from slosched.telemetry.request_log import read_request_log
from slosched.transport.codec import decode_for_client, encode
from slosched.transport.sockets import Dealer

pytestmark = [pytest.mark.processes, pytest.mark.quiet]

LOOPBACK = ("--bind", "127.0.0.1")


def eventually(check: Callable[[], bool], *, within_s: float, what: str) -> float:
    """Wait until `check()`; returns the seconds it took."""
    begin = time.monotonic()
    while time.monotonic() - begin < within_s:
        if check():
            return time.monotonic() - begin
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {within_s} s")


class Cluster:
    """One controller over separate emulated workers, all on loopback."""

    def __init__(self, children: Children, directory: Path, workers: int, *options: str) -> None:
        self.children, self.directory = children, directory
        self.workers = [self._worker(i, 0) for i in range(workers)]
        self.ports = [children.wait_ready(w, within_s=30) for w in self.workers]
        self.logs = directory / "run"
        addresses = ",".join(f"127.0.0.1:{p}" for p in self.ports)
        self.controller = children.start(
            "controller",
            [
                "controller",
                "INFER5",
                "--workers",
                addresses,
                *LOOPBACK,
                "--port",
                "0",
                "--log-dir",
                str(self.logs),
                *options,
            ],
            directory / "c.log",
        )
        self.address = f"127.0.0.1:{children.wait_ready(self.controller, within_s=30)}"
        ready_line = self.controller.log.read_text()
        self.http = ready_line.split("http://")[1].split(";")[0].strip()

    def _worker(self, index: int, port: int) -> Child:
        log = self.directory / f"w{index}-{time.monotonic_ns()}.log"
        arguments = [
            "worker",
            "--device",
            "emulated",
            "--gpus",
            "1",
            *LOOPBACK,
            "--port",
            str(port),
        ]
        return self.children.start(f"worker {index}", arguments, log)

    def kill(self, index: int) -> None:
        child = self.workers[index]
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.wait(10)
        self.children.forget(child)

    def terminate(self, index: int) -> None:
        child = self.workers[index]
        child.process.terminate()
        assert child.process.wait(10) == 0
        self.children.forget(child)

    def restart(self, index: int) -> None:
        self.workers[index] = self._worker(index, self.ports[index])
        self.children.wait_ready(self.workers[index], within_s=30)

    def get(self, path: str) -> tuple[int, dict[str, object]]:
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=5) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Cluster]:
    with Children() as children:
        yield Cluster(children, tmp_path, 2)


async def spray(
    client: AsyncClient, model: object, seconds: float, slo: str, *, each_s: float = 0.005
) -> list[int]:
    """Requests at equal intervals for a while; the codes of all answers."""
    tasks = []

    async def one() -> int:
        try:
            await client.infer(model, slo=slo)  # type: ignore[arg-type]
        except RequestFailed as error:
            return error.code
        return 0

    for _ in range(round(seconds / each_s)):
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(each_s)
    return list(await asyncio.gather(*tasks))


def test_a_worker_killed_mid_run_costs_no_answer_and_is_used_again(two: Cluster) -> None:
    async def run() -> list[int]:
        async with connect(two.address) as client:
            (model,) = await client.load("resnet50_v2")
            loop = asyncio.get_running_loop()
            spraying = asyncio.create_task(spray(client, model, 4.0, "500ms"))
            await asyncio.sleep(1.0)
            await loop.run_in_executor(None, two.kill, 0)
            await asyncio.sleep(1.2)
            await loop.run_in_executor(None, two.restart, 0)
            return await spraying

    codes = asyncio.run(run())
    assert len(codes) == 800 and codes.count(0) > 500
    assert set(codes) <= {Code.OK, Code.CANCELLED, Code.TIMED_OUT, Code.COULD_NOT_START_IN_TIME}
    two.children.stop()
    log = read_request_log(two.logs / "clockwork_request_log.tsv")
    assert len(log) == 800 and len(set(log["request_id"].tolist())) == 800
    text = two.controller.log.read_text()
    assert f"worker 0 (127.0.0.1:{two.ports[0]}) lost" in text and "back after 1 loss" in text
    assert "Traceback" not in text


def test_a_worker_that_is_told_to_end_costs_no_request_that_others_can_serve(
    tmp_path: Path,
) -> None:
    """SIGTERM to one of three under 500/s, twice: it says goodbye, and hands back what it has not begun."""
    with Children() as children:
        three = Cluster(children, tmp_path, 3)

        async def run() -> list[int]:
            async with connect(three.address) as client:
                (model,) = await client.load("resnet50_v2")
                loop = asyncio.get_running_loop()
                spraying = asyncio.create_task(spray(client, model, 4.0, "5s", each_s=0.002))
                for index in (0, 1):
                    await asyncio.sleep(1.2)
                    await loop.run_in_executor(None, three.terminate, index)
                    await loop.run_in_executor(None, three.restart, index)
                return await spraying

        codes = asyncio.run(run())
        assert len(codes) == 2000 and set(codes) == {0}, {c: codes.count(c) for c in set(codes)}
        assert "says goodbye" in three.controller.log.read_text()


def test_health_tells_the_truth_within_a_second_of_a_death(two: Cluster) -> None:
    eventually(lambda: two.get("/healthz")[1]["status"] == "ok", within_s=10, what="all joined")
    assert two.get("/readyz")[0] == 200
    two.kill(0)
    # A second is promised; the poll and a busy machine may add a little.
    eventually(lambda: two.get("/healthz")[1]["status"] == "degraded", within_s=20, what="degraded")
    assert two.get("/healthz")[1]["workers_missing"] == [0]
    assert two.get("/readyz")[0] == 200
    two.kill(1)
    eventually(lambda: two.get("/readyz")[0] == 503, within_s=20, what="not ready")
    assert two.get("/healthz")[0] == 200
    assert two.get("/nonsense")[0] == 404
    two.restart(1)
    eventually(lambda: two.get("/readyz")[0] == 200, within_s=10, what="ready again")


def test_strangers_liars_and_garbage_are_counted_told_and_survived(two: Cluster) -> None:
    stranger = Dealer(two.address, b"stranger")
    try:
        eventually(lambda: stranger.send([b"garbage"]), within_s=5, what="connected")
        stranger.send([b""])
        stranger.send([encode(StatusRequest(1))[:-1]])
        stranger.send([encode(StatusRequest(2)), b"x", b"y", b"z"])
        stranger.send([b"\x00" * (65 * 1024 * 1024)])
        stranger.send([encode(ClientHello(99, 1, "from the future"))])
        stranger.send([encode(StatusRequest(3))])
        stranger.send([encode(ClientHello(PROTOCOL_VERSION, 1, "honest now"))])
        answers: list[object] = []

        def welcomed() -> bool:
            answers.extend(decode_for_client(frames[0]) for frames in stranger.receive())
            return any(isinstance(a, Welcome) for a in answers)

        eventually(welcomed, within_s=10, what="welcome")
    finally:
        stranger.close()
    refused = [a for a in answers if isinstance(a, Refused)]
    reasons = " | ".join(r.reason for r in refused)
    assert len(refused) >= 5
    assert "hello" in reasons and "at most" in reasons and "the client 99" in reasons
    two.children.stop()
    log = two.controller.log.read_text()
    assert log.count(b"stranger".hex()) == 1, "one line for each peer, however often it errs"
    manifest = json.loads((two.logs / "manifest.json").read_text())
    assert manifest["outcome"]["bad_messages"] >= 4
    assert "Traceback" not in log


def test_a_client_that_dies_frees_its_copies_and_the_next_one_reuses_them(two: Cluster) -> None:
    async def use() -> list[int]:
        client = await connect(two.address)
        models = await client.load("resnet50_v2", copies=3)
        return [m.info.model_id for m in models]

    first = asyncio.run(use())

    async def again() -> tuple[list[int], list[int]]:
        async with connect(two.address) as client:
            models = await client.load("resnet50_v2", copies=3)
            status = await client.status()
            users = [m["clients"] for m in status["models"]]
            return [m.info.model_id for m in models], users

    eventually(
        lambda: all(m["clients"] == 0 for m in two.get("/status")[1]["models"]),  # type: ignore[attr-defined]
        within_s=10,
        what="copies freed",
    )
    ids, users = asyncio.run(again())
    assert ids == first and users == [1, 1, 1]


def test_what_clients_and_operators_unload_leaves_the_worker(tmp_path: Path) -> None:
    def slosched(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "slosched", *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    async def left(client: AsyncClient, instances: int) -> None:
        for _ in range(1_000):
            status = await client.status()
            (worker,) = status["workers"]
            (gpu,) = worker["gpus"]
            assert worker["errors"] == 0
            if status["model_instances"] == instances and (
                instances or gpu["free_pages"] == gpu["pages"]
            ):
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"not {instances} instances within 10 s: {status['models']}, {gpu}")

    async def work(address: str) -> None:
        async with connect(address) as one, connect(address) as other:
            models = await one.load("resnet50_v2", copies=3)
            for model in models:
                assert (await one.infer(model, slo="5s")).ok
            (shared,) = await other.load("resnet50_v2")
            assert await one.unload("resnet50_v2") == Unloaded(unloaded=2, kept=1)
            with pytest.raises(InvalidRequest, match="load it again"):
                await one.infer(models[0])
            await left(one, 1)
            assert (await other.infer(shared, slo="5s")).ok

            words = ("unload", "resnet50_v2", address, "--force")
            refused = await asyncio.to_thread(slosched, *words)
            assert refused.returncode == 2 and "--operators names ops" in refused.stderr
            done = await asyncio.to_thread(slosched, *words, "--name", "ops")
            assert (done.returncode, done.stdout) == (0, "resnet50_v2: 1 instance unloaded\n")
            with pytest.raises(InvalidRequest, match="load one first"):
                await other.infer(shared, slo="5s")
            await left(one, 0)
            assert (await one.models())[0] == ()
            (again,) = await one.load("resnet50_v2")
            assert again.model_id > models[-1].model_id
            assert (await one.infer(again, slo="5s")).ok

    with Children() as children:
        cluster = Cluster(children, tmp_path, 1, "--operators", "ops")
        asyncio.run(work(cluster.address))
        said = cluster.controller.log.read_text()
        for count in (2, 1):
            assert f"{count} instance(s) of 'resnet50' are unloaded: a client asked for it" in said


def test_sigterm_finishes_what_is_in_flight_and_completes_the_files(two: Cluster) -> None:
    async def run() -> list[int]:
        async with connect(two.address) as client:
            (model,) = await client.load("resnet50_v2")
            spraying = asyncio.create_task(spray(client, model, 1.0, "200ms"))
            await asyncio.sleep(0.6)
            two.controller.process.send_signal(signal.SIGTERM)
            return await spraying

    codes = asyncio.run(run())
    assert codes.count(0) > 80
    assert two.controller.process.wait(15) == 0
    two.children.forget(two.controller)
    log = read_request_log(two.logs / "clockwork_request_log.tsv")
    manifest = json.loads((two.logs / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert (
        manifest["outcome"]["requests_answered"] == len(log) == manifest["outcome"]["request_rows"]
    )
    assert "Traceback" not in two.controller.log.read_text()


def test_an_impossible_deadline_is_refused_at_once_and_tells_when_to_come_back(
    two: Cluster,
) -> None:
    async def run() -> DeadlineExceeded:
        async with connect(two.address) as client:
            (model,) = await client.load("resnet50_v2")
            with pytest.raises(DeadlineExceeded) as caught:
                await client.infer(model, slo="2ms")
            return caught.value

    error = asyncio.run(run())
    assert error.code == Code.COULD_NOT_START_IN_TIME
    reply = error.reply
    assert 0 < reply.remaining_s <= 0.002  # type: ignore[attr-defined]
    assert "takes 2.6ms" in str(error)


def test_a_controller_without_workers_says_so_and_answers_clients(tmp_path: Path) -> None:
    with Children() as children:
        controller = children.start(
            "controller",
            [
                "controller",
                "FIFO",
                "--workers",
                "127.0.0.1:9",
                *LOOPBACK,
                "--port",
                "0",
                "--log-dir",
                str(tmp_path / "run"),
            ],
            tmp_path / "c.log",
        )
        children.wait_ready(controller, within_s=30)
        eventually(
            lambda: (
                "worker 0 (127.0.0.1:9) does not answer; 0 of 1 joined"
                in controller.log.read_text()
            ),
            within_s=10,
            what="a line about the silence",
        )


@pytest.fixture
def no_bytecode(monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes whose files may not grow: halves of bytecode would be left for every later import."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")


@pytest.mark.usefixtures("no_bytecode")
def test_a_full_disk_under_the_logs_is_told_once_and_serving_goes_on(two: Cluster) -> None:
    # The kernel then refuses to let any file of the controller grow past this, as a full disk would.
    limit = 6_000
    resource.prlimit(two.controller.process.pid, resource.RLIMIT_FSIZE, (limit, limit))

    async def run() -> list[int]:
        async with connect(two.address) as client:
            (model,) = await client.load("resnet50_v2")
            return await spray(client, model, 1.5, "300ms")

    codes = asyncio.run(run())
    assert codes.count(0) > 250
    log = two.controller.log.read_text()
    assert log.count("clockwork_request_log.tsv") == 1 and "File too large" in log
    two.children.stop()
    rows = read_request_log(two.logs / "clockwork_request_log.tsv")
    assert 0 < len(rows) < 300, "whole rows up to the limit, and nothing torn"
    assert "Traceback" not in two.controller.log.read_text()


def test_inputs_that_the_controller_makes_up_reach_the_worker(tmp_path: Path) -> None:
    with Children() as children:
        cluster = Cluster(children, tmp_path, 1, "--generate-inputs")

        async def run() -> list[int]:
            async with connect(cluster.address) as client:
                (model,) = await client.load("resnet50_v2")
                return await spray(client, model, 0.3, "500ms")

        codes = asyncio.run(run())
        assert codes and set(codes) == {0}
        children.stop()
    actions = read_action_log(cluster.logs / "clockwork_action_log.tsv")
    infers = actions["action_type"] == 2
    assert infers.sum() > 0 and set(actions["status"].tolist()) == {0}


def test_a_client_that_repeats_itself_with_other_inputs_harms_nobody(two: Cluster) -> None:
    """A refused duplicate's frame must not become the input of the request that was accepted."""
    liar = Dealer(two.address, b"liar")
    size = 4 * 3 * 224 * 224

    async def innocent() -> list[int]:
        async with connect(two.address) as client:
            (model,) = await client.load("resnet50_v2")

            async def one(mark: int) -> int:
                array = np.full((3, 224, 224), mark, np.float32)
                try:
                    answer = await client.infer(model, array, slo="500ms")
                except RequestFailed as error:
                    return error.code
                assert answer.output is not None and set(answer.output[:4].tolist()) == {mark}
                return answer.code

            tasks = []
            for index in range(100):
                request = InferRequest(
                    request_id=index,
                    model_id=model.info.model_id,
                    slo_factor=0.0,
                    slo_ns=10**9,
                    user_id=0,
                    shape=(3, 224, 224),
                    dtype="float32",
                )
                liar.send([encode(request), b"\0" * size])
                liar.send([encode(request), b"xx"])
                liar.send([encode(CancelRequest(10**6 + index)), b"yy"])
                tasks.append(asyncio.create_task(one(1 + index)))
                await asyncio.sleep(0.01)
            return list(await asyncio.gather(*tasks))

    try:
        eventually(
            lambda: liar.send([encode(ClientHello(PROTOCOL_VERSION, 1, "liar"))]),
            within_s=5,
            what="connected",
        )
        assert set(asyncio.run(innocent())) == {0}
    finally:
        liar.close()
    two.children.stop()
    codes = set(read_request_log(two.logs / "clockwork_request_log.tsv")["result"].tolist())
    assert Code.COPY_INPUT_BAD_SIZES not in codes and Code.OK in codes
