"""What the gateway costs: CPU and latency by HTTP, gRPC and shared memory, beside the native client.

    .venv/bin/python benchmarks/gateway_cost.py            # 5 minutes on quiet cores; writes gateway.md
    .venv/bin/python benchmarks/gateway_cost.py --quick    # does it work? half a minute; writes nothing

A worker on the CPU serves two models that sum up inputs of 1 kB and of 602 kB. An open-loop client sends 300/s
by each way in turn, and compares each answer with the native client's. A run that the machine disturbed is
repeated once (stall_meter.py). Every process that is started is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "triton_server"))

import gateway_page  # noqa: E402
import sums_model  # noqa: E402
from oip_client import (  # noqa: E402
    ANSWERED,
    FAILED,
    REFUSED,
    Done,
    HttpTarget,
    NativeTarget,
    Target,
    infer_message,
    offer,
    poisson,
    quantile,
)
from raw_http import exchange, message  # noqa: E402
from serving_core import commit, machine_line  # noqa: E402
from stall_meter import BOUNDS, StallMeter  # noqa: E402
from tritonclient.grpc import service_pb2, service_pb2_grpc  # noqa: E402

from slosched.clients.aio import AsyncClient, connect  # noqa: E402
from slosched.clients.inference import Model  # noqa: E402
from slosched.clock import monotonic_ns, now_ns  # noqa: E402
from slosched.errors import SloschedError  # noqa: E402
from slosched.experiment.children import Child, Children, ended_by_signals  # noqa: E402
from slosched.output_files import write_file  # noqa: E402
from slosched.telemetry.manifest import describe_host  # noqa: E402
from slosched.units import NS_PER_S  # noqa: E402
from slosched.version import __version__  # noqa: E402

RESULTS = HERE / "results" / "gateway.json"
PAGE = HERE / "gateway.md"
RATE = 300
SLO_NS = NS_PER_S  # nothing is refused
#: Elements of the inputs, by model: 1 kB and 602 kB.
SIZES = {"small": 256, "large": 3 * 224 * 224}
WAYS = ("native", "http", "grpc", "http, shared memory", "grpc, shared memory")
_INPUTS, _SLOTS = 8, 256
_OUTPUT_BYTES = 4 * sums_model.SUMS
_READY_S = 30.0
_SETTLE_S = 0.5
_GRPC_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

Record = dict[str, Any]


class WrongAnswer(SloschedError):
    """An answer was not that of the native client."""


@dataclass
class Served:
    """What runs, and what is sent: inputs by model, and the answers that the native client got for them."""

    children: dict[str, Child]
    http_port: int
    grpc_port: int
    client: AsyncClient
    models: dict[str, Model]
    inputs: dict[str, list[bytes]]
    expected: dict[str, list[bytes]]
    regions: dict[str, mmap]

    def processes(self, way: str) -> dict[str, list[int]]:
        """Ids of the processes that a request passes, by part; those of the models are the worker's."""
        wanted = [name for name in self.children if way != "native" or name != "gateway"]
        found = {name: family(self.children[name].process.pid) for name in wanted}
        return found | {"client": [os.getpid()]}


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for each in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in each.read_text().split():
                found += family(int(child))
    return found


# -------------------------------------------------------------------------------------- starting


@contextlib.contextmanager
def started(directory: Path) -> Iterator[tuple[Children, dict[str, Child], str]]:
    """A worker on the CPU, a controller and a gateway; the controller's address."""
    shutil.copy(Path(sums_model.__file__), directory / "sums_model.py")
    config = "".join(
        f'[models.{name}]\nfactory = "sums_model:Sums"\ninput_shape = [{size}]\n'
        for name, size in SIZES.items()
    )
    write_file(directory / "worker.toml", config.encode())
    loopback = ["--bind", "127.0.0.1", "--port", "0"]
    with Children() as children:
        words = ["worker", "--device", "cpu", "--config", str(directory / "worker.toml")]
        worker = children.start("worker", [*words, *loopback], directory / "worker.log")
        port = children.wait_ready(worker, within_s=_READY_S)
        words = ["controller", "INFER5", "--workers", f"127.0.0.1:{port}", *loopback]
        words += ["--http-port", "-1", "--log-dir", str(directory / "controller")]
        controller = children.start("controller", words, directory / "controller.log")
        address = f"127.0.0.1:{children.wait_ready(controller, within_s=_READY_S)}"
        words = ["gateway", "--controller", address, "--http-port", "0", "--grpc-port", "0"]
        words += ["--load", ",".join(SIZES)]
        gateway = children.start("gateway", words, directory / "gateway.log")
        children.wait_ready(gateway, within_s=_READY_S)
        yield children, {"gateway": gateway, "controller": controller, "worker": worker}, address


def ports(gateway: Child) -> tuple[int, int]:
    """Those for HTTP and gRPC, from the gateway's ready line."""
    http = re.search(r"ready on \S*:(\d+)", gateway.text())
    rpc = re.search(r"gRPC on \S*:(\d+)", gateway.text())
    assert http is not None and rpc is not None  # it was waited for
    return int(http[1]), int(rpc[1])


@contextlib.contextmanager
def shared_memory(http_port: int, inputs: dict[str, list[bytes]]) -> Iterator[dict[str, mmap]]:
    """A region for each model's inputs and one for outputs, registered at the gateway."""
    sizes = {f"{model}_in": sum(map(len, each)) for model, each in inputs.items()}
    sizes["out"] = _SLOTS * _OUTPUT_BYTES
    with contextlib.ExitStack() as ending:
        found = {}
        for name, size in sizes.items():
            key = f"slosched_cost_{os.getpid()}_{name}"
            path = Path("/dev/shm") / key
            with path.open("x+b") as file:
                ending.callback(path.unlink)
                file.truncate(size)
                found[name] = mmap(file.fileno(), size)
            wanted = json.dumps({"key": f"/{key}", "offset": 0, "byte_size": size}).encode()
            place = f"/v2/systemsharedmemory/region/{name}/register"
            answer = exchange(http_port, message("POST", place, wanted))
            if answer.status != 200:
                raise WrongAnswer(f"the region {name} was not registered: {answer.body!r}")
        for model, each in inputs.items():
            found[f"{model}_in"][:] = b"".join(each)
        yield found
        exchange(http_port, message("POST", "/v2/systemsharedmemory/unregister"))


# ---------------------------------- the protocols


def http_messages(served: Served, model: str) -> list[bytes]:
    shape = (1, SIZES[model])
    return [infer_message(model, each, shape, SLO_NS // 1000) for each in served.inputs[model]]


def http_shared(model: str) -> list[bytes]:
    """Requests whose inputs and outputs are in shared memory: one for each slot of the outputs."""
    size = 4 * SIZES[model]
    found = []
    for slot in range(_SLOTS):
        where = _where(f"{model}_in", size * (slot % _INPUTS), size)
        tensor = {"name": "input", "datatype": "FP32", "shape": [1, SIZES[model]]}
        output = _where("out", _OUTPUT_BYTES * slot, _OUTPUT_BYTES)
        document = {
            "parameters": {"timeout": SLO_NS // 1000},
            "inputs": [tensor | {"parameters": where}],
            "outputs": [{"name": "output", "parameters": output}],
        }
        path = f"/v2/models/{model}/infer"
        found.append(message("POST", path, json.dumps(document).encode()))
    return found


def _where(region: str, offset: int, size: int) -> Record:
    return {
        "shared_memory_region": region,
        "shared_memory_offset": offset,
        "shared_memory_byte_size": size,
    }


def rpc_messages(served: Served, model: str, *, shared: bool) -> list[Any]:
    found = []
    for slot in range(_SLOTS if shared else _INPUTS):
        request = service_pb2.ModelInferRequest(model_name=model)
        request.parameters["timeout"].int64_param = SLO_NS // 1000
        tensor = request.InferInputTensor(name="input", datatype="FP32", shape=(1, SIZES[model]))
        if shared:
            size = 4 * SIZES[model]
            _put(tensor, _where(f"{model}_in", size * (slot % _INPUTS), size))
            output = request.InferRequestedOutputTensor(name="output")
            _put(output, _where("out", _OUTPUT_BYTES * slot, _OUTPUT_BYTES))
            request.outputs.append(output)
        else:
            request.raw_input_contents.append(served.inputs[model][slot])
        request.inputs.append(tensor)
        found.append(request)
    return found


def _put(tensor: Any, where: Record) -> None:
    for name, value in where.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(tensor.parameters[name], kind, value)


class RpcTarget:
    """Sends these requests in turn by ModelInfer; `heard` gets each answer."""

    def __init__(
        self, stub: Any, requests: Sequence[Any], heard: Callable[[int, Any], None]
    ) -> None:
        self._stub, self._requests, self._heard = stub, requests, heard
        self._running: set[asyncio.Task[None]] = set()

    def send(self, number: int, done: Done) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(number, done))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _ask(self, number: int, done: Done) -> None:
        try:
            answer = await self._stub.ModelInfer(self._requests[number % len(self._requests)])
        except grpc.aio.AioRpcError as error:
            refused = error.code() == grpc.StatusCode.UNAVAILABLE
            done(number, REFUSED if refused else FAILED)
            return
        done(number, ANSWERED)
        self._heard(number, answer)


class Checker:
    """Compares answers with the native client's."""

    def __init__(self, served: Served, model: str) -> None:
        self._expected = served.expected[model]
        self._outputs = served.regions["out"]
        self.compared = 0
        self.wrong = 0

    def native(self, number: int, output: bytes) -> None:
        self._compare(number, output)

    def http(self, number: int, body: bytes) -> None:
        self._compare(number, body[-_OUTPUT_BYTES:])

    def rpc(self, number: int, answer: Any) -> None:
        self._compare(number, answer.raw_output_contents[0])

    def shared(self, number: int, answer: Any) -> None:
        start = _OUTPUT_BYTES * (number % _SLOTS)
        self._compare(number, self._outputs[start : start + _OUTPUT_BYTES])

    def _compare(self, number: int, output: bytes) -> None:
        self.compared += 1
        self.wrong += output != self._expected[number % _INPUTS]


# ------------------------------------------------------------------------------------- measuring


@contextlib.asynccontextmanager
async def target_of(served: Served, way: str, model: str, checker: Checker) -> Any:
    """What sends requests for `model` this way."""
    if way == "native":
        yield NativeTarget(
            served.client,
            served.models[model],
            SLO_NS,
            *served.inputs[model],
            heard=checker.native,
        )
    elif way.startswith("http"):
        shared = "shared" in way
        messages = http_shared(model) if shared else http_messages(served, model)
        heard = checker.shared if shared else checker.http
        async with HttpTarget(served.http_port, *messages, heard=heard) as target:
            yield target
    else:
        shared = "shared" in way
        address = f"127.0.0.1:{served.grpc_port}"
        async with grpc.aio.insecure_channel(address, options=_GRPC_OPTIONS) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            heard_rpc = checker.shared if shared else checker.rpc
            yield RpcTarget(stub, rpc_messages(served, model, shared=shared), heard_rpc)


async def run(
    served: Served, meter: StallMeter, way: str, model: str, seconds: float, seed: int
) -> Record:
    """One run. Raises WrongAnswer."""
    arrivals = poisson(RATE, _SETTLE_S + seconds, seed)
    first = sum(each < _SETTLE_S * NS_PER_S for each in arrivals)
    checker = Checker(served, model)
    async with target_of(served, way, model, checker) as target:
        start_ns = now_ns()
        given: Target = target
        offered = await offer(given, arrivals, SLO_NS)
        end_ns = now_ns()
    if checker.wrong:
        raise WrongAnswer(f"{checker.wrong} of {checker.compared} answers by {way} are wrong")
    found = offered.behind(first)
    readings = meter.readings(past_ns=end_ns)
    cpu = {
        part: sum(readings.cpu_s(pid, start_ns, end_ns) for pid in pids)
        for part, pids in served.processes(way).items()
    }
    return {
        "way": way,
        "model": model,
        "sent": offered.sent,
        "answered": offered.count(ANSWERED),
        "compared": checker.compared,
        "p50_ns": found.latency(0.5),
        "p99_ns": found.latency(0.99),
        "issue_delay_p99_ns": quantile(found.issue_delay_ns, 0.99),
        "cpu_us": {part: seconds_ / offered.sent * 1e6 for part, seconds_ in cpu.items()},
        "void": list(readings.disturbance(start_ns, end_ns).reasons(BOUNDS)),
    }


async def served_by(
    children: dict[str, Child], client: AsyncClient, regions: dict[str, mmap], inputs: Any
) -> Served:
    """Load the models, and ask the native client for the answers. Raises WrongAnswer if one is wrong."""
    http, rpc = ports(children["gateway"])
    models: dict[str, Model] = {}
    expected: dict[str, list[bytes]] = {}
    for name, size in SIZES.items():
        [models[name]] = await client.load(name)
        expected[name] = []
        for each in inputs[name]:
            array = np.frombuffer(each, np.float32)
            answer = await client.infer(models[name], array, slo="10s")
            output = answer.outputs["output"]
            truth = array.reshape(sums_model.SUMS, size // sums_model.SUMS).sum(1)
            if not np.array_equal(output, truth):
                raise WrongAnswer(f"the native client's answer for {name} is not the sums")
            expected[name].append(output.tobytes())
    return Served(
        children=children,
        http_port=http,
        grpc_port=rpc,
        client=client,
        models=models,
        inputs=inputs,
        expected=expected,
        regions=regions,
    )


async def measure(options: argparse.Namespace, directory: Path) -> list[Record]:
    draw = np.random.default_rng(7)
    inputs = {
        name: [draw.integers(0, 256, size).astype(np.float32).tobytes() for _ in range(_INPUTS)]
        for name, size in SIZES.items()
    }
    rounds, seconds = (1, 0.5) if options.quick else (options.rounds, options.seconds)
    found = []
    with started(directory) as (children, parts, address), StallMeter(directory) as meter:
        http, _ = ports(parts["gateway"])
        with shared_memory(http, inputs) as regions:
            async with connect(address, name="gateway-cost") as client:
                served = await served_by(parts, client, regions, inputs)
                for number in range(rounds):
                    for model in SIZES:
                        # Each round begins with another way, so that none always follows the same one.
                        turn = number % len(WAYS)
                        for way in WAYS[turn:] + WAYS[:turn]:
                            say(f"round {number + 1} of {rounds}: {model}, {way}")
                            found.append(
                                await _undisturbed(served, meter, way, model, seconds, number)
                            )
                            children.check()
    return found


async def _undisturbed(
    served: Served, meter: StallMeter, way: str, model: str, seconds: float, number: int
) -> Record:
    voids = []
    for _ in range(2):
        record = await run(served, meter, way, model, seconds, number)
        voids.append(record["void"])
        if not record["void"]:
            break
    return record | {"voids": voids, "round": number}


_begun_ns = monotonic_ns()


def say(text: str) -> None:
    """One line about what comes next, with the seconds since the begin."""
    print(f"{(monotonic_ns() - _begun_ns) / NS_PER_S:5.0f} s: {text}", file=sys.stderr, flush=True)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="What the gateway costs.")
    parser.add_argument("--out", type=Path, help="file of results (default: the committed ones)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a run")
    parser.add_argument("--quick", action="store_true", help="does it work? writes only with --out")
    options = parser.parse_args(given)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be 1 or more, and --seconds more than 0")
    try:
        with (
            ended_by_signals(),
            tempfile.TemporaryDirectory(prefix="slosched-cost-") as folder,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runs = runner.run(measure(options, Path(folder)))
    except SloschedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    document = {
        "format": gateway_page.FORMAT,
        "slosched": __version__,
        "commit": commit(),
        "machine": machine_line(describe_host()),
        "rate": RATE,
        "seconds": (monotonic_ns() - _begun_ns) / NS_PER_S,
        "runs": runs,
    }
    print(gateway_page.tables(document))
    if options.out or not options.quick:
        write_file(options.out or RESULTS, f"{json.dumps(document, indent=1)}\n".encode())
    if not options.quick and not options.out:
        write_file(PAGE, gateway_page.page(document, PAGE).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
