"""ModelInferRequest to Asked, and Answered to ModelInferResponse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError

from slosched.fronts.asked import Answered, Asked, NamedTensor, RegionPart, Wanted
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.regions import Regions
from slosched.fronts.rpc.contents import TypedContents
from slosched.fronts.rpc.frames import parted, response
from slosched.fronts.rpc.messages import InferRequest, InferResponse
from slosched.fronts.slo import slo_ns
from slosched.signature import MOST_DIMENSIONS, MOST_TENSORS
from slosched.transport.codec import Frame

#: Bytes of a request beside its raw contents, which protobuf makes objects of.
MOST_HEAD_BYTES = 4 * 1024**2
_FINAL = "triton_enable_empty_final_response"  # of streams; perf_analyzer sends it
_REGION, _OFFSET, _SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"


#: Up to here protobuf copies tensors faster than `parted` finds them.
_SMALL_BYTES = 8 * 1024


class Incoming(NamedTuple):
    """A request that was parsed and not looked at yet: a ModelInferRequest, and its raw contents."""

    head: Any
    raw: Sequence[Frame]


class Circumstances(NamedTuple):
    """What a request does not say itself: the text of `slosched-slo`, what is left of the RPC's deadline (0: it
    has none), shared memory (a FrontError if its client is on another host), and the most bytes of its inputs.
    """

    slo_header: str
    deadline_ns: int
    regions: Callable[[], Regions]
    max_bytes: int


def parsed(data: bytes) -> Incoming:
    """A request of its bytes. Raises FrontError, 400."""
    try:
        if len(data) <= _SMALL_BYTES:
            whole = InferRequest.FromString(data)
            return Incoming(whole, whole.raw_input_contents)
        head, raw = parted(data)
        if len(head) > MOST_HEAD_BYTES:
            raise _bad(
                f"the request has {len(head):,} bytes beside its raw_input_contents, and at most "
                f"{MOST_HEAD_BYTES:,} are allowed"
            )
        return Incoming(InferRequest.FromString(head), raw)
    except (DecodeError, ValueError) as error:
        raise _bad(f"the message is not a ModelInferRequest: {error}") from None


def asked(incoming: Incoming, circumstances: Circumstances) -> Asked:
    """The inference that a request asks for. Raises FrontError."""
    head = incoming.head
    for name in head.parameters:
        if name.startswith("triton_") and name != _FINAL:
            raise _bad(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                f"starting with 'triton_' are allowed: {_FINAL}"
            )
    given = slo_ns(
        _parameter(head.parameters, "timeout"),
        circumstances.slo_header,
        circumstances.deadline_ns,
    )
    return Asked(
        model=head.model_name,
        version=head.model_version,
        id=head.id,
        inputs=tuple(_inputs(incoming, circumstances)),
        wanted=tuple(_wanted(head, circumstances)),
        slo_ns=given,
    )


def _inputs(incoming: Incoming, circumstances: Circumstances) -> Iterator[NamedTensor]:
    head, raw = incoming
    if len(head.inputs) > MOST_TENSORS:
        raise _bad(
            f"the request has {len(head.inputs)} inputs, and at most {MOST_TENSORS} are allowed"
        )
    used, room, typed = 0, circumstances.max_bytes, TypedContents()
    for each in head.inputs:
        name = each.name
        if len(each.shape) > MOST_DIMENSIONS + 1:
            raise _bad(f"input '{name}' has {len(each.shape):,} dimensions")
        shape = tuple(each.shape)
        part = _part(each.parameters, f"input '{name}'")
        data: Frame
        if part is not None:
            if each.HasField("contents"):
                raise _bad(
                    f"unexpected 'content' provided when using shared memory for input tensor '{name}' "
                    f"for model '{head.model_name}'"
                )
            room -= part.byte_size
            if room < 0:
                raise FrontError(
                    Status.TOO_LARGE,
                    f"the inputs in shared memory are larger than {circumstances.max_bytes:,} bytes",
                )
            data = circumstances.regions().read(part)
        elif each.HasField("contents"):
            if raw:
                raise _bad(
                    f"contents field must not be specified when using raw_input_contents for '{name}' "
                    f"for model '{head.model_name}'"
                )
            data = typed.bytes_of(name, each.datatype, each.contents)
        elif used < len(raw):
            data = raw[used]
            used += 1
        else:
            raise _bad(
                f"unable to find data for input tensor '{name}' for model '{head.model_name}' in request."
            )
        yield NamedTensor(name, each.datatype, shape, data)
    if used < len(raw):
        raise _bad(f"expected tensor data count to be {used}, got {len(raw)} raw_input_contents")


def _wanted(head: Any, circumstances: Circumstances) -> Iterator[Wanted]:
    if len(head.outputs) > MOST_TENSORS:
        raise _bad(
            f"the request has {len(head.outputs)} outputs, and at most {MOST_TENSORS} are allowed"
        )
    for each in head.outputs:
        if _parameter(each.parameters, "classification"):
            raise _bad(
                f"output '{each.name}': the classification extension is not supported; sort its scores"
            )
        part = _part(each.parameters, f"output '{each.name}'")
        if part is not None:
            circumstances.regions()
        yield Wanted(each.name, part)


def _part(parameters: Any, owner: str) -> RegionPart | None:
    """The region that a tensor names in its parameters."""
    if not parameters:
        return None
    region = _parameter(parameters, _REGION)
    if region is None:
        for each in (_OFFSET, _SIZE):
            if each in parameters:
                raise _bad(f"{owner}: parameter '{each}' needs '{_REGION}'")
        return None
    if not isinstance(region, str) or not region:
        raise _bad(f"{owner}: parameter '{_REGION}' must be the name of a region")
    size, offset = _parameter(parameters, _SIZE), _parameter(parameters, _OFFSET)
    offset = 0 if offset is None else offset
    for key, value in ((_SIZE, size), (_OFFSET, offset)):
        if type(value) is not int or value < 0:
            raise _bad(f"{owner}: parameter '{key}' must be a number of bytes")
    assert isinstance(size, int) and isinstance(offset, int)
    return RegionPart(region, offset, size)


def _parameter(parameters: Any, name: str) -> object:
    """The value of an InferParameter; None if it is not there, or has none."""
    if name not in parameters:
        return None
    value = parameters[name]
    kind = value.WhichOneof("parameter_choice")
    return getattr(value, kind) if kind else None


# ---------------------------------------------------------------------------------------- answers


def answer_bytes(answered: Answered, parameters: Mapping[str, object] | None = None) -> bytes:
    """A ModelInferResponse, or with `parameters` the ModelStreamInferResponse that has it."""
    head = InferResponse(model_name=answered.model, model_version=answered.version, id=answered.id)
    tensors: list[Frame] = []
    for each in answered.outputs:
        made = head.outputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
        part = answered.in_regions.get(each.name) if answered.in_regions else None
        if part is not None:
            made.parameters[_REGION].string_param = part.region
            made.parameters[_SIZE].int64_param = part.byte_size
            if part.offset:
                made.parameters[_OFFSET].int64_param = part.offset
        # Clients look for it by its output's place, also where it is empty: in a region.
        tensors.append(each.data)
    if parameters is not None:
        set_parameters(head, parameters)
    return response(head.SerializeToString(), tensors, in_stream=parameters is not None)


def set_parameters(head: Any, parameters: Mapping[str, object]) -> None:
    """Put bools and whole numbers into the parameters of a ModelInferResponse."""
    for name, value in parameters.items():
        if isinstance(value, bool):
            head.parameters[name].bool_param = value
        else:
            head.parameters[name].int64_param = value


def _bad(text: str) -> FrontError:
    return FrontError(Status.INVALID_ARGUMENT, text)
