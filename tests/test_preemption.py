"""Preemption: an emulated GPU that stops at boundaries, what may interrupt what, and what a run shows of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from scheduler_rig import Rig
from slosched.analysis.trace import write_trace
from slosched.bound.capacity import capacity_bound
from slosched.bound.problem import Cluster, GpuKind, Problem, cells_of
from slosched.bound.problem import Request as BoundRequest
from slosched.bound.window import window_bound
from slosched.codes import ActionType
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.core.scheduler.lane import Lane
from slosched.core.scheduler.overtaking import Overtaking, Urgent
from slosched.core.worker.emulated import EmulatedGpu
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.gpu_profile import GpuProfile, ModelProfile
from slosched.messages import Span
from slosched.signature import Tensor
from slosched.sim.faults import FaultPlan
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry import action_log
from slosched.telemetry.segment_log import FILE_NAME, read_segment_log
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.lengths import Lengths
from slosched.workloads.mix import MixEntry, mix

MS = NS_PER_MS
TAU = MS // 2


def model(name: str, b1_ms: float) -> ModelProfile:
    times = {batch: round(b1_ms * MS * (1 + 0.6 * (batch - 1))) for batch in (1, 2, 4, 8)}
    return ModelProfile(name, times, 4 * MS, 2**26, input_shape=(8,), output_shape=(8,))


PROFILE = GpuProfile(
    "small",
    {
        "short": model("short", 2),
        "long": model("long", 50),
        "steps": ModelProfile("steps", {1: 50 * MS}, 4 * MS, 2**26, steps=4, step_ns={1: 10 * MS}),
    },
    weights_cache_bytes=2**30,
    boundary_ns=TAU,
)


# ------------------------------------------------------------------------------- the emulated GPU


class Gpu:
    """An emulated GPU in steps of its own events. Each exec's end is in `ended`, by op id."""

    def __init__(self, *, preemptive: bool = True) -> None:
        self.device = EmulatedGpu(PROFILE, preemptive=preemptive)
        self.ended: dict[int, OpDone] = {}

    def launch(self, op_id: int, name: str, at_ns: int, priority: int = 0) -> None:
        self.run(at_ns)
        op = Op(
            op_id=op_id,
            kind=OpKind.EXEC,
            gpu_id=0,
            model_id=0,
            action_id=op_id,
            batch_size=1,
            model_name=name,
            latest_ns=2**62,
            priority=priority,
        )
        assert self.device.launch(op, now_ns=at_ns) is None

    def run(self, until_ns: int = 2**61) -> None:
        while (due_ns := self.device.next_event_ns()) is not None and due_ns <= until_ns:
            for event in self.device.poll(now_ns=due_ns):
                assert isinstance(event, OpDone)
                self.ended[event.op_id] = event


def test_a_long_exec_stops_at_its_next_boundary_and_goes_on_afterwards() -> None:
    gpu = Gpu()
    gpu.launch(1, "long", 0)
    gpu.launch(2, "short", 10 * MS + 1, priority=1)
    gpu.run()
    stops_ns = 10 * MS + TAU
    assert gpu.ended[2].span == Span(stops_ns, stops_ns + 2 * MS, 2 * MS)
    assert gpu.ended[2].segments == ()
    done = gpu.ended[1]
    assert done.span == Span(0, 52 * MS, 50 * MS)
    assert done.pause_ns == 2 * MS
    assert done.segments == (
        Span(0, stops_ns, stops_ns),
        Span(stops_ns + 2 * MS, 52 * MS, 50 * MS - stops_ns),
    )


@pytest.mark.parametrize(("at_ms", "starts_ms"), [(3, 10), (21, 30), (39, 40), (41, 50)])
def test_a_run_in_steps_stops_between_two_steps_and_not_in_its_tail(
    at_ms: int, starts_ms: int
) -> None:
    gpu = Gpu()
    gpu.launch(1, "steps", 0)
    gpu.launch(2, "short", at_ms * MS, priority=1)
    gpu.run()
    long, urgent = gpu.ended[1], gpu.ended[2]
    assert urgent.span.begin_ns == starts_ms * MS
    assert long.span.duration_ns == 50 * MS and bool(long.segments) == (starts_ms < 50)


def test_urgent_execs_follow_one_another_before_the_long_one_goes_on() -> None:
    gpu = Gpu()
    gpu.launch(1, "long", 0)
    for op_id in (2, 3):
        gpu.launch(op_id, "short", MS, priority=1)
    gpu.run()
    assert [gpu.ended[i].span.begin_ns for i in (2, 3)] == [MS, 3 * MS]
    assert gpu.ended[1].pause_ns == 4 * MS and len(gpu.ended[1].segments) == 2


def test_what_is_not_urgent_waits_and_so_does_everything_without_preemption() -> None:
    for preemptive, priority in ((True, 0), (False, 1)):
        gpu = Gpu(preemptive=preemptive)
        gpu.launch(1, "long", 0)
        gpu.launch(2, "short", MS, priority=priority)
        gpu.run()
        assert gpu.ended[1].segments == () and gpu.ended[2].span.begin_ns == 50 * MS


def test_an_exec_that_ends_before_its_next_boundary_is_not_interrupted() -> None:
    gpu = Gpu()
    gpu.launch(1, "long", 0)
    gpu.launch(2, "short", 50 * MS - 1, priority=1)
    gpu.run()
    assert gpu.ended[1].segments == () and gpu.ended[2].span.begin_ns == 50 * MS


def test_an_interrupted_exec_is_not_given_up_and_an_urgent_one_that_waits_is() -> None:
    gpu = Gpu()
    gpu.launch(1, "long", 0)
    gpu.launch(2, "short", MS, priority=1)
    gpu.run(MS)
    assert gpu.device.withdraw(1) is None, "it has begun"
    gpu.launch(3, "short", MS + 1, priority=1)
    withdrawn = gpu.device.withdraw(3)
    assert withdrawn is not None and withdrawn.code
    gpu.run()
    assert set(gpu.ended) == {1, 2} and gpu.ended[1].pause_ns == 2 * MS


def test_when_what_was_urgent_is_withdrawn_before_the_boundary_nothing_stops() -> None:
    gpu = Gpu()
    gpu.launch(1, "long", 0)
    gpu.launch(2, "short", MS + 1, priority=1)
    assert gpu.device.withdraw(2) is not None
    gpu.run()
    assert gpu.ended[1].span == Span(0, 50 * MS, 50 * MS) and gpu.ended[1].segments == ()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_the_device_is_never_idle_nor_does_two_things_at_once(seed: int) -> None:
    draw, gpu, at_ns = Random(seed), Gpu(), 0
    work_ns, launched = 0, {}
    for op_id in range(1, 25):
        at_ns += draw.choice((0, 1, TAU, 3 * MS))
        name = draw.choice(("short", "short", "long"))
        gpu.launch(op_id, name, at_ns, priority=int(name == "short"))
        launched[op_id] = at_ns
        work_ns += (2 if name == "short" else 50) * MS
    gpu.run()
    assert set(gpu.ended) == set(range(1, 25))
    spans = sorted(
        (each.begin_ns, each.end_ns)
        for done in gpu.ended.values()
        for each in done.segments or (done.span,)
    )
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert sum(end - begin for begin, end in spans) == work_ns
    for (_, ended_ns), (begun_ns, _) in pairwise(spans):
        idle = begun_ns > ended_ns
        waits = [i for i, at in launched.items() if at <= ended_ns < gpu.ended[i].span.end_ns]
        assert not (idle and waits), f"idle from {ended_ns} to {begun_ns} beside {waits}"


# ------------------------------------------------------------------------------------ the lane


class Sent:
    """An action as a lane sees it."""

    def __init__(self, start_ms: float, exec_ms: float, priority: int = 0) -> None:
        self.predicted_start_ns = round(start_ms * MS)
        self.expected_duration_ns = round(exec_ms * MS)
        self.predicted_end_ns = self.predicted_start_ns + self.expected_duration_ns
        self.reaches_ns, self.priority, self.paused_ns = 0, priority, 0


def test_an_urgent_action_delays_what_it_interrupts_and_what_stands_behind_it() -> None:
    lane: Lane[Sent] = Lane("exec")
    running, behind = Sent(0, 50), Sent(50, 50)
    lane.add(running)
    lane.add(behind)
    urgent = Sent(10, 2, priority=1)
    lane.add(urgent)
    assert list(lane.outstanding) == [urgent, running, behind]
    assert (running.predicted_end_ns, behind.predicted_start_ns) == (52 * MS, 52 * MS)
    assert lane.busy_until_ns == 102 * MS and running.paused_ns == 2 * MS
    lane.finish(urgent, end_ns=13 * MS, took_ns=3 * MS)  # a millisecond longer than expected
    assert (running.predicted_end_ns, lane.busy_until_ns) == (53 * MS, 103 * MS)
    lane.finish(running, end_ns=53 * MS)
    assert (behind.predicted_start_ns, lane.busy_until_ns) == (53 * MS, 103 * MS)


@pytest.mark.parametrize("end_ms", [11.7, 12.3])
def test_a_boundary_that_comes_sooner_or_later_changes_no_pause(end_ms: float) -> None:
    lane: Lane[Sent] = Lane("exec")
    running, first, second = Sent(0, 50), Sent(10, 2, priority=1), Sent(12, 2, priority=1)
    for each in (running, first, second):
        lane.add(each)
    assert running.predicted_end_ns == 54 * MS
    lane.finish(first, end_ns=round(end_ms * MS), took_ns=2 * MS)
    assert second.predicted_end_ns == round((end_ms + 2) * MS)
    assert running.predicted_end_ns == 54 * MS
    lane.finish(second, end_ns=second.predicted_end_ns)  # it failed, and took nothing
    assert running.predicted_end_ns == lane.busy_until_ns == 52 * MS


def test_an_urgent_action_that_is_refused_leaves_the_next_one_its_boundary() -> None:
    lane: Lane[Sent] = Lane("exec")
    running, first, second = Sent(0, 50), Sent(10, 2, priority=1), Sent(12, 2, priority=1)
    for each in (running, first, second):
        lane.add(each)
    lane.finish(first, end_ns=3 * MS)
    assert (second.predicted_start_ns, second.predicted_end_ns) == (10 * MS, 12 * MS)
    assert running.predicted_end_ns == 52 * MS


def test_what_waits_behind_an_urgent_action_that_interrupted_nothing_starts_at_its_end() -> None:
    lane: Lane[Sent] = Lane("exec")
    urgent, waiting = Sent(10, 2, priority=1), Sent(11, 50)
    waiting.predicted_start_ns, waiting.predicted_end_ns = 12 * MS, 62 * MS
    lane.add(waiting)
    lane.outstanding.appendleft(urgent)
    lane.finish(urgent, end_ns=round(12.5 * MS), took_ns=2 * MS)
    assert waiting.predicted_start_ns == round(12.5 * MS)
    assert lane.busy_until_ns == round(62.5 * MS)


def test_a_long_action_may_end_while_an_urgent_one_is_on_its_way() -> None:
    lane: Lane[Sent] = Lane("exec")
    running, urgent = Sent(0, 50), Sent(49, 2, priority=1)
    lane.add(running)
    lane.add(urgent)
    lane.finish(running, end_ns=50 * MS)
    assert (urgent.predicted_start_ns, lane.busy_until_ns) == (50 * MS, 52 * MS)
    lane.finish(urgent, end_ns=52 * MS)
    assert not lane.outstanding and lane.busy_until_ns == 52 * MS


# ------------------------------------------------------------------------------------ whole runs


def spec(
    *,
    load: float = 0.7,
    share: float = 0.5,
    seed: int = 0,
    short_weight: float = 0.0,
    **options: Any,
) -> SimSpec:
    """Short and long requests for `load` of one GPU, of which the short ones take `share`.

    With a `short_weight` two clients send them; that of the short ones has it.
    """
    clients = ("short", "long") if short_weight else ("", "")
    entries = [
        MixEntry(
            "short",
            1,
            load * share * 500,
            (0.0, 10 * MS),
            client=clients[0],
            weight=short_weight or 1.0,
        ),
        MixEntry("long", 1, load * (1 - share) * 20, (0.0, 250 * MS), client=clients[1]),
    ]
    config: dict[str, Any] = {"max_exec_ns": NS_PER_S, "preempt": True} | options
    return SimSpec(
        workload=mix(entries, 4 * NS_PER_S),
        scheduler=SchedulerConfig(**config),
        profiles=(PROFILE,),
        gpus=1,
        inputs=True,
        check=True,
        seed=seed,
    )


def shares(run: SimSpec, out: Path | None = None) -> tuple[float, float]:
    """The shares of short and long requests that were in time, by the controller."""
    steps = simulate(run, out=out).steps
    by_group = {step.group: step.met / step.sent for step in steps}
    return by_group["short"], by_group["long"]


def gpu_time(run: SimSpec, out: Path) -> tuple[list[float], float]:
    """The parts of the GPU time that short and long answers in time took, and that late ones took."""
    simulate(run, out=out)
    log = action_log.read_action_log(out / action_log.FILE_NAME)
    infers = log["action_type"] == int(ActionType.INFER)
    served = [
        float(log["goodput"][infers & (log["model_id"] == model)].sum()) / (4 * NS_PER_S)
        for model in sorted(set(log["model_id"][infers].tolist()))
    ]
    all_of_it = float(log["worker_exec_duration"][infers].sum()) / (4 * NS_PER_S)
    return served, all_of_it - sum(served)


@pytest.mark.parametrize("share", [0.9, 0.5])
@pytest.mark.parametrize("load", [0.3, 0.7, 0.9])
def test_short_requests_gain_and_long_ones_lose_a_point_at_most(load: float, share: float) -> None:
    """Up to a load of 0.9; whole runs with the invariants held, inputs and marks."""
    without = shares(spec(load=load, share=share, preempt=False))
    with_it = shares(spec(load=load, share=share))
    if without[0] < 0.99:
        assert with_it[0] > without[0]
    assert with_it[1] >= without[1] - 0.01


def test_only_batches_that_the_worker_has_ready_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Urgent] = []
    best = Overtaking.best

    def watched(self: Overtaking, now_ns: int) -> Urgent | None:
        urgent = best(self, now_ns)
        found.extend([urgent] if urgent is not None else [])
        return urgent

    monkeypatch.setattr(Overtaking, "best", watched)
    sizes = {}
    for most_ms in (2, 5):
        found.clear()
        profile = replace(PROFILE, urgent_at_most_ns=most_ms * MS)
        simulate(replace(spec(load=0.9), profiles=(profile,)))
        sizes[most_ms] = {urgent.batch for urgent in found}
        assert all(PROFILE.model("short").exec_ns[b] <= most_ms * MS for b in sizes[most_ms])
    assert sizes[2] == {1} and len(sizes[5]) > 1


def test_a_long_program_of_a_model_whose_short_one_is_urgent_plans_with_no_interruption() -> None:
    """Its requests are refused at once where no ordinary plan serves them, as those of a long model are."""
    texts = ModelProfile(
        "texts",
        {},
        4 * MS,
        2**26,
        inputs=(Tensor("ids", "int64", (-1,)),),
        outputs=(Tensor("hidden", "float32", (-1, 4)),),
        exec_ns_at={8: {1: MS}, 512: {1: 20 * MS, 2: 38 * MS}},
    )
    entries = [
        MixEntry("texts", 1, 8, (0.0, 60 * MS), lengths=Lengths(512, 0.01, 500, 512)),
        MixEntry("long", 1, 2.5, (0.0, 2000 * MS)),
    ]
    outcomes = []
    for single_ms in (1, 6):  # the second makes no program of the model urgent
        short = {8: {1: single_ms * MS}, 512: texts.exec_ns_at[512]}
        models = {"texts": replace(texts, exec_ns_at=short), "long": model("long", 200)}
        run = SimSpec(
            workload=mix(entries, 8 * NS_PER_S),
            scheduler=SchedulerConfig(max_exec_ns=NS_PER_S, preempt=True),
            profiles=(replace(PROFILE, models=models),),
            gpus=1,
        )
        (step,) = [each for each in simulate(run).steps if each.group == "texts"]
        outcomes.append(step.codes)
    assert outcomes[0] == outcomes[1] and outcomes[0]["could not start in time"] > 5


def test_a_worker_that_is_restarted_with_preemption_is_used_for_it() -> None:
    rig = Rig(SchedulerConfig(preempt=True))
    rig.hello()
    rig.join()
    rig.load()
    (loaded,) = rig.scheduler.cluster.models.values()
    assert loaded.result is not None and loaded.result.urgent_ns == 0
    (gpu,) = rig.scheduler.cluster.gpus.values()
    table = gpu.exec_table(loaded.queue)
    assert table.boundaries_ns == {}
    bounds = (MS,) * len(loaded.result.batch_sizes)
    anew = msgspec.structs.replace(loaded.result, urgent_ns=2 * MS, boundaries_ns=bounds)
    gpu.worker.has_prepared("net", anew)  # more copies of what is there: what was learned is kept
    assert gpu.exec_table(loaded.queue) is table
    del gpu.worker.prepared["net"]
    gpu.worker.has_prepared("net", anew)
    assert set(gpu.exec_table(loaded.queue).boundaries_ns.values()) == {MS}
    rig.scheduler.catalog._preparations.take_one(gpu.worker, anew, loaded, rig.now_ns)
    assert loaded.result.urgent_ns == 2 * MS


@pytest.mark.parametrize("counts_as", ["value", "shares"])
def test_under_overload_no_gpu_time_is_wasted_and_the_split_follows_the_weights(
    counts_as: str, tmp_path: Path
) -> None:
    """What pauses make late has been computed for nothing, whatever the weights of the urgent ones are."""
    splits = []
    for weight in (0.25, 1.0, 4.0):
        run = spec(load=3.0, short_weight=weight, client_weights=counts_as, max_client_weight=4.0)
        parts, late = gpu_time(run, tmp_path / f"{weight:g}")
        assert late <= 0.01 and sum(parts) >= 0.95
        splits.append(parts[0] / sum(parts))
    assert splits[0] < splits[1] < splits[2]
    assert splits[0] < 0.3 and splits[2] > 0.4


def test_no_long_action_is_paused_for_longer_than_it_runs(tmp_path: Path) -> None:
    run = spec(load=1.2)
    shares(run, tmp_path / "run")
    directory = tmp_path / "run"
    log = read_segment_log(directory / FILE_NAME)
    assert len(log) > 50
    ran: dict[int, int] = {}
    pause: dict[int, int] = {}
    for action, begin, end, pause_ns in zip(
        *(log[name].tolist() for name in ("action_id", "begin", "end", "pause")), strict=True
    ):
        ran[action] = ran.get(action, 0) + end - begin
        pause[action] = pause_ns
    # The wait for a boundary is not a pause, and each urgent batch takes what was expected of it, exactly.
    assert all(pause[action] <= ran[action] for action in ran)
    traced = write_trace(directory, tmp_path / "trace.json")
    assert traced.clipped == 0 and traced.events > len(log)


def test_without_preemption_no_segment_is_written(tmp_path: Path) -> None:
    shares(spec(preempt=False), tmp_path / "run")
    directory = tmp_path / "run"
    assert not (directory / FILE_NAME).exists()


@pytest.mark.parametrize("seed", range(6))
def test_faults_while_an_inference_is_interrupted_break_nothing(seed: int) -> None:
    plan = FaultPlan.random(seed, [1, 1], until_ns=3 * NS_PER_S)
    run = replace(
        spec(load=1.6, seed=seed),
        gpus=2,
        noise=EmulationNoise(exec_sigma=0.02),
        faults=plan,
    )
    assert simulate(run).sent > 500


# ------------------------------------------------------------------------------------ the bound


def most_served(*, preempt: bool) -> int | None:
    """Short requests each 5 ms that must start at once, and one long request that has time enough."""
    long = BoundRequest(1, 0, 120 * MS)
    short = [BoundRequest(0, at * 5 * MS, (at * 5 + 2) * MS) for at in range(50)]
    requests = (long, *short)
    problem = Problem(
        kinds=(GpuKind("one", 1),),
        classes=(({1: 2 * MS},), ({1: 50 * MS},)),
        requests=requests,
        interruptible=frozenset({1} if preempt else ()),
    )
    return window_bound(problem, requests, grid_ns=MS, largest=200_000, time_limit_s=60.0).served


def test_the_bound_of_schedules_that_interrupt_is_above_that_of_those_that_do_not() -> None:
    assert most_served(preempt=True) == 51
    without = most_served(preempt=False)
    assert without is not None and 40 < without < 51


def test_no_run_that_interrupts_exceeds_its_bound() -> None:
    run = spec(load=1.5)
    network = run.network
    cluster = Cluster(
        (PROFILE,), network.to_worker_ns, network.from_worker_ns, 100 * MS, preempt=True
    )
    (cell,) = cells_of(run.workload, cluster)
    result = simulate(run)
    assert result.controller_satisfaction <= capacity_bound(cell.problem) / cell.requests + 0.01
