"""Urgent inferences beside a long model on one GPU: latency, what segments cost, and every answer compared.

    python3 benchmarks/gpu/gpu_preemption.py --out DIR    # two minutes; writes DIR/preemption.json and .md
    python3 benchmarks/gpu/gpu_preemption.py --out DIR --scale 0.1 --models resnet50
    python3 benchmarks/gpu/gpu_preemption.py --table           # preemption.md from the results

An urgent ResNet-50 of batch 1 arrives at random while a long model runs back to back: ResNet-50 of batch 64,
ViT-L/16 of batch 32. Both run on the worker's own device (its exec lane, its programs, as `--preempt` prepares
them), without a worker's loop. Measured are one and two segments in flight, and streams of different priority
alone, where the long model runs as whole graphs. Latency is counted from the arrival to the noticed end.

Answers are compared byte for byte with those that the same program gives when it runs alone, and these with
plain execution.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkout_path  # noqa: F401  (before everything that lies in this checkout)
import numpy as np
from exact_rig import percentile
from measured_on import measured_on
from preemption_page import PAGE, RESULTS, SPARE_NS, answers_table, page, table

from slosched.clock import now_ns
from slosched.config import ModelSource, WorkerConfig
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.contract import differing
from slosched.daemon.backends.cuda.exec_lane import ExecLane
from slosched.daemon.backends.cuda.program import BufferSet, Class, Copies, Cut
from slosched.daemon.backends.cuda.recorded import RecordedProgram
from slosched.daemon.backends.cuda.runs import GraphRun
from slosched.daemon.backends.cuda.segments import SegmentedRun
from slosched.daemon.blackbox import NoBlackbox
from slosched.output_files import write_file
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

FOREVER_NS = 2**62
_PREPARE_S = 120.0
_WAIT_S = 20.0
_SLICE_NS = 100 * NS_PER_US
#: Rows of a long batch that bring an input, batches that inputs are taken from, and single inputs.
_ROWS, _BATCHES, _SINGLES = 16, 5, 40


class Failed(Exception):
    """Something was not measured."""


@dataclass(frozen=True)
class Long:
    """A long model: the urgent one runs beside this class."""

    name: str
    batch: int
    arrivals: int
    runs: int
    slower: float  # wanted at most

    @property
    def of(self) -> Class:
        return Class(self.batch)


URGENT = "resnet50"
LONG = {
    "resnet50": Long("resnet50", 64, 1000, 300, 0.02),
    "vit_l": Long("vit_l", 32, 600, 150, 0.03),
}
MODELS = (
    ModelSource("resnet50", dtype="float16", channels_last=True),
    ModelSource("vit_l", factory="long_models:vit_l", input_shape=(3, 224, 224), dtype="float16"),
)


class Whole:
    """A program whose class runs as whole graphs again, made of what its segments were made of."""

    urgent = None

    def __init__(self, program: RecordedProgram, of: Class) -> None:
        self._program = program
        self._runs: dict[int, GraphRun] = {}
        for buffers in program.sets(of):
            cut = program._segments[id(buffers)]
            assert isinstance(cut, SegmentedRun)
            run = cut._first
            self._runs[id(buffers)] = GraphRun(
                program._driver,
                program._driver.graph(run.captured, run.active),
                run.captured,
                run.active,
                run.weights_bytes,
                run.started,
                run.ended,
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def cut_of(self, of: Class) -> Cut | None:
        return None

    def aim(self, buffers: BufferSet, copies: Copies) -> None:
        self._runs[id(buffers)].aim(copies)

    def launch(self, buffers: BufferSet, stream: Any) -> None:
        self._runs[id(buffers)].launch(stream)

    def close(self) -> None:
        for run in self._runs.values():
            run.close()


class Bed:
    """The worker's device with its models, without the worker."""

    def __init__(self, models: Sequence[str]) -> None:
        import torch

        from slosched.daemon.backends.cuda.backend import CudaBackend

        config = WorkerConfig(
            device="cuda:0",
            preempt=True,
            models=MODELS,
            weights_cache_bytes=4 * 2**30,
        )
        self.backend = CudaBackend(config, torch.device("cuda:0"))
        self.device = self.backend._gpu
        self.notes: list[str] = []
        self.ids: dict[str, int] = {}
        self._ops = self._actions = 0
        for name in dict.fromkeys([URGENT, *[LONG[each].name for each in models]]):
            batches = [1, *[each.batch for each in LONG.values() if each.name == name]]
            self._prepare(name, batches)

    def _prepare(self, name: str, batches: Sequence[int]) -> None:
        errors: list[BaseException] = []
        began_ns = now_ns()

        def job() -> None:
            try:
                self.backend.measure(name, batches, max_exec_ns=NS_PER_S, note=self.notes.append)
            except BaseException as error:
                errors.append(error)

        if not self.backend.in_background(job, _PREPARE_S) or errors:
            raise Failed(f"{name} was not prepared: {errors or 'it takes too long'}")
        self.backend.adopt(name)
        self.notes += self.backend.take_notes()
        self.notes.append(f"{name} was prepared in {(now_ns() - began_ns) / NS_PER_S:.1f} s")
        self.device.instances[name] = 1
        self.ids[name] = len(self.ids)
        self.until(self.launch(OpKind.LOAD_WEIGHTS, name))

    def program(self, name: str) -> RecordedProgram:
        program = self.backend._programs[name]
        assert isinstance(program, RecordedProgram)
        return program

    def op(self, kind: OpKind, name: str, **more: Any) -> Op:
        self._ops += 1
        fields: dict[str, Any] = {
            "action_id": 0,
            "model_name": name,
            "latest_ns": FOREVER_NS,
            "batch_size": 1,
            "request_count": 1,
        }
        return Op(self._ops, kind, 0, self.ids[name], **(fields | more))

    def launch(self, kind: OpKind, name: str, **more: Any) -> int:
        op = self.op(kind, name, **more)
        done = self.device.launch(op, now_ns=now_ns())
        if done is not None:
            raise Failed(f"{op} failed: {done.reason}")
        return op.op_id

    def step(self, until_ns: int) -> list[OpDone]:
        self.device.spin(until_ns)
        return self.device.poll(now_ns=now_ns())

    def until(self, op_id: int) -> OpDone:
        give_up_ns = now_ns() + round(_WAIT_S * NS_PER_S)
        while now_ns() < give_up_ns:
            for done in self.step(now_ns() + _SLICE_NS):
                if done.code:
                    raise Failed(f"an op failed with code {done.code}: {done.reason}")
                if done.op_id == op_id:
                    return done
        raise Failed("the device did not answer")

    def action_id(self) -> int:
        self._actions += 1
        return self._actions


class OnDevice:
    """Long and urgent execs on the device as it is: urgent ones interrupt at boundaries."""

    def __init__(self, bed: Bed, long: Long) -> None:
        self._bed, self._long = bed, long

    def long(self) -> int:
        return self._bed.launch(OpKind.EXEC, self._long.name, batch_size=self._long.batch)

    def urgent(self) -> int:
        return self._bed.launch(OpKind.EXEC, URGENT, priority=1)

    def step(self, until_ns: int) -> list[OpDone]:
        return self._bed.step(until_ns)


class OnStreams:
    """Whole graphs on two streams of different priority; nothing is interrupted."""

    def __init__(self, bed: Bed, long: Long) -> None:
        self._bed, self._long = bed, long
        driver, backend = bed.backend._driver, bed.backend
        self._whole = Whole(bed.program(long.name), long.of)
        twin = bed.program(URGENT).urgent
        assert twin is not None and backend._urgent_streams is not None
        self._twin = twin
        self._lanes = [
            ExecLane(driver, stream, now_ns, lambda: 0, NoBlackbox())
            for stream in (backend._exec_stream, self._bed.device._exec._urgent_stream)  # type: ignore[attr-defined]
        ]

    def _arm(self, place: int, program: Any, name: str, of: Class) -> int:
        bed = self._bed
        op = bed.op(OpKind.EXEC, name, batch_size=of.batch)
        weights = bed.device._copies.weights_of(bed.ids[name], program.active, stay=False)
        self._lanes[place].arm(op, program, of, None, weights, now_ns=now_ns())
        return op.op_id

    def long(self) -> int:
        return self._arm(0, self._whole, self._long.name, self._long.of)

    def urgent(self) -> int:
        return self._arm(1, self._twin, URGENT, Class(1))

    def step(self, until_ns: int) -> list[OpDone]:
        done: list[OpDone] = []
        while True:
            for lane in self._lanes:
                lane.turn()
                done += lane.done
                lane.done.clear()
            if done or now_ns() >= until_ns:
                return done

    def close(self) -> None:
        self._whole.close()


Lanes = OnDevice | OnStreams

# ------------------------------------------------------------------------------------- latency


def alone(lanes: Lanes, count: int) -> dict[str, Any]:
    """Latency of the urgent model by itself."""
    chance, latencies = random.Random(2), []
    for _ in range(count):
        arrival_ns = now_ns() + round(chance.uniform(0.2, 2) * NS_PER_MS)
        while now_ns() < arrival_ns:
            pass
        op = lanes.urgent()
        latencies.append(_end_of(lanes, op) - arrival_ns)
    return spread(latencies)


def _end_of(lanes: Lanes, op: int) -> int:
    while True:
        for done in lanes.step(now_ns() + _SLICE_NS):
            if done.op_id == op:
                return done.span.end_ns


def beside(lanes: Lanes, count: int, long_ns: int) -> dict[str, Any]:
    """Latency of the urgent model that arrives at random while the long one runs back to back."""
    chance = random.Random(3)
    latencies: list[int] = []
    execs: list[int] = []
    pauses: list[int] = []
    outstanding, urgent = 0, -1
    stop = False
    arrival_ns = now_ns() + long_ns
    while outstanding or not stop:
        while outstanding < 2 and not stop:
            lanes.long()
            outstanding += 1
        now = now_ns()
        if urgent < 0 and now >= arrival_ns and not stop:
            urgent = lanes.urgent()
        until_ns = now + _SLICE_NS
        awaited = urgent < 0 and not stop
        for done in lanes.step(min(arrival_ns, until_ns) if awaited else until_ns):
            if done.code:
                raise Failed(f"an exec failed: {done.reason}")
            if done.op_id == urgent:
                latencies.append(done.span.end_ns - arrival_ns)
                execs.append(done.span.duration_ns)
                arrival_ns = now_ns() + round(chance.uniform(0.4, 2.4) * long_ns)
                urgent, stop = -1, len(latencies) >= count
            else:
                outstanding -= 1
                if done.segments:
                    pauses.append(done.pause_ns)
    return spread(latencies) | {
        "exec_ns": spread(execs),
        "pauses_ns": spread(pauses),
        "interrupted": len(pauses),
    }


def back_to_back(lanes: Lanes, count: int) -> float:
    """Time of one run of the long model, ns, when one follows another."""
    ends: list[int] = []
    outstanding = 0
    while len(ends) < count:
        while outstanding < 2:
            lanes.long()
            outstanding += 1
        for done in lanes.step(now_ns() + _SLICE_NS):
            outstanding -= 1
            ends.append(done.span.end_ns)
    while outstanding:
        outstanding -= len(lanes.step(now_ns() + _SLICE_NS))
    return (ends[-1] - ends[4]) / (len(ends) - 5)


def spread(values: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {f"p{p}": percentile(values, p) for p in (50, 90, 99)}
    return found | {"max": max(values, default=None), "n": len(values)}


def measure(bed: Bed, long: Long, scale: float) -> dict[str, Any]:
    """Every figure of one long model."""
    program = bed.program(long.name)
    cut = program.cut_of(long.of)
    if cut is None:
        raise Failed("its class was not cut")
    device = OnDevice(bed, long)
    arrivals, runs = max(20, round(long.arrivals * scale)), max(20, round(long.runs * scale))
    found: dict[str, Any] = {
        "segments": len(cut.segment_ns),
        "longest_segment_ns": max(cut.segment_ns),
        "tuned_in_flight": cut.in_flight,
        "bubble_ns": cut.bubble_ns,
        "slower_wanted_at_most": long.slower,
        "alone": alone(device, arrivals),
    }
    streams = OnStreams(bed, long)
    try:
        whole = [back_to_back(streams, runs)]
        found["streams"] = beside(streams, arrivals, round(whole[0]))
        for in_flight in (1, 2):
            settings = replace(cut, in_flight=in_flight)
            program._cuts[long.of] = settings
            took_ns = back_to_back(device, runs)
            whole.append(back_to_back(streams, runs))
            whole_ns = sum(whole[-2:]) / 2
            row = beside(device, arrivals, round(whole_ns))
            limit_ns = found["alone"]["p99"] + settings.boundary_ns + SPARE_NS
            found[f"in_flight_{in_flight}"] = row | {
                "boundary_ns": settings.boundary_ns,
                "run_ns": took_ns,
                "whole_ns": whole_ns,
                "slower": took_ns / whole_ns - 1,
                "p99_wanted_at_most_ns": limit_ns,
                "p99_met": row["p99"] <= limit_ns,
                "slower_met": took_ns / whole_ns - 1 <= long.slower,
            }
    finally:
        program._cuts[long.of] = cut
        streams.close()
    return found


# ------------------------------------------------------------------------------------- answers


@dataclass
class Sample:
    """Inputs of a batch, what the program answers to them when it runs alone, and the op's shape."""

    frames: list[bytes]
    shape: dict[str, Any]
    answers: list[bytes]


def samples(
    bed: Bed, name: str, of: Class, rows: int, count: int, *, priority: int
) -> list[Sample]:
    """Batches whose answers are compared with plain execution. Raises Failed where they differ."""
    program = bed.program(name)
    runs = program.urgent if priority else program
    assert runs is not None
    layout = runs.sets(of)[0].takes
    made = []
    for seed in range(1, count + 1):
        inputs = program.sample_rows(of.batch, seed)
        packed = layout.pack(inputs)
        sizes = (packed.shape[1],) * rows + (0,) * (of.batch - rows)
        shape: dict[str, Any] = {"batch_size": of.batch, "request_count": of.batch}
        shape |= {"input_sizes": sizes, "priority": priority}
        sample = Sample([packed[row].tobytes() for row in range(rows)], shape, [])
        action = bed.action_id()
        bed.device.keep_inputs(action, sample.frames)
        for kind in (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT):
            bed.until(bed.launch(kind, name, action_id=action, **shape))
        sample.answers = [bytes(frame) for frame in bed.device.take_outputs(action)]
        wanted = {key: array[:rows] for key, array in runs.run_rows(inputs).items()}
        tensor = program.gives[0]
        array = wanted[tensor.name]
        served = _as_rows(sample.answers, array)
        if difference := differing({tensor.name: served}, wanted, program.precision):
            raise Failed(f"{name} {of} alone differs from plain execution: {difference}")
        made.append(sample)
    return made


def _as_rows(answers: Sequence[bytes], like: Any) -> Any:
    return np.frombuffer(b"".join(answers), like.dtype).reshape(like.shape)


def answers(bed: Bed, long: Long, wanted: int) -> dict[str, Any]:
    """Run both with inputs, the urgent one at random, until `wanted` answers of each kind were compared."""
    longs = samples(bed, long.name, long.of, _ROWS, _BATCHES, priority=0)
    shorts = samples(bed, URGENT, Class(1), 1, _SINGLES, priority=1)
    different = {each for sample in (*longs, *shorts) for each in sample.answers}
    if len(different) < len(longs) * len(longs[0].answers) + len(shorts):
        raise Failed("answers to different inputs are the same, so comparing them shows nothing")
    chance = random.Random(4)
    steps: dict[int, Iterator[int]] = {}
    counts = {"long": 0, "urgent": 0, "wrong": 0, "interrupted": 0}
    running = {"long": 0, "urgent": 0}

    def begin(kind: str) -> None:
        sample = chance.choice(longs if kind == "long" else shorts)
        running[kind] += 1
        _advance(_action(kind, sample))

    def _action(kind: str, sample: Sample) -> Iterator[int]:
        name, action = (long.name if kind == "long" else URGENT), bed.action_id()
        bed.device.keep_inputs(action, sample.frames)
        for each in (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT):
            yield bed.launch(each, name, action_id=action, **sample.shape)
        found = [bytes(frame) for frame in bed.device.take_outputs(action)]
        counts[kind] += len(found)
        counts["wrong"] += sum(a != b for a, b in zip(found, sample.answers, strict=True))
        running[kind] -= 1

    def _advance(action: Iterator[int]) -> None:
        op = next(action, None)
        if op is not None:
            steps[op] = action

    give_up = time.monotonic() + _WAIT_S
    while time.monotonic() < give_up:
        enough = counts["long"] >= wanted and counts["urgent"] >= wanted // 10
        if enough and not steps:
            break
        while running["long"] < 2 and not enough:
            begin("long")
        if not running["urgent"] and not enough and chance.random() < 0.03:
            begin("urgent")
        for done in bed.step(now_ns() + _SLICE_NS):
            if done.code:
                raise Failed(f"an op failed: {done.reason}")
            counts["interrupted"] += bool(done.segments)
            _advance(steps.pop(done.op_id))
    return counts | {"different_answers": len(different)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where preemption.json and .md go")
    parser.add_argument("--table", action="store_true", help="only write preemption.md")
    parser.add_argument("--commit", default="", help="what was measured, outside a checkout")
    parser.add_argument("--work", type=Path, help="not needed: nothing else is written")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual counts")
    parser.add_argument(
        "--answers", type=int, default=10_000, help="of each long model (default 10000)"
    )
    parser.add_argument("--models", default=",".join(LONG), help="long models (default: both)")
    options = parser.parse_args(arguments)
    if options.table:
        document = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_file(PAGE, page(document).encode())
        return 0
    if options.out is None:
        parser.error("--out is missing")
    names = options.models.split(",")
    if unknown := set(names) - LONG.keys():
        parser.error(f"{', '.join(sorted(unknown))} is not one of {', '.join(LONG)}")
    began = time.monotonic()
    bed = Bed(names)
    found: dict[str, Any] = {
        "measured_on": measured_on("cuda:0", options.commit),
        "notes": bed.notes,
        "models": {},
    }
    print("\n".join(bed.notes), flush=True)
    gc.collect()
    gc.freeze()
    gc.disable()
    wrong = 0
    for name in names:
        row: dict[str, Any] = {}
        try:
            row |= measure(bed, LONG[name], options.scale)
            row["answers"] = answers(bed, LONG[name], options.answers)
            wrong += row["answers"]["wrong"]
        except Failed as error:  # the other model is measured all the same
            row["failed"] = str(error)
        found["models"][name] = row
        found["seconds"] = time.monotonic() - began
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        write_file(options.out / "preemption.json", text.encode())
        write_file(options.out / "preemption.md", page(found).encode())
        print(f"{table(found)}\n\n{answers_table(found)}", flush=True)
    print(f"{found['seconds']:.0f} s, {wrong} wrong answers", flush=True)
    bed.backend.close()
    failed = any("failed" in row for row in found["models"].values())
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
