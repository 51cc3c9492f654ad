"""The processes of models: `Nursery` has one zygote with torch fork them, and starts another if that ends."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable

from slosched import child_processes, errors
from slosched.clock import anchor_ns, now_ns
from slosched.config import WorkerConfig
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.children import Brood, ChildRunner, Watch, start_zygote
from slosched.daemon.backends.cpu import wire
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import NS_PER_S

#: Importing torch, transformers and two libraries takes 5 to 60 s.
_OPEN_AT_MOST_NS = 300 * NS_PER_S


class Nursery:
    """Starts children by way of one zygote process, and a new zygote if that ends.

    Opening waits for the zygote's imports. Raises MissingPackage, UnknownName or InvalidConfig as the
    config's models do. `announce` gets a line for each line that a child printed, with its name.
    """

    def __init__(self, config: WorkerConfig, announce: Callable[[str], None]) -> None:
        self._config, self.announce = config, announce
        self._cpus = tuple(sorted(os.sched_getaffinity(0)))  # before the worker binds itself to one
        self._watch = Watch()
        self._process: subprocess.Popen[bytes] | None = None
        self._brood: _ModelBrood | None = None
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
        return self._watch.fileno()

    @property
    def ready(self) -> bool:
        """True if `step` has something to do."""
        return self._watch.ready

    def wait(self, at_most_s: float) -> None:
        """Return when `step` has something to do, or after `at_most_s`."""
        self._watch.wait(at_most_s)

    @property
    def zygote_pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def spawn(self, label: str) -> ChildRunner:
        """A new child. It may end at any time, which `ended` says; `label` is human-readable."""
        if self._brood is None or self._brood.closed:
            self._start()
        assert self._brood is not None
        return self._brood.spawn(label)

    def step(self) -> list[ChildRunner]:
        """Do what is due. Returns the children whose `inbox` or `ended` changed."""
        return self._watch.step()

    def close(self) -> None:
        """End the zygote and with it every child; idempotent, bounded by two seconds."""
        if self._brood is not None:
            self._brood.close("the worker ends")
        self._end_process(kill=False)
        self._watch.close()

    # ------------------------------------------------------------------------------- zygote

    def _start(self) -> None:
        order = packets.encode(wire.Open(self._config, anchor_ns(), self._cpus))
        if len(order) > packets.MAX_PACKET_BYTES:
            raise InvalidConfig(
                f"the worker's file takes {len(order)} bytes, and {packets.MAX_PACKET_BYTES} are allowed: "
                "name fewer models, or start several workers"
            )
        self._process, end = start_zygote("slosched.daemon.backends.cpu.zygote")
        self._brood = _ModelBrood(self._watch, end, self.announce, self._lost, self._opened)
        self._brood.send(order)

    def _await_opened(self) -> None:
        give_up_ns = now_ns() + _OPEN_AT_MOST_NS
        while not self.torch:
            if now_ns() > give_up_ns:
                raise InvalidConfig("the process for models did not import torch within 300 s")
            self._watch.wait(1.0)
            self.step()
            if self._process is None:
                raise InvalidConfig(
                    "the process for models ended while it imported torch; its words stand above"
                )

    def _opened(self, message: wire.Opened | wire.OpenFailed) -> None:
        if isinstance(message, wire.Opened):
            self.names, self.torch = message.names, message.torch
        elif self.torch:  # a second zygote: what was there at the start is there no more
            self.announce(f"models cannot be started: {message.words}")
            assert self._brood is not None
            self._brood.close(message.words)
            self._end_process(kill=True)
        else:
            raise _again(getattr(errors, message.kind, None), message.words)

    def _lost(self, words: str) -> None:
        self._end_process(kill=True)

    def _end_process(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        child_processes.end(process, within_s=1.0, ask=False)


class _ModelBrood(Brood):
    """The first packet of the zygote of models says whether it has imported everything."""

    def __init__(
        self,
        watch: Watch,
        end: socket.socket,
        announce: Callable[[str], None],
        lost: Callable[[str], None],
        opened: Callable[[wire.Opened | wire.OpenFailed], None],
    ) -> None:
        super().__init__(watch, end, announce, lost)
        self._opened: Callable[[wire.Opened | wire.OpenFailed], None] | None = opened

    def heard(self, packet: bytes) -> None:
        if self._opened is None:
            super().heard(packet)
            return
        opened, self._opened = self._opened, None
        opened(wire.opened.decode(packet))


def _again(known: object, words: str) -> SloschedError:
    """The zygote's error, raised here: of its own class if that is made of words alone."""
    if isinstance(known, type) and issubclass(known, SloschedError):
        error = known.__new__(known)
        Exception.__init__(error, words)  # UnknownName makes its words of parts that stayed there
        return error
    return InvalidConfig(f"the models of the config cannot be opened: {words}")
