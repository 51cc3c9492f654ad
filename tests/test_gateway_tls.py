"""Unmodified clients over TLS, with a token: what `ssl=True` and perf_analyzer's ssl options need."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import certificates
import perf_analyzer_rig
from live_gateway import Gateway, serving
from slosched import Client
from triton_clients import GRPC, HTTP, Kind, Refused

pytestmark = pytest.mark.processes

#: Emulated; its input has 602 kB, more than several of TLS's records.
MODEL = "resnet50_v2"
IMAGE = {"input": np.random.default_rng(0).random((1, 3, 224, 224), np.float32)}
TOKEN = "correct-horse"
#: That of HTTP puts its own headers into what it is given, so each request gets a copy.
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    certificate, key = certificates.made(folder)
    tokens = folder / "tokens.toml"
    tokens.write_text(f'[tokens.tester]\ntoken = "{TOKEN}"\n', encoding="utf-8")
    tokens.chmod(0o600)
    words = ("--tls-cert", str(certificate), "--tls-key", str(key), "--tokens", str(tokens))
    with serving(folder, gateway=words) as running:
        with Client(running.controller) as client:
            client.load(MODEL)
        yield running


def opened(kind: Kind, gateway: Gateway, folder: Path, *, asynchronous: bool = False) -> Any:
    """A client that trusts the gateway's certificate alone."""
    trusted = folder / "server.crt"
    open_one = kind.open_async if asynchronous else kind.open
    if kind is GRPC:
        return open_one(gateway.grpc, ssl=True, root_certificates=str(trusted))
    if asynchronous:
        context = ssl.create_default_context(cafile=str(trusted))
        return open_one(gateway.http, ssl=True, ssl_context=context)
    return open_one(gateway.http, ssl=True, ssl_options={"ca_certs": str(trusted)})


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=str)
def test_a_blocking_client(gateway: Gateway, folder: Path, kind: Kind) -> None:
    client = opened(kind, gateway, folder)
    try:
        assert client.is_server_live()  # health needs no token
        for _ in range(3):
            result = client.infer(
                MODEL, kind.inputs(IMAGE), headers=dict(BEARER), timeout=10_000_000
            )
            assert result.as_numpy("output").shape == (1, 1000)
        for headers in ({}, {"authorization": "Bearer wrong"}):
            with pytest.raises(Refused) as refused:
                client.infer(MODEL, kind.inputs(IMAGE), headers=dict(headers))
            wanted = "401" if kind is HTTP else "StatusCode.UNAUTHENTICATED"
            assert refused.value.status() == wanted
    finally:
        client.close()


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=str)
def test_an_asynchronous_client(gateway: Gateway, folder: Path, kind: Kind) -> None:
    async def work() -> None:
        client = opened(kind, gateway, folder, asynchronous=True)
        try:
            asked = (
                client.infer(MODEL, kind.inputs(IMAGE), headers=dict(BEARER), timeout=10_000_000)
                for _ in range(8)
            )
            for result in await asyncio.gather(*asked):
                assert result.as_numpy("output").shape == (1, 1000)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("kind", [HTTP, GRPC], ids=str)
def test_perf_analyzer(gateway: Gateway, folder: Path, kind: Kind) -> None:
    """Its `-H` is HTTP's alone, so that by gRPC it can give no token: it is refused, and says so."""
    perf_analyzer_rig.needed()
    trusted = str(folder / "server.crt")
    words = ["--request-count", "10"]
    if kind is HTTP:
        words += ["--ssl-https-ca-certificates-file", trusted]
        words += ["-H", f"authorization:Bearer {TOKEN}", "-H", "slosched-slo:10s"]
        report = perf_analyzer_rig.analyze(MODEL, f"https://{gateway.http}", *words)
        assert report.code == 0 and report.throughput > 0, report.text
    else:
        words += ["-i", "grpc", "--ssl-grpc-use-ssl"]
        words += ["--ssl-grpc-root-certifications-file", trusted]
        report = perf_analyzer_rig.analyze(MODEL, gateway.grpc, *words)
        assert report.code != 0 and "oken" in report.text, report.text
