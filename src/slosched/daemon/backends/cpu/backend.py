"""The CPU: each model in a process of its own, beside which the worker's loop has nothing slow to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.config import ModelProfile, WorkerConfig
from slosched.core.worker.interface import ModelPrepared, PrepareModel, ReleaseModel
from slosched.daemon.backends.base import BATCH_CLASSES, Frame, Plain
from slosched.daemon.backends.cpu import wire
from slosched.daemon.backends.cpu.children import Nursery
from slosched.daemon.backends.cpu.device import CpuDevice
from slosched.daemon.backends.cpu.processes import SILENT_NS, Known, Preparation, Processes
from slosched.daemon.repository.listing import Version
from slosched.errors import InvalidConfig, SloschedError
from slosched.messages import GpuInfo, Span

_GIB = 1024**3
#: Human-readable lines that wait to be shown.
_NOTES_AT_MOST = 200


class CpuBackend(Plain):
    """The CPU of this host. Waits for the imports of the process from which the models' are forked.

    Raises MissingPackage, UnknownName or InvalidConfig if the config's models cannot be offered.
    """

    exact = False
    device_name = "cpu"
    no_cupy = "its factory is for CuPy, which runs on GPUs alone"

    def __init__(
        self, config: WorkerConfig, *, clock: Clock = now_ns, silent_ns: int = SILENT_NS
    ) -> None:
        if config.gpus != 1:
            raise InvalidConfig(
                f"one process serves one real device, not {config.gpus}: start a worker for each, or "
                "let `slosched worker --device cuda` supervise one for each GPU"
            )
        cache_bytes = config.weights_cache_bytes or _default_cache_bytes()
        if cache_bytes < config.page_bytes:
            raise InvalidConfig(
                f"weights_cache_bytes {cache_bytes} holds no page of {config.page_bytes} bytes"
            )
        self._clock = clock
        self._notes: list[str] = []
        self._processes = Processes(Nursery(config, self._note), clock=clock, silent_ns=silent_ns)
        self.loadable = tuple(sorted(self._processes.nursery.names))
        self._known: dict[str, Known] = {}
        self._versions: dict[str, Version] = {}
        self._gpu = CpuDevice(self._processes, clock=clock)
        self.devices = {0: self._gpu}
        self.gpus = (
            GpuInfo(
                0,
                f"CPU, {config.torch_threads} thread(s)",
                cache_bytes // config.page_bytes,
                config.page_bytes,
            ),
        )

    def describe(self) -> str:
        gpu = self.gpus[0]
        return f"{self.device_name} ({gpu.name}), {len(self.loadable)} models, {gpu.pages} pages"

    # ------------------------------------------------------------------------- the loop's

    def offer(self, versions: Sequence[Version]) -> None:
        self._versions = {version.name: version for version in versions}
        gone = [
            name
            for name, known in self._known.items()
            if known.version and name not in self._versions and name not in self._processes.by_name
        ]
        for name in gone:
            del self._known[name]

    def _version_of(self, name: str) -> Version | None:
        """What a model of the repository is built of: as its process was, or else as it is there now."""
        version = self._versions.get(name)
        known = self._known.get(name)
        if known is None or known.version == version:
            return version
        if (
            name in self._processes.by_name
        ):  # its instances share one process, whatever the files are now
            return known.version
        del self._known[name]
        return version

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        name, begin_ns = effect.name, self._clock()
        version = self._version_of(name)
        before = known = self._known.get(name)
        loaded = name in self._processes.by_name
        if known is not None and not known.suffices(effect.max_batch, effect.max_exec_ns):
            known = None
        if known is not None and loaded:
            done(self._prepared(effect, known, begin_ns))
            return
        batches = tuple(batch for batch in BATCH_CLASSES if batch <= effect.max_batch)
        order = (
            wire.Prepare(
                name=name,
                batches=batches,
                max_exec_ns=effect.max_exec_ns,
                version=version,
                digest=before.prepared.digest if before is not None and loaded else "",
            )
            if known is None
            else known.order(name)
        )

        def ended(preparation: Preparation) -> None:
            result = preparation.result
            if result is None and known is not None and version is not None and not loaded:
                # Its files may be others than those that were measured; nothing runs of these.
                self._known.pop(name, None)
                self.prepare(effect, done=done)
                return
            if result is None:
                span = self._span(begin_ns)
                failed = ModelPrepared(
                    effect.action_id, None, span, preparation.code, preparation.reason
                )
                done(failed)
                return
            found = known or Known(result, effect.max_batch, effect.max_exec_ns, version)
            self._known[name] = found
            process = self._processes.by_name.get(name)
            if process is None:
                self._processes.serve(name, found, preparation.child)
            else:  # what is loaded stays where it is
                process.measured_anew(found)
                preparation.cancel()
            done(self._prepared(effect, found, begin_ns))

        self._processes.prepare(order, when_over=ended)

    def _prepared(self, effect: PrepareModel, known: Known, begin_ns: int) -> ModelPrepared:
        return ModelPrepared(
            effect.action_id,
            known.profile,
            self._span(begin_ns),
            random_weights=known.prepared.random_weights,
            labels=known.prepared.labels,
            digest=known.prepared.digest,
        )

    def _span(self, begin_ns: int) -> Span:
        end_ns = self._clock()
        return Span(begin_ns, end_ns, end_ns - begin_ns)

    def warm_up(self, event: ModelPrepared) -> bool:
        return True  # the process that measured the model serves it

    def release(self, effect: ReleaseModel) -> None:
        if effect.last:  # what was measured stays known: a next load needs only to build
            self._processes.end(effect.name)

    def evict(self, gpu_id: int, model_id: int) -> None:
        self._gpu.evict(model_id)

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._gpu.keep_inputs(action_id, frames)

    def drop_inputs(self, action_id: int) -> None:
        self._gpu.drop_inputs(action_id)

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        return self._gpu.take_outputs(action_id)

    def take_notes(self) -> Sequence[str]:
        notes, self._notes = self._notes, []
        return notes

    def wake_fds(self) -> Sequence[int]:
        return (self._processes.nursery.fileno(),)

    def close(self) -> None:
        self._processes.close()

    def _note(self, line: str) -> None:
        if len(self._notes) < _NOTES_AT_MOST:
            self._notes.append(line)


class CpuBench:
    """Measures the models of `config` one by one, each in a process of its own; `close` it.

    Raises what a CpuBackend raises.
    """

    no_cupy = CpuBackend.no_cupy

    def __init__(self, config: WorkerConfig) -> None:
        self._progress: Callable[[str], None] | None = None
        self._processes = Processes(Nursery(config, self._say))
        self.loadable = self._processes.nursery.names
        self._versions: dict[str, Version] = {}

    def offer(self, versions: Sequence[Version]) -> None:
        """These can be measured, too."""
        self._versions = {version.name: version for version in versions}

    def measure(
        self,
        name: str,
        batches: Sequence[int],
        *,
        max_exec_ns: int,
        progress: Callable[[str], None] | None = None,
    ) -> ModelProfile:
        """The profile of `name`, as a worker on this CPU would measure it.

        `progress` gets a line for each batch size, and what the model prints. Raises InvalidConfig for a
        model that does not run, SloschedError for one whose process ends or hangs.
        """
        self._progress = progress
        version = self._versions.get(name)
        order = wire.Prepare(name, tuple(batches), max_exec_ns, version=version)
        preparation = self._processes.prepare(order, note=progress)
        try:
            while not preparation.over:
                self._processes.nursery.wait(1.0)
                self._processes.step()
        finally:
            preparation.cancel()
        if preparation.result is None:
            refused = preparation.code == Code.INVALID_MODEL_PATH
            raise (InvalidConfig if refused else SloschedError)(preparation.reason)
        return preparation.result.profile

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress(line)

    def close(self) -> None:
        self._processes.close()


def _default_cache_bytes() -> int:
    """A quarter of the free memory, at most 8 GiB."""
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(8 * _GIB, max(_GIB // 4, free_bytes // 4))
