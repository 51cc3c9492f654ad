"""What is asked over HTTP in conformance.py: right and wrong requests, each as bytes."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raw_http import Headers, message
from triton_models import TYPES

Json = dict[str, Any]
_LENGTH = "Inference-Header-Content-Length"
PAIR = "/v2/models/pair/infer"


@dataclass(frozen=True)
class HttpCase:
    """One request. `occupied`: the model `slow` is busy when it comes."""

    name: str
    data: bytes
    head: bool = False
    occupied: bool = False


def tensor(name: str, datatype: str, shape: list[Any], **more: Any) -> Json:
    return {"name": name, "datatype": datatype, "shape": shape} | more


LEFT = tensor("left", "FP32", [1, 4], data=[1, 2.5, -3, 4])
RIGHT = tensor("right", "INT32", [1, 4], data=[1, 2, 3, 4])


def left(**changed: Any) -> Json:
    return {k: v for k, v in (LEFT | changed).items() if v is not None}


def right(**changed: Any) -> Json:
    return {k: v for k, v in (RIGHT | changed).items() if v is not None}


def infer(
    *inputs: Any,
    path: str = PAIR,
    tail: bytes = b"",
    headers: Headers = (),
    header_length: str | None = None,
    **document: Any,
) -> bytes:
    """An inference; with `tail` binary data follow the JSON, and a header tells where they begin."""
    text = json.dumps({"inputs": list(inputs)} | document).encode()
    more = [("Content-Type", "application/octet-stream" if tail else "application/json")]
    if tail or header_length is not None:
        more.append((_LENGTH, str(len(text)) if header_length is None else header_length))
    return message("POST", path, text + tail, [*more, *headers])


def binary(size: int) -> Json:
    return {"binary_data_size": size}


FLOATS = struct.pack("<4f", 1, 2.5, -3, 4)
INTS = struct.pack("<4i", 1, 2, 3, 4)
B_LEFT = left(data=None, parameters=binary(16))
B_RIGHT = right(data=None, parameters=binary(16))


#: struct's letters of datatypes.
LETTERS = {
    "BOOL": "?",
    "UINT8": "B",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}


def packed(datatype: str, values: Sequence[Any]) -> bytes:
    """Elements' bytes as the protocol has them."""
    if datatype == "BYTES":
        return texts(*(each.encode() for each in values))
    return struct.pack(f"<{len(values)}{LETTERS[datatype]}", *values)


def texts(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + each for each in values)


def b_texts(data: bytes) -> bytes:
    return infer(
        tensor("texts", "BYTES", [1, 2], parameters=binary(len(data))),
        path="/v2/models/shout/infer",
        tail=data,
    )


def slow(**parameters: Any) -> bytes:
    return infer(
        tensor("input", "FP32", [1, 1], data=[1]),
        path="/v2/models/slow/infer",
        parameters=parameters,
    )


def get(path: str) -> bytes:
    return message("GET", path)


def post(path: str, document: Any = None, raw: bytes = b"") -> bytes:
    body = raw if document is None else json.dumps(document).encode()
    return message("POST", path, body, [("Content-Type", "application/json")])


def cases() -> Iterator[HttpCase]:
    """All, in the order in which they are asked."""
    for name, data in (*_server(), *_models(), *_good(), *_inputs(), *_values(), *_outputs()):
        yield HttpCase(name, data)
    for name, data in (*_bodies(), *_texts(), *_memory(), *_found()):
        yield HttpCase(name, data)
    yield HttpCase("head: live", message("HEAD", "/v2/health/live"), head=True)
    yield HttpCase("timeout: long enough", slow(timeout=5_000_000))
    yield HttpCase("timeout: expired in the queue", slow(timeout=1000), occupied=True)
    yield HttpCase("timeout: a string", slow(timeout="1000"))
    yield HttpCase("timeout: negative", slow(timeout=-1))
    yield HttpCase("timeout: a fraction", slow(timeout=1.5))
    for name, data in _repository():
        yield HttpCase(name, data)


def _server() -> Iterator[tuple[str, bytes]]:
    yield "live", get("/v2/health/live")
    yield "ready", get("/v2/health/ready")
    yield "server metadata", get("/v2")
    yield "server metadata, slash", get("/v2/")
    yield "root", get("/")
    yield "unknown path", get("/v2/nonsense")
    yield "unknown health", get("/v2/health/well")
    yield "live by POST", post("/v2/health/live")
    yield "infer by GET", get(PAIR)
    yield "index by GET", get("/v2/repository/index")


def _models() -> Iterator[tuple[str, bytes]]:
    for what in ("", "/ready", "/config", "/stats"):
        word = what.strip("/") or "metadata"
        yield f"{word}: pair", get(f"/v2/models/pair{what}")
        yield f"{word}: version 1", get(f"/v2/models/pair/versions/1{what}")
        yield f"{word}: version 2", get(f"/v2/models/pair/versions/2{what}")
        yield f"{word}: version 'one'", get(f"/v2/models/pair/versions/one{what}")
        yield f"{word}: unknown model", get(f"/v2/models/nope{what}")
        yield f"{word}: not loaded", get(f"/v2/models/spare{what}")
    yield "statistics: all", get("/v2/models/stats")
    yield "metadata: name in per cents", get("/v2/models/%70air")
    yield "metadata: odd name", get("/v2/models/a%20b%2Fc")


def _good() -> Iterator[tuple[str, bytes]]:
    yield "infer: JSON", infer(LEFT, RIGHT)
    yield "infer: JSON, version", infer(LEFT, RIGHT, path="/v2/models/pair/versions/1/infer")
    yield "infer: id", infer(LEFT, RIGHT, id="a id")
    yield "infer: id is a number", infer(LEFT, RIGHT, id=7)
    yield "infer: inputs in another order", infer(RIGHT, LEFT)
    yield (
        "infer: batch of 2",
        infer(
            left(shape=[2, 4], data=list(range(8))), right(shape=[2, 4], data=[[1, 2, 3, 4]] * 2)
        ),
    )
    yield "infer: nested data", infer(left(data=[[1, 2, 3, 4]]), RIGHT)
    yield "infer: binary", infer(B_LEFT, B_RIGHT, tail=FLOATS + INTS)
    yield "infer: binary and JSON", infer(B_LEFT, RIGHT, tail=FLOATS)
    yield "infer: raw binary, header length 0", infer(tail=FLOATS, header_length="0")
    yield "infer: binary outputs", infer(LEFT, RIGHT, parameters={"binary_data_output": True})
    yield "infer: one output", infer(LEFT, RIGHT, outputs=[{"name": "difference"}])
    yield (
        "infer: outputs binary and JSON",
        infer(
            LEFT,
            RIGHT,
            outputs=[
                {"name": "sum", "parameters": {"binary_data": True}},
                {"name": "difference"},
            ],
        ),
    )
    yield (
        "infer: unknown parameters",
        infer(LEFT, RIGHT, parameters={"colour": "red", "n": 1, "on": True}),
    )
    yield "infer: a parameter is an object", infer(LEFT, RIGHT, parameters={"colour": {"a": 1}})
    yield "infer: priority", infer(LEFT, RIGHT, parameters={"priority": 1})
    yield (
        "infer: sequence",
        infer(LEFT, RIGHT, parameters={"sequence_id": 1, "sequence_start": True}),
    )
    yield (
        "infer: unknown fields",
        infer(left(colour="red"), RIGHT, something=1),
    )


def _inputs() -> Iterator[tuple[str, bytes]]:
    yield "infer: unknown model", infer(LEFT, RIGHT, path="/v2/models/nope/infer")
    yield "infer: version 2", infer(LEFT, RIGHT, path="/v2/models/pair/versions/2/infer")
    yield "infer: version 'one'", infer(LEFT, RIGHT, path="/v2/models/pair/versions/one/infer")
    yield "infer: not loaded", infer(LEFT, RIGHT, path="/v2/models/spare/infer")
    yield "infer: no inputs", infer()
    yield "infer: without the key inputs", post(PAIR, {"id": "1"})
    yield "infer: inputs are an object", post(PAIR, {"inputs": {"left": LEFT}})
    yield "infer: an input is a string", infer("left", RIGHT)
    yield "infer: missing input", infer(LEFT)
    yield "infer: unknown input", infer(LEFT, RIGHT | {"name": "middle"})
    yield "infer: input too many", infer(LEFT, RIGHT, right(name="middle"))
    yield "infer: input twice", infer(LEFT, LEFT, RIGHT)
    yield "infer: input without a name", infer(left(name=None), RIGHT)
    yield "infer: without a datatype", infer(left(datatype=None), RIGHT)
    yield "infer: without a shape", infer(left(shape=None), RIGHT)
    yield "infer: without data", infer(left(data=None), RIGHT)
    yield "infer: wrong datatype", infer(left(datatype="INT32", data=[1, 2, 3, 4]), RIGHT)
    yield "infer: unknown datatype", infer(left(datatype="FP31"), RIGHT)
    yield "infer: wrong shape", infer(left(shape=[1, 5], data=[1] * 5), RIGHT)
    yield "infer: too many dimensions", infer(left(shape=[1, 2, 2]), RIGHT)
    yield "infer: no batch dimension", infer(left(shape=[4]), right(shape=[4]))
    yield (
        "infer: batch of 17",
        infer(left(shape=[17, 4], data=[1] * 68), right(shape=[17, 4], data=[1] * 68)),
    )
    yield "infer: batch of 0", infer(left(shape=[0, 4], data=[]), right(shape=[0, 4], data=[]))
    yield "infer: batches differ", infer(left(shape=[2, 4], data=[1] * 8), RIGHT)
    yield "infer: negative extent", infer(left(shape=[-1, 4]), RIGHT)
    yield "infer: huge extents", infer(left(shape=[2**40, 2**40]), RIGHT)
    yield "infer: extent is a string", infer(left(shape=["1", 4]), RIGHT)
    yield "infer: extent is a fraction", infer(left(shape=[1.5, 4]), RIGHT)
    yield "infer: scalar shape", infer(left(shape=[]), RIGHT)


def _values() -> Iterator[tuple[str, bytes]]:
    nan = b'{"inputs": [%s, %s]}'
    whole = json.dumps(RIGHT).encode()
    yield "data: too few", infer(left(data=[1, 2, 3]), RIGHT)
    yield "data: too many", infer(left(data=[1, 2, 3, 4, 5]), RIGHT)
    yield "data: a string", infer(left(data=["1", 2, 3, 4]), RIGHT)
    yield "data: true", infer(left(data=[True, 2, 3, 4]), RIGHT)
    yield "data: null", infer(left(data=[None, 2, 3, 4]), RIGHT)
    yield "data: not an array", infer(left(data=1), RIGHT)
    yield "data: fraction for INT32", infer(LEFT, right(data=[1.5, 2, 3, 4]))
    yield "data: too large for INT32", infer(LEFT, right(data=[2**40, 2, 3, 4]))
    yield "data: too large for FP32", infer(left(data=[1e300, 2, 3, 4]), RIGHT)
    text = json.dumps(left(data=["#", 2, 3, 4])).encode()
    yield (
        "data: NaN",
        message("POST", PAIR, nan % (text.replace(b'"#"', b"NaN"), whole)),
    )
    yield "data: nested unevenly", infer(left(data=[[1, 2], [3, [4]]]), RIGHT)


def _outputs() -> Iterator[tuple[str, bytes]]:
    yield "output: unknown", infer(LEFT, RIGHT, outputs=[{"name": "product"}])
    yield "output: twice", infer(LEFT, RIGHT, outputs=[{"name": "sum"}, {"name": "sum"}])
    yield "output: without a name", infer(LEFT, RIGHT, outputs=[{}])
    yield "output: outputs are an object", infer(LEFT, RIGHT, outputs={"name": "sum"})
    yield "output: no outputs", infer(LEFT, RIGHT, outputs=[])
    # Not asked: classification, at which a Triton of 2.51 without labels for the model crashes.


def _bodies() -> Iterator[tuple[str, bytes]]:
    good = json.dumps({"inputs": [LEFT, RIGHT]}).encode()
    tail = FLOATS + INTS
    yield "body: empty", post(PAIR)
    yield "body: no JSON", post(PAIR, raw=b"{nonsense")
    yield "body: an array", post(PAIR, raw=b"[1, 2]")
    yield "body: cut", post(PAIR, raw=good[:-9])
    yield "body: bytes behind", post(PAIR, raw=good + b"behind")
    yield "body: key twice", post(PAIR, raw=b'{"id": "1", "id": "2", ' + good[1:])
    yield "body: not UTF-8", post(PAIR, raw=b'{"id": "\xff", ' + good[1:])
    yield "body: deep", post(PAIR, raw=b'{"id": ' + b"[" * 5000 + b"]" * 5000 + b"}")
    plain = [("Content-Type", "text/plain")]
    yield "body: text/plain", message("POST", PAIR, good, plain)
    yield "body: no content type", message("POST", PAIR, good)
    yield "body: gzip", message("POST", PAIR, gzip.compress(good), [("Content-Encoding", "gzip")])
    yield (
        "body: deflate",
        message("POST", PAIR, zlib.compress(good), [("Content-Encoding", "deflate")]),
    )
    yield "body: not gzip", message("POST", PAIR, good, [("Content-Encoding", "gzip")])
    yield "body: unknown encoding", message("POST", PAIR, good, [("Content-Encoding", "br")])
    yield "body: answer in gzip", infer(LEFT, RIGHT, headers=[("Accept-Encoding", "gzip")])
    yield "header length: too long", infer(B_LEFT, B_RIGHT, tail=tail, header_length="99999")
    yield "header length: too short", infer(B_LEFT, B_RIGHT, tail=tail, header_length="20")
    yield "header length: negative", infer(B_LEFT, B_RIGHT, tail=tail, header_length="-1")
    yield "header length: no number", infer(B_LEFT, B_RIGHT, tail=tail, header_length="ten")
    yield "header length: with JSON alone", infer(LEFT, RIGHT, header_length=str(len(good)))
    yield "binary: too short", infer(B_LEFT, B_RIGHT, tail=tail[:-4])
    yield "binary: too long", infer(B_LEFT, B_RIGHT, tail=tail + b"1234")
    few = left(data=None, parameters=binary(12))
    yield "binary: too few for the shape", infer(few, B_RIGHT, tail=tail[:12] + INTS)
    negative = left(data=None, parameters=binary(-16))
    yield "binary: negative size", infer(negative, B_RIGHT, tail=tail)
    word = left(data=None, parameters={"binary_data_size": "16"})
    yield "binary: size is a string", infer(word, B_RIGHT, tail=tail)
    both = left(parameters=binary(16))
    yield "binary: and data in JSON", infer(both, B_RIGHT, tail=tail)
    chunked = [("Transfer-Encoding", "chunked"), ("Content-Type", "application/json")]
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(good), good)
    yield "transfer: chunked", message("POST", PAIR, chunks, chunked, length=False)
    yield "transfer: 100-continue", infer(LEFT, RIGHT, headers=[("Expect", "100-continue")])


def _texts() -> Iterator[tuple[str, bytes]]:
    path = "/v2/models/shout/infer"
    good = texts(b"ab", "straße".encode())
    yield "texts: JSON", infer(tensor("texts", "BYTES", [1, 2], data=["ab", "ü"]), path=path)
    yield "texts: binary", b_texts(good)
    yield "texts: number in JSON", infer(tensor("texts", "BYTES", [1, 2], data=["a", 1]), path=path)
    yield "texts: length beyond the end", b_texts(texts(b"ab") + struct.pack("<I", 90) + b"cd")
    yield "texts: length cut", b_texts(texts(b"ab") + b"\x01\x00")
    yield "texts: one too few", b_texts(texts(b"ab"))
    yield "texts: one too many", b_texts(texts(b"a", b"b", b"c"))
    yield "texts: empty", b_texts(texts(b"", b""))


def _memory() -> Iterator[tuple[str, bytes]]:
    memory = "/v2/systemsharedmemory"
    yield "memory: status", get(f"{memory}/status")
    yield "memory: status of unknown", get(f"{memory}/region/nope/status")
    wanted = {"key": "/slosched_no_such_key", "offset": 0, "byte_size": 64}
    yield "memory: register unknown key", post(f"{memory}/region/mine/register", wanted)
    yield "memory: register without a key", post(f"{memory}/region/mine/register", {"byte_size": 4})
    yield "memory: register without a size", post(f"{memory}/region/mine/register", {"key": "/a"})
    yield "memory: register, no JSON", post(f"{memory}/region/mine/register", raw=b"{")
    yield "memory: unregister unknown", post(f"{memory}/region/nope/unregister")
    yield "memory: unregister all", post(f"{memory}/unregister")
    yield "memory: cuda unregister all", post("/v2/cudasharedmemory/unregister")
    yield "memory: cuda status", get("/v2/cudasharedmemory/status")
    where = {"shared_memory_region": "nope", "shared_memory_byte_size": 16}
    yield "memory: input in unknown region", infer(left(data=None, parameters=where), RIGHT)
    yield (
        "memory: output in unknown region",
        infer(LEFT, RIGHT, outputs=[{"name": "sum", "parameters": where}]),
    )
    size = {"shared_memory_region": "nope"}
    yield "memory: without a size", infer(left(data=None, parameters=size), RIGHT)
    yield "trace setting", get("/v2/trace/setting")
    yield "logging", get("/v2/logging")


def _types(*, binary_data: bool) -> bytes:
    """One element of each input of `types`; floats of half precision travel as bytes alone."""
    values: Json = {"BOOL": [True, False], "FP16": [0.5, -2.0], "FP64": [0.25, -1e6]}
    inputs, tail = [], b""
    for name, datatype in TYPES.items():
        given = values.get(datatype, [7, 0])
        if binary_data or datatype == "FP16":
            data = packed(datatype, given)
            inputs.append(tensor(name, datatype, [1, 2], parameters=binary(len(data))))
            tail += data
        else:
            inputs.append(tensor(name, datatype, [1, 2], data=given))
    path, parameters = "/v2/models/types/infer", {"binary_data_output": binary_data}
    return infer(*inputs, path=path, tail=tail, parameters=parameters)


def _seen(ids: int, mask: int) -> bytes:
    """`seen` with inputs of these lengths."""
    return infer(
        tensor("ids", "INT64", [1, ids], data=[*range(ids)]),
        tensor("mask", "INT64", [1, mask], data=[1] * mask),
        path="/v2/models/seen/infer",
    )


def _found() -> Iterator[tuple[str, bytes]]:
    """What fuzz.py found."""
    yield "infer: all datatypes in JSON", _types(binary_data=False)
    yield "infer: all datatypes in binary", _types(binary_data=True)
    yield "infer: a length of 3", _seen(3, 3)
    yield "infer: a length of 0", _seen(0, 0)
    yield (
        "infer: a grid",
        infer(tensor("input", "FP32", [2, 2, 2], data=[*range(8)]), path="/v2/models/grid/infer"),
    )
    turned = [{"name": "difference"}, {"name": "sum"}]
    yield "infer: outputs in another order", infer(LEFT, RIGHT, outputs=turned)
    yield "infer: version 01", infer(LEFT, RIGHT, path="/v2/models/pair/versions/01/infer")
    yield "infer: version 0", infer(LEFT, RIGHT, path="/v2/models/pair/versions/0/infer")
    yield "infer: parameters of an input are a number", infer(left(parameters=1), RIGHT)
    yield "infer: priority is a string", infer(LEFT, RIGHT, parameters={"priority": "1"})
    yield "infer: sequence_start is a number", infer(LEFT, RIGHT, parameters={"sequence_start": 1})
    yield "timeout: without an end", infer(LEFT, RIGHT, parameters={"timeout": 2**62})
    good = json.dumps({"inputs": [LEFT, RIGHT]}).encode()
    yield "body: byte order mark", post(PAIR, raw=b"\xef\xbb\xbf" + good)
    gzipped = [("Content-Encoding", "gzip")]
    yield (
        "body: gzip without its end",
        message("POST", PAIR, gzip.compress(good, mtime=0)[:-6], gzipped),
    )
    raw = zlib.compress(good)[2:-4]
    yield (
        "body: deflate without zlib",
        message("POST", PAIR, raw, [("Content-Encoding", "deflate")]),
    )
    yield "body: empty encoding", message("POST", PAIR, good, [("Content-Encoding", "")])
    yield "header length: a fraction", infer(LEFT, RIGHT, header_length=f"{len(good)}.0")
    yield "header length: a sign", infer(LEFT, RIGHT, header_length=f"+{len(good)}")
    yield "index: a number", post("/v2/repository/index", raw=b"1")
    unknown = {"parameters": {"colour": "red"}}
    yield "load: unknown parameter", post("/v2/repository/models/pair/load", unknown)
    yield "unload: unknown parameter", post("/v2/repository/models/nope/unload", unknown)
    cuda = "/v2/cudasharedmemory/region"
    yield "memory: cuda status of unknown", get(f"{cuda}/nope/status")
    yield "memory: cuda register", post(f"{cuda}/mine/register", {"byte_size": 64})
    yield "memory: status without a name", get("/v2/systemsharedmemory/region//status")
    yield "memory: unregister without a name", post("/v2/systemsharedmemory/region//unregister")


def _repository() -> Iterator[tuple[str, bytes]]:
    models = "/v2/repository/models"
    yield "index", post("/v2/repository/index", {})
    yield "index: no body", post("/v2/repository/index")
    yield "index: ready", post("/v2/repository/index", {"ready": True})
    yield "index: ready is a string", post("/v2/repository/index", {"ready": "yes"})
    yield "index: no JSON", post("/v2/repository/index", raw=b"{")
    yield "load: unknown", post(f"{models}/nope/load", {})
    yield "load: again", post(f"{models}/pair/load", {})
    yield "load: no JSON", post(f"{models}/pair/load", raw=b"{")
    yield "load: by GET", get(f"{models}/pair/load")
    yield "unload: unknown", post(f"{models}/nope/unload", {})
    yield "unload: not loaded", post(f"{models}/spare/unload", {})
    yield "load: spare", post(f"{models}/spare/load")
    yield "infer: after load", infer(LEFT, RIGHT, path="/v2/models/spare/infer")
    yield "unload: spare", post(f"{models}/spare/unload")
