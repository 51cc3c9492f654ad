"""A path to a worker that was slow for a moment is not held to be slow for ten seconds."""

from __future__ import annotations

from slosched.codes import Code, code_name
from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.paths import Paths
from slosched.core.scheduler.state import Worker
from slosched.sim.faults import Fault, FaultPlan
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import Step
from slosched.workloads.mix import MixEntry, mix

MS, S = NS_PER_MS, NS_PER_S


def slow_path() -> tuple[Paths, Worker]:
    """A worker whose last hundred results came back after 10 ms each."""
    worker = Worker(0)
    paths = Paths({0: worker}, Changes())
    for _ in range(100):
        paths.learn(worker, there_ns=MS // 5, back_ns=10 * MS)
    paths.beat(worker, MS // 5, refused=0)
    return paths, worker


def beats_until_quick(paths: Paths, worker: Worker, refused: list[int]) -> int:
    for count, so_far in enumerate(refused, start=1):
        paths.beat(worker, MS // 5, refused=so_far)
        if worker.returns.expected_ns < MS:
            return count
    return len(refused) + 1


def test_heartbeats_alone_forget_a_slow_path_within_two_seconds_while_requests_are_refused() -> (
    None
):
    paths, worker = slow_path()
    assert worker.returns.expected_ns == 10 * MS
    assert beats_until_quick(paths, worker, [*range(1, 60)]) <= 10


def test_without_refusals_results_are_not_outweighed_by_heartbeats() -> None:
    """A large output takes longer than a heartbeat: a pause between requests must not hide that."""
    paths, worker = slow_path()
    assert beats_until_quick(paths, worker, [0] * 40) > 40


def test_while_results_come_a_heartbeat_is_one_of_many() -> None:
    paths, worker = slow_path()
    for refused in range(1, 40):
        paths.learn(worker, there_ns=MS // 5, back_ns=10 * MS)
        paths.beat(worker, MS // 5, refused=refused)
    assert worker.returns.expected_ns == 10 * MS


def test_half_a_second_of_late_results_costs_no_more_than_two_seconds_of_requests() -> None:
    """Refused were all of the next ten seconds, on idle GPUs, at an SLO of little more than an inference."""
    late = Fault("late", "from worker 0", at_ns=S, for_ns=S // 2, probability=1.0, by_ns=20 * MS)
    steps = tuple(Step(index, start_ns) for index, start_ns in enumerate((0, 4 * S)))
    spec = SimSpec(
        workload=mix([MixEntry("resnet50_v2", 4, 200.0, (0.0, 6 * MS))], 6 * S, steps),
        scheduler=SchedulerConfig(),
        profiles=(load_profile("v100"),),
        gpus=2,
        gpus_per_worker=2,
        faults=FaultPlan((late,)),
    )
    first, after = simulate(spec).steps
    assert first.in_time < 0.98 * first.sent  # it was disturbed
    assert after.in_time > 0.99 * after.sent


def test_a_gpu_that_was_slow_for_seconds_is_tried_again() -> None:
    """Its forecast was longer than every SLO: nothing was sent to it any more, and nothing learnt."""
    slow = tuple(
        Fault("slow", f"worker 0 GPU {gpu}", at_ns=S, for_ns=3 * S, factor=4.0) for gpu in (0, 1)
    )
    steps = tuple(Step(index, start_ns) for index, start_ns in enumerate((0, 9 * S)))
    spec = SimSpec(
        workload=mix([MixEntry("resnet50_v2", 4, 200.0, (0.0, 6 * MS))], 12 * S, steps),
        scheduler=SchedulerConfig(),
        profiles=(load_profile("v100"),),
        gpus=2,
        gpus_per_worker=2,
        faults=FaultPlan(slow),
    )
    first, after = simulate(spec).steps
    assert first.in_time < 0.8 * first.sent
    assert after.in_time > 0.99 * after.sent


def test_what_cannot_be_in_time_on_any_day_is_never_tried() -> None:
    spec = SimSpec(
        workload=mix([MixEntry("resnet50_v2", 4, 200.0, (0.0, 1 * MS))], 12 * S),
        scheduler=SchedulerConfig(),
        profiles=(load_profile("v100"),),
        gpus=2,
        gpus_per_worker=2,
    )
    (step,) = simulate(spec).steps
    assert step.codes == {code_name(Code.COULD_NOT_START_IN_TIME): step.sent}
