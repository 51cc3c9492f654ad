"""A function that is loaded on one device: its template, and the processes that wait for calls.

A call never waits for a fork while it finds a process here: one is started for each that is taken, and as many
wait as the last second wanted (demand.py). A process that ran a call comes back, if its function is reset by
"none" and the call left nothing behind. What remains: calls that each need a new process, and come faster than
this host can fork, wait for forks once the pool is empty.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections import deque
from collections.abc import Callable

import msgspec

from slosched import child_processes
from slosched.clock import Clock, anchor_ns
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.children import Brood, ChildRunner, Watch, start_zygote
from slosched.daemon.backends.functions import wire
from slosched.daemon.backends.functions.demand import MOST_MORE, Demand
from slosched.daemon.backends.functions.guard import shared_bytes
from slosched.units import NS_PER_MS, NS_PER_S

#: An import and an `init` that take longer hang.
LOAD_WITHIN_NS = 120 * NS_PER_S
#: How often processes that are not wanted any more are ended.
_TRIM_NS = 5 * NS_PER_S
#: A template that does not fork or end a process for this time hangs: code that `init` left running holds it.
_ANSWER_WITHIN_NS = 5 * NS_PER_S
_HANGS = "the process that its calls are forked from does not answer"
_TEMPLATE_ENDED = "the process that its calls are forked from ended"
#: How often it is looked at what shared memory calls left in a process.
_LOOK_SHARED_NS = 200 * NS_PER_MS
_FIRST_PAUSE_NS = 100 * NS_PER_MS
_LONGEST_PAUSE_NS = 30 * NS_PER_S


class CallChild(ChildRunner):
    """A process that runs one call at a time. `mail` has what it sent, with descriptors."""

    unsent_at_most = 50_000  # the answers of its children

    def __init__(self, brood: Brood, number: int, end: socket.socket) -> None:
        super().__init__(brood, number, end)
        self.mail: deque[tuple[bytes, list[int]]] = deque()
        self.owner: LoadedFunction | None = None
        self.loading = False  # it says first how its loading ended
        self.ready = False
        self.pid = 0
        self.own_bytes = 0  # when it was ready
        self.looked_ns = 0  # at its shared memory
        self.call = -1  # the key of its call; -1: it has none
        self.taken = False  # for a call

    def took(self, packet: bytes, fds: list[int]) -> None:
        self.mail.append((packet, fds))

    def drop_mail(self) -> None:
        while self.mail:
            packets.close_all(self.mail.popleft()[1])


class Root:
    """The root process, and another one if that ends. `announce` gets what processes print.

    `state` and `namespace` are those of wire.Open.
    """

    def __init__(
        self, watch: Watch, announce: Callable[[str], None], *, state: str = "", namespace: str = ""
    ) -> None:
        self.watch, self._announce = watch, announce
        self._state, self._namespace = state, namespace
        self._cpus = tuple(sorted(os.sched_getaffinity(0)))  # before the worker binds itself to one
        self._process: subprocess.Popen[bytes] | None = None
        self._brood: Brood | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def spawn(self, label: str, kind: type[ChildRunner] = ChildRunner) -> ChildRunner:
        if self._brood is None or self._brood.closed:
            self._process, end = start_zygote(
                "slosched.daemon.backends.functions.root", _one_thread()
            )
            self._brood = Brood(self.watch, end, self._announce, self._lost)
            self._brood.send(
                packets.encode(wire.Open(anchor_ns(), self._cpus, self._state, self._namespace))
            )
        return self._brood.spawn(label, kind)

    def _lost(self, words: str) -> None:
        self._announce("the process from which functions are forked has ended; another is started")
        self._end_process(kill=True)

    def close(self) -> None:
        """End it and everything that it started; bounded by two seconds."""
        if self._brood is not None:
            self._brood.close("the worker ends")
        self._end_process(kill=False)

    def _end_process(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is not None:
            if kill:
                process.kill()
            child_processes.end(process, within_s=1.0, ask=False)


def _one_thread() -> dict[str, str]:
    """The environment of functions: a slot is one thread, unless the worker's environment says otherwise."""
    return {**child_processes.computing_threads(1), **os.environ}


class LoadedFunction:
    """The function of `order`, which is being loaded. `step` until `ready`, or until `failed` says why not.

    `spares` processes wait for calls. A function whose order says `once` has none: each of its calls asks for a
    process (`need_another`), whose start is part of the call. `model_ids` are the instances that are loaded so.
    `announce` gets lines.
    """

    def __init__(
        self,
        root: Root,
        listed: wire.Listed,
        order: wire.Load,
        *,
        spares: int,
        clock: Clock,
        announce: Callable[[str], None],
    ) -> None:
        self._root, self.listed, self._order = root, listed, order
        self.name = listed.name
        self._spares, self._clock, self._announce = spares, clock, announce
        self._most_starting = spares // 2 + 1
        self.model_ids: set[int] = set()
        self.loaded: wire.Loaded | None = None
        self.ready = False  # calls can begin
        self.failed = ""
        self.code = 0
        self.shared_bytes = 0  # that a process holds before its first call
        self.since_ns = clock()
        self.due_ns = self.since_ns + LOAD_WITHIN_NS
        self.children: dict[CallChild, int] = {}  # with their starts, in order
        self._idle: deque[CallChild] = deque()
        self._in_use = 0  # processes that calls have
        self._demand = Demand(restores=listed.reset == "restore")
        self._starting = 0
        self._template_ended = False  # before it was loaded
        self._wanted = 0  # processes that calls wait for, where none are kept
        self._again_ns, self._pause_ns = 0, _FIRST_PAUSE_NS
        self._trim_ns = self.since_ns + _TRIM_NS
        self._killed: dict[CallChild, int] = {}
        self._loader: ChildRunner | None = None
        self._brood: Brood | None = None
        try:
            if order.forks:
                self._start_template()
        except OSError as error:
            self._fail(f"its process cannot be started: {error}")
        self.fill()

    def _start_template(self) -> None:
        near, far = packets.pair()
        with far:
            self._brood = Brood(self._root.watch, near, self._announce, self._template_lost)
            self._loader = self._root.spawn(self.name)
            self._loader.send(packets.encode(self._order), (far.fileno(),))

    def _template_lost(self, words: str) -> None:
        if self._loader is not None:
            self._loader.step()  # what it said last
            self._hear_loader()
        if self.loaded is not None or self._loader is None:
            self._fail(_TEMPLATE_ENDED)
        else:  # the root says soon how its module or its init ended it
            self._template_ended = True
            self.due_ns = min(self.due_ns, self._clock() + _ANSWER_WITHIN_NS)

    # --------------------------------------------------------------------------- processes

    def take(self, call: int) -> CallChild | None:
        """A process for the call of this key, if one is ready."""
        taken: CallChild | None = None
        while self._idle and taken is None:
            child = self._idle.pop()
            if not child.ended:
                taken = child
                taken.call = call
                taken.taken = True
                self._in_use += 1
                self._demand.took(self._clock(), self._in_use)
                self._wanted -= int(self.reloads)
        self.fill()
        return taken

    def give_back(self, child: CallChild) -> None:
        """The process can take another call."""
        child.call = -1
        self._free(child)
        if self.failed or child.ended or len(self._idle) >= self._spares + MOST_MORE:
            self.end(child, "it is not needed")
        elif self._holds_much(child):
            self.end(child, "its calls left shared memory")
        else:
            self._idle.append(child)

    def _holds_much(self, child: CallChild) -> bool:
        """Whether its calls left half of the shared memory that one may take."""
        now_ns = self._clock()
        if not self.memory_bytes or now_ns < child.looked_ns + _LOOK_SHARED_NS:
            return False
        child.looked_ns = now_ns
        return shared_bytes(child.pid) - self.shared_bytes > self.memory_bytes // 2

    def _free(self, child: CallChild) -> None:
        """No call has the process any more."""
        self._in_use -= int(child.taken)
        child.taken = False

    def end(self, child: CallChild, why: str) -> None:
        """End the process and all that it started."""
        self._free(child)
        if not child.ended:
            child.kill(why)
            self._killed[child] = self._clock()

    def fill(self) -> None:
        """Start processes until enough of them wait, or are about to."""
        if self.failed or self._clock() < self._again_ns:
            return
        if self._order.forks:
            # Many that start at once are all ready late.
            wanted = min(self._spares_now - len(self._idle), self._most_starting) - self._starting
        elif self.reloads and self.ready:
            wanted = self._wanted - len(self._idle) - self._starting
        elif self.listed.prepares:
            wanted = self._spares - len(self.children)
        else:
            wanted = int(self._lacks_any and not any(child.call >= 0 for child in self.children))
        for _ in range(wanted):
            if not self._start():
                return

    def need_another(self) -> None:
        """A call waits. On a GPU, where the processes that there are may be suspended for long, start one."""
        if self.reloads:
            self._wanted += 1
            self.fill()
        elif not self._order.forks and not self.failed and self._lacks_any:
            self._start()

    def need_no_more(self) -> None:
        """A call that waited for a process waits no longer, and got none."""
        if self.reloads:
            self._wanted -= 1
            while len(self._idle) > self._wanted:
                self.end(self._idle.pop(), "its call was given up")

    @property
    def reloads(self) -> bool:
        """Whether each call has a process of its own, which is started for it."""
        return self._order.once

    @property
    def _spares_now(self) -> int:
        """The processes that should wait for calls."""
        return self._demand.spares(self._clock(), self._spares, self._in_use)

    @property
    def _lacks_any(self) -> bool:
        return not self._idle and not self._starting

    def _start(self) -> bool:
        """Start a process for calls. False: there is no descriptor or memory for it now."""
        try:
            if self._order.forks:
                assert self._brood is not None
                child = self._brood.spawn(self.name, CallChild)
            else:
                child = self._root.spawn(self.name, CallChild)
                child.send(packets.encode(self._order))
        except OSError as error:
            self._announce(f"{self.name}: no process for its calls can be started now: {error}")
            self._wait_longer()
            return False
        assert isinstance(child, CallChild)
        child.owner, child.loading = self, not self._order.forks
        self.children[child] = self._clock()
        self._starting += 1
        return True

    def _wait_longer(self) -> None:
        self._again_ns = self._clock() + self._pause_ns
        self._pause_ns = min(2 * self._pause_ns, _LONGEST_PAUSE_NS)

    # ---------------------------------------------------------------------------- messages

    def hear(self, packet: bytes) -> bool:
        """How the loading of a process ended. False for nonsense."""
        try:
            message = wire.from_loader.decode(packet)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        if isinstance(message, wire.Failed):
            self._fail(message.words)
        elif isinstance(message, wire.Loaded) and self.loaded is None:
            self.loaded = message
            if message.note:
                self._announce(message.note)
        return True

    def is_ready(self, child: CallChild, message: wire.Ready) -> None:
        """The process says that it can take a call."""
        if child.ready:
            return
        child.ready = True
        child.pid, child.own_bytes = message.pid, message.own_bytes
        if not self.ready:  # the others could not start before either
            self.shared_bytes = shared_bytes(child.pid)
            now = self._clock()
            self.children = dict.fromkeys(self.children, now)
            self._trim_ns = now + _TRIM_NS
        self._starting -= 1
        self._pause_ns = _FIRST_PAUSE_NS
        if self.reloads and not self.ready:
            self.end(child, "it has shown how long a cold start takes")
        else:
            self._idle.append(child)
        self.ready = not self.failed and (self.loaded is not None or self._order.forks)

    def gone(self, child: CallChild) -> None:
        """The process has ended, or is being ended."""
        self._free(child)
        if self.children.pop(child, None) is None:
            return
        if child in self._idle:
            self._idle.remove(child)
        if not child.ready:
            self._starting -= 1
            if not self.failed and not self.ready and not self._order.forks:
                self._fail(f"its process ended while it was loaded: {child.ended}")
            self._wait_longer()
        self.fill()

    def step(self, now_ns: int) -> None:
        """Take what its template said, and do what is due."""
        self._hear_loader()
        if self._loader is not None and self._loader.ended:
            when = (
                "" if self.loaded is not None else " while its module was imported or its init ran"
            )
            self._fail(f"its process ended{when} ({self._loader.ended})")
        if self.failed:
            return
        if self._template_ended and now_ns >= self.due_ns:
            self._fail(_TEMPLATE_ENDED)
        if not self.ready and now_ns >= self.due_ns:
            took_s = (now_ns - self.since_ns) // NS_PER_S
            self._fail(f"it was not loaded within {took_s} s; its process was ended")
        if self.ready and now_ns >= self._trim_ns:
            self._trim_ns = now_ns + _TRIM_NS
            self._trim(now_ns)
        self.fill()

    def _hear_loader(self) -> None:
        loader = self._loader
        while loader is not None and loader.inbox:
            if not self.hear(loader.inbox.popleft()):
                loader.kill("it sent nonsense")

    def _trim(self, now_ns: int) -> None:
        """End what is not needed, and what hangs."""
        surplus = len(self._idle) - self._spares_now
        for _ in range((surplus + 1) // 2):  # some are kept a while: demand comes back
            self.end(self._idle.popleft(), "it is not needed")
        while self._killed:
            child, since_ns = next(iter(self._killed.items()))
            if self._brood is not None and self._brood.has(child):
                if now_ns - since_ns > _ANSWER_WITHIN_NS:
                    self._fail(_HANGS)
                break
            del self._killed[child]
        starting = [(child, since) for child, since in self.children.items() if not child.ready]
        for child, since_ns in starting:
            if self._order.forks and now_ns - since_ns > _ANSWER_WITHIN_NS:
                self._fail(_HANGS)
                return
            if now_ns - since_ns > LOAD_WITHIN_NS:
                self.end(child, "it was not loaded in time")

    # -------------------------------------------------------------------------------- ends

    def _fail(self, words: str) -> None:
        if self.failed:
            return
        self.failed = words
        self.ready = False
        self.close()

    def close(self) -> None:
        """End its processes, those of calls too; does not wait."""
        self.failed = self.failed or "it was unloaded"
        for child in list(self.children):
            child.kill(f"{self.name!r}: {self.failed}")
        if self._brood is not None:
            self._brood.close(self.failed)
        if self._loader is not None:
            self._loader.kill(self.failed)

    @property
    def memory_bytes(self) -> int:
        """What a call may take; 0: any."""
        return self._order.memory_bytes
