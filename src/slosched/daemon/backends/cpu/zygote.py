"""The process that the models' processes are forked from: it has imported torch once, and runs no model."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket

from slosched.clock import take_anchor
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.zygote import Zygote
from slosched.daemon.backends.cpu import wire


def main(fd: int) -> None:
    """The zygote's life. Reads one Open and answers it."""
    end = socket.socket(fileno=fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker drains; it ends us when it has
    got = packets.receive(end)
    assert got is not None
    order = wire.to_open.decode(got[0])
    take_anchor(order.anchor_ns)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, order.cpus)
    try:
        from slosched.daemon.backends.cpu.child import open_models

        serve, names, version = open_models(order.config)
    except Exception as error:
        packets.send(end, packets.encode(wire.OpenFailed(type(error).__name__, str(error)[:4000])))
        return
    packets.send(end, packets.encode(wire.Opened(names, version)))
    gc.collect()
    gc.freeze()  # what was imported is shared with every child for good
    Zygote(end, serve).run()
