"""The functions of the experiment, the same on every engine; workers import this module.

Blocks travel through the state, not through arguments: a call is told which blocks it is about, and returns how
long it took and what it moved (a Report), to which its parent adds its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any

import msgspec
import numpy as np

import slosched
from slosched.clock import monotonic_ns
from slosched.engines import Engine
from slosched.errors import MissingPackage, UnknownName
from slosched.faasm.matrices import blocks, kernels
from slosched.faasm.matrices.blocks import Matrix, Name, Plan
from slosched.functions.context import ChildRef, Context
from slosched.functions.function import Function
from slosched.functions.state.state import State

Call = dict[str, Any]

#: Long, as a leaf of 8,000 rows on one core takes a minute, and what waits for all of them the more.
_SLO = "3600s"
_WAIT_S = 3600.0


@dataclass(kw_only=True)
class Report:
    """What a call and all below it did. Times are in ns, and those of waits are left out.

    `path_ns` is the longest chain of calls of which each needs the one before; `busy_ns` the sum over all.
    `found_here` counts the blocks read that lay in the host's copy as a whole.
    """

    calls: int = 0
    busy_ns: int = 0
    path_ns: int = 0
    state_ns: int = 0
    multiply_ns: int = 0
    device_copy_ns: int = 0
    reads: int = 0
    found_here: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    pulled_bytes: int = 0
    pushed_bytes: int = 0
    device: str = ""

    def add(self, children: Sequence[Report]) -> None:
        """Take in what the children did, which ran side by side."""
        for each in fields(self):
            values = [getattr(child, each.name) for child in children]
            if each.name == "path_ns":
                self.path_ns += max(values, default=0)
            elif each.name == "device":
                self.device = self.device or next(filter(None, values), "")
            else:
                setattr(self, each.name, getattr(self, each.name) + sum(values))


class Blocks:
    """The state as one call sees it, with a note of all that it moves."""

    def __init__(self, state: State, plan: Plan, report: Report) -> None:
        self._state, self._plan, self._report = state, plan, report

    def read(self, key: str, shape: tuple[int, int]) -> Matrix:
        """A view of a block that another call wrote."""
        report, moved = self._report, self._state.moved
        pulled, begun_ns = moved.pulled_bytes, monotonic_ns()
        found: Matrix = self._state.array(key, shape, np.float32).get()
        report.state_ns += monotonic_ns() - begun_ns
        report.reads += 1
        report.read_bytes += found.nbytes
        report.pulled_bytes += moved.pulled_bytes - pulled
        report.found_here += moved.pulled_bytes == pulled
        return found

    def write(self, key: str, values: Matrix) -> None:
        """Make a block, on this host and, where the plan says so, in the global tier."""
        report, moved = self._report, self._state.moved
        pushed, begun_ns = moved.pushed_bytes, monotonic_ns()
        array = self._state.array(key, values.shape, np.float32)
        array.set(values)
        if self._plan.pushes:
            array.push()
        report.state_ns += monotonic_ns() - begun_ns
        report.written_bytes += values.nbytes
        report.pushed_bytes += moved.pushed_bytes - pushed


@contextmanager
def work_on(ctx: Context, plan: Plan, report: Report) -> Iterator[Blocks]:
    """A part of a call that runs without waiting for others."""
    begun_ns = monotonic_ns()
    if plan.alone:
        shared = ctx.state
        with State(shared.namespace, shared.store.name, private=True) as state:
            yield Blocks(state, plan, report)
    else:
        yield Blocks(ctx.state, plan, report)
    took_ns = monotonic_ns() - begun_ns
    report.busy_ns += took_ns
    report.path_ns += took_ns


def argument(plan: Plan) -> Call:
    """A plan as an argument of calls."""
    return msgspec.structs.asdict(plan)


def near_key(plan: Plan, level: int, row: int, inner: int, col: int) -> str | None:
    """What a call names as its place: the product of half the size that it is a part of.

    So the 8 products below one merge, and that merge, meet on one host. There are 8 places at the most, which
    fill some hosts evenly.
    """
    if not plan.near or not level:
        return None
    up = level - 1
    return f"{plan.prefix}/{row >> up}-{inner >> up}-{col >> up}"


def duration_class(call: Call, *place: Any) -> int:
    """Calls on blocks of about the same size take about as long."""
    return min(15, (int(call["size"]) >> int(place[0])).bit_length())


def leaf_class(call: Call, row: int, inner: int, col: int) -> int:
    return duration_class(call, call["splits"])


def ready() -> None:
    """Import what every call needs, before its process is forked from this one."""
    with suppress(ImportError, MissingPackage):  # without redis no state is in a Redis
        import_module("slosched.functions.state.redis_store")


@slosched.function(name="matrices-fill", init=ready, expected="5ms", slo=_SLO, limit=_SLO)
def fill(ctx: Context, call: Call, name: Name, row: int, col: int) -> Call:
    """Make one block of A or B in the state."""
    plan, report = msgspec.convert(call, Plan), Report(calls=1)
    with work_on(ctx, plan, report) as state:
        values = blocks.block_values(plan.seed, name, plan.size, plan.splits, row, col)
        state.write(blocks.input_key(plan, name, row, col), values)
    return asdict(report)


@slosched.function(name="matrices-prepare", init=ready, expected="5ms", slo=_SLO, limit=_SLO)
async def prepare(ctx: Context, call: Call) -> Call:
    """Make all blocks of A and B in the state, in place: nothing is uploaded."""
    plan, report = msgspec.convert(call, Plan), Report(calls=1)
    width = range(2**plan.splits)
    children = [
        ctx.chain(fill, call, name, row, col, near=_place_of_input(plan, name, row, col))
        for name in blocks.NAMES
        for row in width
        for col in width
    ]
    report.add([Report(**found) for found in await slosched.gather(*children)])
    return asdict(report)


def _place_of_input(plan: Plan, name: str, row: int, col: int) -> str | None:
    """A block lies where one of the products that need it is made."""
    if name == "a":
        return near_key(plan, plan.splits, row, col, 0)
    return near_key(plan, plan.splits, 0, row, col)


def _leaf(ctx: Context, call: Call, row: int, inner: int, col: int) -> Call:
    plan, report = msgspec.convert(call, Plan), Report(calls=1)
    by = ctx.init
    report.device = by.device
    size, level = plan.size, plan.splits
    with work_on(ctx, plan, report) as state:
        a = state.read(
            blocks.input_key(plan, "a", row, inner), blocks.shape(size, level, row, inner)
        )
        b = state.read(
            blocks.input_key(plan, "b", inner, col), blocks.shape(size, level, inner, col)
        )
        found, report.device_copy_ns, report.multiply_ns = kernels.product(by, a, b)
        state.write(blocks.product_key(plan, level, row, inner, col), found)
    return asdict(report)


def _numpy() -> kernels.Kernel:
    ready()
    return kernels.kernel("numpy")


def _torch() -> kernels.Kernel:
    ready()
    return kernels.kernel("torch")


def _cupy() -> kernels.Kernel:
    ready()
    return kernels.kernel("cupy")


@slosched.function(
    name="matrices-leaf", init=_numpy, expected="5ms", slo=_SLO, limit=_SLO, size=leaf_class
)
def leaf(ctx: Context, call: Call, row: int, inner: int, col: int) -> Call:
    """A[row, inner] @ B[inner, col] of blocks of the last level, by NumPy."""
    return _leaf(ctx, call, row, inner, col)


@slosched.function(
    name="matrices-leaf-torch",
    init=_torch,
    gpu=True,
    expected="5ms",
    slo=_SLO,
    limit=_SLO,
    size=leaf_class,
)
def leaf_torch(ctx: Context, call: Call, row: int, inner: int, col: int) -> Call:
    """The same on a GPU, by torch."""
    return _leaf(ctx, call, row, inner, col)


@slosched.function(
    name="matrices-leaf-cupy",
    init=_cupy,
    gpu=True,
    expected="5ms",
    slo=_SLO,
    limit=_SLO,
    size=leaf_class,
)
def leaf_cupy(ctx: Context, call: Call, row: int, inner: int, col: int) -> Call:
    """The same on a GPU, by CuPy."""
    return _leaf(ctx, call, row, inner, col)


#: Kernel -> the function of its leaves.
LEAVES: dict[str, Function[Call]] = {"numpy": leaf, "torch": leaf_torch, "cupy": leaf_cupy}


@slosched.function(
    name="matrices-multiply", init=ready, expected="5ms", slo=_SLO, limit=_SLO, size=duration_class
)
async def multiply(ctx: Context, call: Call, level: int, row: int, inner: int, col: int) -> Call:
    """A[row, inner] @ B[inner, col] of blocks of `level`, from 8 products of half the size and 4 sums."""
    plan, report = msgspec.convert(call, Plan), Report(calls=1)
    begun_ns = monotonic_ns()
    below = level + 1
    halves = [(2 * row + i, 2 * col + j) for i in (0, 1) for j in (0, 1)]
    children: list[ChildRef[Call]] = []
    for down, across in halves:
        for deep in (2 * inner, 2 * inner + 1):
            near = near_key(plan, below, down, deep, across)
            if below == plan.splits:
                made = ctx.chain(LEAVES[plan.kernel], call, down, deep, across, near=near)
            else:
                made = ctx.chain(multiply, call, below, down, deep, across, near=near)
            children.append(made)
    report.path_ns = report.busy_ns = monotonic_ns() - begun_ns
    reports = [Report(**found) for found in await slosched.gather(*children)]
    with work_on(ctx, plan, report) as state:
        merged = _merged(state, plan, level, row, inner, col)
        state.write(blocks.product_key(plan, level, row, inner, col), merged)
    report.add(reports)
    return asdict(report)


def _merged(state: Blocks, plan: Plan, level: int, row: int, inner: int, col: int) -> Matrix:
    """The sums of the products of half the size, side by side."""
    size, below = plan.size, level + 1
    found = np.empty(blocks.shape(size, level, row, col), np.float32)
    rows, columns = blocks.shape(size, below, 2 * row, 2 * col)
    for i, down in enumerate((slice(None, rows), slice(rows, None))):
        for j, across in enumerate((slice(None, columns), slice(columns, None))):
            at = 2 * row + i, 2 * col + j
            first, second = (
                state.read(
                    blocks.product_key(plan, below, at[0], 2 * inner + k, at[1]),
                    blocks.shape(size, below, *at),
                )
                for k in (0, 1)
            )
            np.add(first, second, out=found[down, across])
    return found


def offered(kernel: str) -> list[Function[Any] | str]:
    """The functions that a run with this kernel needs. Raises UnknownName."""
    if kernel not in LEAVES:
        raise UnknownName("kernel", kernel, list(LEAVES))
    return [fill, prepare, multiply, LEAVES[kernel]]


def product(engine: Engine, plan: Plan) -> Call:
    """Make A and B, multiply them, and return what the calls report with the two times in ns.

    The product stays in the state, and so do all blocks: `forget` removes them. Matrices are made anew for each
    product, so no host has blocks of the one before.
    """
    call = argument(plan)
    begun_ns = monotonic_ns()
    prepared = engine.call(prepare, call).result(_WAIT_S)
    prepare_ns = monotonic_ns() - begun_ns
    begun_ns = monotonic_ns()
    if plan.splits:
        handle = engine.call(multiply, call, 0, 0, 0, 0)
    else:
        handle = engine.call(LEAVES[plan.kernel], call, 0, 0, 0)
    report: Call = handle.result(_WAIT_S)
    return {
        "took_ns": monotonic_ns() - begun_ns,
        "prepare_ns": prepare_ns,
        "prepare_pushed_bytes": prepared["pushed_bytes"],
        **report,
    }


def product_of(state: State, plan: Plan) -> Matrix:
    """The product that was made, as this process sees it."""
    key = blocks.product_key(plan, 0, 0, 0, 0)
    found: Matrix = state.array(key, (plan.size, plan.size), np.float32).get()
    return found


def forget(states: Sequence[State], plan: Plan) -> None:
    """Remove all blocks of a product. `states` are those of each host with copies, first of this one."""
    for key in blocks.keys(plan):
        for state in states[1:]:
            state.evict(key)
        states[0].delete(key)
