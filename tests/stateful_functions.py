"""Functions of tests/test_calls_with_state.py."""

from __future__ import annotations

from typing import Any

import slosched


@slosched.function
def adds(ctx: Any, number: float) -> None:
    array = ctx.state.array("total", 1, merge="sum")
    with array.lock("write"):  # the local copy is shared by the processes of a host
        array.get(writable=True)[0] += number
        array.push()


@slosched.function
def total(ctx: Any) -> float:
    array = ctx.state.array("total", 1, merge="sum")
    array.pull()
    return float(array.get()[0])


@slosched.function(gpu=True)
async def awaits_on_gpu(ctx: Any) -> Any:
    return await ctx.chain("adds", 1.0)
