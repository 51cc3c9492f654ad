"""What figures of a GPU belong to: the GPU, what ran on it, and its host."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

from serving_core import commit, machine_line

from slosched.telemetry.manifest import describe_host
from slosched.version import __version__

_SMI_S = 15.0


def gpu_facts(device: str) -> dict[str, str]:
    """Name, driver, clocks and limits of `device` (cuda:N) as nvidia-smi tells them; {} without one."""
    fields = "name driver_version memory.total clocks.sm clocks.max.sm clocks.mem power.limit temperature.gpu"
    names = fields.split()
    index = device.partition(":")[2] or "0"
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", index, f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SMI_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names, values, strict=False))


def version_of(name: str) -> str:
    """The version of an installed library; "" if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def measured_on(device: str, commit_given: str = "") -> str:
    """One line. `device` is cuda:N or emulated; `commit_given` says what ran outside a checkout."""
    words = [f"slosched {__version__} ({commit_given or commit() or 'no checkout'})"]
    if device.startswith("cuda"):
        gpu = gpu_facts(device)
        words.insert(0, f"{gpu.get('name', 'GPU')}, driver {gpu.get('driver_version', 'unknown')}")
        words.append(f"torch {version_of('torch')}")
    return f"{'; '.join(words)}; {machine_line(describe_host())}"
