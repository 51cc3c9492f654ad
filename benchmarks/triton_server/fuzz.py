"""Ask a real Triton and slosched's gateway the same random things, and class the answers that differ.

    .venv/bin/python benchmarks/triton_server/fuzz.py --seed 1 --requests 2000 --directory NEW_FOLDER

starts both with the models of triton_models.py (triton_process.py fetches Triton), sends each request to both,
and prints the classes of differences, most frequent first: statuses and texts without their names and numbers,
how often, and the first request of each. A request is drawn from the seed and its number alone: `--only NUMBER`
repeats one and shows it. Where Triton crashes it is started again. Differences that have a reason are in
tests/golden/gateway_differences.toml.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fuzz_http
import fuzz_rpc
import grpc
import torch_models
import triton_models
from conformance import Answer, differences, http_answer, is_ready, rpc_answer
from fuzz_values import REGION, REGION_BYTES, REGION_KEY
from http_cases import HttpCase, post
from raw_http import HttpAnswer, exchange
from rpc_cases import RpcCase
from triton_process import DEFAULT_CACHE, Triton, TritonFailed, serving
from tritonclient.grpc import service_pb2_grpc

from slosched import clock
from slosched.errors import SloschedError
from slosched.experiment.children import Children
from slosched.units import NS_PER_S

_READY_S, _WAIT_NS, _MOST_WAITS = 60.0, NS_PER_S // 20, 600
_GRPC = re.compile(r"gRPC on \S*:(\d+)")
_LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
_SHOWN = 400
CRASH = "crash"
#: What the region holds: small numbers, with which each way of computing is exact.
_CONTENT = struct.pack(f"<{REGION_BYTES // 4}i", *range(REGION_BYTES // 4))
Case = HttpCase | RpcCase


def drawn(seed: int, number: int) -> Case:
    """Request `number` of a seed."""
    draw = random.Random(f"{seed} {number}")
    return fuzz_rpc.case(number, draw) if draw.random() < 0.4 else fuzz_http.case(number, draw)


def _memory() -> Path:
    """The file of the region."""
    return Path("/dev/shm") / REGION_KEY.removeprefix("/")


class Server:
    """One of the two, on 127.0.0.1, with the region of fuzz_values.py."""

    def __init__(self, http_port: int, grpc_port: int) -> None:
        self.http_port, self.grpc_port = http_port, grpc_port
        self._channel = grpc.insecure_channel(f"127.0.0.1:{grpc_port}")
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        for _ in range(_MOST_WAITS):
            if all(is_ready(http_port, name) for name in triton_models.LOADED):
                break
            clock.sleep_ns(_WAIT_NS)
        self.begin()

    def begin(self) -> None:
        """Have the one region, and the model `spare` not loaded."""
        memory = "/v2/systemsharedmemory"
        wanted = {"key": REGION_KEY, "offset": 0, "byte_size": REGION_BYTES}
        _memory().write_bytes(_CONTENT)
        exchange(self.http_port, post(f"{memory}/unregister"))
        exchange(self.http_port, post(f"{memory}/region/{REGION}/register", wanted))
        exchange(self.http_port, post("/v2/repository/models/spare/unload", {}))

    def ask(self, case: Case) -> Answer:
        """Its answer, with what it wrote to the region."""
        memory = _memory()
        memory.write_bytes(_CONTENT)
        try:
            if isinstance(case, HttpCase):
                found = http_answer(exchange(self.http_port, case.data, head=case.head))
            else:
                found = rpc_answer(self._stub, case)
        except OSError as error:
            found = http_answer(HttpAnswer(0)) | {"error": type(error).__name__}
        after = memory.read_bytes()
        return found if after == _CONTENT else found | {"memory": after.hex()}

    def close(self) -> None:
        self._channel.close()


# --------------------------------------------------------------------------------- both servers


@contextlib.contextmanager
def gateway(directory: Path) -> Iterator[Server]:
    """Slosched's worker, controller and gateway, with the models of torch_models.py on the CPU."""
    directory.mkdir(parents=True)
    shutil.copy(Path(torch_models.__file__), directory / "torch_models.py")
    (directory / "worker.toml").write_text(torch_models.WORKER, encoding="utf-8")
    with Children() as children:
        words = ["worker", "--device", "cpu", "--config", str(directory / "worker.toml")]
        run = children.start("worker", [*words, *_LOOPBACK], directory / "worker.log")
        port = children.wait_ready(run, within_s=_READY_S)
        words = ["controller", "INFER5", "--workers", f"127.0.0.1:{port}", *_LOOPBACK]
        words += ["--http-port", "-1", "--log-dir", str(directory / "run")]
        words += ["--default-slo", "20s"]
        decides = children.start("controller", words, directory / "controller.log")
        port = children.wait_ready(decides, within_s=_READY_S)
        words = ["gateway", "--controller", f"127.0.0.1:{port}", "--bind", "127.0.0.1"]
        words += ["--http-port", "0", "--grpc-port", "0", "--model-control", "explicit"]
        words += ["--load", ",".join(triton_models.LOADED)]
        serves = children.start("gateway", words, directory / "gateway.log")
        http_port = children.wait_ready(serves, within_s=_READY_S)
        ports = _GRPC.search(serves.text())
        assert ports is not None, serves.text()
        with contextlib.closing(Server(http_port, int(ports[1]))) as server:
            yield server
        children.check()


class Tritons:
    """A Triton that is started again where it crashed. Use it as a context."""

    def __init__(self, directory: Path, cache: Path) -> None:
        self._directory, self._cache = directory, cache
        self._stack = contextlib.ExitStack()
        self._running: tuple[Triton, Server] | None = None
        self._starts = 0

    def __enter__(self) -> Tritons:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self._stack.close()
        self._starts += 1
        loads = [f"--load-model={name}" for name in triton_models.LOADED]
        folder = self._directory / f"triton-{self._starts}"
        folder.mkdir(parents=True)
        triton = self._stack.enter_context(
            serving(
                folder,
                triton_models.MODELS,
                cache=self._cache,
                arguments=["--model-control-mode=explicit", *loads],
            )
        )
        server = Server(triton.http_port, triton.grpc_port)
        self._stack.callback(server.close)
        self._running = triton, server

    def ask(self, case: Case) -> Answer:
        """Its answer; one whose status is CRASH where it ended."""
        assert self._running is not None
        triton, server = self._running
        found = server.ask(case)
        if found["status"] in (0, "UNAVAILABLE"):
            clock.sleep_ns(_WAIT_NS)
            try:
                triton.check()
            except TritonFailed:
                self._start()
                return {"status": CRASH}
        return found


# ------------------------------------------------------------------------------------- classing


@dataclass
class Found:
    """Differences by class, with the first case of each."""

    asked: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, Any]] = field(default_factory=dict)

    def add(self, case: Case, theirs: Answer, ours: Answer) -> None:
        self.asked += 1
        kind = "http" if isinstance(case, HttpCase) else "grpc"
        differ = differences({case.name: ours}, {case.name: theirs})
        if not differ:
            return
        name = f"{kind} {theirs['status']} -> {ours['status']}: "
        if "error" in theirs or "error" in ours:
            malformed = theirs["status"] == 500 and ours["status"] == 400
            name += _gist(theirs) if malformed else f"{_gist(theirs)} -> {_gist(ours)}"
        else:
            name += _place(theirs, ours)
        self.classes[name] += 1
        self.first.setdefault(name, (case.name, differ[case.name]))


def _gist(answer: Answer) -> str:
    """The answer without names and numbers."""
    text = answer.get("error")
    if text is None:
        return "+".join(key for key in answer if key != "status")
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'-'", str(text))
    text = re.sub(r"\[[^]]*\]", "[-]", re.sub(r"-?\d[\d,.e+]*", "9", text))
    return text.removeprefix("[-] ")[:90]


def _place(theirs: Any, ours: Any) -> str:
    """Where two answers differ first, such as .json.outputs[].shape."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in dict.fromkeys((*theirs, *ours)):
            if theirs.get(key) != ours.get(key):
                return f".{key}{_place(theirs.get(key), ours.get(key))}"
    if isinstance(theirs, list) and isinstance(ours, list):
        for left, right in zip(theirs, ours, strict=False):
            if left != right:
                return f"[]{_place(left, right)}"
    return ""


def report(found: Found) -> str:
    lines = [f"{found.asked} requests, {found.classes.total()} answers differ, in:"]
    for name, count in sorted(found.classes.items(), key=lambda each: (each[0][:30], -each[1])):
        first, differ = found.first[name]
        lines += [f"{count:5}  {name}", f"       {first}"]
        for server, answer in differ.items():
            lines.append(f"       {server}: {json.dumps(answer)[:_SHOWN]}")
    return "\n".join(lines)


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Random requests to Triton and to slosched.")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="of triton_process.py")
    parser.add_argument("--directory", type=Path, required=True, help="for this run, a new one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--only", type=int, help="the number of one request, which is shown")
    options = parser.parse_args(given)
    numbers = range(options.requests) if options.only is None else [options.only]
    found = Found()
    try:
        with (
            gateway(options.directory / "slosched") as ours,
            Tritons(options.directory, options.cache) as triton,
        ):
            for number in numbers:
                case = drawn(options.seed, number)
                if options.only is not None:
                    print(case)
                theirs = triton.ask(case)
                found.add(case, theirs, ours.ask(case))
                if theirs["status"] == CRASH:
                    ours.begin()  # as the next Triton does
    except SloschedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        _memory().unlink(missing_ok=True)
    print(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
