"""Functions for tests. Processes of workers import this module, so it imports little."""

from __future__ import annotations

import sys
from typing import Any

import slosched


def load() -> dict[str, list[int]]:
    return {"seen": []}


@slosched.function
def noop(ctx: slosched.Context) -> None:
    """Does nothing."""


@slosched.function
def echo(ctx: slosched.Context, *args: Any, **kwargs: Any) -> Any:
    """Returns its arguments."""
    return {"args": args, "kwargs": kwargs}


@slosched.function(slo="2s", expected="2ms", size=lambda n: min(n // 10, 15))
async def fibonacci(ctx: slosched.Context, n: int) -> int:
    """The n-th Fibonacci number, a call for each step."""
    if n < 2:
        return n
    one, two = ctx.chain(fibonacci, n - 1), ctx.chain("fibonacci", n - 2, near="two")
    return sum(await slosched.gather(one, two))


@slosched.function
async def deep(ctx: slosched.Context, levels: int) -> int:
    """Calls itself `levels` times, one within another."""
    return 0 if levels == 0 else 1 + await ctx.chain(deep, levels - 1)


@slosched.function
async def fan(ctx: slosched.Context, n: int) -> int:
    """Awaits n children at once."""
    return len(await slosched.gather(*(ctx.chain(noop) for _ in range(n))))


@slosched.function
def boom(ctx: slosched.Context, text: str) -> None:
    """Raises."""
    raise ValueError(text)


@slosched.function
async def parent_of_boom(ctx: slosched.Context, text: str) -> None:
    """Awaits a child that raises."""
    await ctx.chain(boom, text)


@slosched.function
def exits(ctx: slosched.Context, code: int) -> None:
    """Ends its process."""
    sys.exit(code)


@slosched.function(init=load, reset="restore")
def remembers_nothing(ctx: slosched.Context, value: int) -> list[int]:
    """Each call sees what `load` made."""
    seen: list[int] = ctx.init["seen"]
    seen.append(value)
    return seen


@slosched.function(init=load)
def remembers(ctx: slosched.Context, value: int) -> list[int]:
    """A process that is used again keeps what calls changed."""
    seen: list[int] = ctx.init["seen"]
    seen.append(value)
    return seen
