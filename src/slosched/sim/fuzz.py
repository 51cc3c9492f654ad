"""Random clusters under random faults: what must hold while they last, and after.

While faults last, every invariant holds at every step, by the scheduler's books and by the truth at the
workers and the client. Once they are over, within RECOVERY_NS:

- every worker has joined the controller, which knows its clients and their models;
- requests sent from then on are answered in time as often as without faults (LIVE_SHARE, less one or a bunch;
  baselines may take SLOW_RECOVERY_NS, since only heartbeats show them that a latency is short again). Published
  schedulers keep their published defects, among them estimates that a single slow action spoils for
  long, and under rules of placement other than ours what was loaded first decides for long: some must be
  in time. A cluster that is overloaded without faults is not held to it: backlogs last;
- and when the load ends everything is answered and nothing is kept of it.

The client is the one that people run (core/client): each of its requests ends once for its caller, after the
faults each model that it holds is one of the present controller's, and nothing of it grows.

In most cases requests bring inputs, and every answer is held to its request's mark (marks.py); further
clients come and go with requests unanswered (guests.py).

A failing plan is shrunk: faults are dropped as long as it still fails.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from slosched.config import PLACEMENTS
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import Note
from slosched.core.scheduler.policies import about
from slosched.core.scheduler.state import WorkerState
from slosched.errors import SloschedError
from slosched.sim.client import Phase
from slosched.sim.enduring_client import EnduringClient
from slosched.sim.faults import FaultPlan
from slosched.sim.fuzz_case import (
    RECOVERY_NS,
    SLOW_RECOVERY_NS,
    TAIL_NS,
    SmallLoad,
    drawn_spec,
    with_plan,
)
from slosched.sim.guests import Guest
from slosched.sim.spec import SimSpec
from slosched.sim.truth import Sights
from slosched.sim.world import World
from slosched.telemetry.client_log import ClientRecord
from slosched.units import NS_PER_S, format_duration
from slosched.workloads.engine import Engine

#: Least share in time after the faults, compared with the same run without faults.
LIVE_SHARE = 0.95
#: A cluster that does worse without any faults has too much to do.
_OVERLOADED = 0.9
#: A share in time that needs no comparison with a run without faults.
_GOOD = 0.98
#: The rest of the last actions comes in within this time after the load.
_QUIET_NS = 6 * NS_PER_S
#: DIRECT refuses nothing and gives each action ten seconds to start in: a backlog may take that.
_DIRECT_QUIET_NS = 20 * NS_PER_S
_NOTES = 40


class NotLive(InvariantViolated):
    """Faults are over, and it does not work as it did."""


@dataclass(frozen=True)
class Outcome:
    """What became of one seed. `failure` is empty if all held; `log` tells what happened."""

    seed: int
    spec: SimSpec
    failure: str
    log: tuple[str, ...]
    sent: int
    tail: float  # share in time after the recovery
    events: int
    sights: Sights = field(default_factory=Sights)


def run_seed(seed: int, *, policy: str | None = None) -> Outcome:
    """Draw the case of `seed` and run it."""
    return run_case(seed, drawn_spec(seed, policy=policy))


def run_case(seed: int, spec: SimSpec) -> Outcome:
    """Run `spec`, whose faults must be set, and check everything."""
    assert spec.faults is not None
    case = _Case(spec)
    failure = ""
    try:
        case.run()
        if case.tail_share < _GOOD:
            _hold_against_no_faults(spec, case)
    except (InvariantViolated, SloschedError, AssertionError, LookupError, ValueError) as error:
        failure = _failure_text(error)
    case.sights.marks_compared = case.world.cluster.marks.compared
    return Outcome(
        seed=seed,
        spec=spec,
        failure=failure,
        log=tuple(case.log),
        sent=case.sent,
        tail=case.tail_share,
        events=case.world.kernel.events,
        sights=case.sights,
    )


def _failure_text(error: Exception) -> str:
    """What failed; for an unexpected error also where."""
    if isinstance(error, InvariantViolated | SloschedError):
        return str(error)
    place, trace = "", error.__traceback__
    while trace is not None:
        place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {place}: {error}"


def shrink(outcome: Outcome, *, tries: int = 60) -> Outcome:
    """A failing outcome with as few faults as `tries` runs find."""
    best = outcome
    index = 0
    while tries > 0 and best.spec.faults is not None and index < len(best.spec.faults.faults):
        tries -= 1
        smaller = run_case(best.seed, with_plan(best.spec, best.spec.faults.without(index)))
        if smaller.failure:
            best = smaller
        else:
            index += 1
    return best


def _hold_against_no_faults(spec: SimSpec, case: _Case) -> None:
    assert spec.faults is not None
    wanted = _wanted(spec, case)
    if case.tail_share >= wanted:
        return
    recovery_ns = RECOVERY_NS
    if (spec.scheduler.policy, spec.scheduler.fidelity) != ("INFER5", "best"):
        recovery_ns = SLOW_RECOVERY_NS
        case = _Case(spec, recovery_ns=recovery_ns)
        case.run()
        wanted = _wanted(spec, case)
    if case.tail_share < wanted:
        raise NotLive(
            f"of the requests sent {format_duration(recovery_ns)} after the faults and later "
            f"{100 * case.tail_share:.1f} % were in time; without faults enough for {100 * wanted:.1f} %"
        )


def _wanted(spec: SimSpec, case: _Case) -> float:
    """The share in time that `case` must have reached, by a run without its faults."""
    assert spec.faults is not None
    # The same length of everything: an idle plan ends when the faults did.
    none = replace(spec, faults=FaultPlan((), spec.faults.seed))
    twin = _Case(none, faults_end_ns=case.end_ns, recovery_ns=case.recovery_ns)
    twin.run()
    if twin.tail_share < _OVERLOADED:
        return 0.0
    config = spec.scheduler
    published = about(config.policy).published or config.fidelity == "paper"
    if published or config.placement != PLACEMENTS[0]:
        return 1e-9
    # Requests that come together are late together: one bunch, or request, more or less says nothing.
    return LIVE_SHARE * twin.tail_share - twin.bunch_share


def _over_ns(spec: SimSpec) -> int:
    """From then on nothing is wrong any more: what began on a slow GPU is slow to its end.

    Until that end its worker is busy, and may have been given up because it reported nothing.
    """
    assert spec.faults is not None
    longest_ns = max(
        max(model.weights_ns, *model.exec_ns.values())
        for profile in spec.profiles
        for model in profile.models.values()
    )
    slow = (
        fault.end_ns + round(longest_ns * fault.factor)
        for fault in spec.faults.faults
        if fault.kind == "slow"
    )
    return max(spec.faults.end_ns, *slow, 0)


class _Case:
    """One run from the first hello to the last answer."""

    def __init__(
        self, spec: SimSpec, *, faults_end_ns: int | None = None, recovery_ns: int = RECOVERY_NS
    ) -> None:
        assert spec.faults is not None
        self.recovery_ns = recovery_ns
        self.end_ns = _over_ns(spec) if faults_end_ns is None else faults_end_ns
        self.log: list[str] = []
        self.sent = 0
        self._tail = [0, 0]  # sent, in time
        self.sights = Sights()
        engine = Engine(spec.workload, seed=spec.seed, duration_ns=spec.duration_ns)
        self.world = World(
            spec,
            engine,
            on_request=lambda record: self.sights.request_done(record),
            on_action=lambda record: self.sights.action_done(record),
            on_note=self._note,
            on_client=self._client_record,
            log=self._tell,
        )
        if self.world.truth is not None:
            self.sights = self.world.truth.sights
        if isinstance(spec.workload, SmallLoad):
            for plan in spec.workload.guests:
                Guest(
                    plan,
                    self.world.cluster,
                    inputs=spec.inputs,
                    without_input=spec.without_input,
                    log=self._tell,
                )
        self._spec = spec
        self._start_ns = self.world.kernel.now_ns
        self._tail_ns = self._start_ns + self.end_ns + recovery_ns

    @property
    def tail_share(self) -> float:
        """Share of the tail's requests that were in time; 1 if there were none."""
        sent, in_time = self._tail
        return in_time / sent if sent else 1.0

    @property
    def bunch_share(self) -> float:
        """Share of the tail's requests that arrive at one instant: one, or a bunch."""
        load = self._spec.workload
        bunch = load.bunch if isinstance(load, SmallLoad) else 1
        return bunch / self._tail[0] if self._tail[0] else 0.0

    def _tell(self, line: str) -> None:
        at_ns = self.world.kernel.now_ns - self._start_ns
        self.log.append(f"{at_ns / NS_PER_S:9.4f} s  {line}")

    def _note(self, note: Note) -> None:
        self._tell(f"controller: {note.text}")

    def _client_record(self, record: ClientRecord) -> None:
        self.sent += 1
        if record.scheduled_ns >= self._tail_ns:
            self._tail[0] += 1
            self._tail[1] += record.in_time

    # ---------------------------------------------------------------------------------- run

    def run(self) -> None:
        """Raises InvariantViolated for what does not hold, NotLive for what does not work again."""
        world = self.world
        kernel, client = world.kernel, world.client
        client.start()
        kernel.run_until(self._tail_ns)
        if client.failure is not None:
            raise NotLive(f"the client gave up: {client.failure}")
        self._check_joined()
        kernel.run_until(self._tail_ns + TAIL_NS)
        client.end_sending()
        direct = self._spec.scheduler.policy == "DIRECT"
        quiet_ns = kernel.now_ns + (_DIRECT_QUIET_NS if direct else _QUIET_NS)
        while kernel.now_ns < quiet_ns:  # the client stops the kernel when it is done
            kernel.run_until(quiet_ns)
        self._check_quiet()
        client.leave()
        kernel.run_until(kernel.now_ns + NS_PER_S)
        self._check_left()
        world.cluster.controller.recount()

    def _check_left(self) -> None:
        """All clients are gone: nothing of them is kept."""
        scheduler = self.world.cluster.controller.scheduler
        if scheduler.clients or scheduler.leaving:
            raise NotLive("a client that said goodbye is still known")
        used = [m.model_id for m in scheduler.cluster.models.values() if m.clients]
        if used:
            raise NotLive(f"models {used[:10]} are used by clients that are gone")
        kept = scheduler.limits.input_bytes
        if kept:
            raise NotLive(f"{kept} bytes of inputs are counted, and no request waits")

    def _check_joined(self) -> None:
        scheduler = self.world.cluster.controller.scheduler
        for worker in scheduler.cluster.workers.values():
            if worker.state is not WorkerState.JOINED:
                raise NotLive(f"worker {worker.worker_id} has not joined")
            there = self.world.cluster.workers[worker.worker_id].gpu_count
            if len(worker.gpus) != there:
                raise NotLive(f"worker {worker.worker_id} has {len(worker.gpus)} of {there} GPUs")
            missing = [m for m in scheduler.cluster.models if m not in worker.instances]
            if missing:
                raise NotLive(f"worker {worker.worker_id} has not prepared models {missing[:10]}")
        client = self.world.client
        if client.phase is not Phase.SENDING:
            raise NotLive(f"the client is {client.phase.name}, not sending")
        if isinstance(client, EnduringClient):
            client.check_models()

    def _check_quiet(self) -> None:
        """The load is over: what is left?"""
        world = self.world
        scheduler, now_ns = world.cluster.controller.scheduler, world.kernel.now_ns
        left = {
            "unanswered requests at the controller": scheduler.arrived - scheduler.answered,
            "unanswered requests of clients": sum(
                len(c.requests) for c in scheduler.clients.values()
            ),
            "queued requests": sum(m.queued for m in scheduler.cluster.models.values()),
            "actions that are long overdue": sum(
                now_ns - action.sent_ns > _QUIET_NS / 2
                for action in scheduler.cluster.actions.values()
            ),
            "workers with an action that they do not end": sum(
                worker.node is not None
                and (since_ns := worker.node.waiting_since_ns()) is not None
                and now_ns - since_ns > _QUIET_NS / 2
                for worker in world.cluster.workers.values()
            ),
            "inputs of answered requests": world.cluster.controller.inputs_kept,
            "inputs of ended actions": sum(
                0 if worker.node is None else worker.node.inputs_kept
                for worker in world.cluster.workers.values()
            ),
            "requests that the client waits for": world.client.driver.unanswered
            if world.client.driver is not None
            else 0,
        }
        kept = [f"{count} {what}" for what, count in left.items() if count]
        if kept:
            raise NotLive(f"{format_duration(_QUIET_NS)} after the load: {', '.join(kept)}")
        if isinstance(world.client, EnduringClient):
            world.client.check_quiet()
        if world.truth is not None:
            world.truth.check_all_answered()
            world.truth.check_unloaded()
        if world.take_over is not None:
            assert self._spec.faults is not None
            ended = any(fault.kind == "end" for fault in self._spec.faults.faults)
            world.take_over.check_agreement(weights_may_be_lost=ended)
        self._check_unloaded_at_workers()

    def _check_unloaded_at_workers(self) -> None:
        """Workers hold no instance that the controller does not have.

        A worker that was away, or lost messages, may: the controller does not send an UnloadModel again.
        """
        assert self._spec.faults is not None
        cluster = self.world.cluster.controller.scheduler.cluster
        lossy = {f.worker_id for f in self._spec.faults.faults if f.kind in ("lose", "partition")}
        for worker_id, worker in self.world.cluster.workers.items():
            if worker_id in lossy or cluster.workers[worker_id].times_lost:
                continue
            there = () if worker.node is None else worker.node.brain.model_ids
            kept = [model_id for model_id in there if model_id not in cluster.models]
            if kept:
                raise NotLive(
                    f"worker {worker_id} still holds models {kept[:10]}, which were unloaded"
                )
