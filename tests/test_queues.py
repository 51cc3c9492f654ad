"""Taking requests out of long queues: what it costs is counted, in comparisons, and not timed."""

from __future__ import annotations

import math

import pytest

from scheduler_rig import Rig
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.state import Request
from slosched.messages import CancelRequest, Goodbye

#: Every policy that keeps requests in its models' queues.
QUEUEING = ("AIMD", "DIRECT", "EDF", "FIFO", "INFER4", "INFER5", "REJECT", "SMART")
CONFIGS = [
    *(pytest.param(SchedulerConfig(policy=policy), id=policy) for policy in QUEUEING),
    pytest.param(SchedulerConfig(policy="INFER5", fidelity="paper"), id="INFER5-paper"),
]
MANY = 1500


class _Comparisons:
    """Counts how often two requests are compared, for order or for being the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        before = Request.__lt__

        def less(one: Request, other: Request) -> bool:
            self.count += 1
            return before(one, other)

        def same(one: Request, other: object) -> bool:
            self.count += 1
            return one is other

        monkeypatch.setattr(Request, "__lt__", less)
        monkeypatch.setattr(Request, "__eq__", same)
        monkeypatch.setattr(Request, "__hash__", object.__hash__)


def with_queued(
    config: SchedulerConfig, clients: tuple[bytes, ...]
) -> tuple[Rig, dict[bytes, list[int]]]:
    """One GPU, and `MANY` queued requests of each client, in turn, with falling deadlines."""
    rig, (model, *_) = Rig.ready(config)
    for client in clients:
        rig.hello(client)
    ids: dict[bytes, list[int]] = {client: [] for client in clients}
    for place in range(MANY):
        for client in clients:
            ids[client].append(rig.infer(model, slo_ms=60_000 - 10 * place, client=client))
    return rig, ids


@pytest.mark.parametrize("config", CONFIGS)
def test_a_client_that_leaves_costs_a_logarithm_for_each_request(
    config: SchedulerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, _ = with_queued(config, (b"a", b"b"))
    compared = _Comparisons(monkeypatch)
    rig.handle(FromClient(b"b", Goodbye()))
    while rig.scheduler.arrived - rig.scheduler.answered > MANY:
        rig.step()
    assert compared.count <= MANY * (2 + math.log2(2 * MANY))
    assert len(rig.scheduler.clients[b"a"].requests) > 0.9 * MANY


@pytest.mark.parametrize("config", CONFIGS)
def test_cancelled_requests_cost_a_logarithm_each(
    config: SchedulerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, ids = with_queued(config, (b"a",))
    compared = _Comparisons(monkeypatch)
    for request_id in ids[b"a"][::2]:
        rig.handle(FromClient(b"a", CancelRequest(request_id)))
    while rig.scheduler.slicing:
        rig.step()
    assert compared.count <= MANY / 2 * (2 + math.log2(MANY))
    assert rig.scheduler.answered >= MANY // 2
