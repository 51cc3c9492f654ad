"""The global tier without Redis: files that the processes of one host share. It serves one host, and says so.

Under "embedded" the files are in shared memory and last as long as a process has the namespace open; under
"embedded:FOLDER" they are kept there until they are dropped. The kernel's locks exclude, so a killed holder
keeps nothing locked. A commit is written to a journal before it is made; if its process is killed, the next
one that reads or writes the key makes it. Readers hold the key's lock, so none sees half of a commit.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec
import numpy as np

from slosched.errors import OutOfResources
from slosched.functions.state import folders
from slosched.functions.state.errors import KeyDeleted, NamespaceInUse, StateLimit
from slosched.functions.state.ranges import Bytes, Ranges, gathered, scattered, total
from slosched.functions.state.store import DEFAULT_WAIT_NS, Commit, KeyInfo, Limits, Mode
from slosched.output_files import make_folder

_TOTALS = "totals"
_LOCK = "space.lock"


class _Totals(msgspec.Struct):
    limits: Limits
    keys: int = 0
    bytes: int = 0


class _Meta(msgspec.Struct):
    info: KeyInfo
    commits: dict[str, int]


class _Journal(msgspec.Struct):
    """A commit about to be made; without ranges, the file `.new` replaces the data."""

    meta: _Meta
    ranges: bytes | None
    data: bytes


class EmbeddedStore:
    """`folder`: where the files are kept; None for shared memory."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder.absolute() if folder is not None else None
        if self._folder is not None:
            make_folder(self._folder)
        self.name = "embedded" if self._folder is None else f"embedded:{self._folder}"

    def describe(self) -> str:
        place = "shared memory" if self._folder is None else str(self._folder)
        return f"embedded in {place}: serves this host alone"

    def open(self, namespace: str, *, own: bool, limits: Limits) -> EmbeddedSpace:
        if self._folder is not None:
            path = self._folder / quote(namespace, safe="")
            try:
                path.mkdir()
            except FileExistsError:
                if own:
                    raise _in_use(namespace, self.name, "") from None
            return EmbeddedSpace(path, None, limits, kept=True)
        folder = folders.open_folder(namespace, self.name)
        if own and not folder.made:
            pids = ", ".join(map(str, folders.users(folder.path)))
            folder.close()
            raise _in_use(namespace, self.name, f" of the processes {pids}")
        path = folder.path / "global"
        path.mkdir(exist_ok=True)
        return EmbeddedSpace(path, folder, limits)

    def namespaces(self) -> Mapping[str, tuple[int, int]]:
        return {name: _size(path) for name, path in self._paths().items()}

    def drop(self, namespace: str) -> bool:
        path = self._paths().get(namespace)
        if path is None:
            return False
        EmbeddedSpace(path, None, Limits(), kept=self._folder is not None).drop()
        if self._folder is None:
            folders.sweep()
        return True

    def close(self) -> None:
        """Nothing is open."""

    def _paths(self) -> dict[str, Path]:
        if self._folder is not None:
            return {
                unquote(each.name): each for each in sorted(self._folder.iterdir()) if each.is_dir()
            }
        folders.sweep()
        return {
            about.namespace: path / "global"
            for path, about in folders.in_use()
            if about.store == self.name
        }


class EmbeddedSpace:
    """A namespace in the folder `path`, which is `kept` until it is dropped or goes with `folder`."""

    def __init__(
        self, path: Path, folder: folders.Folder | None, limits: Limits, *, kept: bool = False
    ) -> None:
        self._path, self._folder, self._kept = path, folder, kept
        (path / _LOCK).touch()
        with self._space_lock():
            if not (path / _TOTALS).exists():
                _replace(path / _TOTALS, _Totals(limits))

    def declare(self, info: KeyInfo) -> KeyInfo:
        with self._space_lock():
            found = self.find(info.key)
            if found is not None:
                return found
            self._reserve(info.nbytes, 1)
            for suffix in ("data", "log", "lock", "merge", "turn", "user"):
                self._file(info, suffix).touch()
            os.truncate(self._file(info, "data"), info.nbytes)
            _replace(self._file(info, "meta"), _Meta(info, {}))
            return info

    def find(self, key: str) -> KeyInfo | None:
        try:
            return _meta(self._path / f"{folders.digest(key)}.meta").info
        except FileNotFoundError:
            return None

    def read(self, info: KeyInfo, ranges: Ranges) -> Bytes:
        with self._key_lock(info, shared=True):
            if not self._file(info, "journal").exists():
                return self._read(info, ranges)
        with self._key_lock(info, shared=False):  # which completes it
            return self._read(info, ranges)

    def _read(self, info: KeyInfo, ranges: Ranges) -> Bytes:
        if not total(ranges):
            return np.empty(0, np.uint8)
        data = np.memmap(self._file(info, "data"), np.uint8, "r")
        return np.asarray(gathered(data, ranges)).view(np.uint8)

    def merge_lock(self, info: KeyInfo) -> AbstractContextManager[None]:
        return self._flock(info, "merge")

    def commit(self, info: KeyInfo, commit: Commit) -> None:
        with self._key_lock(info, shared=False) as meta:
            if meta.commits.get(commit.writer, 0) >= commit.number:
                return
            meta.commits[commit.writer] = commit.number
            if total(commit.ranges) == info.nbytes:
                _write(self._file(info, "new"), commit.data)
                journal = _Journal(meta, None, b"")
            else:
                journal = _Journal(meta, commit.ranges.tobytes(), commit.data.tobytes())
            _replace(self._file(info, "journal"), journal)
            self._complete(info, journal)

    def committed(self, info: KeyInfo, writer: str) -> int:
        with self._key_lock(info, shared=False) as meta:
            return meta.commits.get(writer, 0)

    def clear(self, info: KeyInfo, *, values: bool) -> None:
        with self._space_lock(), self._key_lock(info, shared=False) as meta:
            self._reserve(-meta.info.appended, 0)
            meta.info = msgspec.structs.replace(meta.info, appended=0)
            _replace(self._file(info, "meta"), meta)
            if values:
                new = self._file(info, "new")
                new.touch()
                os.truncate(new, info.nbytes)
                journal = _Journal(meta, None, b"")
                _replace(self._file(info, "journal"), journal)
                self._complete(info, journal)

    def append(self, info: KeyInfo, data: bytes) -> None:
        with self._space_lock(), self._key_lock(info, shared=False) as meta:
            self._reserve(len(data), 0)
            with self._file(info, "log").open("r+b") as log:
                log.seek(meta.info.appended)
                log.write(data)
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
        for info in self.keys():
            self.delete(info.key)
        if self._kept:
            shutil.rmtree(self._path, ignore_errors=True)

    def close(self) -> None:
        if self._folder is not None:
            self._folder.close()

    def _remove(self, info: KeyInfo) -> None:
        appended = _meta(self._file(info, "meta")).info.appended
        # The name goes first: a key without it is unknown, whatever else is left of it.
        for suffix in ("meta", "journal", "new", "data", "log", "merge", "turn", "user", "lock"):
            self._file(info, suffix).unlink(missing_ok=True)
        self._reserve(-info.nbytes - appended, -1)

    def _reserve(self, size: int, keys: int) -> None:
        path = self._path / _TOTALS
        totals = msgspec.msgpack.decode(path.read_bytes(), type=_Totals)
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

    def _complete(self, info: KeyInfo, journal: _Journal) -> None:
        if journal.ranges is None:
            with suppress(FileNotFoundError):  # it was renamed before its process was killed
                self._file(info, "new").rename(self._file(info, "data"))
        else:
            data = np.memmap(self._file(info, "data"), np.uint8, "r+")
            ranges = np.frombuffer(journal.ranges, np.int64).reshape(-1, 2)
            if len(ranges):
                scattered(data, ranges, np.frombuffer(journal.data, np.uint8))
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
                    text = self._file(info, "journal").read_bytes()
                    self._complete(info, msgspec.msgpack.decode(text, type=_Journal))
            try:
                meta = _meta(self._file(info, "meta"))
            except FileNotFoundError:
                raise _deleted(info) from None
            if meta.info.id != info.id:
                raise _deleted(info)
            yield meta
        finally:
            os.close(descriptor)

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
            os.close(descriptor)

    def _space_lock(self) -> AbstractContextManager[int]:
        return folders.locked(self._path / _LOCK, timeout_ns=DEFAULT_WAIT_NS)

    def _file(self, info: KeyInfo, suffix: str) -> Path:
        return self._path / f"{folders.digest(info.key)}.{suffix}"


class _FileLock:
    """The kernel's lock has no lease: it ends with its process, and is never lost before."""

    token = 0

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def check(self) -> None:
        """It cannot be lost."""

    def release(self) -> None:
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


def _in_use(namespace: str, store: str, whose: str) -> NamespaceInUse:
    return NamespaceInUse(
        f"namespace {namespace!r} of {store} has keys of another run{whose}; end that run, or remove them with "
        f"`slosched state drop {shlex.quote(namespace)} --store {shlex.quote(store)}`"
    )


def _size(path: Path) -> tuple[int, int]:
    try:
        totals = msgspec.msgpack.decode((path / _TOTALS).read_bytes(), type=_Totals)
    except FileNotFoundError:
        return 0, 0
    return totals.keys, totals.bytes


def _meta(path: Path) -> _Meta:
    return msgspec.msgpack.decode(path.read_bytes(), type=_Meta)


def _replace(path: Path, content: msgspec.Struct) -> None:
    draft = path.with_name(f".{os.getpid()}-{os.urandom(8).hex()}")
    _write(draft, msgspec.msgpack.encode(content))
    draft.rename(path)


def _write(path: Path, data: bytes | Bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(data if isinstance(data, bytes) else data.data)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutOfResources(
            f"cannot write {path.parent}: {error.strerror}; free some space"
        ) from None
