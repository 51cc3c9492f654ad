"""Right answers on the CPU: views, in-place operations, own state; refusals that say what was seen."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slosched.config import ControllerConfig, ModelSource, SchedulerConfig, WorkerConfig
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.controller import ControllerServer
from slosched.daemon.worker import WorkerServer

torch = pytest.importorskip("torch")

import slosched  # noqa: E402
from slosched.daemon.backends.contract import ModelRefused  # noqa: E402
from slosched.daemon.backends.measure import check_model  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402
from slosched.daemon.backends.templates import Template  # noqa: E402
from slosched.daemon.backends.torch_device import TorchDevice  # noqa: E402

pytestmark = pytest.mark.torch

WIDTH = 8
Array = Any
#: What each model answers to one row.
RIGHT: dict[str, Callable[[Array], Array]] = {
    "torch.nn:Identity": lambda x: x,
    "torch.nn:ReLU": lambda x: np.maximum(x, 0),
    "torch.nn:Flatten": lambda x: x,
    "cpu_models:Slice": lambda x: x[1:4],
    "cpu_models:InPlace": lambda x: np.maximum(x + 1, 0),
    "cpu_models:Counter": lambda x: x * 2 + 1,
    "cpu_models:Weights": lambda x: x[:1],
}
ANSWERS = 100_000


def template_of(factory: str, shape: tuple[int, ...] = (WIDTH,)) -> Template:
    return Template(source_spec(ModelSource("mine", factory=factory, input_shape=shape)))


class Device:
    """A device with all models of RIGHT, driven op by op, several actions between their stages."""

    def __init__(self) -> None:
        self.templates = {}
        for name in RIGHT:
            template = template_of(name)
            check_model(template)
            template.batch_sizes = (1, 2, 4, 8, 16)
            self.templates[name] = template
        self.device = TorchDevice(self.templates)
        self.next_op = 0
        for model_id, name in enumerate(RIGHT):
            self.run(OpKind.LOAD_WEIGHTS, name, model_id, 0, ())

    def run(
        self, kind: OpKind, name: str, model_id: int, action_id: int, sizes: tuple[int, ...]
    ) -> OpDone:
        self.next_op += 1
        count = len(sizes)
        self.device.launch(
            Op(self.next_op, kind, 0, model_id, action_id, count, count, sizes, name), now_ns=0
        )
        for _ in range(10_000):
            for done in self.device.poll(now_ns=0):
                assert done.code == 0, done.reason
                return done
        raise AssertionError("an op does not end")


def test_100000_answers_in_batches_are_their_own_requests() -> None:
    device, draw = Device(), random.Random(3)
    names = list(RIGHT)
    stages: list[tuple[int, str, list[Array], int]] = []  # action, model, rows, stages done
    compared = action = 0
    while compared < ANSWERS:
        if len(stages) < 5 and draw.random() < 0.5:
            action += 1
            name = draw.choice(names)
            count = draw.randint(1, 16)
            base = np.arange(count, dtype=np.float32)[:, None] * WIDTH + action * 1000 - 500
            rows = list(base + np.arange(WIDTH, dtype=np.float32))
            device.device.keep_inputs(action, [row.tobytes() for row in rows])
            stages.append((action, name, rows, 0))
            continue
        if not stages:
            continue
        place = draw.randrange(len(stages))
        number, name, rows, stage = stages.pop(place)
        sizes = (WIDTH * 4,) * len(rows)
        kind = (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT)[stage]
        device.run(kind, name, names.index(name), number, sizes)
        if stage < 2:
            stages.append((number, name, rows, stage + 1))
            continue
        found = [np.frombuffer(f, np.float32) for f in device.device.take_outputs(number)]
        assert len(found) == len(rows)
        for row, answer in zip(rows, found, strict=True):
            assert (answer == RIGHT[name](row)).all(), (name, row, answer)
        compared += len(rows)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("cpu_models:Several", r"answers with 2 tensors: 0 \[1, 8\], 1 \[1, 8\].*output ="),
        ("cpu_models:Swapped", r"a batch of 1 with the shape \[8, 1\].*movedim"),
        ("cpu_models:Squeezed", r"a batch of 1 with the shape \[8\].*squeeze\(dim\)"),
        ("cpu_models:Replaces", "replaces 'runs' in its forward"),
        ("cpu_models:Centred", "in one batch would change each other's answers"),
        ("cpu_models:Noisy", "answers the same input differently the second time.*eval mode"),
    ],
)
def test_a_model_that_cannot_be_served_in_batches_is_refused(factory: str, words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        check_model(template_of(factory))


def test_a_model_left_in_training_is_put_into_eval_mode() -> None:
    check_model(template_of("cpu_models:training"))


def test_own_state_is_named() -> None:
    template = template_of("cpu_models:Counter")
    check_model(template)
    assert template.own_state == ("runs",)


@pytest.mark.processes
def test_each_of_many_at_once_reads_its_own_answer_and_only_the_culprit_its_error(
    tmp_path: Path,
) -> None:
    """Over real sockets, 64 at a time; one input in each round makes the model want to exit."""
    models = tuple(
        ModelSource(name, factory=factory, input_shape=(200,))
        for name, factory in (
            ("leaves", "sys:exit"),
            ("same", "torch.nn:Identity"),
            ("exits", "cpu_models:Exits"),
        )
    )

    async def ask(address: str) -> None:
        async with slosched.connect(address) as client:
            for _ in range(2):  # and the next load goes on
                with pytest.raises(slosched.RequestFailed, match="wants to end the process"):
                    await client.load("leaves")
            (same,) = await client.load("same")
            (exits,) = await client.load("exits")
            for base in range(0, 640, 64):
                inputs = [np.full(200, base + i, np.float32) for i in range(64)]
                answers = await asyncio.gather(
                    *(client.infer(same, each, slo="20s") for each in inputs)
                )
                for sent, answer in zip(inputs, answers, strict=True):
                    assert answer.output is not None and np.array_equal(answer.output, sent)
            for culprit in (0, 5, 11):
                inputs = [np.full(200, i / 16, np.float32) for i in range(12)]
                inputs[culprit][:] = 2
                found = await asyncio.gather(
                    *(client.infer(exits, each, slo="20s") for each in inputs),
                    return_exceptions=True,
                )
                for place, (sent, each) in enumerate(zip(inputs, found, strict=True)):
                    if place == culprit:
                        assert isinstance(each, slosched.RequestFailed) and "SystemExit" in str(
                            each
                        )
                    else:
                        assert not isinstance(each, BaseException), each
                        assert each.output is not None and np.array_equal(each.output, sent * 2)

    with WorkerServer(
        WorkerConfig(device="cpu", port=0, bind="127.0.0.1", models=models)
    ) as worker:
        config = ControllerConfig(
            scheduler=SchedulerConfig(),
            workers=(f"127.0.0.1:{worker.port}",),
            port=0,
            bind="127.0.0.1",
            http_port=-1,
            log_dir=str(tmp_path),
        )

        async def served() -> None:
            controller = ControllerServer(config, announce=lambda line: None)
            await controller.start()
            serving = asyncio.create_task(controller.run())
            try:
                await ask(f"127.0.0.1:{controller.port}")
            finally:
                controller.stop()
                await asyncio.wait_for(serving, 10)

        asyncio.run(served())
