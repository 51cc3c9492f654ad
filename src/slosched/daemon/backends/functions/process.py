"""What a call's process does: it runs one call at a time, and speaks with the worker about nothing else.

Whatever the function does, and however it ends the process, harms this process alone: the worker takes each
message for what it says about this call, and ends a process whose messages make no sense.
"""

from __future__ import annotations

import _thread
import copy
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from slosched.clock import now_ns
from slosched.codes import Code
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.broods.zygote import become_subreaper
from slosched.daemon.backends.functions import wire
from slosched.daemon.backends.functions.parcels import Parcel, opened
from slosched.functions.body import Awaits, Body, Raised, Returned, outcome_of, traceback_text
from slosched.functions.context import ChildCall, Context
from slosched.functions.errors import MalformedPayload, PayloadTooLarge, shortened
from slosched.functions.function import Function
from slosched.functions.payload import decode, encode_result
from slosched.functions.state.state import State
from slosched.units import exact_bytes

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


class CallProcess:
    """Serves the worker behind `end` until it is gone, or until a call leaves something behind.

    `made` is the product of `init`; each call gets a copy of it with `copies`. `once`: a single call. `gpu`:
    its calls have a GPU's exec lane, and are over when the GPU has done what they asked for.
    """

    def __init__(
        self,
        end: socket.socket,
        function: Function[Any],
        made: Any,
        functions: Mapping[str, Function[Any]],
        *,
        memory_bytes: int,
        open_state: Callable[[], State] | None,
        once: bool,
        copies: bool,
        gpu: bool,
    ) -> None:
        self._end, self._function, self._made, self._functions = end, function, made, functions
        self._memory_bytes, self._once = memory_bytes, once
        self._copies, self._gpu = copies, gpu
        self._open_state = None if open_state is None else _opened_once(open_state)
        self._pid = os.getpid()
        self._call = -1
        self._begin_ns = 0
        self._threads = _thread._count()
        self._most_bytes = 0  # at its peak; with more it takes no other call; 0: any
        self._asked: dict[int, str] = {}  # the functions of the call's children

    def serve(self) -> None:
        become_subreaper()  # what the function starts stays below this process, and is found
        # A slot is one process: others give way, so that many leave time to those that end them.
        os.register_at_fork(after_in_child=_give_way)
        own_bytes = _limit_memory(self._memory_bytes)
        if self._memory_bytes:  # rather another process than a later call that finds no memory left
            self._most_bytes = _peak_bytes() + self._memory_bytes // 2
        self._tell(wire.Ready(self._pid, own_bytes))
        while True:
            got = self._receive()
            if got is None:
                return
            message, fds = got
            try:
                again = not isinstance(message, wire.Begin) or self._run(message, fds)
            finally:
                packets.close_all(fds)
            if not again:
                return

    # --------------------------------------------------------------------------- a call

    def _run(self, message: wire.Begin, fds: list[int]) -> bool:
        """Run the call to its end. True: the process can take another one."""
        self._call, self._begin_ns = message.call, now_ns()
        try:
            frame = opened(message.payload, message.size, fds, 0)
            args, kwargs = decode(frame)
        except MalformedPayload as error:
            return self._failed(Code.INVALID_INPUT, str(error))
        made = self._made
        if self._copies:
            try:
                made = copy.deepcopy(made)
            except Exception as error:
                text = traceback_text(error)
                return self._failed(
                    Code.CALL_RAISED, f"the product of init cannot be copied\n{text}"
                )
        ctx = Context(
            function=self._function.name,
            host=_Host(self),
            call_id=message.call_id,
            init=made,
            deadline_ns=message.deadline_ns,
            open_state=self._open_state,
            functions=self._functions,
        )
        self._asked.clear()
        body = Body(self._function, ctx, args, kwargs)
        try:
            if self._function.prepare is not None:
                raised = body.prepare()
                if raised is not None:
                    return self._raised(raised.text)
                if not self._stands_still(body, ()):
                    return False
            while True:
                step = body.step()
                if isinstance(step, Returned):
                    return self._returned(step.value)
                if isinstance(step, Raised):
                    return self._raised(step.text)
                if not self._await(body, step):
                    return False
        finally:
            self._call = -1

    def _await(self, body: Body, step: Awaits) -> bool:
        """Stand still until the call may go on. False: the worker is gone."""
        if self._take_in(body):
            return True
        if self._gpu:
            _gpu_is_sound()
        return self._stands_still(body, step.children)

    def _stands_still(self, body: Body, children: tuple[int, ...]) -> bool:
        """Wait until the worker has the call go on. False: the worker is gone."""
        _flush()
        self._tell(wire.Awaits(children, now_ns()))
        while True:
            got = self._receive()
            if got is None:
                return False
            message, fds = got
            if isinstance(message, wire.Resume) and message.call == self._call:
                self._begin_ns = now_ns()
                return True
            self._delivered(body, message, fds)

    def _take_in(self, body: Body) -> bool:
        """Take what has come already. True if that is all that the call awaits."""
        self._end.setblocking(False)
        try:
            while not body.ready:
                got = packets.receive(self._end)
                if got is None:
                    return False
                self._delivered(body, wire.to_call.decode(got[0]), got[1])
        except EOFError:
            os._exit(0)  # the worker is gone
        finally:
            self._end.setblocking(True)
        return True

    def _delivered(self, body: Body, message: wire.ToCall, fds: list[int]) -> None:
        try:
            if isinstance(message, wire.Deliver) and message.call == self._call:
                frame = opened(message.payload, message.size, fds, 0)
                function = self._asked.pop(message.child, "")
                outcome = outcome_of(
                    function, code=message.code, reason=message.reason, frame=frame
                )
                body.deliver(message.child, outcome)
        finally:
            packets.close_all(fds)

    # ------------------------------------------------------------------------------ ends

    def _returned(self, value: Any) -> bool:
        if value is None:
            parcel = Parcel(())
        else:
            try:
                parcel = Parcel(encode_result(value, most_bytes=self._function.max_payload_bytes))
                while not parcel.written:
                    parcel.write()
            except PayloadTooLarge as error:
                return self._failed(Code.CALL_OVER_LIMIT, f"max_payload of its function: {error}")
            except TypeError as error:
                return self._failed(Code.CALL_RAISED, f"TypeError: {error}")
            except OSError as error:
                return self._failed(Code.CALL_OVER_LIMIT, f"no memory for its result: {error}")
        again = self._clean()
        end_ns = now_ns()
        try:
            self._tell(wire.Returned(parcel.size, parcel.inline, end_ns, again), parcel.fds)
        finally:
            parcel.close()
        return again

    def _raised(self, text: str) -> bool:
        if self._memory_bytes and "MemoryError" in text.rpartition("\n")[2].partition(":")[0]:
            limit = exact_bytes(self._memory_bytes)
            words = f"the memory of a call, {limit} (RLIMIT_DATA): it raised\n{text}"
            return self._failed(Code.CALL_OVER_LIMIT, words)
        return self._failed(Code.CALL_RAISED, text)

    def _failed(self, code: Code, text: str) -> bool:
        again = self._clean() and code is not Code.CALL_OVER_LIMIT
        self._tell(wire.Raised(code, shortened(text), now_ns(), again))
        return again

    def _clean(self) -> bool:
        """Whether the call left nothing behind, so that the next one can have this process.

        That is a process, a thread, a timer, or much of the memory that a call may take.
        """
        _flush()
        if 0 < self._most_bytes < _peak_bytes():
            return False
        if self._gpu and not _gpu_is_sound():
            return False
        if self._once or _thread._count() > self._threads:  # threading lists only its own
            return False
        if any(signal.getitimer(each)[0] for each in _TIMERS):  # it would end a later call
            return False
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return True
        return False

    # -------------------------------------------------------------------------- children

    def chained(self, child: ChildCall) -> None:
        parcel = Parcel(child.payload)
        try:
            while not parcel.written:
                parcel.write()
            message = wire.Chained(
                child=child.child,
                function=child.function,
                size=parcel.size,
                payload=parcel.inline,
                slo_ns=child.slo_ns,
                size_class=child.size_class,
                near=child.near,
                near_child=child.near_child,
                ran_ns=now_ns() - self._begin_ns,
            )
            self._tell(message, parcel.fds)
            self._asked[child.child] = child.function
        finally:
            parcel.close()

    def taken_back(self, child: int) -> None:
        self._tell(wire.TakenBack(child))

    # ---------------------------------------------------------------------------- socket

    def _receive(self) -> tuple[wire.ToCall, list[int]] | None:
        try:
            got = packets.receive(self._end)
        except EOFError:
            return None
        assert got is not None  # the socket blocks
        return wire.to_call.decode(got[0]), got[1]

    def _tell(self, message: wire.FromCall, fds: tuple[int, ...] = ()) -> None:
        if os.getpid() != self._pid:
            os._exit(0)  # the function forked, and this is the copy: one answer is enough
        try:
            packets.send(self._end, packets.encode(message), fds)
        except OSError as error:  # the worker is gone, or the function closed the socket
            with suppress(Exception):
                sys.stderr.write(f"the process of a call cannot reach its worker: {error}\n")
            os._exit(70)


class _Host:
    """What a call sees of its process: a carrier of children (functions/context.py, CallHost)."""

    __slots__ = ("chained", "taken_back")

    def __init__(self, process: CallProcess) -> None:
        self.chained = process.chained
        self.taken_back = process.taken_back


def _gpu_is_sound() -> bool:
    """Wait until the GPU has done what this process asked for. False: its context is broken, and stays so."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if cupy is not None:
            cupy.cuda.runtime.deviceSynchronize()
    except Exception:  # a function's own module may have that name, too
        return False
    return True


def _give_way() -> None:
    with suppress(OSError):
        os.nice(10)


def _flush() -> None:
    """Pass on what the function printed, before its answer. The function may have replaced the stream."""
    with suppress(BaseException):  # its stream may also exit
        sys.stdout.flush()


def _opened_once(open_state: Callable[[], State]) -> Callable[[], State]:
    """The calls of one process share a State: to open one takes a connection."""
    opened: list[State] = []

    def state() -> State:
        if not opened:
            opened.append(open_state())
        return opened[0]

    return state


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory(memory_bytes: int) -> int:
    """Let this process have `memory_bytes` more (0: any). Returns the bytes that it has of its own.

    RLIMIT_DATA counts private memory that can be written, and neither address space that is only reserved nor
    shared memory, as RLIMIT_AS would.
    """
    fields = Path("/proc/self/statm").read_text().split()
    if memory_bytes:
        limit = int(fields[5]) * _PAGE + memory_bytes
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return (int(fields[1]) - int(fields[2])) * _PAGE
