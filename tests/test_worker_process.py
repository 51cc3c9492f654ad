"""A worker over real sockets: embedded in this process, and as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from made_messages import an_infer
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.config import EmulationNoise, WorkerConfig
from slosched.core.worker.emulated import MARK_BYTES
from slosched.daemon.backends.emulated import EmulatedBackend
from slosched.daemon.supervisor import child_argv, run_workers, supervise
from slosched.daemon.worker import WorkerServer, run_worker
from slosched.errors import AddressInUse, InvalidConfig, UnknownName
from slosched.messages import (
    ErrorResult,
    GetWorkerState,
    InferResult,
    WorkerRefused,
    WorkerStateResult,
)
from slosched.transport.codec import MAX_MESSAGE_BYTES
from slosched.transport.sockets import Router
from slosched.units import NS_PER_MS, NS_PER_S
from worker_rig import FOREVER_NS, BareController

EMULATED = WorkerConfig(device="emulated", port=0, bind="127.0.0.1")
INPUT = bytes(3 * 224 * 224 * 4)


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def server(lines: list[str]) -> Iterator[WorkerServer]:
    with WorkerServer(replace(EMULATED, gpus=2), announce=lines.append) as server:
        yield server


@pytest.fixture
def controller(server: WorkerServer) -> Iterator[BareController]:
    controller = BareController(server.port)
    yield controller
    controller.close()


def test_the_ready_line(server: WorkerServer) -> None:
    assert server.ready_line == (
        f"slosched worker ready on 127.0.0.1:{server.port}: 2 emulated GPU(s), profile v100, "
        "1376 pages each"
    )


def test_inputs_go_in_and_outputs_come_back(controller: BareController) -> None:
    controller.hello()
    controller.load("resnet50")
    inputs = [bytes([mark]) * len(INPUT) for mark in (5, 6)]
    size = len(INPUT)
    controller.send(controller.infer_message(3, sizes=(size, 0, size)), *inputs)
    result, frames = controller.receive()
    assert isinstance(result, InferResult), result
    assert result.output_sizes == (4000, 0, 4000)
    # Each row begins as its input does.
    marks = [bytes([mark]) * MARK_BYTES for mark in (5, 6)]
    assert [bytes(frame) for frame in frames] == [mark.ljust(4000, b"\0") for mark in marks]
    assert result.exec.duration_ns == 5_600_000
    controller.send(controller.infer_message(2))
    result, frames = controller.receive()
    assert isinstance(result, InferResult) and (result.output_sizes, frames) == ((), [])


def test_back_to_back_on_an_emulated_gpu_means_to_the_nanosecond(
    controller: BareController,
) -> None:
    controller.hello()
    controller.load("resnet50")
    for _ in range(20):
        controller.send(controller.infer_message(1))
    # Spans are on our clock and the estimate of the offset moves, so compare what does not depend on it.
    results = [controller.receive()[0] for _ in range(20)]
    assert [r.action_id for r in results] == sorted(r.action_id for r in results)
    total = results[-1].exec.end_ns - results[0].exec.begin_ns
    assert abs(total - 20 * 2_600_000) < 2 * NS_PER_MS


def test_the_clocks_of_one_machine_agree(controller: BareController) -> None:
    controller.hello()
    give_up_ns = now_ns() + 10 * NS_PER_S
    while len(controller.beats) < 10 and now_ns() < give_up_ns:
        controller.wait_for(controller._take, within_s=0.05)
    last = controller.beats[-1][1]
    # Each process anchors its clock for itself, by its tightest reading: a few microseconds apart.
    assert abs(last.clock_offset_ns) <= last.clock_error_ns + 50_000 < 1 * NS_PER_S


def test_what_is_no_message_is_counted_told_once_and_survived(
    controller: BareController, lines: list[str]
) -> None:
    controller.hello()
    state = GetWorkerState(controller.session, 1)
    bad: list[list[bytes]] = [
        [b""],
        [b"garbage"],
        [b"\x92\xa5Hello\x01"],  # an unknown message
        [b"\x94\xa5Infer\x01\x02"],  # truncated
        [os.urandom(1000), b"x", b"y"],
    ]
    for frames in bad:
        controller.send_frames(frames)
    controller.send(state, b"a tensor that does not belong here")
    assert isinstance(controller.ask(state), WorkerStateResult)
    seen = len(controller.beats)
    give_up_ns = now_ns() + 10 * NS_PER_S
    while now_ns() < give_up_ns and not controller.beats[seen:]:
        controller.wait_for(controller._take, within_s=0.05)
    assert controller.beats[-1][1].dropped == len(bad) + 1
    assert sum("further ones are counted" in line for line in lines) == 1


def test_an_oversized_message_is_refused_and_survived(controller: BareController) -> None:
    controller.hello()
    half = bytes(MAX_MESSAGE_BYTES // 2 + 1)
    message = an_infer(
        controller.session,
        1,
        latest_ns=FOREVER_NS,
        batch_size=2,
        request_count=2,
        input_sizes=(len(half), len(half)),
    )
    controller.send(message, half, half)
    state = controller.ask(GetWorkerState(controller.session, 2))
    assert isinstance(state, WorkerStateResult) and state.action_id == 2


def test_a_second_controller_is_told_why_not(
    server: WorkerServer, controller: BareController
) -> None:
    controller.hello()
    second = BareController(server.port)
    try:
        with pytest.raises(AssertionError, match="another controller"):
            second.hello(incarnation=8)
    finally:
        second.close()
    with pytest.raises(AssertionError, match=WorkerRefused.__name__):
        controller.hello(incarnation=9)


def test_a_taken_port(lines: list[str]) -> None:
    taken = Router("127.0.0.1", 0)
    try:
        with pytest.raises(AddressInUse, match=str(taken.port)):
            run_worker(replace(EMULATED, port=taken.port), announce=lines.append)
    finally:
        taken.close()
    assert lines == []


def test_a_config_that_cannot_work() -> None:
    with pytest.raises(UnknownName, match="v1"):
        WorkerServer(replace(EMULATED, profile="v1"))
    with pytest.raises(InvalidConfig, match="unknown device 'tpu'"):
        WorkerServer(replace(EMULATED, device="tpu"))
    with pytest.raises(InvalidConfig, match="cannot listen"):
        WorkerServer(replace(EMULATED, bind="256.0.0.1"))


def test_run_worker_in_a_thread_ends_with_its_event(lines: list[str]) -> None:
    stop = threading.Event()
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(run_worker(EMULATED, announce=lines.append, stop=stop))
    )
    thread.start()
    stop.set()
    thread.join(10)
    assert codes == [0] and "ready" in lines[0]


def test_a_server_that_never_ran_can_be_stopped_twice() -> None:
    server = WorkerServer(EMULATED)
    server.stop()
    server.stop()
    with pytest.raises(RuntimeError):
        server.run()


def start(config: WorkerConfig, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A worker process, once it is ready, and its port."""
    with log.open("wb") as file:
        process = subprocess.Popen(child_argv(config), stdout=file, stderr=subprocess.STDOUT)
    give_up_ns = now_ns() + 30 * NS_PER_S
    while now_ns() < give_up_ns:
        text = log.read_text()
        if "ready on" in text and text.endswith("\n"):
            return process, int(text.split("127.0.0.1:")[1].split(":")[0])
        assert process.poll() is None, text
        time.sleep(0.02)
    process.kill()
    raise AssertionError("the worker was not ready in time")


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals, tmp_path: Path) -> None:
    process, port = start(EMULATED, tmp_path / "log")
    controller = BareController(port)
    try:
        controller.hello()
        controller.load("resnet50")
        for _ in range(40):  # 16 ms each: at the signal one runs, the others wait
            controller.send(controller.infer_message(16 // 2))
        controller.receive()
        process.send_signal(number)
        answers = [controller.receive()[0] for _ in range(39)]
        codes = [answer.code for answer in answers if isinstance(answer, ErrorResult)]
        assert Code.CANCELLED in codes and set(codes) <= {Code.CANCELLED, Code.SHUTTING_DOWN}
        assert process.wait(10) == 0
    finally:
        controller.close()
        process.kill()
        process.wait(10)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.processes
def test_a_taken_port_ends_a_child_with_words(tmp_path: Path) -> None:
    taken = Router("127.0.0.1", 0)
    try:
        ended = subprocess.run(
            child_argv(replace(EMULATED, port=taken.port)), capture_output=True, timeout=30
        )
    finally:
        taken.close()
    assert ended.returncode == AddressInUse.exit_code
    assert b"is in use" in ended.stdout and b"Traceback" not in ended.stderr


@pytest.mark.processes
def test_the_supervisor_reports_a_death_goes_on_and_ends_everybody() -> None:
    lines: list[str] = []
    stop = threading.Event()
    codes: list[int] = []
    configs = [replace(EMULATED, gpus=i + 1) for i in range(3)]
    thread = threading.Thread(
        target=lambda: codes.append(supervise(configs, announce=lines.append, stop=stop))
    )
    thread.start()

    def wait_for(words: str) -> str:
        give_up_ns = now_ns() + 30 * NS_PER_S
        while now_ns() < give_up_ns:
            for line in lines:
                if words in line:
                    return line
            time.sleep(0.02)
        raise AssertionError(f"{words!r} is not in {lines}")

    try:
        ports = [int(p) for p in wait_for("3 of 3 workers ready").split("ports ")[1].split(", ")]
        pids = []
        for port in ports:
            controller = BareController(port)
            pids.append(controller.hello().pid)
            controller.close()
        os.kill(pids[1], signal.SIGKILL)  # as an operator may: no model is to blame
        assert str(ports[1]) in wait_for("signal 9")
        assert "starts again at once" in wait_for("signal 9")
        controller = BareController(ports[1])
        again = controller.hello(incarnation=7)
        assert again.pid != pids[1] and len(again.gpus) == 2 and again.put_aside == ()
        controller.close()
        os.kill(pids[0], signal.SIGTERM)  # told to end, it stays away
        assert "exit code 0; 2 of 3 go on" in wait_for("exit code 0")
        pids.append(again.pid)
        controller = BareController(ports[2])
        assert len(controller.hello(incarnation=7).gpus) == 3
        controller.close()
    finally:
        begin_ns = now_ns()
        stop.set()
        thread.join(20)
    assert codes == [0] and now_ns() - begin_ns < 10 * NS_PER_S
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.processes
def test_a_supervisor_whose_children_all_die_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    configs = [replace(EMULATED, profile="none"), replace(EMULATED, profile="none")]
    assert supervise(configs, announce=lines.append) == 1
    assert sum("exit code 2" in line for line in lines) == 2
    assert any("unknown profile 'none'" in line for line in lines)


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(InvalidConfig, match="3 GPUs were asked for and 2 found"):
        run_workers(WorkerConfig(gpus=3), announce=print)


def test_emulated_workers_of_one_config_are_disturbed_apart() -> None:
    """One noise seed: the same draws at the same port, others at another port and on another GPU."""

    def draws(port: int, gpu: int = 0) -> list[int]:
        noise = EmulationNoise(seed=3, exec_sigma=0.1)
        config = WorkerConfig(device="emulated", gpus=2, port=port, noise=noise)
        generator = EmulatedBackend(config).devices[gpu]._random
        return [generator.next_u64() for _ in range(8)]

    assert draws(12345) == draws(12345)
    assert len({tuple(d) for d in (draws(12345), draws(12346), draws(12345, gpu=1))}) == 3
