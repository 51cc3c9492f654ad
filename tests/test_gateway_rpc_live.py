"""The gRPC port of a gateway process, before a controller and a worker."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from live_gateway import Gateway, serving
from rpc_rig import WITHIN_S
from slosched import Client
from slosched.fronts.rpc.messages import SERVICE, InferRequest, InferResponse, StreamResponse

pytestmark = pytest.mark.processes

_IMAGE = bytes(4 * 3 * 224 * 224)
#: Longer than any test: what waits is not refused.
_PATIENT_US = 60_000_000


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with serving(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def a_request(slo_us: int, name: str = "") -> bytes:
    data: bytes = InferRequest(
        model_name="resnet50",
        id=name,
        inputs=[{"name": "input", "datatype": "FP32", "shape": [1, 3, 224, 224]}],
        raw_input_contents=[_IMAGE],
        parameters={"timeout": {"int64_param": slo_us}},
    ).SerializeToString()
    return data


def counted(client: Client) -> dict[str, int]:
    """Requests at the controller by their code's name; `arrived` are all."""
    requests: dict[str, Any] = client.status()["requests"]
    by_name = {code.partition(" ")[2]: number for code, number in requests["by_code"].items()}
    return by_name | {"arrived": requests["arrived"]}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end, "it did not come within 20 s"
        time.sleep(0.01)


def test_a_client_that_leaves_cancels_at_the_controller(gateway: Gateway) -> None:
    with grpc.insecure_channel(gateway.grpc) as channel, Client(gateway.controller) as client:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        assert InferResponse.FromString(infer(a_request(_PATIENT_US), timeout=WITHIN_S)).outputs
        before = counted(client)
        gateway.worker_process.process.send_signal(signal.SIGSTOP)  # so that requests wait
        try:
            futures = [infer.future(a_request(_PATIENT_US)) for _ in range(40)]
            stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(
                iter([a_request(_PATIENT_US)] * 10)
            )
            until(lambda: counted(client)["arrived"] == before["arrived"] + 50)
            for each in (*futures, stream):
                each.cancel()
            # A batch or two may have gone to the worker already; the others are given up in the queue.
            until(lambda: counted(client).get("cancelled", 0) >= before.get("cancelled", 0) + 10)
        finally:
            gateway.worker_process.process.send_signal(signal.SIGCONT)
        assert InferResponse.FromString(infer(a_request(_PATIENT_US), timeout=WITHIN_S)).outputs


def test_a_refusal_has_its_prediction(gateway: Gateway) -> None:
    with grpc.insecure_channel(gateway.grpc) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        infer(a_request(_PATIENT_US), timeout=WITHIN_S)  # loads the model
        with pytest.raises(grpc.RpcError) as caught:
            infer(a_request(1), timeout=WITHIN_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        known = {name: int(value) for name, value in caught.value.trailing_metadata()}
        assert known["slosched-predicted-exec-us"] > 1 >= known["slosched-time-left-us"]
        assert known["slosched-code"] in (4, 7, 8)


def test_sigterm_ends_idle_streams(gateway: Gateway) -> None:
    """The last test: the gateway has ended."""
    with grpc.insecure_channel(gateway.grpc) as channel:
        sent = iter([a_request(_PATIENT_US, "a")])

        def messages() -> Iterator[bytes]:
            yield from sent
            while gateway.process.process.poll() is None:
                time.sleep(0.01)

        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(messages())
        assert StreamResponse.FromString(next(stream)).infer_response.id == "a"
        gateway.process.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.details() == "the gateway is shutting down"
        assert gateway.process.process.wait(WITHIN_S) == 0
