"""The gRPC port as its clients see it: tritonclient, grpc.aio, and channels that send what they like."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as client
import tritonclient.grpc.aio as aio_client
import uvloop
from tritonclient.utils import InferenceServerException, shared_memory

from rpc_rig import TOKEN, WITHIN_S, EchoService, Served, a_request, call, channel, failure, serving
from slosched.errors import AddressInUse, InvalidConfig
from slosched.fronts.errors import FrontError, Refusal, Status
from slosched.fronts.regions import Regions
from slosched.fronts.rpc import calls
from slosched.fronts.rpc.messages import SERVICE, InferResponse, message, methods
from slosched.fronts.rpc.server import RpcFront
from slosched.fronts.tls import read_tls
from slosched.gateway_config import GatewayConfig

_DOCUMENTS: dict[str, dict[str, Any]] = {
    "metadata": {
        "name": "echo",
        "versions": ["1", "2"],
        "platform": "slosched",
        "inputs": [{"name": "in", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "out", "datatype": "FP32", "shape": [-1, 4]}],
    },
    "config": {
        "name": "echo",
        "backend": "slosched",
        "max_batch_size": 8,
        "input": [{"name": "in", "data_type": "TYPE_FP32", "dims": [4]}],
        "output": [{"name": "out", "data_type": "TYPE_STRING", "dims": [2**40]}],
        "parameters": {"slo": {"string_value": "25ms"}},
        "a_field_of_http_alone": [1],
    },
    "statistics": {
        "model_stats": [
            {
                "name": "echo",
                "version": "1",
                "inference_count": 2**40,
                "inference_stats": {"success": {"count": 3, "ns": 2**50}, "cache_hit": {}},
                "batch_stats": [{"batch_size": 4, "compute_infer": {"count": 1, "ns": 5}}],
            }
        ]
    },
}


@pytest.fixture(scope="module")
def echo() -> Iterator[Served]:
    with serving(EchoService(documents=_DOCUMENTS)) as served:
        yield served


@contextlib.contextmanager
def triton(served: Served, **options: Any) -> Iterator[Any]:
    """tritonclient's client of a front."""
    made = client.InferenceServerClient(served.address, **options)
    try:
        yield made
    finally:
        made.close()


def a_input(array: Any, name: str = "in", datatype: str = "FP32") -> Any:
    made = client.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


# --------------------------------------------------------------------------------------- documents


def test_what_tritonclient_asks_before_it_infers(echo: Served) -> None:
    with triton(echo) as asks:
        assert asks.is_server_live() and not asks.is_server_ready()
        assert asks.is_model_ready("echo") and not asks.is_model_ready("echo", "2")
        server = asks.get_server_metadata(as_json=True)
        assert server == {"name": "slosched", "version": "1", "extensions": ["statistics"]}
        metadata = asks.get_model_metadata("echo", as_json=True)
        assert metadata["versions"] == ["1", "2"] and metadata["inputs"][0]["shape"] == ["-1", "4"]
        config = asks.get_model_config("echo").config
        assert config.max_batch_size == 8 and config.input[0].data_type == 11
        assert config.output[0].data_type == 13 and list(config.output[0].dims) == [2**40]
        assert config.parameters["slo"].string_value == "25ms"
        [statistics] = asks.get_inference_statistics("echo").model_stats
        assert statistics.inference_count == 2**40
        assert statistics.inference_stats.success.ns == 2**50
        assert statistics.inference_stats.HasField("cache_hit")
        assert statistics.batch_stats[0].compute_infer.ns == 5
        with pytest.raises(InferenceServerException, match="unknown model: 'nope' is not found"):
            asks.get_model_config("nope")


def test_grpcs_own_health_check() -> None:
    service = EchoService(needs_token=True)
    with serving(service) as served, channel(served) as made:
        check = made.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=WITHIN_S) == b"\x08\x02"  # NOT_SERVING
        service.is_ready = True
        assert check(b"\x0a\x01x", timeout=WITHIN_S) == b"\x08\x01"  # SERVING
        with pytest.raises(grpc.RpcError, match="Method not found"):
            made.unary_unary("/grpc.health.v1.Health/Watch")(b"", timeout=WITHIN_S)


def test_the_repository(echo: Served) -> None:
    with triton(echo) as asks:
        index = asks.get_model_repository_index()
        assert [(each.name, each.state) for each in index.models] == [
            ("echo", "READY"),
            ("other", ""),
        ]
        asks.load_model("other", config='{"backend": "x"}', files={"file:1/m": b"\x00\xff"})
        loaded = echo.service.loaded["other"]
        assert loaded == {"config": '{"backend": "x"}', "file:1/m": b"\x00\xff"}
        asks.unload_model("other")
        assert not echo.service.loaded
    with channel(echo) as made:
        only_ready = message("RepositoryIndexRequest")(ready=True).SerializeToString()
        data = call(made, "RepositoryIndex", only_ready)
        assert len(message("RepositoryIndexResponse").FromString(data).models) == 1
        for name in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"):
            elsewhere = message(f"{name}Request")(repository_name="elsewhere")
            failed = failure(made, name, elsewhere.SerializeToString())
            assert failed.code() is grpc.StatusCode.UNIMPLEMENTED


def test_what_is_not_there_is_refused_as_by_a_triton_without_it(echo: Served) -> None:
    with triton(echo) as asks:
        for ask in (asks.get_trace_settings, asks.get_log_settings):
            with pytest.raises(InferenceServerException, match="the server does not support"):
                ask()
        asks.unregister_cuda_shared_memory()
        asks.unregister_cuda_shared_memory("name")
        assert not asks.get_cuda_shared_memory_status().regions
        with pytest.raises(InferenceServerException, match="Unable to find cuda"):
            asks.get_cuda_shared_memory_status("name")
    with channel(echo) as made:
        cuda = message("CudaSharedMemoryRegisterRequest")(name="c", byte_size=1)
        failed = failure(made, "CudaSharedMemoryRegister", cuda.SerializeToString())
        assert failed.code() is grpc.StatusCode.UNIMPLEMENTED and "'c'" in failed.details()
        assert failure(made, "Nothing").code() is grpc.StatusCode.UNIMPLEMENTED


# --------------------------------------------------------------------------------------- inference


def test_arrays_come_back(echo: Served) -> None:
    texts = np.array([["one", ""]], dtype=object)
    arrays = {
        "in": (np.arange(8, dtype=np.float32).reshape(2, 4), "FP32"),
        "in2": (np.array([[True, False]]), "BOOL"),
        "in3": (texts, "BYTES"),
        "in4": (np.zeros((1, 0), np.int64), "INT64"),
    }
    with triton(echo) as asks:
        inputs = [a_input(array, name, datatype) for name, (array, datatype) in arrays.items()]
        answer = asks.infer("echo", inputs, request_id="7", timeout=5000, model_version="2")
        response = answer.get_response()
        assert (response.id, response.model_name, response.model_version) == ("7", "echo", "2")
        for name, (array, _) in arrays.items():
            found = answer.as_numpy(name.replace("in", "out"))
            wanted = array.astype(bytes).astype(object) if array.dtype == object else array
            assert found.shape == array.shape and (found == wanted).all(), name
        assert echo.service.asked[-1].slo_ns == 5_000_000
        wanted_outputs = [client.InferRequestedOutput("out2")]
        answer = asks.infer("echo", inputs, outputs=wanted_outputs)
        assert [each.name for each in answer.get_response().outputs] == ["out2"]


def test_the_rpcs_deadline_is_the_slo_where_the_request_has_none(echo: Served) -> None:
    array = a_input(np.zeros((1, 4), np.float32))
    with triton(echo) as asks:
        asks.infer("echo", [array], client_timeout=500.0)
        assert 400e9 < echo.service.asked[-1].slo_ns < 510e9
        asks.infer("echo", [array], client_timeout=500.0, headers={"slosched-slo": "25ms"})
        assert echo.service.asked[-1].slo_ns == 25_000_000
        asks.infer("echo", [array])
        assert echo.service.asked[-1].slo_ns == 0
        with pytest.raises(InferenceServerException, match="slosched-slo") as caught:
            asks.infer("echo", [array], headers={"slosched-slo": "soon"})
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_asyncio_clients() -> None:
    """In the front's own loop: a server and clients of grpc.aio may share one."""

    async def ask(address: str) -> None:
        async with aio_client.InferenceServerClient(address) as asks:
            assert await asks.is_server_live()
            arrays = [np.full((1, 4), number, np.float32) for number in range(20)]
            answers = await asyncio.gather(
                *(asks.infer("echo", [a_input(each)]) for each in arrays)
            )
            assert all((a.as_numpy("out") == b).all() for a, b in zip(answers, arrays, strict=True))

    with serving() as served:
        served.run(ask(served.address))
        with ThreadPoolExecutor(1) as threads:  # and in another loop of the same process
            threads.submit(uvloop.run, ask(served.address)).result(WITHIN_S)


def test_a_refusal_says_what_the_controller_said() -> None:
    refusal = Refusal(code=4, predicted_start_ns=7_000, predicted_exec_ns=9_000, time_left_ns=1_000)
    service = EchoService(
        fails=FrontError(Status.UNAVAILABLE, "Request timeout expired: no", refusal)
    )
    with serving(service) as served, channel(served) as made:
        failed = failure(made, "ModelInfer", a_request())
        assert failed.code() is grpc.StatusCode.UNAVAILABLE
        assert failed.details() == "Request timeout expired: no"
        assert dict(failed.trailing_metadata()) == {
            "slosched-code": "4",
            "slosched-predicted-start-us": "7",
            "slosched-predicted-exec-us": "9",
            "slosched-time-left-us": "1",
        }
        service.fails = FrontError(Status.RESOURCE_EXHAUSTED, "many é\n" * 400, retry_after_s=1.2)
        failed = failure(made, "ModelInfer", a_request())
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert failed.details().startswith("many é\n") and len(failed.details()) == 1027
        assert ("retry-after", "2") in failed.trailing_metadata()


def test_an_answer_that_is_late_says_so(echo: Served) -> None:
    service = EchoService(in_time=False)
    with serving(service) as served, channel(served) as made:
        for in_time in (True, False):
            service.in_time = in_time
            _, ended = made.unary_unary(f"/{SERVICE}/ModelInfer").with_call(
                a_request(), timeout=WITHIN_S
            )
            found = dict(ended.trailing_metadata())
            assert found == ({} if in_time else {"slosched-in-time": "0"})


def test_a_bug_is_an_internal_error_and_the_next_request_is_served() -> None:
    reported: list[dict[str, Any]] = []
    service = EchoService(fails=ZeroDivisionError("oh"))
    with serving(service) as served, channel(served) as made:
        served.do(
            lambda: asyncio.get_running_loop().set_exception_handler(
                lambda _, context: reported.append(context)
            )
        )
        failed = failure(made, "ModelInfer", a_request())
        assert failed.code() is grpc.StatusCode.INTERNAL
        assert failed.details() == "internal error: ZeroDivisionError: oh"
        assert [type(each["exception"]) for each in reported] == [ZeroDivisionError]
        service.fails = None
        assert call(made, "ModelInfer", a_request())


# -------------------------------------------------------------------------------- cancel and drain


def test_a_client_that_leaves_cancels_its_request() -> None:
    service = EchoService(hold=True)
    with serving(service) as served:
        with channel(served) as made:
            future = made.unary_unary(f"/{SERVICE}/ModelInfer").future(a_request("a"))
            served.until(lambda: len(service.begun) == 1)
            future.cancel()
            served.until(lambda: [each.id for each in service.cancelled] == ["a"])
            kept = made.unary_unary(f"/{SERVICE}/ModelInfer").future(a_request("b"))
            served.until(lambda: len(service.begun) == 1)
            assert not kept.done()
        served.until(lambda: [each.id for each in service.cancelled] == ["a", "b"])
        with channel(served) as made:
            while len(service.asked) == 2:  # on a busy machine one may never arrive
                late = made.unary_unary(f"/{SERVICE}/ModelInfer").future(a_request(), timeout=0.2)
                assert late.exception(WITHIN_S).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            served.until(lambda: len(service.cancelled) == len(service.asked))
        assert not service.begun


def test_a_drain_answers_what_runs_and_takes_no_more() -> None:
    service = EchoService(hold=True)
    with serving(service) as served, channel(served) as made:
        future = made.unary_unary(f"/{SERVICE}/ModelInfer").future(a_request())
        served.until(lambda: len(service.begun) == 1)
        with ThreadPoolExecutor(1) as threads:
            drained = threads.submit(served.run, served.front.drain(WITHIN_S))
            served.until(lambda: _refuses(served.front.port))
            served.do(service.release)
            assert InferResponse.FromString(future.result(WITHIN_S)).model_name == "echo"
            drained.result(WITHIN_S)
        served.run(served.front.close())
        served.run(served.front.close())


def test_a_drain_has_a_limit() -> None:
    service = EchoService(hold=True)
    with serving(service) as served, channel(served) as made:
        future = made.unary_unary(f"/{SERVICE}/ModelInfer").future(a_request())
        served.until(lambda: len(service.begun) == 1)
        served.run(served.front.drain(0.05))
        assert future.exception(WITHIN_S).code() in (
            grpc.StatusCode.CANCELLED,
            grpc.StatusCode.UNAVAILABLE,
        )
        served.until(lambda: len(service.cancelled) == 1)


def _refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_that_is_taken_is_said() -> None:
    with serving() as served:
        front = RpcFront(EchoService(), GatewayConfig(grpc_port=served.front.port))
        with pytest.raises(AddressInUse, match=f"gRPC port {served.front.port}"):
            served.run(front.start())
    for bind in ("192.0.2.1", "no.such.host.invalid"):
        front = RpcFront(EchoService(), GatewayConfig(bind=bind, grpc_port=0))
        with pytest.raises(InvalidConfig, match="cannot listen on"):
            asyncio.run(front.start())


def test_it_listens_on_ipv6_and_on_all_addresses() -> None:
    for bind, address in (("::1", "[::1]"), ("*", "127.0.0.1")):
        with (
            serving(bind=bind) as served,
            grpc.insecure_channel(f"{address}:{served.front.port}") as made,
        ):
            assert call(made, "ServerLive", b"")


# -------------------------------------------------------------------------------- tokens and TLS


def test_a_token_is_needed_for_everything_but_health() -> None:
    service = EchoService(needs_token=True, documents=_DOCUMENTS)
    with serving(service) as served, channel(served) as made:
        for method in ("ServerLive", "ServerReady"):
            call(made, method, b"")
        for method in methods():
            if method in ("ServerLive", "ServerReady"):
                continue
            for metadata in ((), (("authorization", "Bearer other"),)):
                failed = failure(made, method, metadata=metadata)
                assert failed.code() is grpc.StatusCode.UNAUTHENTICATED, method
                assert ("www-authenticate", 'Bearer realm="slosched"') in failed.trailing_metadata()
        assert not service.asked
        assert call(made, "ModelInfer", a_request(), metadata=(("authorization", TOKEN),))
        assert call(made, "ServerMetadata", b"", metadata=(("authorization", TOKEN),))


def test_a_client_without_a_token_is_refused_before_its_body_is_read() -> None:
    """The whole of a large request is refused by its size; without a token it is not even looked at."""
    with (
        serving(EchoService(needs_token=True), max_request_bytes=1000) as served,
        channel(served) as made,
    ):
        big = bytes(2**20)
        assert failure(made, "ModelInfer", big).code() is grpc.StatusCode.UNAUTHENTICATED
        failed = failure(made, "ModelInfer", big, metadata=(("authorization", TOKEN),))
        assert failed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    """A certificate for loopback and its key, by openssl."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
    ]
    command += ["-nodes", "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return str(certificate), str(key)


@pytest.mark.processes
def test_tls_and_a_certificate_that_is_renewed(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path, "server")
    other, _ = make_certificate(tmp_path, "other")
    tls = read_tls(certificate, key)
    with serving(tls=tls) as served:
        with triton(served, ssl=True, root_certificates=certificate) as asks:
            assert asks.is_server_live()
            array = np.ones((1, 4), np.float32)
            assert (asks.infer("echo", [a_input(array)]).as_numpy("out") == array).all()
        for wrong in ({"ssl": True, "root_certificates": other}, {}):
            with triton(served, **wrong) as asks, pytest.raises(InferenceServerException):
                asks.is_server_live(client_timeout=5.0)
        certificate, key = make_certificate(tmp_path, "server")
        tls.reload()
        with triton(served, ssl=True, root_certificates=certificate) as asks:
            assert asks.is_server_live()


# --------------------------------------------------------------------------------- shared memory


def test_shared_memory_of_tritonclient(echo: Served) -> None:
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    memory = shared_memory.create_shared_memory_region("r", "/slosched_rpc_test", 2 * array.nbytes)
    try:
        shared_memory.set_shared_memory_region(memory, [array])
        with triton(echo) as asks:
            asks.unregister_system_shared_memory()
            asks.register_system_shared_memory("r", "/slosched_rpc_test", 2 * array.nbytes)
            status = asks.get_system_shared_memory_status(as_json=True)
            assert status["regions"]["r"]["byte_size"] == str(2 * array.nbytes)
            given = client.InferInput("in", [2, 4], "FP32")
            given.set_shared_memory("r", array.nbytes)
            wanted = client.InferRequestedOutput("out")
            wanted.set_shared_memory("r", array.nbytes, offset=array.nbytes)
            answer = asks.infer("echo", [given], outputs=[wanted])
            assert answer.get_output("out").parameters["shared_memory_region"].string_param == "r"
            found = shared_memory.get_contents_as_numpy(memory, np.float32, [4, 4])
            assert (found[2:] == array).all()
            with pytest.raises(InferenceServerException, match="already in manager"):
                asks.register_system_shared_memory("r", "/slosched_rpc_test", 8)
            with pytest.raises(InferenceServerException, match="not the name of a shared memory"):
                asks.register_system_shared_memory("s", "../../etc/passwd", 8)
            asks.unregister_system_shared_memory("r")
            with pytest.raises(
                InferenceServerException, match="Unable to find shared memory region"
            ):
                asks.infer("echo", [given])
    finally:
        shared_memory.destroy_shared_memory_region(memory)


def test_shared_memory_is_for_clients_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    service = EchoService(regions=Regions())
    monkeypatch.setattr(calls, "is_local", lambda peer: False)
    with serving(service) as served, triton(served) as asks:
        for ask in (
            lambda: asks.register_system_shared_memory("r", "/key", 8),
            asks.get_system_shared_memory_status,
        ):
            with pytest.raises(InferenceServerException, match="on the gateway's own host"):
                ask()
        given = client.InferInput("in", [2, 4], "FP32")
        given.set_shared_memory("r", 8)
        with pytest.raises(InferenceServerException, match="on the gateway's own host"):
            asks.infer("echo", [given])
        asks.unregister_system_shared_memory()  # perf_analyzer calls it from everywhere
