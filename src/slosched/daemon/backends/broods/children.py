"""Children as the process sees them that wants them: `Watch` looks after all, `Brood` has those of one zygote.

Nothing here waits: sockets are read when they have something, what cannot be sent now is kept (bounded),
and one epoll descriptor says when there is something to do. No code of others here.

The caller that waits for the answer of a hung child ends it (`kill`). The zygote reaps each child, reports
how it ended in words, and ends every process that it left behind.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from slosched import child_processes
from slosched.daemon.backends.broods import packets

#: Packets for one child that did not fit into its socket yet.
_UNSENT_AT_MOST = 256
#: Packets read of one child in a turn: one that floods its socket must not hold up the others.
_PACKETS_AT_MOST = 64
_START = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "importlib.import_module(sys.argv[3]).main(int(sys.argv[1]))"
)


def start_zygote(
    module: str, env: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A new process that runs `main(fd)` of `module`, and this process's end of the socket `fd`.

    No PDEATHSIG: it would come with the end of the thread that calls this. The process ends when its socket
    does, and everything that it started with it. Raises OSError if it cannot be started.
    """
    near, far = packets.pair()
    with far:
        try:
            process = child_processes.start(
                [sys.executable, "-c", _START, str(far.fileno()), json.dumps(sys.path), module],
                stdout=subprocess.DEVNULL,
                stderr=None,
                pass_fds=(far.fileno(),),
                env=env,
            )
        except BaseException:
            near.close()
            raise
    near.setblocking(False)
    return process, near


class Watch:
    """One epoll descriptor over every socket of the children, and what to call for each.

    `changed` has the children whose `inbox` or `ended` changed since the last `step`.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}
        self.changed: dict[ChildRunner, None] = {}

    def fileno(self) -> int:
        """Readable when `step` has something to do."""
        return self._epoll.fileno()

    @property
    def ready(self) -> bool:
        """True if `step` has something to do."""
        return bool(self.changed) or bool(self._epoll.poll(0, 1))

    def wait(self, at_most_s: float) -> None:
        """Return when `step` has something to do, or after `at_most_s`."""
        if not self.changed:
            self._epoll.poll(at_most_s, 1)

    def step(self) -> list[ChildRunner]:
        """Do what is due. Returns the children whose `inbox` or `ended` changed."""
        for fd, _ in self._epoll.poll(0):
            call = self._calls.get(fd)
            if call is not None:
                call()
        changed, self.changed = list(self.changed), {}
        return changed

    def add(self, fd: int, call: Callable[[], None]) -> None:
        self._calls[fd] = call
        self._epoll.register(fd, select.EPOLLIN)

    def await_room(self, fd: int, *, wanted: bool) -> None:
        """Whether `fd` is also called for when it can be written to."""
        if fd in self._calls:
            self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def remove(self, fd: int) -> None:
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        if not self._epoll.closed:
            self._epoll.close()
        self._calls.clear()


class ChildRunner:
    """One child process. `inbox` has the packets it sent; `ended` says how it ended, empty while it lives.

    A process that the child forks holds the same socket: what serves in a child compares os.getpid()
    before it answers (cpu/child.py), and its end is seen by its parent, not by the socket.
    """

    unsent_at_most = _UNSENT_AT_MOST

    def __init__(self, brood: Brood, number: int, end: socket.socket) -> None:
        self._brood, self._watch, self.number, self._end = brood, brood.watch, number, end
        self._end.setblocking(False)
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self.inbox: deque[bytes] = deque()
        self.ended = ""
        self._watch.add(end.fileno(), self.step)

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Send a packet, or keep it until there is room; `fds` are kept as duplicates meanwhile."""
        if self.ended:
            return
        if self._unsent or not self._try(packet, fds):
            if len(self._unsent) >= self.unsent_at_most:
                self.kill("it takes no more messages")
                return
            try:
                self._unsent.append((packet, [os.dup(fd) for fd in fds]))
            except OSError as error:
                self.kill(f"no descriptor for a message to it: {error}")
                return
            self._watch.await_room(self._end.fileno(), wanted=True)

    def _try(self, packet: bytes, fds: Sequence[int]) -> bool:
        try:
            return packets.send(self._end, packet, fds)
        except OSError:  # it is gone; the zygote says how
            return True

    def step(self) -> None:
        """Read what it sent, send what it takes."""
        while self._unsent and self._try(*self._unsent[0]):
            packets.close_all(self._unsent.popleft()[1])
            if not self._unsent:
                self._watch.await_room(self._end.fileno(), wanted=False)
        for _ in range(_PACKETS_AT_MOST):
            if self.ended:
                return
            try:
                got = packets.receive(self._end)
            except EOFError:
                self._watch.remove(self._end.fileno())  # the zygote tells how it ended
                return
            except ValueError as error:
                self.kill(f"it sent {error}")
                return
            if got is None:
                return
            self.took(*got)
            self._watch.changed[self] = None

    def took(self, packet: bytes, fds: list[int]) -> None:
        """A packet came. No child is expected to send descriptors."""
        packets.close_all(fds)
        self.inbox.append(packet)

    def kill(self, why: str) -> None:
        """End the process and those that it started. `why` becomes `ended` at once."""
        if not self.ended:
            self._brood.kill(self)
            self.end(why)

    def end(self, words: str) -> None:
        """It is gone, or is being ended."""
        if self.ended:
            return
        self.ended = words
        self._watch.changed[self] = None
        self._watch.remove(self._end.fileno())
        self._end.close()
        while self._unsent:
            packets.close_all(self._unsent.popleft()[1])

    def fileno(self) -> int:
        return self._end.fileno()


class Brood:
    """The children of the zygote behind `end`, which speaks to it alone. `announce` gets a line for each line
    that a child printed, with its label. `lost` is called with words when the zygote is gone; all of its
    children have ended then.
    """

    def __init__(
        self,
        watch: Watch,
        end: socket.socket,
        announce: Callable[[str], None],
        lost: Callable[[str], None],
    ) -> None:
        self.watch, self._end, self._announce, self._lost = watch, end, announce, lost
        self._end.setblocking(False)
        self._children: dict[int, ChildRunner] = {}
        self._labels: dict[int, str] = {}
        self._orders: deque[tuple[bytes, Sequence[int]]] = deque()
        self._next = 0
        self.closed = False
        watch.add(end.fileno(), self._step)

    def spawn(self, label: str, kind: type[ChildRunner] = ChildRunner) -> ChildRunner:
        """A new child. It may end at any time, which `ended` says; `label` is human-readable.

        Raises OSError without a descriptor for it.
        """
        near, far = packets.pair()
        self._next += 1
        with far:
            self._order(packets.encode(packets.Spawn(self._next)), (far.fileno(),))
        child = kind(self, self._next, near)
        self._children[child.number] = child
        self._labels[child.number] = label
        if self.closed:
            self._children.clear()
            child.end("the process that starts it ended")
        return child

    def kill(self, child: ChildRunner) -> None:
        self._order(packets.encode(packets.Kill(child.number)))

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """A packet for the zygote itself, in order with those about children."""
        self._order(packet, fds)

    def has(self, child: ChildRunner) -> bool:
        """True until the zygote has reported the child's end, also of one that was told to end."""
        return self._children.get(child.number) is child

    def _order(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        if self.closed:
            return
        self._orders.append((packet, [os.dup(fd) for fd in fds]))
        self._send_orders()

    def _send_orders(self) -> None:
        while self._orders and not self.closed:
            try:
                if not packets.send(self._end, *self._orders[0]):
                    self.watch.await_room(self._end.fileno(), wanted=True)
                    return
            except OSError:
                return  # its end is seen when the socket is read
            packets.close_all(self._orders.popleft()[1])
        if not self.closed:
            self.watch.await_room(self._end.fileno(), wanted=False)

    def _step(self) -> None:
        self._send_orders()
        for _ in range(_PACKETS_AT_MOST):
            if self.closed:
                return
            try:
                got = packets.receive(self._end)
            except EOFError:
                self._give_up("the process that started it ended")
                return
            except ValueError as error:
                self._give_up(f"the process that started it sent {error}")
                return
            if got is None:
                return
            packets.close_all(got[1])
            self.heard(got[0])

    def heard(self, packet: bytes) -> None:
        """A packet of the zygote."""
        try:
            message = packets.from_zygote.decode(packet)
        except msgspec.DecodeError as error:
            self._give_up(f"the process that started it sent nonsense ({error})")
            return
        if isinstance(message, packets.Said):
            self._announce(f"{self._labels.get(message.number, 'a child')}: {message.text}")
        elif (child := self._children.pop(message.number, None)) is not None:
            child.step()  # what it said last
            child.end(message.words)
            self._labels.pop(message.number, None)

    def _give_up(self, words: str) -> None:
        if not self.closed:
            self.close(words)
            self._lost(words)

    def close(self, words: str) -> None:
        """Close the socket, which ends the zygote and its children; idempotent, does not wait."""
        if self.closed:
            return
        self.closed = True
        self.watch.remove(self._end.fileno())
        self._end.close()
        while self._orders:
            packets.close_all(self._orders.popleft()[1])
        for child in list(self._children.values()):
            child.end(words)
        self._children.clear()
        self._labels.clear()
