"""Where a request ends: what its reply and its record say, field by field, and when it was in time."""

from __future__ import annotations

from typing import Any

import pytest

from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.answers import Answers, Plan, reply_and_record
from slosched.core.scheduler.interface import Effect, RequestDone, RequestRecord, ToClient
from slosched.core.scheduler.limits import Limits
from slosched.core.scheduler.state import Client, Instance, Request
from slosched.core.values import Value
from slosched.messages import InferReply

ARRIVAL_NS = 1_000
PLAN = Plan(
    expected_start_ns=ARRIVAL_NS + 21,
    expected_exec_ns=22,
    start_ns=ARRIVAL_NS + 23,
    exec_ns=24,
    worker_id=25,
    gpu_id=26,
    batch_size=27,
)
ENDED: dict[str, Any] = {
    "code": 31,
    "reason": "why",
    "now_ns": ARRIVAL_NS + 32,
    "met": True,
    "departure_count": 33,
    "cold": True,
}


def a_request() -> Request:
    request = Request(
        key=11,
        client=Client(b"c", 1, "c"),
        request_id=12,
        user_id=13,
        queue=Instance(14, "m", 0).queue,
        slo_factor=1.5,
        slo_ns=16,
        arrival_ns=ARRIVAL_NS,
        input=Value(7, 17),
    )
    request.attempts, request.arrival_count = 18, 19
    return request


def test_every_field_of_a_reply() -> None:
    assert reply_and_record(a_request(), PLAN, **ENDED)[0] == InferReply(
        request_id=12,
        code=31,
        reason="why",
        model_id=14,
        slo_ns=16,
        latency_ns=32,
        deadline_met=True,
        batch_size=27,
        worker_id=25,
        gpu_id=26,
        cold=True,
        predicted_start_ns=21,
        predicted_exec_ns=22,
        start_ns=23,
        exec_ns=24,
        attempts=18,
    )


def test_every_field_of_a_requests_record() -> None:
    assert reply_and_record(a_request(), PLAN, **ENDED)[1] == RequestRecord(
        key=11,
        request_id=12,
        user_id=13,
        model_id=14,
        code=31,
        reason="why",
        slo_factor=1.5,
        slo_ns=16,
        arrival_ns=ARRIVAL_NS,
        departure_ns=ARRIVAL_NS + 32,
        deadline_met=True,
        arrival_count=19,
        departure_count=33,
        cold=True,
        batch_size=27,
        worker_id=25,
        gpu_id=26,
        attempts=18,
        predicted_start_ns=21,
        predicted_exec_ns=22,
        start_ns=23,
        exec_ns=24,
    )


def test_a_request_without_a_plan_says_so() -> None:
    reply, record = reply_and_record(a_request(), Plan(), **ENDED)
    assert (reply.predicted_start_ns, reply.start_ns, reply.worker_id) == (-1, -1, -1)
    assert (record.predicted_start_ns, record.start_ns, record.gpu_id) == (-1, -1, -1)


@pytest.mark.parametrize(
    ("late_ns", "code", "met"),
    [
        (-1, Code.OK, True),
        (0, Code.OK, True),
        (1, Code.OK, False),
        (0, Code.CANCELLED, False),
    ],
)
def test_in_time_is_at_the_deadline_or_before_and_with_success(
    late_ns: int, code: Code, met: bool
) -> None:
    """To the nanosecond; reply, record and the return value say the same."""
    effects: list[Effect] = []
    answers = Answers(emit=effects.append, limits=Limits(SchedulerConfig()))
    request = a_request()
    request.client.requests[request.request_id] = request
    assert request.input is not None
    request.client.input_bytes = request.input.size
    now_ns = ARRIVAL_NS + request.slo_ns + late_ns
    said = answers.give(request, code, "", PLAN, now_ns=now_ns, output=None, tell=True)
    told, recorded = effects
    assert isinstance(told, ToClient) and isinstance(told.message, InferReply)
    assert isinstance(recorded, RequestDone)
    assert (said, told.message.deadline_met, recorded.record.deadline_met) == (met, met, met)
