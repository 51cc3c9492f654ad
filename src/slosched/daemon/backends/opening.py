"""Which backend a worker's device names: the one place that knows them all."""

from __future__ import annotations

from slosched.config import WorkerConfig
from slosched.daemon.backends.base import Backend
from slosched.daemon.backends.devices import cuda_device, on_cpu
from slosched.daemon.blackbox import NoBlackbox
from slosched.errors import InvalidConfig


def open_backend(config: WorkerConfig, blackbox: NoBlackbox | None = None) -> Backend:
    """Open what `config.device` names: "auto" is cuda:0 where torch sees a GPU, else the CPU.

    What is imported for a GPU is imported here, not later: an import holds the interpreter for seconds, and
    a heartbeat must never wait for that. The backend of a GPU writes into `blackbox` which model's code runs
    in this process; emulated GPUs run none, and the CPU's models have processes of their own. Raises
    InvalidConfig, MissingPackage or UnknownName.
    """
    device = config.device
    if device == "emulated":
        from slosched.daemon.backends.emulated import EmulatedBackend

        return EmulatedBackend(config)
    if device not in ("auto", "cpu", "cuda") and not device.startswith("cuda:"):
        raise InvalidConfig(
            f"unknown device {device!r}; write auto, cpu, cuda:N (as cuda:0) or emulated"
        )
    if on_cpu(device):
        from slosched.daemon.backends.cpu.backend import CpuBackend

        return CpuBackend(config)
    gpu = cuda_device(device)  # says first if there is no such GPU
    from slosched.daemon.backends.cuda.backend import CudaBackend

    return CudaBackend(config, gpu, blackbox or NoBlackbox())
