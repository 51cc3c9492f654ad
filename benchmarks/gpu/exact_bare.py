"""Rows that talk to the worker alone, as a controller that decides nothing: the profile, and start lateness.

So the planned start of every action is known exactly, and nothing but the worker is measured.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from exact_rig import Rig, RowFailed, check, percentile, scaled, spread

from slosched.clock import now_ns
from slosched.config import GpuProfile, ModelProfile
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    ControllerToWorker,
    ErrorResult,
    EvictWeights,
    GpuStats,
    Heartbeat,
    HeartbeatAck,
    Infer,
    InferResult,
    LoadModel,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    WorkerRefused,
    WorkerWelcome,
)
from slosched.transport.bundles import ResultBundle
from slosched.transport.codec import decode_from_worker, encode
from slosched.transport.sockets import Dealer
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

FOREVER_NS = 2**62
_CONNECT_S = 15.0
_ANSWER_S = 20.0
_LOAD_S = 120.0
_MAX_BATCH = 16
#: An action is sent this long before its planned start.
_AHEAD_NS = 3 * NS_PER_MS
#: Only actions that the worker had so long before their planned start count.
_LEAST_AHEAD_NS = NS_PER_MS
_BUSY = 0.85
_MOST_OUTSTANDING = 64
LATENESS_COPIES = 4


class BareController:
    """A DEALER that speaks the worker's messages, answers its heartbeats, and decides nothing."""

    def __init__(self, port: int) -> None:
        self.dealer = Dealer(f"127.0.0.1:{port}")
        self.session = -1
        self.clock_offsets_ns: list[int] = []  # what the worker holds our clock to be off by
        self.gpu_stats: list[GpuStats] = []
        self._next_action = 0

    def __enter__(self) -> BareController:
        return self

    def __exit__(self, *error: object) -> None:
        self.dealer.close()

    def send(self, message: ControllerToWorker) -> None:
        give_up_ns = now_ns() + round(_CONNECT_S * NS_PER_S)
        frames = [encode(message)]
        while not self.dealer.send(frames):
            if now_ns() > give_up_ns:
                raise RowFailed("the worker takes no messages")
            time.sleep(0.01)

    def drain(self) -> list[Any]:
        """What waits, without the heartbeats, which are answered."""
        found: list[Any] = []
        for frames in self.dealer.receive():
            message = decode_from_worker(frames[0])
            if isinstance(message, Heartbeat):
                received_ns = now_ns()
                self.send(HeartbeatAck(message.sent_ns, received_ns, now_ns()))
                self.clock_offsets_ns.append(message.clock_offset_ns)
                self.gpu_stats += message.gpus
            elif isinstance(message, ResultBundle):
                found += message.results
            else:
                found.append(message)
        return found

    def await_all(self, number: int, within_s: float) -> list[Any]:
        """The next `number` messages. Raises RowFailed if they do not come in time."""
        found: list[Any] = []
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while len(found) < number:
            got = self.drain()
            found += got
            if not got:
                if now_ns() > give_up_ns:
                    raise RowFailed(
                        f"{len(found)} of {number} answers came from the worker in {within_s:g} s"
                    )
                time.sleep(0.0002)
        return found

    def hello(self, answer_s: float = _ANSWER_S) -> WorkerWelcome:
        """Open a session; a worker whose last controller left a moment ago refuses at first."""
        give_up_ns = now_ns() + round(_CONNECT_S * NS_PER_S)
        while True:
            self.send(ControllerHello(PROTOCOL_VERSION, now_ns() & 0x7FFFFFFF, times_lost=0))
            for message in self.await_all(1, answer_s):
                if isinstance(message, WorkerWelcome):
                    self.session = message.session
                    return message
                if not isinstance(message, WorkerRefused) or now_ns() > give_up_ns:
                    raise RowFailed(f"the worker opened no session: {message}")
            time.sleep(0.3)

    def ask(self, message: ControllerToWorker, within_s: float) -> Any:
        """Send, and return the one answer. Raises RowFailed for an error."""
        self.send(message)
        (answer,) = self.await_all(1, within_s)
        if isinstance(answer, ErrorResult):
            raise RowFailed(f"{type(message).__name__}: code {answer.code}, {answer.reason}")
        return answer

    def action_id(self) -> int:
        self._next_action += 1
        return self._next_action

    def load(self, name: str, copies: int) -> tuple[LoadModelResult, list[LoadWeightsResult]]:
        """Prepare `copies` instances and load them all onto GPU 0."""
        message = LoadModel(
            self.session,
            self.action_id(),
            name=name,
            model_id=0,
            copies=copies,
            max_batch=_MAX_BATCH,
            max_exec_ns=NS_PER_S,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
        prepared = self.ask(message, _LOAD_S)
        if not isinstance(prepared, LoadModelResult):
            raise RowFailed(f"the worker answered LoadModel with {prepared}")
        loads = [
            self.ask(
                LoadWeights(
                    self.session,
                    self.action_id(),
                    model_id=i,
                    gpu_id=0,
                    earliest_ns=0,
                    latest_ns=FOREVER_NS,
                    expected_duration_ns=0,
                ),
                _ANSWER_S,
            )
            for i in range(copies)
        ]
        return prepared, loads

    def reload_all(self, copies: int) -> list[LoadWeightsResult]:
        """Evict the first `copies` instances, then load them all, one behind the other. Raises RowFailed."""
        window = {"gpu_id": 0, "earliest_ns": 0, "latest_ns": FOREVER_NS}
        for i in range(copies):
            self.send(EvictWeights(self.session, self.action_id(), model_id=i, **window))
        self.await_all(copies, _ANSWER_S)
        for i in range(copies):
            self.send(
                LoadWeights(
                    self.session, self.action_id(), model_id=i, expected_duration_ns=0, **window
                )
            )
        results = self.await_all(copies, _ANSWER_S)
        wrong = [result for result in results if not isinstance(result, LoadWeightsResult)]
        if wrong:
            raise RowFailed(f"a load of weights gave {wrong[0]}")
        return results

    def infer(self, model_id: int, batch: int, earliest_ns: int = 0) -> int:
        """Send an inference without inputs; return its action id."""
        action_id = self.action_id()
        self.send(
            Infer(
                self.session,
                action_id,
                model_id=model_id,
                gpu_id=0,
                earliest_ns=earliest_ns,
                latest_ns=FOREVER_NS,
                expected_duration_ns=0,
                batch_size=batch,
                request_count=batch,
                input_sizes=(),
            )
        )
        return action_id


# -------------------------------------------------------------------------------------- profile


def profile(rig: Rig) -> dict[str, Any]:
    """Row "profile": what the worker measured of the model, and each batch size alone and back to back."""
    name, settings = rig.settings.model, rig.settings
    alone, queued, loads = {}, {}, []
    with BareController(rig.worker_port()) as bare:
        welcome = bare.hello()
        prepared, loaded = bare.load(name, 2)
        loads = [result.span.duration_ns for result in loaded]
        for batch in prepared.batch_sizes:
            if batch > _MAX_BATCH:
                continue
            number = settings.number(100, least=10)
            single = [_infer_once(bare, batch) for _ in range(number)]
            alone[batch] = spread([result.exec.duration_ns for result in single])
            for _ in range(number):
                bare.infer(0, batch)
            row = [_inferred(message) for message in bare.await_all(number, _ANSWER_S)]
            ends = sorted(result.exec.end_ns for result in row)
            # The first of the row started while the others were still on their way.
            queued[batch] = (ends[-1] - ends[4]) / (len(ends) - 5)
    gpu = welcome.gpus[0]
    measured = ModelProfile(
        name=name,
        exec_ns=dict(zip(prepared.batch_sizes, prepared.exec_ns, strict=True)),
        weights_ns=prepared.weights_ns,
        weights_bytes=prepared.weights_bytes,
        input_shape=tuple(prepared.input_shape),
        input_dtype=prepared.input_dtype,
        output_shape=tuple(prepared.output_shape),
        output_dtype=prepared.output_dtype,
    )
    found = GpuProfile("this-run", {name: measured}, gpu.pages * gpu.page_bytes, gpu.page_bytes)
    b1 = measured.exec_ns[1]
    return {
        "figures": {
            "profile": asdict(found),
            "gpu": gpu.name,
            "worker_device": welcome.device,
            "exec_alone_ns": alone,
            "back_to_back_ns": queued,
            "loads_ns": loads,
            "pages_per_model": prepared.pages,
        },
        "checks": [
            check(f"exec of batch 1, {name}", b1 / NS_PER_MS, "ms"),
            check("load of its weights", measured.weights_ns / NS_PER_MS, "ms"),
        ],
    }


def _infer_once(bare: BareController, batch: int) -> InferResult:
    bare.infer(0, batch)
    return _inferred(bare.await_all(1, _ANSWER_S)[0])


def _inferred(message: Any) -> InferResult:
    if not isinstance(message, InferResult):
        raise RowFailed(f"an inference gave {message}")
    return message


# ------------------------------------------------------------------------------------- lateness


@dataclass(frozen=True)
class Started:
    """One action: when it should start, and the worker's result."""

    earliest_ns: int
    result: InferResult


def lateness(rig: Rig) -> dict[str, Any]:
    """Row "lateness": how late 10,000 planned inferences of batch 1 to 8 start on a GPU that is 85 % busy."""
    count = rig.settings.number(10_000, least=50)
    with BareController(rig.worker_port()) as bare:
        bare.hello()
        prepared, _ = bare.load(rig.settings.model, LATENESS_COPIES)
        return planned_starts(bare, prepared, count)


def planned_starts(bare: BareController, prepared: LoadModelResult, count: int) -> dict[str, Any]:
    """How late `count` inferences of the first LATENESS_COPIES instances start."""
    exec_ns = dict(zip(prepared.batch_sizes, prepared.exec_ns, strict=True))
    started, errors, begin_ns = _offer(bare, exec_ns, count)
    end_ns = now_ns()
    judged = judge_starts(started, errors, least=count)
    judged["figures"]["clock_offsets_ns"] = spread(bare.clock_offsets_ns)
    judged["figures"]["gpu"] = gpu_meanwhile(bare.gpu_stats)
    return judged | {"window_ns": [begin_ns, end_ns]}


def gpu_meanwhile(stats: Sequence[GpuStats]) -> dict[str, Any]:
    """What the driver said of the GPU while the row ran; {} where the worker does not ask it."""
    if not stats:
        return {}
    names = ("sm_clock_mhz", "memory_clock_mhz", "power_mw", "temperature_c", "sm_percent")
    found: dict[str, Any] = {name: spread([getattr(s, name) for s in stats]) for name in names}
    return found | {"throttle_reasons": sorted({s.throttle_reasons for s in stats})}


def _offer(
    bare: BareController, exec_ns: dict[int, int], count: int
) -> tuple[list[Started], int, int]:
    """Send until `count` that count have run, or for long enough; return what ran, failures, and the begin."""
    chance = random.Random(5)
    batches = [batch for batch in exec_ns if batch <= 8]
    plan: dict[int, int] = {}
    started: list[Started] = []
    errors = counted = 0
    begin_ns = now_ns()
    next_ns = begin_ns + 10 * NS_PER_MS
    longest_s = sum(exec_ns[batch] for batch in batches) / len(batches) / _BUSY * count / NS_PER_S
    give_up_ns = begin_ns + round((2 * longest_s + 10) * NS_PER_S)
    while counted < count:
        now = now_ns()
        if now > give_up_ns:
            break  # what there is is judged, and how much of it counts is said
        while next_ns - _AHEAD_NS <= now and len(plan) < min(_MOST_OUTSTANDING, count - counted):
            next_ns = max(next_ns, now + _AHEAD_NS - NS_PER_MS)
            batch = chance.choice(batches)
            plan[bare.infer(chance.randrange(LATENESS_COPIES), batch, next_ns)] = next_ns
            next_ns += round(exec_ns[batch] / _BUSY)
        got = bare.drain()
        for message in got:
            earliest_ns = plan.pop(getattr(message, "action_id", -1), None)
            if isinstance(message, InferResult) and earliest_ns is not None:
                started.append(Started(earliest_ns, message))
                counted += earliest_ns - message.received_ns >= _LEAST_AHEAD_NS
            elif isinstance(message, ErrorResult):
                errors += 1
        if not got:
            time.sleep(0.0001)
    return started, errors, begin_ns


def judge_starts(started: Sequence[Started], errors: int, *, least: int) -> dict[str, Any]:
    """Lateness of each start against max(planned, noticed end of the action before). Raises RowFailed."""
    if not started:
        raise RowFailed(f"no inference ran; {errors} failed")
    ordered = sorted(started, key=lambda each: each.result.exec.begin_ns)
    late, device_late, before_ns, short = [], [], 0, 0
    for each in ordered:
        result = each.result
        due_ns = max(each.earliest_ns, before_ns)
        before_ns = result.exec.end_ns
        if each.earliest_ns - result.received_ns < _LEAST_AHEAD_NS:
            short += 1
            continue
        late.append(result.exec.begin_ns - due_ns)
        # The device does not read our clock: its start is the time at which its end was noticed, less its
        # duration. So the time it took to notice counts as lateness.
        device_late.append(result.exec.end_ns - result.exec.duration_ns - due_ns)
    first, last = ordered[0].result.exec.begin_ns, ordered[-1].result.exec.end_ns
    busy = sum(each.result.exec.duration_ns for each in ordered) / max(1, last - first)
    waits = np.diff([each.result.exec.end_ns for each in ordered])
    p50, p99 = (scaled(percentile(late, percent), NS_PER_US) for percent in (50, 99))
    return {
        "figures": {
            "late_ns": spread(late),
            "device_late_ns": spread(device_late),
            "ran": len(started),
            "failed": errors,
            "planned_less_than_1_ms_ahead": short,
            "gpu_busy": busy,
            "between_ends_ns": spread(waits),
        },
        "checks": [
            check("start lateness of Infer, host, p50", p50, "us", "< 5"),
            check("start lateness of Infer, host, p99", p99, "us", "< 50"),
            check(
                "start lateness of Infer, host, greatest",
                scaled(percentile(late, 100), NS_PER_US),
                "us",
            ),
            check(
                "device-side start (end noticed less exec), p50",
                scaled(percentile(device_late, 50), NS_PER_US),
                "us",
            ),
            check(
                "device-side start (end noticed less exec), p99",
                scaled(percentile(device_late, 99), NS_PER_US),
                "us",
            ),
            check("actions that were planned 1 ms ahead", float(len(late)), "", f">= {least}"),
            check("GPU busy meanwhile", 100 * busy, "%"),
        ],
    }
