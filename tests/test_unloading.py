"""Clients come and go with ever new names and copies: unused models are unloaded, and loads have bounds."""

from __future__ import annotations

import pytest

from made_messages import a_heartbeat
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.scheduler.interface import FromClient, FromWorker, Note
from slosched.core.scheduler.sessions import TICK_NS
from slosched.messages import (
    ClientHeartbeat,
    EvictWeights,
    EvictWeightsResult,
    Goodbye,
    InferReply,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    Span,
    UnloadModel,
    UnloadModelReply,
    UnloadModelRequest,
)
from slosched.sim import fuzz
from slosched.sim.faults import FaultPlan
from slosched.sim.fuzz_case import SmallLoad
from slosched.sim.guests import GOODBYE, GuestPlan
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_S
from slosched.workloads.base import ModelUse

S = NS_PER_S
KEEP_S = 60


def ready(policy: str = "INFER5", **limits: object) -> Rig:
    config = SchedulerConfig(policy=policy, keep_unused_ns=KEEP_S * S, **limits)  # type: ignore[arg-type]
    rig = Rig(config)
    rig.hello()
    rig.join(pages=4)
    return rig


def pass_time(rig: Rig, seconds: float) -> None:
    """Ticks pass; the client "c" and the worker are heard, and evictions reported."""
    for _ in range(round(seconds * S / TICK_NS)):
        rig.now_ns += TICK_NS
        rig.handle(FromClient(b"c", ClientHeartbeat(rig.now_ns)))
        rig.from_worker(a_heartbeat(50, rig.now_ns))
        for evict in rig.to_worker(EvictWeights):
            if evict.action_id in rig.scheduler.cluster.actions:
                span = Span(rig.now_ns, rig.now_ns, 0)
                rig.from_worker(
                    EvictWeightsResult(50, evict.action_id, span=span, received_ns=0, sent_ns=0)
                )
        rig.step()


def visit(rig: Rig, client: bytes, copies: int) -> None:
    """A client comes, loads, and goes."""
    rig.hello(client)
    rig.load(copies, client=client)
    rig.handle(FromClient(client, Goodbye()))
    rig.step()


@pytest.mark.parametrize("policy", ["INFER5", "FIFO", "EDF", "REJECT", "AIMD"])
def test_what_no_client_has_used_for_long_is_unloaded(policy: str) -> None:
    rig = ready(policy)
    rig.load(2)
    visit(rig, b"d", 7)
    cluster = rig.scheduler.cluster
    pass_time(rig, KEEP_S - 2)
    assert len(cluster.models) == 7 and not rig.to_worker(UnloadModel)
    pass_time(rig, 4)
    assert list(cluster.models) == [0, 1], "its client is there"
    unloaded = [message.model_id for message in rig.to_worker(UnloadModel)]
    assert sorted(unloaded) == [2, 3, 4, 5, 6]
    (gpu,) = cluster.gpus.values()
    assert set(gpu.resident) == {0, 1} and gpu.free_pages == 2
    lines = [e.text for e in rig.effects if isinstance(e, Note) and "unloaded" in e.text]
    assert "instance(s) of 'net' are unloaded: no client has used them for 60s" in lines[0]
    assert len(rig.load(4)) == 4  # made anew
    rig.checker.recount()
    request = rig.infer(rig.load(4)[0], slo_ms=500)
    rig.step()
    (infer,) = rig.outstanding()
    rig.now_ns += 4 * MS
    rig.finish(infer, begin_ms=(rig.now_ns - T0) / MS - 2)
    rig.step()
    assert rig.reply(request).code == Code.OK


def test_clients_that_come_and_go_leave_nothing_that_grows() -> None:
    rig = ready()
    for place in range(4):
        visit(rig, b"d%d" % place, 20)
        pass_time(rig, KEEP_S + 4)
        assert not rig.scheduler.cluster.models
    worker = rig.scheduler.cluster.workers[0]
    assert not worker.instances and not worker.prepared and not rig.scheduler.catalog._by_name
    (gpu,) = worker.gpus
    assert gpu.free_pages == gpu.pages and not gpu.load_pauses
    prepared, unloaded = rig.to_worker(LoadModel), rig.to_worker(UnloadModel)
    assert sum(load.copies for load in prepared) == len(unloaded) == 80
    placement = rig.scheduler.policy._placement  # type: ignore[attr-defined]
    assert not placement._unsettled


def test_what_is_in_use_stays_with_all_before_it() -> None:
    rig = ready()
    visit(rig, b"d", 3)
    rig.hello(b"e")
    rig.load(5, client=b"e")
    pass_time(rig, 1)
    request = rig.infer(1, slo_ms=500, client=b"c")  # by its number: "c" never loaded it
    rig.handle(FromClient(b"e", Goodbye()))
    pass_time(rig, KEEP_S + 4)
    assert list(rig.scheduler.cluster.models) == [0, 1]
    assert request


def test_of_too_many_instances_the_unused_make_way_for_a_load() -> None:
    rig = ready(max_instances=10)
    visit(rig, b"d", 7)
    rig.hello(b"e")
    rig.load(3, client=b"e")  # shares three
    rig.handle(FromClient(b"c", LoadModelRequest(900, "net", 11)))
    rig.step()
    (reply,) = [r for r in rig.to_client(LoadModelReply) if r.request_id == 900]
    assert reply.code == Code.LIMIT_REACHED and "--max-instances allows 10" in reply.reason
    pass_time(rig, 3)
    assert len(rig.scheduler.cluster.models) == 3
    assert len(rig.load(10)) == 10


def test_the_published_schedulers_unload_nothing() -> None:
    rig = ready("SMART")
    visit(rig, b"d", 2)
    pass_time(rig, KEEP_S + 4)
    assert len(rig.scheduler.cluster.models) == 2


def test_a_worker_forgets_what_a_guest_brought_in_the_simulator() -> None:
    exec_ns = {1: 5 * MS, 2: 8 * MS, 4: 14 * MS}
    models = {n: ModelProfile(n, exec_ns, MS, 2**24) for n in ("net", "other")}
    guest = GuestPlan("guest", "other", S, 2 * S, 100 * MS, 4, S, GOODBYE)
    load = SmallLoad((ModelUse("net", 1),), (30.0,), 0, 100 * MS, guests=(guest,))
    spec = SimSpec(
        workload=load,
        scheduler=SchedulerConfig(keep_unused_ns=3 * S),
        gpus=2,
        gpus_per_worker=2,
        profiles=(GpuProfile("small", models, 2**28),),
        seed=5,
        duration_ns=60 * S,
        check=True,
        faults=FaultPlan(()),
    )
    case = fuzz._Case(spec, faults_end_ns=3 * S)
    case.run()
    assert [line for line in case.log if "of 'other' are unloaded" in line]
    (worker,) = case.world.cluster.workers.values()
    assert worker.node is not None
    assert {i.name for i in worker.node.brain._ledger.instances.values()} == {"net"}
    for gpu in worker.node.brain._ledger.gpus.values():
        assert gpu.cache.pages - gpu.cache.free_pages == 1


# ------------------------------------------------------------------- the client that asked has left


@pytest.mark.parametrize("copies", [3, 5_000])
def test_a_load_whose_client_left_does_not_hold_up_the_name(copies: int) -> None:
    rig = ready()
    rig.load(1)
    rig.hello(b"d")
    rig.handle(FromClient(b"d", LoadModelRequest(800, "net", copies)))
    rig.handle(FromClient(b"d", Goodbye()))
    rig.handle(FromClient(b"c", LoadModelRequest(900, "net", 1)))
    while rig.scheduler.slicing:
        rig.step()
    rig.step()
    replies = {reply.request_id: reply for reply in rig.to_client(LoadModelReply)}
    assert not replies[900].code and 800 not in replies, "what is there is told at once"
    assert not rig.scheduler.catalog.waiting


def test_who_asks_for_what_a_client_that_left_began_gets_it_with_the_workers_answer() -> None:
    rig = ready()
    rig.hello(b"d")
    rig.handle(FromClient(b"d", LoadModelRequest(800, "net", 3)))
    rig.step()
    rig.handle(FromClient(b"d", Goodbye()))
    rig.handle(FromClient(b"c", LoadModelRequest(900, "net", 2)))
    rig.step()
    (load,) = rig.to_worker(LoadModel)
    rig.prepared()
    rig.weights_loaded()
    (reply,) = rig.to_client(LoadModelReply)
    assert (reply.request_id, reply.code, len(reply.models), load.copies) == (900, 0, 2, 3)


def test_a_preparation_that_is_lost_with_its_clients_is_found_out_in_seconds() -> None:
    rig = ready()
    rig.hello(b"d")
    rig.handle(FromClient(b"d", LoadModelRequest(800, "net", 1)))
    rig.step()
    rig.handle(FromClient(b"d", Goodbye()))
    rig.handle(FromClient(b"c", LoadModelRequest(900, "net", 1)))
    for _ in range(round(7 * S / TICK_NS)):
        rig.now_ns += TICK_NS
        rig.handle(FromClient(b"c", ClientHeartbeat(rig.now_ns)))
        rig.handle(
            FromWorker(
                0,
                a_heartbeat(50, rig.now_ns),
            )
        )
        rig.step()
    assert any(isinstance(e, Note) and "knows nothing of LoadModel" in e.text for e in rig.effects)
    rig.join(session=51)
    rig.prepared()
    rig.weights_loaded()
    assert rig.to_client(LoadModelReply), "an answer, not ten minutes of silence"


# ------------------------------------------------------------------------------ a client unloads


def unload(
    rig: Rig, client: bytes = b"c", name: str = "net", *, force: bool = False
) -> UnloadModelReply:
    rig.handle(FromClient(client, UnloadModelRequest(77, name, force)))
    pass_time(rig, 3)
    return rig.to_client(UnloadModelReply)[-1]


def test_what_a_client_unloads_leaves_the_workers_at_once() -> None:
    rig = ready()
    rig.load(3)
    pass_time(rig, 1)
    assert unload(rig) == UnloadModelReply(77, 0, "", unloaded=3, kept=0)
    assert len(rig.to_worker(UnloadModel)) == 3 and not rig.scheduler.cluster.models
    assert any(
        "a client asked for it" in note.text for note in rig.effects if isinstance(note, Note)
    )


def test_what_was_used_a_moment_ago_is_unloaded_as_well() -> None:
    rig = ready()
    rig.load(2)
    pass_time(rig, 1)
    rig.now_ns += TICK_NS // 2  # between two ticks: a copy is used, and another made
    rig.infer(rig.load(3)[0], slo_ms=50)
    rig.step()
    (infer,) = rig.outstanding()
    rig.now_ns += 4 * MS
    rig.finish(infer, begin_ms=(rig.now_ns - T0) / MS - 2)
    assert unload(rig) == UnloadModelReply(77, 0, "", unloaded=3, kept=0)
    assert not rig.scheduler.cluster.models and not rig.scheduler.catalog._by_name


def test_what_ran_right_before_it_was_unloaded_goes_all_the_same() -> None:
    rig = ready()
    (model,) = rig.load()
    pass_time(rig, 1)
    rig.now_ns += 100 * MS  # the last tick is a while ago
    request = rig.infer(model, slo_ms=500)
    rig.step()
    (infer,) = rig.outstanding()
    rig.now_ns += 4 * MS
    rig.finish(infer, begin_ms=(rig.now_ns - T0) / MS - 2)
    rig.step()
    assert rig.reply(request).code == Code.OK
    assert unload(rig).unloaded == 1
    assert not rig.scheduler.cluster.models and len(rig.to_worker(UnloadModel)) == 1


def test_instances_that_another_client_uses_stay() -> None:
    rig = ready()
    rig.hello(b"d")
    rig.load(3)
    rig.load(1, client=b"d")
    pass_time(rig, 1)
    assert unload(rig) == UnloadModelReply(77, 0, "", unloaded=2, kept=1)
    assert [m.copy for m in rig.scheduler.cluster.models.values()] == [0]


def test_only_an_operator_unloads_what_others_use() -> None:
    rig = ready(operators=("d",))
    rig.hello(b"d")
    (model,) = rig.load()
    pass_time(rig, 1)
    refused = unload(rig, b"c", force=True)
    assert refused.code == Code.INVALID_REQUEST and "--operators names d" in refused.reason
    rig.infer(model, slo_ms=50)
    assert unload(rig, b"d", force=True) == UnloadModelReply(77, 0, "", unloaded=1, kept=0)
    assert not rig.scheduler.cluster.models


def test_clients_that_keep_sending_do_not_keep_what_an_operator_unloads() -> None:
    rig = ready(operators=("d",))
    rig.hello(b"d")
    (model,) = rig.load()
    pass_time(rig, 1)
    rig.handle(FromClient(b"d", UnloadModelRequest(77, "net", force=True)))
    sent = []
    for _ in range(3 * S // TICK_NS):
        sent.append(rig.infer(model, slo_ms=500))
        pass_time(rig, TICK_NS / S)
    assert not rig.scheduler.cluster.models
    assert {rig.reply(request).code for request in sent} == {Code.INVALID_REQUEST}


def test_a_client_that_loads_again_keeps_what_an_operator_unloads() -> None:
    rig = ready(operators=("d",))
    rig.hello(b"d")
    rig.load(2)
    pass_time(rig, 1)
    rig.handle(FromClient(b"d", UnloadModelRequest(77, "net", force=True)))
    (model,) = rig.load(1)
    pass_time(rig, 3)
    assert list(rig.scheduler.cluster.models) == [model.model_id]
    request = rig.infer(model, slo_ms=500)
    rig.step()
    assert request not in {reply.request_id for reply in rig.to_client(InferReply)}


def test_requests_that_wait_for_what_is_unloaded_are_answered() -> None:
    rig = ready(operators=("d",))
    rig.hello(b"d")
    (model,) = rig.load()
    rig.step()
    waiting = [rig.infer(model, slo_ms=60_000) for _ in range(40)]
    rig.step()
    rig.handle(FromClient(b"d", UnloadModelRequest(77, "net", force=True)))
    for _ in range(5):
        rig.step()
    codes = {reply.request_id: reply.code for reply in rig.to_client(InferReply)}
    aboard = {r.request_id for a in rig.scheduler.cluster.actions.values() for r in a.requests}
    assert aboard and codes == {i: Code.CANCELLED for i in waiting if i not in aboard}


def test_unloading_says_why_it_cannot() -> None:
    assert unload(ready(), name="nte").code == Code.UNKNOWN_MODEL
    rig = ready("INFER4")
    rig.load()
    pass_time(rig, 1)
    reply = unload(rig)
    assert reply.code == Code.INVALID_REQUEST and "INFER4 keeps every instance" in reply.reason
