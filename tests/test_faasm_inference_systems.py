"""The systems of the inference experiments with a tiny network: each answers the same, and leaves nothing."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig
from slosched.faasm.frame_processes import read_process
from slosched.faasm.inference import network
from slosched.faasm.inference.campaign import planned
from slosched.faasm.inference.instance import Instance
from slosched.faasm.inference.options import LatencyOptions
from slosched.faasm.inference.plan import Plan, given, images, plan_of, plan_of_environment
from slosched.faasm.inference.pool import Pool
from slosched.faasm.inference.process import InstanceFailed, InstanceProcess
from slosched.faasm.inference.requests import Reply, Request, System
from slosched.faasm.inference.systems import Opening, opened
from slosched.units import NS_PER_S

pytestmark = [pytest.mark.processes, pytest.mark.torch]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    path = tmp_path_factory.mktemp("weights") / "weights.npy"
    plan = Plan(network="own", size="micro", device="cpu", weights=str(path), seed=3)
    network.write_weights(plan)
    with given(plan):
        yield plan


def asked(
    system: System,
    plan: Plan,
    rung: str = "L0",
    *,
    give_up: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> Reply:
    """The reply to one request. `meanwhile` is called when it was sent."""
    over, got = threading.Event(), list[Reply]()

    def done(reply: Reply) -> None:
        got.append(reply)
        over.set()

    request = Request(
        number=0, user=0, intended_ns=now_ns(), picture=0, image=images(plan, 1)[0], rung=rung
    )
    take_back = system.submit(request, done)
    if give_up:
        take_back()
    meanwhile()
    assert over.wait(90), f"{system.name} did not answer"
    assert len(got) == 1
    return got[0]


def opening(plan: Plan, tmp_path: Path, *, with_new: bool = False) -> Opening:
    return Opening(
        plan=plan, instances=1, slo_ns=60 * NS_PER_S, logs=tmp_path / "logs", with_new=with_new
    )


def test_weights_follow_from_the_seed_and_the_network_has_its_published_size(plan: Plan) -> None:
    assert (network.random_weights(plan) == network.random_weights(plan)).all()
    full = Plan(network="own", size="full", device="cpu", weights=plan.weights, seed=3)
    # 4.25 million parameters (table 8 of the MobileNet paper, 1,001 classes), with batch statistics.
    parameters = sum(each.numel() for each in network.made(full).parameters())
    assert parameters == 4_233_001
    assert full.image_shape == (606, 517, 3)


def test_a_cold_instance_answers_as_a_warm_one(plan: Plan) -> None:
    instance, image = Instance(plan), images(plan, 1)[0]
    warm = instance.answer(image)
    for rung in ("L1", "L2", "L3"):
        cold = instance.answer(image, rung)
        assert (cold["top"], cold["scores"]) == (warm["top"], warm["scores"])
        assert cold["cold_ns"] > 0
    with pytest.raises(InvalidConfig, match="a live process has the rungs L1, L2, L3"):
        instance.make_cold("L4")


def test_l3_reads_the_weights_again_and_l1_does_not(plan: Plan, tmp_path: Path) -> None:
    own = Plan(network="own", size="micro", device="cpu", weights=str(tmp_path / "w.npy"), seed=4)
    network.write_weights(own)
    instance, image = Instance(own), images(own, 1)[0]
    before = instance.answer(image)["scores"]
    network.write_weights(
        Plan(network="own", size="micro", device="cpu", weights=own.weights, seed=5)
    )
    assert instance.answer(image, "L1")["scores"] == before
    assert instance.answer(image, "L3")["scores"] != before
    Path(own.weights).write_bytes(b"nonsense")
    with pytest.raises(InvalidConfig, match="cannot read weights"):
        instance.make_cold("L3")


@pytest.mark.parametrize("name", ["slosched", "process", "loop", "dask"])
def test_every_system_answers_as_the_instance_does(name: str, plan: Plan, tmp_path: Path) -> None:
    if name == "dask":
        pytest.importorskip("distributed")
    wanted = Instance(plan).answer(images(plan, 1)[0])
    with opened(name, opening(plan, tmp_path)) as system:
        warm_ns: list[int] = []
        # One of the warm ones may be held up between two looks at the clock, but not all of them.
        for rung in ("L0", "L0", "L0", "L0", "L0", "L1", "L3"):
            reply = asked(system, plan, rung)
            assert reply.status == "ok", reply.reason
            assert reply.answer is not None
            assert (reply.answer["top"], reply.answer["scores"]) == (
                wanted["top"],
                wanted["scores"],
            )
            if rung == "L0":
                warm_ns.append(reply.answer["cold_ns"])
            else:
                assert reply.answer["cold_ns"] > min(warm_ns)


def test_l4_on_slosched_is_a_new_process_and_is_refused_where_it_cannot_be_in_time(
    plan: Plan, tmp_path: Path
) -> None:
    with opened("slosched", opening(plan, tmp_path, with_new=True)) as system:
        pids = [_pid(asked(system, plan, rung)) for rung in ("L0", "L4", "L4", "L0")]
        assert len(set(pids[:3])) == 3
        assert pids[3] not in pids[1:3]  # the warm slots were there all the time
        system.slo_ns = 20_000_000  # type: ignore[attr-defined]
        reply = asked(system, plan, "L4")
    assert reply.status == "refused"
    assert "code 8" in reply.reason


def test_an_instance_of_the_pool_is_started_again_for_l4_and_when_it_was_killed(plan: Plan) -> None:
    with Pool("process", "", plan, 1) as pool:
        first = _pid(asked(pool, plan))
        given_up: list[Reply] = []
        running = threading.Thread(
            target=lambda: given_up.append(asked(pool, plan, give_up=True)), daemon=True
        )
        second = _pid(asked(pool, plan, "L4", meanwhile=running.start))
        running.join(90)
        assert [(each.status, each.reason) for each in given_up] == [
            ("timeout", "it was given up before it began")
        ]
        assert second != first
        assert _pid(asked(pool, plan)) == second
        os.kill(second, signal.SIGKILL)
        reply = asked(pool, plan)
        assert reply.status == "failed"
        assert "did not answer" in reply.reason or "is gone" in reply.reason
        third = _pid(asked(pool, plan))
        assert [third] == pool.pids
        assert third != second
    for pid in (first, second, third):
        assert _ended(pid)


def test_an_instance_that_cannot_load_says_why(plan: Plan) -> None:
    lost = Plan(network="own", size="micro", device="cpu", weights="/nowhere/w.npy", seed=1)
    process = InstanceProcess(lost)
    try:
        with pytest.raises(InstanceFailed, match="cannot read weights from /nowhere"):
            process.ready()
    finally:
        process.close()
    with pytest.raises(InstanceFailed):
        Pool("process", "", lost, 2)
    assert _ended(process.pid)


def test_a_plan_travels_in_the_environment(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_of_environment() == plan
    assert plan_of(plan.text()) == plan
    with pytest.raises(InvalidConfig, match="does not hold a plan"):
        plan_of("{}")
    monkeypatch.delenv("SLOSCHED_FAASM_PLAN")
    with pytest.raises(InvalidConfig, match="is not set"):
        plan_of_environment()


def _pid(reply: Reply) -> int:
    assert reply.answer is not None, reply.reason
    return reply.answer["pid"]


def _ended(pid: int) -> bool:
    until_ns = now_ns() + 10 * NS_PER_S
    while (process := read_process(pid)) is not None and not process.ended:
        if now_ns() > until_ns:
            return False
        sleep_ns(5_000_000)
    return True


def test_a_gpu_that_is_not_there_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InvalidConfig, match="finds no GPU"), planned(LatencyOptions(device="cuda")):
        raise AssertionError("it was planned")
