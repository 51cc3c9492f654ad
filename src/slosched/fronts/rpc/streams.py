"""ModelStreamInfer: requests in flight beside each other on one RPC, answered as their answers come.

Requests without an id, whose answers a client could not tell apart, are answered in their order, as by Triton.

A stream takes MOST requests that are not answered, and is not read beyond: HTTP/2's flow control then holds its
client back. An SLO counts from the time at which the request was read. The stream's own deadline is not that of
its requests, and gives them no SLO. What is wrong with a request is its answer, and the stream goes on. It ends
with the first request after its token has gone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

import grpc

from slosched.fronts.asked import Answered
from slosched.fronts.callers import MOST_OF_FREE
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.rpc.calls import Call, report
from slosched.fronts.rpc.inference import (
    Circumstances,
    answer_bytes,
    asked,
    parsed,
    set_parameters,
)
from slosched.fronts.rpc.messages import StreamResponse
from slosched.fronts.rpc.peers import Answer, Peers
from slosched.fronts.rpc.statuses import fail, internal, shown
from slosched.fronts.service import Caller, Running, Service

#: Requests of one stream that are in flight, or whose answers its client has not taken.
MOST = 256
#: Bytes of answers that were not taken, beyond which a stream is not read either.
MOST_BYTES = 16 * 1024**2
#: What an answer says that came after its SLO, with the value 0.
IN_TIME = "slosched-in-time"
_FINAL = "triton_final_response"


class Stream:
    """One RPC of ModelStreamInfer. `run` is its whole life; `finish` ends it when its requests are answered."""

    def __init__(self, call: Call, peers: Peers, caller: Caller, max_bytes: int) -> None:
        self._call, self._service = call, call.service
        self._peer, self._peers = call.peer, peers
        self._context: grpc.aio.ServicerContext = call.context
        self.caller = caller
        regions = partial(call.regions, caller)
        self._circumstances = Circumstances(call.slo_header, 0, regions, max_bytes)
        self._running: dict[int, Running | None] = {}
        self._answers: deque[tuple[bytes, Answer]] = deque()
        #: Answers of requests without an id, in the order of these; None: not there yet.
        self._in_order: dict[int, tuple[bytes, Answer] | None] = {}
        self._unwritten: set[Answer] = set()
        self._unwritten_bytes = 0
        self._number = 0
        self._changed = asyncio.Event()
        self._to_write = asyncio.Event()
        self._finishing = False
        self._reader: asyncio.Task[object] | None = None
        self.refused: FrontError | None = None  # its caller may not ask any more

    async def run(self) -> None:
        """Serve it to its end."""
        writer = asyncio.create_task(self._write(asyncio.current_task()))
        try:
            while await self._read():
                while self._is_full():
                    await self._change()
            while self._running or self._unwritten:
                await self._change()
        finally:
            for each in self._running.values():
                if each is not None:
                    each.cancel()
            self._running.clear()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            for answer in self._unwritten:
                self._peers.taken(answer)
        if self.refused is not None:
            await fail(self._context, self.refused)
        if self._finishing:
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, "the gateway is shutting down")

    def finish(self) -> None:
        """Take no more requests: the gateway ends."""
        self._finishing = True
        if self._reader is not None:
            self._reader.cancel()

    async def _read(self) -> bool:
        """Read a request and begin it; False at the stream's end."""
        if self._finishing:
            return False
        self._reader = asyncio.current_task()
        try:
            data = await self._context.read()
        except asyncio.CancelledError:
            if not self._finishing or self._reader is None:
                raise
            self._reader.uncancel()
            return False
        finally:
            self._reader = None
        if data is grpc.aio.EOF:
            return False
        self._peer.got(len(data))
        try:
            self._call.caller()
        except FrontError as error:
            self.refused = error
            return False
        self._begin(data)
        return True

    def _is_full(self) -> bool:
        open_ = len(self._running) + len(self._unwritten)
        return open_ >= MOST or self._unwritten_bytes >= MOST_BYTES

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _begin(self, data: bytes) -> None:
        self._number += 1
        number, request_id = self._number, ""

        def ended(end: Answered | FrontError) -> None:
            if number in self._running:
                del self._running[number]
                self._answer(number, request_id, end)

        self._running[number] = self._in_order[number] = None
        try:
            incoming = parsed(data)
            request_id = incoming.head.id
            if request_id:
                del self._in_order[number]
            wanted = asked(incoming, self._circumstances)
            running = self._service.begin(wanted, self.caller, ended)
        except FrontError as error:
            ended(error)
        except Exception as error:  # a bug ends neither the stream nor the requests beside this one
            report(error)
            ended(internal(error))
        else:
            if number in self._running:  # it may have ended already
                self._running[number] = running

    def _answer(self, number: int, request_id: str, end: Answered | FrontError) -> None:
        """Have an answer written: at once, or without an id when those before it are there."""
        data = _response(end, request_id)
        answer = self._peers.holds(self._peer, len(data))
        self._unwritten.add(answer)
        self._unwritten_bytes += len(data)
        if number in self._in_order:
            self._in_order[number] = data, answer
            self._release()
        else:
            self._answers.append((data, answer))
        self._to_write.set()
        self._changed.set()

    def _release(self) -> None:
        """Let the answers without an id go that no earlier one is missing for."""
        while self._in_order:
            number, answer = next(iter(self._in_order.items()))
            if answer is None:
                return
            del self._in_order[number]
            self._answers.append(answer)

    async def _write(self, owner: asyncio.Task[object] | None) -> None:
        """Write answers as they come. Ends the stream's task if that fails: its client is gone."""
        try:
            while True:
                while self._answers:
                    data, answer = self._answers.popleft()
                    self._peers.sends(answer)
                    await self._context.write(data)
                    self._peers.taken(answer)
                    self._unwritten.remove(answer)
                    self._unwritten_bytes -= len(data)
                    self._changed.set()
                self._to_write.clear()
                await self._to_write.wait()
        except asyncio.CancelledError:
            raise
        except Exception:
            if owner is not None:
                owner.cancel()
            raise


def _response(end: Answered | FrontError, request_id: str) -> bytes:
    """The bytes of a ModelStreamInferResponse."""
    if isinstance(end, FrontError):
        made = StreamResponse(error_message=shown(end.text))
        made.infer_response.id = request_id
        if end.refusal is not None:
            set_parameters(made.infer_response, end.refusal.fields())
        data: bytes = made.SerializeToString()
        return data
    # As with Triton each answer says that it is its request's last, wanted or not: only models that
    # answer a request several times would send an empty one (triton_enable_empty_final_response).
    parameters: dict[str, object] = {_FINAL: True}
    if not end.in_time:
        parameters[IN_TIME] = 0
    return answer_bytes(end, parameters)


class Streams:
    """The streams of a server, at most `most` at a time; an idle one holds an RPC as long as it likes.

    A token has at most MOST_OF_FREE times as many as are left free.
    """

    def __init__(self, service: Service, peers: Peers, *, most: int, max_bytes: int) -> None:
        self._service, self._peers, self._most, self._max_bytes = service, peers, most, max_bytes
        self._open: set[Stream] = set()

    def handler(self) -> grpc.RpcMethodHandler:
        """grpc's handler of ModelStreamInfer."""

        async def handle(_requests: object, context: grpc.aio.ServicerContext) -> None:
            call = Call(self._service, self._peers, context)
            try:
                caller = call.caller()
                self._check_room(caller)
            except FrontError as error:
                await fail(context, error)
                return
            stream = Stream(call, self._peers, caller, self._max_bytes)
            self._open.add(stream)
            try:
                await stream.run()
            finally:
                self._open.discard(stream)

        return grpc.stream_stream_rpc_method_handler(handle)

    def _check_room(self, caller: Caller) -> None:
        free = self._most - len(self._open)
        own = sum(each.caller.name == caller.name for each in self._open) if caller.name else 0
        if own >= MOST_OF_FREE * free:
            whose = f", {own} of token '{caller.name}'" if caller.name else ""
            raise FrontError(
                Status.RESOURCE_EXHAUSTED,
                f"{len(self._open)} streams are open{whose}, and no more are allowed",
            )

    def finish(self) -> None:
        """Let each end when its requests are answered."""
        for each in list(self._open):
            each.finish()
