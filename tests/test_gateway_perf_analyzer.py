"""Triton's perf_analyzer against a gateway, in each of its modes: it ends well, and has measured something.

It ends with an error at the first answer that is one. The SLO is 10 s, so that a slow machine refuses none,
and a run is a number of requests, not a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import perf_analyzer_rig
from live_gateway import Gateway, serving
from slosched import Client

pytestmark = pytest.mark.processes

#: Its input has 602 kB.
MODEL = "resnet50_v2"
SLO = {
    "http": ("-H", "slosched-slo:10s"),
    "grpc": ("--request-parameter", "timeout:10000000:int"),
}
#: It wants at least as many requests as its rate is per second.
POISSON = ("--request-rate-range", "40", "--request-distribution", "poisson")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    perf_analyzer_rig.needed()
    with serving(tmp_path_factory.mktemp("gateway")) as running:
        with Client(running.controller) as client:
            client.load(MODEL)
        yield running


def measure(
    gateway: Gateway, protocol: str, *arguments: str, requests: int = 40
) -> perf_analyzer_rig.Report:
    """A run that must succeed; what it reports of the server is from the gateway's statistics."""
    url = {"http": gateway.http, "grpc": gateway.grpc}[protocol]
    words = ["-i", protocol, *SLO[protocol], *arguments, "--request-count", str(requests)]
    report = perf_analyzer_rig.analyze(MODEL, url, *words)
    assert report.code == 0 and report.throughput > 0, report.text
    assert f"Request count: {requests}" in report.text and report.inferences > 0, report.text
    return report


@pytest.mark.parametrize("protocol", SLO)
def test_with_several_in_flight(gateway: Gateway, protocol: str) -> None:
    measure(gateway, protocol, "--concurrency-range", "4")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_at_a_poisson_rate(gateway: Gateway, protocol: str) -> None:
    measure(gateway, protocol, *POISSON)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_at_given_intervals(gateway: Gateway, protocol: str, tmp_path: Path) -> None:
    intervals = tmp_path / "intervals"
    intervals.write_text("10000\n20000\n5000\n", encoding="utf-8")
    measure(gateway, protocol, "--request-intervals", str(intervals))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_in_batches(gateway: Gateway, protocol: str) -> None:
    report = measure(gateway, protocol, "-b", "4", "--concurrency-range", "2")
    assert report.inferences > 40  # 160, less those before and after its window


@pytest.mark.parametrize("load", [("--concurrency-range", "4"), POISSON], ids=["closed", "open"])
def test_over_a_stream(gateway: Gateway, load: tuple[str, ...]) -> None:
    measure(gateway, "grpc", "--streaming", *load)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_through_shared_memory(gateway: Gateway, protocol: str) -> None:
    room = ("--shared-memory", "system", "--output-shared-memory-size", "8192")
    measure(gateway, protocol, *room, "--concurrency-range", "2")


def test_with_tensors_in_json(gateway: Gateway) -> None:
    """Its numbers are random bits, so that there are some which JSON does not have.

    An image of 150,528 numbers takes milliseconds to read: a few of them do.
    """
    in_json = ("--input-tensor-format", "json", "--output-tensor-format", "json")
    measure(gateway, "http", *in_json, requests=5)
