"""The parts of the benchmark that time one system: no-ops, chains, a graph of 585 calls, failing children."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_functions as called
import numpy as np
from bench_systems import POOLS, OnDask, System

from slosched.clock import monotonic_ns
from slosched.functions.errors import CallFailed

Record = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much each part does."""

    warm: int = 50
    calls: int = 300
    many: int = 4_000
    chained: int = 100
    graph_sides: int = 512
    failing: int = 100


FULL = Sizes()
QUICK = Sizes(warm=5, calls=20, many=50, chained=5, graph_sides=64, failing=10)


def timed(work: Callable[[], Any]) -> tuple[int, Any]:
    """How long it took, in ns, and what it returned."""
    begun_ns = monotonic_ns()
    value = work()
    return monotonic_ns() - begun_ns, value


def cpu_ns() -> int:
    """CPU time that this process and all below it have used, as far as they still run."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with suppress(OSError):
                fields = (each / "stat").read_text().rpartition(")")[2].split()
                parents[int(each.name)] = int(fields[1])
                used[int(each.name)] = int(fields[11]) + int(fields[12])
    below = [os.getpid()]
    for process in below:
        below += [child for child, parent in parents.items() if parent == process]
    ticks = sum(used.get(process, 0) for process in below)
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


def percentile(values: list[int], share: float) -> float:
    """In ns; the value at that place of the sorted ones, rounded up."""
    ordered = sorted(values)
    return float(ordered[min(len(ordered) - 1, int(len(ordered) * share))])


def no_op(system: System, sizes: Sizes) -> Record:
    """Latency of one call at a time, and calls/s with as many in flight as the system likes.

    Dask is measured with bare tasks, too, and in `hurried` again without pauses between its messages.
    """
    found = _no_op(system, sizes)
    if isinstance(system, OnDask):
        found["bare_per_s"] = _bare(system, sizes.many)
        system.hurry()
        found["hurried"] = _no_op(system, sizes) | {"bare_per_s": _bare(system, sizes.many)}
    return found


def _bare(system: OnDask, count: int) -> float:
    system.bare(count // 4)
    took_ns, values = timed(lambda: system.bare(count))
    _expect(values == list(range(count)), f"{system.name}: wrong values of bare tasks")
    return count / took_ns * 1e9


def _no_op(system: System, sizes: Sizes) -> Record:
    for i in range(sizes.warm):
        system.one(called.noop, i)
    latencies = [timed(lambda: system.one(called.noop, 1))[0] for _ in range(sizes.calls)]
    calls = [(i,) for i in range(sizes.many)]
    system.many(called.noop, calls[: sizes.many // 4])
    cpu_before_ns = cpu_ns()
    took_ns, values = timed(lambda: system.many(called.noop, calls))
    used_ns = cpu_ns() - cpu_before_ns
    refused = sum(isinstance(each, CallFailed) and each.refused for each in values)
    right = sum(each == i for i, each in enumerate(values))
    _expect(right + refused == sizes.many, f"{system.name}: wrong values of no-ops: {values[:3]}")
    return {
        "p50_ns": percentile(latencies, 0.5),
        "p99_ns": percentile(latencies, 0.99),
        "calls": sizes.calls,
        "calls_per_s": right / took_ns * 1e9,
        "refused": refused,
        "cpu_us": used_ns / sizes.many / 1000,
        "many": sizes.many,
    }


def chains(system: System, sizes: Sizes) -> Record:
    """What a child costs, in turn and at once; and 1 + 8 + 64 calls."""
    found: Record = {"children": sizes.chained}
    for name, function in (("in_turn", called.in_turn), ("at_once", called.at_once)):
        system.one(function, 2)
        alone_ns = min(timed(lambda: system.one(function, 0))[0] for _ in range(5))  # noqa: B023
        took_ns, value = timed(lambda: system.one(function, sizes.chained))  # noqa: B023
        _expect(value == sizes.chained, f"{system.name}: a chain lost children")
        found[f"{name}_ns"] = (took_ns - alone_ns) / sizes.chained
    found["tree_ns"], value = timed(lambda: system.one(called.tree, 2, 8))
    _expect(value == 73, f"{system.name}: 1 + 8 + 64 calls are 73, not {value}")
    return found


def graph(system: System, sizes: Sizes) -> Record:
    """A @ B by 585 calls on blocks, beside numpy's in this process."""
    rng = np.random.default_rng(7)
    side = sizes.graph_sides
    a, b = rng.random((2, side, side))
    whole_ns, right = timed(lambda: a @ b)
    took_ns, found = timed(lambda: system.one(called.product, a, b, 3))
    error = float(np.abs(found - right).max() / np.abs(right).max())
    _expect(error < 1e-12, f"{system.name}: the product is wrong by {error:.2g}")
    return {"side": side, "tasks": 585, "ns": took_ns, "numpy_ns": whole_ns, "error": error}


def failing(system: System, sizes: Sizes) -> Record:
    """A parent of children of which every fifth raises, beside one whose children all return."""
    n = sizes.failing
    system.one(called.with_failing, 5, 5)
    well_ns, value = timed(lambda: system.one(called.with_failing, n, 0))
    _expect(tuple(value) == (n, 0), f"{system.name}: {value} of {n} children that cannot fail")
    took_ns, value = timed(lambda: system.one(called.with_failing, n, 5))
    _expect(
        tuple(value) == (n - n // 5, n // 5),
        f"{system.name}: {value} of {n} children, of which {n // 5} raise",
    )
    return {"children": n, "failed": n // 5, "ns": took_ns, "without_ns": well_ns}


#: The no-ops come last: what they patch in Dask must not change the others.
PARTS: dict[str, Callable[[System, Sizes], Record]] = {
    "chains": chains,
    "graph": graph,
    "failing": failing,
    "no_op": no_op,
}


def parts_of(name: str) -> list[str]:
    """The parts that a system can run: bare pools have no calls in calls."""
    return ["no_op"] if name in POOLS else list(PARTS)


class WrongAnswer(AssertionError):
    """A system answered wrongly, so its times mean nothing."""


def _expect(holds: bool, text: str) -> None:
    if not holds:
        raise WrongAnswer(text)
