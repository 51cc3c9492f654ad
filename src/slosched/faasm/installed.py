"""Which of the systems' packages are here: asked before a run begins, and nothing heavy is imported for it."""

from __future__ import annotations

from importlib.util import find_spec

from slosched.errors import MissingPackage

#: Package -> how it is installed.
_WAYS = {
    "distributed": "pip install 'slosched[dask]'",
    "redis": "pip install 'slosched[state]'",
    "torch": "pip install 'slosched[torch]'",
    "timm": "pip install timm",
    "cupy": "pip install the wheel for CUDA, as cupy-cuda12x",
}


def lack_of(*packages: str) -> str:
    """The first of the packages that is missing, and how it is installed; empty if all are there."""
    for package in packages:
        if find_spec(package) is None:
            return f"{package} is not installed: {_WAYS[package]}"
    return ""


def check_installed(what: str, *packages: str) -> None:
    """Raise MissingPackage unless the packages that `what` needs are there."""
    if lack := lack_of(*packages):
        raise MissingPackage(f"{what} needs a package: {lack}")
