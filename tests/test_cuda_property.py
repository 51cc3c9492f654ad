"""Any order of loads, evictions, inferences and faults on a CUDA device: the worker's books stay right.

The brain and the stepper of the live worker drive the CUDA device on a driver in virtual time. Whatever
was sent: each action is answered once, outputs are those of the instance that was asked, one exec runs at
a time, and the device's pages are, to the page, those that the brain counts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fake_cuda import MS, ROW_IN, FakeDriver, FakeProgram, VirtualClock, expected_row
from slosched.codes import Code
from slosched.config import ModelProfile
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.interface import (
    DropInputs,
    Effect,
    EvictPages,
    FromController,
    ModelPrepared,
    PrepareModel,
    ToController,
)
from slosched.core.worker.lanes import gpu_lanes
from slosched.core.worker.stepping import Stepper
from slosched.daemon.backends.cuda.device import CudaDevice
from slosched.daemon.backends.cuda.pages import PageMap, Run
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    ErrorResult,
    EvictWeights,
    GpuInfo,
    Heartbeat,
    Infer,
    InferResult,
    LoadModel,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    Span,
    WorkerGoodbye,
    WorkerWelcome,
)

PAGE = 4096
PAGES = 11
FOREVER_NS = 2**62
#: name -> (weights bytes, exec times, ids)
MODELS = {
    "one": (PAGE - 5, {1: MS, 2: 2 * MS}, range(6)),
    "three": (2 * PAGE + 9, {1: 2 * MS, 4: 3 * MS}, range(6, 10)),
    "only": (PAGE, {1: MS // 2}, range(10, 11)),
}
BUSY = (Code.RUNTIME_ERROR, Code.WEIGHTS_IN_USE, Code.EVICT_WEIGHTS_NOT_IN_CACHE)


@dataclass
class World:
    seed: int
    clock: VirtualClock = field(default_factory=VirtualClock)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.driver = FakeDriver(self.clock, ns_per_kb=self.draw.choice((200, 20_000, 300_000)))
        self.programs, self.images = {}, {}
        for name, (nbytes, exec_ns, _) in MODELS.items():
            self.programs[name] = FakeProgram(name, self.driver, nbytes, exec_ns)
            self.images[name] = [self.driver.pinned_block(nbytes) for _ in range(3)]
            for block in self.images[name]:
                block.host[:] = np.frombuffer(self.draw.randbytes(nbytes), np.uint8)  # type: ignore[index]
        cache = self.driver.device_block(PAGES * PAGE)
        self.lanes = gpu_lanes(preemptive=False)
        self.device = CudaDevice(
            self.driver,
            self.programs,
            self.images,
            cache=cache,
            page_bytes=PAGE,
            stream=self.driver.stream(-2),
            clock=self.clock,
            stay_bytes=self.draw.choice((0, 2**62)),
            **self.preemption(),
        )
        self.brain = WorkerBrain(
            [GpuInfo(0, "fake", PAGES, PAGE)],
            list(MODELS),
            incarnation=5,
            version="test",
            host="here",
            pid=1,
            device="cuda:0",
            lanes=self.lanes,
        )
        self.stepper = Stepper(self.brain, {0: self.device}, self.perform)
        self.answers: dict[int, tuple[object, list[bytes]]] = {}
        self.asked: dict[int, tuple[object, list[bytes]]] = {}
        self.next_action = 0
        self.session = -1
        self.resident_now: set[int] = set()

    def preemption(self) -> dict[str, Any]:
        """What the device gets besides; the programs are there already."""
        return {}

    def priority(self, name: str) -> int:
        """The priority of the next Infer of the model."""
        return 0

    def perform(self, effect: Effect, now_ns: int) -> None:
        if isinstance(effect, ToController):
            self.sent(effect)
        elif isinstance(effect, DropInputs):
            self.device.drop_inputs(effect.action_id)
        elif isinstance(effect, EvictPages):
            self.device.evict(effect.model_id)
        elif isinstance(effect, PrepareModel):
            nbytes, exec_ns, ids = MODELS[effect.name]
            self.device.instances[effect.name] = len(ids)
            profile = ModelProfile(
                effect.name, exec_ns, MS, nbytes, (ROW_IN,), "uint8", (4,), "uint8"
            )
            event = ModelPrepared(effect.action_id, profile, Span(now_ns, now_ns, 0))
            self.stepper.handle(event, now_ns=now_ns)

    def sent(self, effect: ToController) -> None:
        message = effect.message
        if isinstance(message, WorkerWelcome):
            self.session = message.session
        elif not isinstance(message, Heartbeat | WorkerGoodbye):
            action_id = message.action_id  # type: ignore[union-attr]
            assert action_id not in self.answers, "answered twice"
            frames = [] if effect.output_of is None else self.device.take_outputs(effect.output_of)
            self.answers[action_id] = (message, [bytes(frame) for frame in frames])

    def give(self, kind: type, model_id: int, frames: list[bytes], **more: object) -> int:
        self.next_action += 1
        message = kind(session=self.session, action_id=self.next_action, model_id=model_id, **more)
        self.asked[self.next_action] = (message, frames)
        sizes = tuple(len(frame) for frame in frames)
        event = FromController(b"controller", message, sizes)
        key = self.stepper.handle(event, now_ns=self.clock.now_ns)
        if key is not None and frames:
            self.device.keep_inputs(key, frames)
        return self.next_action

    def run(self, for_ns: int) -> None:
        """The worker's loop, without its socket."""
        end_ns = self.clock.now_ns + for_ns
        while self.clock.now_ns < end_ns:
            self.stepper.step(self.clock())
            self.device.spin(self.clock.now_ns + 20_000)
            self.clock.now_ns += 5_000

    def start(self) -> None:
        hello = FromController(b"controller", ControllerHello(PROTOCOL_VERSION, 9, times_lost=0))
        self.stepper.handle(hello, now_ns=self.clock.now_ns)
        self.run(MS)
        for name, (_, _, ids) in MODELS.items():
            self.give(
                LoadModel,
                ids.start,
                [],
                name=name,
                copies=len(ids),
                max_batch=8,
                max_exec_ns=FOREVER_NS,
                earliest_ns=0,
                latest_ns=FOREVER_NS,
            )
        self.run(MS)

    def act(self) -> None:
        """One random action, with a random window."""
        draw = self.draw
        name = draw.choice(list(MODELS))
        _, exec_ns, ids = MODELS[name]
        model_id = draw.choice(ids)
        earliest_ns = self.clock.now_ns + draw.choice((0, 0, MS // 2, 3 * MS))
        window = {
            "gpu_id": 0,
            "earliest_ns": earliest_ns,
            "latest_ns": earliest_ns + draw.choice((MS // 10, 2 * MS, FOREVER_NS - earliest_ns)),
        }
        kind = draw.choice((LoadWeights, LoadWeights, EvictWeights, Infer, Infer, Infer, Infer))
        if kind is EvictWeights:
            self.give(kind, model_id, [], **window)
            return
        if kind is LoadWeights:
            self.give(kind, model_id, [], expected_duration_ns=0, **window)
            return
        batch = draw.choice(list(exec_ns))
        count = draw.randint(1, batch)
        sizes = tuple(ROW_IN * draw.randint(0, 1) for _ in range(count))
        sizes = draw.choice((sizes, ()))
        frames = [draw.randbytes(size) for size in sizes if size]
        self.give(
            Infer,
            model_id,
            frames,
            expected_duration_ns=0,
            batch_size=batch,
            request_count=count,
            input_sizes=sizes,
            priority=self.priority(name),
            **window,
        )

    # ------------------------------------------------------------------------------- checks

    def check_answers(self) -> None:
        assert self.answers.keys() == self.asked.keys()
        for action_id, (answer, outputs) in self.answers.items():
            asked, frames = self.asked[action_id]
            if isinstance(answer, InferResult):
                assert isinstance(asked, Infer)
                self.check_infer(asked, frames, answer, outputs)
            elif isinstance(answer, ErrorResult):
                assert answer.code != Code.RUNTIME_ERROR, answer.reason

    def check_infer(
        self, asked: Infer, frames: list[bytes], answer: InferResult, outputs: list[bytes]
    ) -> None:
        name = next(name for name, (_, _, ids) in MODELS.items() if asked.model_id in ids)
        image = self.images[name][asked.model_id % 3].host
        assert image is not None
        assert outputs == [expected_row(image.tobytes(), frame) for frame in frames]
        assert asked.earliest_ns <= answer.exec.begin_ns <= asked.latest_ns

    def check_quiet(self) -> None:
        assert self.brain.idle and self.device.idle
        assert self.device.free_pages == self.brain.free_pages(0)
        runs = sorted(run for p in self.programs.values() for run in p.launches)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(runs))


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_actions(seed: int) -> None:
    world = World(seed)
    world.start()
    for _ in range(120):
        world.act()
        if world.draw.random() < 0.5:
            world.run(world.draw.choice((10_000, MS // 3, 2 * MS)))
    world.run(2_000 * MS)
    world.check_answers()
    world.check_quiet()
    kinds = {type(answer) for answer, _ in world.answers.values()}
    assert {LoadModelResult, LoadWeightsResult, InferResult, ErrorResult} <= kinds


@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_is_lost_under_load_leaves_nothing_unanswered(seed: int) -> None:
    world = World(seed)
    world.start()
    for step in range(60):
        world.act()
        world.run(world.draw.choice((10_000, MS // 3)))
        if step == 40:
            world.driver.fault = "unspecified launch failure"
    world.run(500 * MS)
    world.check_answers()
    assert world.brain.idle and world.device.lost


@pytest.mark.parametrize("seed", range(40))
def test_pages_never_overlap_and_none_is_lost(seed: int) -> None:
    draw = random.Random(seed)
    pages = PageMap(draw.choice((1, 7, 64)))
    held: list[list[Run]] = []
    for _ in range(400):
        if held and draw.random() < 0.5:
            pages.give(held.pop(draw.randrange(len(held))))
        wanted = draw.randint(1, 9)
        if wanted <= pages.free_pages:
            held.append(pages.take(wanted))
            assert sum(run.count for run in held[-1]) == wanted
        else:
            with pytest.raises(ValueError, match="free ones"):
                pages.take(wanted)
        taken = sorted(run for runs in held for run in runs)
        assert all(low.end <= high.first for low, high in pairwise(taken))
        assert pages.free_pages == pages.pages - sum(run.count for run in taken)
    for runs in held:
        pages.give(runs)
    assert pages.take(pages.pages) == [Run(0, pages.pages)]
    with pytest.raises(ValueError, match="outside"):
        pages.give([Run(pages.pages, 1)])


def test_pages_that_are_free_cannot_be_given_back_again() -> None:
    pages = PageMap(4)
    pages.give(pages.take(2))
    with pytest.raises(ValueError, match="free already"):
        pages.give([Run(0, 2)])
