"""A backend that runs functions beside the models of another one."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from slosched import errors
from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.config import ModelProfile, WorkerConfig
from slosched.core.worker.interface import Device, ModelPrepared, Op, PrepareModel, ReleaseModel
from slosched.daemon.backends.base import Backend, Frame
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.children import Watch
from slosched.daemon.backends.functions import wire
from slosched.daemon.backends.functions.demand import spares_of
from slosched.daemon.backends.functions.devices import GpuWithFunctions, HostDevice
from slosched.daemon.backends.functions.loaded import LoadedFunction, Root
from slosched.daemon.backends.functions.runner import Runner
from slosched.errors import InvalidConfig, OutOfResources, SloschedError
from slosched.functions.state.state import State
from slosched.messages import HOST_PARTS, GpuInfo, GpuStats, Span
from slosched.units import NS_PER_S

#: Importing the modules of all functions.
_FIND_WITHIN_NS = 300 * NS_PER_S
_NOTES_AT_MOST = 200
#: Files that the worker has open beside those of unfinished calls: sockets, and processes that wait for calls.
_FILES = 768


class FunctionsBackend:
    """Runs the functions of `config` on this host's slots and on the GPUs of `inner`, which runs models.

    Waits until the modules of the functions were imported, in a process of their own. Raises what that raises:
    InvalidConfig and its kinds.
    """

    def __init__(self, inner: Backend, config: WorkerConfig, *, clock: Clock = now_ns) -> None:
        self.inner, self._config, self._clock = inner, config, clock
        self._slots = config.slots or len(os.sched_getaffinity(0))
        _allow_files(config.most_calls + _FILES)
        self._notes: list[str] = []
        self._folder = str(Path.cwd())
        self._watch = Watch()
        self._namespace = config.namespace
        if config.state and not config.namespace:
            self._namespace = f"worker-{os.getpid()}-{os.urandom(4).hex()}"
        own = "" if config.namespace else self._namespace
        self._root = Root(self._watch, self._note, state=config.state, namespace=own)
        self._state: State | None = None
        try:
            self._listed = self._find()
            self._check_names()
            if config.state:
                self._state = State(self._namespace, config.state, own=bool(own))
        except BaseException:
            self._root.close()
            self._watch.close()
            raise
        self._runner = Runner(
            self._root,
            self._watch,
            clock=clock,
            announce=self._note,
            shared_at_most_bytes=_host_bytes() // 2,
        )
        self.calls = self._runner
        self.functions: tuple[str, ...] = tuple(sorted(self._listed))
        self.loadable = tuple(sorted({*inner.loadable, *self.functions}))
        self._known: dict[str, ModelPrepared] = {}
        self._host = max(inner.devices, default=-1) + 1
        self.gpus = (*inner.gpus, self._host_info())
        self._gpus: list[GpuWithFunctions] = []
        self.devices: Mapping[int, Device] = self._open_devices()
        self._runner.over = self._over

    def _open_devices(self) -> dict[int, Device]:
        devices = dict(self.inner.devices)
        on_gpus = {name for name, listed in self._listed.items() if listed.info.gpu}
        if on_gpus:
            for gpu_id, device in devices.items():
                gpu = GpuWithFunctions(device, self._runner, self._make, on_gpus, self._clock)
                devices[gpu_id] = gpu
                self._gpus.append(gpu)
        devices[self._host] = HostDevice(
            self._runner, self._make, exact=self.inner.exact, clock=self._clock
        )
        return devices

    def _host_info(self) -> GpuInfo:
        memory_bytes = _host_bytes() // 2
        page_bytes = self._config.page_bytes
        pages = max(len(self.functions), memory_bytes // page_bytes)
        name = f"host, {self._slots} slot(s)"
        return GpuInfo(self._host, name, pages, page_bytes, slots=self._slots, host=True)

    # ----------------------------------------------------------------------------- opening

    def _find(self) -> dict[str, wire.Listed]:
        """What the specs of the config offer."""
        child = self._root.spawn("functions")
        child.send(packets.encode(wire.Find(self._config.functions, self._folder)))
        found: dict[str, wire.Listed] = {}
        give_up_ns = self._clock() + _FIND_WITHIN_NS
        while True:
            while child.inbox:
                message = wire.from_loader.decode(child.inbox.popleft())
                if isinstance(message, wire.Failed):
                    raise _again(message)
                if isinstance(message, wire.Found):
                    found |= {each.name: each for each in message.functions}
                    if not message.more:
                        child.kill("it has said what there is")
                        return found
            if child.ended:
                words = "; ".join((child.ended, *self._notes[-5:]))
                raise InvalidConfig(f"the process that imports the functions ended: {words}")
            if self._clock() > give_up_ns:
                raise InvalidConfig("the functions' modules were not imported within 300 s")
            self._watch.wait(1.0)
            self._watch.step()

    def _check_names(self) -> None:
        twice = sorted(set(self._listed).intersection(self.inner.loadable))
        if twice:
            raise InvalidConfig(
                f"{', '.join(twice[:5])}: the worker has both a model and a function of that name; rename "
                "the function"
            )
        homeless = [name for name, listed in self._listed.items() if listed.info.gpu]
        if self.inner.devices or not homeless:
            return
        if len(homeless) == len(self._listed):
            raise InvalidConfig(
                f"{', '.join(homeless[:5])}: gpu=True, and this worker has no GPU; start it with "
                "--device cuda, or --device emulated for a trial"
            )
        for name in homeless:
            del self._listed[name]
        self._note(f"not offered, as this worker has no GPU: {', '.join(homeless[:20])}")

    def _make(self, gpu_id: int, name: str, *, trial: bool = False) -> LoadedFunction:
        listed, config = self._listed[name], self._config
        on_host, reloads = gpu_id == self._host, listed.reset == "reload"
        order = wire.Load(
            spec=listed.spec,
            name=name,
            folder=self._folder,
            forks=on_host and not reloads,
            memory_bytes=max(config.call_memory_bytes, listed.memory_bytes) if on_host else 0,
            visible_gpu="" if on_host else _visible_gpu(self.inner.device_name),
            state=config.state,
            namespace=self._namespace,
            once=reloads,
            sized=self._sized(listed.spec),
        )
        return LoadedFunction(
            self._root,
            listed,
            order,
            spares=self._spares(listed, on_host=on_host, trial=trial),
            clock=self._clock,
            announce=self._note,
        )

    def _spares(self, listed: wire.Listed, *, on_host: bool, trial: bool) -> int:
        if not on_host:  # each has a context on the GPU
            return HOST_PARTS if listed.prepares and not trial else 1
        restores = listed.reset == "restore"
        return spares_of(self._slots, restores=restores, others=len(self._listed))

    def _sized(self, spec: str) -> tuple[str, ...]:
        """The specs, but for `spec`, that offer functions with size classes."""
        sized = [each.spec for each in self._listed.values() if each.info.size_classes > 1]
        return tuple(dict.fromkeys(each for each in sized if each != spec))

    # ------------------------------------------------------------------- what is said of it

    @property
    def root_pid(self) -> int:
        """The process from which those of functions are forked."""
        return self._root.pid

    @property
    def device_name(self) -> str:
        return self.inner.device_name

    @property
    def exact(self) -> bool:
        return self.inner.exact

    @property
    def lost(self) -> str:
        return self.inner.lost

    def describe(self) -> str:
        mine = f"{len(self.functions)} function(s) in {self._slots} slot(s)"
        inner = self.inner.describe()
        return f"{inner}, {mine}" if inner else mine

    def gpu_stats(self) -> tuple[GpuStats, ...]:
        return self.inner.gpu_stats()

    def take_notes(self) -> Sequence[str]:
        notes, self._notes = self._notes, []
        return (*self.inner.take_notes(), *notes)

    def wake_fds(self) -> Sequence[int]:
        return (*self.inner.wake_fds(), self._watch.fileno())

    def pass_time(self, due_ns: int | None) -> bool:
        return self.inner.pass_time(due_ns)

    def glance(self) -> None:
        self.inner.glance()

    def _note(self, line: str) -> None:
        if len(self._notes) < _NOTES_AT_MOST:
            self._notes.append(line)

    def _over(self, op: Op) -> None:
        for gpu in self._gpus:
            gpu.over(op)

    # ------------------------------------------------------------------------- preparation

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        if effect.name not in self._listed:
            self.inner.prepare(effect, done=done)
            return
        known = self._known.get(effect.name)
        if known is not None:
            now = self._clock()
            again = msgspec.structs.replace(
                known, action_id=effect.action_id, span=Span(now, now, 0)
            )
            done(again)
            return
        gpu_id = self._host
        if self._listed[effect.name].info.gpu:
            gpu_id = min(self.inner.devices)
        function = self._make(gpu_id, effect.name, trial=True)
        self._runner.functions.trial(function, lambda: done(self._prepared(effect, function)))

    def _prepared(self, effect: PrepareModel, function: LoadedFunction) -> ModelPrepared:
        """What a first load, which is over, has shown."""
        listed, now = function.listed, self._clock()
        cold_ns = now - function.since_ns
        span = Span(function.since_ns, now, cold_ns)
        if function.failed:
            reason = f"function {listed.name!r}: {function.failed}"
            return ModelPrepared(effect.action_id, None, span, Code.INVALID_MODEL_PATH, reason)
        function.close()
        profile = ModelProfile(
            name=listed.name,
            exec_ns={1: max(1, listed.expected_ns)},
            weights_ns=cold_ns,
            weights_bytes=listed.memory_bytes,
            input_shape=(1,),
            input_dtype="uint8",
            output_shape=(1,),
            output_dtype="uint8",
        )
        info = listed.info
        if info.gpu and listed.reset == "reload":  # its host part is a cold start
            info = msgspec.structs.replace(info, prepare_ns=max(1, cold_ns))
        prepared = ModelPrepared(
            effect.action_id, profile, span, random_weights=False, function=info
        )
        self._known[listed.name] = prepared
        return prepared

    def warm_up(self, event: ModelPrepared) -> bool:
        return event.function is not None or self.inner.warm_up(event)

    def release(self, effect: ReleaseModel) -> None:
        if effect.name not in self._listed:
            self.inner.release(effect)

    def evict(self, gpu_id: int, model_id: int) -> None:
        self._runner.functions.evict(gpu_id, model_id)
        if gpu_id != self._host:
            self.inner.evict(gpu_id, model_id)

    # ------------------------------------------------------------------------------ frames

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self.inner.keep_inputs(action_id, frames)

    def drop_inputs(self, action_id: int) -> None:
        self._runner.drop_inputs(action_id)
        self.inner.drop_inputs(action_id)

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        return self._runner.take_outputs(action_id) or self.inner.take_outputs(action_id, sizes)

    def close(self) -> None:
        self._runner.close()
        if self._state is not None:
            state, self._state = self._state, None
            try:
                state.close()
            except SloschedError as error:
                self._note(f"the state of functions was not dropped: {error}")
        self.inner.close()


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _allow_files(count: int) -> None:
    """Let this process have `count` files open. Raises OutOfResources if the system's limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= count or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise OutOfResources(
            f"calls need {count} open files, and this system allows {hard}: lower most_calls, or raise "
            "`ulimit -n`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _visible_gpu(device: str) -> str:
    """What CUDA_VISIBLE_DEVICES says for a process that is to see the worker's GPU alone; empty without one."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return ""
    listed = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    place = int(number or 0)
    return listed[place] if place < len(listed) else str(place)


def _again(failed: wire.Failed) -> SloschedError:
    """The error of the process that imports the functions, raised here: of its own class where that is ours."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, SloschedError):
        error = kind.__new__(kind)
        Exception.__init__(error, failed.words)
        return error
    return InvalidConfig(failed.words)
