"""Copies beside inference: weights onto the device, inputs to it, outputs back.

Each copy is a generator that the loop advances once per turn and that yields wherever the loop should look at
the exec lane. The only work here that takes the host's time is moving an input from its message to pinned
memory: it is done in pieces of 256 KiB (11 us, H200), each begun only if the exec lane can spare the thread
for that long.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slosched.clock import Clock
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.base import Frame, first_line
from slosched.daemon.backends.cuda.driver import Block, DeviceFault, Driver, Event, Stream
from slosched.daemon.backends.cuda.exec_lane import Weights
from slosched.daemon.backends.cuda.pages import PageMap, Run
from slosched.daemon.backends.cuda.program import BufferSet, Program, Use, side_of
from slosched.daemon.backends.layout import PIECE_BYTES, Array
from slosched.messages import Span
from slosched.units import NS_PER_US

#: A piece is begun only if the exec lane can spare the thread for this long.
PIECE_NS = 40 * NS_PER_US

_Steps = Generator[None, None, OpDone]


@dataclass(slots=True)
class _Job:
    op: Op
    steps: _Steps
    begin_ns: int


@dataclass(slots=True, eq=False)
class _Held:
    """An instance's pages, and whether its weights have all arrived there."""

    runs: list[Run]
    program: Program
    load: int
    loaded: bool = False


class CopyLanes:
    """Copies for the models in `programs`, whose host images are in `images` (by name, one or more).

    `spare_ns()` returns for how long the exec lane can spare the thread.
    """

    def __init__(
        self,
        driver: Driver,
        programs: Mapping[str, Program],
        images: Mapping[str, Sequence[Block]],
        *,
        cache: Block,
        page_bytes: int,
        clock: Clock,
        spare_ns: Callable[[], int],
    ) -> None:
        self._driver, self._programs, self._images = driver, programs, images
        self._cache, self._page_bytes = cache, page_bytes
        self._clock, self._spare_ns = clock, spare_ns
        self.pages = PageMap(cache.nbytes // page_bytes)
        kinds = (OpKind.LOAD_WEIGHTS, OpKind.COPY_INPUT, OpKind.COPY_OUTPUT)
        self._streams: dict[OpKind, Stream] = {kind: driver.stream(0) for kind in kinds}
        self._jobs: list[_Job] = []
        self._held: dict[int, _Held] = {}  # by model id
        self._loads = 0
        self._frames: dict[int, Sequence[Frame]] = {}  # by action id
        self._buffers: dict[int, BufferSet] = {}
        self._outputs: dict[int, list[Frame]] = {}
        self._spare_events: list[Event] = []
        self.done: list[OpDone] = []

    @property
    def active(self) -> bool:
        return bool(self._jobs)

    # -------------------------------------------------------------------------------- verbs

    def begin(self, op: Op) -> None:
        steps = {
            OpKind.LOAD_WEIGHTS: self._load_weights,
            OpKind.COPY_INPUT: self._copy_input,
            OpKind.COPY_OUTPUT: self._copy_output,
        }[op.kind](op)
        job = _Job(op, steps, self._clock())
        if not self._advance(job):
            self._jobs.append(job)

    def turn(self) -> None:
        """One step of each copy. Raises DeviceFault."""
        for job in self._jobs[:]:
            if self._advance(job):
                self._jobs.remove(job)

    def fail_all(self, reason: str) -> None:
        now_ns = self._clock()
        jobs, self._jobs = self._jobs, []
        self.done.extend(
            OpDone(job.op.op_id, Span(job.begin_ns, now_ns, 0), Code.PROCESS_ENDED, reason)
            for job in jobs
        )

    def _advance(self, job: _Job) -> bool:
        """One step of the job; True, and it is reported, if that was its last."""
        try:
            next(job.steps)
            return False
        except StopIteration as stop:
            self.done.append(stop.value)
        except DeviceFault:
            if job not in self._jobs:
                self._jobs.append(job)  # `fail_all` reports it
            raise
        except Exception as error:
            now_ns = self._clock()
            reason = f"{job.op.model_name}: {type(error).__name__}: {first_line(error)}"
            span = Span(job.begin_ns, now_ns, 0)
            self.done.append(OpDone(job.op.op_id, span, Code.RUNTIME_ERROR, reason))
        return True

    # --------------------------------------------------------------------- what others ask

    def weights_of(self, model_id: int, active: int, *, stay: bool) -> Weights:
        """The copies that bring the instance's weights to `active`. Raises KeyError if they are not loaded."""
        held = self._held[model_id]
        if not held.loaded:
            raise KeyError(model_id)
        copies = self._pieces(held, active, from_cache=True)
        return Weights(model_id, held.load, copies, stay)

    def uses(self, program: Program) -> bool:
        sets = [buffers for each in program.classes for buffers in program.sets(each)]
        return any(each.use is not Use.FREE for each in sets)

    def buffers_of(self, action_id: int) -> BufferSet | None:
        return self._buffers.get(action_id)

    def evict(self, model_id: int) -> None:
        # A load that is still running continues: the next load into these pages runs after it.
        held = self._held.pop(model_id, None)
        if held is not None:
            self.pages.give(held.runs)

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._frames[action_id] = frames

    def drop(self, action_id: int) -> None:
        """The action has failed: give up its inputs, outputs and buffers."""
        self._frames.pop(action_id, None)
        self._outputs.pop(action_id, None)
        self._give_back(action_id)

    def take_outputs(self, action_id: int) -> Sequence[Frame]:
        return self._outputs.pop(action_id, ())

    def _give_back(self, action_id: int) -> None:
        buffers = self._buffers.pop(action_id, None)
        if buffers is not None:
            buffers.use = Use.FREE

    # ---------------------------------------------------------------------------- weights

    def _pieces(self, held: _Held, flat: int, *, from_cache: bool) -> list[tuple[int, int, int]]:
        """Between the instance's pages and the flat weights at `flat`: (to, from, bytes) of each run."""
        pieces = []
        done_bytes, left_bytes = 0, held.program.weights_bytes
        for run in held.runs:
            nbytes = min(run.count * self._page_bytes, left_bytes)
            paged = self._cache.address + run.first * self._page_bytes
            at_device = flat + done_bytes
            pieces.append((at_device, paged, nbytes) if from_cache else (paged, at_device, nbytes))
            done_bytes, left_bytes = done_bytes + nbytes, left_bytes - nbytes
        return pieces

    def _load_weights(self, op: Op) -> _Steps:
        program, images = self._programs[op.model_name], self._images[op.model_name]
        image = images[op.model_id % len(images)]
        self.evict(op.model_id)
        pages = max(1, -(-program.weights_bytes // self._page_bytes))
        self._loads += 1
        held = _Held(self.pages.take(pages), program, self._loads)
        self._held[op.model_id] = held
        stream = self._streams[op.kind]
        begin_ns = self._clock()
        started, ended = self._event(), self._event()
        self._driver.record(started, stream)
        for to, source, nbytes in self._pieces(held, image.address, from_cache=False):
            self._driver.copy(to, source, nbytes, stream)
        self._driver.record(ended, stream)
        while not self._driver.done(ended):
            yield
        held.loaded = True
        return OpDone(op.op_id, Span(begin_ns, self._clock(), self._took_ns(started, ended)))

    # ----------------------------------------------------------------------------- inputs

    def _copy_input(self, op: Op) -> _Steps:
        begin_ns = self._clock()
        prepared = self._programs[op.model_name]
        of = prepared.class_of(op.batch_size, op.length)
        sets = side_of(prepared, op.priority, of).sets(of)
        while (buffers := _free(sets)) is None:
            yield
        buffers.use = Use.INPUTS
        self._buffers[op.action_id] = buffers
        stream = self._streams[op.kind]
        started, ended = self._event(), self._event()
        frames = iter(self._frames.pop(op.action_id, ()))
        staged = buffers.staged_in
        assert staged.host is not None
        self._driver.record(started, stream)
        for row, size in enumerate(op.input_sizes):
            if not size:  # it runs on what lies there, as the padding does
                continue
            frame = next(frames)
            at = row * buffers.row_in
            if buffers.takes.plain:
                source = np.frombuffer(frame, np.uint8)
                for begin in range(0, size, PIECE_BYTES):
                    while self._spare_ns() < PIECE_NS:
                        yield
                    end = min(begin + PIECE_BYTES, size)
                    staged.host[at + begin : at + end] = source[begin:end]
            else:
                to = staged.host[at : at + buffers.row_in]
                length = op.lengths[row] if op.lengths else 0
                try:
                    yield from self._copied(buffers.takes.copies(to, frame, length))
                except ValueError as error:
                    now_ns, reason = self._clock(), f"{op.model_name}: {error}"
                    span = Span(begin_ns, now_ns, 0)
                    return OpDone(op.op_id, span, Code.COPY_INPUT_BAD_SIZES, reason)
            self._driver.copy(buffers.input + at, staged.address + at, buffers.row_in, stream)
            yield
        self._driver.record(ended, stream)
        while not self._driver.done(ended):
            yield
        return OpDone(op.op_id, Span(begin_ns, self._clock(), self._took_ns(started, ended)))

    def _copied(self, pieces: Iterator[tuple[Array, Array]]) -> Generator[None, None, None]:
        """Copy on the host, piece by piece, each begun only if the exec lane can spare the thread."""
        for to, source in pieces:
            while self._spare_ns() < PIECE_NS:
                yield
            to[...] = source

    # ---------------------------------------------------------------------------- outputs

    def _copy_output(self, op: Op) -> _Steps:
        begin_ns = self._clock()
        buffers = self._buffers.get(op.action_id)
        if buffers is None or not any(op.input_sizes):
            self._give_back(op.action_id)
            return OpDone(op.op_id, Span(begin_ns, begin_ns, 0))
        stream = self._streams[op.kind]
        started, ended = self._event(), self._event()
        staged, row_out = buffers.staged_out, buffers.row_out
        assert staged.host is not None
        self._driver.record(started, stream)
        self._driver.copy(staged.address, buffers.output, row_out * op.request_count, stream)
        self._driver.record(ended, stream)
        while not self._driver.done(ended):
            yield
        frames: list[Frame] = []
        for row, size in enumerate(op.input_sizes):
            if not size:
                continue
            answer = staged.host[row * row_out : (row + 1) * row_out]
            if buffers.gives.plain:
                frames.append(answer.tobytes())
            else:
                frame, pieces = buffers.gives.answer(answer, op.lengths[row] if op.lengths else 0)
                yield from self._copied(pieces)
                frames.append(frame)
                yield
        gives = buffers.gives
        scores = gives.scores(staged.host, op.input_sizes) if gives.scored else ()
        self._outputs[op.action_id] = frames
        self._give_back(op.action_id)
        span = Span(begin_ns, self._clock(), self._took_ns(started, ended))
        own = iter(frames)
        sizes = tuple(len(next(own)) if size else 0 for size in op.input_sizes)
        return OpDone(op.op_id, span, output_sizes=sizes, scores=scores)

    # ------------------------------------------------------------------------------ events

    def _event(self) -> Event:
        return self._spare_events.pop() if self._spare_events else self._driver.event()

    def _took_ns(self, started: Event, ended: Event) -> int:
        duration_ns = self._driver.elapsed_ns(started, ended)
        self._spare_events += (started, ended)
        return duration_ns


def _free(sets: Sequence[BufferSet]) -> BufferSet | None:
    return next((buffers for buffers in sets if buffers.use is Use.FREE), None)
