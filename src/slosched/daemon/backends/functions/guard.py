"""What a call's process and all that it started take: by the kernel's lists, without cgroups."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int, most: int) -> list[int]:
    """The processes that `pid` and its descendants started, at most `most`. What ends meanwhile is left out."""
    found: list[int] = []
    waiting = [pid]
    while waiting and len(found) < most:
        for child in _children(waiting.pop()):
            found.append(child)
            waiting.append(child)
    return found[:most]


def _children(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def own_bytes(pid: int) -> int:
    """Memory of the process that is not shared with files or others by mapping; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def end_group(pid: int) -> None:
    """End all processes of the group that `pid` leads, in one step: none of them can fork meanwhile."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
