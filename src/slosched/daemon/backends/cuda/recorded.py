"""What torch's and CuPy's programs share: the memory of each class, and what a run does with it.

Who owns what, and until when. Memory that must outlive a run never lies where another run may write:

    a set's `input`, `staged_in`    the action whose inputs are copied there, from COPY_INPUT until its exec
                                    has ended; a run reads `input` and writes neither
    a set's `output`, `staged_out`  the same action, from the start of its exec until its rows were copied to
                                    the host; only the last nodes of the set's own run write `output`
    `active` (weights)              the run under way. Each run begins with a copy of its instance's weights,
                                    so what a model writes there is gone at the next. The one exception
                                    (`Program.keeps_weights`) was compared byte by byte after its first runs
    pages of the cache              the instance that was loaded into them, until it is evicted; runs read them
    a set's state                   of a program in steps (steps.py): the run of the set, until its last part.
                                    Within a part that is in pieces it has the graph pool as well
    the graph pool, caching pools   the run under way: everything that a model allocates, its result included.
                                    All graphs of a process share one pool, and the next one writes over it
    pinned images                   the model's name; loads read them

A run in segments (segments.py) is under way until its last segment has ended, also while it is interrupted.
What interrupts it writes none of the above but its own: an urgent run is one of the program's twin
(`urgent`), which has active weights, buffer sets and a stream of its own, and shares a graph pool with other
urgent runs alone. Those are never interrupted. A preparation's runs wait until no run in segments is open
(`Gate`).

All ordinary runs of a process go to one stream, the exec lane's, so one is under way at a time. What prepares a
model eagerly beside them has a stream of its own, and with it its own workspaces of cuBLAS and its own part
of torch's caching allocator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy.typing as npt

from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.contract import ModelRefused
from slosched.daemon.backends.cuda.driver import (
    Block,
    DeviceFault,
    Driver,
    Event,
    OutOfDeviceMemory,
    Stream,
)
from slosched.daemon.backends.cuda.program import BufferSet, Class, Copies, Cut
from slosched.daemon.backends.cuda.runs import GraphRun, PlainRun, Run
from slosched.daemon.backends.cuda.segments import SegmentedRun
from slosched.daemon.backends.cuda.steps import Parts, Pieces, SteppedRun, launch_all
from slosched.daemon.backends.layout import Layout, Layouts
from slosched.signature import Tensor

#: Buffer sets of a class: one batch's inputs arrive, and another's outputs leave, while a third runs.
SETS = 2
WARM_UPS = 3
#: Steps after which a run in preparation's checks may end. One step is the graph of all of them, so what is
#: wrong with it shows after a few; fifty of them would be run hundreds of times, for minutes.
CHECKED_STEPS = 3

Array = npt.NDArray[Any]
#: Inputs or outputs of a batch by name, (batch, *shape) each, on the host.
Arrays = Mapping[str, Array]


class RecordedProgram(ABC):
    """One architecture that runs from `active`, `weights_bytes` long. `add_class` makes a class.

    It takes tensors as `takes`, padded with `pads`; `answers_with` says what it gives, before a class is added.
    `place` is device memory that graphs are captured to copy weights from; a launch says from where.
    `capture` is the stream that captures are made on, of the exec lane's priority, since a graph's nodes
    keep the priority of that stream whatever they are replayed on. Nothing else runs on it.
    """

    #: "float32", "float16" or "bfloat16": what the model computes in, for comparisons.
    precision = "float32"
    #: The number of equal steps of a run; 0: it is not one of steps.
    steps = 0

    def __init__(
        self,
        name: str,
        driver: Driver,
        capture: Stream,
        place: Block,
        weights_bytes: int,
        *,
        takes: Sequence[Tensor],
        pads: Mapping[str, float] | None = None,
    ) -> None:
        self.name, self.weights_bytes = name, weights_bytes
        self._takes, self._pads = takes, pads or {}
        self._layouts = Layouts(takes, (), self._pads)
        self._driver, self._capture_stream, self._place = driver, capture, place
        self._filling = driver.stream(0)
        self.active = 0
        self.keeps_weights = False
        #: Names of weights and buffers that a forward was seen to change, and what is not offered, and why.
        self.changed: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._sets: dict[Class, tuple[BufferSet, ...]] = {}
        self._batches: dict[int, tuple[int, ...]] = {}  # ascending, by length
        self._runs: dict[int, Run] = {}  # by id of the buffer set
        self._graphs: dict[Class, bool] = {}
        self._cuts: dict[Class, Cut] = {}
        self._segments: dict[int, SegmentedRun | SteppedRun] = {}  # by id of the buffer set
        self._states: dict[int, Sequence[Any]] = {}  # by id of the buffer set
        #: What it has for interruptions, and what that cost, in words.
        self.preemption = ""
        self.urgent: RecordedProgram | None = None
        self._class_blocks: dict[Class, list[Block]] = {}  # of the driver's memory, by class
        #: The number of steps of each run now; 0: all.
        self.few_steps = 0
        self.gives: tuple[Tensor, ...] = ()
        self.scored = False
        self._kept: list[Any] = []  # what graphs need for as long as they live
        #: Why a class is run by plain execution, in words; empty if every class was captured.
        self.not_captured = ""

    # ------------------------------------------------------------------------- the protocol

    @property
    def classes(self) -> tuple[Class, ...]:
        return tuple(sorted(self._sets))

    def class_of(self, batch_size: int, length: int) -> Class:
        batches = self._batches.get(length)
        if not batches:
            raise ValueError(f"{self.name} has no length class {length}")
        return Class(next((each for each in batches if each >= batch_size), batches[-1]), length)

    def sets(self, of: Class) -> tuple[BufferSet, ...]:
        return self._sets[of]

    def captured(self, of: Class) -> bool:
        return self._graphs[of]

    def aim(self, buffers: BufferSet, copies: Copies) -> None:
        self._runs[id(buffers)].aim(copies)

    def launch(self, buffers: BufferSet, stream: Stream) -> None:
        run = self._runs[id(buffers)]
        if isinstance(run, SteppedRun):
            run.launch(stream, steps=self.few_steps)
        else:
            run.launch(stream)

    def cut_of(self, of: Class) -> Cut | None:
        return self._cuts.get(of)

    def launch_segment(self, buffers: BufferSet, stream: Stream, index: int = 0) -> None:
        self._segments[id(buffers)].launches[index](stream)

    # ------------------------------------------------------------------- what a library does

    @abstractmethod
    def sample_rows(self, batch: int, seed: int, length: int = 0) -> Arrays:
        """Made-up inputs (batch, *shape) by name; the same for the same seed."""

    @abstractmethod
    def run_rows(self, rows: Arrays) -> Arrays:
        """A plain forward of `rows` with the active weights, beside whatever runs: outputs (batch, *shape).

        Waits for its end. Raises what the model raises, and ModelRefused.
        """

    @abstractmethod
    def changed_weights(self, source: Block) -> tuple[str, ...]:
        """Which tensors of the active weights differ from those at `source`, by name."""

    @abstractmethod
    def restore_weights(self, source: Block) -> None:
        """Make the active weights those at `source`, before the next `run_rows`."""

    @abstractmethod
    def _view(
        self, address: int, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...]
    ) -> Any:
        """The library's array of memory that is not its own; `strides` in bytes."""

    @abstractmethod
    def _forward(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run the model with the active weights on the library's current stream.

        It never writes `inputs`. The results are contiguous, (batch, *shape), in the order of what the model
        gives, and belong to the pool. Raises ModelRefused if one is missing.
        """

    def _begin(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The state of a program in steps before the first one. The results belong to the pool, as below."""
        raise NotImplementedError(f"{self.name}: it has no steps")

    def _step(self, state: Sequence[Any]) -> Sequence[Any]:
        """The state after one step, in the pool."""
        raise NotImplementedError(f"{self.name}: it has no steps")

    def _finish(self, state: Sequence[Any]) -> Sequence[Any]:
        """The outputs of a run with this state, as `_forward` gives them."""
        raise NotImplementedError(f"{self.name}: it has no steps")

    def _new_state(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """Arrays of their own, outside of the pool, like those that `_begin` gives for `inputs`."""
        raise NotImplementedError(f"{self.name}: it has no steps")

    @abstractmethod
    def _address(self, result: Any) -> int: ...

    def _store(self, result: Any, view: Any) -> None:
        """Copy a result into a view of a set's output, on the library's current stream."""
        raise NotImplementedError(f"{self.name}: one output alone")

    @abstractmethod
    def _warm_up(self, inputs: Sequence[Any]) -> Sequence[Array]:
        """Run `_forward` a few times on the stream of preparation; returns copies of the last results."""

    def disturb(self, stream: Stream) -> None:  # noqa: B027 - a library without shared memory has nothing to do
        """Do to memory that runs share what other programs' runs may do to it (for the self-check)."""

    def disturb_beside(self, stream: Stream) -> None:  # noqa: B027 - as above
        """The same, but for the graph pool: what others may do while a run in segments is interrupted."""

    @contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        """Within it the library's current stream is `stream`: the exec lane's, or the captures'."""
        yield

    def _begin_capture(self) -> Any:
        self._driver.begin_capture(self._capture_stream)
        return None

    def _end_capture(self, token: Any) -> Any:
        """What was captured, for `Driver.graph`."""
        return self._driver.end_capture(self._capture_stream)

    def _abandon(self, token: Any) -> None:
        """End a capture that failed, so that stream and memory pool can be used again."""
        self._driver.end_capture(self._capture_stream)

    # ------------------------------------------------------------------------ preparation

    def answers_with(self, gives: Sequence[Tensor], *, scored: bool = False) -> None:
        """The outputs are known from now on; the last one is a judge's score if they are `scored`."""
        self.gives, self.scored = tuple(gives), scored
        self._layouts = Layouts(self._takes, gives, self._pads, scored=scored)

    @contextmanager
    def in_few_steps(self) -> Iterator[None]:
        """Within it a run ends after CHECKED_STEPS of its steps, plain ones too. Only while it is prepared."""
        before = self.few_steps
        self.few_steps = min(self.steps, CHECKED_STEPS)
        try:
            yield
        finally:
            self.few_steps = before

    def add_class(self, of: Class, *, capture: bool = True) -> None:
        """Make a class runnable. Raises what the model raises, ModelRefused or OutOfDeviceMemory.

        What cannot be captured is run by plain execution, and `not_captured` says why.
        """
        try:
            self._add_class(of, capture=capture)
        except BaseException:
            self._free_class(of)
            raise

    def _add_class(self, of: Class, *, capture: bool) -> None:
        takes, _ = self._layouts.at(of.length)
        rows = takes.pack(self.sample_rows(of.batch, 0, of.length))
        sets = [self._set_for(of, rows) for _ in range(SETS)]
        with self.in_few_steps():
            self._check_results(of, self._warm_up(self._inputs(sets[0])))
        runs: list[Run] = []
        if capture and not self.not_captured:
            try:
                capture_set = self._captured_steps if self.steps else self._captured
                runs = [capture_set(each) for each in sets]
            except OutOfDeviceMemory:
                raise
            except Exception as error:  # each library has its own kinds, and NotImplementedError
                self.not_captured = f"{of}: {first_line(error)}"
        self._graphs[of] = bool(runs)
        for buffers, run in zip(sets, runs or [self._plain(each) for each in sets], strict=True):
            buffers.started, buffers.ended = run.started, run.ended
            self._runs[id(buffers)] = run
        self._sets[of] = tuple(sets)
        self._index_classes()

    def _index_classes(self) -> None:
        lengths = {each.length for each in self._sets}
        self._batches = {
            length: tuple(sorted(each.batch for each in self._sets if each.length == length))
            for length in lengths
        }

    def _check_results(self, of: Class, results: Sequence[Array]) -> None:
        """Raises ModelRefused unless a class answers as the model did when it was checked."""
        for tensor, result in zip(self.gives, results, strict=True):
            expected = (of.batch, *tensor.shape_at(of.length))
            if (result.shape, str(result.dtype)) != (expected, tensor.dtype):
                raise ModelRefused(
                    f"model {self.name!r} answers {of} with {tensor.name} of {list(result.shape)} in "
                    f"{result.dtype}, and not of {list(expected)} in {tensor.dtype}, as in other batches"
                )

    def _set_for(self, of: Class, rows: Array) -> BufferSet:
        """A set whose inputs are `rows`, (batch, row_in) bytes."""
        takes, gives = self._layouts.at(of.length)
        staged = self._pinned(of, rows.nbytes)
        assert staged.host is not None
        staged.host[: rows.nbytes] = rows.reshape(-1)
        block = self._block(of, rows.nbytes)
        output = self._block(of, gives.row_bytes * of.batch)
        ended = self._driver.event()
        self._driver.copy(block.address, staged.address, rows.nbytes, self._filling)
        self._driver.record(ended, self._filling)
        while not self._driver.done(ended):
            pass
        return BufferSet(
            batch=of.batch,
            takes=takes,
            gives=gives,
            input=block.address,
            output=output.address,
            row_in=takes.row_bytes,
            row_out=gives.row_bytes,
            staged_in=staged,
            staged_out=self._pinned(of, gives.row_bytes * of.batch),
            started=ended,
            ended=ended,
        )

    def _inputs(self, buffers: BufferSet) -> list[Any]:
        return self._views(buffers.takes, buffers.input, buffers.batch)

    def _views(self, layout: Layout, address: int, batch: int) -> list[Any]:
        """Each tensor (batch, *shape) of the block at `address`."""
        return [
            self._view(address + at, (batch, *shape), dtype, layout.strides(tensor))
            for tensor, at, shape, dtype in layout.parts()
        ]

    def _steps(self, buffers: BufferSet, stream: Stream) -> None:
        """The model's part of a run, captured or not: from the set's input to its output."""
        self._store_all(self._forward(self._inputs(buffers)), buffers, stream)

    def _store_all(self, results: Sequence[Any], buffers: BufferSet, stream: Stream) -> None:
        if len(results) == 1:
            nbytes = buffers.row_out * buffers.batch
            self._driver.copy(buffers.output, self._address(results[0]), nbytes, stream)
            return
        views = self._views(buffers.gives, buffers.output, buffers.batch)
        for result, view in zip(results, views, strict=True):
            self._store(result, view)

    def _captured(self, buffers: BufferSet) -> GraphRun:
        started, ended = self._driver.event(), self._driver.event()

        def whole(stream: Stream) -> None:
            self._begin_run(started, stream)
            self._steps(buffers, stream)
            self._driver.record_inside(ended, stream)

        return self._run_of(self._recorded(whole), started, ended)

    def _captured_steps(self, buffers: BufferSet) -> SteppedRun:
        """Each part of a run by itself; see steps.py."""
        driver, inputs = self._driver, self._inputs(buffers)
        state = self._states[id(buffers)] = self._new_state(inputs)
        started, ended = driver.event(), driver.event()

        def keep(made: Sequence[Any]) -> None:
            for there, value in zip(state, made, strict=True):
                if value is not there:  # a part that gives back what it was given leaves it
                    self._store(value, there)

        def begin(stream: Stream) -> None:
            self._begin_run(started, stream)
            keep(self._begin(inputs))

        def step(stream: Stream) -> None:
            keep(self._step(state))

        def finish(stream: Stream) -> None:
            self._store_all(self._finish(state), buffers, stream)
            driver.record_inside(ended, stream)

        first, middle, last = (self._recorded(part) for part in (begin, step, finish))
        run = self._run_of(first, started, ended)
        later = [Pieces([driver.part(each)]) for each in (middle, last)]
        return SteppedRun(run, later[0], later[1], self.steps, Parts(first, middle, last))

    def _begin_run(self, started: Event, stream: Stream) -> None:
        """What every run begins with: the event, and the copy of the weights."""
        self._driver.record_inside(started, stream)
        nbytes = min(self.weights_bytes, self._place.nbytes)
        self._driver.copy(self.active, self._place.address, nbytes, stream)

    def _recorded(self, launch: Callable[[Stream], None]) -> Any:
        """What was captured of `launch`; raises what it raises."""
        with self._on_stream(self._capture_stream):
            token = self._begin_capture()
            try:
                launch(self._capture_stream)
            except BaseException:
                self._abandon(token)
                raise
            captured = self._end_capture(token)
        self._kept += [captured, token]
        return captured

    def _run_of(self, captured: Any, started: Event, ended: Event) -> GraphRun:
        driver, active = self._driver, self.active
        graph = driver.graph(captured, active)
        return GraphRun(driver, graph, captured, active, self.weights_bytes, started, ended)

    def _plain(self, buffers: BufferSet) -> PlainRun:
        def run(stream: Stream) -> None:
            with self._on_stream(stream):
                self._steps(buffers, stream)

        return PlainRun(self._driver, run)

    def whole_runs(self, of: Class) -> list[GraphRun]:
        """The captured run of each buffer set of a class that is not cut; empty if it was not captured."""
        runs = [self._runs[id(buffers)] for buffers in self._sets[of]]
        return [run for run in runs if isinstance(run, GraphRun)]

    def stepped_runs(self, of: Class) -> list[SteppedRun]:
        """The captured run of each buffer set of a program in steps; empty if it was not captured."""
        runs = [self._runs[id(buffers)] for buffers in self._sets[of]]
        return [run for run in runs if isinstance(run, SteppedRun)]

    def run_in_steps(self, of: Class, cut: Cut, runs: Sequence[SteppedRun] = ()) -> None:
        """From now on each run of a class in steps can be interrupted where `cut` says.

        `runs` are the same runs in pieces, by buffer set; the parts that are whole in others are given up.
        """
        wholes = self.stepped_runs(of)
        for buffers, whole, run in zip(self._sets[of], wholes, runs or wholes, strict=True):
            run.cut(cut.bounds)
            self._runs[id(buffers)] = self._segments[id(buffers)] = run
            whole.close(but=run)
        self._cuts[of] = cut

    def run_in_segments(self, of: Class, cut: Cut, runs: Sequence[SegmentedRun]) -> None:
        """From now on each buffer set of a class runs by one of `runs`; the whole graphs are given up."""
        for buffers, run in zip(self._sets[of], runs, strict=True):
            self._runs[id(buffers)].close()
            self._runs[id(buffers)] = self._segments[id(buffers)] = run
        self._cuts[of] = cut

    def join_segments(self, of: Class, every: int) -> None:
        """From now on a cut class is interrupted at each `every`-th of its boundaries alone."""
        cut = self._cuts[of]
        begins = range(0, len(cut.segment_ns), every)
        for buffers in self._sets[of]:
            run = self._segments[id(buffers)]
            parts = [run.launches[begin : begin + every] for begin in begins]
            run.launches = [partial(launch_all, part) for part in parts]
        bounds = tuple(cut.bounds[begin - 1] for begin in begins[1:])
        times = tuple(sum(cut.segment_ns[begin : begin + every]) for begin in begins)
        self._cuts[of] = replace(cut, bounds=bounds, segment_ns=times)

    def drop_class(self, of: Class) -> None:
        """The class is not offered after all; nothing of it runs."""
        for buffers in self._sets.pop(of):
            self._runs.pop(id(buffers)).close()
            self._segments.pop(id(buffers), None)
            self._states.pop(id(buffers), None)
        self._index_classes()
        self._cuts.pop(of, None)
        del self._graphs[of]
        self._free_class(of)

    def release(self) -> None:
        """See Preparable."""
        if self.urgent is not None:
            self.urgent.release()
        for each in self.classes:
            self.drop_class(each)
        self._kept.clear()

    # ------------------------------------------------------------------------------- memory

    def _block(self, of: Class, nbytes: int) -> Block:
        block = self._driver.device_block(max(1, nbytes))
        self._class_blocks.setdefault(of, []).append(block)
        return block

    def _pinned(self, of: Class, nbytes: int) -> Block:
        block = self._driver.pinned_block(max(1, nbytes))
        self._class_blocks.setdefault(of, []).append(block)
        return block

    def _free_class(self, of: Class) -> None:
        blocks = self._class_blocks.pop(of, [])
        try:
            for block in blocks:
                self._driver.free(block)
        except DeviceFault:
            pass  # the context is gone, and its memory with it
