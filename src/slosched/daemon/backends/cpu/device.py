"""The CPU as a device, behind the core's `Device` protocol: real inference where there is no GPU.

Each model runs in a process of its own (processes.py); here its rows are written into shared memory and read
from it. An input copy is cut up: `poll` writes one request's row and looks round.

Who owns what: a slot belongs to its action from COPY_INPUT until its outputs were read; during the EXEC the
model's process reads and writes it. The model works on a copy of its inputs (templates.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.core.worker.interface import DeviceEvent, Op, OpDone, OpKind
from slosched.daemon.backends.base import Frame
from slosched.daemon.backends.cpu.processes import ModelProcess, Processes
from slosched.daemon.backends.cpu.slots import Slot
from slosched.messages import Span


@dataclass(slots=True)
class _Copy:
    """An input copy that goes on: `rows` are those still to write, with their frames and lengths."""

    op: Op
    begin_ns: int
    slot: Slot
    rows: Iterator[tuple[int, Frame, int]]


class CpuDevice:
    """Runs ops of the models that have a process. Errors are reported through OpDone."""

    #: What runs ends when it does.
    steady = False
    free_copies = False
    arm_ahead_ns = 0

    def __init__(self, processes: Processes, *, clock: Clock = now_ns) -> None:
        self._processes, self._clock = processes, clock
        self._copies: list[_Copy] = []
        self._done: list[OpDone] = []
        self._frames: dict[int, Sequence[Frame]] = {}  # by action id
        self._slots: dict[int, tuple[ModelProcess, Slot]] = {}
        self._outputs: dict[int, list[Frame]] = {}
        self._owners: dict[int, ModelProcess] = {}  # by model id, of loaded weights

    # ------------------------------------------------------------------------ the protocol

    def withdraw(self, op_id: int) -> None:
        return None

    def launch(self, op: Op, *, now_ns: int) -> None:
        begin_ns = self._clock()
        process = self._processes.by_name.get(op.model_name)
        if op.kind is OpKind.COPY_OUTPUT:
            self._read(op, begin_ns)
        elif process is None or not process.ready:
            reason = f"{op.model_name!r} has no process" if process is None else process.absent()
            weights = op.kind is OpKind.LOAD_WEIGHTS
            code = Code.MODEL_PROCESS_ENDED if weights else Code.EXEC_WEIGHTS_MISSING
            self._fail(op, begin_ns, code, reason)
        elif op.kind is OpKind.LOAD_WEIGHTS:
            self._owners[op.model_id] = process
            process.load(op, now_ns=begin_ns)
        elif op.kind is OpKind.COPY_INPUT:
            self._copy_input(op, process, begin_ns)
        else:
            self._exec(op, process, begin_ns)

    def poll(self, *, now_ns: int) -> list[DeviceEvent]:
        self._copies = [copy for copy in self._copies if not self._write_row(copy)]
        done: list[DeviceEvent] = [*self._done, *self._processes.step()]
        self._done = []
        return done

    def next_event_ns(self) -> int | None:
        return 0 if self._copies or self._done else self._processes.due_ns

    # ------------------------------------------------------------- what the backend calls

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._frames[action_id] = frames

    def drop_inputs(self, action_id: int) -> None:
        self._frames.pop(action_id, None)
        self._outputs.pop(action_id, None)
        self._free(action_id)

    def take_outputs(self, action_id: int) -> Sequence[Frame]:
        return self._outputs.pop(action_id, ())

    def evict(self, model_id: int) -> None:
        process = self._owners.pop(model_id, None)
        if process is not None:
            process.evict(model_id)

    # --------------------------------------------------------------------------------- ops

    def _copy_input(self, op: Op, process: ModelProcess, begin_ns: int) -> None:
        try:
            batch = process.batch_class(op.batch_size, op.length)
            slot = process.take_slot(batch, op.length)
        except (OSError, ValueError) as error:
            self._fail(op, begin_ns, Code.COPY_INPUT_HOST_ALLOC, f"no memory for a batch: {error}")
            return
        self._slots[op.action_id] = process, slot
        given = [row for row, size in enumerate(op.input_sizes) if size]
        lengths = [op.lengths[row] if op.lengths else 0 for row in given]
        rows = zip(given, self._frames.pop(op.action_id, ()), lengths, strict=False)
        self._copies.append(_Copy(op, begin_ns, slot, iter(rows)))

    def _write_row(self, copy: _Copy) -> bool:
        """Write one row of the copy. True if it is over, which is reported."""
        op = copy.op
        if op.action_id not in self._slots:  # it was given up
            self._fail(op, copy.begin_ns, Code.CANCELLED, "the action was given up")
            return True
        try:
            entry = next(copy.rows, None)
            if entry is None:
                self._succeed(op, copy.begin_ns)
                return True
            copy.slot.write(*entry)
            return False
        except ValueError as error:
            self._fail(op, copy.begin_ns, Code.COPY_INPUT_BAD_SIZES, str(error))
            return True

    def _exec(self, op: Op, process: ModelProcess, begin_ns: int) -> None:
        _, slot = self._slots[op.action_id]
        if slot.generation != process.generation:  # what it shared it with may yet write to it
            reason = f"the process of {op.model_name!r} ended after the inputs were copied"
            self._fail(op, begin_ns, Code.EXEC_WEIGHTS_MISSING, reason)
            return
        process.execute(op, slot, now_ns=begin_ns)

    def _read(self, op: Op, begin_ns: int) -> None:
        sizes: tuple[int, ...] = ()
        scores: tuple[float, ...] = ()
        if any(op.input_sizes):
            _, slot = self._slots[op.action_id]
            try:
                frames = {
                    row: slot.read(row, op.lengths[row] if op.lengths else 0)
                    for row, size in enumerate(op.input_sizes)
                    if size
                }
            except ValueError as error:
                self._free(op.action_id)
                self._fail(op, begin_ns, Code.RUNTIME_ERROR, f"{op.model_name}: {error}")
                return
            sizes = tuple(
                len(frames[row]) if row in frames else 0 for row in range(len(op.input_sizes))
            )
            if slot.scored:
                scores = slot.scores(op.input_sizes)
            self._outputs[op.action_id] = list(frames.values())
        self._free(op.action_id)
        end_ns = self._clock()
        span = Span(begin_ns, end_ns, end_ns - begin_ns)
        self._done.append(OpDone(op.op_id, span, output_sizes=sizes, scores=scores))

    def _free(self, action_id: int) -> None:
        entry = self._slots.pop(action_id, None)
        if entry is not None:
            entry[0].give_back(entry[1])

    def _succeed(self, op: Op, begin_ns: int) -> None:
        end_ns = self._clock()
        self._done.append(OpDone(op.op_id, Span(begin_ns, end_ns, end_ns - begin_ns)))

    def _fail(self, op: Op, begin_ns: int, code: int, reason: str) -> None:
        end_ns = self._clock()
        span = Span(begin_ns, end_ns, end_ns - begin_ns)
        self._done.append(OpDone(op.op_id, span, code=code, reason=reason))
