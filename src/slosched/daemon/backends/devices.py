"""Which device a name means on this host: the CPU, or one of its GPUs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slosched.errors import InvalidConfig, MissingPackage

if TYPE_CHECKING:
    import torch


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    folder = Path("/proc/driver/nvidia/gpus")
    if folder.is_dir():
        return len(list(folder.iterdir()))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, timeout=10, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def on_cpu(device: str) -> bool:
    """True if `device`, of "auto", "cpu", "cuda" and "cuda:N", means the CPU on this host.

    Where there is no GPU, torch is not imported to find that out. Raises MissingPackage where it must be.
    """
    if device != "auto":
        return device == "cpu"
    return not count_gpus() or not _torch().cuda.is_available()


def cuda_device(name: str) -> torch.device:
    """The torch device for auto, cuda or cuda:N. Raises InvalidConfig if it is not there, MissingPackage."""
    library = _torch()
    index = name.partition(":")[2] or "0"
    count = library.cuda.device_count() if library.cuda.is_available() else 0
    if not index.isdigit():
        raise InvalidConfig(
            f"unknown device {name!r}; write auto, cpu, cuda:N (as cuda:0) or emulated"
        )
    if int(index) >= count:
        raise InvalidConfig(
            f"there is no {name}: torch {library.__version__} sees {count} CUDA GPU(s) here; take "
            "--device cpu, or emulated GPUs: slosched worker --device emulated"
        )
    chosen: torch.device = library.device("cuda", int(index))
    return chosen


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingPackage(
            f"this device needs torch ({error}): pip install 'slosched[torch,models]', or take "
            "emulated GPUs: slosched worker --device emulated"
        ) from None
    return torch
