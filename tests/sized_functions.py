"""A function with size classes, in a module of its own: others know it by its name alone."""

from __future__ import annotations

from typing import Any

import slosched


def _class_of(n: int) -> int:
    return min(n // 10, 15)


@slosched.function(size=_class_of)
def sized(ctx: Any, n: int) -> int:
    return n
