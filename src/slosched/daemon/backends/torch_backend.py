"""Real inference with torch on the CPU, by plain execution.

Everything slow happens in one preparation thread: building a model, flattening its weights, measuring
it. Torch's operators let the interpreter go, so the loop's heartbeat goes on beside it; the libraries'
imports do not, which is why they come before the worker is ready.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

from slosched.clock import now_ns
from slosched.config import ModelProfile, WorkerConfig
from slosched.core.worker.interface import ModelPrepared, PrepareModel, ReleaseModel
from slosched.daemon.backends.base import Frame, Plain, preparation_failed
from slosched.errors import InvalidConfig, MissingPackage
from slosched.messages import GpuInfo, Span

try:
    import torch
except ImportError as error:
    raise MissingPackage(
        f"this device needs torch ({error}): pip install 'slosched[torch,models]', or take --device emulated"
    ) from None

from slosched.daemon.backends.measure import measure_model
from slosched.daemon.backends.sources import open_specs
from slosched.daemon.backends.templates import Template
from slosched.daemon.backends.torch_device import TorchDevice
from slosched.daemon.backends.zoo import BATCH_CLASSES

_GIB = 1024**3


def resolve_device(name: str) -> torch.device:
    """The torch device for auto, cpu, cuda or cuda:N. Raises InvalidConfig if it is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    index = name.partition(":")[2] or "0"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not index.isdigit():
        raise InvalidConfig(
            f"unknown device {name!r}; write auto, cpu, cuda:N (as cuda:0) or emulated"
        )
    if int(index) >= count:
        raise InvalidConfig(
            f"there is no {name}: torch {torch.__version__} sees {count} CUDA GPU(s) here; take "
            "--device cpu or --device emulated"
        )
    return torch.device("cuda", int(index))


class TorchBackend(Plain):
    """The CPU. Raises MissingPackage or InvalidConfig if it cannot be opened."""

    exact = False

    def __init__(self, config: WorkerConfig) -> None:
        if config.gpus != 1:
            raise InvalidConfig(
                f"one process serves one real device, not {config.gpus}: start a worker for each, or "
                "let `slosched worker --device cuda` supervise one for each GPU"
            )
        self.device_name = "cpu"
        self._threads = config.torch_threads
        torch.set_num_threads(self._threads)
        self._specs = open_specs(config)
        self.loadable = tuple(sorted(self._specs))
        self._templates: dict[str, Template] = {}
        self._profiles: dict[str, tuple[ModelProfile, int, int]] = {}  # with max batch, max exec
        self._own_state: dict[str, tuple[str, ...]] = {}
        self._gpu = TorchDevice(self._templates)
        self.devices = {0: self._gpu}
        cache_bytes = config.weights_cache_bytes or self._default_cache_bytes()
        if cache_bytes < config.page_bytes:
            raise InvalidConfig(
                f"weights_cache_bytes {cache_bytes} holds no page of {config.page_bytes} bytes"
            )
        self.gpus = (
            GpuInfo(
                0,
                f"CPU, {self._threads} thread(s)",
                cache_bytes // config.page_bytes,
                config.page_bytes,
            ),
        )
        self._orders: SimpleQueue[tuple[PrepareModel, Callable[[ModelPrepared], None]] | None] = (
            SimpleQueue()
        )
        self._ordered: dict[int, str] = {}  # what `prepare` was called for, until it is warmed up
        self._warming: Iterator[None] = iter(())
        self._thread = threading.Thread(target=self._work, name="slosched-prepare", daemon=True)
        self._thread.start()

    def describe(self) -> str:
        gpu = self.gpus[0]
        return f"{self.device_name} ({gpu.name}), {len(self.loadable)} models, {gpu.pages} pages"

    # ------------------------------------------------------------------------- the loop's

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        self._ordered[effect.action_id] = effect.name
        self._orders.put((effect, done))

    def warm_up(self, event: ModelPrepared) -> bool:
        # What the preparation thread has run is new to the loop's: libraries keep plans per thread.
        name = self._ordered.pop(event.action_id, "")
        if event.profile is None:
            return True
        if name and name in self._templates:
            self._warming = self._gpu.warm_up(name)
        try:
            next(self._warming)
        except (
            StopIteration,
            RuntimeError,
        ):  # what fails here fails again, and is reported, in an op
            return True
        return False

    def release(self, effect: ReleaseModel) -> None:
        if effect.last:  # what was measured stays known: a next load needs only to build
            self._templates.pop(effect.name, None)

    def evict(self, gpu_id: int, model_id: int) -> None:
        self._gpu.evict(model_id)

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._gpu.keep_inputs(action_id, frames)

    def drop_inputs(self, action_id: int) -> None:
        self._gpu.drop_inputs(action_id)

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        return self._gpu.take_outputs(action_id)

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join(1.0)  # a measurement may run on; the thread is a daemon and ends with us

    # ------------------------------------------------------------------------ preparation

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps this per thread
        while (order := self._orders.get()) is not None:
            effect, done = order
            begin_ns = now_ns()
            try:
                profile = self._prepare(effect)
                spec = self._specs[effect.name]
                end_ns = now_ns()
                event = ModelPrepared(
                    effect.action_id,
                    profile,
                    Span(begin_ns, end_ns, end_ns - begin_ns),
                    random_weights=spec.random_weights,
                    labels=spec.labels + self._labels(effect.name),
                )
            except (
                BaseException
            ) as error:  # the operator's code may raise anything; no signal comes here
                code, reason = preparation_failed(error)
                end_ns = now_ns()
                event = ModelPrepared(
                    effect.action_id,
                    None,
                    Span(begin_ns, end_ns, end_ns - begin_ns),
                    code=code,
                    reason=reason,
                )
            done(event)

    def _labels(self, name: str) -> tuple[str, ...]:
        template = self._templates.get(name)
        own = template is not None and template.own_state
        return ("own state restored after each run",) if own else ()

    def _prepare(self, effect: PrepareModel) -> ModelProfile:
        name = effect.name
        wanted = (effect.max_batch, effect.max_exec_ns)
        profile, *known = self._profiles.get(name, (None, 0, 0))
        enough = profile is not None and wanted[0] <= known[0] and wanted[1] <= known[1]
        template = self._templates.get(name)
        if profile is not None and enough:
            if template is None:
                template = Template(self._specs[name])
                template.batch_sizes = tuple(profile.exec_ns)
                template.own_state = self._own_state.get(name, ())
                self._templates[name] = template
            return profile
        template = Template(self._specs[name])
        batches = [batch for batch in BATCH_CLASSES if batch <= effect.max_batch]
        profile = measure_model(template, batches, max_exec_ns=effect.max_exec_ns)
        self._profiles[name] = (profile, *wanted)
        self._own_state[name] = template.own_state
        self._templates[name] = template  # copies on the device keep the one they were loaded with
        return profile

    # -------------------------------------------------------------------------- the device

    def _default_cache_bytes(self) -> int:
        """A quarter of the free memory, at most 8 GiB."""
        free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(8 * _GIB, max(_GIB // 4, free_bytes // 4))
