"""Run directories made of whole cloth, with logs whose every number is known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from slosched.codes import ActionType
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.messages import Span
from slosched.telemetry import action_log, client_log, request_log
from slosched.telemetry.client_log import ClientRecord

START_NS = 1_600_000_000_000_000_000
B1_NS = 2_600_000
MS = 1_000_000
S = 1_000 * MS


def request(
    at_ns: int,
    latency_ns: int,
    *,
    factor: float = 2.0,
    slo_ns: int = 0,
    code: int = 0,
    user: int = 0,
    number: int = 0,
    cold: bool = False,
) -> RequestRecord:
    """One answered request that arrived `at_ns` after the run's start; its model has the user's number."""
    slo_ns = slo_ns or int(factor * B1_NS)
    arrival_ns = START_NS + at_ns
    met = code == 0 and latency_ns <= slo_ns
    return RequestRecord(
        number,
        number,
        user,
        user,
        code,
        "",
        factor,
        slo_ns,
        arrival_ns,
        arrival_ns + latency_ns,
        met,
        0 if cold else 1,
        1,
        cold,
    )


def action(
    at_ns: int,
    duration_ns: int,
    *,
    kind: ActionType = ActionType.INFER,
    code: int = 0,
    batch: int = 1,
    gpu: int = 0,
    duration_error_ns: int = 0,
    completion_error_ns: int = 0,
    in_time: float = 1.0,
    number: int = 0,
) -> ActionRecord:
    """One action whose result came `at_ns` after the run's start; it was sent 20 ms before.

    It took `duration_error_ns` longer, and ended `completion_error_ns` later, than was expected.
    """
    received_ns = START_NS + at_ns
    sent_ns, end_ns = received_ns - 20 * MS, received_ns - MS
    return ActionRecord(
        action_id=number,
        action_type=kind,
        code=code,
        worker_id=gpu,
        gpu_id=0,
        model_id=0,
        batch_size=batch,
        sent_ns=sent_ns,
        expected_duration_ns=duration_ns - duration_error_ns,
        expected_start_ns=sent_ns,
        expected_complete_ns=end_ns - completion_error_ns,
        result_received_ns=received_ns,
        processed_ns=received_ns,
        requests_queued=batch,
        copies_loaded=1,
        goodput_ns=int(duration_ns * in_time),
        exec=Span(end_ns - duration_ns, end_ns, duration_ns),
    )


def write_actions(path: Path, records: Sequence[ActionRecord]) -> None:
    """Write an action log, in order of results as a controller does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(records, key=lambda r: r.result_received_ns)
    path.write_text("\n".join([action_log.HEADER, *map(action_log.format_action, ordered), ""]))


def client(record: RequestRecord, more_ns: int) -> ClientRecord:
    """The client's view of `record`: it was scheduled `more_ns` before it arrived."""
    latency_ns = record.departure_ns - record.arrival_ns + more_ns
    return ClientRecord(
        scheduled_ns=record.arrival_ns - more_ns,
        issue_delay_ns=0,
        latency_ns=latency_ns,
        request_id=record.request_id,
        user_id=record.user_id,
        model_id=record.model_id,
        slo_factor=record.slo_factor,
        slo_ns=record.slo_ns,
        code=record.code,
        in_time=record.code == 0 and latency_ns <= record.slo_ns,
    )


def write_requests(path: Path, records: Sequence[RequestRecord]) -> None:
    """Write a request log, in order of departure as a controller does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(records, key=lambda r: r.departure_ns)
    rows = [request_log.HEADER, *map(request_log.format_request, ordered), ""]
    path.write_text("\n".join(rows))


def write_clients(path: Path, records: Sequence[ClientRecord]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([client_log.HEADER, *map(client_log.format_client, records), ""]))


def sweep(
    *,
    seed: int,
    copies: int = 3,
    rate: int = 100,
    factors: Sequence[float] = (1, 1.5, 2.25, 3.375, 5.0625),
    period_ns: int = 3 * S,
) -> list[RequestRecord]:
    """A Poisson sweep in which most requests of the first steps are late or refused."""
    chance = random.Random(seed)
    records: list[RequestRecord] = []
    at_ns = 0.0
    while True:
        at_ns += chance.expovariate(rate) * S
        step = int(at_ns // period_ns)
        if step >= len(factors):
            return records
        latency_ns = int(2.2 * MS + chance.expovariate(1 / (3.0 * MS)))
        code = 8 if latency_ns > 4 * factors[step] * MS else 0
        records.append(
            request(
                int(at_ns),
                latency_ns if code == 0 else 100_000,
                factor=factors[step],
                code=code,
                user=chance.randrange(copies),
                number=len(records),
            )
        )
