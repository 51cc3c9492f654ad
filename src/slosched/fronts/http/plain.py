"""`POST /v1/infer/MODEL`: one inference in plain JSON, for curl.

    {"inputs": {"x": [1, 2]}, "slo": "25ms"}   ->   {"outputs": {"y": [3.0]}, "latency_ms": 3.1, ...}

Inputs are without the batch, each in lists of lists or in one list; a model with one input takes its value
alone. The SLO may also be in the query, `?slo=25ms`, or in the header slosched-slo. An error says its code, the
reason, and what the controller predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from slosched.codes import code_name
from slosched.fronts.asked import Answered, Asked, NamedTensor
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.http.answers import Answer, document, encode, error_headers
from slosched.fronts.http.bodies import counted, decoded, refused
from slosched.fronts.http.elements import Objects, nested, regular, to_bytes, values_of
from slosched.fronts.slo import slo_ns
from slosched.transport.codec import Frame
from slosched.units import NS_PER_MS

#: As protobuf's JSON has them; JSON has no numbers for these.
_NO_NUMBERS = {math.inf: "Infinity", -math.inf: "-Infinity"}


class Plain(msgspec.Struct, forbid_unknown_fields=True):
    """A plain request. `slo` is a duration, "25ms"; `inputs` are read once the model is known."""

    inputs: msgspec.Raw
    slo: str = ""
    id: str = ""


_decode = msgspec.json.Decoder(Plain).decode
_inputs = msgspec.json.Decoder().decode


def read(body: Frame | bytearray) -> Plain:
    """The request in a body. Raises FrontError."""
    request: Plain = decoded(_decode, body)
    return request


def asked(
    plain: Plain, slo: str, metadata: Mapping[str, Any], *, model: str, version: str
) -> Asked:
    """The inference, by the model's metadata. Raises FrontError, 400, that names the input that is wrong."""
    inputs: Sequence[Mapping[str, Any]] = metadata["inputs"]
    try:
        Objects().add(plain.inputs)
    except ValueError as error:
        raise refused(f"the inputs cannot be read: {error}") from None
    values = decoded(_inputs, memoryview(plain.inputs))
    if not isinstance(values, dict):
        if len(inputs) != 1:
            names = ", ".join(f'"{each["name"]}"' for each in inputs)
            raise refused(f"model '{model}' has several inputs: give an object with {names}")
        values = {inputs[0]["name"]: values}
    unknown = [name for name in values if name not in {each["name"] for each in inputs}]
    missing = [each["name"] for each in inputs if each["name"] not in values]
    if unknown or missing:
        names = ", ".join(each["name"] for each in inputs)
        wrong = (
            f"has no input '{unknown[0][:64]}'" if unknown else f"lacks its input '{missing[0]}'"
        )
        raise refused(f"the request for model '{model}' {wrong}; its inputs are {names}")
    tensors = tuple(_tensor(each, values[each["name"]]) for each in inputs)
    return Asked(
        model=model, version=version, id=plain.id, inputs=tensors, slo_ns=slo_ns(None, slo)
    )


def _tensor(described: Mapping[str, Any], value: object) -> NamedTensor:
    """One input of a batch of 1. Raises FrontError."""
    name, datatype = described["name"], described["datatype"]
    wanted = tuple(described["shape"][1:])
    try:
        elements, given = regular(value)
        shape = _shape(wanted, given, len(elements))
        data = to_bytes(elements, datatype)
    except ValueError as error:
        raise refused(f"input '{name}' {datatype}{list(wanted)}: {error}") from None
    return NamedTensor(name, datatype, (1, *shape), data)


def _shape(wanted: tuple[int, ...], given: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The shape of a value of `count` elements in lists nested as `given`. Raises ValueError.

    One list serves for every shape in which at most one kind of dimension varies.
    """
    if len(given) == len(wanted):
        if all(theirs and ours in (-1, theirs) for ours, theirs in zip(wanted, given, strict=True)):
            return given
        raise ValueError(f"a value of shape {list(given)} came")
    if len(given) > 1:
        raise ValueError(f"lists of shape {list(given)} came")
    fixed = math.prod(extent for extent in wanted if extent != -1)
    if wanted.count(-1) == 1 and fixed and count and count % fixed == 0:
        return tuple(count // fixed if extent == -1 else extent for extent in wanted)
    if -1 in wanted or fixed != count:
        raise ValueError(f"{count} element{'s' if count != 1 else ''} came")
    return wanted


def answer(answered: Answered) -> Answer:
    """The answer to a plain request. Raises FrontError for an output that is not text in UTF-8."""
    elements = 0
    for tensor in answered.outputs:
        elements = counted(tensor, elements)
    outputs = {tensor.name: _value(tensor) for tensor in answered.outputs}
    shown = {
        "model": answered.model,
        "version": answered.version,
        "outputs": outputs,
        "latency_ms": answered.latency_ns / NS_PER_MS,
        "in_time": answered.in_time,
    }
    if answered.slo_ns:
        shown["slo_ms"] = answered.slo_ns / NS_PER_MS
    if answered.id:
        shown["id"] = answered.id
    return document(shown)


def _value(tensor: NamedTensor) -> Any:
    try:
        values = values_of(tensor.data, tensor.datatype, math.prod(tensor.shape))
    except UnicodeDecodeError:
        raise refused(
            f"output '{tensor.name}' has BYTES that are not UTF-8 texts; /v2 carries them as binary data"
        ) from None
    except ValueError as error:
        raise FrontError(Status.INTERNAL, f"output '{tensor.name}': {error}") from None
    if tensor.datatype.startswith(("FP", "BF")) and not all(map(math.isfinite, values)):
        values = [each if math.isfinite(each) else _NO_NUMBERS.get(each, "NaN") for each in values]
    return nested(values, tensor.shape[1:]) if values else []


def error_answer(error: FrontError) -> Answer:
    """An error of a plain request, with what the controller predicted in ms."""
    shown: dict[str, Any] = {"error": error.text}
    refusal = error.refusal
    if refusal is not None:
        shown["code"], shown["reason"] = refusal.code, code_name(refusal.code)
        if refusal.predicted_start_ns >= 0:
            shown["predicted_start_ms"] = refusal.predicted_start_ns / NS_PER_MS
        if refusal.predicted_exec_ns >= 0:
            shown["predicted_exec_ms"] = refusal.predicted_exec_ns / NS_PER_MS
        shown["time_left_ms"] = refusal.time_left_ns / NS_PER_MS
    return Answer(error.status.http, (encode(shown),), error_headers(error))
