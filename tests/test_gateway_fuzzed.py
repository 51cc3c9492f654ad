"""The random requests of benchmarks/triton_server/fuzz.py, without a Triton: none meets an exception."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc")

sys.path[:0] = [str(Path(__file__).parent.parent / "benchmarks" / "triton_server")]

import fuzz_http  # noqa: E402
import fuzz_rpc  # noqa: E402

from gateway_http_rig import Raw, request, served  # noqa: E402
from slosched.fronts.errors import FrontError  # noqa: E402
from slosched.fronts.regions import Regions  # noqa: E402
from slosched.fronts.rpc import inference  # noqa: E402

REQUESTS = 1500


def test_random_requests_by_http_leave_the_connection_in_step() -> None:
    statuses = set()
    with served() as gateway:
        client = Raw(gateway.port)
        for number in range(REQUESTS):
            case = fuzz_http.case(number, random.Random(number))
            reply = client.ask(case.data)
            if reply.status == 100:
                reply = client.reply()
            statuses.add(reply.status)
            if reply.headers.get("connection") == "close":
                client.socket.close()
                client = Raw(gateway.port)
            assert client.ask(request("/v2/health/live")).status == 200, case
        client.socket.close()
        assert not gateway.failures
    assert statuses >= {200, 400, 404, 405, 415, 501}


def test_random_requests_by_grpc_are_read_or_refused() -> None:
    around = inference.Circumstances("", 0, lambda: Regions(enabled=False), 2**20)
    read = refused = 0
    for number in range(REQUESTS):
        case = fuzz_rpc.case(number, random.Random(number))
        if not case.method.endswith("Infer"):
            continue
        try:
            inference.asked(inference.parsed(case.requests[0].SerializeToString()), around)
            read += 1
        except FrontError:
            refused += 1
    assert read > 100 and refused > 100


def test_a_request_is_drawn_from_its_number_alone() -> None:
    for number in range(20):
        assert fuzz_http.case(number, random.Random(number)) == fuzz_http.case(
            number, random.Random(number)
        )
        assert fuzz_rpc.case(number, random.Random(number)) == fuzz_rpc.case(
            number, random.Random(number)
        )
