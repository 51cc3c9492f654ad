"""What multiplies two blocks: NumPy on the host, torch or CuPy on a GPU, imported only where it is asked for.

float32 throughout: TF32, which rounds the inputs of GPUs' products to 10 bits, stays off in both packages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from slosched.clock import monotonic_ns
from slosched.errors import MissingPackage, UnknownName
from slosched.faasm.matrices.blocks import Matrix
from slosched.faasm.matrices.options import KERNELS


class Kernel(Protocol):
    """Arrays of a device. Those of all three packages know `@`, `+` and slices."""

    @property
    def device(self) -> str:
        """What it computes on, in words."""

    def load(self, block: Matrix) -> Any:
        """A host's block as an array of the device."""

    def save(self, array: Any) -> Matrix:
        """An array of the device as a block of the host."""

    def empty(self, rows: int, columns: int) -> Any: ...
    def wait(self) -> None:
        """Until the device has done all that it was told."""


class _NumPy:
    device = "cpu"

    def load(self, block: Matrix) -> Matrix:
        return block

    def save(self, array: Matrix) -> Matrix:
        return array

    def empty(self, rows: int, columns: int) -> Matrix:
        return np.empty((rows, columns), np.float32)

    def wait(self) -> None:
        """It never runs ahead."""


class _Torch:
    """torch on the GPU if there is one, else on the CPU (which the results say)."""

    def __init__(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingPackage(
                f"the kernel torch needs torch ({error}): pip install 'slosched[torch]'"
            ) from error
        self._torch: Any = torch
        self._on_gpu = torch.cuda.is_available()
        self._device = "cuda" if self._on_gpu else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = False
        name = torch.cuda.get_device_name() if self._on_gpu else "torch on the CPU"
        self.device = str(name)

    def load(self, block: Matrix) -> Any:
        return self._torch.tensor(block, device=self._device)

    def save(self, array: Any) -> Matrix:
        found: Matrix = array.cpu().numpy()
        return found

    def empty(self, rows: int, columns: int) -> Any:
        return self._torch.empty((rows, columns), dtype=self._torch.float32, device=self._device)

    def wait(self) -> None:
        if self._on_gpu:
            self._torch.cuda.synchronize()


class _CuPy:
    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise MissingPackage(
                f"the kernel cupy needs CuPy ({error}): pip install the wheel for CUDA, as cupy-cuda12x"
            ) from error
        self._cupy: Any = cupy
        number = int(cupy.cuda.Device().id)
        self.device = cupy.cuda.runtime.getDeviceProperties(number)["name"].decode()

    def load(self, block: Matrix) -> Any:
        return self._cupy.asarray(block)

    def save(self, array: Any) -> Matrix:
        found: Matrix = self._cupy.asnumpy(array)
        return found

    def empty(self, rows: int, columns: int) -> Any:
        return self._cupy.empty((rows, columns), np.float32)

    def wait(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()


def kernel(name: str) -> Kernel:
    """Make a kernel, and let it multiply once, so that its libraries are loaded.

    Raises UnknownName, and MissingPackage without its package.
    """
    if name not in KERNELS:
        raise UnknownName("kernel", name, list(KERNELS))
    kinds: dict[str, Callable[[], Kernel]] = {"numpy": _NumPy, "torch": _Torch, "cupy": _CuPy}
    made = kinds[name]()
    product(made, np.ones((8, 8), np.float32), np.ones((8, 8), np.float32))
    return made


def product(by: Kernel, a: Matrix, b: Matrix) -> tuple[Matrix, int, int]:
    """a @ b with what the device is given and gives back: the product, and two times in ns.

    The first is that of the copies to and from the device, the second that of the multiplication.
    """
    begun_ns = monotonic_ns()
    left, right = by.load(a), by.load(b)
    by.wait()
    loaded_ns = monotonic_ns()
    found = left @ right
    by.wait()
    multiplied_ns = monotonic_ns()
    saved = by.save(found)
    end_ns = monotonic_ns()
    return saved, loaded_ns - begun_ns + end_ns - multiplied_ns, multiplied_ns - loaded_ns


def blocked(by: Kernel, a: Any, b: Any, splits: int) -> Any:
    """The product by the algorithm of the calls, in one process and on the device's arrays."""
    if not splits:
        return a @ b
    rows, inner, columns = a.shape[0] // 2, a.shape[1] // 2, b.shape[1] // 2
    found = by.empty(a.shape[0], b.shape[1])
    for down in (slice(None, rows), slice(rows, None)):
        for across in (slice(None, columns), slice(columns, None)):
            first = blocked(by, a[down, :inner], b[:inner, across], splits - 1)
            found[down, across] = first + blocked(
                by, a[down, inner:], b[inner:, across], splits - 1
            )
    return found
