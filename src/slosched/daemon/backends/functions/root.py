"""The process from which the functions' processes are forked, and what those do first.

The root has imported slosched and numpy, and runs no code of others. A child of it finds what modules offer, or
loads one function: as a template, from which the processes of its calls are forked, or to run calls itself.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from slosched.clock import now_ns, take_anchor
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.zygote import Zygote
from slosched.daemon.backends.functions import wire
from slosched.daemon.backends.functions.process import CallProcess
from slosched.errors import SloschedError
from slosched.functions.body import traceback_text
from slosched.functions.errors import FunctionError
from slosched.functions.function import Function
from slosched.functions.registry import find
from slosched.functions.state.opening import open_store
from slosched.functions.state.state import State


def main(fd: int) -> None:
    """The root's life. Reads one Open, then serves as a zygote."""
    worker = os.getppid()
    end = socket.socket(fileno=fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker drains; it ends us when it has
    try:
        got = packets.receive(end)
    except EOFError:
        return
    assert got is not None
    order = wire.to_root.decode(got[0])
    take_anchor(order.anchor_ns)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, order.cpus)
    gc.collect()
    gc.freeze()  # what was imported is shared with every child for good
    Zygote(end, serve).run()
    if order.namespace and os.getppid() != worker:  # it was killed, and cannot do that
        with contextlib.suppress(SloschedError):
            open_store(order.state).drop(order.namespace)


def serve(end: socket.socket) -> None:
    """What a child of the root does with its socket."""
    try:
        got = packets.receive(end)
    except EOFError:
        return
    assert got is not None
    packet, fds = got
    order = wire.to_loader.decode(packet)
    if isinstance(order, wire.Find):
        for message in _found(order):
            packets.send(end, packets.encode(message))
        return
    begin_ns = now_ns()
    if order.visible_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = order.visible_gpu
    try:
        functions = find((order.spec,), folder=order.folder)
        function = functions.get(order.name)
        if function is None:
            raise FunctionError(f"{order.spec} has no function {order.name!r} any more")
        if order.sized and function.is_async:
            functions |= find(order.sized, folder=order.folder)
    except Exception as error:
        _fail(end, error, str(error))
        return
    imported_ns = now_ns()
    try:
        made = None if function.init is None else function.init()
    except Exception as error:
        assert error.__traceback__ is not None
        shown = error.with_traceback(error.__traceback__.tb_next)  # without the line above
        _fail(end, error, f"its init raised\n{traceback_text(shown)}")
        return
    loaded = wire.Loaded(imported_ns - begin_ns, now_ns() - imported_ns, _note(order))
    packets.send(end, packets.encode(loaded))
    run = partial(_run_calls, order, function, made, functions)
    if not order.forks:
        run(end)
        return
    end.close()
    gc.collect()
    gc.freeze()
    Zygote(socket.socket(fileno=fds[0]), run).run()


def _run_calls(
    order: wire.Load,
    function: Function[Any],
    made: Any,
    functions: dict[str, Function[Any]],
    end: socket.socket,
) -> None:
    restores = function.reset == "restore"
    CallProcess(
        end,
        function,
        made,
        functions,
        memory_bytes=order.memory_bytes,
        open_state=_opener(order),
        once=order.once or (restores and order.forks),
        copies=restores and not order.forks,
        gpu=not order.forks,
    ).serve()


def _opener(order: wire.Load) -> Callable[[], State] | None:
    return partial(State, order.namespace, order.state) if order.state else None


def _note(order: wire.Load) -> str:
    """What may surprise the function's author."""
    threads = len([*Path("/proc/self/task").iterdir()]) - 1
    if not order.forks or not threads:
        return ""
    return (
        f"the module or the init of {order.name!r} started {threads} thread(s), which calls do not have: their "
        "processes are forked, and a lock that one of these held stays locked"
    )


def _found(order: wire.Find) -> Iterator[wire.Found | wire.Failed]:
    """What the specs offer, in messages of bounded length."""
    try:
        every = find(order.specs, folder=order.folder)
        spec_of = {
            name: spec
            for spec in reversed(order.specs)
            for name in find((spec,), folder=order.folder)
        }
        listed = [
            wire.Listed(
                name=each.name,
                spec=spec_of[each.name],
                info=each.info,
                reset=each.reset,
                expected_ns=each.expected_ns,
                memory_bytes=each.memory_bytes,
                prepares=each.prepare is not None,
            )
            for each in every.values()
        ]
    except Exception as error:
        yield wire.Failed(type(error).__name__, str(error)[:4000])
        return
    step = wire.FOUND_AT_ONCE
    for at in range(0, max(1, len(listed)), step):
        yield wire.Found(tuple(listed[at : at + step]), at + step < len(listed))


def _fail(end: socket.socket, error: Exception, words: str) -> None:
    packets.send(end, packets.encode(wire.Failed(type(error).__name__, words[:4000])))
