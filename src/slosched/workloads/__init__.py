"""Workloads: which requests are due when. The same for live and simulated runs.

A workload is a file with a `Kind` in `registry.KINDS`, or a `Kind` of another package. base.py says what one
is, engine.py runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slosched.errors import InvalidConfig, UnknownName
from slosched.workloads.base import Workload
from slosched.workloads.composed import Bounded
from slosched.workloads.registry import WORKLOAD_KINDS, WORKLOADS
from slosched.workloads.values import read_period

__all__ = ["WORKLOADS", "WORKLOAD_KINDS", "Workload", "parse_workload", "workload_from_table"]


def parse_workload(name: str, args: Sequence[str]) -> Workload:
    """Return the workload `name` with `args`. Raises UnknownName, ExtensionError and what its parser raises."""
    return WORKLOAD_KINDS.get(name).parse(args)


def workload_from_table(table: Mapping[str, object]) -> Workload:
    """Return the workload that a TOML table describes.

    `workload` is its name; the other keys are its parameters in lower case (`slo-start`, or
    `slo_start`), and their values what the command takes. Any workload may have a `duration` beside
    them, after which it ends. Raises UnknownName for an unknown name or key, InvalidConfig for
    a missing one, and what the workload's parser raises.
    """
    values: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name in spelled:
            raise InvalidConfig(f"{key} and {spelled[name]} are the same key; give it once")
        spelled[name] = key
        values[name] = _text(value)
    name = values.pop("workload", "")
    kind = WORKLOAD_KINDS.get(name)
    keys = [parameter.key for parameter in kind.parameters]
    limit = None if "duration" in keys else values.pop("duration", None)
    for key in values:
        if key not in keys:
            raise UnknownName(f"key of {name}", key, [*keys, "duration"])
    missing = [p.key for p in kind.parameters if p.key not in values and p.default is None]
    if missing:
        raise InvalidConfig(f"the workload {name} lacks {', '.join(missing)}")
    workload = kind.parse([values.get(p.key, p.default or "") for p in kind.parameters])
    return workload if limit is None else Bounded(workload, read_period("duration", limit))


def _text(value: object) -> str:
    """`value` as one would type it: yes and no are 1 and 0."""
    return str(int(value)) if isinstance(value, bool) else str(value)
