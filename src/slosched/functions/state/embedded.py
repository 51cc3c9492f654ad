"""The global tier without Redis: files that the processes of one host share. It serves one host, and says so.

Under "embedded" the files are in shared memory and last as long as a process has the namespace open; under
"embedded:FOLDER" they are kept there until they are dropped. The kernel's locks exclude, so a killed holder
keeps nothing locked. A commit is written to a journal before it is made; if its process is killed, the next
one that reads or writes the key makes it. Readers hold the key's lock, so none sees half of a commit.
"""

from __future__ import annotations

import mmap
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from slosched.errors import OutOfResources
from slosched.functions.state import folders
from slosched.functions.state.errors import KeyDeleted, NamespaceInUse, StateLimit
from slosched.functions.state.ranges import Bytes, Part, gathered, unpacked
from slosched.functions.state.store import (
    DEFAULT_WAIT_NS,
    Commit,
    KeyInfo,
    Limits,
    Mode,
    version_of,
)
from slosched.output_files import make_folder

_TOTALS = "totals"
_LOCK = "space.lock"
#: A key's files, by their suffixes.
_EMPTY_AT_FIRST = ("log", "lock", "merge", "turn", "user")
_SUFFIXES = (*_EMPTY_AT_FIRST, "data", "new", "meta.draft", "journal", "journal.draft")
#: Writers of a key that are remembered: one per host and run.
_WRITERS = 1000
#: A smaller file is mapped with all its pages: one call takes less time than a fault for each of them.
_MAPPED_AT_ONCE = 4 << 20
_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)


class _Totals(msgspec.Struct):
    """`id` differs from that of a namespace of the same name made after this one was dropped."""

    namespace: str
    id: str
    limits: Limits
    keys: int = 0
    bytes: int = 0


class _Meta(msgspec.Struct):
    info: KeyInfo
    commits: dict[str, int]
    version: str


class _Journal(msgspec.Struct):
    """A commit about to be made: `data` for a packed Part. Without one, the file `.new` replaces the data."""

    meta: _Meta
    part: bytes | None
    data: memoryview


class EmbeddedStore:
    """`folder`: where the files are kept; None for shared memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder.absolute() if folder is not None else None
        self.name = "embedded" if self._folder is None else f"embedded:{self._folder}"

    def describe(self) -> str:
        place = "shared memory" if self._folder is None else str(self._folder)
        return f"embedded in {place}: serves this host alone"

    def open(self, namespace: str, *, own: bool, limits: Limits) -> EmbeddedSpace:
        if self._folder is not None:
            make_folder(self._folder)
            for left in self._folder.glob(".dead-*"):
                shutil.rmtree(left, ignore_errors=True)
            path = self._folder / folders.digest(namespace)
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                if own:
                    raise _in_use(namespace, self.name, "") from None
            return EmbeddedSpace(path, namespace, None, limits)
        folder = folders.open_folder(namespace, self.name)
        if own and not folder.made:
            pids = ", ".join(map(str, folders.users(folder.path)))
            folder.close()
            raise _in_use(namespace, self.name, f" of the processes {pids}")
        path = folder.path / "global"
        path.mkdir(exist_ok=True)
        return EmbeddedSpace(path, namespace, folder, limits)

    def namespaces(self) -> Mapping[str, tuple[int, int]]:
        if self._folder is not None:
            paths = list(self._folder.glob(f"[!.]*/{_TOTALS}"))
        else:
            folders.sweep()
            used = [path for path, about in folders.in_use() if about.store == self.name]
            paths = [path / "global" / _TOTALS for path in used]
        found = {}
        for path in paths:
            with suppress(FileNotFoundError):
                totals = _totals(path)
                found[totals.namespace] = totals.keys, totals.bytes
        return dict(sorted(found.items()))

    def drop(self, namespace: str) -> bool:
        if self._folder is not None:
            return _discard(self._folder / folders.digest(namespace))
        folders.sweep()
        return folders.discard(namespace, self.name)

    def close(self) -> None:
        """Nothing is open."""


class EmbeddedSpace:
    """A namespace in the folder `path`, which is kept until it is dropped, or goes with `folder`."""

    def __init__(
        self, path: Path, namespace: str, folder: folders.Folder | None, limits: Limits
    ) -> None:
        self._path, self._namespace, self._folder = path, namespace, folder
        self._id = ""
        try:
            (path / _LOCK).touch()
        except FileNotFoundError:
            raise dropped_error(namespace) from None
        with self._space_lock():
            if not (path / _TOTALS).exists():
                _replace(path / _TOTALS, _Totals(namespace, os.urandom(8).hex(), limits))
            self._id = _totals(path / _TOTALS).id

    def declare(self, info: KeyInfo) -> KeyInfo:
        with self._space_lock():
            found = self.find(info.key)
            if found is not None:
                return found
            self._reserve(info.nbytes, 1)
            for suffix in _EMPTY_AT_FIRST:
                self._file(info, suffix).touch()
            try:
                _zeros(self._file(info, "data"), info.nbytes)
            except OutOfResources:
                self._reserve(-info.nbytes, -1)
                raise
            _replace(self._file(info, "meta"), _Meta(info, {}, info.id))
            return info

    def find(self, key: str) -> KeyInfo | None:
        try:
            return _meta(self._path / f"{folders.digest(key)}.meta").info
        except FileNotFoundError:
            return None

    def read(self, info: KeyInfo, part: Part) -> Bytes:
        with self._key_lock(info, shared=True):
            if not self._file(info, "journal").exists():
                return self._read(info, part)
        with self._key_lock(info, shared=False):  # which completes it
            return self._read(info, part)

    def _read(self, info: KeyInfo, part: Part) -> Bytes:
        if not part.count:
            return np.empty(0, np.uint8)
        data = _mapped(self._file(info, "data"), info, mmap.PROT_READ)
        return gathered(data, part).view(np.uint8)

    def merge_lock(self, info: KeyInfo) -> AbstractContextManager[None]:
        return self._flock(info, "merge")

    def commit(self, info: KeyInfo, commit: Commit) -> str:
        # What needs no lock is done before it is taken.
        data = np.ascontiguousarray(commit.data).view(np.uint8).data
        whole = len(data) == info.nbytes
        part = None if whole else commit.part.packed(info.nbytes // info.itemsize)
        with self._key_lock(info, shared=False) as meta:
            if meta.commits.get(commit.writer, 0) >= commit.number:
                return ""
            replaced = meta.version
            meta.commits.pop(commit.writer, None)
            meta.commits[commit.writer] = commit.number
            meta.version = version_of(commit.writer, commit.number)
            while len(meta.commits) > _WRITERS:  # in the order of their last commits
                del meta.commits[next(iter(meta.commits))]
            if whole:
                _write(self._file(info, "new"), data)
                data = memoryview(b"")
            journal = _Journal(meta, part, data)
            _replace(self._file(info, "journal"), journal)
            self._complete(info, journal, commit.part)
            return replaced

    def version(self, info: KeyInfo) -> str:
        # Without the lock, which the pushes of other processes may hold most of the time: `meta` is replaced at
        # once, and has every commit if there is no journal behind it.
        with suppress(FileNotFoundError):
            meta = _meta(self._file(info, "meta"))
            if meta.info.id == info.id and not self._file(info, "journal").exists():
                return meta.version
        with self._key_lock(info, shared=False) as meta:
            return meta.version

    def committed(self, info: KeyInfo, writer: str) -> int:
        with self._key_lock(info, shared=False) as meta:
            return meta.commits.get(writer, 0)

    def clear(self, info: KeyInfo, *, values: bool) -> None:
        # Without pushes that have read what they will change.
        merging = self.merge_lock(info) if values else nullcontext()
        with merging, self._space_lock(), self._key_lock(info, shared=False) as meta:
            self._reserve(-meta.info.appended, 0)
            meta.info = msgspec.structs.replace(meta.info, appended=0)
            _replace(self._file(info, "meta"), meta)
            if values:
                _zeros(self._file(info, "new"), info.nbytes)
                meta.version = os.urandom(8).hex()
                journal = _Journal(meta, None, memoryview(b""))
                _replace(self._file(info, "journal"), journal)
                self._complete(info, journal)

    def append(self, info: KeyInfo, data: bytes, *, token: int) -> None:
        with self._space_lock(), self._key_lock(info, shared=False) as meta:
            self._reserve(len(data), 0)
            try:
                with self._file(info, "log").open("r+b") as log:
                    log.seek(meta.info.appended)
                    log.write(data)
            except OSError as error:
                self._reserve(-len(data), 0)
                raise _full(self._path, error) from None
            meta.info = msgspec.structs.replace(meta.info, appended=meta.info.appended + len(data))
            _replace(self._file(info, "meta"), meta)

    def appended(self, info: KeyInfo, start: int) -> bytes:
        with (
            self._key_lock(info, shared=True) as meta,
            self._file(info, "log").open("rb") as log,
        ):
            log.seek(start)
            return log.read(max(0, meta.info.appended - start))

    def lock(self, info: KeyInfo, mode: Mode, timeout_ns: int) -> _FileLock:
        shared = mode == "read"
        try:
            # A writer that waits holds the turn, so readers that come later wait behind it.
            with folders.locked(self._file(info, "turn"), shared=shared, timeout_ns=timeout_ns):
                return _FileLock(
                    folders.take_lock(
                        self._file(info, "user"), shared=shared, timeout_ns=timeout_ns
                    )
                )
        except FileNotFoundError:
            raise _deleted(info) from None

    def keys(self) -> list[KeyInfo]:
        found = []
        for path in self._path.glob("*.meta"):
            with suppress(FileNotFoundError):
                found.append(_meta(path).info)
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        with self._space_lock():
            found = self.find(key)
            if found is None:
                return
            with self._key_lock(found, shared=False):
                self._remove(found)

    def drop(self) -> None:
        with suppress(KeyDeleted), self._space_lock():
            _discard(self._path)

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def _remove(self, info: KeyInfo) -> None:
        appended = _meta(self._file(info, "meta")).info.appended
        # The name goes first: a key without it is unknown, whatever else is left of it.
        self._file(info, "meta").unlink(missing_ok=True)
        for suffix in _SUFFIXES:  # a look into the folder would cost time for each of its keys
            self._file(info, suffix).unlink(missing_ok=True)
        self._reserve(-info.nbytes - appended, -1)

    def _reserve(self, size: int, keys: int) -> None:
        path = self._path / _TOTALS
        totals = _totals(path)
        limits = totals.limits
        if size + keys > 0 and (
            totals.bytes + size > limits.bytes or totals.keys + keys > limits.keys
        ):
            # A process that was killed may have reserved what it did not use.
            known = self.keys()
            totals.keys = len(known)
            totals.bytes = sum(each.nbytes + each.appended for each in known)
            if totals.bytes + size > limits.bytes or totals.keys + keys > limits.keys:
                raise limit_error(totals.bytes, totals.keys, size, limits)
        totals.bytes, totals.keys = max(0, totals.bytes + size), max(0, totals.keys + keys)
        _replace(path, totals)

    def _complete(self, info: KeyInfo, journal: _Journal, part: Part | None = None) -> None:
        """Make the commit; doing it twice is the same as once. `part`: the journal's, where that is known."""
        if journal.part is None:
            with suppress(FileNotFoundError):  # it was renamed before its process was killed
                self._file(info, "new").rename(self._file(info, "data"))
        else:
            part = unpacked(journal.part, info.nbytes // info.itemsize) if part is None else part
            if part.count:
                data = _mapped(self._file(info, "data"), info, mmap.PROT_READ | mmap.PROT_WRITE)
                data[part.where] = np.frombuffer(journal.data, info.dtype)
        _replace(self._file(info, "meta"), journal.meta)
        self._file(info, "journal").unlink()

    @contextmanager
    def _key_lock(self, info: KeyInfo, *, shared: bool) -> Iterator[_Meta]:
        try:
            descriptor = folders.take_lock(
                self._file(info, "lock"), shared=shared, timeout_ns=DEFAULT_WAIT_NS
            )
        except FileNotFoundError:
            raise _deleted(info) from None
        try:
            if not shared:
                with suppress(FileNotFoundError):
                    text = _content(self._file(info, "journal"))
                    self._complete(info, msgspec.msgpack.decode(text, type=_Journal))
            try:
                meta = _meta(self._file(info, "meta"))
            except FileNotFoundError:
                raise _deleted(info) from None
            if meta.info.id != info.id:
                raise _deleted(info)
            yield meta
        finally:
            folders.release(descriptor)

    @contextmanager
    def _flock(self, info: KeyInfo, suffix: str) -> Iterator[None]:
        try:
            descriptor = folders.take_lock(
                self._file(info, suffix), shared=False, timeout_ns=DEFAULT_WAIT_NS
            )
        except FileNotFoundError:
            raise _deleted(info) from None
        try:
            yield
        finally:
            folders.release(descriptor)

    @contextmanager
    def _space_lock(self) -> Iterator[None]:
        try:
            descriptor = folders.take_lock(
                self._path / _LOCK, shared=False, timeout_ns=DEFAULT_WAIT_NS
            )
        except FileNotFoundError:
            raise dropped_error(self._namespace) from None
        try:
            try:
                if self._id and _totals(self._path / _TOTALS).id != self._id:
                    raise dropped_error(self._namespace)
            except FileNotFoundError:
                raise dropped_error(self._namespace) from None
            yield
        finally:
            folders.release(descriptor)

    def _file(self, info: KeyInfo, suffix: str) -> Path:
        return _file_of(self._path, info.key, suffix)


class _FileLock:
    """The kernel's lock has no lease: it ends with its process, and is never lost before."""

    token = 0

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._pid = descriptor, os.getpid()

    def check(self) -> None:
        """It cannot be lost."""

    def release(self) -> None:
        if os.getpid() == self._pid:
            folders.release(self._descriptor)
        else:  # a fork's copy; its parent holds the lock
            os.close(self._descriptor)


def limit_error(size: int, keys: int, more: int, limits: Limits) -> StateLimit:
    return StateLimit(
        f"the namespace has {size:,} bytes in {keys:,} keys, and {more:,} bytes more would exceed its limit of "
        f"{limits.bytes:,} bytes and {limits.keys:,} keys; delete keys, or open it with other limits"
    )


def deleted_error(info: KeyInfo) -> KeyDeleted:
    return KeyDeleted(
        f"key {info.key!r} is gone: it or its namespace was deleted, or the store restarted without it; "
        "declare it again"
    )


_deleted = deleted_error


def dropped_error(namespace: str) -> KeyDeleted:
    return KeyDeleted(
        f"namespace {namespace!r} is gone: it was dropped, or the store restarted without it; open a new State"
    )


def _in_use(namespace: str, store: str, whose: str) -> NamespaceInUse:
    return NamespaceInUse(
        f"namespace {namespace!r} of {store} has keys of another run{whose}; end that run, or remove them with "
        f"`slosched state drop {shlex.quote(namespace)} --store {shlex.quote(store)}`"
    )


def _totals(path: Path) -> _Totals:
    return msgspec.msgpack.decode(path.read_bytes(), type=_Totals)


def _discard(path: Path) -> bool:
    """Remove a namespace's folder at once: what follows finds it there or not. False if there is none."""
    dead = path.with_name(f".dead-{os.getpid()}-{os.urandom(8).hex()}")
    try:
        path.rename(dead)
    except FileNotFoundError:
        return False
    shutil.rmtree(dead, ignore_errors=True)
    return True


def _zeros(path: Path, size: int) -> None:
    """A new file of zeros. Its memory is taken now: a mapping that finds none left kills its process."""
    try:
        with path.open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _full(path.parent, error) from None


def _full(path: Path, error: OSError) -> OutOfResources:
    return OutOfResources(f"cannot write {path}: {error.strerror}; free some space")


# A push names a dozen files, and it takes 5 us to make a Path.
@lru_cache(maxsize=4096)
def _file_of(folder: Path, key: str, suffix: str) -> Path:
    return folder / f"{folders.digest(key)}.{suffix}"


@lru_cache(maxsize=4096)
def _draft_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.draft")


def _mapped(path: Path, info: KeyInfo, access: int) -> npt.NDArray[Any]:
    """The values in the file. Its memory is there already (`_zeros`)."""
    flags = mmap.MAP_SHARED | (_POPULATE if info.nbytes <= _MAPPED_AT_ONCE else 0)
    write = access & mmap.PROT_WRITE
    descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        return np.frombuffer(mmap.mmap(descriptor, info.nbytes, flags, access), info.dtype)
    finally:
        os.close(descriptor)


def _content(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.readall()


def _meta(path: Path) -> _Meta:
    return msgspec.msgpack.decode(_content(path), type=_Meta)


def _replace(path: Path, content: msgspec.Struct) -> None:
    # Always the same name, within the lock of what it replaces: a killed process leaves no more than one.
    draft = _draft_of(path)
    _write(draft, msgspec.msgpack.encode(content))
    draft.rename(path)


def _write(path: Path, data: bytes | memoryview) -> None:
    try:
        with path.open("wb") as file:
            file.write(data)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _full(path.parent, error) from None
