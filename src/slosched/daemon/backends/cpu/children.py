"""Processes that run code of others, as the worker sees them: `Nursery` starts them, `ChildRunner` is one.

Nothing here waits: sockets are read when they have something, what cannot be sent now is kept (bounded),
and one epoll descriptor says when there is something to do. No torch here, and no model.

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
from collections.abc import Callable, Sequence

import msgspec

from slosched import child_processes, errors
from slosched.clock import anchor_ns, now_ns
from slosched.config import WorkerConfig
from slosched.daemon.backends.cpu import wire
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import NS_PER_S

#: Importing torch, transformers and two libraries takes 5 to 60 s.
_OPEN_AT_MOST_NS = 300 * NS_PER_S
#: Packets for one child that did not fit into its socket yet.
_UNSENT_AT_MOST = 256
#: Packets read of one child in a turn: one that floods its socket must not hold up the others.
_PACKETS_AT_MOST = 64
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from slosched.daemon.backends.cpu.zygote import main; main(int(sys.argv[1]))"
)


class ChildRunner:
    """One child process. `inbox` has the packets it sent; `ended` says how it ended, empty while it lives.

    A process that the child forks holds the same socket: what serves in a child compares os.getpid()
    before it answers (child.py), and its end is seen by its parent, not by the socket.
    """

    def __init__(self, nursery: Nursery, number: int, end: socket.socket) -> None:
        self._nursery, self.number, self._end = nursery, number, end
        self._end.setblocking(False)
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        self.inbox: deque[bytes] = deque()
        self.ended = ""

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """Send a packet, or keep it until there is room; `fds` are kept as duplicates meanwhile."""
        if self.ended:
            return
        if self._unsent or not self._try(packet, fds):
            if len(self._unsent) >= _UNSENT_AT_MOST:
                self.kill("it takes no more messages")
                return
            self._unsent.append((packet, [os.dup(fd) for fd in fds]))
            self._nursery.watch(self, writing=True)

    def _try(self, packet: bytes, fds: Sequence[int]) -> bool:
        try:
            return wire.send(self._end, packet, fds)
        except OSError:  # it is gone; the zygote says how
            return True

    def step(self) -> None:
        """Read what it sent, send what it takes."""
        while self._unsent and self._try(*self._unsent[0]):
            wire.close_all(self._unsent.popleft()[1])
            if not self._unsent:
                self._nursery.watch(self, writing=False)
        for _ in range(_PACKETS_AT_MOST):
            if self.ended:
                return
            try:
                got = wire.receive(self._end)
            except EOFError:
                self._nursery.unwatch(self)  # the zygote tells how it ended
                return
            except ValueError as error:
                self.kill(f"it sent {error}")
                return
            if got is None:
                return
            wire.close_all(got[1])
            self.inbox.append(got[0])
            self._nursery.note(self)

    def kill(self, why: str) -> None:
        """End the process and those that it started. `why` becomes `ended` at once."""
        if not self.ended:
            self._nursery.kill(self)
            self.end(why)

    def end(self, words: str) -> None:
        """It is gone, or is being ended."""
        if self.ended:
            return
        self.ended = words
        self._nursery.note(self)
        self._nursery.unwatch(self)
        self._end.close()
        while self._unsent:
            wire.close_all(self._unsent.popleft()[1])

    def fileno(self) -> int:
        return self._end.fileno()


class Nursery:
    """Starts children by way of one zygote process, and a new zygote if that ends.

    Opening waits for the zygote's imports. Raises MissingPackage, UnknownName or InvalidConfig as the
    config's models do. `announce` gets a line for each line that a child printed, with its name.
    """

    def __init__(self, config: WorkerConfig, announce: Callable[[str], None]) -> None:
        self._config, self.announce = config, announce
        self._cpus = tuple(sorted(os.sched_getaffinity(0)))  # before the worker binds itself to one
        self._epoll = select.epoll()
        self._watched: dict[int, ChildRunner | None] = {}  # by descriptor; None: the zygote
        self._children: dict[int, ChildRunner] = {}
        self._labels: dict[int, str] = {}
        self._changed: dict[int, ChildRunner] = {}
        self._next = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._end: socket.socket | None = None
        self._orders: deque[tuple[bytes, Sequence[int]]] = deque()
        self.names: tuple[str, ...] = ()
        self.torch = ""
        try:
            self._start()
            self._await_opened()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Readable when `step` has something to do."""
        return self._epoll.fileno()

    @property
    def ready(self) -> bool:
        """True if `step` has something to do."""
        return bool(self._changed) or bool(self._epoll.poll(0, 1))

    def wait(self, at_most_s: float) -> None:
        """Return when `step` has something to do, or after `at_most_s`."""
        if not self._changed:
            self._epoll.poll(at_most_s, 1)

    @property
    def zygote_pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def spawn(self, label: str) -> ChildRunner:
        """A new child. It may end at any time, which `ended` says; `label` is human-readable."""
        if self._process is None:
            self._start()
        near, far = wire.pair()
        self._next += 1
        child = ChildRunner(self, self._next, near)
        self._children[child.number] = child
        self._labels[child.number] = label
        self.watch(child, writing=False)
        self._order(wire.encode(wire.Spawn(child.number)), (far.fileno(),))
        far.close()
        return child

    def kill(self, child: ChildRunner) -> None:
        self._order(wire.encode(wire.Kill(child.number)))

    def step(self) -> list[ChildRunner]:
        """Do what is due. Returns the children whose `inbox` or `ended` changed."""
        for fd, _ in self._epoll.poll(0):
            child = self._watched.get(fd)
            if child is not None:
                child.step()
            elif fd in self._watched:
                self._step_zygote()
        changed, self._changed = list(self._changed.values()), {}
        return changed

    def note(self, child: ChildRunner) -> None:
        """Something about the child has changed."""
        self._changed[child.number] = child

    def close(self) -> None:
        """End the zygote and with it every child; idempotent, bounded by two seconds."""
        self._zygote_ended("the worker ends", kill=False)
        if not self._epoll.closed:
            self._epoll.close()

    # ----------------------------------------------------------------------------- watching

    def watch(self, child: ChildRunner, *, writing: bool) -> None:
        mask = select.EPOLLIN | (select.EPOLLOUT if writing else 0)
        if child.fileno() in self._watched:
            self._epoll.modify(child.fileno(), mask)
        elif child.number in self._children:
            self._watched[child.fileno()] = child
            self._epoll.register(child.fileno(), mask)

    def unwatch(self, child: ChildRunner) -> None:
        if self._watched.get(child.fileno()) is child:
            del self._watched[child.fileno()]
            self._epoll.unregister(child.fileno())

    # ------------------------------------------------------------------------------- zygote

    def _start(self) -> None:
        near, far = wire.pair()
        with far:
            # No PDEATHSIG: it would come with the end of the thread that calls this. The zygote ends when
            # its socket does, and everything that it started with it.
            self._process = child_processes.start(
                [sys.executable, "-c", _START, str(far.fileno()), json.dumps(sys.path)],
                stdout=subprocess.DEVNULL,
                stderr=None,
                pass_fds=(far.fileno(),),
            )
        near.setblocking(False)
        self._end = near
        self._watched[near.fileno()] = None
        self._epoll.register(near.fileno(), select.EPOLLIN)
        order = wire.encode(wire.Open(self._config, anchor_ns(), self._cpus))
        if len(order) > wire.MAX_PACKET_BYTES:
            raise InvalidConfig(
                f"the worker's file takes {len(order)} bytes, and {wire.MAX_PACKET_BYTES} are allowed: name "
                "fewer models, or start several workers"
            )
        self._order(order)

    def _await_opened(self) -> None:
        give_up_ns = now_ns() + _OPEN_AT_MOST_NS
        while not self.torch:
            if now_ns() > give_up_ns:
                raise InvalidConfig("the process for models did not import torch within 300 s")
            self._epoll.poll(1.0)
            self.step()
            if self._process is None:
                raise InvalidConfig(
                    "the process for models ended while it imported torch; its words stand above"
                )

    def _order(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        if self._end is None:
            return
        self._orders.append((packet, [os.dup(fd) for fd in fds]))
        self._send_orders()

    def _send_orders(self) -> None:
        while self._orders and self._end is not None:
            try:
                if not wire.send(self._end, *self._orders[0]):
                    self._epoll.modify(self._end.fileno(), select.EPOLLIN | select.EPOLLOUT)
                    return
            except OSError:
                return  # its end is seen when the socket is read
            wire.close_all(self._orders.popleft()[1])
        if self._end is not None:
            self._epoll.modify(self._end.fileno(), select.EPOLLIN)

    def _step_zygote(self) -> None:
        self._send_orders()
        for _ in range(_PACKETS_AT_MOST):
            if self._end is None:
                return
            try:
                got = wire.receive(self._end)
                if got is None:
                    return
                wire.close_all(got[1])
                message = wire.from_zygote.decode(got[0])
            except EOFError:
                self._zygote_ended("the process that started it ended", kill=True)
                return
            except (ValueError, msgspec.DecodeError) as error:
                self._zygote_ended(
                    f"the process that started it sent nonsense ({error})", kill=True
                )
                return
            self._heard(message)

    def _heard(self, message: wire.FromZygote) -> None:
        if isinstance(message, wire.Opened):
            self.names, self.torch = message.names, message.torch
        elif isinstance(message, wire.OpenFailed):
            if self.torch:  # a second zygote: what was there at the start is there no more
                self.announce(f"models cannot be started: {message.words}")
                self._zygote_ended(message.words, kill=True)
                return
            known = getattr(errors, message.kind, None)
            raise _again(known, message.words)
        elif isinstance(message, wire.Said):
            self.announce(f"{self._labels.get(message.number, 'a model')}: {message.text}")
        elif (child := self._children.pop(message.number, None)) is not None:
            child.step()  # what it said last
            child.end(message.words)
            self._labels.pop(message.number, None)

    def _zygote_ended(self, words: str, *, kill: bool) -> None:
        process, self._process = self._process, None
        if self._end is not None:
            self._watched.pop(self._end.fileno(), None)
            self._epoll.unregister(self._end.fileno())
            self._end.close()
            self._end = None
        while self._orders:
            wire.close_all(self._orders.popleft()[1])
        for child in list(self._children.values()):
            child.end(words)
        self._children.clear()
        self._labels.clear()
        if process is None:
            return
        if kill:
            process.kill()
        child_processes.end(process, within_s=1.0, ask=False)


def _again(known: object, words: str) -> SloschedError:
    """The zygote's error, raised here: of its own class if that is made of words alone."""
    if isinstance(known, type) and issubclass(known, SloschedError):
        error = known.__new__(known)
        Exception.__init__(error, words)  # UnknownName makes its words of parts that stayed there
        return error
    return InvalidConfig(f"the models of the config cannot be opened: {words}")
