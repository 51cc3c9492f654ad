"""Signatures at the client: arrays and texts to a frame and back, what is refused, and what goes out."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import numpy as np
import pytest

from fake_controller import FakeController, model_info
from slosched.clients.aio import connect
from slosched.clients.inference import Inference, Model
from slosched.clients.tensors import pack, unpack
from slosched.errors import InvalidRequest, RequestFailed
from slosched.loadgen.inputs import InputPool
from slosched.messages import InferReply, InferRequest, ModelInfo
from slosched.signature import Tensor, digest, element_bytes, joined, row_bytes, split

INPUTS = (Tensor("ids", "int64", (-1,)), Tensor("mask", "int64", (-1,)))
OUTPUTS = (Tensor("hidden", "float32", (-1, 2)), Tensor("logits", "float32", (3,)))


def info(
    inputs: tuple[Tensor, ...] = INPUTS,
    outputs: tuple[Tensor, ...] = OUTPUTS,
    lengths: tuple[int, ...] = (8, 16),
) -> ModelInfo:
    return msgspec.structs.replace(model_info(0), inputs=inputs, outputs=outputs, lengths=lengths)


def ids(length: int) -> np.ndarray[Any, Any]:
    return np.arange(length, dtype=np.int64)


def test_named_inputs_are_one_frame_and_its_length() -> None:
    packed = pack(info(), {"mask": ids(5) + 1, "ids": ids(5)})
    assert packed.length == 5
    first, second = split(INPUTS, 5, packed.frame)
    assert [*np.frombuffer(first, np.int64)] == [0, 1, 2, 3, 4]
    assert [*np.frombuffer(second, np.int64)] == [1, 2, 3, 4, 5]


def test_outputs_have_the_shapes_of_the_requests_own_length() -> None:
    hidden, logits = np.arange(10, dtype=np.float32), np.ones(3, np.float32)
    outputs = unpack(info(), joined([hidden.tobytes(), logits.tobytes()]), 5)
    assert outputs["hidden"].shape == (5, 2) and outputs["logits"].shape == (3,)
    assert [*outputs["hidden"][4]] == [8, 9] and outputs["hidden"].flags.writeable
    with pytest.raises(RequestFailed, match=r"hidden float32\[-1, 2\], logits"):
        unpack(info(), b"123", 5)


@pytest.mark.parametrize("inputs", [("é", "b"), [b"\xc3\xa9", b"b"], np.array(["é", "b"])])
def test_texts_and_bytes(inputs: Any) -> None:
    text = (Tensor("text", "BYTES", (2,), 20),)
    packed = pack(info(text, text, ()), list(inputs) if isinstance(inputs, tuple) else inputs)
    assert (packed.frame, packed.length) == (element_bytes([b"\xc3\xa9", b"b"]), 0)
    assert [*unpack(info(text, text, ()), packed.frame, 0)["text"]] == [b"\xc3\xa9", b"b"]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("given", ["hello", b"hello"])
def test_a_text_alone_is_taken_where_there_is_one_element(
    shape: tuple[int, ...], given: str | bytes
) -> None:
    text = (Tensor("text", "BYTES", shape, 20),)
    packed = pack(info(text, text, ()), given)
    assert unpack(info(text, text, ()), packed.frame, 0)["text"].item() == b"hello"


_TEXT = info((Tensor("text", "BYTES", (1,), 9),), lengths=())


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (info(), ids(5), "the model has 2 inputs: give a dict of ids, mask"),
        (info(), {"ids": ids(5)}, "it lacks mask"),
        (info(), {"ids": ids(5), "mask": ids(5), "masks": ids(5)}, "it has no masks"),
        (info(), {"ids": ids(5), "mask": ids(6)}, "of different lengths"),
        (info(), {"ids": ids(17), "mask": ids(17)}, "length 17 is longer than the longest"),
        (info(), {"ids": ids(0), "mask": ids(0)}, r"ids has the wrong shape \(0,\)"),
        (info(), {"ids": ids(5)[None], "mask": ids(5)}, "without its batch dimension"),
        (info(), {"ids": [1, 2], "mask": ids(2)}, "ids must be a numpy array, not list"),
        (info(), {"ids": ids(2).astype(np.int32), "mask": ids(2)}, r"astype\('int64'\)"),
        (_TEXT, [b"123456"], "has 10 bytes .* at most 9"),
        (_TEXT, ["a", "b"], r"of shape \(1,\), not \(2,\)"),
        (
            info((Tensor("text", "BYTES", (2,), 20),), lengths=()),
            "ab",
            r"of shape \(2,\), not \(\)",
        ),
        (_TEXT, [3], "takes texts or bytes, not int"),
        (_TEXT, ["\ud800"], "UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_the_signature(model: ModelInfo, given: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        pack(model, given)
    handle = Model(model, 7)
    assert handle.signature in str(caught.value)
    assert handle.inputs == model.inputs and handle.lengths == model.lengths


def test_several_outputs_have_no_single_one() -> None:
    reply = InferReply(1, 0, "", 0, 1, 1, True)
    outputs = {"hidden": np.ones(2), "logits": np.ones(3)}
    answer = Inference(Model(info(), 7), outputs, reply, 5)
    with pytest.raises(AttributeError, match="hidden, logits"):
        answer.output  # noqa: B018 - it raises
    assert Inference(Model(info(), 7), {}, reply, 5).output is None
    assert Inference(Model(info(), 7), {"a": outputs["hidden"]}, reply, 5).output is not None


def test_the_request_carries_the_signature_and_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_controller.model_info", lambda *_, **__: info())
    sent: list[bytes] = []
    heard = threading.Event()

    async def work() -> None:
        with FakeController() as controller:

            def infer(peer: bytes, message: InferRequest, frames: list[Any]) -> None:
                sent.extend(bytes(frame) for frame in frames)
                heard.set()

            monkeypatch.setattr(controller, "_infer", infer)
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                with pytest.raises(InvalidRequest):
                    await client.infer(model, {"ids": ids(5)})
                assert not controller.of(InferRequest)  # nothing is sent
                with pytest.raises(RequestFailed):
                    await client.infer(model, {"ids": ids(5), "mask": ids(5)}, timeout_s=0.3)
                [request] = controller.of(InferRequest)
                assert isinstance(request, InferRequest)
                assert (request.signature, request.length) == (digest(INPUTS), 5)
                assert request.shape == () and request.dtype == ""

    asyncio.run(asyncio.wait_for(work(), 30))
    assert heard.is_set() and [len(frame) for frame in sent] == [row_bytes(INPUTS, 5)]


def test_a_load_makes_inputs_of_a_given_length() -> None:
    text = (*INPUTS, Tensor("text", "BYTES", (2,), 30))
    pool = InputPool([info(text)], seed=1)
    for length in (0, 3, 16):
        parts = split(text, length or 16, pool.frame(0, 7, length))
        assert len(parts[0]) == 8 * (length or 16)
    assert pool.frame(0, 1, 3) != pool.frame(0, 2, 3)
    assert pool.frame(0, 1, 3) is pool.frame(0, 5, 3)  # made once
