"""A member that needs no models: `python fake_member.py DESCRIPTOR` does what the model's name says.

fast, late (ready after 0.3 s), never (is not ready), refuses (cannot be prepared), exits (with code 7 while it
runs), killed (by itself, with SIGKILL, while it runs), garbage, floods, hangs (never ends a window), stubborn
(does not end with its input), prints (fills its log).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from slosched.share_spec import (
    Begin,
    End,
    FromMember,
    JobEnded,
    Order,
    Prepared,
    Progress,
    Ready,
    Request,
    Row,
    Status,
    ToMember,
)

_LENGTH_NS = 1_000_000


class _Fake:
    def __init__(self, descriptor: int) -> None:
        self._out = descriptor
        self.order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
        self.does = {place: job.model for place, job in self.order.jobs.items()}

    def tell(self, message: FromMember) -> None:
        os.write(self._out, msgspec.json.encode(message) + b"\n")

    def prepare(self) -> None:
        ready = []
        for place, does in self.does.items():
            if does == "late":
                time.sleep(0.3)
            elif does == "never":
                time.sleep(60)
            elif does == "refuses":
                self.tell(JobEnded(job=place, status=Status.OUT_OF_MEMORY, reason="it is too big"))
                continue
            ready.append(Prepared(job=place, pid=os.getpid()))
        if not ready:
            raise SystemExit(1)
        self.tell(Ready(prepared=tuple(ready)))

    def window(self, begin: Begin) -> None:
        places = [place for place in self.does if not begin.jobs or place in begin.jobs]
        with Path(self.order.rows).open("ab", buffering=0) as rows:
            for place in places:
                for number in range(3):
                    at_ns = begin.at_ns + number * _LENGTH_NS
                    row = Request(
                        job=place,
                        number=number,
                        arrived_ns=at_ns,
                        started_ns=at_ns,
                        ended_ns=at_ns + _LENGTH_NS,
                    )
                    rows.write(msgspec.json.encode(Row(request=row)) + b"\n")
            if "killed" in self.does.values():
                rows.write(b'{"request":{"job":0,"num')  # a row that is not whole
        for place in places:
            self.misbehave(self.does[place])
        while time.monotonic_ns() < begin.until_ns:
            time.sleep(0.01)
        for place in places:
            self.tell(JobEnded(job=place, status=Status.OK, memory_allocated=5))

    def misbehave(self, does: str) -> None:
        if does == "exits":
            sys.stderr.write("first\nRuntimeError: no more\n")
            sys.stderr.flush()
            os._exit(7)
        elif does == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif does == "garbage":
            os.write(self._out, b"loading ...\n")
            time.sleep(60)
        elif does == "floods":
            for _ in range(20_000):
                self.tell(Progress(ended={0: 3, 99: 1}))
        elif does == "hangs":
            time.sleep(60)
        elif does == "prints":
            sys.stdout.write("x" * (17 << 20))
            sys.stdout.flush()

    def run(self) -> None:
        self.prepare()
        for line in sys.stdin.buffer:
            message = msgspec.json.decode(line, type=ToMember)
            if isinstance(message, Begin):
                self.window(message)
            else:
                assert isinstance(message, End)
        if "stubborn" in self.does.values():
            time.sleep(60)


if __name__ == "__main__":
    _Fake(int(sys.argv[1])).run()
