"""Whole runs against a fake controller: results, files, stops and losses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import slosched.clients.load as load
import slosched.loadgen.results as results
from fake_controller import FakeController
from slosched.clients.run import run_workload
from slosched.errors import InvalidConfig, InvalidRequest
from slosched.loadgen.results import RunProgress, RunResult
from slosched.messages import InferRequest
from slosched.telemetry.client_log import read_client_log
from slosched.workloads.slo_exp_1 import SloExp1, parse_slo_exp_1


def spec(text: str = "toy 3 poisson 300 1s 4s 2 mul 0.3") -> SloExp1:
    return parse_slo_exp_1(text.split())


async def sent(controller: FakeController, count: int) -> None:
    """Wait until that many requests arrived: however slow the machine is, the run is under way."""
    async with asyncio.timeout(20):
        while len(controller.of(InferRequest)) < count:
            await asyncio.sleep(0.01)


async def run_until(
    controller: FakeController,
    count: int,
    what: Callable[[], object],
    running: Awaitable[RunResult],
) -> RunResult:
    """Let the run go on, and do `what` when it has sent `count` requests."""

    async def do() -> None:
        await sent(controller, count)
        what()

    doing = asyncio.ensure_future(do())
    result = await running
    await doing
    return result


def run(
    controller: FakeController,
    workload: SloExp1,
    *,
    inputs: bool = False,
    out: Path | None = None,
    progress: list[RunProgress] | None = None,
    stop_after_s: float | None = None,
    stop_after_sent: int | None = None,
) -> RunResult:
    async def work() -> RunResult:
        stop = asyncio.Event()
        if stop_after_s is not None:
            asyncio.get_running_loop().call_later(stop_after_s, stop.set)
        running = run_workload(
            controller.address,
            workload,
            inputs=inputs,
            seed=4,
            out=out,
            progress=progress.append if progress is not None else None,
            stop=stop,
        )
        if stop_after_sent is None:
            return await running
        return await run_until(controller, stop_after_sent, stop.set, running)

    return asyncio.run(asyncio.wait_for(work(), 60))


def test_a_sweep_counts_every_request_and_writes_its_files(tmp_path: Path) -> None:
    workload = spec()
    progress: list[RunProgress] = []
    with FakeController() as controller:
        result = run(controller, workload, inputs=True, out=tmp_path / "run", progress=progress)
    arrivals = [*workload.arrivals(4)]
    assert result.complete and result.problem == "" and result.sent == len(arrivals)
    assert [s.slo for s in result.steps] == ["1s", "2s", "4s"]
    assert [s.sent for s in result.steps] == [sum(a.step == i for a in arrivals) for i in range(3)]
    assert result.satisfaction == result.controller_satisfaction == 1.0
    assert all(s.codes == {"ok": s.sent} and s.latency_p50_ns > 0 for s in result.steps)
    assert result.run_dir == tmp_path / "run"

    log = read_client_log(tmp_path / "run" / "client_log.tsv")
    assert len(log["code"]) == len(arrivals)
    assert sorted(log["user_id"].tolist()) == sorted(a.user_id for a in arrivals)
    assert log["in_time"].sum() == len(arrivals)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["complete"] is True and manifest["kind"] == "client"
    assert manifest["config"]["rate"] == 300 and manifest["seeds"]["arrivals"] == 4
    assert manifest["outcome"]["sent"] == len(arrivals)
    assert manifest["random_weights"] is True and manifest["inputs"] is True

    assert progress and progress[-1].steps == 3
    assert all(
        p.label in ("SLO 1s", "SLO 2s", "SLO 4s") and p.total_s == pytest.approx(0.9)
        for p in progress
    )
    assert [p.sent for p in progress] == sorted(p.sent for p in progress)
    json.dumps(result.as_dict())


def test_no_inputs_sends_no_frames() -> None:
    with FakeController() as controller:
        result = run(controller, spec("toy 1 fixed-rate 50 1s 1s 2 mul 0.2"))
        requests = controller.of(InferRequest)
    assert result.sent == len(requests) == 9
    assert all(isinstance(r, InferRequest) and r.shape == () for r in requests)
    assert result.run_dir is None and not result.inputs


def test_stopping_leaves_a_valid_partial_run(tmp_path: Path) -> None:
    with FakeController() as controller:
        result = run(
            controller,
            spec("toy 2 fixed-rate 100 1s 8s 2 mul 5"),
            out=tmp_path / "run",
            stop_after_sent=20,
        )
    assert not result.complete and result.problem == "stopped"
    assert len(result.steps) == 1 and 0 < result.sent < 200
    assert result.steps[0].codes == {"ok": result.sent}
    assert "part of a run (stopped)" in result.verdict or not result.valid
    assert len(read_client_log(tmp_path / "run" / "client_log.tsv")["code"]) == result.sent
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["complete"] is False and manifest["outcome"]["problem"] == "stopped"


def test_stopping_while_it_loads(tmp_path: Path) -> None:
    with FakeController() as controller:
        controller.load_code = 5  # no worker yet
        result = run(controller, spec(), out=tmp_path / "run", stop_after_s=0.3)
    assert result.problem == "stopped" and result.sent == 0 and result.steps == ()
    assert not (tmp_path / "run").exists()


def test_cancelling_the_task_keeps_the_rows(tmp_path: Path) -> None:
    async def work(controller: FakeController) -> None:
        task = asyncio.ensure_future(
            run_workload(
                controller.address,
                spec("toy 1 fixed-rate 100 1s 1s 2 mul 20"),
                inputs=False,
                out=tmp_path / "run",
            )
        )
        await sent(controller, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with FakeController() as controller:
        asyncio.run(asyncio.wait_for(work(controller), 30))
    assert len(read_client_log(tmp_path / "run" / "client_log.tsv")["code"]) > 10
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["complete"] is False and manifest["outcome"]["problem"] == "cancelled"


def test_a_controller_that_falls_silent_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 50_000_000)
    monkeypatch.setattr(load, "GRACE_NS", 10**8)

    async def work(controller: FakeController) -> RunResult:
        running = run_workload(
            controller.address,
            spec("toy 1 fixed-rate 100 50ms 50ms 2 mul 20"),
            inputs=False,
            out=tmp_path / "run",
        )
        return await run_until(controller, 20, lambda: setattr(controller, "deaf", True), running)

    with FakeController() as controller:
        result = asyncio.run(asyncio.wait_for(work(controller), 30))
    assert not result.complete and "silent" in result.problem
    codes = result.steps[0].codes
    assert codes["ok"] > 10 and codes["no answer"] > 5
    assert sum(codes.values()) == result.sent
    assert len(read_client_log(tmp_path / "run" / "client_log.tsv")["code"]) == result.sent


@pytest.mark.parametrize("inputs", [False, True])
def test_a_run_goes_on_after_a_restart_of_the_controller(
    inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 50_000_000)

    unhandled: list[dict[str, Any]] = []

    async def work(controller: FakeController) -> RunResult:
        async def restart() -> None:
            controller.hold = True
            await asyncio.sleep(0.05)  # some are in flight
            controller.incarnation = 8
            await asyncio.sleep(0.3)
            controller.hold = False

        tasks: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: unhandled.append(what))
        workload = spec("toy 1 fixed-rate 100 50ms 50ms 2 mul 2")
        running = run_workload(controller.address, workload, inputs=inputs)
        return await run_until(
            controller, 10, lambda: tasks.append(asyncio.ensure_future(restart())), running
        )

    with FakeController() as controller:
        result = asyncio.run(asyncio.wait_for(work(controller), 30))
    assert not unhandled
    assert result.complete and not result.problem
    [warning] = [text for text in result.warnings if "restarted" in text]
    assert "in flight are lost" in warning
    [step] = result.steps
    assert sum(step.codes.values()) == result.sent
    assert step.codes["no answer"] >= 2 and step.codes["ok"] > 100


def test_refusals_are_counted_by_their_code() -> None:
    with FakeController() as controller:
        controller.code, controller.reason = 8, "no plan"
        result = run(controller, spec("toy 1 fixed-rate 100 1s 1s 2 mul 0.3"))
    [step] = result.steps
    assert step.codes == {"could not start in time": step.sent}
    assert step.satisfaction == step.controller_satisfaction == 0
    assert step.latency_p99_ns == 0


def test_a_run_beyond_its_issue_delay_bound_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "issue_delay_bound_ns", lambda slo_ns: 0)
    with FakeController() as controller:
        result = run(controller, spec("toy 1 fixed-rate 100 1s 1s 2 mul 0.2"))
    assert not result.valid and result.complete
    assert result.verdict.startswith("INVALID: issue delay p99 ")
    assert result.as_dict()["valid"] is False


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    workload = spec("toy 1 fixed-rate 100 1s 1s 2 mul 0.1")
    with FakeController() as controller:
        first = run(controller, workload, out=tmp_path)
        second = run(controller, workload, out=tmp_path)
    assert first.run_dir == tmp_path and second.run_dir == tmp_path / "run-002"
    assert (tmp_path / "run-002" / "client_log.tsv").exists()


def test_a_controllers_directory_is_shared(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "controller"}')
    (tmp_path / "clockwork_request_log.tsv").write_text("t\n")
    with FakeController() as controller:
        result = run(controller, spec("toy 1 fixed-rate 100 1s 1s 2 mul 0.1"), out=tmp_path)
    assert result.run_dir == tmp_path
    assert (tmp_path / "client_log.tsv").exists()
    assert json.loads((tmp_path / "client_manifest.json").read_text())["complete"]
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"kind": "controller"}


def test_errors_before_anything_is_sent(tmp_path: Path) -> None:
    with FakeController() as controller:
        with pytest.raises(InvalidRequest, match="they offer"):
            run(controller, spec("unknown 1 poisson 1 1 2 2 mul 1"))
        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.raises(InvalidConfig, match="not a directory"):
            run(controller, spec(), out=blocked)
        assert not controller.of(InferRequest)
