"""State that calls share: a namespace of arrays by name."""

from __future__ import annotations

import operator
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from typing import SupportsIndex, get_args

import numpy as np
import numpy.typing as npt

from slosched.errors import InvalidConfig, SloschedError
from slosched.functions.state import folders
from slosched.functions.state.array import Moved, StateArray
from slosched.functions.state.errors import StateLimit
from slosched.functions.state.local import LocalCopy, remove_copy
from slosched.functions.state.opening import open_store
from slosched.functions.state.store import KeyInfo, Limits, Merge, Store, check_name, check_same

#: What a journal notes in one piece.
_LARGEST_ARRAY = 4 * 10**9


class State:
    """A namespace in a global tier, with this host's copies.

    `store` is an address (opening.py) or a Store. With `own` the namespace must be new (NamespaceInUse
    otherwise), and `close` drops it: the run's process opens it so, and its calls without. The `limits` of the
    process that makes the namespace hold. With `private` it has a local tier of its own, which no other State
    sees, as if it stood on another host; that is for measuring what the shared one saves.

    A State may be used by several threads; an array's lock belongs to the handle. Close it, or use `with`.
    """

    def __init__(
        self,
        namespace: str,
        store: str | Store = "embedded",
        *,
        own: bool = False,
        limits: Limits | None = None,
        private: bool = False,
    ) -> None:
        check_name("namespace", namespace)
        self.namespace, self.own = namespace, own
        self._opened = isinstance(store, str)
        self.store = open_store(store) if isinstance(store, str) else store
        self.moved = Moved()
        self._pid = os.getpid()
        self._folder: folders.Folder | None = None
        self.space = self.store.open(namespace, own=own, limits=limits or Limits())
        try:
            self._folder = folders.open_folder(namespace, self.store.name)
            self._private = private
            name = f"private-{os.getpid()}-{os.urandom(4).hex()}" if private else "local"
            self._local = self._folder.path / name
            self._local.mkdir(exist_ok=True)
        except BaseException:
            with suppress(SloschedError):
                if own:
                    self.space.drop()
            self.space.close()
            if self._folder is not None:
                self._folder.close()
            if self._opened:
                self.store.close()
            raise

    def array(
        self,
        key: str,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: npt.DTypeLike = np.float64,
        merge: Merge = "overwrite",
    ) -> StateArray:
        """The array `key`, declared if it is new.

        Raises KeyMismatch if it exists otherwise, StateLimit, and OutOfResources without shared memory for it.
        """
        check_name("key", key)
        self._check_open()
        kind = _numeric(dtype)
        if merge not in get_args(Merge):
            raise InvalidConfig(f"merge is one of {', '.join(get_args(Merge))}, not {merge!r}")
        if merge != "overwrite" and (kind.kind == "b" or (kind.kind == "c" and merge == "max")):
            raise InvalidConfig(f"{kind} has no {merge}; use merge='overwrite' or another dtype")
        sizes = _sizes(shape)
        wanted = KeyInfo(key=key, id=os.urandom(8).hex(), shape=sizes, dtype=kind.str, merge=merge)
        if wanted.nbytes > _LARGEST_ARRAY:
            raise StateLimit(
                f"{key!r} has {wanted.nbytes:,} bytes, of {_LARGEST_ARRAY:,} at most; use several keys"
            )
        found = self.space.declare(wanted)
        check_same(wanted, found)
        return StateArray(self.space, LocalCopy(self._local, found), self.moved)

    def list(self) -> list[KeyInfo]:
        """The keys of the namespace, in order."""
        self._check_open()
        return self.space.keys()

    def delete(self, key: str) -> None:
        """Remove a key, everywhere; nothing happens if there is none."""
        self._check_open()
        found = self.space.find(key)
        self.space.delete(key)
        if found is not None:
            remove_copy(self._local, found)

    def evict(self, key: str) -> None:
        """Remove this host's copy of a key, with what was not pushed of it. The next read fetches it anew."""
        self._check_open()
        found = self.space.find(key)
        if found is not None:
            remove_copy(self._local, found)

    def close(self) -> None:
        """Leave the namespace; drop it if this run owns it. The host's copies go with the last process."""
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        if self._private and os.getpid() == self._pid:
            shutil.rmtree(self._local, ignore_errors=True)
        try:
            if self.own and os.getpid() == self._pid:
                self.space.drop()
        finally:
            with suppress(SloschedError):
                self.space.close()
            folder.close()
            if self._opened:
                self.store.close()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._folder is None:
            raise InvalidConfig("this State is closed; make another one")


def _sizes(shape: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    try:
        given = shape if isinstance(shape, Sequence) else (shape,)
        sizes = tuple(operator.index(each) for each in given)
        np.broadcast_to(
            np.int8(0), sizes
        )  # NumPy has limits for the number of axes and of elements
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"{shape!r} is not a shape: {error}") from None
    return sizes


def _numeric(dtype: npt.DTypeLike) -> np.dtype[np.generic]:
    try:
        kind = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"{dtype!r} is not a dtype: {error}") from None
    if (
        kind.kind not in "biufc"
        or not kind.isnative
        or kind.itemsize > (16 if kind.kind == "c" else 8)  # larger ones differ between machines
    ):
        raise InvalidConfig(f"state holds numbers of the machine's byte order, not {kind}")
    return kind
