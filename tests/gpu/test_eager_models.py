"""Eager models on a real GPU: answers are the same alone and interrupted, and the gate keeps kernels apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from slosched.core.share.interface import Ended, Start  # noqa: E402
from slosched.daemon.backends.eager.device import OutOfDeviceMemory  # noqa: E402
from slosched.daemon.backends.eager.lane import EagerLane  # noqa: E402
from slosched.daemon.member.gate import Gate  # noqa: E402
from slosched.share_spec import Boundary, BoundaryKind, Job  # noqa: E402

_DEVICE = "cuda:0"
_DETECTOR = "fasterrcnn_resnet50_fpn"


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    opened = Gate.open(str(tmp_path / "gate"))
    yield opened
    opened.remove()


def _lane(model: str, *, small: bool = False, gate: Any = None, **fields: Any) -> EagerLane:
    if model == _DETECTOR:
        pytest.importorskip("torchvision")
    if model == "diffusion":
        pytest.importorskip("diffusers")
    job = Job(name="job", model=model, **fields)
    return EagerLane(0, job, device=_DEVICE, seed=5, gate=gate, small=small)


def _one(lane: EagerLane, number: int = 0) -> Ended:
    lane.start(Start(0, number), now_ns=0)
    (ended,) = lane.poll(now_ns=0)
    assert ended.reason == ""
    return ended


@pytest.mark.parametrize(
    ("model", "small", "dtype"),
    [
        (_DETECTOR, False, ""),
        ("maskrcnn_resnet50_fpn_v2", False, ""),
        ("ssd300_vgg16", False, ""),
        ("deeplabv3_resnet50", False, ""),
        ("vit_l_16", False, ""),
        ("bert", False, ""),
        ("gpt2", False, ""),
        ("gpt", True, ""),
        ("whisper", False, ""),
        ("diffusion", True, ""),
        ("bloom-560m", True, "fp16"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_each_model_runs_and_repeats_its_answer(
    model: str, small: bool, dtype: str, batch: int
) -> None:
    if "_" in model:
        pytest.importorskip("torchvision")
    bound = Boundary(kind=BoundaryKind.EVENT, every=8)
    lane = _lane(model, small=small, dtype=dtype, batch=batch, boundary=bound)
    prepared = lane.prepare()
    assert prepared.boundaries > 10
    assert 0 < prepared.boundary_ns < prepared.exec_ns
    ended = [_one(lane, number) for number in range(3)]
    assert [each.differs for each in ended] == [False] * 3
    assert all(0 < each.device_ns <= each.ended_ns - each.started_ns for each in ended)
    allocated, reserved = lane.memory()
    assert 0 < allocated <= reserved
    kernels = lane.profile()
    assert kernels.number > 10
    assert 0 < kernels.mean_ns <= kernels.longest_ns
    lane.close()


@pytest.mark.parametrize("kind", [BoundaryKind.NONE, BoundaryKind.SEGMENT, BoundaryKind.SYNC])
@pytest.mark.parametrize("model", [_DETECTOR, "whisper"])
def test_an_interrupted_request_answers_as_an_uninterrupted_one(
    model: str, kind: BoundaryKind, gate: Gate
) -> None:
    alone = _lane(model, warmups=1).prepare().answer
    high = gate.member(1, 1)
    lane = _lane(model, warmups=1, gate=gate.member(0, 0), boundary=Boundary(kind=kind, every=4))
    assert lane.prepare().answer == alone
    stop, moved = threading.Event(), []

    def urgent() -> None:
        while not stop.is_set():
            assert not high.enter(10**10).timed_out
            before = high.steps(0)
            time.sleep(0.001)
            moved.append(high.steps(0) - before)
            high.leave()
            time.sleep(0.005)

    thread = threading.Thread(target=urgent)
    thread.start()
    ended: list[Ended] = []
    while sum(len(each.pauses) for each in ended) < 10 and len(ended) < 200:
        ended.append(_one(lane, len(ended)))
    stop.set()
    thread.join(20)
    assert set(moved) == {0}
    assert sum(len(each.pauses) for each in ended) >= 10
    assert not any(each.differs for each in ended)
    assert lane.answer_digest() == alone
    lane.close()


def test_a_model_that_does_not_fit_says_so() -> None:
    lane = _lane("bloom-560m", batch=30_000, warmups=1)  # its logits alone are 300 GB
    with pytest.raises(OutOfDeviceMemory, match="out of memory"):
        lane.prepare()
    assert _lane("bert", warmups=1).prepare().exec_ns > 0, "and the next one runs"
