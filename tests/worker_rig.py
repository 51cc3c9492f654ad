"""What the worker's tests share: a brain round emulated GPUs in virtual time, and a bare controller."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slosched.clock import now_ns
from slosched.config import EmulationNoise, GpuProfile, ModelProfile
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.emulated import EmulatedGpu, prepare_emulated
from slosched.core.worker.interface import (
    Effect,
    FromController,
    PrepareModel,
    ToController,
)
from slosched.core.worker.lanes import GPU_LANES, LaneSpec
from slosched.core.worker.stepping import Stepper
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    ControllerToWorker,
    ErrorResult,
    GpuInfo,
    Heartbeat,
    HeartbeatAck,
    Infer,
    LoadModel,
    LoadModelResult,
    LoadWeights,
    WorkerToController,
    WorkerWelcome,
)
from slosched.transport.bundles import ResultBundle, with_frames
from slosched.transport.codec import decode_from_worker, encode
from slosched.transport.sockets import Dealer
from slosched.units import NS_PER_MS, NS_PER_S

PEER = b"controller"
FOREVER_NS = 2**62
MS = NS_PER_MS
PAGE = 1_000
EXEC_NS = {1: 2 * MS, 2: 3 * MS, 4: 5 * MS}
WEIGHTS_NS = 8 * MS


def small_profile(*, pages: int = 10, model_pages: int = 3) -> GpuProfile:
    """A GPU of `pages` pages and two models of `model_pages` each; inputs of 12 bytes, outputs of 8."""
    models = {
        name: ModelProfile(
            name=name,
            exec_ns=EXEC_NS,
            weights_ns=WEIGHTS_NS,
            weights_bytes=model_pages * PAGE,
            input_shape=(3,),
            output_shape=(2,),
        )
        for name in ("net", "other")
    }
    return GpuProfile("small", models, weights_cache_bytes=pages * PAGE, page_bytes=PAGE)


@dataclass
class VirtualWorker:
    """A brain and its emulated GPUs in virtual time. `sent` has what went to controllers, in order,
    and `beats` the heartbeats.

    With `prepares` off, a PrepareModel is only recorded; with `deny_input` the worker generates no inputs.
    """

    gpus: int = 1
    profile: GpuProfile = field(default_factory=small_profile)
    noise: EmulationNoise | None = None
    prepares: bool = True
    deny_input: bool = False
    put_aside: tuple[tuple[str, str], ...] = ()
    lanes: Sequence[LaneSpec] = GPU_LANES
    now: int = NS_PER_S
    sent: list[tuple[bytes, WorkerToController]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    beats: list[Heartbeat] = field(default_factory=list)
    session: int = -1
    next_action: int = 0

    def __post_init__(self) -> None:
        profile = self.profile
        infos = [GpuInfo(i, "small", profile.pages, PAGE) for i in range(self.gpus)]
        self.brain = WorkerBrain(
            infos,
            list(profile.models),
            incarnation=100,
            version="test",
            host="here",
            pid=1,
            device="emulated",
            allow_zero_size_inputs=not self.deny_input,
            put_aside=self.put_aside,
            lanes=self.lanes,
        )
        self.devices = {i: EmulatedGpu(profile, self.noise, i) for i in range(self.gpus)}
        self.stepper = Stepper(self.brain, self.devices, self._perform)

    def _perform(self, effect: Effect, now_ns: int) -> None:
        self.effects.append(effect)
        if isinstance(effect, ToController) and isinstance(effect.message, Heartbeat):
            self.beats.append(effect.message)
        elif isinstance(effect, ToController):
            self.sent.append((effect.peer, effect.message))
        elif isinstance(effect, PrepareModel) and self.prepares:
            self.stepper.handle(
                prepare_emulated(self.profile, effect, now_ns=now_ns), now_ns=now_ns
            )

    def give(self, message: ControllerToWorker, *frames: int, peer: bytes = PEER) -> int | None:
        """Hand over a message and do what follows at once. `frames`: bytes behind it."""
        key = self.stepper.handle(FromController(peer, message, frames), now_ns=self.now)
        self.stepper.step(self.now)
        return key

    def run(self, duration_ns: int) -> None:
        """Let time pass."""
        self.now += duration_ns
        self.stepper.run_until(self.now)

    def answers(self) -> Sequence[WorkerToController]:
        """What was sent since the last call, without heartbeats."""
        messages = [message for _, message in self.sent]
        self.sent.clear()
        return messages

    def answer(self) -> Any:
        """The one answer since the last look."""
        answers = self.answers()
        assert len(answers) == 1, answers
        return answers[0]

    def error(self) -> tuple[int, str]:
        answer = self.answer()
        assert isinstance(answer, ErrorResult), answer
        return answer.code, answer.reason

    # ------------------------------------------------------------------------ conversations

    def hello(self, incarnation: int = 7, peer: bytes = PEER) -> WorkerWelcome:
        self.give(ControllerHello(PROTOCOL_VERSION, incarnation, times_lost=0), peer=peer)
        welcome = self.answer()
        assert isinstance(welcome, WorkerWelcome), welcome
        self.session = welcome.session
        return welcome

    def action_id(self) -> int:
        self.next_action += 1
        return self.next_action

    def load_model(
        self, name: str = "net", model_id: int = 0, copies: int = 1, **more: Any
    ) -> int | None:
        fields: dict[str, Any] = {
            "max_batch": 16,
            "max_exec_ns": NS_PER_S,
            "earliest_ns": 0,
            "latest_ns": FOREVER_NS,
        }
        fields.update(more)
        return self.give(
            LoadModel(
                self.session,
                self.action_id(),
                name=name,
                model_id=model_id,
                copies=copies,
                **fields,
            )
        )

    def load_weights(
        self, model_id: int = 0, gpu_id: int = 0, earliest: int = 0, latest: int = FOREVER_NS
    ) -> int | None:
        return self.give(
            LoadWeights(
                self.session,
                self.action_id(),
                model_id=model_id,
                gpu_id=gpu_id,
                earliest_ns=earliest,
                latest_ns=latest,
                expected_duration_ns=0,
            )
        )

    def infer(
        self,
        model_id: int = 0,
        gpu_id: int = 0,
        earliest: int = 0,
        latest: int = FOREVER_NS,
        batch: int = 1,
        count: int | None = None,
        sizes: tuple[int, ...] = (),
        frames: tuple[int, ...] | None = None,
    ) -> int | None:
        message = Infer(
            session=self.session,
            action_id=self.action_id(),
            model_id=model_id,
            gpu_id=gpu_id,
            earliest_ns=earliest,
            latest_ns=latest,
            expected_duration_ns=0,
            batch_size=batch,
            request_count=batch if count is None else count,
            input_sizes=sizes,
        )
        given = tuple(size for size in sizes if size) if frames is None else frames
        return self.give(message, *given)

    def serving(self, *, loaded: bool = True, copies: int = 2) -> VirtualWorker:
        """In session, `copies` instances of "net" known, instance 0 loaded onto GPU 0."""
        self.hello()
        self.load_model(copies=copies)
        assert isinstance(self.answer(), LoadModelResult)
        if loaded:
            self.load_weights()
            self.run(WEIGHTS_NS)
            self.answer()
        return self


class BareController:
    """A DEALER that speaks the worker's messages, answers its heartbeats, and decides nothing."""

    def __init__(self, port: int) -> None:
        self.dealer = Dealer(f"127.0.0.1:{port}")
        self.beats: list[tuple[int, Heartbeat]] = []  # (received, heartbeat)
        self._inbox: list[tuple[Any, list[bytes]]] = []
        self.session = -1
        self.next_action = 0

    def send(self, message: ControllerToWorker, *frames: bytes) -> None:
        self.send_frames([encode(message), *frames])

    def send_frames(self, frames: list[bytes]) -> None:
        give_up_ns = now_ns() + 10 * NS_PER_S
        while not self.dealer.send(frames):
            assert now_ns() < give_up_ns, "the worker cannot be reached"
            time.sleep(0.01)

    def receive(self, *, within_s: float = 20.0) -> tuple[Any, list[bytes]]:
        """The next message other than a heartbeat, and the frames behind it."""
        found = self.wait_for(self._take, within_s=within_s)
        assert found is not None, "no answer within the time"
        return found

    def wait_for(
        self, look: Callable[[], tuple[Any, list[bytes]] | None], *, within_s: float
    ) -> tuple[Any, list[bytes]] | None:
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while now_ns() < give_up_ns:
            found = look()
            if found is not None:
                return found
            time.sleep(0.001)
        return None

    def _take(self) -> tuple[Any, list[bytes]] | None:
        for frames in self.dealer.receive():
            message = decode_from_worker(frames[0])
            if isinstance(message, Heartbeat):
                received_ns = now_ns()
                self.beats.append((received_ns, message))
                self.send(HeartbeatAck(message.sent_ns, received_ns, now_ns()))
            elif isinstance(message, ResultBundle):
                together = with_frames(message.results, message.frames, frames[1:])
                self._inbox += [(each, [bytes(frame) for frame in its]) for each, its in together]
            else:
                self._inbox.append((message, [bytes(frame) for frame in frames[1:]]))
        return self._inbox.pop(0) if self._inbox else None

    def hello(self, incarnation: int = 7) -> WorkerWelcome:
        self.send(ControllerHello(PROTOCOL_VERSION, incarnation, times_lost=0))
        welcome, _ = self.receive()
        assert isinstance(welcome, WorkerWelcome), welcome
        self.session = welcome.session
        return welcome

    def action_id(self) -> int:
        self.next_action += 1
        return self.next_action

    def ask(self, message: ControllerToWorker, *frames: bytes, within_s: float = 20.0) -> Any:
        self.send(message, *frames)
        return self.receive(within_s=within_s)[0]

    def load(self, name: str, model_id: int = 0, *, max_exec_ns: int = NS_PER_S) -> LoadModelResult:
        """Prepare one instance and load it onto GPU 0."""
        result = self.ask(
            LoadModel(
                session=self.session,
                action_id=self.action_id(),
                name=name,
                model_id=model_id,
                copies=1,
                max_batch=8,
                max_exec_ns=max_exec_ns,
                earliest_ns=0,
                latest_ns=FOREVER_NS,
            ),
            within_s=60.0,
        )
        assert isinstance(result, LoadModelResult), result
        self.load_weights(model_id)
        return result

    def load_weights(self, model_id: int = 0) -> Any:
        return self.ask(
            LoadWeights(
                self.session,
                self.action_id(),
                model_id=model_id,
                gpu_id=0,
                earliest_ns=0,
                latest_ns=FOREVER_NS,
                expected_duration_ns=0,
            )
        )

    def infer_message(self, batch: int, *, sizes: tuple[int, ...] = (), model_id: int = 0) -> Infer:
        return Infer(
            session=self.session,
            action_id=self.action_id(),
            model_id=model_id,
            gpu_id=0,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
            expected_duration_ns=0,
            batch_size=batch,
            request_count=batch,
            input_sizes=sizes,
        )

    def close(self) -> None:
        self.dealer.close()
