"""A worker on a real GPU: outputs equal a direct forward pass, whatever the batch, slot and history."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cuda.bindings")

from made_messages import an_infer  # noqa: E402
from slosched.codes import Code  # noqa: E402
from slosched.config import ModelSource, WorkerConfig  # noqa: E402
from slosched.daemon.backends.cuda.backend import CudaBackend  # noqa: E402
from slosched.daemon.backends.cuda.driver import Block  # noqa: E402
from slosched.daemon.backends.cuda.program import Class  # noqa: E402
from slosched.daemon.backends.cuda.torch_program import TorchProgram  # noqa: E402
from slosched.daemon.backends.sources import worker_specs  # noqa: E402
from slosched.daemon.worker import WorkerServer  # noqa: E402
from slosched.messages import (  # noqa: E402
    PROTOCOL_VERSION,
    ControllerHello,
    ErrorResult,
    EvictWeights,
    EvictWeightsResult,
    InferResult,
    LoadModel,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    WorkerWelcome,
)
from slosched.units import NS_PER_MS, NS_PER_S  # noqa: E402
from worker_rig import FOREVER_NS, BareController  # noqa: E402

Array = npt.NDArray[Any]
INCARNATIONS = count(1)
#: Operators' models, and the zoo's in other precisions.
HALF = (
    ModelSource("half", factory="test_zoo:tiny_net", input_shape=(4,), dtype="float16"),
    ModelSource("branches", factory="gpu_models:branching_net", input_shape=(4,)),
    ModelSource("zeros_head", factory="gpu_models:zeros_head", input_shape=(3, 32, 32)),
    ModelSource("counting", factory="gpu_models:counting", input_shape=(64,)),
    ModelSource("mixed_rows", factory="gpu_models:mixed_rows", input_shape=(4,)),
    ModelSource("broken", factory="test_zoo:no_net", input_shape=(4,)),
    ModelSource("out_of_bounds", factory="gpu_models:reading_outside", input_shape=(4,)),
    ModelSource("resnet50", dtype="float16", channels_last=True),
    ModelSource("vit_base", dtype="bfloat16"),
)


def backend_of(server: WorkerServer) -> CudaBackend:
    assert isinstance(server._backend, CudaBackend)
    return server._backend


class _View:
    """A block as torch can see it."""

    def __init__(self, block: Block) -> None:
        self.__cuda_array_interface__ = {
            "shape": (block.nbytes,),
            "typestr": "|u1",
            "data": (block.address, False),
            "version": 3,
        }


def poison(backend: CudaBackend) -> None:
    """Nothing that lies in the cache or in active weights may help."""
    torch.cuda.synchronize()
    cache = backend._gpu._copies._cache

    torch.as_tensor(_View(cache), device="cuda").fill_(0xFF)
    for program in backend._programs.values():
        if isinstance(program, TorchProgram):
            program._weights.block.fill_(0xFF)
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def server() -> Iterator[WorkerServer]:
    config = WorkerConfig(
        device="cuda:0",
        port=0,
        bind="127.0.0.1",
        models=HALF,
        weights_cache_bytes=6 * 2**30,
        host_images=2,
    )
    with WorkerServer(config, announce=print) as server:
        yield server


@pytest.fixture
def controller(server: WorkerServer) -> Iterator[BareController]:
    controller = BareController(server.port)
    hello = ControllerHello(PROTOCOL_VERSION, incarnation=next(INCARNATIONS), times_lost=0)
    for _ in range(200):
        server._brain._link._heard_ns = 0  # the last test's controller is silent
        welcome = controller.ask(hello)
        if isinstance(welcome, WorkerWelcome):
            break
    assert isinstance(welcome, WorkerWelcome), welcome
    controller.session = welcome.session
    yield controller
    controller.close()


def load(
    controller: BareController, name: str, model_id: int = 0, copies: int = 1, max_batch: int = 8
) -> LoadModelResult:
    result = controller.ask(
        LoadModel(
            controller.session,
            controller.action_id(),
            name=name,
            model_id=model_id,
            copies=copies,
            max_batch=max_batch,
            max_exec_ns=NS_PER_S,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        ),
        within_s=40.0,
    )
    assert isinstance(result, LoadModelResult), result
    return result


def load_weights(controller: BareController, model_id: int) -> None:
    message = LoadWeights(
        controller.session,
        controller.action_id(),
        model_id=model_id,
        gpu_id=0,
        earliest_ns=0,
        latest_ns=FOREVER_NS,
        expected_duration_ns=0,
    )
    assert isinstance(controller.ask(message), LoadWeightsResult)


def evict(controller: BareController, model_id: int) -> None:
    message = EvictWeights(
        controller.session,
        controller.action_id(),
        model_id=model_id,
        gpu_id=0,
        earliest_ns=0,
        latest_ns=FOREVER_NS,
    )
    assert isinstance(controller.ask(message), EvictWeightsResult)


def infer(
    controller: BareController, inputs: Array, model_id: int = 0, dtype: str = "float32"
) -> Array:
    sizes = (inputs[0].nbytes,) * len(inputs)
    message = controller.infer_message(len(inputs), sizes=sizes, model_id=model_id)
    controller.send(message, *(row.tobytes() for row in inputs))
    result, frames = controller.receive()
    assert isinstance(result, InferResult), result
    assert result.exec.duration_ns > 0 and result.gpu_clock_mhz > 0
    return np.stack([np.frombuffer(frame, np.dtype(dtype)) for frame in frames])


def sample(loaded: LoadModelResult, batch: int, seed: int) -> Array:
    random = np.random.default_rng(seed)
    shape = (batch, *loaded.input_shape)
    if loaded.input_dtype == "float32":
        return random.random(shape, dtype=np.float32)
    return random.integers(0, 1000, shape).astype(loaded.input_dtype)


#: The largest difference to a direct pass in float32, as a share of the largest output.
TOLERANCE = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 8e-2}


def direct(server: WorkerServer, name: str, inputs: Array) -> Array:
    """A forward pass of the model on the GPU in float32, sharing the builder alone."""
    sources = tuple(s for s in HALF if s.name == name)
    spec = worker_specs(WorkerConfig(models=tuple(s for s in sources if s.factory)))[name]
    from slosched.daemon.backends.contract import single_output

    module = spec.build().float().cuda()
    with torch.inference_mode():
        batch = torch.from_numpy(inputs).cuda()
        found = single_output(module(batch), len(inputs), name=name, take=spec.output)
        return found.float().cpu().numpy().reshape(len(inputs), -1)


ZOO_NAMES = (
    "resnet_tiny",
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "vit_base",
    "bert_base",
    "gpt2",
    "whisper",
    "half",
)


@pytest.mark.parametrize("name", ZOO_NAMES)
def test_outputs_equal_a_direct_forward_for_every_batch_and_after_reloads(
    server: WorkerServer, controller: BareController, name: str
) -> None:
    if name not in server._backend.loadable:
        pytest.skip(f"this zoo has no {name}")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    loaded = load(controller, name, copies=2)
    dtype = next((label for label in loaded.labels if label in TOLERANCE), "float32")
    assert loaded.random_weights or name == "half"
    for life in range(2):
        poison(backend_of(server))
        load_weights(controller, life)
        load_weights(controller, 1 - life)
        for batch in sorted({1, 2, 3, 5, 8} & set(range(1, max(loaded.batch_sizes) + 1))):
            inputs = sample(loaded, batch, seed=10 * life + batch)
            wanted = direct(server, name, inputs)
            for model_id in (0, 1):
                outputs = infer(controller, inputs, model_id, loaded.output_dtype)
                error = np.abs(outputs - wanted).max() / np.abs(wanted).max()
                assert error < TOLERANCE[dtype], f"{name}, batch {batch}, instance {model_id}"
        evict(controller, 0)
        evict(controller, 1)
    program = backend_of(server)._programs[name]
    assert all(program.captured(batch) for batch in program.classes), program.not_captured


def test_cupys_models(server: WorkerServer, controller: BareController) -> None:
    pytest.importorskip("cupy")
    from slosched.daemon.backends.cuda.cupy_zoo import CUPY_ZOO

    for model_id, (name, make) in enumerate(CUPY_ZOO.items()):
        loaded = load(controller, name, model_id)
        load_weights(controller, model_id)
        model = make()
        for batch in (1, 3, 8):
            inputs = sample(loaded, batch, seed=batch)
            outputs = infer(controller, inputs, model_id)
            wanted = inputs
            if name == "cupy_matmul":
                for weights in model.weights.values():
                    wanted = wanted @ weights
            else:
                for i in range(3):
                    wanted = wanted @ model.weights[f"w{i}"].T + model.weights[f"b{i}"]
                    wanted = np.maximum(wanted, 0) if i < 2 else wanted
            assert np.abs(outputs - wanted).max() < 1e-2 * np.abs(wanted).max(), name
    programs = backend_of(server)._programs
    assert programs["cupy_mlp"].captured(Class(8))
    assert not programs["cupy_matmul"].captured(Class(8)) and programs["cupy_matmul"].not_captured


def test_what_cannot_be_captured_runs_and_says_so(
    server: WorkerServer, controller: BareController
) -> None:
    from gpu_models import branching_net

    loaded = load(controller, "branches")
    load_weights(controller, 0)
    assert "plain execution" in loaded.labels
    inputs = sample(loaded, 2, seed=4) - 0.5
    wanted = branching_net()(torch.from_numpy(inputs)).detach().numpy()
    assert np.abs(infer(controller, inputs) - wanted).max() < 1e-4
    # A capture that failed does not stop the next model's.
    assert "plain execution" not in load(controller, "zeros_head", 10).labels


def test_own_state_is_as_it_was_loaded_in_each_run_and_is_named(
    server: WorkerServer, controller: BareController
) -> None:
    loaded = load(controller, "counting", copies=1)  # an only instance, whose weights might stay
    load_weights(controller, 0)
    assert "own state restored before each run" in loaded.labels
    assert backend_of(server)._programs["counting"].changed == ("runs",)
    first = infer(controller, sample(loaded, 3, seed=1))
    for _ in range(5):
        assert (infer(controller, sample(loaded, 3, seed=1)) == first).all()


def test_a_model_that_mixes_its_rows_is_refused_with_what_was_seen(
    server: WorkerServer, controller: BareController
) -> None:
    message = LoadModel(
        controller.session,
        controller.action_id(),
        name="mixed_rows",
        model_id=7,
        copies=1,
        max_batch=8,
        max_exec_ns=NS_PER_S,
        earliest_ns=0,
        latest_ns=FOREVER_NS,
    )
    failed = controller.ask(message, within_s=60.0)
    assert isinstance(failed, ErrorResult) and failed.code == Code.INVALID_MODEL_PATH
    assert "answers otherwise for" in failed.reason and "one batch" in failed.reason


def test_starts_and_heartbeats_go_on_while_a_model_is_prepared(
    server: WorkerServer, controller: BareController
) -> None:
    """The whole preparation of a model beside inferences that start on time."""
    load(controller, "resnet18")
    load_weights(controller, 0)
    action = controller.action_id()
    controller.send(
        LoadModel(
            controller.session,
            action,
            name="resnet50",
            model_id=100,
            copies=1,
            max_batch=16,
            max_exec_ns=NS_PER_S,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
    )
    from slosched.clock import now_ns

    late, prepared = [], None
    for _ in range(4000):
        earliest = now_ns() + 3 * NS_PER_MS
        controller.send(
            an_infer(
                controller.session,
                controller.action_id(),
                earliest_ns=earliest,
                latest_ns=FOREVER_NS,
            )
        )
        answer, _ = controller.receive()
        while not isinstance(answer, InferResult):
            assert isinstance(answer, LoadModelResult), answer
            prepared = answer
            answer, _ = controller.receive()
        late.append(answer.exec.begin_ns - earliest)
        if prepared is not None:
            break
    assert prepared is not None
    late.sort()
    assert late[len(late) // 2] < 20_000 and late[len(late) * 95 // 100] < 200_000, late[-20:]
    times = [beat.sent_ns for _, beat in controller.beats]
    assert max(later - earlier for earlier, later in pairwise(times)) < 600 * NS_PER_MS


def test_more_than_the_gpu_has_is_refused_and_leaves_the_worker_as_it_was(
    server: WorkerServer, controller: BareController
) -> None:
    load(controller, "resnet_tiny")
    load_weights(controller, 0)
    for model_id in (1, 2):
        message = LoadModel(
            controller.session,
            controller.action_id(),
            name="broken",
            model_id=model_id,
            copies=1,
            max_batch=4,
            max_exec_ns=NS_PER_S,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
        failed = controller.ask(message, within_s=60.0)
        assert isinstance(failed, ErrorResult) and failed.code == Code.INVALID_MODEL_PATH
    inputs = np.random.default_rng(1).random((1, 3, 64, 64), dtype=np.float32)
    wanted = direct(server, "resnet_tiny", inputs)
    assert np.abs(infer(controller, inputs) - wanted).max() < 1e-2 * np.abs(wanted).max()


def test_pages_are_accounted_to_the_last(server: WorkerServer, controller: BareController) -> None:
    loaded = load(controller, "resnet_tiny", copies=8)
    pages = server._brain.free_pages(0)
    random = np.random.default_rng(7)
    resident: set[int] = set()
    for _ in range(60):
        model_id = int(random.integers(0, 8))
        if model_id in resident:
            evict(controller, model_id)
            resident.discard(model_id)
        else:
            load_weights(controller, model_id)
            resident.add(model_id)
        assert server._brain.free_pages(0) == pages - loaded.pages * len(resident)
        assert backend_of(server)._gpu.free_pages == server._brain.free_pages(0)


def test_out_of_memory_fails_the_model_and_nothing_else(
    server: WorkerServer, controller: BareController
) -> None:
    load(controller, "resnet_tiny", 0)
    load_weights(controller, 0)
    driver = backend_of(server)._driver
    torch.cuda.empty_cache()
    hog = driver.device_block(driver.free_bytes() - 64 * 2**20)
    try:
        message = LoadModel(
            controller.session,
            controller.action_id(),
            name="resnet101",
            model_id=50,
            copies=1,
            max_batch=8,
            max_exec_ns=NS_PER_S,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
        failed = controller.ask(message, within_s=60.0)
        assert isinstance(failed, ErrorResult) and failed.code == Code.RUNTIME_ERROR
        assert "memory" in failed.reason
    finally:
        driver.free(hog)
    inputs = np.random.default_rng(1).random((2, 3, 64, 64), dtype=np.float32)
    wanted = direct(server, "resnet_tiny", inputs)
    assert np.abs(infer(controller, inputs) - wanted).max() < 1e-2 * np.abs(wanted).max()
    assert load(controller, "resnet18", 60).batch_sizes[0] == 1  # there is room again


def test_a_cuda_error_ends_the_worker_with_words_and_every_action_answered(tmp_path: Path) -> None:
    config = tmp_path / "worker.toml"
    config.write_text(
        '[models.bad]\nfactory = "gpu_models:reading_outside"\ninput_shape = [4]\n',
        encoding="utf-8",
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}"}
    options = [
        "--device",
        "cuda:0",
        "--bind",
        "127.0.0.1",
        "--port",
        "0",
        "--weights-cache",
        "1GiB",
    ]
    command = [sys.executable, "-m", "slosched", "worker", *options, "--config", str(config)]
    worker = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    at_most = threading.Timer(240, worker.kill)  # no readline waits longer
    try:
        assert worker.stdout is not None
        at_most.start()
        ready = worker.stdout.readline()
        port = int(ready.partition("127.0.0.1:")[2].partition(":")[0])
        controller = BareController(port)
        controller.hello()
        load(controller, "bad")
        load_weights(controller, 0)
        fine = np.zeros((1, 4), np.float32)
        assert infer(controller, fine).shape == (1, 4)
        outside = np.full((1, 4), 5, np.float32)
        for _ in range(3):
            message = controller.infer_message(1, sizes=(16,))
            controller.send(message, outside.tobytes())
        answers = [controller.receive()[0] for _ in range(3)]
        assert all(isinstance(a, ErrorResult) and a.code == Code.PROCESS_ENDED for a in answers)
        controller.close()
        said: list[str] = []
        while not said or "worker ready on" not in said[-1]:  # the process that was started again
            line = worker.stdout.readline()
            assert line, said
            said.append(line)
        assert any("cuda:0 is lost" in line and "starts again at once" in line for line in said), (
            said
        )
        assert f"127.0.0.1:{port}: " in said[-1]
        controller = BareController(port)
        controller.hello(8)
        load(controller, "bad")
        load_weights(controller, 0)
        assert infer(controller, fine).shape == (1, 4)
        controller.close()
        worker.terminate()
        worker.communicate(timeout=30)
        assert worker.returncode == 0
    except AssertionError:
        worker.kill()
        print("the worker said:", worker.communicate(timeout=10)[0])  # noqa: T201
        raise
    finally:
        at_most.cancel()
        worker.kill()
        worker.wait(10)
