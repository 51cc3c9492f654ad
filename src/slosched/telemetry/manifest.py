"""`manifest.json`: what a run was, so that a figure drawn years later can say so.

It is written when the run starts, with `complete` false, and again when it ends; a killed run keeps
the first form. Each writing replaces the file at once, so that a reader never sees half of it.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from slosched.errors import InvalidConfig, OutOfResources, SloschedError
from slosched.output_files import utf8_document, write_file
from slosched.telemetry.run_dir import MANIFEST
from slosched.version import __version__

FORMAT = 1


class ManifestNotWritten(SloschedError):
    """The manifest could not be written (disk full, directory gone). The run itself may go on."""


def write_manifest(
    directory: Path,
    kind: str,
    config: object,
    seeds: Mapping[str, int] | None = None,
    extra: Mapping[str, object] | None = None,
    *,
    gpu: Mapping[str, object] | None = None,
    name: str = MANIFEST,
) -> Path:
    """Write the manifest of a run that starts now; return its path.

    `kind` is "controller", "client", ...; `config` the resolved configuration (dataclasses,
    structs, dicts); `seeds` one number for each source of randomness; `gpu` what the owner knows of
    its GPUs; `extra` further top-level entries. Raises ManifestNotWritten.
    """
    document: dict[str, object] = {
        "format": FORMAT,
        "kind": kind,
        "slosched": __version__,
        "started_at": _date(),
        "ended_at": None,
        "complete": False,
        "argv": sys.argv,
        "config": config,
        "seeds": dict(seeds or {}),
        "host": describe_host(),
        "gpu": dict(gpu) if gpu is not None else None,
    }
    for key, value in (extra or {}).items():
        document.setdefault(key, value)
    path = directory / name
    _replace(path, document)
    return path


def finish_manifest(
    directory: Path, outcome: Mapping[str, object], *, name: str = MANIFEST
) -> None:
    """Add the end of the run: `ended_at`, `complete`, and `outcome` (counts, the reason it ended).

    `complete` is outcome["complete"] where that is given, else true. Raises ManifestNotWritten.
    """
    path = directory / name
    document = read_manifest(directory, name=name)
    document["ended_at"] = _date()
    document["complete"] = bool(outcome.get("complete", True))
    document["outcome"] = {key: value for key, value in outcome.items() if key != "complete"}
    _replace(path, document)


def read_manifest(directory: Path, *, name: str = MANIFEST) -> dict[str, Any]:
    """Return the manifest as plain dicts and lists, or {} where there is none that can be read."""
    try:
        document = msgspec.json.decode((directory / name).read_bytes())
    except (OSError, msgspec.DecodeError):
        return {}
    return document if isinstance(document, dict) else {}


def describe_host() -> dict[str, object]:
    """What the measurements ran on: names, CPU, memory in bytes. 0 or "" for what is not known."""
    try:
        usable = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        usable = os.cpu_count() or 0
    return {
        "hostname": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_count": os.cpu_count() or 0,
        "cpu_usable": usable,
        "cpu_model": _cpu_model(),
        "memory_bytes": _memory_bytes(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _date() -> str:
    # The human-readable date of a run; the program's own times come from its clock.
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _replace(path: Path, document: Mapping[str, object]) -> None:
    data = (
        msgspec.json.format(msgspec.json.encode(utf8_document(document), enc_hook=str), indent=2)
        + b"\n"
    )
    try:
        write_file(path, data, folders=False)
    except (InvalidConfig, OutOfResources) as error:
        raise ManifestNotWritten(str(error)) from error
