"""What a request of the protocol must look like, its rows as frames, and frames as outputs; SLOs and names."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from fake_controller import model_info
from slosched.clients.tensors import pack, unpack
from slosched.fronts.asked import Asked, NamedTensor, Wanted
from slosched.fronts.datatypes import OF_NUMPY, SIZES
from slosched.fronts.descriptions import model_config, model_metadata, server_metadata
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.forms import Form
from slosched.fronts.names import Offered, name_and_version
from slosched.fronts.slo import slo_ns
from slosched.fronts.statistics import ModelStatistics
from slosched.messages import InferReply
from slosched.signature import BYTES, Tensor, element_bytes, joined

TOY = Form("toy", model_info(0))  # input float32 (3, 4), output float32 (2,), batches up to 4
PAIR = (Tensor("left", "float32", (4,)), Tensor("right", "int32", (4,)))
TOKENS = (Tensor("ids", "int64", (-1,)), Tensor("mask", "int64", (-1,)))
TEXTS = (Tensor("texts", BYTES, (2,), max_bytes=64), Tensor("place", "int16", ()))


def form(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...] = (), **fields: Any) -> Form:
    wanted = {"inputs": inputs, "outputs": outputs or inputs} | fields
    return Form("m", structs.replace(model_info(0), name="m", **wanted))


def tensor(name: str, array: np.ndarray[Any, Any]) -> NamedTensor:
    datatype = OF_NUMPY[str(array.dtype)]
    return NamedTensor(name, datatype, array.shape, array.tobytes())


def texts(rows: list[list[bytes]]) -> NamedTensor:
    data = element_bytes([each for row in rows for each in row])
    return NamedTensor("texts", "BYTES", (len(rows), len(rows[0])), data)


def refused(of: Form, *inputs: NamedTensor, **fields: Any) -> str:
    with pytest.raises(FrontError) as caught:
        of.rows(Asked(model="m", inputs=inputs, **fields))
    assert caught.value.status is Status.INVALID_ARGUMENT
    return caught.value.text


def test_the_frame_of_one_row_is_the_memory_of_the_request() -> None:
    data = bytearray(48)
    rows = TOY.rows(
        Asked(model="toy", inputs=(NamedTensor("input", "FP32", (1, 3, 4), memoryview(data)),))
    )
    data[5] = 7
    assert rows.frames[0][5] == 7 and rows.length == 0


def test_a_batch_is_its_rows_in_order() -> None:
    array = np.arange(36, dtype=np.float32).reshape(3, 3, 4)
    rows = TOY.rows(Asked(model="toy", inputs=(tensor("input", array),)))
    assert [bytes(frame) for frame in rows.frames] == [each.tobytes() for each in array]


def test_two_inputs_lie_in_a_frame_as_the_native_client_packs_them() -> None:
    of = form(PAIR)
    left = np.arange(8, dtype=np.float32).reshape(2, 4)
    right = np.arange(8, dtype=np.int32).reshape(2, 4) * 3
    given_ = (tensor("right", right), tensor("left", left))  # in any order
    rows = of.rows(Asked(model="m", inputs=given_))
    for row, frame in enumerate(rows.frames):
        native = pack(of.info, {"left": left[row], "right": right[row]})
        assert bytes(frame) == bytes(native.frame)


def test_lengths_travel_with_the_rows_and_must_agree() -> None:
    of = form(TOKENS, lengths=(4, 16))
    ids = np.arange(10, dtype=np.int64).reshape(2, 5)
    rows = of.rows(Asked(model="m", inputs=(tensor("ids", ids), tensor("mask", ids))))
    assert rows.length == 5 and len(rows.frames) == 2
    assert bytes(rows.frames[1]) == bytes(pack(of.info, {"ids": ids[1], "mask": ids[1]}).frame)
    assert "share one length" in refused(of, tensor("ids", ids), tensor("mask", ids[:, :4].copy()))
    long = np.zeros((1, 17), np.int64)
    assert "Expected [-1,-1], -1 up to 16, got [1,17]" in refused(
        of, tensor("ids", long), tensor("mask", long)
    )
    none = np.zeros((1, 0), np.int64)
    assert "got [1,0]" in refused(of, tensor("ids", none), tensor("mask", none))


def test_texts_are_cut_into_rows_and_faulty_ones_refused_in_tritons_words() -> None:
    of = form(TEXTS)
    place = tensor("place", np.array([1, 2], np.int16))
    rows = of.rows(Asked(model="m", inputs=(texts([[b"a", b"bc"], [b"", b"xyz"]]), place)))
    for frame, words, number in zip(
        rows.frames, ([b"a", b"bc"], [b"", b"xyz"]), (1, 2), strict=True
    ):
        assert bytes(frame) == bytes(joined([element_bytes(words), np.int16(number).tobytes()]))
    whole = bytes(texts([[b"ab", b"cd"], [b"ef", b"gh"]]).data)

    def cut(data: bytes) -> str:
        return refused(of, NamedTensor("texts", "BYTES", (2, 2), data), place)

    assert "got 3" in cut(whole[:-6]) and "expected 4 string elements" in cut(whole[:-6])
    assert "string length indicator" in cut(whole[:-4])
    assert "expecting string of length 2 but only 1 bytes available" in cut(whole[:-1])
    assert "unexpected number of string elements 5" in cut(whole + b"\0\0\0\0")
    assert "length indicator" in cut(whole + b"\0")
    assert "expecting string of length 4294967295" in cut(b"\xff" * 4 + whole)
    assert "takes at most 64" in refused(of, texts([[b"x" * 60, b""], [b"", b""]]), place)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"name": "other"}, "unexpected inference input 'other' for model 'toy'"),
    ({"datatype": "FP64"}, "data-type is 'FP64', but model 'toy' expects 'FP32'"),
    ({"datatype": "FLOAT"}, "data-type is '<invalid>', but model 'toy' expects 'FP32'"),
    ({"shape": (3, 4)}, "Expected [-1,3,4], got [3,4]. NOTE: Setting a non-zero max_batch_size"),
    ({"shape": (1, 4, 3)}, "Expected [-1,3,4], got [1,4,3]"),
    ({"shape": (-1, 3, 4)}, "Expected [-1,3,4], got [-1,3,4]"),
    ({"shape": (2**62, 2**62, 4)}, "Expected [-1,3,4], got [4611686018427387904,"),
    ({"shape": (2**62, 3, 4)}, "batch-size must be <= 4 for 'toy'"),
    ({"shape": (5, 3, 4)}, "batch-size must be <= 4 for 'toy'"),
    ({"shape": ()}, "has no shape but model requires batch dimension"),
    ({"shape": (1,) * 1000}, "got [1,1,1"),
    ({"shape": (0, 3, 4), "data": b""}, "Expected 48, got 0"),
    ({"shape": (0, 3, 4)}, "batch-size must be >= 1"),
    ({"data": b"123"}, "Expected 48, got 3"),
    ({"data": bytes(49)}, "Expected 48, got 49"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_does_not_fit_is_refused_with_its_reason(change: dict[str, Any], words: str) -> None:
    right = NamedTensor("input", "FP32", (1, 3, 4), bytes(48))
    assert words in refused(TOY, structs.replace(right, **change))


def test_a_model_of_single_numbers_takes_a_number_a_row() -> None:
    of = form((Tensor("x", "float32", ()),))
    rows = of.rows(Asked(model="m", inputs=(tensor("x", np.arange(3, dtype=np.float32)),)))
    assert [bytes(frame) for frame in rows.frames] == [np.float32(i).tobytes() for i in range(3)]
    assert "has no shape" in refused(of, NamedTensor("x", "FP32", (), bytes(4)))
    assert "got [1,1]" in refused(of, NamedTensor("x", "FP32", (1, 1), bytes(4)))


def test_inputs_that_are_missing_repeated_or_of_other_batches() -> None:
    of = form(PAIR)
    left = tensor("left", np.zeros((2, 4), np.float32))
    right = tensor("right", np.zeros((1, 4), np.int32))
    assert "Got input(s) ['left'], but missing required input(s) ['right']" in refused(of, left)
    assert "expected 2 inputs but got 0" in refused(of)
    assert "input 'left' already exists" in refused(of, left, left, right)
    assert "input 'left' batch size does not match other inputs" in refused(of, left, right)
    assert refused(of, left, id="seven").startswith("[request id: seven] ")
    assert refused(of, left).startswith("[request id: <id_unknown>] ")
    assert len(refused(of, structs.replace(left, name="n" * 10_000))) < 400


def test_a_batch_of_minus_one_is_not_that_of_the_others() -> None:
    of = form(PAIR)
    left = tensor("left", np.zeros((1, 4), np.float32))
    right = structs.replace(tensor("right", np.zeros((1, 4), np.int32)), shape=(-1, 4))
    for inputs in ((left, right), (right, left)):
        assert "batch size does not match" in refused(of, *inputs)


def test_outputs_are_those_that_are_wanted_and_once() -> None:
    of = form(PAIR)
    frames = [
        joined([np.full(4, row, np.float32).tobytes(), np.full(4, row, np.int32).tobytes()])
        for row in range(3)
    ]
    everything = of.answer(Asked(model="m"), frames, 0)
    assert [(each.name, each.shape) for each in everything] == [("left", (3, 4)), ("right", (3, 4))]
    assert np.frombuffer(everything[1].data, np.int32).reshape(3, 4)[:, 0].tolist() == [0, 1, 2]
    twice = Asked(model="m", wanted=(Wanted("right"), Wanted("right")))
    assert [each.name for each in of.answer(twice, frames, 0)] == ["right"]
    # As Triton: in the order of the model, whatever that of the request is.
    turned = Asked(model="m", wanted=(Wanted("right"), Wanted("left")))
    assert [each.name for each in of.answer(turned, frames, 0)] == ["left", "right"]
    assert "unexpected inference output 'sum'" in refused(of, wanted=(Wanted("sum"),))
    with pytest.raises(ValueError, match="bytes came"):
        of.answer(Asked(model="m"), [frames[0][:-1]], 0)
    with pytest.raises(ValueError, match="bytes came"):
        TOY.answer(Asked(model="toy"), [bytes(7)], 0)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 4),
    length=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1),
    words=st.lists(st.binary(max_size=9), min_size=8, max_size=8),
)
def test_any_rows_are_packed_and_unpacked_as_by_the_native_client(
    count: int, length: int, seed: int, words: list[bytes]
) -> None:
    inputs = (*TOKENS, Tensor("texts", BYTES, (2,), max_bytes=64), Tensor("on", "bool", (3,)))
    of = form(inputs, lengths=(4, 16))
    draw = np.random.default_rng(seed)
    ids, mask = draw.integers(0, 9, (2, count, length))
    on = draw.random((count, 3)) < 0.5
    rows = [words[2 * row : 2 * row + 2] for row in range(count)]
    of_request = (tensor("on", on), texts(rows), tensor("ids", ids), tensor("mask", mask))
    packed = of.rows(Asked(model="m", inputs=of_request))
    assert packed.length == length
    for row, frame in enumerate(packed.frames):
        native = {"ids": ids[row], "mask": mask[row], "texts": rows[row], "on": on[row]}
        assert bytes(frame) == bytes(pack(of.info, native).frame)
    found = of.answer(Asked(model="m"), packed.frames, length)
    back = [unpack(of.info, frame, length) for frame in packed.frames]
    assert bytes(found[0].data) == b"".join(each["ids"].tobytes() for each in back)
    assert [bytes(each.data) for each in found[2:3]] == [bytes(of_request[1].data)]


def test_every_dtype_has_a_name_and_a_size_in_the_protocol() -> None:
    for ours, theirs in OF_NUMPY.items():
        if ours not in (BYTES, "bfloat16"):
            assert SIZES[theirs] == np.dtype(ours).itemsize


def test_descriptions_have_the_batch_in_front_in_metadata_and_not_in_the_config() -> None:
    found = model_metadata(TOY, "toy", ["1"])
    assert found["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 4]}]
    config = model_config(TOY, "toy", "1")
    assert config["max_batch_size"] == 4
    assert config["input"][0]["dims"] == [3, 4]
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert model_config(form(TEXTS), "m", "1")["input"][0]["data_type"] == "TYPE_STRING"
    assert "system_shared_memory" in server_metadata(shared_memory=True)["extensions"]
    assert "system_shared_memory" not in server_metadata(shared_memory=False)["extensions"]


# ----------------------------------------------------------------------------------- SLOs


def test_the_parameter_goes_before_the_header_and_that_before_the_deadline() -> None:
    said: dict[str, Any] = {"timeout_us": 5_000, "header": "7ms", "deadline_ns": 9_000_000}
    assert slo_ns(**said) == 5_000_000
    assert slo_ns(**said | {"timeout_us": None}) == slo_ns(**said | {"timeout_us": 0}) == 7_000_000
    assert slo_ns(header="", deadline_ns=9_000_000) == 9_000_000
    assert slo_ns() == slo_ns(deadline_ns=-5) == slo_ns(deadline_ns=2**63) == 0
    assert slo_ns(timeout_us="2500") == 2_500_000  # from clients whose parameters are texts
    assert slo_ns(header="0.5") == 500_000_000


_NO_TIMEOUTS: list[Any] = [-1, 2**62, 1.5, True, "x", "-1", "1" * 40, "\u0663", [], {}]
_NO_DURATIONS = ["x", "-1ms", "0", "nan", "inf", "9" * 30 + "s", "1ms" * 99, "5 parsecs", "1e400s"]


@pytest.mark.parametrize(
    "said",
    [{"timeout_us": each} for each in _NO_TIMEOUTS] + [{"header": each} for each in _NO_DURATIONS],
    ids=lambda said: repr(said)[:40],
)
def test_an_slo_that_is_none_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(FrontError) as caught:
        slo_ns(**said)
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert len(caught.value.text) < 300


# ---------------------------------------------------------------------------------- names


def test_names_and_versions() -> None:
    assert name_and_version("a:b:12") == ("a:b", "12")
    for plain in ("a", "a:", ":3", "a:x", "a:01", "a:0", "a:-1", "a:\u0663", f"a:{'9' * 40}"):
        assert name_and_version(plain) == (plain, "")
    offered = Offered(["b", "a:2", "a:10", "a:9", "f", "c", "c:1"], ["f"])
    assert list(offered) == ["b", "a", "c"]
    assert offered.versions("a") == ("2", "9", "10") and offered.newest("a") == "10"
    assert offered.full("b", "1") == "b" and offered.full("a", "2") == "a:2"
    assert offered.full("c", "1") == "c:1"
    assert offered.known("f") == offered.known("zz") == offered.newest("zz") == ""
    for order in product(("c", "c:1"), repeat=2):
        assert Offered(order).newest("c") == "1"


# ----------------------------------------------------------------------------- statistics


def test_statistics_split_a_request_into_its_parts_and_batches() -> None:
    counts = ModelStatistics()

    def reply(size: int, latency_ns: int) -> InferReply:
        return InferReply(
            1, 0, "", 1, 10**9, latency_ns, True, batch_size=size, start_ns=300, exec_ns=500
        )

    first, second = reply(2, 1_000), reply(2, 900)
    counts.served(first, [first, second], total_ns=1_500)
    counts.served(second, [second], total_ns=1_100)
    counts.failed(50)
    found = counts.document("toy", "1")
    parts = found["inference_stats"]
    assert parts["success"] == {"count": 2, "ns": 2_600} and parts["fail"] == {"count": 1, "ns": 50}
    assert parts["queue"] == {"count": 2, "ns": 600}
    assert parts["compute_infer"] == {"count": 2, "ns": 1_000}
    assert parts["compute_output"] == {"count": 2, "ns": 300}
    assert parts["compute_input"] == {"count": 2, "ns": 700}
    total = sum(
        parts[p]["ns"] for p in ("queue", "compute_input", "compute_infer", "compute_output")
    )
    assert total == parts["success"]["ns"]
    assert parts["cache_hit"] == parts["cache_miss"] == {"count": 0, "ns": 0}
    assert found["inference_count"] == 3 and found["execution_count"] == 2
    [batch] = found["batch_stats"]
    assert batch["batch_size"] == 2 and batch["compute_infer"] == {"count": 2, "ns": 1_000}


# ---------------------------------------------------------------------------------- attacks

_EXTENTS = st.one_of(st.integers(-2, 6), st.sampled_from([2**31, 2**62, -(2**62)]))
_NAMES = st.sampled_from(["ids", "mask", "texts", "on", "", "x", "\udc80", "é" * 300])


@st.composite
def any_tensor(draw: st.DrawFn) -> NamedTensor:
    shape = tuple(draw(st.lists(_EXTENTS, max_size=4)))
    datatype = draw(st.sampled_from([*SIZES, "BYTES", "", "nonsense"]))
    return NamedTensor(draw(_NAMES), datatype, shape, draw(st.binary(max_size=80)))


@settings(max_examples=300, deadline=None)
@given(
    tensors=st.lists(any_tensor(), max_size=5),
    wanted=st.lists(_NAMES, max_size=3),
    which=st.integers(0, 2),
)
def test_nothing_that_a_client_sends_breaks_the_checks(
    tensors: list[NamedTensor], wanted: list[str], which: int
) -> None:
    several = (*TOKENS, Tensor("texts", BYTES, (2,), max_bytes=64), Tensor("on", "bool", ()))
    of = (TOY, form(several, lengths=(4, 16)), form((Tensor("on", "bool", ()),)))[which]
    request = Asked(model="m", inputs=tuple(tensors), wanted=tuple(map(Wanted, wanted)))
    try:
        rows = of.rows(request)
    except FrontError as error:
        assert error.status is Status.INVALID_ARGUMENT and len(error.text) < 2000
    else:
        assert 1 <= len(rows.frames) <= of.max_batch
