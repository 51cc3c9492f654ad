"""Faults in virtual time: plans, what each does, what is watched, and what the fuzzer finds."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from made_messages import an_infer
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.catalog import Catalog
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.sessions import Sessions
from slosched.core.worker.emulated import EmulatedGpu
from slosched.core.worker.interface import EvictPages, Op, OpKind
from slosched.errors import InvalidConfig, SloschedError
from slosched.messages import Infer, InferReply
from slosched.sim import fuzz
from slosched.sim.cluster import SimCluster
from slosched.sim.fault_file import load_plan
from slosched.sim.faults import KINDS, Fault, FaultPlan
from slosched.sim.fuzz import Outcome, run_case, run_seed, shrink
from slosched.sim.fuzz_case import FAULTS_END_NS, SmallLoad, drawn_spec, with_plan
from slosched.sim.network import Network
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.sim.truth import ClientTruth, WorkerTruth
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import ModelUse

MS, S = NS_PER_MS, NS_PER_S
#: 3 + 1 GPUs, INFER5, four instances.
SEED = 13
#: A case without length classes and interruptions.
PLAIN_SEED = 12


def spec_with(*faults: Fault, seed: int = SEED, policy: str | None = None) -> SimSpec:
    spec = replace(drawn_spec(seed, policy=policy), network=Network(), cluster_id="")
    return with_plan(spec, FaultPlan(faults))


def told(outcome: Outcome, words: str) -> list[str]:
    return [line for line in outcome.log if words in line]


# ---------------------------------------------------------------------------------------- plans


def test_plans_are_drawn_from_their_seed_and_end_in_time() -> None:
    seen = dict.fromkeys(KINDS, 0)
    for seed in range(300):
        plan = FaultPlan.random(seed, [2, 1], until_ns=3 * S)
        assert plan == FaultPlan.random(seed, [2, 1], until_ns=3 * S)
        assert plan.end_ns <= 3 * S
        plan.check([2, 1])
        for fault in plan.faults:
            seen[fault.kind] += 1
    assert min(seen.values()) > 50
    texts = {FaultPlan.random(seed, [2, 1], until_ns=3 * S).text() for seed in range(300)}
    assert len(texts) == 300


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    for seed in range(40):
        plan = FaultPlan.random(seed, [1, 3, 1], until_ns=5 * S)
        file = tmp_path / f"{seed}.toml"
        file.write_text(plan.toml())
        assert load_plan(file) == plan


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('kind = "crush"', "unknown kind of fault 'crush'"),
        ('kind = "crash"\ntarget = "client"\nat = "1s"\nfor = "1s"', "cannot befall 'client'"),
        ('kind = "crash"\ntarget = "worker 0"\nat = "1s"', "needs for"),
        ('kind = "crash"\ntarget = "worker 0"\nfor = "1s"', "at is missing"),
        ('kind = "crash"\ntarget = "worker 0"\nat = 1\nfor = "1s"', "at must be a text"),
        ('kind = "crash"\ntarget = "worker 0"\nat = "1 y"\nfor = "1s"', "unknown unit"),
        (
            'kind = "lose"\ntarget = "to worker 0"\nat = "1s"\nfor = "1s"\nprobability = 2',
            "needs probability",
        ),
        ('kind = "crash"\nwhen = "1s"', "a fault has no when"),
    ],
)
def test_a_wrong_fault_is_named_with_its_line(lines: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    good = '[[fault]]\nkind = "restart"\ntarget = "controller"\nat = "1s"\nfor = "1s"\n'
    at = "" if "at =" in lines or "at " in words else '\nat = "1s"'
    target = "" if "target" in lines else '\ntarget = "worker 0"'
    file.write_text(f"{good}\n[[fault]]\n{lines}{target}{at}\n")
    with pytest.raises(InvalidConfig, match=words) as caught:
        load_plan(file)
    assert f"{file}, line 7" in str(caught.value)


def test_a_fault_of_a_worker_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="there are 2 workers"):
        spec_with(Fault("crash", "worker 2", S, S))
    with pytest.raises(InvalidConfig, match=r"worker 1 has 1 GPU\(s\)"):
        spec_with(Fault("slow", "worker 1 GPU 1", S, S, factor=2.0))


# ---------------------------------------------------------------------------- what each one does


def test_a_crashed_worker_is_lost_and_comes_back_empty() -> None:
    outcome = run_case(SEED, spec_with(Fault("crash", "worker 0", S, S)))
    assert not outcome.failure
    assert told(outcome, "worker 0 lost (silent)")
    assert told(outcome, "worker 0 on virtual joined: 3 GPU(s) in use, emulated (back after 1")


def test_a_short_pause_of_a_worker_goes_unnoticed_and_a_long_one_does_not() -> None:
    short = run_case(SEED, spec_with(Fault("pause", "worker 1", S, 300 * MS)))
    assert not short.failure and not told(short, "lost")
    long = run_case(SEED, spec_with(Fault("pause", "worker 1", S, 2 * S)))
    assert not long.failure and told(long, "worker 1 lost (silent)")


def test_a_controller_that_stood_still_declares_nobody_dead() -> None:
    outcome = run_case(SEED, spec_with(Fault("pause", "controller", S, 2 * S)))
    assert not outcome.failure and not told(outcome, "lost") and not told(outcome, "silent:")


def test_a_restarted_controller_finds_everybody_again() -> None:
    outcome = run_case(SEED, spec_with(Fault("restart", "controller", S, 200 * MS)))
    assert not outcome.failure
    # They serve the old one until it was silent for a second.
    assert told(outcome, "worker 0 cannot be used: it is in use by another controller")
    assert len(told(outcome, "worker 0 on virtual joined")) == 2
    assert outcome.tail > 0.98


@pytest.mark.parametrize("target", ["worker 0", "client"])
def test_a_partition_is_survived(target: str) -> None:
    outcome = run_case(SEED, spec_with(Fault("partition", target, S, 2 * S)))
    assert not outcome.failure and outcome.tail > 0.98


def test_a_client_that_stood_still_is_forgotten_and_greeted_again() -> None:
    outcome = run_case(SEED, spec_with(Fault("pause", "client", S, 7 * S)))
    assert not outcome.failure
    assert told(outcome, "client simulation is silent: its models are released")


def test_a_slow_gpu_loses_requests_while_it_is_slow_and_not_after() -> None:
    def in_time(*faults: Fault) -> int:
        spec = replace(spec_with(*faults, seed=38, policy="INFER5"), duration_ns=3 * S)
        return sum(step.in_time for step in simulate(spec).steps)

    slow = [Fault("slow", f"worker {w} GPU 0", S, S, factor=100.0) for w in range(3)]
    assert in_time(*slow) < in_time()
    assert not run_case(38, spec_with(*slow, seed=38, policy="INFER5")).failure


def test_what_began_on_a_slow_gpu_is_waited_for() -> None:
    """A batch of eight of 90 ms begins a hundred times as slow right before the fault ends: its worker is
    given up after five seconds, and cannot join before nine have passed.
    """
    exec_ns = {1: 20 * MS, 2: 30 * MS, 4: 50 * MS, 8: 90 * MS}
    profile = GpuProfile("small", {"net": ModelProfile("net", exec_ns, 8 * MS, 2**25)}, 2**28)
    load = SmallLoad((ModelUse("net", 1),), (100.0,), 0, 400 * MS, bunch=8)
    faults = FaultPlan((Fault("slow", "worker 0 GPU 0", 2900 * MS, 100 * MS, factor=100.0),))
    spec = SimSpec(
        workload=load,
        scheduler=SchedulerConfig(policy="FIFO", max_exec_ns=S),
        profiles=(profile,),
        gpus=1,
        gpus_per_worker=1,
        seed=SEED,
        duration_ns=60 * S,
        check=True,
        faults=faults,
    )
    outcome = run_case(SEED, spec)
    assert told(outcome, "worker 0 lost (it does not report") and not outcome.failure


@pytest.mark.parametrize("by_ms", [-400, 400])
def test_a_clock_that_jumps_is_found_out(by_ms: int) -> None:
    """Without that, its windows would be off for as long as old exchanges count: 13 seconds."""
    spec = spec_with(Fault("jump", "worker 0", S, by_ns=by_ms * MS), seed=8)
    outcome = run_case(8, spec)
    assert not outcome.failure and outcome.tail > 0.9


def test_a_lost_load_model_is_sent_again() -> None:
    """All is lost between worker 1 and its controller in the moment in which that sends it."""
    outcome = run_case(SEED, spec_with(Fault("partition", "worker 1", 500_000, 13 * MS)))
    assert not outcome.failure
    assert told(outcome, "worker 1 lost (it knows nothing of LoadModel")


# --------------------------------------------------------------------------- what is watched


def watched(pages: int = 2) -> tuple[WorkerTruth, list[int], EmulatedGpu]:
    model = ModelProfile("net", {1: 2 * MS}, MS, 2**24)
    profile = GpuProfile("tiny", {"net": model}, weights_cache_bytes=pages * 2**24)
    time_ns = [S]
    return WorkerTruth("worker 0", profile, lambda: time_ns[0]), time_ns, EmulatedGpu(profile)


def infer(latest_ns: int) -> Infer:
    return an_infer(1, 7, earliest_ns=S, latest_ns=latest_ns, expected_duration_ns=2 * MS)


def op(op_id: int, kind: OpKind, model_id: int = 0, action_id: int = 1) -> Op:
    return Op(op_id, kind, 0, model_id, action_id, 1, 1, (), "net")


def test_the_truth_sees_what_overlaps_or_runs_without_weights() -> None:
    truth, _, gpu = watched()
    device = truth.devices({0: gpu})[0]
    truth.accepted(1, infer(2 * S), 0)
    truth.accepted(2, infer(2 * S), 0)
    with pytest.raises(InvariantViolated, match="runs without the weights of 0"):
        device.launch(op(1, OpKind.EXEC), now_ns=S)
    truth, _, gpu = watched()
    device = truth.devices({0: gpu})[0]
    truth.accepted(1, infer(2 * S), 0)
    truth.accepted(2, infer(2 * S), 0)
    device.launch(op(1, OpKind.LOAD_WEIGHTS), now_ns=S)
    device.poll(now_ns=S + MS)
    device.launch(op(2, OpKind.EXEC), now_ns=S + MS)
    with pytest.raises(InvariantViolated, match="EXEC of action 2 begins on GPU 0 while that of"):
        device.launch(op(3, OpKind.EXEC, action_id=2), now_ns=S + 2 * MS)


def test_the_truth_counts_pages() -> None:
    truth, _, gpu = watched(pages=2)
    device = truth.devices({0: gpu})[0]
    for model_id in range(3):
        device.launch(op(model_id, OpKind.LOAD_WEIGHTS, model_id), now_ns=S + model_id * 2 * MS)
        device.poll(now_ns=S + model_id * 2 * MS + MS)
        if model_id == 0:
            truth.performed(EvictPages(0, 0))
    with pytest.raises(InvariantViolated, match="GPU 0 holds 3 of 2 pages"):
        device.launch(op(3, OpKind.LOAD_WEIGHTS, 3), now_ns=S + 9 * MS)


@pytest.mark.parametrize(
    ("late_ns", "jumps_ns", "fails"),
    [
        (0, 0, False),
        (100, 0, True),
        (100, 200, False),
        (100, 50, True),
        (0, 0, False),
    ],
)
def test_the_truth_holds_windows_but_for_what_the_clock_was_made_to_jump(
    late_ns: int, jumps_ns: int, fails: bool
) -> None:
    truth, time_ns, _ = watched()
    truth.accepted(1, infer(latest_ns=S + MS), 10)
    truth.jumped(-jumps_ns)
    time_ns[0] = S + MS + late_ns
    if fails:
        with pytest.raises(InvariantViolated, match=r"action 7 starts at .* outside"):
            truth.starts(op(1, OpKind.EXEC))
    else:
        truth.starts(op(1, OpKind.EXEC))


def test_an_answer_too_many_and_one_too_few_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = ClientTruth._answered
    seen = 0

    def twice(self: ClientTruth, identity: bytes, message: object) -> None:
        nonlocal seen
        seen += isinstance(message, InferReply)
        answered(self, identity, message)
        if seen == 5:
            answered(self, identity, message)

    monkeypatch.setattr(ClientTruth, "_answered", twice)
    assert "is answered more often than it was asked" in run_case(SEED, spec_with()).failure

    def never(self: ClientTruth, identity: bytes, message: object) -> None:
        nonlocal seen
        seen += 1
        if seen != 50:
            answered(self, identity, message)

    seen = 0
    monkeypatch.setattr(ClientTruth, "_answered", never)
    spec = spec_with()
    assert isinstance(spec.workload, SmallLoad)
    stays = replace(spec, workload=replace(spec.workload, guests=()))
    assert "were never answered" in run_case(SEED, stays).failure


# -------------------------------------------------------------------------------- the fuzzer


def test_seeds_hold() -> None:
    outcomes = [run_seed(seed) for seed in range(2000, 2006)]
    assert not [outcome.failure for outcome in outcomes if outcome.failure]
    assert all(outcome.sent > 20 for outcome in outcomes)


def test_the_fuzzer_finds_a_scheduler_that_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sessions, "_watch", lambda self, worker, *, now_ns: None)
    faults = (
        Fault("crash", "worker 0", 500 * MS, 10 * MS),
        Fault("lose", "from worker 1", S, S, probability=0.5),
        Fault("late", "to client", S, S, probability=0.1, by_ns=MS),
    )
    spec = spec_with(*faults, seed=PLAIN_SEED)
    assert isinstance(spec.workload, SmallLoad)
    alone = replace(spec.workload, guests=(), bunch=1)  # so that one fault is enough to show it
    outcome = run_case(PLAIN_SEED, replace(spec, workload=alone, inputs=False))
    assert "overdue" in outcome.failure or "in time" in outcome.failure
    smallest = shrink(outcome)
    assert smallest.failure and smallest.spec.faults is not None
    assert [fault.kind for fault in smallest.spec.faults.faults] == ["lose"]


def test_the_fuzzer_finds_a_load_model_that_nobody_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "forgotten", lambda self, worker, *, now_ns: None)
    fault = Fault("partition", "worker 1", 500_000, 13 * MS)
    assert "worker 1 has not prepared" in run_case(SEED, spec_with(fault)).failure


def test_shrinking_leaves_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"crash", "slow"}

    def run(seed: int, spec: SimSpec) -> Outcome:
        assert spec.faults is not None
        kinds = {fault.kind for fault in spec.faults.faults}
        return Outcome(seed, spec, "broken" if needed <= kinds else "", (), 0, 1.0, 0)

    monkeypatch.setattr(fuzz, "run_case", run)
    spec = spec_with(
        Fault("restart", "controller", S, MS),
        Fault("crash", "worker 0", S, MS),
        Fault("jump", "worker 0", S, by_ns=MS),
        Fault("slow", "worker 0 GPU 0", S, MS, factor=2.0),
        Fault("crash", "worker 1", S, MS),
    )
    smallest = shrink(run(1, spec))
    assert smallest.spec.faults is not None
    assert {fault.kind for fault in smallest.spec.faults.faults} == needed
    assert len(smallest.spec.faults.faults) == 2


def test_a_seed_tells_the_same_under_any_hash_seed() -> None:
    program = (
        "import hashlib; from slosched.sim.fuzz import run_seed; o = run_seed(2001);"
        "print(hashlib.sha256(repr((o.log, o.sent, o.tail, o.events, o.failure)).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("0", "4242")
    }
    assert len(found) == 1


def test_faults_without_a_plan_change_nothing_but_the_client() -> None:
    """An empty plan: the same arrivals, all answered in time as without."""
    plain = replace(drawn_spec(SEED), faults=None, duration_ns=2 * S)
    empty = replace(plain, faults=FaultPlan())
    results = [simulate(spec) for spec in (plain, empty)]
    assert results[0].sent == results[1].sent > 50
    assert results[0].satisfaction == results[1].satisfaction


def test_a_simulated_run_takes_a_plan_and_says_so_in_its_manifest(tmp_path: Path) -> None:
    spec = replace(spec_with(Fault("crash", "worker 0", S, 500 * MS)), duration_ns=3 * S)
    result = simulate(spec, out=tmp_path / "run")
    assert result.complete and any("worker 0 lost" in warning for warning in result.warnings)
    assert '"crash"' in (tmp_path / "run" / "manifest.json").read_text()


def test_the_drawn_faults_leave_time_for_the_recovery() -> None:
    for seed in range(50):
        faults = drawn_spec(seed).faults
        assert faults is not None
        # A case may have one that is longer than any peer waits, beside those that are over by then.
        assert sum(fault.end_ns > FAULTS_END_NS for fault in faults.faults) <= 1
        assert faults.end_ns <= FAULTS_END_NS + 5 * S


def test_an_unforeseen_error_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SimCluster) -> None:
        raise KeyError("no such thing")

    monkeypatch.setattr(SimCluster, "start_controller", broken)
    outcome = run_case(SEED, spec_with(Fault("restart", "controller", S, MS)))
    assert outcome.failure.startswith("KeyError at ") and "test_sim_faults.py" in outcome.failure
    assert issubclass(InvalidConfig, SloschedError)


def test_a_scheduler_that_never_rests_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that opened unnoticed was such a time: REJECT kept a core busy over loads."""
    plain = with_plan(drawn_spec(1, policy="REJECT"), FaultPlan())
    assert run_case(1, plain).events < 40_000
    monkeypatch.setattr(Scheduler, "next_wakeup_ns", lambda self: 5)
    assert "REJECT asked 101 times in a row to be woken" in run_case(1, plain).failure
