"""One look at a repository: the folders NAME/VERSION, what their files are, and what cannot be a version.

A look reads no file: a version's fingerprint is made of the sizes, times and numbers of its files. Names that
begin with a point are passed over, and so are files beside folders of models and of versions.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from slosched.daemon.repository.beneath import NotBelow, open_below
from slosched.errors import InvalidConfig

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_NAME_CHARS = 200
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
#: Entries of one folder, files of one version, and folders within it.
_ENTRIES_AT_MOST = 20_000
_FILES_AT_MOST = 1_000
_DEPTH_AT_MOST = 8
#: Reasons of one look; the rest is cut where they are told anyway.
_FAULTS_AT_MOST = 1_000
_PASSED_OVER = ("__pycache__",)


@dataclass(frozen=True, slots=True)
class Found:
    """The folder of a version. `changed_ns` is when the newest of its files was changed or put there."""

    folder: str  # NAME/VERSION
    fingerprint: str
    changed_ns: int
    files: frozenset[str]  # names directly in it
    modules: frozenset[str] = frozenset()  # "package.module" of its Python files


@dataclass(slots=True)
class Look:
    """What was there: versions, and (path, reason) of what cannot be one."""

    found: list[Found] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)

    def fault(self, path: str, reason: str) -> None:
        if len(self.faults) < _FAULTS_AT_MOST:
            self.faults[shown(path)] = reason


def shown(path: str) -> str:
    """`path` for a message: what is not printable as an escape."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in path
    )


def in_words(error: Exception) -> str:
    """Why something cannot be opened or read."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error)


def look_at(root: int) -> Look:
    """Look at the repository behind the descriptor `root`. Raises OSError if it cannot be read at all."""
    look = Look()
    for name, kind in _entries(root):
        if kind == "file":
            continue
        if kind == "other":
            look.fault(name, "it is neither a folder nor a file")
            continue
        if not _NAME.fullmatch(name) or len(name) > _NAME_CHARS:
            reason = (
                f"a model's name has at most {_NAME_CHARS} letters, digits and _ . + -, and begins with a "
                "letter, a digit or _"
            )
            look.fault(name, reason)
            continue
        try:
            _look_at_model(look, root, name)
        except (OSError, InvalidConfig) as error:
            look.fault(name, in_words(error))
    return look


def _look_at_model(look: Look, root: int, name: str) -> None:
    with _folder(root, name) as fd:
        if fd is None:
            return  # a link to a file
        versions = 0
        for entry, kind in _entries(fd):
            path = f"{name}/{entry}"
            if kind == "file":
                continue
            versions += 1
            if not _VERSION.fullmatch(entry):
                reason = "a version is a whole number of 1 to 9 digits, without zeros in front"
                look.fault(path, reason)
                continue
            try:
                look.found.append(look_at_version(root, path))
            except (OSError, InvalidConfig) as error:
                look.fault(path, in_words(error))
        if not versions:
            look.fault(name, f"it has no folder of a version, such as {name}/1")


def look_at_version(root: int, path: str) -> Found:
    """The folder of a version at `path` below `root`. Raises NotBelow, InvalidConfig, OSError."""
    walk = _Walk(root, path)
    with _folder(root, path) as fd:
        if fd is None:
            raise NotBelow("it is a file, and should be a folder")
        walk.note("", os.fstat(fd))
        walk.folder(fd, "", 0)
    digest = hashlib.blake2b(repr(sorted(walk.seen)).encode(), digest_size=16)
    return Found(
        path,
        digest.hexdigest(),
        walk.changed_ns,
        frozenset(file for file in walk.files if "/" not in file),
        frozenset(
            file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for file in walk.files
            if file.endswith(".py")
        ),
    )


def files_of(root: int, path: str) -> list[str]:
    """The paths, below `path`, of the files of a version, sorted. Raises InvalidConfig, OSError."""
    walk = _Walk(root, path)
    with _folder(root, path) as fd:
        if fd is not None:
            walk.folder(fd, "", 0)
    return sorted(walk.files)


class _Walk:
    """All files of one version."""

    def __init__(self, root: int, path: str) -> None:
        self._root, self._path = root, path
        self.seen: list[tuple[str, int, int, int]] = []
        self.files: list[str] = []
        self.changed_ns = 0

    def note(self, path: str, status: os.stat_result) -> None:
        self.changed_ns = max(self.changed_ns, status.st_ctime_ns, status.st_mtime_ns)
        if stat.S_ISREG(status.st_mode):
            self.seen.append((path, status.st_size, status.st_mtime_ns, status.st_ino))
            self.files.append(path)
            if len(self.files) > _FILES_AT_MOST:
                raise InvalidConfig(f"it has more than {_FILES_AT_MOST} files")

    def folder(self, fd: int, prefix: str, depth: int) -> None:
        if depth > _DEPTH_AT_MOST:
            raise InvalidConfig(f"its folders are more than {_DEPTH_AT_MOST} deep")
        for entry in _scanned(fd):
            if entry.name.startswith(".") or entry.name in _PASSED_OVER:
                continue
            path = f"{prefix}{entry.name}"
            if entry.is_symlink():
                self._link(path)
            elif entry.is_dir(follow_symlinks=False):
                with _folder(self._root, f"{self._path}/{path}") as inner:
                    if inner is not None:
                        self.folder(inner, f"{path}/", depth + 1)
            else:
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    raise NotBelow(f"{shown(path)!r} is neither a file nor a folder")
                self.note(path, status)

    def _link(self, path: str) -> None:
        """A link counts as what it leads to; folders behind links are not walked."""
        try:
            target = open_below(self._root, f"{self._path}/{path}")
        except NotBelow as error:
            raise NotBelow(f"{shown(path)!r}: {error}") from None
        except FileNotFoundError:
            raise InvalidConfig(f"{shown(path)!r} is a link to nothing") from None
        try:
            self.note(path, os.fstat(target))
        finally:
            os.close(target)


@contextmanager
def _folder(root: int, path: str) -> Iterator[int | None]:
    """A descriptor of the folder at `path`; None: it is a file."""
    fd = open_below(root, path)
    try:
        yield fd if stat.S_ISDIR(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def _scanned(fd: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(fd) as entries:
        for count, entry in enumerate(entries):
            if count >= _ENTRIES_AT_MOST:
                raise InvalidConfig(f"it has more than {_ENTRIES_AT_MOST} entries")
            yield entry


def _entries(fd: int) -> list[tuple[str, str]]:
    """Names and kinds (folder, file, other), sorted; what a link leads to is not known yet: "folder"."""
    found: list[tuple[str, str]] = []
    for entry in _scanned(fd):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() or entry.is_dir(follow_symlinks=False):
            kind = "folder"
        else:
            kind = "file" if entry.is_file(follow_symlinks=False) else "other"
        found.append((entry.name, kind))
    return sorted(found)
