"""Folders in shared memory that last as long as a process has them open.

Each process that uses a folder holds a shared lock on its file `users`. The kernel releases that lock when the
process ends, however it ends, so a folder whose `users` nothing holds is left over, and the next process that
opens any folder removes it. Process ids alone would not do: they are used again. They are noted in `users`
for messages. A folder appears under its name by a rename, with the lock of its maker already held.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from slosched.clock import now_ns, sleep_ns
from slosched.functions.state.errors import LockTimeout

#: Files that are mapped are shared memory wherever they lie; here they never reach a disk.
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "slosched-state"
#: An environment variable that replaces it, the folder's name: runs with different ones do not see each other.
PREFIX_VARIABLE = "SLOSCHED_STATE_FOLDER"
_USERS = "users"
_ABOUT = "about.json"
#: Waits for locks look again after at most this time.
_LONGEST_NAP_NS = 5_000_000


class About(msgspec.Struct, frozen=True):
    """What `about.json` of a folder says."""

    namespace: str
    store: str


def root() -> Path:
    """The folder of this user's folders; made if it is missing, for this user alone."""
    path = _root_path()
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _root_path() -> Path:
    base = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return base / (os.environ.get(PREFIX_VARIABLE) or f"{_PREFIX}-{os.getuid()}")


def digest(*parts: str) -> str:
    """A file's name for any text."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


@contextmanager
def locked(path: Path, *, shared: bool = False, timeout_ns: int) -> Iterator[int]:
    """Hold the kernel's lock on the existing file `path`; gives its descriptor.

    Every call opens the file anew, so threads of one process exclude each other as processes do. Raises
    FileNotFoundError if the file is gone, also while waiting, and LockTimeout.
    """
    descriptor = take_lock(path, shared=shared, timeout_ns=timeout_ns)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def take_lock(path: Path, *, shared: bool, timeout_ns: int) -> int:
    """The same without a block: closing the descriptor releases the lock."""
    until_ns = now_ns() + timeout_ns
    nap_ns = 20_000
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if now_ns() >= until_ns:
            raise LockTimeout(
                f"{path.name} stayed locked for {timeout_ns / 1e9:g} s; its holder may be stopped"
            )
        sleep_ns(nap_ns)
        nap_ns = min(2 * nap_ns, _LONGEST_NAP_NS)


class Folder:
    """A folder that this process has open. `made` says whether it was not there before."""

    def __init__(self, path: Path, descriptor: int, made: bool) -> None:
        self.path, self.made = path, made
        self._descriptor = descriptor

    def close(self) -> None:
        """Leave the folder; the last process that leaves removes it."""
        if self._descriptor < 0:
            return
        os.close(self._descriptor)
        self._descriptor = -1
        if _remove_unused(self.path):
            with suppress(OSError):  # others are in it
                self.path.parent.rmdir()


def open_folder(namespace: str, store: str) -> Folder:
    """Open the folder of a namespace of a store on this host. Removes folders that nothing uses first."""
    sweep()
    path = root() / digest(store, namespace)
    while True:
        descriptor = _join(path)
        if descriptor >= 0:
            return Folder(path, descriptor, made=False)
        draft = root() / f".new-{os.getpid()}-{os.urandom(4).hex()}"
        try:
            draft.mkdir(mode=0o700)
        except FileNotFoundError:  # the last user of another namespace removed the root
            continue
        (draft / _ABOUT).write_bytes(msgspec.json.encode(About(namespace, store)))
        descriptor = os.open(draft / _USERS, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.write(descriptor, b"%d\n" % os.getpid())
        try:
            draft.rename(path)
        except OSError:  # another process was first
            os.close(descriptor)
            shutil.rmtree(draft, ignore_errors=True)
            continue
        return Folder(path, descriptor, made=True)


def sweep() -> int:
    """Remove the folders that no process has open any more. Returns their number."""
    removed = 0
    for path in _listed():
        if path.name.startswith(".new-"):
            if not _is_alive(path.name.split("-")[1]):
                shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".dead-"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            removed += _remove_unused(path)
    with suppress(OSError):  # it has folders, or is not there
        _root_path().rmdir()
    return removed


def users(path: Path) -> list[int]:
    """Ids of the live processes that have the folder open, as far as they noted them."""
    try:
        noted = (path / _USERS).read_text().split()
    except OSError:
        return []
    return sorted({int(each) for each in noted if _is_alive(each)})


def in_use() -> list[tuple[Path, About]]:
    """The folders of this user on this host."""
    found = []
    for path in _listed():
        with suppress(OSError, msgspec.DecodeError):
            found.append((path, msgspec.json.decode((path / _ABOUT).read_bytes(), type=About)))
    return found


def _listed() -> list[Path]:
    try:
        return sorted(_root_path().iterdir())
    except FileNotFoundError:
        return []


def _join(path: Path) -> int:
    """A descriptor of `users` with the shared lock; -1 if the folder is missing or about to go."""
    try:
        descriptor = os.open(path / _USERS, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), (path / _USERS).stat()):
            os.write(descriptor, b"%d\n" % os.getpid())
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    sleep_ns(100_000)  # the process that removes it needs a moment
    return -1


def _remove_unused(path: Path) -> bool:
    """Remove the folder unless a process has it open."""
    try:
        descriptor = os.open(path / _USERS, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), (path / _USERS).stat()):
            return False
        dead = path.with_name(f".dead-{os.getpid()}-{os.urandom(4).hex()}")
        path.rename(dead)
        shutil.rmtree(dead, ignore_errors=True)
        return True
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(descriptor)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
