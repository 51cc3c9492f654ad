"""What each gRPC connection makes this process hold, and the end of those that make it hold too much.

grpc bounds none of it in sum: not the messages that are half received, for each of which it opens HTTP/2's
window as far as the message is long, and not the answers that clients do not take. Its resource quota is out of
reach: the Python binding would pass a pointer to one, and has nothing that makes one. So

- answers are counted, from when they are there until grpc has written them;
- what is half received is guessed, once this process has more memory than it may: what the kernel received on
  a connection, less the messages that came whole. (Envoy's overload manager resets the streams that hold most
  likewise: envoy.overload_actions.reset_high_memory_stream.)

A connection is ended as a whole: grpc.aio has no call that ends an RPC whose answer is being sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import grpc

from slosched.clock import now_ns
from slosched.fronts.rpc.kernel import Connection, connections, give_memory_back, own_memory_bytes
from slosched.units import NS_PER_S

#: An answer is taken within this, and a second more for each _TAKEN_BYTES_PER_S of it.
_TAKEN_WITHIN_S, _TAKEN_BYTES_PER_S = 30.0, 256 * 1024
_LOOK_EVERY_S, _AFTER_FAULT_S = 0.1, 10.0
#: A line about ended connections comes no more often.
_SAID_EVERY_NS = 60 * NS_PER_S
#: What ended connections held is freed within this.
_AGAIN_NS = NS_PER_S // 5
#: A connection that holds at least this may be ended, until memory is below this part of its bound.
_WORTH_BYTES, _BELOW = 1024**2, 0.9
#: Bytes of an RPC beside its message: headers and frames. Rather too many: a guess errs for the client.
_RPC_BYTES, _FRAMES_SHIFT = 100, 9
_MOST_PEERS = 4096


class Peer:
    """One connection's counts, in bytes: messages that came whole, and answers that it has not taken."""

    __slots__ = ("ended", "name", "received", "untaken")

    def __init__(self, name: str) -> None:
        self.name = name
        self.received = self.untaken = 0
        self.ended = False

    def got(self, size: int) -> None:
        """A message of `size` bytes came whole."""
        self.received += size + (size >> _FRAMES_SHIFT) + _RPC_BYTES


class Answer:
    """An answer that is there and not taken."""

    __slots__ = ("peer", "size")

    def __init__(self, peer: Peer, size: int) -> None:
        self.peer, self.size = peer, size


class Peers:
    """The connections of a server. `look_after` must run beside it once its `port` is known.

    `most_untaken` bounds answers together, `most_memory` all that the process has for itself, in bytes.
    """

    def __init__(
        self,
        *,
        most_untaken: int,
        most_memory: int,
        memory: Callable[[], int] = own_memory_bytes,
        give_back: Callable[[], None] = give_memory_back,
        connected: Callable[[int], AbstractContextManager[list[Connection]]] = connections,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.port = 0
        self.untaken = 0
        self._most_untaken, self._most_memory = most_untaken, most_memory
        self._memory, self._give_back, self._connected = memory, give_back, connected
        self._peers: dict[str, Peer] = {}
        self._answers: set[Answer] = set()
        #: When those are due that are being written; others wait for these on their stream.
        self._due_ns: dict[Answer, int] = {}
        self._again_ns = self._said_ns = 0
        self._announce = announce

    def of(self, name: str) -> Peer:
        """The connection with grpc's name of it."""
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= _MOST_PEERS:
                self._forget_the_gone()
            peer = self._peers[name] = Peer(name)
        return peer

    # ------------------------------------------------------------------------------ answers

    def holds(self, peer: Peer, size: int) -> Answer:
        """An answer is there. Ends the connection with most of them where all together are too many."""
        answer = Answer(peer, size)
        if not peer.ended:
            self._answers.add(answer)
            peer.untaken += size
            self.untaken += size
            if self.untaken > self._most_untaken:
                self._say("answers that clients do not take are more than --max-in-flight-bytes")
                self._end([max((each.peer for each in self._answers), key=_untaken)])
        return answer

    def sends(self, answer: Answer) -> None:
        """It is being written."""
        if answer in self._answers:
            within_s = _TAKEN_WITHIN_S + answer.size / _TAKEN_BYTES_PER_S
            self._due_ns[answer] = now_ns() + int(within_s * NS_PER_S)

    def taken(self, answer: Answer) -> None:
        """It is written, or is not wanted any more. Safe to call again."""
        if answer in self._answers:
            self._answers.remove(answer)
            self._due_ns.pop(answer, None)
            answer.peer.untaken -= answer.size
            self.untaken -= answer.size

    def answers(self, peer: Peer, size: int, context: grpc.aio.ServicerContext) -> None:
        """An RPC's only answer is sent now, and it is taken when grpc has ended the RPC."""
        answer = self.holds(peer, size)
        self.sends(answer)
        context.add_done_callback(partial(self._rpc_ended, answer))

    def _rpc_ended(self, answer: Answer, _: object) -> None:
        self.taken(answer)

    # ---------------------------------------------------------------------------------- ends

    async def look_after(self) -> None:
        """End what holds too much, or for too long, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self.look()
            except Exception as error:  # a bug must not end what bounds this process
                fault = {"message": "gRPC's connections were not looked at", "exception": error}
                asyncio.get_running_loop().call_exception_handler(fault)
                await asyncio.sleep(_AFTER_FAULT_S)

    async def look(self) -> None:
        """One look of `look_after`."""
        now = now_ns()
        late = {each.peer for each, due_ns in self._due_ns.items() if due_ns <= now}
        if late:
            self._end(late)
        if now < self._again_ns or self._memory() <= self._most_memory:
            return
        await asyncio.to_thread(self._give_back)
        used = self._memory()
        if used > self._most_memory:
            self._end_largest(used - int(_BELOW * self._most_memory))
            self._again_ns = now_ns() + _AGAIN_NS

    def _end_largest(self, excess: int) -> None:
        """End those connections that hold most, as many as hold `excess` bytes together."""
        with self._connected(self.port) as found:
            held = sorted(((self._held(each), each) for each in found), key=_first, reverse=True)
            for size, each in held:
                if excess <= 0 or size < _WORTH_BYTES:
                    return
                self._say("the gateway has more memory than --max-memory")
                excess -= size
                self._part(self._peers.get(each.peer))
                each.end()

    def _held(self, connection: Connection) -> int:
        peer = self._peers.get(connection.peer)
        if peer is None:
            return connection.received
        return max(0, connection.received - peer.received) + peer.untaken

    def _end(self, peers: set[Peer] | list[Peer]) -> None:
        names = {each.name for each in peers}
        for peer in peers:
            self._part(peer)
        with self._connected(self.port) as found:
            for each in found:
                if each.peer in names:
                    each.end()

    def _say(self, why: str) -> None:
        now = now_ns()
        if now >= self._said_ns + _SAID_EVERY_NS:
            self._said_ns = now
            self._announce(f"{why}: the gRPC connections that hold most are ended")

    def _part(self, peer: Peer | None) -> None:
        """Its connection ends: what it holds is held no more."""
        if peer is not None:
            peer.ended = True
            self._peers.pop(peer.name, None)
            for answer in [each for each in self._answers if each.peer is peer]:
                self.taken(answer)

    def _forget_the_gone(self) -> None:
        with self._connected(self.port) as found:
            there = {each.peer for each in found}
        self._peers = {name: each for name, each in self._peers.items() if name in there}


def _untaken(peer: Peer) -> int:
    return peer.untaken


def _first(pair: tuple[int, Connection]) -> int:
    return pair[0]
