"""The file of a cluster's join key: 32 random bytes that controller and workers share."""

from __future__ import annotations

import os
from pathlib import Path

from slosched.errors import InvalidConfig

KEY_BYTES = 32


def write_join_key(path: Path) -> None:
    """Make a new key in a file that only its owner can read. Raises InvalidConfig if there is one already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise InvalidConfig(
            f"{path} exists already; a key that workers use is not overwritten"
        ) from None
    except OSError as error:
        raise InvalidConfig(f"cannot write {path}: {error.strerror}") from None
    try:
        os.fchmod(descriptor, 0o600)  # whatever the umask says
        if os.write(descriptor, os.urandom(KEY_BYTES)) != KEY_BYTES:
            raise InvalidConfig(f"cannot write {path}: the disk is full")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_join_key(path: str) -> bytes:
    """The key of a file. Raises InvalidConfig for one that cannot be read, or holds something else."""
    try:
        with Path(path).open("rb") as file:
            key = file.read(KEY_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise InvalidConfig(f"join key {path}: {error.strerror}") from None
    if len(key) != KEY_BYTES:
        raise InvalidConfig(
            f"join key {path}: a key has {KEY_BYTES} bytes; make one with `slosched keys join FILE`"
        )
    if mode & 0o077:
        raise InvalidConfig(
            f"join key {path}: other users of this host can read it; chmod 600 {path}"
        )
    return key
