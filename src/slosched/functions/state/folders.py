"""Folders in shared memory that last as long as a process has them open.

Each process that uses a folder holds a shared lock on its file `users`. The kernel releases that lock when the
process ends, however it ends, so a folder whose `users` nothing holds is left over, and the next process that
opens any folder removes it. Process ids alone would not do: they are used again. They are noted in `users`
for messages. A folder appears under its name by a rename, with the lock of its maker already held.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import msgspec

from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig, OutOfResources
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
#: A folder in the making that has no `users` after this time is left over.
_DRAFT_NS = 60_000_000_000
_NOTED_BYTES = 65536


class About(msgspec.Struct, frozen=True):
    """What `about.json` of a folder says."""

    namespace: str
    store: str


def root() -> Path:
    """The folder of this user's folders; made if it is missing, for this user alone.

    Raises InvalidConfig if what has its name is not this user's folder: every user may make files there.
    """
    path = _root_path()
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        with suppress(FileNotFoundError):
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise InvalidConfig(
                    f"{path} is not a folder of this user; remove it, or name another in {PREFIX_VARIABLE}"
                ) from None
            if found.st_mode & 0o077:
                path.chmod(0o700)
    return path


def _root_path() -> Path:
    name = os.environ.get(PREFIX_VARIABLE) or f"{_PREFIX}-{os.getuid()}"
    if Path(name).name != name:
        raise InvalidConfig(f"{PREFIX_VARIABLE} is the name of a folder, without slashes: {name!r}")
    base = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return base / name


def is_within_root(path: str) -> bool:
    """Whether the file is of this root, or of one that `root_of_host` names."""
    return path.startswith(str(_root_path()))


def root_of_host(number: int) -> str:
    """The name of a root for processes that are to share nothing with this one, as if on another host.

    Processes of one number share. What they leave when they are killed, `sweep_hosts` removes.
    """
    return f"{_root_path().name}-host{number}"


@contextmanager
def within_root(name: str) -> Iterator[None]:
    """Within the block, what this process opens, and what it starts, has that root."""
    before = os.environ.get(PREFIX_VARIABLE)
    os.environ[PREFIX_VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[PREFIX_VARIABLE]
        else:
            os.environ[PREFIX_VARIABLE] = before


def sweep_hosts() -> None:
    """Remove what ended processes left in the roots of emulated hosts (`root_of_host`)."""
    root = _root_path()
    for path in sorted(root.parent.glob(f"{root.name}-host*")):
        with within_root(path.name):
            sweep()


@lru_cache(maxsize=1024)
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
        release(descriptor)


def take_lock(path: Path, *, shared: bool, timeout_ns: int) -> int:
    """The same without a block: `release` ends it."""
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


def release(descriptor: int) -> None:
    """Release the lock and close its file. A process forked meanwhile has the file open too, so closing alone
    would leave the lock to it."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


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
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = -1
        try:
            draft.mkdir(mode=0o700)
            descriptor = os.open(draft / _USERS, flags, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            (draft / _ABOUT).write_bytes(msgspec.json.encode(About(namespace, store)))
            os.write(descriptor, b"%d\n" % os.getpid())
            draft.rename(path)
            return Folder(path, descriptor, made=True)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            shutil.rmtree(draft, ignore_errors=True)
            # Another process was first, or the last user of another namespace removed the root.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT):
                raise OutOfResources(f"cannot make {path}: {error.strerror}") from None


def sweep() -> int:
    """Remove the folders that no process has open any more. Returns their number."""
    removed = 0
    for path in _listed():
        if path.name.startswith(".new-") and not (path / _USERS).exists():
            # Just made, or by a process that was killed. A maker whose draft goes makes another one.
            with suppress(OSError):
                if now_ns() - path.stat().st_mtime_ns > _DRAFT_NS:
                    shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".dead-"):
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_dir():
            removed += _remove_unused(path)
    with suppress(OSError):  # it has folders, or is not there
        _root_path().rmdir()
    return removed


def discard(namespace: str, store: str) -> bool:
    """Remove the folder of a namespace, also if processes have it open; False if there is none."""
    path = _root_path() / digest(store, namespace)
    dead = path.with_name(f".dead-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.rename(dead)
    except FileNotFoundError:
        return False
    shutil.rmtree(dead, ignore_errors=True)
    with suppress(OSError):  # others are in it
        path.parent.rmdir()
    return True


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
            if os.fstat(descriptor).st_size < _NOTED_BYTES:
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
