"""Which backend a worker's device names: the one place that knows them all.

A package offers its own as entry points of the group `slosched.backends` (docs/my_own_policy.md): a class that
is called with the WorkerConfig and returns a `Backend`, and that states its `interface`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slosched.config import WorkerConfig
from slosched.daemon.backends.base import BACKEND_INTERFACE, Backend
from slosched.daemon.backends.devices import cuda_device, on_cpu
from slosched.daemon.blackbox import NoBlackbox
from slosched.errors import ExtensionError, UnknownName
from slosched.extensions import Registry, check_interface, missing_from


@dataclass(frozen=True)
class DeviceKind:
    """What a device's name stands for.

    `open` imports what the device needs, and no sooner. `process_each`: each GPU has a process of its own,
    which is started again when it ends (supervisor.py); the others are served in the worker's own process.
    """

    open: Callable[[WorkerConfig, NoBlackbox], Backend]
    process_each: bool = False


def _emulated(config: WorkerConfig, blackbox: NoBlackbox) -> Backend:
    from slosched.daemon.backends.emulated import EmulatedBackend

    return EmulatedBackend(config)


def _native(config: WorkerConfig, blackbox: NoBlackbox) -> Backend:
    if on_cpu(config.device):
        from slosched.daemon.backends.cpu.backend import CpuBackend

        return CpuBackend(config)
    gpu = cuda_device(config.device)  # says first if there is no such GPU
    from slosched.daemon.backends.cuda.backend import CudaBackend

    return CudaBackend(config, gpu, blackbox)


def _none(config: WorkerConfig, blackbox: NoBlackbox) -> Backend:
    from slosched.daemon.backends.functions.no_models import NoModels

    return NoModels()


_CUDA = "cuda:N"
#: The built-in ones; "cuda:N" stands for "cuda" too.
BACKENDS: Mapping[str, DeviceKind] = {
    "auto": DeviceKind(_native, process_each=True),
    "cpu": DeviceKind(_native),
    _CUDA: DeviceKind(_native, process_each=True),
    "emulated": DeviceKind(_emulated),
    "none": DeviceKind(_none),
}


def _from_outside(name: str, thing: object) -> DeviceKind:
    """The backend that a package offers. Raises ExtensionError with what it lacks."""
    if not callable(thing):
        raise ExtensionError("is not a class")
    check_interface(getattr(thing, "interface", None), BACKEND_INTERFACE)
    make: Callable[[WorkerConfig], Any] = thing

    def opened(config: WorkerConfig, blackbox: NoBlackbox) -> Backend:
        backend: Backend = make(config)
        missing = missing_from(Backend, backend)
        if missing:
            raise ExtensionError(
                f"the backend of the device {config.device!r} lacks {', '.join(missing)}; "
                "slosched.daemon.backends.base.Plain has what few need"
            )
        return backend

    return DeviceKind(opened)


#: Every device: the built-in ones, those of installed packages, and module:class.
DEVICES: Registry[DeviceKind] = Registry(
    "device", "slosched.backends", lambda: BACKENDS, _from_outside
)


def device_name(device: str) -> str:
    """The name in DEVICES of what a user wrote: "cuda:N" for "cuda:1", "npu" for "npu:1" if there is one."""
    name, colon, rest = device.partition(":")
    if name == "cuda" and (rest.isdigit() or not colon):
        return _CUDA
    return name if rest.isdigit() and name not in BACKENDS and name in DEVICES else device


def device_kind(device: str) -> DeviceKind:
    """What `device` names, without opening it. Raises UnknownName, ExtensionError."""
    if device.startswith("cuda:") and device_name(device) != _CUDA:
        raise UnknownName(DEVICES.kind, device, DEVICES.names())
    return DEVICES.get(device_name(device))


def shown_device(config: WorkerConfig, backend: Backend) -> str:
    """What a controller and its status call the device of `config`: with the package, if it is another's."""
    origin = DEVICES.origin(device_name(config.device))
    return backend.device_name if origin is None else f"{backend.device_name} ({origin.text})"


def open_backend(config: WorkerConfig, blackbox: NoBlackbox | None = None) -> Backend:
    """Open what `config.device` names: "auto" is cuda:0 where torch sees a GPU, else the CPU.

    What is imported for a GPU is imported here, not later: an import holds the interpreter for seconds, and
    a heartbeat must never wait for that. The backend of a GPU writes into `blackbox` which model's code runs
    in this process; emulated GPUs run none, and the CPU's models have processes of their own. Functions of the
    config run beside the models. Raises InvalidConfig, MissingPackage or UnknownName.
    """
    backend = device_kind(config.device).open(config, blackbox or NoBlackbox())
    if not config.functions:
        return backend
    from slosched.daemon.backends.functions.backend import FunctionsBackend

    try:
        return FunctionsBackend(backend, config)
    except BaseException:
        backend.close()
        raise
