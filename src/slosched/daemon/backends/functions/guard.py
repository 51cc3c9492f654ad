"""What a call's process and all that it started take: by the kernel's lists, without cgroups."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from slosched.functions.state.folders import is_within_root

#: Memory without a file on a disk, as links of descriptors and mappings name it.
_SHARED = ("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV")
_BLOCK = 512  # of st_blocks
#: Mappings are looked at one by one, which takes milliseconds, where more than this is mapped.
_MAPPED_UNSEEN = 64 << 20

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


def shared_bytes(pid: int) -> int:
    """Shared memory that the process holds, whether it maps it or has it open; 0 if it is gone.

    That is what lies in memfd, /dev/shm and shared mappings, but for the arrays of ctx.state, which have bounds
    of their own. Mapped memory below 64 MiB that no descriptor leads to is not seen.
    """
    opened = sum(_opened(pid).values())
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        mapped = int(status.partition("RssShmem:")[2].split()[0]) << 10
        if mapped <= max(opened, _MAPPED_UNSEEN):
            return opened
        return max(opened, _mapped(pid))
    except (OSError, IndexError, ValueError):
        return opened


def _opened(pid: int) -> dict[tuple[int, int], int]:
    """Bytes by file."""
    found: dict[tuple[int, int], int] = {}
    with suppress(OSError):
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if _counts(str(each.readlink())):
                    status = each.stat()
                    found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
    return found


def _mapped(pid: int) -> int:
    total, counts = 0, False
    with Path(f"/proc/{pid}/smaps").open(encoding="utf-8", errors="replace") as lines:
        for text in lines:
            words = text.split(maxsplit=5)
            if not words[0].endswith(":"):  # a mapping; what follows is about it
                counts = len(words) == 6 and _counts(words[5])
            elif counts and words[0] == "Rss:":
                total += int(words[1]) << 10
    return total


def _counts(path: str) -> bool:
    return path.startswith(_SHARED) and not is_within_root(path)


def end_group(pid: int) -> None:
    """End all processes of the group that `pid` leads, in one step: none of them can fork meanwhile."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
