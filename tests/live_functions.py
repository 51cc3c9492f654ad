"""The functions of tests/test_calls_live.py: few, so that a worker is ready soon."""

from __future__ import annotations

from typing import Any

import slosched
from called_functions import catches, echo, leaves, naps, raises, sleeps, takes_back, tree

__all__ = [
    "catches",
    "echo",
    "leaves",
    "naps",
    "passes_on",
    "raises",
    "sleeps",
    "takes_back",
    "tree",
]


@slosched.function
async def passes_on(ctx: Any, name: str, *args: Any) -> Any:
    return await ctx.chain(name, *args)
