"""Right answers on the CUDA device: memory that must outlive a run, own state, and the check before serving.

On the driver in virtual time, whose runs write over the pool that all programs share.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from fake_cuda import MS, ROW_IN, FakeDriver, FakeProgram, VirtualClock, expected_row
from slosched.core.worker.interface import OpKind
from slosched.daemon.backends.checking import OneTensor
from slosched.daemon.backends.contract import ModelRefused
from slosched.daemon.backends.cuda.driver import OutOfDeviceMemory, Stream
from slosched.daemon.backends.cuda.preparing import Bench, Source
from slosched.daemon.backends.cuda.program import BufferSet, Class
from slosched.daemon.backends.cuda.recorded import Arrays
from slosched.errors import InvalidConfig
from slosched.signature import ONLY_OUTPUT
from test_cuda_device import EXEC_NS, PAGE, Rig, rows_of

Array = Any


class OutputInPool(FakeProgram):
    """Its set's output is the result as the model made it, in the pool: as programs once were."""

    def _steps(self, buffers: BufferSet, stream: Stream) -> None:
        (result,) = self._forward(self._inputs(buffers))
        buffers.output = result.address


def overlapped(program: FakeProgram, rig: Rig) -> tuple[list[bytes], list[bytes]]:
    """(answers, what they should be) of two batches, the second armed behind the first, as under load."""
    rig.device._programs["net"] = program  # type: ignore[index]
    rig.load()
    rows = [rows_of(1, seed=1), rows_of(1, seed=2)]
    shape: dict[str, Any] = {"batch_size": 1, "request_count": 1, "input_sizes": (ROW_IN,)}
    for action_id in (0, 1):
        rig.device.keep_inputs(action_id, rows[action_id])
        rig.until(rig.launch(OpKind.COPY_INPUT, action_id, **shape))
    due_ns = rig.clock.now_ns + 500_000
    first = rig.launch(OpKind.EXEC, 0, earliest_ns=due_ns, **shape)
    second = rig.launch(OpKind.EXEC, 1, earliest_ns=due_ns, **shape)
    rig.until(first)  # the second runs by now
    outputs = []
    for action_id, op in ((0, first), (1, second)):
        rig.until(op)
        rig.until(rig.launch(OpKind.COPY_OUTPUT, action_id, **shape))
        outputs += [bytes(each) for each in rig.device.take_outputs(action_id)]
    return outputs, [expected_row(rig.weights(0), each[0]) for each in rows]


@pytest.mark.parametrize("capture", [True, False])
def test_an_output_is_still_its_own_when_the_next_run_has_begun(capture: bool) -> None:
    rig = Rig()
    program = FakeProgram("net", rig.driver, rig.weights_bytes, EXEC_NS, capture=capture)
    found, wanted = overlapped(program, rig)
    assert found == wanted


def test_the_fake_notices_an_output_that_lies_where_other_runs_write() -> None:
    rig = Rig()
    program = OutputInPool("net", rig.driver, rig.weights_bytes, EXEC_NS)
    found, wanted = overlapped(program, rig)
    assert found != wanted


def test_several_programs_share_one_pool_and_answer_rightly_at_random() -> None:
    rig = Rig(pages=12)
    draw = random.Random(5)
    names = ("a", "b", "c")
    for number, name in enumerate(names):
        capture = name != "c"
        rig.device._programs[name] = FakeProgram(  # type: ignore[index]
            name, rig.driver, 300 + number, EXEC_NS, capture=capture
        )
        image = rig.driver.pinned_block(300 + number)
        assert image.host is not None
        image.host[:] = number + 1
        rig.device._copies._images[name] = [image]  # type: ignore[index]
        rig.until(rig.launch(OpKind.LOAD_WEIGHTS, model_id=number, model_name=name))
    for action_id in range(200):
        number = draw.randrange(len(names))
        rows = rows_of(draw.choice((1, 2, 3, 4)), seed=action_id)
        shape: dict[str, Any] = {
            "batch_size": len(rows),
            "request_count": len(rows),
            "input_sizes": (ROW_IN,) * len(rows),
            "model_name": names[number],
        }
        rig.device.keep_inputs(action_id, rows)
        rig.until(rig.launch(OpKind.COPY_INPUT, action_id, number, **shape))
        rig.until(rig.launch(OpKind.EXEC, action_id, number, **shape))
        other = draw.randrange(len(names))  # begins before the output is fetched
        more = rig.launch(
            OpKind.EXEC, 10_000 + action_id, other, batch_size=1, model_name=names[other]
        )
        rig.until(rig.launch(OpKind.COPY_OUTPUT, action_id, number, **shape))
        weights = bytes([number + 1]) * (300 + number)
        found = [bytes(each) for each in rig.device.take_outputs(action_id)]
        assert found == [expected_row(weights, row) for row in rows], f"action {action_id}"
        rig.until(more)


def test_own_state_is_fresh_in_each_run_even_for_an_only_instance() -> None:
    rig = Rig(images=1)
    program = FakeProgram("net", rig.driver, rig.weights_bytes, EXEC_NS, spoils=True)
    rig.device._programs["net"] = program  # type: ignore[index]
    rig.device.instances["net"] = 1
    rig.load()
    for action_id in range(4):
        rows = rows_of(2, seed=action_id)
        wanted = [expected_row(rig.weights(0), row) for row in rows]
        assert rig.infer(action_id, rows) == wanted


def test_weights_of_ordinary_size_are_copied_for_each_run_whatever_was_seen_of_the_model() -> None:
    rig = Rig(images=1, stay_bytes=2**20)
    program = FakeProgram("net", rig.driver, rig.weights_bytes, EXEC_NS, spoils=True)
    program.keeps_weights = True  # it spoiled nothing while it was looked at
    rig.device._programs["net"] = program  # type: ignore[index]
    rig.device.instances["net"] = 1
    rig.load()
    for action_id in range(3):
        rows = rows_of(1, seed=action_id)
        assert rig.infer(action_id, rows) == [expected_row(rig.weights(0), rows[0])]


# ------------------------------------------------------------------------- the check before serving


class _AlwaysOn:
    """A background thread that has all the time there is; a pause takes longer than a reading of the clock."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def until_idle(self, for_ns: int) -> None:
        pass

    def pause(self) -> None:
        self._clock.now_ns += 50_000

    @contextmanager
    def uncut(self) -> Iterator[None]:
        yield


class Mixing(FakeProgram):
    """A model whose rows depend on the whole batch."""

    def run_rows(self, rows: Arrays) -> Arrays:
        answers = super().run_rows(rows)
        answers[ONLY_OUTPUT][0] ^= len(answers[ONLY_OUTPUT])
        return answers


class WrongInLargeBatches(FakeProgram):
    """Served batches above 1 differ from plain execution, captured or not."""

    def _steps(self, buffers: BufferSet, stream: Stream) -> None:
        super()._steps(buffers, stream)
        if buffers.batch > 1:
            junk = self.driver.pool(1)
            self._driver.copy(buffers.output, junk, 1, stream)


def profiled(
    kind: type[FakeProgram] = FakeProgram, **how: Any
) -> tuple[FakeProgram, dict[int, int], list[str]]:
    clock = VirtualClock()
    driver = FakeDriver(clock)
    program = kind("net", driver, PAGE, {}, **how)
    program.exec_ns = {1: MS, 2: 2 * MS, 4: 3 * MS}
    image = driver.pinned_block(PAGE)
    assert image.host is not None
    image.host[:] = np.random.default_rng(1).integers(0, 256, PAGE)
    bench = Bench(driver, _AlwaysOn(clock), driver.stream(-2), clock=clock)
    source = Source(program, image.host, OneTensor("net", (ROW_IN,), "uint8"), True, ())
    notes: list[str] = []
    profile = bench.profile(source, image, [1, 2, 4], max_exec_ns=10**9, note=notes.append)
    return program, dict(profile.exec_ns), notes


def test_a_model_that_answers_rightly_is_offered_in_all_classes_as_graphs() -> None:
    program, exec_ns, _ = profiled()
    assert list(exec_ns) == [1, 2, 4] and all(map(program.captured, program.classes))
    assert program.keeps_weights and not program.changed and not program.left_out


def test_a_graph_that_keeps_something_in_the_pool_is_found_and_run_by_plain_execution() -> None:
    program, exec_ns, notes = profiled(remembers=True)
    assert list(exec_ns) == [1, 2, 4] and not any(map(program.captured, program.classes))
    assert "answered wrongly" in program.not_captured
    assert sum("plain execution" in note for note in notes) == 3


def test_own_state_is_found_and_named() -> None:
    program, exec_ns, _ = profiled(spoils=True)
    assert program.changed == ("counter",) and not program.keeps_weights
    assert list(exec_ns) == [1, 2, 4]


def test_a_class_that_differs_from_plain_execution_is_not_offered() -> None:
    program, exec_ns, notes = profiled(WrongInLargeBatches)
    assert list(exec_ns) == [1] and program.classes == (Class(1),)
    assert program.left_out == ("batch 2 answers wrongly", "batch 4 answers wrongly")
    assert any("batch 4 is not offered" in note for note in notes)


def test_a_model_whose_rows_depend_on_the_batch_is_refused() -> None:
    with pytest.raises(ModelRefused, match="in one batch"):
        profiled(Mixing)


def test_a_model_that_raises_is_refused_with_its_words_and_no_memory_is_memory() -> None:
    class Raising(FakeProgram):
        def run_rows(self, rows: Arrays) -> Arrays:
            raise self.kind

        kind: Exception = ValueError("shapes do not fit")

    with pytest.raises(InvalidConfig, match=r"ValueError: shapes do not fit.*correct input_shape"):
        profiled(Raising)
    Raising.kind = TypeError("forward() missing 1 required positional argument: 'mask'")
    with pytest.raises(
        InvalidConfig, match=r"one tensor of uint8 .batch, 16.: it wants more inputs"
    ):
        profiled(Raising)
    for kind in (OutOfDeviceMemory, torch.cuda.OutOfMemoryError, MemoryError):
        Raising.kind = kind("no room")
        with pytest.raises(OutOfDeviceMemory, match="no room"):
            profiled(Raising)


def test_a_class_that_fails_gives_its_memory_back() -> None:
    rig = Rig()
    program = FakeProgram("net", rig.driver, PAGE, {1: MS})
    before = len(rig.driver._memory)

    def fail(inputs: Any) -> Any:
        raise ValueError("no such batch")

    program._warm_up = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no such batch"):
        program.add_class(Class(2))
    assert len(rig.driver._memory) == before and program.classes == (Class(1),)
    program.drop_class(Class(1))
    assert len(rig.driver._memory) < before
