"""The functions that the benchmark calls, the same on every engine; worker processes import this module."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

import slosched
from slosched.clock import monotonic_ns
from slosched.functions.context import Context
from slosched.functions.function import Function
from slosched.functions.state.state import State

Matrix = npt.NDArray[np.float64]


@slosched.function(expected="100us", slo="60s")
def noop(ctx: Context, n: int) -> int:
    return n


@slosched.function(expected="100us", slo="60s")
async def in_turn(ctx: Context, n: int) -> int:
    """`n` children, one after the other."""
    for i in range(n):
        await ctx.chain(noop, i)
    return n


@slosched.function(expected="100us", slo="60s")
async def at_once(ctx: Context, n: int) -> int:
    """`n` children at a time."""
    return len(await slosched.gather(*(ctx.chain(noop, i) for i in range(n))))


@slosched.function(expected="100us", slo="60s")
async def tree(ctx: Context, levels: int, width: int) -> int:
    """The number of calls in a tree."""
    if not levels:
        return 1
    below: list[int] = await slosched.gather(
        *(ctx.chain("tree", levels - 1, width) for _ in range(width))
    )
    return 1 + sum(below)


def levels_of(a: Matrix, b: Matrix, levels: int) -> int:
    return levels


@slosched.function(expected="1ms", slo="60s", size=levels_of)
async def product(ctx: Context, a: Matrix, b: Matrix, levels: int) -> Matrix:
    """A @ B as 8 products of blocks of half the size, `levels` times; 3 levels are 585 calls."""
    if not levels:
        return a @ b
    half = len(a) // 2
    parts = (slice(0, half), slice(half, None))
    asked = [
        ctx.chain("product", a[i, k].copy(), b[k, j].copy(), levels - 1)
        for i in parts
        for j in parts
        for k in parts
    ]
    found = await slosched.gather(*asked)
    sums = [found[n] + found[n + 1] for n in range(0, 8, 2)]
    return np.block([sums[:2], sums[2:]])


@slosched.function(expected="100us", slo="60s")
def fails_at(ctx: Context, n: int, every: int) -> int:
    if every and n % every == 0:
        raise ValueError(f"child {n} fails")
    return n


@slosched.function(expected="100us", slo="60s")
async def with_failing(ctx: Context, n: int, every: int) -> tuple[int, int]:
    """How many of `n` children returned, and how many raised with their own traceback."""
    asked = [ctx.chain(fails_at, i, every) for i in range(n)]
    found = await slosched.gather(*asked, errors=True)
    failed = {i: each for i, each in enumerate(found) if isinstance(each, slosched.CallFailed)}
    traced = sum(f"child {i} fails" in each.reason for i, each in failed.items())
    return n - len(failed), traced


def note_begin(path: str, token: str) -> None:
    """One line in one write, so that lines of many processes stay whole."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, f"{token} {os.getpid()}\n".encode())
    finally:
        os.close(file)


def busy(duration_ns: int) -> None:
    end_ns = monotonic_ns() + duration_ns
    while monotonic_ns() < end_ns:
        pass


@slosched.function(expected="2ms", slo="60s")
def noted(ctx: Context, path: str, token: str, duration_ns: int, fails: bool) -> str:
    """A leaf that notes its begin, works, and may fail."""
    note_begin(path, token)
    busy(duration_ns)
    if fails:
        raise ValueError(token)
    return token


@slosched.function(expected="2ms", slo="60s")
async def noted_parent(
    ctx: Context, path: str, token: str, width: int, duration_ns: int
) -> tuple[int, int]:
    """Notes its begin, and that of its children, of which every fifth fails: (returned, failed)."""
    note_begin(path, token)
    asked = [ctx.chain(noted, path, f"{token}.{i}", duration_ns, i % 5 == 4) for i in range(width)]
    found = await slosched.gather(*asked, errors=True)
    failed = sum(isinstance(each, slosched.CallFailed) for each in found)
    return width - failed, failed


@slosched.function(expected="5ms", slo="60s", limit="60s")
def state_get(ctx: Context, key: str, size: int) -> dict[str, Any]:
    """How long a call takes to have the whole array, and what it fetched for that."""
    state = ctx.state  # a process connects to the store once
    before = state.moved.pulled_bytes
    begun_ns = monotonic_ns()
    view = state.array(key, size).get()
    got_ns = monotonic_ns()
    return {
        "ns": got_ns - begun_ns,
        "pulled_bytes": state.moved.pulled_bytes - before,
        "last": float(view[-1]),
        "process": os.getpid(),
    }


@slosched.function(expected="5ms", slo="60s", limit="60s")
def state_pull(ctx: Context, key: str, size: int) -> dict[str, Any]:
    """How long a pull takes, and what it fetched."""
    array = ctx.state.array(key, size)
    before = ctx.state.moved.pulled_bytes
    begun_ns = monotonic_ns()
    array.pull()
    pulled_ns = monotonic_ns()
    view = array.get()
    return {
        "ns": pulled_ns - begun_ns,
        "pulled_bytes": ctx.state.moved.pulled_bytes - before,
        "last": float(view[-1]),
        "process": os.getpid(),
    }


@slosched.function(expected="50ms", slo="60s", limit="60s")
def state_alone(ctx: Context, namespace: str, store: str, key: str, size: int) -> dict[str, Any]:
    """As `state_get` of a process that shares no copy with its host: it fetches the whole array itself."""
    before = os.environ.get("SLOSCHED_STATE_FOLDER")
    os.environ["SLOSCHED_STATE_FOLDER"] = f"slosched-bench-call-{os.getpid()}"
    try:
        with State(namespace, store) as state:
            begun_ns = monotonic_ns()
            view = state.array(key, size).get()
            got_ns = monotonic_ns()
            return {
                "ns": got_ns - begun_ns,
                "pulled_bytes": state.moved.pulled_bytes,
                "last": float(view[-1]),
                "process": os.getpid(),
            }
    finally:
        if before is None:
            del os.environ["SLOSCHED_STATE_FOLDER"]
        else:
            os.environ["SLOSCHED_STATE_FOLDER"] = before


@slosched.function(expected="5ms", slo="60s", limit="60s")
def state_push(ctx: Context, key: str, size: int, part: float) -> dict[str, Any]:
    """Changes that part of the elements, spread evenly, and sends what was changed."""
    array = ctx.state.array(key, size)
    every = max(1, round(1 / part))
    array.get(writable=True)[::every] += 1.0
    before = ctx.state.moved.pushed_bytes
    begun_ns = monotonic_ns()
    array.push_partial()
    pushed_ns = monotonic_ns()
    return {
        "ns": pushed_ns - begun_ns,
        "pushed_bytes": ctx.state.moved.pushed_bytes - before,
        "changed": -(-size // every),
        "process": os.getpid(),
    }


PLAIN: list[Function[Any] | str] = [
    noop,
    in_turn,
    at_once,
    tree,
    product,
    fails_at,
    with_failing,
    noted,
    noted_parent,
]
STATE: list[Function[Any] | str] = [state_get, state_pull, state_alone, state_push]
