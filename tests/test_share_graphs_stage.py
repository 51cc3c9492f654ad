"""The stage of a CUDA GPU with what it needs of CUDA stood in for: what is prepared how, on which streams."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fake_cuda import MS, ROW_IN, FakeDriver, FakeProgram, FakeStream, VirtualClock  # noqa: E402
from slosched.core.share.interface import Ended, Start  # noqa: E402
from slosched.daemon.backends.checking import OneTensor  # noqa: E402
from slosched.daemon.backends.cuda.program import Class  # noqa: E402
from slosched.daemon.backends.graphs.lane import GraphLane  # noqa: E402
from slosched.errors import InvalidConfig  # noqa: E402
from slosched.share_spec import Job  # noqa: E402
from test_share_graphs import PAGE, SHARES, TIMES_NS, US, job  # noqa: E402

pytestmark = pytest.mark.torch


class _Clock(VirtualClock):
    """A clock that passes without a background thread that pauses."""

    def __call__(self) -> int:
        self.now_ns += 5 * US
        return self.now_ns


class _Streams:
    """TorchStreams of the fake driver: a pool for each."""

    pools = 0

    def __init__(self, driver: FakeDriver, device: Any, run: FakeStream, capture: FakeStream):
        self.driver, self.run, self.capture_stream = driver, run, capture
        run.pool = capture.pool = _Streams.pools
        _Streams.pools += 1

    def make_disturbance(self) -> None:
        pass


@dataclass(frozen=True)
class _Spec(OneTensor):
    random_weights: bool = True
    labels: tuple[str, ...] = ()


def stage_module(monkeypatch: pytest.MonkeyPatch, clock: VirtualClock) -> Any:
    """graphs.cuda_stage on the fake driver: what it needs of CUDA and torch is stood in for."""
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    before = set(sys.modules)
    module: Any = importlib.import_module("slosched.daemon.backends.graphs.cuda_stage")
    for name in set(sys.modules) - before:  # what was made of the stand-ins is for this test alone
        if name.startswith("slosched."):
            del sys.modules[name]
    driver = FakeDriver(clock)
    driver._pools += [driver._block(4096) for _ in range(4)]
    driver._pool_used += [0] * 4
    monkeypatch.setattr(driver, "use_in_this_thread", lambda: None, raising=False)
    monkeypatch.setattr(_Streams, "pools", 0)

    def program(template: Any, streams: _Streams, place: Any) -> FakeProgram:
        made = FakeProgram(
            template.spec.name,
            driver,
            template.weights_bytes,
            {},
            shares=SHARES,
            stream=streams.capture_stream,
        )
        made.exec_ns = dict.fromkeys((1, 2), TIMES_NS[template.spec.name])
        if template.spec.name == "middle":
            made.not_captured = "it asks the device for a value"
        return made

    def template(spec: Any) -> Any:
        host = torch.from_numpy(np.random.default_rng(5).integers(0, 256, PAGE, np.uint8))
        return SimpleNamespace(spec=spec, host=host, weights_bytes=PAGE)

    monkeypatch.setattr(module, "CudaDriver", lambda index: driver)
    monkeypatch.setattr(module, "TorchStreams", _Streams)
    monkeypatch.setattr(module, "TorchProgram", program)
    monkeypatch.setattr(module, "Template", template)
    monkeypatch.setattr(module, "job_spec", lambda job: _Spec(job.model, (ROW_IN,), "uint8"))
    monkeypatch.setattr(module, "now_ns", clock)
    monkeypatch.setattr(module.CudaStage, "clock", staticmethod(clock))
    cuda = MagicMock()
    cuda.OutOfMemoryError = torch.cuda.OutOfMemoryError
    cuda.device_count.return_value = 1
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        getattr(cuda, name).return_value = 5
    cuda.max_memory_reserved.return_value = 9
    monkeypatch.setattr(torch, "cuda", cuda)
    module.driver = driver
    return module


def test_the_stage_of_a_gpu_prepares_each_job_and_gives_everything_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = _Clock()
    module = stage_module(monkeypatch, clock)

    def opened(jobs: Mapping[int, Job], preempt: bool) -> Any:
        return module.open_stage("cuda:0", jobs, preempt, None)

    jobs = {0: job("long", batch=2), 1: job("short", 1), 2: job("middle", 2)}
    lane = GraphLane(jobs, device="cuda:0", seed=0, preempt=True, open_stage=opened, check_every=1)
    prepared = lane.prepare()
    assert [each.job for each in prepared] == [0, 1]
    assert prepared[0].boundaries > 3 and prepared[1].boundaries == 0
    assert "run = eager" in lane.failures[2].reason and not lane.failures[2].out_of_memory
    stage: Any = lane._stage
    assert stage._made[0].program.classes == (Class(2),), "batch 1 was measured, and is not kept"
    assert {stream.priority for stream in stage._exec_streams.values()} == {-2, -3, -4}
    assert _Streams.pools == 3 and not stage._images.images
    lane.start(Start(0, 0, 0), now_ns=clock())
    clock.now_ns += 2 * MS
    lane.poll(now_ns=clock())
    lane.start(Start(1, 0, 1), now_ns=clock())
    ended = lane._finish()
    assert [each.job for each in ended] == [1, 0] and ended[1].pauses
    assert not any(each.differs or each.reason for each in ended)
    allocated, reserved = lane.memory()[0]
    assert reserved - allocated == 4 and allocated > 16 * 2**20
    lane.close()
    assert module.driver.graphs == 0


def test_a_policy_of_deadlines_may_interrupt_the_job_of_the_highest_priority_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = stage_module(monkeypatch, _Clock())

    def opened(jobs: Mapping[int, Job], preempt: bool) -> Any:
        return module.open_stage("cuda:0", jobs, preempt, None, by_deadline=True)

    jobs = {0: job("short"), 1: job("long", 1)}
    lane = GraphLane(jobs, device="cuda:0", seed=0, preempt=True, open_stage=opened)
    assert [each.boundaries > 3 for each in lane.prepare()] == [False, True]
    lane.close()


def test_lanes_beside_each_other_have_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    module = stage_module(monkeypatch, clock)
    lanes = []
    for number, priority in ((0, 0), (1, -1)):
        one = {number: job("short", number)}

        def opened(jobs: Mapping[int, Job], preempt: bool, priority: int = priority) -> Any:
            return module.open_stage("cuda:0", jobs, preempt, priority)

        lane = GraphLane(
            one, device="cuda:0", seed=0, preempt=False, stream_priority=priority, open_stage=opened
        )
        lane.prepare()
        lanes.append(lane)
    assert _Streams.pools == 2
    for number, lane in enumerate(lanes):
        lane.start(Start(number, 0), now_ns=clock())
    ended: list[Ended] = []
    while len(ended) < 2:
        clock.now_ns += 20 * US
        for lane in lanes:
            ended += lane.poll(now_ns=clock())
    streams = [next(iter(lane._stage._exec_streams.values())) for lane in lanes]  # type: ignore[union-attr]
    assert [stream.priority for stream in streams] == [0, -1]
    # They ran at the same time.
    assert max(each.started_ns for each in ended) < min(each.ended_ns for each in ended)


def test_a_gpu_that_is_not_there() -> None:
    for device in ("cpu", "emulated"):
        with pytest.raises(InvalidConfig, match="CUDA device"):
            GraphLane({0: job("short")}, device=device, seed=0, preempt=False).prepare()
