"""Making a model ready on a GPU: build, copy, capture, measure. Runs in the background thread.

What is measured is what will be predicted: the same copies and the same launch on the same stream as the
exec lane's, between two events. A measurement asks for an idle device, so that under light load neither
disturbs the other; what is served meanwhile goes on.

Right before fast: rows must follow their inputs (contract.py), and each class and buffer set must answer as
plain execution does, also when other programs run between its run and the copy of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from slosched.clock import Clock, now_ns
from slosched.config import ModelProfile
from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.checking import Checked, check_model, profile_of
from slosched.daemon.backends.contract import Arrays, ModelRefused, differing
from slosched.daemon.backends.cuda.background import Yielding
from slosched.daemon.backends.cuda.choice import Wish
from slosched.daemon.backends.cuda.driver import (
    Block,
    DeviceFault,
    Driver,
    Event,
    OutOfDeviceMemory,
    Stream,
)
from slosched.daemon.backends.cuda.program import BufferSet, Class, Copies, Program
from slosched.daemon.backends.cuda.segments import Gate
from slosched.daemon.backends.cuda.steps import SteppedRun
from slosched.daemon.backends.cuda.timing import Stopwatch
from slosched.daemon.backends.sources import explain_forward_error
from slosched.errors import InvalidConfig, SloschedError
from slosched.signature import Tensor
from slosched.units import NS_PER_MS

_LOADS = 5
_WARM_UPS = 3
_RUNS = 15
#: No batch class is measured longer than this, once it ran twice.
_CLASS_AT_MOST_NS = 1_500 * NS_PER_MS
#: What a first run is taken to need of an idle device.
_GUESS_NS = 5 * NS_PER_MS
#: Other classes that run between a run and the look at its answer, at most: as many as there are batch sizes.
#: A program in steps takes seconds, and its state is memory of its own, so fewer do.
_OTHERS, _OTHERS_IN_STEPS = 6, 2
#: More than the caches of any GPU (an H200 has 60 MB).
_COLD_BYTES = 128 * 1024 * 1024
_PIECE_BYTES = 4 * 1024 * 1024


_NO_WISH = Wish()


class Preparable(Program, Protocol):
    """A program whose classes can be added; recorded.py says what its methods do."""

    keeps_weights: bool
    precision: str
    changed: tuple[str, ...]
    left_out: tuple[str, ...]
    preemption: str
    gives: tuple[Tensor, ...]
    scored: bool
    not_captured: str

    @property
    def steps(self) -> int: ...

    def stepped_runs(self, of: Class) -> list[SteppedRun]: ...

    def in_few_steps(self) -> AbstractContextManager[None]: ...

    def answers_with(self, gives: Sequence[Tensor], *, scored: bool = False) -> None: ...

    def add_class(self, of: Class, *, capture: bool = True) -> None: ...

    def drop_class(self, of: Class) -> None: ...

    def sample_rows(self, batch: int, seed: int, length: int = 0) -> Arrays: ...

    def run_rows(self, rows: Arrays) -> Arrays: ...

    def changed_weights(self, source: Block) -> tuple[str, ...]: ...

    def restore_weights(self, source: Block) -> None: ...

    def disturb(self, stream: Stream) -> None: ...

    def release(self) -> None:
        """Give back graphs and buffers; nothing of it runs, or will."""


@dataclass(frozen=True)
class Source:
    """One model as it was built: its program, its weights, and what is said of it."""

    program: Preparable
    weights: npt.NDArray[np.uint8]
    model: Checked
    random_weights: bool
    labels: tuple[str, ...]
    #: Makes the program that interrupts others in its place, and what the worker's file says of interruptions.
    twin: Callable[[], Preparable] | None = None
    wish: Wish = _NO_WISH

    @property
    def name(self) -> str:
        return self.program.name


class Preempting(Protocol):
    """What adds what a model needs for interruptions: preemption.py."""

    def add(
        self,
        source: Source,
        exec_ns: Mapping[Class, int],
        scratch: Sequence[Block],
        note: Callable[[str], None],
    ) -> None: ...


class HostImages:
    """Pinned copies of models' weights, at most `limit_bytes` of them (0: as many as the host has).

    A model has up to `per_model` images, which its instances share: one is enough to serve, several make
    loads come from different memory, as those of different models would.
    """

    def __init__(self, driver: Driver, *, limit_bytes: int = 0, per_model: int = 1) -> None:
        self._driver, self._limit_bytes, self._per_model = driver, limit_bytes, per_model
        self.images: dict[str, list[Block]] = {}
        self.used_bytes = 0

    def provide(self, name: str, weights: npt.NDArray[np.uint8] | None, copies: int) -> None:
        """Have as many images of `name` as `copies` instances should share.

        `weights` may be left out if there is one already. Raises OutOfDeviceMemory if not even one fits.
        """
        images = self.images.setdefault(name, [])
        if weights is None:
            weights = images[0].host
        assert weights is not None
        while len(images) < min(self._per_model, copies):
            full = self._limit_bytes and self.used_bytes + len(weights) > self._limit_bytes
            if full and images:
                return
            if full:
                raise OutOfDeviceMemory(
                    f"{name}: {len(weights)} bytes of weights do not fit into what is left of the host "
                    f"cache, {self._limit_bytes - self.used_bytes} bytes; raise --host-cache"
                )
            block = self._driver.pinned_block(len(weights))
            assert block.host is not None
            for begin in range(0, len(weights), _PIECE_BYTES):
                block.host[begin : begin + _PIECE_BYTES] = weights[begin : begin + _PIECE_BYTES]
            self.used_bytes += len(weights)
            images.append(block)

    def forget(self, name: str) -> None:
        for block in self.images.pop(name, []):
            self.used_bytes -= block.nbytes
            self._driver.free(block)


class Bench:
    """Measures programs on the exec stream. With `preemption`, launches pass the `gate`."""

    def __init__(
        self,
        driver: Driver,
        background: Yielding,
        exec_stream: Stream,
        *,
        clock: Clock = now_ns,
        preemption: Preempting | None = None,
        gate: Gate | None = None,
    ) -> None:
        self._driver, self._background, self._clock = driver, background, clock
        self._preemption, self._gate = preemption, gate
        self._stream = exec_stream
        self._watch = Stopwatch(driver, background, exec_stream, gate)
        self._started, self._ended = driver.event(), driver.event()
        self._load_stream = driver.stream(0)

    def profile(
        self,
        source: Source,
        image: Block,
        batches: Sequence[int],
        *,
        max_exec_ns: int,
        note: Callable[[str], None],
    ) -> ModelProfile:
        """Add classes of `batches`, ascending, for each length, and measure each; weights lie in `image`.

        The classes of a length end at the first, other than batch 1, that takes longer than `max_exec_ns` or
        does not run or fit. `note` gets a line for each. Raises InvalidConfig if batch 1 fails.
        """
        program = source.program
        # As many copies of the weights as do not fit into the GPU's cache together: those that are served
        # come from memory too, and a source that is still in the cache is faster by 3 % of a batch of 1.
        count = max(1, min(8, -(-_COLD_BYTES // program.weights_bytes)))
        scratch = [self._driver.device_block(program.weights_bytes) for _ in range(count)]
        try:
            for block in scratch:
                weights_ns = self._load(image, block)
            self._check_model(source, scratch[0])
            self._add_classes(source, batches, scratch, max_exec_ns=max_exec_ns, note=note)
            self.check_answers(program, scratch, note)
            if self._preemption is not None:
                spent = {each: self._exec(program, each, scratch) for each in program.classes}
                self._preemption.add(source, spent, scratch, note)
            exec_ns: dict[int, dict[int, int]] = {}
            step_ns: dict[int, int] = {}
            # Once more, now that everything is there: captured alone, ResNet-50 ran its batch of 1 in
            # 0.78 ms, and in 0.88 once the larger classes had been captured too (H200).
            for each in sorted(program.classes, key=lambda each: (each.length, each.batch)):
                spent_ns, of_a_step_ns = self._times(program, each, scratch)
                exec_ns.setdefault(each.length, {})[each.batch] = spent_ns
                how = "CUDA graph" if program.captured(each) else "plain execution"
                if of_a_step_ns:
                    step_ns[each.batch] = of_a_step_ns
                    how = f"{program.steps} steps of {of_a_step_ns / NS_PER_MS:.3f} ms, {how}s"
                note(f"{program.name} {each}: {spent_ns / NS_PER_MS:.3f} ms, {how}")
        finally:
            for block in scratch:
                self._driver.free(block)
        return profile_of(
            source.model,
            program.gives,
            exec_ns,
            weights_ns,
            program.weights_bytes,
            steps=program.steps,
            step_ns=step_ns if len(exec_ns) == 1 and 0 in exec_ns else None,
        )

    def _add_classes(
        self,
        source: Source,
        batches: Sequence[int],
        scratch: Sequence[Block],
        *,
        max_exec_ns: int,
        note: Callable[[str], None],
    ) -> None:
        """Make the classes that run; see `profile`. Batch 1 of each length is the first, to have room."""
        program = source.program
        ended: set[int] = set()  # lengths
        for batch in sorted({1, *batches}):
            for length in source.model.lengths or (0,):
                if length in ended:
                    continue
                of = Class(batch, length)
                try:
                    program.restore_weights(scratch[0])
                    program.add_class(of)
                    spent_ns = self._exec(program, of, scratch)
                except DeviceFault:
                    raise
                except Exception as error:  # an exported program may have a fixed batch
                    if batch == 1:
                        raise _cannot_run(program, error) from error
                    reason = f"{type(error).__name__}: {first_line(error)}"
                    note(f"{program.name} {of} is left out: {reason}")
                    ended.add(length)
                    continue
                if batch > 1 and spent_ns > max_exec_ns:
                    program.drop_class(of)
                    ended.add(length)

    # ------------------------------------------------------------------------- right answers

    def _check_model(self, source: Source, weights: Block) -> None:
        """Whether rows follow their inputs, and whether the model leaves its weights as they were.

        Each run starts from `weights`, as each served one does. Raises ModelRefused or InvalidConfig.
        """
        program = source.program

        def run(rows: Arrays) -> Arrays:
            program.restore_weights(weights)
            return program.run_rows(rows)

        longest = max(source.model.lengths, default=0)
        try:
            with program.in_few_steps():
                gives = check_model(run, source.model, precision=program.precision)
                program.answers_with(gives, scored=bool(source.model.score))
                program.restore_weights(weights)
                for seed in range(_WARM_UPS):
                    program.run_rows(program.sample_rows(1, seed, longest))
            program.changed = program.changed_weights(weights)
        except Exception as error:
            reason = explain_forward_error(error, source.model)
            raise _cannot_run(program, error, reason) from error
        program.keeps_weights = not program.changed

    def check_answers(
        self, program: Preparable, scratch: Sequence[Block], note: Callable[[str], None]
    ) -> None:
        """Compare each class with plain execution, and drop those that differ. Runs in steps end early.

        If one differs as a graph, all of them are run plainly instead: what the model keeps between runs
        may spoil the others at another time. Raises ModelRefused if batch 1 differs all the same.
        """
        with program.in_few_steps():
            self._check_answers(program, scratch, note)

    def _check_answers(
        self, program: Preparable, scratch: Sequence[Block], note: Callable[[str], None]
    ) -> None:
        classes = program.classes
        right: set[Class] = set()
        for each in classes:
            difference = self._differs(program, each, scratch)
            if not difference and program.steps:
                right.add(
                    each
                )  # these take seconds, and their state is memory of their own: once is enough
            if difference and program.captured(each):
                program.not_captured = f"{each}: its CUDA graph answered wrongly ({difference})"
                for other in classes:
                    program.drop_class(other)
                program.restore_weights(scratch[0])
                for other in classes:
                    program.add_class(other, capture=False)
                right.clear()
                break
        for each in classes:
            difference = "" if each in right else self._differs(program, each, scratch)
            if not difference:
                continue
            program.drop_class(each)
            if each.batch == 1:
                raise ModelRefused(
                    f"model {program.name!r} answers wrongly when it is served ({difference}), so it is not; "
                    "does it keep tensors of a run in attributes, or depend on what ran before?"
                )
            program.left_out = (*program.left_out, f"{each} answers wrongly")
            note(f"{program.name} {each} is not offered: {difference}")

    def _differs(self, program: Preparable, of: Class, scratch: Sequence[Block]) -> str:
        """How the answers of a class differ from plain execution's, in words; empty if they do not."""
        others = _others(program, of)
        for index, buffers in enumerate(program.sets(of)):
            rows = program.sample_rows(of.batch, 1 + 2 * of.batch + index, of.length)
            program.restore_weights(scratch[0])
            wanted = program.run_rows(rows)
            for other in others[:1]:  # what the model keeps for this size, it drops now
                program.run_rows(program.sample_rows(other.batch, 0, other.length))
            answers = self._served(program, buffers, rows, others, scratch)
            if difference := differing(answers, wanted, program.precision):
                return f"buffers {index}: {difference}"
        return ""

    def _served(
        self,
        program: Preparable,
        buffers: BufferSet,
        rows: Arrays,
        others: Sequence[Class],
        scratch: Sequence[Block],
    ) -> Arrays:
        """What a run of `buffers` answers to `rows` when `others` run before its output is fetched."""
        driver, stream = self._driver, self._stream
        host = buffers.staged_in.host
        assert host is not None and buffers.staged_out.host is not None
        nbytes = buffers.takes.pack(rows, host).nbytes
        driver.copy(buffers.input, buffers.staged_in.address, nbytes, stream)
        of = Class(buffers.batch, buffers.takes.length)
        self._disturb(program)
        copies = [(program.active, scratch[-1].address, program.weights_bytes)]
        self._launch(program, of, buffers, copies)
        self._disturb(program)
        for other in (of, *others):
            for each in program.sets(other):
                if each is not buffers:
                    copies = [(program.active, scratch[0].address, program.weights_bytes)]
                    self._launch(program, other, each, copies)
        nbytes = buffers.row_out * buffers.batch
        driver.copy(buffers.staged_out.address, buffers.output, nbytes, stream)
        driver.record(self._ended, stream)
        self._finish()
        return buffers.gives.unpack(buffers.staged_out.host, buffers.batch)

    # ------------------------------------------------------------------------------- times

    def _load(self, image: Block, scratch: Block) -> int:
        """Median time of a few loads, ns."""
        times = []
        for _ in range(_LOADS):
            self._driver.record(self._started, self._load_stream)
            self._driver.copy(scratch.address, image.address, scratch.nbytes, self._load_stream)
            self._driver.record(self._ended, self._load_stream)
            self._finish()
            times.append(self._driver.elapsed_ns(self._started, self._ended))
        return max(1, round(median(times)))

    def _exec(self, program: Preparable, of: Class, scratch: Sequence[Block]) -> int:
        """Median exec time of a class with the copy of its weights, ns."""
        return self._times(program, of, scratch)[0]

    def _times(self, program: Preparable, of: Class, scratch: Sequence[Block]) -> tuple[int, int]:
        """The same, and the time of a step, ns; 0 if it runs as a whole.

        A run in steps is not measured whole: its time is that of its first and last part, and of the steps.
        """
        cut = program.cut_of(of)
        bubbles_ns = cut.bubbles_ns if cut is not None else 0
        if runs := program.stepped_runs(of):
            runs[0].aim([(program.active, scratch[0].address, scratch[0].nbytes)])
            times = self._watch.steps(runs[0], _GUESS_NS)
            return times.whole_ns + bubbles_ns, sum(times.step)
        return max(1, self._whole_ns(program, of, scratch) + bubbles_ns), 0

    def _whole_ns(self, program: Program, of: Class, scratch: Sequence[Block]) -> int:
        times: list[int] = []
        begin_ns, last_ns = self._clock(), _GUESS_NS
        sets = program.sets(of)
        for run in range(_WARM_UPS + _RUNS):
            self._background.until_idle(last_ns)
            buffers, source = sets[run % len(sets)], scratch[run % len(scratch)]
            copies = [(program.active, source.address, source.nbytes)]
            self._launch(program, of, buffers, copies, self._ended)
            self._finish()
            last_ns = self._driver.elapsed_ns(buffers.started, buffers.ended)
            enough = self._clock() - begin_ns > _CLASS_AT_MOST_NS
            if run >= _WARM_UPS or enough:
                times.append(last_ns)
            if enough and run:
                break
        return round(median(times))

    def _launch(
        self,
        program: Program,
        of: Class,
        buffers: BufferSet,
        copies: Copies,
        ended: Event = None,
    ) -> None:
        """Run a buffer set of a class, and record `ended` behind it."""
        with self._alone(segments=program.cut_of(of) is not None), self._background.uncut():
            program.aim(buffers, copies)
            program.launch(buffers, self._stream)
            if ended is not None:
                self._driver.record(ended, self._stream)

    def _disturb(self, program: Preparable) -> None:
        with self._alone(segments=False):
            program.disturb(self._stream)

    @contextmanager
    def _alone(self, *, segments: bool) -> Iterator[None]:
        """Within it, launches are not mixed with those of a served run in segments."""
        if self._gate is None:
            yield
            return
        with self._gate.alone(self._background.pause, segments=segments):
            yield

    def _finish(self) -> None:
        while not self._driver.done(self._ended):
            self._background.pause()


def _others(program: Preparable, of: Class) -> list[Class]:
    """Classes of `program` beside one: all, or those that follow it where there are many."""
    classes = list(program.classes)
    place = classes.index(of)
    most = _OTHERS_IN_STEPS if program.steps else _OTHERS
    return [*classes[place + 1 :], *classes[:place]][:most]


def _cannot_run(program: Program, error: Exception, reason: str = "") -> Exception:
    """The error to report for a failure of batch 1. `reason` says why, and what to do."""
    if isinstance(error, SloschedError):
        return error
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):  # CuPy's is the latter
        return OutOfDeviceMemory(first_line(error))
    what = f"{type(error).__name__}: {first_line(error)}"
    return InvalidConfig(reason or f"model {program.name!r} does not run: {what}")
