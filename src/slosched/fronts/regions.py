"""System shared memory: regions that clients of this host register, for inputs and outputs.

Each token has regions of its own: no other reads, overwrites, sees or unregisters them, or takes their room,
or registers the same object meanwhile, although this process could open that for both.

A region is read and written with pread and pwrite, and not mapped: a client that shortens its file would end
this process with SIGBUS otherwise. The object stays open until the region is unregistered, so it may be
unlinked before. A client reaches what this process may open: objects of its user, or of all if it is root.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
from pathlib import Path
from typing import Any, NamedTuple

from slosched.errors import shown_name
from slosched.fronts.asked import RegionPart
from slosched.fronts.errors import FrontError, Status
from slosched.transport.codec import Frame

#: Where POSIX shared memory objects are, by their names.
FOLDER = Path("/dev/shm")
_LONGEST_NAME, _LONGEST_KEY = 1024, 255


class _Region(NamedTuple):
    key: str
    offset: int
    byte_size: int
    descriptor: int


class Room:
    """How many regions a gateway has room for: MOST, in equal `shares` for its tokens.

    At most a quarter of the files that the process may open are regions, so that connections find room.
    """

    MOST = 1024

    def __init__(self, shares: int = 1) -> None:
        self.shares, self.taken = shares, 0
        #: By device and inode the table that has regions in an object, and how many.
        self.holders: dict[tuple[int, int], tuple[Regions, int]] = {}

    @property
    def most(self) -> int:
        """Regions of all tokens together."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self.MOST if soft == resource.RLIM_INFINITY else min(self.MOST, soft // 4)

    @property
    def share(self) -> int:
        """Regions of one token."""
        return max(1, self.most // max(1, self.shares))

    def is_for(self, status: os.stat_result, regions: Regions) -> bool:
        """Whether no other table has regions in an object."""
        holder, _ = self.holders.get((status.st_dev, status.st_ino), (regions, 0))
        return holder is regions

    def take(self, status: os.stat_result, regions: Regions) -> None:
        """Count a region in an object."""
        place = (status.st_dev, status.st_ino)
        _, count = self.holders.get(place, (regions, 0))
        self.holders[place] = (regions, count + 1)
        self.taken += 1

    def give(self, status: os.stat_result) -> None:
        """A region in the object of `status` was closed: release its place."""
        place = (status.st_dev, status.st_ino)
        holder, count = self.holders.pop(place)
        if count > 1:
            self.holders[place] = (holder, count - 1)
        self.taken -= 1


class Regions:
    """One token's regions by name; every method raises FrontError with Triton's text where it has one.

    A part that is read has at most `max_part_bytes`. Without `enabled` none can be registered.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        max_part_bytes: int = 64 * 1024**2,
        folder: Path = FOLDER,
        room: Room | None = None,
    ) -> None:
        self._enabled, self._max_part_bytes, self._folder = enabled, max_part_bytes, folder
        self._room = room or Room()
        self._regions: dict[str, _Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open the POSIX shared memory object `key`, of which the region is a part."""
        self._check_enabled()
        if not name or len(name) > _LONGEST_NAME:
            raise _bad(f"a shared memory region needs a name of 1 to {_LONGEST_NAME} characters")
        if name in self._regions:
            raise FrontError(
                Status.ALREADY_EXISTS, f"shared memory region '{name}' already in manager"
            )
        self._check_room()
        if offset < 0 or byte_size <= 0:
            raise _bad(
                f"shared memory region '{name}' needs an offset of at least 0 and a byte_size of at "
                f"least 1, not {offset} and {byte_size}"
            )
        descriptor = self._opened(name, key)
        try:
            status = os.fstat(descriptor)
            size = status.st_size
            if not self._room.is_for(status, self):
                raise _bad(f"Unable to open shared memory region: {shown_name(key)} (in use)")
            if offset + byte_size > size:
                raise _bad(
                    f"failed to register shared memory region '{name}': '{key}' has {size:,} bytes, and "
                    f"{byte_size:,} from byte {offset:,} on were asked for"
                )
            self._room.take(status, self)
            self._regions[name] = _Region(key, offset, byte_size, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def unregister(self, name: str) -> None:
        """Forget the region of that name, or all with an empty name. A name that is unknown is accepted."""
        for each in [name] if name else list(self._regions):
            region = self._regions.pop(each, None)
            if region is not None:
                self._room.give(os.fstat(region.descriptor))
                os.close(region.descriptor)

    def status(self, name: str) -> list[dict[str, Any]]:
        """The regions as the protocol shows them: name, key, offset, byte_size; one, or all."""
        if name and name not in self._regions:
            raise FrontError(
                Status.NOT_FOUND, f"Unable to find system shared memory region: '{_short(name)}'"
            )
        return [
            {
                "name": each,
                "key": self._regions[each].key,
                "offset": self._regions[each].offset,
                "byte_size": self._regions[each].byte_size,
            }
            for each in ([name] if name else sorted(self._regions))
        ]

    def read(self, part: RegionPart) -> Frame:
        """A copy of the bytes of a part."""
        region, at = self._place(part)
        if part.byte_size > self._max_part_bytes:
            raise FrontError(
                Status.TOO_LARGE,
                f"{part.byte_size:,} bytes in shared memory region '{part.region}' are more than the "
                f"{self._max_part_bytes:,} allowed",
            )
        try:
            data = os.pread(region.descriptor, part.byte_size, at)
        except OSError as error:
            raise _failed("read", part.region, error) from None
        if len(data) < part.byte_size:
            raise self._shortened(part.region)
        return data

    def write(self, part: RegionPart, data: Frame) -> None:
        """Write `data` at the beginning of a part, which must have room for it."""
        region, at = self._place(part)
        if len(data) > part.byte_size:
            raise _bad(
                f"shared memory size specified with the request for output is too small: "
                f"{part.byte_size:,} bytes in region '{part.region}', and {len(data):,} are needed"
            )
        if os.fstat(region.descriptor).st_size < at + len(data):
            raise self._shortened(part.region)  # a write would lengthen it again
        try:
            written = os.pwrite(region.descriptor, data, at)
        except OSError as error:
            raise _failed("write", part.region, error) from None
        if written < len(data):
            raise self._shortened(part.region)

    def close(self) -> None:
        """Forget all regions, for good."""
        self.unregister("")
        self._enabled = False

    # ---------------------------------------------------------------------------------------

    def _check_enabled(self) -> None:
        if not self._enabled:
            raise FrontError(
                Status.UNIMPLEMENTED,
                "shared memory is off: the gateway was started with --no-shared-memory",
            )

    def _check_room(self) -> None:
        held, room = len(self._regions), self._room
        if held < room.share and room.taken < room.most:
            return
        whose = " of this token" if held >= room.share and room.shares > 1 else ""
        count = held if held >= room.share else room.taken
        raise FrontError(
            Status.RESOURCE_EXHAUSTED,
            f"{count} shared memory regions{whose} are registered, and no more are allowed; unregister one",
        )

    def _opened(self, name: str, key: str) -> int:
        """A descriptor of an object; the key may begin with a slash, as shm_open has it."""
        component = key.removeprefix("/")
        if not 0 < len(component.encode("utf-8", "surrogateescape")) <= _LONGEST_KEY or (
            component in (".", "..") or "/" in component or "\0" in component
        ):
            raise _bad(
                f"failed to register shared memory region '{name}': {shown_name(key)} is not the name of "
                "a shared memory object; that is one component without slashes"
            )
        # A pipe would be waited for without O_NONBLOCK, and a terminal become the process's own.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            descriptor = os.open(self._folder / component, flags)
        except OSError as error:
            why = "" if error.errno == errno.ENOENT else f" ({error.strerror})"
            raise _bad(f"Unable to open shared memory region: {shown_name(key)}{why}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _bad(f"Unable to open shared memory region: {shown_name(key)} is not a file")
        return descriptor

    def _place(self, part: RegionPart) -> tuple[_Region, int]:
        """The region of a part, and the byte of its object where the part begins."""
        region = self._regions.get(part.region)
        if region is None:
            self._check_enabled()
            raise FrontError(
                Status.NOT_FOUND, f"Unable to find shared memory region: '{_short(part.region)}'"
            )
        if not 0 <= part.offset <= region.byte_size:
            raise _bad(f"Invalid offset for shared memory region: '{part.region}'")
        if part.byte_size < 0 or part.offset + part.byte_size > region.byte_size:
            raise _bad(f"Invalid offset + byte size for shared memory region: '{part.region}'")
        return region, region.offset + part.offset

    def _shortened(self, name: str) -> FrontError:
        return _bad(f"shared memory region '{name}' was shortened after it was registered")


def _failed(verb: str, name: str, error: OSError) -> FrontError:
    return FrontError(
        Status.INTERNAL, f"failed to {verb} shared memory region '{name}': {error.strerror}"
    )


def _short(name: str) -> str:
    return name[:200]


def _bad(text: str) -> FrontError:
    return FrontError(Status.INVALID_ARGUMENT, text)
