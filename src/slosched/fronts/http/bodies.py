"""Inferences of the protocol as HTTP bodies: a JSON document, and binary tensors behind it in its order.

Source: the Open Inference Protocol with its extensions for binary tensor data, parameters and system shared
memory. Words of errors are Triton's where it has some. Inputs in binary form are parts of the body's memory,
not copies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import msgspec

from slosched.fronts.asked import Answered, Asked, NamedTensor, RegionPart, Wanted
from slosched.fronts.datatypes import SIZES
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.http.answers import OCTETS, Answer, encode
from slosched.fronts.http.elements import (
    BINARY_ONLY,
    MOST_ELEMENTS,
    MOST_LISTS,
    Objects,
    from_json,
    numbers_to_json,
    odd_json,
    values_of,
)
from slosched.fronts.regions import Regions
from slosched.fronts.slo import slo_ns
from slosched.signature import MOST_TENSORS
from slosched.transport.codec import Frame

#: A document of 16 MiB takes some 80 ms to read, beside its elements (elements.py), and nothing else is served.
MOST_JSON_BYTES = 16 * 1024**2
_MOST_PARAMETERS, _MOST_ID = 64, 1024
#: UTF-8's byte order mark, with which some systems begin every text.
_MARK = b"\xef\xbb\xbf"
#: A document with NaN, which another decoder reads at a tenth of the speed.
_MOST_ODD_BYTES = 4 * 1024**2

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Shape = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=17)]
_Name = Annotated[str, msgspec.Meta(max_length=256)]
_UNSET = msgspec.UNSET
_Unset = msgspec.UnsetType


class _InputParameters(msgspec.Struct, frozen=True, gc=False):
    binary_data_size: _Size | _Unset = _UNSET
    shared_memory_region: _Name | _Unset = _UNSET
    shared_memory_offset: _Size = 0
    shared_memory_byte_size: _Size = 0


_NO_INPUT_PARAMETERS = _InputParameters()


class _Input(msgspec.Struct, frozen=True, gc=False):
    name: _Name
    datatype: _Name
    shape: _Shape
    parameters: _InputParameters = _NO_INPUT_PARAMETERS
    data: msgspec.Raw | _Unset = _UNSET


class _OutputParameters(msgspec.Struct, frozen=True, gc=False):
    binary_data: bool | _Unset = _UNSET
    classification: _Size = 0
    shared_memory_region: _Name | _Unset = _UNSET
    shared_memory_offset: _Size = 0
    shared_memory_byte_size: _Size = 0


_NO_OUTPUT_PARAMETERS = _OutputParameters()


class _Output(msgspec.Struct, frozen=True, gc=False):
    name: _Name
    parameters: _OutputParameters = _NO_OUTPUT_PARAMETERS


class _Inference(msgspec.Struct, frozen=True, gc=False):
    inputs: Annotated[tuple[_Input, ...], msgspec.Meta(max_length=MOST_TENSORS)]
    id: Annotated[str, msgspec.Meta(max_length=_MOST_ID)] = ""
    parameters: Annotated[dict[str, msgspec.Raw], msgspec.Meta(max_length=_MOST_PARAMETERS)] = {}
    outputs: Annotated[tuple[_Output, ...], msgspec.Meta(max_length=MOST_TENSORS)] = ()


_parameter = msgspec.json.Decoder(bool | int | float | str).decode
_strict = msgspec.json.Decoder(_Inference).decode


def _decode(document: Frame) -> _Inference:
    """The inference in a document, which may have NaN and infinities among its elements."""
    try:
        return _strict(document)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        text = bytes(document)
        if len(text) > _MOST_ODD_BYTES or (b"NaN" not in text and b"Infinity" not in text):
            raise
    try:
        whole = odd_json(text)
    except ValueError as error:
        raise msgspec.DecodeError(str(error)) from None
    inputs = whole.get("inputs") if isinstance(whole, dict) else None
    parameters = whole.get("parameters") if isinstance(whole, dict) else None
    if isinstance(parameters, dict):
        whole["parameters"] = {
            name: msgspec.Raw(json.dumps(each).encode()) for name, each in parameters.items()
        }
    for each in inputs if isinstance(inputs, list) else ():
        if isinstance(each, dict) and "data" in each:
            each["data"] = msgspec.Raw(json.dumps(each["data"]).encode())
    return msgspec.convert(whole, _Inference)


class Read(NamedTuple):
    """What a body asks for, and the form of its answer: outputs not named are `binary` or JSON."""

    asked: Asked
    binary: bool


def refused(text: str) -> FrontError:
    """The error of a request that is wrong, 400."""
    return FrontError(Status.INVALID_ARGUMENT, text)


def decoded(decode: Any, document: Frame | bytearray) -> Any:
    """What `decode` makes of JSON from a peer. Raises FrontError, 400, or 413 for a very long one."""
    if len(document) > MOST_JSON_BYTES:
        raise FrontError(
            Status.TOO_LARGE,
            f"the request's JSON has {len(document):,} bytes; at most {MOST_JSON_BYTES:,} are taken, and "
            "tensors may follow it as binary data",
        )
    try:
        return decode(document[len(_MARK) :] if document[: len(_MARK)] == _MARK else document)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise refused(f"failed to parse the request JSON buffer: {error}") from None
    except RecursionError:
        raise refused("failed to parse the request JSON buffer: it is nested too deep") from None


def json_bytes(header: str | None, total: int) -> int:
    """Bytes of the JSON in a body of `total`, by its Inference-Header-Content-Length. Raises FrontError."""
    if header is None:
        return total
    if not header.isascii() or not header.lstrip("-").isdecimal():
        raise refused(f"Unable to parse Inference-Header-Content-Length, got: {header[:40]}")
    if header.startswith("-") or len(header) > 18 or int(header) > total:
        raise refused(f"inference header size should be in range (0, {total}), got: {header[:40]}")
    if not int(header):
        raise refused(
            "Inference-Header-Content-Length is 0: requests of raw data without JSON are not taken"
        )
    return int(header)


class Reader:
    """Reads inferences. Without `regions` a request that names one is refused with `why_not`.

    `most_bytes` bounds what one request takes out of regions.
    """

    def __init__(self, regions: Regions | None, why_not: str, most_bytes: int) -> None:
        self._regions, self._why_not, self._most_bytes = regions, why_not, most_bytes

    def read(
        self, body: Frame | bytearray, length: str | None, slo: str, *, model: str, version: str
    ) -> Read:
        """The inference in a body; `length` is its Inference-Header-Content-Length, `slo` its slosched-slo.

        Raises FrontError.
        """
        view = memoryview(body)
        at = json_bytes(length, len(view))
        inference: _Inference = decoded(_decode, view[:at])
        binary, timeout = False, None
        if inference.parameters:
            binary, timeout = _parameters(inference.parameters)
        tensors = []
        room = self._most_bytes
        objects = Objects() if at > MOST_LISTS else None  # a short one has few
        for given in inference.inputs:
            theirs = given.parameters
            count = (
                (given.data is not _UNSET)
                + (theirs.binary_data_size is not _UNSET)
                + (theirs.shared_memory_region is not _UNSET)
            )
            if count != 1:
                raise refused(_not_one_form(given))
            data: Frame
            if isinstance(theirs.binary_data_size, int):
                end = at + theirs.binary_data_size
                if end > len(view):
                    raise refused(
                        f"unexpected size for input '{given.name}', expecting {end - len(view)} additional "
                        f"bytes for model '{model}'"
                    )
                data, at = view[at:end], end
            elif isinstance(given.data, msgspec.Raw):
                data = _from_json(given, given.data, objects)
            else:
                data = self._from_region(given, room)
                room -= len(data)
            tensors.append(NamedTensor(given.name, given.datatype, given.shape, data))
        if at != len(view):
            raise refused(f"unexpected additional input data for model '{model}'")
        asked = Asked(
            model=model,
            version=version,
            id=inference.id,
            inputs=tuple(tensors),
            wanted=tuple([self._wanted(each) for each in inference.outputs])
            if inference.outputs
            else (),
            slo_ns=slo_ns(timeout, slo),
        )
        return Read(asked, binary)

    def _from_region(self, given: _Input, room: int) -> Frame:
        theirs = given.parameters
        part = self._part(
            theirs.shared_memory_region,
            theirs.shared_memory_offset,
            theirs.shared_memory_byte_size,
        )
        if part.byte_size > room:
            raise FrontError(
                Status.TOO_LARGE,
                f"input '{given.name}' takes the inputs in shared memory beyond {self._most_bytes:,} bytes, "
                "the most of a request",
            )
        assert self._regions is not None  # _part
        return self._regions.read(part)

    def _part(self, region: str | _Unset, offset: int, byte_size: int) -> RegionPart:
        if self._regions is None:
            raise refused(self._why_not)
        return RegionPart(str(region), offset, byte_size)

    def _wanted(self, output: _Output) -> Wanted:
        theirs = output.parameters
        if theirs.classification:
            raise refused(
                f"output '{output.name}': the classification extension is not supported; sort its scores"
            )
        if theirs.shared_memory_region is _UNSET:
            return Wanted(output.name, None, theirs.binary_data is True)
        if theirs.binary_data is True:
            raise refused("Output can't set both 'shared_memory_region' and 'binary_data'")
        part = self._part(
            theirs.shared_memory_region,
            theirs.shared_memory_offset,
            theirs.shared_memory_byte_size,
        )
        return Wanted(output.name, part)


def _parameters(given: Mapping[str, msgspec.Raw]) -> tuple[bool, object]:
    """(binary_data_output, timeout) of a request's parameters; others are taken and not heeded."""
    heeded: dict[str, object] = {}
    for name, raw in given.items():
        if name.startswith("triton_"):
            raise refused(
                "parameter keys starting with 'triton_' are reserved for Triton usage and should not be "
                "specified."
            )
        try:
            heeded[name] = _parameter(raw)
        except msgspec.DecodeError:
            raise refused(
                f"parameter '{name[:64]}' has invalid type. It should be either 'int', 'bool', or 'string'."
            ) from None
    binary = heeded.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise refused("Unable to parse 'binary_data_output': it is true or false")
    return binary, heeded.get("timeout")


def _not_one_form(given: _Input) -> str:
    forms = {
        "'data'": given.data is not _UNSET,
        "'binary_data_size'": given.parameters.binary_data_size is not _UNSET,
        "'shared_memory_region'": given.parameters.shared_memory_region is not _UNSET,
    }
    found = " ".join(name for name, there in forms.items() if there)
    return (
        "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
        f"'shared_memory_region' in 'parameters'. But {f'set {found}' if found else 'no field is set'}"
    )


def _from_json(given: _Input, raw: msgspec.Raw, objects: Objects | None) -> bytes:
    if given.datatype in BINARY_ONLY:
        raise refused(
            f"receiving {given.datatype} data via JSON is not supported. Please use the binary data format for "
            f"input {given.name}"
        )
    if given.datatype not in SIZES and given.datatype != "BYTES":
        raise refused(f"invalid datatype for input {given.name}")
    try:
        if objects is not None:
            objects.add(raw)
        return from_json(raw, given.datatype, math.prod(given.shape))
    except (ValueError, RecursionError) as error:
        raise refused(f"Unable to parse 'data' of input '{given.name}': {error}") from None


# ------------------------------------------------------------------------------------ answers


def answer(read: Read, answered: Answered) -> Answer:
    """The answer's body: JSON, and behind it the outputs that are wanted as binary data.

    Raises FrontError for an output that JSON cannot carry.
    """
    wanted = read.asked.wanted
    forms = {each.name: each.binary for each in wanted} if wanted else None
    outputs: list[dict[str, Any]] = []
    binaries: list[Frame] = []
    elements = 0
    for tensor in answered.outputs:
        shown: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        if tensor.name in answered.in_regions:
            pass  # without parameters, as Triton: its C++ client takes any for those of binary data
        elif read.binary if forms is None else forms.get(tensor.name, False):
            shown["parameters"] = {"binary_data_size": len(tensor.data)}
            binaries.append(tensor.data)
        else:
            elements = counted(tensor, elements)
            shown["data"] = _to_json(tensor)
        outputs.append(shown)
    whole: dict[str, Any] = {"id": answered.id} if answered.id else {}
    whole["model_name"], whole["model_version"] = answered.model, answered.version
    whole["outputs"] = outputs
    text = encode(whole)
    headers = b"" if answered.in_time else b"slosched-in-time: 0\r\n"
    if not binaries:
        return Answer(200, (text,), headers)
    headers += b"inference-header-content-length: %d\r\n" % len(text)
    return Answer(200, (text, *binaries), headers, OCTETS)


def counted(tensor: NamedTensor, before: int) -> int:
    """The elements of an answer in JSON with this output. Raises FrontError, 400, where they are too many."""
    elements = before + math.prod(tensor.shape)
    if elements > MOST_ELEMENTS:
        raise refused(
            f"output '{tensor.name}' has the elements beyond {MOST_ELEMENTS:,}, the most in an answer's JSON; "
            "ask for it as binary data, with /v2"
        )
    return elements


def _to_json(tensor: NamedTensor) -> msgspec.Raw:
    if tensor.datatype in BINARY_ONLY:
        raise refused(
            f"sending {tensor.datatype} data via JSON is not supported. Please use the binary data format for "
            "output"
        )
    try:
        values = values_of(tensor.data, tensor.datatype, math.prod(tensor.shape))
    except UnicodeDecodeError:
        raise refused(
            f"output '{tensor.name}' has BYTES that are not UTF-8 texts; ask for it as binary data"
        ) from None
    except ValueError as error:
        raise FrontError(Status.INTERNAL, f"output '{tensor.name}': {error}") from None
    floats = tensor.datatype in ("FP32", "FP64")
    return msgspec.Raw(numbers_to_json(values) if floats else encode(values))
