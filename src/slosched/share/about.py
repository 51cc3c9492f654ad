"""What a run ran with: versions of what computes, and of this package's own source."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from slosched.sim.run import source_digest
from slosched.version import __version__

#: A driver that starts takes seconds to answer.
_SAID_WITHIN_S = 20.0
#: Packages whose version changes times.
_PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numpy",
)


def about_run(device: str) -> dict[str, str]:
    """What a result says beside its figures."""
    return {
        "device": device,
        "versions": versions(),
        "source": source_digest(),
        "random": "weights and inputs are random: only times and energy mean something",
    }


@cache
def gpus_here() -> frozenset[str]:
    """The names of this machine's GPUs, as NVML says them; none where that is not known."""
    try:
        answer = subprocess.run(
            ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SAID_WITHIN_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    return frozenset(line.strip() for line in answer.decode("utf-8", "replace").splitlines())


@cache
def versions() -> str:
    """slosched 1.0, python 3.12.3, torch 2.11.0, ..."""
    found = [f"slosched {__version__}", f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
