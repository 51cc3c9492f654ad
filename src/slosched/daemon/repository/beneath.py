"""Opens files below a folder, and none outside: one component of a path at a time, by descriptors.

A link is read and walked like any other path, so that a link which is exchanged meanwhile leads nowhere else:
one within the folder is followed, and one that leaves it is refused. What is neither a file nor a folder is
never opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from slosched.errors import InvalidConfig

_LINKS_AT_MOST = 8
#: A path of more components is not walked.
_DEEPEST = 32
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class NotBelow(InvalidConfig):
    """A path leads out of the folder, or to what is neither a file nor a folder."""


@contextmanager
def root_of(folder: str) -> Iterator[int]:
    """A descriptor of `folder`, which may itself be a link. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def open_below(root: int, path: str) -> int:
    """A descriptor of the regular file or the folder at `path` below the folder `root`; the caller closes it.

    Raises NotBelow, or OSError if it cannot be opened.
    """
    todo = deque(path.split("/"))
    way = [os.dup(root)]  # the folders from the root to where the walk is
    links = steps = 0
    try:
        while todo:
            name = todo.popleft()
            steps += 1
            if steps > _DEEPEST * _LINKS_AT_MOST:
                raise NotBelow("its path is too long")
            if name in ("", "."):
                continue
            if name == "..":
                if len(way) == 1:
                    raise NotBelow("it is a link that leads out of the repository")
                os.close(way.pop())
                continue
            mode = os.stat(name, dir_fd=way[-1], follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                links += 1
                target = os.readlink(name, dir_fd=way[-1])
                if links > _LINKS_AT_MOST:
                    raise NotBelow("it is a link to a link, and so on")
                if target.startswith("/"):
                    raise NotBelow(
                        "it is a link with an absolute path; only relative links within the repository are "
                        "followed"
                    )
                todo.extendleft(reversed(target.split("/")))
            elif stat.S_ISDIR(mode):
                way.append(os.open(name, _FLAGS | os.O_DIRECTORY, dir_fd=way[-1]))
            else:
                return _open_file(name, way[-1], mode, last=not any(todo))
        return os.dup(way[-1])
    except OSError as error:
        if error.errno == errno.ELOOP:  # it became a link since
            raise NotBelow("it is being exchanged for a link") from None
        raise
    finally:
        for fd in way:
            os.close(fd)


def _open_file(name: str, folder: int, mode: int, *, last: bool) -> int:
    if not stat.S_ISREG(mode):
        raise NotBelow(f"{name!r} is neither a file nor a folder")
    if not last:
        raise NotBelow(f"{name!r} is not a folder")
    fd = os.open(name, _FLAGS, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # exchanged since
        os.close(fd)
        raise NotBelow(f"{name!r} is neither a file nor a folder")
    return fd


def read_below(root: int, path: str, *, most_bytes: int) -> bytes:
    """The bytes of the file at `path` below `root`. Raises InvalidConfig for one with more, and OSError."""
    fd = open_below(root, path)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotBelow("it is a folder, and should be a file")
        pieces: list[bytes] = []
        left = most_bytes + 1
        while left > 0:
            piece = os.read(fd, min(left, 1 << 20))
            if not piece:
                return b"".join(pieces)
            pieces.append(piece)
            left -= len(piece)
    finally:
        os.close(fd)
    raise InvalidConfig(f"it has more than {most_bytes:,} bytes")
