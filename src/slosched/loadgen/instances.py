"""From what a workload uses to the instances that were loaded, in the workload's numbering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from slosched.workloads.base import ModelUse

_T = TypeVar("_T")


def copies_by_name(uses: Iterable[ModelUse]) -> dict[str, int]:
    """How many instances of each name to load: a controller is asked for a name's copies at once.

    A name that is used twice gets the sum, because loading shares what is there already.
    """
    copies: dict[str, int] = {}
    for use in uses:
        copies[use.name] = copies.get(use.name, 0) + use.copies
    return copies


def in_workload_order(uses: Iterable[ModelUse], loaded: Mapping[str, Sequence[_T]]) -> list[_T]:
    """The instances as the workload numbers them; `loaded` has those of each name, in order."""
    instances: list[_T] = []
    taken: dict[str, int] = {}
    for use in uses:
        first = taken.get(use.name, 0)
        taken[use.name] = first + use.copies
        instances += loaded[use.name][first : first + use.copies]
    return instances
