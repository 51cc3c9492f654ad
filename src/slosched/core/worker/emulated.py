"""An emulated GPU: it takes exactly as long as a profile says, and computes nothing.

An output row begins with the first MARK_BYTES of the same request's input row, and zeros follow. A client that
marks its inputs therefore sees at once if it got another request's answer (`Echo`, which live emulation and the
simulator share).

It is pure, so the live worker and the simulator share it. Its timeline is exact: work starts at the `now_ns` of
its launch, and a shell that steps at each armed time in order (stepping.py) makes the next action start at the
very nanosecond at which the previous one ended, however late the host process was woken. Execs that are armed
while another runs follow in the order of lane_order.py. Noise and stalls are drawn per GPU from a generator of
its own, so a GPU's sequence does not depend on the other GPUs; only a shared PCIe link (pcie.py) couples them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import msgspec

from slosched.codes import Code
from slosched.config import EmulationNoise, GpuProfile, ModelProfile
from slosched.core.worker.interface import (
    DeviceEvent,
    ModelPrepared,
    Op,
    OpDone,
    OpKind,
    PrepareModel,
    WeightsLost,
    joined,
    op_failed,
    too_late,
)
from slosched.core.worker.lane_order import ArmedWork, LaneOrder
from slosched.core.worker.lanes import EXEC_LANE, PREEMPTIVE_EXEC_LANE
from slosched.core.worker.pcie import PcieLink
from slosched.errors import UnknownName
from slosched.messages import Span
from slosched.signature import row_bytes
from slosched.units import NS_PER_S

#: The first bytes of an input, which the output of the same request repeats.
MARK_BYTES = 16

_MASK = 2**64 - 1
_TO_DEVICE = (OpKind.LOAD_WEIGHTS, OpKind.COPY_INPUT)


class SplitMix64:
    """A 64-bit generator whose sequence is the same everywhere (Steele et al., OOPSLA 2014)."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def next_u64(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def uniform(self) -> float:
        """In [0, 1)."""
        return (self.next_u64() >> 11) * 2.0**-53

    def normal(self) -> float:
        """Mean 0, standard deviation 1, cut at 3. A sum of twelve uniforms: the same bits on any libm."""
        while True:
            total = -6.0
            for _ in range(12):
                total += self.uniform()
            if -3.0 <= total <= 3.0:
                return total


@dataclass(slots=True, eq=False)
class _Exec(ArmedWork):
    op: Op
    done: OpDone | None = None  # how it ends, once it has begun
    begun_ns: int = 0  # of the segment that runs
    left_ns: int = 0  # of its time, when that segment began
    every_ns: int = 0  # between two boundaries
    last_ns: int = 0  # no boundary after this part of its time
    segments: list[Span] = field(default_factory=list)  # those that were interrupted


class EmulatedGpu:
    """Implements `Device`. Exec and weights take the profile's time.

    Copies of inputs and outputs take none, unless `noise.pcie_bytes_per_s` is given: then they take what their
    bytes need, and inputs and weights share `link` (the GPU's own, or its host's). Outputs travel in the other
    direction, which nothing else uses. `profile` must know the `model_name` of every op; an op of another model
    fails with code 2. `noise.seed` and `gpu_id` seed the disturbances.
    """

    def __init__(
        self,
        profile: GpuProfile,
        noise: EmulationNoise | None = None,
        gpu_id: int = 0,
        *,
        link: PcieLink | None = None,
        preemptive: bool = False,
    ) -> None:
        self._profile = profile
        self._noise = noise or EmulationNoise()
        self._bytes_per_s = self._noise.pcie_bytes_per_s
        self._link = (link or PcieLink()) if self._bytes_per_s else None
        self._noisy = is_noisy(self._noise)
        self._random = SplitMix64(self._noise.seed * 0x10001 + gpu_id + 1)
        #: (model, batch, length) -> exec ns
        self._classes: dict[tuple[str, int, int], int] = {}
        self._execs: LaneOrder[_Exec] = LaneOrder(PREEMPTIVE_EXEC_LANE if preemptive else EXEC_LANE)
        self.preemptive = preemptive
        #: (end, seq, report, the exec that ends then); without a report the exec reaches a boundary.
        self._ends: list[tuple[int, int, OpDone | None, _Exec | None]] = []
        self._seq = 0
        #: Fault injection: a multiplier on exec times; the share of execs that fail as when a model raises,
        #: and the share that end with the model's process and the weights of all its instances; the share
        #: of loads that fail.
        self.slowdown = 1.0
        self.failing = self.ending = self.spoiling = 0.0
        self._gpu_id = gpu_id
        #: By model id: the name of each instance whose weights were ever loaded here.
        self._instances: dict[int, str] = {}
        self._ended: dict[int, str] = {}  # model name by op id, for execs that end their process
        #: On a link, the end of a copy depends on the copies that share it.
        self.steady = self._link is None
        self.free_copies = self._link is None

    @property
    def arm_ahead_ns(self) -> int:
        """0: in event time a decision at `earliest` is not late."""
        return 0

    def withdraw(self, op_id: int) -> OpDone | None:
        work = next((each for each in self._execs.armed if each.op.op_id == op_id), None)
        if work is None or work.segments:
            return None
        self._execs.disarm(work)
        return op_failed(work.op, Code.CANCELLED, "cancelled before it began", work.due_ns)

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        if op.kind is not OpKind.EXEC:
            return self._begin(op, now_ns)
        work = _Exec(op)
        self._execs.arm(work, start_ns=now_ns, now_ns=now_ns, priority=op.priority)
        if self._execs.first(now_ns) is not work:
            if self.preemptive:
                self._stop_at_boundary(op.priority, now_ns)
            return None
        return self._begin_exec(work, now_ns)

    def _begin_exec(self, work: _Exec, now_ns: int) -> OpDone | None:
        """Start the exec, or go on with it. One that took no time is reported at once."""
        self._execs.begin(work)
        if work.segments:
            self._go_on(work, now_ns)
            return None
        done = self._begin(work.op, now_ns, work)
        if done is not None:
            self._execs.end(work, now_ns)
        return done

    def _follow(self, work: _Exec | None, now_ns: int, events: list[DeviceEvent]) -> None:
        """The exec lane has become free: start `work`, or what comes behind it."""
        while work is not None:
            if now_ns > work.op.latest_ns and not work.segments:
                self._execs.disarm(work)
                events.append(too_late(work.op, now_ns))
            elif (done := self._begin_exec(work, now_ns)) is None:
                return
            else:
                events.append(done)
            work = self._execs.first(now_ns)

    def _begin(self, op: Op, now_ns: int, work: _Exec | None = None) -> OpDone | None:
        """Start `op`. One that took no time is reported at once."""
        try:
            done = self._outcome(op, now_ns)
        except UnknownName as error:
            span = Span(now_ns, now_ns, 0)
            done = OpDone(op.op_id, span, code=Code.RUNTIME_ERROR, reason=str(error))
        if op.kind is OpKind.LOAD_WEIGHTS:
            self._instances[op.model_id] = op.model_name
            if self.spoiling and self._random.uniform() < self.spoiling:
                reason = f"the copy of {op.model_name!r} failed, by a fault"
                done = OpDone(op.op_id, done.span, Code.RUNTIME_ERROR, reason)
        elif op.kind is OpKind.EXEC and (self.failing or self.ending):
            done = self._disturbed(op, done)
        link = self._link
        if not done.span.duration_ns:
            return done
        if link is None or op.kind not in _TO_DEVICE:
            self._push(done, work)
            return None

        def ended(end_ns: int) -> None:
            span = Span(now_ns, end_ns, end_ns - now_ns)
            self._push(msgspec.structs.replace(done, span=span))

        link.begin(done.span.duration_ns, now_ns=now_ns, on_end=ended)
        return None

    def _disturbed(self, op: Op, done: OpDone) -> OpDone:
        """How the exec ends under `failing` and `ending`."""
        share = self._random.uniform()
        if share < self.ending:
            self._ended[op.op_id] = op.model_name
            reason = f"the process of {op.model_name!r} ended, by a fault"
            return OpDone(op.op_id, done.span, Code.MODEL_PROCESS_ENDED, reason)
        if share < self.ending + self.failing:
            reason = f"{op.model_name!r} raised, by a fault"
            return OpDone(op.op_id, done.span, Code.RUNTIME_ERROR, reason)
        return done

    def _push(self, done: OpDone, work: _Exec | None = None) -> None:
        if work is not None:
            work.done, work.begun_ns, work.left_ns = done, done.span.begin_ns, done.span.duration_ns
            work.every_ns, work.last_ns = self._boundaries(work.op, done.span.duration_ns)
        self._push_at(done.span.end_ns, done, work)

    def _push_at(self, at_ns: int, done: OpDone | None, work: _Exec | None) -> None:
        self._seq += 1
        heappush(self._ends, (at_ns, self._seq, done, work))

    # --------------------------------------------------------------------------- preemption

    def _stop_at_boundary(self, priority: int, now_ns: int) -> None:
        """Have the running exec stop at its next boundary, if its priority is lower."""
        work = self._execs.running[0]
        every_ns = work.every_ns
        if work.priority >= priority or not every_ns:
            return
        pieces = max(1, -(-(now_ns - work.begun_ns) // every_ns))
        boundary_ns = work.begun_ns + pieces * every_ns
        assert work.done is not None
        ran_ns = work.done.span.duration_ns - work.left_ns
        if pieces * every_ns < work.left_ns and ran_ns + pieces * every_ns <= work.last_ns:
            self._ends = [entry for entry in self._ends if entry[3] is not work]
            heapify(self._ends)
            self._push_at(boundary_ns, None, work)

    def _boundaries(self, op: Op, duration_ns: int) -> tuple[int, int]:
        """How far apart the boundaries of a run of `duration_ns` are, and how late in it the last one is."""
        model = self._profile.model(op.model_name)
        if not model.steps:
            return self._profile.boundary_ns, duration_ns
        expected_ns, step_ns = (
            class_exec_ns(each, op.batch_size) for each in (model.exec_ns, model.step_ns)
        )
        every_ns = max(1, step_ns * duration_ns // expected_ns)
        return every_ns, every_ns * model.steps

    def _at_boundary(self, work: _Exec, now_ns: int, events: list[DeviceEvent]) -> None:
        """`work` has reached the boundary at which it was to stop: what is urgent goes first."""
        if self._execs.boundary(work, now_ns):  # what was urgent was withdrawn
            self._push_at(work.begun_ns + work.left_ns, self._ended_at(work), work)
            return
        ran_ns = now_ns - work.begun_ns
        work.segments.append(Span(work.begun_ns, now_ns, ran_ns))
        work.left_ns -= ran_ns
        self._follow(self._execs.first(now_ns), now_ns, events)

    def _go_on(self, work: _Exec, now_ns: int) -> None:
        work.begun_ns = now_ns
        self._push_at(now_ns + work.left_ns, self._ended_at(work), work)

    def _ended_at(self, work: _Exec) -> OpDone:
        """How `work` ends, if it is not interrupted again."""
        assert work.done is not None
        if not work.segments:
            return work.done
        begun_ns, left_ns = work.begun_ns, work.left_ns
        segments = (*work.segments, Span(begun_ns, begun_ns + left_ns, left_ns))
        span, pause_ns = joined(segments)
        return msgspec.structs.replace(work.done, span=span, pause_ns=pause_ns, segments=segments)

    def poll(self, *, now_ns: int) -> list[DeviceEvent]:
        if self._link is not None:
            self._link.advance(now_ns)
        events: list[DeviceEvent] = []
        ends = self._ends
        while ends and ends[0][0] <= now_ns:
            end_ns, _, done, work = heappop(ends)
            if done is None:
                assert work is not None
                self._at_boundary(work, end_ns, events)
                ends = self._ends
                continue
            events.append(done)
            if self._ended and (name := self._ended.pop(done.op_id, None)) is not None:
                lost = tuple(i for i, each in self._instances.items() if each == name)
                events.append(WeightsLost(self._gpu_id, lost))
            if work is not None:
                self._follow(self._execs.end(work, end_ns), end_ns, events)
        return events

    def next_event_ns(self) -> int | None:
        due_ns = self._ends[0][0] if self._ends else None
        if self._link is None:
            return due_ns
        # A copy of another GPU on the shared link changes when this GPU's copy ends.
        copied_ns = self._link.next_event_ns()
        if due_ns is None or copied_ns is None:
            return copied_ns if due_ns is None else due_ns
        return min(due_ns, copied_ns)

    def _outcome(self, op: Op, now_ns: int) -> OpDone:
        clock_mhz = self._profile.clock_mhz
        kind, duration_ns = op.kind, 0
        if kind is OpKind.EXEC:
            duration_ns = self._exec_ns(op)
        elif kind is OpKind.LOAD_WEIGHTS:
            duration_ns = self._profile.model(op.model_name).weights_ns
        elif kind is OpKind.COPY_INPUT:
            duration_ns = self._copy_ns(sum(op.input_sizes)) if self._bytes_per_s else 0
        output_sizes: tuple[int, ...] = ()
        if kind is OpKind.COPY_OUTPUT and any(op.input_sizes):
            model = self._profile.model(op.model_name)
            lengths = op.lengths or (0,) * len(op.input_sizes)
            output_sizes = tuple(
                row_bytes(model.answers, length) if given else 0
                for given, length in zip(op.input_sizes, lengths, strict=True)
            )
            duration_ns = self._copy_ns(sum(output_sizes))
        span = Span(now_ns, now_ns + duration_ns, duration_ns)
        return OpDone(
            op_id=op.op_id,
            span=span,
            clock_before_mhz=clock_mhz,
            clock_mhz=clock_mhz,
            output_sizes=output_sizes,
        )

    def _copy_ns(self, size_bytes: int) -> int:
        """The time of a copy that has the link to itself."""
        return size_bytes * NS_PER_S // self._bytes_per_s if self._bytes_per_s else 0

    def _exec_ns(self, op: Op) -> int:
        key = (op.model_name, op.batch_size, op.length)
        duration_ns = self._classes.get(key)
        if duration_ns is None:
            model = self._profile.model(op.model_name)
            duration_ns = class_exec_ns(model.times(op.length), op.batch_size)
            self._classes[key] = duration_ns
        if self.slowdown != 1.0:
            duration_ns = max(1, round(duration_ns * self.slowdown))
        return noisy_ns(duration_ns, self._noise, self._random) if self._noisy else duration_ns


def emulated_gpus(
    profile: GpuProfile, noise: EmulationNoise | None, count: int, *, preemptive: bool = False
) -> dict[int, EmulatedGpu]:
    """The `count` GPUs of one worker, by id; they share one PCIe link if `noise.pcie_shared`."""
    shared = PcieLink() if noise is not None and noise.pcie_shared else None
    return {
        g: EmulatedGpu(profile, noise, g, link=shared, preemptive=preemptive) for g in range(count)
    }


class Echo:
    """The inputs that one emulated worker remembers, and answers with. A row is bytes in C order.

    `keep` takes the input frames of an action, and `drop` forgets them. `take` returns the beginning of each
    output of the action: the first MARK_BYTES of its request's input, or fewer if the output is shorter. Zeros
    fill the rest of the output.
    """

    def __init__(self) -> None:
        self._marks: dict[int, list[bytes]] = {}  # by action: one for each request with an input

    @property
    def kept(self) -> int:
        """Actions whose inputs are remembered."""
        return len(self._marks)

    def keep(self, action_id: int, rows: Sequence[bytes | memoryview]) -> None:
        self._marks[action_id] = [bytes(row[:MARK_BYTES]) for row in rows]

    def drop(self, action_id: int) -> None:
        self._marks.pop(action_id, None)

    def take(self, action_id: int, sizes: Sequence[int]) -> list[bytes]:
        """One for each of `sizes` (bytes of each request's output) other than 0."""
        given = [size for size in sizes if size]
        marks = self._marks.pop(action_id, [b""] * len(given))
        return [mark[:size] for mark, size in zip(marks, given, strict=bool(given))]


def is_noisy(noise: EmulationNoise) -> bool:
    """Whether `noise` disturbs durations."""
    return noise.exec_sigma > 0 or noise.stall_probability > 0 or bool(noise.exec_quantiles)


def noisy_ns(duration_ns: int, noise: EmulationNoise, random: SplitMix64) -> int:
    """A draw of what takes `duration_ns` without `noise`; 1 or more."""
    if noise.exec_quantiles:
        factor = _quantile(noise.exec_quantiles, random.uniform())
    else:
        factor = 1.0 + noise.exec_sigma * random.normal()
    duration_ns = round(duration_ns * factor)
    if random.uniform() < noise.stall_probability:
        duration_ns += noise.stall_ns
    return max(1, duration_ns)


def _quantile(quantiles: Sequence[float], share: float) -> float:
    """The value below which `share` (within [0, 1)) of a distribution lies, from evenly spaced quantiles."""
    place = share * (len(quantiles) - 1)
    low = int(place)
    return quantiles[low] + (quantiles[low + 1] - quantiles[low]) * (place - low)


def class_exec_ns(exec_ns: Mapping[int, int], batch_size: int) -> int:
    """Exec time of the smallest batch class that holds `batch_size`; of the largest if none does."""
    fitting = [batch for batch in exec_ns if batch >= batch_size]
    return exec_ns[min(fitting) if fitting else max(exec_ns)]


def prepare_emulated(
    profile: GpuProfile, effect: PrepareModel, *, now_ns: int, preemptive: bool = False
) -> ModelPrepared:
    """Answer a PrepareModel from the profile, at once: there is nothing to build."""
    span = Span(now_ns, now_ns, 0)
    try:
        model = profile.model(effect.name)
    except UnknownName as error:
        return ModelPrepared(
            effect.action_id, None, span, code=Code.UNKNOWN_MODEL, reason=str(error)
        )
    shortest_ns = min(model.times(length)[1] for length in model.lengths or (0,))
    return ModelPrepared(
        action_id=effect.action_id,
        profile=model,
        span=span,
        random_weights=False,
        labels=("emulated",),
        boundaries_ns=_boundaries_ns(profile, model) if preemptive else {},
        urgent_ns=profile.urgent_at_most_ns
        if preemptive and shortest_ns <= profile.urgent_at_most_ns
        else 0,
    )


def _boundaries_ns(profile: GpuProfile, model: ModelProfile) -> dict[int, dict[int, int]]:
    """How long each class runs until it can be interrupted, if one of them runs for longer than that."""
    if max(model.exec_ns.values()) <= profile.boundary_ns:
        return {}
    return {
        length: {batch: _boundary_ns(profile, model, batch, ns) for batch, ns in times.items()}
        for length in model.lengths or (0,)
        if (times := model.times(length))
    }


def _boundary_ns(profile: GpuProfile, model: ModelProfile, batch: int, exec_ns: int) -> int:
    """The longest time until a run of `exec_ns` can be interrupted: between two steps, if it has them."""
    if not model.steps:
        return min(profile.boundary_ns, exec_ns)
    step_ns = model.step_ns[batch]
    return max(step_ns, exec_ns - (model.steps - 1) * step_ns)
