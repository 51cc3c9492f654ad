"""A controller for the clients' tests: a thread with a ROUTER that answers by the book, or not at all.

Attributes may be changed while it runs. It keeps what it received in `received`.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

import numpy as np

from slosched.addresses import bracketed
from slosched.clock import Waiter
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHello,
    InferReply,
    InferRequest,
    ListModelsReply,
    ListModelsRequest,
    LoadModelReply,
    LoadModelRequest,
    Message,
    ModelInfo,
    Refused,
    StatusReply,
    StatusRequest,
    UnloadModelReply,
    UnloadModelRequest,
    Welcome,
)
from slosched.transport.bundles import RequestBundle, with_frames
from slosched.transport.codec import Frame, decode_from_client, encode
from slosched.transport.sockets import Router

B1_NS = 2_600_000
DEFAULT_SLO_NS = 100_000_000


def model_info(
    model_id: int, *, shape: tuple[int, ...] = (3, 4), dtype: str = "float32"
) -> ModelInfo:
    return ModelInfo(
        model_id=model_id,
        name="toy",
        copy=model_id,
        batch_sizes=(1, 2, 4),
        b1_ns=B1_NS,
        weights_ns=8_000_000,
        weights_bytes=1000,
        input_shape=shape,
        input_dtype=dtype,
        output_shape=(2,),
        output_dtype="float32",
        random_weights=True,
        gpus_resident=0,
        clients=0,
        labels=(),
    )


class FakeController:
    """Loads any name but "unknown", doubles the first two inputs' elements, answers at once."""

    def __init__(self, port: int = 0, *, host: str = "127.0.0.1") -> None:
        self._router = Router(host, port)
        self.port = self._router.port
        self.address = f"{bracketed(host)}:{self.port}"
        self.incarnation = 7
        self.received: list[Message] = []
        self.deaf = False  # hears nothing, answers nothing
        self.hold = False  # takes inferences, does not answer them
        self.default_slo_ns = 0  # said in the Welcome; 0 as a controller that does not say it
        self.code = 0  # of inferences
        self.reason = ""
        self.load_code = 0
        self.unload_code = 0
        self.kept = 0  # of the three instances that a client unloads
        self.answer_after_ns = 0
        self.exec_ns = 2_600_000
        self.protocol = PROTOCOL_VERSION
        self.greeted: set[bytes] = set()
        self.confuse = False  # answers a status with something else
        self.garbage = b""  # sent in front of each answer
        self.shape: tuple[int, ...] = (3, 4)
        self._due: list[tuple[int, bytes, list[Frame]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeController:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(5)
            assert not self._thread.is_alive()

    def of(self, kind: type[Message]) -> list[Message]:
        return [message for message in [*self.received] if isinstance(message, kind)]

    def wait_for(self, kind: type[Message], *, within_s: float = 30.0) -> Message:
        ends = time.monotonic() + within_s
        while time.monotonic() < ends:
            found = self.of(kind)
            if found:
                return found[-1]
            time.sleep(0.005)
        raise AssertionError(f"no {kind.__name__} came within {within_s} s")

    def _run(self) -> None:
        waiter = Waiter(self._router.fileno())
        while not self._stop.is_set():
            if not self.deaf:
                for peer, frames in self._router.receive():
                    self._handle(peer, frames)
                now = time.monotonic_ns()
                for entry in [e for e in self._due if e[0] <= now]:
                    self._due.remove(entry)
                    self._router.send(entry[1], entry[2])
                if self._router.has_input():
                    continue
            waiter.wait(None, at_most_ns=1_000_000 if self._due else 10_000_000)
        waiter.close()
        self._router.close()

    def _handle(self, peer: bytes, frames: list[Frame]) -> None:
        message = decode_from_client(frames[0])
        if isinstance(message, RequestBundle):
            if peer not in self.greeted:
                for request in message.requests:
                    self.received.append(request)
                    self._send(peer, Refused(request.request_id, 6, "say hello first"))
                return
            for request, its in with_frames(message.requests, message.frames, frames[1:]):
                self.received.append(request)
                self._infer(peer, request, its)
            return
        self.received.append(message)
        if isinstance(message, ClientHello):
            self._hello(peer, message)
        elif peer not in self.greeted:
            if hasattr(message, "request_id") and not isinstance(message, CancelRequest):
                self._send(peer, Refused(message.request_id, 6, "say hello first"))
        elif isinstance(message, InferRequest):
            self._infer(peer, message, frames[1:])
        elif isinstance(message, LoadModelRequest):
            self._load(peer, message)
        elif isinstance(message, UnloadModelRequest):
            self._unload(peer, message)
        elif isinstance(message, ListModelsRequest):
            reply = ListModelsReply(message.request_id, (model_info(0),), ("toy", "other"))
            self._send(peer, reply)
        elif isinstance(message, StatusRequest) and self.confuse:
            self._send(peer, ListModelsReply(message.request_id, (), loadable=()))
        elif isinstance(message, StatusRequest):
            self._send(peer, StatusReply(message.request_id, {"policy": "FAKE", "workers": []}))

    def _hello(self, peer: bytes, message: ClientHello) -> None:
        if message.protocol != self.protocol:
            self._send(peer, Refused(-1, 6, f"this controller speaks protocol {self.protocol}"))
            return
        self.greeted.add(peer)
        self._send(peer, self._welcome())

    def _welcome(self) -> Welcome:
        return Welcome(self.protocol, self.incarnation, "0.0", "FAKE", self.default_slo_ns)

    def _load(self, peer: bytes, message: LoadModelRequest) -> None:
        code, reason, models = self.load_code, self.reason, ()
        if message.name == "unknown":
            code, reason = 10, "no worker offers 'unknown'; they offer: toy"
        infos = tuple(model_info(i, shape=self.shape) for i in range(message.copies))
        self._send(
            peer, LoadModelReply(message.request_id, code, reason, infos if not code else models)
        )

    def _unload(self, peer: bytes, message: UnloadModelRequest) -> None:
        code, reason = self.unload_code, self.reason
        if message.name == "unknown":
            code, reason = 10, "no instance of 'unknown' is loaded"
        unloaded, kept = (0, 0) if code else (3 - self.kept, self.kept)
        self._send(peer, UnloadModelReply(message.request_id, code, reason, unloaded, kept))

    def _infer(self, peer: bytes, message: InferRequest, frames: list[Frame]) -> None:
        if self.hold:
            return
        slo_ns = message.slo_ns or round(message.slo_factor * B1_NS) or DEFAULT_SLO_NS
        ran = self.code == 0
        reply = InferReply(
            message.request_id,
            self.code,
            self.reason,
            message.model_id,
            slo_ns,
            3_000_000,
            ran,
            batch_size=1 if ran else 0,
            worker_id=0 if ran else -1,
            gpu_id=0 if ran else -1,
            predicted_start_ns=300_000,
            predicted_exec_ns=2_600_000,
            start_ns=400_000 if ran else -1,
            exec_ns=self.exec_ns if ran else 0,
            attempts=1 if ran else 0,
        )
        answer: list[Frame] = [encode(reply)]
        if frames and ran:
            values = np.frombuffer(frames[0], dtype=np.float32)[:2] * 2
            answer.append(values.tobytes())
        self._send_frames(peer, answer)

    def _send(self, peer: bytes, message: Message) -> None:
        self._send_frames(peer, [encode(message)])

    def _send_frames(self, peer: bytes, frames: list[Frame]) -> None:
        if self.garbage:
            self._router.send(peer, [self.garbage])
        self._due.append((time.monotonic_ns() + self.answer_after_ns, peer, frames))
