"""The models of real_cascades.py on the worker's own device: times by the step, whole passes, answers.

Each model is prepared as a worker with `--preempt` prepares it. What runs are its programs and lanes, without a
worker's loop.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import numpy as np
from exact_rig import percentile
from gpu_preemption import URGENT, Bed, Failed
from numpy.typing import NDArray

from slosched.clock import now_ns
from slosched.config import ModelProfile, ModelSource, WorkerConfig
from slosched.core.worker.interface import OpKind
from slosched.daemon.backends.cuda.program import Class
from slosched.daemon.backends.cuda.recorded import RecordedProgram
from slosched.signature import row_bytes, split
from slosched.units import NS_PER_S
from slosched.workloads.cascades import load_cascade

Array = NDArray[Any]
Left = Callable[[], float]

#: The output that is compared.
IMAGE = "image"
_ANY_EXEC_NS = 2**62
_CACHE_BYTES = 24 * 2**30
_SLICE_NS = 200_000
#: Steps behind one beginning, where a model has fewer: they are the same work.
_LEAST_CHUNK = 10
#: Runs of the parts by batch size, and steps of each distribution.
_PART_RUNS, _STEPS_WANTED = 5, 200
#: Longer passes are run once.
_LONG_NS = 3 * NS_PER_S
_WAIT_S = 60.0
#: How much longer than there is time a preparation may take that was begun.
_GRACE_S = 45.0


@dataclass(frozen=True)
class Subject:
    """A model: its cascade and stage there, and about how long it takes by the largest batch size, s."""

    name: str
    cascade: str
    stage: str
    plans: tuple[tuple[tuple[int, ...], float], ...]

    @property
    def published_ns(self) -> dict[int, int]:
        """The times of the artifact's A100, by batch size; a light program's with its judge."""
        spec = load_cascade(self.cascade)
        return spec.light_ns if self.stage == "light" else spec.heavy.exec_ns

    @property
    def least_s(self) -> float:
        return self.plans[-1][1]


_UP_TO_16, _UP_TO_8, _UP_TO_4 = (1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4)
SUBJECTS = (
    Subject(
        "diffusion/sd-turbo+judge",
        "sdturbo",
        "light",
        ((_UP_TO_16, 60), (_UP_TO_8, 45), ((1, 4), 30)),
    ),
    Subject(
        "diffusion/sdxs+judge", "sdxs", "light", ((_UP_TO_16, 40), (_UP_TO_8, 30), ((1, 4), 20))
    ),
    Subject("diffusion/sd15", "sdturbo", "heavy", ((_UP_TO_8, 85), (_UP_TO_4, 65), ((1, 4), 50))),
    Subject(
        "diffusion/sdxl-lightning+judge",
        "sdxlltn",
        "light",
        ((_UP_TO_8, 130), (_UP_TO_4, 95), ((1,), 60)),
    ),
    Subject("diffusion/sdxl", "sdxlltn", "heavy", ((_UP_TO_4, 190), ((1, 2), 120), ((1,), 85))),
)


def batches_within(subject: Subject, seconds: float, slower: float) -> tuple[int, ...]:
    """The most batch sizes that `seconds` are enough for, if all takes `slower` times what was thought.

    Empty if none is.
    """
    return next((batches for batches, each_s in subject.plans if each_s * slower <= seconds), ())


class Models(Bed):
    """The worker's device with one diffusion model at a time, and an urgent ResNet-50 beside it."""

    def __init__(self, device: str) -> None:
        import torch

        from slosched.daemon.backends.cuda.backend import CudaBackend

        config = WorkerConfig(
            device=device,
            preempt=True,
            models=(ModelSource(URGENT, dtype="float16", channels_last=True),),
            libraries=("diffusion",),
            dtype="float16",
            weights_cache_bytes=_CACHE_BYTES,
        )
        self.backend = CudaBackend(config, torch.device(device))
        self.device = self.backend._gpu
        self.notes: list[str] = []
        self.ids: dict[str, int] = {}
        self._ops = self._actions = 0
        self.prepare(URGENT, (1,), 60.0)
        self.backend._ids[URGENT] = {0}  # so that it is not forgotten with the others

    def prepare(self, name: str, batches: Sequence[int], within_s: float) -> ModelProfile:
        """Build and measure a model, and load its weights onto the GPU. Raises Failed."""
        errors: list[BaseException] = []
        found: list[ModelProfile] = []

        def job() -> None:
            try:
                found.append(
                    self.backend.measure(
                        name, batches, max_exec_ns=_ANY_EXEC_NS, note=self.notes.append
                    )
                )
            except BaseException as error:
                errors.append(error)

        ended = self.backend.in_background(job, within_s)
        self.notes += self.backend.take_notes()
        if not ended or errors:
            raise Failed(
                f"{name} was not prepared: {errors or f'it takes more than {within_s:.0f} s'}"
            )
        self.backend.adopt(name)
        self.device.instances[name] = 1
        self.ids[name] = len(self.ids)
        self.until(self.launch(OpKind.LOAD_WEIGHTS, name))
        return found[0]

    def forget(self, name: str) -> None:
        """Give back all that a model has, so that the next one has the GPU for itself."""
        if name in self.ids:
            self.device.evict(self.ids[name])
        self.backend.forget_unused()
        gc.collect()

    def launches(self, launches: Sequence[Callable[[Any], None]]) -> list[int]:
        """What each takes on the GPU when all are launched one behind the other, ns."""
        driver, stream = self.backend._driver, self.backend._exec_stream
        events = [driver.event() for _ in range(len(launches) + 1)]
        driver.record(events[0], stream)
        for launch, event in zip(launches, events[1:], strict=True):
            launch(stream)
            driver.record(event, stream)
        give_up_ns = now_ns() + round(_WAIT_S * NS_PER_S)
        while not driver.done(events[-1]):
            if now_ns() > give_up_ns:
                raise Failed("the GPU did not end a run")
        return [driver.elapsed_ns(a, b) for a, b in pairwise(events)]

    def aimed(self, name: str, of: Class) -> Any:
        """The run in steps of a class, which copies the model's weights first, as each served one does."""
        program = self.program(name)
        runs = program.stepped_runs(of)
        if not runs:
            raise Failed(f"{name} {of} runs by plain execution: {program.not_captured}")
        weights = self.device._copies.weights_of(self.ids[name], program.active, stay=False)
        runs[0].aim(weights.copies)
        return runs[0]


# ---------------------------------------------------------------------------------------- times


def part_times(bed: Models, name: str, batch: int) -> dict[str, int]:
    """Begin, one step and finish of a class, ns: medians of a few runs of at most three steps."""
    parts = bed.aimed(name, Class(batch)).parts
    some = [*parts[: min(len(parts) - 1, 4)], parts[-1]]
    rows = [bed.launches(some) for _ in range(_PART_RUNS)][1:]
    begin, *steps, finish = (round(median(column)) for column in zip(*rows, strict=True))
    return {"begin_ns": begin, "step_ns": round(median(steps)), "finish_ns": finish}


def step_times(bed: Models, name: str, batch: int, predicted_ns: int) -> dict[str, Any]:
    """At least 200 steps of a class, back to back, against the time of a step that is predicted."""
    parts = bed.aimed(name, Class(batch)).parts
    chunk = max(len(parts) - 2, _LEAST_CHUNK)
    times: list[int] = []
    while len(times) < _STEPS_WANTED:
        times += bed.launches([parts[0], *[parts[1]] * chunk, parts[-1]])[1:-1]
    errors = [each / predicted_ns - 1 for each in times]
    return {
        "n": len(times),
        "predicted_ns": predicted_ns,
        **{f"p{p}_ns": percentile(times, p) for p in (1, 50, 99, 100)},
        "error_p50": percentile(errors, 50),
        "error_p99": percentile(errors, 99),
        "error_worst": max(errors, key=abs),
    }


def whole_passes(bed: Models, name: str, batch: int, predicted_ns: int) -> dict[str, Any]:
    """Whole passes of a class as the worker runs them, against the predicted time."""
    count = 1 if predicted_ns > _LONG_NS else 3
    times = [
        bed.until(bed.launch(OpKind.EXEC, name, batch_size=batch)).span.duration_ns
        for _ in range(count)
    ]
    errors = [each / predicted_ns - 1 for each in times]
    return {
        "predicted_ns": predicted_ns,
        "ns": times,
        "error_p50": percentile(errors, 50),
        "error_worst": max(errors, key=abs),
    }


# -------------------------------------------------------------------------------------- answers


class Answers:
    """Answers of one class: served alone, served beside other programs and interrupted, and run directly."""

    def __init__(self, bed: Models, name: str, batch: int) -> None:
        self.bed, self.name, self.of = bed, name, Class(batch)
        self.program: RecordedProgram = bed.program(name)
        self.layouts = self.program.sets(self.of)[0]
        self.chance = random.Random(batch)
        self.interrupted = 0

    def inputs(self, seed: int) -> dict[str, Array]:
        return dict(self.program.sample_rows(self.of.batch, seed))

    def directly(self, rows: Mapping[str, Array]) -> Array:
        """A plain forward of the same module with the same weights: images (batch, 3, height, width)."""
        found: Array = self.program.run_rows(rows)[IMAGE]
        return found

    def served(self, rows: Mapping[str, Array], *, beside: bool) -> Array:
        """The images that the device answers with.

        `beside`: urgent runs interrupt it, and other programs run before its output is copied.
        """
        bed, batch = self.bed, self.of.batch
        packed = self.layouts.takes.pack(rows)
        action = bed.action_id()
        nbytes = row_bytes(self.layouts.takes.tensors, 0)  # a row may be longer than its frame
        bed.device.keep_inputs(action, [packed[row, :nbytes].tobytes() for row in range(batch)])
        shape: dict[str, Any] = {
            "action_id": action,
            "batch_size": batch,
            "request_count": batch,
            "input_sizes": (nbytes,) * batch,
        }
        bed.until(bed.launch(OpKind.COPY_INPUT, self.name, **shape))
        if beside:
            self._interrupted(bed.launch(OpKind.EXEC, self.name, **shape))
            self._others()
        else:
            bed.until(bed.launch(OpKind.EXEC, self.name, **shape))
        bed.until(bed.launch(OpKind.COPY_OUTPUT, self.name, **shape))
        frames = [bytes(each) for each in bed.device.take_outputs(action)]
        return self._images(frames)

    def _interrupted(self, long: int) -> None:
        """Let urgent runs arrive at random until the long one has ended."""
        bed = self.bed
        whole_ns = bed.backend._profiles[self.name][0].exec_ns[self.of.batch]
        urgent, due_ns = -1, now_ns()
        give_up_ns = now_ns() + round(_WAIT_S * NS_PER_S)
        while now_ns() < give_up_ns:
            if urgent < 0 and long >= 0 and now_ns() >= due_ns:
                urgent = bed.launch(OpKind.EXEC, URGENT, priority=1)
            for done in bed.step(now_ns() + _SLICE_NS):
                if done.code:
                    raise Failed(f"an exec failed: {done.reason}")
                if done.op_id == urgent:
                    urgent = -1
                    due_ns = now_ns() + round(self.chance.uniform(0.02, 0.2) * whole_ns)
                elif done.op_id == long:
                    self.interrupted += bool(done.segments)
                    long = -1
            if long < 0 and urgent < 0:
                return
        raise Failed("the device did not answer")

    def _others(self) -> None:
        """Runs that write over all that programs share: another class of this one, and another program."""
        bed = self.bed
        other = next((each for each in self.program.classes if each != self.of), self.of)
        bed.until(bed.launch(OpKind.EXEC, self.name, batch_size=other.batch))
        bed.until(bed.launch(OpKind.EXEC, URGENT))

    def _images(self, frames: Sequence[bytes]) -> Array:
        gives = self.layouts.gives
        place = [tensor.name for tensor in gives.framed].index(IMAGE)
        tensor = gives.framed[place]
        parts = [split(gives.framed, 0, frame)[place] for frame in frames]
        rows = [np.frombuffer(part, tensor.dtype).reshape(tensor.shape) for part in parts]
        return np.stack(rows)


def compare_answers(bed: Models, name: str, batch: int, count: int) -> dict[str, Any]:
    """`count` batches of a class: served alone, interrupted, and run directly. Pixels are within 0..1."""
    answers = Answers(bed, name, batch)
    found: dict[str, Any] = {"images": 0, "equal": 0, "worst": 0.0, "mean": 0.0, "beside_equal": 0}
    directs: list[Array] = []
    for seed in range(1, count + 1):
        rows = answers.inputs(seed)
        alone = answers.served(rows, beside=False)
        beside = answers.served(rows, beside=True)
        directly = answers.directly(rows)
        off = np.abs(alone - directly)
        if not np.isfinite(alone).all():
            raise Failed(f"{name} batch {batch} answers with values that are not finite")
        found["images"] += batch
        found["equal"] += sum(bool((a == b).all()) for a, b in zip(alone, directly, strict=True))
        found["beside_equal"] += sum(
            bool((a == b).all()) for a, b in zip(alone, beside, strict=True)
        )
        found["worst"] = max(found["worst"], float(off.max()))
        found["mean"] = max(found["mean"], float(off.mean()))
        directs += list(directly)
    # What comparing is worth: how far apart images of other inputs are.
    apart = [
        float(np.abs(a - b).mean()) for place, a in enumerate(directs) for b in directs[:place]
    ]
    return found | {"interrupted": answers.interrupted, "apart_mean": min(apart, default=None)}


# ---------------------------------------------------------------------------------------- whole


def measure(bed: Models, subject: Subject, batches: Sequence[int], left: Left) -> dict[str, Any]:
    """Every figure of one model; what `left` says of the seconds that are left decides what is left out."""
    began_ns, at = now_ns(), len(bed.notes)
    profile = bed.prepare(subject.name, batches, left() + _GRACE_S)
    found: dict[str, Any] = {
        "batches": sorted(profile.exec_ns),
        "steps": profile.steps,
        "weights_bytes": profile.weights_bytes,
        "weights_ns": profile.weights_ns,
        "prepared_s": (now_ns() - began_ns) / NS_PER_S,
        "published_ns": _by_text(subject.published_ns),
        "exec_ns": _by_text(profile.exec_ns),
        "step_ns": _by_text(profile.step_ns),
        "notes": bed.notes[at:],
        "left_out": [],
    }
    if not profile.steps:
        raise Failed(f"{subject.name} has no steps: {bed.program(subject.name).not_captured}")
    name, shown = subject.name, [each for each in (1, 4) if each in profile.exec_ns]

    def cell(kind: str, batch: int, needs_ns: float, make: Callable[[], dict[str, Any]]) -> None:
        if needs_ns / NS_PER_S > left():
            found["left_out"].append(f"{kind} of batch {batch}")
            return
        found.setdefault(kind, {})[str(batch)] = make()

    for batch, exec_ns in sorted(profile.exec_ns.items()):
        cell("parts", batch, exec_ns / 5, partial(part_times, bed, name, batch))
    for batch in shown:
        exec_ns, step_ns = profile.exec_ns[batch], profile.step_ns[batch]
        cell("passes", batch, 3 * exec_ns, partial(whole_passes, bed, name, batch, exec_ns))
        rest_ns = exec_ns - profile.steps * step_ns
        chunks = -(-_STEPS_WANTED // max(profile.steps, _LEAST_CHUNK))
        needs_ns = _STEPS_WANTED * step_ns + chunks * rest_ns
        cell("step_times", batch, needs_ns, partial(step_times, bed, name, batch, step_ns))
        count = 1 if batch > 1 else 2 if exec_ns > NS_PER_S else 3
        # A direct run takes several times as long at batch 1, since the host launches each kernel.
        needs_ns = count * (6 * exec_ns + round(0.06 * profile.steps * NS_PER_S))
        cell("answers", batch, needs_ns, partial(compare_answers, bed, name, batch, count))
    found["took_s"] = (now_ns() - began_ns) / NS_PER_S
    return found


def _by_text(times: Mapping[int, int]) -> dict[str, int]:
    return {str(batch): ns for batch, ns in sorted(times.items())}
