"""A GPU that does not answer any more: everything is answered, the process ends clearly, a new one begins."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

import slosched.daemon.worker
from losing_worker import WHY, LosingBackend
from made_messages import an_infer
from slosched import connect
from slosched.cli.app import app
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.config import WorkerConfig
from slosched.core.worker.interface import ModelPrepared, OpDone
from slosched.daemon.blackbox import NoBlackbox
from slosched.daemon.supervisor import RestartRule, supervise
from slosched.daemon.worker import WorkerServer, run_worker
from slosched.errors import DeviceLost, RequestFailed
from slosched.experiment.children import Children
from slosched.messages import NO_SPAN, ErrorResult, GpuStats, LoadModel
from slosched.units import NS_PER_MS, NS_PER_S
from worker_rig import FOREVER_NS, BareController, VirtualWorker

EMULATED = WorkerConfig(device="emulated", port=0, bind="127.0.0.1")


# -------------------------------------------------------------------------------------- brain


def test_everything_is_answered_once_what_runs_what_waits_and_what_still_comes() -> None:
    worker = VirtualWorker(prepares=False)
    worker.hello()
    worker.load_model("net")
    prepared = worker.effects[-1].action_id  # type: ignore[union-attr]
    worker = VirtualWorker().serving()
    worker.prepares = False
    worker.infer()  # runs
    worker.infer()  # waits for it
    worker.infer(earliest=worker.now + NS_PER_S)  # is not due
    worker.load_weights(model_id=1)  # runs
    worker.load_weights(model_id=1)
    worker.load_model("other", 7)  # is being prepared
    worker.load_model("other", 8)
    assert worker.brain.pending == 7
    worker.answers()
    assert worker.brain.devices_lost("cuda:0 is lost", now_ns=worker.now) == 7
    worker.stepper.step(worker.now)
    failed = worker.answers()
    assert len({answer.action_id for answer in failed if isinstance(answer, ErrorResult)}) == 7
    assert {(a.code, a.reason) for a in failed if isinstance(a, ErrorResult)} == {
        (Code.PROCESS_ENDED, "cuda:0 is lost")
    }
    # What the devices or the preparation say later changes nothing, and nothing is begun any more.
    worker.stepper.handle(OpDone(1, NO_SPAN), now_ns=worker.now)
    worker.stepper.handle(ModelPrepared(prepared, None, NO_SPAN), now_ns=worker.now)
    began = len(worker.effects)
    worker.now += NS_PER_S
    worker.stepper.step(worker.now)
    assert len(worker.effects) == began
    worker.infer()
    assert worker.error() == (Code.PROCESS_ENDED, "cuda:0 is lost")


# --------------------------------------------------------------------------------------- loop


@pytest.fixture
def losing() -> Iterator[tuple[WorkerServer, LosingBackend, list[str]]]:
    lines: list[str] = []
    backend = LosingBackend(EMULATED)
    server = WorkerServer(EMULATED, announce=lines.append, backend=backend)
    yield server, backend, lines
    server.stop()


def test_the_loop_answers_says_it_and_ends_without_waiting(
    losing: tuple[WorkerServer, LosingBackend, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slosched.daemon.worker._DRAIN_NS", 60 * NS_PER_S)
    server, backend, lines = losing
    raised: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except DeviceLost as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    controller = BareController(server.port)
    try:
        controller.hello()
        controller.load("resnet50")
        for _ in range(5):  # one runs, four wait
            controller.send(controller.infer_message(8))
        later = FOREVER_NS - 1
        controller.send(
            an_infer(
                controller.session, controller.action_id(), earliest_ns=later, latest_ns=FOREVER_NS
            )
        )
        while server._brain.pending < 6:
            time.sleep(0.001)
            controller._take()
        began_ns = now_ns()
        backend.lose()
        answers = [controller.receive(within_s=30)[0] for _ in range(6)]
        thread.join(50)
        took_ns = now_ns() - began_ns
    finally:
        controller.close()
        thread.join(5)
    failed = [a for a in answers if isinstance(a, ErrorResult)]
    assert len(failed) >= 5, "the first may have ended before"
    assert {a.code for a in failed} == {Code.PROCESS_ENDED}
    assert {a.reason for a in failed} == {f"emulated is lost: {WHY}"}
    assert took_ns < 45 * NS_PER_S, "a drain would wait for what never ends"
    assert len(raised) == 1 and WHY in str(raised[0]) and server.lost == WHY
    assert sum("is lost" in line for line in lines) == 1


def test_a_loss_during_the_drain_ends_the_drain(
    losing: tuple[WorkerServer, LosingBackend, list[str]],
) -> None:
    server, backend, _ = losing
    server.start()
    controller = BareController(server.port)
    try:
        controller.hello()
        controller.load("resnet50")
        controller.send(controller.infer_message(8))
        while not server._brain.pending:
            time.sleep(0.001)
        server.request_stop()
        backend.lose()
        server.stop()
    finally:
        controller.close()
    assert server.lost == WHY


def test_a_call_that_raises_on_a_dead_device_is_no_traceback(
    losing: tuple[WorkerServer, LosingBackend, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, backend, _ = losing

    def prepare(*_: object, **__: object) -> None:
        backend.lose()
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(backend, "prepare", prepare)
    server.start()
    controller = BareController(server.port)
    try:
        controller.hello()
        load = LoadModel(
            controller.session,
            controller.action_id(),
            name="resnet50",
            model_id=0,
            copies=1,
            max_batch=8,
            max_exec_ns=NS_PER_S,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
        answer = controller.ask(load)
    finally:
        controller.close()
    assert isinstance(answer, ErrorResult) and answer.code == Code.PROCESS_ENDED
    assert WHY in answer.reason and server.lost == WHY


def test_statistics_of_a_backend_reach_the_controller() -> None:
    class Telling(LosingBackend):
        told: tuple[GpuStats, ...] = ()

        def gpu_stats(self) -> tuple[GpuStats, ...]:
            return self.told

    backend = Telling(EMULATED)
    with WorkerServer(EMULATED, backend=backend) as server:
        controller = BareController(server.port)
        try:
            controller.hello()
            backend.told = (GpuStats(power_mw=76_000),)

            def told() -> bool:
                controller._take()
                return any(beat.gpus == backend.told for _, beat in controller.beats)

            give_up_ns = now_ns() + 5 * NS_PER_S
            while not told():
                assert now_ns() < give_up_ns, controller.beats
                time.sleep(0.001)
        finally:
            controller.close()


def test_the_command_says_it_in_one_line_and_exits_with_8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost_at_once(config: WorkerConfig, blackbox: NoBlackbox) -> LosingBackend:
        return LosingBackend(config, execs=0)

    monkeypatch.setattr(slosched.daemon.worker, "open_backend", lost_at_once)
    monkeypatch.setattr(slosched.daemon.worker, "finish_sending", lambda within_ms: None)
    with pytest.raises(DeviceLost, match="719"):
        run_worker(EMULATED, announce=lambda line: None)
    result = CliRunner().invoke(
        app, ["worker", "--device", "emulated", "--port", "0", "--bind", "127.0.0.1"]
    )
    assert result.exit_code == DeviceLost.exit_code == 9
    errors = [line for line in result.stderr.splitlines() if "error" in line.split(WHY)[0]]
    assert len(errors) == 1 and WHY in errors[0]


# --------------------------------------------------------------------------------- supervisor


def test_restarts_come_after_doubling_pauses_and_end() -> None:
    rule = RestartRule()
    restarts: list[int] = []
    pauses = [rule.pause_ns(restarts, i * NS_PER_S) for i in range(9)]
    seconds = [0, 1, 2, 4, 8, 15, 15, 15]
    assert pauses == [s * NS_PER_S for s in seconds] + [None], "the first at once"
    assert rule.pause_ns(restarts, 599 * NS_PER_S) is None
    assert rule.pause_ns(restarts, 600 * NS_PER_S) == 15 * NS_PER_S, "the first is long ago"
    assert rule.pause_ns(restarts, 3000 * NS_PER_S) == 0


class Supervised:
    """`supervise` in a thread, over workers that lose their device in `lives` lives."""

    def __init__(self, directory: Path, rule: RestartRule, *, lives: int, execs: int) -> None:
        self.lines: list[str] = []
        self.codes: list[int] = []
        self._stop = threading.Event()
        lost_file = directory / "lost"

        def argv(config: WorkerConfig) -> list[str]:
            program = str(Path(__file__).parent / "losing_worker.py")
            text = msgspec.json.encode(config).decode()
            return [sys.executable, program, text, str(lost_file), str(lives), str(execs)]

        def run() -> None:
            self.codes.append(
                supervise(
                    [EMULATED], argv, announce=self.lines.append, stop=self._stop, restarts=rule
                )
            )

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def wait_for(self, words: str, *, within_s: float = 30.0) -> str:
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while now_ns() < give_up_ns:
            for line in self.lines:
                if words in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{words!r} is not in {self.lines}")

    def end(self, *, stop: bool) -> None:
        if stop:
            self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.mark.processes
def test_the_supervisor_gives_up_in_the_end(tmp_path: Path) -> None:
    rule = RestartRule(first_pause_ns=10 * NS_PER_MS, at_most=2)
    supervised = Supervised(tmp_path, rule, lives=100, execs=0)
    supervised.end(stop=False)
    text = "\n".join(supervised.lines)
    assert supervised.codes == [1]
    assert text.count(f"error: emulated is lost ({WHY})") == 3
    assert "starts again at once (1 of at most 2 times in 600s)" in text
    assert "starts again in 10ms (2 of at most 2 times in 600s)" in text
    assert "ended with exit code 9 (it lost its device (emulated is lost" in text
    assert "; it was started again 2 times in 600s); 0 of 1 go on" in text
    assert "Traceback" not in text


@pytest.mark.processes
def test_under_load_every_request_is_answered_and_the_new_process_serves(tmp_path: Path) -> None:
    rule = RestartRule()
    supervised = Supervised(tmp_path, rule, lives=1, execs=60)
    try:
        ready = supervised.wait_for("slosched: 1 of 1 workers ready on ports")
        port = int(ready.rpartition(" ")[2])
        with Children() as children:
            controller = children.start(
                "controller",
                [
                    "controller",
                    "INFER5",
                    "--workers",
                    f"127.0.0.1:{port}",
                    "--bind",
                    "127.0.0.1",
                    "--port",
                    "0",
                    "--log-dir",
                    str(tmp_path / "run"),
                ],
                tmp_path / "c.log",
            )
            address = f"127.0.0.1:{children.wait_ready(controller, within_s=30)}"
            codes = asyncio.run(load_until_it_is_back(address))
            log = controller.log.read_text()
    finally:
        supervised.end(stop=True)
    text = "\n".join(supervised.lines)
    assert f"{WHY}); this process cannot mend that, a new one may) and starts again at once" in text
    assert supervised.codes == [0] and "Traceback" not in text + log
    before = codes[: codes.index(next(c for c in codes if c != 0))]
    assert len(before) > 20 and codes[-20:] == [0] * 20, codes
    assert "back after 1 loss(es)" in log


async def load_until_it_is_back(address: str) -> list[int]:
    """A request each 10 ms until many in a row were served after a loss; the codes of all answers."""
    async with connect(address) as client:
        (model,) = await client.load("resnet50_v2")

        async def one() -> int:
            try:
                await client.infer(model, slo="100ms")
            except RequestFailed as error:
                return error.code
            return 0

        tasks: list[asyncio.Task[int]] = []
        give_up = time.monotonic() + 40
        while time.monotonic() < give_up:
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(0.01)
            done = [task.result() for task in tasks[-60:] if task.done()]
            lost = any(task.done() and task.result() != 0 for task in tasks)
            if lost and len(done) > 40 and not any(done):
                break
        return list(await asyncio.wait_for(asyncio.gather(*tasks), 20))


READY = "print('slosched worker ready on 127.0.0.1:1: here', flush=True)"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("program", "how"),
    [
        (f"import os, signal; {READY}; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        (f"import os; {READY}; os.abort()", "signal 6"),
        (f"import os; {READY}; os._exit(3)", "exit code 3"),
        (f"{READY}; raise ValueError('a bug')", "exit code 1"),
    ],
)
def test_a_worker_that_ended_by_itself_in_whatever_way_is_started_again(
    program: str, how: str
) -> None:
    lines: list[str] = []
    rule = RestartRule(first_pause_ns=10 * NS_PER_MS, at_most=2)
    code = supervise(
        [WorkerConfig(device="emulated")],
        lambda config: [sys.executable, "-c", program],
        announce=lines.append,
        restarts=rule,
    )
    text = "\n".join(lines)
    assert code == 1
    assert text.count("ready on 127.0.0.1:1") == 3, text
    assert f"ended with {how}" in text and "starts again in 10ms (2 of at most 2 times" in text


@pytest.mark.processes
def test_one_that_never_was_ready_is_not_started_again() -> None:
    lines: list[str] = []
    code = supervise(
        [WorkerConfig(device="emulated")],
        lambda config: [sys.executable, "-c", "import sys; sys.exit(4)"],
        announce=lines.append,
    )
    assert code == 1 and not any("starts again" in line for line in lines), lines
