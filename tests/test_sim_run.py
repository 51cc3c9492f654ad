"""`simulate`: what a run directory holds, what a spec may say, and how a run ends early."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_runs import LOGS, TakingTurns, slo_exp_1, sweep
from slosched.codes import ActionType
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import RequestDone
from slosched.core.scheduler.scheduler import Scheduler
from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunProgress
from slosched.sim import run_files
from slosched.sim.client import LoadFailed
from slosched.sim.exec_times import exec_quantiles
from slosched.sim.harness import Demand, Simulation
from slosched.sim.network import Network
from slosched.sim.run import simulate, spec_digest
from slosched.sim.run_files import RowsNotWritten
from slosched.sim.spec import SimSpec, WorkerClocks
from slosched.telemetry.action_log import read_action_log
from slosched.telemetry.client_log import ClientRecord, read_client_log
from slosched.telemetry.manifest import read_manifest
from slosched.telemetry.request_log import read_request_log
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US
from slosched.workloads.engine import open_loop_arrivals

MS, US = NS_PER_MS, NS_PER_US
SPEC = sweep("resnet50_v2 3 poisson 800 3.4 7.7 1.5 mul 0.2")


def test_a_run_directory_is_that_of_a_live_run(tmp_path: Path) -> None:
    result = simulate(SPEC, out=tmp_path / "run", manifest={"figure": "none"})
    assert result.run_dir == tmp_path / "run" and result.complete and result.valid
    requests = read_request_log(tmp_path / "run" / LOGS[0])
    clients = read_client_log(tmp_path / "run" / LOGS[2])
    assert result.sent == len(requests) == len(clients)
    manifest = read_manifest(tmp_path / "run")
    assert manifest["kind"] == "simulation" and manifest["complete"] is True
    assert manifest["figure"] == "none" and manifest["seeds"]["arrivals"] == 0
    assert manifest["config"]["scheduler"]["max_batch"] == 16
    outcome = manifest["outcome"]
    assert outcome["requests_arrived"] == outcome["requests_answered"] == result.sent
    assert outcome["request_rows"] == outcome["client_rows"] == result.sent
    assert outcome["network"]["from client"]["messages"] > result.sent
    # Both logs tell the same story.
    order = np.argsort(clients["request_id"])
    by_id = np.argsort(requests["request_id"])
    assert (clients["deadline_met"][order] == requests["deadline_met"][by_id]).all()
    assert (clients["latency_ns"][order] >= requests["latency"][by_id] + 400 * US).all()


def test_it_sends_what_a_live_client_sends() -> None:
    sent: list[int] = []
    spec = replace(SPEC, seed=5)
    expected = [a.at_ns for a in open_loop_arrivals(spec.workload, seed=5)]
    result = simulate(spec, progress=lambda where: sent.append(where.sent))
    assert result.sent == len(expected) == sent[-1]
    assert result.run_dir is None
    assert [step.duration_ns for step in result.steps] == [200 * MS] * 3


def test_the_manifest_is_the_same_but_for_the_host(tmp_path: Path) -> None:
    documents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        simulate(SPEC, out=tmp_path / name)
        document = read_manifest(tmp_path / name)
        for key in ("started_at", "ended_at"):
            document.pop(key)
        document["outcome"].pop("wall_ns")
        document["outcome"].pop("run_dir")
        documents.append(document)
    assert documents[0] == documents[1]


def test_latency_is_the_sum_of_its_ways() -> None:
    """One request at a time on an idle GPU: four latencies, exec, and the outputs' bits on a card."""
    workload = slo_exp_1("resnet50_v2 1 fixed-rate 20 1s 1s 1s add 1")
    network = Network(10 * US, 20 * US, 40 * US, 80 * US)
    spec = replace(SPEC, workload=workload, network=network, gpus=1)
    result = simulate(spec)
    assert result.steps[0].latency_p50_ns == result.steps[0].latency_p99_ns == 2_600_000 + 150 * US
    inputs = replace(spec, inputs=True, network=replace(network, bandwidth_bits_per_s=10**10))
    with_inputs = simulate(inputs).steps[0].latency_p50_ns
    card_ns = 2 * 602_112 * 8 // 10 + 2 * 4000 * 8 // 10  # in on two cards, out on two
    small_ns = 4 * 200 * 8 // 10
    assert abs(with_inputs - result.steps[0].latency_p50_ns - card_ns - small_ns) <= 4
    pcie = replace(inputs, noise=EmulationNoise(pcie_bytes_per_s=12_000_000_000))
    copied_ns = (602_112 + 4000) // 12
    # The copy may begin before the exec is due, and takes its time before it all the same.
    assert abs(simulate(pcie).steps[0].latency_p50_ns - with_inputs - copied_ns) <= 2


def test_a_closed_loop_over_cold_models_loads_and_evicts(tmp_path: Path) -> None:
    small = replace(load_profile("v100"), weights_cache_bytes=16 * 16 * 2**20)
    spec = replace(SPEC, workload=TakingTurns(), profiles=(small,), gpus=1)
    result = simulate(spec, out=tmp_path)
    actions = read_action_log(tmp_path / LOGS[1])["action_type"]
    assert (actions == ActionType.LOAD_WEIGHTS).sum() > 20
    assert (actions == ActionType.EVICT_WEIGHTS).sum() > 20
    clients = read_client_log(tmp_path / LOGS[2])
    # A loop of one never has two outstanding: each is sent when the one before was answered, or at
    # its deadline if that was refused.
    for user in (0, 1):
        own = clients["user_id"] == user
        scheduled = clients["scheduled_ns"][own]
        answered = scheduled + clients["latency_ns"][own]
        assert (scheduled[1:] >= answered[:-1]).all()
    assert result.sent == len(clients)


def test_unequal_gpus_are_each_their_own(tmp_path: Path) -> None:
    slow = replace(load_profile("v100"), name="slow")
    model = slow.models["resnet50"]
    slow.models["resnet50"] = replace(model, exec_ns={1: 9 * MS, 2: 14 * MS})
    spec = replace(SPEC, profiles=(load_profile("v100"), slow))
    simulate(spec, out=tmp_path)
    actions = read_action_log(tmp_path / LOGS[1])
    ran = actions["action_type"] == ActionType.INFER
    on_slow = ran & (actions["worker_id"] == 1)
    assert on_slow.sum() > 5 and actions["worker_exec_duration"][on_slow].min() == 9 * MS
    with pytest.raises(InvalidConfig, match="workers of their own"):
        replace(spec, gpus_per_worker=2)


def test_wrong_clocks_are_found_out_by_the_clock_exchange() -> None:
    """Off by up to 3 s and drifting: served as well as with right ones, and every window is kept."""
    exact = simulate(SPEC)
    off = simulate(replace(SPEC, clocks=WorkerClocks(offset_ns=3 * NS_PER_S, drift_ppm=100.0)))
    assert off.sent == exact.sent
    assert off.satisfaction > exact.satisfaction - 0.01


def test_noise_is_each_workers_own_and_the_seeds(tmp_path: Path) -> None:
    spec = replace(SPEC, noise=EmulationNoise(exec_sigma=0.05))

    def ran(spec: SimSpec, name: str) -> dict[int, list[int]]:
        simulate(spec, out=tmp_path / name)
        log = read_action_log(tmp_path / name / LOGS[1])
        return {
            worker: log["worker_exec_duration"][
                (log["worker_id"] == worker) & (log["batch_size"] == 1) & (log["action_type"] == 2)
            ].tolist()
            for worker in (0, 1)
        }

    first = ran(spec, "a")
    assert len(first[0]) > 10 and len(first[1]) > 10
    assert first[0][:5] != first[1][:5]
    assert first == ran(spec, "b") and first != ran(replace(spec, seed=1), "c")
    quantiles = exec_quantiles(tmp_path / "a")
    assert len(quantiles) == 201 and 0.84 < quantiles[0] < 0.95 < 1.05 < quantiles[-1] < 1.16
    assert 0.99 < quantiles[100] < 1.01
    like = simulate(replace(spec, noise=EmulationNoise(exec_quantiles=quantiles)))
    assert like.sent > 0


def test_too_short_a_log_says_so(tmp_path: Path) -> None:
    short = replace(SPEC, duration_ns=5 * MS)
    simulate(short, out=tmp_path)
    with pytest.raises(InvalidConfig, match="has no 20 inferences"):
        exec_quantiles(tmp_path)


# ------------------------------------------------------------------------------ ending early


def stopping(after: int) -> Callable[[], bool]:
    asked = iter(range(10**9))
    return lambda: next(asked) >= after


def test_a_stopped_run_is_a_valid_part(tmp_path: Path) -> None:
    result = simulate(SPEC, out=tmp_path, stop=stopping(8))
    assert not result.complete and result.problem == "stopped"
    assert 50 < result.sent < 400
    clients = read_client_log(tmp_path / LOGS[2])
    assert len(clients) == result.sent and clients.truncated == 0
    manifest = read_manifest(tmp_path)
    assert manifest["complete"] is False and manifest["outcome"]["problem"] == "stopped"
    assert len(read_request_log(tmp_path / LOGS[0])) == manifest["outcome"]["requests_answered"]


def test_ctrl_c_leaves_a_valid_part(tmp_path: Path) -> None:
    def interrupt(where: RunProgress) -> None:
        if where.sent > 100:
            raise KeyboardInterrupt

    slow = replace(SPEC, workload=slo_exp_1(WORDS))
    result = simulate(slow, out=tmp_path, progress=interrupt)
    assert result.problem == "stopped" and not result.complete
    assert len(read_client_log(tmp_path / LOGS[2])) == result.sent


WORDS = "resnet50_v2 3 poisson 800 4 4 2 mul 60"


def test_a_bug_is_raised_and_what_was_sent_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Scheduler.schedule

    def broken(self: Scheduler, *, now_ns: int) -> list[Any]:
        if self.arrived > 50:
            raise RuntimeError("a bug")
        return schedule(self, now_ns=now_ns)

    monkeypatch.setattr(Scheduler, "schedule", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        simulate(SPEC, out=tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest["complete"] is False and manifest["outcome"]["sent"] >= 50
    assert len(read_client_log(tmp_path / LOGS[2])) == manifest["outcome"]["sent"]


def a_page_goes_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each GPU loses count of a page once its model is loaded: no step touches its pages again."""
    schedule = Scheduler.schedule

    def forgetful(self: Scheduler, *, now_ns: int) -> list[Any]:
        effects = schedule(self, now_ns=now_ns)
        for gpu in self.cluster.gpus.values():
            if (
                self.answered > 20
                and gpu.free_pages + sum(model.pages for model in gpu.resident.values())
                == gpu.pages
            ):
                gpu.free_pages -= 1
        return effects

    monkeypatch.setattr(Scheduler, "schedule", forgetful)


def test_a_checked_run_is_counted_once_more_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_page_goes_missing(monkeypatch)
    assert SPEC.check
    with pytest.raises(InvariantViolated, match="pages"):
        simulate(SPEC, out=tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest["complete"] is False and manifest["outcome"]["problem"] == "an error ended it"
    assert len(read_client_log(tmp_path / LOGS[2])) == manifest["outcome"]["sent"]


def test_so_is_a_checked_simulation_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(SchedulerConfig(), load_profile("v100"), gpus_per_worker=(1,))
    models = simulation.load("resnet50_v2")
    a_page_goes_missing(monkeypatch)
    demands = [Demand(i * 10_000_000, 0, slo_ns=100_000_000) for i in range(30)]
    with pytest.raises(InvariantViolated, match="pages"):
        simulation.run(models, demands)


def test_what_is_answered_at_the_end_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that answers a request again as it ends."""
    done: list[RequestDone] = []
    schedule, abandon = Scheduler.schedule, Scheduler.abandon

    def watched(self: Scheduler, *, now_ns: int) -> list[Any]:
        effects = schedule(self, now_ns=now_ns)
        done.extend(effect for effect in effects if isinstance(effect, RequestDone))
        return effects

    def again(self: Scheduler, *, now_ns: int) -> list[Any]:
        return [*abandon(self, now_ns=now_ns), done[-1]]

    monkeypatch.setattr(Scheduler, "schedule", watched)
    monkeypatch.setattr(Scheduler, "abandon", again)
    with pytest.raises(InvariantViolated, match="although it was answered"):
        simulate(SPEC)


def test_a_full_disk_ends_the_run_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    directory = tmp_path / "run"
    monkeypatch.setattr(run_files, "_ROWS_PER_WRITE", 10)
    files = run_files.RunFiles(_made(directory))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RowsNotWritten, match=r"client_log\.tsv: No space left"):
        for _ in range(10):
            files.clients.append(ClientRecord(1, 0, 2, 3, 0, 0, 1.5, 4, 0, True))


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


# ------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpus": 0}, "gpus and gpus_per_worker must be at least 1"),
        ({"seed": -1}, "a seed must be at least 0"),
        ({"duration_ns": 0}, "duration must be above 0"),
        ({"gpus": 3, "profiles": (load_profile("v100"),) * 2}, "one for each of the 3"),
    ],
)
def test_impossible_specs_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        replace(SPEC, **change)


def test_an_endless_workload_needs_a_duration(tmp_path: Path) -> None:
    endless = replace(SPEC, workload=replace(TakingTurns(), duration_ns=None))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="--duration"):
        simulate(endless, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert simulate(replace(endless, duration_ns=NS_PER_S // 5)).complete


def test_a_model_that_the_profile_lacks_is_named() -> None:
    unknown = slo_exp_1("nonesuch 1 poisson 10 2 4 2 mul 1")
    with pytest.raises(LoadFailed, match="nonesuch"):
        simulate(replace(SPEC, workload=unknown))


def test_a_digest_tells_specs_apart_and_nothing_else() -> None:
    assert spec_digest(SPEC) == spec_digest(replace(SPEC))
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"gpus": 3},
        {"inputs": True},
        {"check": False},
        {"duration_ns": 10**8},
        {"network": Network(jitter_ns=1)},
        {"noise": EmulationNoise(exec_sigma=0.1)},
        {"scheduler": SchedulerConfig(schedule_ahead_ns=6 * MS)},
        {"workload": slo_exp_1("resnet50_v2 3 poisson 801 3 4 2 mul 1")},
    ]
    digests = [spec_digest(replace(SPEC, **change)) for change in changes]
    assert len({spec_digest(SPEC), *digests}) == len(changes) + 1
    # What a default means is part of the spec, not whether it was written down.
    same = replace(SPEC.scheduler, max_batch=16)
    assert spec_digest(replace(SPEC, scheduler=same)) == spec_digest(SPEC)
