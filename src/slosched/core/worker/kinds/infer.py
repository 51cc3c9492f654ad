"""Infer: one batch through a model.

input, from 5 ms before `earliest`  ->  exec, at `earliest`  ->  output
"""

from __future__ import annotations

from slosched.codes import ActionType, Code
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.core.worker.kinds.base import Acceptance, ActionKind, Fault, peer_span
from slosched.core.worker.lanes import Role
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import Instance, PendingAction, Step
from slosched.messages import Infer, InferResult, Span
from slosched.signature import BYTES, row_bytes
from slosched.units import NS_PER_MS

#: Inputs may be copied this long before the exec may start (Clockwork, worker_api: 5 ms).
COPY_INPUT_LEAD_NS = 5 * NS_PER_MS


class InferKind(ActionKind[Infer]):
    message = Infer
    action_type = ActionType.INFER
    takes_inputs = True

    def __init__(self, pipeline: Pipeline, acceptance: Acceptance) -> None:
        super().__init__(pipeline, acceptance)
        self._input = Step(Role.INPUT, self._start_input, self._input_ended)
        self._exec = Step(Role.EXEC, self._start_exec, self._exec_ended)
        self._output = Step(Role.OUTPUT, self._start_output, self._output_ended)

    def check(self, action: PendingAction[Infer], frames: tuple[int, ...]) -> Fault | None:
        message = action.message
        fault = self._locate(action, message, Code.COPY_INPUT_UNKNOWN_MODEL)
        if fault is not None:
            return fault
        assert action.instance is not None
        if action.instance.function is not None:
            return (
                Code.INVALID_ACTION,
                f"{action.instance.name!r} is a function, which a Call runs",
            )
        zero_size_inputs = self._acceptance.zero_size_inputs
        return infer_fault(message, action.instance, frames, zero_size_inputs=zero_size_inputs)

    def begin(self, action: PendingAction[Infer], now_ns: int) -> None:
        assert action.gpu is not None
        action.priority = action.message.priority
        self._ledger.use_weights(action)
        earliest_ns = action.earliest_ns - COPY_INPUT_LEAD_NS
        self._pipeline.enqueue(action.gpu.lanes[Role.INPUT], earliest_ns, action, self._input)

    # ------------------------------------------------------------------------------- input

    def _start_input(self, action: PendingAction[Infer], now_ns: int) -> None:
        gpu = action.gpu
        assert gpu is not None
        if now_ns > action.latest_ns:
            self._pipeline.late(action, Code.COPY_INPUT_TOO_LATE, now_ns)
        elif gpu.free_copies and not any(action.message.input_sizes):
            self._copied_input(action, Span(now_ns, now_ns, 0), now_ns)
        else:
            self._launch(OpKind.COPY_INPUT, action)

    def _input_ended(self, action: PendingAction[Infer], done: OpDone, now_ns: int) -> None:
        if done.code:
            self._ledger.fail(action, done.code, done.reason, now_ns)
        else:
            self._copied_input(action, done.span, now_ns)

    def _copied_input(self, action: PendingAction[Infer], span: Span, now_ns: int) -> None:
        action.copy_input = span
        pipeline = self._pipeline
        if pipeline.closing or action.message.session != self._ledger.link.session:
            reason = "cancelled before it could start"
            self._ledger.fail(action, Code.CANCELLED, reason, now_ns)
        else:
            assert action.gpu is not None
            pipeline.enqueue(action.gpu.lanes[Role.EXEC], action.earliest_ns, action, self._exec)

    # -------------------------------------------------------------------------------- exec

    def _start_exec(self, action: PendingAction[Infer], now_ns: int) -> None:
        if self._pipeline.late(action, Code.EXEC_TOO_LATE, now_ns):
            return
        gpu, instance = action.gpu, action.instance
        assert gpu is not None and instance is not None
        model_id = instance.model_id
        if not gpu.cache.resident(model_id):
            reason = f"the weights of model id {model_id} are not on GPU {gpu.gpu_id}"
            self._ledger.fail(action, Code.EXEC_WEIGHTS_MISSING, reason, now_ns)
            return
        action.weights_version = gpu.cache.version(model_id)
        self._launch(OpKind.EXEC, action)

    def _exec_ended(self, action: PendingAction[Infer], done: OpDone, now_ns: int) -> None:
        if done.code:
            self._ledger.fail(action, done.code, done.reason, now_ns)
            return
        gpu, instance = action.gpu, action.instance
        assert gpu is not None and instance is not None
        self._ledger.release_weights(action)
        if gpu.cache.version(instance.model_id) != action.weights_version:
            reason = f"the weights of model id {instance.model_id} were changed while it ran"
            self._ledger.fail(action, Code.EXEC_CONCURRENT_WEIGHTS_MODIFICATION, reason, now_ns)
            return
        action.exec, action.pause_ns, action.segments = done.span, done.pause_ns, done.segments
        action.clock_before_mhz, action.clock_mhz = done.clock_before_mhz, done.clock_mhz
        output = gpu.lanes[Role.OUTPUT]
        if gpu.free_copies and not output.started and not any(action.message.input_sizes):
            self._answer(action, Span(now_ns, now_ns, 0), (), (), now_ns)
        else:
            self._pipeline.enqueue(output, 0, action, self._output)

    # ------------------------------------------------------------------------------ output

    def _start_output(self, action: PendingAction[Infer], now_ns: int) -> None:
        self._launch(OpKind.COPY_OUTPUT, action)

    def _output_ended(self, action: PendingAction[Infer], done: OpDone, now_ns: int) -> None:
        if done.code:
            self._ledger.fail(action, done.code, done.reason, now_ns)
        else:
            self._answer(action, done.span, done.output_sizes, done.scores, now_ns)

    def _answer(
        self,
        action: PendingAction[Infer],
        copy_output: Span,
        output_sizes: tuple[int, ...],
        scores: tuple[float, ...],
        now_ns: int,
    ) -> None:
        assert action.gpu is not None
        clock = self._clock
        result = InferResult(
            session=action.message.session,
            action_id=action.message.action_id,
            copy_input=peer_span(clock, action.copy_input),
            exec=peer_span(clock, action.exec),
            copy_output=peer_span(clock, copy_output),
            gpu_id=action.gpu.gpu_id,
            gpu_clock_before_mhz=action.clock_before_mhz,
            gpu_clock_mhz=action.clock_mhz,
            received_ns=clock.to_peer_ns(action.received_ns),
            sent_ns=clock.to_peer_ns(now_ns),
            output_sizes=output_sizes,
            pause_ns=action.pause_ns,
            segments=tuple([peer_span(clock, each) for each in action.segments]),
            scores=scores,
        )
        self._ledger.answer(action, result, action.key if output_sizes else None)

    def _launch(self, kind: OpKind, action: PendingAction[Infer]) -> None:
        gpu = action.gpu
        assert gpu is not None
        op = batch_op(self._ledger.next_seq(), kind, action)
        self._pipeline.launch(gpu.lanes[action.step.role], action, op)


def batch_op(op_id: int, kind: OpKind, action: PendingAction[Infer]) -> Op:
    """The op of one step of an Infer. By position: three are made for each batch."""
    message, gpu, instance = action.message, action.gpu, action.instance
    assert gpu is not None and instance is not None
    return Op(
        op_id,
        kind,
        gpu.gpu_id,
        instance.model_id,
        action.key,
        message.batch_size,
        message.request_count,
        message.input_sizes,
        instance.name,
        action.earliest_ns,
        action.latest_ns,
        message.length,
        message.lengths,
        message.priority,
    )


def infer_fault(
    message: Infer, instance: Instance, frames: tuple[int, ...], *, zero_size_inputs: bool
) -> Fault | None:
    """What is wrong with a batch. `frames` are the bytes of the frames that really came behind the message."""
    if message.batch_size < 1 or not 1 <= message.request_count <= message.batch_size:
        return (
            Code.INVALID_BATCH_SIZE,
            f"a batch of {message.batch_size} cannot carry {message.request_count} request(s)",
        )
    largest = instance.largest.get(message.length, 0)
    if message.batch_size > largest:
        if not largest:
            known = ", ".join(map(str, instance.largest))
            reason = f"{instance.name!r} has no length class {message.length}; it has {known}"
            return Code.COPY_INPUT_INVALID_INPUT, reason
        return (
            Code.COPY_INPUT_INVALID_BATCH_SIZE,
            f"{instance.name!r} has no batch size {message.batch_size} or more; the largest is "
            f"{largest}",
        )
    if (message.length or message.lengths) and not _lengths_fit(message):
        return (
            Code.COPY_INPUT_INVALID_INPUT,
            f"lengths {list(message.lengths)} for {message.request_count} request(s) at length "
            f"{message.length}",
        )
    sizes = message.input_sizes
    if sizes and len(sizes) != message.request_count:
        return (
            Code.COPY_INPUT_BAD_SIZES,
            f"{len(sizes)} input sizes for {message.request_count} request(s)",
        )
    if not frames and zero_size_inputs and not any(sizes):
        return None  # the common case: nothing travels
    expected = tuple(size for size in sizes if size != 0)
    if frames != expected:
        return (
            Code.COPY_INPUT_BAD_SIZES,
            f"input_sizes says {list(expected)} bytes, the frames have {list(frames)}",
        )
    for place, size in enumerate(sizes):
        if size != instance.input_bytes and size:
            wrong = _size_fault(instance, message.lengths[place] if message.length else 0, size)
            if wrong:
                return Code.COPY_INPUT_INVALID_INPUT, wrong
    if len(expected) < message.request_count and not zero_size_inputs:
        return (
            Code.COPY_INPUT_INVALID_INPUT,
            "an input of zero bytes, and this worker does not generate inputs "
            "(allow_zero_size_inputs is off)",
        )
    return None


def _lengths_fit(message: Infer) -> bool:
    lengths = message.lengths
    served = message.request_count if message.length else 0
    return len(lengths) == served and all(1 <= each <= message.length for each in lengths)


def _size_fault(instance: Instance, length: int, size: int) -> str:
    """What is wrong with a frame of `size` bytes of a request of `length`; empty if nothing is."""
    takes = instance.profile.takes
    most = row_bytes(takes, length)
    of_any_size = any(tensor.dtype == BYTES for tensor in takes)
    if size == most or (of_any_size and size < most):
        return ""
    at = f" of length {length}" if length else ""
    most_text = f"at most {most}" if of_any_size else f"{most}"
    return f"an input{at} of {instance.name!r} has {most_text} bytes, not {size}"
