"""System shared memory: regions that clients of this host register, for inputs and outputs.

A region is read and written with pread and pwrite, and not mapped: a client that shortens its file would end
this process with SIGBUS otherwise.
"""

from __future__ import annotations

from typing import Any

from slosched.fronts.asked import RegionPart
from slosched.transport.codec import Frame


class Regions:
    """Regions by name. `MOST` bounds them; every method raises FrontError with Triton's text."""

    MOST = 1024

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open the POSIX shared memory object `key`, of which the region is a part."""
        raise NotImplementedError

    def unregister(self, name: str) -> None:
        """Forget the region of that name, or all with an empty name. A name that is unknown is accepted."""
        raise NotImplementedError

    def status(self, name: str) -> list[dict[str, Any]]:
        """The regions as the protocol shows them: name, key, offset, byte_size; one, or all."""
        raise NotImplementedError

    def read(self, part: RegionPart) -> Frame:
        """A copy of the bytes of a part."""
        raise NotImplementedError

    def write(self, part: RegionPart, data: Frame) -> None:
        """Write `data` at the beginning of a part, which must have room for it."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
