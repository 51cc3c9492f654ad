"""The copy of one key that all processes of a namespace on this host share: a file in shared memory, mapped.

    header | fetched, a byte per block | dirty, a byte per element | value | base

`base` is the value as of the last exchange with the global tier. It is kept from the first time that something
may change without being noted: with merge "sum", or when a writable view is given. What differs from it was
changed here. The lock of the file (`locked`) excludes other exchanges of this host; views do not take it.

What must not be half done when a process is killed is written to a journal first, and done again by the next
process that takes the lock.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from slosched.errors import OutOfResources
from slosched.functions.state import folders
from slosched.functions.state.errors import KeyDeleted
from slosched.functions.state.ranges import Part, Ranges, part_of, runs, unpacked, within
from slosched.functions.state.store import DEFAULT_WAIT_NS, KeyInfo

#: The unit in which an array is fetched.
BLOCK_BYTES = 65536
_HEADER = np.dtype([("writer", "S32"), ("version", "S64"), ("has_base", "i8"), ("number", "i8")])
_PAGE = 4096

Flat = npt.NDArray[Any]


class Journal(msgspec.Struct, frozen=True, kw_only=True):
    """An exchange about to be made. A push, if `number`: once the global tier has that commit, `base` is the
    base. Otherwise a pull: `value` and `base` are to be set. `part` is a packed Part."""

    number: int = 0
    part: bytes
    base: bytes
    value: bytes = b""


class LocalCopy:
    """One mapped file. `made` in the folder under the key's id, so that a key made anew has a new copy."""

    def __init__(self, folder: Path, info: KeyInfo) -> None:
        self.info, self.dtype = info, np.dtype(info.dtype)
        self.path = _path(folder, info)
        self._journal_path = self.path.with_name(f"{self.path.name}.journal")
        self._draft_path = self.path.with_name(f"{self.path.name}.draft")
        self.size = info.nbytes // self.dtype.itemsize
        self.block = max(1, BLOCK_BYTES // self.dtype.itemsize)
        self.blocks = -(-self.size // self.block)
        dirty_at = _HEADER.itemsize + self.blocks
        value_at = -(-(dirty_at + self.size) // _PAGE) * _PAGE
        self._base_at = value_at + -(-info.nbytes // _PAGE) * _PAGE
        descriptor = self._open()
        try:
            memory = mmap.mmap(descriptor, self._base_at + info.nbytes)
        finally:
            os.close(descriptor)
        self.header = np.frombuffer(memory, _HEADER, 1)
        self.fetched = np.frombuffer(memory, np.bool_, self.blocks, _HEADER.itemsize)
        self.dirty = np.frombuffer(memory, np.bool_, self.size, dirty_at)
        self.value = np.frombuffer(memory, self.dtype, self.size, value_at)
        self.base = np.frombuffer(memory, self.dtype, self.size, self._base_at)

    def _open(self) -> int:
        """The file's descriptor. A new one appears under its name complete."""
        with suppress(FileNotFoundError):
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        draft = self.path.with_name(f".{os.getpid()}-{os.urandom(8).hex()}")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, self._base_at + self.info.nbytes)
            _allocate(descriptor, 0, self._base_at, self.info.key)
            header = np.zeros(1, _HEADER)
            header["writer"] = os.urandom(16).hex().encode()
            os.pwrite(descriptor, header.tobytes(), 0)
            os.link(draft, self.path)
        except FileExistsError:
            os.close(descriptor)
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            draft.unlink()
        return descriptor

    @property
    def writer(self) -> str:
        return bytes(self.header["writer"][0]).decode()

    @property
    def version(self) -> bytes:
        """The version of the last pull. What was not changed here since is of it, if all blocks are fetched."""
        return bytes(self.header["version"][0])

    def is_whole(self, version: bytes) -> bool:
        """Whether it is of that version, with all blocks, and nothing is left to do. Needs no lock."""
        return (
            self.version == version and bool(self.fetched.all()) and not self._journal_path.exists()
        )

    @property
    def has_base(self) -> bool:
        return bool(self.header["has_base"][0])

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other exchanges of this host. A pull that a killed process left half done is completed."""
        try:
            descriptor = folders.take_lock(self.path, shared=False, timeout_ns=DEFAULT_WAIT_NS)
        except FileNotFoundError:
            raise KeyDeleted(f"key {self.info.key!r} was deleted; declare it again") from None
        try:
            journal = self.journal()
            if journal is not None and not journal.number:
                self.complete(journal)
            yield
        except KeyDeleted:  # elsewhere; this host need not keep its copy until the run ends
            self.remove()
            raise
        finally:
            folders.release(descriptor)

    def keep_base(self) -> None:
        """From now on, notice what changes. Call within `locked`."""
        if not self.has_base:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                _allocate(descriptor, self._base_at, self.info.nbytes, self.info.key)
            finally:
                os.close(descriptor)
            self.base[:] = self.value
            self.header["has_base"] = 1

    def differing(self) -> npt.NDArray[np.bool_]:
        """Which elements differ from the base, bit by bit."""
        if not self.has_base:
            return np.zeros(self.size, np.bool_)
        return _differ(self.value, self.base)

    def changed(self) -> npt.NDArray[np.bool_]:
        """Which elements were set or differ from the base."""
        return self.dirty | self.differing() if self.has_base else self.dirty.copy()

    def missing(self, start: int, stop: int) -> Ranges:
        """Which elements of [start, stop) are in blocks that were not fetched; whole blocks."""
        first, last = start // self.block, -(-stop // self.block)
        found = (runs(~self.fetched[first:last]) + first) * self.block
        return np.minimum(found, self.size)

    def missing_of(self, wanted: npt.NDArray[np.bool_]) -> Ranges:
        """The same for a mask of all elements."""
        if not self.size:
            return runs(wanted)
        touched = np.logical_or.reduceat(wanted, np.arange(0, self.size, self.block))
        return np.minimum(runs(touched & ~self.fetched) * self.block, self.size)

    def absorb(self, ranges: Ranges, fresh: Flat) -> None:
        """Take `fresh` from the global tier for whole blocks; what was changed here and not pushed stays."""
        self._mark(ranges, False)
        where = within(ranges).where
        value, dirty = self.value[where], self.dirty[where]
        if not self.has_base:
            if dirty.any():
                kept = np.maximum(value, fresh) if self.info.merge == "max" else value
                fresh = np.where(dirty, kept, fresh)
            self.value[where] = fresh
        else:
            base = self.base[where]
            changed = dirty | _differ(value, base)
            merged = fresh
            if changed.any():
                merged = np.where(changed, _merged(self.info.merge, value, base, fresh), fresh)
            moved = _differ(fresh, base) | _differ(merged, value)
            spots = np.zeros(self.size, np.bool_)
            spots[where] = moved
            part, chosen = part_of(spots), np.flatnonzero(moved)
            journal = Journal(
                part=part.packed(self.size),
                base=fresh[chosen].tobytes(),
                value=merged[chosen].tobytes(),
            )
            self.note(journal)
            self.complete(journal, part)
        self._mark(ranges, True)

    def _mark(self, ranges: Ranges, fetched: bool) -> None:
        for start, stop in ranges:
            self.fetched[start // self.block : -(-stop // self.block)] = fetched

    # What a kill must not interrupt.

    def journal(self) -> Journal | None:
        """What an ended process left to do, if anything."""
        try:
            return msgspec.msgpack.decode(self._journal_path.read_bytes(), type=Journal)
        except FileNotFoundError:
            return None

    def note(self, journal: Journal) -> None:
        # Always the same name, within `locked`: a draft that a killed process leaves is overwritten.
        draft = self._draft_path
        try:
            draft.write_bytes(msgspec.msgpack.encode(journal))
            draft.rename(self._journal_path)
        except (OSError, ValueError) as error:  # MessagePack holds no more than 4 GiB in one piece
            draft.unlink(missing_ok=True)
            raise OutOfResources(f"cannot exchange {self.info.key!r} at once: {error}") from None

    def complete(self, journal: Journal, part: Part | None = None) -> None:
        """Do what the journal says; doing it twice is the same as once. `part`: its part, if known."""
        part = unpacked(journal.part, self.size) if part is None else part
        if part.count:
            if not journal.number:
                self.value[part.where] = np.frombuffer(journal.value, self.dtype)
            self.base[part.where] = np.frombuffer(journal.base, self.dtype)
        self.forget()

    def forget(self) -> None:
        self._journal_path.unlink(missing_ok=True)

    def remove(self) -> None:
        remove_copy(self.path.parent, self.info)


def remove_copy(folder: Path, info: KeyInfo) -> None:
    """Remove this host's copy of a key, if there is one."""
    path = _path(folder, info)
    for each in (
        path,
        path.with_name(f"{path.name}.journal"),
        path.with_name(f"{path.name}.draft"),
    ):
        each.unlink(missing_ok=True)


def _path(folder: Path, info: KeyInfo) -> Path:
    return folder / f"{folders.digest(info.key)}-{info.id}"


def _merged(merge: str, value: Flat, base: Flat, fresh: Flat) -> Flat:
    if merge == "sum":
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(fresh + (value - base))
    return np.asarray(np.maximum(value, fresh)) if merge == "max" else value


def _differ(a: Flat, b: Flat) -> npt.NDArray[np.bool_]:
    if a.dtype.itemsize == 16:
        pairs = np.ascontiguousarray(a).view(np.uint64) != np.ascontiguousarray(b).view(np.uint64)
        return np.asarray(pairs.reshape(-1, 2).any(axis=1))
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    return np.asarray(a.view(unsigned) != b.view(unsigned))


def _allocate(descriptor: int, start: int, size: int, key: str) -> None:
    """Reserve memory: to write where there is none left would kill the process."""
    try:
        if size:
            os.posix_fallocate(descriptor, start, size)
    except OSError as error:
        raise OutOfResources(
            f"no shared memory for key {key!r} ({size:,} bytes): {error.strerror}; enlarge /dev/shm"
        ) from None
