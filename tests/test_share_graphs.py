"""The lane of CUDA graphs on a driver in virtual time: interruptions at any depth, bytes, times, failures.

Each job's pool is written over when a run of another program begins in it, and every copy moves bytes when it
ends, so memory that two jobs share gives answers that differ from the first one.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("torch")

from fake_cuda import (  # noqa: E402
    MS,
    ROW_IN,
    FakeDriver,
    FakeProgram,
    FakeStream,
    SteppedProgram,
    VirtualClock,
)
from slosched.core.share.brain import Load, ShareBrain  # noqa: E402
from slosched.core.share.driving import turn  # noqa: E402
from slosched.core.share.interface import Ended, Start, Withdraw  # noqa: E402
from slosched.daemon.backends.checking import OneTensor  # noqa: E402
from slosched.daemon.backends.cuda.choice import Aim  # noqa: E402
from slosched.daemon.backends.cuda.cutting import Cutter  # noqa: E402
from slosched.daemon.backends.cuda.device import CudaDevice  # noqa: E402
from slosched.daemon.backends.cuda.driver import OutOfDeviceMemory  # noqa: E402
from slosched.daemon.backends.cuda.exec_lane import ExecLane  # noqa: E402
from slosched.daemon.backends.cuda.preemption import Preemption  # noqa: E402
from slosched.daemon.backends.cuda.preparing import Bench, HostImages, Source  # noqa: E402
from slosched.daemon.backends.cuda.program import Class  # noqa: E402
from slosched.daemon.backends.cuda.segments import Gate  # noqa: E402
from slosched.daemon.backends.graphs.lane import GraphLane  # noqa: E402
from slosched.daemon.backends.graphs.levels import LeveledExecLane, levels_of  # noqa: E402
from slosched.daemon.backends.graphs.models import dtype_of  # noqa: E402
from slosched.daemon.backends.graphs.stage import (  # noqa: E402
    Made,
    cut_notes,
    is_cut,
    program_name,
    wish_of,
)
from slosched.daemon.backends.job_models import can_capture  # noqa: E402
from slosched.daemon.blackbox import NoBlackbox  # noqa: E402
from slosched.errors import InvalidConfig  # noqa: E402
from slosched.share_spec import (  # noqa: E402
    Clients,
    Interruption,
    Job,
    Policy,
    Request,
    Run,
)
from test_cuda_answers import _AlwaysOn  # noqa: E402

pytestmark = pytest.mark.torch

US = 1_000
PAGE = 4096
SHARES = (0.2, *[0.05] * 12, *[0.02] * 10)
#: Models of these names; a number behind "steps" is that of their steps.
TIMES_NS = {
    "long": 8 * MS,
    "middle": 4 * MS,
    "short": MS // 2,
    "steps10": 20 * MS,
    "steps4": 80 * MS,
}
#: Nodes of each of their parts.
NODES = {"steps10": 1, "steps4": 100}


class FakeStage:
    """Programs of the fake driver, prepared by the real bench and cut by the real cutter."""

    def __init__(
        self, jobs: Mapping[int, Job], preempt: bool, *, one_pool: bool = False, broken: str = ""
    ) -> None:
        self.clock = VirtualClock()
        self.driver = FakeDriver(self.clock)
        # The fake has two pools; more of them, so that each job has one.
        self.driver._pools += [self.driver._block(4096) for _ in range(4)]
        self.driver._pool_used += [0] * 4
        self.jobs, self.levels = jobs, levels_of(jobs)
        self.preempt, self.broken = preempt and len(jobs) > 1, broken
        self.gate = Gate(self.clock)
        self.streams = {
            number: FakeStream(-2 - level, pool=0 if one_pool or not self.preempt else number)
            for number, level in self.levels.items()
        }
        self.images = HostImages(self.driver)
        self.programs: dict[str, Any] = {}
        self.weights: dict[int, Any] = {}
        self.closed = self.entered = 0
        self.loads: list[int] = []
        self.spoilt: list[weakref.ref[FakeStream]] = []

    def build(self, number: int, job: Job) -> None:
        if job.model == "unknown":
            raise InvalidConfig("there is no such model")
        self.weights[number] = np.random.default_rng(number).integers(0, 256, PAGE + 40, np.uint8)

    def allocate(self) -> None:
        streams = {program_name(n, self.jobs[n]): stream for n, stream in self.streams.items()}
        if self.preempt:
            lane: ExecLane = LeveledExecLane(
                self.driver, self.clock, streams=streams, gate=self.gate
            )
        else:
            first = next(iter(streams.values()))
            lane = ExecLane(self.driver, first, self.clock, lambda: 0, NoBlackbox())
        self.device = CudaDevice(
            self.driver,
            self.programs,
            self.images.images,
            cache=self.driver.device_block(2 * len(self.weights) * PAGE),
            page_bytes=PAGE,
            stream=next(iter(streams.values())),
            clock=self.clock,
            stay_bytes=0,
            lane=lane,
        )

    def prepare(self, number: int) -> Made:
        job = self.jobs[number]
        if job.model == self.broken:
            spoilt = FakeStream(0)  # as the model that is given up holds memory of the device
            self.spoilt.append(weakref.ref(spoilt))
            raise OutOfDeviceMemory("the GPU has no room")
        name, stream = program_name(number, job), self.streams[number]
        program = self._program(name, job, stream)
        self.images.provide(name, self.weights[number], 1)
        background: Any = _AlwaysOn(self.clock)
        cuts = self.preempt and is_cut(job, self.levels[number], max(self.levels.values()))
        preemption = None
        if cuts:
            cutter = Cutter(self.driver, background, stream, self.gate, Aim())
            spare = Bench(self.driver, background, stream, clock=self.clock)
            preemption = Preemption(self.driver, cutter, spare, clock=self.clock)
        bench = Bench(
            self.driver,
            background,
            stream,
            clock=self.clock,
            preemption=preemption,
            gate=self.gate,
        )
        model = OneTensor(name, (ROW_IN,), "uint8")
        source = Source(program, self.weights[number], model, True, (), None, wish_of(job))
        lines: list[str] = []
        image = self.images.images[name][0]
        bench.profile(source, image, [job.batch], max_exec_ns=2**62, note=lines.append)
        made = Made(name, program, Class(job.batch), ["random weights"])
        cut_notes(made, job, wanted=cuts, lines=lines)
        self.programs[name] = program
        self.device.instances[name] = 1
        program.ran_with.clear()
        return made

    def _program(self, name: str, job: Job, stream: FakeStream) -> FakeProgram:
        times = {1: TIMES_NS[job.model], job.batch: TIMES_NS[job.model]}
        if job.model.startswith("steps"):
            steps = int(job.model.removeprefix("steps"))
            program: FakeProgram = SteppedProgram(
                name,
                self.driver,
                PAGE + 40,
                {},
                steps=steps,
                nodes=NODES[job.model],
                stream=stream,
            )
        else:
            program = FakeProgram(name, self.driver, PAGE + 40, {}, shares=SHARES, stream=stream)
        program.exec_ns = times
        return program

    def enter(self) -> None:
        self.entered += 1

    def loaded(self, number: int) -> None:
        self.loads.append(number)
        self.images.forget(program_name(number, self.jobs[number]))

    def memory(self, number: int) -> tuple[int, int]:
        return 10 + number, 20 + number

    def close(self) -> None:
        self.closed += 1


def job(model: str, priority: int = 0, **more: Any) -> Job:
    return Job(name=f"{model}-{priority}", model=model, priority=priority, **more)


class Rig:
    """A lane on a fake stage."""

    def __init__(
        self,
        *jobs: Job,
        preempt: bool = True,
        one_pool: bool = False,
        broken: str = "",
        **more: Any,
    ) -> None:
        self.stages: list[FakeStage] = []

        def opened(jobs: Mapping[int, Job], preempt: bool) -> Any:
            self.stages.append(FakeStage(jobs, preempt, one_pool=one_pool, broken=broken))
            return self.stages[0]

        self.lane = GraphLane(
            dict(enumerate(jobs)),
            device="cuda:0",
            seed=3,
            preempt=preempt,
            open_stage=opened,
            **more,
        )
        self.prepared = {each.job: each for each in self.lane.prepare()}
        self.stage = self.stages[0]
        self.clock = self.stage.clock
        self.ended: list[Ended] = []

    def start(self, job: int, number: int, priority: int = 0) -> None:
        now_ns = self.clock()
        self.lane.start(Start(job, number, priority), now_ns=now_ns)

    def run(self, for_ns: int) -> None:
        end_ns = self.clock.now_ns + for_ns
        while self.clock.now_ns < end_ns:
            self.ended += self.lane.poll(now_ns=self.clock())
            self.lane.pass_time(min(end_ns, self.clock.now_ns + 50 * US))
            self.clock.now_ns += US

    def finish(self) -> list[Ended]:
        for _ in range(100_000):
            if self.lane.next_event_ns() is None:
                return self.ended
            self.run(50 * US)
        raise AssertionError("it does not end")


def test_a_job_runs_and_its_device_time_is_what_the_model_takes() -> None:
    rig = Rig(job("middle"), preempt=False, check_every=0)
    for number in range(3):
        rig.start(0, number)
    ended = rig.finish()
    assert [each.number for each in ended] == [0, 1, 2]
    for each in ended:
        assert not each.reason and not each.pauses and not each.differs
        assert TIMES_NS["middle"] <= each.device_ns <= TIMES_NS["middle"] + 20 * US
        assert each.device_ns <= each.ended_ns - each.started_ns
    # One behind the other, without a turn of the loop between.
    assert ended[1].started_ns - ended[0].ended_ns < 10 * US
    prepared = rig.prepared[0]
    assert prepared.runs is Run.GRAPHS and prepared.boundaries == 0
    assert abs(prepared.exec_ns - TIMES_NS["middle"]) < 100 * US
    assert "random weights" in prepared.note and len(prepared.answer) == 16
    assert rig.stage.loads == [0] and not rig.stage.images.images
    assert rig.lane.memory() == {0: (10, 20)} and not rig.lane.preemptive and rig.lane.takes == 2
    assert len(rig.lane.warmups) == 3 and not rig.lane.warmups[0].reason


def test_a_higher_job_goes_first_at_a_boundary_and_the_pause_says_by_whom() -> None:
    rig = Rig(job("long"), job("short", 1), check_every=1)
    boundary_ns = rig.prepared[0].boundary_ns
    assert rig.prepared[0].boundaries > 5 and boundary_ns < 2 * MS
    segments_ns = rig.prepared[0].segments_ns
    assert len(segments_ns) == rig.prepared[0].boundaries + 1
    assert list(segments_ns) == sorted(segments_ns) and segments_ns[-1] <= boundary_ns
    assert rig.prepared[1].segments_ns == ()
    rig.start(0, 0)
    rig.run(3 * MS)
    arrived_ns = rig.clock.now_ns
    rig.start(1, 7, priority=1)
    short, long = rig.finish()
    assert (short.job, short.number, long.job) == (1, 7, 0)
    assert short.ended_ns - arrived_ns < TIMES_NS["short"] + boundary_ns + 200 * US
    (pause,) = long.pauses
    assert (pause.job, pause.by) == (0, 1)
    assert arrived_ns <= pause.wanted_ns <= pause.started_ns == short.started_ns
    assert pause.resumed_ns >= short.ended_ns
    assert 0 < long.paused_ns <= pause.resumed_ns - pause.started_ns + boundary_ns
    assert abs(long.device_ns - TIMES_NS["long"]) < 300 * US
    assert not long.differs and not short.differs and rig.lane.compared == {0: 3, 1: 3}


def test_what_interrupts_is_interrupted_itself() -> None:
    rig = Rig(job("steps10"), job("middle", 1), job("short", 2), check_every=1)
    assert rig.lane.takes == 5 and rig.lane.preemptive
    rig.start(0, 0)
    rig.run(6 * MS)
    rig.start(1, 0, priority=1)
    rig.run(3 * MS)
    rig.start(2, 0, priority=2)
    ended = rig.finish()
    assert [each.job for each in ended] == [2, 1, 0]
    short, middle, long = ended
    assert [pause.by for pause in middle.pauses] == [2]
    assert [pause.by for pause in long.pauses] == [1]
    assert long.pauses[0].resumed_ns >= middle.ended_ns
    for each in ended:
        model = ("steps10", "middle", "short")[each.job]
        assert abs(each.device_ns - TIMES_NS[model]) < 300 * US, model
        assert not each.differs
    assert short.paused_ns == 0


def test_a_resumed_run_that_ends_while_a_lower_one_resumes_has_its_own_time() -> None:
    rig = Rig(job("long"), job("middle", 1), job("short", 2), check_every=0)
    for turn_ in range(3):
        rig.start(0, turn_)
        rig.run(2 * MS)
        rig.start(1, turn_, priority=1)
        rig.run(2 * MS)
        rig.start(2, turn_, priority=2)
        rig.finish()
    times = {0: "long", 1: "middle", 2: "short"}
    for each in rig.ended:
        assert abs(each.device_ns - TIMES_NS[times[each.job]]) < 300 * US, times[each.job]


def test_jobs_that_shared_a_pool_would_be_found_out() -> None:
    """The check of the checks: the fake sees it, and so does the lane."""
    rig = Rig(job("long"), job("short", 1), one_pool=True, check_every=1)
    rig.start(0, 0)
    rig.run(4 * MS)
    rig.start(1, 0, priority=1)
    rig.finish()
    assert [each.differs for each in rig.ended if each.job == 0] == [True]
    assert rig.lane.differed[0] == 1


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))]
)
def test_answers_are_right_whatever_interrupts_whatever(seed: int) -> None:
    chance = random.Random(seed)
    models = ["long", "steps10", "middle", "short"]
    # With one priority for all, each is cut.
    jobs = [job(model, chance.randrange(3) if seed % 2 else 0) for model in models]
    rig = Rig(*jobs, check_every=2)
    numbers = [0] * len(jobs)
    out: set[tuple[int, int]] = set()
    withdrawn = 0
    for _ in range(120):
        place = chance.randrange(len(jobs))
        if len(out) < rig.lane.takes:
            # Two requests of one job may be here, and any of them may want to go first.
            rig.start(place, numbers[place], priority=chance.randrange(5))
            out.add((place, numbers[place]))
            numbers[place] += 1
        elif chance.random() < 0.3:
            one = chance.choice(sorted(out))
            if rig.lane.withdraw(Withdraw(*one)):
                out.remove(one)
                withdrawn += 1
        before = len(rig.ended)
        rig.run(chance.randrange(100 * US, 3 * MS))
        out -= {(each.job, each.number) for each in rig.ended[before:]}
    rig.finish()
    keys = [(each.job, each.number) for each in rig.ended]
    assert len(keys) == len(set(keys)) == sum(numbers) - withdrawn
    assert sum(rig.lane.compared.values()) > 16 and not any(rig.lane.differed.values())
    assert any(each.pauses for each in rig.ended) or seed % 2
    for each in rig.ended:
        assert not each.reason and not each.differs
        assert abs(each.device_ns - TIMES_NS[models[each.job]]) < 600 * US
        for pause in each.pauses:
            assert pause.by not in (-1, each.job)
            assert each.started_ns <= pause.started_ns <= pause.resumed_ns <= each.ended_ns


@pytest.mark.parametrize("policy", list(Policy))
def test_the_brain_drives_the_lane(policy: Policy) -> None:
    rig = Rig(job("long"), job("short", 1))
    brain = ShareBrain(
        [
            Load(job=0, clients=Clients(), count=12, expected_ns=TIMES_NS["long"]),
            Load(
                job=1,
                clients=Clients(think_ns=3 * MS),
                priority=1,
                count=20,
                slo_ns=3 * MS,
                expected_ns=TIMES_NS["short"],
            ),
        ],
        policy=policy,
        takes=rig.lane.takes,
        preemptive=rig.lane.preemptive,
        seed=1,
    )
    at_ns = rig.clock.now_ns + MS
    brain.begin(at_ns, at_ns + 10_000 * MS)
    rows: list[Request | Interruption] = []
    for _ in range(200_000):
        turn(brain, rig.lane, rig.clock)
        rows += brain.rows()
        if brain.done:
            break
        if not rig.lane.pass_time(brain.next_wakeup_ns()):
            rig.clock.now_ns += 10 * US
    assert brain.done
    requests = [row for row in rows if isinstance(row, Request)]
    assert sorted((row.job, row.number) for row in requests) == [
        *((0, n) for n in range(12)),
        *((1, n) for n in range(20)),
    ]
    if policy is Policy.PRIORITY:
        slowest = max(row.latency_ns for row in requests if row.job == 1)
        assert slowest < TIMES_NS["short"] + rig.prepared[0].boundary_ns + 300 * US
        assert any(isinstance(row, Interruption) for row in rows)


# ------------------------------------------------------------------------------------ what goes wrong


def test_a_model_that_cannot_be_prepared_leaves_the_others() -> None:
    rig = Rig(job("unknown"), job("short", 1), job("middle"), broken="middle")
    assert set(rig.prepared) == {1}
    failures = rig.lane.failures
    assert set(failures) == {0, 2}
    assert not failures[0].out_of_memory and "no such model" in failures[0].reason
    assert failures[2].out_of_memory and isinstance(failures[2].error, OutOfDeviceMemory)
    assert [each() for each in rig.stage.spoilt] == [None], "its memory is free for the others"
    rig.start(0, 0)
    rig.start(1, 0)
    ended = {each.job: each for each in rig.finish()}
    assert ended[0].fatal and "no such model" in ended[0].reason and not ended[1].reason


def test_if_no_model_can_be_prepared_the_first_error_is_raised() -> None:
    with pytest.raises(InvalidConfig, match="no such model"):
        Rig(job("unknown"), job("short"), broken="short")
    with pytest.raises(OutOfDeviceMemory):
        Rig(job("short"), broken="short")
    with pytest.raises(InvalidConfig, match="needs a job"):
        GraphLane({}, device="cuda:0", seed=0, preempt=False)


def test_a_lost_device_ends_every_request() -> None:
    rig = Rig(job("long"), job("short", 1), check_every=1)
    rig.start(0, 0)
    rig.start(1, 0, priority=1)
    rig.run(2 * MS)
    rig.start(0, 1)
    before = len(rig.ended)
    rig.stage.driver.fault = "an illegal address"
    rig.run(MS)
    rig.start(0, 2)
    lost = rig.finish()[before:]
    assert lost and all(each.fatal and "illegal address" in each.reason for each in lost)
    numbers = [(each.job, each.number) for each in rig.ended]
    assert sorted(numbers) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    rig.lane.close()
    rig.lane.close()
    assert rig.stage.closed == 1 and rig.lane.memory() == {0: (0, 0), 1: (0, 0)}


def test_a_request_is_taken_back_until_it_has_begun() -> None:
    rig = Rig(job("middle"), preempt=False, check_every=2)
    rig.start(0, 0)  # not compared
    rig.run(MS)
    rig.start(0, 1)  # compared
    rig.run(MS)
    assert rig.lane.withdraw(Withdraw(0, 1))
    assert not rig.lane.withdraw(Withdraw(0, 1)), "it is not here any more"
    assert not rig.lane.withdraw(Withdraw(0, 0)), "it runs"
    rig.start(0, 2)
    assert rig.lane.withdraw(Withdraw(0, 2))
    rig.start(0, 1)
    rig.start(0, 3)
    assert [each.number for each in rig.finish()] == [0, 1, 3]
    before = rig.lane.compared[0]
    rig.start(0, 4)  # the buffers of what was taken back are used again
    rig.start(0, 5)
    assert [each.number for each in rig.finish()] == [0, 1, 3, 4, 5]
    assert rig.lane.compared[0] == before + 1


def test_another_thread_serves_than_prepared() -> None:
    import threading

    rig = Rig(job("short"), preempt=False)
    rig.start(0, 0)
    thread = threading.Thread(target=rig.finish)
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and rig.stage.entered == 1 and len(rig.ended) == 1


def test_a_lane_beside_others_waits_no_longer_than_it_may() -> None:
    rig = Rig(job("long"), preempt=False, stream_priority=-3)
    rig.start(0, 0)
    rig.lane.poll(now_ns=rig.clock())
    before_ns = rig.clock.now_ns
    assert rig.lane.pass_time(None)
    assert rig.clock.now_ns - before_ns < 30 * US
    rig.finish()
    assert not rig.lane.pass_time(None) and not rig.lane.pass_time(rig.clock.now_ns + 10 * MS)


# --------------------------------------------------------------------------------- boundaries and names


def test_which_models_are_captured() -> None:
    captured: Sequence[str] = (
        "bert",
        "gpt",
        "gpt2",
        "whisper",
        "diffusion",
        "originals/gpt",
        "diffusion/sd15",
        "resnet50",
        "torchvision/vit_l_16",
        "deeplabv3_resnet50",
        "fcn_resnet50",
        "lraspp_mobilenet_v3_large",
        "timm/resnet10t",
        "bert_base",
    )
    others: Sequence[str] = (
        "fasterrcnn_resnet50_fpn",
        "torchvision/retinanet_resnet50_fpn",
        "fcos_resnet50_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
        "maskrcnn_resnet50_fpn_v2",
        "keypointrcnn_resnet50_fpn",
        "tiny:3:5",
        "my_models:net",
        "",
    )
    assert [name for name in captured if not can_capture(Job(name="a", model=name))] == []
    assert [name for name in others if can_capture(Job(name="a", model=name))] == []
    assert not can_capture(Job(name="a", model="bert", command=("true",)))
    assert can_capture(Job(name="a", model="my_models:net", run=Run.GRAPHS))


def test_precisions_by_their_names() -> None:
    assert dtype_of(job("bert"), "float32") == "float32"
    assert dtype_of(job("bert", dtype="fp16"), "float32") == "float16"
    with pytest.raises(InvalidConfig, match="int8"):
        dtype_of(job("bert", dtype="int8"), "float32")


@pytest.mark.parametrize(("think_ns", "linger_ns"), [(0, 0), (0, 200 * US), (MS, 200 * US)])
def test_the_lane_lingers_for_the_next_request_of_a_closed_loop(
    think_ns: int, linger_ns: int
) -> None:
    rig = Rig(job("long"), job("short", 1), check_every=0)
    loads = [
        Load(job=0, clients=Clients(), count=3, expected_ns=TIMES_NS["long"]),
        Load(job=1, clients=Clients(think_ns=think_ns), priority=1, count=12),
    ]
    brain = ShareBrain(
        loads,
        policy=Policy.PRIORITY,
        takes=rig.lane.takes,
        preemptive=rig.lane.preemptive,
        linger_ns=linger_ns,
    )
    at_ns = rig.clock.now_ns + MS
    brain.begin(at_ns, at_ns + 10_000 * MS)
    rows: list[Request | Interruption] = []
    for _ in range(200_000):
        turn(brain, rig.lane, rig.clock)
        rows += brain.rows()
        if brain.done:
            break
        rig.clock.now_ns += 5 * US  # what the loop takes: the gap between two requests
        rig.lane.pass_time(brain.next_wakeup_ns())
    assert brain.done
    high = [row for row in rows if isinstance(row, Request) and row.job == 1]
    assert len(high) == 12
    waited = sum(row.latency_ns > TIMES_NS["short"] + 100 * US for row in high)
    # Without lingering, and with a client that thinks longer, each waits for a segment of the long one.
    assert waited == 0 if linger_ns > think_ns else waited >= 8
