"""What a worker tells a controller of its cluster: the instances that it holds, by name in runs of ids.

The inventory has a bound, because the message that carries it has one. What is beyond is not told, and the
worker gives it up: what a controller does not know of would hold memory for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from slosched.core.worker.state import Instance
from slosched.messages import Prepared

#: Bytes of an inventory; half of what a message of a worker may have.
MOST_BYTES = 256 * 1024
#: Weights, on all GPUs, that are told.
MOST_RESIDENT = 20_000

_encode = msgspec.msgpack.Encoder().encode


def inventory_of(
    instances: Iterable[Instance], *, most_bytes: int = MOST_BYTES
) -> tuple[Prepared, ...]:
    """The inventory of `instances`, as much of it as `most_bytes` hold."""
    by_name: dict[str, list[Instance]] = {}
    for instance in instances:
        by_name.setdefault(instance.name, []).append(instance)
    entries: list[Prepared] = []
    for name, held in by_name.items():
        last = held[-1]
        if last.request is None or last.result is None:
            continue
        entry = Prepared(
            name=name,
            runs=_runs(sorted(instance.model_id for instance in held)),
            max_batch=last.request.max_batch,
            max_exec_ns=last.request.max_exec_ns,
            result=last.result,
        )
        most_bytes -= len(_encode(entry))
        if most_bytes < 0:
            break
        entries.append(entry)
    return tuple(entries)


def _runs(ids: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending ids as (first, count)."""
    runs: list[tuple[int, int]] = []
    for model_id in ids:
        if runs and sum(runs[-1]) == model_id:
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((model_id, 1))
    return tuple(runs)


def ids_of(inventory: Iterable[Prepared]) -> set[int]:
    """The ids of all its instances."""
    return {
        model_id
        for entry in inventory
        for first, count in entry.runs
        for model_id in range(first, first + count)
    }
