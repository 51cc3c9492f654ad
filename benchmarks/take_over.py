"""A controller is killed under load and started again with the same `--cluster-id`: what that costs.

Two emulated workers of two GPUs register with a controller. A client sends 600/s to 12 copies of ResNet-50,
open loop, SLO 100 ms. `--kills` times the controller gets SIGKILL and a new one is started at once. The client
says hello again, loads its models again and goes on, as an application must. Printed for each kill, and in all:

- models that the workers prepared again, and weights that the new controller loaded again (both should be 0);
- requests that were in flight at the kill or were sent before the new controller answered: answered, or named
  lost by the client; none is neither;
- seconds from the kill until requests are in time again: to the send of the first one of 60 in a row of which
  95 % are.

    .venv/bin/python benchmarks/take_over.py [--kills 10] [--rate 600]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from slosched.clock import now_ns
from slosched.codes import ActionType, code_name
from slosched.config import WorkerConfig
from slosched.core.worker.interface import PrepareModel
from slosched.daemon.backends.opening import open_backend
from slosched.daemon.blackbox import NoBlackbox
from slosched.daemon.worker import WorkerServer
from slosched.experiment.children import Child, ChildFailed, Children
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHeartbeat,
    ClientHello,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
    Refused,
    Welcome,
)
from slosched.telemetry.action_log import FILE_NAME, read_action_log
from slosched.transport.bundles import NotTaken, ReplyBundle
from slosched.transport.codec import decode_for_client, encode
from slosched.transport.sockets import Dealer
from slosched.units import NS_PER_MS, NS_PER_S

MODEL, COPIES = "resnet50", 12
SLO_NS = 100 * NS_PER_MS
#: Requests are in time again from the first one on of which this share of that many in a row is.
_ENOUGH, _IN_A_ROW = 0.95, 60
_HELLO_EVERY_NS = 50 * NS_PER_MS
#: A request without an answer for this long is named lost.
_PATIENCE_NS = 2 * NS_PER_S
_STEADY_S, _READY_WITHIN_S = 2.0, 30.0
_WORKERS = 2
_PREPARES = "prepares"


@dataclass
class Sent:
    """One request. `answered_ns` is 0 until its answer; `lost`: the client has given it up."""

    sent_ns: int
    answered_ns: int = 0
    code: int = -1
    lost: bool = False

    @property
    def in_time(self) -> bool:
        return self.code == 0 and self.answered_ns <= self.sent_ns + SLO_NS


@dataclass
class Client:
    """A client in one loop: it greets, loads, sends at `rate` and gives up what a dead controller had."""

    address: str
    rate: float
    sent: dict[int, Sent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._dealer = Dealer(self.address, identity=os.urandom(16))
        self._draw = Random(1)
        self._incarnation = 0
        self._ids: tuple[int, ...] = ()
        self._hello_ns = self._beat_ns = self._heard_ns = 0
        self._due_ns = now_ns()
        self._next_id = 1

    def run(self, seconds: float) -> None:
        """Serve its connection, and send what is due."""
        end_ns = now_ns() + round(seconds * NS_PER_S)
        while (now := now_ns()) < end_ns:
            for message in self._received():
                self._heard_ns = now
                self._take(message, now)
            self._speak(now)
            while self._due_ns <= now:
                self._send_one(now)
                self._due_ns += round(self._draw.expovariate(self.rate) * NS_PER_S)
            time.sleep(0.0003)

    def _received(self) -> Iterator[Any]:
        for frames in self._dealer.receive():
            message = decode_for_client(frames[0])
            yield from message.replies if isinstance(message, ReplyBundle) else (message,)

    def _take(self, message: Any, now: int) -> None:
        if isinstance(message, Welcome) and message.incarnation != self._incarnation:
            self._incarnation, self._ids = message.incarnation, ()
            for each in self.sent.values():  # a new controller knows none of them
                each.lost = each.lost or not each.answered_ns
            self._dealer.send([encode(LoadModelRequest(0, MODEL, COPIES))])
        elif isinstance(message, LoadModelReply):
            if message.code:
                self._dealer.send([encode(LoadModelRequest(0, MODEL, COPIES))])
            self._ids = tuple(model.model_id for model in message.models)
        elif isinstance(message, Refused):  # it has forgotten us, or never knew us
            self._heard_ns = 0
            if message.request_id in self.sent:
                self._answered(message.request_id, message.code, now)
        elif isinstance(message, InferReply):
            self._answered(message.request_id, message.code, now)
        elif isinstance(message, NotTaken):
            for request_id in message.request_ids:
                self._answered(request_id, message.code, now)

    def _answered(self, request_id: int, code: int, now: int) -> None:
        each = self.sent[request_id]
        if not each.lost:
            each.answered_ns, each.code = now, code

    def _speak(self, now: int) -> None:
        if now - self._heard_ns > 4 * _HELLO_EVERY_NS and now >= self._hello_ns:
            self._hello_ns = now + _HELLO_EVERY_NS
            self._dealer.send([encode(ClientHello(PROTOCOL_VERSION, 7, "take-over"))])
        if now >= self._beat_ns:
            self._beat_ns = now + NS_PER_S
            if self._ids:
                self._dealer.send([encode(ClientHeartbeat(now))])

    def _send_one(self, now: int) -> None:
        request_id, self._next_id = self._next_id, self._next_id + 1
        each = self.sent[request_id] = Sent(self._due_ns)
        model_id = self._ids[request_id % len(self._ids)] if self._ids else -1
        request = InferRequest(request_id=request_id, model_id=model_id, slo_ns=SLO_NS)
        each.lost = model_id < 0 or not self._dealer.send([encode(request)])

    def finish(self) -> None:
        """Wait for the last answers; what has none then is lost."""
        rate, self.rate = self.rate, 1e-6
        self._due_ns = now_ns() + 3600 * NS_PER_S
        self.run(_PATIENCE_NS / NS_PER_S)
        for each in self.sent.values():
            each.lost = each.lost or not each.answered_ns
        self.rate = rate
        self._dealer.close()


# ---------------------------------------------------------------------------------- processes


class _Telling:
    """A backend that prints each preparation."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def prepare(self, effect: PrepareModel, *, done: Any) -> None:
        print(f"{_PREPARES} {effect.name} {effect.copies}", flush=True)
        self._backend.prepare(effect, done=done)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def run_worker(address: str, name: str) -> None:
    """The worker's process: as `slosched worker`, and it prints what it prepares."""
    config = WorkerConfig(
        device="emulated", gpus=2, port=0, bind="127.0.0.1", controller=address, name=name
    )
    backend: Any = _Telling(open_backend(config, NoBlackbox()))
    server = WorkerServer(config, announce=lambda line: print(line, flush=True), backend=backend)
    signal.signal(signal.SIGTERM, lambda number, frame: server.request_stop())
    print(server.ready_line, flush=True)
    server.run()


def prepared(workers: list[Child]) -> int:
    """Models that the workers have prepared so far."""
    return sum(worker.log.read_text().count(f"{_PREPARES} ") for worker in workers)


def start_controller(children: Children, directory: Path, life: int, port: int) -> Child:
    arguments = ["controller", "INFER5", "--cluster-id", "take-over", "--bind", "127.0.0.1"]
    arguments += [
        "--port",
        str(port),
        "--http-port",
        "-1",
        "--log-dir",
        str(directory / f"run{life}"),
    ]
    return children.start("controller", arguments, directory / f"controller{life}.log")


def loads(directory: Path, life: int) -> int:
    """Loads of weights in the action log of a controller's life."""
    table = read_action_log(directory / f"run{life}" / FILE_NAME, only=("action_type",))
    return sum(int(kind) == ActionType.LOAD_WEIGHTS for kind in table["action_type"])


# ------------------------------------------------------------------------------------ results


def recovered_s(sent: list[Sent], killed_ns: int) -> float:
    """Seconds from the kill until requests are in time again; -1: they never are."""
    later = [each for each in sent if each.sent_ns >= killed_ns]
    for place, each in enumerate(later):
        if each.in_time and _share(later[place : place + _IN_A_ROW]) >= _ENOUGH:
            return (each.sent_ns - killed_ns) / NS_PER_S
    return -1.0


def _answers(sent: list[Sent]) -> str:
    """How many were answered, and with which codes."""
    codes = Counter(each.code for each in sent if each.answered_ns)
    words = ", ".join(f"{count} {code_name(code)}" for code, count in codes.most_common())
    return f"{sum(codes.values())} answered" + (f" ({words})" if words else "")


def _share(sent: list[Sent]) -> float:
    return sum(each.in_time for each in sent) / len(sent) if sent else 0.0


def settle(client: Client, controller: Child) -> None:
    """Serve until both workers have joined and requests are in time. Raises ChildFailed if that never is."""
    give_up_ns = now_ns() + round(_READY_WITHIN_S * NS_PER_S)
    while True:
        client.run(0.5)
        joined = controller.log.read_text().count(" joined: ")
        latest = [each for each in client.sent.values() if each.sent_ns < now_ns() - SLO_NS]
        share = _share(latest[-_IN_A_ROW:])
        if joined >= _WORKERS and share >= _ENOUGH:
            client.run(_STEADY_S)
            return
        if now_ns() > give_up_ns:
            answers = _answers(latest[-_IN_A_ROW:])
            raise ChildFailed(
                f"{joined} joined, {share:.2f} in time, {answers}: {controller.last_line()}"
            )


def measure(directory: Path, kills: int, rate: float) -> int:
    """Kill and restart; print what was counted. Returns the exit code: 1 if anything was done again."""
    with Children(stop_within_s=5.0) as children:
        controller = start_controller(children, directory, 0, 0)
        port = children.wait_ready(controller, within_s=_READY_WITHIN_S)
        workers = Children(stop_within_s=5.0, command=[sys.executable, __file__])
        with workers:
            address = f"127.0.0.1:{port}"
            mine = [
                workers.start(name, ["--worker", address, name], directory / f"{name}.log")
                for name in ("one", "two")
            ]
            client = Client(address, rate)
            settle(client, controller)
            killed: list[tuple[int, int]] = []
            for life in range(1, kills + 1):
                before = prepared(mine)
                killed.append((now_ns(), before))
                os.kill(controller.process.pid, signal.SIGKILL)
                controller.process.wait(10)
                children.forget(controller)
                controller = start_controller(children, directory, life, port)
                settle(client, controller)
            client.finish()
            again = [count - killed[0][1] for _, count in killed[1:]] + [
                prepared(mine) - killed[0][1]
            ]
        children.end(controller)
    sent = sorted(client.sent.values(), key=lambda each: each.sent_ns)
    neither = sum(not each.answered_ns and not each.lost for each in sent)
    seconds, loaded = [], 0
    print(f"{rate:g}/s, {COPIES} copies of {MODEL}, SLO 100 ms, 2 workers of 2 emulated GPUs")
    for life, (killed_ns, _) in enumerate(killed, 1):
        weights = loads(directory, life)
        loaded += weights
        seconds.append(recovered_s(sent, killed_ns))
        end_ns = killed_ns + round(max(seconds[-1], 0) * NS_PER_S)
        hit = [each for each in sent if killed_ns - SLO_NS <= each.sent_ns < end_ns]
        hit = [each for each in hit if not 0 < each.answered_ns < killed_ns]
        print(
            f"kill {life}: in time again after {seconds[-1]:.2f} s; {len(hit)} requests meanwhile: "
            f"{_answers(hit)}, {sum(each.lost for each in hit)} lost; "
            f"{weights} weights loaded again"
        )
    print(
        f"{kills} kills: {again[-1]} models prepared again, {loaded} weights loaded again, {neither} requests "
        f"neither answered nor lost; in time again after {median(seconds):.2f} s (median; "
        f"{min(seconds):.2f} to {max(seconds):.2f})"
    )
    return int(bool(again[-1] or loaded or neither or min(seconds) < 0))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rate", type=float, default=600.0)
    parser.add_argument("--worker", nargs=2, metavar=("ADDRESS", "NAME"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        run_worker(*given.worker)
        return 0
    if given.kills < 1 or given.rate <= 0:
        parser.error("--kills and --rate must be above 0")
    with tempfile.TemporaryDirectory() as directory:
        return measure(Path(directory), given.kills, given.rate)


if __name__ == "__main__":
    sys.exit(main())
