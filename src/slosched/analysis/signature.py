"""A line below every figure that is drawn within a block: what the figure is not, or where it is from.

Nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_line: ContextVar[str] = ContextVar("line", default="")


@contextmanager
def signed(line: str) -> Iterator[None]:
    """Within the block, style.save writes `line` below each figure."""
    before = _line.set(line)
    try:
        yield
    finally:
        _line.reset(before)


def line_below() -> str:
    """The line of the block; "" outside of one."""
    return _line.get()
