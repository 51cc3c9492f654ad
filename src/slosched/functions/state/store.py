"""What a global tier must do: the protocol of `embedded.py` and `redis_store.py`, and its plain data.

A key is an array of bytes with a log that is only appended to. A commit changes any number of ranges of one key
at once: a reader sees all of it or nothing. Data arrives as one block for all of a part (ranges.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from slosched.errors import InvalidConfig
from slosched.functions.state.errors import KeyMismatch
from slosched.functions.state.ranges import Bytes, Part

Merge = Literal["overwrite", "sum", "max"]
Mode = Literal["read", "write"]
#: The longest name of a namespace or key, in characters.
LONGEST_NAME = 200
#: An append is one command, and no command is larger.
LARGEST_APPEND = 2**20
DEFAULT_WAIT_NS = 30_000_000_000


class Limits(msgspec.Struct, frozen=True):
    """The most that a namespace may hold: bytes as declared plus bytes appended, and keys."""

    bytes: int = 8 * 2**30
    keys: int = 10_000


class KeyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it was declared. `id` differs between a key and one of the same name made after its deletion."""

    key: str
    id: str
    shape: tuple[int, ...]
    dtype: str
    merge: Merge
    appended: int = 0

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        size = self.itemsize
        for each in self.shape:
            size *= each
        return size


class Commit(msgspec.Struct, frozen=True, kw_only=True):
    """One push: `data` for the elements of `part`, in their order. `writer` and `number` name it, so that it is
    never made twice; `token` is that of the write lock that its caller holds, 0 without one."""

    part: Part
    data: npt.NDArray[Any]
    writer: str
    number: int
    token: int = 0


def version_of(writer: str, number: int) -> str:
    """The version of a key after this commit."""
    return f"{writer}:{number}"


class Held(Protocol):
    """A lock that is held."""

    @property
    def token(self) -> int: ...
    def check(self) -> None:
        """Raise LockLost if the lease ran out."""
        ...

    def release(self) -> None: ...


class Space(Protocol):
    """One namespace in the global tier. Every method may raise StoreLost; those with a KeyInfo KeyDeleted."""

    def declare(self, info: KeyInfo) -> KeyInfo:
        """Make the key unless it is there; return what is there. Raises StateLimit."""
        ...

    def find(self, key: str) -> KeyInfo | None: ...
    def read(self, info: KeyInfo, part: Part) -> Bytes:
        """The bytes of these elements, all of one version."""
        ...

    def merge_lock(self, info: KeyInfo) -> AbstractContextManager[None]:
        """Exclude all other pushes that read what they change."""
        ...

    def commit(self, info: KeyInfo, commit: Commit) -> str:
        """Write the elements at once. Within `merge_lock`, fails if that was lost (LockLost).

        Returns the version that it replaced by `version_of`, or "" if the commit was made before."""
        ...

    def version(self, info: KeyInfo) -> str:
        """What every commit and every clear of values changes."""
        ...

    def committed(self, info: KeyInfo, writer: str) -> int:
        """The number of the writer's last commit; 0 if there was none."""
        ...

    def clear(self, info: KeyInfo, *, values: bool) -> None:
        """Empty the log, and with `values` make all bytes 0."""
        ...

    def append(self, info: KeyInfo, data: bytes, *, token: int) -> None:
        """Append to the log, at most LARGEST_APPEND bytes; `token` as in Commit. Raises StateLimit."""
        ...

    def appended(self, info: KeyInfo, start: int) -> bytes:
        """The log from byte `start` on."""
        ...

    def lock(self, info: KeyInfo, mode: Mode, timeout_ns: int) -> Held:
        """Raises LockTimeout."""
        ...

    def keys(self) -> list[KeyInfo]: ...
    def delete(self, key: str) -> None: ...
    def drop(self) -> None:
        """Remove the namespace and all its keys."""
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """A global tier."""

    @property
    def name(self) -> str:
        """The same for all processes that use the same tier."""
        ...

    def describe(self) -> str: ...
    def open(self, namespace: str, *, own: bool, limits: Limits) -> Space:
        """Open or make a namespace. With `own` it must be new: raises NamespaceInUse."""
        ...

    def namespaces(self) -> Mapping[str, tuple[int, int]]:
        """Each namespace with its number of keys and of bytes."""
        ...

    def drop(self, namespace: str) -> bool:
        """Remove a namespace; False if there was none."""
        ...

    def close(self) -> None: ...


def check_name(kind: str, name: str) -> None:
    """Raise InvalidConfig unless `name` can be that of a namespace or key."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise InvalidConfig(
            f"{kind} {str(name)[:40]!r} must be 1 to {LONGEST_NAME} printable characters"
        )


def check_same(wanted: KeyInfo, found: KeyInfo) -> None:
    """Raise KeyMismatch if a key was declared otherwise."""
    for name in ("shape", "dtype", "merge"):
        ours, theirs = getattr(wanted, name), getattr(found, name)
        if ours != theirs:
            raise KeyMismatch(
                f"key {wanted.key!r} has {name} {theirs}, not {ours}; delete it first or use another key"
            )
