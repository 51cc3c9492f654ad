"""The results of actions, as messages: every time goes back to the controller's clock here."""

from __future__ import annotations

from slosched.config import ModelProfile
from slosched.core.clock_sync import ClockSync
from slosched.core.worker.state import ACTION_TYPES, Instance, PendingAction
from slosched.messages import (
    MAX_TEXT,
    ClearCacheResult,
    ErrorResult,
    EvictWeightsResult,
    GpuInfo,
    Infer,
    InferResult,
    LoadModel,
    LoadModelResult,
    LoadWeightsResult,
    Span,
    UnloadModelResult,
    WorkerStateResult,
)


def _span(clock: ClockSync, span: Span) -> Span:
    if clock.offset_ns == 0:
        return span  # as it is: the worker shares the controller's clock
    return Span(clock.to_peer_ns(span.begin_ns), clock.to_peer_ns(span.end_ns), span.duration_ns)


def offered_batches(profile: ModelProfile, max_batch: int, max_exec_ns: int) -> tuple[int, ...]:
    """Batch sizes up to `max_batch` that take at most `max_exec_ns`, ascending; 1 always."""
    return tuple(
        batch
        for batch in sorted(profile.exec_ns)
        if batch == 1 or (batch <= max_batch and profile.exec_ns[batch] <= max_exec_ns)
    )


def failed(
    action: PendingAction, clock: ClockSync, code: int, reason: str, *, now_ns: int
) -> ErrorResult:
    return ErrorResult(
        session=action.session,
        action_id=action.message.action_id,
        action_type=int(ACTION_TYPES[type(action.message)]),
        code=int(code),
        reason=reason[:MAX_TEXT],
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
    )


def model_loaded(
    action: PendingAction, clock: ClockSync, instance: Instance, span: Span, *, now_ns: int
) -> LoadModelResult:
    message = action.message
    assert isinstance(message, LoadModel)
    profile = instance.profile
    batches = offered_batches(profile, message.max_batch, message.max_exec_ns)
    return LoadModelResult(
        session=action.session,
        action_id=message.action_id,
        span=_span(clock, span),
        copies=message.copies,
        batch_sizes=batches,
        exec_ns=tuple(profile.exec_ns[batch] for batch in batches),
        weights_ns=profile.weights_ns,
        weights_bytes=profile.weights_bytes,
        pages=max(instance.pages.values()),
        input_shape=profile.input_shape,
        input_dtype=profile.input_dtype,
        output_shape=profile.output_shape,
        output_dtype=profile.output_dtype,
        random_weights=instance.random_weights,
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
        labels=instance.labels,
    )


def unloaded(action: PendingAction, clock: ClockSync, *, now_ns: int) -> UnloadModelResult:
    return UnloadModelResult(
        session=action.session,
        action_id=action.message.action_id,
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
    )


def weights_loaded(
    action: PendingAction, clock: ClockSync, span: Span, *, now_ns: int
) -> LoadWeightsResult:
    return LoadWeightsResult(
        session=action.session,
        action_id=action.message.action_id,
        span=_span(clock, span),
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
    )


def evicted(action: PendingAction, clock: ClockSync, *, now_ns: int) -> EvictWeightsResult:
    return EvictWeightsResult(
        session=action.session,
        action_id=action.message.action_id,
        span=_span(clock, Span(now_ns, now_ns, 0)),
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
    )


def inferred(
    action: PendingAction,
    clock: ClockSync,
    gpu_id: int,
    copy_output: Span,
    output_sizes: tuple[int, ...],
    *,
    now_ns: int,
) -> InferResult:
    message = action.message
    assert isinstance(message, Infer)
    return InferResult(
        session=action.session,
        action_id=message.action_id,
        copy_input=_span(clock, action.copy_input),
        exec=_span(clock, action.exec),
        copy_output=_span(clock, copy_output),
        gpu_id=gpu_id,
        gpu_clock_before_mhz=action.clock_before_mhz,
        gpu_clock_mhz=action.clock_mhz,
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
        output_sizes=output_sizes,
    )


def cache_cleared(action: PendingAction, clock: ClockSync, *, now_ns: int) -> ClearCacheResult:
    return ClearCacheResult(
        session=action.session,
        action_id=action.message.action_id,
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
    )


def worker_state(
    action: PendingAction,
    clock: ClockSync,
    gpus: tuple[GpuInfo, ...],
    models: tuple[tuple[int, str], ...],
    *,
    now_ns: int,
) -> WorkerStateResult:
    return WorkerStateResult(
        session=action.session,
        action_id=action.message.action_id,
        gpus=gpus,
        models=models,
        received_ns=clock.to_peer_ns(action.received_ns),
        sent_ns=clock.to_peer_ns(now_ns),
    )
