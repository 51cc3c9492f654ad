"""Messages as tests speak them: what a test does not name has an ordinary value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slosched.messages import (
    PROTOCOL_VERSION,
    ErrorResult,
    GpuInfo,
    Heartbeat,
    Infer,
    InferResult,
    LoadModelResult,
    Span,
    WorkerWelcome,
)


def a_welcome(session: int, gpus: Sequence[GpuInfo], **fields: Any) -> WorkerWelcome:
    """A worker that offers "net"."""
    known: dict[str, Any] = {
        "protocol": PROTOCOL_VERSION,
        "version": "test",
        "host": "host",
        "pid": 1,
        "device": "emulated",
        "loadable": ("net",),
    }
    return WorkerWelcome(session=session, gpus=tuple(gpus), **known | fields)


def a_heartbeat(session: int, sent_ns: int, **fields: Any) -> Heartbeat:
    """A beat of a worker with nothing to say, whose clock is the controller's within 1 us."""
    known: dict[str, Any] = {"clock_offset_ns": 0, "clock_error_ns": 1000, "preparing": 0}
    return Heartbeat(session=session, sent_ns=sent_ns, **known | fields)


def an_infer(session: int, action_id: int, **fields: Any) -> Infer:
    """One request for model 0 on GPU 0."""
    known: dict[str, Any] = {
        "model_id": 0,
        "gpu_id": 0,
        "earliest_ns": 0,
        "latest_ns": 0,
        "expected_duration_ns": 0,
        "batch_size": 1,
        "request_count": 1,
    }
    return Infer(session, action_id, **known | fields)


def an_infer_result(session: int, action_id: int, span: Span, **fields: Any) -> InferResult:
    """It ran during `span`, and so did its copies."""
    known: dict[str, Any] = {
        "gpu_id": 0,
        "gpu_clock_before_mhz": 0,
        "gpu_clock_mhz": 0,
        "received_ns": span.begin_ns,
        "sent_ns": span.end_ns,
    }
    return InferResult(
        session, action_id, copy_input=span, exec=span, copy_output=span, **known | fields
    )


def an_error(session: int, action_id: int, code: int, reason: str, **fields: Any) -> ErrorResult:
    known: dict[str, Any] = {"action_type": 0, "received_ns": 0, "sent_ns": 0}
    return ErrorResult(session, action_id, code=code, reason=reason, **known | fields)


def a_load_result(session: int, action_id: int, **fields: Any) -> LoadModelResult:
    """One instance of one page, which takes 4 numbers and gives 2."""
    known: dict[str, Any] = {
        "span": Span(0, 0, 0),
        "copies": 1,
        "batch_sizes": (1,),
        "exec_ns": (5,),
        "weights_ns": 1,
        "weights_bytes": 1,
        "pages": 1,
        "input_shape": (4,),
        "input_dtype": "float32",
        "output_shape": (2,),
        "output_dtype": "float32",
        "random_weights": True,
        "received_ns": 0,
        "sent_ns": 0,
    }
    return LoadModelResult(session, action_id, **known | fields)
