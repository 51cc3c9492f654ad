"""A backend: the devices of one worker process and the models they can run, behind one protocol.

`Backend`, `Plain`, `Frame` and what they name (as `Device` of core/worker/interface.py) are the stable
interface of backends, in the version `BACKEND_INTERFACE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from slosched.codes import Code
from slosched.core.worker.interface import Device, ModelPrepared, PrepareModel, ReleaseModel
from slosched.daemon.repository.listing import Version
from slosched.errors import InvalidConfig, SloschedError
from slosched.messages import GpuInfo, GpuStats

#: The version of what a backend of another package relies on. It rises when a backend that was written for the
#: old version would no longer work.
BACKEND_INTERFACE = 1

Frame = bytes | memoryview
#: The batch sizes that a worker measures and offers, as far as a model and a LoadModel allow them.
BATCH_CLASSES = (1, 2, 4, 8, 16, 32)
#: Limit of characters of a foreign exception that are passed on.
_WORDS_AT_MOST = 4000


class Backend(Protocol):
    """What the worker's loop needs of the devices. Every method is called by the loop's thread."""

    @property
    def device_name(self) -> str:
        """One of emulated, cpu and cuda:N: shown to users and sent in WorkerWelcome."""

    @property
    def exact(self) -> bool:
        """True: time is simulated, so the loop steps in event time and may sleep as it likes."""

    @property
    def gpus(self) -> Sequence[GpuInfo]: ...

    @property
    def devices(self) -> Mapping[int, Device]: ...

    @property
    def loadable(self) -> Sequence[str]:
        """Canonical names of the models that `prepare` can make ready."""

    def describe(self) -> str:
        """For the ready line: "6 emulated GPU(s), profile v100, 1376 pages each"."""

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        """Begin to make the model ready, outside the loop. `done` may be called by another thread."""

    def warm_up(self, event: ModelPrepared) -> bool:
        """One step, in the loop's thread, towards running the model of `event` at its usual speed.

        Called for each `done` event, once per turn of the loop, until it answers True.
        """

    def release(self, effect: ReleaseModel) -> None:
        """Free the host memory of an instance."""

    def evict(self, gpu_id: int, model_id: int) -> None:
        """Free the instance's weights on the device."""

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        """Keep an action's input frames until they were copied, or dropped."""

    def drop_inputs(self, action_id: int) -> None:
        """The action ended without running: free its frames and its buffers."""

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        """The output frames of a finished action, one for each size other than 0."""

    def pass_time(self, due_ns: int | None) -> bool:
        """Use the time until `due_ns` (0: now) without sleeping. False: the loop may sleep until then.

        For a device whose starts must not wait for a sleeping process. Returns within 0.4 ms.
        """

    def glance(self) -> None:
        """Between two pieces of a turn: what the device must start first, it starts. At most 0.2 ms."""

    def take_notes(self) -> Sequence[str]:
        """Human-readable lines since the last call."""

    def wake_fds(self) -> Sequence[int]:
        """Descriptors, the same all its life, that become readable when a device has something to report."""

    @property
    def lost(self) -> str:
        """Why its devices are gone and nothing that was launched will end; empty while they work."""

    def gpu_stats(self) -> tuple[GpuStats, ...]:
        """What the drivers said last: the same object until they were asked again."""

    def close(self) -> None:
        """End the backend's own threads; idempotent, bounded by a second."""


class RepositoryPort(Protocol):
    """A backend that can prepare versions of models from the config's repository has this."""

    no_cupy: str
    """Why it cannot prepare models of CuPy functions; empty if it can."""

    def offer(self, versions: Sequence[Version]) -> None:
        """From now on these can be prepared, beside what is `loadable`, and no others.

        What is prepared stays as it is.
        """


def repository_of(backend: Backend) -> RepositoryPort | None:
    """The port of a backend that serves a repository."""
    inner: Any = getattr(backend, "inner", backend)  # of functions beside models
    port: RepositoryPort | None = inner if callable(getattr(inner, "offer", None)) else None
    return port


class CallPort(Protocol):
    """The frames of calls of functions, for the loop. A backend that runs calls has one as `calls`."""

    def keep(self, action_id: int, frames: Sequence[Frame]) -> None:
        """Keep the arguments of a call until it begins, or `drop_inputs`."""

    def deliver(
        self, action_id: int, child: int, *, code: int, reason: str, frames: Sequence[Frame]
    ) -> None:
        """A child of the call `action_id` was answered; with code 0 its result is the one frame."""

    def payload(self, action_id: int, child: int) -> Frame:
        """The arguments of a child that the call `action_id` asked for, once."""

    def end(self, action_id: int, reason: str) -> None:
        """End the process of the call, and everything that it started."""


def calls_of(backend: Backend) -> CallPort | None:
    """The port of a backend that runs calls of functions."""
    calls: CallPort | None = getattr(backend, "calls", None)
    return calls


def functions_of(backend: Backend) -> Sequence[str]:
    """Those of `backend.loadable` that are functions."""
    functions: Sequence[str] = getattr(backend, "functions", ())
    return functions


class Plain:
    """The answers of a backend that has no driver to ask, and whose loop may sleep until something is due."""

    lost = ""

    def gpu_stats(self) -> tuple[GpuStats, ...]:
        return ()

    def pass_time(self, due_ns: int | None) -> bool:
        return False

    def glance(self) -> None:
        pass

    def take_notes(self) -> Sequence[str]:
        return ()

    def wake_fds(self) -> Sequence[int]:
        return ()


def first_line(error: BaseException) -> str:
    """What a foreign exception says, cut to a line."""
    lines = _exception_text(error).strip().splitlines()
    return lines[0][:300] if lines else "no message"


def in_words(error: BaseException) -> str:
    """The class and the first line of a foreign exception."""
    return f"{type(error).__name__}: {first_line(error)}"


def _exception_text(error: BaseException, say: Callable[[object], str] = str) -> str:
    try:
        return say(error)[:_WORDS_AT_MOST]
    except Exception:  # its own __str__ or __repr__ raises
        return f"{type(error).__name__}, which cannot say what it is"


def preparation_failed(error: BaseException) -> tuple[Code, str]:
    """The code and the reason of a LoadModel that ended with `error`: ours say it well, others' less."""
    if isinstance(error, SystemExit):
        return (
            Code.RUNTIME_ERROR,
            f"the model's code wants to end the process (exit code {_exception_text(error)})",
        )
    code = Code.INVALID_MODEL_PATH if isinstance(error, InvalidConfig) else Code.RUNTIME_ERROR
    return code, _exception_text(error, str if isinstance(error, SloschedError) else repr)
