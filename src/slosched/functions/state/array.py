"""One array of the state, as a call sees it: a view of this host's copy, exchanged on demand.

Nothing is sent, and fetched is only what is read for the first time. Views are live: what another process
of this host writes or pulls shows in them at once, so elements may be of different pulls. `copy` is of one
moment of this host, and a pull takes one version of the global tier; `lock` is for more than that.

A process that writes through a view while another one pulls on the same host may lose that write, as in
HOGWILD!; `set` and `set_chunk` lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.errors import InvalidConfig
from slosched.functions.state.errors import KeyDeleted, LockLost
from slosched.functions.state.local import Journal, LocalCopy
from slosched.functions.state.ranges import Part, Ranges, gathered, part_of, whole, within
from slosched.functions.state.store import (
    DEFAULT_WAIT_NS,
    LARGEST_APPEND,
    Commit,
    Held,
    Mode,
    Space,
    version_of,
)

#: Times that a merging push is begun again after its mutex was lost.
_TRIES = 5


@dataclass
class Moved:
    """What this process exchanged with the global tier, in bytes of values."""

    pulled_bytes: int = 0
    pushed_bytes: int = 0
    pulls: int = 0
    pushes: int = 0


class StateArray:
    """Made by State.array. Any method may raise StoreLost and KeyDeleted.

    Elements are counted in the flat array (C order). Arrays begin as zeros, also with merge "max".
    """

    def __init__(self, space: Space, local: LocalCopy, moved: Moved) -> None:
        self._space, self._local, self._moved = space, local, moved
        self.info = local.info
        self._held: Held | None = None

    def __repr__(self) -> str:
        info = self.info
        return f"StateArray({info.key!r}, {info.shape}, {info.dtype}, merge={info.merge!r})"

    @property
    def key(self) -> str:
        return self.info.key

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._local.dtype

    @property
    def merge(self) -> str:
        return self.info.merge

    # Reading and writing this host's copy.

    def get(self, *, writable: bool = False) -> npt.NDArray[Any]:
        """A view of the array, fetched as far as this host does not have it. Never a copy.

        What is written through a writable view is noticed, and pushed by the next push.
        """
        return self._view(0, self._local.size, writable).reshape(self.shape)

    def get_chunk(self, start: int, stop: int, *, writable: bool = False) -> npt.NDArray[Any]:
        """A flat view of elements [start, stop); only blocks of 64 KiB that they touch are fetched."""
        self._check_range(start, stop)
        return self._view(start, stop, writable)

    def copy(self) -> npt.NDArray[Any]:
        """A copy that no other exchange or `set` of this host interrupts."""
        local = self._local
        with local.locked():
            self._fetch(0, local.size)
            return local.value.reshape(self.shape).copy()

    def set(self, values: npt.ArrayLike) -> None:
        """Replace the whole array on this host."""
        given = self._fitted(values, self.shape)
        self._set(0, given)

    def set_chunk(self, start: int, values: npt.ArrayLike) -> None:
        """Replace the flat elements from `start` on, on this host."""
        given = self._fitted(values, None)
        self._check_range(start, start + given.size)
        self._set(start, given)

    # Exchanging it with the global tier.

    def push(self) -> int:
        """Send what was changed on this host; with merge "overwrite" the whole array, if any of it was changed.

        The push is atomic: others see all of it or nothing. With "sum" the changes since the last exchange are
        added, with "max" the larger element stays; both lose nothing of concurrent pushes. Returns the bytes
        sent. Raises LockLost if this handle's write lock was lost.
        """
        local = self._local
        with local.locked():
            if self.merge != "overwrite":
                return self._push(part_of(self._changes()))
            if not local.changed().any():
                return 0
            self._fetch(0, local.size)
            return self._push(Part(slice(0, local.size)))

    def push_partial(self, mask: npt.ArrayLike | Sequence[tuple[int, int]] | None = None) -> int:
        """The same for a part: a boolean mask of the array's shape, ranges (start, stop), or what was changed.

        Only those elements are sent; with "sum", those of them that were changed.
        """
        local = self._local
        wanted = None if mask is None else self._mask(mask)
        with local.locked():
            if wanted is None:
                wanted = self._changes()
            elif self.merge == "sum":
                wanted &= self._changes()
            else:
                self._fetch_ranges(local.missing_of(wanted))
            return self._push(part_of(wanted))

    def pull(self, *, discard: bool = False) -> int:
        """Fetch the whole array, in one version. Returns the bytes fetched: 0 if this host has that version.

        With merge "overwrite" it also has it while it alone pushes.

        What was changed on this host and not pushed stays, unless `discard`.
        """
        local = self._local
        if not discard and self.merge == "overwrite" and self._is_current():
            return 0
        with local.locked():
            self._settle()
            # Asked before the read, so that what is read is of this version or a later one.
            version = self._space.version(self.info).encode()
            same = local.version == version and local.fetched.all()
            merges = discard or self.merge == "max"
            if same and not (merges and local.changed().any()):
                return 0
            moved = self._take(whole(local.size), discard=discard)
            local.header["version"] = version
            return moved

    # The log of the key.

    def append(self, values: npt.ArrayLike) -> None:
        """Append values to the log of the key, in the global tier at once and in one piece (at most 1 MiB)."""
        data = self._fitted(values, None).tobytes()
        if len(data) > LARGEST_APPEND:
            raise InvalidConfig(
                f"{len(data):,} bytes are more than one append takes, {LARGEST_APPEND:,}; append several times"
            )
        self._space.append(self.info, data, token=self._token)
        self._moved.pushed_bytes += len(data)

    def read_appended(self, start: int = 0) -> npt.NDArray[Any]:
        """A flat copy of the log from element `start` on, in the order of the appends."""
        data = self._space.appended(self.info, start * self.dtype.itemsize)
        self._moved.pulled_bytes += len(data)
        return np.frombuffer(bytearray(data), self.dtype)

    def clear_appended(self) -> None:
        """Empty the log."""
        self._space.clear(self.info, values=False)

    # The key itself.

    @property
    def size(self) -> int:
        """The array's bytes."""
        return self.info.nbytes

    def clear(self) -> None:
        """Make the array zeros, everywhere, and empty the log; what was not pushed on this host is lost."""
        local = self._local
        with local.locked():
            self._settle()
            self._space.clear(self.info, values=True)
            local.dirty[:] = False
            local.value[:] = 0
            if local.has_base:
                local.base[:] = 0
            local.fetched[:] = True

    def delete(self) -> None:
        """Remove the key, everywhere. Other handles of it raise KeyDeleted."""
        self._space.delete(self.key)
        self._local.remove()

    @contextmanager
    def lock(self, mode: Mode = "write", *, timeout_ns: int = DEFAULT_WAIT_NS) -> Iterator[None]:
        """Hold the key's lock across all hosts: many readers, or one writer. Not reentrant.

        It excludes those that lock, not those that do not. Where the store has leases they are renewed; if one
        runs out nevertheless, pushes of this handle and the end of the block raise LockLost. Raises
        LockTimeout.
        """
        if mode not in ("read", "write"):
            raise InvalidConfig(f"a lock is 'read' or 'write', not {mode!r}")
        if self._held is not None:
            raise InvalidConfig(
                f"this handle of {self.key!r} holds a lock already; end that block first"
            )
        held = self._held = self._space.lock(self.info, mode, timeout_ns)
        try:
            yield
        finally:
            self._held = None
            held.release()
        held.check()

    # What is behind it; all within the local lock.

    def _view(self, start: int, stop: int, writable: bool) -> npt.NDArray[Any]:
        local = self._local
        if writable or local.missing(start, stop).size:
            with local.locked():
                self._fetch(start, stop)
                if writable:
                    local.keep_base()
        view = local.value[start:stop]
        view.flags.writeable = writable
        return view

    def _set(self, start: int, values: npt.NDArray[Any]) -> None:
        local = self._local
        stop = start + values.size
        if not values.size:
            return
        with local.locked():
            if self.merge == "sum":
                self._fetch(start, stop)
                local.keep_base()
            else:
                # Blocks that are replaced as a whole need not be fetched.
                first, last = -(-start // local.block), stop // local.block
                last = local.blocks if stop == local.size else last
                if start % local.block:
                    self._fetch(start, start + 1)
                if last < local.blocks and stop % local.block:
                    self._fetch(stop - 1, stop)
                local.dirty[start:stop] = True
                local.value[start:stop] = values
                local.fetched[first:last] = (
                    True  # last: views of other processes do not wait for the lock
                )
                return
            local.value[start:stop] = values

    def _fetch(self, start: int, stop: int) -> None:
        self._fetch_ranges(self._local.missing(start, stop))

    def _fetch_ranges(self, missing: Ranges) -> None:
        if len(missing):
            self._settle()
            self._take(missing)

    def _take(self, ranges: Ranges, *, discard: bool = False) -> int:
        local = self._local
        data = self._space.read(self.info, within(ranges))
        self._moved.pulled_bytes += data.nbytes
        self._moved.pulls += 1
        if discard:
            local.dirty[:] = False
            if local.has_base:
                local.value[:] = local.base
        if len(ranges):
            local.absorb(ranges, data.view(self.dtype))
        return data.nbytes

    def _is_current(self) -> bool:
        """Whether this host has the version of the global tier. Found without the local lock: behind a push, a
        process need not wait for the pushes of others of its host to learn that there is nothing to fetch."""
        try:
            version = self._space.version(self.info).encode()
        except KeyDeleted:  # `locked` does what is to be done then
            return False
        return self._local.is_whole(version)

    def _changes(self) -> npt.NDArray[np.bool_]:
        local = self._local
        return local.differing() if self.merge == "sum" else local.changed()

    def _push(self, part: Part) -> int:
        if self._held is not None:
            self._held.check()
        if not part.count:
            self._settle()
            return 0
        if self.merge == "overwrite":
            return self._send(part)
        for left in reversed(range(_TRIES)):
            try:
                with self._space.merge_lock(self.info):
                    self._settle(merging=True)
                    return self._send_merged(self._left(part))
            except LockLost:
                if self._held is not None:
                    self._held.check()
                if not left:
                    raise
        raise AssertionError

    def _left(self, part: Part) -> Part:
        """The part, less what a settled push has sent already."""
        if self.merge != "sum":
            return part
        return part_of(part.mask(self._local.size) & self._changes())

    def _send(self, part: Part) -> int:
        local = self._local
        data = gathered(local.value, part)
        self._commit(part, data)
        self._sent(part, data)
        return data.nbytes

    def _send_merged(self, part: Part) -> int:
        if not part.count:
            return 0
        local, space = self._local, self._space
        ours = gathered(local.value, part)
        theirs = space.read(self.info, part).view(self.dtype)
        self._moved.pulled_bytes += theirs.nbytes
        if self.merge == "max":
            self._commit(part, np.maximum(theirs, ours))
            self._sent(part, ours)
            return ours.nbytes
        change = np.asarray(ours) - np.asarray(gathered(local.base, part))
        journal = Journal(
            number=int(local.header["number"][0]) + 1,
            part=part.packed(local.size),
            base=ours.tobytes(),
        )
        local.note(journal)
        self._commit(part, theirs + change)
        local.complete(journal, part)
        return ours.nbytes

    def _commit(self, part: Part, data: npt.NDArray[Any]) -> None:
        local = self._local
        # A number is never used twice, also when it did not arrive.
        local.header["number"] += 1
        commit = Commit(
            part=part,
            data=data,
            writer=local.writer,
            number=int(local.header["number"][0]),
            token=self._token,
        )
        replaced = self._space.commit(self.info, commit)
        if self.merge == "overwrite" and replaced and replaced.encode() == local.version:
            # No other host pushed since the last pull, so this one has what the global tier has now. With the
            # other merges that may hold something else than what was sent.
            local.header["version"] = version_of(commit.writer, commit.number).encode()
        self._moved.pushed_bytes += data.nbytes
        self._moved.pushes += 1

    @property
    def _token(self) -> int:
        return self._held.token if self._held is not None else 0

    def _sent(self, part: Part, data: npt.NDArray[Any]) -> None:
        local = self._local
        if local.has_base:
            local.base[part.where] = data
        local.dirty[part.where] = False

    def _settle(self, *, merging: bool = False) -> None:
        """Find out about a push that was interrupted between its commit and its end here.

        Its commit may still be on its way to the store. With the merge mutex it comes too late, so what the
        store says holds.
        """
        local = self._local
        journal = local.journal()
        if journal is None:
            return
        if not merging:
            with self._space.merge_lock(self.info):
                return self._settle(merging=True)
        if self._space.committed(self.info, local.writer) >= journal.number:
            local.complete(journal)
        else:
            local.forget()

    # What callers give.

    def _fitted(self, values: npt.ArrayLike, shape: tuple[int, ...] | None) -> npt.NDArray[Any]:
        try:
            given = np.asarray(values)
        except ValueError as error:
            raise InvalidConfig(f"{self.key!r} holds {self.dtype}: {error}") from None
        if shape is not None and given.shape != shape:
            raise InvalidConfig(f"{self.key!r} has shape {shape}, not {given.shape}")
        integers = given.dtype.kind in "iu" and self.dtype.kind in "iu"
        fits = not given.size or integers or np.can_cast(given.dtype, self.dtype, "same_kind")
        fitted = given.astype(self.dtype, copy=False) if fits else given
        if not fits or (integers and fitted is not given and (fitted != given).any()):
            raise InvalidConfig(
                f"{self.key!r} holds {self.dtype}, and these {given.dtype} do not fit into it"
            )
        return fitted.ravel()

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self._local.size:
            raise InvalidConfig(
                f"[{start}, {stop}) is not within the {self._local.size} elements of {self.key!r}"
            )

    def _mask(self, given: Any) -> npt.NDArray[np.bool_]:
        array = np.asarray(given)
        size = self._local.size
        if array.dtype == np.bool_:
            if array.shape not in (self.shape, (size,)):
                raise InvalidConfig(
                    f"a mask of {self.key!r} has shape {self.shape}, not {array.shape}"
                )
            return array.ravel().copy()
        mask = np.zeros(size, np.bool_)
        if array.size and (array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu"):
            raise InvalidConfig("a part is a boolean mask, or ranges as (start, stop)")
        for start, stop in array.reshape(-1, 2).astype(np.int64):
            self._check_range(int(start), int(stop))
            mask[start:stop] = True
        return mask
