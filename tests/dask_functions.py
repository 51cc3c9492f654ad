"""Functions that the tests of the Dask engine call; its worker processes import this module."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import slosched
from slosched.functions.context import Context


@slosched.function
def double(ctx: Context, n: Any) -> Any:
    return n + n


@slosched.function
def total(ctx: Context, values: npt.NDArray[np.float64]) -> dict[str, Any]:
    assert not values.flags.writeable
    return {"sum": values.sum(), "pair": (1, "two"), "half": values[: len(values) // 2]}


@slosched.function
async def leaves(ctx: Context, levels: int, width: int) -> int:
    """The number of leaves below it."""
    if levels == 0:
        return 1
    found: list[int] = await slosched.gather(
        *(ctx.chain("leaves", levels - 1, width) for _ in range(width))
    )
    return sum(found)


@slosched.function
def fails(ctx: Context, text: str) -> None:
    raise ValueError(text)


@slosched.function
async def asks_failing(ctx: Context, name: str, *args: Any) -> tuple[int, str]:
    """The code and the reason of a child that fails."""
    child = ctx.chain(name, *args)
    try:
        await child
    except slosched.CallFailed as error:
        return error.code, error.reason
    return 0, ""


@slosched.function
async def gives_up(ctx: Context) -> str:
    """Takes a child back, and is told so."""
    child = ctx.chain(double, 1)
    child.cancel()
    with_code = -1
    try:
        await child
    except slosched.CallFailed as error:
        with_code = error.code
    return f"{child.status} {with_code} {await ctx.chain(double, 4)}"


@slosched.function
def exits(ctx: Context) -> None:
    sys.exit(3)


@slosched.function
def dies(ctx: Context) -> None:
    os._exit(1)


def made() -> dict[str, Any]:
    return {"process": os.getpid(), "thread": threading.get_ident()}


@slosched.function(init=made)
def instance(ctx: Context) -> Any:
    return [ctx.init["process"], os.getpid()]


@slosched.function
def adds(ctx: Context, n: int) -> float:
    weights = ctx.state.array("weights", 4, merge="sum")
    weights.get(writable=True)[n % 4] += 1.0
    weights.push_partial()
    return float(ctx.left_ns())


@slosched.function
def writes_line(ctx: Context, path: str) -> None:
    """One line for each time that its body began."""
    with Path(path).open("a") as file:
        file.write("begun\n")


@slosched.function(gpu=True)
def on_a_gpu(ctx: Context) -> None: ...


@slosched.function(reset="restore")
def restored(ctx: Context) -> None: ...


#: What every engine with Dask can run.
RUNS = [
    double,
    total,
    leaves,
    fails,
    asks_failing,
    gives_up,
    exits,
    dies,
    instance,
    adds,
    writes_line,
]
