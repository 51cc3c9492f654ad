"""Code of others on the CPU: however it ends, prints, forks or hangs, it harms what it was asked for alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slosched.codes import Code
from slosched.config import ModelSource
from slosched.units import NS_PER_S

torch = pytest.importorskip("torch")

from cpu_models import ACTS  # noqa: E402
from cpu_rig import CpuRig  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.processes]

WIDTH = 4
GOOD = np.full((3, WIDTH), 0.5, np.float32)
POISON = np.full((1, WIDTH), 7, np.float32)
BUILT = ("ends_when_built", "hangs_when_built", "ends_when_run")
#: (the code, what the reason says) of an inference that makes the model act.
OUTCOMES = {
    "leaves": (Code.RUNTIME_ERROR, "SystemExit: 3"),
    "exits": (Code.MODEL_PROCESS_ENDED, "exit code 3"),
    "aborts": (Code.MODEL_PROCESS_ENDED, "signal 6"),
    "segfaults": (Code.MODEL_PROCESS_ENDED, "signal 11"),
    "kills": (Code.MODEL_PROCESS_ENDED, "signal 9"),
    "stops": (Code.MODEL_PROCESS_ENDED, "in which one EXEC did not end"),
    "leaves_others": (Code.MODEL_PROCESS_ENDED, "exit code 5"),
    "forks": (0, ""),
    "floods": (0, ""),
    "scribbles": (Code.MODEL_PROCESS_ENDED, "sent nonsense"),
    "sleeps": (0, ""),
    "hangs": (Code.MODEL_PROCESS_ENDED, "in which one EXEC did not end"),
    "no_memory": (Code.RUNTIME_ERROR, "MemoryError"),
    "interrupts": (Code.RUNTIME_ERROR, "KeyboardInterrupt"),
    "long_words": (Code.RUNTIME_ERROR, "ValueError: zzz"),
    "no_words": (Code.RUNTIME_ERROR, "_SaysNothing"),
    "kills_parent": (Code.MODEL_PROCESS_ENDED, "the process that started it ended"),
    "recurses": (Code.RUNTIME_ERROR, "RecursionError"),
}


def source(name: str) -> ModelSource:
    return ModelSource(name, factory=f"cpu_models:{name}", input_shape=(WIDTH,))


@pytest.fixture(scope="module")
def rig() -> Iterator[CpuRig]:
    names = (*ACTS, *BUILT)
    same = ModelSource("same", factory="torch.nn:Identity", input_shape=(WIDTH,))
    other = ModelSource("other", factory="torch.nn:Identity", input_shape=(WIDTH,))
    gone = ModelSource("gone", factory="sys:exit", input_shape=(WIDTH,))
    with CpuRig([*map(source, names), same, other, gone], silent_ns=6 * NS_PER_S) as rig:
        assert rig.prepare("same").code == 0
        assert rig.load("same", 99).code == 0
        yield rig


def others_are_served(rig: CpuRig) -> None:
    rows = np.random.default_rng(1).random((5, WIDTH), dtype=np.float32)
    done, answers = rig.infer("same", rows, 99)
    if done.code == Code.EXEC_WEIGHTS_MISSING:  # the process of all processes was killed
        rig.wait_served("same", 99)
        done, answers = rig.infer("same", rows, 99)
    assert (done.code, done.reason) == (0, "")
    assert np.array_equal(answers, rows)


@pytest.mark.parametrize("name", ACTS)
def test_what_a_model_does_costs_the_request_that_made_it_do_so(rig: CpuRig, name: str) -> None:
    assert rig.prepare(name).code == 0
    assert rig.load(name).code == 0
    code, words = OUTCOMES[name]
    for life in range(2):  # the model is served again after it
        done, answers = rig.infer(name, GOOD)
        assert (done.code, done.reason) == (0, ""), life
        assert np.array_equal(answers, GOOD * 2)
        rig.lost.clear()
        done, answers = rig.infer(name, POISON)
        assert done.code == code, done.reason
        assert words in done.reason and len(done.reason) < 600
        if not code:
            assert np.array_equal(answers, POISON * 2)
        others_are_served(rig)
        if code == Code.MODEL_PROCESS_ENDED:
            assert any(0 in event.model_ids for event in rig.lost)
            assert any(f"{name}: its process ended (" in line for line in rig.said)
            missing, _ = rig.infer(name, GOOD)
            assert missing.code == Code.EXEC_WEIGHTS_MISSING
            rig.wait_served(name)
        if name == "kills_parent":
            break  # each time costs the imports of a new one
    rig.release(name)


def test_what_a_model_prints_is_bounded_and_safe_to_show(rig: CpuRig) -> None:
    assert rig.prepare("floods").code == 0
    assert rig.load("floods").code == 0
    rig.said.clear()
    for _ in range(2):
        assert rig.infer("floods", POISON)[0].code == 0
    others_are_served(rig)
    rig.release("floods")  # how many lines were dropped is told at the end at the latest
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up and not any("lines were dropped" in each for each in rig.said):
        rig.poll()
    shown = [line for line in rig.said if line.startswith("floods: ")]
    assert shown and len(shown) < 400  # of 400,000
    assert all(len(line) < 500 and line.isprintable() for line in shown)
    assert any("more lines were dropped" in line for line in shown)


def test_a_crash_says_where_it_was(rig: CpuRig) -> None:
    assert rig.prepare("segfaults").code == 0
    assert rig.load("segfaults").code == 0
    rig.said.clear()
    assert rig.infer("segfaults", POISON)[0].code == Code.MODEL_PROCESS_ENDED
    rig.wait_served("segfaults")
    assert any(line.startswith("segfaults: File ") and "cpu_models.py" in line for line in rig.said)
    rig.release("segfaults")


def test_processes_that_a_model_left_behind_end_with_it(rig: CpuRig) -> None:
    assert rig.prepare("leaves_others").code == 0
    assert rig.load("leaves_others").code == 0
    done, _ = rig.infer("leaves_others", POISON)
    assert done.code == Code.MODEL_PROCESS_ENDED
    zygote = rig.backend._processes.nursery.zygote_pid
    rig.wait_served("leaves_others")
    served = len(rig.backend._processes.by_name)
    children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
    assert len(children) == served
    rig.release("leaves_others")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        (
            "ends_when_built",
            Code.MODEL_PROCESS_ENDED,
            "ended while the model was prepared: exit code 4",
        ),
        (
            "ends_when_run",
            Code.MODEL_PROCESS_ENDED,
            "ended while the model was prepared: exit code 6",
        ),
        ("hangs_when_built", Code.MODEL_PROCESS_ENDED, "after 6 s in which it said nothing"),
        ("gone", Code.RUNTIME_ERROR, "wants to end the process"),
    ],
)
def test_a_load_that_fails_says_how_and_the_next_goes_on(
    rig: CpuRig, name: str, code: int, words: str
) -> None:
    for _ in range(2):
        failed = rig.prepare(name, within_s=20)
        assert failed.profile is None and failed.code == code
        assert words in failed.reason, failed.reason
        others_are_served(rig)


def test_nothing_stays_of_a_backend_that_was_closed() -> None:
    with CpuRig([source("exits")]) as rig:
        assert rig.prepare("exits").code == 0
        zygote = rig.backend._processes.nursery.zygote_pid
        children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        assert len(children) == 1
    give_up = time.monotonic() + 30
    pids = [zygote, *map(int, children)]
    while time.monotonic() < give_up and any(map(_alive, pids)):
        time.sleep(0.02)
    assert not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def test_larger_batches_are_measured_beside_what_is_served(rig: CpuRig) -> None:
    smaller = rig.prepare("other", max_batch=2)
    assert smaller.profile is not None and set(smaller.profile.exec_ns) == {1, 2}
    assert rig.load("other").code == 0
    larger = rig.prepare("other", max_batch=8)
    assert larger.profile is not None and set(larger.profile.exec_ns) == {1, 2, 4, 8}
    rows = np.random.default_rng(2).random((7, WIDTH), dtype=np.float32)
    done, answers = rig.infer("other", rows)
    assert done.code == 0 and np.array_equal(answers, rows)
    rig.release("other")
    assert rig.infer("other", rows)[0].code == Code.EXEC_WEIGHTS_MISSING
    assert rig.prepare("other", max_batch=4).profile == larger.profile  # it was not measured again
    assert rig.infer("other", rows)[0].code == Code.EXEC_WEIGHTS_MISSING
    assert rig.load("other").code == 0
    assert np.array_equal(rig.infer("other", rows)[1], rows)
    rig.release("other")


def test_a_worker_on_the_cpu_needs_no_torch_of_its_own() -> None:
    program = (
        "import sys; from slosched.daemon.worker import WorkerServer; from slosched.config import WorkerConfig;"
        "s = WorkerServer(WorkerConfig(device='cpu', port=0, bind='127.0.0.1')); s.stop();"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() in ("[]", "['numpy']"), done.stdout + done.stderr
