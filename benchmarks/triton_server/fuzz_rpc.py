"""Requests over gRPC for fuzz.py: right ones, and what becomes of them when parts are changed at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from fuzz_values import DATATYPES, REGION, REGION_KEY, Filled
from http_cases import packed
from rpc_cases import Message, RpcCase
from tritonclient.grpc import service_pb2 as pb

_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_NUMBERS = (0, 1, -1, 2, 16, 64, 512, 4096, 4097, 2**31, 2**62, 2**63 - 1, -(2**63))
_TEXTS = ("", "0", "1", "nope", "100000000", "ü", "x" * 300)


def case(number: int, draw: random.Random) -> RpcCase:
    """One call. Its name says what was done to it."""
    if draw.random() < 0.75:
        made = _Inference(draw)
        method = draw.choice(("ModelInfer",) * 4 + ("ModelStreamInfer",))
        name = f"{number}: {' + '.join(made.done) or 'right'}"
        return RpcCase(name, method, (made.request,) * (2 if method == "ModelStreamInfer" else 1))
    method, request = _other(draw)
    return RpcCase(f"{number}: {method}", method, (request,))


class _Inference:
    """An inference, changed in none to three places."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.filled = Filled(draw)
        self.request: Message = pb.ModelInferRequest(model_name=self.filled.model)
        self.done: list[str] = []
        typed = draw.random() < 0.3 and self.filled.model != "types"
        for name, (datatype, shape, values) in self.filled.inputs.items():
            each = self.request.inputs.add(name=name, datatype=datatype, shape=shape)
            if typed:
                texts = [value.encode() for value in values] if datatype == "BYTES" else values
                getattr(each.contents, _CONTENTS[datatype]).extend(texts)
            else:
                self.request.raw_input_contents.append(packed(datatype, values))
        if draw.random() < 0.3:
            for name in self.filled.outputs:
                self.request.outputs.add(name=name)
        if draw.random() < 0.3:
            self.request.id = draw.choice(("1", "an id", "ü"))
        if draw.random() < 0.2:
            self.request.model_version = "1"
        for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 2, 3))):
            change = draw.choice(_CHANGES)
            self.done.append(change.__name__.strip("_"))
            change(self)

    def any_input(self) -> Message:
        inputs = self.request.inputs
        return self.draw.choice(inputs) if inputs else inputs.add()

    def any_output(self) -> Message:
        outputs = self.request.outputs
        if not outputs:
            for name in self.filled.outputs:
                outputs.add(name=name)
        return self.draw.choice(outputs)

    def set_parameter(self, owner: Message, name: str, *, odd: bool = True) -> None:
        """A parameter of any type."""
        field = self.draw.choice(("bool", "int64", "int64", "string", "double", "uint64"))
        values: dict[str, Any] = {
            "bool": self.draw.random() < 0.5,
            "int64": self.draw.choice(_NUMBERS if odd else (0, 10**8, -1)),
            "string": self.draw.choice(_TEXTS if odd else ("", "0", "100000000", "soon", "-1")),
            "double": self.draw.choice((0.0, 1.5, -1.0, 1e300) if odd else (1e8, 1.5)),
            "uint64": self.draw.choice((0, 1, 2**63, 2**64 - 1) if odd else (10**8, 2**63)),
        }
        setattr(owner.parameters[name], f"{field}_param", values[field])


# ------------------------------------------------------------------------------------- changes


def _name(it: _Inference) -> None:
    it.any_input().name = it.draw.choice(("", "nope", "left ", "ü", "x" * 300))


def _datatype(it: _Inference) -> None:
    it.any_input().datatype = it.draw.choice(DATATYPES)


def _shape(it: _Inference) -> None:
    shape = it.any_input().shape
    extent = it.draw.choice((0, 1, 2, 3, 17, -1, -2, 2**31, 2**62, -(2**63)))
    how = it.draw.choice(("insert", "set", "remove", "clear"))
    if how == "clear":
        del shape[:]
    elif how == "insert":
        shape.insert(it.draw.randrange(len(shape) + 1), extent)
    elif shape and how == "set":
        shape[it.draw.randrange(len(shape))] = extent
    elif shape:
        del shape[it.draw.randrange(len(shape))]


def _raw(it: _Inference) -> None:
    raw = it.request.raw_input_contents
    if raw:
        place = it.draw.randrange(len(raw))
        each = raw[place]
        raw[place] = it.draw.choice((each[:-1], each + b"\0", b"", each * 2))


def _raw_count(it: _Inference) -> None:
    raw = it.request.raw_input_contents
    if raw and it.draw.random() < 0.6:
        del raw[it.draw.randrange(len(raw))]
    else:
        raw.append(it.draw.choice((b"", b"\0" * 16)))


def _text_bytes(it: _Inference) -> None:
    raw = it.request.raw_input_contents
    if raw:
        place = it.draw.randrange(len(raw))
        changed = bytearray(raw[place] or b"\0")
        changed[it.draw.randrange(min(8, len(changed)))] = it.draw.randrange(256)
        raw[place] = bytes(changed)


def _contents(it: _Inference) -> None:
    """Typed contents that are too few, too many, or of another type."""
    each = it.any_input()
    field = it.draw.choice([*_CONTENTS.values()])
    values: dict[str, Any] = {"bool_contents": True, "bytes_contents": b"x"}
    how = it.draw.choice(("more", "less", "huge", "empty"))
    if how == "more":
        getattr(each.contents, field).append(values.get(field, 1))
    elif how == "huge":
        each.contents.int_contents.append(2**31 - 1)
    elif how == "empty":
        each.contents.SetInParent()
    else:
        for one in (each.contents.fp32_contents, each.contents.int64_contents):
            if one:
                one.pop()


def _inputs(it: _Inference) -> None:
    inputs = it.request.inputs
    how = it.draw.choice(("drop", "twice", "none", "swap"))
    if how == "none":
        del inputs[:]
    elif how == "drop" and inputs:
        del inputs[it.draw.randrange(len(inputs))]
    elif how == "twice" and inputs:
        inputs.append(it.draw.choice(inputs))
    elif len(inputs) > 1:
        first = pb.ModelInferRequest.InferInputTensor.FromString(inputs[0].SerializeToString())
        del inputs[0]
        inputs.append(first)


def _outputs(it: _Inference) -> None:
    each = it.any_output()
    how = it.draw.choice(("drop", "twice", "unknown", "swap"))
    outputs = it.request.outputs
    if how == "drop":
        del outputs[it.draw.randrange(len(outputs))]
    elif how == "twice":
        outputs.append(each)
    elif how == "unknown":
        each.name = it.draw.choice(("", "nope", "ü", "x" * 300))
    else:
        last = pb.ModelInferRequest.InferRequestedOutputTensor.FromString(
            outputs[0].SerializeToString()
        )
        del outputs[0]
        outputs.append(last)


def _parameter(it: _Inference) -> None:
    names = ("priority", "sequence_id", "sequence_start", "sequence_end", "colour", "triton_x", "")
    it.set_parameter(it.request, it.draw.choice((*names, "binary_data_output")))


def _timeout(it: _Inference) -> None:
    it.set_parameter(it.request, "timeout", odd=False)


def _final(it: _Inference) -> None:
    it.set_parameter(it.request, "triton_enable_empty_final_response")


def _no_value(it: _Inference) -> None:
    it.request.parameters[it.draw.choice(("timeout", "colour", "priority"))].SetInParent()


def _tensor_parameter(it: _Inference) -> None:
    # Classification is not asked for: a Triton without labels of the model crashes.
    owner = it.any_input() if it.draw.random() < 0.5 else it.any_output()
    it.set_parameter(owner, it.draw.choice(("colour", "binary_data", "binary_data_size", "")))


def _input_region(it: _Inference) -> None:
    """An input in shared memory, in place of its raw contents or beside them."""
    inputs, raw = it.request.inputs, it.request.raw_input_contents
    if not inputs:
        return
    place = it.draw.randrange(len(inputs))
    size = 16
    if place < len(raw) and it.draw.random() < 0.8:
        size = len(raw[place])
        del raw[place]
    elif it.draw.random() < 0.8:
        inputs[place].ClearField("contents")
    _region(it, inputs[place], size)


def _output_region(it: _Inference) -> None:
    _region(it, it.any_output(), 512)


def _region(it: _Inference, owner: Message, size: int) -> None:
    owner.parameters["shared_memory_region"].string_param = REGION
    owner.parameters["shared_memory_byte_size"].int64_param = size
    if it.draw.random() < 0.3:
        offset = it.draw.choice((0, 16, 3584, 4080, 4096, 4097, -1, 2**62))
        owner.parameters["shared_memory_offset"].int64_param = offset
    if it.draw.random() < 0.4:
        name = it.draw.choice(("region", "byte_size", "offset"))
        it.set_parameter(owner, f"shared_memory_{name}")


def _model(it: _Inference) -> None:
    if it.draw.random() < 0.5:
        it.request.model_name = it.draw.choice(("", "nope", "spare", "PAIR", "ü", "a/b", "x" * 300))
    else:
        it.request.model_version = it.draw.choice(
            ("01", "0", "2", "-1", "+1", "1.0", " 1", "9" * 18, "9" * 30, "one", "1x")
        )


_CHANGES: tuple[Callable[[_Inference], None], ...] = (
    *(_name, _datatype, _shape, _shape, _raw, _raw_count, _text_bytes, _contents, _contents),
    *(_inputs, _outputs, _parameter, _timeout, _final, _no_value, _tensor_parameter),
    *(_input_region, _input_region, _output_region, _output_region, _model),
)

# ----------------------------------------------------------------------------------- other calls


def _other(draw: random.Random) -> tuple[str, Message]:
    """A call of another method than an inference's."""
    model = draw.choice(("pair", "pair", "types", "seen", "nope", "spare", "", "ü", "x" * 300))
    version = draw.choice(("", "", "1", "2", "01", "one", "-1", "1x"))
    region = draw.choice((REGION, "nope", "other", ""))
    free = "spare" if model in ("pair", "types", "seen") else model  # others need those
    load = pb.RepositoryModelLoadRequest(
        model_name=model, repository_name=draw.choice(("", "", "r"))
    )
    if draw.random() < 0.3:
        load.parameters[draw.choice(("colour", "config", "file:1/model.py"))].string_param = "x"
    found: dict[str, Message] = {
        "ServerMetadata": pb.ServerMetadataRequest(),
        "ModelReady": pb.ModelReadyRequest(name=model, version=version),
        "ModelMetadata": pb.ModelMetadataRequest(name=model, version=version),
        "ModelConfig": pb.ModelConfigRequest(name=model, version=version),
        "ModelStatistics": pb.ModelStatisticsRequest(name=model, version=version),
        "RepositoryIndex": pb.RepositoryIndexRequest(
            ready=draw.random() < 0.5, repository_name=draw.choice(("", "", "r"))
        ),
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": pb.RepositoryModelUnloadRequest(
            model_name=free, repository_name=draw.choice(("", "", "r"))
        ),
        "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(name=region),
        "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(
            name=region,
            key=draw.choice((REGION_KEY, "/nope", "", "/a/b")),
            offset=draw.choice((0, 0, 64, 2**62)),
            byte_size=draw.choice((64, 4096, 4097, 0, 2**62)),
        ),
        "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(name="other"),
        "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(name=region),
        "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(name=region),
    }
    method = draw.choice([*found])
    return method, found[method]
