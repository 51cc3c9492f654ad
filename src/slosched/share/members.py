"""The members of one run as the experiment sees them: started by their command line, heard, and always ended.

A member (daemon/member) gets its Order as a JSON line on its standard input, then Begin and End; the input's
end tells it to end. It answers in JSON lines on a pipe of its own, whose descriptor is its last argument. What
its models print goes to a log file.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from slosched import child_processes
from slosched.clock import monotonic_ns
from slosched.errors import OutOfResources
from slosched.share.keeper import GROUP, Keeper
from slosched.share_spec import (
    Begin,
    End,
    FromMember,
    JobEnded,
    Order,
    Prepared,
    Progress,
    Ready,
    Status,
    ToMember,
)
from slosched.units import NS_PER_S

COMMAND = (sys.executable, "-m", "slosched.daemon.member")
#: The longest line that a member may send.
_LONGEST_LINE = 1 << 20
#: Read at a time from a member, so that one that says much does not keep the others waiting.
_CHUNK = 1 << 16
#: A log that grows beyond this is emptied: a model that prints without end must not fill the disk.
_LONGEST_LOG = 16 << 20
_LOOK_AT_LOGS_NS = NS_PER_S
_TAIL = 4096
_END_WITHIN_S = 15.0

_decoder = msgspec.json.Decoder(FromMember)


@dataclass
class Member:
    """One process and what it said. `problem`: how it ended before it should, in words; `died` is of itself."""

    order: Order
    process: subprocess.Popen[bytes]
    pipe: int
    log: Path
    ready: bool = False
    prepared: dict[int, Prepared] = field(default_factory=dict)
    ended: dict[int, JobEnded] = field(default_factory=dict)
    progress: dict[int, int] = field(default_factory=dict)
    gone: bool = False
    left: bool = False  # nothing of it is held any more
    problem: str = ""
    status: Status = Status.DIED
    unread: bytearray = field(default_factory=bytearray)
    unsent: deque[bytes] = field(default_factory=deque)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def serves(self) -> bool:
        """True if it is ready and lives: it can be begun."""
        return self.ready and not self.gone

    def open_jobs(self, jobs: Sequence[int] = ()) -> list[int]:
        """Those of `jobs` (empty: all) that are its own and of whose end it has not told."""
        mine = [place for place in self.order.jobs if not jobs or place in jobs]
        return [place for place in mine if place not in self.ended]

    def last_words(self) -> str:
        """The last line that the process wrote: usually its error."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return "".join(c for c in lines[-1][:300] if c.isprintable()) if lines else ""


class Members:
    """All members of a run. Use it as a context: leaving it ends every one, with what it started."""

    def __init__(self, command: Sequence[str] = COMMAND, keeper: Keeper | None = None) -> None:
        self._command = tuple(command)
        self._keeper = keeper
        self.all: list[Member] = []
        self._selector = selectors.DefaultSelector()
        self._next_look_ns = 0

    def __enter__(self) -> Members:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self, order: Order, log: Path, *, env: Mapping[str, str] | None = None) -> Member:
        """Start a member with `order`. Raises OutOfResources if the system has no room for a process."""
        near, far = os.pipe()
        try:
            with log.open("ab") as file:
                process = child_processes.start(
                    [*self._command, str(far)],
                    stdin=subprocess.PIPE,
                    stdout=file.fileno(),
                    stderr=file.fileno(),
                    pass_fds=(far,),
                    env=env,
                )
        except OSError as error:
            os.close(near)
            raise OutOfResources(f"a member does not start: {error}") from error
        finally:
            os.close(far)
        assert process.stdin is not None
        os.set_blocking(near, False)
        os.set_blocking(process.stdin.fileno(), False)
        if self._keeper is not None:
            self._keeper.keep(GROUP, process.pid)
        member = Member(order, process, near, log)
        self.all.append(member)
        self._selector.register(near, selectors.EVENT_READ, member)
        self._send(member, msgspec.json.encode(order))
        return member

    def tell(self, member: Member, message: ToMember) -> None:
        """Send `message`; that a member is gone is noticed elsewhere."""
        if isinstance(message, Begin):
            for place in member.order.jobs:
                if not message.jobs or place in message.jobs:
                    member.ended.pop(place, None)
                    member.progress.pop(place, None)
        self._send(member, msgspec.json.encode(message))

    def begin(
        self, members: Sequence[Member], at_ns: int, until_ns: int, jobs: Sequence[int]
    ) -> None:
        """Begin those of `jobs` that the members have prepared."""
        for member in members:
            mine = tuple(place for place in jobs if place in member.prepared)
            if mine and member.serves:
                self.tell(member, Begin(at_ns=at_ns, until_ns=until_ns, jobs=mine))

    def end(self, members: Sequence[Member]) -> None:
        """No more requests: what runs ends."""
        for member in members:
            if member.serves:
                self.tell(member, End())

    # -------------------------------------------------------------------------------- hearing

    def wait(
        self, done: Callable[[], bool], until_ns: int, *, each: Callable[[], bool] | None = None
    ) -> bool:
        """Hear the members until `done()`; False at `until_ns` (of monotonic_ns), or once `each()` is true.

        `each` is called ten times a second.
        """
        while not done():
            now = monotonic_ns()
            if now >= until_ns or (each is not None and each()):
                return False
            self.hear(min(0.1, (until_ns - now) / NS_PER_S))
        return True

    def hear(self, timeout_s: float) -> None:
        """Take in what the members say within `timeout_s`, and which of them ended."""
        for key, events in self._selector.select(timeout_s):
            if events & selectors.EVENT_READ:
                self._read(key.data)
            if events & selectors.EVENT_WRITE:
                self._write(key.data)
        for member in self.all:
            if not member.gone and member.process.poll() is not None:
                self._ended(member)
        if monotonic_ns() >= self._next_look_ns:
            self._next_look_ns = monotonic_ns() + _LOOK_AT_LOGS_NS
            for member in self.all:
                with contextlib.suppress(OSError):
                    if member.log.stat().st_size > _LONGEST_LOG:
                        os.truncate(member.log, 0)

    def _read(self, member: Member) -> bool:
        """False if nothing was there."""
        try:
            data = os.read(member.pipe, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(member.pipe)
            os.close(member.pipe)
            member.pipe = -1
            return False
        member.unread += data
        *lines, rest = member.unread.split(b"\n")
        member.unread = rest
        try:
            for line in lines:
                self._take(member, _decoder.decode(line))
            if len(rest) > _LONGEST_LINE:
                raise msgspec.DecodeError(f"a line of {len(rest)} bytes")
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            self.kill(member, Status.FAILED, f"its message cannot be read: {error}")
            return False
        return True

    def _take(self, member: Member, message: FromMember) -> None:
        if isinstance(message, Ready):
            member.ready = True
            for each in message.prepared:
                if each.job in member.order.jobs:
                    member.prepared[each.job] = each
        elif isinstance(message, JobEnded):
            if message.job in member.order.jobs:
                member.ended.setdefault(message.job, message)
        elif isinstance(message, Progress):
            for place, number in message.ended.items():
                if place in member.order.jobs:
                    member.progress[place] = number

    def _ended(self, member: Member) -> None:
        """The process is gone: hear its last messages, and end what it has left behind."""
        while member.pipe >= 0 and not member.gone and self._read(member):
            pass
        if member.gone:
            return
        member.gone = True
        code = member.process.returncode
        member.problem = member.problem or f"its process {_how_ended(member, code)}"
        self._leave(member)

    def kill(self, member: Member, status: Status, problem: str) -> None:
        """SIGKILL the member, for `problem`."""
        if member.gone:
            return
        member.gone, member.status = True, status
        words = member.last_words()
        member.problem = problem + (f" (its last words: {words})" if words else "")
        member.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(_END_WITHIN_S)
        self._leave(member)

    # -------------------------------------------------------------------------------- sending

    def _send(self, member: Member, text: bytes) -> None:
        if member.gone:
            return
        member.unsent.append(text + b"\n")
        self._write(member)

    def _write(self, member: Member) -> None:
        stdin = member.process.stdin
        if stdin is None or stdin.closed:
            return
        descriptor = stdin.fileno()
        full = False
        try:
            while member.unsent and not full:
                text = member.unsent.popleft()
                sent = os.write(descriptor, text)
                if sent < len(text):
                    member.unsent.appendleft(text[sent:])
        except BlockingIOError:
            member.unsent.appendleft(text)
            full = True
        except OSError:  # it has closed its input; that it ended is noticed elsewhere
            member.unsent.clear()
        watched = descriptor in self._selector.get_map()
        if full and not watched:
            self._selector.register(descriptor, selectors.EVENT_WRITE, member)
        elif watched and not full:
            self._selector.unregister(descriptor)

    # ---------------------------------------------------------------------------------- ending

    def stop(self) -> None:
        """End all: their inputs close, and SIGKILL after a time, also for what they have started."""
        try:
            for member in self.all:
                self._close_input(member)
            give_up_ns = monotonic_ns() + int(_END_WITHIN_S * NS_PER_S)
            for member in self.all:
                left_s = max(0.01, (give_up_ns - monotonic_ns()) / NS_PER_S)
                child_processes.end(member.process, within_s=left_s, ask=False)
        finally:  # also after a second Ctrl-C
            for member in self.all:
                if member.process.poll() is None:
                    member.process.kill()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        member.process.wait(1.0)
                self._leave(member)
                member.gone = True
            self._selector.close()

    def _close_input(self, member: Member) -> None:
        stdin = member.process.stdin
        if stdin is None or stdin.closed:
            return
        if stdin.fileno() in self._selector.get_map():
            self._selector.unregister(stdin.fileno())
        with contextlib.suppress(OSError):
            stdin.close()

    def _leave(self, member: Member) -> None:
        """Close what belongs to a process that is gone, and end what it left in its session."""
        if member.left:
            return  # its number may be another process's by now
        member.left = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(member.pid, signal.SIGKILL)
        if self._keeper is not None:
            self._keeper.release(GROUP, member.pid)
        self._close_input(member)
        if member.pipe >= 0:
            if member.pipe in self._selector.get_map():
                self._selector.unregister(member.pipe)
            os.close(member.pipe)
            member.pipe = -1


def _how_ended(member: Member, code: int) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        ended = f"(pid {member.pid}) was ended by {name}"
    else:
        ended = f"(pid {member.pid}) ended with exit code {code}"
    words = member.last_words()
    return f"{ended}; its last words: {words}" if words else f"{ended} without a word"
