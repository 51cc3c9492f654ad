"""The blocking client, and the package's public names."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import slosched
from fake_controller import FakeController
from slosched.clients.blocking import Client
from slosched.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidConfig,
    InvalidRequest,
    PeerUnreachable,
    ProtocolMismatch,
    RequestFailed,
)
from slosched.messages import CancelRequest, ClientHello, Goodbye, InferRequest


def test_the_same_calls_without_an_event_loop() -> None:
    with FakeController() as controller:
        with Client(controller.address, name="tester") as client:
            assert client.controller.policy == "FAKE"
            [model] = client.load("toy")
            answer = client.infer(model, np.full((3, 4), 1.5, np.float32), slo="25ms")
            assert answer.output is not None and answer.output.tolist() == [3.0, 3.0]
            assert client.infer(model, slo_factor=4.0).slo_ns == 10_400_000
            assert client.models()[1] == ("toy", "other")
            assert client.status()["policy"] == "FAKE"
            assert client.unload("toy", force=True) == slosched.Unloaded(unloaded=3, kept=0)
        controller.wait_for(Goodbye)
        hello = controller.of(ClientHello)[0]
        assert isinstance(hello, ClientHello) and hello.name == "tester"


def test_errors_reach_the_caller() -> None:
    with FakeController() as controller, Client(controller.address) as client:
        [model] = client.load("toy")
        with pytest.raises(InvalidRequest, match=r"\(3, 4\)"):
            client.infer(model, np.zeros(3, np.float32))
        with pytest.raises(InvalidRequest, match="they offer"):
            client.load("unknown")
        controller.code = 8
        with pytest.raises(DeadlineExceeded) as caught:
            client.infer(model, slo="10ms")
        assert isinstance(caught.value.reply, slosched.Inference)
        assert caught.value.reply.remaining_s == 0.007


def test_nobody_there_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:1"):
        Client("127.0.0.1:1", timeout_s=0.1)
    with pytest.raises(InvalidConfig, match="nonsense"):
        Client("nonsense", timeout_s=0.1)
    with FakeController() as controller:
        controller.protocol = 99
        with pytest.raises(ProtocolMismatch):
            Client(controller.address)
    assert threading.active_count() == before


def test_threads_share_a_client() -> None:
    results: dict[int, list[float]] = {}
    with FakeController() as controller, Client(controller.address) as client:
        [model] = client.load("toy")

        def work(i: int) -> None:
            output = client.infer(model, np.full((3, 4), i, np.float32), slo=10).output
            assert output is not None
            results[i] = output.tolist()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert results == {i: [2.0 * i, 2.0 * i] for i in range(20)}


def test_an_own_timeout_cancels_the_request() -> None:
    with FakeController() as controller, Client(controller.address) as client:
        [model] = client.load("toy")
        controller.hold = True
        with pytest.raises(RequestFailed, match="timeout_s"):
            client.infer(model, slo=10, timeout_s=0.05)
        controller.wait_for(CancelRequest)


def test_closing_fails_what_waits_and_later_calls() -> None:
    with FakeController() as controller:
        client = Client(controller.address)
        [model] = client.load("toy")
        controller.hold = True
        failures: list[BaseException] = []

        def work() -> None:
            try:
                client.infer(model, slo=20)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        controller.wait_for(InferRequest)
        client.close()
        client.close()
        thread.join(10)
        assert len(failures) == 1 and isinstance(failures[0], ConnectionLost)
        with pytest.raises(ConnectionLost, match="closed"):
            client.status()


@pytest.mark.processes
def test_a_program_that_forgets_to_close_still_ends() -> None:
    program = (
        "import sys, slosched\n"
        "client = slosched.Client(sys.argv[1])\n"
        "[model] = client.load('toy')\n"
        "print(client.infer(model, slo=5).ok)\n"
    )
    with FakeController() as controller:
        done = subprocess.run(
            [sys.executable, "-c", program, controller.address],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


@pytest.mark.processes
def test_ctrl_c_interrupts_a_call_and_cancels_its_request() -> None:
    program = (
        "import sys, slosched\n"
        "with slosched.Client(sys.argv[1]) as client:\n"
        "    [model] = client.load('toy')\n"
        "    try:\n"
        "        client.infer(model, slo=60)\n"
        "    except KeyboardInterrupt:\n"
        "        client.status()\n"
        "        print('interrupted')\n"
    )
    with FakeController() as controller:
        controller.hold = True
        with subprocess.Popen(
            [sys.executable, "-c", program, controller.address], stdout=subprocess.PIPE, text=True
        ) as child:
            try:
                controller.wait_for(InferRequest, within_s=20)
                time.sleep(0.1)
                child.send_signal(2)
                output, _ = child.communicate(timeout=20)
            finally:
                child.kill()
        assert (child.returncode, output.strip()) == (0, "interrupted")
        controller.wait_for(CancelRequest)


def test_public_names_resolve() -> None:
    for name in slosched.__all__:
        if name not in ("Controller", "Worker"):  # their rooms are tested where they stand
            assert getattr(slosched, name) is not None
    assert {*slosched.__all__} <= {*dir(slosched)}
    assert {*slosched._PUBLIC} | {"__version__"} == {*slosched.__all__}
    with pytest.raises(AttributeError, match="'slosched' has no attribute 'nonsense'"):
        _ = slosched.nonsense


@pytest.mark.processes
def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, slosched; slosched.errors; slosched.__version__;"
        "heavy = {'asyncio', 'numpy', 'zmq', 'msgspec', 'torch', 'uvloop'} & {*sys.modules};"
        "print(sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"
