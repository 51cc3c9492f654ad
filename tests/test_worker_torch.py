"""Real inference on the CPU through the worker: outputs equal a direct forward, heartbeats go on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from slosched.codes import Code
from slosched.config import ModelSource, WorkerConfig
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    ErrorResult,
    EvictWeights,
    EvictWeightsResult,
    InferResult,
    LoadModel,
    LoadModelResult,
    LoadWeightsResult,
    WorkerWelcome,
)
from slosched.units import NS_PER_MS, NS_PER_S
from worker_rig import FOREVER_NS, BareController

pytest.importorskip("torch")
pytest.importorskip("transformers")

from slosched.daemon.backends import reference_forward
from slosched.daemon.worker import WorkerServer

pytestmark = [pytest.mark.torch, pytest.mark.processes]

OWN = (
    ModelSource("mine", factory="test_zoo:tiny_net", input_shape=(4,)),
    ModelSource("broken", factory="test_zoo:no_net", input_shape=(4,)),
    ModelSource("slow", factory="cpu_models:Slow", input_shape=(4,)),
    ModelSource("half", factory="test_zoo:tiny_net", input_shape=(4,), dtype="bfloat16"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[WorkerServer]:
    config = WorkerConfig(
        device="cpu",
        port=0,
        bind="127.0.0.1",
        models=OWN,
        page_bytes=2**20,
        weights_cache_bytes=64 * 2**20,
    )
    with WorkerServer(config) as server:
        yield server


# Never an `id()`: an address comes back once its object is freed, and the worker would then take the
# next test's controller for the last one and keep its models.
INCARNATIONS = count(1)


@pytest.fixture
def controller(server: WorkerServer) -> Iterator[BareController]:
    controller = BareController(server.port)
    hello = ControllerHello(PROTOCOL_VERSION, incarnation=next(INCARNATIONS), times_lost=0)
    welcome = None
    for _ in range(100):
        # Earlier tests' controllers are silent; this worker need not give each of them its second.
        server._brain._link._heard_ns = 0
        welcome = controller.ask(hello)
        if isinstance(welcome, WorkerWelcome):
            break
    assert isinstance(welcome, WorkerWelcome), welcome
    controller.session = welcome.session
    yield controller
    controller.close()


def infer(controller: BareController, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
    sizes = (inputs[0].nbytes,) * len(inputs)
    message = controller.infer_message(len(inputs), sizes=sizes)
    controller.send(message, *(row.tobytes() for row in inputs))
    result, frames = controller.receive()
    assert isinstance(result, InferResult), result
    assert result.output_sizes == tuple(len(frame) for frame in frames)
    assert result.exec.duration_ns > 0
    return np.stack([np.frombuffer(frame, np.float32) for frame in frames])


def test_outputs_equal_a_direct_forward_for_every_batch_size_and_after_a_reload(
    controller: BareController,
) -> None:
    loaded = controller.load("resnet_tiny")
    assert loaded.batch_sizes == (1, 2, 4, 8) and loaded.random_weights
    assert loaded.weights_bytes <= loaded.pages * 2**20
    random = np.random.default_rng(1)
    for life in range(2):
        for batch in (1, 2, 3, 4, 5, 8):  # 3 and 5 are padded
            inputs = random.random((batch, 3, 64, 64), dtype=np.float32)
            difference = np.abs(
                infer(controller, inputs) - reference_forward("resnet_tiny", inputs)
            )
            assert difference.max() < 1e-4, f"life {life}, batch {batch}"
        evict = EvictWeights(
            controller.session,
            controller.action_id(),
            model_id=0,
            gpu_id=0,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
        assert isinstance(controller.ask(evict), EvictWeightsResult)
        gone = controller.ask(controller.infer_message(1))
        assert isinstance(gone, ErrorResult) and gone.code == Code.EXEC_WEIGHTS_MISSING
        assert isinstance(controller.load_weights(), LoadWeightsResult)


def test_requests_without_inputs_run_on_made_up_ones_and_have_no_outputs(
    controller: BareController,
) -> None:
    controller.load("resnet_tiny")
    controller.send(controller.infer_message(4))
    result, frames = controller.receive()
    assert isinstance(result, InferResult) and (result.output_sizes, frames) == ((), [])


def test_a_batch_that_mixes_both(controller: BareController) -> None:
    controller.load("resnet_tiny")
    row = np.random.default_rng(2).random((3, 64, 64), dtype=np.float32)
    message = controller.infer_message(3, sizes=(0, row.nbytes, 0))
    controller.send(message, row.tobytes())
    result, frames = controller.receive()
    assert isinstance(result, InferResult) and result.output_sizes == (0, 4000, 0)
    output = np.frombuffer(frames[0], np.float32)
    assert np.abs(output - reference_forward("resnet_tiny", row)).max() < 1e-4


# Sleeps 10 ms at a time until its input ends, then says how much longer the longest sleep was, ns.
SLEEPER = """
import select, sys, time
worst = 0
while True:
    before = time.monotonic_ns()
    if select.select([sys.stdin], [], [], 0.01)[0]:
        break
    worst = max(worst, time.monotonic_ns() - before - 10_000_000)
print(worst)
"""


@contextmanager
def other_process_held_up() -> Iterator[list[int]]:
    """By how many ns at most a process that only sleeps was held up meanwhile (in the list, after)."""
    held_up: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sleeper:
        yield held_up
        held_up.append(int(sleeper.communicate(timeout=20)[0]))


def test_the_heartbeat_goes_on_while_a_model_is_built_and_measured(
    controller: BareController,
) -> None:
    with other_process_held_up() as held_up:
        controller.load("resnet18", max_exec_ns=100 * NS_PER_MS)
    assert longest_silence_ns(controller) < 700 * NS_PER_MS + 2 * held_up[0]
    assert any(beat.activity == "preparing resnet18" for _, beat in controller.beats)


def test_the_heartbeat_goes_on_while_a_forward_takes_a_second(controller: BareController) -> None:
    with other_process_held_up() as held_up:
        loaded = controller.load("slow")
        inputs = np.random.default_rng(5).random((1, 4), dtype=np.float32)
        assert np.array_equal(infer(controller, inputs), inputs * 2)
    assert loaded.batch_sizes == (1,) and loaded.exec_ns[0] > 900 * NS_PER_MS
    assert longest_silence_ns(controller) < 700 * NS_PER_MS + 2 * held_up[0]


def longest_silence_ns(controller: BareController) -> int:
    """Between two heartbeats. They are due each 200 ms, and a worker silent for 800 is given up.

    When the machine holds up every process (two cores, other tests beside us), the worker is not at fault.
    """
    times = [beat.sent_ns for _, beat in controller.beats]
    return max(later - earlier for earlier, later in pairwise(times))


def test_an_operators_model_and_its_precision(controller: BareController) -> None:
    from test_zoo import tiny_net

    inputs = np.random.default_rng(3).random((2, 4), dtype=np.float32)
    import torch

    expected = tiny_net()(torch.from_numpy(inputs)).detach().numpy()
    assert controller.load("mine").random_weights is False
    assert np.abs(infer(controller, inputs) - expected).max() < 1e-4


def test_a_model_of_lower_precision_still_answers_in_float32(controller: BareController) -> None:
    loaded = controller.load("half")
    assert (loaded.output_dtype, loaded.labels) == ("float32", ("bfloat16",))
    assert infer(controller, np.ones((1, 4), np.float32)).shape == (1, 2)


def test_a_workers_precision_and_format_hold_for_the_zoo() -> None:
    config = WorkerConfig(
        device="cpu",
        port=0,
        bind="127.0.0.1",
        dtype="bfloat16",
        channels_last=True,
        page_bytes=2**20,
        weights_cache_bytes=64 * 2**20,
    )
    with WorkerServer(config) as server:
        controller = BareController(server.port)
        welcome = controller.ask(
            ControllerHello(PROTOCOL_VERSION, incarnation=next(INCARNATIONS), times_lost=0)
        )
        assert isinstance(welcome, WorkerWelcome)
        controller.session = welcome.session
        loaded = controller.load("resnet_tiny")
        assert loaded.labels == ("image", "bfloat16", "channels_last")
        assert (loaded.input_dtype, loaded.output_dtype) == ("float32", "float32")
        inputs = np.random.default_rng(4).random((3, 3, 64, 64), dtype=np.float32)
        difference = np.abs(infer(controller, inputs) - reference_forward("resnet_tiny", inputs))
        assert 0 < difference.max() < 5e-3
        controller.close()


def test_a_factory_that_fails_is_an_answer_and_not_the_end(controller: BareController) -> None:
    def load(name: str) -> object:
        action = controller.action_id()
        return controller.ask(
            LoadModel(
                controller.session,
                action,
                name=name,
                model_id=0,
                copies=1,
                max_batch=4,
                max_exec_ns=NS_PER_S,
                earliest_ns=0,
                latest_ns=FOREVER_NS,
            )
        )

    failed = load("broken")
    assert isinstance(failed, ErrorResult) and failed.code == Code.INVALID_MODEL_PATH
    assert "returned a str" in failed.reason
    unknown = load("os:system")
    assert isinstance(unknown, ErrorResult) and unknown.code == Code.UNKNOWN_MODEL
    assert isinstance(load("resnet_tiny"), LoadModelResult)


def test_classes_slower_than_max_exec_are_left_out(controller: BareController) -> None:
    assert controller.load("resnet_tiny", max_exec_ns=1).batch_sizes == (1,)
