"""A worker beyond `max_gpus` is a spare: it takes the place of one that is lost and does not come back."""

from __future__ import annotations

from typing import Any

import pytest

from made_messages import a_heartbeat
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import GpuProfile, ModelProfile, SchedulerConfig
from slosched.core.scheduler.interface import FromClient, Note
from slosched.core.scheduler.sessions import TICK_NS
from slosched.messages import (
    ClientHeartbeat,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    StatusReply,
    StatusRequest,
)
from slosched.sim import fuzz
from slosched.sim.faults import Fault, FaultPlan
from slosched.sim.fuzz_case import SmallLoad
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import ModelUse

S = NS_PER_S


def notes(rig: Rig, words: str) -> list[str]:
    return [e.text for e in rig.effects if isinstance(e, Note) and words in e.text]


def pass_time(rig: Rig, seconds: float, alive: dict[int, int]) -> None:
    """Ticks pass, in which the client and the workers `alive` (worker id -> session) are heard."""
    for _ in range(round(seconds * S / TICK_NS)):
        rig.now_ns += TICK_NS
        rig.handle(FromClient(b"c", ClientHeartbeat(rig.now_ns)))
        for worker_id, session in alive.items():
            beat = a_heartbeat(session, rig.now_ns, preparing=1)  # its LoadModel, if it has one
            rig.from_worker(beat, worker_id)
        rig.step()


def with_a_spare(policy: str = "INFER5") -> tuple[Rig, int]:
    """Worker 0 serves a model, worker 1 is its spare; the model's b1."""
    rig = Rig(SchedulerConfig(policy=policy, max_gpus=1), workers=2)
    rig.hello()
    rig.join(0, session=50)
    rig.join(1, session=51)
    rig.handle(FromClient(b"c", LoadModelRequest(900, "net", 2)))
    rig.step()
    rig.prepared(0)
    rig.weights_loaded(0)
    (reply,) = rig.to_client(LoadModelReply)
    assert not reply.code
    rig.infer(reply.models[0], slo_ms=500)
    rig.step()
    for infer in rig.outstanding(0):
        rig.now_ns += 4 * MS
        rig.finish(infer, begin_ms=(rig.now_ns - T0) / MS - 2)
    return rig, reply.models[0].b1_ns


@pytest.mark.parametrize("policy", ["INFER5", "FIFO", "EDF", "REJECT", "AIMD"])
def test_a_spare_takes_over_when_a_lost_worker_does_not_come_back(policy: str) -> None:
    rig, b1_ns = with_a_spare(policy)
    assert notes(rig, "0 GPU(s) in use, 1 kept as spare(s)")
    pass_time(rig, 9, {1: 51})
    assert notes(rig, "worker 0 lost (silent)") and not rig.to_worker(LoadModel, 1)
    pass_time(rig, 3, {1: 51})
    (line,) = notes(rig, "takes over")
    assert line == (
        "worker 1 takes over in the place of worker(s) 0: 1 spare GPU(s) are in use now"
    )
    (load,) = rig.to_worker(LoadModel, 1)
    assert (load.name, load.copies) == ("net", 2)
    rig.prepared(1, scale=2.0)
    rig.weights_loaded(1)
    request = rig.infer(slo_ms=500)
    rig.step()
    if not rig.outstanding(1):
        rig.weights_loaded(1)
    (infer,) = rig.outstanding(1)
    rig.now_ns += 4 * MS
    rig.finish(infer, begin_ms=(rig.now_ns - T0) / MS - 2, worker_id=1)
    assert rig.step() is not None and rig.reply(request).code == Code.OK
    # The unit of SLO factors stays what the client was told; a new copy's is the spare's.
    rig.handle(FromClient(b"c", LoadModelRequest(901, "net", 3)))
    rig.step()
    rig.prepared(1, scale=2.0)
    rig.weights_loaded(1)
    (_, reply) = rig.to_client(LoadModelReply)
    assert [info.b1_ns for info in reply.models] == [b1_ns, b1_ns, 2 * b1_ns]
    rig.checker.recount()


def test_who_comes_back_in_time_keeps_its_place_and_who_comes_late_is_the_spare() -> None:
    rig, _ = with_a_spare()
    pass_time(rig, 5, {1: 51})
    rig.join(0, session=60)
    pass_time(rig, 20, {0: 60, 1: 51})
    assert not notes(rig, "takes over") and not rig.to_worker(LoadModel, 1)
    pass_time(rig, 12, {1: 51})
    assert len(notes(rig, "takes over")) == 1
    rig.join(0, session=61)
    pass_time(rig, 30, {0: 61, 1: 51})
    assert len(notes(rig, "takes over")) == 1, "nothing goes back and forth"
    assert notes(rig, "worker 0 on host joined: 0 GPU(s) in use, 1 kept as spare(s)")
    assert [gpu.name for gpu in rig.scheduler.cluster.gpus.values()] == ["W1-GPU0"]
    pass_time(rig, 13, {0: 61})
    assert notes(rig, "worker 0 takes over in the place of worker(s) 1")


def test_a_worker_that_is_used_in_part_brings_its_other_gpus_with_what_it_has_prepared() -> None:
    rig = Rig(SchedulerConfig(max_gpus=3), workers=2)
    rig.hello()
    rig.join(0, session=50, gpus=2)
    rig.join(1, session=51, gpus=2)
    rig.load(2)
    before = len(rig.to_worker(LoadModel, 1))
    pass_time(rig, 13, {1: 51})
    assert [gpu.name for gpu in rig.scheduler.cluster.gpus.values()] == ["W1-GPU0", "W1-GPU1"]
    assert len(rig.to_worker(LoadModel, 1)) == before, "it has the models"
    rig.weights_loaded(1)
    assert all(len(gpu.resident) == 2 for gpu in rig.scheduler.cluster.gpus.values())


def test_a_spare_that_says_goodbye_or_is_lost_takes_nobodys_place() -> None:
    rig, _ = with_a_spare()
    pass_time(rig, 13, {})
    pass_time(rig, 13, {})
    assert not notes(rig, "takes over")
    rig.handle(FromClient(b"c", StatusRequest(7)))
    rig.step()
    report: dict[str, Any] = rig.to_client(StatusReply)[0].report
    workers = report["workers"]
    assert [(w["gpus"], w["spare_gpus"]) for w in workers] == [([], 0), ([], 0)]


def test_a_spare_takes_over_in_the_simulator() -> None:
    exec_ns = {1: 5 * NS_PER_MS, 2: 8 * NS_PER_MS, 4: 14 * NS_PER_MS}
    profile = GpuProfile("small", {"net": ModelProfile("net", exec_ns, NS_PER_MS, 2**24)}, 2**28)
    spec = SimSpec(
        workload=SmallLoad((ModelUse("net", 2),), (30.0, 30.0), 0, 100 * NS_PER_MS),
        scheduler=SchedulerConfig(policy="INFER5", max_gpus=2),
        profiles=(profile,),
        gpus=3,
        gpus_per_worker=1,
        seed=5,
        duration_ns=60 * S,
        check=True,
        faults=FaultPlan((Fault("crash", "worker 0", S, 20 * S),)),
    )
    case = fuzz._Case(spec)
    world = case.world
    world.client.start()
    world.kernel.run_until(world.kernel.now_ns + 18 * S)
    (line,) = [line for line in case.log if "takes over" in line]
    assert "worker 2 takes over in the place of worker(s) 0" in line
    scheduler = world.cluster.controller.scheduler
    served = scheduler.cluster.workers[2].gpus[0].busy_ns
    assert served > 0
    world.kernel.run_until(world.kernel.now_ns + 12 * S)
    assert scheduler.cluster.workers[2].gpus[0].busy_ns > served
    assert len(scheduler.cluster.workers[0].spare) == 1, "it came back, and is the spare"
    assert len([line for line in case.log if "takes over" in line]) == 1
    world.cluster.controller.recount()
