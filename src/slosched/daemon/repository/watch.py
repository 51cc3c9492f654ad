"""A worker's side of the process that looks at its repository (watcher.py), which starts, reads and ends it.

Nothing here waits but `first`. A process that ended is started again, after longer and longer pauses; meanwhile
the worker offers what it did.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from slosched import child_processes
from slosched.clock import Clock, now_ns
from slosched.daemon.repository.listing import Listing
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S

_LOOK_EVERY_NS = 100 * NS_PER_MS
_READ_BYTES = 64 * 1024
#: A longer listing is not one that the process writes: names, reasons and sources have bounds.
_LISTING_AT_MOST = 64 << 20
_PAUSE_NS, _LONGEST_PAUSE_NS = NS_PER_S, 30 * NS_PER_S
_decode = msgspec.msgpack.Decoder(Listing).decode


class RepositoryWatch:
    """Watches `folder`. `announce` gets a line when the process ended. Raises InvalidConfig for no folder."""

    def __init__(
        self, folder: str, announce: Callable[[str], None], *, clock: Clock = now_ns
    ) -> None:
        if not Path(folder).is_dir():
            raise InvalidConfig(f"repository {folder}: there is no such folder")
        self._folder, self._announce, self._clock = folder, announce, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._pause_ns = _PAUSE_NS
        self._again_ns = 0
        self.due_ns = 0  # `take` has nothing to do before
        self._start()

    @property
    def pid(self) -> int:
        """The process that looks; 0: there is none now."""
        return 0 if self._process is None else self._process.pid

    def first(self, within_ns: int) -> Listing | None:
        """Wait for the first listing; None: it did not come in time."""
        give_up_ns = self._clock() + within_ns
        while self._clock() < give_up_ns:
            output = None if self._process is None else self._process.stdout
            if output is not None:
                select.select([output], [], [], 0.1)
            else:
                select.select([], [], [], 0.1)
            listing = self.take(now_ns=self._clock())
            if listing is not None:
                return listing
        return None

    def take(self, *, now_ns: int) -> Listing | None:
        """The newest listing, if there is news. Reads a part of a long one at each call."""
        self.due_ns = now_ns + _LOOK_EVERY_NS
        process = self._process
        if process is None:
            if now_ns >= self._again_ns:
                self._start()
            return None
        assert process.stdout is not None
        try:
            data = os.read(process.stdout.fileno(), _READ_BYTES)
        except BlockingIOError:
            return None
        if not data:
            self._ended("ended")
            return None
        self._rest += data
        if len(data) == _READ_BYTES:
            self.due_ns = now_ns
        return self._listing()

    def _listing(self) -> Listing | None:
        found: Listing | None = None
        while len(self._rest) >= 4:
            size = int.from_bytes(self._rest[:4], "big")
            if size > _LISTING_AT_MOST:
                self._ended("wrote nonsense")
                return None
            if len(self._rest) < 4 + size:
                break
            frame, self._rest = self._rest[4 : 4 + size], self._rest[4 + size :]
            try:
                found = _decode(frame)
            except msgspec.DecodeError:
                self._ended("wrote nonsense")
                return None
            self._pause_ns = _PAUSE_NS
        return found

    def _start(self) -> None:
        self._rest = b""
        argv = [sys.executable, "-m", "slosched.daemon.repository.watcher", self._folder]
        try:
            self._process = child_processes.start(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None
            )
        except OSError as error:
            self._announce(f"repository {self._folder}: nothing looks at it: {error}")
            self._await()
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def _ended(self, how: str) -> None:
        self._end_process()
        self._announce(
            f"repository {self._folder}: the process that looks at it {how}; another is started"
        )
        self._await()

    def _await(self) -> None:
        self._again_ns = self._clock() + self._pause_ns
        self._pause_ns = min(2 * self._pause_ns, _LONGEST_PAUSE_NS)

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        child_processes.end(process, within_s=0.5)

    def close(self) -> None:
        """End the process; idempotent, bounded by a second."""
        self._end_process()
        self._again_ns = 2**63
