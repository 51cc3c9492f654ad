"""Tokens beside each other on one gateway: what one sees, reads, and takes of what another has."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from gateway_rig import Controller, Ends, asked, loads, run, service, status_of, unloads, until
from slosched.fronts.asked import Answered, RegionPart, Wanted
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.gateway import GatewayServer
from slosched.fronts.regions import FOLDER, Regions, Room
from slosched.fronts.rpc.messages import SERVICE, message
from slosched.gateway_config import GatewayConfig
from slosched.messages import InferRequest

TOKENS = """
[tokens.all]
token = "token-of-all"
[tokens.few]
token = "token-of-few"
models = ["toy"]
[tokens.boss]
token = "token-of-boss"
models = ["toy"]
operator = true
[tokens.root]
token = "token-of-root"
operator = true
"""
#: A name of the same length as that of the model that is hidden.
HIDDEN, UNKNOWN = "hides", "never"

FAR_NS = 10**18


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS)
    path.chmod(0o600)
    return str(path)


@contextmanager
def an_object(name: str) -> Iterator[str]:
    """The key of a shared memory object of 64 bytes."""
    key = f"slosched_tenants_{os.getpid()}_{name}"
    (FOLDER / key).write_bytes(bytes(range(64)))
    yield key
    (FOLDER / key).unlink()


@pytest.fixture
def memory() -> Iterator[str]:
    with an_object("one") as key:
        yield key


@pytest.fixture
def other_memory() -> Iterator[str]:
    with an_object("other") as key:
        yield key


class Reply(NamedTuple):
    """What a client heard: an HTTP status or a gRPC code, and the rest."""

    status: object
    body: bytes | str


class Asks:
    """Sends requests of one token to a gateway's two ports."""

    def __init__(self, server: GatewayServer, channel: grpc.aio.Channel, token: str) -> None:
        assert server.http is not None
        self._port, self._channel, self._token = server.http.port, channel, token

    async def http(self, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        data = json.dumps(body).encode() if body is not None else b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"authorization: Bearer {self._token}\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        answer = await reader.read()
        writer.close()
        head_, _, found = answer.partition(b"\r\n\r\n")
        return Reply(int(head_.split()[1]), found)

    async def rpc(self, method: str, request: str, **fields: Any) -> Reply:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        data = message(request)(**fields).SerializeToString()
        try:
            found = await call(
                data, metadata=(("authorization", f"Bearer {self._token}"),), timeout=20
            )
        except grpc.aio.AioRpcError as error:
            return Reply(error.code(), error.details() or "")
        return Reply(grpc.StatusCode.OK, found)


@asynccontextmanager
async def gateway(controller: Controller, tokens: str) -> AsyncIterator[dict[str, Asks]]:
    """A gateway's clients by the name of their token, once every model is loaded and was used by `all`."""
    config = GatewayConfig(controller=controller.address, tokens=tokens, http_port=0, grpc_port=0)
    server = GatewayServer(config, announce=lambda text: None)
    await server.start()
    assert server.rpc is not None
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.rpc.port}")
    try:
        ends = Ends(server.service, server.service.callers.caller("Bearer token-of-all"))
        for name in controller.offers:
            assert isinstance(await ends.of(asked(model=name)), Answered)
        names = ("all", "few", "boss", "root")
        yield {name: Asks(server, channel, f"token-of-{name}") for name in names}
    finally:
        await channel.close()
        await server.close()


def of_model(name: str) -> dict[str, tuple[Any, ...]]:
    """Requests that name a model, by what they are."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 3, 4], "data": [0.0] * 12}
    raw: dict[str, Any] = {
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3, 4]}],
        "raw_input_contents": [bytes(48)],
    }
    model, repository = f"/v2/models/{name}", f"/v2/repository/models/{name}"
    return {
        "infer": ("POST", f"{model}/infer", {"inputs": [tensor]}),
        "infer of a version": ("POST", f"{model}/versions/1/infer", {"inputs": [tensor]}),
        "plain infer": ("POST", f"/v1/infer/{name}", {"inputs": {"input": [[0.0] * 4] * 3}}),
        "metadata": ("GET", model),
        "metadata of a version": ("GET", f"{model}/versions/1"),
        "config": ("GET", f"{model}/config"),
        "ready": ("GET", f"{model}/ready"),
        "statistics": ("GET", f"{model}/stats"),
        "statistics of a version": ("GET", f"{model}/versions/1/stats"),
        "trace": ("GET", f"{model}/trace/setting"),
        "load": ("POST", f"{repository}/load"),
        "unload": ("POST", f"{repository}/unload"),
        "ModelInfer": ("ModelInferRequest", {"model_name": name, **raw}),
        "ModelMetadata": ("ModelMetadataRequest", {"name": name}),
        "ModelConfig": ("ModelConfigRequest", {"name": name}),
        "ModelReady": ("ModelReadyRequest", {"name": name}),
        "ModelStatistics": ("ModelStatisticsRequest", {"name": name}),
        "TraceSetting": ("TraceSettingRequest", {"model_name": name}),
        "RepositoryModelLoad": ("RepositoryModelLoadRequest", {"model_name": name}),
        "RepositoryModelUnload": ("RepositoryModelUnloadRequest", {"model_name": name}),
    }


async def heard(asks: Asks, what: str, given: tuple[Any, ...]) -> Reply:
    if given[0] in ("GET", "POST"):
        return await asks.http(*given)
    return await asks.rpc(what, given[0], **given[1])


def test_a_model_that_a_token_may_not_use_is_as_one_that_does_not_exist(tokens: str) -> None:
    async def work() -> None:
        with Controller(("toy", HIDDEN)) as controller:
            async with gateway(controller, tokens) as clients:
                loaded = len(loads(controller))
                hidden, unknown = of_model(HIDDEN), of_model(UNKNOWN)
                for who in ("few", "boss"):
                    for what in hidden:
                        found = await heard(clients[who], what, hidden[what])
                        like = await heard(clients[who], what, unknown[what])
                        text = (
                            like.body.replace(UNKNOWN.encode(), HIDDEN.encode())
                            if isinstance(like.body, bytes)
                            else like.body.replace(UNKNOWN, HIDDEN)
                        )
                        assert found == Reply(like.status, text), what
                assert len(loads(controller)) == loaded and not unloads(controller)
                for what, given in of_model("toy").items():  # those of its own it has
                    if "load" not in what.lower() and "trace" not in what.lower():
                        assert (await heard(clients["few"], what, given)).status in (
                            200,
                            grpc.StatusCode.OK,
                        ), what
                every = await clients["all"].rpc("ModelConfig", "ModelConfigRequest", name=HIDDEN)
                assert every.status is grpc.StatusCode.OK

    run(work())


def test_lists_have_the_models_of_the_token_alone(tokens: str) -> None:
    async def work() -> None:
        with Controller(("toy", HIDDEN)) as controller:
            async with gateway(controller, tokens) as clients:
                for who, sees in (("all", True), ("few", False), ("boss", False), ("root", True)):
                    asks = clients[who]
                    answers = [
                        await asks.http("POST", "/v2/repository/index"),
                        await asks.http("POST", "/v2/repository/index", {"ready": True}),
                        await asks.http("GET", "/v2/models/stats"),
                        await asks.rpc("RepositoryIndex", "RepositoryIndexRequest"),
                        await asks.rpc("RepositoryIndex", "RepositoryIndexRequest", ready=True),
                        await asks.rpc("ModelStatistics", "ModelStatisticsRequest"),
                    ]
                    for each in answers:
                        assert isinstance(each.body, bytes) and b"toy" in each.body
                        assert (HIDDEN.encode() in each.body) is sees

    run(work())


def test_loads_unloads_and_metrics_are_for_operators(tokens: str) -> None:
    async def work() -> None:
        with Controller(("toy", HIDDEN)) as controller:
            async with gateway(controller, tokens) as clients:
                for who in ("all", "few"):
                    for name in ("toy", HIDDEN, UNKNOWN):
                        for what in ("load", "unload"):
                            found = await heard(clients[who], what, of_model(name)[what])
                            assert found.status == 403 and b"operator = true" in found.body
                        for what in ("RepositoryModelLoad", "RepositoryModelUnload"):
                            found = await heard(clients[who], what, of_model(name)[what])
                            assert found.status is grpc.StatusCode.PERMISSION_DENIED
                    assert (await clients[who].http("GET", "/metrics")).status == 403
                assert not unloads(controller)
                whole = await clients["root"].http("GET", "/metrics")
                part = await clients["boss"].http("GET", "/metrics")
                assert f'model="{HIDDEN}"'.encode() in whole.body
                assert isinstance(part.body, bytes) and HIDDEN.encode() not in part.body
                assert b'model="toy"' in part.body
                what = "RepositoryModelUnload"
                assert (await heard(clients["boss"], what, of_model("toy")[what])).status is (
                    grpc.StatusCode.OK
                )
                await until(
                    lambda: unloads(controller).count("toy") == 2
                )  # its own, and that of `all`

    run(work())


def test_words_of_the_controller_do_not_tell_other_names(tokens: str) -> None:
    async def work() -> None:
        with Controller(("toy", "more")) as controller:
            async with service(controller.address, tokens=tokens) as serving:
                few = serving.callers.caller("Bearer token-of-few")
                await serving.index(few, ready=False)
                controller.offers = (HIDDEN,)
                status, text = await status_of(serving.model_config("toy", "", few))
                assert status is Status.NOT_FOUND and "no worker offers model 'toy' now" in text
                assert "knows" not in text

    run(work())


# ------------------------------------------------------------------------------ shared memory


def test_a_region_belongs_to_the_token_that_registered_it(
    tokens: str, memory: str, other_memory: str
) -> None:
    async def work() -> None:
        with Controller() as controller:
            async with gateway(controller, tokens) as clients:
                mine, theirs = clients["all"], clients["few"]
                path = "/v2/systemsharedmemory"
                body = {"key": f"/{memory}", "byte_size": 64}
                assert (await mine.http("POST", f"{path}/region/r/register", body)).status == 200
                for asks in (theirs, clients["root"]):
                    assert (await asks.http("GET", f"{path}/status")).body == b"[]"
                    one = await asks.http("GET", f"{path}/region/r/status")
                    none = await asks.http("GET", f"{path}/region/s/status")
                    assert one.status == none.status == 404
                    shown = await asks.rpc(
                        "SystemSharedMemoryStatus", "SystemSharedMemoryStatusRequest"
                    )
                    assert shown.body == b""
                    place = {"shared_memory_region": "r", "shared_memory_byte_size": 48}
                    given = {"name": "input", "datatype": "FP32", "shape": [1, 3, 4]}
                    read = {"inputs": [given | {"parameters": place}]}
                    put = {
                        "inputs": [given | {"data": [0.0] * 12}],
                        "outputs": [{"name": "output", "parameters": place}],
                    }
                    for wanted in (read, put):
                        found = await asks.http("POST", "/v2/models/toy/infer", wanted)
                        assert found.status == 404 and b"Unable to find" in found.body
                    for name in ("", "region/r/"):
                        await asks.http("POST", f"{path}/{name}unregister")
                    for name in ("", "r"):
                        await asks.rpc(
                            "SystemSharedMemoryUnregister",
                            "SystemSharedMemoryUnregisterRequest",
                            name=name,
                        )
                assert (FOLDER / memory).read_bytes() == bytes(range(64))
                shown = await mine.http("GET", f"{path}/status")
                assert json.loads(shown.body) == [
                    {"name": "r", "key": f"/{memory}", "offset": 0, "byte_size": 64}
                ]
                # The name is not taken for others, and by gRPC the table is that of HTTP.
                taken = await theirs.rpc(
                    "SystemSharedMemoryRegister",
                    "SystemSharedMemoryRegisterRequest",
                    name="r",
                    key=other_memory,
                    byte_size=8,
                )
                assert taken.status is grpc.StatusCode.OK
                assert b'"byte_size":8' in (await theirs.http("GET", f"{path}/status")).body

    run(work())


def test_regions_have_room_in_equal_shares(
    memory: str, other_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Room, "MOST", 4)
    room = Room(shares=2)
    first, second = Regions(room=room), Regions(room=room)
    for name in ("a", "b"):
        first.register(name, memory, 0, 1)
    with pytest.raises(FrontError, match="2 shared memory regions of this token are registered"):
        first.register("c", memory, 0, 1)
    room.shares = 1  # the other token went, and came again when its room was taken
    first.register("c", memory, 0, 1)
    room.shares = 2
    second.register("a", other_memory, 0, 1)
    with pytest.raises(FrontError, match="4 shared memory regions are registered"):
        second.register("b", other_memory, 0, 1)
    first.close()
    second.register("b", other_memory, 0, 1)
    second.close()
    assert room.taken == 0


def test_an_object_that_one_token_registered_cannot_be_opened_by_another(memory: str) -> None:
    room = Room(shares=2)
    first, second = Regions(room=room), Regions(room=room)
    alias = f"{memory}_alias"
    os.link(FOLDER / memory, FOLDER / alias)
    try:
        first.register("a", memory, 0, 8)
        first.register("b", alias, 8, 8)
        for key in (memory, f"/{memory}", alias):
            with pytest.raises(FrontError, match="Unable to open shared memory region") as caught:
                second.register("a", key, 0, 8)
            assert caught.value.status is Status.INVALID_ARGUMENT
        first.unregister("a")
        with pytest.raises(FrontError, match="Unable to open"):
            second.register("a", memory, 0, 8)
        first.unregister("")
        second.register("a", memory, 0, 8)
        with pytest.raises(FrontError, match="Unable to open"):
            first.register("a", memory, 0, 8)
        second.close()
        first.register("a", memory, 0, 8)
    finally:
        (FOLDER / alias).unlink()
        first.close()
    assert room.taken == 0 and not room.holders


def test_regions_of_a_token_that_is_gone_are_closed_once_its_requests_are_answered(
    tokens: str, memory: str, other_memory: str
) -> None:
    async def work() -> None:
        with Controller() as controller:
            async with service(controller.address, tokens=tokens) as serving:
                gone = serving.callers.caller("Bearer token-of-all")
                idle = serving.callers.caller("Bearer token-of-few")
                ends = Ends(serving, gone)
                assert isinstance(await ends.of(asked()), Answered)
                for each, key in ((gone, memory), (idle, other_memory)):
                    each.regions.register("r", key, 0, 64)
                controller.answer_after_ns = FAR_NS
                ends.begin(asked(wanted=(Wanted("output", RegionPart("r", 0, 64)),)))
                await until(lambda: len(controller.of(InferRequest)) == 2)
                controller.answer_after_ns = 0
                Path(tokens).write_text('[tokens.new]\ntoken = "token-of-new"\n')
                serving.read_tokens_again()
                await until(lambda: not idle.regions.status(""))
                assert gone.regions.status("")
                late = [*controller._due]
                controller._due += [(0, peer, frames) for due, peer, frames in late if due > FAR_NS]
                await until(lambda: len(ends.results) == 2)
                assert isinstance(ends.results[1], Answered) and ends.results[1].in_regions
                await until(lambda: not gone.regions.status(""))

    run(work())
