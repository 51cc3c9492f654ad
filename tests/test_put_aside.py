"""A process that ends is started again; a model that ended it twice is put aside, and the others go on."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crashing_worker import HOWS
from made_messages import a_welcome
from scheduler_rig import Rig
from slosched import connect
from slosched.cli.status_text import status_text
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.config import MOST_PUT_ASIDE, PUT_ASIDE_CHARS, WorkerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.validation import reasons_of
from slosched.daemon.blackbox import (
    ENDED,
    MOST_NAMES,
    NAME_BYTES,
    READY,
    STARTING,
    VARIABLE,
    AtWork,
    Blackbox,
    NoBlackbox,
)
from slosched.daemon.blame import Blame, can_be_mended, culprit, was_told_to_end
from slosched.daemon.status import status_report
from slosched.daemon.supervisor import child_argv, run_workers, supervise
from slosched.errors import AddressInUse, InvalidConfig, RequestFailed
from slosched.experiment.children import Child, Children
from slosched.messages import (
    ErrorResult,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
)
from slosched.transport.sockets import Router
from slosched.units import NS_PER_S
from worker_rig import BareController, VirtualWorker

EMULATED = WorkerConfig(device="emulated", port=0, bind="127.0.0.1", profile="zoo61")
BAD, GOOD = "resnet18", "resnet50"
REASON = (
    "it ended its worker 2 times (signal 11 (Segmentation fault)); fix it and restart the worker"
)


# ----------------------------------------------------------------------------------- blackbox


def test_the_page_says_who_was_at_work_also_when_the_writer_is_gone() -> None:
    box = Blackbox.create()
    try:
        assert box.read() == AtWork(STARTING)
        child = (
            "import os; from slosched.daemon.blackbox import Blackbox, READY\n"
            "box = Blackbox.inherited(); box.state(READY)\n"
            "box.preparing('first'); box.launching(box.index('second')); box.running(box.index('third'))\n"
            "assert not os.get_inheritable(box.fd); os._exit(3)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", child],
            pass_fds=[box.fd],
            env={**os.environ, VARIABLE: str(box.fd)},
            timeout=30,
        )
        assert ended.returncode == 3
        assert box.read() == AtWork(READY, "first", "second", "third")
    finally:
        box.close()
        box.close()


def test_what_is_written_replaces_what_was_there_and_names_are_bounded() -> None:
    box = Blackbox.create()
    try:
        first = box.index("m0")
        assert box.index("m0") == first != 0
        box.launching(first)
        box.running(first)
        box.idle()
        box.preparing("m0")
        box.preparing("")
        assert box.read() == AtWork(STARTING)
        assert box.index("x" * NAME_BYTES) == 0
        longest = "x" * (NAME_BYTES - 1)
        box.running(box.index(longest))
        assert box.read().running == longest
        numbers = [box.index(f"m{i}") for i in range(MOST_NAMES + 10)]
        assert numbers[-10:] == [0] * 10 and max(numbers) == MOST_NAMES
        box.running(MOST_NAMES)
        assert box.read().running.startswith("m")
        box._slots[3] = 2**32 - 1  # memory that the child's end has damaged
        assert box.read().running == ""
    finally:
        box.close()


def test_without_a_supervisor_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in (None, "", "x", "987654"):
        if given is not None:
            monkeypatch.setenv(VARIABLE, given)
        box = Blackbox.inherited()
        assert type(box) is NoBlackbox and VARIABLE not in os.environ
        box.state(READY)
        box.preparing("m")
        box.launching(box.index("m"))
        box.running(1)
        box.idle()


# -------------------------------------------------------------------------------------- blame


@pytest.mark.parametrize(
    ("code", "work", "starved", "who"),
    [
        (-11, AtWork(READY, "p", "l", "r"), False, "l"),
        (9, AtWork(READY, "p", "", "r"), False, "r"),
        (-6, AtWork(READY, "", "", "r"), False, "r"),
        (9, AtWork(READY, "p"), False, "p"),
        (-11, AtWork(READY, "p", "", "r"), False, "p"),
        (-11, AtWork(READY, "", "", "r"), False, ""),  # a device's fault ends no process so
        (70, AtWork(READY, "", "l", "l"), False, "l"),
        (0, AtWork(READY, "", "l"), False, "l"),  # os._exit(0)
        (0, AtWork(ENDED, "", "l"), False, ""),
        (-15, AtWork(READY, "", "l"), False, ""),
        (-9, AtWork(READY, "", "l"), False, ""),
        (-9, AtWork(READY, "", "l"), True, "l"),
        (-9, AtWork(READY), True, ""),
        (-11, AtWork(READY), False, ""),
    ],
)
def test_who_is_to_blame(code: int, work: AtWork, starved: bool, who: str) -> None:
    assert culprit(code, work, out_of_memory=starved) == who


def test_what_is_not_started_again() -> None:
    assert was_told_to_end(0, AtWork(ENDED)) and not was_told_to_end(0, AtWork(READY))
    for code in (2, 3, 4):
        assert not can_be_mended(code, AtWork(STARTING), ever_ready=False)
        assert can_be_mended(code, AtWork(READY), ever_ready=False)  # a model's sys.exit
        assert can_be_mended(
            code, AtWork(STARTING), ever_ready=True
        )  # a port that is free again soon
    assert can_be_mended(9, AtWork(STARTING), ever_ready=False)


def test_a_model_is_put_aside_at_its_second_end_and_their_number_is_bounded() -> None:
    blame = Blame()
    assert blame.note(BAD, -11) and blame.put_aside() == ()
    assert blame.note(BAD, -11) and blame.put_aside() == ((BAD, REASON),)
    for i in range(MOST_PUT_ASIDE):
        for _ in range(2):
            blame.note(f"m{i}", 3)
    assert len(blame.put_aside()) == MOST_PUT_ASIDE
    assert not blame.note("one more", 3)
    assert all(len(reason) <= PUT_ASIDE_CHARS for _, reason in blame.put_aside())


# --------------------------------------------------------------------------- worker and controller


def test_a_worker_does_not_offer_what_was_put_aside_and_says_why() -> None:
    worker = VirtualWorker(put_aside=(("other", "it crashed"),))
    welcome = worker.hello()
    assert welcome.put_aside == (("other", "it crashed"),) and welcome.loadable == ("net",)
    worker.load_model("other")
    assert worker.error() == (Code.PROCESS_ENDED, "put aside: it crashed")
    worker.load_model("net")
    assert not isinstance(worker.answer(), ErrorResult)


def test_what_a_worker_says_of_it_is_bounded_and_fit_for_a_terminal() -> None:
    said = tuple((f"m{i}\x1b[2J", "x\n" * 10_000) for i in range(1000))
    kept = reasons_of(
        a_welcome(5, (), version="v", host="h", device="d", loadable=(), put_aside=said).put_aside
    )
    assert len(kept) == MOST_PUT_ASIDE
    assert all(k.isprintable() and v.isprintable() and len(v) <= 300 for k, v in kept.items())


def test_a_client_that_asks_for_it_reads_why() -> None:
    rig, (model,) = Rig.ready(workers=2)
    aside = (("net", "it ended its worker 2 times (signal 11); fix it and restart the worker"),)

    def back(worker_id: int, session: int, put_aside: tuple[tuple[str, str], ...] = ()) -> None:
        rig.join(worker_id, session=session, put_aside=put_aside)

    back(0, 60, aside)
    asked = rig.infer(model, slo_ms=500)  # worker 1 serves it still
    rig.step()
    assert not rig.answered(asked) and rig.scheduler.cluster.put_aside == {}
    back(1, 61, aside)
    words = f"put aside on worker 0: {aside[0][1]}"
    asked = rig.infer(model, slo_ms=500)
    rig.step()
    assert (rig.reply(asked).code, rig.reply(asked).reason) == (Code.PROCESS_ENDED, words)
    rig.handle(FromClient(b"c", LoadModelRequest(99, "net", 1)))
    rig.step()
    (reply,) = [r for r in rig.to_client(LoadModelReply) if r.request_id == 99]
    assert reply.code == Code.PROCESS_ENDED and reply.reason.startswith(
        "cannot load 'net': put aside on"
    )
    report = status_report(rig.scheduler, now_ns=rig.now_ns)
    assert [w["put_aside"] for w in report["workers"]] == [dict(aside)] * 2
    rig.handle(FromClient(b"c", LoadModelRequest(100, "nets", 1)))
    rig.step()
    (reply,) = [r for r in rig.to_client(LoadModelReply) if r.request_id == 100]
    assert reply.code == Code.UNKNOWN_MODEL
    back(1, 62)  # started anew: it offers everything again
    rig.prepared(1)
    rig.weights_loaded(1)
    assert rig.scheduler.cluster.put_aside == {}
    asked = rig.infer(model, slo_ms=500)
    rig.step()
    assert not rig.answered(asked)


# ---------------------------------------------------------------------------------- processes


class Supervised:
    """`supervise` in a thread, over workers of which one model ends its process."""

    def __init__(self, where: str, how: str, *, gpus: int = 1) -> None:
        self.lines: list[str] = []
        self.codes: list[int] = []
        self._stop = threading.Event()

        def argv(config: WorkerConfig) -> list[str]:
            program = str(Path(__file__).parent / "crashing_worker.py")
            return [sys.executable, program, msgspec.json.encode(config).decode(), BAD, where, how]

        def run() -> None:
            configs = [EMULATED] * gpus
            self.codes.append(supervise(configs, argv, announce=self.lines.append, stop=self._stop))

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def wait_for(self, words: str, *, times: int = 1, within_s: float = 60.0) -> str:
        give_up_ns = now_ns() + round(within_s * NS_PER_S)
        while now_ns() < give_up_ns:
            found = [line for line in self.lines if words in line]
            if len(found) >= times:
                return found[times - 1]
            time.sleep(0.02)
        raise AssertionError(f"{words!r} is not there {times} times: {self.lines}")

    def port(self, *, life: int = 1) -> int:
        """The port of the worker that was ready as number `life`."""
        ready = self.wait_for("slosched worker ready on ", times=life)
        return int(ready.partition(" ready on ")[2].partition(": ")[0].rpartition(":")[2])


def ends_the_worker(port: int, incarnation: int, where: str) -> int:
    """Prepare the bad model and, unless that is its end, run it. Returns the worker's pid."""
    controller = BareController(port)
    try:
        pid = controller.hello(incarnation).pid
        if where == "prepare":
            controller.send(load_message(controller))
        else:
            controller.load(BAD)
            controller.send(controller.infer_message(1))
        give_up_ns = now_ns() + 30 * NS_PER_S
        while alive(pid):
            assert now_ns() < give_up_ns, "the worker goes on"
            controller._take()
            time.sleep(0.01)
        return pid
    finally:
        controller.close()


def load_message(controller: BareController) -> LoadModel:
    return LoadModel(
        controller.session,
        controller.action_id(),
        name=BAD,
        model_id=0,
        copies=1,
        max_batch=8,
        max_exec_ns=NS_PER_S,
        earliest_ns=0,
        latest_ns=2**62,
    )


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("where", "how"),
    [*[("launch", how) for how in HOWS], ("device", "lost"), ("prepare", "abort")],
)
def test_a_model_that_ends_its_worker_twice_is_put_aside(where: str, how: str) -> None:
    with Supervised(where, how) as supervised:
        port = supervised.port()
        first = ends_the_worker(port, 7, where)
        assert f"while the model {BAD!r} was at work (1 of at most 2 times)" in supervised.wait_for(
            "starts again at once"
        )
        assert supervised.port(life=2) == port
        assert ends_the_worker(port, 8, where) != first
        assert "it is put aside" in supervised.wait_for("starts again at once", times=2)
        assert supervised.port(life=3) == port
        controller = BareController(port)
        try:
            welcome = controller.hello(9)
            assert [name for name, _ in welcome.put_aside] == [BAD]
            assert BAD not in welcome.loadable and GOOD in welcome.loadable
            refused = controller.ask(load_message(controller))
            assert isinstance(refused, ErrorResult) and refused.code == Code.PROCESS_ENDED
            assert refused.reason.startswith("put aside: it ended its worker 2 times (")
            controller.load(GOOD)
        finally:
            controller.close()
    assert supervised.codes == [0]
    assert not any("Traceback" in line for line in supervised.lines), supervised.lines


@pytest.mark.processes
def test_under_a_controller_the_others_are_served_and_status_says_it(tmp_path: Path) -> None:
    with Supervised("launch", "segv") as supervised, Children() as children:
        port = supervised.port()
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
        asyncio.run(crash_it_twice_and_be_served(address, supervised, controller))


async def crash_it_twice_and_be_served(
    address: str, supervised: Supervised, controller: Child
) -> None:
    async with connect(address) as client:
        (good,) = await client.load(GOOD)
        (bad,) = await client.load(BAD)

        async def code_of(model: Any) -> int:
            try:
                await client.infer(model, slo=2.0)
            except RequestFailed as error:
                return error.code
            return 0

        async def served() -> None:
            """Prepared again by the controller alone: no client asks for a load."""
            give_up_ns = now_ns() + 60 * NS_PER_S
            while await code_of(good):
                assert now_ns() < give_up_ns, controller.log.read_text()
                await asyncio.sleep(0.05)

        await served()
        give_up_ns = now_ns() + 120 * NS_PER_S
        while not any("it is put aside" in line for line in supervised.lines):
            assert now_ns() < give_up_ns, supervised.lines
            assert await code_of(bad) != 0
            await served()
        await served()
        report = await client.status()
        assert report["workers"][0]["put_aside"] == {BAD: REASON}
        assert f"worker 0 put {BAD} aside: {REASON}" in status_text(address, report)
        with pytest.raises(
            RequestFailed, match="put aside on worker 0: it ended its worker 2 times"
        ):
            await client.infer(bad, slo=2.0)
        with pytest.raises(
            RequestFailed, match=r"put aside on worker 0: it ended its .*\(signal 11"
        ):
            await client.load(BAD)
        assert [await code_of(good) for _ in range(20)] == [0] * 20


# ------------------------------------------------------------------------------ one GPU alone


def alone(argv: list[str], lines: list[str], **config: Any) -> int:
    return supervise(
        [replace(EMULATED, **config)],
        lambda _: argv,
        announce=lines.append,
        alone=True,
    )


@pytest.mark.processes
def test_one_worker_speaks_as_without_a_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    lines: list[str] = []
    codes: list[int] = []
    stop = threading.Event()

    def argv(config: WorkerConfig) -> list[str]:
        assert config.device == "auto" and config.gpus == 1
        return child_argv(replace(config, device="emulated"))

    def run() -> None:
        config = WorkerConfig(port=0, bind="127.0.0.1")
        codes.append(run_workers(config, argv, announce=lines.append, stop=stop))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        give_up_ns = now_ns() + 60 * NS_PER_S
        while not lines:
            assert now_ns() < give_up_ns
            time.sleep(0.01)
        assert lines[0].startswith("slosched worker ready on 127.0.0.1:")
        assert ":0: " not in lines[0]
    finally:
        stop.set()
        thread.join(30)
    assert codes == [0] and len(lines) == 1, lines


@pytest.mark.processes
def test_one_worker_that_cannot_work_is_the_commands_error() -> None:
    lines: list[str] = []
    with pytest.raises(InvalidConfig, match="unknown profile 'none'"):
        alone(child_argv(replace(EMULATED, profile="none")), lines)
    taken = Router("127.0.0.1", 0)
    try:
        with pytest.raises(AddressInUse, match="is in use"):
            alone(child_argv(replace(EMULATED, port=taken.port)), lines)
    finally:
        taken.close()
    assert lines == []


@pytest.mark.processes
def test_a_ctrl_c_on_the_terminal_reaches_the_supervisor_alone() -> None:
    """Which then ends the child in order; the child's group is another one."""
    with Supervised("launch", "segv") as supervised:
        controller = BareController(supervised.port())
        pid = controller.hello().pid
        controller.close()
        assert os.getpgid(pid) != os.getpgid(0)
