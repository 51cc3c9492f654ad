"""A worker on the CPU with models of several inputs, of any length, and of texts, asked by messages."""

from __future__ import annotations

import pytest
from msgspec import structs

pytest.importorskip("torch")
pytest.importorskip("transformers")

from served_signatures import LENGTHS, MODELS, PLAIN, TOKENS, check_answers, load_all, worker
from slosched.codes import Code
from slosched.config import ModelSource
from slosched.messages import ErrorResult, InferResult
from slosched.signature import BYTES, Tensor, element_bytes, elements, split

pytestmark = [pytest.mark.torch, pytest.mark.processes]

TEXTS = ModelSource(
    "shouts",
    factory="cpu_models:Shouts",
    inputs=(Tensor("texts", BYTES, (2,), 64),),
    outputs=(Tensor("loud", BYTES, (2,), 64), Tensor("sizes", "int64", (2,))),
)


def test_answers_of_mixed_lengths_are_those_of_direct_forward_passes_beside_a_plain_model() -> None:
    with worker("cpu", MODELS[:2]) as controller:
        loaded = load_all(controller, ("pooled", "pairs", PLAIN))
        pooled = loaded["pooled"]
        assert pooled.inputs == TOKENS
        assert tuple(each.length for each in pooled.length_classes) == LENGTHS
        assert all(each.batch_sizes == (1, 2, 4, 8) for each in pooled.length_classes)
        assert [str(each) for each in pooled.outputs] == [
            "mean float32[16]",
            "tokens float32[-1, 16]",
        ]
        check_answers(controller, loaded, answers=200, tolerance=1e-4)
        made_up = structs.replace(controller.infer_message(3), length=24, lengths=(3, 9, 24))
        result = controller.ask(made_up)
        assert isinstance(result, InferResult) and result.output_sizes == ()


def test_texts_travel_and_a_frame_that_is_not_one_fails_alone() -> None:
    with worker("cpu", (TEXTS,)) as controller:
        loaded = controller.load("shouts")
        assert loaded.inputs == TEXTS.inputs and loaded.outputs == TEXTS.outputs
        frames = [element_bytes([b"good", b"day"]), element_bytes([b"", b"x" * 50])]
        sizes = tuple(map(len, frames))
        controller.send(controller.infer_message(2, sizes=sizes), *frames)
        result, found = controller.receive()
        assert isinstance(result, InferResult), result
        assert result.output_sizes == tuple(map(len, found))
        assert [elements(split(TEXTS.outputs, 0, frame)[0]) for frame in found] == [
            [b"GOOD", b"DAY"],
            [b"", b"X" * 50],
        ]
        broken = element_bytes([b"only one"])
        failed = controller.ask(controller.infer_message(1, sizes=(len(broken),)), broken)
        assert isinstance(failed, ErrorResult) and "cut off" in failed.reason
        assert failed.code in (Code.COPY_INPUT_BAD_SIZES, Code.COPY_INPUT_INVALID_INPUT)
