"""Unmodified tritonclients against a gateway: the native client's answers, byte for byte."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from live_gateway import Gateway, serving, serving_models
from slosched import Client
from slosched.clients.aio import connect
from triton_clients import GRPC, HTTP, JSON, KINDS, Array, Arrays, Kind, Refused, same

pytestmark = [pytest.mark.processes, pytest.mark.torch]

OUTPUTS = {
    "pair": ("sum", "difference"),
    "seen": ("seen", "shown"),
    "shouts": ("loud", "sizes"),
    "large": ("output",),
}
#: Asks for a model's outputs by name.
Ask = Callable[[str, Arrays, tuple[str, ...]], Awaitable[Arrays]]
#: Requests in flight at a time, and of how many a mixed load consists for each client.
AT_ONCE, EACH = 16, 60


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with serving(folder, worker=serving_models(folder)) as running:
        with Client(running.controller) as client:
            for name in OUTPUTS:
                client.load(name)
        yield running


def row(name: str, draw: np.random.Generator) -> dict[str, Array]:
    """The inputs of one request, without a batch."""
    if name == "pair":
        return {key: draw.standard_normal((2, 3), np.float32) for key in ("a", "b")}
    if name == "seen":
        length = int(draw.integers(1, 17))
        return {"ids": draw.integers(0, 10**12, length), "mask": draw.integers(0, 2, length)}
    if name == "shouts":
        words = ["", "a", "straße", "\x00\x01", "x" * 40]
        texts = [words[int(draw.integers(len(words)))].encode() for _ in range(2)]
        return {"texts": np.array(texts, np.object_)}
    return {"input": draw.random((3, 224, 224), np.float32)}


def batch(rows: list[Arrays]) -> dict[str, Array]:
    """Rows of one shape as the protocol has them: behind a dimension for the batch."""
    return {name: np.stack([each[name] for each in rows]) for name in rows[0]}


def alike(name: str, size: int, draw: np.random.Generator) -> list[Arrays]:
    """Different rows of one shape."""
    first = row(name, draw)
    if name != "seen":
        return [first, *(row(name, draw) for _ in range(size - 1))]
    length = len(first["ids"])
    return [
        {"ids": draw.integers(0, 10**12, length), "mask": draw.integers(0, 2, length)}
        for _ in range(size)
    ]


def native(client: Client, name: str, rows: list[Arrays]) -> Arrays:
    (model,) = client.load(name)
    return batch([client.infer(model, dict(each), slo="60s").outputs for each in rows])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", OUTPUTS)
def test_answers_are_those_of_the_native_client(gateway: Gateway, kind: Kind, name: str) -> None:
    draw = np.random.default_rng(3)
    address = gateway.http if kind.is_http else gateway.grpc
    client = kind.open(address)
    try:
        with Client(gateway.controller) as own:
            for size in (1, 1, 3):
                rows = alike(name, size, draw)
                found = kind.ask(client, name, batch(rows), OUTPUTS[name])
                assert same(found, native(own, name, rows)), (name, size)
    finally:
        client.close()


def test_a_mixed_load_of_all_clients_at_once(gateway: Gateway) -> None:
    """http, http.aio, grpc, grpc.aio and the native client, with 16 in flight each; no answer is another's."""
    asyncio.run(asyncio.wait_for(_mixed_load(gateway), 90))


async def _mixed_load(gateway: Gateway) -> None:
    draw = np.random.default_rng(4)
    addresses = {HTTP: gateway.http, JSON: gateway.http, GRPC: gateway.grpc}
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(connect(gateway.controller))
        models = {name: (await own.load(name))[0] for name in OUTPUTS}

        async def check(ask: Ask, gate: asyncio.Semaphore) -> None:
            async with gate:
                name = str(draw.choice(list(OUTPUTS)))
                rows = alike(name, int(draw.choice((1, 1, 2, 4))), draw)
                found = await ask(name, batch(rows), OUTPUTS[name])
                answers = await asyncio.gather(
                    *(own.infer(models[name], dict(each), slo="60s") for each in rows)
                )
                assert same(found, batch([each.outputs for each in answers])), name

        work = []
        for kind, address in addresses.items():
            client = kind.open_async(address)
            stack.push_async_callback(client.close)
            gate = asyncio.Semaphore(AT_ONCE)
            ask = functools.partial(kind.ask_async, client)
            # An image as JSON is megabytes, which its client takes a tenth of a second to write.
            work += [check(ask, gate) for _ in range(EACH if kind.binary else EACH // 4)]
        for kind, address in addresses.items():
            # One thread for each: that of HTTP belongs to the thread that made it.
            thread = stack.enter_context(ThreadPoolExecutor(1))
            client = thread.submit(kind.open, address).result()
            stack.callback(thread.submit, client.close)
            gate = asyncio.Semaphore(1)
            blocking = functools.partial(_in_thread, thread, kind, client)
            work += [check(blocking, gate) for _ in range(EACH // 4)]
        await asyncio.gather(*work)


async def _in_thread(
    thread: ThreadPoolExecutor,
    kind: Kind,
    client: Any,
    model: str,
    arrays: Arrays,
    outputs: tuple[str, ...],
) -> Arrays:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(thread, kind.ask, client, model, arrays, outputs)


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=str)
def test_what_the_clients_ask_of_a_server(gateway: Gateway, kind: Kind) -> None:
    client = kind.open(gateway.http if kind.is_http else gateway.grpc)
    try:
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("pair") and not client.is_model_ready("nope")
        in_json = {} if kind.is_http else {"as_json": True}
        assert "binary_tensor_data" in client.get_server_metadata(**in_json)["extensions"]
        metadata = client.get_model_metadata("pair", **in_json)
        assert [each["name"] for each in metadata["inputs"]] == ["a", "b"]
        assert [int(extent) for extent in metadata["inputs"][0]["shape"]] == [-1, 2, 3]
        config = client.get_model_config("pair", **in_json)
        config = config if kind.is_http else config["config"]
        assert config["max_batch_size"] >= 1 and config["input"][0]["data_type"] == "TYPE_FP32"
        statistics = client.get_inference_statistics("pair", **in_json)
        assert statistics["model_stats"][0]["name"] == "pair"
        index = client.get_model_repository_index(**in_json)
        models = index if kind.is_http else index["models"]
        assert {each["name"] for each in models} >= OUTPUTS.keys()
        with pytest.raises(Refused, match="Request for unknown model: 'nope' is not found"):
            client.get_model_metadata("nope")
    finally:
        client.close()


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=str)
def test_load_and_unload(gateway: Gateway, kind: Kind) -> None:
    client = kind.open(gateway.http if kind.is_http else gateway.grpc)
    arrays = batch([row("pair", np.random.default_rng(1))])
    try:
        client.unload_model("pair")
        assert not client.is_model_ready("pair")
        client.load_model("pair")
        assert client.is_model_ready("pair")
        found = kind.ask(client, "pair", arrays, OUTPUTS["pair"])
        assert np.array_equal(found["sum"], arrays["a"] + arrays["b"])
        with pytest.raises(Refused, match="nope"):
            client.load_model("nope")
    finally:
        client.close()


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=str)
def test_a_model_is_unloaded_and_loaded_while_it_is_asked(gateway: Gateway, kind: Kind) -> None:
    """Each request gets its own answer, or is told that the model is not there; none waits for ever."""
    asyncio.run(asyncio.wait_for(_reloaded(gateway, kind), 60))


async def _reloaded(gateway: Gateway, kind: Kind) -> None:
    draw = np.random.default_rng(5)
    answers: Counter[str] = Counter()
    client = kind.open_async(gateway.http if kind.is_http else gateway.grpc)

    async def ask() -> None:
        arrays = batch([row("pair", draw)])
        try:
            found = await kind.ask_async(client, "pair", arrays, OUTPUTS["pair"])
        except Refused as refused:
            answers[str(refused.message())] += 1
        else:
            assert np.array_equal(found["sum"], arrays["a"] + arrays["b"])
            answers["ok"] += 1

    async def ask_on() -> None:
        while not reloads.done():
            await ask()

    async def reload() -> None:
        for _ in range(5):
            await client.unload_model("pair")
            await ask()  # there is nothing to answer it
            await client.load_model("pair")
            await ask()

    try:
        reloads = asyncio.ensure_future(reload())
        await asyncio.gather(reloads, *(ask_on() for _ in range(8)))
        assert answers.keys() == {
            "ok",
            "Request for unknown model: 'pair' has no available versions",
        }
        assert await client.is_model_ready("pair")
    finally:
        await client.close()
