"""Several inputs and outputs, and length classes, on the CUDA device: on the driver in virtual time."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from fake_cuda import (
    GIVES,
    MS,
    TEXT_GIVES,
    TEXT_TAKES,
    FakeDriver,
    FakeProgram,
    VirtualClock,
    expected_row,
)
from slosched.codes import Code
from slosched.core.worker.interface import OpKind
from slosched.daemon.backends.checking import OneTensor, refuse_texts
from slosched.daemon.backends.contract import ModelRefused
from slosched.daemon.backends.cuda.driver import OutOfDeviceMemory
from slosched.daemon.backends.cuda.preparing import Bench, Source
from slosched.daemon.backends.cuda.program import Class, Use
from slosched.daemon.backends.layout import Layout, made_up
from slosched.errors import InvalidConfig
from slosched.signature import BYTES, Tensor, joined, split
from test_cuda_answers import _AlwaysOn
from test_cuda_device import EXEC_NS, PAGE, Rig, rows_of

LENGTHS = (4, 8, 16)


def text_rig(**more: Any) -> Rig:
    """A rig that has, beside "net", the model "text" of three length classes."""
    rig = Rig(pages=12, **more)
    rig.device._programs["text"] = FakeProgram(  # type: ignore[index]
        "text", rig.driver, PAGE + 7, EXEC_NS, lengths=LENGTHS
    )
    image = rig.driver.pinned_block(PAGE + 7)
    assert image.host is not None
    image.host[:] = np.random.default_rng(9).integers(0, 256, PAGE + 7)
    rig.device._copies._images["text"] = [image]  # type: ignore[index]
    rig.until(rig.launch(OpKind.LOAD_WEIGHTS, model_id=9, model_name="text"))
    rig.load()
    return rig


def request(length: int, seed: int) -> tuple[bytes, dict[str, Any]]:
    arrays = made_up(TEXT_TAKES, 1, seed, length=length, high=1000)
    own = {name: array[0] for name, array in arrays.items()}
    return bytes(joined([array.tobytes() for array in own.values()])), own


def expected(rig: Rig, own: dict[str, Any], length: int, of: int) -> bytes:
    """The frame that answers a request of `length` in the class of length `of`."""
    ids = np.zeros(of, np.int32)
    ids[:length] = own["ids"]
    host = rig.device._copies._images["text"][0].host
    assert host is not None
    crc = expected_row(host.tobytes(), ids.tobytes() + own["kind"].tobytes())
    return bytes(joined([crc, own["ids"].tobytes()]))


def test_answers_of_any_length_are_cut_to_it_beside_a_plain_model() -> None:
    rig, draw = text_rig(), random.Random(6)
    for action_id in range(150):
        count = draw.choice((1, 2, 3, 4))
        if draw.random() < 0.3:
            rows = rows_of(count, seed=action_id)
            assert rig.infer(action_id, rows) == [expected_row(rig.weights(0), r) for r in rows]
            continue
        of = draw.choice(LENGTHS)
        lengths = tuple(draw.randint(1, of) for _ in range(count))
        asked = [request(length, 100 * action_id + row) for row, length in enumerate(lengths)]
        shape: dict[str, Any] = {
            "batch_size": count,
            "request_count": count,
            "input_sizes": tuple(len(frame) for frame, _ in asked),
            "length": of,
            "lengths": lengths,
            "model_name": "text",
        }
        rig.device.keep_inputs(action_id, [frame for frame, _ in asked])
        for kind in (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT):
            done = rig.until(rig.launch(kind, action_id, 9, **shape))
            assert done.code == 0, done.reason
        found = [bytes(frame) for frame in rig.device.take_outputs(action_id)]
        assert done.output_sizes == tuple(map(len, found))
        wanted = [
            expected(rig, own, length, of) for (_, own), length in zip(asked, lengths, strict=True)
        ]
        assert found == wanted, f"action {action_id}"
        sum_, echo = split(TEXT_GIVES, lengths[0], found[0])
        assert (len(sum_), bytes(echo)) == (4, asked[0][1]["ids"].tobytes())


def test_a_frame_and_a_length_that_do_not_fit_fail_alone_and_hold_nothing() -> None:
    rig = text_rig()
    frame, _ = request(3, 1)
    for length, lengths, frames, words in (
        (8, (9,), [frame], "length 9 in a class of length 8"),
        (8, (5,), [frame], "19 bytes came, and ids int32[-1]"),
        (5, (3,), [frame], "no length class 5"),
    ):
        shape: dict[str, Any] = {
            "batch_size": 1,
            "request_count": 1,
            "input_sizes": (len(frame),),
            "length": length,
            "lengths": lengths,
            "model_name": "text",
        }
        rig.device.keep_inputs(1, frames)
        done = rig.until(rig.launch(OpKind.COPY_INPUT, 1, 9, **shape))
        assert done.code and words in done.reason
        rig.device.drop_inputs(1)
    done = rig.until(rig.launch(OpKind.EXEC, 2, 9, batch_size=1, length=5, model_name="text"))
    assert done.code == Code.RUNTIME_ERROR and "no length class 5" in done.reason
    program = rig.device._programs["text"]
    every = [buffers for each in program.classes for buffers in program.sets(each)]
    assert len(every) == 2 * 9 and all(buffers.use is Use.FREE for buffers in every)


# ------------------------------------------------------------------------------------ preparation


class Echoes(FakeProgram):
    """Its other output is a checksum of the first input's beginning, so padding does not change it."""

    ignored = True

    def _forward(self, inputs: Any) -> Any:
        results = super()._forward(inputs)
        if self.ignored:
            first = results[0]

            def action() -> None:
                first.array()[...] = inputs[1].array()[:, :1]

            self.driver.enqueue(self._stream, 1, action)
        return results


def prepared(
    kind: type[FakeProgram] = Echoes, *, max_exec_ns: int = 10**9, **said: Any
) -> tuple[FakeProgram, Any, list[str]]:
    clock = VirtualClock()
    driver = FakeDriver(clock)
    program = kind("text", driver, PAGE, {}, lengths=LENGTHS)
    program.exec_ns = {1: MS, 2: 2 * MS, 4: 3 * MS}
    program.answers_with(())  # not known before the check
    program.gives = TEXT_GIVES  # the fake's own names
    image = driver.pinned_block(PAGE)
    assert image.host is not None
    image.host[:] = np.random.default_rng(1).integers(0, 256, PAGE)
    bench = Bench(driver, _AlwaysOn(clock), driver.stream(-2), clock=clock)
    model = OneTensor("text", (), inputs=TEXT_TAKES, lengths=LENGTHS, **said)
    source = Source(program, image.host, model, True, ())
    notes: list[str] = []
    profile = bench.profile(source, image, [1, 2, 4], max_exec_ns=max_exec_ns, note=notes.append)
    return program, profile, notes


def test_every_class_of_batch_and_length_is_prepared_checked_and_measured() -> None:
    program, profile, notes = prepared()
    assert profile.inputs == TEXT_TAKES and profile.outputs == TEXT_GIVES
    assert {length: list(profile.times(length)) for length in profile.lengths} == {
        length: [1, 2, 4] for length in LENGTHS
    }
    assert len(program.classes) == 9 and all(map(program.captured, program.classes))
    assert "text batch 2 length 8: " in " ".join(notes)
    assert program.class_of(3, 16) == Class(4, 16) and program.class_of(9, 4) == Class(4, 4)
    assert program.sets(Class(2, 16))[0].takes.length == 16


def test_slow_classes_are_left_out_and_batch_1_of_each_length_stays() -> None:
    _, profile, _ = prepared(max_exec_ns=2 * MS + MS // 2)
    assert {length: list(profile.times(length)) for length in LENGTHS} == {
        length: [1, 2] for length in LENGTHS
    }
    _, profile, _ = prepared(max_exec_ns=1)
    assert all(list(profile.times(length)) == [1] for length in LENGTHS)


def test_no_room_for_batch_1_of_a_length_refuses_the_model_and_for_others_leaves_them_out() -> None:
    class Cramped(Echoes):
        full = (2, 8)

        def add_class(self, of: Class, *, capture: bool = True) -> None:
            if of == self.full:
                raise OutOfDeviceMemory("no room")
            super().add_class(of, capture=capture)

    _, profile, notes = prepared(Cramped)
    assert {length: list(profile.times(length)) for length in LENGTHS} == {
        4: [1, 2, 4],
        8: [1],
        16: [1, 2, 4],
    }
    assert any("batch 2 length 8 is left out: OutOfDeviceMemory: no room" in n for n in notes)
    Cramped.full = (1, 8)
    with pytest.raises(OutOfDeviceMemory):
        prepared(Cramped)


def test_an_answer_that_padding_changes_is_refused_here_too() -> None:
    with pytest.raises(ModelRefused, match=r"length 3 otherwise when it is padded to 4"):
        prepared(FakeProgram)
    _, profile, _ = prepared(FakeProgram, padding_changes_answers=True)
    assert profile.lengths == LENGTHS


def test_texts_are_not_for_a_gpu() -> None:
    texts = OneTensor("shouts", (), inputs=(Tensor("texts", BYTES, (2,), 64),))
    with pytest.raises(InvalidConfig, match=r"texts BYTES\[2\].*--device cpu.*a tokenizer"):
        refuse_texts(texts)
    refuse_texts(OneTensor("plain", (3,)))


def test_a_fixed_model_keeps_the_path_without_layouts() -> None:
    rig = Rig()
    (buffers, _) = rig.program.sets(Class(1))
    assert buffers.takes.plain and buffers.gives.plain
    assert Layout(GIVES).row_bytes == buffers.row_out
