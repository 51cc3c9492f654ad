"""SLOs that count from the client's send: what the controller learns, and what it plans for."""

from __future__ import annotations

from pathlib import Path

import pytest

from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.core.scheduler.client_latency import ClientLatency
from slosched.sim.client import SimClient
from slosched.sim.network import Network
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry.client_log import FILE_NAME, read_client_log
from slosched.units import NS_PER_MS
from slosched.workloads import parse_workload

MS = NS_PER_MS
SLO_NS = 10 * MS


def test_nothing_is_left_for_the_network_before_anything_is_known() -> None:
    assert ClientLatency().early_ns(SLO_NS) == 0


def test_the_forecast_follows_what_the_client_saw_and_is_not_moved_by_the_worst() -> None:
    latency = ClientLatency()
    for sample in range(100):
        latency.learn(MS + sample * 10_000)
    latency.learn(50 * MS)
    assert 1.45 * MS < latency.early_ns(SLO_NS) < 1.55 * MS
    for _ in range(300):
        latency.learn(MS // 2)
    assert latency.early_ns(SLO_NS) == MS // 2


def test_a_far_client_keeps_half_of_its_slo() -> None:
    latency = ClientLatency()
    latency.learn(60 * MS)
    assert latency.early_ns(SLO_NS) == SLO_NS // 2


def _run(directory: Path, slo: str) -> tuple[float, float]:
    """Shares in time: within SLO_NS at the client, and by the controller's count."""
    spec = SimSpec(
        workload=parse_workload(
            "slo-exp-1", ["resnet50_v2", "1", "poisson", "600", slo, slo, "2", "mul", "3"]
        ),
        scheduler=SchedulerConfig(),
        profiles=(load_profile("v100-linear"),),
        gpus=1,
        network=Network(from_client_ns=300_000, to_client_ns=300_000, jitter_ns=100_000),
    )
    simulate(spec, out=directory)
    log = read_client_log(directory / FILE_NAME)
    rows = [*zip(log["code"], log["latency_ns"], log["deadline_met"], strict=True)]
    in_time = sum(code == 0 and latency_ns <= SLO_NS for code, latency_ns, _ in rows)
    return in_time / len(rows), sum(met for *_, met in rows) / len(rows)


def test_an_slo_from_the_send_is_kept_where_one_from_arrival_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_client, at_controller = _run(tmp_path / "arrival", "10ms")
    by_hand, _ = _run(tmp_path / "by-hand", "9.3ms")
    monkeypatch.setattr(SimClient, "slo_from_send", True)
    itself, judged_there = _run(tmp_path / "send", "10ms")
    assert at_controller > at_client + 0.02  # late at the client alone
    assert itself > at_client + 0.02 and itself > by_hand - 0.01
    assert judged_there >= itself  # by its own count, which leaves the network out
