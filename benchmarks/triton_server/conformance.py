"""Ask a server of the Open Inference Protocol right and wrong things, and record what it answers.

    .venv/bin/python benchmarks/triton_server/conformance.py --record tests/golden/triton_answers.json

starts a real Triton (triton_process.py) with the models of triton_models.py and writes its answers; they are
committed, and tests/test_gateway_conformance.py compares those of `slosched gateway` with them. `--http PORT
--grpc PORT` asks a server that runs on 127.0.0.1 instead. 306 requests, fifteen seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import http_cases
import rpc_cases
import triton_models
from google.protobuf.json_format import MessageToDict
from raw_http import HttpAnswer, exchange, json_of
from triton_process import DEFAULT_CACHE, VERSION, serving
from tritonclient.grpc import service_pb2, service_pb2_grpc

from slosched import clock
from slosched.errors import SloschedError
from slosched.output_files import write_file
from slosched.units import NS_PER_S

#: Headers of an answer that say what its body is.
_HEADERS = ("content-type", "inference-header-content-length", "content-encoding", "allow")
_WITHIN_S = 15.0
_OCCUPYING = 3
#: How long the model `slow` has been busy when a request comes that shall wait behind it.
_OCCUPIED_NS = round(triton_models.SLOW_S * NS_PER_S / 4)
#: What is another number in each run: times, and counts of what came before.
_NUMBERS = frozenset(
    ("ns", "count", "last_inference", "inference_count", "execution_count", "batch_size")
)

#: What an entry of the repository's index has.
_INDEX = {"name", "version", "state", "reason"}
_WAIT_NS, _MOST_WAITS = NS_PER_S // 20, 100

Answer = dict[str, Any]


def ask(http_port: int, grpc_port: int) -> dict[str, Answer]:
    """All answers of the server on 127.0.0.1, by the case's name; "http: ..." and "grpc: ..."."""
    found: dict[str, Answer] = {}
    for case in http_cases.cases():
        with _occupied(http_port) if case.occupied else contextlib.nullcontext():
            found[f"http: {case.name}"] = http_answer(
                exchange(http_port, case.data, head=case.head)
            )
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        _settled(stub)
        for each in rpc_cases.cases():
            with _occupied(http_port) if each.occupied else contextlib.nullcontext():
                found[f"grpc: {each.name}"] = rpc_answer(stub, each)
    return found


@contextlib.contextmanager
def _occupied(http_port: int) -> Iterator[None]:
    """The model `slow` runs for others. Triton keeps requests ready behind the one that runs, and these do not
    expire."""
    with contextlib.ExitStack() as connections:
        others = [
            connections.enter_context(
                socket.create_connection(("127.0.0.1", http_port), timeout=_WITHIN_S)
            )
            for _ in range(_OCCUPYING)
        ]
        for each in others:
            each.sendall(http_cases.slow())
        clock.sleep_ns(_OCCUPIED_NS)
        yield
        for each in others:
            each.recv(1 << 16)


def http_answer(answer: HttpAnswer) -> Answer:
    """What of an answer by HTTP is compared."""
    headers = {name: answer.headers[name] for name in _HEADERS if name in answer.headers}
    found: Answer = {"status": answer.status, "headers": headers}
    body = answer.body
    if headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
        headers.pop("inference-header-content-length", None)
    size = int(headers.get("inference-header-content-length", len(body)))
    document = json_of(body[:size])
    if isinstance(document, dict) and set(document) == {"error"}:
        return {"status": answer.status, "error": document["error"]}
    if not body:
        return {"status": answer.status, "text": ""}
    if document is None:
        return found | {"text": body.decode("latin-1")}
    if size < len(body):
        found["tail"] = body[size:].hex()
    return found | {"json": _steady(document)}


def rpc_answer(stub: Any, case: rpc_cases.RpcCase) -> Answer:
    """Ask by gRPC; what of the answer is compared."""
    call = getattr(stub, case.method)
    try:
        if case.stream:
            answers = [_document(each) for each in call(iter(case.requests), timeout=_WITHIN_S)]
            return {"status": "OK", "json": answers}
        return {"status": "OK", "json": _document(call(case.requests[0], timeout=_WITHIN_S))}
    except grpc.RpcError as error:
        return {"status": error.code().name, "error": error.details()}


def _document(message: Any) -> Any:
    return _steady(MessageToDict(message, preserving_proto_field_name=True))


def _steady(document: Any) -> Any:
    """The document without what differs from one run to the next."""
    if isinstance(document, dict):
        return {
            key: "-" if key in _NUMBERS and isinstance(value, int | str) else _steady(value)
            for key, value in document.items()
        }
    if isinstance(document, list):
        return [_steady(each) for each in document if not _is_other_model(each)]
    return document


def _is_other_model(entry: Any) -> bool:
    """An entry of an index for a model that is not asked about: slosched's worker offers its zoo, too."""
    if not isinstance(entry, dict) or not {"name"} <= entry.keys() <= _INDEX:
        return False
    return entry["name"] not in {each.name for each in triton_models.MODELS}


def _settled(stub: Any) -> None:
    """Wait until no model is being unloaded any more."""
    for _ in range(_MOST_WAITS):
        models = stub.RepositoryIndex(
            service_pb2.RepositoryIndexRequest(), timeout=_WITHIN_S
        ).models
        if not any(each.state == "UNLOADING" for each in models):
            return
        clock.sleep_ns(_WAIT_NS)


def is_ready(http_port: int, name: str) -> bool:
    """Whether the server says that the model is ready."""
    path = f"/v2/models/{name}/ready"
    try:
        return exchange(http_port, http_cases.get(path)).status == 200
    except OSError:
        return False


def differences(ours: Mapping[str, Answer], theirs: Mapping[str, Answer]) -> dict[str, Answer]:
    """The cases whose answers differ: what each of the two said, without what is equal."""
    found = {}
    for name, their in theirs.items():
        our = ours.get(name, {})
        keys = [key for key in (*their, *our) if _text(their.get(key)) != _text(our.get(key))]
        if keys:
            found[name] = {
                "triton": {key: their[key] for key in their if key in keys},
                "slosched": {key: our[key] for key in our if key in keys},
            }
    return found


def _text(value: Any) -> str:
    """The value as JSON, in which one NaN equals another."""
    return json.dumps(value, sort_keys=True)


def read_golden(path: Path) -> dict[str, Answer]:
    document = json.loads(path.read_text(encoding="utf-8"))
    answers: dict[str, Answer] = document["answers"]
    return answers


def record(cache: Path) -> dict[str, Answer]:
    """What a real Triton answers."""
    arguments = [
        "--model-control-mode=explicit",
        *(f"--load-model={m}" for m in triton_models.LOADED),
    ]
    with (
        tempfile.TemporaryDirectory(prefix="slosched-triton-") as folder,
        serving(Path(folder), triton_models.MODELS, cache=cache, arguments=arguments) as triton,
    ):
        found = ask(triton.http_port, triton.grpc_port)
        triton.check()
        return found


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="What a server of the protocol answers.")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="folder of triton_process.py"
    )
    parser.add_argument("--record", type=Path, help="write Triton's answers to this file")
    parser.add_argument("--http", type=int, help="ask a server on this port of 127.0.0.1")
    parser.add_argument("--grpc", type=int, help="and on this one")
    parser.add_argument("--golden", type=Path, help="compare with these answers of Triton's")
    options = parser.parse_args(given)
    if (options.http is None) != (options.grpc is None):
        parser.error("--http and --grpc go together: give both, or neither")
    try:
        if options.http is not None:
            found = ask(options.http, options.grpc)
        else:
            found = record(options.cache)
    except SloschedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"no answer from the server: {error}", file=sys.stderr)
        return 1
    if options.record:
        document = {"triton": VERSION, "answers": found}
        write_file(options.record, f"{json.dumps(document, indent=1, sort_keys=True)}\n".encode())
    if options.golden:
        other = differences(found, read_golden(options.golden))
        print(json.dumps(other, indent=1))
        print(f"{len(other)} of {len(found)} answers differ", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
