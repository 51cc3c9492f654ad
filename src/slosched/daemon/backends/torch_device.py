"""The CPU as a device, behind the core's `Device` protocol: real inference where there is no GPU.

Each op is a generator that is advanced by `poll` and yields whenever the loop should look round: between
two requests' input copies, two pieces of weights. So nothing here holds the loop longer than one piece,
except an exec, which runs inline (the CPU is the device). A GPU's device is in cuda/.

Who owns what: a buffer's rows are written by COPY_INPUT and read by the EXEC of the same action, which gives
it back; the model works on a copy (templates.py). An output belongs to its action, in memory that is neither
the buffer's nor the weights', until its rows have been taken as bytes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.base import Frame, first_line
from slosched.daemon.backends.templates import Array, DeviceWeights, Template
from slosched.messages import Span

#: Weights are copied to "CPU devices" in pieces of this size (0.2 to 0.5 ms each).
_PIECE_BYTES = 2 * 1024 * 1024
#: Input buffers of one model and batch class that are kept for the next batch.
_SPARE_BUFFERS = 4

_Steps = Generator[None, None, OpDone]


@dataclass(slots=True)
class _Buffer:
    """Memory for one batch of inputs (batch, *input_shape)."""

    key: tuple[str, int]  # model, batch class
    tensor: torch.Tensor
    rows: Array


@dataclass(slots=True)
class _Slot:
    """What belongs to one Infer between its input copy and its answer."""

    buffer: _Buffer | None = None
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None


@dataclass(slots=True)
class _Job:
    op: Op
    steps: _Steps
    begin_ns: int


class TorchDevice:
    """Runs ops of the models in `templates` on the CPU. Errors are reported through OpDone."""

    def __init__(self, templates: Mapping[str, Template], *, clock: Clock = now_ns) -> None:
        self._templates = templates
        self._clock = clock
        self._jobs: list[_Job] = []
        self._done: list[OpDone] = []
        self._weights: dict[int, tuple[Template, DeviceWeights]] = {}  # by model id
        self._frames: dict[int, Sequence[Frame]] = {}  # by action id
        self._slots: dict[int, _Slot] = {}
        self._outputs: dict[int, list[Frame]] = {}
        self._spare: dict[tuple[str, int], list[_Buffer]] = {}

    # ------------------------------------------------------------------------ the protocol

    @property
    def steady(self) -> bool:
        """False: what runs ends when it does."""
        return False

    @property
    def free_copies(self) -> bool:
        return False

    @property
    def arm_ahead_ns(self) -> int:
        return 0

    def withdraw(self, op_id: int) -> None:
        return None

    def launch(self, op: Op, *, now_ns: int) -> None:
        steps = {
            OpKind.LOAD_WEIGHTS: self._load_weights,
            OpKind.COPY_INPUT: self._copy_input,
            OpKind.EXEC: self._exec,
            OpKind.COPY_OUTPUT: self._copy_output,
        }[op.kind](op)
        job = _Job(op, steps, self._clock())
        if op.kind is not OpKind.EXEC or not self._advance(job):
            self._jobs.append(job)

    def poll(self, *, now_ns: int) -> list[OpDone]:
        self._jobs = [job for job in self._jobs if not self._advance(job)]
        done, self._done = self._done, []
        return done

    def next_event_ns(self) -> int | None:
        return 0 if self._jobs or self._done else None

    def _advance(self, job: _Job) -> bool:
        """One step of the job; True, and it is reported, if that was its last."""
        try:
            next(job.steps)
            return False
        except StopIteration as stop:
            self._done.append(stop.value)
        except (Exception, SystemExit) as error:  # a model may raise anything; the worker lives on
            end_ns = self._clock()
            self._done.append(
                OpDone(
                    job.op.op_id,
                    Span(job.begin_ns, end_ns, end_ns - job.begin_ns),
                    code=Code.RUNTIME_ERROR,
                    reason=f"{job.op.model_name}: {type(error).__name__}: {first_line(error)}",
                )
            )
        return True

    # ------------------------------------------------------------- what the backend calls

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._frames[action_id] = frames

    def drop_inputs(self, action_id: int) -> None:
        self._frames.pop(action_id, None)
        self._outputs.pop(action_id, None)
        slot = self._slots.pop(action_id, None)
        if slot is not None:
            self._give_back(slot)

    def take_outputs(self, action_id: int) -> Sequence[Frame]:
        return self._outputs.pop(action_id, ())

    def output_of(self, action_id: int) -> torch.Tensor:
        """The output (batch, ...) of an action whose exec has ended and whose output is not copied."""
        outputs = self._slots[action_id].outputs
        assert outputs is not None
        return outputs

    def evict(self, model_id: int) -> None:
        entry = self._weights.pop(model_id, None)
        if entry is not None:
            entry[0].forget(entry[1])

    def warm_up(self, name: str) -> Iterator[None]:
        """Run each batch class of a model once, with a look round after each; nothing of it stays."""
        template = self._templates[name]
        weights = DeviceWeights(template.host.clone())
        while not template.add_views(weights):
            yield
        for batch in template.batch_sizes:
            template.forward(weights, torch.from_numpy(template.sample_input(batch)))
            yield
        template.forget(weights)

    # ---------------------------------------------------------------------------- weights

    def _load_weights(self, op: Op) -> _Steps:
        template = self._templates[op.model_name]
        begin_ns = self._clock()
        block = torch.empty(template.weights_bytes, dtype=torch.uint8)
        for begin in range(0, template.weights_bytes, _PIECE_BYTES):
            piece = slice(begin, begin + _PIECE_BYTES)
            block[piece].copy_(template.host[piece])
            yield
        weights = DeviceWeights(block)
        while not template.add_views(weights):
            yield
        self._weights[op.model_id] = (template, weights)
        end_ns = self._clock()
        return OpDone(op.op_id, Span(begin_ns, end_ns, end_ns - begin_ns))

    # ----------------------------------------------------------------------------- inputs

    def _batch_class(self, template: Template, batch_size: int) -> int:
        for batch in template.batch_sizes:
            if batch >= batch_size:
                return batch
        return batch_size

    def _copy_input(self, op: Op) -> _Steps:
        template = self._templates[op.model_name]
        begin_ns = self._clock()
        buffer = self._take_buffer(
            template, op.model_name, self._batch_class(template, op.batch_size)
        )
        slot = self._slots[op.action_id] = _Slot(buffer)
        frames = iter(self._frames.pop(op.action_id, ()))
        for row, size in enumerate(op.input_sizes or (0,) * op.request_count):
            if size:
                target = buffer.rows[row].reshape(-1).view(np.uint8)
                target[:] = np.frombuffer(next(frames), np.uint8)
                yield
        slot.inputs = buffer.tensor
        end_ns = self._clock()
        return OpDone(op.op_id, Span(begin_ns, end_ns, end_ns - begin_ns))

    def _take_buffer(self, template: Template, name: str, batch: int) -> _Buffer:
        key = (name, batch)
        spare = self._spare.setdefault(key, [])
        if spare:
            return spare.pop()
        # Filled with made-up inputs once: what a request brings none for, and the padding, run on what
        # lies there. Zeros would be faster on some kernels, and denormals slower.
        tensor = torch.from_numpy(template.sample_input(batch))
        return _Buffer(key, tensor, tensor.numpy())

    def _give_back(self, slot: _Slot) -> None:
        if slot.buffer is not None:
            spare = self._spare.setdefault(slot.buffer.key, [])
            if len(spare) < _SPARE_BUFFERS:
                spare.append(slot.buffer)
            slot.buffer = None

    # ------------------------------------------------------------------------------- exec

    def _exec(self, op: Op) -> _Steps:
        template, weights = self._weights[op.model_id]
        slot = self._slots[op.action_id]
        assert slot.inputs is not None
        begin_ns = self._clock()
        slot.outputs = own(template.forward(weights, slot.inputs), weights)
        if template.own_state:
            template.restore(weights)
        end_ns = self._clock()
        slot.inputs = None
        self._give_back(slot)
        return OpDone(op.op_id, Span(begin_ns, end_ns, end_ns - begin_ns))
        yield  # a generator, like the others

    # ---------------------------------------------------------------------------- outputs

    def _copy_output(self, op: Op) -> _Steps:
        slot = self._slots.pop(op.action_id)
        begin_ns = self._clock()
        if not any(op.input_sizes):  # nobody asked for them
            return OpDone(op.op_id, Span(begin_ns, begin_ns, 0))
        assert slot.outputs is not None
        outputs = slot.outputs[: op.request_count]
        rows = outputs.contiguous().numpy()
        frames: list[Frame] = []
        sizes: list[int] = []
        for row, size in zip(rows, op.input_sizes, strict=True):
            sizes.append(row.nbytes if size else 0)
            if size:
                frames.append(row.tobytes())
        self._outputs[op.action_id] = frames
        end_ns = self._clock()
        span = Span(begin_ns, end_ns, end_ns - begin_ns)
        return OpDone(op.op_id, span, output_sizes=tuple(sizes))
        yield  # a generator, like the others


def own(output: torch.Tensor, weights: DeviceWeights) -> torch.Tensor:
    """`output` in memory of its own: a copy if it is a view of the weights, which the next run may change."""
    storage = output.untyped_storage().data_ptr()
    return output.clone() if storage == weights.block.untyped_storage().data_ptr() else output
