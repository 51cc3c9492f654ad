"""Several inputs and outputs, length classes and texts on the CPU, compared with direct forward passes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from slosched.codes import Code
from slosched.config import ModelSource
from slosched.core.worker.interface import OpKind
from slosched.errors import InvalidConfig
from slosched.signature import BYTES, Tensor, element_bytes, elements, joined, split

torch = pytest.importorskip("torch")

import cpu_models  # noqa: E402
from cpu_rig import CpuRig  # noqa: E402
from slosched.daemon.backends.contract import ModelRefused  # noqa: E402
from slosched.daemon.backends.cpu.measuring import check_model  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402
from slosched.daemon.backends.templates import Template  # noqa: E402

pytestmark = pytest.mark.torch

LENGTHS = (8, 16, 32)
ANSWERS = 20_000
TOKENS = (Tensor("ids", "int64", (-1,)), Tensor("mask", "int64", (-1,)))
PAIR = (
    Tensor("image", "float32", (3, 5)),
    Tensor("place", "int16", ()),
    Tensor("on", "bool", (7,)),
)
POOLED = ModelSource("pooled", factory="cpu_models:Pooled", inputs=TOKENS, lengths=LENGTHS)
PAIRS = ModelSource("pairs", factory="cpu_models:Pairs", inputs=PAIR)
PLAIN = ModelSource("plain", factory="cpu_models:InPlace", input_shape=(6,))
SHOUTS = ModelSource(
    "shouts",
    factory="cpu_models:Shouts",
    inputs=(Tensor("texts", BYTES, (2,), 64),),
    outputs=(Tensor("loud", BYTES, (2,), 64), Tensor("sizes", "int64", (2,))),
)
DIRECT = {
    "pooled": cpu_models.Pooled().eval(),
    "pairs": cpu_models.Pairs().eval(),
    "plain": cpu_models.InPlace().eval(),
}


def direct(name: str, arrays: dict[str, Any]) -> bytes:
    """The frame of the answer to one request, by a forward pass at its own length."""
    given = {key: torch.from_numpy(array.copy())[None] for key, array in arrays.items()}
    with torch.inference_mode():
        found = DIRECT[name](**given) if len(given) > 1 else DIRECT[name](*given.values())
    tensors = (
        list(found.values())
        if isinstance(found, dict)
        else [found]
        if name == "plain"
        else list(found)
    )
    return bytes(joined([tensor[0].contiguous().numpy().tobytes() for tensor in tensors]))


def request_of(name: str, draw: np.random.Generator) -> tuple[dict[str, Any], int]:
    if name == "pooled":
        length = int(min(LENGTHS[-1], 1 + draw.exponential(7)))
        ids = draw.integers(0, 1000, length)
        return {"ids": ids, "mask": np.ones(length, np.int64)}, length
    if name == "pairs":
        image = draw.random((3, 5), dtype=np.float32)
        place = draw.integers(0, 99, ()).astype(np.int16)
        return {"image": image, "place": np.asarray(place), "on": draw.random(7) < 0.5}, 0
    return {"x": draw.random(6, dtype=np.float32)}, 0


def close(frame: bytes, wanted: bytes, name: str) -> bool:
    if name == "pairs":
        return frame == wanted
    found, right = (np.frombuffer(each, np.float32) for each in (frame, wanted))
    return found.shape == right.shape and bool(np.allclose(found, right, atol=1e-5))


@pytest.mark.processes
def test_20000_answers_of_any_length_in_batches_are_those_of_direct_forward_passes() -> None:
    """Three models; several actions between their stages, requests in classes longer than themselves."""
    draw, numbers = random.Random(4), np.random.default_rng(4)
    names = list(DIRECT)
    with CpuRig([POOLED, PAIRS, PLAIN]) as rig:
        for model_id, name in enumerate(names):
            prepared = rig.prepare(name)
            assert prepared.code == 0, prepared.reason
            assert rig.load(name, model_id).code == 0
        stages: list[tuple[int, str, list[Any], dict[str, Any], int]] = []
        compared = action = 0
        while compared < ANSWERS:
            if len(stages) < 5 and draw.random() < 0.5:
                action += 1
                name = draw.choice(names)
                asked = [request_of(name, numbers) for _ in range(draw.randint(1, 16))]
                frames = [
                    bytes(joined([array.tobytes() for array in arrays.values()]))
                    for arrays, _ in asked
                ]
                lengths = tuple(length for _, length in asked)
                fitting = [length for length in LENGTHS if length >= max(lengths)]
                op: dict[str, Any] = {"sizes": tuple(map(len, frames))}
                if lengths[0]:
                    op |= {"length": draw.choice(fitting), "lengths": lengths}
                rig.backend.keep_inputs(action, frames)
                stages.append((action, name, [arrays for arrays, _ in asked], op, 0))
                continue
            if not stages:
                continue
            number, name, requests, op, stage = stages.pop(draw.randrange(len(stages)))
            kind = (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT)[stage]
            done = rig.run(kind, name, names.index(name), number, **op)
            assert done.code == 0, done.reason
            if stage < 2:
                stages.append((number, name, requests, op, stage + 1))
                continue
            answers = rig.backend.take_outputs(number, done.output_sizes)
            assert len(answers) == len(requests)
            for arrays, answer in zip(requests, answers, strict=True):
                assert close(bytes(answer), direct(name, arrays), name), (name, arrays)
            compared += len(requests)


# ------------------------------------------------------------------------------- what is prepared


@pytest.fixture(scope="module")
def rig() -> Iterator[CpuRig]:
    with CpuRig([POOLED, PAIRS, SHOUTS, PLAIN]) as rig:
        yield rig


@pytest.mark.processes
def test_the_signature_of_a_prepared_model(rig: CpuRig) -> None:
    profile = rig.prepare("pooled", max_batch=4).profile
    assert profile is not None and profile.inputs == TOKENS and profile.lengths == LENGTHS
    assert profile.outputs == (
        Tensor("mean", "float32", (16,)),
        Tensor("tokens", "float32", (-1, 16)),
    )
    assert all(list(profile.times(length)) == [1, 2, 4] for length in LENGTHS)
    assert profile.exec_ns == profile.times(32) and profile.input_shape == (32,)
    profile = rig.prepare("pairs", max_batch=2).profile
    assert profile is not None and (profile.inputs, profile.lengths) == (PAIR, ())
    assert profile.outputs == (
        Tensor("output_0", "float32", (15,)),
        Tensor("output_1", "bool", (7,)),
    )
    profile = rig.prepare("plain", max_batch=2).profile
    assert profile is not None and (profile.inputs, profile.outputs) == ((), ())


@pytest.mark.processes
def test_texts_in_and_out_and_one_that_is_too_long(rig: CpuRig) -> None:
    prepared = rig.prepare("shouts", max_batch=4)
    assert prepared.code == 0 and prepared.profile is not None, prepared.reason
    assert prepared.profile.outputs == SHOUTS.outputs and prepared.profile.inputs == SHOUTS.inputs
    assert rig.load("shouts", 7).code == 0
    asked = [["hello", ""], ["wörld", "a" * 40], ["x", "y"]]
    frames = [element_bytes([text.encode() for text in row]) for row in asked]
    done, answers = rig.ask("shouts", frames, 7)
    assert done.code == 0, done.reason
    for row, answer in zip(asked, answers, strict=True):
        loud, sizes = split(SHOUTS.outputs, 0, answer)
        assert elements(loud) == [text.upper().encode() for text in row]
        assert np.frombuffer(sizes, np.int64).tolist() == [len(text.encode()) for text in row]
    done, _ = rig.ask("shouts", [element_bytes([b"a" * 40, b"b" * 30])], 7)
    assert done.code == Code.COPY_INPUT_BAD_SIZES and "at most 64 are allowed" in done.reason
    swelling = element_bytes(["ß".encode() * 10, "ŉ".encode() * 17])  # upper case takes more room
    done, _ = rig.ask("shouts", [swelling], 7)
    assert done.code == Code.RUNTIME_ERROR and "loud BYTES[2] has" in done.reason
    assert rig.ask("shouts", frames, 7)[0].code == 0


@pytest.mark.processes
def test_frames_and_lengths_that_do_not_fit_fail_alone(rig: CpuRig) -> None:
    assert rig.prepare("pooled").code == 0 and rig.load("pooled", 3).code == 0
    frame = bytes(joined([np.ones(5, np.int64).tobytes()] * 2))
    done, answers = rig.ask("pooled", [frame], 3, length=8, lengths=(5,))
    assert done.code == 0 and len(answers[0]) == 64 + 5 * 64
    for length, lengths, words in (
        (8, (9,), "length 9 in a class of length 8"),
        (8, (4,), "came, and ids int64"),
        (12, (5,), "no length class 12"),
        (0, (), "no length class 0"),
    ):
        done, _ = rig.ask("pooled", [frame], 3, length=length, lengths=lengths)
        assert done.code and words in done.reason, done
    made_up, answers = rig.ask("pooled", [b"", frame], 3, length=16, lengths=(3, 5))
    assert made_up.code == 0 and len(answers) == 1 and made_up.output_sizes[0] == 0


# ----------------------------------------------------------------------------------- what is refused


def check(factory: str, inputs: tuple[Tensor, ...], **more: Any) -> tuple[Tensor, ...]:
    source = ModelSource("mine", factory=factory, inputs=inputs, **more)
    return check_model(Template(source_spec(source)))


SIGNAL = (Tensor("x", "float32", (-1,)),)


def test_an_answer_that_depends_on_padding_is_refused_unless_that_is_said_to_be_right() -> None:
    with pytest.raises(ModelRefused, match=r"length 6 otherwise when it is padded to 8.*a mask"):
        check("cpu_models:Unmasked", SIGNAL, lengths=(8, 16))
    gives = check("cpu_models:Unmasked", SIGNAL, lengths=(8, 16), padding_changes_answers=True)
    assert gives == (Tensor("output", "float32", ()),)
    with pytest.raises(ModelRefused, match="otherwise when it is padded"):
        check("cpu_models:Pooled", TOKENS, lengths=LENGTHS, pads={"mask": 1.0})


def test_outputs_that_vary_otherwise_than_the_length_are_refused() -> None:
    with pytest.raises(
        ModelRefused, match=r"'output' of shape \[4\] at length 8.*must be the length"
    ):
        check("cpu_models:Halves", SIGNAL, lengths=(8, 16), padding_changes_answers=True)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ((Tensor("nope", "float32", (16,)),), "no output 'nope'; it has mean"),
        (
            (Tensor("mean", "float32", (17,)),),
            r"declared as mean float32\[17\].*it is mean float32\[16\]",
        ),
        ((Tensor("tokens", "float32", (8, 16)),), r"at length 16 it is tokens float32\[16, 16\]"),
    ],
)
def test_outputs_that_are_declared_wrongly(outputs: tuple[Tensor, ...], words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        check("cpu_models:Pooled", TOKENS, lengths=(8, 16), outputs=outputs)


def test_declared_outputs_alone_are_served_in_their_order() -> None:
    outputs = (Tensor("tokens", "float32", (-1, 16)), Tensor("mean", "float32", (16,)))
    assert check("cpu_models:Pooled", TOKENS, lengths=(8,), outputs=outputs) == outputs
    assert check("cpu_models:Pooled", TOKENS, lengths=(8,), output="mean") == outputs[1:]


@pytest.mark.parametrize(
    ("factory", "inputs", "words"),
    [
        (
            "cpu_models:Pooled",
            (Tensor("ids", "int64", (4,)), Tensor("z", "int8", ())),
            "does not take these names.*'z'",
        ),
        (
            "cpu_models:Pairs",
            PAIR[:2],
            r"on image float32\[3, 5\], place int16\[\]: it wants more.*'on'",
        ),
        (
            "cpu_models:Pooled",
            (Tensor("ids", "float32", (4,)), Tensor("mask", "int64", (4,))),
            'dtype = "int64" in the table of that input',
        ),
        (
            "cpu_models:Pooled",
            (Tensor("ids", "int64", (4,)), Tensor("mask", "int64", (5,))),
            r"ids int64\[4\], mask int64\[5\].*correct shape",
        ),
    ],
)
def test_a_forward_that_takes_something_else_says_what_is_possible(
    factory: str, inputs: tuple[Tensor, ...], words: str
) -> None:
    with pytest.raises(InvalidConfig, match=words):
        check(factory, inputs)
