"""The stage of a CUDA GPU (stage.py): torch models on streams of their own."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from slosched.clock import now_ns
from slosched.daemon.backends.checking import refuse_texts
from slosched.daemon.backends.cuda.background import AtOnce
from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.choice import Aim
from slosched.daemon.backends.cuda.cutting import Cutter
from slosched.daemon.backends.cuda.device import CudaDevice
from slosched.daemon.backends.cuda.driver import Block, OutOfDeviceMemory, Stream
from slosched.daemon.backends.cuda.exec_lane import ExecLane
from slosched.daemon.backends.cuda.preemption import Preemption
from slosched.daemon.backends.cuda.preparing import Bench, HostImages, Preempting, Source
from slosched.daemon.backends.cuda.program import Class, Program
from slosched.daemon.backends.cuda.segments import Gate
from slosched.daemon.backends.cuda.torch_program import TorchProgram, TorchStreams
from slosched.daemon.backends.graphs.levels import LeveledExecLane, levels_of
from slosched.daemon.backends.graphs.models import job_spec
from slosched.daemon.backends.graphs.stage import (
    PAGE_BYTES,
    Made,
    Stage,
    cut_notes,
    is_cut,
    program_name,
    wish_of,
)
from slosched.daemon.backends.templates import Template
from slosched.daemon.blackbox import NoBlackbox
from slosched.errors import InvalidConfig
from slosched.share_spec import Job

#: Priorities of streams: the lowest level's, and the highest that there is (an H200 has 0 to -5).
_PRIORITY, _HIGHEST = -2, -5
#: No class is too long here.
_ANY_EXEC_NS = 2**62


class CudaStage:
    """GPU `device` ("cuda:0") for `jobs`, which interrupt each other if `preempt`.

    With `preempt` each job has a stream of its own, otherwise they share one. All streams have
    `stream_priority` (CUDA's numbers: below 0 goes first), if it is given. Raises InvalidConfig, MissingPackage
    or DeviceFault.
    """

    clock = staticmethod(now_ns)

    def __init__(
        self,
        device: str,
        jobs: Mapping[int, Job],
        preempt: bool,
        stream_priority: int | None,
        *,
        by_deadline: bool = False,
    ) -> None:
        self._by_deadline = by_deadline
        self._jobs, self._levels = jobs, levels_of(jobs)
        self._preempt = preempt and len(jobs) > 1
        self._torch_device = _device(device)
        torch.cuda.set_device(self._torch_device)
        self._driver = CudaDriver(self._torch_device.index or 0)
        self._background = AtOnce()
        self._gate = Gate(now_ns)
        self._exec_streams: dict[int, Stream] = {}
        self._streams: dict[int, TorchStreams] = {}
        shared: TorchStreams | None = None
        for number, level in self._levels.items():
            priority = max(_HIGHEST, _PRIORITY - level)
            if stream_priority is not None:
                priority = stream_priority
            if shared is None or self._preempt:
                run, capture = self._driver.stream(priority), self._driver.stream(priority)
                shared = TorchStreams(self._driver, self._torch_device, run, capture)
                shared.make_disturbance()
            self._exec_streams[number], self._streams[number] = run, shared
        self._images = HostImages(self._driver)
        self._templates: dict[int, Template] = {}
        self._programs: dict[str, Program] = {}
        self._made: dict[int, Made] = {}
        self._peaks: dict[int, tuple[int, int]] = {}
        self._cache: Block | None = None
        self._device: CudaDevice | None = None

    @property
    def device(self) -> CudaDevice:
        assert self._device is not None, "allocate() comes first"
        return self._device

    # ----------------------------------------------------------------------------- preparation

    def build(self, number: int, job: Job) -> None:
        spec = job_spec(job)
        refuse_texts(spec)
        self._templates[number] = Template(spec)

    def allocate(self) -> None:
        pages = sum(self._pages(number) for number in self._templates)
        self._cache = self._driver.device_block(pages * PAGE_BYTES)
        self._device = CudaDevice(
            self._driver,
            self._programs,
            self._images.images,
            cache=self._cache,
            page_bytes=PAGE_BYTES,
            stream=next(iter(self._exec_streams.values())),
            stay_bytes=0,  # each model has one instance, so its weights are copied once
            lane=self._lane(),
        )

    def _lane(self) -> ExecLane:
        streams = {
            program_name(number, self._jobs[number]): stream
            for number, stream in self._exec_streams.items()
        }
        if self._preempt:
            return LeveledExecLane(self._driver, now_ns, streams=streams, gate=self._gate)
        first = next(iter(streams.values()))
        return ExecLane(self._driver, first, now_ns, lambda: 0, NoBlackbox())

    def _pages(self, number: int) -> int:
        return max(1, -(-self._templates[number].weights_bytes // PAGE_BYTES))

    def prepare(self, number: int) -> Made:
        # A model that could not be prepared left memory in torch's caches, and the driver needs some too.
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        try:
            made = self._prepared(number)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfDeviceMemory(str(error).partition("\n")[0]) from None
        finally:
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self._peaks[number] = peaks[0] - before[0], peaks[1] - before[1]
            torch.cuda.empty_cache()
        self._made[number] = made
        self._programs[made.name] = made.program
        self.device.instances[made.name] = 1
        return made

    def _prepared(self, number: int) -> Made:
        job, template = self._jobs[number], self._templates[number]
        assert self._cache is not None
        name, of = program_name(number, job), Class(job.batch)
        program = TorchProgram(template, self._streams[number], self._cache)
        lines: list[str] = []
        highest = max(self._levels.values())
        cuts = self._preempt and is_cut(
            job, self._levels[number], highest, by_deadline=self._by_deadline
        )
        try:
            weights = template.host.numpy()
            self._images.provide(name, weights, 1)
            source = Source(
                program=program,
                weights=weights,
                model=template.spec,
                random_weights=template.spec.random_weights,
                labels=template.spec.labels,
                wish=wish_of(job),
            )
            self._bench(number, cuts=cuts).profile(
                source,
                self._images.images[name][0],
                [job.batch],
                max_exec_ns=_ANY_EXEC_NS,
                note=lines.append,
            )
            _refuse(program, of, job, lines)
        except BaseException:
            with suppress(Exception):
                self._images.forget(name)
                program.release()
            raise
        for other in program.classes:
            if other != of:
                program.drop_class(other)
        held = self._pages(number) * PAGE_BYTES
        held += sum(each.row_in + each.row_out for each in program.sets(of)) * job.batch
        notes = ["random weights"] * template.spec.random_weights
        made = Made(name, program, of, [*notes, "CUDA graphs"], held)
        cut_notes(made, job, wanted=cuts, lines=lines)
        return made

    def _bench(self, number: int, *, cuts: bool) -> Bench:
        driver, background, stream = self._driver, self._background, self._exec_streams[number]
        preemption: Preempting | None = None
        if cuts:
            cutter = Cutter(driver, background, stream, self._gate, Aim())
            preemption = Preemption(driver, cutter, Bench(driver, background, stream))
        return Bench(driver, background, stream, preemption=preemption, gate=self._gate)

    def enter(self) -> None:
        self._driver.use_in_this_thread()

    def loaded(self, number: int) -> None:
        self._images.forget(program_name(number, self._jobs[number]))
        # What is left of the template is its code: for the weights it has views of those on the device.
        self._templates[number].host = torch.zeros(1, dtype=torch.uint8)
        gc.collect()

    # ----------------------------------------------------------------------------- afterwards

    def memory(self, number: int) -> tuple[int, int]:
        allocated, reserved = self._peaks.get(number, (0, 0))
        made = self._made.get(number)
        held = made.held_bytes if made is not None else 0
        return allocated + held, reserved + held

    def close(self) -> None:
        if self._device is not None and not self._device.lost:
            with suppress(Exception):
                torch.cuda.synchronize()
                for made in self._made.values():
                    made.program.release()
                if self._cache is not None:
                    self._driver.free(self._cache)
        self._cache = None
        self._made.clear()
        self._programs.clear()
        self._templates.clear()
        gc.collect()
        with suppress(Exception):
            torch.cuda.empty_cache()


def _device(name: str) -> torch.device:
    found: Any = None
    with suppress(RuntimeError):
        found = torch.device(name)
    if found is None or found.type != "cuda":
        raise InvalidConfig(
            f"graphs need a CUDA device (cuda:0), not {name!r}: run eager models there"
        )
    if not torch.cuda.is_available():
        raise InvalidConfig(f"there is no CUDA GPU for {name}: run eager models on the CPU")
    device: torch.device = found
    if (device.index or 0) >= torch.cuda.device_count():
        raise InvalidConfig(f"there is no {name}: this host has {torch.cuda.device_count()} GPU(s)")
    return device


def _refuse(program: TorchProgram, of: Class, job: Job, lines: list[str]) -> None:
    """Raises InvalidConfig if the class does not run as a graph, OutOfDeviceMemory if it does not fit."""
    if program.not_captured:
        raise InvalidConfig(
            f"{job.model} cannot run as CUDA graphs ({program.not_captured}); set run = eager for it"
        )
    if of not in program.classes:
        why = [line for line in (*lines, *program.left_out) if str(of) in line]
        reason = why[-1] if why else f"{job.model} does not run at batch {job.batch}"
        memory = "OutOfDeviceMemory" in reason or "out of memory" in reason
        raise (OutOfDeviceMemory if memory else InvalidConfig)(reason)


def open_stage(
    device: str,
    jobs: Mapping[int, Job],
    preempt: bool,
    stream_priority: int | None,
    *,
    by_deadline: bool = False,
) -> Stage:
    """The stage of a real GPU. Raises as CudaStage does."""
    return CudaStage(device, jobs, preempt, stream_priority, by_deadline=by_deadline)
