"""Child processes: ended in order, ended by the kernel, and what their ready line says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slosched.child_processes import (
    computing_threads,
    end,
    environment,
    on_signals,
    ready_port,
    start,
)

_STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
_PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import os, signal, time; from slosched.child_processes import end_with_parent;"
    "end_with_parent(signal.SIGKILL); print(os.getpid(), flush=True); time.sleep(60)"])
time.sleep(60)
"""


def started(code: str) -> subprocess.Popen[bytes]:
    return start([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=None)


def test_a_child_that_listens_ends_when_it_is_asked() -> None:
    process = started("import time; print('up', flush=True); time.sleep(60)")
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert os.getsid(process.pid) == process.pid, "a session of its own"
    assert end(process, within_s=10) and process.returncode == -signal.SIGTERM
    assert end(process, within_s=10), "it has ended"
    process.stdout.close()


def test_a_child_that_does_not_listen_is_killed() -> None:
    process = started(_STUBBORN)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert not end(process, within_s=0.2) and process.returncode == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a service of Linux's kernel")
def test_the_kernel_ends_a_child_whose_parent_was_killed() -> None:
    parent = started(_PARENT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    while alive(child):
        time.sleep(0.01)  # the suite's timeout ends this


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_signals_call_in_the_block_alone() -> None:
    heard: list[int] = []
    before = signal.getsignal(signal.SIGUSR1)
    with on_signals((signal.SIGUSR1,), heard.append):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0)
    assert heard == [signal.SIGUSR1] and signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("slosched worker ready on 0.0.0.0:12345: 6 emulated GPU(s)", 12345),
        ("noise\nslosched controller ready on [::1]:7: INFER5, 1 worker\nmore", 7),
        ("a model prints: slosched worker ready on 0.0.0.0:1: x", None),
        ("slosched: 2 of 2 workers ready on ports 1, 2", None),
        ("", None),
    ],
)
def test_the_port_of_a_ready_line(text: str, port: int | None) -> None:
    assert ready_port(text) == port


def test_an_environment_is_as_it_was_behind_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), environment(computing_threads(2)):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        process = started(f"import os; print([os.environ[name] for name in {names!r}])")
        assert process.stdout is not None
        with process.stdout as output:
            assert output.read() == b"['2', '2', '2']\n"
        process.wait(10)
        raise ZeroDivisionError
    assert dict(os.environ) == before
