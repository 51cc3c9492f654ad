"""Closed loops in real time: an answer is followed at once, a refusal at its deadline, and all end."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import slosched.clients.load as load
from fake_controller import FakeController
from slosched.clients.run import run_workload
from slosched.loadgen.instances import copies_by_name, in_workload_order
from slosched.loadgen.results import RunProgress, RunResult
from slosched.messages import InferRequest, LoadModelRequest
from slosched.telemetry.client_log import read_client_log
from slosched.workloads.base import ModelUse, Step, Stream
from slosched.workloads.streams import ClosedLoop

MS = 1_000_000

#: Live loops over real sockets: their counts need the machine.
pytestmark = pytest.mark.processes


@dataclass(frozen=True)
class Closed:
    """Two users with a closed loop each, of `concurrency` and of 1; both groups are counted."""

    concurrency: int = 3
    slo_ns: int = 50 * MS
    requests: int = 0
    name: str = "closed"
    duration_ns: int | None = None
    groups: tuple[str, ...] = ("many", "one")

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse("toy", 2), ModelUse("other"), ModelUse("toy"))

    def steps(self) -> tuple[Step, ...]:
        return (Step(0, 0, slo_ns=self.slo_ns),)

    def streams(self, seed: int) -> Sequence[Stream]:
        return (
            ClosedLoop(self.concurrency, (0, 1), user_id=1, requests=self.requests),
            ClosedLoop(1, (2, 3), user_id=2, group=1, requests=self.requests),
        )

    def describe(self) -> str:
        return "closed: two closed loops"


def run(
    controller: FakeController,
    workload: Closed,
    *,
    duration_ns: int | None = None,
    stop_when: Callable[[], bool] | None = None,
    out: Path | None = None,
    progress: list[RunProgress] | None = None,
) -> RunResult:
    async def work() -> RunResult:
        stop = asyncio.Event()

        async def stop_it() -> None:
            assert stop_when is not None
            async with asyncio.timeout(20):
                while not stop_when():
                    await asyncio.sleep(0.01)
            stop.set()

        stopping = asyncio.ensure_future(stop_it()) if stop_when is not None else None
        result = await run_workload(
            controller.address,
            workload,
            inputs=False,
            duration_ns=duration_ns,
            out=out,
            progress=progress.append if progress is not None else None,
            stop=stop,
        )
        if stopping is not None:
            await stopping
        return result

    return asyncio.run(asyncio.wait_for(work(), 30))


def test_each_answer_is_followed_by_the_next_request(tmp_path: Path) -> None:
    with FakeController() as controller:
        controller.answer_after_ns = 10 * MS
        result = run(controller, Closed(), duration_ns=400 * MS, out=tmp_path)
    assert result.complete and result.problem == ""
    many, one = result.steps
    assert (many.group, one.group) == ("many", "one")
    # No loop waits for another: about 400 / (10 to 13) each, and three at a time are thrice as many.
    assert 15 <= one.sent <= 41 and 2.5 * one.sent < many.sent < 3.5 * one.sent
    assert many.codes == {"ok": many.sent} and many.duration_ns == 400 * MS
    log = read_client_log(tmp_path / "client_log.tsv")
    starts = sorted((s, 1) for s in log["scheduled_ns"][log["user_id"] == 1].tolist())
    ends = sorted(
        (s + latency, -1)
        for s, latency, user in zip(
            log["scheduled_ns"].tolist(),
            log["latency_ns"].tolist(),
            log["user_id"].tolist(),
            strict=True,
        )
        if user == 1
    )
    outstanding = most = 0
    for _, change in sorted([*starts, *ends]):
        outstanding += change
        most = max(most, outstanding)
    assert most == 3 and outstanding == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["complete"] is True and manifest["duration_ns"] == 400 * MS


def test_a_refused_request_is_followed_when_its_deadline_has_come() -> None:
    with FakeController() as controller:
        controller.code, controller.reason = 8, "no plan"
        result = run(controller, Closed(slo_ns=50 * MS), duration_ns=420 * MS)
    assert result.complete
    # Due at 0, 50, ... 400 ms, each a little later than the one before; a machine that stalls loses some,
    # and never sends sooner.
    many, one = result.steps
    assert 6 <= many.sent <= 27 and 2 <= one.sent <= 9
    assert one.codes == {"could not start in time": one.sent}


def test_a_load_without_an_end_goes_on_until_it_is_stopped(tmp_path: Path) -> None:
    progress: list[RunProgress] = []
    with FakeController() as controller:
        controller.answer_after_ns = 5 * MS
        began = time.monotonic()
        result = run(
            controller,
            Closed(),
            progress=progress,
            out=tmp_path,
            stop_when=lambda: bool(progress) and len(controller.of(InferRequest)) > 100,
        )
        took_s = time.monotonic() - began
    assert (result.complete, result.problem) == (False, "stopped")
    assert all(math.isinf(p.total_s) for p in progress) and progress
    # The time that it ran, so that goodput is per second: 100 answers of 5 ms from four loops.
    assert 0.02 < result.steps[0].duration_ns / 1e9 < took_s
    assert result.steps[0].codes == {"ok": result.steps[0].sent}
    assert json.loads((tmp_path / "manifest.json").read_text())["duration_ns"] is None


def test_loops_that_have_sent_all_end_the_run() -> None:
    with FakeController() as controller:
        controller.answer_after_ns = 2 * MS
        result = run(controller, Closed(requests=20))
    assert result.complete and [step.sent for step in result.steps] == [20, 20]
    assert result.steps[0].duration_ns < 10**10


def test_answers_that_never_come_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "GRACE_NS", 200 * MS)
    with FakeController() as controller:
        controller.hold = True
        result = run(controller, Closed())
    assert not result.complete
    assert result.problem == "none of the last 4 requests was answered within 250ms"
    assert [step.codes for step in result.steps] == [{"no answer": 3}, {"no answer": 1}]


def test_a_name_that_is_used_twice_is_loaded_once_and_shared_out() -> None:
    uses = Closed().models()
    assert copies_by_name(uses) == {"toy": 3, "other": 1}
    assert in_workload_order(uses, {"toy": "abc", "other": "x"}) == ["a", "b", "x", "c"]
    with FakeController() as controller:
        run(controller, Closed(requests=4))
        loads = controller.of(LoadModelRequest)
        requests = controller.of(InferRequest)
    assert [(m.name, m.copies) for m in loads if isinstance(m, LoadModelRequest)] == [
        ("toy", 3),
        ("other", 1),
    ]
    # The fake numbers each name's copies from 0: `many` uses toys 0 and 1, `one` other 0 and toy 2.
    by_user = {
        user: {m.model_id for m in requests if isinstance(m, InferRequest) and m.user_id == user}
        for user in (1, 2)
    }
    assert by_user == {1: {0, 1}, 2: {0, 2}}
