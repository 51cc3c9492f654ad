"""Eager models: boundaries, answers that interruptions leave unchanged, errors, and the code of each model."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from slosched.core.share.interface import Ended, Start, Withdraw
from slosched.daemon.backends.job_models import made_by
from slosched.daemon.member.gate import Gate, GateMember
from slosched.errors import InvalidConfig, UnknownName
from slosched.share_spec import Boundary, BoundaryKind, Job

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

from slosched.daemon.backends.eager.device import HostTimeline, open_timeline  # noqa: E402
from slosched.daemon.backends.eager.hooks import Boundaries  # noqa: E402
from slosched.daemon.backends.eager.lane import EagerLane  # noqa: E402
from slosched.daemon.backends.eager.models import open_model  # noqa: E402
from slosched.daemon.backends.eager.profiling import summed  # noqa: E402

_LONG_NS = 20 * 10**9


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """A lane sets these for its whole process; other tests have what they had."""
    threads, mha = torch.get_num_threads(), torch.backends.mha
    fast, benchmark = mha.get_fastpath_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    mha.set_fastpath_enabled(fast)
    torch.backends.cudnn.benchmark = benchmark


def _job(model: str, **fields: Any) -> Job:
    return Job(name="job", model=model, **{"warmups": 1, **fields})


def _lane(model: str, *, small: bool = False, gate: Any = None, **fields: Any) -> EagerLane:
    return EagerLane(0, _job(model, **fields), device="cpu", seed=5, gate=gate, small=small)


def _one(lane: EagerLane, number: int = 0) -> Ended:
    lane.start(Start(0, number), now_ns=time.monotonic_ns())
    (ended,) = lane.poll(now_ns=time.monotonic_ns())
    return ended


class _Recorded(HostTimeline):
    """Writes down what it is asked for; marks are numbers."""

    def __init__(self) -> None:
        self.calls: list[str | tuple[str, int]] = []
        self.marks = 0

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def fence(self, passed: int | None = None) -> int:
        self.marks += 1
        self.calls.append(("mark", self.marks))
        return self.marks

    def wait(self, mark: int) -> None:
        self.calls.append(("wait", mark))


def _passed(boundary: Boundary, leaves: int) -> list[str | tuple[str, int]]:
    timeline = _Recorded()
    boundaries = Boundaries(boundary, timeline, None)
    network = torch.nn.Sequential(*[torch.nn.ReLU() for _ in range(leaves)], torch.nn.Dropout())
    boundaries.attach(network)
    boundaries.begin()
    network(torch.zeros(1))
    assert boundaries.number == leaves
    return timeline.calls


def test_the_device_is_waited_for_as_the_kind_says() -> None:
    assert _passed(Boundary(kind=BoundaryKind.NONE), 6) == []
    assert _passed(Boundary(kind=BoundaryKind.SYNC, every=4), 9) == ["synchronize"] * 2
    assert _passed(Boundary(kind=BoundaryKind.LAYER, every=4), 3) == ["synchronize"] * 3


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "boundary", [Boundary(kind=BoundaryKind.EVENT, every=2), Boundary(kind=BoundaryKind.SEGMENT)]
)
def test_at_most_depth_groups_are_in_flight(boundary: Boundary, depth: int) -> None:
    modules = 12 if boundary.kind is BoundaryKind.EVENT else 6 * 8
    calls = _passed(msgspec.structs.replace(boundary, depth=depth), modules)
    ended = 0
    for group in range(1, 7):  # before the group behind mark `group` begins
        at = calls.index(("mark", group))
        following = calls[at + 1 : at + 2]
        if following and following[0][0] == "wait":
            ended = int(following[0][1])
        assert group - ended <= depth - 1, "and the new group makes depth"
    waits = [call for call in calls if call[0] == "wait"]
    assert waits == [("wait", group) for group in range(1, 8 - depth)]


def test_the_longest_time_between_boundaries_is_measured() -> None:
    lane = _lane("tiny:4:2", boundary=Boundary(kind=BoundaryKind.LAYER))
    prepared = lane.prepare()
    assert prepared.boundaries == 4
    # The last one is from the last boundary to the end.
    assert len(prepared.segments_ns) == 5 and prepared.segments_ns[-1] == prepared.boundary_ns
    assert prepared.boundary_ns >= 2_000_000
    assert prepared.exec_ns >= 8_000_000
    assert prepared.load_ns > 0
    assert "random weights" in prepared.note
    assert prepared.answer == lane.answer_digest()
    assert [each.number for each in lane.warmups] == [-1]


@pytest.mark.parametrize("most", [3, 100])
def test_boundaries_beyond_those_that_are_timed_are_counted(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.daemon.backends.eager.hooks._MOST_MARKS", most)
    now = [0]

    class Clock(HostTimeline):
        def mark(self, passed: int | None = None) -> int:
            return now[0]

    def run() -> None:
        for took in (5, 9, 1, 1, 70, 1):  # to the first boundary, and from boundary to boundary
            now[0] += took
            boundaries.between()
        now[0] += 4

    boundaries = Boundaries(Boundary(), Clock(), None)
    boundaries.attach(torch.nn.Sequential())
    # Where only the first ones are timed, the rest of the request is not taken for one step.
    number, segments_ns = boundaries.measured(run)
    assert (number, max(segments_ns)) == (6, 9 if most == 3 else 70)


def test_without_a_gate_or_a_bound_the_model_is_not_hooked() -> None:
    lane = _lane("tiny:4:0")
    assert lane.prepare().boundaries == 0
    assert _one(lane).reason == ""


# -------------------------------------------------------------------------------- each model

_SMALL = (
    "bert",
    "gpt",
    "gpt2",
    "bloom-560m",
    "codegen-350M-mono",
    "whisper",
    "diffusion",
    "resnet50",
)
_SHAPES = {
    "bert": (11,),
    "gpt": (12,),
    "gpt2": (12,),
    "bloom-560m": (12,),
    "codegen-350M-mono": (12,),
    "whisper": (6,),
    "diffusion": (3, 16, 16),
    "resnet50": (1000,),
    "tiny:3:0": (16,),
    "tiny-conv": (10,),
    "tiny-gpt": (12,),
}


@pytest.mark.parametrize("model", _SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_each_model_answers_the_same_for_the_same_input(model: str, batch: int) -> None:
    if model == "diffusion":
        pytest.importorskip("diffusers")
    lane = _lane(model, small=model in _SMALL, batch=batch)
    prepared = lane.prepare()
    ended = [_one(lane, number) for number in range(2)]
    assert [(each.reason, each.differs) for each in ended] == [("", False)] * 2
    assert [each.number for each in ended] == [0, 1]
    assert [tuple(each.shape) for each in lane._last] == [(batch, *_SHAPES[model])]
    assert lane.answer_digest() == prepared.answer
    again = _lane(model, small=model in _SMALL, batch=batch)
    assert again.prepare().answer == prepared.answer, "weights and input follow from names and seed"
    assert lane.memory() == (0, 0)
    lane.close()


def test_another_seed_gives_another_input() -> None:
    one, other = (
        EagerLane(0, _job("tiny-conv"), device="cpu", seed=seed).prepare().answer for seed in (1, 2)
    )
    assert one != other


def test_rows_of_a_batch_differ() -> None:
    for model in ("bert", "tiny-gpt", "tiny-conv"):
        lane = _lane(model, small=True, batch=2)
        lane.prepare()
        assert not torch.equal(lane._last[0][0], lane._last[0][1])


def test_the_published_sizes() -> None:
    meta = torch.device("meta")
    millions = {
        "bloom": 559,
        "codegen-350M-multi": 357,
        "originals/bert": 335,
        "gpt2": 124,
        "whisper": 242,
        "gpt": 6051,
    }
    for model, expected in millions.items():
        module = open_model(_job(model), meta, 0).module
        parameters = {id(each): each for each in module.parameters()}
        assert sum(each.numel() for each in parameters.values()) // 1_000_000 == pytest.approx(
            expected, abs=max(1, expected // 200)
        ), model
        dtype = torch.float16 if model == "gpt" else torch.float32
        assert {each.dtype for each in parameters.values()} == {dtype}


def test_the_dtype_is_that_of_the_job() -> None:
    lane = _lane("gpt2", small=True, dtype="bf16")
    lane.prepare()
    assert lane._model is not None
    assert {each.dtype for each in lane._model.module.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() is torch.float32
    with pytest.raises(
        InvalidConfig, match="dtype 'int3' is not known; choose from float32, float16"
    ):
        _lane("bert", small=True, dtype="int3").prepare()


# ------------------------------------------------------------------------------- interruptions


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    opened = Gate.open(str(tmp_path / "gate"))
    yield opened
    opened.remove()


@pytest.mark.parametrize("model", ["tiny:30:0.3", "tiny-gpt", "whisper", "diffusion"])
def test_an_interrupted_request_answers_as_an_uninterrupted_one(model: str, gate: Gate) -> None:
    if model == "diffusion":
        pytest.importorskip("diffusers")
    small = model in _SMALL
    alone = _lane(model, small=small).prepare().answer
    high = gate.member(1, 1)
    lane = _lane(model, small=small, gate=gate.member(0, 0), boundary=Boundary(every=3))
    prepared = lane.prepare()
    assert prepared.answer == alone
    assert prepared.boundaries > 20
    stop, ran = threading.Event(), []

    def urgent() -> None:
        while not stop.is_set():
            steps = high.steps(0)
            assert not high.enter(_LONG_NS).timed_out
            before = high.steps(0)
            time.sleep(0.001)
            ran.append(high.steps(0) - before)
            high.leave()
            until = time.monotonic() + 10
            while high.steps(0) < steps + 5 and not stop.is_set() and time.monotonic() < until:
                time.sleep(0.0002)

    thread = threading.Thread(target=urgent)
    thread.start()
    ended: list[Ended] = []
    while sum(len(each.pauses) for each in ended) < 3 and len(ended) < 500:
        ended.append(_one(lane, len(ended)))
    stop.set()
    thread.join(20)
    assert set(ran) == {0}, "the low one stood still while the high one ran"
    assert [each.differs for each in ended] == [False] * len(ended)
    assert lane.answer_digest() == alone
    interrupted = next(each for each in ended if each.pauses)
    assert 0 < interrupted.paused_ns < interrupted.ended_ns - interrupted.started_ns
    part = interrupted.pauses[0]
    assert (part.job, part.by) == (0, 1)
    assert 1 <= part.boundary <= prepared.boundaries
    assert part.wanted_ns <= part.resumed_ns <= interrupted.ended_ns


def test_a_request_beside_a_lower_job_that_does_not_stop_says_so(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = gate.member(1, 0)
    lane = _lane("tiny:2:0", gate=gate.member(0, 1))
    lane.prepare()
    assert not _one(lane).beside_lower
    low.enter()  # and it has no boundary
    monkeypatch.setattr(GateMember.enter, "__defaults__", (1_000_000,))
    assert _one(lane).beside_lower
    low.leave()
    assert not _one(lane).beside_lower


def test_the_highest_job_is_not_hooked_once_it_runs(gate: Gate) -> None:
    low = gate.member(1, 0)
    for kind, steps in ((BoundaryKind.SEGMENT, 0), (BoundaryKind.SYNC, 4)):
        lane = _lane("tiny:4:0", gate=gate.member(0, 9), boundary=Boundary(kind=kind))
        assert lane.prepare().boundaries == 4
        before = low.steps(0)
        assert _one(lane).reason == ""
        assert low.steps(0) == before + steps, "but for a bound that the job names itself"


# ------------------------------------------------------------------------------------- errors


class _Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def run(self, between: Any) -> Sequence[Any]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "fatal", "memory"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 GiB"), True, True),
        (RuntimeError("CUDA error: an illegal memory access\nCUDA kernel errors"), True, False),
        (ValueError("a bad shape"), False, False),
    ],
)
def test_what_a_model_raises_is_a_reason(
    error: Exception, fatal: bool, memory: bool, gate: Gate
) -> None:
    member = gate.member(0, 1)
    low = gate.member(1, 0)
    lane = _lane("tiny:2:0", gate=member)
    lane.prepare()
    good, lane._model = lane._model, _Failing(error)  # type: ignore[assignment]
    ended = _one(lane, 4)
    assert ended.reason == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert (ended.number, ended.fatal, ended.out_of_memory) == (4, fatal, memory)
    low.look_around()
    assert not low.must_wait(), "the gate is open again"
    lane._model = good
    assert _one(lane).reason == ""


def test_the_lane_runs_one_request_in_the_call() -> None:
    lane = _lane("tiny:2:0")
    lane.prepare()
    assert (lane.takes, lane.preemptive) == (1, False)
    assert lane.next_event_ns() is None
    lane.start(Start(0, 1), now_ns=0)
    assert lane.next_event_ns() == 0
    assert lane.withdraw(Withdraw(0, 1)) is False
    assert lane.pass_time(None) is False
    assert len(lane.poll(now_ns=0)) == 1
    assert lane.next_event_ns() is None


def test_names_that_are_not_known() -> None:
    with pytest.raises(UnknownName, match="did you mean whisper"):
        made_by("whispr")
    with pytest.raises(UnknownName, match=r"unknown model .\.\./x"):
        made_by("../x")
    for name in ("bert:7", "originals/tiny-bert", "resnet-50", ""):
        with pytest.raises(UnknownName):
            made_by(name)
    assert made_by("timm/vit_base_patch16_224.augreg") == made_by("resnet50")
    assert made_by("torchvision/resnet50") == made_by("wide_resnet50_2")
    assert made_by("originals/gpt") == made_by("gpt")
    with pytest.raises(UnknownName, match="unknown diffusion model"):
        pytest.importorskip("diffusers")
        _lane("diffusion/none").prepare()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "tiny:0"}, "write tiny, tiny:LAYERS or tiny:LAYERS:MS"),
        ({"model": "tiny:2:x"}, "write tiny, tiny:LAYERS or tiny:LAYERS:MS"),
        ({"model": "tiny:2:nan"}, "write tiny, tiny:LAYERS or tiny:LAYERS:MS"),
        ({"model": "tiny", "batch": 0}, "a batch of 0"),
        ({"model": "diffusion/tiny", "size": (64, 64)}, "images of 16x16 only"),
        ({"model": "resnet18", "size": (4, 4)}, "pictures have 32 to 16384 pixels"),
    ],
)
def test_jobs_that_cannot_be_run(fields: dict[str, Any], words: str) -> None:
    if "diffusion" in fields["model"]:
        pytest.importorskip("diffusers")
    with pytest.raises(InvalidConfig, match=words):
        EagerLane(0, Job(name="job", **fields), device="cpu", seed=1).prepare()


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99", ""])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(InvalidConfig, match="device"):
        open_timeline(device, None)


def test_a_cuda_device_is_used_through_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            calls.append(("event", enable_timing))

        def record(self, stream: Any) -> None:
            calls.append(("record", stream.priority))

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, last: Any) -> float:
            return 1.25  # ms

    class Stream:
        def __init__(self, device: Any, priority: int) -> None:
            self.device, self.priority = device, priority

        def synchronize(self) -> None:
            calls.append("synchronize")

    fake = SimpleNamespace(Event=Event, Stream=Stream)
    monkeypatch.setattr("slosched.daemon.backends.eager.device._cuda", fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    timeline: Any = open_timeline("cuda:1", -3)
    assert timeline.stream.device == torch.device("cuda", 1)
    assert timeline.between_ns(timeline.mark(), timeline.mark()) == 1_250_000
    assert calls == [("event", True), ("record", -3)] * 2
    calls.clear()
    fence = timeline.fence()
    timeline.wait(fence)
    assert timeline.fence(fence) is fence
    timeline.synchronize()
    assert calls == [("event", False), ("record", -3), "wait", ("record", -3), "synchronize"]
    assert open_timeline("cuda", None).device == torch.device("cuda", 0)


def test_the_list_of_models_needs_no_torch() -> None:
    program = (
        "import sys, slosched.daemon.backends.job_models, slosched.daemon.backends.eager.models;"
        "assert not {'torch', 'transformers', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_kernels_are_counted_without_copies() -> None:
    cuda = torch.autograd.DeviceType.CUDA
    cpu = torch.autograd.DeviceType.CPU
    events = [
        SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=time_us))
        for name, kind, time_us in [
            ("gemm", cuda, lambda: 10.0),
            ("relu", cuda, lambda: 2.0),
            ("Memcpy HtoD", cuda, lambda: 90.0),
            ("aten::relu", cpu, lambda: 50.0),
        ]
    ]
    assert summed(events) == (2, 6_000, 10_000)
    assert summed([]) == (0, 0, 0)
