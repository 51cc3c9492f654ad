"""Long work goes in slices: what one step does is counted, whatever there is to do."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest

from big_controller import big_controller
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.expiry import ExpiryHeap
from slosched.core.scheduler.interface import (
    ClientLost,
    Drain,
    Effect,
    Event,
    FromClient,
    RequestDone,
    ToClient,
)
from slosched.core.scheduler.policies.published.direct import Direct
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.slices import A_PART, A_STEP, A_STEP_IN_ALL, ANSWER, Slices, Work
from slosched.core.scheduler.state import Instance, Request, RequestState
from slosched.daemon import status
from slosched.daemon.in_slices import PART_BYTES, Slice, json_parts
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHello,
    ClientMessage,
    Goodbye,
    Infer,
    InferReply,
    ListModelsReply,
    ListModelsRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    ModelInfo,
    StatusReply,
)
from slosched.transport.codec import encode, is_long, pieces_of

QUEUED = 20_000
#: Answers that one step may give for work in slices, beside what the policy answers.
MOST_ANSWERS = A_STEP // ANSWER + 8


def crowded(count: int = QUEUED) -> tuple[Rig, list[int]]:
    """A GPU, a client "c" and a client "many" with `count` queued requests, the last due first."""
    rig, (model, *_) = Rig.ready()
    rig.hello(b"many", 7)
    ids = [
        rig.infer(model, slo_ms=3_000_000 - 10 * place, client=b"many") for place in range(count)
    ]
    rig.step()
    return rig, ids


def settle(rig: Rig) -> int:
    """Step until no slice is left; how many steps that took."""
    for count in range(1, 10_000):
        rig.step()
        if not rig.scheduler.slicing:
            return count
        rig.now_ns += MS // 10
    raise AssertionError("slices never end")


def done(effects: list[Effect]) -> list[RequestDone]:
    return [effect for effect in effects if isinstance(effect, RequestDone)]


def steps_until_idle(rig: Rig, step: Callable[[], list[Effect]]) -> list[int]:
    """How many requests were answered in each step; time moves by a tenth of a millisecond."""
    counts = []
    while True:
        effects = step()
        counts.append(len(done(effects)))
        if not rig.scheduler.slicing:
            return counts
        assert rig.scheduler.next_wakeup_ns() == rig.now_ns, "the rest must not wait"
        rig.now_ns += MS // 10


def test_slices_do_so_much_a_step_and_all_work_in_turn() -> None:
    did: list[str] = []

    def work(name: str, parts: int, cost: int) -> Work:
        for _ in range(parts):
            did.append(name)
            yield cost

    slices = Slices()
    slices.begin(work("a", 5, A_STEP // 2))
    slices.begin(work("b", 1, 1))
    assert (did, bool(slices.works)) == (["a", "a"], True)
    slices.go_on()
    assert did == ["a", "a"], "the step has had its units"
    for _ in range(2):
        slices.renew()
        slices.go_on()
    assert (did, bool(slices.works)) == (["a", "a", "a", "b", "a", "a"], False)


@pytest.mark.parametrize("fact", [FromClient(b"many", Goodbye()), ClientLost(b"many")])
def test_a_client_that_leaves_with_20000_requests_holds_no_step(fact: Event) -> None:
    rig, _ = crowded()
    rig.handle(fact)
    counts = steps_until_idle(rig, rig.step)
    rig.checker.recount()
    assert max(counts) <= MOST_ANSWERS
    assert sum(counts) > 0.99 * QUEUED and not rig.to_client(InferReply)
    assert not rig.scheduler.leaving


def test_20000_cancelled_requests_hold_no_step() -> None:
    rig, ids = crowded()
    for request_id in ids:
        rig.handle(FromClient(b"many", CancelRequest(request_id)))
    counts = steps_until_idle(rig, rig.step)
    rig.checker.recount()
    assert max(counts) <= MOST_ANSWERS
    assert sum(counts) > 0.99 * QUEUED
    assert {reply.code for reply in rig.to_client(InferReply)} == {Code.CANCELLED}


def test_others_are_served_between_the_slices() -> None:
    rig, _ = crowded(4_000)
    (infer,) = rig.outstanding()
    rig.handle(FromClient(b"many", Goodbye()))
    rig.step()
    rig.now_ns = T0 + 10 * MS
    rig.finish(infer, begin_ms=0.5)
    mine = rig.infer(slo_ms=30)
    rig.step()
    (infer,) = rig.outstanding()
    rig.now_ns = T0 + 20 * MS
    rig.finish(infer, begin_ms=10.5)
    rig.step()
    assert rig.reply(mine).code == Code.OK
    assert len(rig.scheduler.leaving[0].requests) > 3_000


def test_what_is_left_of_a_client_is_told_to_nobody_and_not_to_who_comes_back() -> None:
    rig, ids = crowded(2_000)
    (infer,) = rig.outstanding()
    rig.hello(b"many", 8)  # the same identity, restarted
    rig.step()
    (model,) = rig.load(client=b"many")
    again = rig.infer(model, slo_ms=100_000, client=b"many", request_id=ids[-1])
    rig.finish(infer, begin_ms=0.5)
    steps_until_idle(rig, rig.step)
    rig.checker.recount()
    assert not rig.answered(again) and not rig.to_client(InferReply)
    assert rig.scheduler.cluster.models[0].clients.keys() == {b"c", b"many"}


def test_the_end_is_answered_in_slices_and_to_everybody() -> None:
    rig, ids = crowded()

    def end() -> list[Effect]:
        effects = rig.scheduler.abandon(now_ns=rig.now_ns)
        rig.checker.check(effects, now_ns=rig.now_ns)
        rig.effects.extend(effects)
        return effects

    rig.handle(Drain())
    rig.step()
    counts = steps_until_idle(rig, end)
    assert max(counts) <= MOST_ANSWERS
    assert rig.scheduler.idle
    to_many = [e.message for e in rig.effects if isinstance(e, ToClient) and e.client == b"many"]
    replies = [message for message in to_many if isinstance(message, InferReply)]
    assert len(replies) == len(ids)
    assert {reply.code for reply in replies} == {Code.SHUTTING_DOWN}


# -------------------------------------------------------------------------- masses in a policy

#: What a policy answers in one step, one part more, and a batch that is given up because it is overdue.
MOST_OF_A_POLICY = A_STEP_IN_ALL // ANSWER + 1 + 8
MANY = 3_000


def full(policy: str, *, slo_ms: float = 60_000) -> Rig:
    """A GPU that reports nothing, and `MANY` requests that wait for it."""
    rig, (model, *_) = Rig.ready(SchedulerConfig(policy=policy, max_batch=8))
    for _ in range(MANY):
        rig.infer(model, slo_ms=slo_ms)
    rig.step()
    return rig


def test_a_policy_has_units_of_its_own_and_shares_the_rest() -> None:
    slices = Slices()
    assert slices.spend(A_STEP_IN_ALL) and not slices.works and not slices.under_way
    assert not slices.spend(1) and slices.under_way, "the next step follows"
    slices.renew()
    slices.go_on()
    assert not slices.under_way
    slices.begin(iter([A_STEP, 1]))
    assert slices.spend(A_STEP_IN_ALL - A_STEP) and not slices.spend(1)


@pytest.mark.parametrize("policy", ["INFER5", "EDF", "REJECT"])
def test_thousands_that_expire_at_once_are_answered_in_slices(policy: str) -> None:
    rig = full(policy)
    rig.now_ns += 60_001 * MS
    before = len(rig.records())
    counts = steps_until_idle(rig, rig.step)
    rig.checker.recount()
    assert max(counts) <= MOST_OF_A_POLICY and len(counts) > 20
    late = [record for record in rig.records()[before:] if record.code == Code.TIMED_OUT]
    assert len(late) > 0.9 * MANY


def test_what_can_be_in_time_is_served_between_those_that_cannot() -> None:
    rig = full("INFER5")
    infers = rig.outstanding()
    rig.now_ns += 60_001 * MS
    for place, infer in enumerate(infers):
        rig.finish(infer, begin_ms=0.5 + 10 * place)
    mine = rig.infer(slo_ms=100)
    rig.step()
    (infer,) = rig.outstanding()
    assert infer.request_count == 1 and not rig.answered(mine)
    rig.now_ns += 3 * MS
    rig.finish(infer, begin_ms=(rig.now_ns - T0) / MS - 2.5)
    rig.step()
    assert rig.reply(mine).code == Code.OK and rig.scheduler.slicing
    steps_until_idle(rig, rig.step)
    # They had hope until all had none: nothing was preferred to them.
    assert {r.code for r in rig.records()} <= {Code.OK, Code.TIMED_OUT}


@pytest.mark.parametrize("policy", ["INFER5", "FIFO", "EDF", "REJECT", "AIMD", "DIRECT"])
def test_the_loss_of_the_last_worker_is_told_in_slices(policy: str) -> None:
    rig = full(policy)
    (worker,) = rig.scheduler.cluster.workers.values()
    aboard = sum(len(action.requests) for action in rig.scheduler.cluster.actions.values())
    before = len(rig.records())
    rig.scheduler.sessions.lose(worker, "test", now_ns=rig.now_ns)
    counts = steps_until_idle(rig, rig.step)
    rig.checker.recount()
    assert rig.scheduler.idle and max(counts[1:], default=0) <= MOST_OF_A_POLICY
    assert counts[0] <= MOST_OF_A_POLICY + MOST_ANSWERS + aboard
    assert {r.code for r in rig.records()[before:]} <= {Code.CANCELLED, Code.TIMED_OUT}


def test_direct_does_not_walk_what_waits_for_weights() -> None:
    rig, models = Rig.ready(SchedulerConfig(policy="DIRECT"), copies=3)
    for place in range(MANY):
        rig.infer(models[place % 3], slo_ms=60_000, request_id=2 * place + 1)
    policy = rig.scheduler.policy
    assert isinstance(policy, Direct)
    for _ in range(100):
        rig.now_ns += MS // 10
        rig.step()
        rig.scheduler.next_wakeup_ns()
    assert policy.groups_looked_at == 0
    rig.weights_loaded()
    counts = []
    while rig.scheduler.slicing:
        before = len(rig.to_worker(Infer))
        rig.step()
        counts.append(len(rig.to_worker(Infer)) - before)
    rig.checker.recount()
    sent = [infer.model_id for infer in rig.to_worker(Infer)]
    assert sent == [models[place % 3].model_id for place in range(MANY)], "in the order of arrival"
    assert max(counts) <= MOST_OF_A_POLICY


def test_an_expiry_heap_is_rebuilt_some_entries_at_a_time() -> None:
    rig, _ = Rig.ready()
    draw = random.Random(3)
    heap, requests = ExpiryHeap(), []
    (client,) = rig.scheduler.clients.values()
    for key in range(20_000):
        due_ns = T0 + draw.randrange(10**9)
        request = Request(key, client, key, 0, rig.scheduler.cluster.models[0].queue, 0.0, 1, T0)
        requests.append((due_ns, key, request))
        heap.push(due_ns, request)
        if key % 3:
            request.state = RequestState.ANSWERED
    assert len(heap) < 15_000, "the dead are not kept"
    left = sorted(each for each in requests if each[2].state is RequestState.QUEUED)
    for due_ns, _, request in left[:200]:
        assert heap.next_ns() == due_ns and heap.pop_before(due_ns + 1) is request
    for _, _, request in left[200:]:
        request.state = RequestState.ANSWERED  # a client with all of them left
    looks = 0
    while (due := heap.next_ns()) is not None:
        looks += 1
        assert due <= left[-1][0]
    assert 5 < looks < 100 and not len(heap)


# ------------------------------------------------------------------------- long replies, brain

INSTANCES = 10_000


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number, which grows by the instances that are described, for a status or for a client."""
    described = [0]
    info, rows = Instance.info, status._models

    def counted_info(model: Instance) -> ModelInfo:
        described[0] += 1
        return info(model)

    def counted_rows(models: Sequence[Instance]) -> list[dict[str, Any]]:
        described[0] += len(models)
        return rows(models)

    monkeypatch.setattr(Instance, "info", counted_info)
    monkeypatch.setattr(status, "_models", counted_rows)
    return described


def large(monkeypatch: pytest.MonkeyPatch) -> tuple[Scheduler, list[int]]:
    scheduler, _ = big_controller(gpus=20, instances=INSTANCES)
    (model, *_) = Rig.ready()[0].scheduler.cluster.models.values()
    for each in scheduler.cluster.models.values():
        each.result = model.result
    scheduler.handle(FromClient(b"c", ClientHello(PROTOCOL_VERSION, 1, "c")), now_ns=T0)
    scheduler.schedule(now_ns=T0)
    return scheduler, counting(monkeypatch)


def reply_in_slices(
    scheduler: Scheduler, described: list[int], message: ClientMessage
) -> tuple[Any, int]:
    """The reply to `message`, and the most instances that one step described for it."""
    most, now_ns, before = 0, T0, described[0]
    scheduler.handle(FromClient(b"c", message), now_ns=now_ns)
    for _ in range(1000):
        effects = scheduler.schedule(now_ns=now_ns)
        most = max(most, described[0] - before)
        before = described[0]
        found = [e.message for e in effects if isinstance(e, ToClient) and e.client == b"c"]
        if found:
            return found[0], most
        assert scheduler.next_wakeup_ns() == now_ns
        now_ns += MS // 10
    raise AssertionError("no reply")


def test_a_status_of_10000_instances_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, described = large(monkeypatch)
    for brief, wanted in ((False, INSTANCES), (True, 0)):
        report: dict[str, Any] = {}
        counts = [described[0]]
        parts = status.status_parts(report, scheduler, now_ns=T0, brief=brief, counted=dict)
        counts += [described[0] for _ in parts]
        assert (len(report["models"]), report["model_instances"]) == (wanted, INSTANCES)
        assert max(after - before for before, after in pairwise(counts)) <= status.A_PART
        assert report == status.status_report(scheduler, now_ns=T0, brief=brief)


def test_a_list_of_10000_models_is_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, described = large(monkeypatch)
    reply, most = reply_in_slices(scheduler, described, ListModelsRequest(5))
    assert len(reply.models) == INSTANCES and most <= A_STEP + A_PART


def test_a_first_load_of_many_copies_is_made_and_taken_in_slices() -> None:
    rig = Rig()
    rig.hello()
    rig.join(pages=50)
    catalog, cluster = rig.scheduler.catalog, rig.scheduler.cluster
    worker = cluster.workers[0]
    rig.handle(FromClient(b"c", LoadModelRequest(5, "net", INSTANCES)))
    rig.handle(FromClient(b"c", LoadModelRequest(6, "net", 7)))  # waits for the same ones
    made, taken = [len(cluster.models)], [0]
    while rig.scheduler.slicing:
        rig.step()
        made.append(len(cluster.models))
    (load,) = rig.to_worker(LoadModel)
    assert (load.copies, made[-1]) == (INSTANCES, INSTANCES)
    rig.prepared()
    while taken[-1] < INSTANCES:
        taken.append(len(worker.instances))
        rig.now_ns += MS // 10
        rig.step()
    while rig.weights_loaded() or rig.scheduler.slicing:
        settle(rig)
    replies = {reply.request_id: reply for reply in rig.to_client(LoadModelReply)}
    assert [len(replies[5].models), len(replies[6].models)] == [INSTANCES, 7]
    assert [model.copy for model in cluster.models.values()] == list(range(INSTANCES))
    assert taken[-1] == INSTANCES and not catalog.waiting
    for counts, most in ((made, A_STEP + A_PART), (taken, A_STEP // 4)):
        assert max(after - before for before, after in pairwise(counts)) <= most


def test_a_worker_lost_while_many_copies_are_taken_leaves_no_load_waiting() -> None:
    rig = Rig()
    rig.hello()
    rig.join(pages=50)
    rig.handle(FromClient(b"c", LoadModelRequest(5, "net", INSTANCES)))
    settle(rig)
    rig.prepared()
    worker = rig.scheduler.cluster.workers[0]
    assert 0 < len(worker.instances) < INSTANCES
    rig.scheduler.sessions.lose(worker, "test", now_ns=rig.now_ns)
    rig.join(pages=50, session=51)
    settle(rig)
    (reply,) = rig.to_client(LoadModelReply)
    assert reply.code == Code.CANCELLED and not worker.instances
    rig.effects.clear()
    assert len(rig.load(3)) == 3


def test_a_load_of_many_models_is_answered_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    rig.hello()
    rig.join(pages=50)
    described = counting(monkeypatch)
    rig.handle(FromClient(b"c", LoadModelRequest(5, "net", 2_500)))
    settle(rig)
    rig.prepared()
    counts = []
    while not rig.to_client(LoadModelReply):
        before = described[0]
        if not rig.weights_loaded():
            rig.now_ns += MS // 10
            rig.step()
        counts.append(described[0] - before)
        assert len(counts) < 200
    assert len(rig.to_client(LoadModelReply)[0].models) == 2_500 and len(counts) > 5
    assert max(counts) <= A_STEP + A_PART
    assert all(model.clients for model in rig.scheduler.cluster.models.values())


def test_a_client_that_leaves_while_its_load_is_looked_at_leaves_nothing_to_do() -> None:
    rig = Rig()
    rig.hello()
    rig.hello(b"d")
    rig.join(pages=50)
    rig.handle(FromClient(b"d", LoadModelRequest(5, "net", 2_500)))
    settle(rig)
    (load,) = rig.to_worker(LoadModel)
    rig.prepared()
    while not rig.scheduler.catalog.hurried:
        rig.step()
    rig.handle(FromClient(b"d", Goodbye()))
    settle(rig)
    assert load.copies == 2_500 and not rig.scheduler.slicing
    assert rig.scheduler.next_wakeup_ns() != rig.now_ns


def test_who_left_before_the_reply_was_made_is_told_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler, _ = large(monkeypatch)
    for message in (ListModelsRequest(6), Goodbye()):
        scheduler.handle(FromClient(b"c", message), now_ns=T0)
    effects: list[Effect] = []
    while scheduler.slicing:
        effects += scheduler.schedule(now_ns=T0)
    assert not [e for e in effects if isinstance(e, ToClient) and e.client == b"c"]


# ------------------------------------------------------------------------- long replies, shell


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 51, 200, 70_000])
def test_pieces_of_a_long_reply_are_its_bytes(count: int) -> None:
    info = ModelInfo(
        model_id=1,
        name="net",
        copy=0,
        batch_sizes=(1, 2),
        b1_ns=5,
        weights_ns=5,
        weights_bytes=5,
        input_shape=(4,),
        input_dtype="float32",
        output_shape=(2,),
        output_dtype="float32",
        random_weights=False,
        gpus_resident=1,
        clients=1,
        labels=(),
    )
    rows: list[object] = [{"model_id": 1, "name": "net"}] * count
    replies: list[StatusReply | ListModelsReply | LoadModelReply] = [
        ListModelsReply(7, (info,) * count, ("net",) * count),
        LoadModelReply(7, 0, "", (info,) * count),
        StatusReply(7, {"models": rows, "clients": [], "requests": {"by_code": {}}, "n": count}),
    ]
    for reply in replies:
        pieces = list(pieces_of(reply))
        assert b"".join(pieces) == encode(reply)
        assert is_long(reply) == (count > 50)
        assert max(map(len, pieces)) < 4_000


def test_json_in_slices_is_the_same_text_and_lets_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = {"models": [{"model_id": n, "name": "nét", "b1_ns": 1.5} for n in range(2_000)], "e": []}
    monkeypatch.setattr(Slice, "is_over", lambda slice_: True)

    async def written() -> tuple[list[bytes], int]:
        turns = 0
        task = asyncio.ensure_future(json_parts(body))
        while not task.done():
            turns += 1
            await asyncio.sleep(0)
        return task.result(), turns

    parts, turns = asyncio.run(written())
    assert b"".join(parts) == json.dumps(body, indent=1).encode() + b"\n"
    assert turns > 200
    assert len(parts) > 2 and max(map(len, parts)) < 2 * PART_BYTES  # they are not joined
