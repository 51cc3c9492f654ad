"""What is asked over gRPC in conformance.py: right and wrong requests, in the published messages."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from http_cases import FLOATS, INTS, texts
from tritonclient.grpc import service_pb2 as pb

Message = Any


@dataclass(frozen=True)
class RpcCase:
    """One call of `method`; with `stream` the requests go over ModelStreamInfer, one after another."""

    name: str
    method: str
    requests: tuple[Message, ...]
    occupied: bool = False

    @property
    def stream(self) -> bool:
        return self.method == "ModelStreamInfer"


def _input(name: str, datatype: str, shape: tuple[int, ...], **contents: Any) -> Message:
    tensor = pb.ModelInferRequest().InferInputTensor(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return tensor


def pair(
    *, model: str = "pair", version: str = "", change: Callable[[Message], None] | None = None
) -> Message:
    """A right inference with raw contents, which `change` may spoil."""
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    request.inputs.extend(
        [_input("left", "FP32", (1, 4)), _input("right", "INT32", (1, 4))],
    )
    request.raw_input_contents.extend([FLOATS, INTS])
    if change is not None:
        change(request)
    return request


def typed(left: tuple[float, ...] = (1, 2.5, -3, 4)) -> Message:
    request = pb.ModelInferRequest(model_name="pair")
    request.inputs.extend(
        [
            _input("left", "FP32", (1, 4), fp32_contents=left),
            _input("right", "INT32", (1, 4), int_contents=(1, 2, 3, 4)),
        ]
    )
    return request


def slow(**timeout: Any) -> Message:
    request = pb.ModelInferRequest(model_name="slow")
    request.inputs.append(_input("input", "FP32", (1, 1)))
    request.raw_input_contents.append(struct.pack("<f", 1))
    for field, value in timeout.items():
        setattr(request.parameters["timeout"], field, value)
    return request


def shout(raw: bytes) -> Message:
    request = pb.ModelInferRequest(model_name="shout")
    request.inputs.append(_input("texts", "BYTES", (1, 2)))
    request.raw_input_contents.append(raw)
    return request


Change = Callable[[Message], None]


def _output(*names: str) -> Change:
    return lambda request: request.outputs.extend(
        [request.InferRequestedOutputTensor(name=name) for name in names]
    )


def _on_left(**values: Any) -> Change:
    """Set fields of the first input."""

    def change(request: Message) -> None:
        for name, value in values.items():
            if name == "shape":
                request.inputs[0].shape[:] = value
            else:
                setattr(request.inputs[0], name, value)

    return change


def _both(shape: list[int]) -> Change:
    """Give both inputs this shape, and raw contents for it."""

    def change(request: Message) -> None:
        for each in request.inputs:
            each.shape[:] = shape
        times = max(0, shape[0]) if len(shape) > 1 else 1
        request.raw_input_contents[:] = [FLOATS * times, INTS * times]

    return change


def _raw(*contents: bytes) -> Change:
    def change(request: Message) -> None:
        request.raw_input_contents[:] = contents

    return change


def _drop(request: Message) -> None:
    del request.inputs[1], request.raw_input_contents[1]


def _twice(request: Message) -> None:
    request.inputs.append(request.inputs[0])
    request.raw_input_contents.append(FLOATS)


def _mixed(request: Message) -> None:
    request.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])


def _region(request: Message) -> None:
    del request.raw_input_contents[0]
    request.inputs[0].parameters["shared_memory_region"].string_param = "nope"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 16


def _empty(request: Message) -> None:
    del request.inputs[:], request.raw_input_contents[:]


def spoilt() -> Iterator[tuple[str, Change]]:
    """Ways to spoil `pair`, and a few that leave it right."""
    yield "id", lambda request: setattr(request, "id", "a id")
    yield "one output", _output("difference")
    yield "unknown output", _output("product")
    yield "output twice", _output("sum", "sum")
    yield "missing input", _drop
    yield "no inputs", _empty
    yield "input twice", _twice
    yield "unknown input", _on_left(name="middle")
    yield "input without a name", _on_left(name="")
    yield "wrong datatype", _on_left(datatype="INT32")
    yield "unknown datatype", _on_left(datatype="FP31")
    yield "without a datatype", _on_left(datatype="")
    yield "wrong shape", _on_left(shape=[1, 5])
    yield "without a shape", _on_left(shape=[])
    yield "negative extent", _on_left(shape=[-1, 4])
    yield "huge extents", _on_left(shape=[2**40, 2**40])
    yield "no batch dimension", _both([4])
    yield "batch of 2", _both([2, 4])
    yield "batch of 17", _both([17, 4])
    yield "batch of 0", _both([0, 4])
    yield "batches differ", _on_left(shape=[2, 4])
    yield "raw: one too few", _raw(FLOATS)
    yield "raw: one too many", _raw(FLOATS, INTS, INTS)
    yield "raw: too short", _raw(FLOATS[:-4], INTS)
    yield "raw: too long", _raw(FLOATS + FLOATS, INTS)
    yield "raw and typed contents", _mixed
    yield "input in unknown region", _region
    yield (
        "unknown parameters",
        lambda request: setattr(request.parameters["colour"], "string_param", "red"),
    )


def _parameter(name: str, **value: Any) -> Change:
    """A parameter of the request; without a value it is there and has none."""

    def change(request: Message) -> None:
        request.parameters[name].SetInParent()
        for field, each in value.items():
            setattr(request.parameters[name], field, each)

    return change


def _on_right(*shape: int) -> Change:
    return lambda request: request.inputs[1].shape.__setitem__(slice(None), shape)


def _no_entry(request: Message) -> None:
    del request.inputs[1]


def _found() -> Iterator[tuple[str, Change]]:
    """What fuzz.py found."""
    yield "outputs in another order", _output("difference", "sum")
    yield "batch of -1 in the last input", _on_right(-1, 4)
    yield "batch of 2^62 in the last input", _on_right(2**62, 4)
    yield "missing input, with its raw contents", _no_entry
    yield "a parameter of Triton's own", _parameter("triton_x", int64_param=1)
    yield "a parameter without a value", _parameter("colour")
    yield "priority is a string", _parameter("priority", string_param="1")
    final = "triton_enable_empty_final_response"
    yield "an empty final response of 1", _parameter(final, int64_param=1)


def cases() -> Iterator[RpcCase]:
    """All, in the order in which they are asked."""
    yield from _plain()
    yield RpcCase("infer: raw", "ModelInfer", (pair(),))
    yield RpcCase("infer: typed contents", "ModelInfer", (typed(),))
    yield RpcCase("infer: typed contents, too few", "ModelInfer", (typed((1, 2, 3)),))
    yield RpcCase("infer: version 1", "ModelInfer", (pair(version="1"),))
    yield RpcCase("infer: version 2", "ModelInfer", (pair(version="2"),))
    yield RpcCase("infer: version 'one'", "ModelInfer", (pair(version="one"),))
    yield RpcCase("infer: unknown model", "ModelInfer", (pair(model="nope"),))
    yield RpcCase("infer: not loaded", "ModelInfer", (pair(model="spare"),))
    yield RpcCase("infer: no model", "ModelInfer", (pair(model=""),))
    for name, change in spoilt():
        yield RpcCase(f"infer: {name}", "ModelInfer", (pair(change=change),))
    for name, change in _found():
        yield RpcCase(f"infer: {name}", "ModelInfer", (pair(change=change),))
    for version in ("01", "1x", "0", "-1"):
        yield RpcCase(f"infer: version {version!r}", "ModelInfer", (pair(version=version),))
    yield RpcCase("texts: raw", "ModelInfer", (shout(texts(b"ab", b"cd")),))
    yield RpcCase(
        "texts: length beyond the end", "ModelInfer", (shout(texts(b"ab") + b"\x5a\0\0\0cd"),)
    )
    yield RpcCase("texts: one too few", "ModelInfer", (shout(texts(b"ab")),))
    yield RpcCase("texts: one too many", "ModelInfer", (shout(texts(b"a", b"b", b"c")),))
    yield RpcCase("timeout: long enough", "ModelInfer", (slow(int64_param=5_000_000),))
    expired = slow(int64_param=1000)
    yield RpcCase("timeout: expired in the queue", "ModelInfer", (expired,), occupied=True)
    yield RpcCase("timeout: a string", "ModelInfer", (slow(string_param="1000"),))
    yield RpcCase("timeout: negative", "ModelInfer", (slow(int64_param=-1),))
    wrong, unknown = pair(change=dict(spoilt())["wrong shape"]), pair(model="nope")
    yield RpcCase("stream: right, wrong, right", "ModelStreamInfer", (pair(), wrong, pair()))
    yield RpcCase("stream: unknown model", "ModelStreamInfer", (unknown,))
    final = pair()
    final.parameters["triton_enable_empty_final_response"].bool_param = True
    yield RpcCase("stream: with an empty final response", "ModelStreamInfer", (final,))
    yield from _repository()


def _plain() -> Iterator[RpcCase]:
    yield RpcCase("live", "ServerLive", (pb.ServerLiveRequest(),))
    yield RpcCase("ready", "ServerReady", (pb.ServerReadyRequest(),))
    yield RpcCase("server metadata", "ServerMetadata", (pb.ServerMetadataRequest(),))
    for word, method, message in (
        ("ready", "ModelReady", pb.ModelReadyRequest),
        ("metadata", "ModelMetadata", pb.ModelMetadataRequest),
        ("config", "ModelConfig", pb.ModelConfigRequest),
        ("statistics", "ModelStatistics", pb.ModelStatisticsRequest),
    ):
        for name, version in (
            ("pair", ""),
            ("pair", "1"),
            ("pair", "2"),
            ("pair", "one"),
            ("nope", ""),
            ("spare", ""),
            ("", ""),
        ):
            text = f"{word}: {name or 'no model'}" + (f", version {version!r}" if version else "")
            yield RpcCase(text, method, (message(name=name, version=version),))
    wanted = pb.SystemSharedMemoryRegisterRequest(
        name="mine", key="/slosched_no_such_key", byte_size=64
    )
    system, cuda = "SystemSharedMemory", "CudaSharedMemory"
    yield RpcCase("memory: status", f"{system}Status", (pb.SystemSharedMemoryStatusRequest(),))
    unknown = pb.SystemSharedMemoryStatusRequest(name="nope")
    yield RpcCase("memory: status of unknown", f"{system}Status", (unknown,))
    yield RpcCase("memory: register unknown key", f"{system}Register", (wanted,))
    gone = pb.SystemSharedMemoryUnregisterRequest(name="nope")
    yield RpcCase("memory: unregister unknown", f"{system}Unregister", (gone,))
    every = pb.CudaSharedMemoryUnregisterRequest()
    yield RpcCase("memory: cuda unregister all", f"{cuda}Unregister", (every,))
    theirs = pb.CudaSharedMemoryRegisterRequest(
        name="mine", raw_handle=b"nonsense", device_id=0, byte_size=64
    )
    yield RpcCase("memory: cuda register", f"{cuda}Register", (theirs,))
    yield RpcCase("memory: cuda status", f"{cuda}Status", (pb.CudaSharedMemoryStatusRequest(),))
    unknown = pb.CudaSharedMemoryStatusRequest(name="nope")
    yield RpcCase("memory: cuda status of unknown", f"{cuda}Status", (unknown,))
    yield RpcCase("trace setting", "TraceSetting", (pb.TraceSettingRequest(),))
    yield RpcCase("logging", "LogSettings", (pb.LogSettingsRequest(),))


def _repository() -> Iterator[RpcCase]:
    index = pb.RepositoryIndexRequest
    load, unload = "RepositoryModelLoad", "RepositoryModelUnload"
    named = pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest
    yield RpcCase("index", "RepositoryIndex", (index(),))
    yield RpcCase("index: ready", "RepositoryIndex", (index(ready=True),))
    yield RpcCase("load: unknown", load, (named[0](model_name="nope"),))
    yield RpcCase("load: no name", load, (named[0](),))
    yield RpcCase("load: again", load, (named[0](model_name="pair"),))
    yield RpcCase("unload: unknown", unload, (named[1](model_name="nope"),))
    yield RpcCase("load: spare", load, (named[0](model_name="spare"),))
    yield RpcCase("infer: after load", "ModelInfer", (pair(model="spare"),))
    yield RpcCase("unload: spare", unload, (named[1](model_name="spare"),))
