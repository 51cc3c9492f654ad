"""Unmodified clients of the protocol over HTTP and HTTPS, with a service of the test's own behind the port."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import tritonclient.http as blocking
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

from gateway_http_rig import FakeService, Raw, Served, inference, request, served, x_of
from slosched.errors import InvalidConfig
from slosched.fronts.tls import TlsFiles, read_tls

FILES = Path(__file__).with_name("tls_files")
CERTIFICATE, KEY = str(FILES / "server.pem"), str(FILES / "server.key")
VALUES = numpy.arange(600, dtype=numpy.float32).reshape(2, 300)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Served]:
    with served() as running:
        yield running
        assert not running.failures


def inputs(module: Any, *, binary: bool = True) -> list[Any]:
    given = module.InferInput("x", VALUES.shape, "FP32")
    given.set_data_from_numpy(VALUES, binary_data=binary)
    texts = module.InferInput("text", [2, 1], "BYTES")
    words = numpy.array([["grün"], [""]], dtype=numpy.object_)
    texts.set_data_from_numpy(words, binary_data=binary)
    return [given, texts]


def check(result: Any) -> None:
    assert numpy.array_equal(result.as_numpy("y"), VALUES)
    texts = result.as_numpy("text").flatten()  # of JSON's outputs str, of binary ones bytes
    assert [str(each, "utf-8") if isinstance(each, bytes) else each for each in texts] == [
        "grün",
        "",
    ]


def test_the_blocking_client(gateway: Served) -> None:
    client = blocking.InferenceServerClient(f"127.0.0.1:{gateway.port}")
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("echo") and not client.is_model_ready("nope")
    assert client.get_server_metadata()["name"] == "fake"
    assert client.get_model_metadata("grid", "2")["versions"] == ["2"]
    assert client.get_model_config("grid")["max_batch_size"] == 4
    assert client.get_inference_statistics("grid")["model_stats"][0]["name"] == "grid"
    assert client.get_model_repository_index()[0]["name"] == "echo"
    client.load_model("new", config="{}")
    assert client.get_system_shared_memory_status() == []
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    for binary in (True, False):
        check(client.infer("echo", inputs(blocking, binary=binary)))
        outputs = [
            blocking.InferRequestedOutput(each, binary_data=binary) for each in ("y", "text")
        ]
        check(client.infer("echo", inputs(blocking), outputs=outputs, timeout=25_000))
    assert gateway.service.asked[-1].slo_ns == 25_000_000
    for encoding in ("gzip", "deflate"):
        check(
            client.infer(
                "echo",
                inputs(blocking),
                request_compression_algorithm=encoding,
                response_compression_algorithm=encoding,
            )
        )
    for model, status, words in (
        ("refused", "503", "could not start in time"),
        ("limited", "429", "over the quota"),
    ):
        with pytest.raises(InferenceServerException, match=words) as raised:
            client.infer(model, inputs(blocking))
        assert raised.value.status() == status
    with pytest.raises(InferenceServerException, match="unknown model 'old'"):
        client.unload_model("old")
    client.close()


def test_the_blocking_client_s_asynchronous_requests(gateway: Served) -> None:
    client = blocking.InferenceServerClient(f"127.0.0.1:{gateway.port}", concurrency=4)
    for each in [client.async_infer("echo", inputs(blocking)) for _ in range(12)]:
        check(each.get_result())
    client.close()


def test_the_asynchronous_client(gateway: Served) -> None:
    async def talk() -> None:
        async with aio.InferenceServerClient(f"localhost:{gateway.port}") as client:
            assert await client.is_server_ready()
            found = await asyncio.gather(*[client.infer("echo", inputs(aio)) for _ in range(20)])
            for each in found:
                check(each)
            slow = asyncio.ensure_future(client.infer("slow", inputs(aio)))
            await asyncio.to_thread(gateway.until, lambda: len(gateway.service.slow) == 1)
            slow.cancel()
            await asyncio.to_thread(gateway.until, lambda: gateway.service.cancelled == 1)

    asyncio.run(talk())


# ------------------------------------------------------------------------------------- TLS


@pytest.fixture(params=["uvloop", "asyncio"])
def secure(request: pytest.FixtureRequest) -> Iterator[Served]:
    tls = read_tls(CERTIFICATE, KEY)
    options: dict[str, Any] = {"tls_cert": CERTIFICATE, "tls_key": KEY, "loop": request.param}
    with served(tls=tls, **options) as running:
        yield running
        assert not running.failures


def context(trusted: str = CERTIFICATE) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=trusted)


def wrapped(client: Raw, with_context: ssl.SSLContext | None = None) -> Raw:
    """The same connection, in TLS."""
    client.socket = (with_context or context()).wrap_socket(
        client.socket, server_hostname="localhost"
    )
    return client


def test_unmodified_clients_over_https(secure: Served) -> None:
    client = blocking.InferenceServerClient(
        f"localhost:{secure.port}", ssl=True, ssl_context_factory=context
    )
    check(client.infer("echo", inputs(blocking)))
    check(client.infer("echo", inputs(blocking)))
    client.close()

    async def talk() -> None:
        trusting = context()
        async with aio.InferenceServerClient(
            f"localhost:{secure.port}", ssl=True, ssl_context=trusting
        ) as client:
            for each in await asyncio.gather(
                *[client.infer("echo", inputs(aio)) for _ in range(8)]
            ):
                check(each)

    asyncio.run(talk())


def test_large_bodies_and_answers_over_https(secure: Served) -> None:
    data = bytes(range(256)) * 8000
    form = {"name": "x", "datatype": "UINT8", "shape": [1, len(data)]}
    given = {**form, "parameters": {"binary_data_size": len(data)}}
    document = {"inputs": [given], "parameters": {"binary_data_output": True}}
    with Raw(secure.port) as client:
        wrapped(client)
        for _ in range(3):
            assert client.ask(inference(document, data)).body.endswith(data)


def test_a_client_that_leaves_over_https_cancels_its_inference(secure: Served) -> None:
    with Raw(secure.port) as client:
        wrapped(client).send(inference(x_of(1), model="slow"))
        secure.until(lambda: len(secure.service.slow) == 1)
    secure.until(lambda: secure.service.cancelled == 1)


def test_an_error_over_https_reaches_its_client(secure: Served) -> None:
    with Raw(secure.port) as client:
        assert wrapped(client).ask(b"nonsense\r\n\r\n").status == 400


def test_plain_http_to_a_tls_port_and_tls_to_a_plain_port(secure: Served) -> None:
    with Raw(secure.port) as client:
        client.send(request("/v2"))
        while client.socket.recv(100):  # an alert
            pass
    with Raw(secure.port) as client:
        assert wrapped(client).ask(request("/v2")).status == 200
    with served() as plain, Raw(plain.port) as client, pytest.raises(ssl.SSLError):
        wrapped(client)


def test_tls_1_1_is_refused(secure: Served) -> None:
    old = context()
    with pytest.warns(DeprecationWarning):
        old.minimum_version = ssl.TLSVersion.TLSv1_1
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with Raw(secure.port) as client, pytest.raises((ssl.SSLError, ConnectionError)):
        wrapped(client, old)


def test_a_certificate_that_is_renewed_is_used_after_reload(tmp_path: Path) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"

    def put(name: str) -> None:
        certificate.write_bytes((FILES / f"{name}.pem").read_bytes())
        key.write_bytes((FILES / f"{name}.key").read_bytes())

    put("server")
    tls = read_tls(str(certificate), str(key))
    with served(tls=tls, tls_cert=str(certificate), tls_key=str(key)) as gateway:
        with Raw(gateway.port) as first:
            wrapped(first)
            put("other")
            gateway.do(tls.reload)
            assert tls.certificate == (FILES / "other.pem").read_bytes()
            assert first.ask(request("/v2")).status == 200
        with Raw(gateway.port) as client, pytest.raises(ssl.SSLCertVerificationError):
            wrapped(client)
        with Raw(gateway.port) as client:
            renewed = wrapped(client, context(str(FILES / "other.pem")))
            assert renewed.ask(request("/v2")).status == 200
        key.write_text("nonsense")
        with pytest.raises(InvalidConfig, match="--tls-key"):
            tls.reload()
        with Raw(gateway.port) as client:
            again = wrapped(client, context(str(FILES / "other.pem")))
            assert again.ask(request("/v2")).status == 200


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("missing.pem", "server.key", "--tls-cert .*missing.pem cannot be read: No such file"),
        ("server.pem", "missing.key", "--tls-key .*missing.key cannot be read: No such file"),
        ("", "server.key", "--tls-cert .* cannot be read: Is a directory"),
        ("server.pem", "other.key", "--tls-key .*other.key is not the key of the certificate"),
        ("server.pem", "encrypted.key", "--tls-key .*encrypted.key is encrypted"),
        ("server.pem", "server.pem", "--tls-key .*server.pem has no usable private key"),
        ("server.key", "server.key", "--tls-cert .*server.key has no usable certificate"),
        ("nonsense", "server.key", "--tls-cert .*nonsense has no usable certificate"),
        ("server.pem", "nonsense", "--tls-key .*nonsense has no usable private key"),
    ],
)
def test_the_file_that_is_wrong_is_named(
    tmp_path: Path, certificate: str, key: str, words: str
) -> None:
    for each in FILES.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    (tmp_path / "nonsense").write_bytes(b"-----BEGIN \xff CERTIFICATE-----\n")
    with pytest.raises(InvalidConfig, match=words):
        TlsFiles(str(tmp_path / certificate), str(tmp_path / key))


def test_tokens_over_https() -> None:
    service = FakeService("secret")
    options: dict[str, Any] = {"tls_cert": CERTIFICATE, "tls_key": KEY, "tokens": "tokens.toml"}
    with served(service, tls=read_tls(CERTIFICATE, KEY), **options) as gateway:
        client = blocking.InferenceServerClient(
            f"localhost:{gateway.port}", ssl=True, ssl_context_factory=context
        )
        headers = {"Authorization": "Bearer secret"}
        check(client.infer("echo", inputs(blocking), headers=headers))
        with pytest.raises(InferenceServerException, match="token") as raised:
            client.infer("echo", inputs(blocking))
        assert raised.value.status() == "401"
        check(client.infer("echo", inputs(blocking), headers=headers))
        client.close()
