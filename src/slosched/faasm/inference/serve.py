"""The program of a process that is one instance: `python -m slosched.faasm.inference.serve FD PLAN`.

It loads the plan's network, or nothing without a plan, then does what comes over the socket FD, one order
at a time, and ends when that is closed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from typing import NoReturn

from slosched.clock import now_ns
from slosched.faasm.inference import wire
from slosched.faasm.inference.instance import Instance
from slosched.faasm.inference.plan import Image, images, plan_of
from slosched.units import NS_PER_S

_RIGHT, _WRONG = b".", b"x"


def main(fd: int, plan_text: str) -> None:
    """The life of the process. Its memory and CPU time are those of an instance."""
    end = socket.socket(fileno=fd)
    began_ns = now_ns()
    instance: Instance | None = None
    imported_ns = began_ns
    try:
        if plan_text:
            import torch  # noqa: F401 - to see what the import takes

            imported_ns = now_ns()
            instance = Instance(plan_of(plan_text))
    except Exception as error:
        with contextlib.suppress(OSError):
            wire.send(end, wire.Failed(f"{type(error).__name__}: {error}"))
        return
    with contextlib.suppress(OSError, EOFError):
        wire.send(
            end,
            wire.Ready(os.getpid(), imported_ns - began_ns, now_ns() - imported_ns, cpu_ns()),
        )
        _Process(end, instance).serve()


class _Process:
    def __init__(self, end: socket.socket, instance: Instance | None) -> None:
        self._end, self._instance = end, instance
        self._image = None if instance is None else images(instance.plan, 1)[0]
        self._held: list[int] = []
        self._leash: int | None = None  # held children end when it is closed

    def serve(self) -> None:
        try:
            self._serve()
        finally:
            self._release()

    def _serve(self) -> None:
        while True:
            order = wire.receive_order(self._end)
            self._release()
            try:
                report = self._did(order)
            except Exception as error:
                report = wire.Failed(f"{type(error).__name__}: {error}")
            wire.send(self._end, report)

    def _did(self, order: wire.Order) -> wire.Report:
        if isinstance(order, wire.Fork):
            return self._forked()
        if isinstance(order, wire.Weigh):
            from slosched.faasm.inference.network import gpu_bytes

            return wire.Weighed(*gpu_bytes())
        if isinstance(order, wire.Hold):
            return self._hold(order.count)
        if isinstance(order, wire.Measure):
            return self._measured(order)
        assert self._instance is not None, "this process has no network"
        answer = self._instance.answer(_image(order), order.rung, order.pause_ns)
        return wire.Answered(answer)

    def _measured(self, order: wire.Measure) -> wire.Measured:
        instance, image = self._instance, self._image
        walls, cpus = [], []
        for _ in range(order.count):
            cpu = cpu_ns()
            began_ns = now_ns()
            if instance is not None and image is not None:
                if order.rung == "L0":
                    instance.answer_image(image)
                else:
                    instance.make_cold(order.rung)
            walls.append(now_ns() - began_ns)
            cpus.append(cpu_ns() - cpu)
        return wire.Measured(tuple(walls), tuple(cpus))

    def _hold(self, count: int) -> wire.Held:
        """Children that share this process's memory as forks do, and have worked."""
        wanted = self._answer()
        far, self._leash = os.pipe()
        heard, speak = os.pipe()
        try:
            try:
                for _ in range(count):
                    pid = os.fork()
                    if pid == 0:
                        self._live_as_child(wanted, far, speak)
                    self._held.append(pid)
            finally:
                os.close(far)
                os.close(speak)
            replies = b""
            while len(replies) < count:
                got = os.read(heard, count)
                if not got:
                    raise OSError("a forked process ended before it had answered")
                replies += got
        finally:
            os.close(heard)
        return wire.Held(tuple(self._held), replies.count(_RIGHT))

    def _live_as_child(self, wanted: object, far: int, speak: int) -> NoReturn:
        with contextlib.suppress(BaseException):
            assert self._leash is not None
            os.close(self._leash)
            os.write(speak, _RIGHT if self._answer() == wanted else _WRONG)
            os.close(speak)
            os.read(far, 1)
        os._exit(0)

    def _answer(self) -> tuple[list[int], list[float]] | None:
        """To the process's picture; None without a network."""
        if self._instance is None or self._image is None:
            return None
        return self._instance.answer_image(self._image)

    def _release(self) -> None:
        if self._leash is not None:
            os.close(self._leash)
            self._leash = None
        while self._held:
            os.waitpid(self._held.pop(), 0)

    def _forked(self) -> wire.Measured:
        """A fork of this process, from the wish to the moment at which it can answer."""
        far, near = os.pipe()
        began_ns = now_ns()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                os.write(near, now_ns().to_bytes(8, "little") + cpu_ns().to_bytes(8, "little"))
            os._exit(0)
        os.close(near)
        try:
            data = os.read(far, 16)
        finally:
            os.close(far)
            os.waitpid(pid, 0)
        return wire.Measured(
            (int.from_bytes(data[:8], "little") - began_ns,), (int.from_bytes(data[8:], "little"),)
        )


def _image(order: wire.Answering) -> Image:
    import numpy as np

    return np.frombuffer(order.image, np.uint8).reshape(order.shape)


def cpu_ns() -> int:
    """CPU time of this process, with the kernel's share."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return round((used.ru_utime + used.ru_stime) * NS_PER_S)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
