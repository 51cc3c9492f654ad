"""A workload as words of the command line: a name and its values, or a TOML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slosched.errors import InvalidConfig

if TYPE_CHECKING:
    from slosched.workloads import Workload


def is_spec(word: str) -> bool:
    """True if the word names a TOML file, which no workload's name does."""
    return word.endswith(".toml")


def announce_trace(workload: Workload) -> None:
    """Say on stderr that a synthetic trace must be made first, which takes seconds, if that is so."""
    from slosched.cli.output import warn
    from slosched.workloads.azure import TraceReplay
    from slosched.workloads.composed import Bounded

    inner = workload.workload if isinstance(workload, Bounded) else workload
    if isinstance(inner, TraceReplay) and inner.source.path is None:
        warn(f"making {inner.source.describe()}; this takes some seconds")


def workload_of(words: Sequence[str]) -> Workload:
    """Return the workload that `words` describe. Raises InvalidConfig (or a class below it)."""
    from slosched.workloads import parse_workload

    if not words:
        raise InvalidConfig("no workload is named; give a name and its values, or a file.toml")
    name, *values = words
    if not is_spec(name):
        return parse_workload(name, values)
    if values:
        raise InvalidConfig(f"{name} describes the workload whole; {values[0]!r} is one too many")
    from slosched.workloads.spec_file import load_workload

    return load_workload(Path(name))
