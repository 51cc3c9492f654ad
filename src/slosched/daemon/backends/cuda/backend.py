"""One CUDA GPU as the worker's backend: torch and CuPy models, graphs, a weights cache in pages.

Two Python threads, of which one runs at a time: the loop's, and the background thread in slices
(background.py). Everything that the loop calls returns within microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from slosched.clock import now_ns
from slosched.config import ModelProfile, WorkerConfig
from slosched.core.worker.interface import ModelPrepared, PrepareModel, ReleaseModel
from slosched.daemon.backends.base import BATCH_CLASSES, Frame, preparation_failed
from slosched.daemon.backends.cuda.background import HANDOVER_NS, LEAST_NS, SLICE_NS, Background
from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.choice import Aim
from slosched.daemon.backends.cuda.cutting import Cutter
from slosched.daemon.backends.cuda.device import CudaDevice
from slosched.daemon.backends.cuda.driver import DeviceFault, OutOfDeviceMemory, Stream
from slosched.daemon.backends.cuda.models import Models
from slosched.daemon.backends.cuda.preemption import Preemption, boundaries_ns, urgent_ns
from slosched.daemon.backends.cuda.preparing import Bench, HostImages, Preparable, Source
from slosched.daemon.backends.cuda.segments import Gate
from slosched.daemon.backends.cuda.torch_program import TorchStreams
from slosched.daemon.backends.nvml import Nvml
from slosched.daemon.blackbox import NoBlackbox
from slosched.daemon.repository.listing import Version
from slosched.errors import InvalidConfig
from slosched.messages import GpuInfo, GpuStats, Span
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

#: The priorities of what runs: an exec goes before whatever is prepared or copied beside it.
_EXEC_PRIORITY = -2
#: And an urgent run before what is left of the run that it interrupts.
_URGENT_PRIORITY = -5
#: Closer than this to a start or an end the loop begins no turn, which may take as long (a message is
#: 60 to 100 us), but spins until it has come: this is the longest time it spins.
_TURN_NS = 200 * NS_PER_US
_OVERDUE_NS = 100 * NS_PER_US
#: Nor, within a turn, the next piece of it: a message, a result.
_PIECE_NS = 100 * NS_PER_US
#: While copies want to be looked after too.
_SPIN_COPYING_NS = 30 * NS_PER_US
#: Closer than this to a start the loop does not sleep.
_AWAKE_NS = 400 * NS_PER_US
#: How often the driver is asked for utilisation, memory, power and energy.
_SAMPLE_EVERY_NS = NS_PER_S
#: The background thread gets a slice at least so often, whatever the load.
_STARVED_NS = 20 * NS_PER_MS


class CudaBackend:
    """GPU `device` (cuda:N). Raises MissingPackage, InvalidConfig or DeviceFault if it cannot be opened."""

    exact = False
    spins = True

    def __init__(
        self, config: WorkerConfig, device: torch.device, blackbox: NoBlackbox | None = None
    ) -> None:
        self._blackbox = blackbox or NoBlackbox()
        if config.gpus != 1:
            raise InvalidConfig(
                f"one process serves one real device, not {config.gpus}: start a worker for each, or "
                "let `slosched worker --device cuda` supervise one for each GPU"
            )
        self._torch_device = device
        self.device_name = str(device)
        torch.cuda.set_device(device)
        self._driver = CudaDriver(device.index or 0)
        exec_stream = self._exec_stream = self._driver.stream(_EXEC_PRIORITY)
        capture = self._driver.stream(_EXEC_PRIORITY)
        self._streams = TorchStreams(self._driver, device, exec_stream, capture)
        self._streams.make_disturbance()
        urgent_stream = self._driver.stream(_URGENT_PRIORITY) if config.preempt else None
        self._urgent_streams = self._make_urgent(urgent_stream)
        gate = Gate(now_ns)
        self._models = Models(config, self._driver, self._streams, self._urgent_streams)
        self.loadable = self._models.loadable
        self.no_cupy = self._models.no_cupy
        self._programs: dict[str, Preparable] = {}
        self._made: dict[str, Preparable] = {}  # prepared, and not yet the loop's
        self._retired: list[Preparable] = []  # replaced, perhaps while something of them was armed
        self._images = HostImages(
            self._driver, limit_bytes=config.host_cache_bytes, per_model=config.host_images
        )
        cache_bytes = config.weights_cache_bytes or self._driver.free_bytes() * 4 // 5
        pages = cache_bytes // config.page_bytes
        if not pages:
            raise InvalidConfig(
                f"weights_cache_bytes {cache_bytes} holds no page of {config.page_bytes} bytes"
            )
        self.gpus = (GpuInfo(0, torch.cuda.get_device_name(device), pages, config.page_bytes),)
        self._cache = self._driver.device_block(pages * config.page_bytes)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._nvml = Nvml(uuid=uuid)
        self._stats: tuple[GpuStats, ...] = ()
        self._sample_due_ns = 0
        self._sampling = False
        self._fault = ""  # what ended the context in preparation
        self._gpu = CudaDevice(
            self._driver,
            self._programs,
            self._images.images,
            cache=self._cache,
            page_bytes=config.page_bytes,
            stream=exec_stream,
            read_clock_mhz=self._nvml.clock_mhz,
            blackbox=self._blackbox,
            urgent_stream=urgent_stream,
            gate=gate,
        )
        self.devices = {0: self._gpu}
        self._notes: list[str] = []
        self._background = Background(enter=self._enter, report=self._notes.append)
        self._bench = self._make_bench(
            urgent_stream, gate, Aim(config.urgent_share, config.urgent_slo_ns)
        )
        self._profiles: dict[str, tuple[ModelProfile, int, int]] = {}  # with max batch, max exec
        self._sources: dict[str, Source] = {}
        self._ordered: dict[int, PrepareModel] = {}  # until it is warmed up
        self._warming: Iterator[None] | None = None
        self._ids: dict[str, set[int]] = {}
        self._sliced_ns = 0
        self._never_sleeps = config.busy_poll

    def _make_urgent(self, stream: Stream | None) -> TorchStreams | None:
        """Torch's streams of what interrupts others, with a graph pool of their own."""
        if stream is None:
            return None
        capture = self._driver.stream(_URGENT_PRIORITY)
        streams = TorchStreams(self._driver, self._torch_device, stream, capture)
        streams.make_disturbance()
        return streams

    def _make_bench(self, urgent_stream: Stream | None, gate: Gate, aim: Aim) -> Bench:
        driver, background, stream = self._driver, self._background, self._exec_stream
        if urgent_stream is None:
            return Bench(driver, background, stream)
        cutter = Cutter(driver, background, stream, gate, aim)
        twins = Bench(driver, background, urgent_stream)
        preemption = Preemption(driver, cutter, twins)
        return Bench(driver, background, stream, preemption=preemption, gate=gate)

    def _enter(self) -> None:
        self._driver.use_in_this_thread()
        self._streams.enter()

    def describe(self) -> str:
        gpu = self.gpus[0]
        return f"{self.device_name} ({gpu.name}), {len(self.loadable)} models, {gpu.pages} pages"

    @property
    def lost(self) -> str:
        """Why the device can do nothing any more; empty while it can."""
        return self._gpu.lost or self._fault or self._nvml.lost

    def gpu_stats(self) -> tuple[GpuStats, ...]:
        return self._stats

    def _sample(self) -> None:
        self._stats = (self._nvml.sample(),)
        self._sampling = False

    # ------------------------------------------------------------------------- the loop's

    def pass_time(self, due_ns: int | None) -> bool:
        """Use the time until `due_ns`: for the background thread, or spinning. False: the loop may sleep."""
        gpu, background = self._gpu, self._background
        now = now_ns()
        if now >= self._sample_due_ns and not self._sampling and not self._nvml.problem:
            # In the background: asking for the energy takes 2.5 to 15 ms (H200).
            self._sample_due_ns = now + _SAMPLE_EVERY_NS
            self._sampling = True  # one at a time: a model in preparation is in front of it
            background.submit(self._sample)
        spare_ns = gpu.spare_ns()
        if due_ns is not None and due_ns > now:
            spare_ns = min(spare_ns, due_ns - now)
        if background.pending:
            needs_ns = background.needs_idle_ns
            if needs_ns and gpu.idle and spare_ns >= needs_ns:
                background.is_idle()
            budget_ns = min(SLICE_NS, spare_ns - HANDOVER_NS)
            if now - self._sliced_ns > _STARVED_NS:
                budget_ns = max(budget_ns, LEAST_NS)
            if budget_ns >= LEAST_NS:
                background.slice(budget_ns)
                self._sliced_ns = now_ns()
                return True
        if spare_ns < _TURN_NS:
            for_ns = max(spare_ns, 0) + _OVERDUE_NS
            gpu.spin(now + (min(for_ns, _SPIN_COPYING_NS) if gpu.copying else for_ns))
            return True
        awake = gpu.running or gpu.copying or spare_ns < _AWAKE_NS
        return self._never_sleeps or awake or background.pending

    def wake_fds(self) -> Sequence[int]:
        return ()  # a GPU is polled

    def glance(self) -> None:
        """Before the next piece of the loop's work: what is due within it comes first."""
        spare_ns = self._gpu.spare_ns()
        if spare_ns < _PIECE_NS:
            self._gpu.spin(now_ns() + max(spare_ns, 0) + _OVERDUE_NS // 2)

    def offer(self, versions: Sequence[Version]) -> None:
        self._models.versions = {version.name: version for version in versions}

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        self._ordered[effect.action_id] = effect
        self._background.submit(partial(self._prepare, effect, done))

    def warm_up(self, event: ModelPrepared) -> bool:
        effect = self._ordered.get(event.action_id)
        if effect is None or event.profile is None:
            self._ordered.pop(event.action_id, None)
            return True
        if self._warming is None:
            self._warming = self._warm_up(effect.name)
        try:
            next(self._warming)
            return False
        except StopIteration:
            pass
        except Exception as error:  # a model may raise anything; it will again, in an op
            if not isinstance(error, DeviceFault):
                self._blackbox.launching(0)
            self._notes.append(f"{effect.name} failed in its first run: {error!r}")
        self._warming = None
        del self._ordered[event.action_id]
        self.adopt(effect.name)
        ids = self._ids.setdefault(effect.name, set())
        ids.update(range(effect.model_id, effect.model_id + effect.copies))
        self._gpu.instances[effect.name] = len(ids)
        return True

    def adopt(self, name: str) -> None:
        """From now on `name` runs by the program that was prepared last. In the loop's thread."""
        program = self._made.pop(name, None)
        if program is not None:
            replaced = self._programs.get(name)
            if replaced is not None:
                self._retired.append(replaced)
            self._programs[name] = program
            self._gpu.overwritten(name)

    def _warm_up(self, name: str) -> Iterator[None]:
        """Run what was not captured once in the loop's thread: cuDNN keeps its plans per thread."""
        program = self._made.get(name)
        if program is None:
            return
        for each in program.classes:
            if not program.captured(each):
                buffers = program.sets(each)[0]
                program.aim(buffers, ())
                self._blackbox.launching(self._blackbox.index(name))
                program.launch(buffers, self._exec_stream)
                self._blackbox.launching(0)
                yield

    def release(self, effect: ReleaseModel) -> None:
        # The program stays, for the next controller's sake, until its memory is needed.
        ids = self._ids.get(effect.name, set())
        ids.discard(effect.model_id)
        self._gpu.instances[effect.name] = len(ids)

    def evict(self, gpu_id: int, model_id: int) -> None:
        self._gpu.evict(model_id)

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._gpu.keep_inputs(action_id, frames)

    def drop_inputs(self, action_id: int) -> None:
        self._gpu.drop_inputs(action_id)

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        return self._gpu.take_outputs(action_id)

    def take_notes(self) -> list[str]:
        """Human-readable lines since the last call."""
        notes = self._notes[:]
        del self._notes[: len(notes)]
        return notes

    def close(self) -> None:
        self._background.close()
        self._nvml.close()

    # ------------------------------------------------------------------------ preparation

    def _prepare(self, effect: PrepareModel, done: Callable[[ModelPrepared], None]) -> None:
        begin_ns = now_ns()
        profile: ModelProfile | None = None
        code, reason = 0, ""
        self._blackbox.preparing(effect.name)
        try:
            try:
                profile = self._made_ready(effect)
            except (OutOfDeviceMemory, torch.cuda.OutOfMemoryError):
                if not self.forget_unused():
                    raise
                profile = self._made_ready(effect)
        except (Exception, SystemExit) as error:  # the operator's code may raise anything
            code, reason = preparation_failed(error)
            if isinstance(error, DeviceFault):
                self._fault = reason
        if not self._fault:  # after one the slots say what ran
            self._blackbox.preparing("")
        end_ns = now_ns()
        source = self._sources.get(effect.name)
        known = (source.program, profile) if source is not None and profile is not None else None
        done(
            ModelPrepared(
                effect.action_id,
                profile,
                Span(begin_ns, end_ns, end_ns - begin_ns),
                code=code,
                reason=reason,
                random_weights=source is None or source.random_weights,
                labels=source.labels if source is not None else (),
                boundaries_ns={} if known is None else boundaries_ns(*known),
                urgent_ns=0 if known is None else urgent_ns(*known),
                digest=self._models.digests.get(effect.name, ""),
            )
        )

    def _made_ready(self, effect: PrepareModel) -> ModelProfile:
        name = effect.name
        if self._models.changed(name):
            self._forget_if_unused(name)
        profile, *known = self._profiles.get(name, (None, 0, 0))
        if profile is not None and effect.max_batch <= known[0] and effect.max_exec_ns <= known[1]:
            copies = len(self._ids.get(name, ())) + effect.copies
            self._images.provide(name, None, copies)
            return profile
        batches = [batch for batch in BATCH_CLASSES if batch <= effect.max_batch]
        return self.measure(
            name,
            batches,
            max_exec_ns=effect.max_exec_ns,
            copies=effect.copies,
            max_batch=effect.max_batch,
        )

    def measure(
        self,
        name: str,
        batches: Sequence[int],
        *,
        max_exec_ns: int,
        copies: int = 1,
        max_batch: int = 0,
        note: Callable[[str], None] | None = None,
    ) -> ModelProfile:
        """Build `name` and measure it; `adopt` makes it run. In the background thread."""
        source = self._models.build(name, self._cache)
        images = self._images
        if name not in images.images:
            images.provide(name, source.weights, copies)
        elif images.images[name][0].nbytes != len(source.weights):
            source.program.release()
            raise InvalidConfig(
                f"model {name!r} has {len(source.weights)} bytes of weights now, and had "
                f"{images.images[name][0].nbytes} when it was loaded first; restart the worker"
            )
        try:
            profile = self._bench.profile(
                source,
                images.images[name][0],
                batches,
                max_exec_ns=max_exec_ns,
                note=note or _ignore,
            )
        except BaseException:
            if name not in self._programs:
                images.forget(name)
            if not self._gpu.lost:
                source.program.release()
            raise
        program = source.program
        if program.not_captured:
            self._notes.append(
                f"{name} runs by plain execution, not as a CUDA graph: {program.not_captured}"
            )
        if program.changed:
            self._notes.append(
                f"{name} changes {', '.join(program.changed[:3])} when it runs: each run starts from the "
                "values that were loaded"
            )
        self._sources[name] = Source(
            program=program,
            weights=source.weights[:0],
            model=source.model,
            random_weights=source.random_weights,
            labels=(*source.labels, *_labels(program)),
        )
        self._profiles[name] = (profile, max_batch, max_exec_ns)
        self._made[name] = program
        return profile

    def in_background(self, job: Callable[[], None], timeout_s: float) -> bool:
        """Run `job` there while nothing is served (for measuring). False if it did not end in time."""
        ended: list[bool] = []

        def whole() -> None:
            try:
                job()
            finally:
                ended.append(True)

        self._background.submit(whole)
        give_up_ns = now_ns() + round(timeout_s * 1e9)
        while not ended and now_ns() < give_up_ns:
            self._background.is_idle()
            self._background.slice(50 * SLICE_NS)
        return bool(ended)

    def forget_unused(self) -> bool:
        """Forget the programs that have no instance. True if there were any."""
        retired = [each for each in self._retired if not self._gpu.uses(each)]
        self._retired = [each for each in self._retired if each not in retired]
        for program in retired:
            program.release()
        gone = [name for name in self._programs if not self._ids.get(name)]
        for name in gone:
            self._forget(name)
        if gone or retired:
            torch.cuda.empty_cache()
        return bool(gone or retired)

    def _forget(self, name: str) -> None:
        self._programs.pop(name).release()
        self._sources.pop(name, None)
        self._profiles.pop(name, None)
        self._models.forget(name)
        self._images.forget(name)

    def _forget_if_unused(self, name: str) -> None:
        """Forget a version of the repository whose files are others now, so that the new ones are built."""
        if self._ids.get(name):
            return
        if name in self._programs:
            self._forget(name)
        else:  # it could not be built
            self._models.forget(name)


def _labels(program: Preparable) -> tuple[str, ...]:
    """What status says of how a model runs, where it is not as usual."""
    plain = ("plain execution",) if program.not_captured else ()
    restored = ("own state restored before each run",) if program.changed else ()
    preemption = (program.preemption,) if program.preemption else ()
    return (*plain, *restored, *preemption, *program.left_out)


def _ignore(line: str) -> None:
    pass
