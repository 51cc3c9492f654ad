"""Right answers on the CPU: views, in-place operations, own state; refusals that say what was seen."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slosched.codes import Code
from slosched.config import ControllerConfig, ModelSource, SchedulerConfig, WorkerConfig
from slosched.core.worker.interface import OpKind
from slosched.daemon.controller import ControllerServer
from slosched.daemon.worker import WorkerServer

torch = pytest.importorskip("torch")

import slosched  # noqa: E402
from cpu_rig import CpuRig  # noqa: E402
from slosched.daemon.backends.contract import ModelRefused  # noqa: E402
from slosched.daemon.backends.cpu.measuring import check_model  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402
from slosched.daemon.backends.templates import Template  # noqa: E402

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


@pytest.mark.processes
@pytest.mark.quiet
def test_100000_answers_in_batches_are_their_own_requests() -> None:
    """Seven models, each in its process; several actions between their stages."""
    draw = random.Random(3)
    names = list(RIGHT)
    sources = [ModelSource(name, factory=name, input_shape=(WIDTH,)) for name in names]
    with CpuRig(sources) as rig:
        for model_id, name in enumerate(names):
            assert rig.prepare(name).code == 0
            assert rig.load(name, model_id).code == 0
        stages: list[tuple[int, str, list[Array], int]] = []  # action, model, rows, stages done
        compared = action = 0
        while compared < ANSWERS:
            if len(stages) < 5 and draw.random() < 0.5:
                action += 1
                name = draw.choice(names)
                count = draw.randint(1, 16)
                base = np.arange(count, dtype=np.float32)[:, None] * WIDTH + action * 1000 - 500
                rows = list(base + np.arange(WIDTH, dtype=np.float32))
                rig.backend.keep_inputs(action, [row.tobytes() for row in rows])
                stages.append((action, name, rows, 0))
                continue
            if not stages:
                continue
            place = draw.randrange(len(stages))
            number, name, rows, stage = stages.pop(place)
            sizes = (WIDTH * 4,) * len(rows)
            kind = (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT)[stage]
            done = rig.run(kind, name, names.index(name), number, sizes)
            assert done.code == 0, done.reason
            if stage < 2:
                stages.append((number, name, rows, stage + 1))
                continue
            frames = rig.backend.take_outputs(number, done.output_sizes)
            found = [np.frombuffer(frame, np.float32) for frame in frames]
            assert len(found) == len(rows)
            for row, answer in zip(rows, found, strict=True):
                assert (answer == RIGHT[name](row)).all(), (name, row, answer)
            compared += len(rows)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
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
@pytest.mark.quiet
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

    served(models, tmp_path, ask)


@pytest.mark.processes
@pytest.mark.quiet
def test_a_request_that_ends_its_process_is_tried_once_more_alone(tmp_path: Path) -> None:
    """Those beside it are answered rightly, by the process that comes after; so is another model."""
    models = (
        ModelSource("same", factory="torch.nn:Identity", input_shape=(200,)),
        ModelSource("aborts", factory="cpu_models:aborts", input_shape=(200,)),
    )

    async def ask(address: str) -> None:
        async with slosched.connect(address) as client:
            (same,) = await client.load("same")
            (aborts,) = await client.load("aborts")
            for culprit in (0, 7):
                inputs = [np.full(200, i / 16, np.float32) for i in range(12)]
                inputs[culprit][:] = 2
                found = await asyncio.gather(
                    *(client.infer(aborts, each, slo="20s") for each in inputs),
                    *(client.infer(same, each, slo="20s") for each in inputs),
                    return_exceptions=True,
                )
                for place, (sent, each) in enumerate(zip(inputs, found[:12], strict=True)):
                    if place == culprit:
                        assert isinstance(each, slosched.RequestFailed), each
                        assert each.code == Code.MODEL_PROCESS_ENDED
                        assert "signal 6" in str(each) and "once more, alone" in str(each)
                    else:
                        assert not isinstance(each, BaseException), each
                        assert each.output is not None and np.array_equal(each.output, sent * 2)
                for sent, each in zip(inputs, found[12:], strict=True):
                    assert not isinstance(each, BaseException), each
                    assert each.output is not None and np.array_equal(each.output, sent)

    said = served(models, tmp_path, ask)
    assert not any("lost" in line for line in said), said


def served(
    models: tuple[ModelSource, ...], folder: Path, ask: Callable[[str], Awaitable[None]]
) -> list[str]:
    """Run `ask` with a controller of one CPU worker that offers `models`; what the controller said."""
    said: list[str] = []
    with WorkerServer(
        WorkerConfig(device="cpu", port=0, bind="127.0.0.1", models=models)
    ) as worker:
        config = ControllerConfig(
            scheduler=SchedulerConfig(),
            workers=(f"127.0.0.1:{worker.port}",),
            port=0,
            bind="127.0.0.1",
            http_port=-1,
            log_dir=str(folder),
        )

        async def running() -> None:
            controller = ControllerServer(config, announce=said.append)
            await controller.start()
            serving = asyncio.create_task(controller.run())
            try:
                await ask(f"127.0.0.1:{controller.port}")
            finally:
                controller.stop()
                await asyncio.wait_for(serving, 10)

        asyncio.run(running())
    return said
