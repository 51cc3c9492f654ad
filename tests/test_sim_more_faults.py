"""Faults that end a process well, second controllers, failing loads, guests that stay: each is noticed."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import mutants
from made_messages import a_heartbeat, a_welcome, an_infer
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.clock_sync import ClockSync
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.arrivals import Arrivals
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.unloading import Unloading
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.emulated import EmulatedGpu
from slosched.core.worker.interface import (
    DeviceEvent,
    EvictPages,
    Op,
    OpDone,
    OpKind,
    ToController,
    joined,
)
from slosched.core.worker.link import Link
from slosched.core.worker.memory import WeightsCache
from slosched.messages import HeartbeatAck, Infer, Span
from slosched.sim.faults import Fault, FaultPlan
from slosched.sim.fuzz import Outcome, run_case
from slosched.sim.fuzz_case import SmallLoad, drawn_spec, with_plan
from slosched.sim.guests import AGAIN, DEAF, GOODBYE, GuestPlan
from slosched.sim.marks import Marks, Payload
from slosched.sim.network import Network
from slosched.sim.spec import SimSpec
from slosched.sim.truth import WorkerTruth
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import ModelUse

MS, S = NS_PER_MS, NS_PER_S


def case(*faults: Fault, pages: int = 8, **changes: object) -> SimSpec:
    """Two workers of two GPUs each, two models of different outputs in two copies each, batches."""
    exec_ns = {1: 4 * MS, 2: 6 * MS, 4: 10 * MS, 8: 18 * MS}
    models = {
        name: ModelProfile(
            name, exec_ns, 4 * MS, 2 * 2**24, input_shape=(8,), output_shape=(8 + 4 * place,)
        )
        for place, name in enumerate(("net0", "net1"))
    }
    uses = (ModelUse("net0", 2), ModelUse("net1", 2))
    spec = SimSpec(
        workload=SmallLoad(uses, (25.0,) * 4, 1, 150 * MS, bunch=4),
        scheduler=SchedulerConfig(max_exec_ns=S),
        profiles=(GpuProfile("small", models, pages * 2**24),),
        gpus=4,
        gpus_per_worker=2,
        inputs=True,
        duration_ns=60 * S,
        check=True,
    )
    return with_plan(replace(spec, **changes), FaultPlan(faults))  # type: ignore[arg-type]


def told(outcome: Outcome, words: str) -> list[str]:
    return [line for line in outcome.log if words in line]


# -------------------------------------------------------------------------------- what each does


def test_a_worker_that_is_told_to_end_says_goodbye_and_is_followed_by_another() -> None:
    outcome = run_case(1, case(Fault("leave", "worker 0", S, 700 * MS)))
    assert not outcome.failure
    assert told(outcome, "worker 0 says goodbye: it gets nothing new")
    assert told(outcome, "worker 0 has left") and told(outcome, "back after 1 loss")
    assert outcome.sights.infers_lost == 0


def test_a_controller_that_drains_answers_everything_and_is_followed_by_another() -> None:
    outcome = run_case(1, case(Fault("drain", "controller", S, 300 * MS)))
    assert not outcome.failure and outcome.tail > 0.98
    assert len(told(outcome, "worker 0 on virtual joined")) == 2


def test_a_drain_that_a_death_cuts_short_is_nobodys_failure() -> None:
    faults = (
        Fault("drain", "controller", S, 300 * MS),
        Fault("restart", "controller", S + 50 * MS, 500 * MS),
        Fault("drain", "controller", S + 100 * MS, 10 * MS),
        Fault("pause", "controller", 2 * S, S),
        Fault("drain", "controller", 2 * S + MS, 10 * MS),
    )
    outcome = run_case(1, case(*faults))
    assert not outcome.failure and outcome.tail > 0.98


def test_a_second_controller_is_refused_while_ours_is_heard() -> None:
    outcome = run_case(1, case(Fault("intrude", "worker 0", 500 * MS, 2 * S)))
    assert not outcome.failure and not told(outcome, "lost")


def test_a_second_controller_gets_a_worker_that_ours_left_alone_and_ours_gets_it_back() -> None:
    faults = (
        Fault("partition", "worker 0", 500 * MS, 1500 * MS),
        Fault("intrude", "worker 0", S, 2 * S),
    )
    outcome = run_case(1, case(*faults))
    assert not outcome.failure and outcome.tail > 0.98
    assert told(outcome, "worker 0 cannot be used: it is in use by another controller")
    assert told(outcome, "back after 1 loss")


def test_loads_that_fail_are_tried_again() -> None:
    faults = [
        Fault("spoil", f"worker {w} GPU {g}", 0, 2 * S, probability=0.5)
        for w in range(2)
        for g in range(2)
    ]
    outcome = run_case(1, case(*faults, pages=4))
    assert not outcome.failure and outcome.tail > 0.9


def with_guest(way: str, *faults: Fault, goes_ns: int = S) -> SimSpec:
    """Beside the client one that sends 60 requests at a time."""
    plan = GuestPlan(
        name="guest 0",
        model="net1",
        comes_ns=0,
        goes_ns=goes_ns,
        every_ns=50 * MS,
        burst=60,
        slo_ns=2 * S,
        way=way,
    )
    spec = case(*faults, network=Network(jitter_ns=300_000))
    assert isinstance(spec.workload, SmallLoad)
    return replace(spec, workload=replace(spec.workload, guests=(plan,)))


def test_a_guest_that_is_started_again_gets_no_answer_of_its_former_life() -> None:
    outcome = run_case(1, with_guest(AGAIN))
    assert not outcome.failure
    assert told(outcome, "guest 0 is started again with ")
    assert told(outcome, "guest 0 says goodbye")


def test_a_guest_that_reads_nothing_is_given_up_and_known_again_when_it_reads() -> None:
    outcome = run_case(1, with_guest(DEAF))
    assert not outcome.failure and outcome.sights.left_by_a_break > 0
    assert told(outcome, "guest 0 reads nothing") and told(outcome, "guest 0 says goodbye")


def unloading(*, force: bool = False, model: str = "net1") -> SimSpec:
    """The guest loads four copies, of which the client uses two, and unloads them behind a burst."""
    spec = with_guest(GOODBYE)
    assert isinstance(spec.workload, SmallLoad)
    (plan,) = spec.workload.guests
    plan = replace(plan, copies=4, unloads_ns=600 * MS, force=force, model=model)
    return replace(spec, workload=replace(spec.workload, guests=(plan,)))


def test_a_guest_unloads_what_it_alone_uses_and_loads_it_again() -> None:
    outcome = run_case(1, unloading())
    assert not outcome.failure
    assert told(outcome, "guest 0 unloads 'net1'") and told(outcome, "is told: 2 unloaded, 2 kept")
    assert (outcome.sights.unloads, outcome.sights.unloaded) == (1, 2)
    refused = run_case(1, unloading(force=True))
    assert not refused.failure and refused.sights.unloads == 0
    assert told(refused, "is told: only operators may unload what others use")


def test_an_operators_unload_reaches_a_guest_that_sends() -> None:
    """Its requests that wait are answered, the next ones are refused, and it loads the model again."""
    spec = unloading(force=True, model="net2")
    profile, load = spec.profiles[0], spec.workload
    own = replace(profile.models["net1"], name="net2")
    profiles = (replace(profile, models={**profile.models, "net2": own}),)
    assert isinstance(load, SmallLoad)
    (first,) = load.guests
    second = replace(first, name="guest 1", unloads_ns=-1, goes_ns=2 * S)
    spec = replace(
        spec,
        workload=replace(load, guests=(first, second)),
        profiles=profiles,
        scheduler=replace(spec.scheduler, operators=("guest 0",)),
    )
    outcome = run_case(1, spec)
    assert not outcome.failure and outcome.sights.unloaded == 4
    assert told(outcome, "guest 0 is told: 4 unloaded, 0 kept")
    assert told(outcome, "guest 1 says goodbye with")


# -------------------------------------------------------------------------- what is watched


def watched(pages: int = 2) -> tuple[WorkerTruth, list[int], EmulatedGpu]:
    model = ModelProfile("net", {1: 2 * MS}, MS, 2**24)
    profile = GpuProfile("tiny", {"net": model}, weights_cache_bytes=pages * 2**24)
    time_ns = [S]
    truth = WorkerTruth("worker 0", profile, lambda: time_ns[0])
    welcome = a_welcome(1, (), version="", host="")
    truth.performed(ToController(b"", welcome))
    return truth, time_ns, EmulatedGpu(profile)


def infer(latest_ns: int, session: int = 1) -> Infer:
    return an_infer(session, 7, earliest_ns=S, latest_ns=latest_ns, expected_duration_ns=2 * MS)


def op(op_id: int, kind: OpKind, action_id: int = 1) -> Op:
    return Op(op_id, kind, 0, 0, action_id, 1, 1, (), "net")


def test_the_truth_sees_an_action_of_another_session() -> None:
    truth, _, _ = watched()
    with pytest.raises(InvariantViolated, match="an action of session 2 is taken in session 1"):
        truth.accepted(1, infer(2 * S, session=2), 0)


def test_a_jump_excuses_a_start_until_a_heartbeat_has_shown_it() -> None:
    def starts(*, beats: bool, late_ns: int) -> None:
        truth, time_ns, _ = watched()
        truth.jumped(-100 * MS)
        if beats:
            truth.performed(
                ToController(
                    b"",
                    a_heartbeat(1, S, clock_error_ns=0),
                )
            )
            truth.heard(HeartbeatAck(S, S, S), S + MS, 1000)
        truth.accepted(1, infer(S + 10 * MS), 1000)
        time_ns[0] = S + 10 * MS + late_ns
        truth.starts(op(1, OpKind.EXEC))

    starts(beats=False, late_ns=100 * MS)
    starts(beats=True, late_ns=MS // 2)
    with pytest.raises(InvariantViolated, match="outside"):
        starts(beats=True, late_ns=10 * MS)


def test_what_was_converted_before_a_jump_stays_excused() -> None:
    truth, time_ns, _ = watched()
    truth.accepted(1, infer(S + 10 * MS), 1000)
    truth.jumped(-100 * MS)
    truth.performed(ToController(b"", a_heartbeat(1, S, clock_error_ns=0)))
    truth.heard(HeartbeatAck(S, S, S), S + MS, 1000)
    time_ns[0] = S + 100 * MS
    truth.starts(op(1, OpKind.EXEC))


def test_an_exchange_that_a_jump_fell_into_shows_nothing() -> None:
    truth, time_ns, _ = watched()
    truth.performed(ToController(b"", a_heartbeat(1, S, clock_error_ns=0)))
    truth.jumped(100 * MS)
    truth.heard(HeartbeatAck(S, S, S), S + MS, 1000)
    truth.accepted(1, infer(S + 10 * MS), 1000)
    time_ns[0] = S + 100 * MS
    truth.starts(op(1, OpKind.EXEC))


def test_the_truth_sees_weights_given_up_under_what_runs_but_for_a_reload() -> None:
    for reload in (False, True):
        truth, time_ns, gpu = watched()
        device = truth.devices({0: gpu})[0]
        truth.accepted(1, infer(2 * S), 0)
        device.launch(op(1, OpKind.LOAD_WEIGHTS), now_ns=S)
        device.poll(now_ns=S + MS)
        time_ns[0] = S + MS
        device.launch(op(2, OpKind.EXEC), now_ns=S + MS)
        truth.performed(EvictPages(0, 0))
        if reload:
            device.launch(op(3, OpKind.LOAD_WEIGHTS), now_ns=S + MS)
            device.poll(now_ns=S + 9 * MS)
        else:
            with pytest.raises(InvariantViolated, match="were given up while action 1 ran"):
                device.poll(now_ns=S + 9 * MS)


class Interrupted(EmulatedGpu):
    """Reports that its execs ran in `segments`, with `pause_ns` (the right one if None)."""

    segments: tuple[Span, ...] = ()
    pause_ns: int | None = None

    def poll(self, *, now_ns: int) -> list[DeviceEvent]:
        return [self._with_segments(event) for event in super().poll(now_ns=now_ns)]

    def _with_segments(self, event: DeviceEvent) -> DeviceEvent:
        if not isinstance(event, OpDone) or event.op_id == 1 or not self.segments:
            return event
        span, pause_ns = joined(self.segments)
        if self.pause_ns is not None:
            pause_ns = self.pause_ns
        return OpDone(event.op_id, span, segments=self.segments, pause_ns=pause_ns)


def test_the_truth_checks_a_timeline_by_segment() -> None:
    """Loads, then runs an exec as one segment from S + 1 ms to S + 3 ms, then another one in segments."""

    def second_exec(*begins_ms: float, pause_ns: int | None = None) -> None:
        truth, time_ns, plain = watched()
        gpu = Interrupted(plain._profile)
        device = truth.devices({0: gpu})[0]
        device.launch(op(1, OpKind.LOAD_WEIGHTS), now_ns=S)
        device.poll(now_ns=S + MS)
        for action_id, begin_ns in ((2, S + MS), (3, S + 3 * MS)):
            truth.accepted(action_id, infer(2 * S), 0)
            time_ns[0] = begin_ns
            device.launch(op(action_id, OpKind.EXEC, action_id), now_ns=begin_ns)
            if action_id == 3:
                begins_ns = [S + round(begin * MS) for begin in begins_ms]
                gpu.segments = tuple(Span(b, b + MS, MS) for b in begins_ns)
                gpu.pause_ns = pause_ns
            device.poll(now_ns=begin_ns + 2 * MS)

    second_exec()
    second_exec(3)
    second_exec(3, 6)
    with pytest.raises(InvariantViolated, match="before the one ahead of it ended"):
        second_exec(2.5, 6)
    with pytest.raises(InvariantViolated, match="before the one ahead of it ended"):
        second_exec(4, 4.5)
    with pytest.raises(InvariantViolated, match="and reports"):
        second_exec(3, 6, pause_ns=0)


def test_an_output_of_another_model_is_told_by_its_size() -> None:
    marks = Marks(lambda ids: "so it went")
    sent = marks.input(b"me", 4, 32, 48)
    marks.compare(b"me", 4, [Payload(sent.mark, 48)])
    marks.compare(b"me", 4, [Payload(sent.mark, 32)], awaited=False)
    with pytest.raises(InvariantViolated, match="me got 32 bytes instead of 48"):
        marks.compare(b"me", 4, [Payload(sent.mark, 32)])


# ------------------------------------------------------------------------------- planted bugs

Plant = Callable[[pytest.MonkeyPatch], None]


def takes_although_it_drains(patch: pytest.MonkeyPatch) -> None:
    mutants.rewritten(patch, Arrivals, "infer", "if self.draining:", "if False:")


def forgets_requests_at_the_end(patch: pytest.MonkeyPatch) -> None:
    mutants.rewritten(patch, Scheduler, "_abandon_all", "while client.requests:", "while False:")


def keeps_pages_of_failed_loads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WeightsCache, "fail_load", lambda self, model_id, version: None)


def serves_whoever_asks(patch: pytest.MonkeyPatch) -> None:
    mutants.rewritten(patch, Link, "hello", "silent_ns < _KEEP_NS", "False")


def takes_any_session(patch: pytest.MonkeyPatch) -> None:
    mutants.rewritten(
        patch, WorkerBrain, "_accept", "message.session != self._link.session", "False"
    )


def keeps_unloaded_instances_at_workers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Unloading, "_has", lambda self, worker, model: False)


def keeps_unloaded_instances(patch: pytest.MonkeyPatch) -> None:
    mutants.rewritten(patch, Unloading, "tick", "if name in self._asked", "if False")


def unloads_and_uses_on(patch: pytest.MonkeyPatch) -> None:
    old = "user.models.pop(model.model_id, None)"
    mutants.rewritten(patch, Unloading, "_give_up_one", old, "pass")


def believes_old_exchanges(patch: pytest.MonkeyPatch) -> None:
    mutants.rewritten(patch, ClockSync, "add", "self._samples.clear()", "pass")


SPOILT = Fault("spoil", "worker 0 GPU 0", 0, 2 * S, probability=0.5)
HELD = (
    Fault("hold", "to worker 0", S, 1500 * MS),
    Fault("crash", "worker 0", 1200 * MS, 100 * MS),
)


@pytest.mark.parametrize(
    ("plant", "faults", "words"),
    [
        (
            takes_although_it_drains,
            (Fault("drain", "controller", S, S),),
            "when the controller drained",
        ),
        (
            forgets_requests_at_the_end,
            (Fault("drain", "controller", S + 15 * MS, 2 * MS),),
            "leaves .* unanswered",
        ),
        (keeps_pages_of_failed_loads, (SPOILT,), "it counts .* free pages on GPU 0"),
        (serves_whoever_asks, (Fault("intrude", "worker 0", S, S),), "takes another controller"),
        (believes_old_exchanges, (Fault("jump", "worker 0", S, by_ns=-300 * MS),), "outside"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_is_noticed_by_a_case_made_for_it(
    plant: Plant, faults: tuple[Fault, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_guest(GOODBYE, *faults, goes_ns=2 * S)
    assert not run_case(1, spec).failure
    plant(monkeypatch)
    failure = run_case(1, spec).failure
    assert re.search(words, failure), failure


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (keeps_unloaded_instances_at_workers, "still holds models .* which were unloaded"),
        (keeps_unloaded_instances, "4 instances of 'net1' are there; .* 2 were kept"),
        (unloads_and_uses_on, "guest 0 unloaded 'net1' and still uses it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_noticed_that_an_unload_leaves_something(
    plant: Plant, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    spec = unloading()
    assert isinstance(spec.workload, SmallLoad)
    (plan,) = spec.workload.guests
    plan = replace(plan, loads_again=False)
    failure = run_case(1, replace(spec, workload=replace(spec.workload, guests=(plan,)))).failure
    assert re.search(words, failure), failure


def test_every_bug_of_the_list_can_be_planted(tmp_path: Path) -> None:
    bugs = mutants.bugs()
    assert len({bug.name for bug in bugs}) == len(bugs) > 40
    lost = mutants.stale(bugs)
    assert not lost, "\n".join(lost)
    for place, bug in enumerate(bugs):
        ((file, _),) = bug.places(mutants.SOURCE)
        copy = tmp_path / str(place) / file.relative_to(mutants.SOURCE)
        copy.parent.mkdir(parents=True)
        shutil.copy(file, copy)
        ast.parse(bug.plant(tmp_path / str(place)).read_text())


def test_a_bug_whose_code_has_changed_is_told_with_the_place_where_it_was_looked_for() -> None:
    gone = mutants.Bug("a bug", "no such code", "pass", within="core/worker")
    common = mutants.Bug("another", "return", "pass", within="core/worker/link.py")
    first, second = mutants.stale([*mutants.bugs(["padding"]), gone, common])
    assert first == "a bug: 'no such code' is not to be found in src/slosched/core/worker"
    assert second.startswith("another: 'return' stands ") and second.endswith("link.py")


def test_cases_are_drawn_with_every_option() -> None:
    specs = [drawn_spec(seed) for seed in range(200)]
    configs = [spec.scheduler for spec in specs]
    assert {config.placement for config in configs} == {"gain", "demand", "lru"}
    assert {config.client_weights for config in configs} == {"value", "shares"}
    assert sum(bool(config.weights) for config in configs) > 40
    assert sum(config.max_client_requests < 100 for config in configs) > 40
    guests = [g for s in specs if isinstance(s.workload, SmallLoad) for g in s.workload.guests]
    assert len({guest.way for guest in guests}) == 5 and len({g.weight for g in guests}) == 3
