"""Requests as bytes to inferences, and answers to bytes, held against protobuf's own reading of them."""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from slosched.fronts.asked import Answered, Asked, NamedTensor, RegionPart, Wanted
from slosched.fronts.errors import FrontError, Refusal, Status
from slosched.fronts.regions import Regions
from slosched.fronts.rpc import contents, frames, inference, statuses
from slosched.fronts.rpc.calls import is_local
from slosched.fronts.rpc.messages import InferRequest, InferResponse, StreamResponse, message

_REGIONS = Regions()


@pytest.fixture(scope="module", autouse=True, params=[0, 8192], ids=["parted", "small"])
def read_both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small requests are read by protobuf alone; each test is right either way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "_SMALL_BYTES", request.param)
        yield


def asked(request: Any, *, slo: str = "", deadline_ns: int = 0, most: int = 2**20) -> Asked:
    """What a ModelInferRequest, or its bytes, asks for."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    around = inference.Circumstances(slo, deadline_ns, lambda: _REGIONS, most)
    return inference.asked(inference.parsed(data), around)


def refused(request: Any, **options: Any) -> FrontError:
    with pytest.raises(FrontError) as caught:
        asked(request, **options)
    return caught.value


def request(*inputs: dict[str, Any], raw: tuple[bytes, ...] = (), **fields: Any) -> Any:
    return InferRequest(model_name="m", inputs=inputs, raw_input_contents=raw, **fields)


def a_input(name: str = "x", datatype: str = "FP32", shape: Any = (1, 2), **fields: Any) -> Any:
    return {"name": name, "datatype": datatype, "shape": shape, **fields}


# ------------------------------------------------------------------------------------------ frames


@given(
    raw=st.lists(st.binary(max_size=300), max_size=4),
    name=st.text(max_size=5),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_parted_bytes_are_what_protobuf_reads(
    raw: list[bytes], name: str, shape: list[int], order: Any
) -> None:
    parts = [InferRequest(raw_input_contents=[each]).SerializeToString() for each in raw]
    parts.insert(
        order.randint(0, len(parts)),
        InferRequest(model_name=name, inputs=[a_input(shape=shape)]).SerializeToString(),
    )
    data = b"".join(parts)
    rest, found = frames.parted(data)
    assert [bytes(each) for each in found] == raw
    whole = InferRequest.FromString(data)
    whole.ClearField("raw_input_contents")
    assert InferRequest.FromString(rest) == whole


@given(data=st.binary(max_size=60))
@example(data=b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(data=b"\xba\x00\x01a")  # the tag in two bytes
@example(data=b"\x3b\x3c")  # a group
@example(data=b"\x00\x01")
def test_any_bytes_are_read_as_protobuf_reads_them_or_refused(data: bytes) -> None:
    try:
        theirs = InferRequest.FromString(data)
    except DecodeError:
        theirs = None
    try:
        mine = inference.parsed(data)
    except FrontError as error:
        assert error.status is Status.INVALID_ARGUMENT
        groups = any(byte & 7 in (3, 4) for byte in data)
        assert theirs is None or groups
        return
    assert theirs is not None
    assert [bytes(each) for each in mine.raw] == list(theirs.raw_input_contents)
    for each in (theirs, mine.head):
        each.ClearField("raw_input_contents")
    assert mine.head == theirs


def test_a_large_tensor_is_a_view_of_the_message() -> None:
    data = request(a_input(), raw=(bytes(100_000),)).SerializeToString()
    [tensor] = asked(data).inputs
    assert isinstance(tensor.data, memoryview) and tensor.data.obj is data


def test_a_message_of_very_many_fields_is_refused_before_it_is_parsed() -> None:
    one = b"\x2a\x08\x0a\x06abcdef"
    many = one * (frames.MOST_FIELDS + 1)
    assert "more than 1024 fields" in refused(many).text
    assert len(inference.parsed(one * frames.MOST_FIELDS).head.inputs) == frames.MOST_FIELDS
    assert "at most 64" in refused(one * frames.MOST_FIELDS).text
    outputs = b"\x32\x00" * 65
    assert "65 outputs" in refused(outputs).text


def test_a_head_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    huge = request(a_input(contents={"fp32_contents": [0.0] * (2**20)}))
    assert "4,194,304 are allowed" in refused(huge).text
    assert "17 dimensions" not in str(asked(request(a_input(shape=[1] * 17), raw=(b"",))))
    assert "1,000 dimensions" in refused(request(a_input(shape=[1] * 1000), raw=(b"",))).text


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**64 - 1])
def test_numbers_are_protobufs(value: int) -> None:
    data = b"\x18" + frames.varint(value)
    assert message("SystemSharedMemoryRegisterRequest").FromString(data).offset == value


# ---------------------------------------------------------------------------------------- requests


def test_a_request_is_an_inference() -> None:
    found = asked(
        request(
            a_input("a", "FP32", [1, 2]),
            a_input("b", "INT8", [1]),
            raw=(b"12345678", b"9"),
            model_version="3",
            id="one",
            outputs=[{"name": "y"}],
            parameters={"timeout": {"int64_param": 5000}, "other": {"double_param": 1.0}},
        ),
        slo="25ms",
    )
    assert (found.model, found.version, found.id, found.slo_ns) == ("m", "3", "one", 5_000_000)
    assert [(each.name, each.datatype, each.shape) for each in found.inputs] == [
        ("a", "FP32", (1, 2)),
        ("b", "INT8", (1,)),
    ]
    assert [bytes(each.data) for each in found.inputs] == [b"12345678", b"9"]
    assert found.wanted == (Wanted("y"),)


def test_the_slo_is_the_parameter_else_the_metadata_else_the_deadline() -> None:
    timeout = {"timeout": {"uint64_param": 7}}
    assert asked(request(parameters=timeout), slo="25ms", deadline_ns=9).slo_ns == 7000
    assert asked(request(), slo="25ms", deadline_ns=9).slo_ns == 25_000_000
    assert asked(request(), deadline_ns=9).slo_ns == 9
    assert asked(request()).slo_ns == 0
    for bad in ({"bool_param": True}, {"int64_param": -1}, {"double_param": 1.5}):
        assert "'timeout'" in refused(request(parameters={"timeout": bad})).text
    assert "slosched-slo" in refused(request(), slo="soon").text


_TYPED: list[tuple[str, str, list[Any], bytes]] = [
    ("BOOL", "bool_contents", [True, False], b"\x01\x00"),
    ("INT8", "int_contents", [-128, 127], struct.pack("<2b", -128, 127)),
    ("INT16", "int_contents", [-(2**15), 5], struct.pack("<2h", -(2**15), 5)),
    ("INT32", "int_contents", [-(2**31), 5], struct.pack("<2i", -(2**31), 5)),
    ("INT64", "int64_contents", [-(2**63), 5], struct.pack("<2q", -(2**63), 5)),
    ("UINT8", "uint_contents", [255, 0], b"\xff\x00"),
    ("UINT16", "uint_contents", [65535, 0], struct.pack("<2H", 65535, 0)),
    ("UINT32", "uint_contents", [2**32 - 1, 0], struct.pack("<2I", 2**32 - 1, 0)),
    ("UINT64", "uint64_contents", [2**64 - 1, 0], struct.pack("<2Q", 2**64 - 1, 0)),
    ("FP32", "fp32_contents", [1.5, math.inf], struct.pack("<2f", 1.5, math.inf)),
    ("FP64", "fp64_contents", [0.1, -0.0], struct.pack("<2d", 0.1, -0.0)),
    ("BYTES", "bytes_contents", [b"ab", b""], b"\x02\x00\x00\x00ab\x00\x00\x00\x00"),
]


@pytest.mark.parametrize(("datatype", "field", "values", "data"), _TYPED)
def test_typed_contents_are_the_bytes_of_the_tensor(
    datatype: str, field: str, values: list[Any], data: bytes
) -> None:
    [found] = asked(request(a_input("x", datatype, [2], contents={field: values}))).inputs
    assert found.data == data and found.datatype == datatype


@pytest.mark.parametrize(
    ("datatype", "typed", "words"),
    [
        ("FP16", {"fp32_contents": [1.0]}, "must be in raw_input_contents"),
        ("BF16", {}, "must be in raw_input_contents"),
        ("WORD", {"int_contents": [1]}, "must be in raw_input_contents"),
        ("INT8", {"int_contents": [128]}, "not within INT8"),
        ("UINT16", {"uint_contents": [65536]}, "not within UINT16"),
        ("FP32", {"fp64_contents": [1.0]}, "must be in fp32_contents, not in fp64_contents"),
        ("FP32", {"fp32_contents": [1.0], "int_contents": [1]}, "not in int_contents"),
    ],
)
def test_typed_contents_that_do_not_fit(datatype: str, typed: dict[str, Any], words: str) -> None:
    error = refused(request(a_input("x", datatype, [1], contents=typed)))
    assert error.status is Status.INVALID_ARGUMENT and words in error.text


def test_too_many_elements_are_refused_before_they_are_made_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contents, "MOST_ELEMENTS", 8)
    for datatype, field, element, most in (
        ("INT8", "int_contents", 1, 8),
        ("UINT64", "uint64_contents", 1, 8),
        ("BYTES", "bytes_contents", b"a", 2),
    ):
        one = a_input("x", datatype, [1], contents={field: [element]})
        enough = a_input("x", datatype, [1], contents={field: [element] * most})
        assert asked(request(enough)) and asked(request(*[one] * most))
        more = a_input("x", datatype, [1], contents={field: [element] * (most + 1)})
        for wrong in (request(more), request(enough, one)):
            assert "more than 8 whole numbers, or 2 BYTES" in refused(wrong).text
    # Those that need no objects are bounded by the request's bytes.
    many = asked(request(a_input(contents={"fp32_contents": [0.5] * 300_000})))
    assert many.inputs[0].data == array("f", [0.5] * 300_000).tobytes()


def test_contents_with_fields_of_a_later_protocol() -> None:
    typed = message("InferTensorContents")(fp32_contents=[1.0, 2.0]).SerializeToString()
    later = b"\x9a\x06\x05later"
    data = InferRequest(model_name="m").SerializeToString()
    for content, values in ((typed + later, [1.0, 2.0]), (later, []), (later * 2000, [])):
        tensor = b"\x0a\x01x\x12\x04FP32\x2a" + frames.varint(len(content)) + content
        whole = data + b"\x2a" + frames.varint(len(tensor)) + tensor
        assert asked(whole).inputs[0].data == array("f", values).tobytes()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: request(a_input()), "unable to find data for input tensor 'x' for model 'm'"),
        (lambda: request(raw=(b"",)), "got 1 raw_input_contents"),
        (
            lambda: request(a_input(contents={"fp32_contents": [1.0]}), raw=(b"a",)),
            "contents field must not be specified when using raw_input_contents for 'x'",
        ),
        (
            lambda: request(
                outputs=[{"name": "y", "parameters": {"classification": {"int64_param": 3}}}]
            ),
            "classification extension is not supported",
        ),
    ],
)
def test_wrong_requests(make: Callable[[], Any], words: str) -> None:
    error = refused(make())
    assert error.status is Status.INVALID_ARGUMENT and words in error.text


# ---------------------------------------------------------------------------------- shared memory


def region(name: Any = "r", size: Any = 8, offset: Any = None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in (
        ("shared_memory_region", name),
        ("shared_memory_byte_size", size),
        ("shared_memory_offset", offset),
    ):
        if value is not None:
            kind = "string_param" if isinstance(value, str) else "int64_param"
            found[key] = {kind: value}
    return found


def test_inputs_and_outputs_in_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory").write_bytes(bytes(range(64)))
    regions = Regions(folder=tmp_path)
    monkeypatch.setattr(f"{__name__}._REGIONS", regions)
    regions.register("r", "memory", 8, 40)
    wanted = {"name": "y", "parameters": region(size=4, offset=1)}
    # The region's input has no entry among the raw contents.
    found = asked(
        request(
            a_input("a", parameters=region(offset=2)), a_input("b"), raw=(b"raw",), outputs=[wanted]
        )
    )
    assert [bytes(each.data) for each in found.inputs] == [bytes(range(10, 18)), b"raw"]
    assert found.wanted == (Wanted("y", RegionPart("r", 1, 4)),)
    twice = request(*(a_input(each, parameters=region(size=40)) for each in "ab"))
    assert refused(twice, most=79).status is Status.TOO_LARGE and asked(twice, most=80)
    both = a_input(parameters=region(), contents={"fp32_contents": [1.0]})
    assert "unexpected 'content' provided" in refused(request(both)).text
    unknown = refused(request(a_input(parameters=region("nope"))))
    assert unknown.status is Status.NOT_FOUND
    assert unknown.text == "Unable to find shared memory region: 'nope'"
    regions.close()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (region(7), "must be the name of a region"),
        (region(""), "must be the name of a region"),
        (region(None), "'shared_memory_byte_size' needs 'shared_memory_region'"),
        (region(size=None), "'shared_memory_byte_size' must be a number of bytes"),
        (region(size="8"), "'shared_memory_byte_size' must be a number of bytes"),
        (region(size=-1), "'shared_memory_byte_size' must be a number of bytes"),
        (region(offset=-1), "'shared_memory_offset' must be a number of bytes"),
    ],
)
def test_parameters_of_a_region_that_are_wrong(parameters: dict[str, Any], words: str) -> None:
    for wrong in (
        request(a_input(parameters=parameters)),
        request(outputs=[{"name": "y", "parameters": parameters}]),
    ):
        error = refused(wrong)
        assert error.status is Status.INVALID_ARGUMENT and words in error.text


def test_parameters_that_are_tritons_own_are_refused() -> None:
    ours = request(a_input(), raw=(b"12345678",), parameters={"triton_x": {"int64_param": 1}})
    assert "'triton_' are reserved" in refused(ours).text
    # perf_analyzer sends this with each request of a stream.
    streamed = {"triton_enable_empty_final_response": {"bool_param": True}}
    assert asked(request(a_input(), raw=(b"12345678",), parameters=streamed)).inputs


# ---------------------------------------------------------------------------------------- answers


def answered(**fields: Any) -> Answered:
    outputs = (
        NamedTensor("y", "FP32", (1, 2), array("f", [1, 2]).tobytes()),
        NamedTensor("z", "INT8", (1, 3), b""),
        NamedTensor("t", "BYTES", (1,), memoryview(b"\x01\x00\x00\x00a")),
    )
    return Answered(
        **{
            "model": "m",
            "version": "1",
            "id": "i",
            "outputs": outputs,
            "in_regions": {"z": RegionPart("r", 16, 3)},
            **fields,
        }
    )


def test_an_answer_is_what_protobuf_would_write() -> None:
    found = InferResponse.FromString(inference.answer_bytes(answered()))
    assert (found.model_name, found.model_version, found.id) == ("m", "1", "i")
    assert [(each.name, each.datatype, list(each.shape)) for each in found.outputs] == [
        ("y", "FP32", [1, 2]),
        ("z", "INT8", [1, 3]),
        ("t", "BYTES", [1]),
    ]
    # Clients look for the bytes of a tensor by its place, so that of a region has an empty entry.
    assert list(found.raw_output_contents) == [
        array("f", [1, 2]).tobytes(),
        b"",
        b"\x01\x00\x00\x00a",
    ]
    placed = found.outputs[1].parameters
    assert placed["shared_memory_region"].string_param == "r"
    assert placed["shared_memory_byte_size"].int64_param == 3
    assert placed["shared_memory_offset"].int64_param == 16


def test_an_answer_in_a_stream_is_a_message_in_a_message() -> None:
    big = answered(outputs=(NamedTensor("y", "UINT8", (70_000,), bytes(70_000)),))
    data = inference.answer_bytes(big, {"triton_final_response": True, "slosched-in-time": 0})
    found = StreamResponse.FromString(data)
    assert not found.error_message
    parameters = found.infer_response.parameters
    assert parameters["triton_final_response"].bool_param
    assert parameters["slosched-in-time"].WhichOneof("parameter_choice") == "int64_param"
    assert len(found.infer_response.raw_output_contents[0]) == 70_000
    del found.infer_response.parameters["triton_final_response"]
    del found.infer_response.parameters["slosched-in-time"]
    assert found.infer_response == InferResponse.FromString(inference.answer_bytes(big))


# --------------------------------------------------------------------------------------- statuses


@pytest.mark.parametrize("status", list(Status))
def test_each_status_has_a_code_of_grpc(status: Status) -> None:
    assert statuses.code_of(status).value[0] == status.rpc


def test_what_is_known_of_a_refusal_is_trailing_metadata() -> None:
    refusal = Refusal(code=4, predicted_start_ns=5_000, predicted_exec_ns=-1, time_left_ns=-7_000)
    error = FrontError(Status.UNAVAILABLE, "no", refusal, retry_after_s=0.2)
    assert dict(statuses.trailing(error)) == {
        "slosched-code": "4",
        "slosched-predicted-start-us": "5",
        "slosched-time-left-us": "-7",
        "retry-after": "1",
    }
    unknown = dict(statuses.trailing(FrontError(Status.UNAUTHENTICATED, "who")))
    assert unknown == {"www-authenticate": 'Bearer realm="slosched"'}
    assert statuses.shown("a" * 5000) == "a" * 1024 + "..."


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("ipv4:127.0.0.1:40000", True),
        ("ipv4:127.8.9.1:1", True),
        ("ipv6:%5B::1%5D:40000", True),
        ("ipv6:[::1]:40000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:40000", True),
        ("unix:", True),
        ("ipv4:10.0.0.1:127", False),
        ("ipv6:%5B2001:db8::1%5D:40000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:40000", False),
        ("", False),
        ("localhost:1", False),
    ],
)
def test_who_is_on_this_host(peer: str, local: bool) -> None:
    assert is_local(peer) is local
