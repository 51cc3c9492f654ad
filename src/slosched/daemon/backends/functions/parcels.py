"""Payloads on their way between the worker and a call's process: small ones in the packet, large ones in memory
that both map. Its size is sealed: if one side could shrink it, the other would end with SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

from slosched.daemon.backends.functions.wire import INLINE_BYTES

Buffer = bytes | memoryview

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
#: A worker writes that much at a time, which takes some 0.3 ms.
_SLICE_BYTES = 1 << 20


class Parcel:
    """A payload of `parts` that is sent once. `write` until `written`; then `inline` and `fds` go.

    Raises OSError without memory for a large one, from `write` too. `close` it.
    """

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self.size = sum(len(part) for part in parts)
        self.inline = b""
        self.fds: tuple[int, ...] = ()
        self._parts: list[memoryview] = []
        if self.size <= INLINE_BYTES:
            single = len(parts) == 1 and isinstance(parts[0], bytes)
            self.inline = parts[0] if single else b"".join(parts)  # type: ignore[assignment]
            return
        self._parts = [memoryview(part) for part in parts if len(part)]
        self.fds = (os.memfd_create("slosched-payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING),)

    @property
    def written(self) -> bool:
        return not self._parts

    def write(self) -> None:
        """Write the next piece; seal the memory behind the last one."""
        if not self._parts:
            return
        part = self._parts[0]
        count = os.write(self.fds[0], part[:_SLICE_BYTES])
        if count < len(part):
            self._parts[0] = part[count:]
            return
        del self._parts[0]
        if not self._parts:
            fcntl.fcntl(self.fds[0], fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        fds, self.fds = self.fds, ()
        self._parts = []
        for fd in fds:
            os.close(fd)


def opened(inline: bytes, size: int, fds: Sequence[int], most_bytes: int) -> Buffer:
    """The payload that came with a message, read-only. The caller closes `fds`.

    Raises ValueError for one that is not as the message says, or larger than `most_bytes` (0: any).
    """
    if not size >= 0 or (most_bytes and size > most_bytes):
        raise ValueError(f"a payload of {size} bytes; {most_bytes} are allowed")
    if not fds:
        if len(inline) != size:
            raise ValueError(f"a payload of {len(inline)} bytes that says {size}")
        return inline
    if inline or not size:
        raise ValueError("a payload in two places")
    seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)  # OSError for another kind of file
    if seals & _SEALS != _SEALS or os.fstat(fds[0]).st_size != size:
        raise ValueError(
            "shared memory that can change, or is not of the size that its message says"
        )
    return memoryview(mmap.mmap(fds[0], size, prot=mmap.PROT_READ))
