"""A request that fails its batch, or ends its process, harms itself alone (core/scheduler/second_tries.py)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from made_messages import an_error
from scheduler_rig import EXEC_MS, MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import Drain, FromClient, SendFailed, ToWorker
from slosched.core.scheduler.second_tries import SecondTries
from slosched.core.scheduler.sessions import TICK_NS
from slosched.core.scheduler.state import ActionState, Gpu, RequestState
from slosched.messages import (
    CancelRequest,
    EvictWeights,
    EvictWeightsResult,
    Goodbye,
    Infer,
    LoadWeights,
    LoadWeightsResult,
    Span,
)

#: The code that an action ends with, by its requests' ids at the client.
Judge = Callable[[list[int]], int]


class Bench:
    """A rig whose workers run one action after another; `judge` gives the code of each."""

    def __init__(self, judge: Judge, *, policy: str = "INFER5", workers: int = 1) -> None:
        self.judge = judge
        self.rig, (self.model,) = Rig.ready(SchedulerConfig(policy=policy), workers=workers)
        self.ran: list[tuple[list[int], int]] = []  # requests aboard, code
        self.beside: list[int] = []  # how many others were outstanding when one ended badly

    def aboard(self, infer: Infer) -> list[int]:
        action = self.rig.scheduler.cluster.actions[infer.action_id]
        return [request.request_id for request in action.requests]

    def run(self, until_ms: float) -> None:
        """Let time pass in steps of 0.25 ms; what is outstanding runs in the order sent."""
        rig = self.rig
        ends: dict[int, float] = {}
        while (rig.now_ns - T0) / MS < until_ms:
            now_ms = (rig.now_ns - T0) / MS
            rig.step()
            for worker_id in rig._sessions:
                waiting = rig.outstanding(worker_id)
                if not waiting:
                    continue
                infer = waiting[0]
                takes_ms = EXEC_MS[infer.batch_size]
                begin_ms = ends.setdefault(infer.action_id, now_ms + 0.5)
                if now_ms < begin_ms + takes_ms + 0.25:
                    continue
                names = self.aboard(infer)
                code = self.judge(names)
                self.ran.append((names, code))
                if code:
                    self.beside.append(len(waiting) - 1)
                    rig.from_worker(
                        an_error(
                            infer.session, infer.action_id, code, f"of {names}", action_type=2
                        ),
                        worker_id,
                    )
                else:
                    rig.finish(infer, begin_ms=begin_ms, worker_id=worker_id)
            rig.now_ns += MS // 4
        rig.step()

    def codes(self, requests: list[int]) -> list[int]:
        return [self.rig.reply(request).code for request in requests]


def fails_for(*culprits: int, code: int = Code.RUNTIME_ERROR) -> Judge:
    return lambda names: code if set(names) & set(culprits) else 0


REPLANNING = ["INFER5", "FIFO", "EDF", "AIMD", "REJECT"]


@pytest.mark.parametrize("policy", REPLANNING)
@pytest.mark.parametrize("place", range(12))
def test_one_of_twelve_that_makes_the_model_raise_fails_alone(policy: str, place: int) -> None:
    culprit: list[int] = []
    bench = Bench(lambda names: fails_for(*culprit)(names), policy=policy)
    slo_ms = 900 if policy != "REJECT" else 2000
    requests = [bench.rig.infer(bench.model, slo_ms=slo_ms) for _ in range(12)]
    culprit.append(requests[place])
    bench.run(150)
    codes = dict(zip(requests, bench.codes(requests), strict=True))
    assert codes.pop(culprit[0]) == Code.RUNTIME_ERROR
    assert set(codes.values()) == {0}
    reply = bench.rig.reply(culprit[0])
    assert f"of [{culprit[0]}]" in reply.reason  # its own error, of the run that held it alone
    # Halves of halves: as many failures as that takes, and no more.
    failures = sum(code != 0 for _, code in bench.ran)
    assert failures <= math.ceil(math.log2(8)) + 1


def test_two_culprits_in_one_batch_both_read_their_own_error() -> None:
    culprits: list[int] = []
    bench = Bench(lambda names: fails_for(*culprits)(names))
    requests = [bench.rig.infer(bench.model, slo_ms=500) for _ in range(8)]
    culprits += [requests[1], requests[6]]
    bench.run(200)
    for request in requests:
        reply = bench.rig.reply(request)
        if request in culprits:
            assert reply.code == Code.RUNTIME_ERROR and f"of [{request}]" in reply.reason
        else:
            assert reply.code == 0


def test_a_wrong_input_in_a_batch_is_found_likewise() -> None:
    culprit: list[int] = []
    bench = Bench(lambda names: fails_for(*culprit, code=Code.COPY_INPUT_INVALID_INPUT)(names))
    requests = [bench.rig.infer(bench.model, slo_ms=500) for _ in range(4)]
    culprit.append(requests[2])
    bench.run(100)
    assert bench.codes(requests) == [0, 0, Code.COPY_INPUT_INVALID_INPUT, 0]


@pytest.mark.parametrize("policy", REPLANNING)
def test_a_request_that_ends_its_process_does_so_twice_and_alone_the_second_time(
    policy: str,
) -> None:
    poison: list[int] = []
    bench = Bench(lambda names: fails_for(*poison, code=Code.PROCESS_ENDED)(names), policy=policy)
    requests = [bench.rig.infer(bench.model, slo_ms=900) for _ in range(8)]
    poison.append(requests[3])
    later: list[int] = []
    for _ in range(30):  # others go on asking meanwhile
        bench.run((bench.rig.now_ns - T0) / MS + 5)
        later.append(bench.rig.infer(bench.model, slo_ms=900))
    bench.run(600)
    codes = dict(zip(requests, bench.codes(requests), strict=True))
    assert codes.pop(poison[0]) == Code.PROCESS_ENDED and set(codes.values()) == {0}
    assert "tried once more, alone" in bench.rig.reply(poison[0]).reason
    ended = [names for names, code in bench.ran if code]
    assert len(ended) == 2, "a process was ended a third time"
    assert ended[1] == poison
    assert bench.beside[1] == 0, "something else was outstanding beside it"
    assert bench.codes(later) == [0] * len(later)


def test_requests_of_a_lost_worker_go_once_more_alone_and_never_a_third_time() -> None:
    bench = Bench(fails_for(), workers=3)
    rig = bench.rig
    request = rig.infer(bench.model, slo_ms=60_000)
    rig.step()
    lost: list[int] = []
    for _ in range(2):
        (worker,) = [w for w in rig._sessions if rig.outstanding(w)]
        lost.append(worker)
        (infer,) = rig.outstanding(worker)
        assert bench.aboard(infer) == [request] and infer.request_count == 1
        others = [w for w in rig._sessions if w not in lost]
        for _ in range(6):  # the others are heard
            rig.now_ns += TICK_NS
            for other in others:
                rig.scheduler.sessions.heard(rig.scheduler.cluster.workers[other])
            rig.step()
        rig.step()
        if rig.answered(request):
            break
    assert len(lost) == 2
    reply = rig.reply(request)
    assert reply.code == Code.CANCELLED and "tried once more, alone" in reply.reason
    assert not [w for w in rig._sessions if rig.outstanding(w)], "a third worker was given it"


def waiting_alone() -> tuple[Bench, list[int], list[int]]:
    """A bench with two requests of a process that ended waiting for a GPU that works; (lot, others)."""
    bench = Bench(fails_for())
    rig = bench.rig
    requests = [rig.infer(bench.model, slo_ms=400) for _ in range(2)]
    rig.step()
    (infer,) = rig.outstanding()
    others = [rig.infer(bench.model, slo_ms=400)]
    rig.step(3.2)  # about to end: the next one is behind it
    assert len(rig.outstanding()) == 2
    error = an_error(infer.session, infer.action_id, Code.PROCESS_ENDED, "signal 11", action_type=2)
    rig.from_worker(error)
    rig.step()
    assert rig.scheduler.second_tries.waiting == 2
    return bench, requests, others


def test_what_must_run_alone_waits_for_its_gpu_and_holds_it_free() -> None:
    bench, requests, others = waiting_alone()
    rig = bench.rig
    later = rig.infer(bench.model, slo_ms=400)
    rig.step(3.4)
    assert len(rig.outstanding()) == 1, "the GPU is kept free"
    bench.run(60)
    assert bench.codes([*requests, *others, later]) == [0] * 4
    assert [names for names, _ in bench.ran[1:3]] == [[requests[0]], [requests[1]]]


def test_a_request_that_is_cancelled_or_whose_client_leaves_is_forgotten_while_it_waits() -> None:
    bench, requests, others = waiting_alone()
    rig = bench.rig
    rig.handle(FromClient(b"c", CancelRequest(requests[0])))
    rig.step()
    assert rig.reply(requests[0]).code == Code.CANCELLED
    assert rig.scheduler.second_tries.waiting == 1
    rig.handle(FromClient(b"c", Goodbye()))
    rig.step()
    assert rig.scheduler.second_tries.waiting == 0 and rig.scheduler.idle
    (gpu,) = rig.scheduler.cluster.gpus.values()
    assert not gpu.held and others


def test_what_waits_is_answered_at_the_end() -> None:
    bench, requests, _ = waiting_alone()
    bench.rig.handle(Drain())
    effects = bench.rig.scheduler.abandon(now_ns=bench.rig.now_ns)
    bench.rig.checker.check(effects, now_ns=bench.rig.now_ns)
    bench.rig.effects.extend(effects)
    assert bench.codes(requests) == [Code.SHUTTING_DOWN] * 2
    assert bench.rig.scheduler.idle


def test_one_whose_deadline_passes_while_it_waits_is_told_so_and_not_the_culprits_words() -> None:
    bench, requests, _ = waiting_alone()
    bench.rig.step(500)
    bench.rig.step()
    for request in requests:
        reply = bench.rig.reply(request)
        assert reply.code == Code.TIMED_OUT and "no second try fits" in reply.reason
        assert "signal" not in reply.reason
    wakeup_ns = bench.rig.scheduler.next_wakeup_ns()
    assert bench.rig.scheduler.second_tries.next_wakeup_ns(0) is None and wakeup_ns is not None


def test_the_scheduler_wakes_for_what_waits() -> None:
    bench, _, _ = waiting_alone()
    wakeup_ns = bench.rig.scheduler.next_wakeup_ns()
    assert wakeup_ns is not None and wakeup_ns <= bench.rig.now_ns + MS


def test_policies_that_do_not_replan_answer_with_the_cause_as_ever() -> None:
    rig, (model,) = Rig.ready()
    rig.scheduler.policy.replans = False
    request = rig.infer(model, slo_ms=100)
    rig.step()
    (infer,) = rig.outstanding()
    rig.from_worker(
        an_error(infer.session, infer.action_id, Code.PROCESS_ENDED, "exit code 3", action_type=2)
    )
    rig.step()
    reply = rig.reply(request)
    assert reply.code == Code.PROCESS_ENDED and "exit code 3" in reply.reason


def test_the_same_failures_give_the_same_effects() -> None:
    def history() -> list[tuple[int, tuple[int, ...]]]:
        culprits: list[int] = []
        bench = Bench(lambda names: fails_for(*culprits)(names))
        requests = [bench.rig.infer(bench.model, slo_ms=500) for _ in range(12)]
        culprits += [requests[2], requests[9]]
        bench.run(100)
        return [
            (e.message.action_id, e.requests)
            for e in bench.rig.effects
            if isinstance(e, ToWorker) and isinstance(e.message, Infer)
        ]

    assert history() == history()


def test_splitting_spends_no_tries_of_those_that_were_not_at_fault() -> None:
    """Twice in a batch that raised, then too late: the fourth action answers it."""
    codes = iter([Code.RUNTIME_ERROR, Code.RUNTIME_ERROR, Code.EXEC_TOO_LATE])
    bench = Bench(lambda names: next(codes, Code.OK) if requests[0] in names else Code.OK)
    requests: list[int] = []
    requests += [bench.rig.infer(bench.model, slo_ms=500) for _ in range(8)]
    bench.run(100)
    assert bench.codes(requests) == [0] * 8
    assert bench.rig.reply(requests[0]).attempts == 4


# ------------------------------------------------------------- workers that end, and weights that are nowhere


@pytest.mark.parametrize("policy", REPLANNING)
def test_a_worker_whose_process_ended_gets_no_second_try_while_others_are_there(
    policy: str,
) -> None:
    """Its device is lost, and until it is gone it fails whatever comes, at once."""
    rig, (model,) = Rig.ready(SchedulerConfig(policy=policy), workers=2)
    requests: list[int] = []
    for half_ms in range(80):
        rig.now_ns = T0 + half_ms * MS // 2
        if half_ms % 20 == 0:  # the last of them find a GPU that nothing runs on
            requests.append(rig.infer(model, slo_ms=900))
        rig.step()
        for infer in rig.outstanding(0):
            lost = an_error(
                infer.session, infer.action_id, Code.PROCESS_ENDED, "cuda:0 is lost", action_type=2
            )
            rig.from_worker(lost, 0)
        for infer in rig.outstanding(1):
            if rig.now_ns >= infer.earliest_ns + 3 * MS:
                rig.finish(infer, begin_ms=half_ms / 2 - 2.5, worker_id=1)
        rig.step()
    assert [rig.reply(r).code for r in requests] == [0] * len(requests)
    assert len(rig.to_worker(Infer, 0)) <= 1
    wakeup_ns = rig.scheduler.next_wakeup_ns()
    assert wakeup_ns is not None
    rig.step(2_000)
    gpus = rig.scheduler.cluster.gpus.values()
    assert not any(gpu.held for gpu in gpus), "it is used again if it is still there"


def test_the_only_worker_is_tried_although_its_process_ended() -> None:
    bench = Bench(lambda names: Code.OK if bench.ran else Code.PROCESS_ENDED)
    request = bench.rig.infer(bench.model, slo_ms=100)
    bench.run(20)
    assert bench.codes([request]) == [0]


def test_a_worker_whose_models_process_ended_goes_on_and_gets_the_weights_anew() -> None:
    """Other GPUs are there, and the worker is not spared; its pages of the model are free at once."""
    rig, (model,) = Rig.ready(workers=2)
    requests = [rig.infer(model, slo_ms=900) for _ in range(2)]
    rig.step()
    (infer,) = [*rig.outstanding(0), *rig.outstanding(1)][:1]
    action = rig.scheduler.cluster.actions[infer.action_id]
    gpu, free_pages = action.gpu, action.gpu.free_pages
    worker_id = gpu.worker.worker_id
    ended = an_error(
        infer.session, infer.action_id, Code.MODEL_PROCESS_ENDED, "exit code 3", action_type=2
    )
    rig.from_worker(ended, worker_id)
    assert model.model_id not in gpu.resident and gpu.free_pages > free_pages
    rig.step()
    assert not rig.scheduler.second_tries._ending
    assert serve(rig, until_ms=800, stop=lambda: rig.scheduler.idle)
    assert [rig.reply(request).code for request in requests] == [0, 0]


@pytest.mark.parametrize("policy", REPLANNING)
def test_weights_that_are_nowhere_are_loaded_over_what_is_busy(policy: str) -> None:
    """Two models, two GPUs of one page; the GPU of one model is lost, and the other one is asked for always."""
    rig = Rig(SchedulerConfig(policy=policy), workers=2)
    rig.hello()
    for worker_id in (0, 1):
        rig.join(worker_id, pages=1, session=50 + worker_id)
    there, wanted = rig.load(2)
    for _ in range(8):  # until it has a GPU
        rig.infer(wanted, slo_ms=4000)
    assert serve(rig, until_ms=3_000, stop=lambda: rig.scheduler.idle)
    model = rig.scheduler.cluster.models[wanted.model_id]
    (gpu,) = model.resident_on.values()
    request = rig.infer(wanted, slo_ms=5000)
    rig.step()
    popularity = rig.scheduler.policy._placement._popularity  # type: ignore[attr-defined]
    asked = popularity.score(model).asked
    rig.handle(SendFailed(gpu.worker.worker_id, rig.outstanding(gpu.worker.worker_id)[0]))
    assert not model.resident_on
    start_ns = rig.now_ns
    others: list[int] = []

    def done() -> bool:
        others.append(rig.infer(there, slo_ms=4000))
        return rig.answered(request)

    assert serve(rig, until_ms=(start_ns - T0) / MS + 500, stop=done)
    assert rig.reply(request).code == 0
    assert popularity.score(model).asked <= asked, "one that waits is not asked for again and again"
    serve(rig, until_ms=(start_ns - T0) / MS + 3_000, stop=lambda: rig.scheduler.idle)
    assert {rig.reply(other).code for other in others} == {0}, "what made way comes back"


@pytest.mark.parametrize("policy", REPLANNING)
def test_what_waits_is_served_although_the_culprit_took_the_weights_with_it_twice(
    policy: str,
) -> None:
    """Nothing else arrives that would ask for the weights."""
    rig, (model,) = Rig.ready(SchedulerConfig(policy=policy))
    poison = rig.infer(model, slo_ms=4000)
    others = [rig.infer(model, slo_ms=4000) for _ in range(12)]

    def judge(infer: Infer) -> int:
        action = rig.scheduler.cluster.actions[infer.action_id]
        aboard = [request.request_id for request in action.requests]
        return Code.MODEL_PROCESS_ENDED if poison in aboard else Code.OK

    assert serve(rig, until_ms=2_000, stop=lambda: rig.scheduler.idle, judge=judge)
    assert rig.reply(poison).code == Code.MODEL_PROCESS_ENDED
    assert {rig.reply(other).code for other in others} == {0}


def serve(
    rig: Rig,
    *,
    until_ms: float,
    stop: Callable[[], bool],
    judge: Callable[[Infer], int] = lambda infer: Code.OK,
) -> bool:
    """Work on workers 0 and 1 in steps of 1 ms, everything after its usual time; True if `stop` said so.

    `judge` gives the code with which an Infer ends.
    """
    cluster = rig.scheduler.cluster
    while (rig.now_ns - T0) / MS < until_ms:
        rig.now_ns += MS
        rig.step()
        for worker_id, worker in cluster.workers.items():
            rig.scheduler.sessions.heard(worker)
            for sent in rig.to_worker(EvictWeights, worker_id):
                if sent.action_id in cluster.actions:
                    span = Span(rig.now_ns, rig.now_ns, 0)
                    evicted = EvictWeightsResult(
                        sent.session,
                        sent.action_id,
                        span=span,
                        received_ns=rig.now_ns,
                        sent_ns=rig.now_ns,
                    )
                    rig.from_worker(evicted, worker_id)
            for load in rig.to_worker(LoadWeights, worker_id):
                if load.action_id in cluster.actions and rig.now_ns >= load.earliest_ns + 9 * MS:
                    span = Span(rig.now_ns - 8 * MS, rig.now_ns, 8 * MS)
                    loaded = LoadWeightsResult(
                        load.session,
                        load.action_id,
                        span=span,
                        received_ns=rig.now_ns,
                        sent_ns=rig.now_ns,
                    )
                    rig.from_worker(loaded, worker_id)
            for infer in rig.outstanding(worker_id)[:1]:
                takes_ms = EXEC_MS[infer.batch_size]
                if rig.now_ns < infer.earliest_ns + (takes_ms + 1) * MS:
                    continue
                if code := judge(infer):
                    failed = an_error(
                        infer.session, infer.action_id, code, "it failed", action_type=2
                    )
                    rig.from_worker(failed, worker_id)
                else:
                    begin_ms = (rig.now_ns - T0) / MS - takes_ms
                    rig.finish(infer, begin_ms=begin_ms, worker_id=worker_id)
        rig.step()
        if stop():
            return True
    return False


def test_what_a_step_looks_at_does_not_grow_with_what_waits() -> None:
    """One process with half of the GPUs is lost: each step looks at what can go, and at no GPU twice."""
    for gpus in (5, 40):
        rig, (model,) = Rig.ready(SchedulerConfig(max_gpus=100), workers=2, gpus=gpus)
        for _ in range(16 * gpus):
            rig.infer(model, slo_ms=400)
        rig.step(0)
        rig.handle(SendFailed(0, rig.outstanding(0)[0]))
        tries = rig.scheduler.second_tries
        assert tries.waiting >= 4 * gpus
        for _ in range(3):
            tries.lots_looked_at = tries.gpus_looked_at = 0
            rig.now_ns += 1000
            rig.step()
            assert tries.lots_looked_at <= gpus + 1
            assert tries.gpus_looked_at <= gpus


def test_no_more_than_half_of_the_gpus_are_kept_from_serving_others() -> None:
    rig, (model,) = Rig.ready(workers=5)
    for _ in range(80):
        rig.infer(model, slo_ms=900)
    rig.step(0)
    rig.handle(SendFailed(0, rig.outstanding(0)[0]))
    for step in range(1, 40):
        rig.step(step * 0.5)
        for worker_id in range(1, 5):
            for infer in rig.outstanding(worker_id)[:1]:
                takes_ms = EXEC_MS[infer.batch_size]
                if rig.now_ns >= infer.earliest_ns + (takes_ms + 1) * MS:
                    begin_ms = step * 0.5 - takes_ms - 0.25
                    rig.finish(infer, begin_ms=begin_ms, worker_id=worker_id)
        rig.step()
        gpus = rig.scheduler.cluster.gpus.values()
        assert sum(gpu.held or gpu.runs_alone for gpu in gpus) <= 2
        if not rig.scheduler.second_tries.waiting:
            break
    assert not rig.scheduler.second_tries.waiting


# ------------------------------------------------------------------------------------- the checker


@pytest.mark.parametrize("third", [False, True])
def test_the_checker_notices_company_and_a_third_try(
    monkeypatch: pytest.MonkeyPatch, third: bool
) -> None:
    """Scheduled as any other failure: with others, and again and again."""

    def as_any_other(
        tries: SecondTries, action: ActionState, code: int, reason: str, **_: object
    ) -> None:
        for request in action.requests:
            request.move(RequestState.QUEUED)
            bench.rig.scheduler.policy.enqueue(request, now_ns=bench.rig.now_ns)

    monkeypatch.setattr(SecondTries, "process_ended", as_any_other)
    bench = Bench(lambda names: Code.PROCESS_ENDED)
    for _ in range(1 if third else 2):
        bench.rig.infer(bench.model, slo_ms=500)
    with pytest.raises(InvariantViolated, match="third process" if third else "not alone"):
        bench.run(50)


def test_the_checker_notices_what_is_sent_behind_one_that_must_be_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Gpu, "runs_alone", False)
    bench = Bench(lambda names: Code.OK if bench.ran else Code.PROCESS_ENDED)
    bench.rig.infer(bench.model, slo_ms=500)

    def ask_on() -> None:
        for _ in range(5):
            bench.run((bench.rig.now_ns - T0) / MS + 4)
            bench.rig.infer(bench.model, slo_ms=500)

    with pytest.raises(InvariantViolated, match="must be alone"):
        ask_on()
